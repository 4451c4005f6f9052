"""Quotes: their totals, and the tokens that carry them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from payments.quotes import (
    ROUTE_CANDIDATES_MAX,
    QuoteInvalid,
    QuoteSealer,
    make_quote,
    request_digest,
    route_mark,
)
from tests.payments.x402_samples import AMOUNT_NANO_USD, NOW, quote_for

SEALER = QuoteSealer(b"s" * 32)
DIGEST = request_digest("POST", "/v1/chat/completions", b'{"model":"auto"}')


def open_code(token: str, *, amount: int = AMOUNT_NANO_USD, digest: bytes = DIGEST, now: int = NOW) -> str:
    with pytest.raises(QuoteInvalid) as refusal:
        SEALER.open(token, amount_nano_usd=amount, request_digest=digest, now=now)
    assert refusal.value.status == 402
    return refusal.value.code


def test_an_opened_token_says_what_was_quoted() -> None:
    quote = quote_for(DIGEST)
    claim = QuoteSealer(b"s" * 32).open(  # another replica with the same secret
        SEALER.seal(quote), amount_nano_usd=AMOUNT_NANO_USD, request_digest=DIGEST, now=NOW
    )
    assert claim.id == quote.id
    assert claim.expires_at == quote.expires_at
    assert claim.route_marks == tuple(route_mark(candidate) for candidate in quote.route)


@given(
    inference=st.integers(0, 10**15),
    fee=st.integers(0, 10**12),
    minimum=st.integers(0, 10**12),
    route=st.lists(st.text(), max_size=ROUTE_CANDIDATES_MAX).map(tuple),
    digest=st.binary(min_size=32, max_size=32),
    expires_at=st.integers(0, 2**32 - 1),
)
def test_every_quote_that_can_be_made_survives_its_token(
    inference: int, fee: int, minimum: int, route: tuple[str, ...], digest: bytes, expires_at: int
) -> None:
    quote = make_quote(
        inference_nano_usd=inference,
        network_fee_nano_usd=fee,
        minimum_nano_usd=minimum,
        route=route,
        request_digest=digest,
        expires_at=expires_at,
    )
    assert quote.maximum_nano_usd >= max(inference + fee, minimum)
    assert quote.maximum_nano_usd % 1_000 == 0
    claim = SEALER.open(
        SEALER.seal(quote), amount_nano_usd=quote.maximum_nano_usd, request_digest=digest, now=expires_at
    )
    assert (claim.id, claim.expires_at, len(claim.route_marks)) == (quote.id, expires_at, len(route))


def test_a_quote_holds_to_the_last_second() -> None:
    token = SEALER.seal(quote_for(DIGEST))
    SEALER.open(token, amount_nano_usd=AMOUNT_NANO_USD, request_digest=DIGEST, now=NOW + 300)
    assert open_code(token, now=NOW + 301) == "quote_expired"


def test_a_quote_is_for_one_request_and_one_amount() -> None:
    token = SEALER.seal(quote_for(DIGEST))
    for method, path, body in (
        ("GET", "/v1/chat/completions", b'{"model":"auto"}'),
        ("POST", "/v1/completions", b'{"model":"auto"}'),
        ("POST", "/v1/chat/completions", b'{"model":"auto"} '),
    ):
        assert open_code(token, digest=request_digest(method, path, body)) == "quote_mismatch"
    for amount in (
        AMOUNT_NANO_USD - 1_000,
        AMOUNT_NANO_USD + 1_000,
        AMOUNT_NANO_USD + 1,
        0,
        2**256 - 1,
        2**300 * 1_000,
    ):
        assert open_code(token, amount=amount) == "quote_mismatch"


def test_a_quote_of_another_gateway_is_refused() -> None:
    assert open_code(QuoteSealer(b"t" * 32).seal(quote_for(DIGEST))) == "quote_mismatch"


@pytest.mark.parametrize(
    "change",
    [
        lambda quote: replace(quote, id="quote_" + "0" * 20),
        lambda quote: replace(quote, expires_at=quote.expires_at + 1),
        lambda quote: replace(quote, route=(*quote.route, "model-c@three")),
        lambda quote: replace(quote, route=quote.route[::-1]),
        lambda quote: replace(quote, route=()),
    ],
    ids=["id", "expiry", "longer-route", "turned-route", "no-route"],
)
def test_the_tag_of_one_quote_does_not_fit_another(change: Callable[..., object]) -> None:
    quote = quote_for(DIGEST)
    tag = _raw(SEALER.seal(quote))[-16:]
    other = _raw(SEALER.seal(change(quote)))  # type: ignore[arg-type]
    assert open_code(_token(other[:-16] + tag)) == "quote_mismatch"


def test_any_changed_bit_is_noticed() -> None:
    raw = _raw(SEALER.seal(quote_for(DIGEST)))
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        # The version byte is read first; all the rest is the tag's business.
        assert open_code(_token(bytes(changed))) == ("quote_malformed" if bit < 8 else "quote_mismatch")


@given(st.text() | st.binary().map(lambda raw: _token(raw)))
def test_a_text_that_is_no_token_is_refused_and_nothing_else(text: str) -> None:
    assert open_code(text) in {"quote_malformed", "quote_mismatch"}


def test_a_token_has_one_spelling() -> None:
    token = SEALER.seal(quote_for(DIGEST, route=("a@b",)))
    assert len(_raw(token)) % 3 != 0, "the last character has unused bits"
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(token[-1])
    for spelling in (token[:-1] + alphabet[last ^ 1], token + "=", token + "\n", " " + token, token + "A"):
        assert open_code(spelling) == "quote_malformed"


def test_a_long_route_is_cut_to_keep_the_token_short() -> None:
    quote = quote_for(DIGEST, route=tuple(f"model-{n}@provider" for n in range(100)))
    token = SEALER.seal(quote)
    claim = SEALER.open(token, amount_nano_usd=AMOUNT_NANO_USD, request_digest=DIGEST, now=NOW)
    assert claim.route_marks == tuple(route_mark(candidate) for candidate in quote.route[:ROUTE_CANDIDATES_MAX])
    assert len(token) <= 180


def test_request_digests_differ_wherever_requests_do() -> None:
    requests = [
        ("POST", "/a", b"b"),
        ("POST", "/ab", b""),
        ("POST", "/a", b""),
        ("POST", "/a\nb", b""),
        ("POST", "/a", b"\nb"),
        ("PUT", "/a", b"b"),
    ]
    assert len({request_digest(*request) for request in requests}) == len(requests)
    assert request_digest("post", "/a", b"b") == request_digest("POST", "/a", b"b")


def _raw(token: str) -> bytes:
    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))


def _token(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
