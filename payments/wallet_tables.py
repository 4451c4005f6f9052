"""The part of the schema that is about wallets' balances, see `payments.tables`."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, UniqueConstraint
from sqlmodel import Field, SQLModel

from payments.columns import big as _big


class WalletAccount(SQLModel, table=True):
    """A wallet that keeps a balance here on purpose: it topped up, deposited or made a key. Others' credit is sent back."""

    __tablename__ = "wallet_account"

    address: str = Field(primary_key=True)
    """Lower-case hex."""
    opened_ms: int = Field(sa_column=_big())


class Withdrawal(SQLModel, table=True):
    """What a wallet takes out, to its own address. The settlement that pays it has the same id."""

    __tablename__ = "withdrawal"
    __table_args__ = (UniqueConstraint("address", "idempotency_key"),)

    id: str = Field(primary_key=True)
    address: str
    """Who asked and who is paid, lower-case hex."""
    idempotency_key: str
    asset: str
    amount_nano_usd: int = Field(sa_column=_big())
    """What arrives: whole units of the token."""
    fee_nano_usd: int = Field(sa_column=_big())
    state: str = Field(index=True)
    """review | approved | queued | paid | failed | rejected; the transitions stand in `payments.withdrawals`."""
    reason: str | None = None
    created_ms: int = Field(sa_column=_big())
    updated_ms: int = Field(sa_column=_big())
    asked_nano_usd: int | None = Field(sa_column=Column(BigInteger, nullable=True))
    """The amount that was asked for, in whole units; none for all that there was, or before this was kept."""


class DepositAddress(SQLModel, table=True):
    """An address of a wallet's own, to which it deposits by plain transfer."""

    __tablename__ = "deposit_address"

    chain_id: int = Field(sa_column=Column(BigInteger, primary_key=True))
    address: str = Field(primary_key=True)
    wallet: str = Field(index=True)
    factory: str
    """The contract that can sweep it."""
    created_ms: int = Field(sa_column=_big())


class DepositCursor(SQLModel, table=True):
    """How far a chain's deposits were read into the ledger."""

    __tablename__ = "deposit_cursor"

    chain_id: int = Field(sa_column=Column(BigInteger, primary_key=True))
    block_number: int = Field(sa_column=_big())
    block_hash: str
    """To notice a reorganisation below the confirmation depth."""


class ForwarderMovement(SQLModel, table=True):
    """A Transfer to or from a deposit address, booked under the ledger transfer of the same id."""

    __tablename__ = "forwarder_movement"
    __table_args__ = (Index("forwarder_movement_block", "chain_id", "block_number"),)

    id: str = Field(primary_key=True)
    """`log:<transaction hash>:<log index>`"""
    chain_id: int = Field(sa_column=_big())
    asset: str
    direction: str
    """in | out"""
    address: str
    wallet: str
    other: str
    """Who sent it, or who got it."""
    amount_nano_usd: int = Field(sa_column=_big())
    transaction_hash: str
    log_index: int = Field(sa_column=_big())
    block_number: int = Field(sa_column=_big())
    state: str
    """booked | reversed (a reorganisation took it away; booked again if it comes back)"""
    bookings: int = 0
    """How often it was reversed; one more where a check of the books had booked its log first, under the id."""
    created_ms: int = Field(sa_column=_big())
