"""The settlement engine: takes orders, sees them through to evidence, and says what came of them.

Money moves in the ledger only here: when evidence is found, the settlement's state and the ledger's entries (by the callbacks
that the engine is given) are one commit. Everything that the engine knows is in the outbox; a restart carries on from there.

Any number of processes share a database and their accounts: see `payments.settlement.ownership`. An engine looks after the
transactions of the accounts that are its own, and after the orders that it can sign for; of all others it only tells whoever
waits in this process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from payments.chain.networks import Network
from payments.chain.rpc import Rpc, RpcError, RpcUnavailable
from payments.chain.signers import WEI_PER_GWEI, FeeEstimate, Signer
from payments.chain.transactions import Fees
from payments.errors import SettlementUnavailable
from payments.leases import Leases
from payments.settlement import outbox
from payments.settlement.care import Care
from payments.settlement.courier import HEAD
from payments.settlement.lookout import Lookout
from payments.settlement.orders import Kind, SettlementOrder
from payments.settlement.outcomes import Outcomes, SettlementOutcome
from payments.settlement.ownership import Ownership
from payments.settlement.witnesses import Witnesses
from payments.store import Store

log = logging.getLogger(__name__)

LOOK_BACK_S = 900
"""Older than this is no authorization that a payer signed for a quote of ours which is still good."""


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
        look_s: How often the database is looked into for what other processes did, should their news be lost.
        leases: Of this process, under way; it makes some of its own if there are none.
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
        look_s: float = 1.0,
        leases: Leases | None = None,
    ) -> None:
        self.network = network
        self.batch_contract = None if batch_contract is None else batch_contract.lower()
        self.signers = [Signer.from_hex(key) for key in signer_keys]
        by_address = {signer.address: signer for signer in self.signers}
        treasury = None if treasury_key is None else Signer.from_hex(treasury_key)
        # One account has one nonce sequence, whatever it is used for.
        self.treasury = None if treasury is None else by_address.setdefault(treasury.address, treasury)
        self.accounts = by_address
        self.rpc = rpc
        self.outcomes = Outcomes()
        self._store = store
        self._kinds: dict[str, Kind] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._running = False
        self._housekeeping_s = housekeeping_s
        cap = Fees(network.max_fee_gwei * WEI_PER_GWEI, network.max_priority_fee_gwei * WEI_PER_GWEI)
        self.fees = FeeEstimate(max(network.block_time_ms / 1000, 1.0), cap)
        held = leases or Leases(store, store.instance)
        assert held.owner == store.instance, "units ask for the leases of the process that they run in"
        self._own_leases = held if leases is None else None
        self._ownership = Ownership(
            store,
            held,
            network.chain_id,
            self.accounts.values(),
            self.signers,
            take=self._take_over,
            drop=lambda signer: self._care.let_go(signer),
        )
        self._care = Care(
            store,
            rpc,
            network,
            {"settler": self.signers, "treasury": [] if self.treasury is None else [self.treasury]},
            self._kinds,
            self.outcomes,
            self.fees,
            batch_contract=self.batch_contract,
            confirmations=confirmations,
            witnesses=Witnesses(rpc, network, cross_check_nano_usd),
            housekeeping_s=housekeeping_s,
            caretaker=lambda: self._ownership.caretaker,
            lost=self._ownership.lost,
            spawn=self._spawn,
        )
        self.courier = self._care.courier
        self._lookout = Lookout(
            store,
            network.chain_id,
            self.outcomes,
            serves=lambda: self._care.dispatcher.served,
            waiting=self._care.queued,
            take=self._care.take_queued,
            decided=self._care.decided_elsewhere,
            found=self._care.found,
            interval_s=look_s,
        )

    def handle(self, name: str, kind: Kind) -> None:
        """Say how orders of a kind are carried, proven and booked; before `start`."""
        assert not self._running
        assert name not in self._kinds
        self._kinds[name] = kind

    # --- for tenders --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Learn the chain's state, take what accounts are free, and carry on with what is under way of them. Once; after `stop`
        a new engine takes over.

        Raises:
            RpcUnavailable: No node answers.
            RpcError: A node refuses the simplest questions.
        """
        await self._care.ask_chain([])
        if self._own_leases is not None:
            await self._own_leases.start()
        self._running = True
        try:
            await self._lookout.start()
            await self._ownership.start()
            await self._care.refresh()
        except BaseException:
            await self.stop()
            raise
        self._care.start()
        self._spawn(self._lookout.run())
        self._spawn(self._housekeeping())
        self._lookout.look_for_queued()

    async def stop(self) -> None:
        """Stop working; open rows stay in the outbox for other processes, or the next start."""
        self._running = False
        self._care.stop()
        self._lookout.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._ownership.stop()
        if self._own_leases is not None:
            await self._own_leases.stop()
        self.outcomes.let_go()

    def admit(self, payer: str) -> None:
        """Ask before a payment of `payer` (lower-case hex) is taken on; costs nothing.

        Raises:
            PaymentRefused: ``payments_reverted``: too many payments, of this payer or of all, failed on chain lately.
        """
        self._care.reverts.admit(payer)

    async def submit(self, order: SettlementOrder) -> None:
        """Write an order to the outbox, signed, and broadcast it; or leave that to the process that has the accounts.
        Submitting it again changes nothing.

        Returns when the row is durable. A caller that is cancelled meanwhile does not undo it.

        Raises:
            SettlementUnavailable: The engine is not running, or too much waits for it; nothing was written.
            StoreBusy: The database takes no more; nothing was written.
        """
        assert order.chain_id == self.network.chain_id
        if not self._running:
            raise _not_running()
        if order.id not in self._care.entries:
            await self._care.dispatcher.submit(order)

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
            return await asyncio.shield(self._spawn(self._care.judge.book_executed(order, from_block, head)))
        except (RpcUnavailable, RpcError) as error:
            raise SettlementUnavailable(
                "chain_unavailable", "the chain cannot be asked; send the same payment again"
            ) from error

    async def outcome(self, settlement_id: str, timeout_s: float) -> SettlementOutcome:
        """Wait until the fate of a settlement is known, whichever process decides it, or `timeout_s` is over: then its state is
        an open one.

        Raises:
            KeyError: There is no such settlement.
        """
        told = self.outcomes.expect(settlement_id)
        try:
            known = await self._known(settlement_id)
            if not known.open or timeout_s <= 0 or not self._running:
                return known
            await asyncio.wait({told}, timeout=timeout_s)
            return await self._known(settlement_id)
        finally:
            self.outcomes.give_up(settlement_id, told)

    async def give_up(self, settlement_id: str, reason: str) -> None:
        """End an order that waits for something which will not happen, unless it is carried by now."""
        await self._care.judge.give_up(settlement_id, self._care.entries.get(settlement_id), reason)

    def take_queued(self, settlement_id: str) -> None:
        """Take up an order that a unit has written, or let go (`outbox.enqueue`, `release`), now that it is durable; if this
        process cannot sign for it, another one was told of it."""
        if self._running:
            self._lookout.look_for_queued()

    @property
    def paid(self) -> int:
        """Settlements that this process found paid; what another one found is counted there, as with the next three."""
        return self._care.paid

    @property
    def failed(self) -> int:
        """Settlements that failed."""
        return self._care.failed

    @property
    def reorganised(self) -> int:
        """Settlements whose evidence a reorganisation took away."""
        return self._care.reorganised

    @property
    def transactions(self) -> int:
        """Transactions that were sent, each with one or many settlements."""
        return self._care.sent

    @property
    def in_flight(self) -> int:
        """How many settlements are in this process's care, neither paid nor failed."""
        return len(self._care.entries)

    @property
    def from_block(self) -> int:
        """A block before which nobody can have executed what is found unexecuted now, see `outbox.enqueue`."""
        return self._care.from_block

    async def _known(self, settlement_id: str) -> SettlementOutcome:
        decided = self.outcomes.get(settlement_id)
        if decided is not None:
            return decided
        entry = self._care.entries.get(settlement_id) or await self._store.read(
            lambda tx: outbox.find(tx, settlement_id)
        )
        if entry is None:
            raise KeyError(settlement_id)
        return SettlementOutcome.of(entry)

    async def _take_over(self, signers: list[Signer]) -> None:
        await self._care.take_over(signers)
        self._lookout.look_for_queued()

    async def _housekeeping(self) -> None:
        while self._running:
            await asyncio.sleep(self._housekeeping_s)
            await self._care.round()

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
