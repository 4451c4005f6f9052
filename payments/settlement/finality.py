"""Watches mined transactions until they are deep enough, and takes back those that a reorganisation took away."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.chain.signers import Signer
from payments.settlement import loading, news, outgoing, states
from payments.settlement.orders import NO_LOG, Kind
from payments.settlement.outbox import Entry
from payments.settlement.outgoing import Outgoing
from payments.store import Store, StoreBusy, Transaction

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What one look at the chain found."""

    final: list[Entry] = field(default_factory=list)
    vanished: list[Entry] = field(default_factory=list)


class Finality:
    """Entries whose evidence stands in a block that is not deep enough yet.

    Args:
        store: The database.
        rpc: The chain.
        chain_id: Of the network.
        accounts: All that the configuration names.
        kinds: By name, the kinds of orders that are known here.
        confirmations: Blocks on top of the evidence's own after which it is final.
        interval_s: At most one look per this time: a chain that mines at once would make hundreds of blocks to look at.
        finalised: Called with an entry that is final.
        reopened: Called with an entry that is open again.
        adopt: Takes over a transaction that is to be carried again.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        chain_id: int,
        accounts: Mapping[str, Signer],
        kinds: Mapping[str, Kind],
        *,
        confirmations: int,
        interval_s: float,
        finalised: Callable[[Entry], object],
        reopened: Callable[[Entry], object],
        adopt: Callable[[Outgoing], object],
    ) -> None:
        self.watched: dict[str, Entry] = {}
        self._store, self._rpc, self._chain_id = store, rpc, chain_id
        self._accounts, self._kinds = accounts, kinds
        self._confirmations = confirmations
        self._interval_s = interval_s
        self._finalised, self._reopened, self._adopt = finalised, reopened, adopt
        self._looked_at = 0.0
        self._looking = False

    @property
    def due(self) -> bool:
        """Whether there is something to look at, and it is time."""
        return bool(self.watched) and time.monotonic() - self._looked_at >= self._interval_s

    def watch(self, entry: Entry) -> None:
        """Watch an entry with evidence until a look finds it final or vanished."""
        self.watched[entry.id] = entry

    def watch_also(self, entries: Iterable[Entry]) -> None:
        """Watch what the database has, too; what is known already as it is known."""
        self.watched = {entry.id: entry for entry in entries} | self.watched

    async def round(self, head: int) -> None:
        """Look at the chain once, and book what has changed.

        Raises:
            LeaseLost: Something of it is another process's now.
        """
        try:
            async with self.look(head) as verdicts:
                await self._record(verdicts)
        except (RpcUnavailable, StoreBusy) as error:
            log.warning("confirmations must wait: %s", error)

    async def _record(self, verdicts: Verdicts) -> None:
        final = [entry for entry in verdicts.final if entry.state == "mined"]
        if final:
            await self._store.write(lambda tx: [states.move(tx, entry.id, "final") for entry in final])
        for entry in final:
            entry.state = "final"
            self._finalised(entry)
        if verdicts.vanished:
            await self._send_again(verdicts.vanished)

    @contextlib.asynccontextmanager
    async def look(self, head: int) -> AsyncIterator[Verdicts]:
        """Compare the blocks of the evidence with the chain as it is now, and act on that inside the context.

        Entries in the answer are watched no longer once that is done; if it fails, the next look finds them again. Meanwhile
        whoever looks as well finds nothing.

        Raises:
            RpcUnavailable: No node answered.
        """
        if self._looking:
            yield Verdicts()
            return
        self._looking, self._looked_at = True, time.monotonic()
        try:
            verdicts = await self._compare(head)
            yield verdicts
            for entry in (*verdicts.final, *verdicts.vanished):
                # Perhaps it was tried again meanwhile, and what came of that is to be watched.
                if self.watched.get(entry.id) is entry:
                    del self.watched[entry.id]
        finally:
            self._looking = False

    async def _compare(self, head: int) -> Verdicts:
        entries = list(self.watched.values())
        await self._restore_block_hashes([entry for entry in entries if entry.block_hash is None])
        numbers = sorted({_block(entry) for entry in entries})
        requests: list[Request] = [("eth_getBlockByNumber", (hex(number), False)) for number in numbers]
        blocks = dict(zip(numbers, await self._rpc.batch(requests), strict=True))
        verdicts = Verdicts()
        for entry in entries:
            number = _block(entry)
            block = blocks[number]
            if isinstance(block, RpcError):
                continue
            if block is None or block["hash"] != entry.block_hash:
                # A node that lags behind does not know the block yet; only one that is past it can say that it is gone.
                if head >= number:
                    verdicts.vanished.append(entry)
            elif head - number >= self._confirmations:
                verdicts.final.append(entry)
        return verdicts

    async def _send_again(self, vanished: list[Entry]) -> None:
        """A reorganisation took evidence away: the same bytes go out once more, and the evidence is found anew."""
        moved, transactions = await self._store.write(lambda tx: self._reopen(tx, vanished))
        for entry in moved:
            log.warning("settlement %s was reorganised out of block %s", entry.id, entry.block_number)
            entry.state, entry.own = entry.state_without_evidence, True
            entry.block_number = entry.block_hash = None
            self._reopened(entry)
        for transaction in transactions:
            self._adopt(transaction)

    def _reopen(self, tx: Transaction, vanished: list[Entry]) -> tuple[list[Entry], list[Outgoing]]:
        ids = sorted({entry.transaction_id for entry in vanished if entry.transaction_id is not None})
        transactions = loading.with_entries(tx, outgoing.load(tx, ids, self._accounts), self._kinds)
        for transaction in transactions:
            outgoing.require_care(tx, transaction)
        gone: dict[str, Any] = {"transfer_log_index": None, "block_number": None}
        moved = [
            entry
            for entry in vanished
            if entry.state != "failed" and _stands_by(tx, entry)
            if states.move(tx, entry.id, entry.state_without_evidence, **gone)
        ]
        for entry in moved:
            on_reopened = self._kinds[entry.kind].on_reopened
            if on_reopened is not None:
                on_reopened(tx, entry.row() | {"state": entry.state_without_evidence, "block_number": None})
        for transaction in transactions:
            outgoing.exclude(tx, transaction)
        if any(entry.transaction_id is None for entry in moved):
            news.tell_queued(tx, self._chain_id)
        news.tell_decided(
            tx, self._chain_id, [news.Decision.of(entry, entry.state_without_evidence) for entry in moved]
        )
        return moved, transactions

    async def _restore_block_hashes(self, entries: list[Entry]) -> None:
        """After a restart only the place of an entry's evidence is known: read its receipt once more. One that stands elsewhere
        by now has no hash, is found vanished, and recorded anew: the books know a Transfer by its place."""
        requests: list[Request] = [("eth_getTransactionReceipt", (entry.transaction_hash,)) for entry in entries]
        for entry, receipt in zip(entries, await self._rpc.batch(requests), strict=True):
            if not isinstance(receipt, dict) or receipt["status"] != "0x1":
                continue
            places = {NO_LOG, *(int(log["logIndex"], 16) for log in receipt["logs"])}
            if int(receipt["blockNumber"], 16) == entry.block_number and entry.transfer_log_index in places:
                entry.block_hash = receipt["blockHash"]


def _stands_by(tx: Transaction, entry: Entry) -> bool:
    """Whether the row has the evidence that this process saw vanish: another process may have found another one since."""
    row = tx.execute("SELECT transaction_hash FROM settlement WHERE id=?", (entry.id,)).fetchone()
    return row is not None and row[0] == entry.transaction_hash


def _block(entry: Entry) -> int:
    """Of its evidence; of our reverted call where there is none."""
    number = entry.burnt_in_block if entry.block_number is None else entry.block_number
    assert number is not None
    return number
