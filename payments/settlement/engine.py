"""The settlement engine: takes orders, sees them through to evidence, and says what came of them.

Money moves in the ledger only here: when evidence is found, the settlement's state and the ledger's entries (by the callbacks
that the engine is given) are one commit. Everything that the engine knows is in the outbox; a restart carries on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from payments.chain.gas import BytesGas
from payments.chain.networks import Network
from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.chain.signers import WEI_PER_GWEI, FeeEstimate, Signer
from payments.chain.transactions import Fees
from payments.errors import SettlementUnavailable
from payments.settlement import loading, outbox, outgoing, states
from payments.settlement.courier import HEAD, Courier
from payments.settlement.dispatcher import Dispatcher
from payments.settlement.finality import Finality, Verdicts
from payments.settlement.judge import Judge
from payments.settlement.orders import Kind, SettlementOrder
from payments.settlement.outbox import Entry
from payments.settlement.outcomes import Outcomes, SettlementOutcome, wait_for, wake
from payments.settlement.outgoing import Outgoing
from payments.settlement.repairs import STALL_BLOCKS, Repairs
from payments.settlement.reverts import Reverts
from payments.settlement.second_looks import SecondLooks
from payments.settlement.witnesses import Witnesses
from payments.store import Store, StoreBusy, Transaction

log = logging.getLogger(__name__)

LOOK_BACK_S = 900  # older is no authorization that a payer signed for a quote of ours which is still good
WITNESS_RETRY_S = 0.2  # before a receipt that no second node confirms is asked for again


class Settlements:
    """All settlements on one network. Kinds of orders are registered with `handle` before `start`.

    Args:
        store: The database.
        rpc: The chain.
        network: Its chain id and block time.
        signer_keys: Private keys (hex) of the accounts that pay the gas of settlements.
        treasury_key: Private key (hex) of `pay_to`, for what only the treasury can send; may be one of `signer_keys`.
        batch_contract: The operator's own; None settles everything singly.
        confirmations: Blocks on top of the evidence's own after which it is final.
        cross_check_nano_usd: What settles more than that at once must be in the chain for two nodes, where there are several;
            None trusts each.
        housekeeping_s: How often deadlines and stalled signers are looked after.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        network: Network,
        signer_keys: Sequence[str],
        *,
        treasury_key: str | None = None,
        batch_contract: str | None = None,
        confirmations: int = 2,
        cross_check_nano_usd: int | None = None,
        housekeeping_s: float = 1.0,
    ) -> None:
        self.network = network
        self.batch_contract = None if batch_contract is None else batch_contract.lower()
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
        self.transactions = 0
        """Sent, each with one or many settlements."""
        self.rpc = rpc
        self._store = store
        self._kinds: dict[str, Kind] = {}
        self._entries: dict[str, Entry] = {}
        self._transactions: dict[str, Outgoing] = {}
        self.outcomes = Outcomes()
        self._taking: dict[str, asyncio.Task[Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._running = False
        self._housekeeping_s = housekeeping_s
        block_time_s = network.block_time_ms / 1000
        cap = Fees(network.max_fee_gwei * WEI_PER_GWEI, network.max_priority_fee_gwei * WEI_PER_GWEI)
        self.fees = FeeEstimate(max(block_time_s, 1.0), cap)
        self._bytes_gas = BytesGas()
        self._reverts = Reverts()
        self._witnesses = Witnesses(rpc, network, cross_check_nano_usd)
        self.courier = Courier(
            rpc,
            self.fees,
            network.block_time_ms,
            on_receipt=self._receipt,
            on_head=self._head_changed,
            on_trouble=lambda transaction, trouble: self._repairs.report(transaction, trouble),
        )
        self._dispatcher = Dispatcher(
            store,
            network.chain_id,
            {"settler": self.signers, "treasury": [] if self.treasury is None else [self.treasury]},
            self._kinds,
            self.fees,
            bytes_gas=self._bytes_gas,
            batch_contract=self.batch_contract,
            block_time_ms=network.block_time_ms,
            head=lambda: self.courier.head,
            adopt=self._carry,
        )
        self._judge = Judge(
            store,
            rpc,
            self._kinds,
            witnesses=self._witnesses,
            closed=self._decided,
            requeued=self._dispatcher.take,
            spawn=self._spawn,
        )
        self.finality = Finality(rpc, confirmations, housekeeping_s)
        self._repairs = Repairs(
            store,
            rpc,
            network.chain_id,
            patience_s=STALL_BLOCKS * max(block_time_s, housekeeping_s),
            fees=self.fees,
            bytes_gas=self._bytes_gas,
            courier=self.courier,
            entries=self._entries,
            transactions=self._transactions,
            adopt=self._adopt,
            abandon=self._included,
            expire=lambda entry, head: self._spawn(
                self._judge.look_elsewhere(entry, head, sender=None, reverted=False)
            ),
        )
        self._second_looks = SecondLooks(
            store,
            rpc,
            network.chain_id,
            self._judge,
            self._entries,
            self._transactions,
            carry=self.courier.carry,
            head=lambda: self.courier.head,
        )

    def handle(self, name: str, kind: Kind) -> None:
        """Say how orders of a kind are carried, proven and booked; before `start`."""
        assert not self._running
        assert name not in self._kinds
        self._kinds[name] = kind

    # --- for tenders --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Learn the chain's state and carry on with every open row. Once; after `stop` a new engine takes over.

        Raises:
            RpcUnavailable: No node answers.
            RpcError: A node refuses the simplest questions.
        """
        await self._ask_chain()
        loaded = await self._store.write(lambda tx: loading.load(tx, self.network.chain_id, self.accounts, self._kinds))
        self._reverts.recall(loaded.reverts)
        self._running = True
        for entry in loaded.entries:
            if entry.state in states.OPEN:
                self._entries[entry.id] = entry
                if entry.state == "queued" and entry.waits_for is None:
                    self._dispatcher.take(entry)
            elif entry.block_number is not None and (entry.own or self.courier.head - entry.block_number <= 64):
                self.finality.watch(entry)
        for transaction in loaded.transactions:
            if transaction.signer is None:
                log.warning("transaction %s was signed by an account that is no longer configured", transaction.id)
            self._adopt(transaction)
        self._spawn(self.courier.run())
        self._spawn(self._dispatcher.run("settler"))
        self._spawn(self._dispatcher.run("treasury"))
        self._spawn(self._housekeeping())

    async def stop(self) -> None:
        """Stop working; open rows stay in the outbox for the next start."""
        self._running = False
        self.courier.stop()
        self._dispatcher.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for entry in self._entries.values():
            wake(entry)

    def admit(self, payer: str) -> None:
        """Ask before a payment of `payer` (lower-case hex) is taken on; costs nothing.

        Raises:
            PaymentRefused: ``payments_reverted``: too many payments, of this payer or of all, failed on chain lately.
        """
        self._reverts.admit(payer)

    async def submit(self, order: SettlementOrder) -> None:
        """Write an order to the outbox, signed, and broadcast it. Submitting it again changes nothing.

        Returns when the row is durable and the broadcast under way. A caller that is cancelled meanwhile does not undo it.

        Raises:
            SettlementUnavailable: The engine is not running, or too much waits for it; nothing was written.
            StoreBusy: The database takes no more; nothing was written.
        """
        assert order.chain_id == self.network.chain_id
        if not self._running:
            raise _not_running()
        if order.id not in self._entries:
            await self._dispatcher.submit(order)

    async def book_executed(self, order: SettlementOrder) -> bool:
        """Book an order whose authorization was used before we could: if it paid us, it is paid, whoever submitted it.

        Returns:
            False, with nothing written, if nothing of the last `LOOK_BACK_S` proves that.

        Raises:
            SettlementUnavailable: The engine is not running, or the chain cannot be asked; nothing was written.
            StoreBusy: The database takes nothing now; nothing was written.
        """
        if not self._running:
            raise _not_running()
        try:
            head = int(await self.rpc.call(*HEAD), 16)
            from_block = max(head - LOOK_BACK_S * 1000 // self.network.block_time_ms, 0)
            return await asyncio.shield(self._spawn(self._judge.book_executed(order, from_block, head)))
        except (RpcUnavailable, RpcError) as error:
            raise SettlementUnavailable(
                "chain_unavailable", "the chain cannot be asked; send the same payment again"
            ) from error

    async def outcome(self, settlement_id: str, timeout_s: float) -> SettlementOutcome:
        """Wait until the fate of a settlement is known, or `timeout_s` is over: then its state is an open one.

        Raises:
            KeyError: There is no such settlement.
        """
        if timeout_s > 0 and (taking := self._taking.get(settlement_id)) is not None:
            await asyncio.wait({taking})
        entry = self._entries.get(settlement_id)
        if entry is not None and entry.state in states.OPEN and self._running and timeout_s > 0:
            await wait_for(entry, timeout_s)
        decided = self.outcomes.get(settlement_id)
        if decided is not None:
            return decided
        entry = entry or await self._store.read(lambda tx: outbox.find(tx, settlement_id))
        if entry is None:
            raise KeyError(settlement_id)
        return SettlementOutcome.of(entry)

    async def give_up(self, settlement_id: str, reason: str) -> None:
        """End an order that waits for something which will not happen, unless it is carried by now."""
        await self._judge.give_up(settlement_id, self._entries.get(settlement_id), reason)

    def take_queued(self, settlement_id: str) -> None:
        """Take up an order that a unit has written, or let go (`outbox.enqueue`, `release`), now that it is durable."""
        if self._running and settlement_id not in self._taking:
            task = self._taking[settlement_id] = self._spawn(self._take_queued(settlement_id))
            task.add_done_callback(lambda _: self._taking.pop(settlement_id))

    @property
    def in_flight(self) -> int:
        """How many settlements are neither paid nor failed."""
        return len(self._entries)

    # --- transactions -------------------------------------------------------------------------------------------------

    def _carry(self, transaction: Outgoing) -> None:
        """A transaction that the dispatcher made durable; its signer's slot is taken already."""
        self.transactions += 1
        self.submitted += len(transaction.entries)
        for entry in transaction.entries:
            self._entries[entry.id] = entry
        self._transactions[transaction.id] = transaction
        self.courier.carry(transaction)

    def _adopt(self, transaction: Outgoing) -> None:
        """A transaction that was durable before, or fills a gap; who waits for what it carries knows the entry that is here."""
        carried = self._transactions.get(transaction.id, transaction)
        known, watched = self._entries, self.finality.watched
        carried.entries = [known.get(each.id) or watched.get(each.id, each) for each in carried.entries]
        if carried is not transaction:
            return
        self._transactions[transaction.id] = transaction
        if transaction.signer is not None:
            transaction.signer.in_flight += 1
        self.courier.carry(transaction)

    def _included(self, transaction: Outgoing) -> None:
        """A transaction needs no more carrying."""
        self.courier.drop(transaction)
        if self._transactions.pop(transaction.id, None) is not None and transaction.signer is not None:
            self._dispatcher.freed(transaction.signer)

    def _receipt(self, transaction: Outgoing, receipt: dict[str, Any]) -> None:
        if self._witnesses.needed_for(*(entry.order for entry in transaction.entries)):
            self._spawn(self._hear_witnesses(transaction, receipt))
            return
        self._judge.receipt(transaction, receipt)
        self._included(transaction)

    async def _hear_witnesses(self, transaction: Outgoing, receipt: dict[str, Any]) -> None:
        """Take a receipt that a second node has too; one that it has not is asked for again."""
        try:
            if await self._witnesses.confirm(receipt):
                if transaction.id in self._transactions:
                    self._judge.receipt(transaction, receipt)
                    self._included(transaction)
                return
            log.warning("one node alone has a receipt of %s", transaction.hashes[-1])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            log.exception("a node sent a receipt of %s that cannot be read", transaction.hashes[-1])
        await asyncio.sleep(WITNESS_RETRY_S)
        if transaction.id in self._transactions:
            self.courier.carry(transaction)

    async def _take_queued(self, settlement_id: str) -> None:
        entry = await self._store.read(lambda tx: outbox.find(tx, settlement_id))
        known = self._entries.get(settlement_id)
        if entry is not None and entry.state == "queued" and (known is None or known.waits_for is not None):
            known = self._entries.setdefault(entry.id, entry)
            known.waits_for = entry.waits_for
            if known.waits_for is None:
                self._dispatcher.take(known)

    def _decided(self, entry: Entry) -> None:
        """The judge has made its decision durable."""
        if entry.state != "failed" or entry.burnt:
            # In another block a call that reverted may succeed.
            self.finality.watch(entry)
        before = self.outcomes.get(entry.id)
        if self._entries.pop(entry.id, None) is None and before is not None and before.state == entry.state:
            return  # two ways led to the same decision
        self.outcomes.keep(entry)
        if entry.state != "failed":
            self.paid += 1
            self._reverts.paid(entry.order.payer)
        else:
            self.failed += 1
            if entry.burnt:
                self._reverts.reverted(entry.order.payer)
        wake(entry)

    # --- the chain moves on -------------------------------------------------------------------------------------------

    def _head_changed(self, head: int) -> None:
        if self.finality.due:
            self._spawn(self._look_at_finality(head))

    async def _look_at_finality(self, head: int) -> None:
        try:
            async with self.finality.look(head) as verdicts:
                await self._record_verdicts(verdicts)
        except (RpcUnavailable, StoreBusy) as error:
            log.warning("confirmations must wait: %s", error)

    async def _record_verdicts(self, verdicts: Verdicts) -> None:
        final = [entry for entry in verdicts.final if entry.state == "mined"]
        if final:
            await self._store.write(lambda tx: [states.move(tx, entry.id, "final") for entry in final])
        for entry in final:
            entry.state = "final"
            self.outcomes.keep(entry)
        if verdicts.vanished:
            await self._send_again(verdicts.vanished)

    async def _send_again(self, vanished: Sequence[Entry]) -> None:
        """A reorganisation took evidence away: the same bytes go out once more, and the evidence is found anew."""

        def unit(tx: Transaction) -> tuple[list[Entry], list[Outgoing]]:
            gone: dict[str, Any] = {"transfer_log_index": None, "block_number": None}
            paid = [entry for entry in vanished if entry.state != "failed"]
            moved = [entry for entry in paid if states.move(tx, entry.id, entry.state_without_evidence, **gone)]
            ids = {entry.transaction_id for entry in vanished if entry.transaction_id is not None}
            transactions = loading.with_entries(tx, outgoing.load(tx, sorted(ids), self.accounts)) if ids else []
            for transaction in transactions:
                outgoing.exclude(tx, transaction)
            return moved, transactions

        moved, transactions = await self._store.write(unit)
        for entry in moved:
            log.warning("settlement %s was reorganised out of block %s", entry.id, entry.block_number)
            entry.state, entry.own = entry.state_without_evidence, True
            entry.block_number = entry.block_hash = None
            self._entries[entry.id] = entry
            self.outcomes.forget(entry)
            # Counted once nobody is told the old outcome any more.
            self.reorganised += 1
            if entry.state == "queued":
                self._dispatcher.take(entry)
        for transaction in transactions:
            self._adopt(transaction)

    async def _housekeeping(self) -> None:
        """What no block announces: deadlines, stalled signers, depth on a chain that nobody else uses."""
        while self._running:
            await asyncio.sleep(self._housekeeping_s)
            try:
                await self._repairs.round()
                await self._second_looks.round()
                if self._bytes_gas.stale:
                    self._bytes_gas.read(*await self.rpc.batch([BytesGas.REQUEST]))
                if self.finality.due:
                    await self._look_at_finality(int(await self.rpc.call(*HEAD), 16))
            except (RpcUnavailable, RpcError) as error:
                log.warning("housekeeping of settlements must wait: %s", error)
            except Exception:
                # Nothing that housekeeping meets may end it: without it stalled signers stay stalled.
                log.exception("housekeeping of settlements failed")

    async def _ask_chain(self) -> None:
        accounts = list(self.accounts.values())
        requests: list[Request] = [HEAD, FeeEstimate.REQUEST]
        requests += [("eth_getTransactionCount", (account.address, "pending")) for account in accounts]
        head, fee_history, *counts = await self.rpc.ask(requests)
        self._bytes_gas.read(*await self.rpc.batch([BytesGas.REQUEST]))
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


def _not_running() -> SettlementUnavailable:
    return SettlementUnavailable("settlement_unavailable", "payments on this network are not being settled right now")
