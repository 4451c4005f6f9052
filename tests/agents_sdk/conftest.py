"""The fake gateway, and agents that pay it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account

from agents_sdk import Agent
from tests.agents_sdk import fake_gateway

KEY = "0x" + "11" * 31 + "22"
ADDRESS = str(Account.from_key(KEY).address)
MakeAgent = Callable[..., Agent]


@pytest.fixture(scope="session")
def gateway_server() -> Iterator[fake_gateway.Server]:
    with fake_gateway.running() as running:
        yield running


@pytest.fixture
def gateway(gateway_server: fake_gateway.Server) -> fake_gateway.FakeGateway:
    """A gateway of the test's own, on the session's one socket."""
    return gateway_server.fresh()


@pytest.fixture
def make_agent(gateway: fake_gateway.FakeGateway, tmp_path: Path) -> Iterator[MakeAgent]:
    """Makes agents on one journal. They do not look for credit unless a test says so, and hardly wait between tries."""
    agents: list[Agent] = []

    def make(**options: Any) -> Agent:
        given: dict[str, Any] = {
            "wallet": KEY,
            "base_url": gateway.url,
            "receipts": tmp_path / "agent" / "log.sqlite3",
            "credit": "never",
            "backoff_s": 0.01,
            "tokens": [fake_gateway.USDT],
        } | options
        agents.append(Agent(**given))
        return agents[-1]

    yield make
    for agent in agents:
        agent.close()


@pytest.fixture
def agent(make_agent: MakeAgent) -> Agent:
    return make_agent()
