"""What all tests share; helpers are in tests/support."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_training import write_blobs


def pytest_collection_modifyitems(items) -> None:
    """The slow ones first: the others run beside them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A preprocessed dataset of shifted blobs; whoever changes something in it copies it first."""
    return write_blobs(tmp_path_factory.mktemp("preprocessed"))
