"""Paying by exact, upto and prepaid credit, topping up and withdrawing, all at once on one database and one chain.

Requests run beside each other and beside everything that can go wrong: blocks, reorganisations, batches that revert, wallets
that are emptied, strangers, failing nodes and databases, restarts, and kills between any two steps. Whatever the order: no
balance below zero, no payment served twice, nobody charged more than quoted, no more risked on a payer than allowed. In the
end every wallet has to its credit exactly what it paid on chain, less what it was charged and took out.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import hypothesis.strategies as st
from hypothesis.stateful import initialize, precondition, rule

from payments import withdrawals
from payments.chain.networks import UPTO_PERMIT2_PROXY_ADDRESS
from payments.chain.rpc import RpcError, RpcUnavailable
from payments.chain.signers import Signer
from payments.chain.transactions import TRANSFER_TOPIC, Call, encode_transfer
from payments.errors import PaymentError
from payments.ledger.accounts import account_id, payer_account
from payments.ledger.books import Finding
from payments.reconciliation import reconcile
from payments.settlement.retries import DEADLINE_MARGIN_S, TRIES_MAX
from payments.store import StoreBusy
from payments.tenders.base import Charge, Hold, Outcome
from payments.tenders.exact import ExactTender
from payments.tenders.prepaid import PrepaidTender
from payments.tenders.upto import UptoTender
from payments.withdrawals import Limits, WithdrawalRefused
from payments.x402.wire import Eip3009Authorization, Payment, Requirement, UptoAuthorization
from tests.payments.exact_samples import quote_of
from tests.payments.fake_contracts import calls_of
from tests.payments.machines import BATCH, CONFIRMATIONS, NANO, NETWORK, STRANGER, THIEF, TOKEN, GatewayMachine
from tests.payments.simulation import exploring

PAYERS = tuple(f"0x{number:040x}" for number in (0xA1, 0xA2, 0xA3))
TREASURY_KEY = "0x" + "7e" * 32
TREASURY = Signer.from_hex(TREASURY_KEY).address
FUNDS = 5_000
OWNED = 777
"""What the treasury had before, in atomic units."""
EXPOSURE, LIMIT = 600 * NANO, 1_000 * NANO
"""What one payer may owe before its exact payments are mined, and for answers by upto."""
WITHDRAWALS = Limits(minimum=1, maximum=10**12, daily=10**12, review=10**12, fee=7)
ROUNDS_MAX = 300
VALID_S = 90 + DEADLINE_MARGIN_S
"""Long enough for what has failed to be tried again."""

Way = Literal["exact", "upto", "prepaid"]
Ending = Literal["capture", "capture twice", "release", "interrupt"]


@dataclass(frozen=True, slots=True)
class Wish:
    """One request: who pays, how, what it may cost and costs (nano-USD), and how it ends."""

    payer: str
    way: Way
    quoted: int
    cost: int
    more: int
    """Atomic units that are signed beyond what is quoted: a top-up, where it is exact."""
    ending: Ending


wishes = st.lists(
    st.builds(
        Wish,
        payer=st.sampled_from(PAYERS),
        way=st.sampled_from(("exact", "exact", "upto", "upto", "prepaid")),
        quoted=st.sampled_from((200 * NANO, 350 * NANO, 350_500, 900 * NANO)),
        cost=st.sampled_from((0, 1, 123_456, 200 * NANO, 350_500, 10**6)),
        more=st.sampled_from((0, 0, 500)),
        ending=st.sampled_from(("capture", "capture", "capture twice", "release", "interrupt")),
    ),
    min_size=1,
    max_size=6,
)


class TendersMachine(GatewayMachine):
    """One gateway's payments, again and again, on one database and one chain."""

    rounds_max = ROUNDS_MAX
    treasury, treasury_key = TREASURY, TREASURY_KEY
    undecided = (
        *GatewayMachine.undecided,
        # As long as its authorization is good, it may be tried again.
        "SELECT id, state FROM settlement WHERE kind='upto' AND state='failed' AND watch_again_ms IS NOT NULL",
    )

    @initialize(seed=st.integers(0, 2**32), wanted=wishes)
    def start(self, seed: int, wanted: list[Wish]) -> None:
        self.payments: list[tuple[Payment, Wish]] = []
        self.served: Counter[str] = Counter()
        self.prepare(seed, dict.fromkeys(PAYERS, FUNDS) | {TREASURY: OWNED})
        self.requests_at_once(wanted)

    async def begin(self) -> None:
        self.services = await self.open_services(EXPOSURE)
        await self.engine.start()

    # --- requests -----------------------------------------------------------------------------------------------------

    @rule(wanted=wishes)
    def requests_at_once(self, wanted: list[Wish]) -> None:
        for wish in wanted:
            payment = self.sign(wish)
            if payment is not None:
                self.payments.append((payment, wish))
            self.spawn(self.request(payment, wish))
        self.run(asyncio.sleep(0.2))

    @precondition(lambda self: self.payments)
    @rule(data=st.data(), other_request=st.booleans(), copies=st.integers(1, 3))
    def a_payment_is_sent_again(self, data: st.DataObject, other_request: bool, copies: int) -> None:
        payment, wish = self.payments[data.draw(st.integers(0, len(self.payments) - 1))]
        for _ in range(copies):
            self.spawn(self.request(payment, wish, b"other" if other_request else b"first"))
        self.run(asyncio.sleep(0.2))

    async def request(self, payment: Payment | None, wish: Wish, body: bytes = b"first") -> None:
        """What the gateway does with a request."""
        quote = quote_of(wish.quoted)
        with contextlib.suppress(PaymentError, StoreBusy):
            hold: Hold = await self.tender(payment, wish, body).authorize(quote, {})
            try:
                if hold.may_start_early:
                    await asyncio.sleep(self.world.a_while(300))
                await hold.ready()
                charge = await self.end(hold, wish)
            except BaseException:
                await hold.interrupt(Outcome({"reason": "stopped"}))
                raise
            if charge is not None:
                assert charge.charged_nano_usd <= min(wish.cost, quote.maximum_nano_usd), (
                    "charged more than it cost or was quoted"
                )
                if payment is not None:
                    self.served[payment.digest.hex()] += 1
                    assert self.served[payment.digest.hex()] == 1, "one payment bought two answers"

    async def end(self, hold: Hold, wish: Wish) -> Charge | None:
        match wish.ending:
            case "interrupt":
                raise asyncio.CancelledError
            case "release":
                await hold.release(Outcome({"reason": "failed"}))
                return None
            case "capture twice":
                first, second = await asyncio.gather(
                    hold.capture(wish.cost, Outcome()), hold.capture(wish.cost, Outcome())
                )
                assert first == second
                return first
        return await hold.capture(wish.cost, Outcome())

    def tender(self, payment: Payment | None, wish: Wish, body: bytes) -> Any:
        if payment is None:
            return PrepaidTender(self.process.store, wish.payer, [TOKEN.asset])
        if wish.way == "upto":
            return UptoTender(self.services, payment, TOKEN, body.ljust(32), LIMIT)
        requirement = Requirement("exact", NETWORK.caip2, TOKEN.address, wish.quoted // NANO, TREASURY, 300, {})
        return ExactTender(self.services, payment, TOKEN, NETWORK, requirement, body.ljust(32))

    def sign(self, wish: Wish) -> Payment | None:
        if wish.way == "prepaid":
            return None
        value, nonce = -(-wish.quoted // NANO) + wish.more, self.world.random.getrandbits(256)
        deadline = int(self.world.time()) + VALID_S
        authorization: Eip3009Authorization | UptoAuthorization
        if wish.way == "exact":
            authorization = Eip3009Authorization(wish.payer, TREASURY, value, 0, deadline, nonce)
        else:
            terms = (wish.payer, TOKEN.address, value, UPTO_PERMIT2_PROXY_ADDRESS, nonce, deadline, TREASURY, 0)
            authorization = UptoAuthorization(*terms, facilitator=BATCH)
        digest = self.world.random.randbytes(32)
        return Payment(2, wish.way, NETWORK.caip2, None, None, digest, authorization, b"\x01" * 64 + b"\x1b")

    @rule(payer=st.sampled_from(PAYERS), amount=st.sampled_from((None, 100 * NANO, 333_333)), copies=st.integers(1, 2))
    def a_wallet_withdraws(self, payer: str, amount: int | None, copies: int) -> None:
        key = self.world.random.randbytes(8).hex()

        async def withdraw() -> None:
            with contextlib.suppress(WithdrawalRefused, StoreBusy):
                made, _ = await self.process.store.write(
                    lambda tx: withdrawals.request(
                        tx,
                        address=payer,
                        idempotency_key=key,
                        token=TOKEN,
                        amount_nano_usd=amount,
                        limits=WITHDRAWALS,
                        treasury=TREASURY,
                    )
                )
                self.engine.take_queued(made.id)

        for _ in range(copies):
            self.process.loop.create_task(withdraw())
        self.run(asyncio.sleep(0.2))

    # --- what happens besides -----------------------------------------------------------------------------------------

    @rule(payer=st.sampled_from(PAYERS), all_of_it=st.booleans())
    def a_wallet_is_emptied(self, payer: str, all_of_it: bool) -> None:
        left = self.chain.state.balances[payer]
        self.move(payer, THIEF, left if all_of_it else left // 2)

    @rule(payer=st.sampled_from(PAYERS))
    def a_wallet_is_filled(self, payer: str) -> None:
        self.move(THIEF, payer, self.chain.state.balances.get(THIEF, 0))

    @rule(
        payer=st.sampled_from(PAYERS), cost=st.sampled_from((123_456, 350_500)), after=st.sampled_from((None, 3, 9, 20))
    )
    def a_wallet_is_short_for_a_moment(self, payer: str, cost: int, after: int | None) -> None:
        """When its answer by upto is due; perhaps the process is killed when that is tried again."""
        self.requests_at_once([Wish(payer, "upto", 350_500, cost, 0, "capture")])
        self.run(asyncio.sleep(0.1))
        self.a_wallet_is_emptied(payer, all_of_it=True)
        self.let_time_pass(CONFIRMATIONS + 2, blocks=True, busy=False)
        self.a_wallet_is_filled(payer)
        self.world.kill_in = after
        self.let_time_pass(2, blocks=True, busy=False)

    @rule(value=st.sampled_from((1, 50)))
    def somebody_sends_a_present(self, value: int) -> None:
        self.move(THIEF, TREASURY, min(value, self.chain.state.balances.get(THIEF, 0)))

    def move(self, sender: str, recipient: str, value: int) -> None:
        if value:
            self.chain.act(sender, Call(TOKEN.address, encode_transfer(recipient, value), 100_000))

    @precondition(lambda self: self.payments)
    @rule(data=st.data())
    def a_stranger_executes(self, data: st.DataObject) -> None:
        nonce = self.payments[data.draw(st.integers(0, len(self.payments) - 1))][0].authorization.nonce
        for to, data_of_call in self.read(
            f"SELECT call_to, call_data FROM settlement WHERE authorization_nonce='{nonce}'"
        ):
            self.chain.act(STRANGER, Call(to, bytes(data_of_call), 100_000))

    @rule()
    def the_books_are_compared_with_the_chain(self) -> None:
        """In the middle of things they may differ, while a reorganisation is not noticed; looking must do no harm."""

        async def compare() -> list[Finding]:
            with contextlib.suppress(RpcUnavailable, RpcError, StoreBusy):
                store, rpc = self.process.store, self.process.rpc
                return (await reconcile(store, rpc, NETWORK, TREASURY, confirmations=CONFIRMATIONS)).findings
            return []

        self.findings = self.run(compare())

    # --- what must be so ----------------------------------------------------------------------------------------------

    def check_always(self) -> None:
        super().check_always()
        at_risk = self.read(
            "SELECT receipt.payer, SUM(CASE receipt.state WHEN 'open' THEN quoted_nano_usd ELSE charged_nano_usd END)"
            " FROM receipt JOIN payment_authorization AS pledge ON pledge.receipt_id = receipt.id"
            " LEFT JOIN settlement ON settlement.reference = receipt.id WHERE tender='upto'"
            # What a reorganisation took away was paid when others were taken on, and is sent again.
            " AND pledge.state <> 'paid'"
            " AND (receipt.state='open' OR settlement.state IN ('queued', 'submitted')) GROUP BY receipt.payer"
        )
        assert all(risk <= LIMIT for _, risk in at_risk), at_risk

    def finish(self) -> None:
        """Requests end, the chain behaves, and whoever asks is given a second look."""
        self.put_right()
        self.wait_until_decided()
        self.ask_again_for_all_that_failed()
        self.reopen()
        self.the_books_are_compared_with_the_chain()
        assert self.findings == []

    def check(self) -> None:
        """Every wallet: what it paid on chain and was paid, what it was charged, and what it has to its credit."""
        paid_in: Counter[str] = Counter()
        for receipt in self.chain.receipts():
            for log in receipt["logs"]:
                if log["address"] == TOKEN.address and log["topics"][0] == TRANSFER_TOPIC:
                    sender, recipient = ("0x" + topic[-40:] for topic in log["topics"][1:])
                    paid_in[sender] += int(log["data"], 16) * NANO if recipient == TREASURY else 0
                    paid_in[recipient] -= int(log["data"], 16) * NANO if sender == TREASURY else 0
        charged = dict(self.read("SELECT payer, SUM(charged_nano_usd) FROM receipt GROUP BY payer"))
        fees = dict(self.read("SELECT address, SUM(fee_nano_usd) FROM withdrawal WHERE state='paid' GROUP BY address"))
        for payer in PAYERS:
            account = payer_account(payer, TOKEN.asset)
            row = self.read(f"SELECT balance, pending_out FROM ledger_account WHERE id='{account}'")
            balance, held = row[0] if row else (0, 0)
            assert held == 0, "something is held and nobody works on it"
            owed = self.lost_on(payer, account)
            expected = paid_in[payer] - (charged.get(payer) or 0) - (fees.get(payer) or 0) + owed
            assert balance == expected, f"{payer} has {balance} nano-USD to its credit instead of {expected}"
        despite = self.read(
            "SELECT later.id FROM receipt AS later JOIN receipt AS unpaid ON unpaid.payer = later.payer"
            " JOIN payment_authorization AS pledge ON pledge.receipt_id = unpaid.id"
            " JOIN settlement ON settlement.reference = unpaid.id"
            " WHERE later.tender='upto' AND pledge.state='defaulted' AND settlement.state='failed'"
            " AND later.created_ms > settlement.updated_ms"
        )
        assert despite == [], "upto was taken of a wallet that owed for an answer"
        receivable = self.read("SELECT COALESCE(SUM(balance), 0) FROM ledger_account WHERE kind='receivable'")[0][0]
        assert receivable == 0, "something was earned, and is neither paid nor lost"
        self.check_operator(paid_in)
        self.check_tries()

    def check_tries(self) -> None:
        """What an order may cost in gas is bounded."""
        carried: dict[bytes, set[tuple[str, int]]] = defaultdict(set)
        for sent, _ in self.chain.executed:
            if sent.call.to == BATCH:
                for _, data in calls_of(sent.call.data):
                    carried[data].add((sent.sender, sent.nonce))
        assert all(len(places) <= TRIES_MAX for places in carried.values())

    def lost_on(self, payer: str, account: str) -> int:
        """What the operator bears for a payer: answers that were never paid, credit that was spent before it was gone."""
        (unpaid,) = self.read(
            "SELECT COALESCE(SUM(charged_nano_usd), 0) FROM receipt JOIN payment_authorization AS pledge"
            f" ON pledge.receipt_id = receipt.id WHERE receipt.payer='{payer}' AND pledge.state='defaulted'"
        )[0]
        variance = account_id("variance", TOKEN.asset)
        (borne,) = self.read(
            "SELECT COALESCE(SUM(CASE debit_account WHEN '"
            + variance
            + "' THEN posted_amount ELSE -posted_amount END), 0)"
            f" FROM ledger_transfer WHERE id LIKE 'loss:%' AND credit_account='{account}'"
            f" OR id LIKE 'made-good:%' AND debit_account='{account}'"
        )[0]
        (dust,) = self.read(
            "SELECT COALESCE(SUM(posted_amount), 0) FROM ledger_transfer AS moved JOIN settlement"
            f" ON settlement.id = moved.reference WHERE moved.id LIKE 'unexcess:%' AND settlement.payer='{payer}'"
        )[0]
        assert 0 <= unpaid <= LIMIT, "more is owed for answers by upto than was to be risked"
        assert borne >= 0
        return int(unpaid + borne + dust)

    def check_operator(self, paid_in: Counter[str]) -> None:
        """The treasury: on chain it has what was there, and what all wallets and strangers paid in."""
        balances = dict(self.read("SELECT id, balance FROM ledger_account"))
        custody = -balances[account_id("custody", TOKEN.asset)]
        assert custody == self.chain.state.balances[TREASURY] * NANO
        names = ("revenue", "unattributed", "owner", "variance")
        theirs = {name: balances.get(account_id(name, TOKEN.asset), 0) for name in names}
        liabilities = sum(balance for name, balance in balances.items() if name.startswith("payer:"))
        assert custody == liabilities + sum(theirs.values())
        assert theirs["owner"] == OWNED * NANO
        assert theirs["unattributed"] == paid_in[THIEF]


TestTendersMachine = TendersMachine.TestCase
TestTendersMachine.settings = exploring(50, 25)


def owing_machine() -> TendersMachine:
    """A wallet that was emptied when its answer was to be settled, and is filled again once that has failed for good."""
    machine = TendersMachine()
    machine.start(seed=1, wanted=[Wish(PAYERS[0], "upto", 350_500, 350_500, 0, "capture")])
    machine.run(asyncio.sleep(0.3))
    machine.a_wallet_is_emptied(PAYERS[0], all_of_it=True)
    machine.let_time_pass(CONFIRMATIONS + 3, blocks=True, busy=False)
    assert pledge_and_settlement(machine) == [("defaulted", "failed")]
    machine.a_wallet_is_filled(PAYERS[0])
    return machine


def pledge_and_settlement(machine: TendersMachine) -> list[tuple[str, str]]:
    query = "SELECT pledge.state, settlement.state FROM payment_authorization AS pledge JOIN settlement"
    return machine.read(f"{query} ON settlement.reference = pledge.receipt_id")


def test_killed_at_every_step_of_another_try_it_is_paid_once() -> None:
    """The wallet pays once, owes nothing, and no gas is spent besides."""
    for steps in itertools.count():
        machine = owing_machine()
        machine.world.kill_in = steps
        machine.let_time_pass(25, blocks=True, busy=False)
        killed, machine.world.kill_in = machine.world.kill_in is None, None
        machine.let_time_pass(25, blocks=True, busy=False)
        paid, sent = pledge_and_settlement(machine), len(machine.read("SELECT id FROM chain_transaction"))
        machine.teardown()
        assert paid == [("paid", "final")]
        assert sent == 2
        if not killed:
            break
    assert steps > 10


def test_another_try_that_a_reorganisation_takes_away_is_mined_again() -> None:
    machine = owing_machine()
    while pledge_and_settlement(machine) != [("paid", "mined")]:
        machine.let_time_pass(1, blocks=True, busy=False)
    machine.mine_and_take_away(CONFIRMATIONS, keep=False, pause_s=0.5)
    machine.let_time_pass(10, blocks=True, busy=False)
    assert pledge_and_settlement(machine) == [("paid", "final")]
    machine.teardown()
