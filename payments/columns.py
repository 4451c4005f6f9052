"""Columns that more than one module's tables have."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column


def big(*, nullable: bool = False, default: int | None = None) -> Column[int]:
    """An integer of 64 bits."""
    return Column(BigInteger, nullable=nullable, default=default)
