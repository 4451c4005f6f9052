"""What is known of each channel, and every decision about it. Everything here runs inside store units.

A channel's money: the payer's deposits are its `balance` on chain. What was captured is `charged`; requests under way hold
their quoted maxima on the ledger's account `receivable:<channel>`, from which captures go to revenue. A request is taken if
the payer's highest voucher covers charged + held + price, and the balance on chain does too. Of the chain only states are
kept, never differences: whatever happens to a channel is *marked*, and before anything is decided about a marked channel its
state is read again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from payments.chain.channel_contract import ChannelState
from payments.chain.networks import Token
from payments.errors import PaymentRefused
from payments.ledger import transfers
from payments.ledger.accounts import account_id
from payments.money import atomic_to_nano_down, nano_to_atomic_down, nano_to_atomic_up
from payments.store import Transaction
from payments.x402.channels import ChannelConfig, ChannelStatus, Voucher, hex32

TRANSITIONS: dict[str, frozenset[str]] = {
    # Known by a voucher; its first deposit is not on chain.
    "new": frozenset({"open", "withdrawing", "drained"}),
    "open": frozenset({"withdrawing", "drained"}),
    # The payer announced a withdrawal: what it owes has to be claimed before the delay is over.
    "withdrawing": frozenset({"open", "drained"}),
    # Nothing is left beyond what was claimed. A deposit opens it again.
    "drained": frozenset({"open", "withdrawing"}),
}

_COLUMNS = (
    "id, chain_id, asset, state, payer, payer_authorizer, receiver, receiver_authorizer, token, withdraw_delay, salt, balance,"
    " total_claimed, withdraw_amount, withdraw_at, refund_nonce, synced_block, marks, synced_marks, voucher, signature,"
    " charged_nano_usd, claimed_nano_usd, lost_nano_usd, announced, refunding, refund_id, claim_id, claim_from_ms,"
    " unclaimed_since_ms, topped_up_to_nano_usd"
)
_FIND = f"SELECT {_COLUMNS} FROM channel WHERE id = ?"  # noqa: S608 - columns from this module
_INSERT = (
    "INSERT INTO channel (id, chain_id, asset, state, payer, payer_authorizer, receiver, receiver_authorizer, token,"
    " withdraw_delay, salt, balance, total_claimed, withdraw_amount, withdraw_at, refund_nonce, synced_block, marks,"
    " synced_marks, voucher, signature, charged_nano_usd, claimed_nano_usd, lost_nano_usd, announced, refunding,"
    " claim_from_ms, topped_up_to_nano_usd, unpaid_transactions, unpaid_since_ms, created_ms, updated_ms)"
    " VALUES (?, ?, ?, 'new', ?, ?, ?, ?, ?, ?, ?,"
    " '0', '0', '0', 0, '0', -1, 0, 0, '0', ?, 0, 0, 0, '0', '0', 0, 0, 0, 0, ?, ?)"
    " ON CONFLICT (id) DO NOTHING"
)
_REFUNDS = (
    "SELECT authorization_nonce, value FROM settlement"
    " WHERE reference = ? AND kind = 'channel_refund' AND state <> 'final'"
)
_UNPAID = "SELECT COALESCE(SUM(unpaid_transactions), 0) FROM channel WHERE payer = ? AND unpaid_since_ms > ?"
_COUNT_TRANSACTION = """
    UPDATE channel SET
        unpaid_transactions = CASE WHEN unpaid_since_ms > ? THEN unpaid_transactions + 1 ELSE 1 END,
        unpaid_since_ms = CASE WHEN unpaid_since_ms > ? THEN unpaid_since_ms ELSE ? END
    WHERE id = ?
"""
_COUNT_REQUEST = (
    "UPDATE channel SET unpaid_transactions = unpaid_transactions - 1 WHERE id = ? AND unpaid_transactions > 0"
)
_SETTABLE = frozenset({
    "balance", "total_claimed", "withdraw_amount", "withdraw_at", "refund_nonce", "synced_block", "synced_marks", "voucher",
    "signature", "charged_nano_usd", "claimed_nano_usd", "lost_nano_usd", "announced", "refunding", "refund_id", "claim_id",
    "claim_from_ms", "unclaimed_since_ms", "topped_up_to_nano_usd",
})  # fmt: skip


UNPAID_MAX = 10
"""Transactions in one `UNPAID_WINDOW_MS` for one payer, by whichever channels, that no request was charged for."""
UNPAID_WINDOW_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel as the database has it. Amounts without a unit in their name are the token's atomic units."""

    id: str
    chain_id: int
    asset: str
    state: str
    config: ChannelConfig
    on_chain: ChannelState
    synced_block: int
    marks: int
    synced_marks: int
    voucher: int
    signature: bytes
    charged_nano_usd: int
    claimed_nano_usd: int
    lost_nano_usd: int
    announced: int
    refunding: int
    refund_id: str | None
    claim_id: str | None
    claim_from_ms: int
    unclaimed_since_ms: int | None
    topped_up_to_nano_usd: int

    @property
    def number(self) -> int:
        """The id as the contract's bytes32."""
        return int(self.id, 16)

    @property
    def unsynced(self) -> bool:
        """Whether the chain must be asked before anything is decided."""
        return self.synced_block < 0 or self.marks != self.synced_marks

    @property
    def account(self) -> str:
        """Its account in the ledger."""
        return receivable(self.id, self.asset)

    @property
    def uncollected_nano_usd(self) -> int:
        """At least what of its payer's balance was topped up here and is not in the treasury yet."""
        return max(0, self.topped_up_to_nano_usd - self.claimed_nano_usd)

    @property
    def claimable_nano_usd(self) -> int:
        """What was charged and is not claimed yet, as far as the channel holds it."""
        return self.charged_nano_usd - self.lost_nano_usd - self.claimed_nano_usd

    @property
    def spendable(self) -> int:
        """What it holds, claimed or not, and will not give back."""
        return self.on_chain.balance - self.on_chain.withdraw_amount - self.refunding

    def status(self, charged: int | None = None) -> ChannelStatus:
        """What the payer is told; `charged` where it is to count another sum than the announced one."""
        state = self.on_chain
        return ChannelStatus(
            self.id,
            state.balance,
            state.total_claimed,
            state.withdraw_at,
            state.refund_nonce,
            self.announced if charged is None else charged,
        )

    def highest(self) -> Voucher | None:
        """The highest voucher, None if there is none."""
        return Voucher(self.number, self.voucher, self.signature) if self.signature else None


@dataclass(frozen=True, slots=True)
class Seen:
    """What the chain says of a channel."""

    state: ChannelState
    block: int
    """The block that it is of."""
    marks: int
    """The channel's marks before the chain was asked."""


def receivable(channel_id: str, asset: str) -> str:
    """The ledger's account of what was earned through a channel and is not in the treasury yet."""
    return account_id("receivable", asset, channel_id)


def find(tx: Transaction, channel_id: str) -> Channel | None:
    """The channel with this id (0x and 64 hex digits), or None."""
    row = tx.execute(_FIND, (channel_id,)).fetchone()
    return None if row is None else from_row(row)


def select(tx: Transaction, condition: str, parameters: tuple[Any, ...]) -> list[Channel]:
    """Every channel for which an SQL condition of ours holds."""
    sql = f"SELECT {_COLUMNS} FROM channel WHERE {condition}"  # noqa: S608 - conditions are this package's own
    return [from_row(row) for row in tx.execute(sql, parameters).fetchall()]


def from_row(row: tuple[Any, ...]) -> Channel:
    """A channel from its columns."""
    config = ChannelConfig(row[4], row[5], row[6], row[7], row[8], row[9], int(row[10], 16))
    on_chain = ChannelState(int(row[11]), int(row[12]), int(row[13]), row[14], int(row[15]))
    sums = (int(row[24]), int(row[25]))
    fields: list[Any] = [
        *row[:4],
        config,
        on_chain,
        *row[16:19],
        int(row[19]),
        bytes(row[20]),
        *row[21:24],
        *sums,
        *row[26:],
    ]
    return Channel(*fields)


def ensure(tx: Transaction, channel_id: str, config: ChannelConfig, token: Token) -> Channel:
    """The channel, entered into the book if it is not there yet."""
    now = now_ms()
    tx.execute(
        _INSERT,
        (
            channel_id,
            token.chain_id,
            token.asset,
            config.payer,
            config.payer_authorizer,
            config.receiver,
            config.receiver_authorizer,
            config.token,
            config.withdraw_delay,
            hex32(config.salt),
            b"",
            now,
            now,
        ),
    )
    channel = find(tx, channel_id)
    assert channel is not None
    assert channel.config == config
    return channel


def put(tx: Transaction, channel_id: str, **columns: Any) -> None:
    """Set columns of a channel; sums of atomic units become text here."""
    assert columns.keys() <= _SETTABLE
    assignments = ", ".join(f"{column} = ?" for column in columns)
    values = [str(value) if column in _TEXTS else value for column, value in columns.items()]
    tx.execute(
        f"UPDATE channel SET {assignments}, updated_ms = ? WHERE id = ?",  # noqa: S608 - names from this module
        (*values, now_ms(), channel_id),
    )


_TEXTS = frozenset({"balance", "total_claimed", "withdraw_amount", "refund_nonce", "voucher", "announced", "refunding"})


def mark(tx: Transaction, channel_id: str, block_number: int | None) -> None:
    """Something happened to a channel on chain, in a block: nothing is decided about it before it was looked at again."""
    tx.execute(
        "UPDATE channel SET marks = marks + 1, synced_block = CASE WHEN synced_block < ? THEN ? ELSE synced_block END"
        " WHERE id = ?",
        (block_number or 0, block_number or 0, channel_id),
    )


def sync(tx: Transaction, channel_id: str, seen: Seen, token: Token) -> Channel:
    """Take over what the chain says of a channel.

    Args:
        tx: The unit's transaction.
        channel_id: The channel's.
        seen: What the chain says; of an older block than is known it changes nothing, so that no lagging node takes money
            away.
        token: What the channel is in.

    Returns:
        The channel as it is now.
    """
    current = find(tx, channel_id)
    assert current is not None
    state = seen.state
    if seen.block < current.synced_block:
        return current
    _move(tx, current, _state_of(state, current.state))
    claimed_nano_usd = atomic_to_nano_down(state.total_claimed, token.decimals)
    columns: dict[str, Any] = {
        "balance": state.balance,
        "total_claimed": state.total_claimed,
        "withdraw_amount": state.withdraw_amount if state.withdraw_at else 0,
        "withdraw_at": state.withdraw_at,
        "refund_nonce": state.refund_nonce,
        "refunding": signed_refunds(tx, channel_id, state.refund_nonce),
        "synced_block": seen.block,
        "synced_marks": seen.marks,
    }
    if claimed_nano_usd > current.charged_nano_usd:
        # A channel from before this database: what was claimed was charged.
        columns["charged_nano_usd"] = columns["claimed_nano_usd"] = claimed_nano_usd
        columns["announced"] = max(current.announced, state.total_claimed)
    put(tx, channel_id, **columns)
    book_claimed(tx, channel_id, claimed_nano_usd, token)
    _book_losses(tx, channel_id, token)
    synced = find(tx, channel_id)
    assert synced is not None
    return synced


def signed_refunds(tx: Transaction, channel_id: str, refund_nonce: int) -> int:
    """What refunds that we signed may still give back, atomic units, when the chain has made those below `refund_nonce`.

    Whoever has seen one can submit it, also when ours has failed or a reorganisation took it away; of one nonce it is one.
    """
    greatest: dict[int, int] = {}
    for nonce, value in tx.execute(_REFUNDS, (channel_id,)).fetchall():
        if int(nonce) >= refund_nonce:
            greatest[int(nonce)] = max(int(value), greatest.get(int(nonce), 0))
    return sum(greatest.values())


def book_claimed(tx: Transaction, channel_id: str, claimed_nano_usd: int, token: Token) -> None:
    """What was claimed in all is in the treasury and not outstanding; less than before if a reorganisation took it back."""
    channel = find(tx, channel_id)
    assert channel is not None
    change = claimed_nano_usd - channel.claimed_nano_usd
    if change:
        _post(tx, channel, "claimed", account_id("custody", channel.asset), change)
    settled = not _owes(channel.charged_nano_usd - claimed_nano_usd, token)
    since = None if settled else (now_ms() if change else channel.unclaimed_since_ms)
    put(tx, channel_id, claimed_nano_usd=claimed_nano_usd, unclaimed_since_ms=since)


def count_transaction(tx: Transaction, channel: Channel) -> None:
    """Count a deposit or a refund that is ordered now. Its gas is ours, and each charged request makes up for one: else a payer
    could have us make one for every atomic unit.

    Raises:
        PaymentRefused: ``unpaid_transactions``: there were too many for this payer lately; nothing was changed.
    """
    now = now_ms()
    since = now - UNPAID_WINDOW_MS
    (unpaid,) = tx.execute(_UNPAID, (channel.config.payer, since)).fetchone()
    if unpaid >= UNPAID_MAX:
        raise PaymentRefused(
            "unpaid_transactions",
            f"{UNPAID_MAX} deposits and refunds were made for this wallet within an hour that no charged request makes up for;"
            " use what is deposited, or send it again later",
        )
    tx.execute(_COUNT_TRANSACTION, (since, since, now, channel.id))


def held_nano_usd(tx: Transaction, channel: Channel) -> int:
    """What requests under way may still cost."""
    return transfers.balance(tx, channel.account).pending_out


def charge(tx: Transaction, channel_id: str, amount_nano_usd: int, announced: int, token: Token) -> None:
    """Count what a captured request cost; its payer was told `announced` atomic units in all."""
    channel = find(tx, channel_id)
    assert channel is not None
    charged = channel.charged_nano_usd + amount_nano_usd
    owed_before, owes = channel.unclaimed_since_ms, _owes(charged - channel.claimed_nano_usd, token)
    if amount_nano_usd:
        tx.execute(_COUNT_REQUEST, (channel_id,))
    put(
        tx,
        channel_id,
        charged_nano_usd=charged,
        announced=min(max(channel.announced, announced), max(channel.voucher, channel.announced)),
        unclaimed_since_ms=(owed_before or now_ms()) if owes else None,
    )


def credit(tx: Transaction, channel_id: str, amount_nano_usd: int, announced: int, token: Token) -> None:
    """Count a top-up as charged: what it came to is claimed at once, and not paid out before."""
    charge(tx, channel_id, amount_nano_usd, announced, token)
    channel = find(tx, channel_id)
    assert channel is not None
    whole = nano_to_atomic_down(channel.charged_nano_usd, token.decimals)
    put(tx, channel_id, topped_up_to_nano_usd=atomic_to_nano_down(whole, token.decimals))


def uncollected_nano_usd(tx: Transaction, payer: str, asset: str) -> int:
    """What of a payer's balance (lower-case hex) is in its channels still: no other payer's money may be paid out for it."""
    channels = select(tx, "payer = ? AND asset = ? AND topped_up_to_nano_usd > claimed_nano_usd", (payer, asset))
    return sum(channel.uncollected_nano_usd for channel in channels)


def unclaimable_nano_usd(channel: Channel, token: Token) -> int:
    """What was charged beyond what the channel holds on chain."""
    return max(0, channel.charged_nano_usd - atomic_to_nano_down(channel.on_chain.balance, token.decimals))


def announce(tx: Transaction, channel: Channel, held: int, decimals: int, *, bump: bool = False) -> Channel:
    """Choose the sum that a payer who is out of step is to count from: all that is charged and held, as far as it has signed.

    Args:
        tx: The unit's transaction.
        channel: The channel.
        held: Nano-USD of requests under way.
        decimals: Of the token.
        bump: Count one unit more, so that the payer's next voucher is another one than its last.
    """
    sum_now = max(channel.announced, nano_to_atomic_up(channel.charged_nano_usd + held, decimals)) + int(bump)
    announced = max(channel.announced, min(sum_now, channel.voucher)) if channel.signature else sum_now
    put(tx, channel.id, announced=announced)
    found = find(tx, channel.id)
    assert found is not None
    return found


def now_ms() -> int:
    """Milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


def _owes(outstanding_nano_usd: int, token: Token) -> bool:
    """Whether something can be claimed: less than the token's unit is claimed with what comes next."""
    return nano_to_atomic_down(outstanding_nano_usd, token.decimals) > 0


def _state_of(state: ChannelState, before: str) -> str:
    if state.withdraw_at:
        return "withdrawing"
    if state.balance > state.total_claimed:
        return "open"
    return "new" if before == "new" and state.balance == 0 else "drained"


def _move(tx: Transaction, channel: Channel, to: str) -> None:
    if channel.state == to:
        return
    assert to in TRANSITIONS[channel.state], f"{channel.state} → {to}"
    tx.execute("UPDATE channel SET state = ? WHERE id = ?", (to, channel.id))


def _book_losses(tx: Transaction, channel_id: str, token: Token) -> None:
    """What a payer took out before it was claimed is the operator's loss, until a deposit covers it again."""
    channel = find(tx, channel_id)
    assert channel is not None
    lost = unclaimable_nano_usd(channel, token)
    if lost != channel.lost_nano_usd:
        _post(tx, channel, "loss", account_id("variance", channel.asset), lost - channel.lost_nano_usd)
        put(tx, channel_id, lost_nano_usd=lost)


def _post(tx: Transaction, channel: Channel, what: str, account: str, amount_nano_usd: int) -> None:
    """Move an amount from one of the books' own accounts to the channel's, or back if it is below zero."""
    debit, credit = (account, channel.account) if amount_nano_usd > 0 else (channel.account, account)
    name = f"{what}:{channel.id}:"
    transfer_id = f"{name}{transfers.count(tx, channel.id, name)}"
    transfers.post(tx, id=transfer_id, debit=debit, credit=credit, amount=abs(amount_nano_usd), reference=channel.id)
