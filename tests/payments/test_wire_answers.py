"""What is said to a payer, as the official Python and TypeScript clients understand it, and what they send back."""

from __future__ import annotations

import base64
import json
import subprocess
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from x402 import PaymentRequired, x402ClientSync
from x402.http.utils import (
    decode_payment_required_header,
    decode_payment_response_header,
    encode_payment_signature_header,
)
from x402.mechanisms.evm.exact import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSigner
from x402.schemas.v1 import PaymentRequiredV1

from payments.chain.networks import KNOWN_NETWORKS, Network
from payments.quotes import ROUTE_CANDIDATES_MAX, QuoteSealer, request_digest
from payments.verification.checks import check_offline
from payments.x402.answers import HEADER_BYTES_MAX
from payments.x402.wire import (
    PaymentRequiredAnswer,
    payment_required,
    payment_response,
    requirement_for,
)
from tests.payments.x402_samples import (
    AMOUNT_NANO_USD,
    NETWORK,
    PAY_TO,
    PAYER,
    PAYER_ADDRESS,
    RESOURCE_URL,
    USDC,
    USDC_OFFER,
    USDT,
    USDT_OFFER,
    decode_transfer,
    quote_for,
)

REPOSITORY = Path(__file__).parents[2]
SEALER = QuoteSealer(b"s" * 32)
DIGEST = request_digest("POST", "/v1/chat/completions", b"{}")
QUOTE = quote_for(DIGEST)
ANSWER = payment_required((USDC_OFFER, USDT_OFFER), QUOTE, SEALER.seal(QUOTE), RESOURCE_URL, "pay first", (NETWORK,))
V1_ONLY = payment_required((USDC_OFFER,), QUOTE, SEALER.seal(QUOTE), RESOURCE_URL, "pay first", (NETWORK,))


def python_client(*allowed: str) -> x402ClientSync:
    client = register_exact_evm_client(x402ClientSync(), EthAccountSigner(PAYER))
    if allowed:
        client.set_spend_controls({"allowed_assets": [{"network": NETWORK.caip2, "asset": asset} for asset in allowed]})
    return client


def test_the_header_and_the_body_say_the_same_to_the_official_models() -> None:
    header = decode_payment_required_header(ANSWER.header)
    assert isinstance(header, PaymentRequired)
    assert header.error == "pay first"
    assert header.resource is not None
    assert header.resource.url == RESOURCE_URL
    assert [(offer.asset, offer.amount, offer.pay_to) for offer in header.accepts] == [
        (token.address, str(AMOUNT_NANO_USD // 1_000), PAY_TO) for token in (USDC, USDT)
    ]
    assert [offer.extra for offer in header.accepts] == [
        {"name": "USDC", "version": "2", "assetTransferMethod": "eip3009", "paymentFlow": "upfront"},
        # No domain: nothing has to be signed in it, and clients would try to sign a permit, which this token does not take.
        {"assetTransferMethod": "permit2", "paymentFlow": "upfront"},
    ]
    body = PaymentRequiredV1.model_validate(json.loads(json.dumps(ANSWER.body)))
    assert body.error == "pay first"
    # v1 knows no Permit2, so USDT is not offered there.
    assert [(offer.network, offer.asset, offer.max_amount_required) for offer in body.accepts] == [
        ("base-sepolia", USDC.address, str(AMOUNT_NANO_USD // 1_000))
    ]
    assert ANSWER.body["quote"] == {
        "id": QUOTE.id,
        "expires_at": QUOTE.expires_at,
        "items": [{"name": "inference", "amount_usd": "0.012"}, {"name": "network_fee", "amount_usd": "0.000345"}],
        "maximum_usd": "0.012345",
        "route": [{"model": "model-a", "provider": "one"}, {"model": "model-b", "provider": "two"}],
    }


def test_networks_without_a_v1_name_are_not_offered_to_v1_clients() -> None:
    network = KNOWN_NETWORKS[42161]
    offers = [requirement_for(token, network, AMOUNT_NANO_USD, PAY_TO, 300) for token in network.tokens]
    answer = payment_required(offers, QUOTE, SEALER.seal(QUOTE), RESOURCE_URL, "pay first", (network,))
    assert answer.body["accepts"] == []
    accepts = _header_json(answer)["accepts"]
    assert [offer["extra"]["name"] for offer in accepts] == ["USD Coin", "USD₮0"]


@pytest.mark.parametrize("network", KNOWN_NETWORKS.values(), ids=lambda network: network.caip2)
def test_the_header_stays_below_three_kilobytes(network: Network) -> None:
    quote = quote_for(DIGEST, route=tuple(f"m{n}@p" for n in range(ROUTE_CANDIDATES_MAX)))
    offers = [requirement_for(token, network, 10**15, PAY_TO, 300) for token in network.tokens]
    answer = payment_required(
        offers, quote, SEALER.seal(quote), "https://" + "x" * 150, "quote_mismatch: " + "y" * 500, (network,)
    )
    assert len(answer.header) <= HEADER_BYTES_MAX <= 3_000
    assert len(_header_json(answer)["accepts"]) == len(network.tokens), "nothing had to be left out"


def test_offers_that_do_not_fit_are_left_out_from_the_end() -> None:
    networks = list(KNOWN_NETWORKS.values())
    offers = [requirement_for(token, net, AMOUNT_NANO_USD, PAY_TO, 300) for net in networks for token in net.tokens]
    answer = payment_required(offers, QUOTE, SEALER.seal(QUOTE), RESOURCE_URL, "pay first", networks)
    accepts = _header_json(answer)["accepts"]
    assert len(answer.header) <= HEADER_BYTES_MAX
    assert 4 <= len(accepts) < len(offers)
    assert [offer["asset"] for offer in accepts] == [offer.asset for offer in offers[: len(accepts)]]
    endless = payment_required(offers, QUOTE, SEALER.seal(QUOTE), "https://" + "x" * 4_000, "pay first", networks)
    assert len(_header_json(endless)["accepts"]) == 1


def test_the_official_python_client_pays_in_usdc_with_its_defaults() -> None:
    payload = python_client().create_payment_payload(decode_payment_required_header(ANSWER.header))
    _assert_pays(encode_payment_signature_header(payload), "usdc")


def test_the_official_python_client_pays_in_usdt() -> None:
    answer = payment_required((USDT_OFFER,), QUOTE, SEALER.seal(QUOTE), RESOURCE_URL, "pay first", (NETWORK,))
    payload = python_client(USDT.address).create_payment_payload(decode_payment_required_header(answer.header))
    _assert_pays(encode_payment_signature_header(payload), "usdt")


def test_the_official_python_client_pays_over_v1() -> None:
    payload = python_client().create_payment_payload(PaymentRequiredV1.model_validate(V1_ONLY.body))
    payment = decode_transfer(encode_payment_signature_header(payload), "x-payment")
    assert check_offline(payment, USDC_OFFER, NETWORK, USDC, now=int(time.time())) == PAYER_ADDRESS


@pytest.fixture(scope="module")
def typescript_headers() -> dict[str, str]:
    """What the official TypeScript client sends, for our 402 in USDC, in USDT, and over v1."""
    script = textwrap.dedent("""
        const { x402Client, x402HTTPClient } = require("@x402/core/client");
        const { registerExactEvmScheme } = require("@x402/evm/exact/client");
        const { privateKeyToAccount } = require("viem/accounts");
        const input = JSON.parse(require("fs").readFileSync(0, "utf8"));
        async function pay(header, body, controls) {
          const client = new x402Client();
          registerExactEvmScheme(client, { signer: privateKeyToAccount(input.key) });
          if (controls) client.setSpendControls(controls);
          const http = new x402HTTPClient(client);
          const required = http.getPaymentRequiredResponse((name) => name === "PAYMENT-REQUIRED" ? header : null, body);
          return http.encodePaymentSignatureHeader(await client.createPaymentPayload(required));
        }
        (async () => {
          const usdc = await pay(input.usdc);
          const usdt = await pay(input.usdt, undefined, { allowedAssets: true });
          const v1 = await pay(null, input.v1);
          console.log(JSON.stringify({
            usdc: usdc["PAYMENT-SIGNATURE"], usdt: usdt["PAYMENT-SIGNATURE"], v1: v1["X-PAYMENT"],
          }));
        })();
    """)
    usdt = payment_required((USDT_OFFER,), QUOTE, SEALER.seal(QUOTE), RESOURCE_URL, "pay first", (NETWORK,))
    done = subprocess.run(
        ["node", "-e", script],
        input=json.dumps(
            {"key": "0x" + bytes(PAYER.key).hex(), "usdc": ANSWER.header, "usdt": usdt.header, "v1": V1_ONLY.body}
        ),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    headers: dict[str, str] = json.loads(done.stdout)
    return headers


@pytest.mark.parametrize("token", ["usdc", "usdt"])
def test_the_official_typescript_client_pays(typescript_headers: dict[str, str], token: str) -> None:
    _assert_pays(typescript_headers[token], token)


def test_the_official_typescript_client_pays_over_v1(typescript_headers: dict[str, str]) -> None:
    payment = decode_transfer(typescript_headers["v1"], "x-payment")
    assert check_offline(payment, USDC_OFFER, NETWORK, USDC, now=int(time.time())) == PAYER_ADDRESS


@pytest.mark.parametrize("v1", [False, True])
def test_clients_understand_how_a_payment_went(v1: bool) -> None:
    network = "base-sepolia" if v1 else "eip155:84532"
    paid = decode_payment_response_header(
        payment_response(True, "0x" + "ab" * 32, network, PAYER_ADDRESS, v1, amount=12_345, receipt="rcpt_1")
    )
    assert (paid.success, paid.transaction, paid.network, paid.payer) == (
        True,
        "0x" + "ab" * 32,
        network,
        PAYER_ADDRESS,
    )
    assert (paid.amount, paid.extra) == ((None, None) if v1 else ("12345", {"receipt": "rcpt_1"}))
    failed = decode_payment_response_header(
        payment_response(False, None, network, None, v1, error_reason="transfer_would_fail")
    )
    assert (failed.success, failed.transaction, failed.error_reason) == (False, "", "transfer_would_fail")


def test_an_offer_rounds_up_to_a_whole_unit() -> None:
    assert requirement_for(USDC, NETWORK, 1, PAY_TO, 300).amount == 1
    assert requirement_for(USDC, NETWORK, 1_001, PAY_TO, 300).amount == 2
    coarse = replace(USDC, decimals=2)
    assert requirement_for(coarse, replace(NETWORK, tokens=(coarse,)), 10_000_001, PAY_TO, 300).amount == 2


def _assert_pays(header: str, token: str) -> None:
    """The header is a payment for our offer that brings our quote back unchanged."""
    payment = decode_transfer(header, "payment-signature")
    chosen, offer = (USDC, USDC_OFFER) if token == "usdc" else (USDT, USDT_OFFER)
    assert payment.accepted == offer
    assert check_offline(payment, offer, NETWORK, chosen, now=int(time.time())) == PAYER_ADDRESS
    assert payment.quote_token is not None
    claim = SEALER.open(
        payment.quote_token, amount_nano_usd=AMOUNT_NANO_USD, request_digest=DIGEST, now=QUOTE.expires_at
    )
    assert claim.id == QUOTE.id


def _header_json(answer: PaymentRequiredAnswer) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(base64.b64decode(answer.header))
    return decoded
