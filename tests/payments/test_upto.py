"""The scheme `upto` with everything real: the signatures, the batch contract, the engine, the chain and the books."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import payments.settlement.judge
from contracts.devnet import (
    Devnet,
    Wallet,
    approve_permit2,
    as_owner,
    balance_of,
    call_data,
    place_operator_contracts,
    rpc,
    send_signed,
)
from payments import promises, receipts
from payments.chain.batches import missing_for_upto
from payments.chain.networks import UPTO_PERMIT2_PROXY_ADDRESS, Network, Token
from payments.chain.rpc import Rpc
from payments.chain.transactions import encode_upto_settle
from payments.errors import AllowanceRequired, PaymentConflict, PaymentError, PaymentRefused, SchemeRefused
from payments.ledger import history
from payments.ledger.accounts import account_id, payer_account
from payments.recovery import recover
from payments.settlement.care import SLACK_BLOCKS
from payments.settlement.dispatcher import Dispatcher
from payments.settlement.engine import Settlements
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Outcome
from payments.tenders.upto import UptoHold
from payments.tenders.upto_settlement import settlement_id
from payments.x402.wire import Payment, UptoAuthorization
from tests.payments.contract_wallets import place
from tests.payments.desks import VALUE, opened
from tests.payments.exact_samples import QUOTED, assert_books_balance
from tests.payments.pledging import ANSWER_S, ANSWERED, COST, Desk, gateway
from tests.payments.settling import PAY_TO, later_than_the_last_block, pay, rows, until


@pytest.fixture
async def desk(chain: Devnet, network: Network, sqlite_database: Path) -> AsyncIterator[Desk]:
    for wallet in chain.wallets[1:4]:
        for coin in (chain.usdc, chain.usdt):
            approve_permit2(chain.rpc_url, coin, wallet.private_key)
    async with gateway(sqlite_database, chain, network) as opened:
        yield opened


async def refusal(desk: Desk, payment: Payment) -> PaymentError:
    with pytest.raises(PaymentError) as refused:
        await desk.authorize(payment)
    return refused.value


@pytest.mark.parametrize("which", [0, 1], ids=["USDC", "USDT"])
async def test_only_what_the_answer_cost_is_taken(desk: Desk, which: int) -> None:
    token, coin = desk.network.tokens[which], (desk.chain.usdc, desk.chain.usdt)[which]
    payment = desk.sign(desk.chain.wallets[1], token)
    hold = await desk.authorize(payment)
    assert hold.may_start_early
    assert balance_of(desk.chain.rpc_url, coin, PAY_TO) == 0
    charge = await hold.capture(COST, ANSWERED)
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (COST, 0)
    assert await desk.settled(hold.receipt_id)
    assert balance_of(desk.chain.rpc_url, coin, PAY_TO) == 7_655
    assert await desk.balance(account_id("revenue", token.asset)) == COST
    assert await desk.balance(account_id("receivable", token.asset, payment.payer)) == 0
    assert await desk.balance(payer_account(payment.payer, token.asset)) == 679
    view = await desk.store.read(lambda tx: receipts.get(tx, hold.receipt_id))
    assert view is not None
    assert (view.settlement_state, view.paid_nano_usd, view.credited_nano_usd) == ("mined", 7_655_000, 679)
    # What a unit of the token is too large for is in the balance, and the history says from where.
    page = await desk.store.read(lambda tx: history.page(tx, payment.payer, 9))
    assert [(line.kind, line.amount_nano_usd, line.receipt) for line in page.entries] == [
        ("rounding", 679, hold.receipt_id)
    ]
    assert await desk.store.read(lambda tx: promises.exposure(promises.under_way(tx, payment.payer))) == 0
    await desk.check_books()


async def test_what_used_an_authorization_is_looked_for_from_when_the_answer_was_there(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dispatcher, "take", lambda self, entry: None)
    assert isinstance(desk.services.settlements, Settlements)
    desk.services.settlements.courier.head = 1_000
    hold = await desk.authorize(desk.sign(desk.chain.wallets[1], desk.network.tokens[0]))
    await hold.capture(COST, ANSWERED)
    assert await rows(desk.store, "state, from_block") == [("queued", 1_000 - SLACK_BLOCKS)]


async def test_it_may_be_valid_from_later_than_the_last_block_on(desk: Desk) -> None:
    now = await later_than_the_last_block(desk.chain.rpc_url)
    hold = await desk.authorize(desk.sign(desk.chain.wallets[1], desk.network.tokens[0], valid_after=now - 1))
    await hold.capture(COST, ANSWERED)
    assert await desk.settled(hold.receipt_id)


async def test_an_answer_that_costs_more_than_authorised_is_the_operators_loss(desk: Desk) -> None:
    token = desk.network.tokens[0]
    hold = await desk.authorize(desk.sign(desk.chain.wallets[1], token))
    charge = await hold.capture(QUOTED + 5, ANSWERED)
    assert charge.charged_nano_usd == QUOTED
    assert await desk.settled(hold.receipt_id)
    assert balance_of(desk.chain.rpc_url, desk.chain.usdc, PAY_TO) == VALUE
    assert await desk.balance(account_id("variance", token.asset)) == -5
    await desk.check_books()


async def test_of_fifty_uses_of_one_authorization_one_begins(desk: Desk) -> None:
    payment = desk.sign(desk.chain.wallets[1], desk.network.tokens[0])
    results = await asyncio.gather(*(desk.authorize(payment) for _ in range(50)), return_exceptions=True)
    (hold,) = [result for result in results if isinstance(result, UptoHold)]
    assert sum(isinstance(result, AlreadyUsed) and result.state == "in_progress" for result in results) == 49
    with pytest.raises(PaymentConflict) as conflict:
        await desk.authorize(payment, b"another request".ljust(32))
    assert conflict.value.code == "authorization_reused"
    await asyncio.gather(*(hold.capture(COST, ANSWERED) for _ in range(5)))
    assert await desk.settled(hold.receipt_id)
    assert balance_of(desk.chain.rpc_url, desk.chain.usdc, PAY_TO) == 7_655
    await desk.check_books()


@pytest.mark.parametrize("how", ["nothing to pay", "failed", "hung up", "restarted"])
async def test_what_settles_nothing_buys_nothing_else(
    chain: Devnet, network: Network, sqlite_database: Path, desk: Desk, how: str
) -> None:
    payment = desk.sign(chain.wallets[1], network.tokens[0])
    hold = await desk.authorize(payment)
    if how == "nothing to pay":
        await hold.capture(0, ANSWERED)
    elif how == "failed":
        await hold.release(Outcome({"reason": "all_candidates_failed"}))
    elif how == "hung up":
        await hold.interrupt(Outcome({"reason": "gone"}))
    else:
        await recover(desk.store)
    used = await refusal(desk, payment)
    assert isinstance(used, AlreadyUsed)
    assert used.state == ("captured" if how == "nothing to pay" else "burnt")
    late = dataclasses.replace(payment, quote_token=None)
    refused = await desk.scheme.first_outcome(late, network.tokens[0], b"d" * 32)
    assert refused is not None
    assert refused.state == used.state
    assert await desk.store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM settlement").fetchone()[0]) == 0
    assert await desk.store.read(lambda tx: promises.exposure(promises.under_way(tx, payment.payer))) == 0
    await desk.check_books()


async def test_a_used_authorization_is_known_after_its_deadline(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    payment = desk.sign(desk.chain.wallets[1], desk.network.tokens[0])
    hold = await desk.authorize(payment)
    await hold.capture(0, ANSWERED)
    later = time.time() + 10_000
    monkeypatch.setattr(time, "time", lambda: later)
    assert isinstance(await refusal(desk, payment), AlreadyUsed)
    unused = desk.sign(desk.chain.wallets[1], desk.network.tokens[0], valid_s=-1)
    assert (await refusal(desk, unused)).code == "expired"


async def test_what_was_captured_before_the_process_died_is_settled_by_the_next_one(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    token = network.tokens[0]
    approve_permit2(chain.rpc_url, chain.usdc, chain.wallets[1].private_key)
    async with gateway(sqlite_database, chain, network) as desk:
        hold = await desk.authorize(desk.sign(chain.wallets[1], token))
        interrupted = await desk.authorize(desk.sign(chain.wallets[1], token))
        # The unit is durable and nobody is told any more, as after a SIGKILL.
        await desk.store.write(lambda tx: hold._capture(tx, COST, ANSWERED, None))
    async with gateway(sqlite_database, chain, network) as desk:
        assert await desk.settled(hold.receipt_id)
        assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 7_655
        view = await desk.store.read(lambda tx: receipts.get(tx, interrupted.receipt_id))
        assert view is not None
        assert view.state == "released"
        await desk.check_books()


async def test_beyond_the_exposure_limit_another_scheme_is_asked_for(desk: Desk) -> None:
    token, wallet = desk.network.tokens[0], desk.chain.wallets[1]
    holds = [await desk.authorize(desk.sign(wallet, token)) for _ in range(3)]
    refused = await refusal(desk, desk.sign(wallet, token))
    assert isinstance(refused, SchemeRefused)
    assert (refused.code, refused.scheme) == ("exposure_exceeded", "upto")
    # Somebody else's limit is their own, and an answer counts as what it cost.
    await desk.authorize(desk.sign(desk.chain.wallets[2], token))
    rpc(desk.chain.rpc_url, "evm_setAutomine", False)
    await holds[0].capture(1, ANSWERED)
    assert (await refusal(desk, desk.sign(wallet, token))).code == "exposure_exceeded"
    rpc(desk.chain.rpc_url, "evm_setAutomine", True)
    rpc(desk.chain.rpc_url, "evm_mine")
    assert await desk.settled(holds[0].receipt_id)
    await desk.authorize(desk.sign(wallet, token))


async def test_open_pledges_and_payments_under_way_count_against_the_balance(desk: Desk) -> None:
    token, wallet = desk.network.tokens[0], desk.chain.wallets[1]
    balance = balance_of(desk.chain.rpc_url, desk.chain.usdc, wallet.address)
    send_signed(
        desk.chain.rpc_url,
        wallet.private_key,
        desk.chain.usdc.address,
        call_data("transfer(address,uint256)", desk.chain.wallets[9].address, balance - 2 * VALUE),
    )
    await desk.authorize(desk.sign(wallet, token))
    other = await desk.authorize(desk.sign(wallet, token))
    assert (await refusal(desk, desk.sign(wallet, token))).code == "insufficient_funds"
    await other.release(Outcome({}))
    rpc(desk.chain.rpc_url, "evm_setAutomine", False)
    from tests.payments.settling import order_for

    order = dataclasses.replace(order_for(pay(wallet, token, VALUE), token), kind="payment")
    await desk.store.write(lambda tx: _receipt_for(tx, order.reference, wallet, token))
    await desk.services.settlements.submit(order)
    assert (await refusal(desk, desk.sign(wallet, token))).code == "insufficient_funds"


def _receipt_for(tx: object, reference: str, wallet: Wallet, token: Token) -> None:
    receipts.open_receipt(
        tx,  # type: ignore[arg-type]
        id=reference,
        tender="exact",
        payer=wallet.address.lower(),
        asset=token.asset,
        quoted_nano_usd=QUOTED,
        details={},
    )
    tx.execute(  # type: ignore[attr-defined]
        "INSERT INTO payment_authorization (identity, digest, receipt_id, payer, state, value_nano_usd, exposed_nano_usd,"
        " created_ms) VALUES (?, ?, ?, ?, 'reserved', ?, 0, 0)",
        (reference, b"d", reference, wallet.address.lower(), QUOTED),
    )


async def test_the_allowance_has_to_cover_all_open_pledges(desk: Desk) -> None:
    token, wallet = desk.network.tokens[0], desk.chain.wallets[4]
    assert isinstance(await refusal(desk, desk.sign(wallet, token)), AllowanceRequired)
    approve_permit2(desk.chain.rpc_url, desk.chain.usdc, wallet.private_key, VALUE)
    await desk.authorize(desk.sign(wallet, token))
    assert isinstance(await refusal(desk, desk.sign(wallet, token)), AllowanceRequired)


async def test_a_drained_wallet_costs_the_operator_one_answer_and_pays_by_exact_until_it_has_paid(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nor is it tried again meanwhile.
    monkeypatch.setattr(payments.settlement.judge, "FIRST_LOOK_MS", 600_000)
    token, wallet = desk.network.tokens[0], desk.chain.wallets[1]
    payer = wallet.address.lower()
    hold = await desk.authorize(desk.sign(wallet, token))
    everything = balance_of(desk.chain.rpc_url, desk.chain.usdc, wallet.address)
    drain = call_data("transfer(address,uint256)", desk.chain.wallets[9].address, everything)
    send_signed(desk.chain.rpc_url, wallet.private_key, desk.chain.usdc.address, drain)
    await hold.capture(COST, ANSWERED)
    assert not await desk.settled(hold.receipt_id)
    variance = account_id("variance", token.asset)
    assert await desk.balance(variance) == -COST
    assert await desk.balance(account_id("receivable", token.asset, payer)) == 0
    await desk.check_books()
    back = call_data("transfer(address,uint256)", wallet.address, everything)
    send_signed(desk.chain.rpc_url, desk.chain.wallets[9].private_key, desk.chain.usdc.address, back)
    refused = await refusal(desk, desk.sign(wallet, token))
    assert isinstance(refused, SchemeRefused)
    assert refused.code == "unpaid_answers"
    await desk.pay_in(wallet, token, 2 * COST)
    await desk.authorize(desk.sign(wallet, token))
    assert await desk.balance(variance) == 0
    assert await desk.balance(payer_account(payer, token.asset)) == COST
    await assert_books_balance(desk.store)


async def test_a_cancelled_pledge_is_a_loss_and_no_error(desk: Desk) -> None:
    token, wallet = desk.network.tokens[0], desk.chain.wallets[1]
    payment = desk.sign(wallet, token)
    hold = await desk.authorize(payment)
    nonce = payment.authorization.nonce
    cancel = call_data("invalidateUnorderedNonces(uint256,uint256)", nonce >> 8, 1 << (nonce & 0xFF))
    send_signed(desk.chain.rpc_url, wallet.private_key, desk.chain.permit2, cancel)
    await hold.capture(COST, ANSWERED)
    assert not await desk.settled(hold.receipt_id)
    assert await desk.balance(account_id("variance", token.asset)) == -COST
    assert (await refusal(desk, desk.sign(wallet, token))).code == "unpaid_answers"
    await desk.check_books()


async def test_nobody_but_the_batch_contract_can_settle(desk: Desk) -> None:
    payment = desk.sign(desk.chain.wallets[1], desk.network.tokens[0])
    assert isinstance(payment.authorization, UptoAuthorization)
    data = "0x" + encode_upto_settle(payment.authorization, payment.signature, VALUE).hex()
    call = {"from": desk.chain.wallets[0].address, "to": UPTO_PERMIT2_PROXY_ADDRESS, "data": data}
    with pytest.raises(Exception, match="revert"):
        rpc(desk.chain.rpc_url, "eth_call", call, "latest")


async def test_answers_that_end_together_are_settled_in_one_transaction(desk: Desk) -> None:
    token = desk.network.tokens[0]
    holds = [await desk.authorize(desk.sign(desk.chain.wallets[1 + i % 3], token)) for i in range(6)]
    rpc(desk.chain.rpc_url, "evm_setAutomine", False)
    await asyncio.gather(*(hold.capture(COST, ANSWERED) for hold in holds))
    await until(lambda: desk.services.settlements.in_flight == 6)  # type: ignore[attr-defined]
    await asyncio.sleep(0.2)
    rpc(desk.chain.rpc_url, "evm_setAutomine", True)
    rpc(desk.chain.rpc_url, "evm_mine")
    assert all([await desk.settled(hold.receipt_id) for hold in holds])
    assert balance_of(desk.chain.rpc_url, desk.chain.usdc, PAY_TO) == 6 * 7_655
    assert desk.services.settlements.transactions < 6  # type: ignore[attr-defined]
    await desk.check_books()


async def test_pledges_that_could_not_be_settled_are_refused_before_any_work(desk: Desk) -> None:
    token, wallet = desk.network.tokens[0], desk.chain.wallets[1]
    wrong = {
        "expired": desk.sign(wallet, token, valid_s=ANSWER_S - 5),
        "wrong_amount": desk.sign(wallet, token, amount=VALUE - 1),
        "wrong_recipient": desk.sign(wallet, token, to="0x" + "99" * 20),
        "wrong_facilitator": desk.sign(wallet, token, facilitator="0x" + "99" * 20),
        "wrong_spender": desk.sign(wallet, token, spender="0x402085c248eea27d92e8b30b2c58ed07f9e20001"),
        "not_yet_valid": desk.sign(wallet, token, valid_after=int(time.time()) + 100),
        "bad_signature": dataclasses.replace(desk.sign(wallet, token), signature=b"\1" * 64 + b"\x1b"),
    }
    for code, payment in wrong.items():
        assert (await refusal(desk, payment)).code == code
    as_owner(desk.chain.rpc_url, desk.chain.usdc, "blacklist(address)", wallet.address)
    refused = await refusal(desk, desk.sign(wallet, token))
    assert isinstance(refused, PaymentRefused)
    assert refused.code == "transfer_would_fail"
    counted = await desk.store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM receipt").fetchone()[0])
    assert counted == 0


async def test_accounts_with_code_are_asked_for_exact(desk: Desk) -> None:
    token, wallet = desk.network.tokens[0], desk.chain.wallets[3]
    place(desk.chain, "0x" + "5a" * 20, "0x" + "00" * 20)
    rpc(desk.chain.rpc_url, "anvil_setCode", wallet.address, "0xef0100" + "5a" * 20)
    refused = await refusal(desk, desk.sign(wallet, token))
    assert isinstance(refused, SchemeRefused)
    assert refused.code == "upto_needs_a_key"


async def test_upto_works_only_where_the_batch_contract_knows_every_signer(desk: Desk) -> None:
    known, stranger = desk.chain.wallets[0].address.lower(), desk.chain.wallets[5].address.lower()
    async with Rpc([desk.chain.rpc_url]) as node:
        assert await missing_for_upto(node, desk.batch_contract, [known]) is None
        assert stranger in (await missing_for_upto(node, desk.batch_contract, [known, stranger]) or "")
        assert "no batch contract" in (await missing_for_upto(node, "0x" + "12" * 20, [known]) or "")


@pytest.mark.parametrize("exchanged", [True, False], ids=["exchanged", "taken out"])
async def test_an_answer_is_settled_through_the_batch_contract_that_its_payer_named(
    database: Path | str, chain: Devnet, network: Network, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    """The operator may have another one by then, or none."""
    wallet, token, owner = chain.wallets[1], network.tokens[0], chain.wallets[8].address
    approve_permit2(chain.rpc_url, chain.usdc, wallet.private_key)
    another, _ = place_operator_contracts(chain.rpc_url, PAY_TO, owner, [chain.wallets[0].address])
    async with gateway(database, chain, network) as desk:
        hold = await desk.authorize(desk.sign(wallet, token))
        assert another != desk.batch_contract
        # Written, and carried by nobody before the process ends.
        monkeypatch.setattr(desk.services.settlements, "take_queued", lambda _: None)
        await hold.capture(COST, ANSWERED)
    async with opened(database, chain, network, batch_contract=another if exchanged else None) as (_, settlements):
        assert (await settlements.outcome(settlement_id(hold.receipt_id), 20)).paid
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 7_655
