"""Payment headers: what is read from them, and that everything else is refused by name."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import pytest

from payments.chain.networks import EXACT_PERMIT2_PROXY_ADDRESS, PERMIT2_ADDRESS
from payments.errors import PaymentMalformed
from payments.x402.wire import Eip3009Authorization, Payment, Permit2Authorization, decode_payment
from tests.payments.x402_samples import (
    AMOUNT_NANO_USD,
    NOW,
    PAY_TO,
    PAYER,
    PAYER_ADDRESS,
    REMOVED,
    USDC,
    USDC_OFFER,
    USDT,
    USDT_OFFER,
    changed,
    decode_transfer,
    header_of,
    usdc_payload,
    usdt_payload,
    v1_document,
    v2_document,
)

USDC_V2 = v2_document(usdc_payload(), USDC_OFFER, "token")
USDT_V2 = v2_document(usdt_payload(), USDT_OFFER, "token")
USDC_V1 = v1_document(usdc_payload())


def decode_v2(document: Any) -> Payment:
    return decode_transfer(header_of(document), "payment-signature")


def refusal(header: str, name: Any = "payment-signature") -> PaymentMalformed:
    with pytest.raises(PaymentMalformed) as raised:
        decode_payment(header, name)
    assert raised.value.status == 400
    return raised.value


def test_an_eip3009_payment_is_read() -> None:
    document = v2_document(usdc_payload(nonce="0x" + "0" * 62 + "Fe"), USDC_OFFER, "the-token")
    payment = decode_v2(document)
    assert payment.version == 2
    assert payment.scheme == "exact"
    assert payment.network == "eip155:84532"
    assert payment.accepted == USDC_OFFER
    assert payment.authorization == Eip3009Authorization(
        payer=PAYER_ADDRESS,
        to=PAY_TO,
        value=AMOUNT_NANO_USD // 1_000,
        valid_after=0,
        valid_before=NOW + 300,
        nonce=0xFE,
    )
    assert payment.authorization.recipient == PAY_TO
    assert payment.authorization.expires_at == NOW + 300
    assert "0x" + payment.signature.hex() == document["payload"]["signature"]
    assert payment.quote_token == "the-token"
    assert payment.transfer_method == "eip3009"
    assert payment.token_address == USDC.address
    assert payment.identity(84532, USDC) == f"84532|{USDC.address}|{PAYER_ADDRESS}|254"


def test_a_permit2_payment_is_read() -> None:
    payment = decode_v2(v2_document(usdt_payload(nonce="77"), USDT_OFFER))
    assert payment.authorization == Permit2Authorization(
        payer=PAYER_ADDRESS,
        token=USDT.address,
        amount=AMOUNT_NANO_USD // 1_000,
        spender=EXACT_PERMIT2_PROXY_ADDRESS,
        nonce=77,
        deadline=NOW + 300,
        to=PAY_TO,
        valid_after=0,
    )
    assert payment.authorization.value == USDT_OFFER.amount
    assert payment.authorization.recipient == PAY_TO
    assert payment.authorization.expires_at == NOW + 300
    assert payment.quote_token is None
    assert payment.transfer_method == "permit2"
    # Permit2 counts nonces per owner, whatever the token.
    assert payment.identity(84532, USDT) == f"84532|{PERMIT2_ADDRESS}|{PAYER_ADDRESS}|77"
    assert payment.identity(84532, USDT) == payment.identity(84532, USDC)


def test_a_v1_payment_is_read() -> None:
    payment = decode_transfer(header_of(v1_document(usdc_payload())), "x-payment")
    assert (payment.version, payment.scheme, payment.network) == (1, "exact", "base-sepolia")
    assert payment.accepted is None
    assert payment.quote_token is None
    assert payment.token_address is None
    assert payment.payer == PAYER_ADDRESS


def test_letter_case_of_addresses_and_nonces_makes_no_second_identity() -> None:
    payload = usdc_payload(nonce="0x" + "ab" * 32)
    upper = copy.deepcopy(payload)
    upper["authorization"]["nonce"] = "0x" + "AB" * 32
    upper["authorization"]["from"] = "0x" + PAYER_ADDRESS[2:].upper()
    first, second = (decode_v2(v2_document(each, USDC_OFFER)) for each in (payload, upper))
    assert first.authorization == second.authorization
    assert first.identity(84532, USDC) == second.identity(84532, USDC)


def test_the_digest_is_of_the_meaning_and_not_of_the_spelling() -> None:
    document = v2_document(usdc_payload(), USDC_OFFER, "token")
    digest = decode_v2(document).digest
    turned = json.dumps(dict(reversed(document.items())), indent=3).encode()
    assert decode_payment(base64.b64encode(turned).decode(), "payment-signature").digest == digest
    for path, value in (
        ("accepted.amount", "1"),
        ("payload.authorization.value", "1"),
        ("payload.signature", "0x00"),
        ("extensions.farebox.quote", "other"),
        ("resource", {"url": "https://elsewhere"}),
    ):
        assert decode_v2(changed(document, path, value)).digest != digest


def test_a_far_away_expiry_fits_a_database_column() -> None:
    for document in (
        v2_document(usdc_payload(validBefore=str(2**256 - 1)), USDC_OFFER),
        v2_document(usdt_payload(deadline=str(2**256 - 1)), USDT_OFFER),
    ):
        assert decode_v2(document).authorization.expires_at == 2**63 - 1


@pytest.mark.parametrize(
    "extra",
    [
        {"extensions": None, "resource": None},
        {"extensions": {}},
        {"extensions": {"bazaar": {"info": 1}}, "resource": {"url": "https://x"}, "unheardOf": [1]},
        {"extensions": {"farebox": None}},
    ],
)
def test_members_around_the_signed_part_may_come_and_go(extra: dict[str, Any]) -> None:
    assert decode_v2({**v2_document(usdc_payload(), USDC_OFFER), **extra}).quote_token is None


NOT_DECIMAL = [
    "",
    "-1",
    "+1",
    "01",
    " 1",
    "1 ",
    "1\n",
    "1e3",
    "1.0",
    "0x1",
    "١",
    "1_0",
    str(2**256),
    "9" * 78,
    1,
    1.0,
    None,
    True,
    [],
    {},
]
NOT_ADDRESS = [
    "",
    "0x",
    "0x" + "1" * 39,
    "0x" + "1" * 41,
    "0X" + "1" * 40,
    "1" * 40,
    "0x" + "g" * 40,
    "0x" + "1" * 40 + "\n",
    1,
    None,
]
NOT_BYTES32 = ["", "0x", "0x" + "1" * 63, "0x" + "1" * 65, "1" * 64, "0x" + "x" * 64, "0x" + "1" * 64 + "\n", 7, None]
NOT_HEX = ["", "0x", "0x1", "11", "0xzz", "0x11 22", "0x11\n", "0x" + "00" * 4_097, 1, None, b"".hex()]
NOT_TEXT = ["", "x" * 129, 1, None, [], {}]
NOT_SECONDS = [-1, 2**31, 1.0, "300", True, None]
NOT_OBJECT: list[object] = [None, 1, "x", [], True]


@pytest.mark.parametrize(
    ("document", "path", "values"),
    [
        (USDC_V2, "payload", NOT_OBJECT),
        (USDC_V2, "payload.authorization", NOT_OBJECT),
        (USDC_V2, "payload.authorization.from", NOT_ADDRESS),
        (USDC_V2, "payload.authorization.to", NOT_ADDRESS),
        (USDC_V2, "payload.authorization.value", NOT_DECIMAL),
        (USDC_V2, "payload.authorization.validAfter", NOT_DECIMAL),
        (USDC_V2, "payload.authorization.validBefore", NOT_DECIMAL),
        (USDC_V2, "payload.authorization.nonce", NOT_BYTES32),
        (USDC_V2, "payload.signature", NOT_HEX),
        (USDC_V2, "accepted", NOT_OBJECT),
        (USDC_V2, "accepted.scheme", NOT_TEXT),
        (USDC_V2, "accepted.network", NOT_TEXT),
        (USDC_V2, "accepted.asset", NOT_ADDRESS),
        (USDC_V2, "accepted.amount", NOT_DECIMAL),
        (USDC_V2, "accepted.payTo", NOT_ADDRESS),
        (USDC_V2, "accepted.maxTimeoutSeconds", NOT_SECONDS),
        (USDC_V2, "accepted.extra", [1, "x", [], True]),
        (USDC_V2, "extensions", [1, "x", [], True]),
        (USDC_V2, "extensions.farebox", [1, "x", [], True]),
        (USDC_V2, "extensions.farebox.quote", ["", "x" * 513, 1, None, []]),
        (USDT_V2, "payload.permit2Authorization", NOT_OBJECT),
        (USDT_V2, "payload.permit2Authorization.from", NOT_ADDRESS),
        (USDT_V2, "payload.permit2Authorization.permitted", NOT_OBJECT),
        (USDT_V2, "payload.permit2Authorization.permitted.token", NOT_ADDRESS),
        (USDT_V2, "payload.permit2Authorization.permitted.amount", NOT_DECIMAL),
        (USDT_V2, "payload.permit2Authorization.spender", NOT_ADDRESS),
        (USDT_V2, "payload.permit2Authorization.nonce", NOT_DECIMAL),
        (USDT_V2, "payload.permit2Authorization.deadline", NOT_DECIMAL),
        (USDT_V2, "payload.permit2Authorization.witness", NOT_OBJECT),
        (USDT_V2, "payload.permit2Authorization.witness.to", NOT_ADDRESS),
        (USDT_V2, "payload.permit2Authorization.witness.validAfter", NOT_DECIMAL),
        (USDT_V2, "payload.signature", NOT_HEX),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_field_has_one_spelling_and_the_refusal_names_it(
    document: dict[str, Any], path: str, values: list[object]
) -> None:
    for value in values:
        error = refusal(header_of(changed(document, path, value)))
        assert error.code == "malformed_payment"
        assert error.message.startswith(path), (value, error.message)


@pytest.mark.parametrize(
    ("document", "path"),
    [
        (USDC_V2, "payload"),
        (USDC_V2, "payload.authorization"),
        (USDC_V2, "payload.signature"),
        (USDC_V2, "payload.authorization.nonce"),
        (USDC_V2, "accepted"),
        (USDC_V2, "accepted.payTo"),
        (USDT_V2, "payload.permit2Authorization.witness.to"),
        (USDT_V2, "payload.permit2Authorization.permitted.token"),
        (USDT_V2, "payload.signature"),
    ],
)
def test_a_missing_field_is_named(document: dict[str, Any], path: str) -> None:
    error = refusal(header_of(changed(document, path, REMOVED)))
    assert (error.code, error.message.split()[0]) == ("malformed_payment", path)


@pytest.mark.parametrize(
    ("document", "path"),
    [
        (USDC_V2, "payload.surplus"),
        (USDC_V2, "payload.authorization.surplus"),
        (USDT_V2, "payload.authorization"),
        (USDT_V2, "payload.permit2Authorization.witness.facilitator"),
        (USDT_V2, "payload.permit2Authorization.permitted.surplus"),
    ],
)
def test_the_signed_part_holds_nothing_that_we_do_not_know(document: dict[str, Any], path: str) -> None:
    error = refusal(header_of(changed(document, path, "0x01")))
    assert error.code == "malformed_payment"
    assert error.message.startswith(path.rpartition(".")[0])


def test_each_version_has_its_own_header() -> None:
    for document, name in ((USDC_V1, "payment-signature"), (USDC_V2, "x-payment")):
        assert refusal(header_of(document), name).code == "unsupported_version"
    for version in (0, 3, "2", 2.0, True, None, 2**70):
        assert refusal(header_of(changed(USDC_V2, "x402Version", version))).code == "unsupported_version"
    assert refusal(header_of(changed(USDC_V2, "x402Version", REMOVED))).code == "unsupported_version"


def test_other_schemes_are_told_apart_from_mistakes() -> None:
    assert refusal(header_of(changed(USDC_V2, "accepted.scheme", "deferred"))).code == "unsupported_scheme"
    assert refusal(header_of(changed(USDC_V1, "scheme", "Exact")), "x-payment").code == "unsupported_scheme"
    assert refusal(header_of(changed(USDC_V1, "network", "")), "x-payment").message.startswith("network")


def test_base64_is_the_standard_alphabet_with_padding() -> None:
    filler = {**USDC_V2, "filler": ""}
    while not (header := header_of(filler)).endswith("="):
        filler["filler"] += "x"
    decode_payment(header, "payment-signature")
    for spelling in (
        header.rstrip("="),
        header + "=",
        header + "\n",
        " " + header,
        header[:40] + " " + header[40:],
        header[:40] + "-" + header[41:],
        header[:40] + "é" + header[41:],
        header[:40] + "\N{SNOWMAN}" + header[41:],
        header + header,
    ):
        assert refusal(spelling).code == "malformed_base64"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"nope", b"{'a':1}", b"\xff\xfe", b'{"a":"\\ud800"}', b'{"a":NaN}', b"[" * 5_000, b'{"a":' * 2_000],
    ids=repr,
)
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    assert refusal(base64.b64encode(raw[:12_000]).decode()).code == "malformed_json"


@pytest.mark.parametrize("value", [1, "x", [], None, True, [{}]])
def test_json_that_is_no_object_is_refused(value: object) -> None:
    assert refusal(header_of(value)).code == "malformed_payment"


def test_depth_is_limited() -> None:
    def nested(levels: int) -> Any:
        return {} if levels == 0 else {"a": [nested(levels - 2)]} if levels > 1 else {"a": {}}

    # Within the document and `extensions`: 14 more levels make 16.
    decode_v2({**USDC_V2, "extensions": {"x": nested(13)}})
    assert refusal(header_of({**USDC_V2, "extensions": {"x": nested(14)}})).code == "malformed_json"


def test_length_is_limited() -> None:
    room = 16_384 // 4 * 3 - len(json.dumps({**USDC_V2, "filler": ""}))
    assert len(header_of({**USDC_V2, "filler": "x" * room})) == 16_384
    decode_v2({**USDC_V2, "filler": "x" * room})
    assert refusal(header_of({**USDC_V2, "filler": "x" * (room + 1)})).code == "header_too_long"


def test_a_refusal_never_repeats_what_was_sent() -> None:
    marker = "<script>secret</script>"
    for path in ("payload.authorization.value", "accepted.payTo", "payload.signature", "accepted.scheme"):
        assert marker not in refusal(header_of(changed(USDC_V2, path, marker))).message


def test_the_checksummed_address_of_a_stock_client_is_accepted() -> None:
    assert PAYER.address != PAYER_ADDRESS
    assert decode_v2(USDC_V2).payer == PAYER_ADDRESS
