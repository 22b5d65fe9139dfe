"""The two shapes a stage can have, and what a stage says about the machine it needs.

A stage knows nothing of Ray, run folders or the clock. `ShardStage` turns one table into one
table; `DatasetStage` sees a whole round at once. The engine decides where and when they run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar

import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import pyarrow.parquet as pq

T = TypeVar("T")
R = TypeVar("R")


class Config(BaseModel):
    """Base of every configuration: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def operational(default: T, **constraints: object) -> T:
    """A config field that cannot change what a stage writes, so no fingerprint covers it."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)  # type: ignore[call-overload, no-any-return]


def fingerprinted(config: BaseModel) -> dict[str, object]:
    """The fields of ``config``, nested ones included, that can change a stage's output rows."""
    values: dict[str, object] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            continue
        value = getattr(config, name)
        values[name] = fingerprinted(value) if isinstance(value, BaseModel) else value
    return values


def _a_share_or_whole(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("a share of one GPU, at most 1, or a whole number of GPUs")
    return value


Gpus = Annotated[float, Field(ge=0), AfterValidator(_a_share_or_whole)]
"""A share of one GPU, which others share, or whole GPUs."""


class Resources(Config):
    """What one replica of a stage occupies, and how many there may be."""

    cpus: float = Field(1.0, gt=0)
    gpus: Gpus = 0.0
    memory_gb: float = Field(0.0, ge=0)
    """GiB of main memory to set aside; 0 sets none aside."""
    accelerator: str | None = None
    """Only on nodes with this accelerator, by Ray's name of it: H100, A100, L4…"""
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)


class WholeRoundConfig(Config):
    """Config of a `DatasetStage` that runs in one worker."""

    resources: Resources = operational(Resources())
    """Of its one worker; replicas do not count."""


class ShardStage(ABC):
    """A function from one shard's table to another, built from its own config alone.

    ``process`` must be a function of its input only: the same table gives the same table, in any
    process, on any retry. ``setup`` loads weights, once per worker.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    input_schema: ClassVar[pa.Schema]
    output_schema: ClassVar[pa.Schema]

    @property
    @abstractmethod
    def resources(self) -> Resources: ...

    def setup(self) -> None:  # noqa: B027 - most CPU stages have nothing to load
        """Load what every call needs. Called once before the first ``process``."""

    def shared(self) -> Callable[..., Any] | None:
        """What all workers of the stage in a run ask, where they must agree on something: made
        once, called by one of them at a time. None: they need nothing of each other."""
        return None

    def share(self, ask: Callable[..., Any], worker: str) -> None:  # noqa: B027 - most do not
        """Before `setup`: how to call what `shared` has made, wherever that is; and the name of
        this worker, which stays the same if it dies and is started again."""

    def choices(self) -> dict[str, int]:
        """What `setup` found on its machine and what another attempt at the same shard must
        repeat, such as a batch size. JSON; empty where nothing was found."""
        return {}

    def choose(self, choices: Mapping[str, int]) -> None:  # noqa: B027 - most have no choice
        """Take over another attempt's `choices`."""

    def facts(self) -> dict[str, str]:
        """What is worth knowing of the last `process`, for the record."""
        return {}

    @abstractmethod
    def process(self, table: pa.Table) -> pa.Table: ...

    @abstractmethod
    def failed(self, table: pa.Table, status: str, detail: str) -> pa.Table:
        """The output rows for input rows that cannot be processed: ``status`` is ``failed`` or
        ``quarantined``. Needs no `setup`."""


class Context(Protocol):
    """What the engine gives a dataset stage. Training stages use rank, save and resume_from too."""

    rank: int
    world_size: int

    def map(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        reads: Sequence[Path] = (),
        gpus: float = 0.0,
    ) -> list[R]:
        """``[function(item) for item in items]``, in order, perhaps in parallel, on any machine.
        ``reads``: files that the stage wrote, or folders of such, which ``function`` reads where
        they lie; nobody may write them meanwhile. ``gpus``: what each call needs of a GPU."""
        ...

    def progress(self, message: str, done: int, total: int) -> None:
        """Tell the person who waits how far the stage is."""
        ...

    def save(self, write: Callable[[Path], None]) -> None:
        """Keep a resumable checkpoint: ``write`` fills an empty folder, which then replaces the
        last one as a whole."""
        ...

    def resume_from(self) -> Path | None:
        """The folder of the last checkpoint that this very work saved, or None."""
        ...


class LocalContext:
    """A `Context` in the calling process: one worker, which maps over ``threads``, no progress,
    checkpoints in a folder."""

    rank = 0
    world_size = 1

    def __init__(self, checkpoints: Path | None = None, threads: int = 1) -> None:
        self._checkpoints, self._threads = checkpoints, threads

    def map(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        reads: Sequence[Path] = (),
        gpus: float = 0.0,
    ) -> list[R]:
        if self._threads == 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(function, items))

    def progress(self, message: str, done: int, total: int) -> None:
        pass

    def save(self, write: Callable[[Path], None]) -> None:
        if self._checkpoints is not None:
            replace_folder(self._checkpoints, write)

    def resume_from(self) -> Path | None:
        return last_folder(self._checkpoints) if self._checkpoints is not None else None


def replace_folder(parent: Path, write: Callable[[Path], None]) -> None:
    """Write a new numbered folder below ``parent`` and drop the older ones.

    The rename is what publishes: a kill at any moment leaves the previous folder or the new one.
    """
    import shutil

    parent.mkdir(parents=True, exist_ok=True)
    finished = sorted(p for p in parent.iterdir() if p.name.isdigit())
    number = int(finished[-1].name) + 1 if finished else 0
    scratch = parent / f"{number:08d}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    write(scratch)
    scratch.rename(parent / f"{number:08d}")
    for old in finished:
        shutil.rmtree(old, ignore_errors=True)


def last_folder(parent: Path) -> Path | None:
    """The newest folder that `replace_folder` finished below ``parent``, or None."""
    if not parent.is_dir():
        return None
    return max((p for p in parent.iterdir() if p.name.isdigit()), default=None)


class DatasetStage(ABC):
    """A stage that needs a whole round at once.

    ``inputs`` maps names to the files a stage reads, sorted; what they must hold is said by the
    stage's docstring. Everything it writes goes below ``output_dir``, an empty local folder.
    Training stages are dataset stages that run once per rank.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    @abstractmethod
    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None: ...


def read_tables(files: Iterable[Path], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Parquet files one after the other, only the named columns. Raises KeyError for one that a
    file lacks."""
    import pyarrow.parquet as pq

    for file in files:
        # `pq.read_table` would import pyarrow's datasets, 0.8 s of every worker's start.
        with pq.ParquetFile(file) as table:
            found = table.read(columns=list(columns) if columns is not None else None)
        yield found if columns is None else found.select(list(columns))


def batches(files: Iterable[Path], columns: Sequence[str]) -> Iterator[pa.Table]:
    """The named columns of Parquet files, 10,000 rows at a time, whatever a file's row groups."""
    import pyarrow.parquet as pq

    for file in files:
        with pq.ParquetFile(file, buffer_size=PAGE_BUFFER) as parquet:
            for batch in record_batches(parquet, 10_000, columns):
                yield pa.Table.from_batches([batch])


PAGE_BUFFER = 1 << 16
"""Bytes of a column that are read at once: a row group may hold a million rows."""


def record_batches(
    parquet: pq.ParquetFile, rows: int, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Batches of at most ``rows`` rows, one row group after the other: asked for all at once,
    Arrow keeps the buffers of each from the start, and memory would grow with the file."""
    for group in range(parquet.num_row_groups):
        # Threads of its own would each keep memory, and read faster than rows are made of it.
        yield from parquet.iter_batches(rows, [group], list(columns), use_threads=False)


def read_table(files: Sequence[Path], schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """The named columns of all the files as one table; an empty one where there are no files."""
    kinds = pa.schema([schema.field(name) for name in columns])
    tables = [table.cast(kinds) for table in read_tables(files, columns)]
    return pa.concat_tables([kinds.empty_table(), *tables])
