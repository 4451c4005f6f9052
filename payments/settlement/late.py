"""Authorizations whose settlement failed and that somebody may execute all the same: their payer, or whoever read it on chain.

What arrives that way is evidence like any other, and is found by itself: until an authorization cannot be used any more (its
deadline lies before a block that is final, or it was cancelled in one) its nonce is looked at, now and then, up to a hundred in
one round trip. The times stand in the database, so that a restart goes on, and of several processes one looks. What nobody has
executed may be worth another transaction of ours: see `payments.settlement.retries`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from payments.chain.rpc import Reply, Request, Rpc, RpcError, RpcUnavailable
from payments.settlement import loading, outbox, states
from payments.settlement.courier import HEAD
from payments.settlement.judge import FIRST_LOOK_MS, Judge
from payments.settlement.orders import Kind, NoEvidence, NonceRead
from payments.settlement.outbox import Entry
from payments.settlement.retries import Retries
from payments.store import Store, Transaction

log = logging.getLogger(__name__)

LOOKS_MAX = 100
"""In one round, and so in one round trip."""
INTERVAL_MAX_MS = 600_000
UNEXPLAINED_MS = 3_600_000
"""How long after the failure a nonce is looked at that is used and of which no log says for what: logs come late, or never."""
AGE_PER_INTERVAL = 4
"""The interval grows with the time since the failure: most are executed soon after it, if ever."""

_TAKE = "UPDATE settlement SET watch_again_ms=? WHERE id=? AND state='failed' AND watch_again_ms<=? RETURNING id"
_END = "UPDATE settlement SET watch_again_ms=NULL WHERE id=? AND state='failed'"


@dataclass(frozen=True, slots=True)
class _Watched:
    entry: Entry
    nonce: NonceRead
    failed_ms: int


class LateExecutions:
    """Watches the failed settlements of one network.

    Args:
        kinds: By name, where the chain keeps their nonces.
        retries: Told of those that nobody has executed, and nobody has cancelled.
        confirmations: Blocks on top of one after which it is final.
        ours: Tells what this process looks after.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        chain_id: int,
        judge: Judge,
        kinds: Mapping[str, Kind],
        retries: Retries,
        confirmations: int,
        ours: Callable[[Transaction], loading.Ours],
    ) -> None:
        self._store, self._rpc, self._chain_id, self._judge = store, rpc, chain_id, judge
        self._kinds, self._retries, self._confirmations, self._ours = kinds, retries, confirmations, ours

    async def round(self) -> None:
        """Look at every failed settlement whose time it is. One that cannot be looked at, or not be booked, holds up none of
        the others: it is looked at again in time.

        Raises:
            RpcUnavailable: No node answered; they are looked at again in time.
            RpcError: A node refused to say what is final; likewise.
        """
        due = await self._store.read(
            lambda tx: loading.due(tx, self._chain_id, "watch_again_ms", self._kinds, self._ours(tx), LOOKS_MAX)
        )
        if not due:
            return
        watched = await self._store.write(lambda tx: self._take(tx, due))
        if not watched:
            return
        head = int(await self._rpc.call(*HEAD), 16)
        final = max(head - self._confirmations, 0)
        requests: list[Request] = [("eth_getBlockByNumber", (hex(final), False))]
        requests += [each.nonce.request(head) for each in watched]
        block, *answers = await self._rpc.batch(requests)
        if isinstance(block, RpcError):
            raise block
        final_s = int(block["timestamp"], 16)
        over: list[str] = []
        unused: list[Entry] = []
        for each, answer in zip(watched, answers, strict=True):
            try:
                used = _is_used(each, answer)
                if await self._is_over(each, used, final_s, final, head):
                    over.append(each.entry.id)
                elif not used:
                    unused.append(each.entry)
            except (RpcUnavailable, RpcError) as error:
                log.warning("the failed settlement %s cannot be looked at now: %s", each.entry.id, error)
            except Exception:
                # Nonsense from a node about one of them, or books that do not take it.
                log.exception("a look at the failed settlement %s failed", each.entry.id)
        if over:
            await self._store.write(lambda tx: [tx.execute(_END, (settlement,)) for settlement in over])
        await self._retries.round(unused, final)

    async def _is_over(self, each: _Watched, used: bool, final_s: int, final: int, head: int) -> bool:
        """Whether nothing can come of it any more. What has come of it is booked."""
        entry = each.entry
        if not used:
            return final_s > entry.order.valid_before
        if await self._judge.find(entry, head) is None:
            log.warning("the failed settlement %s was executed by somebody else later", entry.id)
            return False
        # Cancelled, unless a reorganisation takes that away again.
        settled = await self._judge.search(entry, final)
        if not isinstance(settled, NoEvidence) or not settled.nonce_consumed:
            return False
        return settled.explained or states.now_ms() > each.failed_ms + UNEXPLAINED_MS

    def _take(self, tx: Transaction, due: list[tuple[str, int]]) -> list[_Watched]:
        """Those that no other process took, with their next time set."""
        taken, now = [], states.now_ms()
        for settlement_id, failed_ms in due:
            interval_ms = min(max((now - failed_ms) // AGE_PER_INTERVAL, FIRST_LOOK_MS), INTERVAL_MAX_MS)
            if tx.execute(_TAKE, (now + interval_ms, settlement_id, now)).fetchone() is None:
                continue
            entry = outbox.find(tx, settlement_id)
            assert entry is not None
            nonce = self._kinds[entry.kind].nonce(entry.order)
            if nonce is not None:
                taken.append(_Watched(entry, nonce, failed_ms))
            else:
                tx.execute(_END, (settlement_id,))
        return taken


def _is_used(each: _Watched, answer: Reply) -> bool:
    if isinstance(answer, RpcError):
        raise answer
    return each.nonce.is_used(answer)
