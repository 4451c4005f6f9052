"""What `agent.wallet` returns: frozen, amounts as dollar texts, times in UTC."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Balance:
    """Credit with the gateway in one token."""

    asset: str
    available_usd: str
    held_usd: str


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One line of a balance's history. `amount_usd` is negative for what left."""

    id: str
    type: str
    """payment, topup, deposit, charge, withdrawal, refund, …"""
    asset: str
    amount_usd: str
    state: str
    """pending or posted"""
    at: datetime
    receipt: str | None
    transaction: str | None


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """Some lines, newest first. `next` is what to give as `before` for those before them; None if there are none."""

    entries: tuple[HistoryEntry, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class TopUp:
    """A payment that became balance."""

    asset: str
    credited_usd: str
    receipt: str
    transaction: str | None


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A withdrawal to the wallet's own address."""

    id: str
    asset: str
    amount_usd: str
    fee_usd: str
    state: str
    """review (waits for a person), approved, queued, paid, failed or rejected: the last two gave the money back."""
    reason: str | None
    transaction: str | None
    created: datetime


@dataclass(frozen=True, slots=True)
class DepositAddress:
    """An address of the wallet's own: what is sent there in one of the tokens becomes its balance."""

    network: str
    address: str
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that sees (balance and history) and spends the wallet's balance, and can do nothing else."""

    id: str
    name: str
    prefix: str
    created: datetime
    revoked: datetime | None


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A key that was made just now: the only time that it is shown."""

    key: str = field(repr=False)
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Channel:
    """A payment channel, by this agent's log.

    `deposited_usd` is what lies in it; of that `charged_usd` were charged, `under_way_usd` are the maxima of requests whose
    outcome is not known, and `unspent_usd` is the rest. `claimable_usd` is what the gateway could claim in all with the
    vouchers that it has, whatever was charged. `gateway` is the URL that it was used with last; any that serves its `receiver`
    takes it.
    """

    id: str
    asset: str
    deposited_usd: str
    charged_usd: str
    under_way_usd: str
    unspent_usd: str
    claimable_usd: str
    receiver: str
    gateway: str
    withdraw_delay_s: int


@dataclass(frozen=True, slots=True)
class Refund:
    """What a channel gave back. `transaction` is None if that was seen only by its being gone."""

    channel: str
    asset: str
    refunded_usd: str
    transaction: str | None
