"""The gateway is killed at every step between a payer's funding, its approval, and its payment."""

from __future__ import annotations

from pathlib import Path

from tests.crashes.matrix import kill_at_every_step
from tests.crashes.sponsored import SPONSORED
from tests.crashes.world import World


def test_killed_at_every_step_nobody_is_funded_twice_and_the_payment_arrives(world: World, tmp_path: Path) -> None:
    kill_at_every_step(world, tmp_path, SPONSORED, "sponsored approval")
