"""An index for what a reorganisation took out of the chain, which is asked for with every payment."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

_REOPENED = sa.text("state IN ('queued', 'submitted') AND received_value IS NOT NULL")


def upgrade() -> None:
    """Add the index."""
    op.create_index("settlement_reopened", "settlement", ["payer"], sqlite_where=_REOPENED, postgresql_where=_REOPENED)
