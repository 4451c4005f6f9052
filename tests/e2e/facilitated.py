"""A shop that knows nothing of Farebox, and `farebox facilitator` as a process beside it.

The shop is the official FastAPI middleware, run as ``python -m tests.e2e.facilitated`` with JSON on standard input
(facilitator, pay_to, network, port, price, and for more than `exact`: schemes, authorizer, key), or in TypeScript by
`typescript/shop.mjs`. It sells ``/thing`` by `exact`, ``/metered`` by `upto` (``?used=`` says how much is taken, in atomic
units) and ``/channel`` by `batch-settlement`, whose claims ``POST /claims`` makes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from contracts.anvil import end_with_parent, free_port
from contracts.devnet import Devnet

PRICE = "$0.001"
VALUE = 1_000
"""`PRICE` in atomic units."""
SHOP = "0x" + "5b" * 20
READY_S = 30.0


@contextlib.contextmanager
def process(
    command: Sequence[str], url: str, log: Path, *, stdin: str = "", **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, once it answers."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            preexec_fn=end_with_parent(),
        )
    assert started.stdin is not None
    started.stdin.write(stdin.encode())
    started.stdin.close()
    try:
        deadline = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url, timeout=5)
                break
            assert started.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        yield started
    finally:
        started.kill()
        started.wait()


@contextlib.contextmanager
def facilitator(
    chain: Devnet, directory: Path, port: int, *, batch_contract: str | None = None, anybody: bool = True, **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`farebox facilitator`, for anybody or for those who have a key; its signer is the chain's first wallet."""
    directory.mkdir(exist_ok=True)
    environment = settings(chain, directory, batch_contract) | more
    command = [sys.executable, "-m", "gateway.cli", "facilitator", "--port", str(port), *(["--open"] * anybody)]
    url = f"http://127.0.0.1:{port}"
    with process(command, f"{url}/healthz", directory / "facilitator.log", **environment) as running:
        yield running


def settings(chain: Devnet, directory: Path, batch_contract: str | None = None) -> dict[str, str]:
    """What every command of this facilitator's operator is configured with."""
    tokens = [
        {
            "symbol": token.symbol,
            "address": token.address,
            "decimals": token.decimals,
            "transfer_method": token.transfer_method,
            "domain_name": token.name,
            "domain_version": token.version,
        }
        for token in (chain.usdc, chain.usdt)
    ]
    network: dict[str, Any] = {"chain_id": chain.chain_id, "rpc_urls": [chain.rpc_url], "tokens": tokens}
    if batch_contract is not None:
        network["batch_contract"] = batch_contract
    return {
        "FAREBOX_DATA_DIR": str(directory),
        "FAREBOX_PAY_TO": chain.wallets[0].address,
        "FAREBOX_SIGNER_KEYS": json.dumps([chain.wallets[0].private_key]),
        "FAREBOX_NETWORKS": json.dumps([network]),
    }


@contextlib.contextmanager
def shop(facilitator_url: str, network: str, log: Path, *, language: str = "python", **more: Any) -> Iterator[str]:
    """The URL of what is sold by `exact`; `more` are parts of the Python shop."""
    port = free_port()
    parts = {"facilitator": facilitator_url, "pay_to": SHOP, "network": network, "port": port, "price": PRICE, **more}
    if language == "python":
        command = [sys.executable, "-m", "tests.e2e.facilitated"]
    else:
        node = shutil.which("node")
        assert node is not None, "these tests need Node.js 20 or newer on PATH"
        command = [node, str(Path(__file__).parent / "typescript" / "shop.mjs")]
    with process(command, f"http://127.0.0.1:{port}/open", log, stdin=json.dumps(parts)):
        yield f"http://127.0.0.1:{port}/thing"


def _sell(parts: dict[str, Any]) -> None:
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from x402 import x402ResourceServer
    from x402.extensions.bazaar import bazaar_resource_server_extension, declare_discovery_extension
    from x402.http import HTTPFacilitatorClient
    from x402.http.middleware.fastapi import PaymentMiddlewareASGI, set_settlement_overrides
    from x402.http.types import PaymentOption, RouteConfig
    from x402.mechanisms.evm.batch_settlement.authorizer_signer import LocalAuthorizerSigner
    from x402.mechanisms.evm.batch_settlement.server import (
        BatchSettlementEvmScheme,
        BatchSettlementEvmSchemeServerConfig,
    )
    from x402.mechanisms.evm.exact import register_exact_evm_server
    from x402.mechanisms.evm.upto.server import UptoEvmScheme

    network, wanted = parts["network"], parts.get("schemes", ["exact"])
    key = parts.get("key")
    bearer = {"authorization": f"Bearer {key}"} if key else {}
    headers = {"verify": bearer, "settle": bearer, "supported": bearer}
    client = HTTPFacilitatorClient({"url": parts["facilitator"], "create_headers": lambda: headers})
    server = register_exact_evm_server(x402ResourceServer(client), networks=network)
    server.register_extension(bazaar_resource_server_extension)  # type: ignore[arg-type]
    authorizer = None if parts.get("authorizer") is None else LocalAuthorizerSigner(parts["authorizer"])
    channels = BatchSettlementEvmScheme(
        parts["pay_to"], BatchSettlementEvmSchemeServerConfig(receiver_authorizer_signer=authorizer)
    )
    if "upto" in wanted:
        server.register(network, UptoEvmScheme())  # type: ignore[arg-type, no-untyped-call]
    if "batch-settlement" in wanted:
        server.register(network, channels)  # type: ignore[arg-type]

    def route(scheme: str, **more: Any) -> RouteConfig:
        option = PaymentOption(scheme, parts["pay_to"], parts["price"], network, max_timeout_seconds=300)
        return RouteConfig(accepts=option, mime_type="application/json", **more)

    routes = {
        "GET /thing": route("exact", extensions=declare_discovery_extension(input={})),
        "/metered": route("upto"),
        "/channel": route("batch-settlement"),
    }
    app = FastAPI()
    offered = {path: config for path, config in routes.items() if config.accepts.scheme in wanted}  # type: ignore[union-attr]
    app.add_middleware(PaymentMiddlewareASGI, routes=offered, server=server)
    sold = 0

    @app.get("/thing")
    @app.api_route("/channel", methods=["GET", "POST"])
    async def thing() -> dict[str, int]:
        nonlocal sold
        sold += 1
        return {"sold": sold}

    @app.api_route("/metered", methods=["GET", "POST"], response_model=None)
    async def metered(used: str) -> JSONResponse:
        response = JSONResponse({"used": used})
        set_settlement_overrides(response, {"amount": used})
        return response

    @app.post("/claims")
    async def claims() -> dict[str, Any]:
        done = await channels.create_channel_manager(client, network).claim_and_settle()
        return {
            "claims": [claim.transaction for claim in done["claims"]],
            "settle": done["settle"] and done["settle"].transaction,
        }

    @app.get("/open")
    async def free() -> dict[str, int]:
        return {"sold": sold}

    uvicorn.run(app, host="127.0.0.1", port=parts["port"], log_level="warning", access_log=False)


if __name__ == "__main__":
    _sell(json.loads(sys.stdin.read()))
