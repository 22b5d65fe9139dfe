"""Evaluation: what a round's models are worth on probe sets that no training ever sees.

Writes ``metrics.parquet`` and ``outcomes.parquet``; the latter has one value for each probe image,
so that two models can be compared image by image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from stages.base import Context, DatasetStage, WholeRoundConfig, operational
from stages.caption_metrics import bleu, cider
from stages.errors import SourceError
from stages.models.config import GenerationConfig
from stages.probes import Probe, decode_probes, read_probes
from stages.retrieval import RECALL_AT, Scores, recalls, retrieval_ranks
from stages.schemas import METRICS, OUTCOMES, PROBE_CAPTIONS

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from stages.models.matcher import Matcher

SPLITS = ("dev", "test")

_UNSCORED = -100.0
"""Score of a pair that re-ranking leaves out (train_retrieval.py)."""

Values = npt.NDArray[np.float64]

Outcomes = dict[str, dict[str, float]]
"""Metric → probe image → value."""

_TABLES = {"metrics": METRICS, "outcomes": OUTCOMES, "captions": PROBE_CAPTIONS}


class EvaluateConfig(WholeRoundConfig):
    """How models are measured, all by one worker, in turn."""

    k_test: int = Field(256, ge=1)
    """How many of each query's best ITC candidates ITM rescores (COCO 256, Flickr30k 128)."""
    threshold: float = Field(0.5, ge=0, le=1)
    """ITM probability from which the filter keeps a text, for its precision and recall."""
    prompt: str = "a picture of "
    """Of the captioner; must be the one that it was fine-tuned with."""
    max_text_tokens: int = Field(35, ge=3)
    """Tokens of a text that is matched, [CLS] and [SEP] included."""
    num_beams: int = Field(3, ge=1)
    min_tokens: int = Field(5, ge=1)
    max_tokens: int = Field(20, ge=2)
    """Prompt included, as in training of the captioner."""
    batch_size: int = operational(32, ge=1)
    """Images at once."""
    threads: int | None = operational(None, ge=1)
    """Threads of torch; None leaves them as they are."""

    @property
    def generation(self) -> GenerationConfig:
        """How the captioner decodes."""
        return GenerationConfig(
            method="beam",
            prompt=self.prompt,
            num_beams=self.num_beams,
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
        )

    @model_validator(mode="after")
    def _can_decode(self) -> EvaluateConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        return self


class Measured(NamedTuple):
    """What one model is worth on one probe set."""

    metrics: Mapping[str, tuple[float, int]]
    """Name → (value, over how many items)."""
    outcomes: Outcomes
    captions: Mapping[str, str] = {}
    """Probe image → what the captioner wrote."""


class EvaluateStage(DatasetStage):
    """Inputs, each one folder and each optional: the models ``med``, ``captioner`` and ``filter``,
    and the probe sets ``dev`` and ``test`` (`stages.probes.read_probes`).

    - med and filter: ``tr_at_k``, ``ir_at_k`` for k of 1, 5, 10, re-ranked by ITM
      (`retrieval_scores`).
    - captioner: ``bleu4`` and ``cider`` of its beam captions.
    - filter: `filter_quality`.

    Writes ``metrics.parquet`` (METRICS), ``outcomes.parquet`` (OUTCOMES) and ``captions.parquet``
    (PROBE_CAPTIONS).

    Raises:
        SourceError: a probe set cannot be read, or one of its images not decoded.
        CheckpointError: a folder holds no such model.
    """

    name = "evaluate"
    version = 2

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        from stages.training.device import torch_threads

        splits = [split for split in SPLITS if inputs.get(split)]
        models = [model for model in ("med", "captioner", "filter") if inputs.get(model)]
        rows: dict[str, list[dict[str, object]]] = {name: [] for name in _TABLES}
        with torch_threads(self.config.threads):
            for number, split in enumerate(splits):
                folder = inputs[split][0]
                probes = read_probes(folder)
                images = decode_probes(probes, folder)
                for index, model in enumerate(models):
                    done = number * len(models) + index
                    ctx.progress(f"{model} on {split}", done, len(splits) * len(models))
                    measured = self._measured(model, inputs[model][0], probes, images)
                    for name, found in _rows(split, model, measured).items():
                        rows[name] += found
        for name, schema in _TABLES.items():
            table = pa.Table.from_pylist(rows[name], schema=schema)
            pq.write_table(table, output_dir / f"{name}.parquet")

    def _measured(
        self,
        model: str,
        source: Path,
        probes: Sequence[Probe],
        images: Sequence[Image.Image],
    ) -> Measured:
        if model == "captioner":
            return self._captioner(source, probes, images)
        return self._matcher(source, model, probes, images)

    def _captioner(
        self, source: Path, probes: Sequence[Probe], images: Sequence[Image.Image]
    ) -> Measured:
        from stages.models.captioner import Captioner
        from stages.training.device import default_device

        config = self.config
        captioner = Captioner(source, default_device(), batch_size=config.batch_size)
        texts = [found[0] or "" for found in captioner(images, config=config.generation)]
        references = [probe.captions for probe in probes]
        scores = cider(texts, references)
        metrics = {"bleu4": bleu(texts, references), "cider": float(np.mean(scores))}
        return Measured(
            {name: (value, len(probes)) for name, value in metrics.items()},
            {"cider": {probe.name: s for probe, s in zip(probes, scores, strict=True)}},
            {probe.name: text for probe, text in zip(probes, texts, strict=True)},
        )

    def _matcher(
        self, source: Path, model: str, probes: Sequence[Probe], images: Sequence[Image.Image]
    ) -> Measured:
        from stages.models.matcher import Matcher
        from stages.training.device import default_device

        matcher = Matcher(
            source,
            default_device(),
            batch_size=self.config.batch_size,
            max_tokens=self.config.max_text_tokens,
        )
        measured = retrieval(matcher, probes, images, self.config.k_test)
        if model == "filter":
            quality = filter_quality(matcher, probes, images, self.config.threshold)
            measured = Measured(
                {**measured.metrics, **quality.metrics}, {**measured.outcomes, **quality.outcomes}
            )
        return measured


def retrieval(
    matcher: Matcher, probes: Sequence[Probe], images: Sequence[Image.Image], k_test: int
) -> Measured:
    """Recall at k both ways, over every image and every caption of the probe set."""
    texts = [text for probe in probes for text in probe.captions]
    owner = [index for index, probe in enumerate(probes) for _ in probe.captions]
    ranks = retrieval_ranks(*retrieval_scores(matcher, images, texts, k_test), owner)
    sizes = {"tr": len(probes), "ir": len(texts)}
    metrics = {name: (value, sizes[name[:2]]) for name, value in recalls(ranks).items()}
    outcomes: Outcomes = {}
    own = np.array(owner)
    for k in RECALL_AT:
        text_hits, image_hits = ranks.text < k, ranks.image < k
        for index, probe in enumerate(probes):
            outcomes.setdefault(f"tr_at_{k}", {})[probe.name] = float(text_hits[index])
            share = float(image_hits[own == index].mean())
            outcomes.setdefault(f"ir_at_{k}", {})[probe.name] = share
    return Measured(metrics, outcomes)


def retrieval_scores(
    matcher: Matcher, images: Sequence[Image.Image], texts: Sequence[str], k_test: int
) -> tuple[Scores, Scores]:
    """Scores (I, T) for images seeking texts and (T, I) for texts seeking images.

    The ``k_test`` best of each query by ITC get ITM's match logit plus the cosine, all others
    -100 (train_retrieval.py, ``evaluation``). A pair that both directions ask for is scored once.
    """
    import torch

    from stages.models.matcher import MATCH

    seen, read = matcher.encode_images(images), matcher.encode_texts(texts)
    cosines = (seen.features @ read.features.T).float().cpu()
    wanted_i2t = _best(cosines, k_test)
    wanted_t2i = _best(cosines.T, k_test).T
    pairs = (wanted_i2t | wanted_t2i).nonzero()
    logits = matcher.itm_logits(seen, read, pairs)[:, MATCH].float().cpu()
    scored = torch.full_like(cosines, _UNSCORED)
    scored[pairs[:, 0], pairs[:, 1]] = logits + cosines[pairs[:, 0], pairs[:, 1]]
    i2t = scored.masked_fill(~wanted_i2t, _UNSCORED)
    t2i = scored.masked_fill(~wanted_t2i, _UNSCORED).T
    return i2t.numpy(), t2i.numpy()


def filter_quality(
    matcher: Matcher, probes: Sequence[Probe], images: Sequence[Image.Image], threshold: float
) -> Measured:
    """How well ITM probabilities tell right captions from wrong ones.

    Wrong are the probes' own wrong captions (near misses; where there are any) and, for each image,
    as many captions of the image that stands after it (gross mismatches). ``auc_near`` and
    ``auc_other`` are the probability that a right caption scores above a wrong one of that kind,
    wherever they come from (ties count half), images weighing alike; ``auc`` is their mean.
    ``precision`` and ``recall`` are those of the texts at or above ``threshold``. A score that is
    NaN counts as the worst: below all of a right caption, above all of a wrong one.
    """
    following = [*probes[1:], probes[0]]
    others = [
        [text for text in after.captions if text not in probe.captions]
        for probe, after in zip(probes, following, strict=True)
    ]
    groups = {
        "right": [list(probe.captions) for probe in probes],
        "near": [list(probe.wrong_captions) for probe in probes],
        "other": others if len(probes) > 1 else [[] for _ in probes],
    }
    asked = [[t for texts in groups.values() for t in texts[i]] for i in range(len(probes))]
    scores = [[match for match, _ in found] for found in matcher(images, asked)]
    split: dict[str, list[list[float]]] = {name: [] for name in groups}
    for index, found in enumerate(scores):
        rest = iter(found)
        for name, texts in groups.items():
            split[name].append([next(rest) for _ in texts[index]])
    return _quality(probes, split, threshold)


def _quality(
    probes: Sequence[Probe], scores: Mapping[str, list[list[float]]], threshold: float
) -> Measured:
    scores = _with_nan_worst(scores)
    right = np.array([s for own in scores["right"] for s in own])
    wrong = np.array([s for kind in ("near", "other") for own in scores[kind] for s in own])
    outcomes: Outcomes = {}
    for kind in ("near", "other"):
        pool = np.sort([s for own in scores[kind] for s in own])
        if len(pool):
            outcomes[f"auc_{kind}"] = {
                probe.name: _share_below(own, pool)
                for probe, own in zip(probes, scores["right"], strict=True)
            }
    if not outcomes:
        raise SourceError(
            "probe set: no wrong captions and one image only; give wrong_captions or more images"
        )
    outcomes["auc"] = {
        probe.name: float(np.mean([values[probe.name] for values in outcomes.values()]))
        for probe in probes
    }
    kept, passed = int((right >= threshold).sum()), int((wrong >= threshold).sum())
    metrics = {name: (float(np.mean(list(v.values()))), len(v)) for name, v in outcomes.items()}
    metrics["recall"] = (kept / len(right), len(right))
    if kept + passed:
        metrics["precision"] = (kept / (kept + passed), kept + passed)
    return Measured(metrics, outcomes)


def _with_nan_worst(scores: Mapping[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    worst = {"right": -np.inf, "near": np.inf, "other": np.inf}
    return {
        kind: [[worst[kind] if np.isnan(s) else s for s in own] for own in of_images]
        for kind, of_images in scores.items()
    }


def _share_below(scores: Sequence[float], pool: Values) -> float:
    """Mean share of the sorted ``pool`` below each score, ties counting half (Mann-Whitney)."""
    below = np.searchsorted(pool, scores, side="left")
    not_above = np.searchsorted(pool, scores, side="right")
    return float(np.mean((below + not_above) / 2) / len(pool))


def _rows(split: str, model: str, measured: Measured) -> dict[str, list[dict[str, object]]]:
    head = {"split": split, "model": model}
    metrics = [
        {**head, "metric": metric, "value": value, "n": n}
        for metric, (value, n) in measured.metrics.items()
    ]
    outcomes = [
        {**head, "metric": metric, "item": item, "value": value}
        for metric, values in measured.outcomes.items()
        for item, value in values.items()
    ]
    captions = [
        {"split": split, "item": i, "text": text, "cider": measured.outcomes["cider"][i]}
        for i, text in measured.captions.items()
    ]
    return {"metrics": metrics, "outcomes": outcomes, "captions": captions}


def _best(scores: Tensor, k: int) -> Tensor:
    """True for the ``k`` highest scores of each row."""
    import torch

    chosen = torch.zeros_like(scores, dtype=torch.bool)
    index = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return chosen.scatter_(1, index, value=True)
