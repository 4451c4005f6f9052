"""The durable outbox: what is to happen on the chain, written before it happens.

A row's signer nonce is allocated in the transaction that stores the signed bytes, from the rows themselves: if the commit
fails, nothing was allocated. Everything here runs inside store units.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from payments.chain.signers import Signer
from payments.chain.transactions import Call, Fees, sign_transaction
from payments.settlement import states
from payments.settlement.orders import SettlementOrder
from payments.store import Transaction

GAS_TOKEN_CALL = 150_000
"""EIP-3009 and plain transfers: Circle's USDC uses up to 105,000."""
GAS_PROXY_CALL = 250_000
"""A Permit2 settlement through the exact proxy."""
GAS_FILLER = 30_000
NO_FEES = Fees(0, 0)

_ORDER_COLUMNS = (
    "id, kind, reference, chain_id, token, payer, pay_to, value, authorization_nonce, call_to, call_data, valid_before"
)
_ENTRY_COLUMNS = (
    f"{_ORDER_COLUMNS}, state, from_block, signer, signer_nonce, raw_transaction, broadcasts, transaction_hash,"
    " block_number, reason"
)
_INSERT_COLUMNS = (
    f"{_ORDER_COLUMNS}, state, from_block, signer, signer_nonce, raw_transaction, transaction_hash, broadcasts,"
    " created_ms, updated_ms"
)
_INSERT = f"INSERT INTO settlement ({_INSERT_COLUMNS}) VALUES ({','.join('?' * 21)}) ON CONFLICT (id) DO NOTHING"  # noqa: S608


def gas_limit(call_to: str, token: str) -> int:
    """The gas that a settlement's transaction may use."""
    return GAS_TOKEN_CALL if call_to == token else GAS_PROXY_CALL


@dataclass(slots=True, eq=False)
class Entry:
    """A row of the outbox that is still being worked on, and what this process knows about it."""

    id: str
    kind: str
    reference: str
    chain_id: int
    token: str
    payer: str
    pay_to: str
    value: int
    authorization_nonce: int | None
    call_to: str
    call_data: bytes
    valid_before: int
    state: str
    from_block: int
    signer: Signer | None = None
    signer_nonce: int = -1
    raw: bytes = b""
    hashes: list[str] = field(default_factory=list)
    """Of every transaction signed for the row, oldest first; all but a re-allocated one share the nonce."""
    fees: Fees = NO_FEES
    """Of the newest one."""
    transaction_hash: str | None = None
    """Of the evidence."""
    block_number: int | None = None
    block_hash: str | None = None
    reason: str | None = None
    # The courier's notes, in seconds of the monotonic clock.
    first_sent: float = 0.0
    """Since when the newest transaction has been on its way; 0 before it was accepted by a node."""
    last_sent: float = 0.0
    next_poll: float = 0.0
    polled_at_head: int = -1
    waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def call(self) -> Call:
        """What its transaction does."""
        if self.kind == "filler":
            return Call(self.call_to, b"", GAS_FILLER)
        return Call(self.call_to, self.call_data, gas_limit(self.call_to, self.token))

    def row(self) -> dict[str, Any]:
        """The row as the ledger's callbacks see it; amounts are decimal text as in the table."""
        return {
            "id": self.id,
            "kind": self.kind,
            "reference": self.reference,
            "chain_id": self.chain_id,
            "state": self.state,
            "token": self.token,
            "payer": self.payer,
            "pay_to": self.pay_to,
            "value": str(self.value),
            "authorization_nonce": None if self.authorization_nonce is None else str(self.authorization_nonce),
            "transaction_hash": self.transaction_hash,
            "block_number": self.block_number,
            "reason": self.reason,
        }


def _new_entry(order: SettlementOrder, state: str, from_block: int) -> Entry:
    return Entry(
        id=order.id,
        kind=order.kind,
        reference=order.reference,
        chain_id=order.chain_id,
        token=order.token,
        payer=order.payer,
        pay_to=order.pay_to,
        value=order.value,
        authorization_nonce=order.authorization_nonce,
        call_to=order.call_to,
        call_data=order.call_data,
        valid_before=order.valid_before,
        state=state,
        from_block=from_block,
    )


def _insert(tx: Transaction, entry: Entry) -> bool:
    now = states.now_ms()
    rows = tx.execute(
        _INSERT,
        (
            entry.id,
            entry.kind,
            entry.reference,
            entry.chain_id,
            entry.token,
            entry.payer,
            entry.pay_to,
            str(entry.value),
            None if entry.authorization_nonce is None else str(entry.authorization_nonce),
            entry.call_to,
            entry.call_data,
            entry.valid_before,
            entry.state,
            entry.from_block,
            entry.signer.address if entry.signer else None,
            entry.signer_nonce if entry.signer else None,
            entry.raw or None,
            entry.transaction_hash,
            _broadcasts(entry),
            now,
            now,
        ),
    )
    return rows.rowcount == 1


def _broadcasts(entry: Entry, earlier: str = "[]") -> str:
    if not entry.hashes:
        return earlier
    newest = {
        "hash": entry.hashes[-1],
        "max_fee": str(entry.fees.max_fee),
        "priority_fee": str(entry.fees.priority_fee),
    }
    return orjson.dumps([*orjson.loads(earlier), newest]).decode()


def _next_nonce(tx: Transaction, chain_id: int, signer: Signer) -> int:
    assert signer.nonce_floor is not None
    highest = tx.execute(
        "SELECT MAX(signer_nonce) FROM settlement WHERE chain_id=? AND signer=?", (chain_id, signer.address)
    ).fetchone()[0]
    return signer.nonce_floor if highest is None else max(int(highest) + 1, signer.nonce_floor)


def _sign(entry: Entry, signer: Signer, nonce: int, fees: Fees) -> None:
    assert signer.nonce_floor is not None
    signed = sign_transaction(signer.key, chain_id=entry.chain_id, nonce=nonce, call=entry.call, fees=fees)
    entry.signer, entry.signer_nonce, entry.fees, entry.raw = signer, nonce, fees, signed.raw
    entry.hashes.append(signed.hash)
    entry.transaction_hash = signed.hash
    entry.first_sent = entry.last_sent = 0.0


def enqueue(tx: Transaction, order: SettlementOrder) -> bool:
    """Write an order without a signer, inside the unit that it belongs to; the engine takes it up.

    Returns:
        False if it was written before.
    """
    return _insert(tx, _new_entry(order, "queued", 0))


def submit(tx: Transaction, order: SettlementOrder, signer: Signer, fees: Fees, head: int) -> Entry | None:
    """Sign an order and write it, ready to broadcast.

    Returns:
        None if it was written before: then nothing was signed for good.
    """
    entry = _new_entry(order, "submitted", head)
    _sign(entry, signer, _next_nonce(tx, order.chain_id, signer), fees)
    return entry if _insert(tx, entry) else None


def assign(tx: Transaction, entry: Entry, signer: Signer, fees: Fees, head: int) -> bool:
    """Sign a queued entry. False if it is not queued any more."""
    _sign(entry, signer, _next_nonce(tx, entry.chain_id, signer), fees)
    entry.state, entry.from_block = "submitted", head
    tx.execute("UPDATE settlement SET from_block=? WHERE id=? AND state='queued'", (head, entry.id))
    return states.move(tx, entry.id, "submitted", **_signed_columns(tx, entry))


def replace(tx: Transaction, entry: Entry, fees: Fees) -> None:
    """Sign the same call at the same nonce for higher fees, and write it before anybody sees it."""
    assert entry.signer is not None
    _sign(entry, entry.signer, entry.signer_nonce, fees)
    _update_signed(tx, entry)


def move_to_new_nonce(tx: Transaction, entry: Entry, fees: Fees) -> None:
    """Sign the same call at a new nonce. Only once the chain proves that none of its transactions can be mined any more."""
    assert entry.signer is not None
    _sign(entry, entry.signer, _next_nonce(tx, entry.chain_id, entry.signer), fees)
    _update_signed(tx, entry)


def fill_gap(tx: Transaction, chain_id: int, signer: Signer, nonce: int, fees: Fees, head: int) -> Entry:
    """Write an empty transaction of a signer to itself at a nonce that no row has."""
    entry = Entry(
        id=f"filler:{chain_id}:{signer.address}:{nonce}",
        kind="filler",
        reference="",
        chain_id=chain_id,
        token=signer.address,
        payer=signer.address,
        pay_to=signer.address,
        value=0,
        authorization_nonce=None,
        call_to=signer.address,
        call_data=b"",
        valid_before=0,
        state="submitted",
        from_block=head,
    )
    _sign(entry, signer, nonce, fees)
    if not _insert(tx, entry):
        raise AssertionError(f"{entry.id} exists, so there is no gap")
    return entry


def _signed_columns(tx: Transaction, entry: Entry) -> dict[str, Any]:
    assert entry.signer is not None
    earlier = tx.execute("SELECT broadcasts FROM settlement WHERE id=?", (entry.id,)).fetchone()[0]
    return {
        "signer": entry.signer.address,
        "signer_nonce": entry.signer_nonce,
        "raw_transaction": entry.raw,
        "transaction_hash": entry.transaction_hash,
        "broadcasts": _broadcasts(entry, earlier),
    }


def _update_signed(tx: Transaction, entry: Entry) -> None:
    columns = _signed_columns(tx, entry)
    assignments = ", ".join(f"{column}=?" for column in columns)
    tx.execute(
        f"UPDATE settlement SET {assignments}, updated_ms=? WHERE id=?",  # noqa: S608 - names from this module
        (*columns.values(), states.now_ms(), entry.id),
    )


def load(tx: Transaction, chain_id: int, signers: dict[str, Signer], wanted: Sequence[str]) -> list[Entry]:
    """Every row of a chain in one of the `wanted` states, by signer and nonce."""
    marks = ",".join("?" * len(wanted))
    rows = tx.execute(
        f"SELECT {_ENTRY_COLUMNS} FROM settlement WHERE chain_id=? AND state IN ({marks})"  # noqa: S608 - names from this module
        " ORDER BY signer, signer_nonce, created_ms",
        (chain_id, *wanted),
    ).fetchall()
    return [_entry(row, signers) for row in rows]


def load_decided(tx: Transaction, chain_id: int, signer: Signer, chain_nonce: int) -> list[Entry]:
    """Rows that are not open any more although the chain still waits for a transaction at their nonce."""
    rows = tx.execute(
        f"SELECT {_ENTRY_COLUMNS} FROM settlement WHERE chain_id=? AND signer=? AND signer_nonce>=?"  # noqa: S608 - names from this module
        " AND state NOT IN ('queued', 'submitted') ORDER BY signer_nonce",
        (chain_id, signer.address, chain_nonce),
    ).fetchall()
    return [_entry(row, {signer.address: signer}) for row in rows]


def is_evidence_of_another(tx: Transaction, entry: Entry, transaction_hash: str, log_index: int) -> bool:
    """Whether a Transfer log already proves another settlement."""
    row = tx.execute(
        "SELECT 1 FROM settlement WHERE chain_id=? AND transaction_hash=? AND transfer_log_index=? AND id<>?",
        (entry.chain_id, transaction_hash, log_index, entry.id),
    ).fetchone()
    return row is not None


def find(tx: Transaction, settlement_id: str) -> Entry | None:
    """One row, without a signer to sign with, or None."""
    row = tx.execute(f"SELECT {_ENTRY_COLUMNS} FROM settlement WHERE id=?", (settlement_id,)).fetchone()  # noqa: S608 - names from this module
    return None if row is None else _entry(row, {})


def _entry(row: Sequence[Any], signers: dict[str, Signer]) -> Entry:
    signed = orjson.loads(row[17])
    return Entry(
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
        state=row[12],
        from_block=row[13],
        signer=signers.get(row[14]) if row[14] else None,
        signer_nonce=-1 if row[15] is None else row[15],
        raw=bytes(row[16] or b""),
        hashes=[broadcast["hash"] for broadcast in signed],
        fees=Fees(int(signed[-1]["max_fee"]), int(signed[-1]["priority_fee"])) if signed else NO_FEES,
        transaction_hash=row[18],
        block_number=row[19],
        reason=row[20],
    )
