"""A chain and providers that many short lives of gateways share, and what one life consists of.

Each run has a treasury, a signer, a payer and a database of its own, so that runs on one chain do not see each other: nothing
has to be put back between them, and several can be under way at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from eth_account import Account
from eth_account.signers.local import LocalAccount
from sha3 import keccak_256

from contracts.anvil import Anvil, free_port
from contracts.builds import artifact
from contracts.devnet import PERMIT2_ADDRESS, USDC, USDT, DevToken, balance_of, load, place_operator_contracts
from contracts.jsonrpc import batch, rpc
from gateway.dev.models import KEY_VARIABLE, dev_models, dev_providers
from gateway.dev.simulator.process import Simulator
from payments.accounts import create_key, fund_pool
from payments.chain.networks import Network, Token
from payments.chain.rpc import Rpc
from payments.ledger.books import Finding
from payments.migrate import upgrade
from payments.reconciliation import reconcile
from payments.store import Store
from tests.crashes.forks import Forks, alive, end
from tests.crashes.steps import Step, steps_of

CHAIN_ID = 84532
MILLION_USD = 10**12
"""In atomic units: nobody here runs out of money."""
PATIENCE_S = 20.0
"""Everything must come to its end by itself within this."""


@dataclass(frozen=True, slots=True)
class World:
    """What all runs share."""

    rpc_url: str
    simulator: Simulator
    forks: Forks
    template: Path
    """A database with the current schema, to be copied."""
    network: Network

    @classmethod
    @contextlib.contextmanager
    def open(cls, directory: Path) -> Iterator[World]:
        """Start everything."""
        with Anvil(chain_id=CHAIN_ID) as anvil, Simulator.start() as simulator, Forks() as forks:
            load(anvil.rpc_url)
            template = directory / "template.db"
            upgrade(template)
            network = Network(CHAIN_ID, "base-sepolia", tuple(_token(token) for token in (USDC, USDT)))
            yield cls(anvil.rpc_url, simulator, forks, template, network)


class Run:
    """One operator, one payer, and the lives of their gateway.

    Args:
        world: What it shares with others.
        directory: Its own.
        settings: Further `FAREBOX_*` variables.
    """

    def __init__(self, world: World, directory: Path, settings: dict[str, str] | None = None) -> None:
        self.world = world
        self.payer: LocalAccount = Account.create()
        self.treasury: LocalAccount = Account.create()
        self.signer: LocalAccount = Account.create()
        self.directory = directory
        self.api_key = ""
        self.seen: list[httpx.Response] = []
        """Every answer of the gateway to the payer that arrived whole."""
        self._lives = itertools.count(1)
        self._pid = 0
        directory.mkdir(parents=True)
        shutil.copy(world.template, directory / "farebox.db")
        self._port = free_port()
        self._furnish(settings or {})
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=PATIENCE_S, trust_env=False)

    # ------------------------------------------------------------------ its gateway

    def live(self, kill_at: Step | None = None, *, armed: bool = False) -> None:
        """Begin a life of the gateway; with `armed`, the steps of its start count too, and it may not survive them."""
        self.life = next(self._lives)
        if armed:
            self.arm()
        log, record = self.directory / "gateway.log", self._file("record")
        self._pid = self.world.forks.gateway(self._environment, log, record, self._file("armed"), kill_at)
        deadline = time.monotonic() + PATIENCE_S
        while alive(self._pid):
            assert time.monotonic() < deadline, f"it does not answer: {log.read_text()[-2000:]}"
            with contextlib.suppress(httpx.TransportError):
                self.http.get("/healthz")
                return
            time.sleep(0.005)
        assert armed, f"it did not start: {log.read_text()[-2000:]}"

    def arm(self) -> None:
        """Steps count from now on."""
        self._file("armed").touch()

    @property
    def alive(self) -> bool:
        """Whether the gateway lives."""
        return alive(self._pid)

    def steps(self) -> list[Step]:
        """What happened in this life since it was armed."""
        return steps_of(self._file("record"))

    def die(self) -> None:
        """Kill the gateway, if something has not done so already."""
        end(self._pid)

    def close(self) -> None:
        """Leave nothing behind but the directory."""
        self.die()
        self.http.close()

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.{self.life}"

    # ------------------------------------------------------------------ the truth about it

    def balance(self, token: DevToken, owner: str) -> int:
        """What somebody has on chain, in atomic units."""
        return balance_of(self.world.rpc_url, token, owner)

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Read the database, past the gateway."""

        async def read() -> list[tuple[Any, ...]]:
            store = Store(self.directory / "farebox.db")
            try:
                return await store.read(lambda tx: tx.execute(query, parameters).fetchall())
            finally:
                store.close()

        return asyncio.run(read())

    def findings(self) -> list[Finding]:
        """What is wrong with the books, in themselves and compared with the chain."""
        for _ in range(3):  # below the confirmations, the chain is not compared
            rpc(self.world.rpc_url, "evm_mine")

        async def check() -> list[Finding]:
            store = Store(self.directory / "farebox.db")
            try:
                async with Rpc([self.world.rpc_url]) as node:
                    return (await reconcile(store, node, self.world.network, self.treasury.address)).findings
            finally:
                store.close()

        return asyncio.run(check())

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that must happen by itself."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain until {what}"
            time.sleep(0.02)

    def until_settled(self) -> None:
        """Wait until nothing is on its way to the chain any more."""
        self.until(lambda: not self.open_settlements(), "every settlement has its end")

    def open_settlements(self) -> list[tuple[Any, ...]]:
        """What is on its way to the chain."""
        return self.rows("SELECT id, state FROM settlement WHERE state IN ('queued', 'submitted')")

    # ------------------------------------------------------------------ making it

    def _furnish(self, settings: dict[str, str]) -> None:
        chain = self.world.rpc_url
        calls: list[tuple[str, list[Any]]] = [
            ("anvil_setBalance", [account.address, hex(10**21)]) for account in (self.treasury, self.signer, self.payer)
        ]
        for token, contract in ((USDC, "UsdcLike"), (USDT, "UsdtLike")):
            slot = _slot(contract, "balanceOf", self.payer.address)
            calls.append(("anvil_setStorageAt", [token.address, slot, f"0x{MILLION_USD:064x}"]))
        allowed = _slot("UsdtLike", "allowance", self.payer.address, PERMIT2_ADDRESS)
        calls.append(("anvil_setStorageAt", [USDT.address, allowed, "0x" + "ff" * 32]))
        batch(chain, calls)
        batch_contract, factory = place_operator_contracts(
            chain, self.treasury.address, self.treasury.address, [self.signer.address]
        )
        network = {
            "chain_id": CHAIN_ID,
            "rpc_urls": [chain],
            "batch_contract": batch_contract,
            "deposit_factory": factory,
            "tokens": [_token_settings(token) for token in (USDC, USDT)],
        }
        self._environment = {
            "FAREBOX_PORT": str(self._port),
            "FAREBOX_DATA_DIR": str(self.directory),
            "FAREBOX_SECRET": "a secret that is the same in every life",
            "FAREBOX_SIGNER_KEYS": json.dumps([_hex(self.signer)]),
            "FAREBOX_TREASURY_KEY": _hex(self.treasury),
            "FAREBOX_PAY_TO": self.treasury.address,
            "FAREBOX_NETWORKS": json.dumps([network]),
            "FAREBOX_PROVIDERS": json.dumps(dev_providers(self.world.simulator.url)),
            "FAREBOX_MODELS": json.dumps(dev_models()),
            KEY_VARIABLE: "simulated",
            **settings,
        }
        asyncio.run(self._make_key())

    async def _make_key(self) -> None:
        store = Store(self.directory / "farebox.db")
        try:
            await store.write(lambda tx: fund_pool(tx, "team", 10**12, "first"))
            _, self.api_key = await store.write(lambda tx: create_key(tx, "agent", "team"))
        finally:
            store.close()


def _hex(account: LocalAccount) -> str:
    return "0x" + bytes(account.key).hex()


def _slot(contract: str, mapping: str, *keys: str) -> str:
    """Where a mapping's entry is stored: Solidity's storage layout."""
    place = int(artifact(contract)["storage"][mapping]["slot"]).to_bytes(32, "big")
    for key in keys:
        place = keccak_256(bytes.fromhex(key[2:]).rjust(32, b"\0") + place).digest()
    return "0x" + place.hex()


def _token(token: DevToken) -> Token:
    return Token(
        symbol=token.symbol,
        chain_id=CHAIN_ID,
        address=token.address.lower(),
        decimals=token.decimals,
        transfer_method=token.transfer_method,
        domain_name=token.name,
        domain_version=token.version,
    )


def _token_settings(token: DevToken) -> dict[str, Any]:
    return {
        "symbol": token.symbol,
        "address": token.address,
        "decimals": token.decimals,
        "transfer_method": token.transfer_method,
        "domain_name": token.name,
        "domain_version": token.version,
    }
