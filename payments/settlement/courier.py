"""Takes signed transactions to the chain and brings back their receipts. Knows nothing of money or of the database.

One loop for all transactions: each turn is one JSON-RPC batch that carries the new transactions, the head's number and the
receipts that may be there by now. It wakes for new work; between blocks it asks only for the head's number.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.chain.signers import FeeEstimate
from payments.settlement.outgoing import Outgoing

log = logging.getLogger(__name__)

HEAD: Request = ("eth_blockNumber", ())
EAGER_POLL_S = 0.0015
"""Between polls while the chain mines at once (a development chain)."""
EAGER_PATIENCE_S = 0.05
"""A transaction that took longer than this was not mined at once."""
POLLS_PER_BLOCK = 40
POLL_MIN_S, POLL_MAX_S = 0.005, 0.05
RETRY_S = 1.0
"""Between broadcasts of a transaction that a node refuses, and between turns while no node answers."""
BLOCK_MAX = 2**53
"""Beyond it is nonsense, which would not even fit the database."""
SENDS_MAX = 64
"""Transactions in one turn: Anvil's automine stalls with more at once."""

ReceiptHandler = Callable[[Outgoing, dict[str, Any]], None]
TroubleHandler = Callable[[Outgoing, str], None]


class Courier:
    """Broadcasts transactions and watches for their receipts until each is dropped.

    Args:
        on_receipt: Called with a transaction and the receipt of one of its forms, once; the transaction is then dropped.
        on_head: Called with the block number whenever it changes.
        on_trouble: Called with a transaction and one of ``nonce_used``, ``nonce_ahead``, ``underpriced``, ``no_gas``.
    """

    def __init__(
        self,
        rpc: Rpc,
        fees: FeeEstimate,
        block_time_ms: int,
        *,
        on_receipt: ReceiptHandler,
        on_head: Callable[[int], None],
        on_trouble: TroubleHandler,
    ) -> None:
        self.head = 0
        self.broadcasts = 0
        self.refusals = 0
        """Broadcasts that a node refused for another reason than knowing the transaction."""
        self.turns = 0
        self.carried: dict[str, Outgoing] = {}
        self._rpc = rpc
        self._fees = fees
        self._poll_s = min(max(block_time_ms / 1000 / POLLS_PER_BLOCK, POLL_MIN_S), POLL_MAX_S)
        self._resend_s = max(3 * block_time_ms / 1000, 2.0)
        self._eager = block_time_ms < 1000
        self._probe = False
        self._outgoing: dict[str, Outgoing] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._on_receipt, self._on_head, self._on_trouble = on_receipt, on_head, on_trouble

    def carry(self, outgoing: Outgoing) -> None:
        """Broadcast a transaction's newest form in the next turn, and watch for its receipt from then on."""
        self.carried[outgoing.id] = outgoing
        self._outgoing[outgoing.id] = outgoing
        outgoing.next_poll = 0.0
        outgoing.polled_at_head = -1
        self._wake.set()

    def drop(self, outgoing: Outgoing) -> None:
        """Forget a transaction."""
        self.carried.pop(outgoing.id, None)
        self._outgoing.pop(outgoing.id, None)

    def stop(self) -> None:
        """End `run` after the turn that is under way."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Work until stopped."""
        while True:
            await self._sleep(self._pause())
            if self._stopping:
                return
            try:
                await self.turn()
            except RpcUnavailable as error:
                log.warning("no node answers: %s", error)
                await asyncio.sleep(RETRY_S)
            except Exception:
                # A reply that nobody foresaw must not end the only loop that settles payments.
                log.exception("a turn of the settlement loop failed")
                await asyncio.sleep(RETRY_S)

    async def turn(self) -> None:
        """One round trip: send what is new, learn the head, poll what is due."""
        now = time.monotonic()
        for outgoing in self.carried.values():
            # Sent again now and then: nodes drop transactions from their pools without a word.
            if outgoing.last_sent and now - outgoing.last_sent > (self._resend_s if outgoing.first_sent else RETRY_S):
                self._outgoing[outgoing.id] = outgoing
        sends = list(self._outgoing.values())[:SENDS_MAX]
        for outgoing in sends:
            del self._outgoing[outgoing.id]
        sending = {outgoing.id for outgoing in sends}
        polls = [
            (outgoing, transaction_hash)
            for outgoing in self.carried.values()
            if outgoing.id not in sending and self._due(outgoing, now)
            for transaction_hash in outgoing.hashes
        ]
        requests: list[Request] = [HEAD]
        if self._fees.stale:
            requests.append(FeeEstimate.REQUEST)
        first_send = len(requests)
        requests += [("eth_sendRawTransaction", ("0x" + outgoing.raw.hex(),)) for outgoing in sends]
        requests += [("eth_getTransactionReceipt", (transaction_hash,)) for _, transaction_hash in polls]
        try:
            replies = await self._rpc.batch(requests)
            self._take(replies, sends, polls, first_send)
        except Exception:
            # They may have arrived or not: the same bytes again do no harm.
            self._outgoing = {
                outgoing.id: outgoing for outgoing in sends if outgoing.id in self.carried
            } | self._outgoing
            raise

    def _take(
        self, replies: Sequence[Any], sends: list[Outgoing], polls: list[tuple[Outgoing, str]], first_send: int
    ) -> None:
        self.turns += 1
        if first_send == 2:
            self._fees.read(replies[1])
        self._probe = False
        polled_head = self.head
        self._take_head(replies[0])
        now = time.monotonic()
        for outgoing, reply in zip(sends, replies[first_send:], strict=False):
            self._sent(outgoing, reply, now)
        for (outgoing, _), reply in zip(polls, replies[first_send + len(sends) :], strict=True):
            self._polled(outgoing, reply, now, polled_head)

    def _take_head(self, reply: Any) -> None:
        if isinstance(reply, RpcError):
            return
        head = int(reply, 16)
        if head > BLOCK_MAX:
            raise ValueError(f"a node says that its head is block {reply[:40]}")
        if head != self.head:
            self.head = head
            self._on_head(head)

    def _sent(self, outgoing: Outgoing, reply: Any, now: float) -> None:
        self.broadcasts += 1
        outgoing.last_sent = now
        # Looked at after each broadcast, whatever the head does: a node may know a block before the receipts in it.
        outgoing.polled_at_head = -1
        trouble = _trouble(reply) if isinstance(reply, RpcError) else None
        outgoing.next_poll = now if trouble is None else now + self._poll_s
        if trouble is None:
            outgoing.first_sent = outgoing.first_sent or now
            self._probe = True
            return
        if trouble == "refused":
            self.refusals += 1
            log.warning("a node refused transaction %s of %s: %s", outgoing.hashes[-1], outgoing.id, reply)
        self._on_trouble(outgoing, trouble)

    def _polled(self, outgoing: Outgoing, reply: Any, now: float, polled_head: int) -> None:
        if isinstance(reply, dict) and reply.get("blockNumber"):
            if outgoing.id not in self.carried:
                return
            try:
                self._on_receipt(outgoing, reply)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                # Not what a receipt looks like: it is asked for again.
                log.exception("a node sent a receipt of %s that cannot be read", outgoing.hashes[-1])
                outgoing.polled_at_head, outgoing.next_poll = polled_head, now + RETRY_S
                return
            self.drop(outgoing)
            self._eager = now - outgoing.first_sent < EAGER_PATIENCE_S if outgoing.first_sent else self._eager
            return
        if isinstance(reply, RpcError):
            outgoing.polled_at_head = -1
        else:
            outgoing.polled_at_head = polled_head
        age = now - (outgoing.first_sent or now)
        outgoing.next_poll = now + min(max(EAGER_POLL_S, age / 4), self._poll_s)
        if self._eager and age > EAGER_PATIENCE_S:
            self._eager = False

    def _due(self, outgoing: Outgoing, now: float) -> bool:
        return now >= outgoing.next_poll if self._eager else outgoing.polled_at_head != self.head

    def _pause(self) -> float | None:
        """Seconds until the next turn unless woken; None: sleep until woken."""
        if self._outgoing:
            return 0.0
        if not self.carried:
            return None
        if self._eager or self._probe:
            now = time.monotonic()
            return max(min(outgoing.next_poll for outgoing in self.carried.values()) - now, EAGER_POLL_S)
        if any(outgoing.polled_at_head != self.head for outgoing in self.carried.values()):
            return 0.0
        return self._poll_s

    async def _sleep(self, seconds: float | None) -> None:
        if seconds == 0.0:
            self._wake.clear()
            return
        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._wake.set)
        await self._wake.wait()
        self._wake.clear()
        if timer is not None:
            timer.cancel()


def _trouble(error: RpcError) -> str | None:
    """What a refusal to take a transaction means; None if the node has it already. Nodes differ in their words."""
    text = error.message.lower()
    if "already known" in text or "already imported" in text or "known transaction" in text or "alreadyknown" in text:
        return None
    if "nonce too low" in text or "nonce is too low" in text or "oldnonce" in text:
        return "nonce_used"
    if "nonce too high" in text or "nonce is too high" in text or "nonce gap" in text:
        return "nonce_ahead"
    if "underpriced" in text or "less than block base fee" in text or "fee too low" in text:
        return "underpriced"
    if "insufficient funds" in text:
        return "no_gas"
    return "refused"
