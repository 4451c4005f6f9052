"""The outermost layer: request ids, a bound on requests under way, one log line each, and every error in one form."""

from __future__ import annotations

import re
import secrets
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.errors import ApiError
from gateway.api.http import CallerGone, send_error, send_json
from gateway.metrics import Metrics
from gateway.offers import PAYMENT_HEADERS
from payments.errors import PaymentConflict, PaymentError, SettlementPending
from payments.store import StoreBusy
from payments.tenders.base import HoldEnded

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_PRIVATE = frozenset({*PAYMENT_HEADERS, b"authorization"})
_NO_STORE = (b"cache-control", b"no-store")
log = structlog.get_logger("farebox.http")


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: What it guards.
        concurrency_max: Requests under way at once; more get 503.
        metrics: Where responses are counted.
    """

    def __init__(self, app: ASGIApp, concurrency_max: int, metrics: Metrics) -> None:
        self._app = app
        self._concurrency_max = concurrency_max
        self._metrics = metrics
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        # An endpoint may plan the request that another one would get, and changes its scope to it.
        method = scope["method"]
        request_id = _request_id(scope)
        marks = [(b"x-request-id", request_id)]
        names = {name for name, _ in scope["headers"]}
        if not names.isdisjoint(PAYMENT_HEADERS):
            # The stock OpenAI SDK retries 409 and 5xx, and through a paying transport that would be a new payment.
            marks.append((b"x-should-retry", b"false"))
        # What somebody paid for is nobody else's: a shared cache that kept it would serve it for free (arXiv 2605.11781).
        is_private = not names.isdisjoint(_PRIVATE)
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *marks]
                if is_private and not any(name == b"cache-control" for name, _ in message["headers"]):
                    message["headers"].append(_NO_STORE)
            await send(message)

        self.under_way += 1
        try:
            if self.under_way > self._concurrency_max:
                raise ApiError(
                    503,
                    "overloaded",
                    "too many requests are under way; try again shortly",
                    headers={"retry-after": "1"},
                )
            await self._app(scope, receive, send_marked)
        except CallerGone:
            status = status or 499
        except (ApiError, PaymentError, StoreBusy) as error:
            await self._answer(send_marked, error, status)
        except Exception:
            # The last resort: the log has the traceback, the caller a clear answer without it.
            log.exception("unexpected error", request_id=request_id.decode(), path=scope["path"])
            unexpected = ApiError(
                500, "internal_error", "something went wrong here; the request id helps the operator find it"
            )
            await self._answer(send_marked, unexpected, status)
        finally:
            self.under_way -= 1
            seconds = time.perf_counter() - started
            route = scope.get("farebox.route", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            # Anybody can ask for a price, as often as the limit lets them; the metrics count those.
            write = log.debug if status == 402 else log.info
            write(
                "request",
                id=request_id.decode(),
                method=method,
                route=route,
                status=status,
                ms=round(seconds * 1e3, 2),
            )

    async def _answer(self, send: Send, error: ApiError | PaymentError | StoreBusy, status: int) -> None:
        answer = as_api_error(error)
        if status:
            log.error("error after the response had begun", code=answer.code)
            raise error
        if isinstance(error, SettlementPending):
            # Not an error: the payment may well have gone through. Clients poll, then send the same payment again.
            pending = {"status": "pending", "message": error.message} | answer.extra
            await send_json(send, 202, pending, answer.headers)
            return
        await send_error(send, answer)


def as_api_error(error: ApiError | PaymentError | StoreBusy) -> ApiError:
    """Any error that has an answer, in the one form that answers have."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StoreBusy):
        return ApiError(503, "overloaded", f"{error}; try again shortly", headers={"retry-after": "1"})
    extra: dict[str, str] = {}
    headers: dict[str, str] = {}
    receipt_id = error.receipt_id if isinstance(error, SettlementPending | PaymentConflict | HoldEnded) else None
    if receipt_id is not None:
        extra = {"receipt": receipt_id, "poll": f"/v1/receipts/{receipt_id}"}
        headers = {"x-farebox-receipt": receipt_id}
    if error.status in (202, 503):
        headers["retry-after"] = "2"
    return ApiError(error.status, error.code, error.message, headers=headers, extra=extra)


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return b"req_" + secrets.token_hex(12).encode()
