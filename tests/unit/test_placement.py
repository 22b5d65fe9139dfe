"""How stages share a cluster."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import EngineConfig, load, parse
from pipeline.engine.placement import check, check_training, share_out
from stages.base import Resources
from stages.errors import ConfigError

GIB = 1 << 30
MINIMAL = {
    "run": "runs/x",
    "sources": [{"path": "web.parquet"}],
    "human": [{"path": "human", "kind": "human"}],
    "pretrain": {"tokenizer": "bert-base-uncased"},
}


CONFIGS = Path(__file__).parents[2] / "configs"


def stages(*needs: Resources) -> dict[str, Resources]:
    return dict(zip(("caption", "filter", "embed"), needs, strict=False))


def test_cpus_shrink_until_the_first_replicas_fit():
    shares = share_out(stages(*[Resources(cpus=1)] * 3), [{"CPU": 2.0}]).values()
    assert 1.5 < sum(share.cpus * share.min_replicas for share in shares) <= 2.0
    assert len({share.cpus for share in shares}) == 1


def test_cpus_shrink_until_every_replica_finds_one_node():
    # Three of 0.67 would fit two CPUs, but not two nodes of one CPU.
    shares = share_out(stages(*[Resources(cpus=1)] * 3), [{"CPU": 1.0}] * 2)
    assert shares["embed"].cpus <= 0.5
    assert share_out(stages(Resources(cpus=4)), [{"CPU": 2.0}] * 2)["caption"].cpus <= 2.0


def test_cpus_that_suffice_are_left_as_asked():
    shares = share_out(stages(Resources(cpus=1), Resources(cpus=2, max_replicas=4)), [{"CPU": 8}])
    assert [share.cpus for share in shares.values()] == [1.0, 2.0]
    assert [share.max_replicas for share in shares.values()] == [1, 4]


def test_stages_share_one_gpu_by_fractions():
    needs = stages(Resources(gpus=0.5), Resources(gpus=0.25), Resources(gpus=0.25))
    shares = share_out(needs, [{"CPU": 2.0, "GPU": 1.0}])
    assert [share.gpus for share in shares.values()] == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("needs", "nodes"),
    [
        (stages(Resources(gpus=1), Resources(gpus=1)), [{"CPU": 8.0, "GPU": 1.0}]),
        (stages(Resources(gpus=0.6), Resources(gpus=0.6)), [{"CPU": 8.0, "GPU": 1.0}]),
        (stages(*[Resources(gpus=0.6)] * 3), [{"CPU": 8.0, "GPU": 2.0}]),
        (stages(Resources(gpus=2)), [{"CPU": 8.0, "GPU": 1.0}] * 2),
        (stages(Resources(gpus=1)), [{"CPU": 8.0}, {"GPU": 1.0}]),
        (stages(Resources(memory_gb=2)), [{"CPU": 8.0, "memory": 1.0 * GIB}] * 4),
        (stages(Resources(accelerator="H100")), [{"CPU": 8.0, "accelerator_type:L4": 1.0}]),
    ],
)
def test_gpus_and_memory_are_not_shrunk(needs, nodes):
    with pytest.raises(ConfigError, match=r"\.resources: no place for caption .* Ray has"):
        share_out(needs, nodes)


def test_whole_gpus_memory_and_kind_find_their_node():
    node = {"CPU": 2.0, "GPU": 2.0, "memory": 4.0 * GIB, "accelerator_type:H100": 1.0}
    needs = Resources(gpus=2, memory_gb=4, accelerator="H100")
    share = share_out(stages(needs), [{"CPU": 1.0}, node])["caption"]
    assert (share.gpus, share.memory, share.accelerator) == (2, 4 * GIB, "H100")


def test_a_share_of_more_than_one_gpu_is_refused():
    with pytest.raises(ValidationError, match="a share of one GPU"):
        Resources(gpus=1.5)
    with pytest.raises(
        ConfigError, match=r"engine\.train_gpus: 1\.5 is not allowed: a share of one"
    ):
        parse({**MINIMAL, "engine": {"train_gpus": 1.5}}, "x")


def test_what_an_autoscaler_may_add_counts():
    needs = stages(Resources(gpus=4, min_replicas=2))
    assert share_out(needs, [{"CPU": 2.0}], {"CPU": 64, "GPU": 8})["caption"].cpus == 1.0
    with pytest.raises(ConfigError, match=r"need 8 GPUs at once .* Ray grows to 4"):
        share_out(needs, [{"CPU": 2.0}], {"CPU": 64, "GPU": 4})


def test_tenths_of_a_gpu_make_a_whole_one():
    share_out(stages(Resources(gpus=0.1, cpus=0.1, min_replicas=10)), [{"CPU": 2.0, "GPU": 1.0}])


def test_the_kind_of_gpu_that_only_one_stage_needs_is_left_to_it():
    both = [
        {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 1.0},
        {"CPU": 1.0, "GPU": 1.0, "accelerator_type:A100": 1.0},
    ]
    share_out({"caption": Resources(gpus=1), "filter": Resources(gpus=1, accelerator="H100")}, both)


def test_no_cpus_at_all():
    with pytest.raises(ConfigError, match="Ray has no CPUs"):
        share_out(stages(Resources()), [])


def test_no_more_replicas_than_shards():
    share = share_out(stages(Resources(min_replicas=2, max_replicas=8)), [{"CPU": 8.0}])["caption"]
    assert (share.of_at_most(1).min_replicas, share.of_at_most(5).max_replicas) == (1, 5)


def test_a_search_on_gpus_wants_gpus() -> None:
    config = parse(MINIMAL | {"dedup": {"search": {"gpus": 0.5}}}, "test")
    check(config, [{"CPU": 8.0, "GPU": 1.0}])
    for nodes in ([{"CPU": 8.0}], [{"CPU": 8.0}, {"CPU": 0.0, "GPU": 8.0}]):
        with pytest.raises(ConfigError, match=r"dedup\.search\.gpus: .* a CPU and 0\.5 GPUs"):
            check(config, nodes)


@pytest.mark.parametrize("stage", ["dedup", "select", "assemble", "evaluate"])
def test_a_whole_round_wants_its_memory_on_one_node(stage: str) -> None:
    config = parse(MINIMAL | {stage: {"resources": {"memory_gb": 64}}}, "test")
    check(config, [{"CPU": 8.0, "memory": 64.0 * GIB}])
    with pytest.raises(ConfigError, match=rf"{stage}\.resources: no place for {stage} .* 64 GiB"):
        check(config, [{"CPU": 8.0, "memory": 32.0 * GIB}] * 4)


def test_an_evaluation_on_a_gpu_wants_one() -> None:
    config = parse(MINIMAL | {"evaluate": {"resources": {"gpus": 1}}}, "test")
    check(config, [{"CPU": 8.0, "GPU": 1.0}])
    with pytest.raises(ConfigError, match=r"evaluate\.resources: no place for evaluate 1 x 1 GPU"):
        check(config, [{"CPU": 8.0}])


def test_a_worker_group_that_cannot_start_is_refused():
    check_training(EngineConfig(train_workers=2, train_cpus=1), {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"engine.train_cpus: 2 workers need 4 CPUs, Ray has 2"):
        check_training(EngineConfig(train_workers=2, train_cpus=2), {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"engine\.train_gpus"):
        check_training(EngineConfig(train_gpus=1), {"CPU": 2.0})


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ({"train_accelerator": "H100"}, "1 workers of 1 CPUs and 1 GPUs with accelerator H100"),
        ({"train_memory_gb": 32}, "1 workers of 1 CPUs and 1 GPUs, 32 GiB"),
        # Each has a node, but not the same one.
        ({"train_accelerator": "L4", "train_memory_gb": 16}, ".*, 16 GiB with accelerator L4"),
        ({"train_accelerator": "A100", "train_workers": 2}, "2 workers .* with accelerator A100"),
    ],
)
def test_training_wants_its_kind_of_gpu_and_its_memory(engine, told):
    mixed = [
        {"CPU": 8.0, "GPU": 1.0, "memory": 8.0 * GIB, "accelerator_type:L4": 1.0},
        {"CPU": 8.0, "GPU": 1.0, "memory": 16.0 * GIB, "accelerator_type:A100": 1.0},
    ]
    fits = {"train_gpus": 1, "train_accelerator": "A100", "train_memory_gb": 16}
    check(parse({**MINIMAL, "engine": fits}, "x"), mixed)
    has = r"the 2 nodes that Ray has, with 2 GPUs, accelerator_type:A100, accelerator_type:L4, 24.0"
    with pytest.raises(ConfigError, match=rf"engine\.train_workers: {told} do not fit on {has}"):
        check(parse({**MINIMAL, "engine": {"train_gpus": 1, **engine}}, "x"), mixed)
    # What an autoscaler would bring is of a kind and size that cannot be looked at.
    grown = {"train_gpus": 1, **engine, "grows_to": {"CPU": 64, "GPU": 8}}
    check(parse({**MINIMAL, "engine": grown}, "x"), mixed)


def test_a_training_worker_is_no_larger_than_a_node():
    small = [{"CPU": 8.0, "GPU": 1.0}] * 4
    check(parse({**MINIMAL, "engine": {"train_workers": 4, "train_gpus": 1}}, "x"), small)
    with pytest.raises(ConfigError, match=r"2 workers of 1 CPUs and 2 GPUs do not fit on the 4"):
        check(parse({**MINIMAL, "engine": {"train_workers": 2, "train_gpus": 2}}, "x"), small)
    # What an autoscaler would bring cannot be looked at, only its sum.
    engine = {"train_gpus": 2, "train_workers": 4, "grows_to": {"CPU": 64, "GPU": 8}}
    check(parse({**MINIMAL, "engine": engine}, "x"), small)


def test_one_machine_suffices_for_its_config():
    config = load(str(CONFIGS / "one-machine.yaml"))
    check(config, [{"CPU": 8.0, "GPU": 1.0, "memory": 52.0 * GIB}])
    with pytest.raises(ConfigError):
        check(config, [{"CPU": 8.0, "memory": 52.0 * GIB}])
    # Queues turn over in whole batches.
    pretrain, filter_ = config.pretrain, config.finetune.filter
    assert pretrain.model.queue_size % (pretrain.batch_size // pretrain.accumulate) == 0
    assert filter_.queue_size % (filter_.batch_size // filter_.accumulate) == 0


@pytest.mark.parametrize("grown", [{"GPU": 8}, {"CPU": 0, "GPU": 8}])
def test_what_a_cluster_grows_to_names_its_cpus(grown):
    with pytest.raises(ConfigError, match=r"engine\.grows_to: .*name the CPUs too"):
        parse({**MINIMAL, "engine": {"grows_to": grown}}, "x")
