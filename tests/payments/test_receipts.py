"""Receipts: only the transitions that the tables name, whatever is asked of them in whatever state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from payments import receipts
from payments.store import Store, Transaction
from payments.tenders import authorizations

CALLS: dict[str, Callable[[Transaction], object]] = {
    "capture": lambda tx: receipts.close_receipt(tx, "r", 1, "captured", charged_nano_usd=1),
    "release": lambda tx: receipts.close_receipt(tx, "r", 1, "released", charged_nano_usd=0),
    "interrupt": lambda tx: receipts.close_receipt(tx, "r", 1, "interrupted", charged_nano_usd=None),
    "reopen": lambda tx: receipts.reopen_receipt(tx, "r"),
    "release_unsettled": lambda tx: receipts.release_unsettled(tx, "r", "failed"),
    "end_orphans": lambda tx: receipts.end_orphans(tx, "restart"),
}


def open_in(tx: Transaction, state: str) -> None:
    receipts.open_receipt(tx, id="r", tender="exact", payer="0xa", asset="USD", quoted_nano_usd=9, details={})
    tx.execute("UPDATE receipt SET state = ? WHERE id = 'r'", (state,))


def state_of(tx: Transaction) -> str:
    return str(tx.execute("SELECT state FROM receipt WHERE id = 'r'").fetchone()[0])


async def test_receipt_makes_exactly_the_transitions_of_its_table(store: Store) -> None:
    def unit(tx: Transaction) -> dict[str, frozenset[str]]:
        made: dict[str, frozenset[str]] = {}
        for state in receipts.TRANSITIONS:
            reached = set()
            for call in CALLS.values():
                open_in(tx, state)
                call(tx)
                reached.add(state_of(tx))
                tx.execute("DELETE FROM receipt")
            made[state] = frozenset(reached - {state})
        return made

    assert await store.write(unit) == receipts.TRANSITIONS


async def test_authorization_makes_exactly_the_transitions_of_its_table(store: Store) -> None:
    insert = (
        "INSERT INTO payment_authorization (identity, digest, receipt_id, payer, state, value_nano_usd, exposed_nano_usd,"
        " created_ms) VALUES ('i', ?, 'r', '0xa', ?, 9, 0, 0)"
    )

    targets: set[Any] = set().union(*authorizations.TRANSITIONS.values())

    def unit(tx: Transaction) -> dict[str, frozenset[str]]:
        open_in(tx, "open")
        made: dict[str, frozenset[str]] = {}
        for state in authorizations.TRANSITIONS:
            reached = set()
            for to in targets:
                tx.execute(insert, (b"0", state))
                moved = authorizations.mark(tx, "r", to)
                found = tx.execute("SELECT state FROM payment_authorization").fetchone()[0]
                assert moved == (found != state)
                reached.add(found)
                tx.execute("DELETE FROM payment_authorization")
            made[state] = frozenset(reached - {state})
        return made

    assert await store.write(unit) == authorizations.TRANSITIONS


async def test_use_that_is_over_cannot_close_the_receipt_of_the_next_one(store: Store) -> None:
    def unit(tx: Transaction) -> tuple[int | None, bool, bool]:
        open_in(tx, "interrupted")
        use = receipts.reopen_receipt(tx, "r")
        assert use is not None
        earlier = receipts.close_receipt(tx, "r", use - 1, "captured", charged_nano_usd=1)
        return use, earlier, receipts.close_receipt(tx, "r", use, "captured", charged_nano_usd=1)

    assert await store.write(unit) == (2, False, True)


async def test_receipt_that_somebody_paid_for_is_never_forgotten(store: Store) -> None:
    def unit(tx: Transaction) -> str:
        open_in(tx, "interrupted")
        receipts.set_paid(tx, "r", 9)
        receipts.forget(tx, "r")
        return state_of(tx)

    assert await store.write(unit) == "interrupted"


def test_receipt_ids_are_unguessable() -> None:
    ids = {receipts.new_receipt_id() for _ in range(1_000)}
    assert len(ids) == 1_000
    assert {len(id) for id in ids} == {len("rcpt_") + 40}
