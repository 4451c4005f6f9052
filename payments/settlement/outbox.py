"""The durable outbox: what is to happen on the chain, written before it happens. Everything here runs inside store units."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from payments.chain.networks import NOBODY
from payments.chain.transactions import Call, has_permit, has_wallet_signature, last_call, upto_facilitator
from payments.settlement import news, states
from payments.settlement.orders import SettlementOrder
from payments.settlement.outgoing import Outgoing
from payments.store import Transaction

GAS_TOKEN_CALL = 150_000
"""EIP-3009 and plain transfers: Circle's USDC uses up to 105,000."""
GAS_PROXY_CALL = 250_000
"""A Permit2 settlement through the exact proxy."""
GAS_PERMIT = 100_000
"""Besides, for an EIP-2612 permit that comes with it: Circle's USDC uses up to 80,000."""
GAS_WALLET_SIGNATURE = 350_000
"""Besides, for a contract wallet to look at its signature: P-256 in Solidity uses up to 330,000."""
GAS_DEPLOYMENT = 800_000
"""Besides, to deploy a contract wallet: the usual factories use up to 450,000."""

PARAMETERS_MAX = 500
"""In one statement."""

_ORDER_COLUMNS = (
    "id, kind, reference, chain_id, token, payer, pay_to, value, authorization_nonce, call_to, call_data, valid_before"
)
_ENTRY_COLUMNS = (
    f"{_ORDER_COLUMNS}, state, from_block, transaction_id, position, attempts, transaction_hash, block_number, reason,"
    " waits_for, transfer_log_index"
)
_INSERT = (
    f"INSERT INTO settlement ({_ORDER_COLUMNS}, state, from_block, transaction_id, position, attempts, created_ms,"  # noqa: S608
    f" updated_ms, waits_for) VALUES ({','.join('?' * 20)}) ON CONFLICT (id) DO NOTHING"
)


def gas_limit(call_to: str, call_data: bytes, token: str) -> int:
    """The gas that a payment's or a transfer's call may use: what a hostile wallet can make us burn, and no more."""
    target, data = last_call(call_to, call_data)
    gas = GAS_TOKEN_CALL if target == token else GAS_PROXY_CALL
    if has_wallet_signature(data):
        gas += GAS_WALLET_SIGNATURE
    if has_permit(data):
        gas += GAS_PERMIT
    return gas if target == call_to else gas + GAS_DEPLOYMENT


def order_gas(order: SettlementOrder) -> int:
    """`gas_limit` of an order."""
    return gas_limit(order.call_to, order.call_data, order.token)


def order_facilitator(order: SettlementOrder) -> str:
    """Of an order by `upto`: the batch contract that its payer named."""
    return upto_facilitator(order.call_data)


@dataclass(slots=True, eq=False)
class Entry:
    """A row of the outbox that is still being worked on."""

    order: SettlementOrder
    state: str
    from_block: int
    """The head when the row was written: evidence is searched from here on."""
    transaction_id: str | None = None
    position: int = 0
    """Its place in the transaction that carries it."""
    attempts: int = 0
    """Earlier transactions that carried it for nothing: as a whole they reverted, or its own call did; after the first one it
    goes alone."""
    transaction_hash: str | None = None
    """Of the evidence; before there is any, of the newest transaction that carries it."""
    block_number: int | None = None
    block_hash: str | None = None
    transfer_log_index: int | None = None
    reason: str | None = None
    own: bool = True
    """Whether the evidence is a transaction of ours."""
    burnt: bool = False
    """Whether our own call for it moved nothing, so that its gas was paid for nothing."""
    burnt_in_block: int | None = None
    waits_for: str | None = None
    """What has to happen before it is carried, see `release`."""

    @property
    def id(self) -> str:
        """The settlement's name."""
        return self.order.id

    @property
    def kind(self) -> str:
        """See `payments.settlement.orders.Kind`."""
        return self.order.kind

    @property
    def state_without_evidence(self) -> str:
        """What it is again when its evidence is gone; nothing of ours carries what somebody else executed before us."""
        return "queued" if self.transaction_id is None else "submitted"

    def row(self) -> dict[str, Any]:
        """The row as the ledger's callbacks see it; amounts are decimal text as in the table."""
        order = self.order
        nonce = order.authorization_nonce
        return {
            "id": order.id,
            "kind": order.kind,
            "reference": order.reference,
            "chain_id": order.chain_id,
            "state": self.state,
            "token": order.token,
            "payer": order.payer,
            "pay_to": order.pay_to,
            "value": str(order.value),
            "authorization_nonce": None if nonce is None else str(nonce),
            "transaction_hash": self.transaction_hash,
            "block_number": self.block_number,
            "reason": self.reason,
        }


def enqueue(tx: Transaction, order: SettlementOrder, from_block: int = 0, waits_for: str | None = None) -> bool:
    """Write an order without a transaction, inside the unit that it belongs to; whichever process holds a signer takes it up.

    Args:
        tx: The unit's transaction.
        order: What is to happen.
        from_block: A block before which nobody can have executed it; 0 if nobody but us can.
        waits_for: The name of what has to happen first: until its `release` nothing carries the order.

    Returns:
        False if it was written before.
    """
    if not _insert(tx, order, "queued", from_block, None, 0, waits_for):
        return False
    news.tell_queued(tx, order.chain_id)
    return True


def release(tx: Transaction, settlement_id: str) -> bool:
    """What an order waited for has happened. False, with nothing changed, if it does not wait, or was decided meanwhile."""
    row = tx.execute(
        "UPDATE settlement SET waits_for = NULL WHERE id = ? AND state = 'queued' AND waits_for IS NOT NULL"
        " RETURNING chain_id",
        (settlement_id,),
    ).fetchone()
    if row is None:
        return False
    news.tell_queued(tx, row[0])
    return True


def waiting(tx: Transaction, chain_id: int, limit: int) -> int:
    """How many orders no transaction carries, and could; counts to `limit` at most."""
    row = tx.execute(
        "SELECT COUNT(*) FROM (SELECT 1 FROM settlement WHERE state='queued' AND chain_id=? AND waits_for IS NULL LIMIT ?)"
        " AS found",
        (chain_id, limit),
    ).fetchone()
    return int(row[0])


def submit(
    tx: Transaction, order: SettlementOrder, transaction_id: str, position: int, from_block: int
) -> Entry | None:
    """Write an order that a transaction of this unit is going to carry, see `carry`.

    Returns:
        None if it was written before.
    """
    if not _insert(tx, order, "submitted", from_block, transaction_id, position):
        return None
    return Entry(order, "submitted", from_block, transaction_id, position)


def assign(tx: Transaction, entry: Entry, transaction_id: str, position: int, from_block: int) -> bool:
    """Let a transaction of this unit carry a queued entry. False if it is not queued any more."""
    from_block = entry.from_block or from_block
    if not states.move(
        tx, entry.id, "submitted", transaction_id=transaction_id, position=position, from_block=from_block
    ):
        return False
    entry.state, entry.from_block, entry.transaction_id, entry.position = (
        "submitted",
        from_block,
        transaction_id,
        position,
    )
    return True


def unassign(entry: Entry) -> None:
    """The unit that assigned it was undone."""
    if entry.state in states.OPEN:
        entry.state, entry.transaction_id = "queued", None


def carry(tx: Transaction, outgoing: Outgoing, entries: list[Entry]) -> None:
    """Bind the entries, which name the transaction already, to its signed form."""
    outgoing.entries = entries
    tx.execute("UPDATE settlement SET transaction_hash=? WHERE transaction_id=?", (outgoing.hashes[-1], outgoing.id))
    for entry in entries:
        entry.transaction_hash = outgoing.hashes[-1]


def is_as_known(tx: Transaction, entry: Entry) -> bool:
    """Whether the row is still in the state, and carried by the transaction, that this process knows."""
    row = tx.execute("SELECT state, transaction_id FROM settlement WHERE id=?", (entry.id,)).fetchone()
    return row is not None and (row[0], row[1]) == (entry.state, entry.transaction_id)


def requeue(tx: Transaction, entries: Sequence[Entry]) -> list[Entry]:
    """Put entries back whose transaction reverted as a whole, so that it executed none of them; returns those that were."""
    return [entry for entry in entries if is_as_known(tx, entry) and _put_back(tx, entry)]


def try_again(tx: Transaction, entry: Entry) -> bool:
    """Put an entry back that has failed. False, with nothing changed, if it is not as this process knows it."""
    return is_as_known(tx, entry) and _put_back(tx, entry, reason=None, watch_again_ms=None)


def _put_back(tx: Transaction, entry: Entry, **columns: Any) -> bool:
    no_carrier = {"attempts": entry.attempts + 1, "transaction_id": None, "transaction_hash": None}
    return states.move(tx, entry.id, "queued", **no_carrier, **columns)


def call_for(order: SettlementOrder, gas: int) -> Call:
    """The order's call as a transaction of its own makes it; of the chain's own coin the call is the transfer."""
    return Call(order.call_to, order.call_data, gas, order.value if order.token == NOBODY else 0)


def load_queued(tx: Transaction, chain_id: int, kinds: Sequence[str], limit: int) -> list[Entry]:
    """What no transaction carries, and could, of these kinds, oldest first. What waits for something else may be much."""
    marks = ",".join("?" * len(kinds))
    rows = tx.execute(
        f"SELECT {_ENTRY_COLUMNS} FROM settlement WHERE state='queued' AND chain_id=? AND kind IN ({marks})"  # noqa: S608 - names from this module
        " AND waits_for IS NULL ORDER BY created_ms, id LIMIT ?",
        (chain_id, *kinds, limit),
    ).fetchall()
    return [_entry(row) for row in rows]


def load_paid(tx: Transaction, chain_id: int, from_block: int) -> list[tuple[Entry, str | None]]:
    """What is paid and not final, with evidence in `from_block` or later, or of our own: with the account that carried it."""
    columns = ", ".join(f"settlement.{column}" for column in _ENTRY_COLUMNS.split(", "))
    rows = tx.execute(
        f"SELECT {columns}, chain_transaction.signer FROM settlement"  # noqa: S608 - names from this module
        " LEFT JOIN chain_transaction ON chain_transaction.id = settlement.transaction_id WHERE settlement.chain_id=?"
        " AND (settlement.state='mined' OR settlement.state='superseded' AND settlement.block_number>=?)",
        (chain_id, from_block),
    ).fetchall()
    return [(_entry(row), row[-1]) for row in rows]


def find_all(tx: Transaction, settlement_ids: Sequence[str]) -> list[Entry]:
    """The rows with these ids."""
    marks = ",".join("?" * len(settlement_ids))
    rows = tx.execute(
        f"SELECT {_ENTRY_COLUMNS} FROM settlement WHERE id IN ({marks})",  # noqa: S608 - names from this module
        tuple(settlement_ids),
    ).fetchall()
    return [_entry(row) for row in rows]


def load_carried(tx: Transaction, transaction_ids: Sequence[str]) -> dict[str, list[Entry]]:
    """What transactions carry, by transaction, in the order of the batch."""
    carried: dict[str, list[Entry]] = {transaction_id: [] for transaction_id in transaction_ids}
    if not carried:
        return carried
    marks = ",".join("?" * len(transaction_ids))
    rows = tx.execute(
        f"SELECT {_ENTRY_COLUMNS} FROM settlement WHERE transaction_id IN ({marks}) ORDER BY transaction_id, position",  # noqa: S608 - names from this module
        tuple(transaction_ids),
    ).fetchall()
    for entry in map(_entry, rows):
        assert entry.transaction_id is not None
        carried[entry.transaction_id].append(entry)
    return carried


def reverted_since(tx: Transaction, chain_id: int, since_ms: int) -> list[tuple[str, int]]:
    """Who made us pay gas for nothing, and when (ms since 1970), oldest first: settlements that failed in a block."""
    rows = tx.execute(
        "SELECT settlement.payer, settlement.updated_ms FROM settlement"
        " JOIN chain_transaction ON chain_transaction.id = settlement.transaction_id"
        " WHERE settlement.chain_id=? AND settlement.state='failed' AND settlement.updated_ms>?"
        " AND chain_transaction.state='included' ORDER BY settlement.updated_ms",
        (chain_id, since_ms),
    ).fetchall()
    return [(payer, updated_ms) for payer, updated_ms in rows]


def stranded(tx: Transaction, chain_id: int) -> list[tuple[str, str]]:
    """Transactions that are in a block and whose entries are not decided, and their accounts: whoever was deciding them was
    killed."""
    rows = tx.execute(
        "SELECT DISTINCT chain_transaction.id, chain_transaction.signer FROM settlement"
        " JOIN chain_transaction ON chain_transaction.id = settlement.transaction_id"
        " WHERE settlement.chain_id=? AND settlement.state='submitted' AND chain_transaction.state='included'",
        (chain_id,),
    ).fetchall()
    return [(transaction_id, signer) for transaction_id, signer in rows]


def proven_by(tx: Transaction, chain_id: int, transaction_hashes: Collection[str]) -> dict[tuple[str, int], str]:
    """The settlements that the logs of some transactions prove already, by a log's transaction and its place in the block."""
    found: dict[tuple[str, int], str] = {}
    hashes = sorted(transaction_hashes)
    for start in range(0, len(hashes), PARAMETERS_MAX):
        part = hashes[start : start + PARAMETERS_MAX]
        rows = tx.execute(
            "SELECT transaction_hash, transfer_log_index, id FROM settlement WHERE chain_id=? AND transaction_hash IN"  # noqa: S608
            f" ({','.join('?' * len(part))}) AND transfer_log_index IS NOT NULL",
            (chain_id, *part),
        ).fetchall()
        found |= {(transaction_hash, log_index): settlement for transaction_hash, log_index, settlement in rows}
    return found


def find(tx: Transaction, settlement_id: str) -> Entry | None:
    """One row, or None."""
    row = tx.execute(f"SELECT {_ENTRY_COLUMNS} FROM settlement WHERE id=?", (settlement_id,)).fetchone()  # noqa: S608 - names from this module
    return None if row is None else _entry(row)


def _insert(
    tx: Transaction,
    order: SettlementOrder,
    state: str,
    from_block: int,
    transaction_id: str | None,
    position: int,
    waits_for: str | None = None,
) -> bool:
    now = states.now_ms()
    nonce = order.authorization_nonce
    rows = tx.execute(
        _INSERT,
        (
            order.id,
            order.kind,
            order.reference,
            order.chain_id,
            order.token,
            order.payer,
            order.pay_to,
            str(order.value),
            None if nonce is None else str(nonce),
            order.call_to,
            order.call_data,
            order.valid_before,
            state,
            from_block,
            transaction_id,
            position,
            0,
            now,
            now,
            waits_for,
        ),
    )
    return rows.rowcount == 1


def _entry(row: Sequence[Any]) -> Entry:
    order = SettlementOrder(
        id=row[0],
        kind=row[1],
        reference=row[2],
        chain_id=row[3],
        token=row[4],
        payer=row[5],
        pay_to=row[6],
        value=int(row[7]),
        authorization_nonce=None if row[8] is None else int(row[8]),
        call_to=row[9],
        call_data=bytes(row[10]),
        valid_before=row[11],
    )
    return Entry(
        order=order,
        state=row[12],
        from_block=row[13],
        transaction_id=row[14],
        position=row[15],
        attempts=row[16],
        transaction_hash=row[17],
        block_number=row[18],
        reason=row[19],
        own=row[12] != "superseded",
        waits_for=row[20],
        transfer_log_index=row[21],
    )
