"""The gateway is killed at every step of payments that the chain spoils."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crashes.matrix import kill_at_every_step
from tests.crashes.misfortunes import MISFORTUNES
from tests.crashes.world import World


@pytest.mark.parametrize("name", MISFORTUNES)
def test_killed_at_every_step_nothing_is_lost_and_nothing_happens_twice(
    world: World, tmp_path: Path, name: str
) -> None:
    kill_at_every_step(world, tmp_path, MISFORTUNES, name)
