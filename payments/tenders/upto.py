"""Paying what the answer cost: the x402 scheme `upto` over Permit2.

authorize  check offline, reserve the pledge durably within the payer's exposure limit, look at the chain
ready      nothing to wait for: nothing is taken before the answer
capture    charge what was used and hand its transfer to the settlement engine, in one durable step
release    burn the pledge: nothing is settled, and it buys nothing else
"""

from __future__ import annotations

import contextlib
from typing import Any

from payments.chain.networks import UPTO_PERMIT2_PROXY_ADDRESS, Token
from payments.chain.transactions import encode_upto_settle
from payments.errors import AllowanceRequired, PaymentRefused, SchemeRefused
from payments.money import atomic_to_nano_down, nano_to_atomic_up
from payments.promises import Earlier
from payments.quotes import Quote
from payments.settlement import outbox
from payments.settlement.orders import SettlementOrder
from payments.store import StoreBusy, Transaction
from payments.tenders import pledges
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Also, Charge, HoldEnded, Outcome
from payments.tenders.closing import Use
from payments.tenders.exact import use_digest
from payments.tenders.exact_services import ExactServices
from payments.tenders.upto_settlement import KIND, settlement_id
from payments.x402.wire import Payment, UptoAuthorization


class UptoTender:
    """One pledge for one request.

    Args:
        services: Of the payment's network.
        payment: Decoded, and checked by `payments.verification.checks`.
        token: What it is in.
        request_digest: Of the request: the first use binds the pledge to it.
        exposure_max_nano_usd: What one payer may owe for answers that are not settled.
        refusal: Why the checks refused it, if they did: then only an earlier use of it is found.
    """

    def __init__(
        self,
        services: ExactServices,
        payment: Payment,
        token: Token,
        request_digest: bytes,
        exposure_max_nano_usd: int,
        refusal: PaymentRefused | None = None,
    ) -> None:
        assert isinstance(payment.authorization, UptoAuthorization)
        self._services, self._payment, self._token = services, payment, token
        self._digest = use_digest(payment, request_digest)
        self._exposure_max_nano_usd = exposure_max_nano_usd
        self._refusal = refusal

    async def authorize(self, quote: Quote, details: dict[str, Any]) -> UptoHold:
        """Reserve the pledge; it must be covered beside everything else that the payer has under way.

        Raises:
            AlreadyUsed: It was sent before for the same request; its `state` says what became of it.
            PaymentConflict: ``authorization_reused``: it is bound to another request or payload.
            SchemeRefused: This payer cannot pay by `upto` now; it says why and how else.
            PaymentRefused: The chain says that it could not be settled, or too many payments failed on it lately.
            AllowanceRequired: Permit2 is not approved, and no approval came along that is brought to the chain.
            SettlementUnavailable: The chain cannot be asked now; nothing was taken.
        """
        store = self._services.store
        found = await store.write(lambda tx: self._reserve(tx, quote, details), if_abandoned=_abandon)
        if isinstance(found, AlreadyUsed):
            raise found
        hold = UptoHold(self._services, found.use, self._payment, self._token, quote.maximum_nano_usd)
        try:
            self._services.settlements.admit(self._payment.payer)
            await self._check(found)
        except BaseException:
            await hold.forget()
            raise
        return hold

    def _reserve(self, tx: Transaction, quote: Quote, details: dict[str, Any]) -> pledges.Pledge | AlreadyUsed:
        return pledges.reserve(
            tx,
            identity=self._payment.identity(self._token.chain_id, self._token),
            digest=self._digest,
            payer=self._payment.payer,
            asset=self._token.asset,
            quoted_nano_usd=quote.maximum_nano_usd,
            value_nano_usd=atomic_to_nano_down(self._payment.authorization.value, self._token.decimals),
            details=details,
            exposure_max_nano_usd=self._exposure_max_nano_usd,
            refusal=self._refusal,
            identifier=self._payment.identifier,
        )

    async def _check(self, pledge: pledges.Pledge) -> None:
        try:
            await self._check_chain(pledge)
        except AllowanceRequired as required:
            await self._approve(pledge, required)
            await self._check_chain(pledge)

    async def _approve(self, pledge: pledges.Pledge, required: AllowanceRequired) -> None:
        """Bring the approval to the chain that came along."""
        sponsor, payment = self._services.sponsor, self._payment
        if sponsor is None:
            raise required
        assert isinstance(payment.authorization, UptoAuthorization)
        order = order_for(payment, self._token, pledge.use.receipt_id, payment.authorization.amount)
        facilitator = payment.authorization.facilitator
        wanted = await sponsor.consider(payment.approval, required, self._token, order, facilitator)
        await sponsor.approve(wanted, self._services.settlement_wait_s)

    async def _check_chain(self, pledge: pledges.Pledge) -> None:
        services, payment = self._services, self._payment
        earlier = Earlier(services.store, payment.payer, self._token, pledge.earlier)
        recipient = payment.authorization.recipient
        if (await services.chain_states.check(payment, self._token, recipient, earlier)).has_code:
            raise SchemeRefused(
                "upto_needs_a_key",
                "a contract can take back its signature at any time, so that wallets with code pay by exact or a channel",
                "upto",
            )


class UptoHold:
    """A reserved pledge whose request is under way."""

    may_start_early = True

    def __init__(
        self, services: ExactServices, use: Use, payment: Payment, token: Token, maximum_nano_usd: int
    ) -> None:
        self.receipt_id = use.receipt_id
        self.payer = payment.payer
        self.asset = use.asset
        self.maximum_nano_usd = maximum_nano_usd
        self._services, self._use, self._payment, self._token = services, use, payment, token
        services.begin_use(self.receipt_id)

    async def ready(self) -> None:
        """Nothing to wait for."""

    async def capture(self, amount_nano_usd: int, outcome: Outcome, also: Also | None = None) -> Charge:
        """See `payments.tenders.base.Hold`: the charge and the order to settle it are one durable step."""
        taken = await self._services.store.write_surely(
            lambda tx: self._capture(tx, amount_nano_usd, outcome, also), self._captured
        )
        return taken.charge

    async def release(self, outcome: Outcome, also: Also | None = None) -> Charge:
        """See `payments.tenders.base.Hold`."""

        def unit(tx: Transaction) -> Charge:
            charge = pledges.release(tx, self._use, outcome)
            if also is not None:
                also(tx)
            return charge

        return await self._services.store.write_surely(unit, lambda _: self._end())

    async def interrupt(self, outcome: Outcome, spent_nano_usd: int = 0) -> None:
        """Take what was spent, else release it, if it has not ended: nothing was paid that a second use could go on with."""

        def unit(tx: Transaction) -> pledges.Taken | None:
            with contextlib.suppress(HoldEnded):
                if spent_nano_usd:
                    return self._capture(tx, spent_nano_usd, outcome, None)
                pledges.release(tx, self._use, outcome)
            return None

        def done(taken: pledges.Taken | None) -> None:
            if taken is None:
                self._end()
            else:
                self._captured(taken)

        with contextlib.suppress(StoreBusy):  # the background goes on
            await self._services.store.write_surely(unit, done)

    async def forget(self) -> None:
        """End it before anybody was told of it, as if it had never been."""
        with contextlib.suppress(StoreBusy):
            await self._services.store.write_surely(lambda tx: pledges.forget(tx, self._use), lambda _: self._end())

    def payment_response(self, charge_nano_usd: int | None = None) -> dict[str, Any] | None:
        """See `payments.tenders.base.Hold`. The transfer is made after the answer, so no transaction is named yet."""
        if charge_nano_usd is None:
            return None
        return {
            "success": True,
            "tx_hash": None,
            "network": self._payment.network,
            "payer": self.payer,
            "receipt": self.receipt_id,
            "amount": self._atomic(min(charge_nano_usd, self.maximum_nano_usd)),
        }

    def _capture(self, tx: Transaction, amount_nano_usd: int, outcome: Outcome, also: Also | None) -> pledges.Taken:
        taken = pledges.capture(tx, self._use, self.payer, self.maximum_nano_usd, amount_nano_usd, outcome)
        if taken.first and taken.charge.charged_nano_usd:
            value = self._atomic(taken.charge.charged_nano_usd)
            order = order_for(self._payment, self._token, self.receipt_id, value)
            outbox.enqueue(tx, order, self._services.settlements.from_block)
        if also is not None:
            also(tx)
        return taken

    def _captured(self, taken: pledges.Taken) -> None:
        if taken.charge.charged_nano_usd:
            self._services.settlements.take_queued(settlement_id(self.receipt_id))
        self._end()

    def _end(self) -> None:
        self._services.end_use(self.receipt_id)

    def _atomic(self, amount_nano_usd: int) -> int:
        return nano_to_atomic_up(amount_nano_usd, self._token.decimals)


def order_for(payment: Payment, token: Token, receipt_id: str, value: int) -> SettlementOrder:
    """What settles `value` atomic units of a pledge."""
    authorization = payment.authorization
    assert isinstance(authorization, UptoAuthorization)
    return SettlementOrder(
        id=settlement_id(receipt_id),
        kind=KIND,
        reference=receipt_id,
        chain_id=token.chain_id,
        token=token.address,
        payer=authorization.payer,
        pay_to=authorization.recipient,
        value=value,
        authorization_nonce=authorization.nonce,
        call_to=UPTO_PERMIT2_PROXY_ADDRESS,
        call_data=encode_upto_settle(authorization, payment.signature, value, payment.permit),
        valid_before=authorization.expires_at,
    )


def _abandon(tx: Transaction, found: pledges.Pledge | AlreadyUsed) -> None:
    if isinstance(found, pledges.Pledge):
        pledges.forget(tx, found.use)
