"""What a payer has under way is counted in the database: who signed, and what may have begun before the money is there."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add payers, exposures, and the indexes by which they are found."""
    with op.batch_alter_table("payment_authorization") as table:
        table.add_column(sa.Column("payer", sa.String(), nullable=True))
        table.add_column(sa.Column("exposed_nano_usd", sa.BigInteger(), nullable=True))
    # The limits count what is under way from before as well: all of it may have begun.
    op.execute(
        "UPDATE payment_authorization SET"
        " payer = (SELECT receipt.payer FROM receipt WHERE receipt.id = payment_authorization.receipt_id),"
        " exposed_nano_usd = (SELECT CASE WHEN payment_authorization.state IN ('reserved', 'pledged')"
        " THEN receipt.quoted_nano_usd ELSE 0 END FROM receipt WHERE receipt.id = payment_authorization.receipt_id)"
    )
    with op.batch_alter_table("payment_authorization") as table:
        table.alter_column("payer", existing_type=sa.String(), nullable=False)
        table.alter_column("exposed_nano_usd", existing_type=sa.BigInteger(), nullable=False)
    _add_partial_index(
        "payment_authorization_under_way", "payment_authorization", "payer", "state IN ('reserved', 'pledged')"
    )
    with op.batch_alter_table("channel_request") as table:
        table.add_column(sa.Column("deposit_id", sa.String(), nullable=True))
        table.add_column(sa.Column("exposed_nano_usd", sa.BigInteger(), nullable=True))
    op.execute("UPDATE channel_request SET exposed_nano_usd = 0")
    with op.batch_alter_table("channel_request") as table:
        table.alter_column("exposed_nano_usd", existing_type=sa.BigInteger(), nullable=False)
    _add_partial_index("channel_request_deposit", "channel_request", "deposit_id", "deposit_id IS NOT NULL")
    _add_partial_index(
        "settlement_under_way",
        "settlement",
        "payer",
        "state IN ('queued', 'submitted') AND kind NOT IN ('payment', 'upto')",
    )


def _add_partial_index(name: str, table: str, column: str, where: str) -> None:
    op.create_index(name, table, [column], unique=False, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
