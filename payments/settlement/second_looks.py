"""Settlements that somebody wants looked at again: see `payments.settlement.stories.ask_again`.

An open one is sent once more. Of any that is not paid, the chain is searched for evidence: in the receipts of our own
transaction, and in everybody else's. What is found counts; nothing is signed, and nothing fails because of a look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.settlement import loading, outbox, outgoing, states
from payments.settlement.courier import HEAD
from payments.settlement.judge import Judge
from payments.settlement.orders import Evidence, Kind
from payments.settlement.outbox import Entry
from payments.settlement.outgoing import Outgoing
from payments.store import Store, Transaction

log = logging.getLogger(__name__)

LOOKS_MAX = 100
"""In one round."""
AGAIN_MS = 10_000
"""Until a wish that could not be fulfilled is tried again, behind the others: a node may refuse it for ever."""


class SecondLooks:
    """Fulfils the wishes for one network.

    Args:
        kinds: By name, those that are known here.
        entries: The engine's open entries by id.
        transactions: The engine's open transactions by id.
        carry: Sends a transaction's newest form now.
        ours: Tells what this process looks after.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        chain_id: int,
        judge: Judge,
        kinds: Mapping[str, Kind],
        entries: Mapping[str, Entry],
        transactions: Mapping[str, Outgoing],
        carry: Callable[[Outgoing], None],
        ours: Callable[[Transaction], loading.Ours],
    ) -> None:
        self._store, self._rpc, self._chain_id, self._judge = store, rpc, chain_id, judge
        self._kinds, self._entries, self._transactions = kinds, entries, transactions
        self._carry, self._ours = carry, ours

    async def round(self) -> None:
        """Look at everything that was asked for since the last round. The wish for one that cannot be looked at, or not be
        booked, stays and holds up none of the others."""
        wishes = await self._store.read(
            lambda tx: loading.due(tx, self._chain_id, "look_again_ms", self._kinds, self._ours(tx), LOOKS_MAX)
        )
        for settlement_id, _ in wishes:
            again_ms: int | None = states.now_ms() + AGAIN_MS
            try:
                await self._fulfil(settlement_id)
                again_ms = None
            except (RpcUnavailable, RpcError) as error:
                log.warning("the settlement %s cannot be looked at again now: %s", settlement_id, error)
            except Exception:
                # Nonsense from a node, or books that do not take it.
                log.exception("a second look at %s failed", settlement_id)
            await self._store.write(partial(_wish, settlement_id=settlement_id, again_ms=again_ms))

    async def _fulfil(self, settlement_id: str) -> None:
        entry = self._entries.get(settlement_id) or await self._store.read(lambda tx: outbox.find(tx, settlement_id))
        if entry is None or entry.state in states.PAID:
            return
        log.info("settlement %s is looked at again", entry.id)
        transaction = self._transactions.get(entry.transaction_id or "")
        if transaction is not None:
            self._carry(transaction)
        evidence = None if transaction is not None else await self._of_own_receipts(entry)
        if evidence is None or not await self._judge.book(entry, evidence):
            # While nothing is under way nobody follows the chain's head.
            await self._judge.find(entry, int(await self._rpc.call(*HEAD), 16))

    async def _of_own_receipts(self, entry: Entry) -> Evidence | None:
        """A transaction of ours that nobody waits for any more may have been mined since."""
        if entry.transaction_id is None:
            return None
        hashes = await self._store.read(lambda tx: outgoing.hashes_of(tx, str(entry.transaction_id)))
        requests: list[Request] = [("eth_getTransactionReceipt", (each,)) for each in hashes]
        for receipt in await self._rpc.batch(requests):
            if isinstance(receipt, dict) and receipt.get("blockNumber"):
                evidence = self._judge.own_evidence(entry, receipt)
                if evidence is not None:
                    await self._judge.confirm(entry, evidence)
                return evidence
        return None


def _wish(tx: Transaction, settlement_id: str, again_ms: int | None) -> None:
    tx.execute("UPDATE settlement SET look_again_ms=? WHERE id=?", (again_ms, settlement_id))
