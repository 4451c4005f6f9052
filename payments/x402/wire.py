"""Payments as they arrive in a header, and what the answer's header says: x402 v1 and v2.

Decoding is strict: one spelling for every number and address, and every deviation is a `PaymentMalformed` that names the field.
It reads no clock, no chain and no configuration; whether a payment pays for a request is `payments.verification.checks`'s question.

Source: x402 specification v2 (`transports-v2/http.md`, `schemes/exact`), and v1 for clients that still speak it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from payments.chain.networks import PERMIT2_ADDRESS, Token, TransferMethod

HeaderName = Literal["payment-signature", "x-payment"]

_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Requirement:
    """One way to pay: what a 402 offers, and what a v2 payer sends back as `accepted`.

    Addresses are lower-case hex, `amount` is in the token's atomic units, `network` is a CAIP-2 identifier.
    """

    scheme: str
    network: str
    asset: str
    amount: int
    pay_to: str
    max_timeout_s: int
    extra: dict[str, Any]


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
    """A `PermitWitnessTransferFrom` for the x402 exact proxy. Addresses are lower-case hex, times Unix seconds, integers uint256."""

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
class Payment:
    """A decoded payment header."""

    version: int
    """1 or 2."""
    scheme: str
    network: str
    """As the payer wrote it: CAIP-2 in v2, a name such as ``base-sepolia`` in v1."""
    accepted: Requirement | None
    """The offer that the payer chose; v1 does not send it."""
    authorization: Eip3009Authorization | Permit2Authorization
    signature: bytes
    quote_token: str | None
    """Our quote as the payer echoed it; v1 cannot carry it."""
    digest: bytes
    """SHA-256 over the whole payment in canonical JSON: the same payment sent again has the same digest, any other has not."""

    @property
    def payer(self) -> str:
        """Who claims to pay, lower-case hex. Proven only by the signature."""
        return self.authorization.payer

    @property
    def transfer_method(self) -> TransferMethod:
        """How the authorization moves the token."""
        return "permit2" if isinstance(self.authorization, Permit2Authorization) else "eip3009"

    def identity(self, chain_id: int, token: Token) -> str:
        """The name under which this authorization can be used once: chain, verifying contract, payer, nonce as decimal.

        Permit2 counts nonces per owner whatever the token, EIP-3009 per token and payer.
        """
        contract = PERMIT2_ADDRESS if self.transfer_method == "permit2" else token.address
        return f"{chain_id}|{contract}|{self.authorization.payer}|{self.authorization.nonce}"
