"""Getting back what a channel holds beyond what was charged: asked for with GET at the address that was paid.

The request carries a voucher over what was charged, which is no new right to money: it is never more than was signed before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from agents_sdk.answers import document_in, error_code_in
from agents_sdk.channels import book, signing
from agents_sdk.channels.rows import Book
from agents_sdk.channels.terms import CUMULATIVE_MISMATCH, REFUND_NO_BALANCE, SCHEME, read_status
from agents_sdk.errors import AnswerUnreadable, ChannelDisputed, RequestRefused
from agents_sdk.money import atomic_to_nano_down, nano_to_atomic_down, nano_to_atomic_up, nano_to_usd
from agents_sdk.receipts import settled_in
from agents_sdk.results import Refund
from agents_sdk.shared import Shared
from agents_sdk.steps import Reply, Sleep, Steps, fetch
from agents_sdk.wallet import PAYMENT_HEADER

if TYPE_CHECKING:
    from x402.schemas import PaymentRequired, PaymentRequirements

PATH = "/v1/chat/completions"
TRIES_MAX = 8
POLL_S = 1.0


def refund(shared: Shared, channel_id: str, amount_nano_usd: int | None) -> Steps[Refund]:
    """Ask for what is left in a channel, or for a part of it, and wait until the chain has it.

    Args:
        shared: The agent's state.
        channel_id: One of the journal's channels.
        amount_nano_usd: How much; None for all.

    Raises:
        RequestRefused: There is nothing to give back, or the gateway does not take this channel.
        ChannelDisputed: The gateway claims more than was signed.
        AnswerUnreadable, httpx.TransportError: As they say; the same again goes on from there.
    """
    channel = book.get(shared.journal, channel_id)
    terms = channel.terms
    amount = None if amount_nano_usd is None else nano_to_atomic_down(amount_nano_usd, terms.decimals)
    if amount == 0:
        least = _usd(nano_to_atomic_up(1, terms.decimals), channel)
        raise RequestRefused(400, "refund_amount", f"the least that can come back of {terms.asset} is {least} USD")
    required, requirement = yield from _offer(shared, channel)
    voucher = nano_to_atomic_up(channel.charged_nano_usd, terms.decimals)
    intent = f"refund|{channel_id}|{amount}"
    _, asked_before = shared.journal.intend(intent)
    for _ in range(TRIES_MAX):
        if voucher > channel.signed:
            raise ChannelDisputed(
                f"the gateway says that more of the channel {channel_id} was charged than this wallet signed for"
            )
        header = signing.sign_refund(shared.wallet, required, requirement, terms, voucher, amount)
        reply, body, lost = yield from _ask(shared, terms.network, {PAYMENT_HEADER: header})
        asked_before |= lost
        if reply.status == 200:
            settled = settled_in(reply.headers)
            told = "" if settled is None else str(settled.amount or "")
            given = book.given_back(shared.journal, channel_id, int(told) if told.isdigit() else amount)
            shared.journal.end_intent(intent)
            transaction = None if settled is None else settled.transaction or None
            return Refund(channel_id, terms.asset, _usd(given, channel), transaction)
        code = error_code_in(body)
        if reply.status == 402 and code == CUMULATIVE_MISMATCH:
            voucher = _corrected(reply, body, channel)
        elif reply.status == 202 or reply.status >= 500:
            asked_before = True
            yield Sleep(POLL_S)
        else:
            shared.journal.end_intent(intent)
            if code == REFUND_NO_BALANCE and asked_before:
                given = book.given_back(shared.journal, channel_id, amount)
                return Refund(channel_id, terms.asset, _usd(given, channel), None)
            raise RequestRefused(reply.status, code, _reason(code, body, channel, amount))
    raise AnswerUnreadable(f"the refund of the channel {channel_id} is still on its way; ask for it again later")


def is_served(shared: Shared, channel: Book) -> Steps[bool]:
    """Whether the gateway that is asked now gives back what is left in a channel."""
    try:
        yield from _offer(shared, channel)
    except RequestRefused:
        return False
    return True


def _offer(shared: Shared, channel: Book) -> Steps[tuple[PaymentRequired, PaymentRequirements]]:
    from x402.http.utils import decode_payment_required_header
    from x402.schemas import PaymentRequired

    reply, _, _ = yield from _ask(shared, channel.terms.network, {})
    try:
        required = decode_payment_required_header(reply.headers["payment-required"])
        assert isinstance(required, PaymentRequired)
    except (KeyError, ValueError, AssertionError):
        raise AnswerUnreadable(f"the gateway answered HTTP {reply.status} and does not offer channels") from None
    for requirement in required.accepts:
        if channel.terms.are_served_by(requirement):
            return required, requirement
    delay = channel.terms.config["withdrawDelay"]
    elsewhere = "" if channel.origin == shared.origin else f": it was used last with {channel.origin}, which may"
    raise RequestRefused(
        reply.status,
        "channel_not_taken",
        f"{shared.origin} does not serve the channel {channel.terms.channel_id}{elsewhere}. Its money is the wallet's in any "
        f"case: announce a withdrawal on chain (initiateWithdraw), and take it {delay} seconds later (finalizeWithdraw)",
    )


def _ask(shared: Shared, network: str, headers: dict[str, str]) -> Steps[tuple[Reply, bytes, bool]]:
    """The answer, and whether one before it was lost."""
    url, tries = shared.settings.base_url.join(PATH), shared.settings.tries_max
    headers = {"accept-payment": f"{SCHEME}, {network}", **headers}
    for tried in range(tries):
        try:
            reply, body = yield from fetch("GET", url, headers=headers)
        except httpx.TransportError:
            if tried == tries - 1:
                raise
        else:
            return reply, body, tried > 0
        yield Sleep(shared.settings.backoff_s)
    raise AssertionError("tries_max is at least 1")


def _corrected(reply: Reply, body: bytes, channel: Book) -> int:
    from x402.http.utils import decode_payment_required_header
    from x402.schemas import PaymentRequired

    try:
        required = decode_payment_required_header(reply.headers["payment-required"])
        assert isinstance(required, PaymentRequired)
    except (KeyError, ValueError, AssertionError):
        raise AnswerUnreadable("the gateway's corrective 402 cannot be read") from None
    for requirement in required.accepts:
        if requirement.scheme == SCHEME and "channelState" in requirement.extra:
            return read_status(requirement.extra, channel.terms.channel_id).charged
    raise AnswerUnreadable("the gateway says that the voucher is out of step, but not where the channel stands")


def _reason(code: str, body: bytes, channel: Book, amount: int | None) -> str:
    if code == REFUND_NO_BALANCE and amount is not None and channel.unspent:
        return f"{_usd(amount, channel)} USD are asked for, and {_usd(channel.unspent, channel)} USD are left in the channel"
    if code == REFUND_NO_BALANCE:
        return "there is nothing in this channel that is not charged"
    error = document_in(body).get("error")
    return str(error.get("message", code)) if isinstance(error, dict) else str(error or code)


def _usd(amount: int, channel: Book) -> str:
    return nano_to_usd(atomic_to_nano_down(amount, channel.terms.decimals))
