"""Approvals that are brought to the chain for their payers, and orders that wait for something."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

OPEN = sa.text("state IN ('funding', 'approving')")


def upgrade() -> None:
    """Add a column and a table."""
    op.add_column("settlement", sa.Column("waits_for", sa.String(), nullable=True))
    op.create_table(
        "sponsored_approval",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("chain_id", sa.BigInteger(), nullable=False),
        sa.Column("token", sa.String(), nullable=False),
        sa.Column("payer", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("nonce", sa.BigInteger(), nullable=False),
        sa.Column("raw_transaction", sa.LargeBinary(), nullable=False),
        sa.Column("needed", sa.String(), nullable=False),
        sa.Column("permit2_nonce", sa.String(), nullable=False),
        sa.Column("settlement_id", sa.String(), nullable=True),
        sa.Column("client", sa.String(), nullable=False),
        sa.Column("funding_id", sa.String(), nullable=True),
        sa.Column("cost_gwei", sa.BigInteger(), nullable=False),
        sa.Column("funded_ms", sa.BigInteger(), nullable=True),
        sa.Column("give_up_ms", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "sponsored_approval_open",
        "sponsored_approval",
        ["chain_id"],
        unique=False,
        sqlite_where=OPEN,
        postgresql_where=OPEN,
    )
    op.create_index("sponsored_approval_funded", "sponsored_approval", ["chain_id", "funded_ms"], unique=False)
