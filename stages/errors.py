"""The errors of capfilt; each name says what follows.

    CapfiltError
    ├── UserError        bad input from the person who runs us: one line, exit 2, nothing written
    │   ├── ConfigError      a configuration field
    │   ├── SourceError      a source file, table or column
    │   ├── CheckpointError  a model folder
    │   ├── StoreError       the run folder cannot be reached, read or written
    │   └── LeaseHeldError   another driver is at work in the run folder
    ├── RunError         the run cannot go on or its books are wrong: exit 1
    │   ├── LedgerError      an account does not balance
    │   ├── TrainingError    a loss is NaN or diverges
    │   └── LeaseLostError   another driver has taken the run over
    └── ShardError       one shard failed: retried, then run alone, then quarantined

A bad row is data, not an exception: it carries its status in the stage's output.
"""


class CapfiltError(Exception):
    """Base of every error raised on purpose; ``str(error)`` is one line for a person."""


class UserError(CapfiltError):
    """Bad input: what, where, what is allowed, what to do. Ends the program with exit code 2."""


class ConfigError(UserError):
    """A configuration field is unknown, missing or out of range."""


class SourceError(UserError):
    """A source cannot be read: no such file, no rows, or a missing column."""


class CheckpointError(UserError):
    """A model folder or hub id does not hold the model that the stage needs."""


class StoreError(UserError):
    """The run folder cannot be reached, read or written."""


class LeaseHeldError(UserError):
    """Another driver holds the lease of the run folder."""


class RunError(CapfiltError):
    """The run cannot go on. Ends the program with exit code 1."""


class LedgerError(RunError):
    """Rows or pairs went missing, or were counted twice."""


class TrainingError(RunError):
    """Training cannot go on: the loss is not finite or diverges, or workers read other pairs."""


class LeaseLostError(RunError):
    """Another driver has taken the run over; nothing more may be published."""


class ShardError(CapfiltError):
    """A stage could not process one shard."""


_NO_MEMORY = (
    "CUDA out of memory",  # torch's allocator for GPUs; the others go round it
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",  # pinned memory and graphs
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or one that it followed, says that a GPU's or the machine's memory is used
    up: a graph whose capture that interrupts complains of the capture alone."""
    while error is not None:
        told = str(error)
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and any(words in told for words in _NO_MEMORY)
        ):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


_CLOUD_MODULES = frozenset({"botocore", "aiohttp", "aiobotocore", "gcsfs", "google", "fsspec"})


def from_remote_store(error: Exception) -> bool:
    """Whether a cloud client raised it: botocore's errors derive from Exception alone."""
    return type(error).__module__.partition(".")[0] in _CLOUD_MODULES
