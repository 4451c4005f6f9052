"""Verifies and settles payments for other resource servers. No gateway, no ledger but gas: money goes from payer to server.

verify  changes nothing, and asks the chain once
settle  checks → one commit that reserves the payment and queues its transfer → evidence → one call is told of the success

A payment whose outcome is not known in time is answered ``settlement_pending``, which is neither failure nor success: the same
payment settled again finds what became of it. See `payments.facilitator.records` for who is told.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from payments.buckets import Buckets
from payments.errors import PaymentError, PaymentRefused, SettlementUnavailable
from payments.facilitator import records, wire
from payments.facilitator.records import Record
from payments.facilitator.schemes import Facilitated, FacilitatedScheme
from payments.facilitator.wire import FacilitatorCall
from payments.money import atomic_to_nano_down
from payments.settlement.engine import Settlements
from payments.settlement.orders import SettlementOrder
from payments.settlement.outcomes import SettlementOutcome
from payments.store import Store
from payments.tenders.exact_services import Unmined

log = logging.getLogger(__name__)

HOUR_S = 3600.0


class Facilitator:
    """All that is facilitated on the networks of one operator.

    Args:
        store: The database.
        settlements: The engine of each network by its chain id; not started yet.
        schemes: What is facilitated.
        extensions: The names of the extensions that it understands.
        pay_to: Whom it settles for, lower-case hex; empty for anybody.
        minimum_nano_usd: The least that is worth settling.
        settlement_wait_s: How long `settle` waits for the evidence, in seconds.
        client_failures_per_hour: Settlements of one client that may fail, each of which costs us gas, before it has to wait. A
            payer's are counted by the engine.
    """

    def __init__(
        self,
        store: Store,
        settlements: Mapping[int, Settlements],
        schemes: Sequence[FacilitatedScheme],
        *,
        extensions: Sequence[str] = (),
        pay_to: frozenset[str] = frozenset(),
        minimum_nano_usd: int = 0,
        settlement_wait_s: float = 30,
        client_failures_per_hour: int = 100,
    ) -> None:
        self.networks = tuple({scheme.network.chain_id: scheme.network for scheme in schemes}.values())
        self._store, self._settlements = store, settlements
        self._schemes = {(scheme.network.caip2, scheme.name): scheme for scheme in schemes}
        self._extensions = list(extensions)
        self._pay_to, self._minimum_nano_usd = pay_to, minimum_nano_usd
        self._wait_s = settlement_wait_s
        self._client_failures = Buckets(client_failures_per_hour, HOUR_S)
        self._beginning: dict[str, asyncio.Task[bool]] = {}
        self._asked: dict[str, int] = {}
        """How many calls of `settle` are under way for an identity."""
        self._unmined = Unmined()
        self._open: dict[str, tuple[str, str]] = {}
        """Payer and asset of each settlement that is counted in `_unmined`."""

    async def start(self) -> None:
        """Learn what is under way; before the engines start."""
        tokens = {(token.chain_id, token.address): token for network in self.networks for token in network.tokens}
        for settlement_id, chain_id, address, payer, value, client in await self._store.read(records.open_settlements):
            token = tokens.get((chain_id, address))
            if token is not None:
                self._count_open(settlement_id, payer, token.asset, atomic_to_nano_down(value, token.decimals))
                self._settlements[chain_id].outcomes.follow(
                    settlement_id, partial(self._decided, settlement_id, client)
                )

    def supported(self) -> dict[str, Any]:
        """The answer of `/supported`."""
        signers = sorted({signer.address for engine in self._settlements.values() for signer in engine.signers})
        return {
            "kinds": [kind for scheme in self._schemes.values() for kind in scheme.kinds()],
            "extensions": self._extensions,
            "signers": {"eip155:*": signers},
        }

    def read(self, body: dict[str, Any]) -> FacilitatorCall:
        """Read the body of `/verify` or `/settle`.

        Raises:
            PaymentMalformed: See `payments.facilitator.wire.read_call`.
        """
        return wire.read_call(body, self.networks)

    async def verify(self, call: FacilitatorCall, client: str) -> dict[str, Any]:
        """The answer of `/verify`: whether a payment would be settled if it were settled now. Changes nothing.

        Raises:
            StoreBusy: The database cannot be asked.
        """
        try:
            await self._verify(call, client)
        except SettlementUnavailable as error:
            return wire.not_verified("unexpected_verify_error", error.message, call.payer)
        except PaymentError as error:
            return wire.not_verified(wire.reason_for(error.code, call.payment), error.message, call.payer)
        return wire.verified(call.payer)

    async def settle(self, call: FacilitatorCall, client: str, idempotency_key: str | None) -> dict[str, Any]:
        """The answer of `/settle`. Cancelling it undoes nothing that is durable, and tells nobody of a success.

        Args:
            call: What is to be settled.
            client: Who asks, see `payments.facilitator.access`.
            idempotency_key: The client's own name of this call: the same one is told the same again.

        Raises:
            StoreBusy: The database cannot be written to; nothing was begun that is not known from the next call on.
        """
        try:
            return await self._settle(call, client, idempotency_key)
        except SettlementUnavailable as error:
            return self._not_settled(call, "unexpected_settle_error", error.message)
        except PaymentError as error:
            return self._not_settled(call, wire.reason_for(error.code, call.payment), error.message)

    # --- verify -------------------------------------------------------------------------------------------------------

    async def _verify(self, call: FacilitatorCall, client: str) -> None:
        payment = self._read(call)
        record = await self._store.read(lambda tx: records.find(tx, payment.identity))
        if record is None:
            await self._check_first(payment, client)
            return
        self._check_known(record, payment)
        if record.granted:
            raise PaymentRefused("authorization_used", f"this payment was settled already by {record.transaction_hash}")
        if record.failed:
            raise PaymentRefused("settlement_failed", f"this payment's transfer failed ({record.reason})")
        if payment.identity in self._asked:
            # Its success will be told to the call that waits for it: nobody should work for another one.
            raise PaymentRefused(wire.PENDING, "this payment is being settled by another call right now")

    def _read(self, call: FacilitatorCall) -> Facilitated:
        requirement = call.requirement
        scheme = self._schemes.get((requirement.network, requirement.scheme))
        if scheme is None:
            known = {network.caip2 for network in self.networks}
            code = "unsupported_scheme" if requirement.network in known else "wrong_network"
            raise PaymentRefused(code, "this scheme is not settled here on that network; see /supported")
        if self._pay_to and requirement.pay_to not in self._pay_to:
            raise PaymentRefused("not_accepted_here", "payments to this address are not settled here")
        payment = scheme.read(call, int(time.time()))
        if _worth_nano_usd(payment) < self._minimum_nano_usd:
            raise PaymentRefused("not_accepted_here", "this payment is less than what is worth settling here")
        return payment

    async def _check_first(self, payment: Facilitated, client: str) -> SettlementOrder:
        """That a payment which nobody settled here before can be; returns what settles it."""
        if payment.refusal is not None:
            raise payment.refusal
        order = payment.order
        self._settlements[order.chain_id].admit(order.payer)
        wait_s = self._client_failures.wait_s(client)
        if wait_s:
            message = f"too many settlements of this server failed and cost gas; try again in {wait_s} s"
            raise PaymentRefused("client_suspended", message)
        before = partial(self._unmined.before, order.payer, payment.token.asset)
        return await payment.check_chain(lambda: before(order.id))

    def _check_known(self, record: Record, payment: Facilitated) -> None:
        if not record.is_same(payment.calls, payment.order.value):
            raise PaymentRefused("authorization_used", "this authorization was used for another payment")

    # --- settle -------------------------------------------------------------------------------------------------------

    async def _settle(self, call: FacilitatorCall, client: str, idempotency_key: str | None) -> dict[str, Any]:
        payment = self._read(call)
        identity = payment.identity
        self._asked[identity] = self._asked.get(identity, 0) + 1
        try:
            record = await self._store.read(lambda tx: records.find(tx, identity))
            if record is None:
                record = await self._begun(payment, client)
            self._check_known(record, payment)
            return await self._conclude(call, payment, record, _call_name(client, idempotency_key))
        finally:
            self._asked[identity] -= 1
            if not self._asked[identity]:
                del self._asked[identity]

    async def _begun(self, payment: Facilitated, client: str) -> Record:
        """The record of a payment that nobody settled here a moment ago."""
        refusal: PaymentError = PaymentRefused("authorization_used", "this authorization paid for something else")
        try:
            await self._begin_once(payment, client)
        except PaymentError as error:
            # Another replica may have settled it since, which makes the chain refuse it.
            refusal = error
        record = await self._store.read(lambda tx: records.find(tx, payment.identity))
        if record is None:
            raise refusal
        return record

    async def _begin_once(self, payment: Facilitated, client: str) -> None:
        """Begin a settlement, together with whoever else wants to begin the same one at this moment."""
        task = self._beginning.get(payment.identity)
        if task is None:
            task = self._beginning[payment.identity] = asyncio.create_task(self._begin(payment, client))
            task.add_done_callback(lambda _: self._beginning.pop(payment.identity))
        # Shielded: a caller that hangs up must not leave an order that is written and that nobody takes up.
        await asyncio.shield(task)

    async def _begin(self, payment: Facilitated, client: str) -> bool:
        order = payment.order
        engine = self._settlements[order.chain_id]
        self._count_open(order.id, order.payer, payment.token.asset, _worth_nano_usd(payment))
        engine.outcomes.follow(order.id, partial(self._decided, order.id, client))
        begun = False
        try:
            order = await self._check_first(payment, client)
            begun = await self._store.write(lambda tx: records.begin(tx, payment.identity, order, client))
        finally:
            if not begun:
                engine.outcomes.unfollow(order.id)
                self._uncount_open(order.id)
        if begun:
            engine.take_queued(order.id)
        return begun

    async def _conclude(
        self, call: FacilitatorCall, payment: Facilitated, record: Record, call_name: str
    ) -> dict[str, Any]:
        outcome = await self._settlements[payment.order.chain_id].outcome(record.settlement_id, self._wait_s)
        transaction = outcome.transaction_hash
        if outcome.open:
            message = "the transfer is on its way and not mined yet; settle the same payment again to learn its outcome"
            return self._not_settled(call, wire.PENDING, message, transaction)
        if not outcome.paid:
            message = f"the payment's transfer failed ({outcome.reason or 'no reason is known'}); nothing was taken"
            return self._not_settled(call, wire.reason_for("settlement_failed", call.payment), message)
        granted = await self._store.write(
            lambda tx: records.grant(tx, payment.identity, call_name),
            if_abandoned=lambda tx, _: records.take_back(tx, payment.identity, call_name),
        )
        if not granted:
            message = "this payment has been settled already, and its success was told to another call"
            return self._not_settled(call, wire.DUPLICATE, message, transaction)
        assert transaction is not None
        return wire.settled(transaction, call.network_name, call.payer, payment.order.value)

    def _not_settled(
        self, call: FacilitatorCall, reason: str, message: str, transaction: str | None = None
    ) -> dict[str, Any]:
        return wire.not_settled(reason, message, call.network_name, call.payer, transaction)

    # --- what the engines decide --------------------------------------------------------------------------------------

    def _decided(self, settlement_id: str, client: str, outcome: SettlementOutcome) -> None:
        self._uncount_open(settlement_id)
        # Whoever executes an authorization before us makes our transaction revert, and us pay for it.
        if outcome.state in ("superseded", "failed"):
            self._client_failures.take(client)

    def _count_open(self, settlement_id: str, payer: str, asset: str, value_nano_usd: int) -> None:
        self._open[settlement_id] = (payer, asset)
        self._unmined.add(payer, asset, settlement_id, value_nano_usd)

    def _uncount_open(self, settlement_id: str) -> None:
        counted = self._open.pop(settlement_id, None)
        if counted is not None:
            self._unmined.remove(*counted, settlement_id)


def _worth_nano_usd(payment: Facilitated) -> int:
    return atomic_to_nano_down(payment.order.value, payment.token.decimals)


def _call_name(client: str, idempotency_key: str | None) -> str:
    """The name of a call that can be told a success: the client's own, or one that no other call has."""
    return f"{client} {idempotency_key}" if idempotency_key else secrets.token_hex(16)
