"""The sponsored approvals' part of the schema, see `payments.tables`."""

from __future__ import annotations

from sqlalchemy import Column, Index, LargeBinary, text
from sqlmodel import Field, SQLModel

from payments.columns import big


class SponsoredApproval(SQLModel, table=True):
    """A payer's approval of Permit2 for one token, which we bring to the chain and may have paid for: once, whatever becomes of
    it."""

    __tablename__ = "sponsored_approval"
    __table_args__ = (
        # Few are under way at a time, and they are looked for all the time.
        Index(
            "sponsored_approval_open",
            "chain_id",
            sqlite_where=text("state IN ('funding', 'approving')"),
            postgresql_where=text("state IN ('funding', 'approving')"),
        ),
        Index("sponsored_approval_funded", "chain_id", "funded_ms"),
    )

    id: str = Field(primary_key=True)
    """`approval:<chain id>:<token>:<payer>`"""
    chain_id: int = Field(sa_column=big())
    token: str
    payer: str
    state: str
    """funding | approving | approved | failed; the transitions stand in `payments.sponsoring.records`."""
    nonce: int = Field(sa_column=big())
    """The payer's, of its transaction."""
    raw_transaction: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """As the payer signed it."""
    needed: str
    """The allowance that its payment needs, atomic units as decimal text."""
    permit2_nonce: str
    """Of that payment, decimal text: once it is used up, somebody has executed the payment."""
    settlement_id: str | None = None
    """The order that waits for it, if one does."""
    client: str
    """The resource server that asked, for those of a facilitator."""
    funding_id: str | None = None
    """The settlement that gave the payer the coin for it; never a second one."""
    cost_gwei: int = Field(default=0, sa_column=big(default=0))
    """Of that, its own gas included, at most."""
    funded_ms: int | None = Field(default=None, sa_column=big(nullable=True))
    give_up_ms: int = Field(sa_column=big())
    """If it is not in a block by then, it has failed."""
    reason: str | None = None
    created_ms: int = Field(sa_column=big())
    updated_ms: int = Field(sa_column=big())
