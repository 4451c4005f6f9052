"""The reference stack: the official `x402` package's FastAPI middleware before a canned answer, and its facilitator.

Each is a uvicorn process of its own, with uvloop and httptools like ours. The facilitator is the asynchronous one, as its
documentation shows it, whose signer blocks the event loop while it waits; or the synchronous one in a thread pool, which
settles some more payments a second and costs more CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel
from x402 import PaymentPayload, PaymentRequirements, x402Facilitator, x402FacilitatorSync, x402ResourceServer
from x402.http import FacilitatorConfig, HTTPFacilitatorClient
from x402.http.middleware.fastapi import PaymentMiddlewareASGI
from x402.http.types import PaymentOption, RouteConfig
from x402.mechanisms.evm.exact import register_exact_evm_facilitator, register_exact_evm_server
from x402.mechanisms.evm.signers import FacilitatorWeb3Signer

from benchmarks.serving import wait_until_answering
from contracts.anvil import end_with_parent, free_port

PATH = "/v1/chat/completions"
PRICE = "$0.001"
STOP_TIMEOUT_S = 30.0
PAYMENT_TIMEOUT_S = 900


class FacilitatorCall(BaseModel):
    """What a resource server posts to `/verify` and `/settle`, by the protocol's own names."""

    paymentPayload: dict[str, Any]
    paymentRequirements: dict[str, Any]

    def parsed(self) -> tuple[PaymentPayload, PaymentRequirements]:
        """As the package's own types."""
        return (
            PaymentPayload.model_validate(self.paymentPayload),
            PaymentRequirements.model_validate(self.paymentRequirements),
        )


def facilitator_app(rpc_url: str, private_key: str, network: str, threads: bool) -> FastAPI:
    """The official facilitator."""
    app = FastAPI()
    signer = FacilitatorWeb3Signer(private_key, rpc_url)

    if threads:
        in_threads = register_exact_evm_facilitator(x402FacilitatorSync(), signer, networks=network)

        @app.post("/verify")
        def verify_in_thread(call: FacilitatorCall) -> dict[str, Any]:
            return _json(in_threads.verify(*call.parsed()))

        @app.post("/settle")
        def settle_in_thread(call: FacilitatorCall) -> dict[str, Any]:
            return _json(in_threads.settle(*call.parsed()))

        @app.get("/supported")
        def supported_in_threads() -> dict[str, Any]:
            return _json(in_threads.get_supported())

        return app

    facilitator = register_exact_evm_facilitator(x402Facilitator(), signer, networks=network)

    @app.post("/verify")
    async def verify(call: FacilitatorCall) -> dict[str, Any]:
        return _json(await facilitator.verify(*call.parsed()))

    @app.post("/settle")
    async def settle(call: FacilitatorCall) -> dict[str, Any]:
        return _json(await facilitator.settle(*call.parsed()))

    @app.get("/supported")
    async def supported() -> dict[str, Any]:
        return _json(facilitator.get_supported())

    return app


def resource_app(facilitator_url: str, pay_to: str, network: str, answer: bytes) -> FastAPI:
    """The official middleware before a handler that does nothing."""
    app = FastAPI()
    server = register_exact_evm_server(
        x402ResourceServer(HTTPFacilitatorClient(FacilitatorConfig(url=facilitator_url))), networks=network
    )
    option = PaymentOption("exact", pay_to, PRICE, network, max_timeout_seconds=PAYMENT_TIMEOUT_S)
    routes = {f"POST {PATH}": RouteConfig(accepts=option, mime_type="application/json")}
    app.add_middleware(PaymentMiddlewareASGI, routes=routes, server=server)

    @app.post(PATH)
    async def complete() -> Response:
        return Response(answer, media_type="application/json")

    return app


def _json(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(by_alias=True, exclude_none=True)


@dataclass(frozen=True, slots=True)
class Reference:
    """A running reference stack: where it is, and its two processes' ids."""

    url: str
    resource_pid: int
    facilitator_pid: int


@contextlib.contextmanager
def running(
    rpc_url: str, private_key: str, pay_to: str, network: str, answer: bytes, *, threads: bool
) -> Iterator[Reference]:
    """Start the reference stack, and stop it at the end.

    Args:
        rpc_url: The chain.
        private_key: Pays the gas.
        pay_to: Who is paid.
        network: In CAIP-2 form.
        answer: What the paid handler returns, JSON.
        threads: Run the facilitator's calls in a thread pool.

    Raises:
        RuntimeError: If a process does not start; standard error says why.
    """
    with contextlib.ExitStack() as cleanup:
        facilitator_port, resource_port = free_port(), free_port()
        facilitator_url = f"http://127.0.0.1:{facilitator_port}"
        parts = {"network": network, "threads": threads}
        facilitator = _start({"rpc_url": rpc_url, "private_key": private_key, **parts}, facilitator_port, cleanup)
        wait_until_answering(facilitator, f"{facilitator_url}/supported")
        resource = _start(
            {"facilitator_url": facilitator_url, "pay_to": pay_to, "answer": answer.decode(), **parts},
            resource_port,
            cleanup,
        )
        url = f"http://127.0.0.1:{resource_port}"
        wait_until_answering(resource, f"{url}/docs")
        yield Reference(url + PATH, resource.pid, facilitator.pid)


def _start(parts: dict[str, Any], port: int, cleanup: contextlib.ExitStack) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, __file__, "--port", str(port)],
        stdin=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_parent(),
    )
    assert process.stdin is not None
    cleanup.callback(process.wait, STOP_TIMEOUT_S)
    cleanup.callback(process.terminate)
    # Keys go through the pipe, so that they do not show in a list of processes.
    process.stdin.write(json.dumps(parts))
    process.stdin.close()
    return process


def main() -> int:
    """Run one of the two processes; what it is made of comes as JSON from standard input."""
    parser = argparse.ArgumentParser(description="One process of the reference stack.")
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    parts = json.loads(sys.stdin.read())
    if "rpc_url" in parts:
        app = facilitator_app(parts["rpc_url"], parts["private_key"], parts["network"], parts["threads"])
    else:
        app = resource_app(parts["facilitator_url"], parts["pay_to"], parts["network"], parts["answer"].encode())
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
