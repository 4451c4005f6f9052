"""Payers' own names for what they pay for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "payment_identifier",
        sa.Column("payer", sa.String(), nullable=False),
        sa.Column("identifier", sa.String(), nullable=False),
        sa.Column("receipt_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("payer", "identifier"),
    )
