"""Offline verification: which payments pay for a requirement, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from hypothesis import given, settings
from hypothesis import strategies as st

from payments.chain.networks import KNOWN_NETWORKS, Network, Token
from payments.errors import PaymentMalformed, PaymentRefused
from payments.verification.checks import SETTLEMENT_MARGIN_S, check_offline
from payments.x402.wire import Payment, Requirement, requirement_for
from tests.payments.x402_samples import (
    AMOUNT_NANO_USD,
    NETWORK,
    NOW,
    PAY_TO,
    PAYER,
    PAYER_ADDRESS,
    USDC,
    USDC_OFFER,
    USDT,
    USDT_OFFER,
    decode_transfer,
    header_of,
    usdc_payload,
    usdt_payload,
    v1_document,
    v2_document,
)

OTHER: LocalAccount = Account.from_key("0x" + "33" * 32)
ELSEWHERE = "0x" + "99" * 20


def usdc(payload: dict[str, Any] | None = None, offer: Requirement = USDC_OFFER) -> Payment:
    return decode_transfer(header_of(v2_document(payload or usdc_payload(), offer)), "payment-signature")


def usdt(payload: dict[str, Any] | None = None, offer: Requirement = USDT_OFFER) -> Payment:
    return decode_transfer(header_of(v2_document(payload or usdt_payload(), offer)), "payment-signature")


def v1(payload: dict[str, Any] | None = None, network: str = "base-sepolia") -> Payment:
    return decode_transfer(header_of(v1_document(payload or usdc_payload(), network)), "x-payment")


def refusal(
    payment: Payment,
    offer: Requirement = USDC_OFFER,
    token: Token = USDC,
    *,
    network: Network = NETWORK,
    now: int = NOW,
) -> str:
    with pytest.raises(PaymentRefused) as raised:
        check_offline(payment, offer, network, token, now=now)
    assert raised.value.status == 402
    return raised.value.code


def test_payments_for_the_offer_are_accepted() -> None:
    assert check_offline(usdc(), USDC_OFFER, NETWORK, USDC, now=NOW) == PAYER_ADDRESS
    assert check_offline(usdt(), USDT_OFFER, NETWORK, USDT, now=NOW) == PAYER_ADDRESS
    assert check_offline(v1(), USDC_OFFER, NETWORK, USDC, now=NOW) == PAYER_ADDRESS


def test_addresses_are_compared_whatever_their_case() -> None:
    upper = "0x" + PAY_TO[2:].upper()
    assert requirement_for(USDC, NETWORK, AMOUNT_NANO_USD, upper, 300) == USDC_OFFER
    payment = usdc(usdc_payload(to=upper), replace(USDC_OFFER, pay_to=upper, asset="0x" + USDC.address[2:].upper()))
    assert check_offline(payment, USDC_OFFER, NETWORK, USDC, now=NOW) == PAYER_ADDRESS


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"network": "eip155:8453"}, "wrong_network"),
        ({"network": "base-sepolia"}, "wrong_network"),
        ({"asset": ELSEWHERE}, "wrong_token"),
        ({"amount": USDC_OFFER.amount - 1}, "wrong_amount"),
        ({"amount": USDC_OFFER.amount + 1}, "wrong_amount"),
        ({"pay_to": ELSEWHERE}, "wrong_recipient"),
        ({"max_timeout_s": 301}, "wrong_timeout"),
        ({"extra": {}}, "wrong_extra"),
        ({"extra": {**USDC_OFFER.extra, "name": "USD Coin"}}, "wrong_extra"),
        ({"extra": {**USDC_OFFER.extra, "version": "1"}}, "wrong_extra"),
        ({"extra": {**USDC_OFFER.extra, "assetTransferMethod": "permit2"}}, "wrong_extra"),
        ({"extra": {**USDC_OFFER.extra, "paymentFlow": "authorization"}}, "wrong_extra"),
    ],
)
def test_the_offer_that_was_accepted_must_be_ours(change: dict[str, Any], code: str) -> None:
    assert refusal(usdc(offer=replace(USDC_OFFER, **change))) == code


def test_the_scheme_must_be_ours() -> None:
    assert refusal(usdc(), replace(USDC_OFFER, scheme="upto")) == "wrong_scheme"
    assert refusal(v1(), replace(USDC_OFFER, scheme="upto")) == "wrong_scheme"


def test_what_a_client_adds_to_extra_means_nothing() -> None:
    payment = usdc(offer=replace(USDC_OFFER, extra={**USDC_OFFER.extra, "note": {"a": [1]}}))
    assert check_offline(payment, USDC_OFFER, NETWORK, USDC, now=NOW) == PAYER_ADDRESS


def test_v1_names_the_network_by_its_word() -> None:
    assert refusal(v1(network="base")) == "wrong_network"
    assert refusal(v1(network="eip155:84532")) == "wrong_network"
    assert refusal(v1(), network=replace(NETWORK, v1_name=None)) == "wrong_network"


@pytest.mark.parametrize("payment_of", [usdc, v1])
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"value": str(USDC_OFFER.amount - 1)}, "wrong_amount"),
        ({"value": str(USDC_OFFER.amount + 1)}, "wrong_amount"),
        ({"value": "0"}, "wrong_amount"),
        ({"to": ELSEWHERE}, "wrong_recipient"),
        ({"validAfter": str(NOW + 1)}, "not_yet_valid"),
        ({"validBefore": str(NOW + SETTLEMENT_MARGIN_S - 1)}, "expired"),
        ({"validBefore": "0"}, "expired"),
        ({"from": OTHER.address}, "bad_signature"),
    ],
)
def test_an_eip3009_authorization_must_pay_the_offer(
    payment_of: Callable[[dict[str, Any]], Payment], change: dict[str, str], code: str
) -> None:
    assert refusal(payment_of(usdc_payload(change))) == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"amount": str(USDT_OFFER.amount - 1)}, "wrong_amount"),
        ({"amount": str(USDT_OFFER.amount + 1)}, "wrong_amount"),
        ({"to": ELSEWHERE}, "wrong_recipient"),
        ({"token": USDC.address}, "wrong_token"),
        ({"spender": ELSEWHERE}, "wrong_spender"),
        ({"validAfter": str(NOW + 1)}, "not_yet_valid"),
        ({"deadline": str(NOW + SETTLEMENT_MARGIN_S - 1)}, "expired"),
        ({"from": OTHER.address}, "bad_signature"),
    ],
)
def test_a_permit2_authorization_must_pay_the_offer(change: dict[str, str], code: str) -> None:
    assert refusal(usdt(usdt_payload(change)), USDT_OFFER, USDT) == code


def test_the_limits_of_the_time_window_are_inside_it() -> None:
    window = {"validAfter": str(NOW), "validBefore": str(NOW + SETTLEMENT_MARGIN_S)}
    assert check_offline(usdc(usdc_payload(window)), USDC_OFFER, NETWORK, USDC, now=NOW) == PAYER_ADDRESS
    forever = {"validBefore": str(2**256 - 1)}
    assert check_offline(usdc(usdc_payload(forever)), USDC_OFFER, NETWORK, USDC, now=NOW) == PAYER_ADDRESS


def test_a_token_is_paid_by_its_own_method() -> None:
    assert refusal(usdc(usdt_payload())) == "wrong_transfer_method"
    assert refusal(usdt(usdc_payload()), USDT_OFFER, USDT) == "wrong_transfer_method"
    assert refusal(v1(usdt_payload())) == "wrong_transfer_method"


def test_a_signature_for_another_chain_or_domain_is_nobodys() -> None:
    on_base = KNOWN_NETWORKS[8453].tokens[0]
    assert refusal(usdc(usdc_payload(token=on_base))) == "bad_signature"
    assert refusal(usdc(usdc_payload(token=replace(USDC, chain_id=8453)))) == "bad_signature"
    assert refusal(usdc(usdc_payload(token=replace(USDC, domain_name="USD Coin")))) == "bad_signature"
    assert refusal(usdc(usdc_payload(token=replace(USDC, domain_version="1")))) == "bad_signature"
    assert refusal(usdt(usdt_payload(chain_id=8453)), USDT_OFFER, USDT) == "bad_signature"


def test_the_payers_word_for_the_domain_is_not_taken() -> None:
    # Offer and signature agree on a domain of the payer's invention: the offer is not ours.
    extra = {**USDC_OFFER.extra, "name": "Invented"}
    invented = usdc(usdc_payload(token=replace(USDC, domain_name="Invented")), replace(USDC_OFFER, extra=extra))
    assert refusal(invented) == "wrong_extra"


def test_somebody_elses_signature_is_refused() -> None:
    assert refusal(usdc(usdc_payload(signer=OTHER))) == "bad_signature"
    assert refusal(usdt(usdt_payload(signer=OTHER)), USDT_OFFER, USDT) == "bad_signature"


def test_signatures_of_other_lengths_are_told_apart() -> None:
    long, short = usdc_payload(), usdc_payload()
    long["signature"] += "00" * 32
    assert refusal(usdc(long)) == "bad_signature"
    short["signature"] = short["signature"][:-2]
    with pytest.raises(PaymentMalformed):
        check_offline(usdc(short), USDC_OFFER, NETWORK, USDC, now=NOW)


SIGNED_USDC = usdc_payload()
SIGNED_USDT = usdt_payload()


@pytest.mark.parametrize("name", ["validAfter", "validBefore", "nonce", "from"])
def test_each_field_of_an_eip3009_authorization_is_under_the_signature(name: str) -> None:
    other = usdc_payload({"from": OTHER.address}, validAfter=str(NOW - 5), validBefore=str(NOW + 299))
    tampered = {**SIGNED_USDC["authorization"], name: other["authorization"][name]}
    assert refusal(usdc({**SIGNED_USDC, "authorization": tampered})) == "bad_signature"


@pytest.mark.parametrize("name", ["from", "nonce", "deadline", "witness"])
def test_each_field_of_a_permit2_authorization_is_under_the_signature(name: str) -> None:
    other = usdt_payload({"from": OTHER.address}, deadline=str(NOW + 299), validAfter=str(NOW - 5))
    tampered = {**SIGNED_USDT["permit2Authorization"], name: other["permit2Authorization"][name]}
    assert refusal(usdt({**SIGNED_USDT, "permit2Authorization": tampered}), USDT_OFFER, USDT) == "bad_signature"


@given(st.integers(0, 64), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_no_changed_byte_of_a_signature_passes(at: int, mask: int) -> None:
    raw = bytearray.fromhex(SIGNED_USDC["signature"][2:])
    raw[at] ^= mask
    assert refusal(usdc({**SIGNED_USDC, "signature": "0x" + raw.hex()})) == "bad_signature"


@given(st.integers(1, 10**18), st.sampled_from([(6, "eip3009"), (18, "permit2")]))
@settings(max_examples=50, deadline=None)
def test_any_amount_in_any_decimals_is_paid_exactly(amount_nano_usd: int, kind: tuple[int, Any]) -> None:
    decimals, method = kind
    token = replace(USDC, decimals=decimals, transfer_method=method)
    network = replace(NETWORK, tokens=(token,))
    offer = requirement_for(token, network, amount_nano_usd, PAY_TO, 300)
    for difference, accepted in ((0, True), (1, False), (-1, False)):
        value = str(offer.amount + difference)
        payload = (
            usdc_payload(token=token, value=value)
            if method == "eip3009"
            else usdt_payload(token=token.address, amount=value)
        )
        if accepted:
            assert check_offline(usdc(payload, offer), offer, network, token, now=NOW) == PAYER.address.lower()
        else:
            assert refusal(usdc(payload, offer), offer, token, network=network) == "wrong_amount"
