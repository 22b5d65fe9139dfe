"""Evaluation on real probe folders and tiny models."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stages.base import LocalContext
from stages.caption_metrics import cider
from stages.errors import CheckpointError, SourceError
from stages.evaluate import EvaluateConfig, EvaluateStage, _quality, retrieval_scores
from stages.models.checkpoints import save_captioner, save_filter, save_med
from stages.models.matcher import MATCH, Matcher
from stages.models.med import Med
from stages.models.text import fitted_to, load_tokenizer
from stages.probes import Probe
from stages.schemas import METRICS, OUTCOMES, PROBE_CAPTIONS
from tests.toy_pairs import COLOURS, SIZE, png, toy_med, toy_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models of all three kinds, and two probe folders."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = load_tokenizer(toy_tokenizer(folder / "tokenizer"))
    config = toy_med()
    torch.manual_seed(0)
    med = Med(config.model_copy(update={"text": fitted_to(config.text, tokenizer)}))
    # Untrained heads answer nearly alike; larger ones tell pairs apart.
    for part in (med.itm_head, med.vision_proj, med.text_proj, med.text_encoder.embeddings):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter)
    save_med(med, tokenizer, folder / "med")
    save_captioner(med, tokenizer, folder / "captioner")
    save_filter(med, tokenizer, folder / "filter")
    for split in ("dev", "test"):
        probe_folder(folder / split, wrong=split == "dev")
    return folder


def probe_folder(folder: Path, wrong: bool) -> Path:
    folder.mkdir()
    lines = []
    for number, colour in enumerate(COLOURS):
        (folder / f"{number}.png").write_bytes(png(colour, number))
        line = {"image": f"{number}.png", "captions": [f"a {colour} square", f"{colour} wall"]}
        if wrong:
            line["wrong_captions"] = [f"a {colour} picture"]
        lines.append(json.dumps(line))
    (folder / "annotations.jsonl").write_text("\n".join(lines))
    return folder


def run(world: Path, out: Path, *names: str, k_test: int = 3) -> dict[str, list[dict[str, object]]]:
    out.mkdir(exist_ok=True)
    stage = EvaluateStage(EvaluateConfig(k_test=k_test))
    stage.run({name: [world / name] for name in names}, out, LocalContext())
    tables = {"metrics": METRICS, "outcomes": OUTCOMES, "captions": PROBE_CAPTIONS}
    found = {}
    for name, schema in tables.items():
        table = pq.read_table(out / f"{name}.parquet")
        assert table.schema.equals(schema)
        found[name] = table.to_pylist()
    return found


def test_all_models_on_both_splits(world: Path, tmp_path: Path) -> None:
    found = run(world, tmp_path / "out", "med", "captioner", "filter", "dev", "test")
    value = {(m["split"], m["model"], m["metric"]): m["value"] for m in found["metrics"]}
    recalls = {f"{side}_at_{k}" for side in ("tr", "ir") for k in (1, 5, 10)}
    for split in ("dev", "test"):
        assert {m for s, model, m in value if (s, model) == (split, "med")} == recalls
        assert {m for s, model, m in value if (s, model) == (split, "captioner")} == {
            "bleu4",
            "cider",
        }
    of_filter = {m for s, model, m in value if (s, model) == ("dev", "filter")}
    assert of_filter >= recalls | {"auc", "auc_near", "auc_other", "recall"}
    assert ("test", "filter", "auc_near") not in value
    assert all(0 <= v <= 10 for v in value.values())  # type: ignore[operator]

    # What is kept of each image says the same as the metric.
    for (split, model, metric), expected in value.items():
        own = [
            o["value"]
            for o in found["outcomes"]
            if (o["split"], o["model"], o["metric"]) == (split, model, metric)
        ]
        if metric in ("bleu4", "precision", "recall"):
            assert not own
        else:
            assert len(own) == len(COLOURS)
            assert np.mean(own) == pytest.approx(expected)  # type: ignore[arg-type]
    for split in ("dev", "test"):
        texts = [c["text"] for c in found["captions"] if c["split"] == split]
        references = [[f"a {colour} square", f"{colour} wall"] for colour in COLOURS]
        assert np.mean(cider(texts, references)) == pytest.approx(
            value[split, "captioner", "cider"]
        )


def test_only_what_is_given_is_measured(world: Path, tmp_path: Path) -> None:
    found = run(world, tmp_path / "out", "filter", "dev")
    assert {(m["split"], m["model"]) for m in found["metrics"]} == {("dev", "filter")}
    assert found["captions"] == []
    assert run(world, tmp_path / "none", "filter")["metrics"] == []


def test_it_gives_the_same_twice(world: Path, tmp_path: Path) -> None:
    names = ("med", "captioner", "filter", "dev")
    assert run(world, tmp_path / "a", *names) == run(world, tmp_path / "b", *names)


@pytest.mark.parametrize("k_test", [1, 3, 100])
def test_the_best_by_itc_are_rescored_by_itm(world: Path, k_test: int) -> None:
    matcher = Matcher(world / "filter")
    images = [Image.new("RGB", (SIZE, SIZE), colour) for colour in COLOURS.values()]
    texts = [f"{w} {colour} square" for colour in COLOURS for w in ("a", "the")]
    i2t, t2i = retrieval_scores(matcher, images, texts, k_test)
    seen, read = matcher.encode_images(images), matcher.encode_texts(texts)
    cosines = (seen.features @ read.features.T).numpy()
    every = torch.tensor([[i, t] for i in range(6) for t in range(12)])
    logits = matcher.itm_logits(seen, read, every)[:, MATCH].numpy().reshape(6, 12)
    for scores, sims, itm in ((i2t, cosines, logits), (t2i, cosines.T, logits.T)):
        k = min(k_test, sims.shape[1])
        for row, own, match in zip(scores, sims, itm, strict=True):
            best = np.argsort(-own)[:k]
            assert set(np.flatnonzero(row > -100)) == set(best)
            assert row[best] == pytest.approx((own + match)[best], abs=1e-4)


def probes(count: int) -> list[Probe]:
    return [Probe(f"{i}", b"", ("x",)) for i in range(count)]


def test_auc_is_the_share_of_pairs_in_order() -> None:
    random = np.random.default_rng(0)
    scores = {
        "right": random.integers(3, 10, (20, 2)).tolist(),
        "near": random.integers(0, 8, (20, 1)).tolist(),
        "other": random.integers(0, 5, (20, 2)).tolist(),
    }
    measured = _quality(probes(20), scores, threshold=5)
    flat = {name: np.array(values).flatten() for name, values in scores.items()}
    for kind in ("near", "other"):
        ahead = np.sign(flat["right"][:, None] - flat[kind][None, :])
        assert measured.metrics[f"auc_{kind}"][0] == pytest.approx((ahead.mean() + 1) / 2)
    mean = (measured.metrics["auc_near"][0] + measured.metrics["auc_other"][0]) / 2
    assert measured.metrics["auc"] == (pytest.approx(mean), 20)
    kept = (flat["right"] >= 5).sum()
    wrong = (flat["near"] >= 5).sum() + (flat["other"] >= 5).sum()
    assert measured.metrics["recall"] == (pytest.approx(kept / 40), 40)
    assert measured.metrics["precision"] == (pytest.approx(kept / (kept + wrong)), kept + wrong)


def test_a_perfect_filter_and_one_that_keeps_nothing() -> None:
    scores = {"right": [[0.9], [0.8]], "near": [[], []], "other": [[0.1], [0.2]]}
    perfect = _quality(probes(2), scores, threshold=0.5).metrics
    assert perfect["auc"] == perfect["precision"] == perfect["recall"] == (1.0, 2)
    assert "auc_near" not in perfect
    strict = _quality(probes(2), scores, threshold=0.95).metrics
    assert strict["recall"] == (0.0, 2) and "precision" not in strict


def test_scores_that_are_nan_are_the_worst() -> None:
    nan = float("nan")
    broken = {"right": [[nan], [nan]], "near": [[nan], [nan]], "other": [[nan], [nan]]}
    found = _quality(probes(2), broken, threshold=0.5).metrics
    assert found["auc"] == found["auc_near"] == found["auc_other"] == found["recall"] == (0.0, 2)
    assert found["precision"] == (0.0, 4)
    right = {"right": [[nan], [0.9]], "near": [[0.1], [0.2]], "other": [[], []]}
    assert _quality(probes(2), right, threshold=0.5).metrics["auc"] == (0.5, 2)
    wrong = {"right": [[0.8], [0.9]], "near": [[0.1], [nan]], "other": [[], []]}
    assert _quality(probes(2), wrong, threshold=0.5).metrics["auc"] == (0.5, 2)


def test_a_probe_without_anything_wrong_is_refused() -> None:
    scores: dict[str, list[list[float]]] = {"right": [[0.9]], "near": [[]], "other": [[]]}
    with pytest.raises(SourceError, match="no wrong captions"):
        _quality(probes(1), scores, threshold=0.5)


def test_a_model_of_another_kind_is_named(world: Path, tmp_path: Path) -> None:
    stage = EvaluateStage(EvaluateConfig())
    with pytest.raises(CheckpointError):
        stage.run(
            {"captioner": [world / "tokenizer"], "dev": [world / "dev"]}, tmp_path, LocalContext()
        )
