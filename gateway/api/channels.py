"""Refunds of payment channels: the payer asks for one with GET at the address that it paid, as official clients do."""

from __future__ import annotations

import time
from collections.abc import Mapping

from gateway.access.limits import QuoteLimiter
from gateway.api.errors import ApiError
from gateway.api.http import Call, send_json
from gateway.offers import Offers, error_text
from payments.channels.refunds import Refunder
from payments.errors import PaymentRefused
from payments.quotes import make_quote, request_digest
from payments.x402.channels import PAYLOAD_TYPE, SCHEME, ChannelPayment

DESCRIPTION = "A refund of what a payment channel holds"
QUOTE_TTL_S = 300


async def refund(call: Call, offers: Offers, channels: Mapping[int, Refunder], limiter: QuoteLimiter) -> None:
    """Answer 402 with the channels that are taken here, or a refund with what came of it."""
    if not channels:
        raise ApiError(404, "not_found", "there is nothing here; chat completions are asked for with POST")
    limiter.take(call.client)
    try:
        sent = offers.sent(call)
        if sent is None:
            raise PaymentRefused("payment_required", "send a refund payload of the scheme batch-settlement")
        payment = sent.payment
        if not isinstance(payment, ChannelPayment) or payment.type != "refund":
            raise PaymentRefused(PAYLOAD_TYPE, "only a refund is asked for with GET; pay with POST")
        refunded = await channels[sent.token.chain_id].refund(payment, sent.token)
    except PaymentRefused as error:
        await _ask(call, offers, error)
        return
    body = {"refund": {"channel": refunded.channel.id, "amount": str(refunded.amount), "asset": refunded.channel.asset}}
    headers = offers.payment_headers(call, sent, refunded.payment_response(payment.network))
    await send_json(call.send, 200, body, headers | {"cache-control": "no-store"})


async def _ask(call: Call, offers: Offers, refused: PaymentRefused) -> None:
    digest = request_digest(call.method, call.path, call.body)
    # An offer is how a client knows its channel again; a refund itself costs nothing.
    quote = make_quote(
        inference_nano_usd=0,
        network_fee_nano_usd=0,
        minimum_nano_usd=0,
        route=(),
        request_digest=digest,
        expires_at=int(time.time()) + QUOTE_TTL_S,
    )
    answer = offers.required_for(
        call, quote, error_text(refused.code, refused.message), refused, only=(SCHEME,), description=DESCRIPTION
    )
    await send_json(call.send, 402, answer.body, {"PAYMENT-REQUIRED": answer.header, "cache-control": "no-store"})
