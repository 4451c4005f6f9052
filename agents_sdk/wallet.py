"""The wallet: the one place where the private key is used. It signs payments, sign-in messages and approvals, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount

from agents_sdk.errors import QuoteRejected
from agents_sdk.quotes import Demand, Offer

if TYPE_CHECKING:
    from x402 import x402ClientSync
    from x402.mechanisms.evm.types import TypedDataDomain, TypedDataField
    from x402.schemas import PaymentRequired, PaymentRequirements

PAYMENT_HEADER = "PAYMENT-SIGNATURE"


@dataclass(frozen=True, slots=True)
class SignedPayment:
    """A payment ready to be sent: the header's value, and the Unix second after which it is worth nothing."""

    header: str
    expires_at: int


class Wallet:
    """A key that can pay.

    Args:
        key: A private key (hexadecimal text or bytes) or an eth-account `LocalAccount`.

    Raises:
        ValueError: If it is neither. The message does not repeat it.
    """

    def __init__(self, key: str | bytes | LocalAccount) -> None:
        self._account = key if isinstance(key, LocalAccount) else _account(key)
        self._client: x402ClientSync | None = None

    @property
    def address(self) -> str:
        """The address in its checksummed spelling."""
        return str(self._account.address)

    def __repr__(self) -> str:
        return f"Wallet({self.address})"

    def sign_payment(self, demand: Demand, offer: Offer, identifier: str | None = None) -> SignedPayment:
        """Sign a payment with the official x402 client.

        Args:
            demand: The 402; its extensions (the sealed quote) are echoed.
            offer: The one way to pay that was chosen; the client is shown no other.
            identifier: Our own name for what is paid for, if the gateway knows the extension `payment-identifier`: it takes no
                second payment of that name.

        Raises:
            QuoteRejected: If what was signed is not what was offered, whoever is to blame.
        """
        from x402.http.utils import encode_payment_signature_header

        if self._client is None:
            self._client = _x402_client(self.signer)
        payload = self._client.create_payment_payload(_only(demand.required, offer.requirement, identifier))
        return SignedPayment(encode_payment_signature_header(payload), _expiry(payload.payload, offer))

    @property
    def signer(self) -> Signer:
        """Signs typed data, as the x402 package wants it."""
        return Signer(self._account)

    def sign_message(self, message: str) -> str:
        """Sign a text with `personal_sign` (EIP-191); returns 0x and 65 bytes in hexadecimal."""
        signed = self._account.sign_message(encode_defunct(text=message))
        return "0x" + bytes(signed.signature).hex()

    def sign_transaction(self, transaction: dict[str, Any]) -> str:
        """Sign a transaction; returns the raw bytes in hexadecimal with 0x."""
        signed = self._account.sign_transaction(transaction)
        return "0x" + bytes(signed.raw_transaction).hex()


def _account(key: str | bytes) -> LocalAccount:
    try:
        account: LocalAccount = Account.from_key(key)
    except Exception:  # noqa: BLE001 - whatever the libraries raise may carry the key; it must not travel any further
        account_or_none = None
    else:
        account_or_none = account
    if account_or_none is None:
        raise ValueError("the wallet's private key must be 32 bytes, as 64 hexadecimal digits")
    return account_or_none


class Signer:
    """What the x402 client wants of a wallet. The package's own adapter logs whole payments at debug level; this does not."""

    def __init__(self, account: LocalAccount) -> None:
        self._account = account

    @property
    def address(self) -> str:
        return str(self._account.address)

    def sign_typed_data(
        self,
        domain: TypedDataDomain | dict[str, Any],
        types: dict[str, list[TypedDataField]],
        primary_type: str,
        message: dict[str, Any],
    ) -> bytes:
        if not isinstance(domain, dict):
            domain = {
                "name": domain.name,
                "version": domain.version,
                "chainId": domain.chain_id,
                "verifyingContract": domain.verifying_contract,
            }
        fields = {
            name: [field if isinstance(field, dict) else {"name": field.name, "type": field.type} for field in members]
            for name, members in types.items()
        }
        signed = self._account.sign_typed_data(domain_data=domain, message_types=fields, message_data=message)
        return bytes(signed.signature)


def encoded_payment(
    required: PaymentRequired, requirement: PaymentRequirements, payload: dict[str, Any], identifier: str | None
) -> str:
    """The header of a payment whose payload was signed, as the x402 client would put it together."""
    from x402.http.utils import encode_payment_signature_header
    from x402.schemas import PaymentPayload

    only = _only(required, requirement, identifier)
    return encode_payment_signature_header(
        PaymentPayload(payload=payload, accepted=requirement, resource=only.resource, extensions=only.extensions)
    )


def _only(required: PaymentRequired, requirement: PaymentRequirements, identifier: str | None) -> PaymentRequired:
    """The 402 with one way to pay, and our name for what is paid for in its extensions."""
    from x402.extensions.payment_identifier import append_payment_identifier_to_extensions

    only = required.model_copy(update={"accepts": [requirement]}, deep=True)
    if identifier is not None and only.extensions:
        append_payment_identifier_to_extensions(only.extensions, identifier)
    return only


def _x402_client(signer: Signer) -> x402ClientSync:
    # Imported at the first payment: it takes a second, and an agent may only look at its receipts.
    from x402 import x402ClientSync
    from x402.mechanisms.evm.exact.client import ExactEvmScheme
    from x402.mechanisms.evm.upto import UptoEvmClientScheme

    client = x402ClientSync()
    client.register("eip155:*", ExactEvmScheme(signer))
    client.register("eip155:*", UptoEvmClientScheme(signer))
    # Our policy has decided, with the quote in hand; the client's built-in cap and token list would only second-guess it.
    client.set_spend_controls(False)
    return client


def _expiry(payload: dict[str, Any], offer: Offer) -> int:
    """Read back what was signed: when it expires, after checking that it pays what was agreed to whom."""
    requirement = offer.requirement
    agreed = (requirement.pay_to.lower(), requirement.amount)
    if "authorization" in payload:
        authorization = payload["authorization"]
        signed = (authorization["to"].lower(), authorization["value"])
        expires_at = int(authorization["validBefore"])
    else:
        authorization = payload["permit2Authorization"]
        signed = (authorization["witness"]["to"].lower(), authorization["permitted"]["amount"])
        expires_at = int(authorization["deadline"])
        if authorization["permitted"]["token"].lower() != offer.token.address:
            raise QuoteRejected("the signed payment is in another token than the one agreed")
    if signed != agreed:
        raise QuoteRejected("the signed payment differs from the one agreed")
    return expires_at
