"""Settlements that somebody wants looked at again: see `payments.settlement.stories.ask_again`.

An open one is sent once more. Of any that is not paid, the chain is searched for evidence: in the receipts of our own
transaction, and in everybody else's. What is found counts; nothing is signed, and nothing fails because of a look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.settlement import outbox, outgoing, states
from payments.settlement.courier import HEAD
from payments.settlement.judge import Judge
from payments.settlement.orders import Evidence
from payments.settlement.outbox import Entry
from payments.settlement.outgoing import Outgoing
from payments.store import Store, Transaction

log = logging.getLogger(__name__)

LOOKS_MAX = 100
"""In one round."""


class SecondLooks:
    """Fulfils the wishes for one network.

    Args:
        entries: The engine's open entries by id.
        transactions: The engine's open transactions by id.
        carry: Sends a transaction's newest form now.
        ours: Tells, for one unit, of which account's transactions (None: of none's) this process looks after what they carry.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        chain_id: int,
        judge: Judge,
        entries: Mapping[str, Entry],
        transactions: Mapping[str, Outgoing],
        carry: Callable[[Outgoing], None],
        ours: Callable[[Transaction], Callable[[str | None], bool]],
    ) -> None:
        self._store, self._rpc, self._chain_id, self._judge = store, rpc, chain_id, judge
        self._entries, self._transactions = entries, transactions
        self._carry, self._ours = carry, ours

    async def round(self) -> None:
        """Look at everything that was asked for since the last round.

        Raises:
            RpcUnavailable: No node answered; the wishes stay.
            RpcError: A node refused; the wishes stay.
        """
        for settlement_id in await self._store.read(self._wishes):
            entry = self._entries.get(settlement_id) or await self._store.read(
                lambda tx, wished=settlement_id: outbox.find(tx, wished)  # type: ignore[misc]
            )
            if entry is not None and entry.state not in states.PAID:
                await self._look(entry)
            await self._store.write(
                lambda tx, done=settlement_id: tx.execute(  # type: ignore[misc]
                    "UPDATE settlement SET look_again_ms=NULL WHERE id=?", (done,)
                )
            )

    def _wishes(self, tx: Transaction) -> list[str]:
        rows = tx.execute(
            "SELECT settlement.id, settlement.kind, chain_transaction.signer FROM settlement"
            " LEFT JOIN chain_transaction ON chain_transaction.id = settlement.transaction_id"
            " WHERE settlement.chain_id=? AND look_again_ms IS NOT NULL ORDER BY look_again_ms LIMIT ?",
            (self._chain_id, LOOKS_MAX),
        ).fetchall()
        if not rows:
            return []
        ours = self._ours(tx)
        return [settlement_id for settlement_id, kind, signer in rows if ours(signer) and self._judge.knows(kind)]

    async def _look(self, entry: Entry) -> None:
        log.info("settlement %s is looked at again", entry.id)
        transaction = self._transactions.get(entry.transaction_id or "")
        if transaction is not None:
            self._carry(transaction)
        try:
            evidence = None if transaction is not None else await self._of_own_receipts(entry)
            # While nothing is under way nobody follows the chain's head.
            found = evidence or await self._judge.search(entry, int(await self._rpc.call(*HEAD), 16))
            if isinstance(found, Evidence):
                await self._judge.record(entry, found)
        except (RpcUnavailable, RpcError):
            raise
        except Exception:
            # Nonsense from a node; whoever asked can ask again.
            log.exception("a second look at %s failed", entry.id)

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
