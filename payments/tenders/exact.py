"""Paying with the request itself: the x402 scheme `exact` over EIP-3009 and Permit2.

authorize  reserve the authorization durably, look at the chain, hand the transfer to the settlement engine
ready      the transfer is mined: from here on the payment is credit of the payer, part of which is held (see `evidence`)
capture    charge what was used; the rest simply stays the payer's credit
release    charge nothing; all of it stays the payer's credit
interrupt  nobody works on it any more: the same payment sent again takes it up
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal

from payments.chain.networks import Network, Token
from payments.chain.transactions import settle_call
from payments.errors import AllowanceRequired, PaymentRefused, SettlementPending, SettlementUnavailable
from payments.money import atomic_to_nano_down
from payments.promises import Earlier
from payments.quotes import Quote
from payments.settlement.evidence import PaymentProof, payment_nonce
from payments.settlement.orders import Kind, SettlementOrder
from payments.settlement.outbox import order_gas
from payments.sponsoring.sponsor import Sponsor
from payments.store import StoreBusy, Transaction
from payments.tenders import authorizations, closing
from payments.tenders.authorizations import AlreadyUsed, Reservation
from payments.tenders.base import Charge, Outcome
from payments.tenders.closing import LedgerHold, Use
from payments.tenders.evidence import on_failed, on_mined
from payments.tenders.exact_services import ExactServices, Settled
from payments.x402.wire import Payment, Requirement

__all__ = [
    "PAYMENT",
    "AlreadyUsed",
    "ExactHold",
    "ExactServices",
    "ExactTender",
    "on_failed",
    "on_mined",
    "settlement_id",
]


def _is_reserved(tx: Transaction, order: SettlementOrder) -> bool:
    return authorizations.is_reserved(tx, order.reference)


PAYMENT = Kind(
    PaymentProof(), on_mined, on_failed, order_gas, batchable=True, still_wanted=_is_reserved, nonce=payment_nonce
)
"""Settlements of the kind ``payment``: a payer's authorization pays the treasury."""


def settlement_id(receipt_id: str) -> str:
    """The settlement that pays for a receipt. One receipt has one, so submitting it again is no second transfer."""
    return f"pay:{receipt_id}"


def use_digest(payment: Payment, request_digest: bytes) -> bytes:
    """What an authorization is bound to by its first use: the whole payment, and the request that it came with."""
    return hashlib.sha256(payment.digest + request_digest).digest()


class ExactTender:
    """One signed payment for one request.

    Args:
        services: Of the payment's network.
        payment: Decoded, and checked by `payments.verification.checks` against `requirement`.
        token: What it is in.
        network: Where it is.
        requirement: What it pays for.
        request_digest: Of the request, see `payments.quotes.request_digest`: the first use binds the payment to it.
        refusal: Why the checks refused it, if they did: then only an earlier use of it is found, and none is begun.
        unproven: Why its signature is bad unless the payer is a contract that takes it, if it is no key's.
        tops_up: Whether it becomes balance: then there is nothing to begin early, and nothing to lose.
    """

    scheme: Literal["exact", "upto"] = "exact"
    kind = "payment"

    def __init__(
        self,
        services: ExactServices,
        payment: Payment,
        token: Token,
        network: Network,
        requirement: Requirement,
        request_digest: bytes,
        refusal: PaymentRefused | None = None,
        unproven: PaymentRefused | None = None,
        *,
        tops_up: bool = False,
    ) -> None:
        assert token.chain_id == network.chain_id
        assert refusal is not None or payment.authorization.recipient == requirement.pay_to.lower()
        self._services = services
        self._payment = payment
        self._refusal = refusal
        self._unproven = unproven
        self._token = token
        self._exposure_max_nano_usd = 0 if tops_up else services.payer_exposure_nano_usd
        self._pay_to = requirement.pay_to.lower()
        self._value_nano_usd = atomic_to_nano_down(payment.authorization.value, token.decimals)
        self._digest = use_digest(payment, request_digest)

    async def authorize(self, quote: Quote, details: dict[str, Any]) -> ExactHold:
        """Reserve the payment and put its transfer on the way, or take an interrupted use of it up again.

        Raises:
            AlreadyUsed: It was sent before for the same request; its `state` says what became of it.
            PaymentConflict: ``authorization_reused``: it is bound to another request or payload.
            PaymentRefused: The chain says that it cannot be settled, or its transfer has failed, or the checks refused it and
                it was not used before; nothing was taken.
            AllowanceRequired: Permit2 is not approved yet.
            SettlementUnavailable: The chain cannot be asked now; nothing was taken.
        """
        services = self._services
        if self._unproven is not None and self._refusal is None:
            await self._prove()
        found = await services.store.write(lambda tx: self._reserve(tx, quote, details), if_abandoned=_abandon)
        if isinstance(found, AlreadyUsed):
            raise found
        hold = ExactHold(services, found, self._payment)
        if found.stage == "new":
            await self._settle(hold, Earlier(services.store, self._payment.payer, self._token, found.earlier))
        elif found.stage == "held":
            await hold.look_up_transaction()
        return hold

    async def _prove(self) -> None:
        """Let the payer's contract judge the signature before anything is reserved: or anybody could use up its nonces.

        What was used before needs no proof: only the very same payment finds its use.
        """
        services = self._services
        identity = self._payment.identity(self._token.chain_id, self._token)
        if await services.store.read(lambda tx: authorizations.is_known(tx, identity)):
            return
        try:
            await services.chain_states.check(self._payment, self._token, self._pay_to, None, self._unproven)
        except PaymentRefused:
            # The same payment sent twice at once: the other one was faster, and is found.
            if not await services.store.read(lambda tx: authorizations.is_known(tx, identity)):
                raise

    def _reserve(self, tx: Transaction, quote: Quote, details: dict[str, Any]) -> Reservation | AlreadyUsed:
        return authorizations.reserve(
            tx,
            identity=self._payment.identity(self._token.chain_id, self._token),
            digest=self._digest,
            payer=self._payment.payer,
            asset=self._token.asset,
            quoted_nano_usd=quote.maximum_nano_usd,
            value_nano_usd=self._value_nano_usd,
            details=details,
            exposure_max_nano_usd=self._exposure_max_nano_usd,
            refusal=self._refusal,
            identifier=self._payment.identifier,
            tender=self.scheme,
        )

    async def _settle(self, hold: ExactHold, earlier: Earlier) -> None:
        services = self._services
        submitting = False
        try:
            services.settlements.admit(self._payment.payer)
            try:
                seen = await services.chain_states.check(
                    self._payment, self._token, self._pay_to, earlier, self._unproven
                )
            except AllowanceRequired as required:
                if services.sponsor is None:
                    raise
                await self._settle_after_approval(hold, services.sponsor, required)
                return
            except PaymentRefused as refused:
                # Whose signature nobody has proven could be anybody who read the chain.
                if refused.code != "authorization_used" or self._unproven is not None:
                    raise
                # Whoever saw the payment on its way may have executed it before us: then it has paid, and is not paid again.
                submitting = True
                if await services.settlements.book_executed(self._order(hold.receipt_id, deploy=False)):
                    return
                submitting = False
                raise
            if seen.has_code or self._unproven is not None:
                await hold.settle_first()
            order = self._order(hold.receipt_id, deploy=not seen.has_code)
            submitting = True
            await services.settlements.submit(order)
        except BaseException as error:
            # Whoever is cancelled while submitting cannot know whether the order is going to be written.
            unwritten = not submitting or isinstance(error, SettlementUnavailable | StoreBusy)
            await hold.give_up(authorizations.forget if unwritten else authorizations.interrupt)
            raise

    async def _settle_after_approval(self, hold: ExactHold, sponsor: Sponsor, required: AllowanceRequired) -> None:
        """The approval that came along goes first. Its order and the payment's are one commit: whoever hangs up has paid."""
        order = self._order(hold.receipt_id, deploy=False)
        wanted = await sponsor.consider(self._payment.approval, required, self._token, order, self.sender)
        await hold.settle_first()
        funding_id = await self._services.store.write(lambda tx: sponsor.begin(tx, wanted, order))
        sponsor.begun(funding_id, order.id)

    def _order(self, receipt_id: str, *, deploy: bool) -> SettlementOrder:
        authorization = self._payment.authorization
        call_to, call_data = self._call(deploy=deploy)
        return SettlementOrder(
            id=settlement_id(receipt_id),
            kind=self.kind,
            reference=receipt_id,
            chain_id=self._token.chain_id,
            token=self._token.address,
            payer=authorization.payer,
            pay_to=self._pay_to,
            value=authorization.value,
            authorization_nonce=authorization.nonce,
            call_to=call_to,
            call_data=call_data,
            valid_before=authorization.expires_at,
        )

    @property
    def sender(self) -> str | None:
        """Who alone can make its call, lower-case hex; None if anybody can."""
        return None

    def _call(self, *, deploy: bool) -> tuple[str, bytes]:
        return settle_call(self._payment, self._token, deploy=deploy)


class ExactHold(LedgerHold):
    """A payment whose transfer is under way, or has arrived."""

    def __init__(self, services: ExactServices, reservation: Reservation, payment: Payment) -> None:
        super().__init__(services.store, reservation.use, payment.payer, reservation.held_nano_usd)
        self._services = services
        self._payment = payment
        self._settled: Settled | None = None
        # Credit of a payment that was mined before is certain, whatever its old transaction does now.
        self._certain = reservation.stage == "held"
        self.may_start_early = self._certain or reservation.may_start_early
        services.begin_use(self.receipt_id)

    async def settle_first(self) -> None:
        """Begin no inference before the transfer is mined.

        A contract takes back what it has signed whenever it likes, even by the block's number and at no cost: what an account
        with a key has to pay for, a transaction that overtakes ours, limits how often it can be done.
        """
        if self.may_start_early:
            self.may_start_early = False
            await self._store.write(lambda tx: authorizations.settle_first(tx, self.receipt_id))

    async def look_up_transaction(self) -> None:
        """Find the transaction of a payment that was mined before, for `payment_response`."""
        try:
            self._settled = await self._services.settlements.outcome(settlement_id(self.receipt_id), 0)
        except BaseException:
            await self.give_up(authorizations.interrupt)
            raise

    async def give_up(self, end: Callable[[Transaction, Use, str], None]) -> None:
        """End this use before anybody was told of it, by `authorizations.forget` or `authorizations.interrupt`."""
        await self._give_up(lambda tx: end(tx, self._use, "not_started"))

    async def ready(self) -> None:
        """Wait until the transfer is mined and held in the ledger.

        Raises:
            PaymentRefused: ``settlement_failed``: nothing was taken and nothing may be shown.
            SettlementPending: It is not known after the configured wait.
        """
        if self._certain:
            return
        settled = await self._services.settlements.outcome(
            settlement_id(self.receipt_id), self._services.settlement_wait_s
        )
        if settled.open:
            raise SettlementPending(
                "settlement_pending",
                "the payment is on its way and not mined yet; do not pay again: look at the receipt, or send the same payment",
                self.receipt_id,
            )
        self._settled = settled
        if not settled.paid:
            self._services.end_use(self.receipt_id)
            raise PaymentRefused(
                "settlement_failed",
                f"the payment's transfer failed ({settled.reason or 'no reason is known'}); nothing was taken,"
                " sign a new payment",
            )
        self._certain = True

    async def interrupt(self, outcome: Outcome, spent_nano_usd: int = 0) -> None:
        """See `payments.tenders.base.Hold`: the same payment sent again goes on from here, with what it has left."""
        # Of a payment that is not there yet something must be left to be held when it is.
        spent = min(spent_nano_usd, self.maximum_nano_usd - (0 if self._certain else 1))
        await self._give_up(lambda tx: closing.interrupt(tx, self._use, outcome, spent))

    async def _give_up(self, unit: Callable[[Transaction], object]) -> None:
        """Until it is durable, the same payment sent again waits: it would find a use that nobody works on."""
        try:
            await self._store.write_surely(unit, lambda _: self._end())
        except StoreBusy:
            return  # the background goes on
        except Exception:
            self._end()
            raise

    def payment_response(self, charge_nano_usd: int | None = None) -> dict[str, Any] | None:
        """What `payments.x402.wire.payment_response` takes; None while the transfer's fate is unknown."""
        settled = self._settled
        if settled is None:
            return None
        response: dict[str, Any] = {
            "success": self._certain,
            "tx_hash": settled.transaction_hash,
            "network": self._payment.network,
            "payer": self.payer,
            "receipt": self.receipt_id,
        }
        if self._certain:
            return response | {"amount": self._payment.authorization.value}
        return response | {"error_reason": "settlement_failed"}

    def _over(self, charge: Charge) -> None:
        self._end()
        if charge.credited_nano_usd and self._services.credited is not None:
            self._services.credited(self.payer, self.asset)

    def _end(self) -> None:
        self._services.end_use(self.receipt_id)


def _abandon(tx: Transaction, found: Reservation | AlreadyUsed) -> None:
    if isinstance(found, Reservation):
        authorizations.forget(tx, found.use, "caller_gone")
