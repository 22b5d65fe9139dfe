"""One shard through a model stage, without Ray: its batch size is fixed and recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.dag import ShardJob, ShardTask
from pipeline.engine import shard as shards
from pipeline.engine.isolate import merged
from pipeline.records import record_name
from pipeline.store import Store
from stages.caption import CaptionConfig, CaptionStage
from stages.schemas import IMAGES
from tests import tiny_models
from tests.images import image_rows, jpeg
from tests.tables import filled

JOB = ShardJob("000000", {"caption": record_name("caption", 1, "000000", "ab" * 8)}, ("caption",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "captioner"
    return tiny_models.save_blip(tiny_models.captioner_model(), where)


def opened(folder: Path, **fields: object) -> tuple[ShardTask, CaptionStage]:
    task = ShardTask("caption", 1, CaptionConfig(device="cpu", **fields))
    stage = task.build(str(folder))
    stage.setup()
    return task, stage


def test_what_the_first_attempt_found_every_later_one_follows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, table = Store(str(tmp_path)), filled(IMAGES, image_rows([jpeg(0)]))
    store.ensure()
    with monkeypatch.context() as small:
        small.setattr(CaptionStage, "_find_batch_size", lambda s: setattr(s.model, "batch_size", 3))
        task, first = opened(folder, batch_size="auto")
    assert first.choices() == {"batch_size": 3}
    shards.settle(first, task, JOB, store)
    _, retry = opened(folder, batch_size="auto")
    shards.settle(retry, task, JOB, store)
    for stage in (first, retry):
        stage.process(table)
        assert stage.facts()["batch_size"] == "3"
    # The next shard of the same worker has what its own machine takes.
    shards.settle(retry, task, ShardJob("000001", JOB.records, JOB.todo), store)
    retry.process(table)
    assert retry.facts()["batch_size"] == "16"


def test_a_size_from_the_config_needs_no_plan(folder: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.ensure()
    task, stage = opened(folder, batch_size=5)
    shards.settle(stage, task, JOB, store)
    assert stage.model.batch_size == 5
    assert not list(tmp_path.rglob("plan.json"))


def test_the_record_says_which_sizes_were_used(folder: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.ensure()
    task, stage = opened(folder, batch_size=4)
    table = filled(IMAGES, image_rows([jpeg(seed) for seed in range(9)]))
    vision = stage.model.vision.forward

    def small_machine(pixels):
        if len(pixels) > 2:
            raise MemoryError
        return vision(pixels)

    stage.model.vision.forward = small_machine
    output = stage.process(table)
    assert output.num_rows == 9 and set(output["status"].to_pylist()) == {"success"}
    shards.publish(task, JOB, output, store, 0.0, stage.facts())
    details = store.read_record(JOB.records["caption"]).details
    assert details == {"batch_size": "4, 2", "tokens": details["tokens"]}
    assert int(details["tokens"]) >= len(output)
    assert stage.process(table).equals(output)  # the next shard starts from the config's again
    assert stage.facts() == details
    assert opened(folder, batch_size=2)[1].process(table).equals(output)


def test_what_is_told_of_pieces_is_told_of_the_shard() -> None:
    pieces = [{"batch_size": "32", "tokens": "7"}, {"batch_size": "32, 16", "tokens": "5"}, {}]
    assert merged(pieces) == {"batch_size": "32, 16", "tokens": "12"}
    assert merged([{"batch_size": "4"}]) == {"batch_size": "4"}
    assert merged([]) == {}
