"""Settlements and their transactions: only the transitions that the tables name, whatever is asked in whatever state."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from payments.settlement import states
from payments.store import Store, Transaction

Move = Callable[[Transaction, str, str], bool]

SETTLEMENT = (
    "INSERT INTO settlement (id, kind, reference, chain_id, state, token, payer, pay_to, value, call_to, call_data,"
    " valid_before, from_block, position, attempts, created_ms, updated_ms)"
    " VALUES ('it', 'payment', 'r', 1, ?, '0x1', '0xa', '0xb', '1', '0xc', ?, 0, 0, 0, 0, 0, 0)"
)
TRANSACTION = (
    "INSERT INTO chain_transaction (id, chain_id, kind, state, signer, signer_nonce, raw_transaction, broadcasts,"
    " inclusions, created_ms, updated_ms) VALUES ('it', 1, 'single', ?, '0xa', 0, ?, '[]', 0, 0, 0)"
)


@pytest.mark.parametrize(
    ("table", "insert", "move", "transitions"),
    [
        ("settlement", SETTLEMENT, states.move, states.TRANSITIONS),
        ("chain_transaction", TRANSACTION, states.move_transaction, states.TRANSACTION_TRANSITIONS),
    ],
    ids=["settlement", "transaction"],
)
async def test_exactly_the_transitions_of_its_table_are_made(
    store: Store, table: str, insert: str, move: Move, transitions: Mapping[str, frozenset[str]]
) -> None:
    def unit(tx: Transaction) -> dict[str, frozenset[str]]:
        made: dict[str, frozenset[str]] = {}
        for state in transitions:
            reached = set()
            for to in transitions:
                tx.execute(insert, (state, b"0"))
                moved = move(tx, "it", to)
                found = tx.execute(f"SELECT state FROM {table}").fetchone()[0]
                assert moved == (found != state)
                reached.add(found)
                tx.execute(f"DELETE FROM {table}")
            made[state] = frozenset(reached - {state})
        return made

    assert await store.write(unit) == transitions
