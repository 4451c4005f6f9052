"""The gateway is killed at every step of an exact payment, whether its request is answered, fails, or is sent back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crashes.matrix import kill_again_at_every_step, kill_at_every_step
from tests.crashes.operations import PAYMENTS
from tests.crashes.world import World


@pytest.mark.parametrize("name", PAYMENTS)
def test_killed_at_every_step_nothing_is_lost_and_nothing_happens_twice(
    world: World, tmp_path: Path, name: str
) -> None:
    kill_at_every_step(world, tmp_path, PAYMENTS, name)


def test_killed_again_at_every_step_of_the_recovery(world: World, tmp_path: Path) -> None:
    kill_again_at_every_step(world, tmp_path, PAYMENTS, "exact, EIP-3009", start_too=True)
