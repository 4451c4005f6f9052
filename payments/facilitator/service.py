"""Verifies and settles payments for other resource servers. No gateway, no ledger but gas: money goes from payer to server.

verify  changes nothing, and asks the chain once
settle  checks → one commit that reserves the payment and queues its transfer → evidence → one call is told of the success

A payment whose outcome is not known in time is answered ``settlement_pending``, which is neither failure nor success: the same
payment settled again finds what became of it. Any number of facilitators may work on one database: what they must agree on is
in `payments.facilitator.records`, and nothing is remembered here but which payments this process is just beginning.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from payments import promises
from payments.errors import PaymentError, PaymentRefused, SettlementUnavailable
from payments.facilitator import records, wire
from payments.facilitator.access import Client
from payments.facilitator.records import Beginning, Record
from payments.facilitator.schemes import AlreadyDone, Checked, Facilitated, FacilitatedScheme, Promise
from payments.facilitator.wire import FacilitatorCall
from payments.money import atomic_to_nano_down
from payments.promises import Earlier
from payments.settlement.engine import Settlements
from payments.settlement.outcomes import SettlementOutcome
from payments.store import Store, Transaction

BEGINNINGS_MAX = 3
"""How often a settlement is begun anew because others of the same payer were begun since the chain was asked."""


class Facilitator:
    """All that is facilitated on the networks of one operator.

    Args:
        store: The database.
        settlements: The engine of each network by its chain id; it knows `payments.facilitator.kinds`.
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
        self._failures_per_hour = client_failures_per_hour
        self._beginning: dict[str, asyncio.Task[bool]] = {}

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

    async def verify(self, call: FacilitatorCall, client: Client) -> dict[str, Any]:
        """The answer of `/verify`: whether a payment would be settled if it were settled now. Changes nothing.

        Raises:
            StoreBusy: The database cannot be asked.
        """
        try:
            extra = await self._verify(call, client)
        except SettlementUnavailable as error:
            return wire.not_verified("unexpected_verify_error", error.message, call.payer)
        except PaymentError as error:
            return wire.not_verified(wire.reason_for(error.code, call.payment), error.message, call.payer)
        return wire.verified(call.payer, extra)

    async def settle(self, call: FacilitatorCall, client: Client, idempotency_key: str | None) -> dict[str, Any]:
        """The answer of `/settle`. Cancelling it undoes nothing that is durable, and tells nobody of a success.

        Args:
            call: What is to be settled.
            client: Who asks.
            idempotency_key: The client's own name of this call: the same one is told the same again.

        Raises:
            StoreBusy: The database cannot be written to; nothing was begun that is not known from the next call on.
        """
        try:
            return await self._settle(call, client, idempotency_key)
        except AlreadyDone:
            return wire.settled(None, call.network_name, call.payer, 0)
        except SettlementUnavailable as error:
            return self._not_settled(call, "unexpected_settle_error", error.message)
        except PaymentError as error:
            return self._not_settled(call, wire.reason_for(error.code, call.payment), error.message)

    # --- verify -------------------------------------------------------------------------------------------------------

    async def _verify(self, call: FacilitatorCall, client: Client) -> dict[str, Any] | None:
        payment = self._scheme(call, client).verifies(call, client, int(time.time()))
        if isinstance(payment, Promise):
            return await payment.look()
        self._check_worth(payment, payment.worth)
        record = await self._find(payment)
        if record is None:
            return (await self._check_first(payment, client)).extra
        self._check_known(record, payment)
        if record.granted_to is not None:
            by = f" by {record.transaction_hash}" if record.transaction_hash else ""
            raise PaymentRefused("authorization_used", f"this payment was settled already{by}")
        if record.failed:
            raise PaymentRefused("settlement_failed", f"this payment's transfer failed ({record.reason})")
        if record.asked:
            # Its success will be told to the call that waits for it: nobody should work for another one.
            raise PaymentRefused(wire.PENDING, "this payment is being settled by another call right now")
        return None

    def _scheme(self, call: FacilitatorCall, client: Client) -> FacilitatedScheme:
        requirement = call.requirement
        scheme = self._schemes.get((requirement.network, requirement.scheme))
        if scheme is None:
            known = {network.caip2 for network in self.networks}
            code = "unsupported_scheme" if requirement.network in known else "wrong_network"
            raise PaymentRefused(code, "this scheme is not settled here on that network; see /supported")
        if self._pay_to and requirement.pay_to not in self._pay_to:
            raise PaymentRefused("not_accepted_here", "payments to this address are not settled here")
        if client.pay_to not in (None, requirement.pay_to):
            raise PaymentRefused("not_accepted_here", f"this API key is bound to the recipient {client.pay_to}")
        return scheme

    def _check_worth(self, payment: Facilitated, value: int | None) -> None:
        if value is not None and atomic_to_nano_down(value, payment.token.decimals) < self._minimum_nano_usd:
            raise PaymentRefused("not_accepted_here", "this payment is less than what is worth settling here")

    def _check_known(self, record: Record, payment: Facilitated) -> None:
        if not record.is_same(payment.calls, payment.value):
            raise PaymentRefused("authorization_used", "this authorization was used for another payment")

    async def _check_first(self, payment: Facilitated, client: Client) -> Checked:
        """That a payment which nobody settled here before can be."""
        if payment.refusal is not None:
            raise payment.refusal
        self._settlements[payment.token.chain_id].admit(payment.payer)
        wait_s, promised = await self._store.read(
            lambda tx: (
                records.suspended_s(tx, client.name, self._failures_per_hour),
                promises.under_way(tx, payment.payer),
            )
        )
        if wait_s:
            message = f"too many settlements of this server failed and cost gas; try again in {wait_s} s"
            raise PaymentRefused("client_suspended", message)
        checked = await payment.check_chain(Earlier(self._store, payment.payer, payment.token, promised))
        if payment.worth is None and checked.order is not None:
            self._check_worth(payment, checked.order.value)
        return checked

    # --- settle -------------------------------------------------------------------------------------------------------

    async def _settle(self, call: FacilitatorCall, client: Client, idempotency_key: str | None) -> dict[str, Any]:
        payment = self._scheme(call, client).settles(call, client, int(time.time()))
        self._check_worth(payment, payment.worth)
        call_name = f"{client.name} {idempotency_key}" if idempotency_key else secrets.token_hex(16)
        record = await self._find(payment)
        if record is None or (record.state in payment.repeats and record.granted_to != call_name):
            record = await self._begun(payment, client, record)
        elif record.open:
            await self._store.write(lambda tx: records.ask(tx, payment.identity, self._wait_ms))
        self._check_known(record, payment)
        return await self._conclude(call, payment, record, call_name)

    async def _begun(self, payment: Facilitated, client: Client, before: Record | None) -> Record:
        """The record of a payment that nobody settled here a moment ago, or whose settlement is over and may be made anew."""
        refusal: PaymentError = PaymentRefused("authorization_used", "this authorization paid for something else")
        try:
            await self._begin_once(payment, client, before)
        except PaymentError as error:
            # Another process may have settled it since, which makes the chain refuse it.
            refusal = error
        record = await self._find(payment)
        if record is None:
            raise refusal
        # What succeeded before and was told to nobody (whoever asked for it, or we, died) is told now.
        untold = record.paid and record.granted_to is None
        if before is not None and record.settlement_id == before.settlement_id and not untold:
            raise refusal
        return record

    async def _find(self, payment: Facilitated) -> Record | None:
        return await self._store.read(lambda tx: records.find(tx, payment.identity))

    async def _begin_once(self, payment: Facilitated, client: Client, before: Record | None) -> None:
        """Begin a settlement, together with whoever else wants to begin the same one at this moment."""
        task = self._beginning.get(payment.identity)
        if task is None:
            task = asyncio.create_task(self._begin(payment, client, before))
            self._beginning[payment.identity] = task
            task.add_done_callback(lambda _: self._beginning.pop(payment.identity))
        # Shielded: a caller that hangs up must not leave an order that is written and that nobody takes up.
        await asyncio.shield(task)

    async def _begin(self, payment: Facilitated, client: Client, before: Record | None) -> bool:
        engine = self._settlements[payment.token.chain_id]
        for _ in range(BEGINNINGS_MAX):
            from_block = engine.from_block
            checked = await self._check_first(payment, client)
            order = checked.order
            if before is not None and order is not None:
                order = replace(order, id=records.next_settlement_id(before.settlement_id))
            wanted = Beginning(
                identity=payment.identity,
                order=order,
                from_block=from_block,
                client=client.name,
                wait_ms=self._wait_ms,
                cover=checked.cover,
                instead_of=None if before is None else before.settlement_id,
                approval=checked.approval,
            )
            begun = await self._store.write(lambda tx, wanted=wanted: records.begin(tx, wanted))  # type: ignore[misc]
            if begun == "begun" and order is not None:
                engine.take_queued(order.id)
            if begun == "begun" and checked.approval is not None:
                checked.approval.sponsor.begun()
            if begun != "short":
                return begun == "begun"
        raise PaymentRefused(
            "insufficient_funds", "the payer's other payments under way take what this one needs; try again later"
        )

    async def _conclude(
        self, call: FacilitatorCall, payment: Facilitated, record: Record, call_name: str
    ) -> dict[str, Any]:
        outcome: SettlementOutcome | None = None
        transaction = None
        if record.state != "burnt":
            outcome = await self._settlements[payment.token.chain_id].outcome(record.settlement_id, self._wait_s)
            transaction = outcome.transaction_hash
            if outcome.open:
                message = "it is on its way and not mined yet; settle the same again to learn its outcome"
                return self._not_settled(call, wire.PENDING, message, transaction)
            if not outcome.paid:
                message = f"the transaction failed ({outcome.reason or 'no reason is known'}); nothing was moved"
                return self._not_settled(call, wire.reason_for("settlement_failed", call.payment), message)
        # What was moved is known where it was asked for; else the evidence says it.
        found = record if payment.once else await self._find(payment) or record
        try:
            told = await payment.told(found, outcome)
        except SettlementUnavailable as error:
            return self._not_settled(call, wire.PENDING, f"it is done, but {error.message}", transaction)
        if not await self._grant(payment, call_name):
            message = "this payment has been settled already, and its success was told to another call"
            return self._not_settled(call, wire.DUPLICATE, message, transaction)
        return wire.settled(transaction, call.network_name, call.payer, told.amount, told.extra)

    async def _grant(self, payment: Facilitated, call_name: str) -> bool:
        def take_back(tx: Transaction, granted: bool) -> None:
            if granted:
                records.take_back(tx, payment.identity, call_name)

        granted = await self._store.write(
            lambda tx: records.grant(tx, payment.identity, call_name), if_abandoned=take_back
        )
        return granted or not payment.once

    @property
    def _wait_ms(self) -> int:
        return int(self._wait_s * 1000)

    def _not_settled(
        self, call: FacilitatorCall, reason: str, message: str, transaction: str | None = None
    ) -> dict[str, Any]:
        return wire.not_settled(reason, message, call.network_name, call.payer, transaction)
