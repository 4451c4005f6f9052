"""Calls of contracts and the typed data that payers sign, made by eth-abi and eth-account rather than by our own code."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from eth_abi.abi import encode
from eth_abi.grammar import TupleType, parse
from eth_account import Account
from eth_account.datastructures import SignedMessage
from eth_utils.crypto import keccak

from contracts.devnet import Devnet, DevToken, Wallet, receipt, rpc, send_as

ZERO_ADDRESS = "0x" + "00" * 20
ALWAYS = 2**256 - 1


def encoded(signature: str, *arguments: Any) -> str:
    """Calldata in hex for a function in its canonical form, such as ``"settle(((address,uint256),uint256,uint256),…)"``."""
    selector = keccak(text=signature)[:4]
    if not arguments:
        return "0x" + selector.hex()
    parameters = parse(signature[signature.index("(") :])
    assert isinstance(parameters, TupleType)
    types = [component.to_type_str() for component in parameters.components]
    return "0x" + (selector + encode(types, list(arguments))).hex()


def send(chain: Devnet, sender: Wallet, to: str, signature: str, *arguments: Any) -> dict[str, Any]:
    """Send a transaction and return its receipt; raises RpcRefused with the reason if it would revert."""
    sent = send_as(chain.rpc_url, sender.address, to, encoded(signature, *arguments))
    return receipt(chain.rpc_url, sent)


def read(chain: Devnet, to: str, signature: str, *arguments: Any) -> bytes:
    """What a view function returns, undecoded."""
    answer: str = rpc(chain.rpc_url, "eth_call", {"to": to, "data": encoded(signature, *arguments)}, "latest")
    return bytes.fromhex(answer[2:])


def events(mined: dict[str, Any], address: str, signature: str) -> list[dict[str, Any]]:
    """The receipt's logs of one event of one contract."""
    topic = "0x" + keccak(text=signature).hex()
    return [log for log in mined["logs"] if log["address"].lower() == address.lower() and log["topics"][0] == topic]


def selector(signature: str) -> str:
    """How a call of this function begins, or what a revert with this custom error, such as ``"InvalidOwner()"``, returns."""
    return "0x" + keccak(text=signature)[:4].hex()


def now(chain: Devnet) -> int:
    """The time of the latest block, in seconds."""
    return int(rpc(chain.rpc_url, "eth_getBlockByNumber", "latest", False)["timestamp"], 16)


def sign(wallet: Wallet, domain: dict[str, Any], types: dict[str, Any], message: dict[str, Any]) -> SignedMessage:
    """An EIP-712 signature by eth-account."""
    signed: SignedMessage = Account.sign_typed_data(wallet.private_key, domain, types, message)
    return signed


def token_domain(chain: Devnet, token: DevToken) -> dict[str, Any]:
    """A token's EIP-712 domain."""
    return {
        "name": token.name,
        "version": token.version,
        "chainId": chain.chain_id,
        "verifyingContract": token.address,
    }


def _fields(*fields: str) -> list[dict[str, str]]:
    return [dict(zip(("type", "name"), field.split(), strict=True)) for field in fields]


_AUTHORIZATION = _fields(
    "address from", "address to", "uint256 value", "uint256 validAfter", "uint256 validBefore", "bytes32 nonce"
)
_EXACT_WITNESS = _fields("address to", "uint256 validAfter")
_UPTO_WITNESS = _fields("address to", "address facilitator", "uint256 validAfter")


@dataclass(frozen=True, slots=True)
class Authorization:
    """An EIP-3009 authorization in the order of the contract's parameters."""

    payer: str
    to: str
    value: int
    valid_after: int
    valid_before: int
    nonce: bytes

    @property
    def arguments(self) -> tuple[str, str, int, int, int, bytes]:
        return (self.payer, self.to, self.value, self.valid_after, self.valid_before, self.nonce)


def authorization(payer: Wallet, to: str, value: int, **changes: Any) -> Authorization:
    """An authorization that is valid for the next minute, but for the `changes`."""
    terms: dict[str, Any] = {
        "valid_after": 0,
        "valid_before": int(time.time()) + 60,
        "nonce": keccak(text="nonce"),
    } | changes
    return Authorization(payer.address, to, value, **terms)


def sign_authorization(
    chain: Devnet, signer: Wallet, wanted: Authorization, kind: str = "TransferWithAuthorization"
) -> SignedMessage:
    """EIP-3009: ``TransferWithAuthorization`` or ``ReceiveWithAuthorization`` on the chain's USDC."""
    names = [field["name"] for field in _AUTHORIZATION]
    message = dict(zip(names, wanted.arguments, strict=True))
    return sign(signer, token_domain(chain, chain.usdc), {kind: _AUTHORIZATION}, message)


def sign_cancellation(chain: Devnet, signer: Wallet, nonce: bytes) -> SignedMessage:
    """EIP-3009: the signer takes back the authorization with this nonce."""
    return sign(
        signer,
        token_domain(chain, chain.usdc),
        {"CancelAuthorization": _fields("address authorizer", "bytes32 nonce")},
        {"authorizer": signer.address, "nonce": nonce},
    )


def sign_permit(
    chain: Devnet, owner: Wallet, spender: str, value: int, nonce: int, deadline: int = ALWAYS
) -> SignedMessage:
    """EIP-2612: the owner gives the spender an allowance of the chain's USDC."""
    fields = _fields("address owner", "address spender", "uint256 value", "uint256 nonce", "uint256 deadline")
    message = {
        "owner": owner.address,
        "spender": spender,
        "value": value,
        "nonce": nonce,
        "deadline": deadline,
    }
    return sign(owner, token_domain(chain, chain.usdc), {"Permit": fields}, message)


@dataclass(frozen=True, slots=True)
class Permit2Payment:
    """A Permit2 transfer with an x402 witness: `witness` is (to, validAfter), or (to, facilitator, validAfter) for upto."""

    token: str
    amount: int
    nonce: int
    deadline: int
    owner: str
    witness: tuple[Any, ...]

    @property
    def permit(self) -> tuple[tuple[str, int], int, int]:
        return ((self.token, self.amount), self.nonce, self.deadline)


def permit2_payment(
    token: DevToken, payer: Wallet, amount: int, witness: tuple[Any, ...], **changes: Any
) -> Permit2Payment:
    """A payment that is valid for the next minute, but for the `changes`."""
    terms: dict[str, Any] = {"nonce": 7, "deadline": int(time.time()) + 60} | changes
    return Permit2Payment(token.address, amount, owner=payer.address, witness=witness, **terms)


def sign_permit2(chain: Devnet, signer: Wallet, payment: Permit2Payment) -> bytes:
    """The payer's signature for the exact or the upto proxy, whichever the witness belongs to."""
    exact = len(payment.witness) == 2
    witness_fields = _EXACT_WITNESS if exact else _UPTO_WITNESS
    types = {
        "PermitWitnessTransferFrom": _fields(
            "TokenPermissions permitted",
            "address spender",
            "uint256 nonce",
            "uint256 deadline",
            "Witness witness",
        ),
        "TokenPermissions": _fields("address token", "uint256 amount"),
        "Witness": witness_fields,
    }
    message = {
        "permitted": {"token": payment.token, "amount": payment.amount},
        "spender": chain.exact_proxy if exact else chain.upto_proxy,
        "nonce": payment.nonce,
        "deadline": payment.deadline,
        "witness": dict(zip((field["name"] for field in witness_fields), payment.witness, strict=True)),
    }
    domain = {"name": "Permit2", "chainId": chain.chain_id, "verifyingContract": chain.permit2}
    return bytes(sign(signer, domain, types, message).signature)
