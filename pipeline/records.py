"""Records, which publish the work of a run, and the fingerprints in their names."""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel, Field

from stages.base import Config, fingerprinted

CHECKPOINTS = "scratch/checkpoints"
"""Below it, a folder for each unfinished training, from which that goes on."""


class Payload(Config):
    """One published file."""

    path: str
    """Relative to the run folder."""
    bytes: int
    sha256: str
    rows: int | None = None
    """Rows of a Parquet file; None for anything else."""
    first_sha256: str | None = None
    """Of the file as first published, where `pipeline.scrub` has taken samples out of it since."""


class Record(Config):
    """One finished piece of work: a shard through one stage, or a whole-round stage."""

    stage: str
    stage_version: int
    round: int | None
    """None for stages whose output belongs to the run (sources, download, embed)."""
    shard: str
    """Six digits or more, or ``all`` for a stage that sees the whole round."""
    fingerprint: str
    payloads: tuple[Payload, ...]
    counts: dict[str, int] = Field(default_factory=dict)
    """Rows by status."""
    details: dict[str, str] = Field(default_factory=dict)
    """What else is known of the work: ``weights`` of a model stage (what stood for them in the
    fingerprint) and the ``batch_size`` it ran with; ``file``, ``kind`` and ``identity`` of an
    ingested file; ``reads``, a JSON list of the records of whole-round stages that a whole-round
    stage has read; ``scrubbed``, when removed samples were last taken out of its files (UTC)."""
    code_version: str
    token: int | None = None
    """Of the lease under which it was published; None for what needs none. See `pipeline.lease`."""
    started: float
    """Seconds since the epoch, UTC."""
    finished: float

    @property
    def name(self) -> str:
        return record_name(self.stage, self.round, self.shard, self.fingerprint)


def record_name(stage: str, round_: int | None, shard: str, fingerprint: str) -> str:
    """Path of a record below the run folder; says all that planning needs to know."""
    scope = "run" if round_ is None else f"round={round_:02d}"
    return f"records/{scope}/stage={stage}/{shard}-{fingerprint}.json"


def lease_name(token: int) -> str:
    """Path of the lease with that fencing token below the run folder."""
    return f"leases/{token:06d}.json"


def fingerprint(stage: str, version: int, config: BaseModel | None, *inputs: str) -> str:
    """64 bits, as 16 hex digits, over all that can change what a stage writes.

    Covers the stage and its version, the fields of ``config`` that are not operational, and
    ``inputs``: fingerprints of the records read (a record is immutable, so its fingerprint stands
    for its content) and hashes of weights.
    """
    described = json.dumps(
        [stage, version, fingerprinted(config) if config else None, list(inputs)],
        sort_keys=True,
        default=_jsonable,
    )
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _jsonable(value: object) -> object:
    if isinstance(value, BaseModel):
        return fingerprinted(value)
    return str(value)
