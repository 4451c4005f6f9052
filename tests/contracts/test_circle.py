"""Circle's own bytecode takes every kind of payment that ours takes, and refuses what ours refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import coincurve
import pytest

from contracts.devnet import (
    Devnet,
    Wallet,
    approve_permit2,
    as_owner,
    balance_of,
    mint,
    place_operator_contracts,
    receipt,
    rpc,
)
from payments.chain.batches import batch_gas_limit, encode_batch, logs_of_calls
from payments.chain.networks import Network, Token
from payments.chain.rpc import Rpc
from payments.chain.transactions import AUTHORIZATION_USED_TOPIC, TRANSFER_TOPIC, Call, address_of, settle_call
from payments.doctor import verify_tokens
from payments.errors import PaymentError
from tests.contracts.circle import build
from tests.payments import contract_wallets as wallets
from tests.payments.desks import VALUE, opened
from tests.payments.exact_samples import assert_books_balance
from tests.payments.settling import PAY_TO, pay
from tests.payments.wallet_desk import refusal, send

SMART = "0x" + "5a" * 20


def permit2_token(network: Network) -> tuple[Network, Token]:
    """USDC as an operator may have it paid: by Permit2."""
    usdc = dataclasses.replace(network.tokens[0], transfer_method="permit2")
    return dataclasses.replace(network, tokens=(usdc, *network.tokens[1:])), usdc


async def test_the_domain_and_the_decimals_are_what_payers_sign(circle_chain: Devnet, network: Network) -> None:
    async with Rpc([circle_chain.rpc_url]) as node:
        await verify_tokens(node, network)
    assert build("v2/FiatTokenV2_2")["contractName"] == "FiatTokenV2_2"


async def test_an_authorization_is_settled(circle_chain: Devnet, network: Network, sqlite_database: Path) -> None:
    token = network.tokens[0]
    async with opened(sqlite_database, circle_chain, network) as (services, _):
        assert await send(services, network, token, pay(circle_chain.wallets[1], token, VALUE))
        assert balance_of(circle_chain.rpc_url, circle_chain.usdc, PAY_TO) == VALUE
        await assert_books_balance(services.store)


async def test_permit2_moves_it_through_the_exact_proxy(
    circle_chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    chain, payer = circle_chain, circle_chain.wallets[1]
    network, token = permit2_token(network)
    async with opened(sqlite_database, chain, network) as (services, _):
        assert (await refusal(services, network, token, pay(payer, token, VALUE))).code == "permit2_allowance_required"
        approve_permit2(chain.rpc_url, chain.usdc, payer.private_key)
        assert await send(services, network, token, pay(payer, token, VALUE))
        assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == VALUE


@pytest.mark.parametrize("behind", [b"", b"wallet's own"], ids=["65 bytes", "longer"])
async def test_a_contract_wallet_pays(
    circle_chain: Devnet, network: Network, sqlite_database: Path, behind: bytes
) -> None:
    token, owner = network.tokens[0], circle_chain.wallets[1]
    wallets.place(circle_chain, SMART, owner.address)
    mint(circle_chain.rpc_url, circle_chain.usdc, SMART, 10**9)
    async with opened(sqlite_database, circle_chain, network) as (services, _):
        await send(services, network, token, wallets.pay_from(SMART, owner, token, VALUE, behind=behind))
        assert balance_of(circle_chain.rpc_url, circle_chain.usdc, PAY_TO) == VALUE
        stranger = circle_chain.wallets[2]
        forged = wallets.pay_from(SMART, stranger, token, VALUE, behind=behind)
        assert (await refusal(services, network, token, forged)).code == "transfer_would_fail"


async def test_a_wallet_is_created_with_its_first_payment(
    circle_chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    token, owner = network.tokens[0], circle_chain.wallets[1]
    wallets.place_factory(circle_chain)
    address = wallets.future_address(owner.address)
    mint(circle_chain.rpc_url, circle_chain.usdc, address, 10**9)
    async with opened(sqlite_database, circle_chain, network) as (services, _):
        await send(
            services, network, token, wallets.wrapped(wallets.pay_from(address, owner, token, VALUE), owner.address)
        )
        assert balance_of(circle_chain.rpc_url, circle_chain.usdc, PAY_TO) == VALUE


async def test_a_key_that_delegated_its_account_elsewhere_no_longer_pays(
    circle_chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    """EIP-7702: Circle asks the code, so a signature that ecrecover takes is refused before anything is sent."""
    chain, token, account = circle_chain, network.tokens[0], circle_chain.wallets[3]
    rpc(chain.rpc_url, "anvil_setCode", account.address, "0xef0100" + chain.permit2[2:])
    async with opened(sqlite_database, chain, network) as (services, _):
        assert (await refusal(services, network, token, pay(account, token, VALUE))).code == "transfer_would_fail"
        wallets.place(chain, SMART, "0x" + "00" * 20)
        rpc(chain.rpc_url, "anvil_setCode", account.address, "0xef0100" + SMART[2:])
        await send(services, network, token, pay(account, token, VALUE))
        assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == VALUE


@pytest.mark.parametrize("method", ["eip3009", "permit2"])
@pytest.mark.parametrize("act", ["payer blacklisted", "treasury blacklisted", "paused"])
async def test_what_circle_blocks_is_refused_and_costs_nothing(
    circle_chain: Devnet, network: Network, sqlite_database: Path, act: str, method: str
) -> None:
    chain, payer = circle_chain, circle_chain.wallets[1]
    if method == "permit2":
        network, token = permit2_token(network)
        approve_permit2(chain.rpc_url, chain.usdc, payer.private_key)
    else:
        token = network.tokens[0]
    acts: dict[str, Callable[[], str]] = {
        "payer blacklisted": lambda: as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", payer.address),
        "treasury blacklisted": lambda: as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", PAY_TO),
        "paused": lambda: as_owner(chain.rpc_url, chain.usdc, "pause()"),
    }
    acts[act]()
    async with opened(sqlite_database, chain, network) as (services, _):
        refused: PaymentError = await refusal(services, network, token, pay(payer, token, VALUE))
        assert refused.code == "transfer_would_fail"
        count = await services.store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM settlement").fetchone()[0])
        assert count == 0


@pytest.mark.parametrize(("payers", "gas_max"), [(5, 43_500), (50, 50_000)])
def test_fifty_payments_share_a_transaction_and_its_gas(
    circle_chain: Devnet, network: Network, payers: int, gas_max: int
) -> None:
    """Gas a payment, all included; a payer's first payment of a batch touches its balance, the others find it warm."""
    chain, token, signer, count = circle_chain, network.tokens[0], circle_chain.wallets[9], 50
    batch, _ = place_operator_contracts(chain.rpc_url, PAY_TO, signer.address, [signer.address])
    mint(chain.rpc_url, chain.usdc, PAY_TO, 1)
    keys = [coincurve.PrivateKey(number.to_bytes(32, "big")) for number in range(1_000, 1_000 + payers)]
    wealthy = [Wallet(address_of(key), "0x" + key.secret.hex()) for key in keys]
    for wallet in wealthy:
        mint(chain.rpc_url, chain.usdc, wallet.address, 10**6)
    payments = [pay(wealthy[number % payers], token, 1_000) for number in range(count)]
    calls = [Call(*settle_call(payment, token), 150_000) for payment in payments]
    transaction = {
        "from": signer.address,
        "to": batch,
        "data": "0x" + encode_batch(calls).hex(),
        "gas": hex(batch_gas_limit(calls)),
    }
    mined = receipt(chain.rpc_url, rpc(chain.rpc_url, "eth_sendTransaction", transaction))
    results = logs_of_calls(mined)
    assert [result.success for result in results] == [True] * count
    assert {frozenset(log["topics"][0] for log in result.logs) for result in results} == {
        frozenset((TRANSFER_TOPIC, AUTHORIZATION_USED_TOPIC))
    }
    assert int(mined["gasUsed"], 16) // count <= gas_max
