"""Fixtures that every part's tests share: a real local chain with everything loaded, and real databases."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from contracts.devnet import Anvil, Devnet, DevToken, load, rpc
from payments.chain.networks import Network, Token
from payments.store import Store
from tests.databases import PostgresServer, sqlite_file

if TYPE_CHECKING:
    from tests.crashes.forks import Forks


@pytest.fixture(scope="session")
def anvil() -> Iterator[Anvil]:
    """One Anvil per test process, which mines every transaction at once."""
    with Anvil() as running:
        yield running


@pytest.fixture(scope="session")
def devnet(anvil: Anvil) -> Devnet:
    """The loaded chain. Shared by the whole session: a test that changes anything takes `chain` or `module_chain`."""
    return load(anvil.rpc_url)


@contextlib.contextmanager
def _undone(devnet: Devnet) -> Iterator[Devnet]:
    """The chain, to do with it what one likes: it is as it was afterwards."""
    snapshot = rpc(devnet.rpc_url, "evm_snapshot")
    yield devnet
    rpc(devnet.rpc_url, "anvil_dropAllTransactions")
    rpc(devnet.rpc_url, "evm_setAutomine", True)
    assert rpc(devnet.rpc_url, "evm_revert", snapshot)
    # Going back takes the chain's clock along: set it right, or what a payer signs "from now" lies in the future.
    rpc(devnet.rpc_url, "evm_setTime", int(time.time()))


@pytest.fixture
def chain(devnet: Devnet) -> Iterator[Devnet]:
    """The loaded chain as if it were the test's own: whatever the test does to it is undone."""
    with _undone(devnet) as chain:
        yield chain


@pytest.fixture(scope="module")
def module_chain(devnet: Devnet) -> Iterator[Devnet]:
    """The same for all tests of a file together, which have something running on it."""
    with _undone(devnet) as chain:
        yield chain


@pytest.fixture
def circle_chain(chain: Devnet) -> Devnet:
    """The loaded chain with Circle's own USDC instead of ours, at the same address and with the same balances."""
    from tests.contracts import circle

    circle.place(chain)
    return chain


@pytest.fixture(scope="session")
def network(devnet: Devnet) -> Network:
    """The loaded chain as `payments` knows networks."""
    return Network(
        chain_id=devnet.chain_id,
        v1_name="base-sepolia",
        tokens=(_token(devnet, devnet.usdc), _token(devnet, devnet.usdt)),
    )


def _token(devnet: Devnet, token: DevToken) -> Token:
    return Token(
        symbol=token.symbol,
        chain_id=devnet.chain_id,
        address=token.address.lower(),
        decimals=token.decimals,
        transfer_method=token.transfer_method,
        domain_name=token.name,
        domain_version=token.version,
        has_permit=token is devnet.usdc,
    )


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL server per test process, started when the first test needs it."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Path:
    """An empty SQLite database with the current schema."""
    return sqlite_file(tmp_path / "farebox.db")


@pytest.fixture
def postgres_database(postgres: PostgresServer) -> Iterator[str]:
    """The URL of an empty PostgreSQL database with the current schema."""
    url = postgres.new_database()
    yield url
    postgres.drop(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Path | str:
    """An empty database of either kind: a SQLite file or a PostgreSQL URL. A test that takes it runs on both."""
    name = {"sqlite": "sqlite_database", "postgresql": "postgres_database"}[request.param]
    found: Path | str = request.getfixturevalue(name)
    return found


@pytest.fixture
def store(database: Path | str) -> Iterator[Store]:
    """An open store on either kind of database."""
    opened = Store(database)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """One process per test process that forks gateways and whatever else is to be killed."""
    from tests.crashes.forks import Forks  # the gateway and all that it needs

    with Forks() as forking:
        yield forking
