"""Up to what sum a channel's charges are its payer's balance, which has to be claimed before it is paid out."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; nothing was topped up through a channel before."""
    with op.batch_alter_table("channel") as table:
        table.add_column(sa.Column("topped_up_to_nano_usd", sa.BigInteger(), nullable=True))
    op.execute("UPDATE channel SET topped_up_to_nano_usd = 0")
    with op.batch_alter_table("channel") as table:
        table.alter_column("topped_up_to_nano_usd", existing_type=sa.BigInteger(), nullable=False)
