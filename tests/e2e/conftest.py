"""A whole stack as `farebox dev` starts it, once per worker."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack, running

QUESTION: dict[str, Any] = {
    "model": "deepseek-v4-flash",
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "max_tokens": 64,
}

ENVIRONMENT = {"FAREBOX_LIMITS__QUOTES_PER_MINUTE": "100000", "FAREBOX_WALLET__SWEEP_INTERVAL_S": "1"}


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("stack"), environment=ENVIRONMENT) as (
        stack,
        _,
    ):
        yield stack


@pytest.fixture
def simulator(stack: Stack) -> Iterator[Simulator]:
    """The simulated providers, with an empty log and default behaviour."""
    simulator = Simulator.attach(stack.simulator_url)
    simulator.clear()
    simulator.reset_behaviours()
    yield simulator
    simulator.reset_behaviours()


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.gateway_url, timeout=30) as client:
        yield client


_wallets = itertools.count()


@pytest.fixture
def wallet(stack: Stack) -> LocalAccount:
    """A funded wallet; tests take turns, so that most have one that nobody used before."""
    account: LocalAccount = Account.from_key(stack.wallets[next(_wallets) % len(stack.wallets)]["private_key"])
    return account
