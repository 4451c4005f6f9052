"""What a withdrawal's caller asked for: so much, or all that there was."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; of those that were made before, either may have been asked for."""
    op.add_column("withdrawal", sa.Column("asked_nano_usd", sa.BigInteger(), nullable=True))
