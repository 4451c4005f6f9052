"""One payment sent to two gateways at once, which share a database and a signer: it pays once, whatever its scheme."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import psycopg
import pytest

from contracts.anvil import free_port
from contracts.devnet import balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import GatewayProcess, Stack, running
from tests.databases import PostgresServer
from tests.e2e.clients import JSON
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import ENVIRONMENT, amount_of, check_books, wait_until
from tests.e2e.payers import DEV_TOKENS, RICH, WAYS, Payer, Way

COPIES = 25


@pytest.fixture(scope="module")
def shared_database(postgres: PostgresServer) -> Iterator[str]:
    url = postgres.new_database()
    yield url
    postgres.drop(url)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, shared_database: str) -> Iterator[tuple[Stack, str, Path]]:
    """A stack on PostgreSQL, and the URL of a second gateway beside its own."""
    directory = tmp_path_factory.mktemp("pair")
    environment = ENVIRONMENT | {"FAREBOX_DATABASE_URL": shared_database}
    with running(directory, environment=environment) as (stack, first):
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        log = directory / "second.log"
        second = GatewayProcess(url, None, first.environment | {"FAREBOX_PORT": str(port)}, log)
        second.start()
        try:
            yield stack, url, directory
            check_books(first)
        finally:
            second.stop()
        for name in ("gateway.log", "second.log"):
            assert "Traceback" not in (directory / name).read_text()


@pytest.mark.parametrize("way", WAYS)
async def test_copies_at_two_gateways_at_once_are_one_answer_and_one_payment(
    pair: tuple[Stack, str, Path], shared_database: str, way: Way
) -> None:
    stack, second_url, _ = pair
    simulator = Simulator.attach(stack.simulator_url)
    simulator.clear()
    payer = Payer(stack)
    with httpx.Client(base_url=stack.gateway_url, timeout=30) as http:
        signed = payer.pay(http, way, QUESTION)
    content = orjson.dumps(QUESTION)
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=2 * COPIES)) as http_:
        answers = await asyncio.gather(
            *(
                http_.post(f"{url}/v1/chat/completions", content=content, headers=JSON | signed)
                for url in (stack.gateway_url, second_url) * COPIES
            )
        )
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses[200] >= 1, answers[0].text
    assert set(statuses) <= {200, 409}, (statuses, [a.text for a in answers if a.status_code not in (200, 409)][:1])
    assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
    assert sum(attempt["outcome"] == "ok" for attempt in simulator.attempts()) == 1
    wait_until(lambda: not still_open(shared_database), "all is settled")
    taken = RICH - payer_balance(stack, payer, way)
    most = payer.channels[way.split()[1]].deposited if way.startswith("channel") else amount_of(signed)
    assert 0 < taken <= most


def payer_balance(stack: Stack, payer: Payer, way: Way) -> int:
    return balance_of(stack.rpc_url, DEV_TOKENS[way.split()[1]], payer.address)


def still_open(database_url: str) -> bool:
    with psycopg.connect(database_url) as database:
        return bool(
            database.execute("SELECT 1 FROM settlement WHERE state IN ('queued', 'submitted') LIMIT 1").fetchall()
        )
