"""Calls that came to nothing and would succeed by now: sent once more, while nobody else has used their authorization.

A token is paused, a payer short or blacklisted, for the moment in which its settlement is due: what it signed is good until its
deadline all the same. What says so is the kind of an order, because somebody must not have been told of the failure as final.
Gas is spent only where the very call succeeds in a simulation, and on `TRIES_MAX` transactions an order at the most. The one
before must be in a block that is final, so that no two are ever under way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from payments.chain.rpc import Request, Rpc, RpcError
from payments.settlement import news, outbox, outgoing
from payments.settlement.news import Decision
from payments.settlement.orders import Kind
from payments.settlement.outbox import Entry
from payments.store import Store, Transaction

log = logging.getLogger(__name__)

TRIES_MAX = 3
"""Transactions that carry one order for nothing, the first one among them."""
DEADLINE_MARGIN_S = 60
"""So long must an authorization still be good for a transaction to be worth its gas: it has to get into a block."""


class Retries:
    """Tries failed settlements of one network again.

    Args:
        kinds: By name, what may be tried again and what that does to the books.
        requeued: Called with an entry that is queued again.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        chain_id: int,
        kinds: Mapping[str, Kind],
        requeued: Callable[[Entry], None],
    ) -> None:
        self._store, self._rpc, self._chain_id = store, rpc, chain_id
        self._kinds, self._requeued = kinds, requeued

    async def round(self, unused: Sequence[Entry], final: int) -> None:
        """Queue those again whose call succeeds now.

        Args:
            unused: Failed ones whose authorization is neither used nor cancelled nor past its deadline.
            final: The newest block that is final.

        Raises:
            RpcUnavailable: No node answered; they are looked at again in time.
        """
        latest_s = time.time() + DEADLINE_MARGIN_S
        worth = [entry for entry in unused if entry.order.valid_before > latest_s and self._may_be_tried(entry)]
        entries = await self._store.read(lambda tx: [entry for entry in worth if _is_over(tx, entry, final)])
        if not entries:
            return
        simulations = await self._rpc.batch([self._simulation(entry) for entry in entries])
        for entry, answer in zip(entries, simulations, strict=True):
            if isinstance(answer, RpcError):
                continue
            try:
                await self._queue(entry)
            except Exception:
                # Books that do not take it back, perhaps; the others are queued all the same.
                log.exception("the failed settlement %s could not be queued again", entry.id)

    def _may_be_tried(self, entry: Entry) -> bool:
        return self._kinds[entry.kind].on_tried_again is not None and entry.attempts + 1 < TRIES_MAX

    def _simulation(self, entry: Entry) -> Request:
        kind, order = self._kinds[entry.kind], entry.order
        call = {"from": kind.through(order), "to": order.call_to, "data": "0x" + order.call_data.hex()}
        return "eth_call", (call | {"gas": hex(kind.gas(order))}, "latest")

    async def _queue(self, entry: Entry) -> None:
        """In one commit it is open again in the outbox and in the books; whoever has a signer then takes it up."""

        def unit(tx: Transaction) -> bool:
            on_tried_again = self._kinds[entry.kind].on_tried_again
            assert on_tried_again is not None
            # Another process may have been faster, or found it paid.
            if not outbox.is_as_known(tx, entry) or not on_tried_again(tx, entry.row()):
                return False
            assert outbox.try_again(tx, entry)
            news.tell_queued(tx, self._chain_id)
            news.tell_decided(tx, self._chain_id, [Decision.of(entry, "queued")])
            return True

        if not await self._store.write(unit):
            return
        log.warning("the settlement %s has failed, and would succeed now: it is sent again", entry.id)
        entry.state, entry.attempts = "queued", entry.attempts + 1
        entry.transaction_id = entry.transaction_hash = entry.reason = None
        self._requeued(entry)


def _is_over(tx: Transaction, entry: Entry, final: int) -> bool:
    """Whether what carried it is in a block for good."""
    return entry.transaction_id is not None and outgoing.is_included(tx, entry.transaction_id, final)
