"""Decides on evidence what became of an entry, and books the decision together with the ledger's entries in one commit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from payments.chain.batches import logs_of_call
from payments.chain.logs import Log
from payments.chain.rpc import Rpc, RpcError, RpcUnavailable
from payments.leases import LeaseLost
from payments.settlement import evidence as proof
from payments.settlement import news, outbox, outgoing, states
from payments.settlement.news import Decision
from payments.settlement.orders import Evidence, Kind, NoEvidence, Search, SettlementOrder
from payments.settlement.outbox import Entry
from payments.settlement.outgoing import Outgoing
from payments.settlement.witnesses import Witnesses
from payments.store import Store, StoreBusy, Transaction

log = logging.getLogger(__name__)

RETRY_S = 1.0
UNEXPLAINED_S = 10.0
"""How long a nonce that is used without a log that says for what is no failure: the node's logs may lag behind its state. It
fails then, since some tokens leave no logs, and what was paid all the same is found later: see `payments.settlement.late`."""
FIRST_LOOK_MS = 2_000
"""After a failure, whether somebody executed the authorization all the same: see `payments.settlement.late`."""

LOOK_BACK_BLOCKS = 50_000
"""How far back evidence is searched for what no transaction of ours ever carried, and of which nobody wrote from where on."""

Spawn = Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"]
Found = tuple[Entry, Evidence]


@dataclass(slots=True)
class _Included:
    """A transaction in a block, and what its receipt says of the entries that it carries."""

    outgoing: Outgoing
    receipt: dict[str, Any]
    proven: list[Found] = field(default_factory=list)
    unproven: list[Entry] = field(default_factory=list)
    """Their calls reverted or moved nothing."""
    untried: list[Entry] = field(default_factory=list)
    """The whole batch reverted, and so none of its calls was made."""


class Judge:
    """The one place where settlements become paid or failed.

    Args:
        chain_id: Of the network.
        kinds: By name, what proves orders and what books them.
        batch_contract: The operator's own, lower-case hex, if there is one.
        witnesses: Confirm what a single node says of large amounts.
        closed: Called with an entry whose decision is durable; its `state` is the new one.
        requeued: Called with an entry that is queued again.
        forget: Called with an entry that another process decides, or has sent anew.
        lost: Called with the name of a lease, when what it is needed for turns out to be another process's.
        spawn: Starts background work that the engine waits for when it stops.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        chain_id: int,
        kinds: Mapping[str, Kind],
        *,
        batch_contract: str | None,
        witnesses: Witnesses,
        closed: Callable[[Entry], None],
        requeued: Callable[[Entry], None],
        forget: Callable[[Entry], None],
        lost: Callable[[str], None],
        spawn: Spawn,
    ) -> None:
        self._store, self._rpc, self._chain_id = store, rpc, chain_id
        self._kinds, self._batch_contract, self._witnesses = kinds, batch_contract, witnesses
        self._closed, self._requeued, self._forget = closed, requeued, forget
        self._lost, self._spawn = lost, spawn
        self._included: list[_Included] = []
        self._recording = False

    def receipt(self, transaction: Outgoing, receipt: dict[str, Any]) -> None:
        """One of our transactions is in a block.

        Raises:
            ValueError, KeyError: The receipt makes no sense; nothing was decided.
        """
        included = _Included(transaction, receipt)
        # One that was alone in its batch would fail alone again.
        reverted_batch = len(transaction.entries) + transaction.others > 1 and receipt["status"] != "0x1"
        for entry in transaction.entries:
            if entry.state not in ("submitted", "failed"):
                continue
            evidence = self.own_evidence(entry, receipt)
            if evidence is not None:
                included.proven.append((entry, evidence))
            elif entry.state == "submitted":
                (included.untried if reverted_batch else included.unproven).append(entry)
            else:
                # Given up before a reorganisation, and not paid by us now: perhaps by another transaction.
                self._spawn(self._look_once(entry, _burn(entry, receipt)))
        self._included.append(included)
        if not self._recording:
            self._recording = True
            self._spawn(self._record())

    def own_evidence(self, entry: Entry, receipt: dict[str, Any]) -> Evidence | None:
        """What a receipt of the transaction that carries an entry proves for it."""
        logs = logs_of_call(receipt, entry.position)
        return None if logs is None else self._kinds[entry.kind].proof.of_call(entry.order, receipt, logs)

    async def look_elsewhere(self, entry: Entry, head: int, *, sender: str | None, reverted: bool) -> None:
        """Our own call paid nothing (`reverted`), or cannot any more because the deadline is past at block `head`.

        Somebody else may have executed the authorization: then it is paid all the same. Otherwise it has failed.
        """
        unexplained_until = None
        while entry.state in states.OPEN:
            try:
                found = await self.find(entry, head)
                if found is None:
                    return
                if found.nonce_consumed and not found.explained:
                    now = asyncio.get_running_loop().time()
                    unexplained_until = unexplained_until or now + UNEXPLAINED_S
                    if now < unexplained_until:
                        raise RpcUnavailable("a node says that the nonce is used, and has no log of it")
                await self._fail(entry, await self._reason(entry, found, sender, reverted))
            except (RpcUnavailable, RpcError) as error:
                log.warning("cannot look for evidence of %s: %s", entry.id, error)
            except Exception:
                # Nonsense from a node, a database that takes nothing: nobody else decides this entry, so it is tried again.
                log.exception("deciding settlement %s failed", entry.id)
            else:
                return
            await asyncio.sleep(RETRY_S)

    async def book_executed(self, order: SettlementOrder, from_block: int, head: int) -> bool:
        """Write an order that somebody else has executed already, as paid. False, with nothing written, if nothing proves that.

        Raises:
            RpcError: A node refused.
            RpcUnavailable: No node answered.
            StoreBusy: The database takes nothing now.
        """
        entry = Entry(order, "queued", from_block)

        def unit(tx: Transaction, evidence: Evidence) -> tuple[bool, str | None]:
            if not self._is_free(tx, entry, evidence):
                return True, None
            return False, self._book(tx, entry, evidence) if outbox.enqueue(tx, order) else None

        again = True
        while again and isinstance(evidence := await self.search(entry, head), Evidence):
            again, state = await self._store.write(partial(unit, evidence=evidence))
            if state is not None:
                self._paid(entry, evidence, state)
                return True
        return False

    async def _look_once(self, entry: Entry, head: int) -> None:
        while isinstance(found := await self.search(entry, head), Evidence):
            if await self.record(entry, found):
                return
        self._closed(entry)

    async def find(self, entry: Entry, head: int) -> NoEvidence | None:
        """Look for evidence in anybody's transaction up to block `head`, and book it: then None. Errors as for `search` and
        `book`."""
        while isinstance(found := await self.search(entry, head), Evidence):
            if await self.book(entry, found):
                return None
        return found

    async def search(self, entry: Entry, head: int) -> Evidence | NoEvidence:
        """Look for evidence in anybody's transaction up to block `head`.

        Raises:
            RpcError: A node refused; try again later.
            RpcUnavailable: No node answered, or no second one confirms what the first one said; try again later.
        """
        from_block = entry.from_block or max(head - LOOK_BACK_BLOCKS, 0)
        kind, free = self._kinds[entry.kind], partial(self._free, entry)
        where = Search(self._rpc, from_block, head, free, kind.through(entry.order) or self._batch_contract)
        taken = None
        while isinstance(found := await kind.proof.search(entry.order, where), Evidence):
            if await self._store.read(lambda tx, seen=found: self._is_free(tx, entry, seen)):  # type: ignore[misc]
                await self.confirm(entry, found)
                return found
            if found == taken:
                return NoEvidence(nonce_consumed=True, explained=True)
            # Perhaps it was taken just now, and there is other evidence.
            taken = found
        return found

    async def _free(self, entry: Entry, logs: list[Log]) -> list[Log]:
        hashes = {log["transactionHash"] for log in logs}
        proven = await self._store.read(lambda tx: outbox.proven_by(tx, self._chain_id, hashes)) if logs else {}
        places = [(log["transactionHash"], int(log["logIndex"], 16)) for log in logs]
        return [log for log, place in zip(logs, places, strict=True) if proven.get(place, entry.id) == entry.id]

    def _is_free(self, tx: Transaction, entry: Entry, evidence: Evidence) -> bool:
        """Whether evidence proves no other settlement."""
        proven = outbox.proven_by(tx, self._chain_id, [evidence.transaction_hash])
        return proven.get((evidence.transaction_hash, evidence.transfer_log_index), entry.id) == entry.id

    async def confirm(self, entry: Entry, evidence: Evidence) -> None:
        """Hear a second node, where the amount is large enough.

        Raises:
            RpcUnavailable: None says the same.
        """
        if self._witnesses.needed_for(entry.order) and not await self._witnesses.confirm_evidence(evidence):
            raise RpcUnavailable(f"no second node confirms {evidence.transaction_hash}")

    async def _reason(self, entry: Entry, found: NoEvidence, sender: str | None, reverted: bool) -> str:
        if found.nonce_consumed:
            return "the authorization was cancelled or used for something else"
        if reverted:
            return await proof.explain_failure(self._rpc, entry.order, sender)
        return "the authorization expired before it was executed"

    async def _record(self) -> None:
        """Commit what receipts say; all that comes up while a commit is running goes into the next one."""
        try:
            while self._included:
                taken, self._included = self._included, []
                try:
                    await self._store.write(partial(self._book_all, taken=taken))
                except LeaseLost as lost:
                    # The other accounts' transactions are still ours.
                    self._included += self._left(taken, lost)
                except Exception:
                    # One of them cannot be booked; the others must not suffer for it.
                    log.exception("booking %d transactions together failed; trying one by one", len(taken))
                    for included in taken:
                        self._spawn(self._record_apart(included))
                else:
                    for included in taken:
                        self._told(included)
        finally:
            self._recording = False

    async def _record_apart(self, included: _Included) -> None:
        for found in included.proven:
            self._spawn(self._record_own(*found, sender=included.outgoing.caller))
        included.proven.clear()
        try:
            with contextlib.suppress(StoreBusy):  # the background goes on, and tells
                unit = partial(self._book_all, taken=[included])
                await self._store.write_surely(unit, lambda _: self._told(included))
        except LeaseLost as lost:
            self._left([included], lost)

    async def _record_own(self, entry: Entry, evidence: Evidence, sender: str | None) -> None:
        if not await self.record(entry, evidence):
            # An order of the same authorization was quicker to find it.
            await self.look_elsewhere(entry, evidence.block_number, sender=sender, reverted=False)

    def _left(self, taken: list[_Included], lost: LeaseLost) -> list[_Included]:
        """What can still be booked here, when an account turns out to be another process's."""
        self._lost(lost.name)
        for included in taken:
            if not _is_ours(included):
                for entry in included.outgoing.entries:
                    self._forget(entry)
        return [included for included in taken if _is_ours(included)]

    def _book_all(self, tx: Transaction, taken: list[_Included]) -> None:
        decisions: list[Decision] = []
        for included in taken:
            outgoing.require_care(tx, included.outgoing)
            outgoing.include(tx, included.outgoing, included.receipt)
            for entry, evidence in included.proven:
                # That a log proves no other settlement is not asked: the table takes each but once.
                decisions += self._pay(tx, entry, evidence, "mined")
            if outbox.requeue(tx, included.untried):
                news.tell_queued(tx, included.outgoing.chain_id)
        self._tell(tx, decisions)

    def _told(self, included: _Included) -> None:
        for entry, evidence in included.proven:
            self._paid(entry, evidence, "mined")
        for entry in included.untried:
            entry.state, entry.attempts, entry.transaction_id = "queued", entry.attempts + 1, None
            log.warning("the batch that carried %s reverted; it goes out alone", entry.id)
            self._requeued(entry)
        sender = included.outgoing.caller
        for entry in included.unproven:
            head = _burn(entry, included.receipt)
            self._spawn(self.look_elsewhere(entry, head, sender=sender, reverted=True))

    async def record(self, entry: Entry, evidence: Evidence) -> bool:
        """Record evidence, whatever it takes: for work that nothing else waits for. See `book`."""
        while True:
            try:
                return await self.book(entry, evidence)
            except Exception:
                # Nothing is shown to the caller until the money is booked, so trying again is the only way out.
                log.exception("booking settlement %s failed", entry.id)
                await asyncio.sleep(RETRY_S)

    async def book(self, entry: Entry, evidence: Evidence) -> bool:
        """Record evidence. False, with nothing written, if its log is already another settlement's evidence.

        Raises:
            Exception: Whatever keeps it from being booked; nothing was written.
        """
        state = await self._store.write(lambda tx: self._book(tx, entry, evidence))
        if state is not None:
            self._paid(entry, evidence, state)
        return state is not None

    def _book(self, tx: Transaction, entry: Entry, evidence: Evidence) -> str | None:
        """Book evidence and tell it; the state that it makes, or None if it proves something else already."""
        if not self._is_free(tx, entry, evidence):
            return None
        own = outgoing.is_form_of(tx, entry.transaction_id, evidence.transaction_hash)
        state = "mined" if own else "superseded"
        self._tell(tx, self._pay(tx, entry, evidence, state))
        return state

    def _pay(self, tx: Transaction, entry: Entry, evidence: Evidence, state: str) -> list[Decision]:
        """Book evidence that is free; what is to be told."""
        columns = {
            "transaction_hash": evidence.transaction_hash,
            "transfer_log_index": evidence.transfer_log_index,
            "received_value": str(evidence.received_value),
            "block_number": evidence.block_number,
            "reason": None,
            "waits_for": None,
        }
        if not states.move(tx, entry.id, state, **columns, watch_again_ms=None):
            return []
        told = {"state": state, "withheld_value": str(evidence.withheld_value)}
        self._kinds[entry.kind].on_paid(tx, entry.row() | columns | told)
        return [Decision.of(entry, state)]

    def _tell(self, tx: Transaction, decisions: list[Decision]) -> None:
        if decisions:
            news.tell_decided(tx, self._chain_id, decisions)

    def _paid(self, entry: Entry, evidence: Evidence, state: str) -> None:
        entry.state, entry.own = state, state == "mined"
        entry.transaction_hash, entry.reason, entry.waits_for = evidence.transaction_hash, None, None
        entry.block_number, entry.block_hash = evidence.block_number, evidence.block_hash
        entry.transfer_log_index = evidence.transfer_log_index
        self._closed(entry)

    async def give_up(self, settlement_id: str, entry: Entry | None, reason: str) -> None:
        """Record that what an order waits for will not happen, unless it waits no more; `entry` if it is known."""
        entry = entry or await self._store.read(lambda tx: outbox.find(tx, settlement_id))
        if entry is not None and entry.state == "queued" and entry.waits_for is not None:
            await self._fail(entry, reason)

    async def _fail(self, entry: Entry, reason: str) -> None:
        def unit(tx: Transaction) -> bool:
            # Another process may have sent it since, or found it paid.
            again_ms = _watched_from(self._kinds[entry.kind], entry.order)
            if not outbox.is_as_known(tx, entry) or not states.move(
                tx, entry.id, "failed", reason=reason, watch_again_ms=again_ms
            ):
                return False
            self._kinds[entry.kind].on_failed(tx, entry.row() | {"state": "failed", "reason": reason})
            self._tell(tx, [Decision.of(entry, "failed")])
            return True

        if await self._store.write(unit):
            entry.state, entry.reason = "failed", reason
            self._closed(entry)
        else:
            self._forget(entry)


def _burn(entry: Entry, receipt: dict[str, Any]) -> int:
    """Our call for it moved nothing, in this block, whose number is returned: in another one it may."""
    entry.burnt, entry.block_hash = True, receipt["blockHash"]
    entry.burnt_in_block = int(receipt["blockNumber"], 16)
    return entry.burnt_in_block


def _is_ours(included: _Included) -> bool:
    signer = included.outgoing.signer
    return signer is None or signer.mine


def _watched_from(kind: Kind, order: SettlementOrder) -> int | None:
    """When a settlement that fails now is looked at first; None if nobody else can execute it."""
    may_be_executed = order.valid_before and order.authorization_nonce is not None and kind.nonce(order) is not None
    return states.now_ms() + FIRST_LOOK_MS if may_be_executed else None
