"""The gateway is killed at every step of what becomes of a deposit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crashes.deposits import DEPOSITS
from tests.crashes.matrix import kill_again_at_every_step, kill_at_every_step
from tests.crashes.world import World


@pytest.mark.parametrize("name", DEPOSITS)
def test_killed_at_every_step_nothing_is_lost_and_nothing_happens_twice(
    world: World, tmp_path: Path, name: str
) -> None:
    kill_at_every_step(world, tmp_path, DEPOSITS, name)


def test_killed_again_at_every_step_of_the_recovery(world: World, tmp_path: Path) -> None:
    kill_again_at_every_step(world, tmp_path, DEPOSITS, "swept")
