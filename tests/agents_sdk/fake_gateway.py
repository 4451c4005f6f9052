"""A small gateway over real sockets that speaks the paid API and misbehaves on order. It checks every signature."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import uvicorn
from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol
from x402.http.utils import (
    decode_payment_signature_header,
    encode_payment_required_header,
    encode_payment_response_header,
)
from x402.schemas import PaymentPayload, PaymentRequired, PaymentRequirements, ResourceInfo, SettleResponse

from agents_sdk.tokens import PERMIT2_ADDRESS, Token

NETWORK = "eip155:84532"
USDC = Token("USDC", NETWORK, "0x036CbD53842c5426634e7929541eC2318f3dCF7e", 6, "eip3009", "USDC", "2")
USDT = Token("USDT", NETWORK, "0x00000000000000000000000000000000000055d7", 6, "permit2")
PAY_TO = "0x00000000000000000000000000000000000007e5"
EXACT_PROXY = "0x402085c248EeA27D92E8b30b2C58ed07f9E20001"
TRANSACTION = "0x" + "ab" * 32
MAXIMUM_NANO_USD = 500_000
CHARGED_NANO_USD = 113_000
WORDS = ("Light ", "scatters.")


class AbortableProtocol(H11Protocol):
    """Lets the application drop its connection without an answer."""

    live: dict[Any, asyncio.Transport] = {}  # noqa: RUF012 - one table for all connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.live[tuple(transport.get_extra_info("peername")[:2])] = transport


@dataclass
class FakeGateway:
    """What was seen, and what to do next. `script` holds one word for each paid request to come; then it behaves."""

    url: str = ""
    script: list[str] = field(default_factory=list)
    credit_script: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=lambda: [USDC])
    extra: dict[str, Any] = field(default_factory=dict)
    """Overrides in the 402: quote, resource, pay_to, amount, domain, timeout."""
    seen: list[str] = field(default_factory=list)
    """The nonce of every paid request, in order."""
    taken: dict[str, str] = field(default_factory=dict)
    """Nonce → payer, of payments that were settled."""
    payments: list[PaymentPayload] = field(default_factory=list)
    unpaid: int = 0
    on_credit: int = 0
    challenges: int = 0
    polls: int = 0
    credit: dict[str, int] = field(default_factory=dict)
    authorizations: list[str | None] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    poll: str = "/v1/receipts/rcpt_slow"
    message: str | None = None
    """What to have signed instead of a sign-in message."""
    arrived: threading.Event = field(default_factory=threading.Event)
    """Set once a paid request is here."""
    _sessions: dict[str, str] = field(default_factory=dict)

    @property
    def nonces(self) -> set[str]:
        """Distinct payments that were ever shown to the gateway."""
        return set(self.seen)

    # ------------------------------------------------------------------ endpoints

    async def chat(self, request: Request) -> Response:
        body = await request.body()
        self.authorizations.append(request.headers.get("authorization"))
        header = request.headers.get("payment-signature")
        if header is not None:
            return await self._paid(request, header, body)
        session = request.headers.get("authorization", "").removeprefix("Bearer ")
        if session in self._sessions:
            return await self._from_credit(request, self._sessions[session], body)
        self.unpaid += 1
        return self._required(request, "payment_required: this request has to be paid")

    def _required(self, request: Request, error: str) -> Response:
        extra = self.extra
        quote = {
            "id": f"quote_{secrets.token_hex(4)}",
            "expires_at": int(time.time()) + 300,
            "maximum_usd": "0.0005",
            "items": [{"name": "inference", "amount_usd": "0.0004"}, {"name": "network_fee", "amount_usd": "0.0001"}],
            "route": [{"model": "sim-fast", "provider": "sim"}],
        } | extra.get("quote", {})
        required = PaymentRequired(
            error=error,
            resource=ResourceInfo(url=extra.get("resource", str(request.url))),
            accepts=[
                PaymentRequirements(
                    scheme="exact",
                    network=extra.get("network", token.network),
                    asset=token.address,
                    amount=extra.get("amount", "500"),
                    pay_to=extra.get("pay_to", PAY_TO),
                    max_timeout_seconds=extra.get("timeout", 300),
                    extra={
                        "name": token.name,
                        "version": token.version,
                        "assetTransferMethod": token.transfer_method,
                        "paymentFlow": "upfront",
                    }
                    | extra.get("domain", {}),
                )
                for token in self.tokens
            ],
            extensions={"farebox": {"quote": quote["id"]}},
        )
        body = {"x402Version": 1, "error": error, "accepts": [], "quote": quote}
        return JSONResponse(body, 402, {"PAYMENT-REQUIRED": encode_payment_required_header(required)})

    async def _paid(self, request: Request, header: str, body: bytes) -> Response:
        payload = decode_payment_signature_header(header)
        assert isinstance(payload, PaymentPayload)
        payer, nonce = verify(payload)
        assert payload.extensions is not None
        assert payload.extensions["farebox"]["quote"].startswith("quote_")
        self.payments.append(payload)
        self.seen.append(nonce)
        self.arrived.set()
        step = self.script.pop(0) if self.script else "ok"
        no_retry = {"x-should-retry": "false"}
        match step:
            case "500" | "503":
                # As a proxy in front would: without the header that stops the OpenAI SDK.
                return JSONResponse(error("broken"), int(step), {"retry-after": "0"} if step == "503" else {})
            case "in_progress":
                return JSONResponse(error("payment_in_progress"), 409, {"retry-after": "0"})
            case "used":
                return JSONResponse(error("payment_already_used"), 409, no_retry)
            case "already_credited":
                self._take(nonce, payer, charged=0)
                return JSONResponse(error("payment_already_credited"), 409, no_retry)
            case "failed":
                self._take(nonce, payer, charged=0)
                receipt = {"id": "rcpt_failed", "charged_usd": "0.00", "credited_usd": "0.0005"}
                document = error("all_candidates_failed", farebox={"receipt": receipt})
                return JSONResponse(document, 502, {**no_retry, "x-farebox-receipt": "rcpt_failed"})
            case "202":
                document = {"status": "pending", "receipt": "rcpt_slow", "poll": self.poll}
                return JSONResponse(document, 202, no_retry)
            case "412":
                document = error("permit2_allowance_required", token=USDT.address, spender=PERMIT2_ADDRESS)
                return JSONResponse(document, 412)
            case "reset":
                await self._abort(request)
            case "taken_then_reset":
                self._take(nonce, payer)
                await self._abort(request)
            case "hang":
                self._take(nonce, payer)
                await self._hang(request)
            case _ if step.startswith("402 "):
                return self._required(request, step.removeprefix("402 "))
            case _:
                self._take(nonce, payer)
        settled = SettleResponse(success=True, transaction=TRANSACTION, network=NETWORK, payer=payer)
        headers = no_retry | {"PAYMENT-RESPONSE": encode_payment_response_header(settled)}
        return self._answer(request, body, headers, step)

    async def _from_credit(self, request: Request, payer: str, body: bytes) -> Response:
        self.on_credit += 1
        step = self.credit_script.pop(0) if self.credit_script else "ok"
        if self.credit.get(payer, 0) < MAXIMUM_NANO_USD:
            return self._required(request, "insufficient_credit: the wallet's credit does not suffice")
        self.credit[payer] -= CHARGED_NANO_USD
        if step == "reset":
            await self._abort(request)
        return self._answer(request, body, {}, step)

    def _take(self, nonce: str, payer: str, charged: int = CHARGED_NANO_USD) -> None:
        if nonce not in self.taken:
            self.taken[nonce] = payer
            self.credit[payer] = self.credit.get(payer, 0) + MAXIMUM_NANO_USD - charged

    def _answer(self, request: Request, body: bytes, headers: dict[str, str], step: str) -> Response:
        receipt_id = f"rcpt_{secrets.token_hex(8)}"
        headers = {
            "x-farebox-receipt": receipt_id,
            "x-farebox-model": "sim-fast",
            "x-farebox-provider": "sim",
            "x-farebox-attempts": "1",
        } | headers
        if json.loads(body).get("stream"):
            return StreamingResponse(
                self._frames(request, receipt_id, step), headers=headers, media_type="text/event-stream"
            )
        message = {"role": "assistant", "content": "".join(WORDS)}
        completion = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "sim-fast",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }
        return JSONResponse(completion, headers=headers | {"x-farebox-cost-usd": "0.000113"})

    async def _frames(self, request: Request, receipt_id: str, step: str) -> AsyncIterator[bytes]:
        for place, word in enumerate(WORDS):
            chunk = {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "sim-fast",
                "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}],
            }
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
            if place == 0 and step == "gated":
                await asyncio.to_thread(self.released.wait, 20)
            if place == 0 and step == "cut":
                await self._abort(request)
        receipt = {
            "id": receipt_id,
            "model": "sim-fast",
            "provider": "sim",
            "attempts": 1,
            "charged_usd": "0.000113",
            "credited_usd": "0.000387",
            "transaction": TRANSACTION,
        }
        comment = b": farebox-receipt " + json.dumps(receipt).encode() + b"\n\n"
        # In two pieces: the reader must not depend on where a network cuts.
        yield comment[:25]
        yield comment[25:] + b"data: [DONE]\n\n"

    async def _abort(self, request: Request) -> None:
        assert request.client is not None
        AbortableProtocol.live[(request.client.host, request.client.port)].abort()
        await asyncio.sleep(20)

    async def _hang(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    async def receipt(self, request: Request) -> Response:
        self.polls += 1
        return JSONResponse({"id": request.path_params["id"], "state": "open" if self.polls < 2 else "interrupted"})

    async def challenge(self, request: Request) -> Response:
        self.challenges += 1
        address = (await request.json())["address"]
        now = int(time.time())
        message = self.message or sign_in_message(request.headers["host"], address, now)
        return JSONResponse({"message": message, "nonce": "0" * 24, "expires_at": now + 300})

    async def session(self, request: Request) -> Response:
        document = await request.json()
        signer = Account.recover_message(encode_defunct(text=document["message"]), signature=document["signature"])
        token = f"fbs_{secrets.token_hex(8)}"
        self._sessions[token] = str(signer)
        return JSONResponse({"token": token, "expires_at": int(time.time()) + 3600})

    async def wallet(self, request: Request) -> Response:
        payer = self._sessions[request.headers["authorization"].removeprefix("Bearer ")]
        available = f"0.{self.credit.get(payer, 0):09d}"
        balance = {"asset": USDC.asset, "symbol": "USDC", "network": NETWORK, "available_usd": available}
        return JSONResponse({"address": payer, "balances": [{**balance, "held_usd": "0.00"}]})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": []})


def sign_in_message(host: str, address: str, now: int) -> str:
    """An EIP-4361 message as the real gateway writes it."""
    issued, expires = (datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") for at in (now, now + 300))
    return (
        f"{host} wants you to sign in with your Ethereum account:\n{address}\n\n"
        "Sign in to Farebox to see and spend your balance. This does not move funds.\n\n"
        f"URI: http://{host}\nVersion: 1\nChain ID: 84532\nNonce: {secrets.token_hex(28)}\n"
        f"Issued At: {issued}\nExpiration Time: {expires}"
    )


def error(code: str, **extra: Any) -> dict[str, Any]:
    """An OpenAI-style error body."""
    return {"error": {"message": f"scripted: {code}", "type": "api_error", "code": code, "param": None, **extra}}


def verify(payload: PaymentPayload) -> tuple[str, str]:
    """Check a payment's signature with eth-account; returns payer and nonce."""
    inner, chain_id = payload.payload, int(payload.accepted.network.removeprefix("eip155:"))
    if "authorization" in inner:
        authorization = inner["authorization"]
        domain = {
            "name": payload.accepted.extra["name"],
            "version": payload.accepted.extra["version"],
            "chainId": chain_id,
            "verifyingContract": payload.accepted.asset,
        }
        types = {
            "TransferWithAuthorization": _fields(
                "address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce"
            )
        }
        message = {
            "from": authorization["from"],
            "to": authorization["to"],
            "value": int(authorization["value"]),
            "validAfter": int(authorization["validAfter"]),
            "validBefore": int(authorization["validBefore"]),
            "nonce": bytes.fromhex(authorization["nonce"][2:]),
        }
    else:
        authorization = inner["permit2Authorization"]
        domain = {"name": "Permit2", "chainId": chain_id, "verifyingContract": PERMIT2_ADDRESS}
        types = {
            "PermitWitnessTransferFrom": _fields(
                "TokenPermissions permitted,address spender,uint256 nonce,uint256 deadline,Witness witness"
            ),
            "TokenPermissions": _fields("address token,uint256 amount"),
            "Witness": _fields("address to,uint256 validAfter"),
        }
        assert authorization["spender"].lower() == EXACT_PROXY.lower()
        message = {
            "permitted": {
                "token": authorization["permitted"]["token"],
                "amount": int(authorization["permitted"]["amount"]),
            },
            "spender": authorization["spender"],
            "nonce": int(authorization["nonce"]),
            "deadline": int(authorization["deadline"]),
            "witness": {
                "to": authorization["witness"]["to"],
                "validAfter": int(authorization["witness"]["validAfter"]),
            },
        }
    signable = encode_typed_data(domain_data=domain, message_types=types, message_data=message)
    signer = str(Account.recover_message(signable, signature=inner["signature"]))
    assert signer == authorization["from"]
    return signer, str(authorization["nonce"])


def _fields(text: str) -> list[dict[str, str]]:
    return [dict(zip(("type", "name"), member.split(), strict=True)) for member in text.split(",")]


class Server:
    """Serves one gateway after another from a thread on a free port."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.gateway = FakeGateway(url)

    def fresh(self) -> FakeGateway:
        """Begin anew: nothing seen, nothing scripted."""
        self.gateway.released.set()
        self.gateway = FakeGateway(self.url)
        return self.gateway

    def app(self) -> Starlette:
        def route(path: str, name: str, method: str = "GET") -> Route:
            async def endpoint(request: Request) -> Response:
                answer: Response = await getattr(self.gateway, name)(request)
                return answer

            return Route(path, endpoint, methods=[method])

        return Starlette(
            routes=[
                route("/v1/chat/completions", "chat", "POST"),
                route("/v1/chat/completions", "refund"),
                route("/v1/receipts/{id}", "receipt"),
                route("/v1/wallet/challenges", "challenge", "POST"),
                route("/v1/wallet/sessions", "session", "POST"),
                route("/v1/wallet", "wallet"),
                route("/v1/models", "models"),
            ]
        )


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server on a free port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    serving = Server(f"http://127.0.0.1:{listener.getsockname()[1]}")
    config = uvicorn.Config(serving.app(), http=AbortableProtocol, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield serving
    finally:
        server.force_exit = True
        server.should_exit = True
        thread.join(10)
        listener.close()
