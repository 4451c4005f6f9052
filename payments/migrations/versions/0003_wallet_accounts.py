"""Wallets that keep a balance on purpose, and API keys of their own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the accounts; let a key belong to a wallet instead of a pool."""
    op.create_table(
        "wallet_account",
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("opened_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("address"),
    )
    with op.batch_alter_table("api_key") as table:
        table.add_column(sa.Column("wallet", sa.String(), nullable=True))
        table.alter_column("pool", existing_type=sa.String(), nullable=True)
        table.create_check_constraint("api_key_draws_on_one", sa.text("(pool IS NULL) <> (wallet IS NULL)"))
    op.create_index(op.f("ix_api_key_wallet"), "api_key", ["wallet"], unique=False)
