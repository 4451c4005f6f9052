"""The channels' part of the schema, see `payments.tables`."""

from __future__ import annotations

from sqlalchemy import Column, Index, LargeBinary, text
from sqlmodel import Field, SQLModel

from payments.columns import big as _big


class Channel(SQLModel, table=True):
    """A payment channel of the scheme `batch-settlement`: what the chain says of it, and what was charged through it."""

    __tablename__ = "channel"

    id: str = Field(primary_key=True)
    """The channel's id on its chain: 0x and 64 hex digits, lower case."""
    chain_id: int = Field(sa_column=_big())
    asset: str
    state: str
    """new | open | withdrawing | drained; the transitions stand in `payments.channels.book`."""
    payer: str = Field(index=True)
    payer_authorizer: str
    receiver: str
    receiver_authorizer: str
    token: str
    withdraw_delay: int = Field(sa_column=_big())
    salt: str
    """0x and 64 hex digits."""
    balance: str = "0"
    """On chain, with what was claimed: atomic units, decimal text, as are the next two."""
    total_claimed: str = "0"
    withdraw_amount: str = "0"
    """What the payer announced that it will take out."""
    withdraw_at: int = Field(default=0, sa_column=_big(default=0))
    """Unix seconds of that announcement; 0 without one."""
    refund_nonce: str = "0"
    synced_block: int = Field(default=-1, sa_column=_big(default=-1))
    """The block that the five above are of; -1 before the first look."""
    marks: int = Field(default=0, sa_column=_big(default=0))
    """Counts what is known to have happened to it on chain; more than `synced_marks` until the chain was asked again."""
    synced_marks: int = Field(default=0, sa_column=_big(default=0))
    voucher: str = "0"
    """The highest amount that the payer signed, atomic units as decimal text."""
    signature: bytes = Field(default=b"", sa_column=Column(LargeBinary, nullable=False))
    """Of that voucher."""
    charged_nano_usd: int = Field(default=0, sa_column=_big(default=0))
    """Captured in all."""
    claimed_nano_usd: int = Field(default=0, sa_column=_big(default=0))
    """Of that, claimed on chain."""
    lost_nano_usd: int = Field(default=0, sa_column=_big(default=0))
    """Of that, beyond what the channel holds: the operator's loss, unless the payer deposits again."""
    announced: str = "0"
    """What the payer was told that was charged, atomic units as decimal text: a stream announces its maximum."""
    refunding: str = "0"
    """What the refunds that were signed may still give back, atomic units as decimal text."""
    refund_id: str | None = None
    """The settlement of a refund under way."""
    claim_id: str | None = Field(default=None, index=True)
    """The settlement of a claim under way."""
    claim_from_ms: int = Field(default=0, sa_column=_big(default=0))
    """No claim before this, after one that failed."""
    unclaimed_since_ms: int | None = Field(default=None, sa_column=_big(nullable=True))
    topped_up_to_nano_usd: int = Field(default=0, sa_column=_big(default=0))
    """`charged_nano_usd` when its payer last topped up its balance here, in whole atomic units."""
    unpaid_transactions: int = Field(default=0, sa_column=_big(default=0))
    """Deposits and refunds that were ordered, less the requests that were charged since; counted from `unpaid_since_ms` on."""
    unpaid_since_ms: int = Field(default=0, sa_column=_big(default=0))
    created_ms: int = Field(sa_column=_big())
    updated_ms: int = Field(sa_column=_big())


class ChannelRequest(SQLModel, table=True):
    """A request paid through a channel: the same voucher for the same request finds its first outcome here."""

    __tablename__ = "channel_request"
    __table_args__ = (
        Index("channel_request_voucher", "channel_id", "voucher"),
        Index(
            "channel_request_deposit",
            "deposit_id",
            sqlite_where=text("deposit_id IS NOT NULL"),
            postgresql_where=text("deposit_id IS NOT NULL"),
        ),
    )

    digest: bytes = Field(sa_column=Column(LargeBinary, primary_key=True))
    """SHA-256 over payment and request."""
    channel_id: str = Field(foreign_key="channel.id")
    voucher: str
    """The amount of its voucher, atomic units as decimal text."""
    receipt_id: str = Field(unique=True, foreign_key="receipt.id")
    deposit_id: str | None = None
    """The settlement of the deposit that it waits for."""
    exposed_nano_usd: int = Field(default=0, sa_column=_big(default=0))
    """Inference that may begin before that deposit has arrived."""
    created_ms: int = Field(sa_column=_big())


class ChannelClaim(SQLModel, table=True):
    """What one settlement claims from one channel."""

    __tablename__ = "channel_claim"

    settlement_id: str = Field(primary_key=True)
    channel_id: str = Field(primary_key=True, foreign_key="channel.id")
    amount_nano_usd: int = Field(sa_column=_big())
    """What this adds to what was claimed."""
    total: str
    """What is claimed in all after it, atomic units as decimal text."""
