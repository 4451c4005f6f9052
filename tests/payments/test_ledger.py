"""The ledger: whatever is done to it in whatever order, the books balance and nobody spends what is not there."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import create_engine

import payments.tables
from payments.databases.sqlite import Connection
from payments.ledger import books, transfers
from payments.ledger.accounts import ensure_account
from payments.ledger.transfers import Balance, InsufficientFunds, TransferConflict
from payments.store import Store, Transaction
from tests.payments.exact_samples import assert_books_balance

CUSTODY, ALICE, BOB, REVENUE = "custody@USD", "payer:0xa@USD", "payer:0xb@USD", "revenue@USD"


def fund(tx: Transaction, account: str, amount: int) -> None:
    transfers.post(tx, id=f"fund:{account}", debit=CUSTODY, credit=account, amount=amount, reference="test")


def hold(tx: Transaction, id: str, amount: int, debit: str = ALICE) -> bool:
    return transfers.hold(tx, id=id, debit=debit, credit=REVENUE, amount=amount, reference="test")


async def test_capture_posts_what_was_used_and_frees_the_rest(store: Store) -> None:
    def unit(tx: Transaction) -> tuple[Balance, Balance, Balance]:
        fund(tx, ALICE, 100)
        hold(tx, "t", 60)
        held = transfers.balance(tx, ALICE)
        transfers.capture(tx, "t", 25)
        return held, transfers.balance(tx, ALICE), transfers.balance(tx, REVENUE)

    assert await store.write(unit) == (Balance(100, 60), Balance(75, 0), Balance(25, 0))
    await assert_books_balance(store)


async def test_the_same_transfer_again_changes_nothing(store: Store) -> None:
    def unit(tx: Transaction) -> list[bool]:
        fund(tx, ALICE, 60)
        # The second hold finds nothing available, because it has itself taken it.
        made = [hold(tx, "t", 60), hold(tx, "t", 60)]
        captured = [transfers.capture(tx, "t", 25), transfers.capture(tx, "t", 25), hold(tx, "t", 60)]
        post = {"id": "p", "debit": ALICE, "credit": BOB, "amount": 35, "reference": "test"}
        posted = [transfers.post(tx, **post), transfers.post(tx, **post)]  # type: ignore[arg-type]
        void = [hold(tx, "v", 20, BOB), transfers.void(tx, "v"), transfers.void(tx, "v")]
        return [*made, *captured, *posted, *void]

    assert await store.write(unit) == [True, False, True, False, False, True, False, True, True, False]
    await assert_books_balance(store)


async def test_the_same_id_for_anything_else_is_refused_and_changes_nothing(store: Store) -> None:
    def unit(tx: Transaction) -> None:
        fund(tx, ALICE, 100)
        hold(tx, "t", 10)
        with pytest.raises(TransferConflict):
            hold(tx, "t", 11)
        with pytest.raises(TransferConflict):
            transfers.post(tx, id="t", debit=ALICE, credit=REVENUE, amount=10, reference="test")
        with pytest.raises(TransferConflict):
            transfers.post(tx, id=f"fund:{ALICE}", debit=CUSTODY, credit=ALICE, amount=99, reference="test")
        with pytest.raises(TransferConflict):
            transfers.capture(tx, "t", 11)
        transfers.capture(tx, "t", 10)
        with pytest.raises(TransferConflict):
            transfers.void(tx, "t")
        with pytest.raises(TransferConflict):
            transfers.capture(tx, "t", 9)
        with pytest.raises(TransferConflict):
            transfers.void(tx, "unknown")
        assert transfers.balance(tx, ALICE) == Balance(90, 0)

    await store.write(unit)
    await assert_books_balance(store)


async def test_what_raises_has_changed_nothing(store: Store) -> None:
    def unit(tx: Transaction) -> None:
        fund(tx, ALICE, 100)
        hold(tx, "t", 70)
        with pytest.raises(InsufficientFunds):
            hold(tx, "u", 31)
        with pytest.raises(InsufficientFunds):
            transfers.post(tx, id="u", debit=ALICE, credit=BOB, amount=31, reference="test")
        with pytest.raises(InsufficientFunds):
            transfers.post(tx, id="u", debit="payer:nobody@USD", credit=BOB, amount=1, reference="test")
        assert transfers.find(tx, "u") is None
        assert hold(tx, "u", 30)

    await store.write(unit)


async def test_hundred_holds_at_once_never_exceed_the_balance(store: Store) -> None:
    await store.write(lambda tx: fund(tx, ALICE, 1_000))

    async def attempt(number: int) -> bool:
        try:
            return await store.write(lambda tx: hold(tx, f"t{number}", 30))
        except InsufficientFunds:
            return False

    held = await asyncio.gather(*(attempt(number) for number in range(100)))
    assert sum(held) == 1_000 // 30
    assert await store.read(lambda tx: transfers.balance(tx, ALICE)) == Balance(1_000, 990)


@pytest.mark.parametrize("account", ["payer@USD", "custody:me@USD", "payer:0xa", "shop:1@USD", "payer:0xa@", ""])
async def test_account_of_no_known_kind_is_refused(store: Store, account: str) -> None:
    with pytest.raises(ValueError, match="known kind"):
        await store.write(lambda tx: ensure_account(tx, account))


@pytest.mark.parametrize(
    ("corruption", "codes"),
    [
        (f"UPDATE ledger_account SET balance = 99 WHERE id = '{ALICE}'", {"sum_not_zero", "balance_wrong"}),
        (f"UPDATE ledger_account SET pending_out = 9 WHERE id = '{ALICE}'", {"pending_wrong"}),
        (f"UPDATE ledger_account SET overdraft = TRUE WHERE id = '{ALICE}'", {"overdraft_wrong"}),
        ("UPDATE ledger_transfer SET amount = 11 WHERE id = 'hold:r'", {"pending_wrong"}),
        ("UPDATE ledger_transfer SET state = 'voided' WHERE id = 'hold:r'", {"pending_wrong"}),
        (f"UPDATE ledger_account SET asset = 'EUR' WHERE id = '{ALICE}'", {"sum_not_zero", "assets_mixed"}),
        ("UPDATE receipt SET state = 'interrupted'", {"hold_orphaned"}),
        ("UPDATE receipt SET state = 'captured', charged_nano_usd = 5", {"hold_orphaned", "charge_wrong"}),
    ],
)
async def test_check_finds_what_is_wrong_with_the_books(store: Store, corruption: str, codes: set[str]) -> None:
    def unit(tx: Transaction) -> None:
        fund(tx, ALICE, 100)
        columns = "(id, state, uses, tender, payer, asset, quoted_nano_usd, paid_nano_usd, spent_nano_usd, details, created_ms)"
        values = "('r', 'open', 1, 'exact', '0xa', 'USD', 10, 0, 0, '{}', 0)"
        tx.execute(f"INSERT INTO receipt {columns} VALUES {values}")
        transfers.hold(tx, id="hold:r", debit=ALICE, credit=REVENUE, amount=10, reference="r")

    await store.write(unit)
    await assert_books_balance(store)
    await store.write(lambda tx: tx.execute(corruption) and None)
    assert {finding.code for finding in await store.read(books.check)} == codes


class LedgerMachine(RuleBasedStateMachine):
    """Random transfers between a few accounts, against a model that is three lines of arithmetic."""

    accounts = st.sampled_from([ALICE, BOB])
    amounts = st.integers(1, 60)

    @initialize()
    def open(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None, factory=Connection)
        self.connection.execute("PRAGMA foreign_keys = ON")
        engine = create_engine("sqlite://", creator=lambda: self.connection)
        payments.tables.LedgerAccount.metadata.create_all(engine)
        self.balances = dict.fromkeys((ALICE, BOB, REVENUE, CUSTODY), 0)
        self.pending: dict[str, tuple[str, int]] = {}
        self.made = 0

    def next_id(self) -> str:
        self.made += 1
        return f"t{self.made}"

    def available(self, account: str) -> int:
        return self.balances[account] - sum(amount for debit, amount in self.pending.values() if debit == account)

    @rule(account=accounts, amount=amounts)
    def deposit(self, account: str, amount: int) -> None:
        assert transfers.post(
            self.connection, id=self.next_id(), debit=CUSTODY, credit=account, amount=amount, reference="r"
        )
        self.balances[CUSTODY] -= amount
        self.balances[account] += amount

    @rule(debit=accounts, amount=amounts, twice=st.booleans())
    def post(self, debit: str, amount: int, twice: bool) -> None:
        transfer = self.next_id()
        enough = self.available(debit) >= amount
        with contextlib.nullcontext() if enough else pytest.raises(InsufficientFunds):
            for made in [True, False][: 1 + twice]:
                assert made is transfers.post(
                    self.connection, id=transfer, debit=debit, credit=REVENUE, amount=amount, reference="r"
                )
        if enough:
            self.balances[debit] -= amount
            self.balances[REVENUE] += amount

    @rule(debit=accounts, amount=amounts, twice=st.booleans())
    def hold(self, debit: str, amount: int, twice: bool) -> None:
        transfer = self.next_id()
        enough = self.available(debit) >= amount
        with contextlib.nullcontext() if enough else pytest.raises(InsufficientFunds):
            for made in [True, False][: 1 + twice]:
                assert made is hold(self.connection, transfer, amount, debit)
        if enough:
            self.pending[transfer] = (debit, amount)

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), twice=st.booleans())
    def capture(self, data: st.DataObject, twice: bool) -> None:
        transfer = data.draw(st.sampled_from(sorted(self.pending)))
        debit, held = self.pending.pop(transfer)
        amount = data.draw(st.integers(0, held))
        for made in [True, False][: 1 + twice]:
            assert made is transfers.capture(self.connection, transfer, amount)
        self.balances[debit] -= amount
        self.balances[REVENUE] += amount

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), twice=st.booleans())
    def void(self, data: st.DataObject, twice: bool) -> None:
        transfer = data.draw(st.sampled_from(sorted(self.pending)))
        del self.pending[transfer]
        for made in [True, False][: 1 + twice]:
            assert made is transfers.void(self.connection, transfer)

    @invariant()
    def balances_are_the_models(self) -> None:
        for account, balance in self.balances.items():
            held = sum(amount for debit, amount in self.pending.values() if debit == account)
            assert transfers.balance(self.connection, account) == Balance(balance, held)

    @invariant()
    def books_balance(self) -> None:
        assert books.check(self.connection) == []

    def teardown(self) -> None:
        self.connection.close()


LedgerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_random_transfers_keep_every_invariant = LedgerMachine.TestCase
