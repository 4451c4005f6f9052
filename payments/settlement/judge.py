"""Decides on evidence what became of an entry, and books the decision together with the ledger's entries in one commit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from payments.chain.rpc import Rpc, RpcError, RpcUnavailable
from payments.settlement import evidence as proof
from payments.settlement import outbox, states
from payments.settlement.evidence import Evidence, NoEvidence
from payments.settlement.outbox import Entry
from payments.store import Store, Transaction

log = logging.getLogger(__name__)

RETRY_S = 1.0

LedgerCallback = Callable[[Transaction, dict[str, Any]], None]
Spawn = Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"]


class Judge:
    """The one place where settlements become paid or failed.

    Args:
        callbacks: By kind of order, what to do in the unit that records evidence, and in the one that records failure.
        closed: Called with an entry whose decision is durable; its `state` is the new one.
        spawn: Starts background work that the engine waits for when it stops.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        callbacks: dict[str, tuple[LedgerCallback, LedgerCallback]],
        *,
        closed: Callable[[Entry], None],
        spawn: Spawn,
    ) -> None:
        self._store, self._rpc = store, rpc
        self._callbacks = callbacks
        self._closed = closed
        self._spawn = spawn
        self._proven: list[tuple[Entry, Evidence]] = []
        self._recording = False

    def receipt(self, entry: Entry, receipt: dict[str, Any], head: int) -> None:
        """One of the entry's own transactions is in a block."""
        if entry.kind == "filler":
            self._spawn(self._record_filler(entry))
            return
        evidence = proof.of_own_transaction(receipt, entry)
        if evidence is None:
            self._spawn(self.look_elsewhere(entry, max(head, int(receipt["blockNumber"], 16)), reverted=True))
            return
        self._proven.append((entry, evidence))
        if not self._recording:
            self._recording = True
            self._spawn(self._record_proven())

    async def look_elsewhere(self, entry: Entry, head: int, *, reverted: bool) -> None:
        """Our own transaction paid nothing (`reverted`), or cannot any more because the deadline is past at block `head`.

        Somebody else may have executed the authorization: then it is paid all the same. Otherwise it has failed.
        """
        while entry.state in states.OPEN:
            try:
                found = await proof.search(self._rpc, entry, head)
                if isinstance(found, Evidence):
                    if await self._record_one(entry, found):
                        return
                    found = NoEvidence(nonce_consumed=True)
                await self._fail(entry, await self._reason(entry, found, reverted))
            except (RpcUnavailable, RpcError) as error:
                log.warning("cannot look for evidence of %s: %s", entry.id, error)
            except Exception:
                # Nonsense from a node, a database that takes nothing: nobody else decides this entry, so it is tried again.
                log.exception("deciding settlement %s failed", entry.id)
            else:
                return
            await asyncio.sleep(RETRY_S)

    async def _reason(self, entry: Entry, found: NoEvidence, reverted: bool) -> str:
        if found.nonce_consumed:
            return "the authorization was cancelled or used for something else"
        if reverted:
            return await proof.explain_failure(self._rpc, entry)
        return "the authorization expired before it was executed"

    async def _record_proven(self) -> None:
        """Commit what was proven; all that comes up while a commit is running goes into the next one."""
        try:
            while self._proven:
                proven, self._proven = self._proven, []
                try:
                    await self._store.write(partial(self._pay_all, proven=proven))
                except Exception:
                    # One of them cannot be booked; the others must not suffer for it.
                    log.exception("booking %d settlements together failed; trying one by one", len(proven))
                    for entry, evidence in proven:
                        self._spawn(self._record_one(entry, evidence))
                else:
                    for entry, evidence in proven:
                        self._paid(entry, evidence)
        finally:
            self._recording = False

    async def _record_one(self, entry: Entry, evidence: Evidence) -> bool:
        """Record evidence, whatever it takes. False if its Transfer log is already another settlement's evidence."""
        while True:
            try:
                recorded = await self._store.write(lambda tx: self._pay(tx, entry, evidence))
            except Exception:
                # Nothing is shown to the caller until the money is booked, so trying again is the only way out.
                log.exception("booking settlement %s failed", entry.id)
                await asyncio.sleep(RETRY_S)
                continue
            if recorded:
                self._paid(entry, evidence)
            return recorded

    def _pay_all(self, tx: Transaction, proven: list[tuple[Entry, Evidence]]) -> None:
        for entry, evidence in proven:
            self._pay(tx, entry, evidence)

    def _pay(self, tx: Transaction, entry: Entry, evidence: Evidence) -> bool:
        own = evidence.transaction_hash in entry.hashes
        if not own and outbox.is_evidence_of_another(tx, entry, evidence.transaction_hash, evidence.transfer_log_index):
            return False
        columns = {
            "transaction_hash": evidence.transaction_hash,
            "transfer_log_index": evidence.transfer_log_index,
            "received_value": str(evidence.received_value),
            "block_number": evidence.block_number,
            "reason": None,
        }
        state = "mined" if own else "superseded"
        if states.move(tx, entry.id, state, **columns):
            self._callbacks[entry.kind][0](tx, entry.row() | columns | {"state": state})
        return True

    def _paid(self, entry: Entry, evidence: Evidence) -> None:
        entry.state = "mined" if evidence.transaction_hash in entry.hashes else "superseded"
        entry.transaction_hash, entry.reason = evidence.transaction_hash, None
        entry.block_number, entry.block_hash = evidence.block_number, evidence.block_hash
        self._closed(entry)

    async def _fail(self, entry: Entry, reason: str) -> None:
        def unit(tx: Transaction) -> None:
            if states.move(tx, entry.id, "failed", reason=reason):
                self._callbacks[entry.kind][1](tx, entry.row() | {"state": "failed", "reason": reason})

        await self._store.write(unit)
        entry.state, entry.reason = "failed", reason
        self._closed(entry)

    async def _record_filler(self, entry: Entry) -> None:
        await self._store.write_surely(lambda tx: states.move(tx, entry.id, "mined"))
        entry.state = "mined"
        self._closed(entry)
