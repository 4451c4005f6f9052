"""A transaction may carry many settlements: what is signed moves out of `settlement` into a table of its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_KEPT = (
    "id, kind, reference, chain_id, state, token, payer, pay_to, value, authorization_nonce, call_to, call_data,"
    " valid_before, transaction_hash, transfer_log_index, received_value, from_block, block_number, reason, created_ms,"
    " updated_ms"
)


def upgrade() -> None:
    op.create_table(
        "chain_transaction",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("chain_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("signer", sa.String(), nullable=False),
        sa.Column("signer_nonce", sa.BigInteger(), nullable=False),
        sa.Column("raw_transaction", sa.LargeBinary(), nullable=False),
        sa.Column("broadcasts", sa.String(), nullable=False),
        sa.Column("inclusions", sa.Integer(), nullable=False),
        sa.Column("block_number", sa.BigInteger(), nullable=True),
        sa.Column("gas_used", sa.BigInteger(), nullable=True),
        sa.Column("fee_wei", sa.String(), nullable=True),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("chain_id", "signer", "signer_nonce"),
    )
    op.create_index(
        "chain_transaction_signed",
        "chain_transaction",
        ["chain_id"],
        unique=False,
        sqlite_where=sa.text("state = 'signed'"),
        postgresql_where=sa.text("state = 'signed'"),
    )
    # A decided settlement whose own transaction is in no block yet is rare; should its nonce be missing, it is found by that.
    op.execute(
        "INSERT INTO chain_transaction (id, chain_id, kind, state, signer, signer_nonce, raw_transaction, broadcasts,"
        " inclusions, block_number, created_ms, updated_ms)"
        " SELECT 'tx_' || id, chain_id, CASE WHEN kind = 'filler' THEN 'filler' ELSE 'single' END,"
        " CASE WHEN state = 'submitted' THEN 'signed' ELSE 'included' END,"
        " signer, signer_nonce, raw_transaction, broadcasts, CASE WHEN state = 'submitted' THEN 0 ELSE 1 END,"
        " block_number, created_ms, updated_ms FROM settlement WHERE signer IS NOT NULL"
    )
    op.execute("CREATE TABLE settlement_before AS SELECT * FROM settlement")
    op.drop_table("settlement")
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
        sa.Column("transaction_id", sa.String(), nullable=True),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("transaction_hash", sa.String(), nullable=True),
        sa.Column("transfer_log_index", sa.BigInteger(), nullable=True),
        sa.Column("received_value", sa.String(), nullable=True),
        sa.Column("from_block", sa.BigInteger(), nullable=False),
        sa.Column("block_number", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("chain_id", "transaction_hash", "transfer_log_index"),
    )
    op.execute(
        f"INSERT INTO settlement ({_KEPT}, transaction_id, position, attempts)"  # noqa: S608 - a constant
        f" SELECT {_KEPT}, CASE WHEN signer IS NULL THEN NULL ELSE 'tx_' || id END, 0, 0"
        " FROM settlement_before WHERE kind <> 'filler'"
    )
    op.drop_table("settlement_before")
    op.create_index("settlement_open", "settlement", ["state"], unique=False)
    op.create_index(op.f("ix_settlement_reference"), "settlement", ["reference"], unique=False)
    op.create_index(op.f("ix_settlement_transaction_hash"), "settlement", ["transaction_hash"], unique=False)
    op.create_index(op.f("ix_settlement_transaction_id"), "settlement", ["transaction_id"], unique=False)
