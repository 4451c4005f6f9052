"""An official resource server that sells by `upto` and through channels, with `farebox facilitator` behind it and official
clients, Python and TypeScript, before it: nothing of theirs knows Farebox."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from x402 import x402Client
from x402.http.clients import x402_httpx_transport
from x402.mechanisms.evm.batch_settlement.client import BatchSettlementEvmScheme
from x402.mechanisms.evm.signers import EthAccountSigner, EthAccountSignerWithRPC
from x402.mechanisms.evm.upto import UptoEvmClientScheme

from contracts.anvil import free_port
from contracts.devnet import Devnet, approve_permit2, balance_of, place_operator_contracts
from tests.e2e import facilitated
from tests.e2e.clients import decoded
from tests.e2e.facilitated import VALUE

SCHEMES = ["exact", "upto", "batch-settlement"]
DEPOSITING = (0, 10)
"""Of eleven requests through one channel: stock clients deposit for ten, and top up then."""
TYPESCRIPT = Path(__file__).parent / "typescript"


@dataclass(frozen=True, slots=True)
class Market:
    """A shop that relies on a facilitator. `signed_here` says that the facilitator signs its claims and refunds."""

    url: str
    pay_to: str
    signed_here: bool


@pytest.fixture(scope="module", params=["the shop signs", "the facilitator signs"])
def market(
    request: pytest.FixtureRequest, module_chain: Devnet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Market]:
    directory = tmp_path_factory.mktemp("market")
    signer = module_chain.wallets[0].address
    contract, _ = place_operator_contracts(module_chain.rpc_url, signer, signer, [signer])
    port, signed_here = free_port(), request.param == "the facilitator signs"
    # Each has its own: what one leaves claimed and not fetched, the other's would fetch.
    pay_to = "0x" + ("5c" if signed_here else "5d") * 20
    more: dict[str, Any] = {"authorizer": module_chain.wallets[8].private_key}
    if signed_here:
        (directory / "facilitator").mkdir()
        made = subprocess.run(
            [sys.executable, "-m", "gateway.cli", "keys", "create", "shop", "--pay-to", pay_to, "--json"],
            env=os.environ | facilitated.settings(module_chain, directory / "facilitator", contract),
            capture_output=True,
            text=True,
            check=True,
        )
        more = {"key": json.loads(made.stdout)["key"]}
    with (
        facilitated.facilitator(
            module_chain, directory / "facilitator", port, batch_contract=contract, anybody=not signed_here
        ),
        facilitated.shop(
            f"http://127.0.0.1:{port}",
            f"eip155:{module_chain.chain_id}",
            directory / "shop.log",
            schemes=SCHEMES,
            pay_to=pay_to,
            **more,
        ) as thing,
    ):
        yield Market(thing.removesuffix("/thing"), pay_to, signed_here)


@pytest.fixture
def wallet(module_chain: Devnet) -> LocalAccount:
    account: LocalAccount = Account.from_key(module_chain.wallets[5].private_key)
    approve_permit2(module_chain.rpc_url, module_chain.usdc, module_chain.wallets[5].private_key)
    return account


def held(module_chain: Devnet, address: str) -> int:
    return balance_of(module_chain.rpc_url, module_chain.usdc, address)


async def test_upto_takes_what_the_shop_says(market: Market, module_chain: Devnet, wallet: LocalAccount) -> None:
    client = x402Client()
    client.register("eip155:*", UptoEvmClientScheme(EthAccountSigner(wallet)))
    async with httpx.AsyncClient(transport=x402_httpx_transport(client), base_url=market.url, timeout=60) as http:
        for used in (321, VALUE, 0):
            before = held(module_chain, market.pay_to)
            paid = await http.get("/metered", params={"used": str(used)})
            assert paid.status_code == 200, paid.text
            response = decoded(paid.headers["payment-response"])
            assert (response["success"], response["amount"]) == (True, str(used))
            assert (response["transaction"] != "") == (used > 0)
            assert held(module_chain, market.pay_to) == before + used
        before = held(module_chain, market.pay_to)
        refused = await http.get("/metered", params={"used": str(VALUE + 1)})
        assert refused.status_code == 402
        assert held(module_chain, market.pay_to) == before


async def test_a_channels_life(market: Market, module_chain: Devnet, wallet: LocalAccount) -> None:
    scheme = BatchSettlementEvmScheme(EthAccountSignerWithRPC(wallet, module_chain.rpc_url))
    client = x402Client()
    client.register("eip155:*", scheme)
    before, funds = held(module_chain, market.pay_to), held(module_chain, wallet.address)
    async with httpx.AsyncClient(transport=x402_httpx_transport(client), base_url=market.url, timeout=60) as http:
        for index in range(11):
            paid = await http.get("/channel")
            assert paid.status_code == 200, paid.text
            response = decoded(paid.headers["payment-response"])
            assert response["success"]
            assert (response["transaction"] != "") == (index in DEPOSITING), "all others have vouchers only"
        claimed = (await http.post("/claims")).json()
        assert len(claimed["claims"]) == 1
        assert claimed["settle"]
        assert held(module_chain, market.pay_to) == before + 11 * VALUE
        assert (await http.get("/channel")).status_code == 200
    refunded = await asyncio.to_thread(scheme.refund, f"{market.url}/channel")
    assert refunded.success, refunded
    # Its last request is claimed with the refund, and fetched with the next claims.
    assert funds - held(module_chain, wallet.address) == 12 * VALUE


def test_the_typescript_client_pays_by_upto(market: Market, module_chain: Devnet, wallet: LocalAccount) -> None:
    before = held(module_chain, market.pay_to)
    done = node("pay.mjs", wallet, f"{market.url}/metered?used=123", ACCEPT_PAYMENT="upto")
    end = json.loads(done.splitlines()[-1])
    assert (end["statuses"], end["paymentResponse"]["success"]) == ([402, 200], True), end
    assert end["paymentResponse"]["amount"] == "123"
    assert held(module_chain, market.pay_to) == before + 123


def test_the_typescript_client_opens_uses_and_closes_a_channel(
    market: Market, module_chain: Devnet, wallet: LocalAccount
) -> None:
    wallet = Account.from_key(module_chain.wallets[6].private_key)
    funds = held(module_chain, wallet.address)
    told = json.loads(node("channel.mjs", wallet, f"{market.url}/channel", RPC_URL=module_chain.rpc_url))
    assert [payment["success"] for payment in told["payments"]] == [True] * 11
    assert [payment["transaction"] != "" for payment in told["payments"]] == [
        index in DEPOSITING for index in range(11)
    ]
    assert told["refund"]["success"] is True
    assert funds - held(module_chain, wallet.address) == 11 * VALUE


def node(script: str, wallet: LocalAccount, url: str, **environment: str) -> str:
    """What a TypeScript client prints."""
    program = shutil.which("node")
    assert program is not None, "this test needs Node.js 20 or newer on PATH"
    key = "0x" + wallet.key.hex().removeprefix("0x")
    done = subprocess.run(
        [program, str(TYPESCRIPT / script)],
        env=os.environ | {"WALLET_KEY": key, "URL": url, "BODY": "{}", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
