"""Nonsense and attacks at a facilitator: each gets the protocol's own word, nothing moves, nothing breaks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import Devnet
from payments.chain.networks import Network
from payments.facilitator import discovery
from tests.e2e.clients import decoded
from tests.payments.facilitating import VALUE, Change, at, body, facilitator
from tests.payments.settling import rows


def both(*changes: Change) -> Change:
    def change(call: dict[str, Any]) -> None:
        for one in changes:
            one(call)

    return change


AUTHORIZATION = "paymentPayload.payload.authorization"
SIGNATURE = "paymentPayload.payload.signature"
DEEP: Any = {}
for _ in range(40):
    DEEP = {"a": DEEP}

CASES: dict[str, tuple[Change, str]] = {
    "no payload": (at("paymentPayload", ...), "invalid_payload"),
    "a payload that is a list": (at("paymentPayload", []), "invalid_payload"),
    "no requirements": (at("paymentRequirements", ...), "invalid_payload"),
    "no version": (both(at("x402Version", ...), at("paymentPayload.x402Version", ...)), "invalid_x402_version"),
    "two versions": (at("x402Version", 1), "invalid_x402_version"),
    "a version that is true": (at("paymentPayload.x402Version", True), "invalid_x402_version"),
    "another scheme": (at("paymentRequirements.scheme", "gift"), "unsupported_scheme"),
    "a scheme that nobody knows": (at("paymentPayload.accepted.scheme", "gift"), "unsupported_scheme"),
    "another network": (at("paymentRequirements.network", "eip155:1"), "invalid_network"),
    "a network that is a number": (at("paymentRequirements.network", 84532), "invalid_payment_requirements"),
    "a token that is not taken": (at("paymentRequirements.asset", "0x" + "11" * 20), "invalid_payment_requirements"),
    "an amount in hex": (at("paymentRequirements.amount", "0x3e8"), "invalid_payment_requirements"),
    "an amount with a sign": (at("paymentRequirements.amount", "+1000"), "invalid_payment_requirements"),
    "an amount of nothing": (at("paymentRequirements.amount", "0"), "invalid_payment_requirements"),
    "more than was accepted": (
        at("paymentRequirements.amount", str(VALUE + 1)),
        "invalid_exact_evm_payload_authorization_value_mismatch",
    ),
    "less than was accepted": (
        at("paymentRequirements.amount", str(VALUE - 1)),
        "invalid_exact_evm_payload_authorization_value_mismatch",
    ),
    "another recipient": (
        at("paymentRequirements.payTo", "0x" + "66" * 20),
        "invalid_exact_evm_payload_recipient_mismatch",
    ),
    "a foreign domain": (at("paymentRequirements.extra.name", "Fake"), "invalid_payment_requirements"),
    "no extra to sign for": (at("paymentPayload.accepted.extra", {}), "invalid_payment_requirements"),
    "another method": (
        at("paymentRequirements.extra.assetTransferMethod", "erc7710"),
        "invalid_payment_requirements",
    ),
    "a value in float spelling": (at(f"{AUTHORIZATION}.value", "1e3"), "invalid_payload"),
    "a value that is a number": (at(f"{AUTHORIZATION}.value", VALUE), "invalid_payload"),
    "a member too many": (at(f"{AUTHORIZATION}.memo", "x"), "invalid_payload"),
    "a short nonce": (at(f"{AUTHORIZATION}.nonce", "0x01"), "invalid_payload"),
    "a value of 2^256": (at(f"{AUTHORIZATION}.value", str(2**256)), "invalid_payload"),
    "an expired authorization": (
        at(f"{AUTHORIZATION}.validBefore", "1"),
        "invalid_exact_evm_payload_authorization_valid_before",
    ),
    "one of the future": (
        at(f"{AUTHORIZATION}.validAfter", str(2**63)),
        "invalid_exact_evm_payload_authorization_valid_after",
    ),
    "somebody else's money": (at(f"{AUTHORIZATION}.from", "0x" + "77" * 20), "invalid_exact_evm_payload_signature"),
    "no signature": (at(SIGNATURE, "0x"), "invalid_payload"),
    "a short signature": (at(SIGNATURE, "0x" + "11" * 64), "invalid_exact_evm_payload_signature"),
    "a signature of zeros": (at(SIGNATURE, "0x" + "00" * 65), "invalid_exact_evm_payload_signature"),
    "a nest": (at("paymentPayload.extensions", DEEP), "invalid_payload"),
}


def flip(call: dict[str, Any]) -> None:
    """The other spelling of the same signature: n - s."""
    payment = call["paymentPayload"]["payload"]
    raw = bytes.fromhex(payment["signature"][2:])
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    s = order - int.from_bytes(raw[32:64], "big")
    payment["signature"] = "0x" + (raw[:32] + s.to_bytes(32, "big") + bytes([55 - raw[64]])).hex()


CASES["a malleable signature"] = (flip, "invalid_exact_evm_payload_signature")


async def test_nothing_that_is_wrong_is_valid_or_settled(chain: Devnet, network: Network, tmp_path: Path) -> None:
    usdc = network.tokens[0]
    good = body(chain.wallets[2], usdc, network)
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        for name, (change, reason) in CASES.items():
            call = copy.deepcopy(good)
            change(call)
            verified = await running.verify(call)
            assert (verified["isValid"], verified.get("invalidReason")) == (False, reason), (name, verified)
            settled = await running.settle(call)
            assert (settled["success"], settled["errorReason"], settled["transaction"]) == (False, reason, ""), name
        assert await rows(running.services.store) == []
        assert (await running.settle(good))["success"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"x402Version": 2, "paymentPayload": {"x402Version": 2}}', 200),
        (b'{"a": "' + b"x" * 270_000 + b'"}', 413),
        (b"[" * 10_000, 400),
    ],
)
@pytest.mark.parametrize("path", ["/verify", "/settle"])
async def test_bodies_that_are_no_calls_get_a_clear_answer(
    chain: Devnet, network: Network, tmp_path: Path, path: str, content: bytes, status: int
) -> None:
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        answer = await running.http.post(path, content=content)
        assert answer.status_code == status
        if status != 200:
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert (await running.http.get("/nowhere")).status_code == 404
        assert (await running.http.get(path)).status_code == 405


HTTP_INPUT = {"type": "http", "method": "GET"}
DESCRIPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "a plain one": ({"info": {"input": HTTP_INPUT}}, {}, True),
    "no info": ({}, {}, False),
    "an unknown input": ({"info": {"input": {"type": "ftp"}}}, {}, False),
    "a body without its kind": ({"info": {"input": {"type": "http", "method": "POST"}}}, {}, False),
    "a tool without a name": ({"info": {"input": {"type": "mcp", "inputSchema": {}}}}, {}, False),
    "a file": ({"info": {"input": HTTP_INPUT}}, {"url": "file:///etc/passwd"}, False),
    "credentials": ({"info": {"input": HTTP_INPUT}}, {"url": "https://a:b@shop.example/"}, False),
    "a wide one": ({"info": {"input": HTTP_INPUT, "output": "x" * 20_000}}, {}, False),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
async def test_only_harmless_descriptions_are_listed(
    chain: Devnet, network: Network, tmp_path: Path, name: str
) -> None:
    extension, resource, listed = DESCRIPTIONS[name]
    call = body(chain.wallets[2], network.tokens[0], network, extensions={"bazaar": extension})
    call["paymentPayload"]["resource"] |= resource
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        answer = await running.http.post("/settle", json=call)
        assert answer.json()["success"]
        assert "extension-responses" in answer.headers
        page = (await running.http.get("/discovery/resources")).json()
        assert page["pagination"]["total"] == int(listed)


def test_what_a_resource_says_about_itself_is_dropped_where_it_fails_its_rule() -> None:
    kept = discovery._service(
        {
            "serviceName": "x" * 33,
            "tags": ["News", "news", "ü", 1, "a", "b", "c", "d", "e"],
            "iconUrl": "http://127.0.0.1/x",
            "description": "fine",
        }
    )
    assert kept == {"description": "fine", "tags": ["News", "a", "b", "c", "d"]}
    for url in (
        "http://localhost/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://[::1]/",
        "data:x",
        "https://u@h.example/",
    ):
        assert not discovery._is_harmless_icon(url), url
    assert discovery._is_harmless_icon("https://shop.example/icon.png")


async def test_a_listed_resource_stays_its_recipients(chain: Devnet, network: Network, tmp_path: Path) -> None:
    extensions = {"bazaar": {"info": {"input": HTTP_INPUT}}}
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        for to, status in (("0x" + "5a" * 20, "success"), ("0x" + "66" * 20, "rejected")):
            call = body(chain.wallets[2], network.tokens[0], network, to=to, extensions=extensions)
            answer = await running.http.post("/settle", json=call)
            assert decoded(answer.headers["extension-responses"])["bazaar"]["status"] == status
        items = (await running.http.get("/discovery/resources")).json()["items"]
        assert [item["accepts"][0]["payTo"] for item in items] == ["0x" + "5a" * 20]
        assert (await running.http.get("/discovery/resources?limit=x")).status_code == 400
