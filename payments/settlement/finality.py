"""Watches mined transactions until they are deep enough, and notices those that a reorganisation took away."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from payments.chain.rpc import Request, Rpc, RpcError
from payments.settlement.outbox import Entry


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What one look at the chain found."""

    final: list[Entry] = field(default_factory=list)
    vanished: list[Entry] = field(default_factory=list)


class Finality:
    """Entries whose evidence stands in a block that is not deep enough yet.

    Args:
        confirmations: Blocks on top of the evidence's own after which it is final.
        interval_s: At most one look per this time: a chain that mines at once would make hundreds of blocks to look at.
    """

    def __init__(self, rpc: Rpc, confirmations: int, interval_s: float) -> None:
        self.watched: dict[str, Entry] = {}
        self._rpc = rpc
        self._confirmations = confirmations
        self._interval_s = interval_s
        self._looked_at = 0.0
        self._looking = False

    @property
    def due(self) -> bool:
        """Whether there is something to look at, and it is time."""
        return bool(self.watched) and time.monotonic() - self._looked_at >= self._interval_s

    def watch(self, entry: Entry) -> None:
        """Watch an entry with evidence until a look finds it final or vanished."""
        self.watched[entry.id] = entry

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
                self.watched.pop(entry.id, None)
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

    async def _restore_block_hashes(self, entries: list[Entry]) -> None:
        """After a restart only the place of an entry's evidence is known: read its receipt once more. One that stands elsewhere
        by now has no hash, is found vanished, and recorded anew: the books know a Transfer by its place."""
        requests: list[Request] = [("eth_getTransactionReceipt", (entry.transaction_hash,)) for entry in entries]
        for entry, receipt in zip(entries, await self._rpc.batch(requests), strict=True):
            if not isinstance(receipt, dict) or receipt["status"] != "0x1":
                continue
            places = {int(log["logIndex"], 16) for log in receipt["logs"]}
            if int(receipt["blockNumber"], 16) == entry.block_number and entry.transfer_log_index in places:
                entry.block_hash = receipt["blockHash"]


def _block(entry: Entry) -> int:
    """Of its evidence; of our reverted call where there is none."""
    number = entry.burnt_in_block if entry.block_number is None else entry.block_number
    assert number is not None
    return number
