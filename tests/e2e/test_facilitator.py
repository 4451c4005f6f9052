"""Official resource servers, Python and TypeScript, with `farebox facilitator` behind them and official clients before them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from x402.extensions.bazaar import ListDiscoveryResourcesParams, with_bazaar
from x402.http import FacilitatorConfig, HTTPFacilitatorClientSync

from contracts.anvil import free_port
from contracts.devnet import Devnet, balance_of
from tests.e2e import facilitated
from tests.e2e.clients import decoded, sign
from tests.e2e.facilitated import SHOP, VALUE


@dataclass(frozen=True, slots=True)
class Market:
    """A facilitator and a shop that relies on it."""

    facilitator_url: str
    thing: str
    language: str


@pytest.fixture(scope="module", params=["python", "typescript"])
def market(
    request: pytest.FixtureRequest, module_chain: Devnet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Market]:
    directory = tmp_path_factory.mktemp("market")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (
        facilitated.facilitator(module_chain, directory / "facilitator", port),
        facilitated.shop(
            url, f"eip155:{module_chain.chain_id}", directory / "shop.log", language=request.param
        ) as thing,
    ):
        yield Market(url, thing, request.param)


@pytest.fixture
def wallet(module_chain: Devnet) -> LocalAccount:
    account: LocalAccount = Account.from_key(module_chain.wallets[5].private_key)
    return account


def test_an_official_shop_sells_through_it(market: Market, module_chain: Devnet, wallet: LocalAccount) -> None:
    before = balance_of(module_chain.rpc_url, module_chain.usdc, SHOP)
    with httpx.Client(timeout=60) as http:
        asked = http.get(market.thing)
        paid = http.get(market.thing, headers=sign(wallet, asked))
    assert paid.status_code == 200, paid.text
    response = decoded(paid.headers["payment-response"])
    assert response["success"]
    assert response["payer"].lower() == wallet.address.lower()
    assert balance_of(module_chain.rpc_url, module_chain.usdc, SHOP) == before + VALUE


def test_one_payment_sent_many_times_at_once_is_served_once(
    market: Market, module_chain: Devnet, wallet: LocalAccount
) -> None:
    before = balance_of(module_chain.rpc_url, module_chain.usdc, SHOP)
    with httpx.Client(timeout=60) as http, ThreadPoolExecutor(8) as several:
        headers = sign(wallet, http.get(market.thing))
        answers = list(several.map(lambda _: http.get(market.thing, headers=headers), range(8)))
        again = http.get(market.thing, headers=headers)
    assert sorted(answer.status_code for answer in answers) == [200] + [402] * 7
    assert again.status_code == 402
    assert balance_of(module_chain.rpc_url, module_chain.usdc, SHOP) == before + VALUE


def test_what_was_sold_is_discovered(market: Market, module_chain: Devnet, wallet: LocalAccount) -> None:
    if market.language == "typescript":
        pytest.skip("the TypeScript shop describes nothing")
    with httpx.Client(timeout=60) as http:
        assert http.get(market.thing, headers=sign(wallet, http.get(market.thing))).status_code == 200
    client = with_bazaar(HTTPFacilitatorClientSync(FacilitatorConfig(url=market.facilitator_url)))  # type: ignore[arg-type]
    found = client.extensions.bazaar.list_resources(ListDiscoveryResourcesParams(type="http", pay_to=SHOP, limit=5))
    assert [item.resource for item in found.items] == [market.thing]
    assert found.items[0].accepts is not None
    assert found.items[0].accepts[0]["amount"] == str(VALUE)
    assert found.pagination.total == 1
    none = client.extensions.bazaar.list_resources(ListDiscoveryResourcesParams(network="eip155:1"))
    assert none.items == []


def test_a_killed_facilitator_settles_what_it_began(module_chain: Devnet, wallet: LocalAccount, tmp_path: Path) -> None:
    port = free_port()
    network = f"eip155:{module_chain.chain_id}"
    with httpx.Client(timeout=60) as http:
        with facilitated.facilitator(module_chain, tmp_path / "facilitator", port) as first:
            shop = facilitated.shop(f"http://127.0.0.1:{port}", network, tmp_path / "shop.log")
            thing = shop.__enter__()
            headers = sign(wallet, http.get(thing))
            first.send_signal(9)
            first.wait()
        try:
            assert http.get(thing, headers=headers).status_code >= 400
            with facilitated.facilitator(module_chain, tmp_path / "facilitator", port):
                assert http.get(thing, headers=headers).status_code == 200
                assert http.get(thing, headers=headers).status_code == 402
        finally:
            shop.__exit__(None, None, None)
