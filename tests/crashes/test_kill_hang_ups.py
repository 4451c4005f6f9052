"""The gateway is killed at every step of what becomes of a request whose caller has hung up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crashes.hang_ups import HANG_UPS
from tests.crashes.matrix import kill_at_every_step
from tests.crashes.world import World


@pytest.mark.parametrize("name", HANG_UPS)
def test_killed_at_every_step_nothing_is_lost_and_nothing_happens_twice(
    world: World, tmp_path: Path, name: str
) -> None:
    kill_at_every_step(world, tmp_path, HANG_UPS, name)
