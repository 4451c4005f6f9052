"""API keys that speak for one recipient at a facilitator."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column."""
    op.add_column("api_key", sa.Column("pay_to", sa.String(), nullable=True))
