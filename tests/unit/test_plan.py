"""What a round's plan says of its inputs before any work is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import RunConfig, parse
from pipeline.copies import plan_sharing
from pipeline.course import Course, labelled
from pipeline.dag import SHARD_READS, WHOLE_ROUND_READS, Published, print_of, stage_input
from pipeline.engine.dataset import publish_folder
from pipeline.plan import (
    Model,
    Sharing,
    absolute,
    content_of,
    evaluation_sets,
    plan_round,
    probes,
)
from pipeline.runfolder import STAGES
from pipeline.store import Store
from stages.base import Resources
from stages.errors import SourceError
from stages.schemas import DOWNLOAD
from tests.tables import filled


def config(**fields: object) -> RunConfig:
    values = {
        "run": "run",
        "sources": [{"path": "web.parquet"}],
        "human": [{"path": "human", "kind": "human"}],
        "pretrain": {"tokenizer": "tokenizer"},
    }
    return parse(values | fields, "test")


def test_the_content_of_a_folder_is_its_names_and_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"1234")
    assert content_of(str(tmp_path / "one")) == content_of(str(tmp_path / "two"))
    (tmp_path / "two" / "weights").write_bytes(b"1235")
    assert content_of(str(tmp_path / "one")) != content_of(str(tmp_path / "two"))
    (tmp_path / "two" / "weights").rename(tmp_path / "two" / "other")
    (tmp_path / "two" / "other").write_bytes(b"1234")
    assert content_of(str(tmp_path / "one")) != content_of(str(tmp_path / "two"))


def test_a_hub_id_stands_for_itself_and_a_missing_path_does_not(tmp_path: Path) -> None:
    assert content_of("someone/blip") == "someone/blip"
    with pytest.raises(SourceError, match="no such folder"):
        content_of(str(tmp_path / "missing"))


def test_a_revision_with_slashes_is_part_of_a_hub_id() -> None:
    assert content_of("someone/blip@refs/pr/1") == "someone/blip@refs/pr/1"
    for missing in ("none/such/folder@1", "./none@refs/pr/1", "/none@1"):
        with pytest.raises(SourceError, match="no such folder"):
            content_of(missing)


def test_images_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "0.jpg").write_bytes(b"1")
    for name in ("linked", "copied"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "annotations.jsonl").write_text("{}")
    (tmp_path / "linked" / "images").symlink_to(tmp_path / "coco")
    (tmp_path / "copied" / "images").mkdir()
    (tmp_path / "copied" / "images" / "0.jpg").write_bytes(b"1")
    assert content_of(str(tmp_path / "linked")) == content_of(str(tmp_path / "copied"))
    (tmp_path / "coco" / "0.jpg").write_bytes(b"2")
    assert content_of(str(tmp_path / "linked")) != content_of(str(tmp_path / "copied"))


def test_probe_folders_must_be_there_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "probes" / "dev"
    folder.mkdir(parents=True)
    # As short a path as a hub id, which would be looked up only when it is opened.
    with pytest.raises(SourceError, match=r"dev: probes/dev: no annotations\.jsonl"):
        probes(config(dev="probes/dev"))
    (folder / "annotations.jsonl").write_text("{}")
    assert probes(config(dev="probes/dev")) == {"dev": str(folder)}
    assert probes(config()) == {}


SHARDS = {
    "000000": ("web", "records/run/stage=sources/000000-aa.json"),
    "000001": ("human", "records/run/stage=sources/000001-bb.json"),
}
MODELS = {stage: Model(f"made/{stage}", "00") for stage in ("caption", "filter", "embed")}


def records(models: dict[str, Model], **fields: object) -> dict[str, str]:
    """Stage → its first record in the plan of a round."""
    plan = plan_round(config(**fields), 1, SHARDS, models, None, {})
    published = plan.document("gate")["records"]
    assert isinstance(published, dict)
    return {stage: names[0] for stage, names in published.items()}


def test_a_new_threshold_redoes_select_and_what_follows_and_nothing_else() -> None:
    before, after = records(MODELS), records(MODELS, select={"threshold": 0.4})
    same = {stage for stage in before if before[stage] == after[stage]}
    assert same == {"download", "caption", "filter", "embed", "dedup", "gate"}


def test_a_new_threshold_leaves_a_raw_round_as_it_is() -> None:
    assert records({}) == records({}, select={"threshold": 0.4, "keep": "synthetic"})


@pytest.mark.parametrize("models", [{}, MODELS], ids=["raw", "with models"])
def test_resources_reach_the_worker_and_no_fingerprint(models: dict[str, Model]) -> None:
    large = {"resources": {"cpus": 8, "memory_gb": 64}}
    fields = dict.fromkeys(("dedup", "select", "assemble", "evaluate"), large)
    assert records(models) == records(models, **fields)
    plans = [plan_round(c, 1, SHARDS, models, None, {}) for c in (config(), config(**fields))]
    asked = [{t.name: t.resources for t in plan.curation + plan.measuring} for plan in plans]
    assert set(asked[0].values()) == {Resources()}
    assert set(asked[1].values()) == {Resources(cpus=8, memory_gb=64)}
    stages = {"select", "assemble", "ledger", "evaluate"}
    assert set(asked[0]) == stages | ({"dedup"} if models else set())


def test_where_a_tokenizer_lies_does_not_matter(tmp_path: Path) -> None:
    found = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text("[PAD]")
        found.append(records({}, pretrain={"tokenizer": str(tmp_path / name)}))
    assert found[0] == found[1]
    (tmp_path / "there" / "vocab.txt").write_text("[UNK]")
    changed = records({}, pretrain={"tokenizer": str(tmp_path / "there")})
    assert changed["pretrain"] != found[0]["pretrain"]


@pytest.mark.parametrize("field", ["init", "init_vision", "init_text"])
def test_the_content_of_what_pretraining_starts_from_counts(tmp_path: Path, field: str) -> None:
    found = [records({})]
    for name, content in (("here", "1"), ("there", "1"), ("other", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(content)
        folder = str(tmp_path / name)
        found.append(records({}, pretrain={"tokenizer": "tokenizer", field: folder}))
    nothing, here, there, other = found
    assert here == there and len({r["pretrain"] for r in (nothing, here, other)}) == 3
    assert here["assemble"] == nothing["assemble"]


def test_probes_and_evaluation_sets_reach_dedup_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "dev"
    folder.mkdir()
    (folder / "annotations.jsonl").write_text("{}")
    (tmp_path / "coco.tar").write_bytes(b"1")
    dedup = {"dedup": {"evaluation": [str(tmp_path / "coco.tar")]}}
    first = records(MODELS, dev=str(folder), **dedup)
    sets = evaluation_sets(config(dev=str(folder), **dedup))
    assert sets == {"dev": str(folder), "0-coco.tar": str(tmp_path / "coco.tar")}
    assert records(MODELS, dev=str(folder), **dedup) == first
    (tmp_path / "coco.tar").write_bytes(b"2")
    assert records(MODELS, dev=str(folder), **dedup)["dedup"] != first["dedup"]
    (tmp_path / "coco.tar").unlink()
    with pytest.raises(SourceError, match=r"dedup\.evaluation: .*not there"):
        records(MODELS, **dedup)


def test_workers_get_full_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in another folder than the driver, which a relative path means."""
    monkeypatch.chdir(tmp_path)
    for name in ("captioner", "filter", "embedder", "words", "med", "dev", "test", "blobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "annotations.jsonl").write_text(name)
    (tmp_path / "set.parquet").symlink_to("blobs/annotations.jsonl")
    made = config(
        caption={"model": "captioner"},
        filter={"model": "./filter"},
        embed={"model": "embedder"},
        dev="dev",
        test="test",
        dedup={"evaluation": ["set.parquet"]},
        pretrain={"tokenizer": "words", "init": "med"},
    )
    course = Course(made, Store("run"), None)
    tasks = [course.released()]
    plan, _ = course.plan(1, None, SHARDS)
    tasks += plan.tasks
    given = [s for task in tasks for s in task.inputs.values() if isinstance(s, str)]
    given += [str(task.model) for task in plan.shard_tasks if task.model is not None]
    paths = {place for place in given if not place.startswith("record:")}
    names = ("captioner", "filter", "embedder", "words", "med", "dev", "test", "set.parquet")
    assert paths == {str(tmp_path / name) for name in names}
    monkeypatch.chdir("/")
    elsewhere = Course(_with_full_paths(made, tmp_path), Store(str(tmp_path / "run")), None)
    assert elsewhere.released().fingerprint == tasks[0].fingerprint
    assert absolute("someone/blip@main") == "someone/blip@main"


def _with_full_paths(made: RunConfig, folder: Path) -> RunConfig:
    """The same config as one who sits elsewhere would write it."""
    values = made.model_dump()
    for stage in ("caption", "filter", "embed"):
        values[stage]["model"] = str(folder / values[stage]["model"])
    for split in ("dev", "test"):
        values[split] = str(folder / values[split])
    return parse(values, "test")


def test_human_images_are_embedded_where_evaluation_sets_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "coco.tar").write_bytes(b"1")
    compared = {"dedup": {"evaluation": [str(tmp_path / "coco.tar")]}}
    for fields, stages in (({}, ["download"]), (compared, ["download", "embed"])):
        plan = plan_round(config(**fields), 1, SHARDS, MODELS, None, {})
        _, human = plan.jobs(set())
        assert human.shard == "000001" and list(human.todo) == stages


def test_the_table_of_what_stages_read_is_that_of_the_plan(tmp_path: Path) -> None:
    store, told = Store(str(tmp_path / "run")), dict(WHOLE_ROUND_READS)
    assert told.pop("gate") == ("evaluate",)  # is no task, see `pipeline.course.gate_record`
    read: dict[str, set[str]] = {}
    for models in ({}, MODELS):
        sharing = plan_sharing(config(), 1, SHARDS, models, (), (), store)
        plan = plan_round(config(), 1, SHARDS, models, "world", {}, sharing=sharing)
        for task in plan.tasks:
            names = [n for s in task.inputs.values() if isinstance(s, Published) for n in s.records]
            stages = {name.partition("stage=")[2].partition("/")[0] for name in names + task.reads}
            read.setdefault(task.name, set()).update(stages)
    assert read == {stage: set(names) for stage, names in told.items()}
    assert set(WHOLE_ROUND_READS) | set(SHARD_READS) | {"sources"} == set(STAGES)


def test_a_round_takes_over_the_clusters_of_the_one_before() -> None:
    first = plan_round(config(), 1, SHARDS, MODELS, None, {})
    assert "earlier" not in first.task("dedup").inputs
    second = plan_round(config(), 2, SHARDS, MODELS, None, {}, first.task("dedup"))
    earlier = second.task("dedup").inputs["earlier"]
    assert isinstance(earlier, Published) and earlier.records == (first.task("dedup").record,)


def test_tombstones_change_what_is_selected_and_nothing_before(tmp_path: Path) -> None:
    tombstones = ("records/run/stage=forget/all-cc.json",)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("a")
    made = config(pretrain={"tokenizer": str(tmp_path / "tokenizer")})
    models = {name: Model(f"some/{name}", name) for name in ("caption", "filter", "embed")}
    whole = plan_round(made, 1, SHARDS, models, None, {})
    without = plan_round(made, 1, SHARDS, models, None, {}, tombstones=tombstones)
    assert whole.jobs(set()) == without.jobs(set())
    assert whole.task("dedup").fingerprint == without.task("dedup").fingerprint
    for later in ("select", "assemble", "ledger", "pretrain", "finetune_filter", "evaluate"):
        assert whole.task(later).fingerprint != without.task(later).fingerprint
    assert without.task("select").inputs["tombstones"] == Published(tombstones, "*.parquet")
    assert without.document("gate")["tombstones"] == list(tombstones)


def test_labels_taken_over_give_way_where_images_share_something_else() -> None:
    shards = {f"00000{n}": ("web", f"records/run/stage=sources/00000{n}-0{n}.json") for n in (1, 2)}
    better = {stage: Model(f"better/{stage}", "11") for stage in MODELS} | {
        "embed": MODELS["embed"]
    }
    shared = "records/run/stage=shared/000002-{}.json"

    def prints(models: dict[str, Model], known: str | None, before: object) -> list[set[str]]:
        sharing = Sharing(shared={"000002": known} if known else {})
        plan = plan_round(config(), 2, shards, models, None, before, sharing=sharing)
        return [
            {print_of(job.records[s]) for s in ("caption", "filter")} for job in plan.jobs(set())
        ]

    first = Sharing(shared={"000002": shared.format("aa")})
    inherited = labelled(plan_round(config(), 1, shards, MODELS, None, {}, sharing=first))
    kept = prints(MODELS, shared.format("aa"), {})
    assert prints(better, shared.format("aa"), {})[0].isdisjoint(kept[0])
    assert prints(better, shared.format("aa"), inherited) == kept
    some_task = plan_round(config(), 1, shards, MODELS, None, {}).task("dedup")
    unknown = Sharing(copies=some_task)
    plan = plan_round(config(), 2, shards, better, None, inherited, sharing=unknown)
    waiting = [
        {print_of(job.records[s]) for s in ("caption", "filter")} for job in plan.jobs(set())
    ]
    assert waiting == kept  # until it is known to be otherwise
    for other in (shared.format("bb"), None):
        alone, changed = prints(better, other, inherited)
        assert alone == kept[0] and changed.isdisjoint(kept[1])


def test_the_images_of_human_pairs_reach_embed() -> None:
    known = {"source": "human", "status": "success", "sha256": "00"}
    rows = [known | {"sample_id": "a", "image": b"1"}, known | {"sample_id": "a", "image": None}]
    assert stage_input("embed", {"download": filled(DOWNLOAD, rows)}).num_rows == 1


def test_models_say_which_training_set_and_model_they_come_from(tmp_path: Path) -> None:
    plan = plan_round(config(), 1, SHARDS, MODELS, None, {})
    assemble, pretrain = plan.task("assemble").record, plan.task("pretrain").record
    assert plan.task("pretrain").reads == [assemble]
    for stage in ("finetune_captioner", "finetune_filter"):
        assert plan.task(stage).reads == [assemble, pretrain]
    # Of 100,000 shards a record cannot name each.
    assert plan.task("select").reads == [plan.task("dedup").record]
    store = Store(str(tmp_path / "run"))
    (tmp_path / "made").mkdir()
    record = publish_folder(plan.task("pretrain"), store, tmp_path / "made", 0.0)
    assert json.loads(store.read_record(record.name).details["reads"]) == [assemble]
