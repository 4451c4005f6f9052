"""Paying through a channel: the x402 scheme `batch-settlement`.

authorize  the voucher covers what was charged, what is under way and this price: hold the price. No chain, no waiting
ready      nothing to wait for, except for the deposit that opens a channel or tops it up
capture    charge what was used; it is claimed on chain later, with many others
release    charge nothing: the voucher is the payer's to use again
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import replace
from functools import partial
from typing import Any

from payments.chain.channel_contract import encode_deposit
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, Token
from payments.channels import book, requests
from payments.channels.book import Seen
from payments.channels.looks import unavailable
from payments.channels.requests import MustWait, Taken, Wanted
from payments.channels.services import ChannelServices, DepositCheck
from payments.errors import AllowanceRequired, PaymentRefused, SettlementPending, SettlementUnavailable
from payments.money import atomic_to_nano_down, nano_to_atomic_up
from payments.quotes import Quote
from payments.settlement import outbox
from payments.settlement.orders import SettlementOrder
from payments.store import StoreBusy, Transaction
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Also, Charge, HoldEnded, Outcome
from payments.tenders.closing import LedgerHold, because, release_if_open
from payments.verification.vouchers import erc3009_deposit_nonce
from payments.x402.channels import (
    CHANNEL_BUSY,
    DEPOSIT_FAILED,
    ChannelPayment,
    Permit2Deposit,
    hex32,
)

QUEUE_WAIT_S = 3.0
"""How long a request waits for another one on its channel: a stock client signs for one at a time."""
POLL_S = 0.25

Decision = Taken | MustWait | AlreadyUsed | PaymentRefused


def use_digest(payment: ChannelPayment, request_digest: bytes) -> bytes:
    """What makes a use the same one: the whole payment, and the request that it came with."""
    return hashlib.sha256(payment.digest + request_digest).digest()


def deposit_id(payment: ChannelPayment, chain_id: int) -> str | None:
    """The settlement of the deposit that a payment carries; the same authorization is the same settlement."""
    if payment.deposit is None:
        return None
    method = "permit2" if isinstance(payment.deposit, Permit2Deposit) else "eip3009"
    return f"deposit:{chain_id}:{payment.payer}:{method}:{authorization_nonce(payment)}"


def authorization_nonce(payment: ChannelPayment) -> int:
    """The nonce that a payment's deposit uses up."""
    assert payment.deposit is not None
    if isinstance(payment.deposit, Permit2Deposit):
        return payment.deposit.nonce
    return erc3009_deposit_nonce(payment.voucher.channel_id, payment.deposit.salt)


class _Overtaken(Exception):
    """What a deposit needs was promised to something else after the chain was asked; nothing was written."""


class ChannelTender:
    """One voucher for one request.

    Args:
        services: Of the payment's network.
        payment: Decoded and checked, see `payments.tenders.channel_scheme`.
        token: What it is in.
        request_digest: Of the request.
        refusal: Why it is too late for a first use, if it is: then only an earlier use is found.
        tops_up: Whether it becomes its payer's balance.
    """

    def __init__(
        self,
        services: ChannelServices,
        payment: ChannelPayment,
        token: Token,
        request_digest: bytes,
        refusal: PaymentRefused | None = None,
        *,
        tops_up: bool = False,
    ) -> None:
        self._tops_up = tops_up
        self._services = services
        self._payment = payment
        self._token = token
        self._channel_id = hex32(payment.voucher.channel_id)
        self._digest = use_digest(payment, request_digest)
        self._deposit_id = deposit_id(payment, token.chain_id)
        self._refusal = refusal

    async def authorize(self, quote: Quote, details: dict[str, Any]) -> ChannelHold:
        """Hold the price, and put the deposit on the way if there is one.

        Raises:
            AlreadyUsed: The same payment came before for the same request.
            OutOfStep: The voucher is not the next one; the channel's state comes with it.
            PaymentRefused: The channel holds too little, its deposit would fail, or too many of this payer's did lately.
            AllowanceRequired: Permit2 is not approved yet.
            SettlementUnavailable: The chain has to be asked and cannot be.
        """
        taken = await self._take(quote, details)
        kind = TopUpHold if self._tops_up else ChannelHold
        return kind(self._services, taken, self._payment, self._token, self._deposit_id)

    async def _take(self, quote: Quote, details: dict[str, Any]) -> Taken:
        services = self._services
        deposit = await self._check_deposit()
        seen = None if deposit is None else deposit.seen
        give_up_at = time.monotonic() + QUEUE_WAIT_S
        while True:
            patient = time.monotonic() < give_up_at
            try:
                decision = await services.store.write(
                    lambda tx, seen=seen, deposit=deposit, patient=patient: self._decide(  # type: ignore[misc]
                        tx, quote, details, seen, deposit, patient
                    ),
                    done=self._send_deposit,
                    if_abandoned=_abandon,
                )
            except _Overtaken:
                # Another payment of the payer's was reserved since the chain was asked: together they may be too much.
                if not patient:
                    raise PaymentRefused(CHANNEL_BUSY, "too much of this payer is under way; send it again") from None
                deposit = await self._check_deposit()
                seen = None if deposit is None else deposit.seen
                continue
            if isinstance(decision, Taken):
                return decision
            if isinstance(decision, AlreadyUsed | PaymentRefused):
                raise decision
            if decision.why == "unsynced":
                if seen is not None and not patient:
                    raise unavailable()
                if seen is not None:
                    # By a node that lags, or too early: something has happened since.
                    await services.change(self._channel_id, POLL_S)
                seen = await self._look()
            elif patient:
                await services.change(self._channel_id, POLL_S)
            else:
                raise PaymentRefused(
                    CHANNEL_BUSY, "this channel's deposit is still on its way; send the same payment again"
                )

    def _decide(
        self,
        tx: Transaction,
        quote: Quote,
        details: dict[str, Any],
        seen: Seen | None,
        deposit: DepositCheck | None,
        patient: bool,
    ) -> Decision:
        unknown = book.find(tx, self._channel_id) is None
        if unknown and seen is None:
            return MustWait("unsynced")
        channel = book.ensure(tx, self._channel_id, self._payment.config, self._token)
        if seen is not None:
            channel = book.sync(tx, channel.id, seen, self._token)
        wanted = Wanted(
            channel=channel,
            voucher=self._payment.voucher,
            digest=self._digest,
            price_nano_usd=quote.maximum_nano_usd,
            decimals=self._token.decimals,
            deposit_id=self._deposit_id,
            deposit_value=0 if self._payment.deposit is None else self._payment.deposit.amount,
            details=details,
            exposure_max_nano_usd=self._services.payers.payer_exposure_nano_usd,
            refusal=self._refusal,
            identifier=self._payment.identifier,
            unclaimed_s_max=self._services.unclaimed_s_max,
            tops_up=self._tops_up,
        )
        decision = requests.take(tx, wanted, patient=patient)
        if isinstance(decision, Taken) and decision.deposit == "due":
            if deposit is None or not deposit.cover.holds(tx):
                raise _Overtaken
            book.count_transaction(tx, channel)
            outbox.enqueue(tx, self._deposit_order(), self._services.settlements.from_block)
        if unknown and isinstance(decision, PaymentRefused):
            # Nothing is kept of it: a key costs nothing, another salt even less.
            raise decision
        return decision

    def _send_deposit(self, decision: Decision) -> None:
        """The deposit of a request that was taken is in the outbox, durably."""
        if isinstance(decision, Taken) and decision.deposit == "due":
            assert self._deposit_id is not None
            self._services.settlements.take_queued(self._deposit_id)

    async def _look(self) -> Seen:
        channel = await self._services.store.read(lambda tx: book.find(tx, self._channel_id))
        marks = 0 if channel is None else channel.marks
        (seen,) = await self._services.look([(self._payment.voucher.channel_id, marks)])
        return seen

    async def _check_deposit(self) -> DepositCheck | None:
        """Ask the chain about a deposit that was not sent on its way before."""
        payment = self._payment
        if payment.deposit is None or self._refusal is not None:
            return None
        known, marks = await self._services.store.read(self._known)
        if known:
            return None
        self._services.settlements.admit(payment.payer)
        number, config = payment.voucher.channel_id, payment.config
        check = partial(
            self._services.check_deposit, number, marks, config, payment.deposit, self._token, payment.permit
        )
        try:
            return await check()
        except (PaymentRefused, AllowanceRequired) as refused:
            # Another request may have come with the same deposit and been quicker; whoever saw it on its way may have made it
            # before us. Either way the channel has it, and it is not made again.
            known, _ = await self._services.store.read(self._known)
            if known or await self._services.settlements.book_executed(self._deposit_order()):
                return None
            if not isinstance(refused, AllowanceRequired):
                raise
            await self._approve(refused)
        return await check()

    async def _approve(self, required: AllowanceRequired) -> None:
        """Bring the approval to the chain that came along with the deposit."""
        payers = self._services.payers
        if payers.sponsor is None:
            raise required
        wanted = await payers.sponsor.consider(self._payment.approval, required, self._token, self._deposit_order())
        await payers.sponsor.approve(wanted, payers.settlement_wait_s)

    def _known(self, tx: Transaction) -> tuple[bool, int]:
        channel = book.find(tx, self._channel_id)
        known = tx.execute("SELECT 1 FROM settlement WHERE id = ?", (self._deposit_id,)).fetchone() is not None
        known = known or requests.outcome_of(tx, self._digest) is not None
        return known, 0 if channel is None else channel.marks

    def _deposit_order(self) -> SettlementOrder:
        payment, deposit = self._payment, self._payment.deposit
        assert deposit is not None
        assert self._deposit_id is not None
        return SettlementOrder(
            id=self._deposit_id,
            kind="channel_deposit",
            reference=self._channel_id,
            chain_id=self._token.chain_id,
            token=self._token.address,
            payer=payment.payer,
            pay_to=BATCH_SETTLEMENT_ADDRESS,
            value=deposit.amount,
            authorization_nonce=authorization_nonce(payment),
            call_to=BATCH_SETTLEMENT_ADDRESS,
            call_data=encode_deposit(payment.config, deposit, payment.permit),
            valid_before=deposit.expires_at,
        )


class ChannelHold(LedgerHold):
    """The price of a request, held in its channel."""

    def __init__(
        self, services: ChannelServices, taken: Taken, payment: ChannelPayment, token: Token, deposit: str | None
    ) -> None:
        super().__init__(services.store, taken.use, payment.payer, taken.price_nano_usd)
        self._services = services
        self._payment = payment
        self._token = token
        self._channel = taken.channel
        self._deposit_id = deposit
        self._transaction_hash: str | None = None
        self._told: int | None = None
        self._charged_nano_usd: int | None = None
        self._certain = taken.deposit in ("none", "paid")
        self.may_start_early = taken.may_start_early
        services.payers.begin_use(self.receipt_id)

    async def ready(self) -> None:
        """Wait until the deposit is in the channel.

        Raises:
            PaymentRefused: It failed; nothing was taken and nothing may be shown.
            SettlementPending: It is not known after the configured wait.
        """
        if self._certain:
            return
        await self._arrival()
        (synced,) = await self._services.sync([self._channel.id])
        # A withdrawal that was announced since comes later than the claim that it is answered with: else whoever announces
        # one at the right moment would have its inference for nothing.
        to_be_withdrawn = min(synced.on_chain.withdraw_amount, self._channel.on_chain.withdraw_amount)
        there = synced.on_chain.balance - to_be_withdrawn - synced.refunding
        # What is announced goes on from what the payer knew when it signed.
        self._channel = replace(self._channel, on_chain=synced.on_chain)
        if atomic_to_nano_down(there, self._token.decimals) < synced.charged_nano_usd + self.maximum_nano_usd:
            raise PaymentRefused(DEPOSIT_FAILED, "the channel does not hold what was deposited; nothing was taken")
        self._certain = True

    async def _arrival(self) -> None:
        """Wait for the deposit's transaction; errors as for `ready`."""
        assert self._deposit_id is not None
        settled = await self._services.settlements.outcome(self._deposit_id, self._services.payers.settlement_wait_s)
        if settled.open:
            raise SettlementPending(
                "settlement_pending",
                "the deposit is on its way and not mined yet; do not deposit again: send the same payment",
                self.receipt_id,
            )
        if not settled.paid:
            raise PaymentRefused(
                DEPOSIT_FAILED,
                f"the deposit failed ({settled.reason or 'no reason is known'}); nothing was taken, sign a new one",
            )
        self._transaction_hash = settled.transaction_hash

    async def capture(self, amount_nano_usd: int, outcome: Outcome, also: Also | None = None) -> Charge:
        """See `payments.tenders.base.Hold`."""
        announced = self._told if self._told is not None else self._announced(amount_nano_usd)

        def unit(tx: Transaction) -> Charge:
            charge = requests.capture(tx, self._use, self._channel.id, amount_nano_usd, outcome, announced, self._token)
            if also is not None:
                also(tx)
            return charge

        return await self._store.write_surely(unit, self._over)

    async def interrupt(self, outcome: Outcome, spent_nano_usd: int = 0) -> None:
        """Charge what was spent; else give the voucher back: the same payment sent again is a new use then.

        Whether a deposit arrives is waited for, and where that cannot be known now, what was spent is charged: the payer has
        signed for it, and it is claimed once the channel holds it. Else whoever hangs up soon enough would pay nothing.
        """
        if not spent_nano_usd or self._certain:
            await self._end_with(spent_nano_usd, outcome)
            return
        charge_nano_usd = spent_nano_usd
        try:
            with contextlib.suppress(SettlementPending, SettlementUnavailable, StoreBusy):
                await self._arrival()
        except PaymentRefused:
            charge_nano_usd = 0
        finally:
            # Whoever cancels this because the process stops must not leave a hold that nobody ends.
            await self._end_with(charge_nano_usd, outcome)

    async def _end_with(self, spent_nano_usd: int, outcome: Outcome) -> None:
        announced = self._announced(spent_nano_usd)

        def unit(tx: Transaction) -> None:
            if not spent_nano_usd:
                release_if_open(tx, self._use, outcome)
                return
            with contextlib.suppress(HoldEnded):
                requests.capture(tx, self._use, self._channel.id, spent_nano_usd, outcome, announced, self._token)

        with contextlib.suppress(StoreBusy):
            await self._store.write_surely(unit, lambda _: self._end())

    def payment_response(self, charge_nano_usd: int | None = None) -> dict[str, Any] | None:
        """What the payer is told: the charge, or for a stream the most that it can be; the next answer makes up for it."""
        known = self._charged_nano_usd if charge_nano_usd is None else charge_nano_usd
        amount = self.maximum_nano_usd if known is None else known
        response: dict[str, Any] = {
            "success": self._certain,
            "tx_hash": self._transaction_hash,
            "network": self._payment.network,
            "payer": self.payer,
            "receipt": self.receipt_id,
        }
        if not self._certain:
            return response | {"error_reason": DEPOSIT_FAILED}
        self._told = self._announced(amount)
        return response | {
            "chargedAmount": str(self._told - self._channel.announced),
            "channelState": self._channel.status(self._told).as_json(),
        }

    def _announced(self, amount_nano_usd: int) -> int:
        amount = min(amount_nano_usd, self.maximum_nano_usd)
        charged = nano_to_atomic_up(self._channel.charged_nano_usd + amount, self._token.decimals)
        return max(self._channel.announced, charged)

    def _over(self, charge: Charge) -> None:
        self._charged_nano_usd = charge.charged_nano_usd
        self._end()

    def _end(self) -> None:
        self._services.payers.end_use(self.receipt_id)
        self._services.notify(self._channel.id)


class TopUpHold(ChannelHold):
    """What becomes its payer's balance, whole, when it is captured.

    Until it is claimed it is in the channel, as safe as what answers cost: claimed at once, and before a withdrawal.
    """

    async def capture(self, amount_nano_usd: int, outcome: Outcome, also: Also | None = None) -> Charge:
        """Make all that is held balance: `amount_nano_usd` is 0, for no request is charged to it."""
        assert amount_nano_usd == 0
        amount = self.maximum_nano_usd
        announced = self._announced(amount)

        def unit(tx: Transaction) -> Charge:
            charge = requests.credit(tx, self._use, self._channel, amount, outcome, announced, self._token)
            if also is not None:
                also(tx)
            return charge

        return await self._store.write_surely(unit, self._over)

    def _over(self, charge: Charge) -> None:
        self._charged_nano_usd = charge.credited_nano_usd
        self._end()


def _abandon(tx: Transaction, decision: Decision) -> None:
    if isinstance(decision, Taken):
        release_if_open(tx, decision.use, because("caller_gone"))
