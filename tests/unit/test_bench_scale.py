"""The stand-ins of the scale benchmark pass the engine's checks."""

import pytest

from pipeline.dag import plan_shards
from pipeline.engine.shard import load, load_inputs, publish, run_stage
from pipeline.store import Store
from tests.bench.scale import _idle, make_sources, replicas, tasks_for


def test_a_sleeping_shard_passes_every_stage(tmp_path):
    store = Store(str(tmp_path))
    known = make_sources(store, 2)
    tasks = tasks_for(8, 4, 0.0)
    jobs = plan_shards(tasks, known, store.record_names(), {})
    assert len(jobs) == 2
    for job in jobs:
        for task in tasks:
            inputs = load_inputs(task.name, job, store, {})
            publish(task, job, run_stage(task.build(None), inputs), store, 0.0)
            assert load(job.records[task.name], store).num_rows == 1
    assert not any(job.todo for job in plan_shards(tasks, known, store.record_names(), {}))


def test_all_replicas_are_shared_out_and_all_stages_are_equally_fast():
    for count in (3, 4, 64, 512):
        held = replicas(count)
        assert sum(held.values()) == count and min(held.values()) >= 1
    paces = [task.config.seconds / task.config.resources.max_replicas
             for task in tasks_for(128, 64, 8.0) if task.name != "download"]  # fmt: skip
    assert paces == pytest.approx([8 / 128] * 3)
    assert sum(task.config.resources.gpus * task.config.resources.max_replicas
               for task in tasks_for(128, 64, 8.0)) == 128  # fmt: skip


def test_idle_is_what_no_sleep_covers():
    assert _idle([(0, 6, 1), (2, 4, 1)], 0, 8, 2) == pytest.approx(0.5)
    assert _idle([(0, 6, 1), (2, 4, 1)], 2, 4, 2) == pytest.approx(0)
