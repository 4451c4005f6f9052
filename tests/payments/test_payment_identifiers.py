"""The payer's own names for what it pays for: one payment bears each, whatever schemes it tries, on both databases."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable

import pytest

from payments import receipts
from payments.chain.channel_contract import ChannelState
from payments.channels import book, requests
from payments.channels.book import Seen
from payments.channels.requests import OutOfStep, Taken, Wanted
from payments.errors import PaymentConflict
from payments.store import Store, Transaction
from payments.tenders import authorizations, closing, pledges
from payments.tenders.authorizations import AlreadyUsed, Reservation
from payments.tenders.base import Outcome
from payments.tenders.closing import Use
from payments.x402.channels import ChannelConfig, Voucher, hex32
from tests.payments.exact_samples import ASSET, PAY_TO, PAYER, USDC

STRANGER = "0x" + "b2" * 20
NAME = "order-7d5d747be160e280504c099d984bcfe0"
PRICE = 1_000_000
VOUCHER = PRICE // 1_000

Pay = Callable[[Transaction, str, str | None], Use]


def pay_exact(tx: Transaction, payer: str, name: str | None) -> Use:
    found = authorizations.reserve(
        tx,
        identity=f"{payer}|{secrets.token_hex(8)}",
        digest=b"d" * 32,
        payer=payer,
        asset=ASSET,
        quoted_nano_usd=PRICE,
        value_nano_usd=PRICE,
        details={},
        exposure_max_nano_usd=0,
        identifier=name,
    )
    assert isinstance(found, Reservation)
    return found.use


def pay_upto(tx: Transaction, payer: str, name: str | None) -> Use:
    found = pledges.reserve(
        tx,
        identity=f"{payer}|{secrets.token_hex(8)}",
        digest=b"d" * 32,
        payer=payer,
        asset=ASSET,
        quoted_nano_usd=PRICE,
        value_nano_usd=PRICE,
        details={},
        exposure_max_nano_usd=10**15,
        identifier=name,
    )
    assert not isinstance(found, AlreadyUsed)
    return found.use


def wanted_by_channel(
    tx: Transaction, payer: str, name: str | None, *, balance: int = 10**9, voucher: int = 0, digest: bytes = b""
) -> Wanted:
    """A request on the payer's channel, with the right next voucher unless another one is given."""
    channel_id = hex32(int(payer, 16))
    config = ChannelConfig(payer, payer, PAY_TO, "0x" + "5e" * 20, USDC.address, 86_400, 0)
    book.ensure(tx, channel_id, config, USDC)
    channel = book.find(tx, channel_id)
    assert channel is not None
    channel = book.sync(tx, channel_id, Seen(ChannelState(balance, 0, 0, 0, 0), 1, channel.marks), USDC)
    due = (channel.charged_nano_usd + book.held_nano_usd(tx, channel)) // 1_000 + VOUCHER
    return Wanted(
        channel=channel,
        voucher=Voucher(channel.number, voucher or due, b"s" * 65),
        digest=digest or secrets.token_bytes(32),
        price_nano_usd=PRICE,
        decimals=6,
        deposit_id=None,
        deposit_value=0,
        details={},
        exposure_max_nano_usd=0,
        identifier=name,
    )


def pay_by_channel(tx: Transaction, payer: str, name: str | None) -> Use:
    taken = requests.take(tx, wanted_by_channel(tx, payer, name), patient=False)
    assert isinstance(taken, Taken), taken
    return taken.use


SCHEMES: dict[str, Pay] = {"exact": pay_exact, "upto": pay_upto, "batch-settlement": pay_by_channel}
PAIRS = list(itertools.product(SCHEMES, SCHEMES))


async def refusal(store: Store, pay: Pay) -> PaymentConflict:
    with pytest.raises(PaymentConflict) as refused:
        await store.write(lambda tx: pay(tx, PAYER, NAME))
    assert refused.value.code == "payment_identifier_used"
    return refused.value


async def open_receipts(store: Store) -> int:
    return int(await store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM receipt").fetchone()[0]))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
async def test_a_second_payment_of_a_name_finds_the_first_ones_receipt(store: Store, first: str, second: str) -> None:
    use = await store.write(lambda tx: SCHEMES[first](tx, PAYER, NAME))
    assert (await refusal(store, SCHEMES[second])).receipt_id == use.receipt_id
    assert await open_receipts(store) == 1, "the refused payment left nothing behind"
    await store.write(lambda tx: SCHEMES[second](tx, PAYER, NAME + "-2"))
    await store.write(lambda tx: SCHEMES[second](tx, STRANGER, NAME))
    await store.write(lambda tx: SCHEMES[second](tx, PAYER, None))


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_name_stays_with_what_was_charged(store: Store, scheme: str) -> None:
    use = await store.write(lambda tx: SCHEMES[scheme](tx, PAYER, NAME))
    await store.write(
        lambda tx: receipts.close_receipt(tx, use.receipt_id, 1, "captured", charged_nano_usd=5, details={})
    )
    assert (await refusal(store, pay_exact)).receipt_id == use.receipt_id


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_name_whose_request_came_to_nothing_is_free_again(store: Store, scheme: str) -> None:
    use = await store.write(lambda tx: SCHEMES[scheme](tx, PAYER, NAME))
    await store.write(
        lambda tx: receipts.close_receipt(tx, use.receipt_id, 1, "released", charged_nano_usd=0, details={})
    )
    for pay in SCHEMES.values():
        again = await store.write(lambda tx, pay=pay: pay(tx, PAYER, NAME))  # type: ignore[misc]
        assert again.receipt_id != use.receipt_id
        await store.write(
            lambda tx, again=again: receipts.close_receipt(  # type: ignore[misc]
                tx, again.receipt_id, 1, "released", charged_nano_usd=0, details={}
            )
        )


async def test_of_many_payments_of_one_name_at_once_one_is_taken(store: Store) -> None:
    pays = [SCHEMES[name] for name in SCHEMES for _ in range(10)]
    results = await asyncio.gather(
        *(store.write(lambda tx, pay=pay: pay(tx, PAYER, NAME)) for pay in pays),  # type: ignore[misc]
        return_exceptions=True,
    )
    (use,) = [result for result in results if isinstance(result, Use)]
    assert {result.receipt_id for result in results if isinstance(result, PaymentConflict)} == {use.receipt_id}
    assert await open_receipts(store) == 1


async def test_whoever_lost_all_but_the_name_is_told_of_it_before_its_voucher_is_judged(store: Store) -> None:
    use = await store.write(lambda tx: pay_by_channel(tx, PAYER, NAME))

    def take(tx: Transaction, balance: int) -> object:
        return requests.take(tx, wanted_by_channel(tx, PAYER, NAME, voucher=1, balance=balance), patient=False)

    with pytest.raises(PaymentConflict) as refused:
        await store.write(lambda tx: take(tx, 10**9))
    assert refused.value.receipt_id == use.receipt_id
    # Anybody may name the payer in a channel that nobody paid into.
    assert isinstance(await store.write(lambda tx: take(tx, 0)), OutOfStep)


async def test_the_same_voucher_payment_finds_its_own_outcome_and_may_be_used_again_after_a_release(
    store: Store,
) -> None:
    digest = b"the same payment and request".ljust(32)

    def take(tx: Transaction) -> object:
        return requests.take(tx, wanted_by_channel(tx, PAYER, NAME, digest=digest), patient=False)

    first = await store.write(take)
    assert isinstance(first, Taken)
    assert isinstance(await store.write(take), AlreadyUsed)
    await store.write(lambda tx: closing.release(tx, first.use, Outcome()))
    assert isinstance(await store.write(take), Taken)
