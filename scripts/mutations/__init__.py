"""Small ways to break the code that moves money, and the tests that must notice each; see `scripts/check_mutations.py`."""

from __future__ import annotations

from mutations.mutation import Mutation
from mutations.settlement import SETTLEMENTS

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS: tuple[Mutation, ...] = (*SETTLEMENTS,)
