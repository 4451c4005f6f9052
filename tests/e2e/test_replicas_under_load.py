"""Two gateways and two facilitators as processes on one PostgreSQL, with one signer key on one chain, under load.

One is killed and one stopped for longer than its lease, in the middle. Nothing is lost, paid twice, or credited twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from eth_account import Account

from contracts.anvil import end_with_parent, free_port
from contracts.devnet import Devnet, Wallet, balance_of, place_operator_contracts, rpc
from gateway.dev.models import KEY_VARIABLE, dev_models, dev_providers
from gateway.dev.simulator.process import Simulator
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.reconciliation import reconcile
from payments.store import Store
from tests.e2e.clients import JSON, sign
from tests.e2e.conftest import QUESTION
from tests.payments.facilitating import SHOP, VALUE, body

LEASE_S = 4
PAYERS_AT_ONCE = 12
EACH_PART = 60
"""Payments between one blow and the next."""
TREASURY, SIGNER = 9, 8
PATIENCE_S, READY_S = 60.0, 90.0


@dataclass(slots=True)
class Place:
    """One process."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    alive: bool = True
    """Whether it answers."""
    killed: bool = False

    def holds_the_key(self) -> bool:
        text = httpx.get(f"{self.url}/metrics", timeout=5).text
        found = re.search(r"^farebox_signer_held\{.*\} ([01])\.0$", text, re.MULTILINE)
        assert found is not None, text
        return found.group(1) == "1"


@dataclass(slots=True)
class World:
    """Everything that runs."""

    chain: Devnet
    network: Network
    database: str
    places: list[Place]
    nonce_before: int
    done: Counter[str] = field(default_factory=Counter)
    """Payments by the kind of place that they were accepted at."""
    values: list[int] = field(default_factory=list)
    """Paid to gateways, in atomic units."""
    statuses: Counter[str] = field(default_factory=Counter)
    stopping: bool = False

    def next_of(self, kind: str, turn: Iterator[int]) -> Place:
        own = [place for place in self.places if place.name.startswith(kind) and not place.killed]
        living = [place for place in own if place.alive]
        # Whoever has nobody else asks the one that does not answer now.
        return (living or own)[next(turn) % len(living or own)]

    async def until_paid(self, count: int) -> None:
        wanted = self.done.total() + count
        async with asyncio.timeout(PATIENCE_S):
            while self.done.total() < wanted:  # noqa: ASYNC110 - counted by whoever pays
                await asyncio.sleep(0.05)

    async def holder(self) -> Place:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for place in self.places:
                    if place.alive and await asyncio.to_thread(place.holds_the_key):
                        return place
                await asyncio.sleep(0.2)


@pytest.fixture
def world(chain: Devnet, network: Network, postgres_database: str, tmp_path: Path) -> Iterator[World]:
    signer, treasury = chain.wallets[SIGNER], chain.wallets[TREASURY]
    contract, _ = place_operator_contracts(chain.rpc_url, treasury.address, treasury.address, [signer.address])
    with contextlib.ExitStack() as cleanup:
        simulator = Simulator.start()
        cleanup.callback(simulator.stop)
        environment = _environment(chain, postgres_database, contract, signer, treasury, simulator.url, tmp_path)
        nonce = int(rpc(chain.rpc_url, "eth_getTransactionCount", signer.address, "latest"), 16)
        made = World(chain, network, postgres_database, [], nonce)
        client = cleanup.enter_context(httpx.Client(timeout=5))
        for names in (("gateway-1",), ("gateway-2", "facilitator-1", "facilitator-2")):
            places = [_start(name, environment, tmp_path) for name in names]
            for place in places:
                cleanup.callback(_end, place)
            for place in places:
                _until_ready(place, client, tmp_path)
            made.places += places
        yield made


def _start(name: str, environment: Mapping[str, str], directory: Path) -> Place:
    port = free_port()
    command = [sys.executable, "-m", "gateway.cli"]
    command += ["facilitator", "--open", "--port", str(port)] if name.startswith("f") else ["serve"]
    with (directory / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, "FAREBOX_PORT": str(port)},
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent(),
        )
    return Place(name, f"http://127.0.0.1:{port}", process)


def _until_ready(place: Place, client: httpx.Client, directory: Path) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            client.get(f"{place.url}/healthz")
            return
        assert place.process.poll() is None, (directory / f"{place.name}.log").read_text()[-3000:]
        assert time.monotonic() < deadline, f"{place.name} does not answer"
        time.sleep(0.1)


def _end(place: Place) -> None:
    place.process.kill()
    place.process.wait()


def _environment(
    chain: Devnet,
    database: str,
    contract: str,
    signer: Wallet,
    treasury: Wallet,
    simulator_url: str,
    directory: Path,
) -> Mapping[str, str]:
    tokens = [
        {
            "symbol": token.symbol,
            "address": token.address,
            "decimals": token.decimals,
            "transfer_method": token.transfer_method,
            "domain_name": token.name,
            "domain_version": token.version,
        }
        for token in (chain.usdc, chain.usdt)
    ]
    network = {
        "chain_id": chain.chain_id,
        "rpc_urls": [chain.rpc_url],
        "tokens": tokens,
        "batch_contract": contract,
    }
    return {
        "FAREBOX_DATA_DIR": str(directory),
        "FAREBOX_DATABASE_URL": database,
        "FAREBOX_LEASE_S": str(LEASE_S),
        "FAREBOX_SECRET": "s" * 40,
        "FAREBOX_SIGNER_KEYS": json.dumps([signer.private_key]),
        "FAREBOX_TREASURY_KEY": treasury.private_key,
        "FAREBOX_PAY_TO": treasury.address,
        "FAREBOX_NETWORKS": json.dumps([network]),
        "FAREBOX_PROVIDERS": json.dumps(dev_providers(simulator_url)),
        "FAREBOX_MODELS": json.dumps(dev_models()),
        "FAREBOX_LIMITS__QUOTES_PER_MINUTE": "100000",
        "FAREBOX_FACILITATOR__CALLS_PER_MINUTE": "100000",
        KEY_VARIABLE: "simulated",
    }


@pytest.mark.timeout(300)
async def test_one_key_is_shared_by_four_processes_of_which_one_is_killed_and_one_stopped(world: World) -> None:
    chain = world.chain
    shop_before = balance_of(chain.rpc_url, chain.usdc, SHOP)
    treasury_before = balance_of(chain.rpc_url, chain.usdc, chain.wallets[TREASURY].address)
    async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=200)) as http:
        payers = [
            asyncio.create_task(_pay_on_and_on(world, http, number, "gateway" if number % 2 else "facilitator"))
            for number in range(PAYERS_AT_ONCE)
        ]
        work = asyncio.gather(*payers)
        try:
            await asyncio.wait_for(asyncio.shield(_blows(world, work)), 4 * PATIENCE_S)
            world.stopping = True
            await asyncio.wait_for(work, PATIENCE_S)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
    assert not [status for status in world.statuses if status.endswith(" 500")], world.statuses
    assert min(world.done["gateway"], world.done["facilitator"]) >= EACH_PART / 4, world.done
    # On the chain: each accepted payment moved its money once.
    rpc(chain.rpc_url, "anvil_mine", "0x4")
    assert balance_of(chain.rpc_url, chain.usdc, SHOP) - shop_before == world.done["facilitator"] * VALUE
    received = balance_of(chain.rpc_url, chain.usdc, chain.wallets[TREASURY].address) - treasury_before
    assert received == sum(world.values)
    await _check_the_books(world)


async def _blows(world: World, work: asyncio.Future[Any]) -> None:
    await world.until_paid(EACH_PART)
    first = await world.holder()
    assert first.name == "gateway-1", "the first that was started has the key"
    first.alive, first.killed = False, True
    first.process.send_signal(signal.SIGKILL)
    # The others' payments wait for whoever takes over, and are then sent.
    await world.until_paid(EACH_PART)
    second = await world.holder()
    os.kill(second.process.pid, signal.SIGSTOP)
    second.alive = False
    await world.until_paid(EACH_PART)
    third = await world.holder()
    assert third is not second
    os.kill(second.process.pid, signal.SIGCONT)
    second.alive = True
    await world.until_paid(EACH_PART)
    assert not second.holds_the_key()
    assert third.holds_the_key()


async def _pay_on_and_on(world: World, http: httpx.AsyncClient, number: int, kind: str) -> None:
    turn = itertools.count(number)
    wallet = world.chain.wallets[number % 6]
    pay = _ask_a_gateway if kind == "gateway" else _settle
    while not world.stopping:
        async with asyncio.timeout(PATIENCE_S):
            await pay(world, http, wallet, turn)
        world.done[kind] += 1


async def _post(
    world: World,
    http: httpx.AsyncClient,
    kind: str,
    turn: Iterator[int],
    path: str,
    content: bytes,
    headers: dict[str, str],
) -> httpx.Response | None:
    """Send something to the next living place; None if it is cut off."""
    place = world.next_of(kind, turn)
    try:
        answer = await http.post(place.url + path, content=content, headers=JSON | headers)
    except httpx.TransportError as error:
        world.statuses[f"{kind} {type(error).__name__}"] += 1
        return None
    world.statuses[f"{kind} {answer.status_code}"] += 1
    return answer


async def _ask_a_gateway(world: World, http: httpx.AsyncClient, wallet: Wallet, turn: Iterator[int]) -> None:
    """One question, paid once; the same payment goes from gateway to gateway until there is an answer."""
    question = json.dumps({**QUESTION, "max_tokens": 8}).encode()
    path = "/v1/chat/completions"
    asked = None
    while asked is None:
        asked = await _post(world, http, "gateway", turn, path, question, {})
    payment = sign(Account.from_key(wallet.private_key), asked)
    value = int(asked.json()["accepts"][0]["maxAmountRequired"])
    while True:
        answer = await _post(world, http, "gateway", turn, path, question, payment)
        if answer is not None and answer.status_code == 200:
            world.values.append(value)
            return
        if answer is not None:
            assert answer.status_code in (202, 409, 503), answer.text
            assert answer.status_code == 202 or answer.json()["error"]["code"] in (
                "payment_in_progress",
                "request_interrupted",
                "settlement_unavailable",
                "settlement_busy",
                "overloaded",
                "chain_unavailable",
            ), answer.text
        await asyncio.sleep(0.2)


async def _settle(world: World, http: httpx.AsyncClient, wallet: Wallet, turn: Iterator[int]) -> None:
    """One payment for a shop; the same call is made from facilitator to facilitator until it is told of the success."""
    call = json.dumps(body(wallet, world.network.tokens[0], world.network)).encode()
    headers = {"idempotency-key": os.urandom(16).hex()}
    while True:
        answer = await _post(world, http, "facilitator", turn, "/settle", call, headers)
        if answer is not None and answer.status_code == 200:
            told = answer.json()
            if told["success"]:
                return
            assert told["errorReason"] in ("settlement_pending", "unexpected_settle_error"), told
        elif answer is not None:
            assert answer.status_code == 503, answer.text
        await asyncio.sleep(0.2)


async def _check_the_books(world: World) -> None:
    store = Store(world.database)
    try:
        rows = await store.read(
            lambda tx: tx.execute("SELECT kind, state, COUNT(*) FROM settlement GROUP BY kind, state").fetchall()
        )
        settled = Counter({kind: 0 for kind, _, _ in rows})
        for kind, state, count in rows:
            assert state in ("mined", "final"), rows
            settled[kind] += count
        assert settled == {"payment": world.done["gateway"], "facilitated": world.done["facilitator"]}
        sent = await store.read(
            lambda tx: tx.execute("SELECT signer_nonce, state FROM chain_transaction ORDER BY signer_nonce").fetchall()
        )
        # Without gaps, and none of ours in the place of another: every nonce of the account is a transaction in a block.
        signer = world.chain.wallets[SIGNER].address
        next_nonce = int(rpc(world.chain.rpc_url, "eth_getTransactionCount", signer, "latest"), 16)
        assert sent == [(nonce, "included") for nonce in range(world.nonce_before, next_nonce)]
        receipts = await store.read(
            lambda tx: tx.execute("SELECT state, COUNT(*) FROM receipt GROUP BY state").fetchall()
        )
        assert receipts == [("captured", world.done["gateway"])]
        async with Rpc([world.chain.rpc_url]) as node:
            treasury = world.chain.wallets[TREASURY].address.lower()
            report = await reconcile(store, node, world.network, treasury)
        assert report.findings == []
        assert [movement for token in report.tokens for movement in token.booked] == []
    finally:
        store.close()
