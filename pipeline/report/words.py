"""What the report calls things: every metric, state and stage in words for a newcomer."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Literal, NamedTuple

Kind = Literal["share", "number", "count"]


class Word(NamedTuple):
    """One metric in words."""

    title: str
    meaning: str
    kind: Kind = "share"
    better: int = 1
    """1: higher is better; -1: lower is; 0: neither."""


def _recall(ways: str, what: str) -> dict[str, Word]:
    found = {}
    for k in (1, 5, 10):
        place = "first" if k == 1 else f"among the first {k}"
        found[f"{ways}_at_{k}"] = Word(f"{ways.upper()}@{k}", what.format(place))
    return found


METRICS: Mapping[str, Word] = {
    **_recall("tr", "text retrieval: share of images whose own text is ranked {}"),
    **_recall("ir", "image retrieval: share of texts whose own image is ranked {}"),
    "cider": Word(
        "CIDEr", "agreement of captions with human ones, rare words weigh more", "number"
    ),
    "bleu4": Word("BLEU-4", "share of four-word runs in common with human captions", "number"),
    "auc": Word("AUC", "chance that a right text scores above a wrong one; 50% is guessing"),
    "auc_near": Word("AUC, near misses", "the same against texts with one word changed"),
    "auc_other": Word("AUC, other texts", "the same against texts of other images"),
    "precision": Word("Precision", "share of right texts among those that pass"),
    "recall": Word("Recall", "share of the right texts that pass"),
    "wrong_before": Word("Wrong texts before", "share of wrong web texts as downloaded", better=-1),
    "wrong_after": Word(
        "Wrong texts after", "share of wrong texts among all that are trained with", better=-1
    ),
    "wrong_after_web": Word("… of web texts", "the same, kept web texts alone", better=-1),
    "wrong_after_synthetic": Word(
        "… of synthetic texts", "the same, kept synthetic texts alone", better=-1
    ),
    "filter_precision": Word("Filter precision", "share of right texts among web texts that pass"),
    "filter_recall": Word("Filter recall", "share of the right web texts that pass"),
    "synthetic_right_before": Word(
        "Captions right, before the filter", "share of right texts among all synthetic ones"
    ),
    "synthetic_right_after": Word(
        "Captions right, after the filter", "share of right texts among synthetic ones that pass"
    ),
    "duplicate_recall": Word("Duplicate recall", "share of true duplicate pairs in one cluster"),
    "duplicate_recall_exact": Word("… of exact copies", "the same, files of equal bytes"),
    "duplicate_recall_near": Word("… of near copies", "the same, resized or recompressed"),
    "duplicates_found": Word("Duplicates found", "pairs of images, found in one cluster", "count"),
    "duplicates_missed": Word("Duplicates missed", "pairs of images, not found", "count", -1),
    "wrongly_merged": Word(
        "Wrongly merged", "pairs in one cluster that show different scenes", "count", -1
    ),
}

MODELS: Mapping[str, str] = {
    "med": "MED, the pretrained model",
    "captioner": "Captioner",
    "filter": "Filter",
    "data": "Data",
}

STATES: Mapping[str, str] = {
    # rows
    "downloaded": "image fetched",
    "duplicate_row": "repeats an earlier row",
    "no_url": "neither a URL nor an image file",
    "invalid_url": "no http(s) address",
    "blocked_address": "an address inside the network",
    "dns": "unknown host",
    "refused": "no connection",
    "timeout": "too slow",
    "tls": "no valid certificate",
    "http_4xx": "not there, or not allowed",
    "http_5xx": "the server failed",
    "redirect": "redirected too often or astray",
    "broken_response": "not HTTP, or cut short",
    "opted_out": "a header disallows the use",
    "too_large": "too many bytes or pixels",
    "unreadable": "a file that cannot be read",
    "not_an_image": "something else in place of an image",
    "decode": "a damaged image",
    "too_small": "too few pixels",
    "aspect": "too long and narrow",
    # rows and pairs
    "failed": "could not be worked on",
    "quarantined": "crashed its worker, set aside",
    "removed": "must not be used again",
    "retried": "failed; a later row tries again",
    "hash_mismatch": "other bytes than the source says",
    # pairs
    "kept": "trained with",
    "merged": "trained with, on the surviving image",
    "rejected": "does not match, says the filter",
    "duplicate": "the surviving image has this text",
    "contaminated": "the image is in an evaluation set",
}

STAGES: Mapping[str, str] = {
    "download": "fetch and resize images",
    "embed": "embed images for deduplication",
    "copies": "find images that share captions",
    "caption": "write synthetic texts",
    "filter": "score every text",
    "dedup": "find duplicates",
    "select": "decide on every pair",
    "assemble": "write the training set",
    "ledger": "balance the accounts",
    "pretrain": "train MED",
    "finetune_captioner": "tune the captioner",
    "finetune_filter": "tune the filter",
    "evaluate": "measure the models",
    "audit": "hold the data against the truth",
    "gate": "promote or keep models",
}


def word(metric: str) -> Word:
    """The metric in words; one that is not known goes by its own name."""
    return METRICS.get(metric) or Word(metric, "", "number", 0)


def figure(value: float | None, kind: Kind) -> str:
    """``49.3%``, ``0.985`` or ``1,234``; nothing where there is no value."""
    if value is None:
        return ""
    if not isfinite(value):
        return "–"
    if kind == "share":
        return f"{value:.1%}"
    return f"{value:,.0f}" if kind == "count" else f"{value:,.3f}"


def change(first: float, last: float, kind: Kind) -> str:
    """The step from one figure to another: ``+12.3 pp``, ``−0.120``, ``+52``."""
    step = last - first
    sign = "+" if step > 0 else "−" if step < 0 else "±"
    size = abs(step)
    if kind == "share":
        return f"{sign}{100 * size:.1f} pp"
    return f"{sign}{size:,.0f}" if kind == "count" else f"{sign}{size:,.3f}"
