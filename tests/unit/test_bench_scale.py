"""The stand-ins of the scale benchmark pass the engine's checks."""

from pipeline.dag import plan_shards
from pipeline.engine.shard import load, load_inputs, publish, run_stage
from pipeline.store import Store
from tests.bench.scale import make_sources, replicas, tasks_for


def test_a_sleeping_shard_passes_every_stage(tmp_path):
    store = Store(str(tmp_path))
    known = make_sources(store, 2)
    tasks = tasks_for(4, 0.0)
    jobs = plan_shards(tasks, known, store.record_names(), {})
    assert len(jobs) == 2
    for job in jobs:
        for task in tasks:
            inputs = load_inputs(task.name, job, store, {})
            publish(task, job, run_stage(task.build(None), inputs), store, 0.0)
            assert load(job.records[task.name], store).num_rows == 1
    assert not any(job.todo for job in plan_shards(tasks, known, store.record_names(), {}))


def test_every_gpu_has_one_replica():
    for gpus in (3, 4, 64, 512):
        held = replicas(gpus)
        assert sum(held.values()) == gpus and min(held.values()) >= 1
