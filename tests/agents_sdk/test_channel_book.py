"""The book of channels under any course of events: what an honest gateway needs is always signed, and never more."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents_sdk.channels import book, deposits
from agents_sdk.channels.book import Reserved
from agents_sdk.channels.rows import Wanted
from agents_sdk.channels.terms import Status, Terms
from agents_sdk.errors import ChannelDisputed
from agents_sdk.journal import Journal
from agents_sdk.money import atomic_to_nano_down, nano_to_atomic_up

ORIGIN, PAYER = "http://gateway.example:80", "0xPayer"
DEPOSIT = 1_000_000_000


def terms_of(decimals: int) -> Terms:
    return Terms("0x" + "01" * 32, "eip155:1", "eip155:1/USDC", decimals, {"receiver": "0xTreasury"})


@dataclass
class HonestGateway:
    """Takes vouchers as ours does, see `payments.channels.requests`; amounts in nano-USD, vouchers in atomic units."""

    decimals: int
    charged: int = 0
    highest: int = 0
    held: dict[str, int] = field(default_factory=dict)
    bound: dict[int, str] = field(default_factory=dict)

    def worth(self, amount: int) -> int:
        return atomic_to_nano_down(amount, self.decimals)

    def take(self, request: Reserved) -> bool:
        amount, price = request.amount, request.payment.amount_nano_usd
        highest = max(self.highest, amount)
        if amount in self.bound or self.worth(amount) <= self.charged:
            return False
        if self.worth(highest) < self.charged + sum(self.held.values()) + price:
            return False
        self.highest = highest
        self.held[request.payment.id] = price
        self.bound[amount] = request.payment.id
        return True

    def end(self, request: Reserved, cost: int) -> None:
        del self.held[request.payment.id]
        self.charged += cost
        if not cost:
            del self.bound[request.amount]


def reserve(journal: Journal, terms: Terms, price: int) -> Reserved:
    wanted = Wanted(
        terms=terms,
        origin=ORIGIN,
        payer=PAYER,
        request="question",
        recipient="0xTreasury",
        price_nano_usd=price,
        expires_at=int(time.time()) + 300,
        deposit_nano_usd=DEPOSIT,
        deposit_expires_at=int(time.time()) + 300,
        windows=[],
    )
    found = book.reserve(journal, wanted)
    assert isinstance(found, Reserved)
    new = found.deposit is not None and found.deposit.authorization is None
    book.keep(journal, found, "header", {"signed": True} if new else None, int(time.time()) + 300)
    deposits.accepted(journal, found.payment)
    return found


PRICES = st.sampled_from([100_000, 200_000, 313_000])
"""Few, so that sums often meet."""
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), PRICES),
        st.tuples(
            st.sampled_from(["answered", "unknown", "refused"]), st.integers(0, 7), st.sampled_from([0, 333, 500, 1000])
        ),
        st.tuples(st.just("lie"), st.integers(0, 10**9), st.integers(0, 10**9)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(decimals=st.sampled_from([6, 18]), events=EVENTS)
def test_an_honest_gateway_takes_every_voucher_and_a_lying_one_gets_no_more(
    decimals: int, events: list[tuple[Any, ...]]
) -> None:
    journal, terms = Journal(":memory:"), terms_of(decimals)
    gateway = HonestGateway(decimals)
    under_way: list[Reserved] = []
    acknowledged = unknown = vouchers = 0
    for event in events:
        if event[0] == "ask":
            request = reserve(journal, terms, event[1])
            vouchers += 1
            owed = acknowledged + unknown + sum(each.payment.amount_nano_usd for each in under_way) + event[1]
            # What is owed, in whole units, and as many more as it takes to be another voucher than those before.
            least = nano_to_atomic_up(owed, decimals)
            assert least <= request.amount < least + vouchers
            under_way.append(request)
            assert gateway.take(request)
        elif event[0] == "lie":
            status = Status(event[2], nano_to_atomic_up(event[1], decimals), 0, None)
            before = book.get(journal, terms.channel_id) if vouchers else None
            if before is None:
                continue
            try:
                book.correct(journal, terms, status, ours=False)
            except ChannelDisputed:
                assert status.charged > before.signed
            assert book.get(journal, terms.channel_id) == before
        elif under_way:
            request = under_way.pop(event[1] % len(under_way))
            price = request.payment.amount_nano_usd
            cost = price * event[2] // 1000
            if event[0] == "refused":
                cost = 0
            gateway.end(request, cost)
            if event[0] == "unknown":
                unknown += price
                book.close(journal, request.payment, "used", None)
            else:
                acknowledged += cost
                book.close(journal, request.payment, event[0], cost)
    if vouchers:
        channel = book.get(journal, terms.channel_id)
        assert channel.charged_nano_usd == acknowledged + unknown >= gateway.charged
        assert channel.signed == gateway.highest
        # What counts against the limits is what could be claimed.
        assert 0 <= journal.used(PAYER, 3600) - gateway.worth(gateway.highest) <= 1
    journal.close()


def test_an_answer_that_was_alone_tells_what_was_lost_before_it() -> None:
    journal, terms = Journal(":memory:"), terms_of(6)
    lost = reserve(journal, terms, 500_000)
    book.close(journal, lost.payment, "used", None)
    time.sleep(0.002)
    alone = reserve(journal, terms, 500_000)
    assert alone.amount == 1_000
    # It cost 100, and the gateway counts 130 in all: the lost one cost 30 and not 500.
    book.close(journal, alone.payment, "answered", 100_000, told=130)
    assert book.get(journal, terms.channel_id).charged_nano_usd == 130_000


def test_an_answer_that_was_not_alone_tells_nothing() -> None:
    journal, terms = Journal(":memory:"), terms_of(6)
    first, second = reserve(journal, terms, 500_000), reserve(journal, terms, 500_000)
    book.close(journal, first.payment, "answered", 400_000, told=400)
    # The gateway took both up before it had charged anything.
    book.close(journal, second.payment, "answered", 300_000, told=300)
    assert book.get(journal, terms.channel_id).charged_nano_usd == 700_000


def test_a_payment_that_was_given_up_is_counted_by_its_late_answer() -> None:
    journal, terms = Journal(":memory:"), terms_of(6)
    slow = reserve(journal, terms, 500_000)
    with journal.transaction() as database:
        database.execute("UPDATE payment SET expires_at = 1")
    assert book.get(journal, terms.channel_id).charged_nano_usd == 500_000
    book.close(journal, slow.payment, "answered", 200_000)
    assert book.get(journal, terms.channel_id).charged_nano_usd == 200_000
