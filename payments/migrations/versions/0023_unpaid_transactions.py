"""How many transactions were made for a channel lately that nothing was charged for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; the count begins now."""
    names = ("unpaid_transactions", "unpaid_since_ms")
    with op.batch_alter_table("channel") as table:
        for name in names:
            table.add_column(sa.Column(name, sa.BigInteger(), nullable=True))
    op.execute("UPDATE channel SET unpaid_transactions = 0, unpaid_since_ms = 0")
    with op.batch_alter_table("channel") as table:
        for name in names:
            table.alter_column(name, existing_type=sa.BigInteger(), nullable=False)
