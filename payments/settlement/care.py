"""What one process has in its care of a network's settlements: the transactions of its accounts, and the entries that it can
sign for. It sees them through to evidence; whatever it knows is in the outbox, where the next process finds it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from payments.chain.gas import BytesGas
from payments.chain.networks import Network
from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.chain.signers import FeeEstimate, Signer
from payments.leases import LeaseLost, require, signer_name
from payments.settlement import loading, states
from payments.settlement.courier import HEAD, Courier
from payments.settlement.dispatcher import Dispatcher, Role
from payments.settlement.finality import Finality
from payments.settlement.judge import Judge
from payments.settlement.late import LateExecutions
from payments.settlement.news import Decision
from payments.settlement.orders import Kind
from payments.settlement.outbox import Entry
from payments.settlement.outcomes import Outcomes
from payments.settlement.outgoing import Outgoing
from payments.settlement.repairs import STALL_BLOCKS, Repairs
from payments.settlement.retries import Retries
from payments.settlement.reverts import Reverts
from payments.settlement.second_looks import SecondLooks
from payments.settlement.witnesses import Witnesses
from payments.store import Store, StoreBusy, Transaction

log = logging.getLogger(__name__)

WITNESS_RETRY_S = 0.2
"""Before a receipt that no second node confirms is asked for again."""
SLACK_BLOCKS = 32
"""Evidence may be so much older than an order's row: others may execute an authorization between our look at it and the row."""
REFRESH_S = 10.0
"""Between looks for what has fallen to this process, such as what a dead one was watching."""


class Care:
    """The entries and transactions of one engine.

    Args:
        store: The database.
        rpc: The chain.
        network: Its chain id and block time.
        signers: For each role, the accounts that sign for it.
        kinds: What proves orders and what books them, by name.
        outcomes: Who waits in this process.
        fees: What a unit of gas costs.
        batch_contract: The operator's own, lower-case hex; None settles everything singly.
        confirmations: Blocks on top of the evidence's own after which it is final.
        witnesses: Confirm what a single node says of large amounts.
        housekeeping_s: How often deadlines and stalled signers are looked after.
        caretaker: Tells whether this process looks after what nobody else does.
        lost: Called with the name of a lease that turns out to be another process's.
        spawn: Starts background work that ends with the engine.
    """

    def __init__(
        self,
        store: Store,
        rpc: Rpc,
        network: Network,
        signers: Mapping[Role, list[Signer]],
        kinds: Mapping[str, Kind],
        outcomes: Outcomes,
        fees: FeeEstimate,
        *,
        batch_contract: str | None,
        confirmations: int,
        witnesses: Witnesses,
        housekeeping_s: float,
        caretaker: Callable[[], bool],
        lost: Callable[[str], None],
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
    ) -> None:
        self.entries: dict[str, Entry] = {}
        """Open ones by id."""
        self.transactions: dict[str, Outgoing] = {}
        """Not known to be in a block, by id."""
        self.paid = self.failed = self.reorganised = self.sent = 0
        self.reverts = Reverts()
        self._store, self._rpc, self._chain_id = store, rpc, network.chain_id
        self._accounts = {signer.address: signer for role in signers.values() for signer in role}
        self._kinds, self._outcomes, self._fees = kinds, outcomes, fees
        self._witnesses = witnesses
        self._caretaker, self._lost, self._spawn = caretaker, lost, spawn
        self._bytes_gas = BytesGas()
        self._refreshed_at = 0.0
        self.courier = Courier(
            rpc,
            fees,
            network.block_time_ms,
            on_receipt=self._receipt,
            on_head=self._head_changed,
            on_trouble=lambda transaction, trouble: self._repairs.report(transaction, trouble),
        )
        self.dispatcher = Dispatcher(
            store,
            network.chain_id,
            signers,
            kinds,
            fees,
            bytes_gas=self._bytes_gas,
            batch_contract=batch_contract,
            block_time_ms=network.block_time_ms,
            from_block=lambda: self.from_block,
            adopt=self._carry,
            forget=self._forget,
            lost=lost,
            spawn=spawn,
        )
        self.judge = Judge(
            store,
            rpc,
            network.chain_id,
            kinds,
            batch_contract=batch_contract,
            witnesses=witnesses,
            closed=self._decided,
            requeued=self._requeued,
            forget=self._forget,
            lost=lost,
            spawn=spawn,
        )
        self.finality = Finality(
            store,
            rpc,
            network.chain_id,
            self._accounts,
            kinds,
            confirmations=confirmations,
            interval_s=housekeeping_s,
            finalised=outcomes.keep,
            reopened=self._reopened,
            adopt=self._adopt,
        )
        self._repairs = Repairs(
            store,
            rpc,
            network.chain_id,
            kinds,
            patience_s=STALL_BLOCKS * max(network.block_time_ms / 1000, housekeeping_s),
            fees=fees,
            bytes_gas=self._bytes_gas,
            courier=self.courier,
            entries=self.entries,
            transactions=self.transactions,
            adopt=self._adopt,
            abandon=self._included,
            expire=lambda entry, head: spawn(self.judge.look_elsewhere(entry, head, sender=None, reverted=False)),
        )
        self._second_looks = SecondLooks(
            store,
            rpc,
            network.chain_id,
            self.judge,
            kinds,
            self.entries,
            self.transactions,
            carry=self.courier.carry,
            ours=self._ours,
        )
        retries = Retries(store, rpc, network.chain_id, kinds, self._requeued)
        self._late = LateExecutions(store, rpc, network.chain_id, self.judge, kinds, retries, confirmations, self._ours)

    @property
    def from_block(self) -> int:
        """From where evidence of an order is searched that is written now."""
        return max(self.courier.head - SLACK_BLOCKS, 0)

    def start(self) -> None:
        """Work until the tasks are cancelled."""
        self._spawn(self.courier.run())
        self._spawn(self.dispatcher.run("settler"))
        self._spawn(self.dispatcher.run("treasury"))

    def stop(self) -> None:
        """Take nothing more, and send nothing more."""
        self.courier.stop()
        self.dispatcher.stop()

    async def round(self) -> None:
        """What no block announces: deadlines, stalled signers, depth on a chain that nobody else uses. What one of these meets
        keeps none of the others from being looked after, now or in the next round."""
        for part in (
            self._repairs.round,
            self._second_looks.round,
            self._late.round,
            self._measure,
            self._look_deeper,
            self._look_for_what_fell_to_us,
        ):
            try:
                await part()
            except LeaseLost as lost:
                self._lost(lost.name)
            except (RpcUnavailable, RpcError, StoreBusy) as error:
                log.warning("housekeeping of settlements must wait: %s", error)
            except Exception:
                # Without it stalled signers stay stalled.
                log.exception("housekeeping of settlements failed")

    async def _measure(self) -> None:
        if not self._fees.known:
            # The courier keeps them new while anything is sent; before they are known nothing is.
            self._fees.read(*await self._rpc.batch([FeeEstimate.REQUEST]))
            self.dispatcher.changed()
        if self._bytes_gas.stale:
            self._bytes_gas.read(*await self._rpc.batch([BytesGas.REQUEST]))

    async def _look_deeper(self) -> None:
        if self.finality.due:
            await self.finality.round(int(await self._rpc.call(*HEAD), 16))

    async def _look_for_what_fell_to_us(self) -> None:
        if self._store.shared and time.monotonic() - self._refreshed_at > REFRESH_S:
            self.courier.head = int(await self._rpc.call(*HEAD), 16)
            await self.refresh()

    # --- accounts -----------------------------------------------------------------------------------------------------

    async def ask_chain(self, signers: Sequence[Signer]) -> None:
        """Learn the head, the fees, and the nonces of these accounts.

        Raises:
            RpcUnavailable, RpcError: No node answers, or one refuses the simplest questions.
        """
        requests: list[Request] = [HEAD, FeeEstimate.REQUEST]
        requests += [("eth_getTransactionCount", (signer.address, "pending")) for signer in signers]
        head, fee_history, *counts = await self._rpc.ask(requests)
        self._bytes_gas.read(*await self._rpc.batch([BytesGas.REQUEST]))
        self.courier.head = int(head, 16)
        self._fees.read(fee_history)
        for signer, count in zip(signers, counts, strict=True):
            signer.nonce_floor = int(count, 16)

    async def take_over(self, signers: list[Signer]) -> None:
        """Accounts are this process's from here on: what others left under way of them goes on.

        Raises:
            LeaseLost: They are not.
            RpcUnavailable, RpcError: The chain cannot be asked.
        """
        await self.ask_chain(signers)
        accounts = {signer.address: signer for signer in signers}

        def unit(tx: Transaction) -> list[Outgoing]:
            for address in accounts:
                require(tx, signer_name(self._chain_id, address), tx.instance)
            return loading.under_way(tx, self._chain_id, accounts, self._kinds)

        transactions = await self._store.write(unit)
        for signer in signers:
            signer.mine, signer.in_flight = True, 0
        for transaction in transactions:
            self._adopt(transaction)
        self.dispatcher.changed()
        self._refreshed_at = 0.0

    def let_go(self, signer: Signer) -> None:
        """An account is another process's from here on."""
        for transaction in [each for each in self.transactions.values() if each.signer is signer]:
            self.courier.drop(transaction)
            del self.transactions[transaction.id]
            for entry in transaction.entries:
                self.entries.pop(entry.id, None)
        self.dispatcher.changed()
        served = self.dispatcher.served
        for entry in [each for each in self.entries.values() if each.state == "queued" and each.kind not in served]:
            del self.entries[entry.id]
        # What is still to be watched is read again.
        self.finality.watched.clear()
        self._refreshed_at = 0.0

    async def refresh(self) -> None:
        """Read what no event of this process announces: what has fallen to it, and what of others' news was missed."""
        self._refreshed_at = time.monotonic()
        head = self.courier.head
        paid, reverts = await self._store.read(
            lambda tx: (
                loading.paid(tx, self._chain_id, self._ours(tx), self._kinds, head),
                loading.reverts(tx, self._chain_id),
            )
        )
        self.finality.watch_also(paid)
        self.reverts.recall(reverts)
        if not self._caretaker():
            return
        keyless = await self._store.write(lambda tx: loading.orphaned(tx, self._chain_id, self._accounts, self._kinds))
        for transaction in keyless:
            if transaction.id not in self.transactions:
                log.warning("transaction %s was signed by an account whose key nobody has now", transaction.id)
            self._adopt(transaction)

    def _ours(self, tx: Transaction) -> loading.Ours:
        mine = frozenset(signer.address for signer in self._accounts.values() if signer.mine)
        return loading.ours(tx, self._chain_id, mine, caretaker=self._caretaker())

    # --- transactions -------------------------------------------------------------------------------------------------

    def _carry(self, transaction: Outgoing) -> None:
        """A transaction that the dispatcher made durable; its signer's slot is taken already."""
        self.sent += 1
        if transaction.id in self.transactions or (transaction.signer is not None and not transaction.signer.mine):
            return  # lost at this very moment: whoever has the account finds it
        for entry in transaction.entries:
            self.entries[entry.id] = entry
        self.transactions[transaction.id] = transaction
        self.courier.carry(transaction)

    def _adopt(self, transaction: Outgoing) -> None:
        """A transaction that was durable before, or fills a gap."""
        carried = self.transactions.get(transaction.id, transaction)
        carried.entries = [self._as_known(entry) for entry in carried.entries]
        if carried is not transaction:
            return
        self.entries |= {entry.id: entry for entry in transaction.entries if entry.state in states.OPEN}
        self.transactions[transaction.id] = transaction
        if transaction.signer is not None:
            transaction.signer.in_flight += 1
        self.courier.carry(transaction)

    def _as_known(self, entry: Entry) -> Entry:
        known = self.entries.get(entry.id) or self.finality.watched.get(entry.id)
        return entry if known is None or known.transaction_id != entry.transaction_id else known

    def _included(self, transaction: Outgoing) -> None:
        """A transaction needs no more carrying."""
        self.courier.drop(transaction)
        if self.transactions.pop(transaction.id, None) is not None and transaction.signer is not None:
            self.dispatcher.freed(transaction.signer)

    def _receipt(self, transaction: Outgoing, receipt: dict[str, Any]) -> None:
        if self._witnesses.needed_for(*(entry.order for entry in transaction.entries)):
            self._spawn(self._hear_witnesses(transaction, receipt))
            return
        self.judge.receipt(transaction, receipt)
        self._included(transaction)

    async def _hear_witnesses(self, transaction: Outgoing, receipt: dict[str, Any]) -> None:
        """Take a receipt that a second node has too; one that it has not is asked for again."""
        try:
            if await self._witnesses.confirm(receipt):
                if transaction.id in self.transactions:
                    self.judge.receipt(transaction, receipt)
                    self._included(transaction)
                return
            log.warning("one node alone has a receipt of %s", transaction.hashes[-1])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            log.exception("a node sent a receipt of %s that cannot be read", transaction.hashes[-1])
        await asyncio.sleep(WITNESS_RETRY_S)
        if transaction.id in self.transactions:
            self.courier.carry(transaction)

    # --- entries ------------------------------------------------------------------------------------------------------

    def take_queued(self, entry: Entry) -> None:
        """Something is queued, and waits for nothing else, that this process may not know; if it cannot sign for it, another
        one will find it."""
        if entry.kind in self.dispatcher.served and entry.id not in self.entries:
            self.dispatcher.take(entry)
            self.entries[entry.id] = entry

    def queued(self) -> list[str]:
        """The settlements that this process believes to be queued."""
        return [entry.id for entry in self.entries.values() if entry.state == "queued"]

    def found(self, row: Entry) -> None:
        """The row of something that somebody waits for here, or that was queued when this process saw it last."""
        entry = self.entries.get(row.id)
        if entry is not None and entry.state == "queued" and row.state != "queued":
            entry.state = row.state
            del self.entries[row.id]
        if row.state not in states.OPEN and row.id not in self.entries:
            self._outcomes.keep(row)

    def decided_elsewhere(self, decision: Decision) -> None:
        """Another process has decided."""
        if decision.state in states.OPEN:
            self._outcomes.forget(decision.settlement_id)
        elif decision.state != "failed":
            self.reverts.paid(decision.payer)
        elif decision.burnt:
            self.reverts.reverted(decision.payer)

    def _forget(self, entry: Entry) -> None:
        """Another process sends it, or has decided it."""
        if self.entries.get(entry.id) is entry:
            del self.entries[entry.id]

    def _requeued(self, entry: Entry) -> None:
        """The batch that carried it reverted, or its call would succeed by now."""
        self._outcomes.forget(entry.id)
        self.entries.pop(entry.id, None)
        self.take_queued(entry)

    def _decided(self, entry: Entry) -> None:
        """The judge has made its decision durable."""
        if entry.state != "failed" or entry.burnt:
            # In another block a call that reverted may succeed.
            self.finality.watch(entry)
        before = self._outcomes.get(entry.id)
        if self.entries.pop(entry.id, None) is None and before is not None and before.state == entry.state:
            return  # two ways led to the same decision
        if entry.state != "failed":
            self.paid += 1
            self.reverts.paid(entry.order.payer)
        else:
            self.failed += 1
            if entry.burnt:
                self.reverts.reverted(entry.order.payer)
        self._outcomes.keep(entry)

    def _reopened(self, entry: Entry) -> None:
        """A reorganisation took its evidence away."""
        self._outcomes.forget(entry.id)
        # Counted once nobody is told the old outcome any more.
        self.reorganised += 1
        if entry.state == "queued":
            self.take_queued(entry)
        else:
            self.entries[entry.id] = entry

    def _head_changed(self, head: int) -> None:
        if self.finality.due:
            self._spawn(self._look_at_finality(head))

    async def _look_at_finality(self, head: int) -> None:
        try:
            await self.finality.round(head)
        except LeaseLost as lost:
            self._lost(lost.name)
