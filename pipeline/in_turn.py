"""Files of a remote store that are read one after the other, without room for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from pipeline.store import Store


class InTurn(Sequence[Path]):
    """Local paths of files of which only the one in use lies on this machine: the copy of the
    one before is gone when the next is asked for. For those who read a shard after the other."""

    def __init__(self, store: Store, files: Sequence[str]) -> None:
        self._store, self._files = store, files
        self._last: str | None = None

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> InTurn: ...

    def __getitem__(self, index: int | slice) -> Path | InTurn:
        if isinstance(index, slice):
            return InTurn(self._store, self._files[index])
        if self._last is not None:
            self._store.drop_copy(self._last)
            self._last = None
        self._last = self._files[index]
        return self._store.local_copy(self._last)
