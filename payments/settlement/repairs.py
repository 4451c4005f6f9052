"""What keeps a signer's queue of transactions moving: deadlines, fee bumps, and gaps in its nonces.

A chain executes an account's transactions strictly by nonce, so one that cannot be mined holds up all that follow. Each round
looks at what the chain waits for from every account, and provides it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial

from payments.chain.rpc import Request, Rpc
from payments.chain.signers import FeeEstimate, Signer
from payments.settlement import outbox, states
from payments.settlement.courier import Courier
from payments.settlement.outbox import Entry
from payments.store import Store

log = logging.getLogger(__name__)

STALL_BLOCKS = 10
"""A transaction that is not mined in so many blocks needs help."""
DEADLINE_MARGIN_S = 15
"""The chain's clock is asked this long after a deadline, in case ours is ahead."""
NONCE_LOST_ROUNDS = 5
"""Rounds in which a nonce must be seen consumed by an unknown transaction before the entry gets a new one."""

Expire = Callable[[Entry, int], object]


class Repairs:
    """Looks after the accounts of one network.

    Args:
        patience_s: How long a transaction may stay unmined before its fees are raised.
        entries: The engine's open entries by id; those made here are put there by `adopt`.
        adopt: Takes a new entry (one that fills a gap) into the engine's care.
        expire: Starts the decision of an entry whose deadline is past at a block.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        chain_id: int,
        *,
        patience_s: float,
        fees: FeeEstimate,
        courier: Courier,
        entries: Mapping[str, Entry],
        adopt: Callable[[Entry], None],
        expire: Expire,
    ) -> None:
        self._store, self._rpc, self._chain_id = store, rpc, chain_id
        self._patience_s = patience_s
        self._fees, self._courier = fees, courier
        self._entries = entries
        self._adopt, self._expire = adopt, expire
        self._holding: dict[str, Entry] = {}
        """Decided entries whose nonce the chain still waits for."""
        self._troubles: dict[str, str] = {}
        self._lost: dict[str, int] = {}
        self._expiring: set[str] = set()

    def report(self, entry: Entry, trouble: str) -> None:
        """A node refused an entry's transaction; see `Courier`."""
        self._troubles[entry.id] = trouble

    def hold_nonce(self, entry: Entry) -> None:
        """Keep sending the transaction of an entry that is decided: those after it wait for its nonce."""
        self._holding[entry.id] = entry
        self._courier.carry(entry)

    def release_nonce(self, entry: Entry) -> None:
        """Its nonce is consumed."""
        self._holding.pop(entry.id, None)
        self._courier.drop(entry)

    async def round(self) -> None:
        """Look at everything once.

        Raises:
            RpcUnavailable: No node answered.
            RpcError: A node refused a question.
        """
        await self._look_at_deadlines()
        now = time.monotonic()
        stuck = {
            entry.signer.address: entry.signer
            for entry in (*self._entries.values(), *self._holding.values())
            if entry.signer is not None and (entry.id in self._troubles or _age(entry, now) > self._patience_s / 3)
        }
        if not stuck:
            return
        signers = list(stuck.values())
        requests: list[Request] = [("eth_getTransactionCount", (signer.address, "latest")) for signer in signers]
        for signer, count in zip(signers, await self._rpc.ask(requests), strict=True):
            await self._look_at_signer(signer, int(count, 16), now)

    async def _look_at_deadlines(self) -> None:
        now = time.time()
        self._expiring &= self._entries.keys()
        expired = [
            entry
            for entry in self._entries.values()
            if entry.state == "submitted" and 0 < entry.valid_before < now - DEADLINE_MARGIN_S
        ]
        if not expired:
            return
        block = await self._rpc.call("eth_getBlockByNumber", ("latest", False))
        for entry in expired:
            if int(block["timestamp"], 16) > entry.valid_before and entry.id not in self._expiring:
                self._expiring.add(entry.id)
                self._expire(entry, int(block["number"], 16))

    async def _look_at_signer(self, signer: Signer, chain_nonce: int, now: float) -> None:
        for entry in list(self._holding.values()):
            if entry.signer is signer and entry.signer_nonce < chain_nonce:
                self.release_nonce(entry)
        mine = [
            entry
            for entry in (*self._entries.values(), *self._holding.values())
            if entry.signer is signer and entry.state != "queued"
        ]
        for entry in mine:
            if entry.signer_nonce < chain_nonce:
                await self._look_at_consumed(entry)
        waiting = sorted((entry for entry in mine if entry.signer_nonce >= chain_nonce), key=lambda e: e.signer_nonce)
        if not waiting:
            return
        if waiting[0].signer_nonce > chain_nonce:
            await self._fill(signer, chain_nonce, waiting[0].signer_nonce)
            return
        first = waiting[0]
        trouble = self._troubles.pop(first.id, None)
        if trouble == "underpriced" or _age(first, now) > self._patience_s:
            await self._bump(first)

    async def _look_at_consumed(self, entry: Entry) -> None:
        """The nonce is used. By one of our transactions: its receipt will come. By a stranger with our key: start anew.

        Signing again is safe only because the chain proves that no earlier transaction of the entry can be mined any more.
        """
        requests: list[Request] = [("eth_getTransactionReceipt", (each,)) for each in entry.hashes]
        if any(reply is not None for reply in await self._rpc.batch(requests)):
            self._lost.pop(entry.id, None)
            return
        self._lost[entry.id] = self._lost.get(entry.id, 0) + 1
        if self._lost[entry.id] < NONCE_LOST_ROUNDS or entry.state != "submitted" or self._fees.fees is None:
            return
        assert entry.signer is not None
        pending = int(await self._rpc.call("eth_getTransactionCount", (entry.signer.address, "pending")), 16)
        entry.signer.nonce_floor = max(entry.signer.nonce_floor or 0, pending)
        del self._lost[entry.id]
        self._troubles.pop(entry.id, None)
        log.warning(
            "somebody else used nonce %d of %s; %s gets a new one", entry.signer_nonce, entry.signer.address, entry.id
        )
        fees = self._fees.fees
        await self._store.write(lambda tx: outbox.move_to_new_nonce(tx, entry, fees))
        self._courier.carry(entry)

    async def _fill(self, signer: Signer, start: int, end: int) -> None:
        """Provide what the chain waits for below our lowest open transaction: stored bytes, or an empty transaction."""
        fees = self._fees.fees
        if fees is None:
            return
        stored = await self._store.read(lambda tx: outbox.load_decided(tx, self._chain_id, signer, start))
        by_nonce = {entry.signer_nonce: entry for entry in stored}
        for nonce in range(start, min(end, start + 16)):
            if nonce in by_nonce:
                self.hold_nonce(by_nonce[nonce])
                continue
            log.warning("nonce %d of %s is a gap; filling it", nonce, signer.address)
            unit = partial(
                outbox.fill_gap, chain_id=self._chain_id, signer=signer, nonce=nonce, fees=fees, head=self._courier.head
            )
            self._adopt(await self._store.write(unit))

    async def _bump(self, entry: Entry) -> None:
        fees = self._fees.raised(entry.fees)
        if fees is None:
            log.warning("transaction of %s stalls, and offers already what we offer at most", entry.id)
            return
        if entry.state not in states.OPEN and entry.id not in self._holding:
            return
        await self._store.write(lambda tx: outbox.replace(tx, entry, fees))
        log.warning("transaction of %s stalls; sent again for %d wei a unit of gas", entry.id, fees.max_fee)
        self._courier.carry(entry)


def _age(entry: Entry, now: float) -> float:
    """Seconds since a node took the entry's newest transaction; 0 before."""
    return now - entry.first_sent if entry.first_sent else 0.0
