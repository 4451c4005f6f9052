"""The first schema: ledger, receipts, authorizations, settlements, keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create every table."""
    op.create_table(
        "api_key",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("pool", sa.String(), nullable=False),
        sa.Column("key_hash", sa.String(), nullable=False),
        sa.Column("prefix", sa.String(), nullable=False),
        sa.Column("admin", sa.Boolean(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("revoked_ms", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key_hash"),
    )
    op.create_table(
        "chain_cursor",
        sa.Column("asset", sa.String(), nullable=False),
        sa.Column("block_number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("asset"),
    )
    op.create_table(
        "ledger_account",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("asset", sa.String(), nullable=False),
        sa.Column("balance", sa.BigInteger(), nullable=False),
        sa.Column("pending_out", sa.BigInteger(), nullable=False),
        sa.Column("overdraft", sa.Boolean(), nullable=False),
        sa.CheckConstraint("overdraft OR balance >= pending_out"),
        sa.CheckConstraint("pending_out >= 0"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_ledger_account_kind"), "ledger_account", ["kind"], unique=False)
    op.create_index(op.f("ix_ledger_account_owner"), "ledger_account", ["owner"], unique=False)
    op.create_table(
        "receipt",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("uses", sa.Integer(), nullable=False),
        sa.Column("tender", sa.String(), nullable=False),
        sa.Column("payer", sa.String(), nullable=False),
        sa.Column("asset", sa.String(), nullable=False),
        sa.Column("quoted_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("paid_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("charged_nano_usd", sa.BigInteger(), nullable=True),
        sa.Column("details", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("closed_ms", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_receipt_payer"), "receipt", ["payer"], unique=False)
    op.create_index(
        "receipt_open",
        "receipt",
        ["id"],
        unique=False,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_table(
        "replay",
        sa.Column("receipt_id", sa.String(), nullable=False),
        sa.Column("ciphertext", sa.LargeBinary(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("receipt_id"),
    )
    op.create_table(
        "settlement",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("reference", sa.String(), nullable=False),
        sa.Column("chain_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("token", sa.String(), nullable=False),
        sa.Column("payer", sa.String(), nullable=False),
        sa.Column("pay_to", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.Column("authorization_nonce", sa.String(), nullable=True),
        sa.Column("call_to", sa.String(), nullable=False),
        sa.Column("call_data", sa.LargeBinary(), nullable=False),
        sa.Column("valid_before", sa.BigInteger(), nullable=False),
        sa.Column("signer", sa.String(), nullable=True),
        sa.Column("signer_nonce", sa.BigInteger(), nullable=True),
        sa.Column("raw_transaction", sa.LargeBinary(), nullable=True),
        sa.Column("transaction_hash", sa.String(), nullable=True),
        sa.Column("transfer_log_index", sa.BigInteger(), nullable=True),
        sa.Column("received_value", sa.String(), nullable=True),
        sa.Column("broadcasts", sa.String(), nullable=False),
        sa.Column("from_block", sa.BigInteger(), nullable=False),
        sa.Column("block_number", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("chain_id", "signer", "signer_nonce"),
        sa.UniqueConstraint("chain_id", "transaction_hash", "transfer_log_index"),
    )
    op.create_index(op.f("ix_settlement_reference"), "settlement", ["reference"], unique=False)
    op.create_index(op.f("ix_settlement_transaction_hash"), "settlement", ["transaction_hash"], unique=False)
    op.create_index("settlement_open", "settlement", ["state"], unique=False)
    op.create_table(
        "sign_in_nonce",
        sa.Column("nonce", sa.String(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("nonce"),
    )
    op.create_table(
        "ledger_transfer",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("debit_account", sa.String(), nullable=False),
        sa.Column("credit_account", sa.String(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("posted_amount", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reference", sa.String(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("(state = 'posted') = (posted_amount IS NOT NULL)"),
        sa.CheckConstraint("amount > 0"),
        sa.CheckConstraint("debit_account <> credit_account"),
        sa.CheckConstraint("posted_amount IS NULL OR posted_amount BETWEEN 0 AND amount"),
        sa.ForeignKeyConstraint(
            ["credit_account"],
            ["ledger_account.id"],
        ),
        sa.ForeignKeyConstraint(
            ["debit_account"],
            ["ledger_account.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_ledger_transfer_credit_account"), "ledger_transfer", ["credit_account"], unique=False)
    op.create_index(op.f("ix_ledger_transfer_debit_account"), "ledger_transfer", ["debit_account"], unique=False)
    op.create_index(op.f("ix_ledger_transfer_reference"), "ledger_transfer", ["reference"], unique=False)
    op.create_index(
        "ledger_transfer_pending",
        "ledger_transfer",
        ["id"],
        unique=False,
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_table(
        "payment_authorization",
        sa.Column("identity", sa.String(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("receipt_id", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("value_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["receipt_id"],
            ["receipt.id"],
        ),
        sa.PrimaryKeyConstraint("identity"),
        sa.UniqueConstraint("receipt_id"),
    )
    op.create_index(
        "payment_authorization_reserved",
        "payment_authorization",
        ["receipt_id"],
        unique=False,
        sqlite_where=sa.text("state = 'reserved'"),
        postgresql_where=sa.text("state = 'reserved'"),
    )
