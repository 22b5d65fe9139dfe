"""Integration tests, two at a time: the longest files first, so that no worker ends alone."""

import pytest

_LONGEST = ("test_resume", "test_real_photos", "test_engine_train", "test_engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST)

    items.sort(key=place)
