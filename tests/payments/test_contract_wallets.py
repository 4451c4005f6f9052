"""Contract wallets pay like anybody else, and cannot do more harm than anybody else."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from contracts.devnet import Devnet, DevToken, Wallet, artifact, as_owner, balance_of, mint, rpc
from payments.chain.networks import Network, Token
from payments.chain.transactions import address_word, word
from payments.errors import PaymentMalformed, PaymentRefused
from payments.store import Store
from payments.tenders.exact import ExactTender
from payments.verification.chain_state import Seen
from payments.verification.signatures import keccak256
from payments.verification.wallet_signatures import ERC6492_SUFFIX, unwrap
from payments.x402.wire import Requirement
from tests.databases import open_store
from tests.payments import contract_wallets as wallets
from tests.payments.desks import VALUE, opened
from tests.payments.exact_samples import (
    DETAILS,
    NETWORK,
    QUOTED,
    USDC,
    HandChain,
    assert_books_balance,
    open_desk,
    payment_of,
    quote_of,
)
from tests.payments.settling import PAY_TO, pay
from tests.payments.wallet_desk import refusal, send

SMART = "0x" + "5a" * 20


def owned(chain: Devnet, network: Network, which: int = 0) -> tuple[Token, DevToken, Wallet]:
    """A contract wallet with money, and its owner."""
    token, coin = network.tokens[which], (chain.usdc, chain.usdt)[which]
    wallets.place(chain, SMART, chain.wallets[1].address)
    mint(chain.rpc_url, coin, SMART, 10**9)
    return token, coin, chain.wallets[1]


def approve_from(chain: Devnet, address: str) -> None:
    """As the wallet's own approval would leave it; a wallet to be created has no transaction of its own."""
    slot = keccak256(address_word(address) + word(artifact("UsdtLike")["storage"]["allowance"]["slot"]))
    entry = keccak256(address_word(chain.permit2) + slot)
    rpc(chain.rpc_url, "anvil_setStorageAt", chain.usdt.address, "0x" + entry.hex(), "0x" + "7f" * 32)


async def reserved(store: Store) -> int:
    return int(await store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM payment_authorization").fetchone()[0]))


@pytest.mark.parametrize("which", [0, 1], ids=["USDC", "USDT"])
@pytest.mark.parametrize("behind", [b"", b"wallet's own"], ids=["65 bytes", "longer"])
async def test_a_deployed_wallet_pays_and_its_inference_waits_for_the_money(
    chain: Devnet, network: Network, sqlite_database: Path, which: int, behind: bytes
) -> None:
    token, coin, owner = owned(chain, network, which)
    if which == 1:
        approve_from(chain, SMART)
    async with opened(sqlite_database, chain, network) as (services, _):
        early = await send(services, network, token, wallets.pay_from(SMART, owner, token, VALUE, behind=behind))
        assert not early
        assert balance_of(chain.rpc_url, coin, PAY_TO) == VALUE
        await assert_books_balance(services.store)


@pytest.mark.parametrize("which", [0, 1], ids=["USDC", "USDT"])
async def test_a_wallet_that_does_not_exist_yet_is_deployed_with_its_first_payment(
    chain: Devnet, network: Network, sqlite_database: Path, which: int
) -> None:
    token, coin, owner = network.tokens[which], (chain.usdc, chain.usdt)[which], chain.wallets[1]
    wallets.place_factory(chain)
    address = wallets.future_address(owner.address)
    mint(chain.rpc_url, coin, address, 10**9)
    if which == 1:
        approve_from(chain, address)
    async with opened(sqlite_database, chain, network) as (services, _):
        for paid in (VALUE, 2 * VALUE):  # the second one finds the wallet deployed
            payment = wallets.wrapped(wallets.pay_from(address, owner, token, VALUE), owner.address)
            assert not await send(services, network, token, payment)
            assert balance_of(chain.rpc_url, coin, PAY_TO) == paid
        assert len(rpc(chain.rpc_url, "eth_getCode", address, "latest")) > 2
        await assert_books_balance(services.store)


async def test_only_listed_factories_deploy(chain: Devnet, network: Network, sqlite_database: Path) -> None:
    token, owner = network.tokens[0], chain.wallets[1]
    payment = wallets.pay_from(wallets.future_address(owner.address), owner, token, VALUE)
    async with opened(sqlite_database, chain, network) as (services, _):
        elsewhere = wallets.wrapped(payment, owner.address, "0x" + "bb" * 20)
        assert (await refusal(services, network, token, elsewhere)).code == "unsupported_factory"


async def test_a_deployment_that_leads_nowhere_is_refused_before_anything_is_sent(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    token, owner = network.tokens[0], chain.wallets[1]
    wallets.place_factory(chain)
    mint(chain.rpc_url, chain.usdc, SMART, 10**9)
    async with opened(sqlite_database, chain, network) as (services, _):
        not_its_own = wallets.wrapped(wallets.pay_from(SMART, owner, token, VALUE), owner.address)
        assert (await refusal(services, network, token, not_its_own)).code == "transfer_would_fail"
        assert await reserved(services.store) == 0


@pytest.mark.parametrize("mood", [wallets.NEVER, wallets.BURNING, wallets.BOMB])
async def test_a_hostile_wallet_is_refused_and_harms_nobody_beside_it(
    chain: Devnet, network: Network, sqlite_database: Path, mood: int
) -> None:
    token, _, owner = owned(chain, network)
    wallets.set_mood(chain, SMART, mood)
    async with opened(sqlite_database, chain, network) as (services, _):
        hostile = wallets.pay_from(SMART, owner, token, VALUE, behind=b"x")
        refused, *early = await asyncio.gather(
            send(services, network, token, hostile),
            *(send(services, network, token, pay(chain.wallets[2 + i], token, VALUE)) for i in range(3)),
            return_exceptions=True,
        )
        assert isinstance(refused, PaymentRefused)
        assert refused.code == "transfer_would_fail"
        assert early == [True, True, True]
        assert await reserved(services.store) == 3


async def test_a_wallet_that_changes_its_mind_gets_nothing_and_can_pay_anew(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    token, _, owner = owned(chain, network)
    wallets.set_mood(chain, SMART, wallets.FICKLE)
    payment = wallets.pay_from(SMART, owner, token, VALUE)
    async with opened(sqlite_database, chain, network) as (services, _):
        refused = await refusal(services, network, token, payment)
        assert refused.code == "settlement_failed"
        wallets.set_mood(chain, SMART, 0)
        await send(services, network, token, wallets.pay_from(SMART, owner, token, VALUE))
        await assert_books_balance(services.store)


async def test_a_delegated_account_is_judged_by_its_code_whatever_its_key_signed(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    token, account = network.tokens[0], chain.wallets[3]
    wallets.place(chain, SMART, "0x" + "00" * 20)
    rpc(chain.rpc_url, "anvil_setCode", account.address, "0xef0100" + SMART[2:])
    async with opened(sqlite_database, chain, network) as (services, _):
        assert not await send(services, network, token, pay(account, token, VALUE))
        # To code that is no wallet: the key's own signature is worth nothing any more.
        rpc(chain.rpc_url, "anvil_setCode", account.address, "0xef0100" + chain.usdc.address[2:])
        refused = await refusal(services, network, token, pay(account, token, VALUE))
        assert refused.code == "transfer_would_fail"
        assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == VALUE


async def test_signatures_that_nobody_can_have_made_reserve_nothing(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    token = network.tokens[0]
    good = pay(chain.wallets[1], token, VALUE)
    s = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141 - int.from_bytes(
        good.signature[32:64], "big"
    )
    spellings = {
        "malleable": good.signature[:32] + s.to_bytes(32, "big") + bytes([55 - good.signature[64]]),
        "v of zero": good.signature[:64] + bytes([good.signature[64] - 27]),
        "longer": good.signature + b"\0",
        "somebody else's": pay(chain.wallets[2], token, VALUE).signature,
    }
    async with opened(sqlite_database, chain, network) as (services, _):
        for name, signature in spellings.items():
            forged = dataclasses.replace(good, signature=signature)
            assert (await refusal(services, network, token, forged)).code == "bad_signature", name
        short = dataclasses.replace(good, signature=good.signature[:64])
        assert isinstance(await refusal(services, network, token, short), PaymentMalformed)
        assert await reserved(services.store) == 0
        assert await send(services, network, token, good)


async def test_nothing_is_reserved_while_a_contract_judges_its_signature(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    desk, seen = open_desk(store), []

    class Watching(HandChain):
        async def check(self, *_: object, **__: object) -> Seen:
            seen.append(await reserved(store))
            return Seen(has_code=True)

    desk.services.chain_states = Watching()
    payment = payment_of()
    unproven = PaymentRefused("bad_signature", "no key's")
    requirement = Requirement("exact", NETWORK.caip2, USDC.address, QUOTED // 1000, PAY_TO, 300, {})
    tender = ExactTender(desk.services, payment, USDC, NETWORK, requirement, b"d" * 32, unproven=unproven)
    hold = await tender.authorize(quote_of(), DETAILS)
    # Before the reservation by the contract's word, after it with what else is under way.
    assert seen == [0, 1]
    assert not hold.may_start_early
    store.close()


async def test_a_wallet_on_the_blacklist_is_told_so(chain: Devnet, network: Network, sqlite_database: Path) -> None:
    token, _, owner = owned(chain, network)
    as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", SMART)
    async with opened(sqlite_database, chain, network) as (services, _):
        refused = await refusal(services, network, token, wallets.pay_from(SMART, owner, token, VALUE))
        assert isinstance(refused, PaymentRefused)
        assert "blacklisted" in refused.message


@pytest.mark.parametrize(
    "body", [b"", bytes(64), b"\xff" * 160, bytes(32) + b"\xff" * 128, bytes(159)], ids=lambda body: str(len(body))
)
def test_what_only_ends_like_a_wrapped_signature_is_malformed(body: bytes) -> None:
    with pytest.raises(PaymentMalformed):
        unwrap(body + ERC6492_SUFFIX)
