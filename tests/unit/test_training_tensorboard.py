"""Event files, read back."""

import struct
from pathlib import Path

import pyarrow as pa
from tensorboardX.proto.event_pb2 import Event

from stages.schemas import TRAINING_LOG
from stages.training.tensorboard import write_events

ROWS = [
    {"stage": "pretrain", "step": step, "loss": loss, "loss_itc": loss, "lr": 0.5}
    for step, loss in ((10, 2.5), (20, 1.25))
]


def events(folder: Path) -> list[Event]:
    """Each record is its length (8 bytes), a checksum (4), the event and another checksum (4)."""
    (file,) = folder.iterdir()
    assert "tfevents" in file.name, "TensorBoard looks for it"
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_every_number_is_a_point_of_its_curve(tmp_path: Path) -> None:
    write_events(tmp_path / "tensorboard", pa.Table.from_pylist(ROWS, schema=TRAINING_LOG))
    version, *points = events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    found = [(p.step, v.tag, v.simple_value) for p in points for v in p.summary.value]
    assert found == [
        (row["step"], f"pretrain/{name}", row[name])
        for row in ROWS
        for name in ("loss", "loss_itc", "lr")
    ]


def test_equal_logs_make_equal_files(tmp_path: Path) -> None:
    log = pa.Table.from_pylist(ROWS, schema=TRAINING_LOG)
    for name in ("a", "b"):
        write_events(tmp_path / name, log)
    (a,), (b,) = (list((tmp_path / name).iterdir()) for name in ("a", "b"))
    assert a.name == b.name and a.read_bytes() == b.read_bytes()
