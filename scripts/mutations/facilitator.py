"""Mutations of the facilitator: a success that two are told of."""

from __future__ import annotations

from mutations.mutation import Mutation

FACILITATOR = (
    Mutation(
        "a success that was told is taken back when the call made again is hung up on",
        "payments/facilitator/records.py",
        "granted_to = CASE WHEN grants > 1 THEN granted_to END",
        "granted_to = NULL",
        ("tests/payments/test_facilitator_grants.py",),
    ),
    Mutation(
        "a success that nobody heard stays with the call that is gone",
        "payments/facilitator/service.py",
        "            if granted:\n                records.take_back",
        "            if not granted:\n                records.take_back",
        ("tests/payments/test_facilitator_grants.py",),
    ),
)
