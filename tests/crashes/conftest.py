"""One world for all kills of a test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crashes.forks import Forks
from tests.crashes.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[World]:
    """A chain, providers, and a process that forks gateways."""
    with World.open(tmp_path_factory.mktemp("world"), forks) as world:
        yield world
