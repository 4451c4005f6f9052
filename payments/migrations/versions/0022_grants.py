"""How often a facilitated payment's success was granted to the call that is told of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; whoever was granted it so far counts once."""
    with op.batch_alter_table("facilitated_payment") as table:
        table.add_column(sa.Column("grants", sa.Integer(), nullable=True))
    op.execute("UPDATE facilitated_payment SET grants = CASE WHEN granted_to IS NULL THEN 0 ELSE 1 END")
    with op.batch_alter_table("facilitated_payment") as table:
        table.alter_column("grants", existing_type=sa.Integer(), nullable=False)
