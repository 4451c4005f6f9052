"""The settlement engine: takes orders, sees them through to evidence, and says what came of them.

Money moves in the ledger only here: when evidence is found, the settlement's state and the ledger's entries (by the callbacks
that the engine is given) are one commit. Everything that the engine knows is in the outbox; a restart carries on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from payments.chain.networks import Network
from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.chain.signers import WEI_PER_GWEI, FeeEstimate, Signer, least_loaded
from payments.chain.transactions import Fees
from payments.errors import SettlementUnavailable
from payments.settlement import outbox, states
from payments.settlement.courier import HEAD, Courier
from payments.settlement.finality import Finality
from payments.settlement.judge import Judge, LedgerCallback
from payments.settlement.orders import SettlementOrder
from payments.settlement.outbox import Entry
from payments.settlement.repairs import STALL_BLOCKS, Repairs
from payments.store import Store

log = logging.getLogger(__name__)

OUTCOMES_KEPT = 4_096
SLOT_WAIT_S = 10.0
"""How long a payment waits for a signer when all have as many transactions under way as they may."""


@dataclass(frozen=True, slots=True)
class SettlementOutcome:
    """What became of a settlement so far."""

    state: str
    """See `payments.settlement.states`."""
    transaction_hash: str | None
    block_number: int | None
    reason: str | None

    @property
    def paid(self) -> bool:
        """Whether there is evidence that it was paid."""
        return self.state in states.PAID

    @property
    def open(self) -> bool:
        """Whether its fate is unknown."""
        return self.state in states.OPEN


class Settlements:
    """All settlements on one network.

    Args:
        store: The database.
        rpc: The chain.
        network: Its chain id and block time.
        signer_keys: Private keys (hex) of the accounts that pay the gas of payments.
        treasury_key: Private key (hex) of `pay_to`, for refunds; may be one of `signer_keys`.
        confirmations: Blocks on top of the evidence's own after which it is final.
        housekeeping_s: How often deadlines and stalled signers are looked after.
        on_mined: Called in the unit that records evidence of a payment, with the settlement's row.
        on_failed: Called in the unit that records a payment's failure, with the settlement's row.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        network: Network,
        signer_keys: Sequence[str],
        *,
        on_mined: LedgerCallback,
        on_failed: LedgerCallback,
        treasury_key: str | None = None,
        confirmations: int = 2,
        housekeeping_s: float = 1.0,
    ) -> None:
        self.network = network
        self.signers = [Signer.from_hex(key) for key in signer_keys]
        by_address = {signer.address: signer for signer in self.signers}
        treasury = None if treasury_key is None else Signer.from_hex(treasury_key)
        # One account has one nonce sequence, whatever it is used for.
        self.treasury = None if treasury is None else by_address.setdefault(treasury.address, treasury)
        self.accounts = by_address
        self.submitted = 0
        self.paid = 0
        self.failed = 0
        self.reorganised = 0
        self.rpc = rpc
        self._store = store
        self._callbacks = {"payment": (on_mined, on_failed)}
        self._entries: dict[str, Entry] = {}
        self._outcomes: dict[str, SettlementOutcome] = {}
        self._slot_freed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._running = False
        self._housekeeping_s = housekeeping_s
        block_time_s = network.block_time_ms / 1000
        cap = Fees(network.max_fee_gwei * WEI_PER_GWEI, network.max_priority_fee_gwei * WEI_PER_GWEI)
        self.fees = FeeEstimate(max(block_time_s, 1.0), cap)
        self.courier = Courier(
            rpc,
            self.fees,
            network.block_time_ms,
            on_receipt=self._receipt,
            on_head=self._head_changed,
            on_trouble=lambda entry, trouble: self._repairs.report(entry, trouble),
        )
        self.finality = Finality(rpc, confirmations, housekeeping_s)
        self._judge = Judge(store, rpc, self._callbacks, closed=self._decided, spawn=self._spawn)
        self._repairs = Repairs(
            store,
            rpc,
            network.chain_id,
            patience_s=STALL_BLOCKS * max(block_time_s, housekeeping_s),
            fees=self.fees,
            courier=self.courier,
            entries=self._entries,
            adopt=self._adopt,
            expire=lambda entry, head: self._spawn(self._judge.look_elsewhere(entry, head, reverted=False)),
        )

    def handle_refunds(self, on_mined: LedgerCallback, on_failed: LedgerCallback) -> None:
        """Set the callbacks for orders of the kind ``refund``; before `start`."""
        self._callbacks["refund"] = (on_mined, on_failed)

    # --- for tenders --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Learn the chain's state and carry on with every open row. Once; after `stop` a new engine takes over.

        Raises:
            RpcUnavailable: No node answers.
            RpcError: A node refuses the simplest questions.
        """
        await self._ask_chain()
        rows = await self._store.read(
            lambda tx: outbox.load(
                tx, self.network.chain_id, self.accounts, ("queued", "submitted", "mined", "superseded")
            )
        )
        self._running = True
        for entry in rows:
            if entry.state in states.OPEN:
                self._resume(entry)
            elif entry.block_number is not None and (entry.state == "mined" or self._may_be_shallow(entry)):
                self.finality.watch(entry)
        self._spawn(self.courier.run())
        self._spawn(self._housekeeping())

    async def stop(self) -> None:
        """Stop working; open rows stay in the outbox for the next start."""
        self._running = False
        self.courier.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for entry in self._entries.values():
            _wake(entry)

    async def submit(self, order: SettlementOrder) -> None:
        """Write an order to the outbox, signed, and broadcast it. Submitting it again changes nothing.

        Returns when the row is durable and the broadcast under way. A caller that is cancelled meanwhile does not undo it.

        Raises:
            SettlementUnavailable: The engine is not running; nothing was written.
            StoreBusy: The database takes no more; nothing was written.
        """
        assert order.chain_id == self.network.chain_id
        if not self._running:
            raise SettlementUnavailable(
                "settlement_unavailable", "payments on this network are not being settled right now"
            )
        if order.id not in self._entries:
            await asyncio.shield(self._spawn(self._submit(order)))

    async def outcome(self, settlement_id: str, timeout_s: float) -> SettlementOutcome:
        """Wait until the fate of a settlement is known, or `timeout_s` is over: then its state is an open one.

        Raises:
            KeyError: There is no such settlement.
        """
        entry = self._entries.get(settlement_id)
        if entry is not None and entry.state in states.OPEN and self._running and timeout_s > 0:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry.waiters.append(waiter)
            timer = asyncio.get_running_loop().call_later(timeout_s, _finish, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                if waiter in entry.waiters:
                    entry.waiters.remove(waiter)
        if settlement_id in self._outcomes:
            return self._outcomes[settlement_id]
        entry = entry or await self._store.read(lambda tx: outbox.find(tx, settlement_id))
        if entry is None:
            raise KeyError(settlement_id)
        return _outcome(entry)

    def take_queued(self, settlement_id: str) -> None:
        """Take up an order that a unit has written with `outbox.enqueue`, now that it is durable."""
        if self._running:
            self._spawn(self._take_queued(settlement_id))

    @property
    def in_flight(self) -> int:
        """How many settlements are neither paid nor failed."""
        return len(self._entries)

    # --- submitting ---------------------------------------------------------------------------------------------------

    async def _submit(self, order: SettlementOrder) -> None:
        signer = await self._slot(order.kind)
        try:
            fees = self.fees.fees
            assert fees is not None
            entry = await self._store.write(lambda tx: outbox.submit(tx, order, signer, fees, self.courier.head))
        except BaseException:
            self._free(signer)
            raise
        if entry is None:
            self._free(signer)
            return
        self.submitted += 1
        self._entries[entry.id] = entry
        self.courier.carry(entry)

    def _adopt(self, entry: Entry) -> None:
        """An entry that is signed and durable."""
        self._entries[entry.id] = entry
        if entry.signer is not None:
            entry.signer.in_flight += 1
        self.courier.carry(entry)

    async def _take_queued(self, settlement_id: str) -> None:
        entry = await self._store.read(lambda tx: outbox.find(tx, settlement_id))
        if entry is not None and entry.state == "queued" and entry.id not in self._entries:
            self._resume(entry)

    def _resume(self, entry: Entry) -> None:
        if entry.state == "queued":
            self._entries[entry.id] = entry
            self._spawn(self._assign(entry))
            return
        if entry.signer is None:
            # Its key was taken out of the configuration; the bytes are signed and may be mined all the same.
            log.warning("settlement %s was signed by an account that is no longer configured", entry.id)
        self._adopt(entry)

    async def _assign(self, entry: Entry) -> None:
        signer = await self._slot(entry.kind)
        fees = self.fees.fees
        assert fees is not None
        try:
            moved = await self._store.write(lambda tx: outbox.assign(tx, entry, signer, fees, self.courier.head))
        except BaseException:
            self._free(signer)
            raise
        if moved:
            self.courier.carry(entry)
        else:
            self._free(signer)
            self._entries.pop(entry.id, None)

    async def _slot(self, kind: str) -> Signer:
        candidates = self.signers
        if kind == "refund":
            if self.treasury is None:
                raise SettlementUnavailable("no_treasury_key", "refunds need the treasury's key")
            candidates = [self.treasury]
        try:
            async with asyncio.timeout(SLOT_WAIT_S if kind == "payment" else None):
                while (signer := least_loaded(candidates)) is None:
                    self._slot_freed.clear()
                    await self._slot_freed.wait()
        except TimeoutError:
            raise SettlementUnavailable(
                "settlement_busy", "too many payments are waiting for this network; send the same payment again"
            ) from None
        signer.in_flight += 1
        return signer

    def _free(self, signer: Signer) -> None:
        signer.in_flight -= 1
        self._slot_freed.set()

    # --- results ------------------------------------------------------------------------------------------------------

    def _receipt(self, entry: Entry, receipt: dict[str, Any]) -> None:
        if entry.id in self._entries:
            self._judge.receipt(entry, receipt, self.courier.head)
        else:
            self._repairs.release_nonce(entry)

    def _decided(self, entry: Entry) -> None:
        """The judge has made its decision durable."""
        if self._entries.pop(entry.id, None) is None:
            return
        self._outcomes[entry.id] = _outcome(entry)
        if len(self._outcomes) > OUTCOMES_KEPT:
            del self._outcomes[next(iter(self._outcomes))]
        if entry.state == "failed":
            self.failed += 1
        elif entry.kind != "filler":
            self.paid += 1
            self.finality.watch(entry)
        if entry.id in self.courier.carried:
            # Decided by another transaction than ours, or by the clock: those after ours still wait for its nonce.
            self._repairs.hold_nonce(entry)
        if entry.signer is not None:
            self._free(entry.signer)
        _wake(entry)

    # --- the chain moves on -------------------------------------------------------------------------------------------

    def _head_changed(self, head: int) -> None:
        if self.finality.due:
            self._spawn(self._look_at_finality(head))

    async def _look_at_finality(self, head: int) -> None:
        try:
            verdicts = await self.finality.look(head)
        except RpcUnavailable as error:
            log.warning("cannot look at confirmations: %s", error)
            return
        final = [entry for entry in verdicts.final if entry.state == "mined"]
        if final:
            await self._store.write(lambda tx: [states.move(tx, entry.id, "final") for entry in final])
        for entry in verdicts.final:
            if entry.id in self._outcomes and entry.state == "mined":
                entry.state = "final"
                self._outcomes[entry.id] = _outcome(entry)
        for entry in verdicts.vanished:
            await self._send_again(entry)

    async def _send_again(self, entry: Entry) -> None:
        """A reorganisation took the evidence away: the same bytes go out once more, and the evidence is found anew."""
        log.warning("settlement %s was reorganised out of block %s", entry.id, entry.block_number)
        moved = await self._store.write(
            lambda tx: states.move(tx, entry.id, "submitted", transfer_log_index=None, block_number=None)
        )
        if not moved:
            return
        entry.state, entry.block_number, entry.block_hash = "submitted", None, None
        entry.first_sent = entry.last_sent = 0.0
        self._outcomes.pop(entry.id, None)
        # Counted once nobody is told the old outcome any more.
        self.reorganised += 1
        self._resume(entry)

    async def _housekeeping(self) -> None:
        """What no block announces: deadlines, stalled signers, depth on a chain that nobody else uses."""
        while self._running:
            await asyncio.sleep(self._housekeeping_s)
            try:
                await self._repairs.round()
                if self.finality.due:
                    await self._look_at_finality(int(await self.rpc.call(*HEAD), 16))
            except (RpcUnavailable, RpcError) as error:
                log.warning("housekeeping of settlements must wait: %s", error)
            except Exception:
                # Nothing that housekeeping meets may end it: without it stalled signers stay stalled.
                log.exception("housekeeping of settlements failed")

    def _may_be_shallow(self, entry: Entry) -> bool:
        assert entry.block_number is not None
        return self.courier.head - entry.block_number <= 64

    async def _ask_chain(self) -> None:
        accounts = list(self.accounts.values())
        requests: list[Request] = [HEAD, FeeEstimate.REQUEST]
        requests += [("eth_getTransactionCount", (account.address, "pending")) for account in accounts]
        head, fee_history, *counts = await self.rpc.ask(requests)
        self.courier.head = int(head, 16)
        self.fees.read(fee_history)
        for account, count in zip(accounts, counts, strict=True):
            account.nonce_floor = int(count, 16)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("settlement work failed", exc_info=error)


def _outcome(entry: Entry) -> SettlementOutcome:
    return SettlementOutcome(entry.state, entry.transaction_hash, entry.block_number, entry.reason)


def _finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _wake(entry: Entry) -> None:
    waiters, entry.waiters = entry.waiters, []
    for waiter in waiters:
        _finish(waiter)
