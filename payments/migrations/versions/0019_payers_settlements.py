"""One index finds what is settled for a payer: the newer one (0014) is asked, and the older one was written for nothing."""

from __future__ import annotations

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drop the older one."""
    op.drop_index("settlement_of_payer", table_name="settlement")
