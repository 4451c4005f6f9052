"""Several facilitators on one database: who waits for an outcome, whose settlements failed, what a payer has under way."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

OPEN = sa.text("state IN ('queued', 'submitted')")


def upgrade() -> None:
    """Add a column, a table and two indexes."""
    op.add_column("facilitated_payment", sa.Column("asked_until_ms", sa.BigInteger(), nullable=True))
    op.create_table(
        "facilitator_failure",
        sa.Column("settlement_id", sa.String(), nullable=False),
        sa.Column("client", sa.String(), nullable=False),
        sa.Column("failed_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("settlement_id"),
    )
    op.create_index("facilitator_failure_client", "facilitator_failure", ["client", "failed_ms"], unique=False)
    op.create_index(
        "settlement_of_payer", "settlement", ["payer"], unique=False, sqlite_where=OPEN, postgresql_where=OPEN
    )
