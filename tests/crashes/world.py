"""A chain and providers that many short lives of gateways share, and what one life consists of.

Each run has a treasury, a signer, a payer and a database of its own, so that runs on one chain do not see each other: nothing
has to be put back between them, and several can be under way at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import socket
import sqlite3
import ssl
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
from eth_account import Account
from eth_account.signers.local import LocalAccount
from sha3 import keccak_256

from contracts.anvil import Anvil, free_port
from contracts.builds import artifact
from contracts.devnet import PERMIT2_ADDRESS, USDC, USDT, DevToken, balance_of, load, place_operator_contracts
from contracts.jsonrpc import batch, rpc
from gateway.dev.models import dev_models, dev_providers
from gateway.dev.simulator.process import Simulator
from gateway.settings import Settings
from payments.accounts import create_key, fund_pool
from payments.chain.networks import Network, Token
from payments.chain.rpc import Rpc
from payments.deposits import Deposits
from payments.ledger.books import Finding
from payments.migrate import upgrade
from payments.reconciliation import reconcile
from payments.store import Store
from tests.crashes.forks import Forks, alive, end
from tests.crashes.steps import DRIVEN_BY, Step, steps_of

CHAIN_ID = 84532
MILLION_USD = 10**12
"""In atomic units: nobody here runs out of money."""
PATIENCE_S = 20.0
"""Everything must come to its end by itself within this."""
CONTRACTS = {USDC.symbol: "UsdcLike", USDT.symbol: "UsdtLike"}
MODEL = "deepseek-v4-flash"
UNAVAILABLE = "unavailable"
SLOW = "slow"
TERSE = "terse"
THOUGHTFUL = "thoughtful"
_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Nobody here speaks TLS, and a context of httpx's own making takes 30 ms."""


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
    def open(cls, directory: Path, forks: Forks) -> Iterator[World]:
        """Start everything else."""
        with Anvil(chain_id=CHAIN_ID) as anvil, Simulator.start() as simulator:
            load(anvil.rpc_url)
            template = directory / "template.db"
            upgrade(template)
            network = Network(CHAIN_ID, "base-sepolia", tuple(_token(token) for token in (USDC, USDT)))
            yield cls(anvil.rpc_url, simulator, forks, template, network)

    @contextlib.contextmanager
    def with_its_own_chain(self) -> Iterator[World]:
        """The same with another chain: for what nobody else could bear, such as a reorganisation."""
        with Anvil(chain_id=CHAIN_ID) as anvil:
            load(anvil.rpc_url)
            yield replace(self, rpc_url=anvil.rpc_url)


class Gateway:
    """One gateway, in all its lives.

    Args:
        world: Where it is.
        directory: Of its logs and records.
        settings: Its configuration, but for the port.
        loops: Whose steps count, see `tests.crashes.steps`; they hurry.
    """

    def __init__(self, world: World, directory: Path, settings: Mapping[str, Any], loops: Collection[str]) -> None:
        self._forks, self._directory, self._loops = world.forks, directory, loops
        self._port = free_port()
        # Checked once for all lives, and not read from an environment, which takes a third of the time of a start.
        self._settings = Settings(**settings, port=self._port)
        self._lives = itertools.count(1)
        self._life = 0
        self._pid = 0
        directory.mkdir(parents=True)
        self.log = directory / "gateway.log"
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self._port}", timeout=PATIENCE_S, trust_env=False, verify=_TLS
        )

    def live(self, kill_at: Step | None = None, *, armed: bool = False, pause_at: str | None = None) -> None:
        """Begin a life of the gateway.

        Args:
            kill_at: Where it ends.
            armed: The steps of its start count too, and it may not survive them.
            pause_at: The step that waits for `go_on`.
        """
        self._life = next(self._lives)
        if armed:
            self.arm()
        self._pid = self._forks.gateway(
            self._settings,
            self.log,
            self._file("record"),
            self._file("armed"),
            kill_at,
            self._loops,
            {*self._loops, *(DRIVEN_BY[loop] for loop in self._loops if loop in DRIVEN_BY)},
            None if pause_at is None else (pause_at, self._file("paused")),
        )
        deadline = time.monotonic() + PATIENCE_S
        while alive(self._pid):
            assert time.monotonic() < deadline, f"it does not answer: {self.log.read_text()[-2000:]}"
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self._port)):
                return
            time.sleep(0.005)
        assert armed, f"it did not start: {self.log.read_text()[-2000:]}"

    def arm(self) -> None:
        """Steps count from now on."""
        self._file("armed").touch()

    def wait_for_pause(self) -> bool:
        """Wait until it has come to the step that it pauses at. False if it has died before."""
        deadline = time.monotonic() + PATIENCE_S
        while self.alive:
            if self._file("paused").exists():
                return True
            assert time.monotonic() < deadline, "it does not come to where it was to wait"
            time.sleep(0.002)
        return False

    def go_on(self) -> None:
        """End its pause."""
        self._file("paused").unlink(missing_ok=True)

    def dies(self, within_s: float) -> bool:
        """Wait for its death; False if it lives on."""
        deadline = time.monotonic() + within_s
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.002)
        return not self.alive

    @property
    def alive(self) -> bool:
        """Whether it lives."""
        return alive(self._pid)

    def steps(self) -> list[Step]:
        """What happened in this life since it was armed."""
        return steps_of(self._file("record"))

    def die(self) -> None:
        """Kill it, if something has not done so already."""
        if self._life:
            end(self._pid)

    def close(self) -> None:
        """Leave nothing behind but the directory."""
        self.die()
        self.http.close()

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.{self._life}"


class Run:
    """One operator, one payer, and their gateway.

    Args:
        world: What it shares with others.
        directory: Its own.
        settings: Of the configuration, besides what all have.
        loops: Whose steps count, see `tests.crashes.steps`.
        database: A PostgreSQL URL; None makes a SQLite file.
    """

    def __init__(
        self,
        world: World,
        directory: Path,
        settings: Mapping[str, Any],
        loops: Collection[str] = (),
        database: str | None = None,
    ) -> None:
        self.world = world
        self.payer: LocalAccount = Account.create()
        self.treasury: LocalAccount = Account.create()
        self.signer: LocalAccount = Account.create()
        self.directory = directory
        # Before the names by which providers know its models: others ask the same ones.
        self._upstream = f"{self.payer.address.lower()}/"
        self._models = [
            model | {"upstream_model": self._upstream + model.get("upstream_model", model["id"])}
            for model in dev_models() + _peculiar_models()
        ]
        self.api_key = ""
        directory.mkdir(parents=True)
        self.database: Path | str = database or Path(shutil.copy(world.template, directory / "farebox.db"))
        self._loops = loops
        self._settings = self._furnish() | dict(settings)
        self.gateways: list[Gateway] = []
        self.gateway = self.another_gateway()

    def another_gateway(self) -> Gateway:
        """One more gateway on the same database."""
        made = Gateway(self.world, self.directory / str(len(self.gateways)), self._settings, self._loops)
        self.gateways.append(made)
        return made

    @property
    def http(self) -> httpx.Client:
        """The payer's way to the gateway."""
        return self.gateway.http

    def log(self) -> str:
        """What all gateways said in all their lives."""
        return "".join(gateway.log.read_text() for gateway in self.gateways)

    def close(self) -> None:
        """Leave nothing behind but the directory."""
        for gateway in self.gateways:
            gateway.close()

    # ------------------------------------------------------------------ the truth about it

    def balance(self, token: DevToken, owner: str) -> int:
        """What somebody has on chain, in atomic units."""
        return balance_of(self.world.rpc_url, token, owner)

    def make_penniless(self) -> None:
        """Take the payer's coin away, and its approvals."""
        calls: list[tuple[str, list[Any]]] = [("anvil_setBalance", [self.payer.address, "0x0"])]
        for token in (USDC, USDT):
            slot = _slot(CONTRACTS[token.symbol], "allowance", self.payer.address, PERMIT2_ADDRESS)
            calls.append(("anvil_setStorageAt", [token.address, slot, "0x" + "00" * 32]))
        batch(self.world.rpc_url, calls)
        self.mine(1)

    def give(self, token: DevToken, owner: str, value: int) -> None:
        """Let somebody have so much, whatever it was before."""
        slot = _slot(CONTRACTS[token.symbol], "balanceOf", owner)
        rpc(self.world.rpc_url, "anvil_setStorageAt", token.address, slot, f"0x{value:064x}")
        self.mine(1)

    def allow(self, token: DevToken, spender: str) -> None:
        """Let a contract take what it wants of the payer's tokens."""
        slot = _slot(CONTRACTS[token.symbol], "allowance", self.payer.address, spender)
        rpc(self.world.rpc_url, "anvil_setStorageAt", token.address, slot, "0x" + "ff" * 32)
        self.mine(1)

    def mine(self, blocks: int) -> None:
        """Let the chain go on, for everybody.

        Only then is certain what was put into the state by force: whoever looks while somebody else's block is being made may
        see the state of the block before, without it.
        """
        rpc(self.world.rpc_url, "anvil_mine", hex(blocks))

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Read the database, past the gateway."""
        if isinstance(self.database, Path):
            with contextlib.closing(sqlite3.connect(self.database, timeout=PATIENCE_S)) as connection:
                return connection.execute(query, parameters).fetchall()
        with psycopg.connect(self.database) as postgres:
            return postgres.execute(query.replace("?", "%s").encode(), parameters).fetchall()

    def findings(self) -> list[Finding]:
        """What is wrong with the books, in themselves and compared with the chain."""
        self.mine(3)  # below the confirmations, the chain is not compared

        async def check() -> list[Finding]:
            store = Store(self.database)
            network, treasury = self.world.network, self.treasury.address.lower()
            try:
                async with Rpc([self.world.rpc_url]) as node:
                    deposits = Deposits(store, node, network, treasury, self.deposit_factory)
                    return (await reconcile(store, node, network, treasury, deposits=deposits)).findings
            finally:
                store.close()

        return asyncio.run(check())

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that must happen by itself."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain until {what}"
            time.sleep(0.01)

    def until_settled(self) -> None:
        """Wait until nothing is on its way to the chain any more."""
        self.until(lambda: not self.open_settlements(), "every settlement has its end")

    def open_settlements(self) -> list[tuple[Any, ...]]:
        """What is on its way to the chain."""
        return self.rows("SELECT id, state FROM settlement WHERE state IN ('queued', 'submitted')")

    def make_prompt(self, model: str) -> None:
        """Let a model answer at once from now on."""
        self.world.simulator.configure(next(each["upstream_model"] for each in self._models if each["id"] == model))

    def inferences(self) -> int:
        """How many the providers made for it: all that they were asked for and did not refuse, as far as they came."""
        attempts = self.world.simulator.attempts(self._upstream)
        return sum(attempt["outcome"] != "error" for attempt in attempts)

    def charged_inferences(self) -> int:
        """How many of them were charged to somebody, seen by a caller or not."""
        ((answered,),) = self.rows("SELECT COUNT(*) FROM receipt WHERE charged_nano_usd > spent_nano_usd")
        ((unseen,),) = self.rows("SELECT COUNT(*) FROM receipt WHERE spent_nano_usd > 0")
        return int(answered) + int(unseen)

    # ------------------------------------------------------------------ making it

    def _furnish(self) -> dict[str, Any]:
        chain = self.world.rpc_url
        calls: list[tuple[str, list[Any]]] = [
            ("anvil_setBalance", [account.address, hex(10**21)]) for account in (self.treasury, self.signer, self.payer)
        ]
        for token in (USDC, USDT):
            for mapping, keys, word in (
                ("balanceOf", (self.payer.address,), f"0x{MILLION_USD:064x}"),
                ("allowance", (self.payer.address, PERMIT2_ADDRESS), "0x" + "ff" * 32),
            ):
                slot = _slot(CONTRACTS[token.symbol], mapping, *keys)
                calls.append(("anvil_setStorageAt", [token.address, slot, word]))
        batch(chain, calls)
        batch_contract, self.deposit_factory = place_operator_contracts(
            chain, self.treasury.address, self.treasury.address, [self.signer.address]
        )
        self.mine(1)
        assert [self.balance(token, self.payer.address) for token in (USDC, USDT)] == [MILLION_USD] * 2
        network = {
            "chain_id": CHAIN_ID,
            "rpc_urls": [chain],
            "batch_contract": batch_contract,
            "deposit_factory": self.deposit_factory,
            "sponsor_hourly_native": "1",
            "sponsor_payer_native": "0.001",
            "tokens": [_token_settings(token) for token in (USDC, USDT)],
        }
        asyncio.run(self._make_key())
        return {
            "data_dir": self.directory,
            "database_url": None if isinstance(self.database, Path) else self.database,
            "secret": "a secret that is the same in every life",
            "signer_keys": [_hex(self.signer)],
            "treasury_key": _hex(self.treasury),
            "pay_to": self.treasury.address,
            "networks": [network],
            "providers": dev_providers(self.world.simulator.url),
            "models": self._models,
        }

    async def _make_key(self) -> None:
        store = Store(self.database)
        try:
            await store.write(lambda tx: fund_pool(tx, "team", 10**12, "first"))
            _, self.api_key = await store.write(lambda tx: create_key(tx, "agent", "team"))
        finally:
            store.close()


def _peculiar_models() -> list[dict[str, Any]]:
    """Their upstream names tell the simulator how they behave."""
    cheap = next(model for model in dev_models() if model["id"] == MODEL)
    return [
        cheap | {"id": UNAVAILABLE, "upstream_model": "sim-error-500"},
        cheap | {"id": SLOW, "upstream_model": "sim-ttft-300"},
        cheap | {"id": THOUGHTFUL, "upstream_model": "sim-ttft-20000"},
        # Input is free, and there is no output.
        cheap | {"id": TERSE, "upstream_model": "sim-tokens-0", "input_usd": "0", "cached_input_usd": "0"},
    ]


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
