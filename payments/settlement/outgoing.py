"""Transactions of ours: signed and written before anybody sees them, and carried to the nodes until they are in a block.

A transaction's nonce is allocated in the unit that stores its bytes, from the rows themselves: if the commit fails, nothing was
allocated. One transaction carries one call, or many through the batch contract. Everything here runs inside store units; those
that sign stand only if this process has the account's lease, or two processes would use one nonce for different things.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import orjson

from payments.chain.signers import WEI_PER_GWEI, Signer
from payments.chain.transactions import Call, Fees, call_of, sign_transaction
from payments.leases import require, signer_name
from payments.ledger import transfers
from payments.ledger.accounts import account_id, native_asset
from payments.money import divide_up
from payments.settlement import states
from payments.store import Transaction

if TYPE_CHECKING:
    from payments.settlement.outbox import Entry

GAS_FILLER = 30_000
NO_FEES = Fees(0, 0)

TransactionKind = Literal["single", "batch", "filler"]

_COLUMNS = "id, chain_id, kind, signer, signer_nonce, raw_transaction, broadcasts, inclusions"
_INSERT = (
    "INSERT INTO chain_transaction (id, chain_id, kind, state, signer, signer_nonce, raw_transaction, broadcasts,"
    " inclusions, created_ms, updated_ms) VALUES (?, ?, ?, 'signed', ?, ?, ?, ?, 0, ?, ?)"
)


@dataclass(slots=True, eq=False)
class Outgoing:
    """A signed transaction that is not known to be in a block, and what this process knows about it."""

    id: str
    chain_id: int
    kind: TransactionKind
    call: Call
    signer: Signer | None
    """None if no configuration names its key any more; the bytes are signed and may be mined all the same."""
    signer_nonce: int
    raw: bytes = b""
    hashes: list[str] = field(default_factory=list)
    """Of every form of it that was signed, oldest first; all but a re-allocated one share the nonce."""
    fees: Fees = NO_FEES
    """Of the newest one."""
    entries: list[Entry] = field(default_factory=list)
    """What it carries, in the order of the batch."""
    others: int = 0
    """How many entries it carries besides, of kinds that this process does not know."""
    inclusions: int = 0
    """How often it was seen in a block: more than once only after reorganisations."""
    # The courier's notes, in seconds of the monotonic clock.
    first_sent: float = 0.0
    """Since when the newest form has been on its way; 0 before it was accepted by a node."""
    last_sent: float = 0.0
    next_poll: float = 0.0
    polled_at_head: int = -1

    @property
    def caller(self) -> str | None:
        """Who makes the calls that it carries: the batch contract, or the signer; None if nobody knows any more."""
        if self.kind == "batch":
            return self.call.to
        return None if self.signer is None else self.signer.address


def new_id() -> str:
    """A name for a transaction that is about to be signed."""
    return f"tx_{secrets.token_hex(12)}"


def write(
    tx: Transaction,
    *,
    id: str,
    chain_id: int,
    kind: TransactionKind,
    call: Call,
    signer: Signer,
    fees: Fees,
    nonce: int | None = None,
) -> Outgoing:
    """Sign a transaction and write it, ready to broadcast.

    Args:
        tx: The unit's transaction.
        id: From `new_id`.
        chain_id: Where it goes.
        kind: What it carries.
        call: What it does.
        signer: Who sends it.
        fees: What it offers.
        nonce: The signer's next one unless given.

    Raises:
        LeaseLost: Another process sends the account's transactions; so do `replace`, `move_to_new_nonce` and `fill_gap`.
    """
    _require_mine(tx, chain_id, signer)
    outgoing = Outgoing(id, chain_id, kind, call, signer, _next_nonce(tx, chain_id, signer) if nonce is None else nonce)
    _sign(outgoing, signer, fees)
    now = states.now_ms()
    values = (id, chain_id, kind, signer.address, outgoing.signer_nonce, outgoing.raw, _broadcasts(outgoing), now, now)
    tx.execute(_INSERT, values)
    return outgoing


def fill_gap(tx: Transaction, chain_id: int, signer: Signer, nonce: int, fees: Fees, bytes_gas: int = 0) -> Outgoing:
    """Write an empty transaction of a signer to itself at a nonce that no row has; `bytes_gas` as `BytesGas` says."""
    call = Call(signer.address, b"", GAS_FILLER + bytes_gas)
    return write(tx, id=new_id(), chain_id=chain_id, kind="filler", call=call, signer=signer, fees=fees, nonce=nonce)


def replace(tx: Transaction, outgoing: Outgoing, fees: Fees) -> None:
    """Sign the same call at the same nonce for higher fees, and write it before anybody sees it."""
    assert outgoing.signer is not None
    _require_mine(tx, outgoing.chain_id, outgoing.signer)
    _sign(outgoing, outgoing.signer, fees)
    _update(tx, outgoing)


def move_to_new_nonce(tx: Transaction, outgoing: Outgoing, fees: Fees) -> None:
    """Sign the same call at a new nonce. Only once the chain proves that no form of it can be mined any more."""
    assert outgoing.signer is not None
    _require_mine(tx, outgoing.chain_id, outgoing.signer)
    outgoing.signer_nonce = _next_nonce(tx, outgoing.chain_id, outgoing.signer)
    _sign(outgoing, outgoing.signer, fees)
    _update(tx, outgoing)


def require_care(tx: Transaction, outgoing: Outgoing) -> None:
    """Let a unit decide about a transaction only while it is this process's to look after: a process that was stopped meanwhile
    knows a chain of long ago.

    Raises:
        LeaseLost: Another process sends the account's transactions.
    """
    if outgoing.signer is not None:
        _require_mine(tx, outgoing.chain_id, outgoing.signer)


def include(tx: Transaction, outgoing: Outgoing, receipt: dict[str, Any]) -> None:
    """Record that a transaction is in a block, and what it cost: from the signer's account to `gas`, in gwei.

    Recording it again changes nothing.
    """
    gas_used = int(receipt["gasUsed"], 16)
    # Rollups charge for their data on the chain below besides (`l1Fee`, OP stack).
    fee_wei = gas_used * int(receipt.get("effectiveGasPrice") or "0x0", 16) + int(receipt.get("l1Fee") or "0x0", 16)
    inclusions = outgoing.inclusions + 1
    if not states.move_transaction(
        tx,
        outgoing.id,
        "included",
        inclusions=inclusions,
        block_number=int(receipt["blockNumber"], 16),
        gas_used=gas_used,
        fee_wei=str(fee_wei),
    ):
        return
    outgoing.inclusions = inclusions
    fee_gwei = divide_up(fee_wei, WEI_PER_GWEI)
    signer, gas = _gas_accounts(tx, outgoing)
    if fee_gwei:
        transfers.post(
            tx, id=f"gas:{outgoing.id}:{inclusions}", debit=signer, credit=gas, amount=fee_gwei, reference=outgoing.id
        )


def exclude(tx: Transaction, outgoing: Outgoing) -> None:
    """A reorganisation took its block away: it is to be carried again, and has cost nothing yet."""
    if not states.move_transaction(tx, outgoing.id, "signed", block_number=None):
        return
    paid = transfers.find(tx, f"gas:{outgoing.id}:{outgoing.inclusions}")
    if paid is not None:
        signer, gas = _gas_accounts(tx, outgoing)
        reversal = f"ungas:{outgoing.id}:{outgoing.inclusions}"
        transfers.post(tx, id=reversal, debit=gas, credit=signer, amount=paid.amount, reference=outgoing.id)


def load_signed(tx: Transaction, chain_id: int, signers: Mapping[str, Signer | None]) -> list[Outgoing]:
    """Every transaction of these accounts that is not known to be in a block, by signer and nonce; without what they carry."""
    rows = tx.execute(
        f"SELECT {_COLUMNS} FROM chain_transaction WHERE chain_id=? AND state='signed' ORDER BY signer, signer_nonce",  # noqa: S608
        (chain_id,),
    ).fetchall()
    return [_outgoing(row, signers) for row in rows if row[3] in signers]


def signers_under_way(tx: Transaction, chain_id: int) -> set[str]:
    """The accounts of transactions that are not known to be in a block."""
    query = "SELECT DISTINCT signer FROM chain_transaction WHERE chain_id=? AND state='signed'"
    return {address for (address,) in tx.execute(query, (chain_id,)).fetchall()}


def load(tx: Transaction, ids: Sequence[str], signers: Mapping[str, Signer | None]) -> list[Outgoing]:
    """The transactions with these ids, without what they carry; `signer` is None where it is none of `signers`."""
    if not ids:
        return []
    marks = ",".join("?" * len(ids))
    rows = tx.execute(f"SELECT {_COLUMNS} FROM chain_transaction WHERE id IN ({marks})", tuple(ids)).fetchall()  # noqa: S608
    return [_outgoing(row, signers) for row in rows]


def load_from(tx: Transaction, chain_id: int, signer: Signer, nonce: int) -> list[Outgoing]:
    """A signer's transactions from a nonce on, whatever their state, but those that are lost; without what they carry."""
    rows = tx.execute(
        f"SELECT {_COLUMNS} FROM chain_transaction WHERE chain_id=? AND signer=? AND signer_nonce>=? AND state<>'lost'"  # noqa: S608
        " ORDER BY signer_nonce",
        (chain_id, signer.address, nonce),
    ).fetchall()
    return [_outgoing(row, {signer.address: signer}) for row in rows]


def is_included(tx: Transaction, transaction_id: str, block: int) -> bool:
    """Whether a transaction is in a block up to this one."""
    query = "SELECT 1 FROM chain_transaction WHERE id=? AND state='included' AND block_number<=?"
    return tx.execute(query, (transaction_id, block)).fetchone() is not None


def is_form_of(tx: Transaction, transaction_id: str | None, transaction_hash: str) -> bool:
    """Whether a hash is that of a form of this transaction that we signed."""
    return transaction_hash in hashes_of(tx, transaction_id)


def hashes_of(tx: Transaction, transaction_id: str | None) -> list[str]:
    """Of every form of a transaction that was signed, oldest first."""
    row = tx.execute("SELECT broadcasts FROM chain_transaction WHERE id=?", (transaction_id,)).fetchone()
    return [] if row is None else [signed["hash"] for signed in orjson.loads(row[0])]


def _require_mine(tx: Transaction, chain_id: int, signer: Signer) -> None:
    require(tx, signer_name(chain_id, signer.address), tx.instance)


def _next_nonce(tx: Transaction, chain_id: int, signer: Signer) -> int:
    assert signer.nonce_floor is not None
    highest = tx.execute(
        "SELECT MAX(signer_nonce) FROM chain_transaction WHERE chain_id=? AND signer=?", (chain_id, signer.address)
    ).fetchone()[0]
    return signer.nonce_floor if highest is None else max(int(highest) + 1, signer.nonce_floor)


def _sign(outgoing: Outgoing, signer: Signer, fees: Fees) -> None:
    signed = sign_transaction(
        signer.key, chain_id=outgoing.chain_id, nonce=outgoing.signer_nonce, call=outgoing.call, fees=fees
    )
    outgoing.fees, outgoing.raw = fees, signed.raw
    outgoing.hashes.append(signed.hash)
    outgoing.first_sent = outgoing.last_sent = 0.0


def _update(tx: Transaction, outgoing: Outgoing) -> None:
    earlier = tx.execute("SELECT broadcasts FROM chain_transaction WHERE id=?", (outgoing.id,)).fetchone()[0]
    tx.execute(
        "UPDATE chain_transaction SET signer_nonce=?, raw_transaction=?, broadcasts=?, updated_ms=? WHERE id=?",
        (outgoing.signer_nonce, outgoing.raw, _broadcasts(outgoing, earlier), states.now_ms(), outgoing.id),
    )
    tx.execute(
        "UPDATE settlement SET transaction_hash=? WHERE transaction_id=? AND state='submitted'",
        (outgoing.hashes[-1], outgoing.id),
    )


def _broadcasts(outgoing: Outgoing, earlier: str = "[]") -> str:
    newest = {
        "hash": outgoing.hashes[-1],
        "max_fee": str(outgoing.fees.max_fee),
        "priority_fee": str(outgoing.fees.priority_fee),
    }
    return orjson.dumps([*orjson.loads(earlier), newest]).decode()


def _gas_accounts(tx: Transaction, outgoing: Outgoing) -> tuple[str, str]:
    row = tx.execute("SELECT signer FROM chain_transaction WHERE id=?", (outgoing.id,)).fetchone()
    asset = native_asset(outgoing.chain_id)
    return account_id("signer", asset, row[0]), account_id("gas", asset)


def _outgoing(row: Sequence[Any], signers: Mapping[str, Signer | None]) -> Outgoing:
    raw, signed = bytes(row[5]), orjson.loads(row[6])
    return Outgoing(
        id=row[0],
        chain_id=row[1],
        kind=row[2],
        call=call_of(raw),
        signer=signers.get(row[3]),
        signer_nonce=row[4],
        raw=raw,
        hashes=[broadcast["hash"] for broadcast in signed],
        fees=Fees(int(signed[-1]["max_fee"]), int(signed[-1]["priority_fee"])),
        inclusions=row[7],
    )
