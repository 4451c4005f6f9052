"""The ledger and the settlements under whatever order of things: submissions, batches that revert as a whole, stolen nonces,
fee spikes, reorganisations, strangers, cancellations, deadlines, failing nodes and databases, restarts and kills at any step.

Once the chain behaves again everything is decided within a bounded number of blocks, and the books say what the chain says.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import initialize, precondition, rule

from payments.chain.signers import IN_FLIGHT_MAX, Signer
from payments.chain.transactions import AUTHORIZATION_USED_TOPIC, Call, encode_transfer_with_authorization, word
from payments.errors import SettlementUnavailable
from payments.ledger import books, transfers
from payments.ledger.accounts import account_id, payer_account
from payments.money import divide_up
from payments.settlement import outbox, states
from payments.settlement.engine import Settlements
from payments.settlement.evidence import PaymentProof
from payments.settlement.orders import Kind, SettlementOrder
from payments.settlement.outbox import order_gas
from payments.store import StoreBusy, Transaction
from payments.x402.wire import Eip3009Authorization
from tests.payments.fake_chain import GWEI, Sent
from tests.payments.fake_contracts import CANCEL, calls_of
from tests.payments.machines import (
    BATCH,
    CHAIN_ID,
    CONFIRMATIONS,
    NANO,
    NETWORK,
    SIGNER_KEYS,
    STRANGER,
    THIEF,
    TOKEN,
    Machine,
)
from tests.payments.simulation import exploring

TREASURY = "0x" + "7e" * 20
PAYERS = tuple(f"0x{number:040x}" for number in (0xA1, 0xA2, 0xA3, 0xA4))
CUSTODY = account_id("custody", TOKEN.asset)
FUNDS = 10_000
LONG_S, SHORT_S = 3_600, 12
DEADLINE_ROUNDS = 20
"""Seconds after a deadline by which it is decided."""

# Few amounts: a payment must not take another one's Transfer of the same amount for its own.
payers, values = st.sampled_from(PAYERS), st.sampled_from((1, 300, 300, 1_500, 4_000))
wanted_orders = st.lists(st.tuples(payers, values, st.sampled_from((LONG_S, LONG_S, SHORT_S))), min_size=1, max_size=8)


def paid(tx: Transaction, row: dict[str, Any]) -> None:
    """Credit a payer, unless it has that credit already: as a tender's callback would."""
    times = entries_of(tx, row["id"])
    if times % 2 == 0:
        book(tx, row, times, CUSTODY, payer_account(row["payer"], TOKEN.asset))


def failed(tx: Transaction, row: dict[str, Any]) -> None:
    """Take back the credit of a payment that a reorganisation took away for good."""
    times = entries_of(tx, row["id"])
    if times % 2:
        book(tx, row, times, payer_account(row["payer"], TOKEN.asset), CUSTODY)


def book(tx: Transaction, row: dict[str, Any], times: int, debit: str, credit: str) -> None:
    amount, name = int(row["value"]) * NANO, f"settle:{row['id']}:{times}"
    transfers.post(tx, id=name, debit=debit, credit=credit, amount=amount, reference=row["id"])


def entries_of(tx: Transaction, settlement_id: str) -> int:
    """How often a settlement was booked: credits and reversals take turns."""
    return int(tx.execute("SELECT COUNT(*) FROM ledger_transfer WHERE reference=?", (settlement_id,)).fetchone()[0])


class SettlementMachine(Machine):
    """One engine, again and again, on one database and one chain."""

    rounds_max = 120
    """Once nothing is in the way; a deadline and its margin are among them."""

    @initialize(seed=st.integers(0, 2**32), wanted=wanted_orders)
    def start(self, seed: int, wanted: list[tuple[str, int, int]]) -> None:
        self.orders: dict[str, SettlementOrder] = {}
        self.accepted: set[str] = set()
        self.unknown: set[str] = set()
        """Nobody was told whether they were taken: the process was killed meanwhile."""
        self.stolen: set[str] = set()
        self.overtaken: set[str] = set()
        """Executed by a stranger before we gave them up: they are found without being asked for."""
        self.final: set[str] = set()
        self.waited = False
        self.prepare(seed, dict.fromkeys(PAYERS, FUNDS))
        self.submit_orders(wanted, enqueue=False)

    async def begin(self) -> None:
        store, rpc = self.process.store, self.process.rpc
        self.engine = Settlements(store, rpc, NETWORK, SIGNER_KEYS, batch_contract=BATCH, confirmations=CONFIRMATIONS)
        self.engine.handle("payment", Kind(PaymentProof(), paid, failed, order_gas, batchable=True))
        await self.engine.start()

    # --- what the operator and its callers do -------------------------------------------------------------------------

    @rule(payer=payers, value=values)
    def a_stranger_is_faster(self, payer: str, value: int) -> None:
        """An order is written, and the process dies before it is taken up; meanwhile somebody executes it."""
        order = self.order(payer, value, LONG_S)
        self.orders[order.id] = order
        self.unknown.add(order.id)
        with contextlib.suppress(StoreBusy):
            self.run(self.process.store.write(lambda tx: outbox.enqueue(tx, order)))
        self.a_stranger_executes(order)
        self.reopen()

    @rule(wanted=wanted_orders, enqueue=st.booleans())
    def submit_orders(self, wanted: list[tuple[str, int, int]], enqueue: bool) -> None:
        orders = [self.order(payer, value, valid_s) for payer, value, valid_s in wanted]
        self.orders |= {order.id: order for order in orders}
        self.submit([*orders, orders[0]], enqueue)

    @precondition(lambda self: self.orders)
    @rule(data=st.data(), enqueue=st.booleans())
    def submit_again(self, data: st.DataObject, enqueue: bool) -> None:
        self.submit([self.orders[data.draw(st.sampled_from(sorted(self.orders)))]], enqueue)

    def submit(self, orders: list[SettlementOrder], enqueue: bool) -> None:
        async def all_at_once() -> list[bool]:
            return await asyncio.gather(*(self.submit_one(order, enqueue) for order in orders))

        taken = self.run(all_at_once())
        if taken is None:
            self.unknown |= {order.id for order in orders}
            return
        self.accepted |= {order.id for order, yes in zip(orders, taken, strict=True) if yes}
        written = {row[0] for row in self.read("SELECT id FROM settlement")}
        refused = {order.id for order in orders} - self.accepted - self.unknown
        assert not refused & written, "it was said that nothing was written"

    async def submit_one(self, order: SettlementOrder, enqueue: bool) -> bool:
        try:
            if enqueue:
                await self.process.store.write(lambda tx: outbox.enqueue(tx, order))
                self.engine.take_queued(order.id)
            else:
                await self.engine.submit(order)
        except (SettlementUnavailable, StoreBusy):
            return False
        return True

    @precondition(lambda self: self.accepted)
    @rule(data=st.data(), timeout_s=st.sampled_from((0, 1, 5)))
    def ask_for_an_outcome(self, data: st.DataObject, timeout_s: float) -> None:
        order_id = data.draw(st.sampled_from(sorted(self.accepted)))
        outcome = self.run(self.engine.outcome(order_id, timeout_s))
        if outcome is not None and outcome.paid:
            (times,) = self.read(f"SELECT COUNT(*) FROM ledger_transfer WHERE reference='{order_id}'")[0]
            assert times, "it is told as paid before it is booked"

    @rule(seconds=st.integers(0, 6), blocks=st.booleans(), busy=st.booleans())
    def time_passes(self, seconds: int, blocks: bool, busy: bool) -> None:
        self.let_time_pass(seconds, blocks, busy)

    @precondition(lambda self: not self.waited)
    @rule()
    def nothing_is_mined_until_deadlines_pass(self) -> None:
        self.waited = True
        fee, self.chain.base_fee = self.chain.base_fee, 10_000 * GWEI
        for _ in range(SHORT_S + DEADLINE_ROUNDS):
            self.run(asyncio.sleep(1))
            self.chain.mine()
        self.chain.base_fee = fee
        late = self.world.time() - DEADLINE_ROUNDS
        still_open = {row[0] for row in self.read("SELECT id FROM settlement WHERE state IN ('queued', 'submitted')")}
        assert not [each for each in still_open if self.orders[each].valid_before < late], "past its deadline and open"

    @rule()
    def restart(self) -> None:
        self.run(self.engine.stop())
        self.process.store.close()
        self.reopen()

    @rule(after=st.integers(0, 12), pause_s=st.sampled_from((0.05, 1)))
    def a_block_and_a_kill(self, after: int, pause_s: float) -> None:
        self.chain.mine()
        self.world.kill_in = after
        self.run(asyncio.sleep(pause_s))

    @rule(after=st.integers(0, 40))
    def the_process_will_be_killed(self, after: int) -> None:
        self.world.kill_in = after

    @rule(writes=st.integers(1, 3))
    def the_database_takes_nothing(self, writes: int) -> None:
        self.world.busy = writes

    # --- what the chain does ------------------------------------------------------------------------------------------

    @rule()
    def a_block(self) -> None:
        self.chain.mine()

    @rule(depth=st.integers(1, CONFIRMATIONS), keep=st.booleans(), pause_s=st.sampled_from((0, 0.05, 0.5, 2)))
    def mine_and_reorganise(self, depth: int, keep: bool, pause_s: float) -> None:
        self.mine_and_take_away(depth, keep, pause_s)

    @rule()
    def what_is_pending_is_dropped(self) -> None:
        self.chain.mempool.clear()

    @rule(gwei=st.sampled_from((1, 4, 30)))
    def fees_change(self, gwei: int) -> None:
        self.chain.base_fee = gwei * GWEI

    @rule(payer=payers)
    def a_payer_uses_all_gas(self, payer: str) -> None:
        self.chain.contracts.gas_eaters = {payer}

    @rule(which=st.integers(0, 1))
    def our_key_was_used_elsewhere_and_that_is_forgotten(self, which: int) -> None:
        """A node counts somebody's pending transaction when we start, and drops it later: a gap."""
        signer = self.engine.signers[which].address
        nonce = int(str(self.chain.answer("eth_getTransactionCount", (signer, "pending"))), 16)
        self.chain.mempool[signer, nonce] = Sent("0x00", signer, nonce, 0, 0, Call(THIEF, b"", 21_000))
        self.reopen()
        self.chain.mempool.pop((signer, nonce), None)

    @rule(which=st.integers(0, 1))
    def somebody_uses_a_nonce_of_our_signer(self, which: int) -> None:
        signer = self.engine.signers[which].address
        self.chain.act(signer, Call(THIEF, b"", 21_000))
        self.stolen.add(self.chain.head.sent[0].hash)

    # --- what payers and strangers do ---------------------------------------------------------------------------------

    @precondition(lambda self: self.orders)
    @rule(data=st.data())
    def a_stranger_submits_an_authorization(self, data: st.DataObject) -> None:
        self.a_stranger_executes(self.orders[data.draw(st.sampled_from(sorted(self.orders)))])

    def a_stranger_executes(self, order: SettlementOrder) -> None:
        self.chain.act(STRANGER, Call(order.call_to, order.call_data, 100_000))
        if [(order.id,)] != self.read(f"SELECT id FROM settlement WHERE id='{order.id}' AND state='failed'"):
            self.overtaken.add(order.id)

    @precondition(lambda self: self.orders)
    @rule(data=st.data())
    def a_payer_cancels_an_authorization(self, data: st.DataObject) -> None:
        order = self.orders[data.draw(st.sampled_from(sorted(self.orders)))]
        assert order.authorization_nonce is not None
        arguments = word(int(order.payer, 16)) + word(order.authorization_nonce) + bytes(3 * 32)
        self.chain.act(order.payer, Call(TOKEN.address, CANCEL + arguments, 100_000))

    @rule(payer=payers, value=values)
    def a_payer_spends_elsewhere(self, payer: str, value: int) -> None:
        order = self.order(payer, value, LONG_S, to=THIEF)
        self.chain.act(STRANGER, Call(order.call_to, order.call_data, 100_000))

    def order(self, payer: str, value: int, valid_s: int, to: str = TREASURY) -> SettlementOrder:
        name, nonce = self.world.random.randbytes(8).hex(), self.world.random.getrandbits(256)
        deadline = int(self.world.time()) + valid_s
        authorization = Eip3009Authorization(payer, to, value, 0, deadline, nonce)
        return SettlementOrder(
            id=f"pay:{name}",
            kind="payment",
            reference=name,
            chain_id=CHAIN_ID,
            token=TOKEN.address,
            payer=payer,
            pay_to=to,
            value=value,
            authorization_nonce=nonce,
            call_to=TOKEN.address,
            call_data=encode_transfer_with_authorization(authorization, b"\x01" * 64 + b"\x1b"),
            valid_before=deadline,
        )

    # --- what must be so ----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Nothing more happens but blocks: everything is decided for good, by itself. Then a person asks for second looks."""
        self.put_right()
        self.wait_until_decided()
        for signer in self.engine.signers:
            self.send_one_more(signer)
        executed = self.executed()
        for order_id, state in self.read("SELECT id, state FROM settlement"):
            order = self.orders[order_id]
            if order_id in self.overtaken and (order.payer, order.authorization_nonce) in executed:
                assert state in states.PAID, f"{order_id} is {state}, and somebody else had executed it"
            tried = (order.call_to, order.call_data) in self.chain.contracts.failed_calls
            used = (order.payer, order.authorization_nonce) in self.chain.state.used
            late = order.valid_before < self.world.time()
            assert state != "failed" or tried or used or late, f"{order_id} has failed for no reason"
        self.ask_again_for_all_that_failed()

    def send_one_more(self, signer: Signer) -> None:
        """What a reorganisation took of an account's transactions, with nobody waiting for them, shows with its next one."""
        others = [each for each in self.engine.signers if each is not signer]
        for other in others:
            other.in_flight += IN_FLIGHT_MAX
        order = self.order(PAYERS[0], 1, LONG_S)
        self.orders[order.id] = order
        self.submit([order], enqueue=False)
        for other in others:
            other.in_flight -= IN_FLIGHT_MAX
        self.wait_until_decided()

    def check(self) -> None:
        found: dict[str, str] = dict(self.read("SELECT id, state FROM settlement"))
        assert self.accepted <= found.keys() <= self.orders.keys()
        executed = self.executed()
        for order_id, state in found.items():
            order = self.orders[order_id]
            arrived = (order.payer, order.authorization_nonce) in executed
            assert (state in states.PAID) == arrived, f"{order_id} is {state}, and on chain: {arrived}"
        assert self.process.store._database.read(books.check) == []
        expected: Counter[str] = Counter()
        for order_id in found:
            order = self.orders[order_id]
            if (order.payer, order.authorization_nonce) in executed:
                expected[order.payer] += order.value * NANO
        credits = dict(self.read("SELECT id, balance FROM ledger_account WHERE kind='payer' AND balance<>0"))
        assert credits == {payer_account(payer, TOKEN.asset): owed for payer, owed in expected.items()}
        self.check_transactions()
        self.check_carriers()
        assert [error for error in self.world.errors if "StoreBusy" not in error] == []

    def executed(self) -> set[tuple[str, int]]:
        """The authorizations that paid the treasury: the use of a nonce, and a Transfer right after it."""
        found = set()
        for receipt in self.chain.receipts():
            for used, moved in zip(receipt["logs"], receipt["logs"][1:], strict=False):
                if used["topics"][0] == AUTHORIZATION_USED_TOPIC and moved["topics"][-1].endswith(TREASURY[2:]):
                    found.add(("0x" + used["topics"][1][-40:], int(used["topics"][2], 16)))
        return found

    def check_transactions(self) -> None:
        """Every nonce is used once, by a transaction that we know or that was not ours; all gas is booked, once."""
        rows = self.read("SELECT signer, signer_nonce, state FROM chain_transaction")
        assert {state for _, _, state in rows} <= {"included", "lost"}
        gas_gwei = 0
        for signer in self.engine.signers:
            sent = self.chain.sent_by(signer.address)
            ours = [each.nonce for each in sent if each.hash not in self.stolen]
            known = [nonce for address, nonce, state in rows if address == signer.address and state == "included"]
            assert sorted(known) == ours
        for receipt in self.chain.receipts():
            if receipt["from"] in self.engine.accounts and receipt["transactionHash"] not in self.stolen:
                gas_gwei += divide_up(int(receipt["gasUsed"], 16) * int(receipt["effectiveGasPrice"], 16), GWEI)
        booked = self.read("SELECT COALESCE(SUM(balance), 0) FROM ledger_account WHERE kind='gas'")[0][0]
        assert booked == gas_gwei

    def check_carriers(self) -> None:
        """A call is carried once, and again only after what carried it reverted as a whole; from then on it goes alone."""
        carriers: dict[tuple[str, bytes], set[bytes]] = defaultdict(set)
        fell: dict[tuple[str, bytes], set[bytes]] = defaultdict(set)
        for sent, reverted in self.chain.executed:
            if sent.sender not in self.engine.accounts or sent.hash in self.stolen:
                continue
            batch = sent.call.to == BATCH
            calls = calls_of(sent.call.data) if batch else [(sent.call.to, sent.call.data)]
            for call in calls:
                if call[0] != TOKEN.address:
                    continue
                assert len(calls) == 1 or not fell[call] - {sent.call.data}, "it went out among others again"
                carriers[call].add(sent.call.data)
                if reverted and len(calls) > 1:
                    fell[call].add(sent.call.data)
        assert all(len(found) <= 1 + len(fell[call]) for call, found in carriers.items()), "it was carried twice"

    def check_always(self) -> None:
        """What is final is as deep as it must be."""
        rows = self.read("SELECT id, block_number FROM settlement WHERE state='final'")
        head = self.chain.head.number
        assert all(head - block >= CONFIRMATIONS for order_id, block in rows if order_id not in self.final)
        self.final = {order_id for order_id, _ in rows}


TestSettlementMachine = SettlementMachine.TestCase
TestSettlementMachine.settings = exploring(60, 30)


def started(*payers: str) -> SettlementMachine:
    machine = SettlementMachine()
    machine.start(seed=1, wanted=[(payer, 300, LONG_S) for payer in payers])
    return machine


def test_confirmations_that_the_database_refused_are_recorded_later() -> None:
    machine = started(PAYERS[0])
    machine.chain.mine()
    machine.time_passes(2, blocks=False, busy=False)
    machine.time_passes(6, blocks=True, busy=True)
    machine.teardown()


def test_what_is_mined_and_not_deep_enough_is_watched_by_the_next_process() -> None:
    machine = started(PAYERS[0])
    machine.let_time_pass(2, blocks=True, busy=False)
    assert machine.read("SELECT state FROM settlement") == [("mined",)]
    machine.reopen()
    machine.teardown()


def test_what_a_reverted_batch_carried_goes_out_alone_after_a_long_outage() -> None:
    machine = started(*PAYERS[:2])
    machine.chain.contracts.batches_out_of_gas = 1
    machine.chain.mine()
    machine.time_passes(15, blocks=False, busy=True)
    machine.teardown()


def test_an_order_that_the_database_refused_to_bind_to_a_transaction_is_bound_later() -> None:
    machine = started(PAYERS[0])
    machine.let_time_pass(3, blocks=True, busy=False)
    order = machine.order(PAYERS[1], 300, LONG_S)
    machine.orders[order.id] = order
    machine.accepted.add(order.id)

    async def queue() -> None:
        await machine.process.store.write(lambda tx: outbox.enqueue(tx, order))
        machine.world.busy = 1
        machine.engine.take_queued(order.id)

    machine.run(queue())
    machine.run(asyncio.sleep(0.5))
    assert machine.world.busy == 0, "nothing was refused"
    machine.teardown()


def test_a_broadcast_that_reached_no_node_is_repeated() -> None:
    machine = started(PAYERS[0])
    machine.let_time_pass(5, blocks=True, busy=False)
    machine.process.rpc.refuse = refused = 1_000_000
    machine.submit_orders([(PAYERS[1], 300, LONG_S)], enqueue=False)
    machine.run(asyncio.sleep(3))
    assert machine.process.rpc.refuse < refused
    assert machine.chain.mempool == {}
    machine.teardown()
