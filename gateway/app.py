"""The application: URLs on one side, services on the other, and the life of a process around them."""

from __future__ import annotations

import binascii
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway import serving
from gateway.api import models
from gateway.api.channels import refund
from gateway.api.errors import ApiError, error_object
from gateway.api.guard import Guard
from gateway.api.http import Call, read_call, send_body, send_json
from gateway.api.wallet import WalletApi
from gateway.api.withdrawals import WithdrawalApi
from gateway.metrics import Metrics
from gateway.offers import PaymentNeeded
from gateway.services import Services
from gateway.settings import Settings
from payments import receipts
from payments.facilitator.discovery import read_page
from payments.x402.extensions import bazaar
from payments.x402.v1 import RESOURCE_DESCRIPTION

Handler = Callable[[Services, Call], Awaitable[None]]


class Endpoint:
    """A handler as an ASGI application: reads the request within limits and calls it with the services."""

    def __init__(self, name: str, handler: Handler, body_bytes_max: int) -> None:
        self._name = name
        self._handler = handler
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        scope["farebox.route"] = self._name
        call = await read_call(scope, receive, send, self._body_bytes_max)
        await self._handler(scope["app"].state.services, call)


def create_app(settings: Settings) -> Starlette:
    """Build the gateway.

    Args:
        settings: A checked configuration.

    Returns:
        An ASGI application; its lifespan opens the database, resumes settlements and closes everything again.
    """
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with Services.open(settings, metrics) as services:
            app.state.services = services
            yield

    def route(method: str, path: str, handler: Handler) -> Route:
        return Route(path, Endpoint(path, handler, settings.limits.body_bytes), methods=[method])

    return Starlette(
        lifespan=lifespan,
        routes=[
            route("POST", "/v1/chat/completions", chat_completions),
            route("POST", "/v1/quote", quote),
            # Official clients ask for a refund with GET at the address that they paid.
            route("GET", "/v1/chat/completions", refund_channel),
            route("GET", "/v1/models", list_models),
            route("GET", "/v1/models/{model:path}", get_model),
            route("GET", "/v1/receipts/{receipt}", get_receipt),
            route("POST", "/v1/wallet/challenges", create_challenge),
            route("POST", "/v1/wallet/sessions", create_session),
            route("GET", "/v1/wallet", wallet(WalletApi.get_wallet)),
            route("GET", "/v1/wallet/history", wallet(WalletApi.get_history)),
            route("POST", "/v1/wallet/deposit-addresses", wallet(WalletApi.create_deposit_addresses)),
            route("GET", "/v1/wallet/keys", wallet(WalletApi.list_keys)),
            route("POST", "/v1/wallet/keys", wallet(WalletApi.create_key)),
            route("DELETE", "/v1/wallet/keys/{key}", wallet(WalletApi.revoke_key)),
            route("POST", "/v1/wallet/topups", top_up),
            route("GET", "/v1/wallet/withdrawals", withdrawals(WithdrawalApi.list)),
            route("POST", "/v1/wallet/withdrawals", withdrawals(WithdrawalApi.create)),
            route("GET", "/v1/wallet/withdrawals/{withdrawal}", withdrawals(WithdrawalApi.get)),
            route("GET", "/discovery/resources", discovery),
            route("GET", "/.well-known/farebox-keys", public_keys),
            route("GET", "/healthz", healthz),
            route("GET", "/readyz", readyz),
            route("GET", "/metrics", metrics_text),
        ],
        middleware=[Middleware(Guard, concurrency_max=settings.limits.concurrency, metrics=metrics)],
        exception_handlers={404: _not_found, 405: _not_found},
    )


async def chat_completions(services: Services, call: Call) -> None:
    """Answer a chat, paid in whatever way."""
    await services.flow.serve(call)


async def quote(services: Services, call: Call) -> None:
    """The price and the route of a chat completion, without paying: the same body as for `/v1/chat/completions`."""
    services.limiter.take(call.client)
    # The quote is for the request that will be sent, not for the one that asks.
    call.scope["path"] = "/v1/chat/completions"
    answer = services.offers.required(call, PaymentNeeded(await services.flow.plan(call)))
    body = {"quote": answer.body["quote"], "payment_required": answer.header, "accepts": answer.body["accepts"]}
    await send_json(call.send, 200, body, {"cache-control": "no-store"})


async def refund_channel(services: Services, call: Call) -> None:
    """Give back what a payment channel holds beyond what was charged."""
    await refund(call, services.offers, services.channels, services.limiter)


async def list_models(services: Services, call: Call) -> None:
    """Everything that can be called, with prices."""
    await send_json(call.send, 200, models.list_models(services.catalog))


async def get_model(services: Services, call: Call) -> None:
    """One model."""
    await send_json(call.send, 200, models.get_model(services.catalog, call.scope["path_params"]["model"]))


async def get_receipt(services: Services, call: Call) -> None:
    """What became of a request. Whoever knows the unguessable id may read it; it holds no content."""
    receipt_id = call.scope["path_params"]["receipt"]
    view = await services.store.read(lambda tx: receipts.get(tx, receipt_id))
    if view is None:
        raise ApiError(404, "receipt_not_found", "there is no receipt with this id", param="receipt")
    await send_json(call.send, 200, view.as_json(), {"cache-control": "no-store"})


async def create_challenge(services: Services, call: Call) -> None:
    """Begin to sign in with a wallet."""
    services.limiter.take(call.client)
    await send_json(call.send, 200, await services.wallet.create_challenge(call), {"cache-control": "no-store"})


async def create_session(services: Services, call: Call) -> None:
    """Finish signing in with a wallet."""
    services.limiter.take(call.client)
    await send_json(call.send, 200, await services.wallet.create_session(call), {"cache-control": "no-store"})


def wallet(method: Callable[[WalletApi, Call], Awaitable[dict[str, Any]]]) -> Handler:
    """What a wallet asks about itself."""

    async def handler(services: Services, call: Call) -> None:
        await send_json(call.send, 200, await method(services.wallet, call), {"cache-control": "no-store"})

    return handler


async def top_up(services: Services, call: Call) -> None:
    """A payment becomes its payer's balance."""
    await services.topups.serve(call)


def withdrawals(method: Callable[[WithdrawalApi, Call], Awaitable[dict[str, Any]]]) -> Handler:
    """What a wallet takes out."""

    async def handler(services: Services, call: Call) -> None:
        await send_json(call.send, 200, await method(services.withdrawals, call), {"cache-control": "no-store"})

    return handler


async def discovery(services: Services, call: Call) -> None:
    """What is sold here, for catalogues: the paid route with the offers for an example (x402's discovery)."""
    services.limiter.take(call.client)
    query = parse_qsl(call.scope.get("query_string", b"").decode("latin-1"))
    try:
        page = read_page(dict(query))
    except ValueError as error:
        raise ApiError(400, "invalid_parameter", str(error)) from None
    extensions = services.extensions
    call.scope["path"] = bazaar.CHAT_PATH
    call.scope["method"] = "POST"
    call.body = extensions.example()
    answer = services.offers.required(call, PaymentNeeded(await services.flow.plan(call)))
    accepts = orjson.loads(binascii.a2b_base64(answer.header))["accepts"]
    url = extensions.origin + bazaar.CHAT_PATH
    body = bazaar.listing(url, RESOURCE_DESCRIPTION, accepts, extensions.example_model or "", page.limit, page.offset)
    await send_json(call.send, 200, body, {"cache-control": "max-age=60"})


async def public_keys(services: Services, call: Call) -> None:
    """Whose signatures on offers and receipts are this gateway's."""
    await send_json(call.send, 200, services.extensions.keys(), {"cache-control": "max-age=3600"})


async def healthz(services: Services, call: Call) -> None:
    """The process answers."""
    await send_json(call.send, 200, {"status": "ok"})


async def readyz(services: Services, call: Call) -> None:
    """The gateway can take payments and serve; otherwise 503 with what is wrong."""
    alarms = services.alarms()
    await send_json(call.send, 503 if alarms else 200, {"status": "alarm" if alarms else "ready", "alarms": alarms})


async def metrics_text(services: Services, call: Call) -> None:
    """Metrics for Prometheus."""
    await send_body(call.send, 200, services.metrics.text(), {}, "text/plain; version=0.0.4; charset=utf-8")


async def _not_found(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        body = error_object(405, "method_not_allowed", f"{request.url.path} does not take {request.method}")
    else:
        body = error_object(404, "not_found", f"there is nothing at {request.url.path}; the API is under /v1")
    headers: dict[str, Any] = dict(getattr(error, "headers", None) or {})
    return JSONResponse({"error": body}, status_code=status, headers=headers)


def serve(settings: Settings) -> None:
    """Run the gateway until SIGTERM or Ctrl-C, then let the requests under way finish.

    Raises:
        TokenMismatch, RpcUnavailable, RpcError: A chain is not what the configuration says, or cannot be asked.
        StoreOwned, SchemaTooNew: The database belongs to another process, or to a newer Farebox.
    """

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[Starlette]:
        app = create_app(settings)
        # Entered here, so that what keeps the services from starting is raised and not only logged.
        async with app.router.lifespan_context(app):
            yield app

    serving.run(opened(), settings.host, settings.port, settings.limits)
