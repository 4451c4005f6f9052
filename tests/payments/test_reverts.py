"""Payments that revert on chain: how often one payer, and all together, can make us burn gas."""

from __future__ import annotations

import pytest

from payments.errors import PaymentRefused
from payments.settlement.reverts import PAYERS_MAX, REVERTS_MAX, REVERTS_OF_ALL_MAX, WINDOW_S, Reverts

PAYER, OTHER = "0x" + "11" * 20, "0x" + "22" * 20


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_a_payer_whose_payments_reverted_is_refused_until_the_first_is_old() -> None:
    clock = Clock()
    reverts = Reverts(clock)
    for _ in range(REVERTS_MAX):
        reverts.admit(PAYER)
        reverts.reverted(PAYER)
        clock.now += 10
    with pytest.raises(PaymentRefused, match="in 571 s") as refused:
        reverts.admit(PAYER)
    assert refused.value.code == "payments_reverted"
    reverts.admit(OTHER)
    clock.now += WINDOW_S - 10 * REVERTS_MAX
    reverts.admit(PAYER)
    reverts.reverted(PAYER)
    with pytest.raises(PaymentRefused):
        reverts.admit(PAYER)


def test_new_wallets_do_not_help_and_those_that_paid_are_served() -> None:
    clock = Clock()
    reverts = Reverts(clock)
    reverts.paid(OTHER)
    for index in range(REVERTS_OF_ALL_MAX):
        reverts.admit(f"0x{index:040x}")
        reverts.reverted(f"0x{index:040x}")
    with pytest.raises(PaymentRefused):
        reverts.admit(PAYER)
    reverts.admit(OTHER)
    clock.now += WINDOW_S
    reverts.admit(PAYER)


def test_a_restart_forgets_nothing_that_is_recent() -> None:
    reverts = Reverts(Clock())
    reverts.recall([(PAYER, WINDOW_S + 1)] * REVERTS_MAX)
    reverts.admit(PAYER)
    reverts.recall([(PAYER, 5.0)] * REVERTS_MAX)
    with pytest.raises(PaymentRefused):
        reverts.admit(PAYER)


def test_what_is_remembered_is_bounded() -> None:
    reverts = Reverts(Clock())
    for index in range(PAYERS_MAX + 10):
        reverts.reverted(f"0x{index:040x}")
        reverts.paid(f"0x{index:040x}")
    assert len(reverts._of_payer) == len(reverts._honest) == PAYERS_MAX
