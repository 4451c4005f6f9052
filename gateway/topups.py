"""`POST /v1/wallet/topups`: a payment that becomes its payer's balance, whole: no request is charged to it, and no fee.

It is the pipeline of `gateway.flow` without an inference: 402 with a quote, the payment, and a receipt that charges nothing.
The payment proves whose wallet it is; the same payment sent again is told what became of the first, as that was told.
"""

from __future__ import annotations

import secrets
import time

from gateway.access.keys import Access, WalletCaller, WalletKeyCaller
from gateway.access.limits import QuoteLimiter
from gateway.api.errors import ApiError
from gateway.api.http import Call, read_json, send_json
from gateway.offers import Offers, SentPayment, error_text
from gateway.replays import KeptAnswer, Replays, replay_secret
from payments import receipts, wallet_accounts
from payments.errors import PaymentRefused
from payments.money import nano_to_usd, usd_to_nano
from payments.quotes import CHARGE_UNIT_NANO_USD, Quote, QuoteItem, request_digest
from payments.store import Store
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Hold, Outcome, Tender
from payments.tenders.closing import because
from payments.x402.answers import describe_quote

DESCRIPTION = "Balance of the wallet that pays, spent on answers"
RESUMES_MAX = 3
ANOTHER_USE_WAIT_S = 30.0


class TopUps:
    """Turns payments into balance.

    Args:
        store: The database.
        offers: Makes 402 answers and reads payments.
        access: Tells who is calling.
        limiter: Counts what is asked without being paid.
        replays: Keeps how a payment was answered, for the same payment sent again.
        minimum_nano_usd: The least that can be topped up at once.
        maximum_nano_usd: The most.
        quote_ttl_s: How long a 402 is good for, in seconds.
        json_depth_max: How deep a body may be nested.
    """

    def __init__(
        self,
        *,
        store: Store,
        offers: Offers,
        access: Access,
        limiter: QuoteLimiter,
        replays: Replays,
        minimum_nano_usd: int,
        maximum_nano_usd: int,
        quote_ttl_s: int,
        json_depth_max: int,
    ) -> None:
        self._store, self._offers, self._access, self._limiter = store, offers, access, limiter
        self._replays = replays
        self._minimum, self._maximum = minimum_nano_usd, maximum_nano_usd
        self._quote_ttl_s = quote_ttl_s
        self._json_depth_max = json_depth_max

    def limits_json(self) -> dict[str, str]:
        """What `GET /v1/wallet` says of top-ups."""
        return {"minimum_usd": nano_to_usd(self._minimum), "maximum_usd": nano_to_usd(self._maximum)}

    async def serve(self, call: Call) -> None:
        """Answer `POST /v1/wallet/topups`; the body says `amount_usd`."""
        self._limiter.check(call.client)
        now = int(time.time())
        quote = self._quote(call, now)
        try:
            sent = self._offers.sent(call)
            if sent is None:
                raise PaymentRefused("payment_required", "this is what has to be paid to top up")
            await self._require_own(call, sent)
            _, _, refusal = self._offers.claim(sent, quote.request_digest, now)
            await self._take(call, sent, self._offers.tender(sent, quote, now, refusal, tops_up=True), quote)
        except PaymentRefused as refused:
            self._limiter.count(call.client)
            answer = self._offers.required_for(
                call, quote, error_text(refused.code, refused.message), refused, description=DESCRIPTION
            )
            answer.body["quote"] = describe_quote(quote)
            headers = {"PAYMENT-REQUIRED": answer.header, "cache-control": "no-store"}
            await send_json(call.send, 402, answer.body, headers)

    def _quote(self, call: Call, now: int) -> Quote:
        text = read_json(call.body, self._json_depth_max).get("amount_usd")
        try:
            amount = usd_to_nano(text) if isinstance(text, str) else -1
        except ValueError:
            amount = -1
        if not self._minimum <= amount <= self._maximum or amount % CHARGE_UNIT_NANO_USD:
            self._limiter.count(call.client)
            raise ApiError(
                400,
                "invalid_field",
                f'`amount_usd` must be a text such as "10.00", from {nano_to_usd(self._minimum)} to'
                f" {nano_to_usd(self._maximum)}, with at most six decimals",
                param="amount_usd",
            )
        return Quote(
            id=f"quote_{secrets.token_hex(10)}",
            items=(QuoteItem("topup", amount),),
            maximum_nano_usd=amount,
            route=(),
            request_digest=request_digest(call.method, call.path, call.body),
            expires_at=now + self._quote_ttl_s,
        )

    async def _require_own(self, call: Call, sent: SentPayment) -> None:
        """Whoever is signed in tops up its own wallet: paying from another one would top up that one instead."""
        caller = await self._access.caller(call.header(b"authorization"))
        payer = getattr(sent.payment, "payer", None)
        if isinstance(caller, WalletCaller | WalletKeyCaller) and caller.address != payer:
            raise ApiError(
                403,
                "payer_mismatch",
                f"the payment is from {payer}, you are signed in as {caller.address}; nothing was taken",
            )

    async def _take(self, call: Call, sent: SentPayment, tender: Tender, quote: Quote) -> None:
        details = {"kind": "topup", "quote": describe_quote(quote)}
        for _ in range(RESUMES_MAX):
            try:
                hold = await tender.authorize(quote, details)
            except AlreadyUsed as used:
                if used.state == "in_progress" and await sent.scheme.use_ended(used.receipt_id, ANOTHER_USE_WAIT_S):
                    continue
                if used.state == "in_progress":
                    break
                await self._answer_again(call, sent, used.receipt_id)
                return
            await self._complete(call, sent, hold)
            return
        raise ApiError(409, "payment_in_progress", "this payment is still under way; send it again later")

    async def _complete(self, call: Call, sent: SentPayment, hold: Hold) -> None:
        try:
            # Before the money: what arrives later than the caller waits is balance all the same, and is not sent back.
            await self._store.write(lambda tx: wallet_accounts.open_account(tx, hold.payer))
            await hold.ready()
            headers = self._payment_headers(call, sent, hold)
            kept = KeptAnswer(200, headers, "application/json", b"")
            sealed = self._replays.sealed(hold.receipt_id, replay_secret(sent.header, call.body), kept)
            await hold.capture(0, Outcome({"kind": "topup"}), also=sealed)
        except BaseException:
            # Does nothing after a capture; before one, the same payment sent again goes on from here.
            await hold.interrupt(because("the top-up was not finished"))
            raise
        await self._answer(call, hold.receipt_id, headers)

    def _payment_headers(self, call: Call, sent: SentPayment, hold: Hold) -> dict[str, str]:
        response = hold.payment_response()
        return {} if response is None else self._offers.payment_headers(call, sent, response)

    async def _answer_again(self, call: Call, sent: SentPayment, receipt_id: str) -> None:
        """The receipt as it is by now, and of the payment what was told first."""
        kept = await self._replays.find(receipt_id, replay_secret(sent.header, call.body))
        await self._answer(call, receipt_id, ({} if kept is None else kept.headers) | {"x-farebox-replayed": "true"})

    async def _answer(self, call: Call, receipt_id: str, payment_headers: dict[str, str]) -> None:
        receipt = await self._store.read(lambda tx: receipts.get(tx, receipt_id))
        assert receipt is not None
        headers = payment_headers | {
            "x-farebox-receipt": receipt.id,
            "x-farebox-quoted-usd": nano_to_usd(receipt.quoted_nano_usd),
            "x-farebox-cost-usd": nano_to_usd(receipt.charged_nano_usd or 0),
            "cache-control": "no-store",
        }
        body = {
            "address": receipt.payer,
            "asset": receipt.asset,
            "credited_usd": nano_to_usd(receipt.credited_nano_usd),
            "receipt": receipt.id,
            "transaction": receipt.transaction_hash,
        }
        await send_json(call.send, 200, body, headers)
