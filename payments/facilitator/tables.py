"""The facilitator's part of the schema, see `payments.tables`."""

from __future__ import annotations

from sqlalchemy import Index
from sqlmodel import Field, SQLModel

from payments.columns import big


class FacilitatedPayment(SQLModel, table=True):
    """What was settled for another resource server; its terms and its fate are the settlement's. An authorization of `upto`
    that was settled for nothing has no settlement."""

    __tablename__ = "facilitated_payment"

    identity: str = Field(primary_key=True)
    """As of `Authorization`: one authorization settles once."""
    settlement_id: str = Field(unique=True)
    client: str
    """Who asked first, see `payments.facilitator.access`."""
    asked_until_ms: int | None = Field(default=None, sa_column=big(nullable=True))
    """Until when calls wait for its success, in whichever process."""
    granted_to: str | None = None
    """The one call that was told of the success."""
    granted_ms: int | None = Field(default=None, sa_column=big(nullable=True))
    grants: int = 0
    """How often it was granted to that call, without what is taken back because the call had gone."""
    created_ms: int = Field(sa_column=big())


class FacilitatorFailure(SQLModel, table=True):
    """A settlement for another server that cost gas for nothing, within the last hour."""

    __tablename__ = "facilitator_failure"
    __table_args__ = (Index("facilitator_failure_client", "client", "failed_ms"),)

    settlement_id: str = Field(primary_key=True)
    client: str
    failed_ms: int = Field(sa_column=big())


class DiscoveredResource(SQLModel, table=True):
    """Something that is sold over x402 and whose payment was settled here: what `/discovery/resources` lists."""

    __tablename__ = "discovered_resource"

    id: str = Field(primary_key=True)
    """The URL, and for MCP the tool."""
    type: str
    """http | mcp"""
    pay_to: str = Field(index=True)
    scheme: str
    network: str
    document: str
    """JSON: the item as it is listed."""
    updated_ms: int = Field(sa_column=big())
