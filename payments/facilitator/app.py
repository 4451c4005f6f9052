"""The facilitator over HTTP: `/verify`, `/settle`, `/supported`, `/discovery/resources`, and what operators look at.

Answers of the protocol have status 200, whatever they say of a payment; anything else is an OpenAI-style error.
"""

from __future__ import annotations

import asyncio
import binascii
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from payments.errors import PaymentMalformed
from payments.facilitator import discovery, wire
from payments.facilitator.access import Client, Denied
from payments.facilitator.opening import Services
from payments.facilitator.wire import FacilitatorCall
from payments.store import StoreBusy

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 262_144
"""A hundred claims, as many as a server sends at once, are about 90,000."""
BODY_TIMEOUT_S = 10.0
IDEMPOTENCY_KEY_CHARACTERS_MAX = 128

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
Handler = Callable[[Services, Request], Awaitable[Response]]


class _Answerer:
    """Calls handlers within limits, and turns every error into an answer."""

    def __init__(self, services: Services, concurrency_max: int) -> None:
        self._services = services
        self._concurrency_max = concurrency_max
        self._under_way = 0

    def endpoint(self, path: str, method: str, handler: Handler) -> Route:
        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            self._under_way += 1
            try:
                if self._under_way > self._concurrency_max:
                    raise Denied(503, "overloaded", "too many calls are under way; try again shortly", 1)
                response = await handler(self._services, request)
            except Denied as error:
                response = _error(error.status, error.code, error.message, error.wait_s)
            except StoreBusy as error:
                response = _error(503, "overloaded", f"{error}; try again shortly", 1)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                log.exception("unexpected error at %s", path)
                response = _error(
                    500, "internal_error", "something went wrong here; the log of this facilitator says what"
                )
            finally:
                self._under_way -= 1
            self._services.metrics.answered(path, response.status_code, time.perf_counter() - started)
            return response

        return Route(path, answer, methods=[method])


def create_app(services: Services, *, concurrency_max: int = 1_000) -> Starlette:
    """Build the facilitator's ASGI application.

    Args:
        services: Opened already, see `payments.facilitator.opening.opened`.
        concurrency_max: Calls under way at once; more get 503.
    """
    answerer = _Answerer(services, concurrency_max)
    return Starlette(
        routes=[
            answerer.endpoint("/verify", "POST", verify),
            answerer.endpoint("/settle", "POST", settle),
            answerer.endpoint("/supported", "GET", supported),
            answerer.endpoint("/discovery/resources", "GET", resources),
            answerer.endpoint("/healthz", "GET", healthz),
            answerer.endpoint("/readyz", "GET", readyz),
            answerer.endpoint("/metrics", "GET", metrics_text),
        ],
        exception_handlers={404: _not_found, 405: _not_found},
    )


async def verify(services: Services, request: Request) -> Response:
    """Whether a payment would be settled now; changes nothing."""
    client = await _client(services, request)
    body = await _body(request)
    try:
        call = services.facilitator.read(body)
    except PaymentMalformed as error:
        answer = wire.not_verified(wire.reason_for(error.code, None), error.message, None)
    else:
        answer = await services.facilitator.verify(call, client)
    services.metrics.verified(answer)
    return _json(answer)


async def settle(services: Services, request: Request) -> Response:
    """Settle a payment, and answer when its outcome is known or the wait is over."""
    client = await _client(services, request)
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= IDEMPOTENCY_KEY_CHARACTERS_MAX:
        raise Denied(
            400, "invalid_idempotency_key", f"Idempotency-Key has 1 to {IDEMPOTENCY_KEY_CHARACTERS_MAX} characters"
        )
    body = await _body(request)
    headers: dict[str, str] = {}
    try:
        call = services.facilitator.read(body)
    except PaymentMalformed as error:
        network = (
            body.get("paymentRequirements", {}).get("network")
            if isinstance(body.get("paymentRequirements"), dict)
            else ""
        )
        answer = wire.not_settled(
            wire.reason_for(error.code, None), error.message, network if isinstance(network, str) else "", None
        )
    else:
        answer = await _while_connected(request, services.facilitator.settle(call, client, key))
        if answer["success"]:
            headers = await _catalogue(services, call)
    services.metrics.settled(answer)
    return _json(answer, headers)


async def supported(services: Services, request: Request) -> Response:
    """What can be settled here."""
    return _json(services.facilitator.supported())


async def resources(services: Services, request: Request) -> Response:
    """What is sold over x402 and was paid through here."""
    try:
        page = discovery.read_page(request.query_params)
    except ValueError as error:
        raise Denied(400, "invalid_parameter", str(error)) from None
    return _json(await services.store.read(lambda tx: discovery.listing(tx, page)))


async def healthz(services: Services, request: Request) -> Response:
    """The process answers."""
    return _json({"status": "ok"})


async def readyz(services: Services, request: Request) -> Response:
    """Whether it can settle; 503 with what is wrong otherwise."""
    alarms = services.alarms()
    return _json({"status": "alarm" if alarms else "ok", "alarms": alarms}, status=503 if alarms else 200)


async def metrics_text(services: Services, request: Request) -> Response:
    """For Prometheus."""
    return Response(services.metrics.text(), media_type="text/plain; version=0.0.4")


async def _client(services: Services, request: Request) -> Client:
    address = request.client.host if request.client is not None else ""
    return await services.clients.identify(request.headers.get("authorization"), address)


async def _body(request: Request) -> dict[str, Any]:
    too_large = Denied(413, "body_too_large", f"the body may have at most {BODY_BYTES_MAX} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES_MAX:
                    raise too_large
    except TimeoutError:
        raise Denied(408, "body_too_slow", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    try:
        value = orjson.loads(bytes(body))
    except orjson.JSONDecodeError as error:
        raise Denied(400, "invalid_json", f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Denied(400, "invalid_json", "the body must be a JSON object")
    return value


async def _while_connected(request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Await `work` as long as somebody is there to be told of it: a success that nobody hears must not be granted."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _catalogue(services: Services, call: FacilitatorCall) -> dict[str, str]:
    """List what was paid for, if the payment describes it; the header that says how that went."""
    if not discovery.describes(call):
        return {}
    try:
        entry = discovery.entry_for(call)
        listed = await services.store.write(lambda tx: discovery.enter(tx, entry))
        refused = "" if listed else "it is listed for another recipient, or its recipient has listed too much"
    except discovery.NotListed as error:
        refused = str(error)
    except StoreBusy:
        refused = "the catalogue takes nothing now"
    status = {"status": "rejected", "rejectedReason": refused} if refused else {"status": "success"}
    encoded = binascii.b2a_base64(orjson.dumps({discovery.BAZAAR: status}), newline=False)
    return {"extension-responses": encoded.decode("ascii")}


async def _not_found(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        return _error(405, "method_not_allowed", f"{request.url.path} does not take {request.method}")
    return _error(404, "not_found", f"there is nothing at {request.url.path}; see /supported")


def _json(value: Any, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    own = {"cache-control": "no-store", **(headers or {})}
    return Response(orjson.dumps(value), status_code=status, headers=own, media_type="application/json")


def _error(status: int, code: str, message: str, wait_s: int = 0) -> Response:
    body = {"error": {"message": message, "type": _TYPES.get(status, "api_error"), "code": code, "param": None}}
    return _json(body, {"retry-after": str(wait_s)} if wait_s else None, status)
