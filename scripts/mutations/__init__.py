"""Small ways to break the code that moves money, and the tests that must notice each; see `scripts/check_mutations.py`."""

from __future__ import annotations

from mutations.channels import CHANNELS
from mutations.facilitator import FACILITATOR
from mutations.mutation import Mutation
from mutations.settlement import SETTLEMENTS
from mutations.sponsoring import SPONSORING
from mutations.tenders import TENDERS

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS: tuple[Mutation, ...] = (*SETTLEMENTS, *TENDERS, *CHANNELS, *SPONSORING, *FACILITATOR)
