"""Withdrawals: a wallet takes its balance out, to its own proven address and no other.

A withdrawal holds its amount (and its fee) when it is asked for, and is a payout of the settlement engine from then on; a large
one waits for a person first. It is idempotent under the caller's key, and whatever fails gives the money back.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from payments import promises
from payments.chain.networks import Token
from payments.channels import book as channels
from payments.errors import PaymentError
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.ledger.transfers import InsufficientFunds
from payments.money import atomic_to_nano_down, nano_to_atomic_down, nano_to_usd
from payments.settlement import payouts
from payments.store import Transaction

State = Literal["review", "approved", "queued", "paid", "failed", "rejected"]

TRANSITIONS: dict[str, frozenset[str]] = {
    # Large: its money is held, and a person looks at it.
    "review": frozenset({"approved", "rejected"}),
    # A person has agreed; the gateway has not written its order yet.
    "approved": frozenset({"queued"}),
    # Its order is in the outbox.
    "queued": frozenset({"paid", "failed"}),
    # On the chain. Back only if a reorganisation took it away for good.
    "paid": frozenset({"failed"}),
    # The transfer came to nothing; the money is the wallet's again, unless a reorganisation brings the transfer all the same.
    "failed": frozenset({"paid"}),
    "rejected": frozenset(),
}
OPEN = ("review", "approved", "queued")

DAY_MS = 86_400_000
ENQUEUED_AT_ONCE = 100
PER_DAY_MAX = 50
"""Withdrawals of one wallet in a day, whatever became of them: each costs gas."""
_KEY = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
_COLUMNS = (
    "id, address, idempotency_key, asset, amount_nano_usd, fee_nano_usd, state, reason, created_ms, updated_ms,"
    " asked_nano_usd"
)


class WithdrawalRefused(PaymentError):
    """The withdrawal is not made, and nothing was held. 409 unless said otherwise."""

    status = 409


class UnknownWithdrawal(Exception):
    """There is no withdrawal with this id."""


class NotUnderReview(Exception):
    """The withdrawal does not wait for a person."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a wallet may take out. Amounts in nano-USD."""

    minimum: int
    maximum: int
    """Of one withdrawal."""
    daily: int
    """Of all of a wallet's in one token, within 24 hours."""
    review: int
    """From here on, counted like `daily`, a person looks at it first."""
    fee: int
    """Charged with each, an item of its own."""

    def as_json(self) -> dict[str, str]:
        """For whoever plans a withdrawal."""
        return {
            "minimum_usd": nano_to_usd(self.minimum),
            "maximum_usd": nano_to_usd(self.maximum),
            "daily_usd": nano_to_usd(self.daily),
            "review_from_usd": nano_to_usd(self.review),
            "fee_usd": nano_to_usd(self.fee),
        }


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A withdrawal as it stands, and the transaction that paid it. Amounts in nano-USD, times milliseconds since 1970."""

    id: str
    address: str
    idempotency_key: str
    asset: str
    amount_nano_usd: int
    fee_nano_usd: int
    state: State
    reason: str | None
    created_ms: int
    updated_ms: int
    asked_nano_usd: int | None
    """None for all that there was."""
    transaction_hash: str | None = None

    def as_json(self) -> dict[str, Any]:
        """What the API and the commands show."""
        return {
            "id": self.id,
            "address": self.address,
            "asset": self.asset,
            "amount_usd": nano_to_usd(self.amount_nano_usd),
            "fee_usd": nano_to_usd(self.fee_nano_usd),
            "state": self.state,
            "reason": self.reason,
            "transaction": self.transaction_hash,
            "created": _time(self.created_ms),
            "updated": _time(self.updated_ms),
        }


def request(
    tx: Transaction,
    *,
    address: str,
    idempotency_key: str,
    token: Token,
    amount_nano_usd: int | None,
    limits: Limits,
    treasury: str,
) -> tuple[Withdrawal, bool]:
    """Make a withdrawal, or find the one that was made with this key.

    Args:
        tx: The unit's transaction.
        address: The wallet that has signed in, lower-case hex: it is also who is paid.
        idempotency_key: The caller's own name for it.
        token: What is withdrawn.
        amount_nano_usd: What shall arrive, rounded down to the token's unit; None for all that there is.
        limits: The operator's.
        treasury: Who pays, lower-case hex.

    Returns:
        The withdrawal, and whether it is new.

    Raises:
        WithdrawalRefused: Saying which limit stands against it.
    """
    if not _KEY.fullmatch(idempotency_key):
        raise _Malformed(
            "invalid_idempotency_key",
            "send an Idempotency-Key of 1 to 128 characters (A-Z a-z 0-9 . _ : -): the same key again is the same withdrawal",
        )
    found = find(tx, address, idempotency_key)
    if found is not None:
        asked = None if amount_nano_usd is None else _whole(amount_nano_usd, token)
        same = asked == found.amount_nano_usd if asked is not None else found.asked_nano_usd is None
        if found.asset != token.asset or not same:
            raise WithdrawalRefused(
                "idempotency_conflict",
                f"this Idempotency-Key was used for another withdrawal ({found.id}); use a new one",
            )
        return found, False
    uncollected = channels.uncollected_nano_usd(tx, address, token.asset)
    uncollected += promises.reopened_nano_usd(tx, address, token.asset)
    # What has been spent of it meanwhile counts as uncollected still.
    available = max(transfers.balance(tx, payer_account(address, token.asset)).available - uncollected, 0)
    amount = _whole(available - limits.fee if amount_nano_usd is None else amount_nano_usd, token)
    if uncollected and (amount <= 0 or amount + limits.fee > available):
        raise WithdrawalRefused(
            "topup_unclaimed",
            f"{nano_to_usd(uncollected)} USD of this balance are on their way to the treasury still, or once more after a"
            f" reorganisation: {nano_to_usd(available)} USD can be withdrawn now, all of it in a minute",
        )
    recent = _check_limits(tx, address, token, amount, limits)
    withdrawal_id = f"wd_{secrets.token_hex(16)}"
    try:
        _hold(tx, withdrawal_id, address, token, amount, limits.fee)
    except InsufficientFunds:
        fee = f" and the fee of {nano_to_usd(limits.fee)}" if limits.fee else ""
        raise WithdrawalRefused(
            "insufficient_balance",
            f"{nano_to_usd(available)} USD are available in {token.asset}, less than {nano_to_usd(amount)} USD{fee}",
        ) from None
    state: State = "review" if recent + amount >= limits.review else "queued"
    asked = None if amount_nano_usd is None else amount
    _insert(tx, withdrawal_id, address, idempotency_key, token, amount, limits.fee, state, asked)
    if state == "queued":
        payouts.enqueue(tx, "withdrawal", withdrawal_id, address, token, _value(amount, token), treasury)
    made = get(tx, withdrawal_id)
    assert made is not None
    return made, True


def find(tx: Transaction, address: str, idempotency_key: str) -> Withdrawal | None:
    """The withdrawal that a wallet made with this key, or None."""
    rows = _select(tx, "WHERE withdrawal.address = ? AND withdrawal.idempotency_key = ?", (address, idempotency_key))
    return rows[0] if rows else None


def get(tx: Transaction, withdrawal_id: str) -> Withdrawal | None:
    """The withdrawal with this id, or None."""
    rows = _select(tx, "WHERE withdrawal.id = ?", (withdrawal_id,))
    return rows[0] if rows else None


def of_wallet(tx: Transaction, address: str, limit: int) -> list[Withdrawal]:
    """A wallet's withdrawals, newest first."""
    return _select(
        tx, "WHERE withdrawal.address = ? ORDER BY withdrawal.created_ms DESC, withdrawal.id LIMIT ?", (address, limit)
    )


def listed(tx: Transaction, states: tuple[str, ...], limit: int) -> list[Withdrawal]:
    """The withdrawals in these states, newest first; for whoever runs the gateway."""
    marks = ",".join("?" * len(states))
    return _select(
        tx,
        f"WHERE withdrawal.state IN ({marks}) ORDER BY withdrawal.created_ms DESC, withdrawal.id LIMIT ?",
        (*states, limit),
    )


def approve(tx: Transaction, withdrawal_id: str) -> Withdrawal:
    """A person agrees; the gateway sends it. Approving it again changes nothing.

    Raises:
        UnknownWithdrawal: There is none.
        NotUnderReview: It was decided otherwise.
    """
    return _decide(tx, withdrawal_id, "approved", None, done=("approved", "queued", "paid", "failed"))


def reject(tx: Transaction, withdrawal_id: str, reason: str) -> Withdrawal:
    """A person refuses; the money is the wallet's again. Rejecting it again changes nothing.

    Raises:
        UnknownWithdrawal: There is none.
        NotUnderReview: It was decided otherwise.
    """
    rejected = _decide(tx, withdrawal_id, "rejected", reason, done=("rejected",))
    _free(tx, rejected.id)
    return rejected


def enqueue_approved(tx: Transaction, tokens: dict[str, Token], treasury: str) -> list[str]:
    """Write the orders of what was approved, what was asked for first before the rest; returns their ids, for the engine to
    take up.

    Args:
        tx: The unit's transaction.
        tokens: By asset, those that this treasury pays out.
        treasury: Lower-case hex.
    """
    enqueued = []
    for each in approved(tx, tokens, ENQUEUED_AT_ONCE):
        token = tokens[each.asset]
        if move(tx, each.id, "queued"):
            value = _value(each.amount_nano_usd, token)
            payouts.enqueue(tx, "withdrawal", each.id, each.address, token, value, treasury)
            enqueued.append(each.id)
    return enqueued


def approved(tx: Transaction, assets: Collection[str], limit: int) -> list[Withdrawal]:
    """What was approved in these tokens and is not sent yet, oldest first."""
    marks = ",".join("?" * len(assets))
    condition = (
        f"WHERE withdrawal.state = 'approved' AND withdrawal.asset IN ({marks}) ORDER BY withdrawal.created_ms LIMIT ?"
    )
    return _select(tx, condition, (*assets, limit))


def on_paid(tx: Transaction, row: dict[str, Any], token: Token) -> None:
    """The settlement engine has evidence of a withdrawal's transfer."""
    payouts.paid(tx, row, token)
    fee = transfers.find(tx, _fee_id(row["id"]))
    if fee is not None:
        payouts.take(tx, _fee_id(row["id"]), fee.amount)
    move(tx, row["id"], "paid")


def on_failed(tx: Transaction, row: dict[str, Any]) -> None:
    """A withdrawal's transfer cannot be made: the money is the wallet's again, and its fee."""
    payouts.failed(tx, row)
    payouts.give_back(tx, _fee_id(row["id"]))
    move(tx, row["id"], "failed", row.get("reason"))


def move(tx: Transaction, withdrawal_id: str, to: State, reason: str | None = None) -> bool:
    """Move a withdrawal to a state that may follow its own; False, with nothing changed, if it may not."""
    sources = tuple(source for source, targets in TRANSITIONS.items() if to in targets)
    marks = ",".join("?" * len(sources))
    row = tx.execute(
        f"UPDATE withdrawal SET state = ?, reason = ?, updated_ms = ? WHERE id = ? AND state IN ({marks}) RETURNING id",  # noqa: S608 - only marks
        (to, reason, _now_ms(), withdrawal_id, *sources),
    ).fetchone()
    return row is not None


class _Malformed(WithdrawalRefused):
    status = 400


def _check_limits(tx: Transaction, address: str, token: Token, amount: int, limits: Limits) -> int:
    """What was withdrawn within a day before this, after checking that this may follow."""
    since = _now_ms() - DAY_MS
    count, recent = tx.execute(
        "SELECT COUNT(*), COALESCE(SUM(CASE WHEN asset = ? AND state NOT IN ('failed', 'rejected')"
        " THEN amount_nano_usd ELSE 0 END), 0) FROM withdrawal WHERE address = ? AND created_ms > ?",
        (token.asset, address, since),
    ).fetchone()
    recent = int(recent)
    if amount < max(limits.minimum, 1):
        raise WithdrawalRefused(
            "below_minimum",
            f"{nano_to_usd(max(amount, 0))} USD are less than the minimum of {nano_to_usd(limits.minimum)}",
        )
    if amount > limits.maximum:
        raise WithdrawalRefused(
            "above_maximum", f"at most {nano_to_usd(limits.maximum)} USD can be withdrawn at once; make several"
        )
    if recent + amount > limits.daily or count >= PER_DAY_MAX:
        raise WithdrawalRefused(
            "daily_limit",
            f"{nano_to_usd(recent)} USD in {count} withdrawals were made within 24 hours; the limits are"
            f" {nano_to_usd(limits.daily)} USD and {PER_DAY_MAX}. Come back later",
        )
    return recent


def _hold(tx: Transaction, withdrawal_id: str, address: str, token: Token, amount: int, fee: int) -> None:
    if transfers.balance(tx, payer_account(address, token.asset)).available < amount + fee:
        raise InsufficientFunds
    payouts.hold(tx, "withdrawal", withdrawal_id, address, token, _value(amount, token))
    if fee:
        transfers.hold(
            tx,
            id=_fee_id(withdrawal_id),
            debit=payer_account(address, token.asset),
            credit=account_id("revenue", token.asset),
            amount=fee,
            reference=withdrawal_id,
        )


def _free(tx: Transaction, withdrawal_id: str) -> None:
    transfers.void(tx, f"withdrawal:{withdrawal_id}")
    if transfers.find(tx, _fee_id(withdrawal_id)) is not None:
        transfers.void(tx, _fee_id(withdrawal_id))


def _decide(tx: Transaction, withdrawal_id: str, to: State, reason: str | None, done: tuple[str, ...]) -> Withdrawal:
    moved = move(tx, withdrawal_id, to, reason)
    found = get(tx, withdrawal_id)
    if found is None:
        raise UnknownWithdrawal(f"there is no withdrawal {withdrawal_id}")
    if not moved and found.state not in done:
        raise NotUnderReview(f"{withdrawal_id} does not wait for a decision: it is {found.state}")
    return found


def _select(tx: Transaction, conditions: str, parameters: tuple[Any, ...]) -> list[Withdrawal]:
    columns = ", ".join(f"withdrawal.{name}" for name in _COLUMNS.split(", "))
    rows = tx.execute(
        f"SELECT {columns}, CASE WHEN withdrawal.state = 'paid' THEN settlement.transaction_hash END"  # noqa: S608 - conditions from this module
        f" FROM withdrawal LEFT JOIN settlement ON settlement.id = withdrawal.id {conditions}",
        parameters,
    ).fetchall()
    return [Withdrawal(*row) for row in rows]


def _insert(
    tx: Transaction,
    id: str,
    address: str,
    key: str,
    token: Token,
    amount: int,
    fee: int,
    state: State,
    asked: int | None,
) -> None:
    now = _now_ms()
    tx.execute(
        f"INSERT INTO withdrawal ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - a constant
        (id, address, key, token.asset, amount, fee, state, None, now, now, asked),
    )


def _whole(amount_nano_usd: int, token: Token) -> int:
    """What is left of an amount when it has become whole units of the token: what leaves rounds down."""
    return atomic_to_nano_down(_value(max(amount_nano_usd, 0), token), token.decimals)


def _value(amount_nano_usd: int, token: Token) -> int:
    return nano_to_atomic_down(amount_nano_usd, token.decimals)


def _fee_id(withdrawal_id: str) -> str:
    return f"withdrawal-fee:{withdrawal_id}"


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
