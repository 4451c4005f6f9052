"""Two gateways on one PostgreSQL, with one signer's key: one is killed, and the other one puts right what that one left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.crashes.channels import CHANNELS
from tests.crashes.deposits import DEPOSITS
from tests.crashes.matrix import kill_one_of_two
from tests.crashes.operations import BALANCES, PAYMENTS, Operation
from tests.crashes.upto import UPTOS
from tests.crashes.world import World
from tests.databases import PostgresServer

SAMPLE: Mapping[str, Callable[[], Operation]] = {
    "exact": PAYMENTS["exact, EIP-3009"],
    "upto": UPTOS["upto"],
    "channel opened": CHANNELS["opened, EIP-3009"],
    "channel claimed": CHANNELS["claimed"],
    "deposited": DEPOSITS["deposited"],
    "swept": DEPOSITS["swept"],
    "withdrawn": BALANCES["withdrawn"],
}


@pytest.mark.parametrize("name", SAMPLE)
def test_one_of_two_gateways_is_killed_and_the_other_one_goes_on(
    world: World, postgres: PostgresServer, tmp_path: Path, name: str
) -> None:
    kill_one_of_two(world, postgres, tmp_path, SAMPLE, name)
