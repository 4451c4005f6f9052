"""A settlement can be given a second look."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add when it was asked for."""
    op.add_column("settlement", sa.Column("look_again_ms", sa.BigInteger(), nullable=True))
    op.create_index(
        "settlement_look_again",
        "settlement",
        ["chain_id"],
        unique=False,
        sqlite_where=sa.text("look_again_ms IS NOT NULL"),
        postgresql_where=sa.text("look_again_ms IS NOT NULL"),
    )
