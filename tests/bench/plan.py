"""What 10M, 129M and 1B pairs take: `infra/README.md` shows this table and tells its formulas.

``python -m tests.bench.plan`` prints it. None of the rates below has been measured on the hardware
meant: they are assumptions, to be replaced by those of ``capfilt status`` on a first million.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

SIZES = {"10M": 10_000_000, "129M": 129_000_000, "1B": 1_000_000_000}
_HOUR = 3600.0


@dataclass(frozen=True)
class Rates:
    """Assumptions. Images a second are those of one GPU of 48 to 80 GB in bfloat16."""

    alive: float = 0.8
    """Share of the URLs that still give an image."""
    kept: float = 0.8
    """Of these, share that is trained with."""
    download_bytes: float = 200e3
    """Of an image as it lies on the web."""
    image_bytes: float = 45e3
    """Of an image as it is stored, shorter side 384."""
    row_bytes: float = 2.5e3
    """Of all Parquet of one image in one round, its embedding of 512 float16 included."""
    download: float = 50.0
    """Images a second of one CPU core."""
    caption: float = 60.0
    """Images a second (ViT-L, 384 px, 20 tokens)."""
    filter: float = 120.0
    """Images a second, with two texts each (ViT-L, 384 px)."""
    embed: float = 600.0
    """Images a second (CLIP ViT-B/32)."""
    train: float = 150.0
    """Images a second of pretraining (ViT-L, 224 px, momentum encoders)."""
    epochs: float = 20.0
    itm: float = 2_000.0
    """Image-text pairs a second that evaluation re-ranks (ViT-L, 384 px, float32)."""
    beam: float = 10.0
    """Images a second that evaluation captions with 3 beams (ViT-L, 384 px, float32)."""
    probes: float = 5_000.0
    """Images of each of the two probe sets, with five texts each."""
    k_test: float = 256.0
    """Pairs that are re-ranked of each image and each text."""
    shard_size: float = 10_000.0
    samples_per_tar: float = 1_000.0
    """Of the training tars."""
    requests: float = 46.0
    """That one shard makes of the store while it is labelled, counted on loopback
    (`tests.bench.requests_a_shard`)."""
    driver: float = 0.031
    """Seconds of one core that the driver takes for a shard, measured (`tests.bench.scale`)."""
    gpus: float = 32.0


def plan(pairs: float, rates: Rates) -> dict[str, float]:
    """The plan of one run of one bootstrapping round over ``pairs`` URLs, round 0 included."""
    images = pairs * rates.alive
    shards = pairs / rates.shard_size
    label = images * (1 / rates.caption + 1 / rates.filter + 1 / rates.embed) / _HOUR
    # Round 0 trains on all images, round 1 on those that are kept.
    train = images * (1 + rates.kept) * rates.epochs / rates.train / _HOUR
    # MED and filter rank, the captioner writes, for rounds 0 and 1 on both probe sets.
    rank = 2 * 6 * rates.probes * rates.k_test / rates.itm
    evaluate = 2 * 2 * (rank + rates.probes / rates.beam) / _HOUR
    stored = images * (rates.image_bytes * (2 + rates.kept) + rates.row_bytes)
    # A shard: 7 payloads, 6 records, 3 plans with batch sizes.
    objects = shards * 16 + images * (1 + rates.kept) / rates.samples_per_tar
    # Embedding and captioning each read the images, since what is copied is found in between.
    read = 2 * images * rates.image_bytes / 1e6
    seconds = label / rates.gpus * _HOUR
    return {
        "shards": shards,
        "download, core-hours": images / rates.download / _HOUR,
        "labelling, GPU-hours": label,
        "pretraining, GPU-hours": train,
        "evaluation, hours on one GPU": evaluate,
        "labelling, days on the GPUs": label / rates.gpus / 24,
        "pretraining, days on the GPUs": train / rates.gpus / 24,
        "from the web, TB": images * rates.download_bytes / 1e12,
        "stored, TB": stored / 1e12,
        "read for labelling, MB/s": read / seconds,
        "objects, thousands": objects / 1e3,
        "writes a second while labelling": shards * 11 / seconds,
        "requests a second while labelling": shards * rates.requests / seconds,
        "GPUs that take one core of the driver": label * _HOUR / shards / rates.driver,
        "pages of one listing of records": shards * 6 / 1000,
    }


def table(rates: Rates) -> str:
    """A Markdown table, a column a size."""
    plans = [plan(pairs, rates) for pairs in SIZES.values()]
    lines = [f"| | {' | '.join(SIZES)} |", "| --- |" + " ---: |" * len(plans)]
    lines += [f"| {name} | {' | '.join(_figure(p[name]) for p in plans)} |" for name in plans[0]]
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def assumed(rates: Rates) -> str:
    """The assumptions in one line."""
    return ", ".join(f"{f.name} {getattr(rates, f.name):,g}" for f in fields(rates))


if __name__ == "__main__":
    print(table(Rates()))
    print(assumed(Rates()))
