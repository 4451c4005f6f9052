"""The x402 extensions of a gateway, met by the official package where it has a client for them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import orjson
import pytest
from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address
from x402 import PaymentRequired, x402Client, x402ClientSync
from x402.extensions.bazaar import with_bazaar
from x402.extensions.bazaar.facilitator import validate_discovery_extension_spec
from x402.extensions.payment_identifier import append_payment_identifier_to_extensions
from x402.extensions.sign_in_with_x import (
    SIWxExtension,
    SIWxPayload,
    assert_siwx_challenge_bound_to_origin,
    encode_siwx_header,
)
from x402.http import FacilitatorConfig, HTTPFacilitatorClientSync, x402HTTPClientSync
from x402.http.clients import x402_httpx_transport
from x402.mechanisms.evm.batch_settlement.client import BatchSettlementEvmScheme
from x402.mechanisms.evm.batch_settlement.client.config import BatchSettlementEvmSchemeOptions
from x402.mechanisms.evm.exact import ExactEvmScheme
from x402.mechanisms.evm.signers import EthAccountSigner, EthAccountSignerWithRPC
from x402.mechanisms.evm.upto import UptoEvmClientScheme

from agents_sdk.signed_receipts import ReceiptInvalid, read_signed_receipt
from contracts.devnet import USDC, USDT, approve_permit2, balance_of, mint, rpc
from gateway.dev.stack import Stack
from tests.e2e.clients import JSON, ask, decoded, encoded, official_client, sign
from tests.e2e.conftest import QUESTION
from tests.e2e.test_upto_clients import settled

IDENTIFIER = "order-7d5d747be160e280504c099d984bcfe0"


def asked_for(http: httpx.Client, *names: str) -> dict[str, Any]:
    asked = ask(http, QUESTION, {"accept-payment": ", ".join(names)})
    assert asked.status_code == 402
    required: dict[str, Any] = decoded(asked.headers["payment-required"])
    return required


def sign_named(account: LocalAccount, asked: httpx.Response, identifier: str, *schemes: Any) -> dict[str, str]:
    """What the official client sends with its extension `payment-identifier`; by `schemes` only, where some are named."""
    assert asked.status_code == 402, asked.text
    client = official_client(account)
    if schemes:
        client = x402ClientSync()
        for scheme in schemes:
            client.register("eip155:*", scheme)
    wrapped = x402HTTPClientSync(client)
    required = wrapped.get_payment_required_response(asked.headers.get, asked.json())
    assert isinstance(required, PaymentRequired)
    assert required.extensions is not None
    append_payment_identifier_to_extensions(required.extensions, identifier)
    return dict(wrapped.encode_payment_signature_header(client.create_payment_payload(required)))


def test_whoever_asks_for_nothing_is_told_of_names_for_payments_within_three_kilobytes(http: httpx.Client) -> None:
    asked = ask(http, QUESTION)
    assert len(asked.headers["payment-required"]) <= 3_000
    required = decoded(asked.headers["payment-required"])
    assert set(required["extensions"]) == {"farebox", "payment-identifier"}
    assert len(required["accepts"]) == 2


def test_a_second_payment_of_the_same_name_is_not_taken(http: httpx.Client, stack: Stack, wallet: LocalAccount) -> None:
    first = sign_named(wallet, ask(http, QUESTION), IDENTIFIER)
    answer = ask(http, QUESTION, first)
    assert answer.status_code == 200, answer.text
    held = balance_of(stack.rpc_url, USDC, wallet.address)
    refused = ask(http, QUESTION, sign_named(wallet, ask(http, QUESTION), IDENTIFIER))
    assert refused.status_code == 409
    error = refused.json()["error"]
    assert error["code"] == "payment_identifier_used"
    assert error["receipt"] == answer.headers["x-farebox-receipt"]
    assert balance_of(stack.rpc_url, USDC, wallet.address) == held
    again = ask(http, QUESTION, first)
    assert (again.status_code, again.text) == (200, answer.text)
    assert ask(http, QUESTION, sign_named(wallet, ask(http, QUESTION), IDENTIFIER + "-2")).status_code == 200


def test_a_name_is_borne_once_whatever_scheme_pays_and_for_whatever(
    http: httpx.Client, stack: Stack, wallet: LocalAccount
) -> None:
    approve_permit2(stack.rpc_url, USDC, wallet.key.hex())
    signer = EthAccountSigner(wallet)
    upto = UptoEvmClientScheme(signer)
    # Two channels, since nobody tells this client what its first voucher came to.
    channels = [
        BatchSettlementEvmScheme(signer, BatchSettlementEvmSchemeOptions(salt=f"0x{salt:064x}")) for salt in (1, 2)
    ]

    def answered(headers: dict[str, str]) -> httpx.Response:
        return ask(http, QUESTION, headers)

    def topped_up(headers: dict[str, str]) -> httpx.Response:
        return http.post("/v1/wallet/topups", json={"amount_usd": "0.10"}, headers=headers)

    def paid(send: Callable[[dict[str, str]], httpx.Response], scheme: Any, name: str) -> httpx.Response:
        """An answer or a top-up, by this scheme; by exact if it is None."""
        names = {} if scheme is None else {"accept-payment": scheme.scheme}
        return send(names | sign_named(wallet, send(names), name, *([] if scheme is None else [scheme])))

    ways = [
        (send, scheme)
        for send, channel in zip((answered, topped_up), channels, strict=True)
        for scheme in (upto, None, channel)
    ]
    for number, (send, scheme) in enumerate(ways):
        name = f"{IDENTIFIER}-{number}"
        first = paid(send, scheme, name)
        assert first.status_code == 200, first.text
        for refused in [paid(other, by, name) for other, by in ways]:
            assert refused.status_code == 409, refused.text
            error = refused.json()["error"]
            assert (error["code"], error["receipt"]) == ("payment_identifier_used", first.headers["x-farebox-receipt"])


def test_names_of_two_payers_do_not_meet(http: httpx.Client, stack: Stack) -> None:
    name = "shared-" + "a" * 20
    for entry in stack.wallets[:2]:
        account: LocalAccount = Account.from_key(entry["private_key"])
        assert ask(http, QUESTION, sign_named(account, ask(http, QUESTION), name)).status_code == 200


@pytest.mark.parametrize("identifier", ["short", "x" * 129, "no blanks allowed here", 7])
def test_a_name_that_is_none_is_refused(http: httpx.Client, wallet: LocalAccount, identifier: Any) -> None:
    payment = decoded(sign(wallet, ask(http, QUESTION))["PAYMENT-SIGNATURE"])
    payment["extensions"]["payment-identifier"]["info"]["id"] = identifier
    refused = ask(http, QUESTION, {"payment-signature": encoded(payment)})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "malformed_payment"


@pytest.fixture
def penniless(stack: Stack) -> LocalAccount:
    """A wallet with dollars and without the chain's own coin, which never approved anything."""
    account: LocalAccount = Account.create()
    for coin in (USDC, USDT):
        mint(stack.rpc_url, coin, account.address, 5_000_000)
    return account


def with_rpc(stack: Stack, account: LocalAccount, scheme: type[Any], token: str | None = None) -> x402ClientSync:
    """The official client, with a node to ask: then it sponsors itself where a 402 says that it may."""
    client = x402ClientSync()
    client.register("eip155:*", scheme(EthAccountSignerWithRPC(account, stack.rpc_url)))
    if token is not None:
        client.set_spend_controls({"allowed_assets": True})
        client.register_policy(lambda _, offers: [offer for offer in offers if offer.asset.lower() == token.lower()])
    return client


def paid_by(client: x402ClientSync, asked: httpx.Response) -> tuple[dict[str, str], dict[str, Any]]:
    """The headers that pay a 402, and what the payment says in its extensions."""
    wrapped = x402HTTPClientSync(client)
    required = wrapped.get_payment_required_response(asked.headers.get, asked.json())
    headers = dict(wrapped.encode_payment_signature_header(client.create_payment_payload(required)))
    return headers, decoded(headers["PAYMENT-SIGNATURE"])["extensions"]


def test_a_wallet_without_coin_pays_by_upto_with_a_permit(
    http: httpx.Client, stack: Stack, penniless: LocalAccount
) -> None:
    names = {"accept-payment": "upto, eip2612GasSponsoring"}
    client = with_rpc(stack, penniless, UptoEvmClientScheme, USDC.address)
    headers, extensions = paid_by(client, ask(http, QUESTION, names))
    assert "signature" in extensions["eip2612GasSponsoring"]["info"]
    answer = ask(http, QUESTION, names | headers)
    assert answer.status_code == 200, answer.text
    receipt = settled(http, answer.headers["x-farebox-receipt"])
    assert receipt["tender"] == "upto"
    paid = 5_000_000 - balance_of(stack.rpc_url, USDC, penniless.address)
    assert 0 < paid == int(decoded(answer.headers["payment-response"])["amount"])
    assert rpc(stack.rpc_url, "eth_getBalance", penniless.address, "latest") == "0x0"


@pytest.mark.parametrize(
    ("scheme", "names"),
    [(ExactEvmScheme, "erc20ApprovalGasSponsoring"), (UptoEvmClientScheme, "erc20ApprovalGasSponsoring, upto")],
    ids=["exact", "upto"],
)
def test_a_wallet_without_coin_pays_in_a_token_without_permits(
    http: httpx.Client, stack: Stack, penniless: LocalAccount, scheme: type[Any], names: str
) -> None:
    asking = {"accept-payment": names}
    client = with_rpc(stack, penniless, scheme, USDT.address)
    asked = ask(http, QUESTION, asking)
    assert len(asked.headers["payment-required"]) <= 7_500
    headers, extensions = paid_by(client, asked)
    assert "signedTransaction" in extensions["erc20ApprovalGasSponsoring"]["info"]
    answer = ask(http, QUESTION, asking | headers)
    assert answer.status_code == 200, answer.text
    again = ask(http, QUESTION, asking | headers)
    assert (again.status_code, again.text) == (200, answer.text)
    settled(http, answer.headers["x-farebox-receipt"])
    paid = 5_000_000 - balance_of(stack.rpc_url, USDT, penniless.address)
    assert paid == int(decoded(answer.headers["payment-response"])["amount"]) > 0
    # It is approved from now on, and signs no approval any more.
    headers, extensions = paid_by(client, ask(http, QUESTION, asking))
    assert "signedTransaction" not in extensions["erc20ApprovalGasSponsoring"]["info"]
    assert ask(http, QUESTION, asking | headers).status_code == 200


async def test_a_wallet_without_coin_opens_a_channel_in_a_token_without_permits(
    stack: Stack, penniless: LocalAccount
) -> None:
    client = x402Client()
    client.register("eip155:*", BatchSettlementEvmScheme(EthAccountSignerWithRPC(penniless, stack.rpc_url)))
    client.set_spend_controls({"allowed_assets": True})
    usdt = USDT.address.lower()
    client.register_policy(lambda _, offers: [offer for offer in offers if offer.asset.lower() == usdt])
    headers = JSON | {"accept-payment": "batch-settlement, erc20ApprovalGasSponsoring"}
    async with httpx.AsyncClient(
        transport=x402_httpx_transport(client), base_url=stack.gateway_url, timeout=30, headers=headers
    ) as paying:
        for _ in range(2):
            answer = await paying.post("/v1/chat/completions", content=orjson.dumps(QUESTION))
            assert answer.status_code == 200, answer.text
    assert balance_of(stack.rpc_url, USDT, penniless.address) < 5_000_000


@pytest.mark.parametrize(
    ("asked", "declared"),
    [
        ("erc20ApprovalGasSponsoring", True),
        ("eip2612GasSponsoring, erc20ApprovalGasSponsoring, upto", True),
        ("payment-identifier", False),
    ],
)
def test_approvals_are_declared_to_whoever_asks(http: httpx.Client, asked: str, declared: bool) -> None:
    assert ("erc20ApprovalGasSponsoring" in asked_for(http, asked)["extensions"]) is declared


@pytest.mark.parametrize(
    ("asked", "declared"),
    [
        ("upto, eip2612GasSponsoring", True),
        ("eip2612GasSponsoring, upto", True),
        # USDC moves by EIP-3009 there, and USDT takes no permits.
        ("eip2612GasSponsoring", False),
        ("eip2612GasSponsoring, batch-settlement", False),
    ],
)
def test_permits_are_declared_where_they_help(http: httpx.Client, asked: str, declared: bool) -> None:
    required = asked_for(http, asked)
    assert ("eip2612GasSponsoring" in required["extensions"]) is declared
    for offer in required["accepts"]:
        # A client that is named a domain signs a permit in it.
        takes_permits = offer["asset"].lower() == USDC.address.lower()
        assert ("name" in offer["extra"]) is takes_permits


FIELDS = {
    "Offer": "string resourceUrl,string scheme,string network,string asset,address payTo,string amount,"
    "uint256 maxTimeoutSeconds,uint256 issuedAt",
    "Receipt": "string network,string resourceUrl,string payer,uint256 issuedAt,string transaction",
}


def signer_of(kind: str, artifact: dict[str, Any], chain_id: int) -> str:
    """Who signed an offer or a receipt, by the specification and another implementation of EIP-712 than ours."""
    fields = [dict(zip(("type", "name"), field.split(), strict=True)) for field in FIELDS[kind].split(",")]
    signable = encode_typed_data(
        domain_data={"name": f"x402 {kind.lower()}", "version": "1", "chainId": chain_id},
        message_types={kind: fields},
        message_data=artifact["payload"],
    )
    assert artifact["format"] == "eip712"
    recovered: str = Account.recover_message(signable, signature=artifact["signature"])
    return recovered.lower()


def test_offers_and_receipts_are_signed_by_the_published_key(
    http: httpx.Client, stack: Stack, wallet: LocalAccount
) -> None:
    published = http.get("/.well-known/farebox-keys").json()["offer-receipt"]["address"]
    asked = ask(http, QUESTION, {"accept-payment": "offer-receipt"})
    required = decoded(asked.headers["payment-required"])
    offers = required["extensions"]["offer-receipt"]["info"]["offers"]
    assert len(offers) == len(required["accepts"]) == 2
    for offer, accepted in zip(offers, required["accepts"], strict=True):
        assert signer_of("Offer", offer, stack.chain_id) == published
        assert {name: offer["payload"][name] for name in ("asset", "payTo", "amount", "network")} == {
            name: accepted[name] for name in ("asset", "payTo", "amount", "network")
        }
    paid = ask(http, QUESTION, sign(wallet, asked))
    assert paid.status_code == 200
    response = decoded(paid.headers["payment-response"])
    receipt = response["extensions"]["offer-receipt"]["info"]["receipt"]
    assert signer_of("Receipt", receipt, stack.chain_id) == published
    assert receipt["payload"]["payer"] == wallet.address.lower()
    assert receipt["payload"]["transaction"] == response["transaction"]
    read = read_signed_receipt(paid.headers["payment-response"], published)
    assert (read.payer, read.transaction) == (wallet.address.lower(), response["transaction"])
    with pytest.raises(ReceiptInvalid, match="not by"):
        read_signed_receipt(paid.headers["payment-response"], wallet.address)
    receipt["payload"]["payer"] = "0x" + "11" * 20
    with pytest.raises(ReceiptInvalid, match="signed by"):
        read_signed_receipt(encoded(response), published)
    with pytest.raises(ReceiptInvalid, match="no signed receipt"):
        read_signed_receipt(encoded({name: response[name] for name in response.keys() - {"extensions"}}), published)
    assert signer_of("Receipt", receipt, stack.chain_id) != published


def test_a_receipt_is_signed_only_for_those_who_want_one(http: httpx.Client, wallet: LocalAccount) -> None:
    paid = ask(http, QUESTION, sign(wallet, ask(http, QUESTION)))
    assert "extensions" not in decoded(paid.headers["payment-response"])


def answer_challenge(wallet: LocalAccount, required: dict[str, Any], **changes: str) -> dict[str, str]:
    """What a client with the extension `sign-in-with-x` sends: the challenge as EIP-4361, signed with EIP-191."""
    extension = required["extensions"]["sign-in-with-x"]
    SIWxExtension.model_validate(extension)
    info = extension["info"] | {"chainId": extension["supportedChains"][0]["chainId"], "type": "eip191"} | changes
    message = (
        f"{info['domain']} wants you to sign in with your Ethereum account:\n{to_checksum_address(wallet.address)}\n\n"
        f"{info['statement']}\n\nURI: {info['uri']}\nVersion: {info['version']}\nChain ID: {info['chainId'][7:]}\n"
        f"Nonce: {info['nonce']}\nIssued At: {info['issuedAt']}\nExpiration Time: {info['expirationTime']}"
    )
    signature = wallet.sign_message(encode_defunct(text=message)).signature.hex()
    proof = info | {"address": wallet.address, "signature": "0x" + signature.removeprefix("0x")}
    return {"sign-in-with-x": encode_siwx_header(SIWxPayload.model_validate(proof))}


def test_a_wallet_with_credit_signs_in_instead_of_paying(
    http: httpx.Client, stack: Stack, wallet: LocalAccount
) -> None:
    # An exact payment takes the maximum; what is not used is credit.
    assert ask(
        http, QUESTION | {"max_tokens": 2_000}, sign(wallet, ask(http, QUESTION | {"max_tokens": 2_000}))
    ).is_success
    held = balance_of(stack.rpc_url, USDC, wallet.address)
    required = asked_for(http, "sign-in-with-x")
    # The official client signs for nobody but the origin that asked it.
    assert_siwx_challenge_bound_to_origin(required["extensions"]["sign-in-with-x"]["info"], stack.gateway_url)
    proof = answer_challenge(wallet, required)
    answer = ask(http, QUESTION, proof)
    assert answer.status_code == 200, answer.text
    assert "payment-response" not in answer.headers
    assert balance_of(stack.rpc_url, USDC, wallet.address) == held
    again = ask(http, QUESTION, proof)
    assert again.status_code == 402
    assert again.json()["error"].startswith("challenge_used")


def test_a_wallet_without_credit_is_asked_to_pay(http: httpx.Client) -> None:
    stranger: LocalAccount = Account.create()
    answer = ask(http, QUESTION, answer_challenge(stranger, asked_for(http, "sign-in-with-x")))
    assert answer.status_code == 402
    assert answer.json()["error"].startswith("insufficient_credit")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"domain": "evil.example"}, "invalid_message"),
        ({"uri": "http://127.0.0.1/v1/other"}, "invalid_message"),
        ({"nonce": "0" * 48}, "invalid_message"),
        ({"expirationTime": "2099-01-01T00:00:00Z"}, "invalid_message"),
        ({"chainId": "eip155:1"}, "invalid_chain"),
        ({"statement": "I give you everything."}, "invalid_message"),
    ],
)
def test_a_changed_challenge_lets_nobody_in(
    http: httpx.Client, wallet: LocalAccount, changes: dict[str, str], code: str
) -> None:
    answer = ask(http, QUESTION, answer_challenge(wallet, asked_for(http, "sign-in-with-x"), **changes))
    assert answer.status_code == 402
    assert answer.json()["error"].startswith(code)


def test_somebody_elses_signature_and_nonsense_let_nobody_in(
    http: httpx.Client, stack: Stack, wallet: LocalAccount
) -> None:
    proof = decoded(answer_challenge(wallet, asked_for(http, "sign-in-with-x"))["sign-in-with-x"])
    proof["address"] = (
        stack.wallets[0]["address"] if stack.wallets[0]["address"] != wallet.address else "0x" + "11" * 20
    )
    for header in (encoded(proof), "%%%", base64.b64encode(b"[]").decode(), encoded({"domain": 1}), "A" * 9_000):
        assert ask(http, QUESTION, {"sign-in-with-x": header}).status_code == 402


def test_what_is_sold_is_described_and_discovered(http: httpx.Client, stack: Stack) -> None:
    declared = asked_for(http, "bazaar")["extensions"]["bazaar"]
    jsonschema.validate(declared["info"], declared["schema"])
    assert validate_discovery_extension_spec(declared).valid
    example = declared["info"]["input"]["body"]
    assert ask(http, example).status_code == 402
    client = with_bazaar(HTTPFacilitatorClientSync(FacilitatorConfig(url=stack.gateway_url)))  # type: ignore[arg-type]
    (item,) = client.extensions.bazaar.list_resources().items
    beyond = http.get("/discovery/resources?limit=7&offset=1").json()
    assert (beyond["items"], beyond["pagination"]) == ([], {"limit": 7, "offset": 1, "total": 1})
    assert http.get("/discovery/resources?limit=-1").status_code == 400
    assert item.resource == f"{stack.gateway_url}/v1/chat/completions"
    assert item.accepts is not None
    assert {offer["payTo"] for offer in item.accepts} == {stack.pay_to.lower()}
    assert item.service_name == "Farebox"


def test_everything_at_once_stays_below_what_servers_take(http: httpx.Client) -> None:
    names = ("payment-identifier", "sign-in-with-x", "offer-receipt", "bazaar")
    asked = ask(http, QUESTION, {"accept-payment": ", ".join(names)})
    assert len(asked.headers["payment-required"]) <= 7_500
    assert set(decoded(asked.headers["payment-required"])["extensions"]) == {"farebox", *names}
