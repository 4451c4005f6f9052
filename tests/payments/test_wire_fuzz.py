"""Whatever arrives as a payment header is a payment or malformed, never an error of ours."""

from __future__ import annotations

import base64
import contextlib
import json
import string

from hypothesis import given, settings
from hypothesis import strategies as st

from payments.errors import PaymentMalformed
from payments.x402.wire import HeaderName, decode_payment
from tests.payments.x402_samples import USDC_OFFER, changed, header_of, usdc_payload, v2_document

USDC_V2 = v2_document(usdc_payload(), USDC_OFFER, "token")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=10,
)
paths = st.sampled_from(
    [
        "x402Version",
        "payload",
        "payload.authorization",
        *(f"payload.authorization.{name}" for name in USDC_V2["payload"]["authorization"]),
        "payload.signature",
        "accepted",
        *(f"accepted.{name}" for name in USDC_V2["accepted"]),
        "extensions",
        "extensions.farebox",
        "extensions.farebox.quote",
    ]
)


def _decodes_or_is_malformed(header: str) -> None:
    names: tuple[HeaderName, HeaderName] = ("payment-signature", "x-payment")
    for name in names:
        with contextlib.suppress(PaymentMalformed):  # anything else fails the test
            decode_payment(header, name)


@given(st.binary(max_size=400).map(lambda raw: raw.decode("latin-1")) | st.text(max_size=400))
@settings(max_examples=300)
def test_any_text_as_header_is_a_payment_or_malformed(header: str) -> None:
    _decodes_or_is_malformed(header)


@given(st.binary(max_size=400))
def test_any_bytes_in_base64_are_a_payment_or_malformed(raw: bytes) -> None:
    _decodes_or_is_malformed(base64.b64encode(raw).decode())


@given(st.text(string.printable, max_size=60) | json_values, paths)
@settings(max_examples=400)
def test_any_value_in_any_place_is_a_payment_or_malformed(value: object, path: str) -> None:
    _decodes_or_is_malformed(header_of(changed(USDC_V2, path, value)))


@given(st.integers(0, 100_000), st.binary(min_size=1, max_size=3))
@settings(max_examples=300)
def test_any_damage_to_a_payment_leaves_a_payment_or_malformed(at: int, damage: bytes) -> None:
    raw = bytearray(json.dumps(USDC_V2).encode())
    raw[at % len(raw) : at % len(raw) + len(damage)] = damage
    _decodes_or_is_malformed(base64.b64encode(raw).decode())
