"""What a request has cost that its caller hung up on is kept on the receipt."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add it; so far hanging up has cost nothing."""
    with op.batch_alter_table("receipt") as table:
        table.add_column(sa.Column("spent_nano_usd", sa.BigInteger(), nullable=True))
    op.execute("UPDATE receipt SET spent_nano_usd = 0")
    with op.batch_alter_table("receipt") as table:
        table.alter_column("spent_nano_usd", existing_type=sa.BigInteger(), nullable=False)
