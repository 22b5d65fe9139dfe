"""What a run tells the person who waits: live in a terminal, plain lines elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Notices:
    """What the workers of a run have told so far, at one moment."""

    running: dict[tuple[str, str], float] = field(default_factory=dict)
    """(stage, shard) → when it began, seconds since the epoch."""
    done: dict[str, int] = field(default_factory=dict)
    """Stage → shards ended well."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Stage → rows by status."""
    errors: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """(stage, shard) → (class name, message) of what it raised."""
    progress: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Whole-round stage → (message, done, total)."""
