"""A payer that never approved Permit2 sends a permit with its payment: exact, upto and a channel's deposit, everything real."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import Devnet, Wallet, balance_of, call_data, rpc
from payments.chain.networks import PERMIT2_ADDRESS, PERMIT2_DEPOSIT_COLLECTOR_ADDRESS, Network, Token
from payments.chain.rpc import Rpc
from payments.chain.transactions import encode_allowance
from payments.errors import PaymentError, PaymentRefused
from payments.tenders.base import Outcome
from payments.tenders.exact import ExactHold
from payments.tenders.exact_scheme import ExactScheme
from payments.tenders.upto import UptoHold
from payments.verification import vouchers
from payments.verification.permits import permit_digest, with_permits
from payments.x402.channels import ChannelPayment, Permit2Deposit
from payments.x402.extensions.eip2612 import Eip2612Permit
from payments.x402.wire import Payment
from tests.e2e.chain_acts import send_dearly
from tests.payments.channel_desk import PRICE
from tests.payments.channel_desk import Gateway as Channels
from tests.payments.channel_desk import gateway as channel_gateway
from tests.payments.desks import VALUE
from tests.payments.exact_samples import DETAILS, QUOTED, quote_of
from tests.payments.pledging import COST, Desk
from tests.payments.pledging import gateway as upto_gateway
from tests.payments.settling import PAY_TO, pay, sign, transactions

PAYER = 5
ANSWERED = Outcome({"model": "m"})


@pytest.fixture
def over_permit2(network: Network) -> Network:
    """USDC moved by Permit2, as operators of tokens without EIP-3009 have it."""
    usdc, usdt = network.tokens
    return dataclasses.replace(network, tokens=(dataclasses.replace(usdc, transfer_method="permit2"), usdt))


@pytest.fixture
async def desk(chain: Devnet, over_permit2: Network, sqlite_database: Path) -> AsyncIterator[Desk]:
    async with upto_gateway(sqlite_database, chain, over_permit2) as opened:
        yield opened


def permit_of(chain: Devnet, wallet: Wallet, token: Token, amount: int, **changes: Any) -> Eip2612Permit:
    """What an official client signs: the allowance for exactly this payment, at the token's next nonce."""
    nonce = rpc(
        chain.rpc_url,
        "eth_call",
        {"to": token.address, "data": call_data("nonces(address)", wallet.address)},
        "latest",
    )
    terms: dict[str, Any] = {
        "owner": wallet.address.lower(),
        "asset": token.address,
        "spender": PERMIT2_ADDRESS,
        "value": amount,
        "nonce": int(nonce, 16),
        "deadline": int(time.time()) + 300,
        "signature": b"",
    }
    unsigned = Eip2612Permit(**terms | changes)
    return dataclasses.replace(unsigned, signature=sign(wallet, permit_digest(unsigned, token)))


def allowance(chain: Devnet, wallet: Wallet, token: Token) -> int:
    data = "0x" + encode_allowance(wallet.address.lower(), PERMIT2_ADDRESS).hex()
    return int(rpc(chain.rpc_url, "eth_call", {"to": token.address, "data": data}, "latest"), 16)


def exact(desk: Desk, wallet: Wallet, **changes: Any) -> Payment:
    token = desk.network.tokens[0]
    payment = pay(wallet, token, VALUE)
    requirement = ExactScheme(desk.network, PAY_TO, desk.services).requirement(token, QUOTED, 300)
    return dataclasses.replace(
        payment, accepted=requirement, permit=permit_of(desk.chain, wallet, token, VALUE, **changes)
    )


def upto(desk: Desk, wallet: Wallet, **changes: Any) -> Payment:
    payment = desk.sign(wallet, desk.network.tokens[0])
    return dataclasses.replace(payment, permit=permit_of(desk.chain, wallet, desk.network.tokens[0], VALUE, **changes))


async def authorize(desk: Desk, payment: Payment) -> ExactHold | UptoHold:
    if payment.scheme == "upto":
        return await desk.authorize(payment)
    scheme, token = ExactScheme(desk.network, PAY_TO, desk.services), desk.network.tokens[0]
    requirement = scheme.requirement(token, QUOTED, 300)
    tender = scheme.tender(payment, token, requirement, hashlib.sha256(b"request").digest(), int(time.time()))
    return await tender.authorize(quote_of(), DETAILS)


async def refused(desk: Desk, payment: Payment) -> str:
    with pytest.raises(PaymentError) as error:
        await authorize(desk, payment)
    return error.value.code


@pytest.mark.parametrize("token", ["ours", "circle"])
async def test_a_permit_and_an_exact_payment_are_one_transaction(
    chain: Devnet, desk: Desk, token: str, request: pytest.FixtureRequest
) -> None:
    if token == "circle":
        request.getfixturevalue("circle_chain")
    wallet = chain.wallets[PAYER]
    hold = await authorize(desk, exact(desk, wallet))
    await hold.ready()
    await hold.capture(QUOTED, ANSWERED)
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == VALUE
    assert len(await transactions(desk.store)) == 1
    assert allowance(chain, wallet, desk.network.tokens[0]) == 0
    await desk.check_books()


@pytest.mark.parametrize("token", ["ours", "circle"])
async def test_an_upto_payment_takes_what_the_answer_cost_by_its_permit(
    chain: Devnet, desk: Desk, token: str, request: pytest.FixtureRequest
) -> None:
    if token == "circle":
        request.getfixturevalue("circle_chain")
    wallet, usdc = chain.wallets[PAYER], desk.network.tokens[0]
    hold = await authorize(desk, upto(desk, wallet))
    assert allowance(chain, wallet, usdc) == 0
    await hold.capture(COST, ANSWERED)
    assert await desk.settled(hold.receipt_id)
    paid = balance_of(chain.rpc_url, chain.usdc, PAY_TO)
    assert paid == 7_655
    assert len(await transactions(desk.store)) == 1
    assert allowance(chain, wallet, usdc) == VALUE - paid
    await desk.check_books()


@pytest.mark.parametrize("make", [exact, upto])
async def test_a_permit_that_somebody_submitted_before_us_does_no_harm(chain: Devnet, desk: Desk, make: Any) -> None:
    wallet, token = chain.wallets[PAYER], desk.network.tokens[0]
    payment = make(desk, wallet)
    _submit(chain, chain.wallets[7], payment.permit)
    assert allowance(chain, wallet, token) == VALUE
    hold = await authorize(desk, payment)
    await hold.ready()
    await hold.capture(QUOTED, ANSWERED)
    if make is upto:
        assert await desk.settled(hold.receipt_id)
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == VALUE


@pytest.mark.parametrize("make", [exact, upto])
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"owner": "0x" + "11" * 20}, "eip2612_from_mismatch"),
        ({"asset": "0x" + "11" * 20}, "eip2612_asset_mismatch"),
        ({"spender": "0x" + "11" * 20}, "eip2612_spender_not_permit2"),
        ({"value": 2**256 - 1}, "eip2612_amount_mismatch"),
        ({"deadline": 1}, "eip2612_deadline_expired"),
        ({"nonce": 77}, "transfer_would_fail"),
    ],
)
async def test_a_permit_that_does_not_fit_is_refused_before_anything_is_written(
    chain: Devnet, desk: Desk, make: Any, changes: dict[str, Any], code: str
) -> None:
    assert await refused(desk, make(desk, chain.wallets[PAYER], **changes)) == code
    assert await transactions(desk.store) == []
    assert await desk.store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM receipt").fetchone()[0]) == 0


async def test_a_permit_must_hold_until_the_answer_is_settled(chain: Devnet, desk: Desk) -> None:
    short = int(time.time()) + 30  # an answer may take 60 s
    assert await refused(desk, upto(desk, chain.wallets[PAYER], deadline=short)) == "eip2612_deadline_expired"
    hold = await authorize(desk, exact(desk, chain.wallets[PAYER], deadline=short))
    await hold.ready()


@pytest.mark.parametrize("make", [exact, upto])
async def test_somebody_elses_permit_is_refused(chain: Devnet, desk: Desk, make: Any) -> None:
    payment, other = make(desk, chain.wallets[PAYER]), make(desk, chain.wallets[6])
    assert await refused(desk, dataclasses.replace(payment, permit=other.permit)) == "eip2612_from_mismatch"
    forged = dataclasses.replace(payment.permit, signature=other.permit.signature)
    assert await refused(desk, dataclasses.replace(payment, permit=forged)) == "eip2612_invalid_signature"


@pytest.mark.parametrize(("first", "second"), [(exact, exact), (exact, upto), (upto, upto), (upto, exact)])
async def test_two_permits_of_one_nonce_are_not_relied_on_at_once(
    chain: Devnet, desk: Desk, first: Any, second: Any
) -> None:
    wallet = chain.wallets[PAYER]
    one, two = first(desk, wallet), second(desk, wallet)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    hold = await authorize(desk, one)
    assert await refused(desk, two) == "permit_in_use"
    rpc(chain.rpc_url, "evm_setAutomine", True)
    rpc(chain.rpc_url, "evm_mine")
    await hold.ready()
    await hold.capture(QUOTED, ANSWERED)
    if first is upto:
        assert await desk.settled(hold.receipt_id)
    again = await authorize(desk, second(desk, wallet))
    await again.ready()


async def test_whoever_spoils_its_permit_before_the_block_gets_nothing(chain: Devnet, desk: Desk) -> None:
    wallet = chain.wallets[PAYER]
    payment = exact(desk, wallet)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    hold = await authorize(desk, payment)
    _submit(chain, wallet, permit_of(chain, wallet, desk.network.tokens[0], 0))
    with pytest.raises(PaymentRefused) as error:
        await hold.ready()
    assert error.value.code == "settlement_failed"
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 0
    await desk.check_books()


async def test_whoever_spoils_its_permit_after_the_answer_owes_it(chain: Devnet, desk: Desk) -> None:
    wallet = chain.wallets[PAYER]
    hold = await authorize(desk, upto(desk, wallet))
    _submit(chain, wallet, permit_of(chain, wallet, desk.network.tokens[0], 0))
    await hold.capture(COST, ANSWERED)
    assert not await desk.settled(hold.receipt_id)
    assert await refused(desk, upto(desk, wallet)) == "unpaid_answers"
    await desk.check_books()


async def test_a_channel_is_opened_by_a_permit(sqlite_database: Path, chain: Devnet, over_permit2: Network) -> None:
    async with channel_gateway(sqlite_database, chain, over_permit2) as opened:
        payment = _deposit(opened, 5 * PRICE)
        with pytest.raises(PaymentError) as short:
            await opened.take(payment)
        assert short.value.code == "permit2_allowance_required"
        permit = permit_of(chain, opened.wallet, opened.token, 5 * PRICE)
        wrong = dataclasses.replace(permit, value=PRICE)
        for bad, code in ((wrong, "eip2612_amount_mismatch"), (_forged(permit), "eip2612_invalid_signature")):
            with pytest.raises(PaymentRefused) as error:
                await opened.take(dataclasses.replace(payment, permit=bad))
            assert error.value.code == code
        hold = await opened.take(dataclasses.replace(payment, permit=permit))
        await hold.capture(QUOTED, ANSWERED)
        assert (await opened.channel()).on_chain.balance == 5 * PRICE
        assert len(await transactions(opened.services.store)) == 1


async def test_which_tokens_take_permits_is_learnt_from_the_chain(chain: Devnet, network: Network) -> None:
    usdc, usdt = network.tokens
    elsewhere = dataclasses.replace(usdc, domain_version="7")
    unknown = tuple(dataclasses.replace(token, has_permit=False) for token in (usdc, usdt, elsewhere))
    async with Rpc([chain.rpc_url]) as node:
        learnt = await with_permits(node, dataclasses.replace(network, tokens=unknown))
    assert [token.has_permit for token in learnt.tokens] == [True, False, False]


async def test_fifty_permits_of_fifty_payers_at_once(chain: Devnet, desk: Desk) -> None:
    wallets = chain.wallets[1:]
    holds = await asyncio.gather(*(authorize(desk, exact(desk, wallet)) for wallet in wallets))
    await asyncio.gather(*(hold.ready() for hold in holds))
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == len(wallets) * VALUE


def _forged(permit: Eip2612Permit) -> Eip2612Permit:
    return dataclasses.replace(permit, signature=permit.signature[:63] + b"\0" + permit.signature[64:])


def _submit(chain: Devnet, sender: Wallet, permit: Eip2612Permit) -> None:
    """Bring a permit to the chain, before whatever of ours waits there."""
    signature = permit.signature
    data = call_data(
        "permit(address,address,uint256,uint256,uint8,bytes32,bytes32)",
        permit.owner,
        permit.spender,
        permit.value,
        permit.deadline,
        signature[64],
        int.from_bytes(signature[:32], "big"),
        int.from_bytes(signature[32:64], "big"),
    )
    send_dearly(chain.rpc_url, sender.address, data)
    rpc(chain.rpc_url, "evm_mine")


def _deposit(opened: Channels, amount: int) -> ChannelPayment:
    """A payment that opens the channel over Permit2, as an official client signs it."""
    unsigned = Permit2Deposit(
        amount=amount,
        payer=opened.wallet.address.lower(),
        token=opened.token.address,
        permitted=amount,
        spender=PERMIT2_DEPOSIT_COLLECTOR_ADDRESS,
        nonce=secrets.randbits(256),
        deadline=int(time.time()) + 300,
        channel_id=opened.number,
        signature=b"",
    )
    digest = vouchers.permit2_deposit_digest(unsigned, opened.token.chain_id)
    deposit = dataclasses.replace(unsigned, signature=sign(opened.wallet, digest))
    return dataclasses.replace(opened.payment(PRICE), type="deposit", deposit=deposit)
