"""Paying a request through a channel, step by step: the next voucher, and what to do when the gateway does not take it."""

from __future__ import annotations

import re
import time

import httpx

from agents_sdk import permit2
from agents_sdk.answers import document_in
from agents_sdk.channels import book, deposits, signing
from agents_sdk.channels.book import Reserved
from agents_sdk.channels.deposits import Full, TooDear, Wait
from agents_sdk.channels.rows import Wanted
from agents_sdk.channels.terms import (
    CUMULATIVE_MISMATCH,
    DEPOSIT_EXPIRED,
    DEPOSIT_REFUSED,
    EXCEEDS_BALANCE,
    SCHEME,
    Terms,
    read_status,
    read_terms,
)
from agents_sdk.errors import LimitExceeded, QuoteRejected
from agents_sdk.journal import StoredPayment
from agents_sdk.money import nano_to_usd, usd_to_nano
from agents_sdk.policy import SpendingPolicy
from agents_sdk.quotes import Demand, Offer
from agents_sdk.receipts import amount_of
from agents_sdk.shared import Shared
from agents_sdk.steps import Sleep, Steps, fetch

POLL_S = 0.05
ROOM_WAIT_S = 30.0
"""How long a request waits for others on its channel before it is paid in another way."""
FILL_FROM = 1
"""Atomic units: what is too little to fill a channel up with, if the gateway names no least deposit."""
_RECEIPT = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)


class ChannelFull(Exception):
    """A channel was to be filled up and has enough. Nothing was signed.

    Args:
        channel_id: Which.
    """

    def __init__(self, channel_id: str) -> None:
        self.channel_id = channel_id
        super().__init__(channel_id)


def sign(
    shared: Shared,
    demand: Demand,
    offer: Offer,
    request: str,
    identifier: str | None,
    policy: SpendingPolicy,
    *,
    fill: bool = False,
) -> Steps[StoredPayment]:
    """Choose the next voucher, take it out of the limits, sign it, and write it down.

    Args:
        shared: The agent's state.
        demand: The 402, checked.
        offer: Its channel.
        request: The request's digest.
        identifier: Our own name for what is paid for.
        policy: The rules for this request.
        fill: Fill the channel up to what the policy lets lie in it, whether the request needs that or not.

    Raises:
        ChannelFull: There is nothing to fill up.
        LimitExceeded: A limit stands against it, the channel's deposit included.
        QuoteRejected: The channel is none to put money into.
        ApprovalNeeded, ApprovalFailed: The deposit needs Permit2.
    """
    terms = read_terms(offer.requirement, offer.token, shared.wallet.address, shared.settings.channel_name)
    yield from read_unclear(shared, terms.channel_id)
    reserved = yield from _reserve(shared, demand, offer, terms, request, policy, fill=fill)
    try:
        deposit = reserved.deposit
        if offer.through_permit2 and deposit is not None and deposit.authorization is None:
            yield from permit2.ensure_allowance(shared, offer.token, deposit.amount, asked_to=False)
        signed = signing.sign_payment(shared.wallet, demand, offer, terms, reserved, identifier)
        return book.keep(shared.journal, reserved, signed.header, signed.authorization, signed.expires_at)
    except BaseException:
        book.drop(shared.journal, reserved)
        raise


def _reserve(
    shared: Shared, demand: Demand, offer: Offer, terms: Terms, request: str, policy: SpendingPolicy, *, fill: bool
) -> Steps[Reserved]:
    wanted = Wanted(
        terms=terms,
        origin=shared.origin,
        payer=shared.wallet.address,
        request=request,
        recipient=offer.requirement.pay_to,
        price_nano_usd=demand.quote.maximum_nano_usd,
        expires_at=demand.quote.expires_at,
        deposit_nano_usd=usd_to_nano(policy.channel_deposit),
        deposit_expires_at=int(time.time()) + offer.requirement.max_timeout_seconds,
        windows=policy.windows(),
        fill_from=_least_deposit(offer) if fill else None,
    )
    give_up_at = time.monotonic() + ROOM_WAIT_S
    while True:
        found = book.reserve(shared.journal, wanted)
        if isinstance(found, Reserved):
            return found
        if isinstance(found, Full):
            raise ChannelFull(terms.channel_id)
        if isinstance(found, TooDear) or time.monotonic() > give_up_at:
            raise LimitExceeded(
                "channel_deposit",
                limit_nano_usd=wanted.deposit_nano_usd,
                asked_nano_usd=wanted.price_nano_usd,
                used_nano_usd=0,
            )
        assert isinstance(found, Wait)
        yield Sleep(POLL_S)


def _least_deposit(offer: Offer) -> int:
    told = offer.requirement.extra.get("minDeposit")
    return int(told) if isinstance(told, str) and told.isascii() and told.isdigit() and len(told) < 40 else FILL_FROM


def take_refusal(shared: Shared, payment: StoredPayment, offer: Offer, demand: Demand | None, code: str) -> bool:
    """The gateway refused a voucher with a 402. Returns whether another one, signed from what is known now, may do.

    Args:
        shared: The agent's state.
        payment: What was refused; its end is written down.
        offer: How it paid.
        demand: The 402, if it can be read.
        code: Why.

    Raises:
        ChannelDisputed: The gateway claims more than it proves.
        QuoteRejected: It says nothing that can be read.
    """
    if code == EXCEEDS_BALANCE:
        return deposits.exceeded(shared.journal, payment)
    if code in DEPOSIT_REFUSED:
        deposits.failed(shared.journal, payment)
        return False
    if code != CUMULATIVE_MISMATCH:
        return code == DEPOSIT_EXPIRED
    terms = read_terms(offer.requirement, offer.token, shared.wallet.address, shared.settings.channel_name)
    for requirement in () if demand is None else demand.required.accepts:
        found = shared.settings.tokens.find(requirement.network, requirement.asset)
        if requirement.scheme == SCHEME and found is offer.token and "channelState" in requirement.extra:
            status = read_status(requirement.extra, terms.channel_id)
            ours = signing.is_ours(shared.wallet, terms, status)
            book.correct(shared.journal, terms, status, ours=ours)
            return True
    raise QuoteRejected("the gateway says that the voucher is out of step, but not where the channel stands")


def read_unclear(shared: Shared, channel_id: str) -> Steps[None]:
    """Read the receipts of answers of which we did not hear the end, so that they count with what they cost."""
    for payment_id, receipt_id in book.unclear(shared.journal, channel_id):
        known, charged = yield from charged_by(shared, receipt_id)
        if known:
            book.clear(shared.journal, payment_id, charged)
            if charged is not None:
                shared.journal.amend_receipt(receipt_id, {"charged_usd": nano_to_usd(charged)})


def charged_by(shared: Shared, receipt_id: str) -> Steps[tuple[bool, int | None]]:
    """What a receipt says was charged, in nano-USD. First whether the question is settled: an open receipt's is not."""
    if not _RECEIPT.fullmatch(receipt_id):
        return True, None
    try:
        reply, body = yield from fetch("GET", shared.settings.base_url.join(f"/v1/receipts/{receipt_id}"))
    except httpx.TransportError:
        return False, None
    if reply.status != 200:
        return reply.status == 404, None
    document = document_in(body)
    if document.get("state") not in ("captured", "released"):
        return False, None
    return True, 0 if document["state"] == "released" else amount_of(document.get("charged_usd"))
