"""A settlement that failed is watched for as long as somebody may execute its authorization all the same."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add when it is looked at next; those that failed before are looked at once as well."""
    op.add_column("settlement", sa.Column("watch_again_ms", sa.BigInteger(), nullable=True))
    op.execute(
        "UPDATE settlement SET watch_again_ms = updated_ms"
        " WHERE state = 'failed' AND valid_before > 0 AND authorization_nonce IS NOT NULL"
    )
    op.create_index(
        "settlement_watched",
        "settlement",
        ["chain_id", "watch_again_ms"],
        unique=False,
        sqlite_where=sa.text("watch_again_ms IS NOT NULL"),
        postgresql_where=sa.text("watch_again_ms IS NOT NULL"),
    )
