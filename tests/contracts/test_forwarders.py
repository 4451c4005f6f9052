"""Deposit addresses: known before they exist, one for every account, and whatever arrives there can only go to the treasury."""

from __future__ import annotations

import pytest

from contracts import operators
from contracts.devnet import Devnet, as_owner, balance_of, call_data, place_operator_contracts, receipt, rpc, send_as
from payments.chain.batches import SWEEP_FAILED_TOPIC, SWEPT_TOPIC, account_of, encode_sweep, forwarder_address
from tests.contracts.calls import encoded, read

TREASURY = "0x" + "7e" * 20


@pytest.fixture
def factory(chain: Devnet) -> str:
    """The operator's factory."""
    wallet = chain.wallets[9].address
    return place_operator_contracts(chain.rpc_url, TREASURY, wallet, [wallet])[1]


def deposit(chain: Devnet, factory: str, customer: int, amount: int, symbol: str = "usdc") -> str:
    """A plain transfer to a wallet's deposit address, which is returned."""
    wallet = chain.wallets[customer]
    address = forwarder_address(factory, operators.forwarder(TREASURY).address, wallet.address.lower())
    token = getattr(chain, symbol)
    send_as(chain.rpc_url, wallet.address, token.address, call_data("transfer(address,uint256)", address, amount))
    return address


def sweep(chain: Devnet, factory: str, customers: list[int], symbol: str = "usdc") -> list[dict]:  # type: ignore[type-arg]
    """Sweep wallets' addresses, sent by a stranger; returns the factory's own logs."""
    accounts = [account_of(chain.wallets[customer].address.lower()) for customer in customers]
    data = "0x" + encode_sweep(getattr(chain, symbol).address.lower(), accounts).hex()
    mined = receipt(chain.rpc_url, send_as(chain.rpc_url, chain.wallets[6].address, factory, data))
    return [log for log in mined["logs"] if log["address"] == factory]


@pytest.mark.parametrize("symbol", ["usdc", "usdt"])
def test_deposits_are_swept_to_the_treasury_again_and_again(chain: Devnet, factory: str, symbol: str) -> None:
    addresses = [deposit(chain, factory, customer, 1_000 + customer, symbol) for customer in range(3)]
    token = getattr(chain, symbol)

    logs = sweep(chain, factory, [0, 1, 2], symbol)

    assert balance_of(chain.rpc_url, token, TREASURY) == 3_003
    assert [log["topics"][0] for log in logs] == [SWEPT_TOPIC] * 3
    assert [int(log["data"], 16) for log in logs] == [1_000, 1_001, 1_002]
    assert [balance_of(chain.rpc_url, token, address) for address in addresses] == [0, 0, 0]

    assert deposit(chain, factory, 1, 50, symbol) == addresses[1]
    assert len(sweep(chain, factory, [0, 1], symbol)) == 1  # nothing was at the first one
    assert balance_of(chain.rpc_url, token, TREASURY) == 3_053


def test_an_address_that_the_token_has_blocked_keeps_nobody_else_from_the_treasury(chain: Devnet, factory: str) -> None:
    blocked, _ = deposit(chain, factory, 0, 10), deposit(chain, factory, 1, 20)
    as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", blocked)

    logs = sweep(chain, factory, [0, 1])

    assert [log["topics"][0] for log in logs] == [SWEEP_FAILED_TOPIC, SWEPT_TOPIC]
    assert balance_of(chain.rpc_url, chain.usdc, TREASURY) == 20
    assert balance_of(chain.rpc_url, chain.usdc, blocked) == 10


def test_a_token_that_is_none_fails_and_nothing_else(chain: Devnet, factory: str) -> None:
    nothing = "0x" + "ab" * 20
    accounts = [account_of(chain.wallets[0].address.lower())]
    data = "0x" + encode_sweep(nothing, accounts).hex()
    mined = receipt(chain.rpc_url, send_as(chain.rpc_url, chain.wallets[6].address, factory, data))
    assert [log["topics"][0] for log in mined["logs"]] == [SWEEP_FAILED_TOPIC]


def test_a_forwarder_pays_the_treasury_whoever_calls_it(chain: Devnet, factory: str) -> None:
    address = deposit(chain, factory, 0, 10)
    sweep(chain, factory, [0])
    deposit(chain, factory, 0, 25)

    send_as(chain.rpc_url, chain.wallets[5].address, address, encoded("flush(address)", chain.usdc.address))

    assert balance_of(chain.rpc_url, chain.usdc, TREASURY) == 35


def test_addresses_are_the_factorys_own_and_the_creation_is_the_placed_one(chain: Devnet, factory: str) -> None:
    implementation = operators.forwarder(TREASURY)
    for wallet in chain.wallets[:4]:
        account = account_of(wallet.address.lower())
        there = read(chain, factory, "addressOf(bytes32)", account)[-20:].hex()
        assert "0x" + there == forwarder_address(factory, implementation.address, wallet.address.lower())

    other = "0x" + "11" * 20
    for creation in (operators.forwarder(other), operators.deposit_factory(other)):
        data = "0x" + creation.deployer_data.hex()
        send_as(chain.rpc_url, chain.wallets[0].address, operators.CREATE2_DEPLOYER, data)
        assert len(rpc(chain.rpc_url, "eth_getCode", creation.address, "latest")) > 2
    assert (
        read(chain, operators.deposit_factory(other).address, "FORWARDER()")[-20:].hex()
        == (operators.forwarder(other).address[2:])
    )
