"""Payments as they arrive in a header, x402 v1 and v2; the one module to import for all that goes over the wire.

Decoding is strict: one spelling for every number and address, and every deviation is a `PaymentMalformed` that names the field.
It reads no clock, no chain and no configuration; whether a payment pays for a request is for `payments.verification.checks`.

Source: x402 specification v2 (`transports-v2/http.md`, `schemes/exact`), and v1 for clients that still speak it.
"""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson

from payments.chain.networks import PERMIT2_ADDRESS, Token, TransferMethod
from payments.errors import PaymentMalformed
from payments.x402.answers import QUOTE_EXTENSION, PaymentRequiredAnswer, payment_required, payment_response
from payments.x402.channels import decode_channel_payment
from payments.x402.extensions import eip2612, erc20_approval, identifier
from payments.x402.fields import (
    is_deeper_than,
    read_address,
    read_bytes32,
    read_members,
    read_object,
    read_seconds,
    read_signature,
    read_text,
    read_uint256,
)
from payments.x402.headers import PaymentHeader
from payments.x402.requirements import Requirement, requirement_for

__all__ = [
    "Eip3009Authorization",
    "HeaderName",
    "Payment",
    "PaymentHeader",
    "PaymentRequiredAnswer",
    "Permit2Authorization",
    "Requirement",
    "UptoAuthorization",
    "decode_payment",
    "payment_required",
    "payment_response",
    "read_payment",
    "read_requirement",
    "requirement_for",
]

HeaderName = Literal["payment-signature", "x-payment"]

HEADER_CHARACTERS_MAX = 16_384
JSON_DEPTH_MAX = 16
"""The deepest part that stock clients send, a schema echoed within `extensions`, is about half of it."""
QUOTE_TOKEN_CHARACTERS_MAX = 512

OFFER_RECEIPT = "offer-receipt"

_INT64_MAX = 2**63 - 1
_VERSIONS: dict[HeaderName, int] = {"payment-signature": 2, "x-payment": 1}
_EIP3009_PAYLOAD = frozenset({"authorization", "signature"})
_EIP3009_MEMBERS = frozenset({"from", "to", "value", "validAfter", "validBefore", "nonce"})
_PERMIT2_PAYLOAD = frozenset({"permit2Authorization", "signature"})
_PERMIT2_MEMBERS = frozenset({"from", "permitted", "spender", "nonce", "deadline", "witness"})
_PERMITTED_MEMBERS = frozenset({"token", "amount"})
_WITNESS_MEMBERS = frozenset({"to", "validAfter"})
_UPTO_WITNESS_MEMBERS = _WITNESS_MEMBERS | {"facilitator"}


@dataclass(frozen=True, slots=True)
class Eip3009Authorization:
    """A `TransferWithAuthorization` (EIP-3009). Addresses are lower-case hex, times Unix seconds, all integers uint256."""

    payer: str
    to: str
    value: int
    valid_after: int
    valid_before: int
    nonce: int
    """The bytes32 nonce as a big-endian integer."""

    @property
    def recipient(self) -> str:
        """Who is paid."""
        return self.to

    @property
    def expires_at(self) -> int:
        """`valid_before`, cut to 64 bits so that a far-away one fits a database column."""
        return min(self.valid_before, _INT64_MAX)


@dataclass(frozen=True, slots=True)
class Permit2Authorization:
    """A `PermitWitnessTransferFrom` (Permit2). Addresses are lower-case hex, times Unix seconds, integers uint256.

    `amount` and `token` are the permission's, `to` and `valid_after` the witness's.
    """

    payer: str
    token: str
    amount: int
    spender: str
    nonce: int
    deadline: int
    to: str
    valid_after: int

    @property
    def value(self) -> int:
        """What is paid, in atomic units."""
        return self.amount

    @property
    def recipient(self) -> str:
        """Who is paid (the witness)."""
        return self.to

    @property
    def expires_at(self) -> int:
        """`deadline`, cut to 64 bits so that a far-away one fits a database column."""
        return min(self.deadline, _INT64_MAX)


@dataclass(frozen=True, slots=True)
class UptoAuthorization(Permit2Authorization):
    """The same for the scheme `upto`: `amount` is the most that may be taken, and only `facilitator` may take it."""

    facilitator: str


@dataclass(frozen=True, slots=True)
class Payment(PaymentHeader):
    """A payment that is one signed transfer."""

    authorization: Eip3009Authorization | Permit2Authorization
    signature: bytes

    @property
    def payer(self) -> str:
        """Who claims to pay, lower-case hex. Proven only by the signature."""
        return self.authorization.payer

    @property
    def transfer_method(self) -> TransferMethod:
        """How the authorization moves the token."""
        return "permit2" if isinstance(self.authorization, Permit2Authorization) else "eip3009"

    @property
    def token_address(self) -> str | None:
        """As for any payment; a Permit2 authorization names the token by itself, EIP-3009 over v1 does not."""
        if self.accepted is not None:
            return self.accepted.asset
        return self.authorization.token if isinstance(self.authorization, Permit2Authorization) else None

    def identity(self, chain_id: int, token: Token) -> str:
        """The name under which this authorization can be used once: chain, verifying contract, payer, nonce as decimal.

        Permit2 counts nonces per owner whatever the token, EIP-3009 per token and payer.
        """
        contract = PERMIT2_ADDRESS if self.transfer_method == "permit2" else token.address
        return f"{chain_id}|{contract}|{self.authorization.payer}|{self.authorization.nonce}"


Decode = Callable[[PaymentHeader, dict[str, Any]], PaymentHeader]
"""Reads the scheme's own part, `payload`, into the scheme's own kind of payment."""


def decode_payment(header: str, header_name: HeaderName) -> PaymentHeader:
    """Read the value of a payment header.

    Args:
        header: The header's value: base64 (standard alphabet, padded) of a JSON object.
        header_name: ``payment-signature`` carries x402 v2, ``x-payment`` v1.

    Returns:
        The payment, of which nothing has been verified but its form.

    Raises:
        PaymentMalformed: With the code ``header_too_long``, ``malformed_base64``, ``malformed_json``, ``unsupported_version``,
            ``unsupported_scheme`` or ``malformed_payment``, the message naming the field.
    """
    document = _read_document(header, header_name)
    version = document.get("x402Version")
    if type(version) is not int or version != _VERSIONS[header_name]:
        raise PaymentMalformed(
            "unsupported_version", f"x402Version must be {_VERSIONS[header_name]} in {header_name.upper()}"
        )
    return read_payment(document, version)


def read_payment(document: dict[str, Any], version: int, decoders: Mapping[str, Decode] | None = None) -> PaymentHeader:
    """Read a payment that is JSON already, as in a call of a facilitator.

    Args:
        document: The payment, nested no deeper than `JSON_DEPTH_MAX`.
        version: Which x402 it is in, 1 or 2.
        decoders: What reads each scheme's part; `SCHEMES` unless given.

    Raises:
        PaymentMalformed: As for `decode_payment`.
    """
    accepted = None if version == 1 else read_requirement(document.get("accepted"), "accepted")
    scheme = read_text(document.get("scheme"), "scheme") if accepted is None else accepted.scheme
    network = read_text(document.get("network"), "network") if accepted is None else accepted.network
    decoders = SCHEMES if decoders is None else decoders
    decode = decoders.get(scheme)
    if decode is None or (version == 1 and scheme != "exact"):
        known = sorted(decoders) if version == 2 else ["exact"]
        raise PaymentMalformed("unsupported_scheme", f"the scheme must be one of: {', '.join(known)}")
    envelope = PaymentHeader(
        version=version,
        scheme=scheme,
        network=network,
        accepted=accepted,
        quote_token=None if version == 1 else _read_quote_token(document.get("extensions")),
        digest=hashlib.sha256(orjson.dumps(document, option=orjson.OPT_SORT_KEYS)).digest(),
    )
    payment = decode(envelope, read_object(document.get("payload"), "payload"))
    extensions = document.get("extensions")
    if version == 1 or not isinstance(extensions, dict):
        return payment
    return replace(
        payment,
        identifier=identifier.read(extensions),
        wants_receipt=OFFER_RECEIPT in extensions,
        permit=eip2612.read(extensions),
        approval=erc20_approval.read(extensions),
    )


def _read_document(header: str, header_name: HeaderName) -> dict[str, Any]:
    if len(header) > HEADER_CHARACTERS_MAX:
        raise PaymentMalformed(
            "header_too_long", f"{header_name.upper()} must not exceed {HEADER_CHARACTERS_MAX} characters"
        )
    try:
        raw = binascii.a2b_base64(header, strict_mode=True)
    except ValueError as error:  # binascii.Error, or a character outside ASCII
        raise PaymentMalformed(
            "malformed_base64", f"{header_name.upper()} must be standard base64 with padding"
        ) from error
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise PaymentMalformed("malformed_json", f"{header_name.upper()} must be base64 of UTF-8 JSON") from error
    if is_deeper_than(document, JSON_DEPTH_MAX):
        raise PaymentMalformed(
            "malformed_json", f"{header_name.upper()} must not nest deeper than {JSON_DEPTH_MAX} levels"
        )
    return read_object(document, header_name.upper())


def read_requirement(value: object, field: str) -> Requirement:
    """A v2 requirement; `field` is its name for errors.

    Raises:
        PaymentMalformed: ``malformed_payment``, naming the member.
    """
    members = read_object(value, field)
    extra = members.get("extra")
    return Requirement(
        scheme=read_text(members.get("scheme"), f"{field}.scheme"),
        network=read_text(members.get("network"), f"{field}.network"),
        asset=read_address(members.get("asset"), f"{field}.asset"),
        amount=read_uint256(members.get("amount"), f"{field}.amount"),
        pay_to=read_address(members.get("payTo"), f"{field}.payTo"),
        max_timeout_s=read_seconds(members.get("maxTimeoutSeconds"), f"{field}.maxTimeoutSeconds"),
        extra={} if extra is None else read_object(extra, f"{field}.extra"),
    )


def _decode_exact(header: PaymentHeader, payload: dict[str, Any]) -> Payment:
    authorization: Eip3009Authorization | Permit2Authorization
    if "permit2Authorization" in payload:
        payload = read_members(payload, "payload", _PERMIT2_PAYLOAD)
        authorization = _read_permit2(payload["permit2Authorization"], "payload.permit2Authorization")
    else:
        payload = read_members(payload, "payload", _EIP3009_PAYLOAD)
        authorization = _read_eip3009(payload["authorization"], "payload.authorization")
    return _signed(header, authorization, payload)


def _decode_upto(header: PaymentHeader, payload: dict[str, Any]) -> Payment:
    payload = read_members(payload, "payload", _PERMIT2_PAYLOAD)
    return _signed(header, _read_upto(payload["permit2Authorization"], "payload.permit2Authorization"), payload)


def _signed(
    header: PaymentHeader, authorization: Eip3009Authorization | Permit2Authorization, payload: dict[str, Any]
) -> Payment:
    return Payment(
        version=header.version,
        scheme=header.scheme,
        network=header.network,
        accepted=header.accepted,
        quote_token=header.quote_token,
        digest=header.digest,
        authorization=authorization,
        signature=read_signature(payload["signature"], "payload.signature"),
    )


SCHEMES: dict[str, Decode] = {
    "exact": _decode_exact,
    "upto": _decode_upto,
    "batch-settlement": decode_channel_payment,
}
"""The schemes that can be read, by name. v1 knows ``exact`` only."""


def _read_eip3009(value: object, field: str) -> Eip3009Authorization:
    members = read_members(value, field, _EIP3009_MEMBERS)
    return Eip3009Authorization(
        payer=read_address(members["from"], f"{field}.from"),
        to=read_address(members["to"], f"{field}.to"),
        value=read_uint256(members["value"], f"{field}.value"),
        valid_after=read_uint256(members["validAfter"], f"{field}.validAfter"),
        valid_before=read_uint256(members["validBefore"], f"{field}.validBefore"),
        nonce=read_bytes32(members["nonce"], f"{field}.nonce"),
    )


def _read_permit2(value: object, field: str) -> Permit2Authorization:
    terms, _ = _read_permit2_terms(value, field, _WITNESS_MEMBERS)
    return Permit2Authorization(**terms)


def _read_upto(value: object, field: str) -> UptoAuthorization:
    terms, witness = _read_permit2_terms(value, field, _UPTO_WITNESS_MEMBERS)
    return UptoAuthorization(**terms, facilitator=read_address(witness["facilitator"], f"{field}.witness.facilitator"))


def _read_permit2_terms(
    value: object, field: str, witness_members: frozenset[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every `Permit2Authorization` has, and the witness for more."""
    members = read_members(value, field, _PERMIT2_MEMBERS)
    permitted = read_members(members["permitted"], f"{field}.permitted", _PERMITTED_MEMBERS)
    witness = read_members(members["witness"], f"{field}.witness", witness_members)
    terms = {
        "payer": read_address(members["from"], f"{field}.from"),
        "token": read_address(permitted["token"], f"{field}.permitted.token"),
        "amount": read_uint256(permitted["amount"], f"{field}.permitted.amount"),
        "spender": read_address(members["spender"], f"{field}.spender"),
        "nonce": read_uint256(members["nonce"], f"{field}.nonce"),
        "deadline": read_uint256(members["deadline"], f"{field}.deadline"),
        "to": read_address(witness["to"], f"{field}.witness.to"),
        "valid_after": read_uint256(witness["validAfter"], f"{field}.witness.validAfter"),
    }
    return terms, witness


def _read_quote_token(extensions: object) -> str | None:
    """The quote that came with the 402, if the client echoed it. Other parties' extensions are none of our business."""
    if extensions is None:
        return None
    ours = read_object(extensions, "extensions").get(QUOTE_EXTENSION)
    if ours is None:
        return None
    field = f"extensions.{QUOTE_EXTENSION}"
    return read_text(read_object(ours, field).get("quote"), f"{field}.quote", QUOTE_TOKEN_CHARACTERS_MAX)
