"""The journal: who may take up a payment, and what counts."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents_sdk import LimitExceeded
from agents_sdk.journal import Journal, StoredPayment
from agents_sdk.policy import Window

ORIGIN, PAYER = "http://gateway.example:80", "0xPayer"
HOUR = Window("hour", 3600, 1_000)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "log.sqlite3")


def reserve(journal: Journal, amount: int = 600, good_for_s: int = 300) -> StoredPayment:
    return journal.reserve(
        origin=ORIGIN,
        payer=PAYER,
        request="question",
        amount_nano_usd=amount,
        asset="eip155:1/USDC",
        recipient="0xTreasury",
        expires_at=int(time.time()) + good_for_s,
        windows=[HOUR],
    )


def sign(journal: Journal, good_for_s: int = 300) -> StoredPayment:
    return journal.signed(reserve(journal, good_for_s=good_for_s), "header", int(time.time()) + good_for_s)


def take(journal: Journal) -> StoredPayment | None:
    return journal.take_open(origin=ORIGIN, payer=PAYER, request="question")


def test_a_payment_that_somebody_carries_is_not_taken_up(journal: Journal) -> None:
    payment = sign(journal)
    assert take(journal) is None
    journal.let_go(payment)
    assert take(journal) == payment
    assert take(journal) is None


def test_a_payment_of_a_process_that_died_is_taken_up(journal: Journal, tmp_path: Path) -> None:
    script = (
        "import sys, time; from agents_sdk.journal import Journal; j = Journal(sys.argv[1]);"
        "p = j.reserve(origin=sys.argv[2], payer=sys.argv[3], request='question', amount_nano_usd=1, asset='a',"
        "recipient='r', expires_at=int(time.time()) + 300, windows=[]); j.signed(p, 'header', p.expires_at)"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "log.sqlite3", ORIGIN, PAYER], check=True)
    taken = take(journal)
    assert taken is not None
    assert taken.header == "header"


@pytest.mark.parametrize("outcome", ["answered", "used", "credited", "refused"])
def test_a_payment_whose_outcome_is_known_is_not_sent_again(journal: Journal, outcome: str) -> None:
    journal.close_payment(sign(journal), outcome)
    assert take(journal) is None


def test_what_was_never_signed_does_not_count(journal: Journal) -> None:
    journal.let_go(reserve(journal))
    assert journal.used(PAYER, 3600) == 0


@pytest.mark.parametrize("outcome", ["answered", "used", "credited", "refused", None])
def test_what_was_signed_counts(journal: Journal, outcome: str | None) -> None:
    payment = sign(journal)
    if outcome is not None:
        journal.close_payment(payment, outcome)
    with pytest.raises(LimitExceeded):
        reserve(journal)


def test_a_refused_payment_stops_counting_when_its_signature_has_expired(journal: Journal) -> None:
    journal.close_payment(sign(journal, good_for_s=-1), "refused")
    assert journal.used(PAYER, 3600) == 0


def test_a_payment_long_expired_is_given_up(journal: Journal) -> None:
    journal.let_go(sign(journal, good_for_s=-601))
    assert take(journal) is None
    assert journal.expire_open(ORIGIN, PAYER) == 1
    assert journal.used(PAYER, 3600) == 600


def test_an_outcome_is_written_once(journal: Journal) -> None:
    payment = sign(journal)
    journal.close_payment(payment, "answered")
    with pytest.raises(AssertionError):
        journal.close_payment(payment, "refused")


def test_what_is_older_than_the_window_does_not_count(journal: Journal, tmp_path: Path) -> None:
    sign(journal)
    with sqlite3.connect(tmp_path / "log.sqlite3") as database:
        database.execute("UPDATE payment SET created_ms = created_ms - 3600 * 1000")
    assert journal.used(PAYER, 3600) == 0
    assert journal.used(PAYER, 7200) == 600


def test_credit_never_goes_below_nothing(journal: Journal) -> None:
    journal.add_credit(ORIGIN, PAYER, "a", 5)
    journal.add_credit(ORIGIN, PAYER, "a", -7)
    assert journal.credit(ORIGIN, PAYER) == {}
    journal.add_credit(ORIGIN, PAYER, "a", 3)
    assert journal.credit(ORIGIN, PAYER) == {"a": 3}


def test_a_lease_is_held_by_one(journal: Journal) -> None:
    assert journal.take_lease("approve", 60)
    assert not journal.take_lease("approve", 60)
    journal.end_lease("approve")
    assert journal.take_lease("approve", -1)
    time.sleep(0.002)
    assert journal.take_lease("approve", 60)
