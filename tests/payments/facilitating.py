"""What the tests of the facilitator share: a running one on the test chain, and the bodies that resource servers post to it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from contracts.devnet import Devnet, balance_of, rpc
from contracts.wallets import Wallet
from payments.chain.networks import EXACT_PERMIT2_PROXY_ADDRESS, Network, Token
from payments.facilitator.app import create_app
from payments.facilitator.opening import NetworkOptions, Options, Services, opened
from payments.verification.eip712 import eip3009_digest, permit2_exact_digest
from payments.x402.wire import Eip3009Authorization, Permit2Authorization
from tests.databases import sqlite_file
from tests.payments.settling import rows, sign

SHOP = "0x" + "5a" * 20
VALUE = 1_000
HOUR_S = 3_600
Change = Callable[[dict[str, Any]], Any]
"""Changes a body where it stands."""


@dataclass(slots=True)
class Running:
    """A facilitator under test."""

    services: Services
    http: httpx.AsyncClient

    async def verify(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._post("/verify", body)

    async def settle(self, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        return await self._post("/settle", body, **{name.replace("_", "-"): text for name, text in headers.items()})

    async def _post(self, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        answer = await self.http.post(path, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        parsed: dict[str, Any] = answer.json()
        return parsed


def options(
    chain: Devnet,
    network: Network,
    database: Path | str,
    *,
    batch_contract: str | None = None,
    signer: int = 0,
    **wanted: Any,
) -> Options:
    """Options of a facilitator that anybody may use; its signer is the first wallet unless another is named."""
    networks = (NetworkOptions(network, [chain.rpc_url], batch_contract=batch_contract),)
    return Options(
        database=database,
        **{
            "signer_keys": (chain.wallets[signer].private_key,),
            "networks": networks,
            "require_key": False,
            "settlement_wait_s": 20,
            **wanted,
        },
    )


@contextlib.asynccontextmanager
async def facilitator(chain: Devnet, network: Network, database: Path | str, **wanted: Any) -> AsyncIterator[Running]:
    if isinstance(database, Path):
        sqlite_file(database)
    async with opened(options(chain, network, database, **wanted)) as services:
        transport = httpx.ASGITransport(create_app(services))
        async with httpx.AsyncClient(transport=transport, base_url="http://facilitator", timeout=60) as http:
            yield Running(services, http)


def requirement(
    token: Token, network: Network, *, value: int = VALUE, to: str = SHOP, version: int = 2
) -> dict[str, Any]:
    """What a resource server wants."""
    method = {} if token.transfer_method == "eip3009" else {"assetTransferMethod": "permit2"}
    common = {
        "scheme": "exact",
        "payTo": to,
        "maxTimeoutSeconds": 300,
        "asset": token.address,
        "extra": {"name": token.domain_name, "version": token.domain_version, **method},
    }
    if version == 2:
        return common | {"network": network.caip2, "amount": str(value)}
    return common | {
        "network": network.v1_name,
        "maxAmountRequired": str(value),
        "resource": "https://shop.example/thing",
        "description": "",
        "mimeType": "",
    }


def payload(
    wallet: Wallet, token: Token, *, value: int = VALUE, to: str = SHOP, nonce: int | None = None, valid_s: int = HOUR_S
) -> dict[str, Any]:
    """What a payer signs, by the token's own transfer method."""
    nonce = secrets.randbits(256) if nonce is None else nonce
    deadline = int(time.time()) + valid_s
    payer = wallet.address.lower()
    if token.transfer_method == "eip3009":
        authorization = Eip3009Authorization(payer, to, value, 0, deadline, nonce)
        return {
            "signature": "0x" + sign(wallet, eip3009_digest(authorization, token)).hex(),
            "authorization": {
                "from": payer,
                "to": to,
                "value": str(value),
                "validAfter": "0",
                "validBefore": str(deadline),
                "nonce": f"0x{nonce:064x}",
            },
        }
    permit = Permit2Authorization(payer, token.address, value, EXACT_PERMIT2_PROXY_ADDRESS, nonce, deadline, to, 0)
    return {
        "signature": "0x" + sign(wallet, permit2_exact_digest(permit, token.chain_id)).hex(),
        "permit2Authorization": {
            "from": payer,
            "permitted": {"token": token.address, "amount": str(value)},
            "spender": EXACT_PERMIT2_PROXY_ADDRESS,
            "nonce": str(nonce),
            "deadline": str(deadline),
            "witness": {"to": to, "validAfter": "0"},
        },
    }


def body(
    wallet: Wallet,
    token: Token,
    network: Network,
    *,
    version: int = 2,
    extensions: dict[str, Any] | None = None,
    **wanted: Any,
) -> dict[str, Any]:
    """The body of a call of `/verify` or `/settle`."""
    asked = {name: wanted[name] for name in ("value", "to") if name in wanted}
    wants = requirement(token, network, version=version, **asked)
    payment: dict[str, Any] = {"x402Version": version, "payload": payload(wallet, token, **wanted)}
    if version == 2:
        payment |= {"accepted": copy.deepcopy(wants), "resource": {"url": "https://shop.example/thing"}}
    else:
        payment |= {"scheme": "exact", "network": network.v1_name}
    if extensions is not None:
        payment["extensions"] = extensions
    return {"x402Version": version, "paymentPayload": payment, "paymentRequirements": wants}


def at(path: str, value: Any) -> Change:
    """Set one member of a body, by its dotted path; `...` takes it away."""

    def change(call: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            call = call[name]
        if value is ...:
            del call[last]
        else:
            call[last] = value

    return change


def held_by_shop(chain: Devnet) -> int:
    """In atomic units, of both tokens together."""
    return balance_of(chain.rpc_url, chain.usdc, SHOP) + balance_of(chain.rpc_url, chain.usdt, SHOP)


async def until_submitted(chain: Devnet, running: Running) -> None:
    """Wait until the one settlement is written, and its transaction waits for a block."""
    async with asyncio.timeout(20):
        while await rows(running.services.store, "state") != [("submitted",)]:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)
        while int(rpc(chain.rpc_url, "txpool_status")["pending"], 16) == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def drain(chain: Devnet, address: str) -> None:
    """Send all USDC of an address elsewhere, before what the facilitator sends."""
    funds = balance_of(chain.rpc_url, chain.usdc, address)
    data = "0xa9059cbb" + ("dd" * 20).rjust(64, "0") + f"{funds:064x}"
    rpc(chain.rpc_url, "anvil_impersonateAccount", address)
    price = hex(10**12)  # before ours in the block
    rpc(
        chain.rpc_url,
        "eth_sendTransaction",
        {"from": address, "to": chain.usdc.address, "data": data, "gasPrice": price},
    )
