"""Payment channels: their state, the requests paid through them, and what is claimed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the three tables."""
    op.create_table(
        "channel",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("chain_id", sa.BigInteger(), nullable=False),
        sa.Column("asset", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("payer", sa.String(), nullable=False),
        sa.Column("payer_authorizer", sa.String(), nullable=False),
        sa.Column("receiver", sa.String(), nullable=False),
        sa.Column("receiver_authorizer", sa.String(), nullable=False),
        sa.Column("token", sa.String(), nullable=False),
        sa.Column("withdraw_delay", sa.BigInteger(), nullable=False),
        sa.Column("salt", sa.String(), nullable=False),
        sa.Column("balance", sa.String(), nullable=False),
        sa.Column("total_claimed", sa.String(), nullable=False),
        sa.Column("withdraw_amount", sa.String(), nullable=False),
        sa.Column("withdraw_at", sa.BigInteger(), nullable=False),
        sa.Column("refund_nonce", sa.String(), nullable=False),
        sa.Column("synced_block", sa.BigInteger(), nullable=False),
        sa.Column("marks", sa.BigInteger(), nullable=False),
        sa.Column("synced_marks", sa.BigInteger(), nullable=False),
        sa.Column("voucher", sa.String(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("charged_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("claimed_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("lost_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("announced", sa.String(), nullable=False),
        sa.Column("refunding", sa.String(), nullable=False),
        sa.Column("refund_id", sa.String(), nullable=True),
        sa.Column("claim_id", sa.String(), nullable=True),
        sa.Column("claim_from_ms", sa.BigInteger(), nullable=False),
        sa.Column("unclaimed_since_ms", sa.BigInteger(), nullable=True),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_channel_payer"), "channel", ["payer"], unique=False)
    op.create_index(op.f("ix_channel_claim_id"), "channel", ["claim_id"], unique=False)
    op.create_table(
        "channel_request",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("channel_id", sa.String(), nullable=False),
        sa.Column("voucher", sa.String(), nullable=False),
        sa.Column("receipt_id", sa.String(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["channel_id"], ["channel.id"]),
        sa.ForeignKeyConstraint(["receipt_id"], ["receipt.id"]),
        sa.PrimaryKeyConstraint("digest"),
        sa.UniqueConstraint("receipt_id"),
    )
    op.create_index("channel_request_voucher", "channel_request", ["channel_id", "voucher"], unique=False)
    op.create_table(
        "channel_claim",
        sa.Column("settlement_id", sa.String(), nullable=False),
        sa.Column("channel_id", sa.String(), nullable=False),
        sa.Column("amount_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["channel_id"], ["channel.id"]),
        sa.PrimaryKeyConstraint("settlement_id", "channel_id"),
    )
