"""The book of channels: whatever happens in whatever order, no more is taken than was signed for and is there."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from payments.chain.channel_contract import ChannelState
from payments.chain.networks import KNOWN_NETWORKS
from payments.channels import book, requests
from payments.channels.book import Channel, Seen
from payments.channels.keeper import claim_of
from payments.channels.requests import MustWait, OutOfStep, Taken, Wanted
from payments.databases.sqlite import Connection
from payments.errors import PaymentRefused
from payments.ledger import transfers
from payments.ledger.books import check
from payments.migrate import upgrade
from payments.settlement import outbox, states
from payments.settlement.orders import SettlementOrder
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Outcome
from payments.tenders.closing import Use, release
from payments.x402.channels import ChannelConfig, Voucher, hex32

USDC = KNOWN_NETWORKS[8453].tokens[0]
NUMBER = 0xC0FFEE
ID = hex32(NUMBER)
CONFIG = ChannelConfig("0x" + "a1" * 20, "0x" + "a1" * 20, "0x" + "7e" * 20, "0x" + "5e" * 20, USDC.address, 86_400, 0)
NANO = 1_000


class Chain:
    """What the contract would hold."""

    def __init__(self, database: Connection) -> None:
        self.database = database
        self.state = ChannelState(0, 0, 0, 0, 0)
        self.block = 0
        book.ensure(database, ID, CONFIG, USDC)

    @property
    def channel(self) -> Channel:
        found = book.find(self.database, ID)
        assert found is not None
        return found

    def becomes(self, **changes: int) -> None:
        """Something happens on chain, and is seen."""
        self.block += 1
        self.state = replace(self.state, **changes)
        book.mark(self.database, ID, self.block)
        book.sync(self.database, ID, Seen(self.state, self.block, self.channel.marks), USDC)

    def wanted(self, voucher: int, price: int, digest: bytes | None = None) -> Wanted:
        return Wanted(
            channel=self.channel,
            voucher=Voucher(NUMBER, voucher, b"s" * 65),
            digest=digest or secrets.token_bytes(32),
            price_nano_usd=price * NANO,
            decimals=6,
            deposit_id=None,
            deposit_value=0,
            details={},
            exposure_max_nano_usd=0,
        )

    def take(self, voucher: int, price: int, digest: bytes | None = None, *, patient: bool = False) -> object:
        return requests.take(self.database, self.wanted(voucher, price, digest), patient=patient)

    def taken(self, voucher: int, price: int) -> Use:
        decision = self.take(voucher, price)
        assert isinstance(decision, Taken), decision
        return decision.use

    def capture(self, use: Use, cost: int) -> None:
        requests.capture(self.database, use, ID, cost * NANO, Outcome(), 0, USDC)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    path: Path = tmp_path_factory.mktemp("book") / "farebox.db"
    upgrade(path)
    connection = sqlite3.connect(path, isolation_level=None, factory=Connection)
    yield connection
    connection.close()


@pytest.fixture
def chain(database: Connection) -> Iterator[Chain]:
    database.execute("BEGIN")
    yield Chain(database)
    database.execute("ROLLBACK")


def test_a_voucher_covers_what_was_charged_what_is_under_way_and_the_price(chain: Chain) -> None:
    chain.becomes(balance=1_000)
    chain.capture(chain.taken(100, 100), 40)
    first, second = chain.taken(140, 100), chain.taken(240, 100)
    third = chain.take(340 - 1, 100)
    assert isinstance(third, OutOfStep)
    chain.capture(first, 100)
    chain.capture(second, 0)
    assert chain.channel.charged_nano_usd == 140 * NANO
    assert isinstance(chain.take(240, 100, patient=True), Taken), "what was not charged gave its voucher back"


def test_what_is_on_its_way_back_to_the_payer_is_lent_to_nobody(chain: Chain) -> None:
    chain.becomes(balance=1_000)
    book.put(chain.database, ID, refunding=800, refund_id="refund:1")
    refused = chain.take(201, 201)
    assert isinstance(refused, PaymentRefused)
    assert refused.code == "invalid_batch_settlement_evm_cumulative_exceeds_balance"
    assert isinstance(chain.take(200, 200), Taken)


def sign_refund(chain: Chain, nonce: int, amount: int, state: str) -> None:
    token = USDC.address
    order = SettlementOrder(
        id=f"refund:{nonce}:{amount}", kind="channel_refund", reference=ID, chain_id=USDC.chain_id, token=token,
        payer=token, pay_to=CONFIG.payer, value=amount, authorization_nonce=nonce, call_to=token, call_data=b"",
        valid_before=0,
    )  # fmt: skip
    assert outbox.enqueue(chain.database, order)
    if state != "queued":
        assert states.move(chain.database, order.id, state)


def test_a_refund_that_was_signed_is_good_until_the_chain_has_made_one_of_its_nonce(chain: Chain) -> None:
    chain.becomes(balance=1_000)
    sign_refund(chain, 0, 600, "failed")
    sign_refund(chain, 0, 100, "failed")
    chain.becomes()
    assert chain.channel.spendable == 400, "whoever has seen them can submit one of them"
    # Two of which a reorganisation took away one, and knows nothing of the other yet.
    sign_refund(chain, 1, 50, "queued")
    chain.becomes()
    assert chain.channel.spendable == 350
    chain.becomes(balance=400, refund_nonce=1)
    assert chain.channel.spendable == 350
    chain.becomes(balance=350, refund_nonce=2)
    assert chain.channel.spendable == 350


def test_vouchers_that_arrive_out_of_order_are_taken_on_the_highest(chain: Chain) -> None:
    chain.becomes(balance=1_000)
    chain.taken(200, 100)
    chain.taken(100, 100)
    assert book.held_nano_usd(chain.database, chain.channel) == 200 * NANO


def test_one_voucher_pays_one_request(chain: Chain) -> None:
    chain.becomes(balance=1_000)
    digest = secrets.token_bytes(32)
    decision = chain.take(500, 100, digest)
    assert isinstance(decision, Taken)
    again = chain.take(500, 100, digest)
    assert isinstance(again, AlreadyUsed)
    assert again.state == "in_progress"
    assert chain.take(500, 100, patient=True) == MustWait("requests")
    chain.capture(decision.use, 1)
    # It would cover another request easily, and is not taken for one.
    assert isinstance(chain.take(500, 100), OutOfStep)
    again = chain.take(500, 100, digest)
    assert isinstance(again, AlreadyUsed)
    assert again.state == "captured"


def test_a_client_that_would_sign_the_same_voucher_again_is_told_another_sum(chain: Chain) -> None:
    chain.becomes(balance=1_000)
    requests.capture(chain.database, chain.taken(100, 100), ID, 50 * NANO, Outcome(), 50, USDC)
    assert isinstance(chain.take(100, 50), OutOfStep)
    assert isinstance(chain.take(chain.channel.announced + 50, 50), Taken)


def test_a_stale_voucher_is_told_where_the_channel_stands(chain: Chain) -> None:
    chain.becomes(balance=1_000)
    requests.capture(chain.database, chain.taken(100, 100), ID, 80 * NANO, Outcome(), 80, USDC)
    stale = chain.take(60, 60)
    assert isinstance(stale, OutOfStep)
    assert stale.code == "invalid_batch_settlement_evm_cumulative_amount_mismatch"
    assert chain.channel.announced == 80


def test_what_the_payer_announced_to_take_out_is_not_lent_on(chain: Chain) -> None:
    chain.becomes(balance=1_000)
    chain.becomes(withdraw_amount=950, withdraw_at=1)
    assert chain.channel.state == "withdrawing"
    refused = chain.take(100, 100)
    assert isinstance(refused, PaymentRefused)
    assert refused.code == "invalid_batch_settlement_evm_cumulative_exceeds_balance"
    assert isinstance(chain.take(50, 50), Taken)


def test_what_was_taken_out_before_it_was_claimed_is_a_loss_until_it_is_deposited_again(chain: Chain) -> None:
    chain.becomes(balance=1_000)
    chain.capture(chain.taken(600, 600), 600)
    chain.becomes(balance=100)
    assert chain.channel.lost_nano_usd == 500 * NANO
    assert claim_of(chain.channel, USDC).total == 100, "what is left is claimed"
    assert check(chain.database) == []
    chain.becomes(balance=1_100)
    assert chain.channel.lost_nano_usd == 0
    assert check(chain.database) == []


def test_less_than_a_unit_is_not_outstanding(chain: Chain) -> None:
    chain.becomes(balance=1_000)

    def owes_since(voucher: int, cost_nano_usd: int) -> int | None:
        use = chain.taken(voucher, 1)
        requests.capture(chain.database, use, ID, cost_nano_usd, Outcome(), 0, USDC)
        return chain.channel.unclaimed_since_ms

    assert owes_since(1, NANO // 2) is None
    since = owes_since(2, NANO // 2)
    assert since is not None
    assert owes_since(3, 0) == since


def test_a_node_that_lags_changes_nothing(chain: Chain) -> None:
    chain.becomes(balance=1_000)
    old = Seen(ChannelState(5, 0, 0, 0, 0), chain.block - 1, chain.channel.marks)
    assert book.sync(chain.database, ID, old, USDC).on_chain.balance == 1_000


actions = st.lists(
    st.one_of(
        st.tuples(st.just("deposit"), st.integers(1, 500)),
        st.tuples(st.just("request"), st.integers(1, 200), st.integers(-150, 250)),
        st.tuples(st.just("capture"), st.integers(0, 3), st.integers(0, 250)),
        st.tuples(st.just("release"), st.integers(0, 3)),
        st.tuples(st.just("claim")),
        st.tuples(st.just("announce"), st.integers(1, 400)),
        st.tuples(st.just("withdraw")),
    ),
    max_size=40,
)


@given(actions)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_order_of_events_takes_more_than_was_signed_and_is_there(
    database: Connection, steps: list[tuple[str, int, int]]
) -> None:
    database.execute("BEGIN")
    try:
        _run(Chain(database), steps)
    finally:
        database.execute("ROLLBACK")


def _run(chain: Chain, steps: list[tuple[str, int, int]]) -> None:
    under_way: list[Use] = []
    chain.becomes(balance=300)
    signed = 0
    for name, *arguments in steps:
        channel, state = chain.channel, chain.state
        if name == "deposit":
            chain.becomes(balance=state.balance + arguments[0])
        elif name == "request":
            price, more = arguments
            amount = max(1, channel.voucher + more)
            decision = chain.take(amount, price)
            signed = max(signed, amount)
            if isinstance(decision, Taken):
                under_way.append(decision.use)
        elif name == "capture" and under_way:
            chain.capture(under_way.pop(arguments[0] % len(under_way)), arguments[1])
        elif name == "release" and under_way:
            release(chain.database, under_way.pop(arguments[0] % len(under_way)), Outcome())
        elif name == "claim":
            claim = claim_of(channel, USDC)
            assert claim.total <= min(signed, state.balance)
            chain.becomes(total_claimed=max(claim.total, state.total_claimed))
        elif name == "announce" and not state.withdraw_at:
            available = state.balance - state.total_claimed
            if available:
                chain.becomes(withdraw_amount=min(arguments[0], available), withdraw_at=1)
        elif name == "withdraw" and state.withdraw_at:
            # The keeper has claimed what was charged until then; what is under way goes on.
            total = max(claim_of(channel, USDC).total, state.total_claimed)
            taken_out = min(state.withdraw_amount, state.balance - total)
            chain.becomes(total_claimed=total, balance=state.balance - taken_out, withdraw_amount=0, withdraw_at=0)
        _check(chain, signed)


def _check(chain: Chain, signed: int) -> None:
    channel = chain.channel
    held = book.held_nano_usd(chain.database, channel)
    # A payer may announce a withdrawal of what is under way: only what is charged by then is claimed in time.
    assert channel.charged_nano_usd + held <= signed * NANO
    balance = transfers.balance(chain.database, channel.account).balance
    assert balance == -(channel.charged_nano_usd - channel.claimed_nano_usd - channel.lost_nano_usd)
    assert channel.claimed_nano_usd <= channel.charged_nano_usd
    assert check(chain.database) == []
