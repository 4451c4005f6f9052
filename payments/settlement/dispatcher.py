"""Puts orders into transactions: many in one where the batch contract can carry them, each with its own otherwise.

Whatever waits when a signer is free goes out in one commit, which writes the orders, signs their transaction and stores it.
While a transaction is on its way, what comes next gathers for a moment, as small packets do on a network (RFC 896): a chain
that mines at once is never waited for, and one with blocks of seconds carries many payments for the gas of few.

A process that sends with no account now writes its orders all the same, as queued: whoever does send takes them up together
with its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from payments.chain.batches import batch_gas_limit, encode_batch
from payments.chain.gas import BytesGas
from payments.chain.signers import FeeEstimate, Signer, least_loaded
from payments.chain.transactions import Call, Fees
from payments.errors import SettlementUnavailable
from payments.leases import LeaseLost
from payments.settlement import outbox, outgoing
from payments.settlement.orders import Kind, SettlementOrder
from payments.settlement.outbox import Entry
from payments.settlement.outgoing import Outgoing
from payments.store import Store, StoreBusy, Transaction

log = logging.getLogger(__name__)

BATCH_GAS_MAX = 15_000_000
"""Of one transaction: half of the smallest block in use, and about a hundred payments."""
HOLD_PART_OF_BLOCK = 20
HOLD_S_MAX = 0.1
"""How long an order waits for company while another transaction is on its way: a twentieth of a block, so that few miss one for
it."""
SLOT_WAIT_S = 10.0
"""How long a payment waits for a signer when all have as many transactions under way as they may."""
QUEUED_MAX = 2_000
"""Orders that wait for other processes; more are turned away."""
ROUND_MAX = 256
"""Orders in one commit."""
RETRY_S = 1.0

Role = Literal["settler", "treasury"]


@dataclass(slots=True, eq=False)
class _Waiting:
    """An order that is written nowhere yet, and who waits for that; or a queued entry of the outbox."""

    order: SettlementOrder
    gas: int
    """The most that its call may use."""
    entry: Entry | None
    future: asyncio.Future[None] | None
    since: float
    timer: asyncio.TimerHandle | None = None
    unwanted: bool = False
    """Whether what it was for is gone, so that it was not written."""
    apart: bool = False
    """Whether it was in a round that could not be written, perhaps because of it: it gets one of its own."""

    @property
    def alone(self) -> bool:
        """Whether a transaction that carried it among others reverted."""
        return self.entry is not None and self.entry.attempts > 0


@dataclass(slots=True)
class _Load:
    """What one transaction is going to carry."""

    signer: Signer
    items: list[_Waiting]
    through: str | None
    """The batch contract, lower-case hex, that makes the calls where there are several, or that alone can make the one; None if
    there is none."""
    gas: int
    """Of all calls, at the most."""


@dataclass(slots=True)
class _Lane:
    """The orders that one role signs."""

    signers: list[Signer]
    """All that the configuration names."""
    waiting: deque[_Waiting] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def open(self) -> bool:
        """Whether this process can sign for it now."""
        return any(signer.mine for signer in self.signers)


class Dispatcher:
    """Puts the orders of one network into transactions.

    Args:
        signers: For each role, the accounts that sign; an empty list if there is none.
        bytes_gas: What the chain charges for bytes.
        batch_contract: Of the operator, lower-case hex; None sends everything singly.
        from_block: Tells from where evidence is searched of what is written now.
        adopt: Takes over a signed and durable transaction and the new entries that it carries.
        forget: Called with a queued entry that another process was faster to take.
        lost: Called with the name of an account's lease that turns out to be another process's.
        spawn: Starts background work that the engine waits for when it stops.
    """

    def __init__(
        self,
        store: Store,
        chain_id: int,
        signers: Mapping[Role, list[Signer]],
        kinds: Mapping[str, Kind],
        fees: FeeEstimate,
        *,
        bytes_gas: BytesGas,
        batch_contract: str | None,
        block_time_ms: int,
        from_block: Callable[[], int],
        adopt: Callable[[Outgoing], None],
        forget: Callable[[Entry], None],
        lost: Callable[[str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._store, self._chain_id, self._kinds, self._fees = store, chain_id, kinds, fees
        self._bytes_gas = bytes_gas
        self._batch_contract = batch_contract
        self._hold_s = min(block_time_ms / 1000 / HOLD_PART_OF_BLOCK, HOLD_S_MAX)
        self._from_block, self._adopt, self._forget = from_block, adopt, forget
        self._lost, self._spawn = lost, spawn
        self._lanes = {role: _Lane(accounts) for role, accounts in signers.items()}
        self._running = True

    async def submit(self, order: SettlementOrder) -> None:
        """Write an order and put it on its way, or leave that to another process; return when it is durable. The same id again
        changes nothing.

        Raises:
            SettlementUnavailable: No signer became free in time, or nobody says what gas costs; nothing was written.
            StoreBusy: The database takes no more; nothing was written.
        """
        lane = self._lane(order)
        if not lane.open:
            from_block = self._from_block()
            await self._store.write(lambda tx: self._leave(tx, order, from_block))
            return
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        item = _Waiting(order, self._kinds[order.kind].gas(order), None, future, loop.time())
        item.timer = loop.call_later(SLOT_WAIT_S, self._give_up, lane, item)
        lane.waiting.append(item)
        lane.changed.set()
        # Whoever hangs up does not take back what may be written by now.
        await asyncio.shield(future)

    @property
    def served(self) -> set[str]:
        """The kinds of orders that this process can sign for now."""
        return {name for name, kind in self._kinds.items() if self._lanes[kind.signed_by].open}

    def take(self, entry: Entry) -> None:
        """Put a queued entry of the outbox on its way, however long that takes."""
        lane, gas = self._lane(entry.order), self._kinds[entry.kind].gas(entry.order)
        lane.waiting.append(_Waiting(entry.order, gas, entry, None, asyncio.get_running_loop().time()))
        lane.changed.set()

    def freed(self, signer: Signer) -> None:
        """A transaction of `signer` is in a block, or will never be."""
        signer.in_flight = max(signer.in_flight - 1, 0)
        self.changed()

    def changed(self) -> None:
        """Accounts became this process's, or another's: what nobody here can sign for is left to others.
        Or the fees are known now."""
        for lane in self._lanes.values():
            if not lane.open and lane.waiting:
                unwritten = [item for item in lane.waiting if item.entry is None]
                lane.waiting.clear()
                self._spawn(self._leave_all(unwritten))
            lane.changed.set()

    async def run(self, role: Role) -> None:
        """Serve one role's orders until cancelled."""
        lane = self._lanes[role]
        while True:
            while not self._can_send(lane) or self._should_hold(lane):
                await self._wait(lane)
            await self._round(lane)

    def stop(self) -> None:
        """Turn away whoever waits."""
        self._running = False
        for lane in self._lanes.values():
            for item in lane.waiting:
                _settle(item, _stopped())
            lane.waiting.clear()

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _lane(self, order: SettlementOrder) -> _Lane:
        return self._lanes[self._kinds[order.kind].signed_by]

    def _give_up(self, lane: _Lane, item: _Waiting) -> None:
        if item in lane.waiting:
            lane.waiting.remove(item)
            _settle(item, _busy() if self._fees.known else _dark())

    def _can_send(self, lane: _Lane) -> bool:
        return bool(lane.waiting) and self._fees.known and least_loaded(lane.signers) is not None

    def _should_hold(self, lane: _Lane) -> bool:
        """Whether what waits may gain from waiting on: company is welcome, and may come before this chain's next block."""
        if self._batch_contract is None or not any(signer.in_flight for signer in lane.signers):
            return False
        oldest = lane.waiting[0]
        if not self._kinds[oldest.order.kind].batchable or oldest.alone or self._gas_of(lane.waiting) > BATCH_GAS_MAX:
            return False
        return asyncio.get_running_loop().time() - oldest.since < self._hold_s

    async def _wait(self, lane: _Lane) -> None:
        lane.changed.clear()
        timer = None
        if self._can_send(lane):
            timer = asyncio.get_running_loop().call_at(lane.waiting[0].since + self._hold_s, lane.changed.set)
        await lane.changed.wait()
        if timer is not None:
            timer.cancel()

    def _leave(self, tx: Transaction, order: SettlementOrder, from_block: int) -> None:
        """Write an order for whichever process can sign it."""
        if outbox.waiting(tx, self._chain_id, QUEUED_MAX) >= QUEUED_MAX:
            raise _busy()
        if not self._kinds[order.kind].still_wanted(tx, order):
            raise _unwanted()
        outbox.enqueue(tx, order, from_block)

    async def _leave_all(self, items: list[_Waiting]) -> None:
        from_block = self._from_block()
        for number, item in enumerate(items):
            try:
                await self._store.write(lambda tx, order=item.order: self._leave(tx, order, from_block))  # type: ignore[misc]
            except asyncio.CancelledError:
                for left in items[number:]:
                    _settle(left, _stopped())
                raise
            except Exception as error:  # noqa: BLE001 - handed to the order's own caller
                _settle(item, error)
            else:
                _settle(item, None)

    def _gas_of(self, items: deque[_Waiting]) -> int:
        return sum(item.gas for item in items)

    # --- loading ------------------------------------------------------------------------------------------------------

    async def _round(self, lane: _Lane) -> None:
        loads = self._load(lane)
        if not loads:
            return
        fees, from_block = self._fees.fees, self._from_block()
        assert fees is not None  # see `_can_send`: once known, they are
        try:
            sent = await self._store.write(lambda tx: [self._write(tx, load, fees, from_block) for load in loads])
        except LeaseLost as lost:
            self._put_back(lane, loads)
            self._lost(lost.name)
            return
        except (Exception, asyncio.CancelledError) as error:
            self._failed(lane, loads, error)
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        for load, transaction in zip(loads, sent, strict=True):
            for item in load.items:
                if item.entry is not None and (transaction is None or item.entry.transaction_id != transaction.id):
                    self._forget(item.entry)
            if transaction is None:
                self.freed(load.signer)
            else:
                self._adopt(transaction)
            for item in load.items:
                _settle(item, _unwanted() if item.unwanted else None)

    def _load(self, lane: _Lane) -> list[_Load]:
        """Take from the lane what the free signers can carry now."""
        loads: list[_Load] = []
        batches: dict[str | None, _Load] = {}
        taken = 0
        while lane.waiting and taken < ROUND_MAX:
            item = lane.waiting[0]
            if item.entry is not None and item.entry.state != "queued":
                lane.waiting.popleft()  # it was decided while it waited
                continue
            if item.apart and loads:
                break
            kind = self._kinds[item.order.kind]
            through = kind.through(item.order) or self._batch_contract
            joins = through is not None and kind.batchable and not item.alone
            batch = batches.get(through) if joins else None
            if batch is not None and batch.gas + item.gas <= BATCH_GAS_MAX:
                batch.items.append(item)
                batch.gas += item.gas
            else:
                signer = least_loaded(lane.signers)
                if signer is None:
                    break
                signer.in_flight += 1
                load = _Load(signer, [item], through, item.gas)
                loads.append(load)
                if joins:
                    batches[through] = load
            lane.waiting.popleft()
            taken += 1
            if item.timer is not None:
                item.timer.cancel()
            if item.apart:
                break
        return loads

    def _write(self, tx: Transaction, load: _Load, fees: Fees, from_block: int) -> Outgoing | None:
        """One transaction with all that it carries; None if all of that was written before."""
        transaction_id = outgoing.new_id()
        entries: list[Entry] = []
        for item in load.items:
            entry = item.entry
            if entry is None:
                item.unwanted = not self._kinds[item.order.kind].still_wanted(tx, item.order)
                if item.unwanted:
                    continue
                entry = outbox.submit(tx, item.order, transaction_id, len(entries), from_block)
            elif not outbox.assign(tx, entry, transaction_id, len(entries), from_block):
                entry = None
            if entry is not None:
                entries.append(entry)
        if not entries:
            return None
        calls = [outbox.call_for(entry.order, self._kinds[entry.kind].gas(entry.order)) for entry in entries]
        single = len(calls) == 1 and self._kinds[entries[0].kind].through(entries[0].order) is None
        call = calls[0] if single else _batch(calls, load.through)
        call = replace(call, gas=call.gas + self._bytes_gas.besides(len(call.data)))
        transaction = outgoing.write(
            tx,
            id=transaction_id,
            chain_id=self._chain_id,
            kind="single" if single else "batch",
            call=call,
            signer=load.signer,
            fees=fees,
        )
        outbox.carry(tx, transaction, entries)
        return transaction

    def _put_back(self, lane: _Lane, loads: list[_Load]) -> None:
        """Nothing was written, and it is all tried again."""
        loop = asyncio.get_running_loop()
        items = [item for load in loads for item in load.items]
        for item in items:
            if item.entry is not None:
                outbox.unassign(item.entry)
            else:
                item.timer = loop.call_later(SLOT_WAIT_S, self._give_up, lane, item)
        lane.waiting.extendleft(reversed(items))
        for load in loads:
            self.freed(load.signer)

    def _failed(self, lane: _Lane, loads: list[_Load], error: BaseException) -> None:
        """Nothing was written. If one of them may be the reason, try each by itself; else tell those who wait, and try the
        queued ones again."""
        items = [item for load in loads for item in load.items]
        if not isinstance(error, StoreBusy | asyncio.CancelledError):
            log.error("writing %d orders failed", len(items), exc_info=error)
            if len(items) > 1:
                for item in items:
                    item.apart = True
                self._put_back(lane, loads)
                return
        for load in loads:
            self.freed(load.signer)
        for item in items:
            _settle(item, _stopped() if isinstance(error, asyncio.CancelledError) else error)
        queued = [item for item in items if item.entry is not None]
        for item in queued:
            assert item.entry is not None
            outbox.unassign(item.entry)
        if queued and self._running:
            asyncio.get_running_loop().call_later(RETRY_S, self._again, lane, queued)

    def _again(self, lane: _Lane, items: list[_Waiting]) -> None:
        if self._running:
            lane.waiting.extend(items)
            self.changed()


def _batch(calls: Sequence[Call], contract: str | None) -> Call:
    assert contract is not None
    return Call(contract, encode_batch(calls), batch_gas_limit(calls))


def _busy() -> SettlementUnavailable:
    message = "too many payments are waiting for this network; send the same payment again"
    return SettlementUnavailable("settlement_busy", message)


def _dark() -> SettlementUnavailable:
    message = "no node of this network says what gas costs; send the same payment again later"
    return SettlementUnavailable("settlement_unavailable", message)


def _unwanted() -> SettlementUnavailable:
    message = "this instance was away for too long, and the request was given up; send the same payment again"
    return SettlementUnavailable("request_interrupted", message)


def _stopped() -> SettlementUnavailable:
    return SettlementUnavailable("settlement_unavailable", "payments on this network are not being settled right now")


def _settle(item: _Waiting, error: BaseException | None) -> None:
    if item.timer is not None:
        item.timer.cancel()
    if item.future is None or item.future.done():
        return
    if error is None:
        item.future.set_result(None)
    else:
        item.future.set_exception(error)
