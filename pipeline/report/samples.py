"""Sample pictures of one round: pairs kept and rejected, and clusters of duplicates.

The choice follows from ids and scores alone, so that a report made again shows the same. Of a
large run only a few shards are sampled, and only the tars of the chosen images are opened.
"""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from PIL import Image

from pipeline.inspect import Query
from pipeline.records import Payload
from pipeline.report.collect import RoundFacts
from pipeline.store import Store
from pipeline.tombstones import read_removed

PER_GROUP = 12
CLUSTERS = 6
MEMBERS = 4
_SHARDS = 8
"""How many shards the pairs are drawn from."""
_CANDIDATES = 2000
_TEXT = 1000
"""Characters of a text that are read."""
_SIDE = 192
"""Longest side of a picture on the page, pixels."""
_TINY = 96
_MAX_BYTES = 32 << 20
_MAX_PIXELS = 50_000_000
_FORMATS = ("JPEG", "PNG", "WEBP")
"""What download writes; nothing else in a tar is opened."""


@dataclass(frozen=True)
class Picture:
    """An image that can stand in a page: encoded anew, without any metadata."""

    src: str
    """A data URI."""
    width: int
    height: int

    @property
    def tiny(self) -> bool:
        """Better shown with hard pixels than blurred."""
        return max(self.width, self.height) < _TINY


@dataclass(frozen=True)
class Sample:
    """One pair as it is shown."""

    pair_id: str
    sample_id: str
    shard: str
    source: str
    text: str | None
    """None for a caption that could not be written."""
    score: float | None
    state: str
    picture: Picture | None = None
    """None where the image cannot be read."""


@dataclass(frozen=True)
class Member:
    """One image of a cluster with its texts."""

    samples: tuple[Sample, ...]
    net: str | None
    similarity: float | None

    @property
    def survives(self) -> bool:
        return any(sample.state == "kept" for sample in self.samples)

    @property
    def picture(self) -> Picture | None:
        return self.samples[0].picture


@dataclass(frozen=True)
class Cluster:
    """A survivor, first, and its duplicates."""

    members: tuple[Member, ...]
    images: int
    """How many the cluster has; ``members`` may be fewer."""


@dataclass(frozen=True)
class Samples:
    """What is shown of one round."""

    groups: Mapping[tuple[str, str], tuple[Sample, ...]]
    """(web or synthetic, kept or rejected) → pairs, best match first."""
    clusters: tuple[Cluster, ...]


def read_samples(store: Store, facts: RoundFacts) -> Samples:
    """The samples of one round; empty groups where nothing is published.

    Raises:
        UserError: a table cannot be read.
    """
    if "pairs" not in facts.views:
        return Samples({}, ())
    shards = spread(sorted(facts.tars), _SHARDS)
    groups = {
        (source, state): _group(store, facts, source, state, shards)
        for source in ("web", "synthetic")
        for state in ("kept", "rejected")
    }
    clusters = _clusters(store, facts) if "clusters" in facts.views else ()
    chosen = [sample for group in groups.values() for sample in group]
    chosen += [s for cluster in clusters for member in cluster.members for s in member.samples[:1]]
    pictures = read_pictures(store, facts.tars, chosen)
    return Samples(
        {key: _with(group, pictures) for key, group in groups.items() if group},
        tuple(
            Cluster(
                tuple(
                    Member(_with(m.samples, pictures), m.net, m.similarity) for m in cluster.members
                ),
                cluster.images,
            )
            for cluster in clusters
        ),
    )


def _with(samples: Sequence[Sample], pictures: Mapping[str, Picture]) -> tuple[Sample, ...]:
    return tuple(replace(sample, picture=pictures.get(sample.sample_id)) for sample in samples)


def spread(items: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the items, evenly spaced, both ends among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


# ---- pairs -----------------------------------------------------------------------------------


def _group(
    store: Store, facts: RoundFacts, source: str, state: str, shards: Sequence[str]
) -> tuple[Sample, ...]:
    """Pairs over the whole range of scores, one image each."""
    states = ("kept", "merged") if state == "kept" else (state,)
    query = _GROUP.format(
        text=_TEXT,
        source=_literal(source),
        states=", ".join(map(_literal, states)),
        shards=", ".join(map(_literal, shards)) or "NULL",
        limit=_CANDIDATES,
    )
    hidden = read_removed(store).samples
    rows = Query(store, {"pairs": facts.views["pairs"]}, hidden).run(query, _CANDIDATES)[1]
    one_each = {row[1]: Sample(*row) for row in reversed(rows)}
    return stratified(list(one_each.values()), PER_GROUP)


_GROUP = """
SELECT pair_id, sample_id, shard, source, left(text, {text}), itm_score, state FROM pairs
WHERE source = {source} AND state IN ({states}) AND shard IN ({shards})
ORDER BY pair_id LIMIT {limit}
"""


def stratified(samples: Sequence[Sample], count: int) -> tuple[Sample, ...]:
    """``count`` samples, one from each of as many equal slices of the scores; the best first.

    Within a slice the smallest pair_id, which is a hash, decides: as good as chance, and always
    the same.
    """
    ordered = sorted(samples, key=lambda s: (-(s.score or 0.0), s.pair_id))
    if len(ordered) <= count:
        return tuple(ordered)
    edges = [round(i * len(ordered) / count) for i in range(count + 1)]
    slices = (ordered[a:b] for a, b in pairwise(edges))
    return tuple(min(part, key=lambda s: s.pair_id) for part in slices)


# ---- clusters --------------------------------------------------------------------------------


def _clusters(store: Store, facts: RoundFacts) -> tuple[Cluster, ...]:
    """Clusters of two images or more; those with a survivor first, every net among them."""
    views = {name: facts.views[name] for name in ("pairs", "clusters")}
    hidden = read_removed(store).samples
    rows = Query(store, views, hidden).run(_CLUSTERS.format(text=_TEXT), 200 * 4 * MEMBERS)[1]
    found: dict[str, dict[str, list[Sample]]] = {}
    ties: dict[str, tuple[str | None, float | None]] = {}
    sizes: dict[str, int] = {}
    for cluster, images, net, similarity, *pair in rows:
        sample = Sample(*pair)
        found.setdefault(cluster, {}).setdefault(sample.sample_id, []).append(sample)
        ties[sample.sample_id] = (net, similarity)
        sizes[cluster] = images
    clusters = [Cluster(_members(members, ties), sizes[name]) for name, members in found.items()]
    return _varied([cluster for cluster in clusters if len(cluster.members) > 1])


def _members(
    samples: Mapping[str, list[Sample]], ties: Mapping[str, tuple[str | None, float | None]]
) -> tuple[Member, ...]:
    members = [Member(tuple(found), *ties[sample]) for sample, found in samples.items()]
    return tuple(sorted(members, key=lambda m: not m.survives)[:MEMBERS])


def _varied(clusters: Sequence[Cluster]) -> tuple[Cluster, ...]:
    """`CLUSTERS` of them, taken in turn from those of each net; small ones first."""
    by_net: dict[str | None, list[Cluster]] = {}
    for cluster in sorted(clusters, key=lambda c: not c.members[0].survives):
        by_net.setdefault(cluster.members[-1].net, []).append(cluster)
    longest = max(map(len, by_net.values()), default=0)
    turns = (group[i] for i in range(longest) for group in by_net.values() if i < len(group))
    return tuple(sorted(list(turns)[:CLUSTERS], key=lambda c: len(c.members)))


_CLUSTERS = """
WITH groups AS (
    SELECT cluster_id, count(*) AS images FROM clusters
    GROUP BY cluster_id HAVING count(*) > 1 ORDER BY md5(cluster_id) LIMIT 200
)
SELECT cluster_id, images, net, similarity,
    pair_id, sample_id, shard, source, left(text, {text}), itm_score, state
FROM groups JOIN clusters USING (cluster_id)
    JOIN (SELECT * EXCLUDE (cluster_id) FROM pairs WHERE source IN ('web', 'synthetic'))
    USING (sample_id)
QUALIFY row_number() OVER (
    PARTITION BY cluster_id ORDER BY state <> 'kept', sample_id, source DESC, pair_id) <= 16
ORDER BY md5(cluster_id), state <> 'kept', sample_id, source DESC, pair_id
"""


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# ---- images ----------------------------------------------------------------------------------


def read_pictures(
    store: Store, tars: Mapping[str, Iterable[Payload]], samples: Iterable[Sample]
) -> dict[str, Picture]:
    """sample_id → picture. What cannot be read or decoded is left out."""
    wanted: dict[str, set[str]] = {}
    for sample in samples:
        wanted.setdefault(sample.shard, set()).add(sample.sample_id)
    pictures: dict[str, Picture] = {}
    for shard, names in wanted.items():
        for payload in tars.get(shard, ()):
            pictures.update(_from_tar(store, payload, names))
    return pictures


def _from_tar(store: Store, payload: Payload, names: set[str]) -> dict[str, Picture]:
    """The named images of one tar, which is read no further than the last of them."""
    found: dict[str, Picture] = {}
    missing = set(names)
    try:
        with (
            store.fs.open(store.path(payload.path), "rb") as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            for member in archive:
                name = member.name.partition(".")[0]
                if name not in missing or not member.isfile() or member.size > _MAX_BYTES:
                    continue
                content = archive.extractfile(member)
                picture = draw(content.read()) if content is not None else None
                if picture is not None:
                    found[name] = picture
                missing.discard(name)
                if not missing:
                    break
    except Exception:  # noqa: BLE001 - one shard's images; the page shows that they are missing
        return found
    return found


def draw(data: bytes) -> Picture | None:
    """An image of at most `_SIDE` pixels a side; None for bytes that are no image of ours."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                return None
            small = image.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        if max(small.size) < _TINY:
            small.save(buffer, "PNG", optimize=True)
            kind = "png"
        else:
            small.save(buffer, "JPEG", quality=80)
            kind = "jpeg"
    except Exception:  # noqa: BLE001 - one image; a decoder raises whatever it likes
        return None
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/{kind};base64,{encoded}", small.width, small.height)
