"""How operators share a machine."""

import pytest

from pipeline.config import EngineConfig
from pipeline.dag import ShardTask
from pipeline.engine.placement import check_training, fit
from stages.base import Resources
from stages.caption import CaptionConfig
from stages.errors import ConfigError


def tasks(*needs: Resources) -> list[ShardTask]:
    return [ShardTask("caption", 1, CaptionConfig(resources=need)) for need in needs]


def test_cpus_shrink_until_the_first_replicas_fit():
    shares = fit(tasks(*[Resources(cpus=1)] * 3), {"CPU": 2.0})
    assert sum(share.cpus * share.min_replicas for share in shares) <= 2.0
    assert len({share.cpus for share in shares}) == 1


def test_cpus_that_suffice_are_left_as_asked():
    shares = fit(tasks(Resources(cpus=1), Resources(cpus=2, max_replicas=4)), {"CPU": 8.0})
    assert [share.cpus for share in shares] == [1.0, 2.0]
    assert [share.max_replicas for share in shares] == [1, 4]


def test_gpus_are_not_shrunk():
    with pytest.raises(ConfigError, match=r"need 2 GPUs at once .* Ray has 1"):
        fit(tasks(Resources(gpus=1), Resources(gpus=1)), {"CPU": 8.0, "GPU": 1.0})


def test_no_cpus_at_all():
    with pytest.raises(ConfigError, match="Ray has no CPUs"):
        fit(tasks(Resources()), {})


def test_a_worker_group_that_cannot_start_is_refused():
    check_training(EngineConfig(train_workers=2, train_cpus=1), {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"engine.train_cpus: 2 workers need 4 CPUs, Ray has 2"):
        check_training(EngineConfig(train_workers=2, train_cpus=2), {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"engine\.train_gpus"):
        check_training(EngineConfig(train_gpus=1), {"CPU": 2.0})
