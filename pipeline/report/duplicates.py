"""How duplicates were searched for: what each net tied, and what the search measured of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.inspect import Query
from pipeline.report.collect import RoundFacts
from pipeline.report.safe import plain
from pipeline.store import Store
from stages.select import MOST_TEXTS


def read_duplicates(store: Store, rounds: Sequence[RoundFacts]) -> list[tuple[str, str]]:
    """(what, how much) of the last round that has searched; empty before."""
    facts = next((f for f in reversed(rounds) if "dedup" in f.views), None)
    if facts is None:
        return []
    rows = Query(store, {"dedup": facts.views["dedup"]}).run(_FACTS, 100)[1]
    told = _told({(net, metric): float(value) for net, metric, value in rows})
    if "copies" in facts.views:
        (row,) = Query(store, {"copies": facts.views["copies"]}).run(_COPIES, 1)[1]
        images, captioned, scored = (float(value or 0) for value in row)
        told[:0] = [
            ("Images captioned for all their copies", f"{captioned:,.0f} of {images:,.0f}"),
            ("Images scored for all their copies", f"{scored:,.0f} of {images:,.0f}"),
        ]
    if "texts" in facts.views:
        (row,) = Query(store, {"texts": facts.views["texts"]}).run(_TEXTS, 1)[1]
        shared, capped, text, images = row
        if shared:
            which = "the most shared" if shared == MOST_TEXTS else "all"
            how_many = f"{shared:,} ({which}), {capped:,} pairs of them capped"
            told.append(("Texts that images share", how_many))
            told.append(("The most shared", f"“{plain(text, 60)}”, {images:,} images"))
    return told


def _told(found: Mapping[tuple[str, str], float]) -> list[tuple[str, str]]:
    def count(net: str, metric: str) -> str:
        return f"{found.get((net, metric), 0):,.0f}"

    tables = found.get(("semantic", "tables"))
    way = f"{tables:,.0f} tables of 2^{count('semantic', 'bits')} buckets"
    told = [
        ("Exact copies", count("exact", "copies")),
        ("New ties by perceptual hash", count("perceptual", "pairs")),
        ("New ties by embedding", count("semantic", "pairs")),
    ]
    if tables is not None:  # runs of earlier versions tell other things
        told.append(("New embeddings compared", way if tables else "each with every other"))
    if tables:
        sample = f"{count('semantic', 'sampled_pairs')} pairs of {count('semantic', 'sampled')}"
        told += [
            (label, f"{found.get(('semantic', name), 0):.4f}, on {sample} sampled images")
            for label, name in (("Recall", "recall"), ("Precision", "precision"))
        ]
    widest = found.get(("clusters", "widest_cosine"), 1.0)
    size = count("clusters", "widest_size")
    return [
        *told,
        ("Widest cluster", f"least cosine {widest:.3f}, {size} images"),
        ("Chains of unlike images cut", count("clusters", "chains_cut")),
        ("Images that evaluation sets show", count("contamination", "images")),
    ]


_FACTS = "SELECT net, metric, value FROM dedup WHERE value IS NOT NULL"

_COPIES = """
SELECT max(value) FILTER (metric = 'images'), max(value) FILTER (metric = 'captioned'),
    max(value) FILTER (metric = 'scored') FROM copies
"""

_TEXTS = """
SELECT count(*), coalesce(sum(capped), 0)::BIGINT, arg_max(text, images), max(images) FROM texts
"""
