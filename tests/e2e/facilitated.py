"""A shop that knows nothing of Farebox, and `farebox facilitator` as a process beside it.

The shop is the official FastAPI middleware around one route, run as ``python -m tests.e2e.facilitated`` with JSON on standard
input (facilitator, pay_to, network, port, price), or in TypeScript by `typescript/shop.mjs`.
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
def facilitator(chain: Devnet, directory: Path, port: int, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """`farebox facilitator` for anybody; its signer is the chain's first wallet."""
    directory.mkdir(exist_ok=True)
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
    network = {"chain_id": chain.chain_id, "rpc_urls": [chain.rpc_url], "tokens": tokens}
    environment = {
        "FAREBOX_DATA_DIR": str(directory),
        "FAREBOX_PAY_TO": chain.wallets[0].address,
        "FAREBOX_SIGNER_KEYS": json.dumps([chain.wallets[0].private_key]),
        "FAREBOX_NETWORKS": json.dumps([network]),
        **more,
    }
    command = [sys.executable, "-m", "gateway.cli", "facilitator", "--open", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with process(command, f"{url}/healthz", directory / "facilitator.log", **environment) as running:
        yield running


@contextlib.contextmanager
def shop(facilitator_url: str, network: str, log: Path, *, language: str = "python") -> Iterator[str]:
    """The URL of what is sold."""
    port = free_port()
    parts = {"facilitator": facilitator_url, "pay_to": SHOP, "network": network, "port": port, "price": PRICE}
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
    from x402 import x402ResourceServer
    from x402.extensions.bazaar import bazaar_resource_server_extension, declare_discovery_extension
    from x402.http import FacilitatorConfig, HTTPFacilitatorClient
    from x402.http.middleware.fastapi import PaymentMiddlewareASGI
    from x402.http.types import PaymentOption, RouteConfig
    from x402.mechanisms.evm.exact import register_exact_evm_server

    app = FastAPI()
    client = HTTPFacilitatorClient(FacilitatorConfig(url=parts["facilitator"]))
    server = register_exact_evm_server(x402ResourceServer(client), networks=parts["network"])
    server.register_extension(bazaar_resource_server_extension)  # type: ignore[arg-type]
    option = PaymentOption("exact", parts["pay_to"], parts["price"], parts["network"], max_timeout_seconds=300)
    route = RouteConfig(accepts=option, mime_type="application/json", extensions=declare_discovery_extension(input={}))
    app.add_middleware(PaymentMiddlewareASGI, routes={"GET /thing": route}, server=server)
    sold = 0

    @app.get("/thing")
    async def thing() -> dict[str, int]:
        nonlocal sold
        sold += 1
        return {"sold": sold}

    @app.get("/open")
    async def free() -> dict[str, int]:
        return {"sold": sold}

    uvicorn.run(app, host="127.0.0.1", port=parts["port"], log_level="warning", access_log=False)


if __name__ == "__main__":
    _sell(json.loads(sys.stdin.read()))
