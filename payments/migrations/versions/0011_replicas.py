"""Several processes on one database: who works on a receipt, and which commits came through."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the receipts' instances and the writers' marks."""
    op.create_table(
        "commit_mark",
        sa.Column("writer", sa.String(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("written_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("writer"),
    )
    with op.batch_alter_table("receipt") as table:
        table.add_column(sa.Column("instance", sa.String(), nullable=True))
