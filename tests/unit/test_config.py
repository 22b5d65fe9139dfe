"""A run's YAML: what is accepted, and one clear line for everything that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import RunConfig, load, parse, substitute
from stages.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL: dict[str, Any] = {
    "run": "runs/x",
    "sources": [{"path": "web.parquet"}],
    "human": [{"path": "human", "kind": "human"}],
    "pretrain": {"tokenizer": "bert-base-uncased"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def problem(file: Path, *overrides: str) -> str:
    """The one line with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        load(str(file), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_left_out_has_its_default(file: Path) -> None:
    config = load(str(file))
    assert config.rounds.count == 2 and config.select.threshold == 0.5
    assert config.first_round == 0
    assert load(str(file)) == config


def test_overrides_are_yaml_and_reach_into_lists(file: Path) -> None:
    config = load(
        str(file),
        [
            "select.threshold=0.4",
            "rounds.count=7",
            "sources.0.path=other.csv",
            "dev=probes/dev",
            "engine.address=null",
            "run=s3://bucket/a=b",
        ],
    )
    assert config.select.threshold == 0.4 and config.rounds.count == 7
    assert config.sources[0].path == "other.csv" and config.engine.address is None
    assert config.run == "s3://bucket/a=b"


def test_off_is_a_word_without_quotes(file: Path) -> None:
    assert load(str(file), ["dedup.before_caption=off"]).dedup.before_caption == "off"
    assert "before_caption" in problem(file, "dedup.before_caption=on")


def test_an_override_fills_an_empty_section(file: Path) -> None:
    file.write_text(file.read_text() + "select:\n")
    assert load(str(file), ["select.threshold=0.25"]).select.threshold == 0.25


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("select.treshold=0.4", ["select.treshold: 0.4: unknown key; did you mean 'threshold'"]),
        ("selekt.threshold=0.4", ["selekt: {'threshold': 0.4}: unknown", "did you mean 'select'"]),
        ("select.zzz=1", ["select.zzz", "allowed are", "synthetic_threshold"]),
        ("sources.0.pth=x", ["sources.0.pth", "did you mean 'path'"]),
        ("select.threshold=2", ["select.threshold", "2", "less than or equal to 1"]),
        ("select.threshold=high", ["select.threshold", "'high'", "valid number"]),
        ("select.keep=all", ["select.keep", "'all'", "'web', 'synthetic' or 'both'"]),
        ("rounds.count=-1", ["rounds.count", "-1", "greater than or equal to 0"]),
        ("human=[]", ["human", "at least one human-annotated source"]),
        ("sources=[]", ["sources", "at least 1"]),
        ("caption.model=somewhere", ["caption.model and filter.model: give both"]),
        ("run=null", ["run", "None", "valid string"]),
        ("threshold", ["'threshold'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("select.threshold=[1", ["select.threshold", "'[1'", "valid number"]),
        ("sources.4.path=x", ["sources.4.path", "no element '4'"]),
        ("sources.first.path=x", ["no element 'first'"]),
        ("run.name=x", ["run.name=x", "run holds no settings"]),
        ("select.threshold.deep.x=1", ["select.threshold", "1"]),
        ("select.threshold=" + "9" * 500, ["select.threshold", "9..."]),
    ],
)
def test_a_bad_override_is_named(file: Path, override: str, parts: list[str]) -> None:
    said = problem(file, override)
    assert all(part in said for part in parts), said
    assert len(said) < 500


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("evaluate.min_tokens=30", ["evaluate", "min_tokens 30 exceeds max_tokens 20"]),
        ("evaluate.prompt=a photo", ["evaluate.prompt: 'a photo' is not", "'a picture of '"]),
        ("caption.generation.prompt=", ["caption.generation.prompt: None", "valid string"]),
        ("finetune.captioner.prompt=so ", ["caption.generation.prompt: 'a picture of ' is not"]),
        ("finetune.filter.image_size=100", ["finetune.filter.image_size: 100 is no multiple"]),
        ("finetune.captioner.image_size=100", ["captioner.image_size: 100", "patch_size, 16"]),
    ],
)
def test_what_would_fail_after_hours_is_refused_at_once(
    file: Path, override: str, parts: list[str]
) -> None:
    said = problem(file, override)
    assert all(part in said for part in parts), said


def test_languages_can_only_be_chosen_where_they_are_identified(file: Path) -> None:
    said = problem(file, "select.texts.languages=[en]", "ingest.language=false")
    assert "select.texts.languages: needs ingest.language" in said


@pytest.mark.parametrize(
    "place", [{"device": "cuda", "resources": {"gpus": 1}}, {"resources": {"gpus": 0.5}}]
)
def test_int8_on_a_gpu_is_refused_before_anything_runs(file: Path, place: dict[str, Any]) -> None:
    overrides = [f"caption.{name}={json.dumps(value)}" for name, value in place.items()]
    assert load(str(file), overrides).caption.precision == "float32"
    said = problem(file, *overrides, "caption.precision=int8")
    assert "caption: " in said and "precision: 'int8' runs on a CPU" in said


@pytest.mark.parametrize("stage", ["caption", "filter", "embed"])
def test_a_gpu_that_is_not_asked_for_is_not_there(file: Path, stage: str) -> None:
    told = problem(file, f"{stage}.device=cuda")
    assert f"{stage}.device: 'cuda' needs {stage}.resources.gpus" in told
    load(str(file), [f"{stage}.device=cuda", f"{stage}.resources.gpus=0.5"])


@pytest.mark.parametrize("stage", ["pretrain", "finetune.captioner", "finetune.filter"])
def test_a_batch_that_workers_cannot_share_is_refused_before_any_work(
    file: Path, stage: str
) -> None:
    given = ["engine.train_workers=4", f"{stage}.batch_size=36", f"{stage}.accumulate=2"]
    told = problem(file, *given)
    assert f"{stage}.batch_size: 36 pairs cannot be shared out evenly among 4 workers" in told
    assert "in 2 batches; give a multiple of 8" in told
    load(str(file), [*given, f"{stage}.accumulate=3"])


def test_a_misspelt_section_is_named_rather_than_called_missing(file: Path) -> None:
    file.write_text(file.read_text().replace("pretrain", "pretrian"))
    said = problem(file)
    assert "pretrian: {'tokenizer': 'bert-base-uncased'}: unknown key" in said
    assert "did you mean 'pretrain'? (and 1 more)" in said


def test_it_says_where_the_field_was_set(file: Path) -> None:
    with file.open("a") as text:
        text.write("select: {threshold: 2}\nrounds: {counts: 1}\n")
    assert problem(file, "seed=1").startswith(f"{file}: rounds.counts: 1: unknown key")
    given = ("rounds={}", "select.threshold=0.5", "select.threshold=3", "selects.x=1")
    assert problem(file, *given[:1]).startswith(f"{file}: select.threshold: 2 ")
    assert problem(file, *given[:3]).startswith(
        "override 'select.threshold=3': select.threshold: 3"
    )
    assert problem(file, *given).startswith(f"{file} with 'selects.x=1': selects: ")
    assert problem(file, "select={threshold: 4}", *given[:1]).startswith("override 'select={thresh")
    assert problem(file, *given[:2], "human=[]").startswith("override 'human=[]': human: at least")


@pytest.mark.parametrize(
    ("field", "override"),
    [
        ("sources.0.path", "sources.0.path={world}/web.parquet"),
        ("pretrain.tokenizer", "pretrain.tokenizer={world}/tokenizer"),
        ("dedup.evaluation.0", "dedup.evaluation=['{world}/dev']"),
        ("dev", "dev={world}/dev"),
    ],
)
def test_the_world_is_not_named_where_there_is_none(file: Path, field: str, override: str) -> None:
    assert f"{field}: '{{world}}/" in problem(file, override)
    assert "`world` is not given; name what is yours" in problem(file, override)
    load(str(file), [override, "world={}"])


def test_released_models_start_at_round_1(file: Path) -> None:
    models = ["caption.model=a/b", "filter.model=c/d"]
    assert "embed.model: needed" in problem(file, *models)
    assert load(str(file), [*models, "embed.model=e/f"]).first_round == 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "must hold a mapping"),
        ("- a\n- b\n", "must hold a mapping of settings, found list"),
        ("a: [1\nb: 2\n", "not YAML"),
        ("a: \x01\n", "not YAML"),
        ("run: x\n", "sources: is missing"),
        ("1: 2\n", "run: is missing"),
        ("!!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_bad_file_is_said_in_one_line(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    said = problem(path)
    assert said.startswith(f"{path}: ") and part in said


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "cannot be read" in problem(tmp_path / "none.yaml")
    assert "cannot be read" in problem(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problem(tmp_path / "bytes.yaml")


def test_the_seed_reaches_every_stage_that_names_none(file: Path) -> None:
    config = load(str(file), ["seed=5", "pretrain.seed=9"])
    assert config.caption.generation.seed == 5 and config.finetune.filter.seed == 5
    assert config.pretrain.seed == 9


@pytest.mark.parametrize(
    ("more", "key", "lines"),
    [
        ("seed: 1\nselect: {keep: web}\nseed: 1\n", "seed", (3, 1)),
        ("caption:\n  model: a/b\n  resources: {cpus: 2}\n  model: c/d\n", "model", (4, 2)),
        ("sources:\n- {path: a, path: b}\n", "path", (2, 2)),
        ("'seed': 1\nseed: 2\n", "seed", (2, 1)),
    ],
)
def test_a_key_that_is_given_twice_is_refused(
    tmp_path: Path, more: str, key: str, lines: tuple[int, int]
) -> None:
    (tmp_path / "run.yaml").write_text(more)
    again, first = lines
    assert problem(tmp_path / "run.yaml") == (
        f"{tmp_path}/run.yaml: line {again}: {key!r} stands on line {first} already; "
        "put both into one"
    )


def test_an_override_that_gives_a_key_twice(file: Path) -> None:
    said = problem(file, "rounds={count: 1, count: 2}")
    assert said.startswith("override 'rounds={count: 1, count: 2}': line 1: 'count' stands on")


def test_an_alias_is_a_copy(file: Path) -> None:
    """Neither an override nor the seed of one node reaches the other."""
    with file.open("a") as text:
        text.write("caption: &model {model: a/b}\nfilter: *model\nembed: *model\n")
    config = load(str(file), ["filter.model=c/d"])
    assert (config.caption.model, config.filter.model) == ("a/b", "c/d")


def test_an_alias_that_holds_itself(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").write_text("run: &loop [*loop]\n")
    assert "an alias holds itself" in problem(tmp_path / "loop.yaml")


def test_the_world_is_filled_in_everywhere(file: Path) -> None:
    config = load(
        str(file),
        ["world={}", "sources.0.path={world}/web.parquet", "pretrain.tokenizer={world}/tokenizer"],
    )
    filled = substitute(config, Path("/a/world"))
    assert filled.sources[0].path == "/a/world/web.parquet"
    assert filled.pretrain.tokenizer == "/a/world/tokenizer"
    assert "{world}" not in filled.model_dump_json()
    assert config.sources[0].path == "{world}/web.parquet"


def test_a_config_survives_json(file: Path) -> None:
    """run.json holds it; resuming and reporting read it back."""
    config = load(str(file), ["seed=3"])
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert parse(config.model_dump(), "again") == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_the_configs_that_come_along_are_valid(path: Path) -> None:
    config = load(str(path))
    assert config.run and config.rounds.count > 0


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        (
            "paper-14m",
            {
                "pretrain.model.vision.width": 768,
                "pretrain.model.vision.drop_path": 0.0,
                "finetune.captioner.drop_path": 0.0,
                "finetune.filter.drop_path": 0.0,
                "pretrain.batch_size": 2880,
                "pretrain.lr": 3e-4,
                "finetune.captioner.lr": 1e-5,
                "finetune.filter.lr": 1e-5,
            },
        ),
        (
            "paper-129m",
            {
                "pretrain.model.vision.width": 1024,
                "pretrain.model.vision.layers": 24,
                "pretrain.model.vision.drop_path": 0.1,
                "finetune.captioner.drop_path": 0.1,
                "finetune.filter.drop_path": 0.1,
                "pretrain.batch_size": 2400,
                "pretrain.lr": 2e-4,
                "finetune.captioner.lr": 2e-6,
                "finetune.filter.lr": 5e-6,
            },
        ),
    ],
)
def test_the_papers_values(name: str, paper: dict[str, float]) -> None:
    """Of what sets the two apart, and of what a changed default must not change for them."""
    config = load(str(CONFIGS / f"{name}.yaml"))
    same = {
        "pretrain.epochs": 20,
        "pretrain.warmup_steps": 3000,
        "pretrain.warmup_lr": 1e-6,
        "pretrain.min_lr": 1e-6,
        "pretrain.decay_rate": 0.9,
        "pretrain.weight_decay": 0.05,
        "pretrain.alpha": 0.4,
        "pretrain.alpha_epochs": 2,
        "pretrain.global_negatives": False,
        "pretrain.model.queue_size": 57_600,
        "pretrain.model.vision.image_size": 224,
        "finetune.captioner.image_size": 384,
        "finetune.captioner.epochs": 5,
        "finetune.filter.epochs": 6,
        "finetune.filter.batch_size": 256,
        "finetune.filter.global_negatives": True,
        "pretrain.precision": "float32",
        "caption.precision": "bfloat16",
        "filter.precision": "bfloat16",
        "embed.precision": "bfloat16",
        "caption.generation.top_p": 0.9,
        "caption.generation.min_tokens": 5,
        "caption.generation.max_tokens": 20,
        "select.threshold": 0.5,
        "rounds.count": 1,
    }
    for field, value in {**same, **paper}.items():
        found: Any = config
        for part in field.split("."):
            found = getattr(found, part)
        assert found == value, field
    # Queues turn over in whole batches, and batches are shared out evenly.
    assert config.pretrain.model.queue_size % config.pretrain.batch_size == 0
    for batch in (config.pretrain.batch_size, config.finetune.filter.batch_size):
        assert batch % config.engine.train_workers == 0
