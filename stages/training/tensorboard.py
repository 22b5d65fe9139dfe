"""A training log as a TensorBoard event file.

Made from the log's table once training is over: so the curve of a run that was killed and resumed
is whole, and equal logs make equal files. A step stands in for the time of day.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

_FILE = "events.out.tfevents.0.capfilt"
_NOT_DRAWN = ("stage", "step")


def write_events(folder: Path, log: pa.Table) -> None:
    """Every number of ``log`` (TRAINING_LOG) by step, tagged ``stage/column``; nulls left out."""
    folder.mkdir()
    writer = RecordWriter(str(folder / _FILE))
    writer.write(Event(wall_time=0, file_version="brain.Event:2").SerializeToString())
    for row in log.to_pylist():
        for name, value in row.items():
            if name in _NOT_DRAWN or value is None:
                continue
            summary = scalar(f"{row['stage']}/{name}", value)
            event = Event(wall_time=row["step"], step=row["step"], summary=summary)
            writer.write(event.SerializeToString())
    writer.close()
