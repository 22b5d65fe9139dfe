"""What is said of a shard whose process ended, by the errors that Ray itself makes."""

from __future__ import annotations

import pytest
import ray.exceptions as rays

from pipeline.engine import isolate


def of_task(cause: Exception) -> rays.RayTaskError:
    return rays.RayTaskError("caption", "its traceback", cause)


@pytest.mark.parametrize(
    ("error", "lost", "of_rows"),
    [
        (rays.NodeDiedError("spot node is gone"), True, False),
        (rays.LocalRayletDiedError(), True, False),
        (rays.ObjectLostError("00", None, ""), True, False),
        (rays.OwnerDiedError("00", None, ""), True, False),
        (rays.ObjectReconstructionFailedError("00", None, ""), True, False),
        (rays.WorkerCrashedError(), False, True),
        (of_task(ValueError("a bad row")), False, True),
        (of_task(MemoryError()), False, False),
        (rays.OutOfMemoryError("the machine's"), False, False),
        (rays.RuntimeEnvSetupError("pip"), False, False),
    ],
)
def test_whose_fault_it_is(error: rays.RayError, lost: bool, of_rows: bool) -> None:
    assert isinstance(error, isolate._LOST) == lost
    assert isolate._is_rows_fault(error) == of_rows
