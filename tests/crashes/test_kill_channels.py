"""The gateway is killed at every step of a payment channel's life."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crashes.channels import CHANNELS
from tests.crashes.matrix import kill_again_at_every_step, kill_at_every_step
from tests.crashes.world import World


@pytest.mark.parametrize("name", CHANNELS)
def test_killed_at_every_step_nothing_is_lost_and_nothing_happens_twice(
    world: World, tmp_path: Path, name: str
) -> None:
    kill_at_every_step(world, tmp_path, CHANNELS, name)


@pytest.mark.parametrize("name", ["opened, EIP-3009", "claimed"])
def test_killed_again_at_every_step_of_the_recovery(world: World, tmp_path: Path, name: str) -> None:
    kill_again_at_every_step(world, tmp_path, CHANNELS, name)
