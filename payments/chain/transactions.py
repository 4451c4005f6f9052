"""Transactions and calls as bytes: EIP-1559 signing, and the calldata of the few functions that Farebox calls.

Hand-written because it is small and on the path of every payment: the usual libraries cost milliseconds a transaction and
hundreds of megabytes of imports. Sources: EIP-2718, EIP-1559, the Solidity ABI specification, EIP-3009, Permit2, Multicall3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import coincurve

from payments.chain.networks import EXACT_PERMIT2_PROXY_ADDRESS, MULTICALL3_ADDRESS, UPTO_PERMIT2_PROXY_ADDRESS, Token
from payments.chain.rlp import RlpItem, rlp_decode, rlp_encode
from payments.verification.signatures import ECDSA_BYTES, keccak256
from payments.verification.wallet_signatures import unwrap
from payments.x402.extensions.eip2612 import Eip2612Permit
from payments.x402.wire import Eip3009Authorization, Payment, Permit2Authorization, UptoAuthorization

WORD = 32
SECP256K1_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


# --- EIP-1559 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """What a transaction does: `data` to the contract at `to` (lower-case hex), with `gas` at most."""

    to: str
    data: bytes
    gas: int
    value: int = 0


@dataclass(frozen=True, slots=True)
class Fees:
    """What a transaction pays for a unit of gas, in wei (EIP-1559)."""

    max_fee: int
    priority_fee: int

    def at_least(self, other: Fees) -> Fees:
        """Each fee the greater of the two."""
        return Fees(max(self.max_fee, other.max_fee), max(self.priority_fee, other.priority_fee))

    def at_most(self, cap: Fees) -> Fees:
        """Each fee the lesser of the two; a chain refuses a priority fee above the whole."""
        max_fee = min(self.max_fee, cap.max_fee)
        return Fees(max_fee, min(self.priority_fee, cap.priority_fee, max_fee))

    def raised(self) -> Fees:
        """An eighth more and one wei: nodes replace a pending transaction only for 10 % more in both fees."""
        return Fees(self.max_fee * 9 // 8 + 1, self.priority_fee * 9 // 8 + 1)


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    """A transaction ready to broadcast; `hash` is 0x-prefixed lower-case hex."""

    raw: bytes
    hash: str


def sign_transaction(
    key: coincurve.PrivateKey, *, chain_id: int, nonce: int, call: Call, fees: Fees
) -> SignedTransaction:
    """Sign an EIP-1559 transaction. Deterministic (RFC 6979): the same arguments give the same bytes."""
    fields: list[RlpItem] = [
        chain_id,
        nonce,
        fees.priority_fee,
        fees.max_fee,
        call.gas,
        bytes.fromhex(call.to[2:]),
        call.value,
        call.data,
        (),
    ]
    signature = key.sign_recoverable(keccak256(b"\x02" + rlp_encode(fields)), hasher=None)
    r, s, parity = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big"), signature[64]
    assert s <= SECP256K1_HALF_ORDER  # libsecp256k1 normalises; EIP-2 refuses anything else
    raw = b"\x02" + rlp_encode([*fields, parity, r, s])
    return SignedTransaction(raw, "0x" + keccak256(raw).hex())


def call_of(raw: bytes) -> Call:
    """The call that a transaction signed by `sign_transaction` makes.

    Raises:
        ValueError: These are not the bytes of such a transaction.
    """
    fields = rlp_decode(raw[1:]) if raw[:1] == b"\x02" else b""
    if not isinstance(fields, list) or len(fields) != 12:
        raise ValueError("these are not the bytes of an EIP-1559 transaction")
    gas, to, value, data = fields[4:8]
    return Call("0x" + to.hex(), data, int.from_bytes(gas, "big"), int.from_bytes(value, "big"))


def address_of(key: coincurve.PrivateKey) -> str:
    """The address of a private key, lower-case hex."""
    return "0x" + keccak256(key.public_key.format(compressed=False)[1:])[-20:].hex()


# --- ABI --------------------------------------------------------------------------------------------------------------


def selector(signature: str) -> bytes:
    """The first four bytes of a function's calldata, from its canonical signature such as ``transfer(address,uint256)``."""
    return keccak256(signature.encode())[:4]


def topic(signature: str) -> str:
    """The first topic of an event's logs, from its canonical signature, as 0x-prefixed hex."""
    return "0x" + keccak256(signature.encode()).hex()


def word(value: int) -> bytes:
    """A uint256."""
    return value.to_bytes(WORD, "big")


def address_word(address: str) -> bytes:
    """An address as an ABI word."""
    return bytes.fromhex(address[2:]).rjust(WORD, b"\0")


def address_topic(address: str) -> str:
    """An address as an indexed topic."""
    return "0x" + address[2:].lower().rjust(2 * WORD, "0")


def _tail(data: bytes) -> bytes:
    return word(len(data)) + data + b"\0" * (-len(data) % WORD)


TRANSFER_TOPIC = topic("Transfer(address,address,uint256)")
AUTHORIZATION_USED_TOPIC = topic("AuthorizationUsed(address,bytes32)")
AUTHORIZATION_CANCELED_TOPIC = topic("AuthorizationCanceled(address,bytes32)")
NONCES_INVALIDATED_TOPIC = topic("UnorderedNonceInvalidation(address,uint256,uint256)")
"""Of Permit2: the word of the bitmap, and the bits that were set in it."""

TRANSFER_WITH_AUTHORIZATION = selector(
    "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,uint8,bytes32,bytes32)"
)
_TRANSFER_WITH_AUTHORIZATION_BYTES = selector(
    "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,bytes)"
)
_PROXY_SETTLE = selector("settle(((address,uint256),uint256,uint256),address,(address,uint256),bytes)")
_PROXY_SETTLE_WITH_PERMIT = selector(
    "settleWithPermit((uint256,uint256,bytes32,bytes32,uint8),((address,uint256),uint256,uint256),address,(address,uint256),"
    "bytes)"
)
_UPTO_SETTLE = selector("settle(((address,uint256),uint256,uint256),uint256,address,(address,address,uint256),bytes)")
_UPTO_SETTLE_WITH_PERMIT = selector(
    "settleWithPermit((uint256,uint256,bytes32,bytes32,uint8),((address,uint256),uint256,uint256),uint256,address,"
    "(address,address,uint256),bytes)"
)
_TRANSFER = selector("transfer(address,uint256)")
_BALANCE_OF = selector("balanceOf(address)")
_ALLOWANCE = selector("allowance(address,address)")
_BASIS_POINTS_RATE = selector("basisPointsRate()")
_AUTHORIZATION_STATE = selector("authorizationState(address,bytes32)")
_NONCE_BITMAP = selector("nonceBitmap(address,uint256)")
PERMIT_WORDS = 5
_FACILITATOR_PLACE = 7
"""Of the words that follow the permit, if there is one."""
_PROXY_CALLS = {
    _PROXY_SETTLE: (4, 7),
    _PROXY_SETTLE_WITH_PERMIT: (4 + PERMIT_WORDS * WORD, 7),
    _UPTO_SETTLE: (4, 9),
    _UPTO_SETTLE_WITH_PERMIT: (4 + PERMIT_WORDS * WORD, 9),
}
"""Where the terms of a proxy's call begin, and their words; the offset and the length of the signature follow."""
_AGGREGATE3 = selector("aggregate3((address,bool,bytes)[])")
_ERROR_STRING = selector("Error(string)")
_PANIC = selector("Panic(uint256)")


def encode_transfer_with_authorization(authorization: Eip3009Authorization, signature: bytes) -> bytes:
    """Calldata that executes an EIP-3009 authorization.

    A signature of 65 bytes goes as v, r, s, which every such token takes; any other length is a contract wallet's and goes as
    bytes, which Circle's tokens take since version 2.2.
    """
    terms = b"".join(
        (
            address_word(authorization.payer),
            address_word(authorization.to),
            word(authorization.value),
            word(authorization.valid_after),
            word(authorization.valid_before),
            word(authorization.nonce),
        )
    )
    if len(signature) == ECDSA_BYTES:
        return TRANSFER_WITH_AUTHORIZATION + terms + word(signature[64]) + signature[:64]
    return _TRANSFER_WITH_AUTHORIZATION_BYTES + terms + word(7 * WORD) + _tail(signature)


def encode_proxy_settle(
    authorization: Permit2Authorization, signature: bytes, permit: Eip2612Permit | None = None
) -> bytes:
    """Calldata for the exact proxy's `settle(permit, owner, witness, signature)`; with an EIP-2612 permit for its
    `settleWithPermit`: the allowance and the payment in one."""
    words = 0 if permit is None else PERMIT_WORDS
    return b"".join(
        (
            _PROXY_SETTLE if permit is None else _PROXY_SETTLE_WITH_PERMIT + encode_permit(permit),
            address_word(authorization.token),
            word(authorization.amount),
            word(authorization.nonce),
            word(authorization.deadline),
            address_word(authorization.payer),
            address_word(authorization.to),
            word(authorization.valid_after),
            word((8 + words) * WORD),
            _tail(signature),
        )
    )


def encode_permit(permit: Eip2612Permit) -> bytes:
    """An EIP-2612 permit as the proxies take it: value, deadline, r, s, v."""
    return word(permit.value) + word(permit.deadline) + permit.signature[:64] + word(permit.signature[64])


def encode_upto_settle(
    authorization: UptoAuthorization, signature: bytes, amount: int, permit: Eip2612Permit | None = None
) -> bytes:
    """Calldata for the upto proxy's `settle(permit, amount, owner, witness, signature)`, or with an EIP-2612 permit for its
    `settleWithPermit`, to be called by the facilitator."""
    assert amount <= authorization.amount
    words = 0 if permit is None else PERMIT_WORDS
    return b"".join(
        (
            _UPTO_SETTLE if permit is None else _UPTO_SETTLE_WITH_PERMIT + encode_permit(permit),
            address_word(authorization.token),
            word(authorization.amount),
            word(authorization.nonce),
            word(authorization.deadline),
            word(amount),
            address_word(authorization.payer),
            address_word(authorization.to),
            address_word(authorization.facilitator),
            word(authorization.valid_after),
            word((10 + words) * WORD),
            _tail(signature),
        )
    )


def upto_facilitator(data: bytes) -> str:
    """Who alone can make a call that `encode_upto_settle` made, lower-case hex."""
    permit_words = PERMIT_WORDS if has_permit(data) else 0
    return f"0x{uint_at(data, 4 + (permit_words + _FACILITATOR_PLACE) * WORD):040x}"


def proxy_terms(data: bytes) -> bytes | None:
    """What a call of one of the proxies pays, to whom and by which nonce: neither the signature, which has several spellings,
    nor the permit that may precede it. None if the calldata is of no such call."""
    if data[:4] not in _PROXY_CALLS:
        return None
    start, words = _PROXY_CALLS[data[:4]]
    return data[start : start + words * WORD]


def settle_call(
    payment: Payment, token: Token, *, deploy: bool = False, amount: int | None = None
) -> tuple[str, bytes]:
    """The contract and the calldata that execute a payment: what is simulated, and what is then broadcast.

    Args:
        payment: Its signature may be wrapped (ERC-6492).
        token: What it pays in.
        deploy: The payer has no code yet: if its signature says how to deploy it, that is done first. Both or nothing: a
            transfer that fails takes the deployment back.
        amount: Of `upto`, what is taken, in atomic units; None for all that may be. Only the facilitator can call it.
    """
    if isinstance(payment.authorization, UptoAuthorization):
        taken = payment.authorization.amount if amount is None else amount
        data = encode_upto_settle(payment.authorization, payment.signature, taken, payment.permit)
        return UPTO_PERMIT2_PROXY_ADDRESS, data
    signature, deployment = unwrap(payment.signature)
    if isinstance(payment.authorization, Permit2Authorization):
        data = encode_proxy_settle(payment.authorization, signature, payment.permit)
        call = EXACT_PERMIT2_PROXY_ADDRESS, data
    else:
        call = token.address, encode_transfer_with_authorization(payment.authorization, signature)
    if deployment is None or not deploy:
        return call
    calls = [(deployment.factory, deployment.data), call]
    return MULTICALL3_ADDRESS, encode_aggregate3(calls, last_must_succeed=True)


def has_wallet_signature(data: bytes) -> bool:
    """Whether the calldata of a payment carries a signature of another form than a key's."""
    if data[:4] in _PROXY_CALLS:
        start, words = _PROXY_CALLS[data[:4]]
        return uint_at(data, start + (words + 1) * WORD) != ECDSA_BYTES
    return data[:4] == _TRANSFER_WITH_AUTHORIZATION_BYTES


def has_permit(data: bytes) -> bool:
    """Whether the calldata of a payment carries an EIP-2612 permit."""
    return data[:4] in (_PROXY_SETTLE_WITH_PERMIT, _UPTO_SETTLE_WITH_PERMIT)


def last_call(call_to: str, call_data: bytes) -> tuple[str, bytes]:
    """What `settle_call` executes last: the payment itself, whether or not a deployment precedes it."""
    if call_to != MULTICALL3_ADDRESS:
        return call_to, call_data
    calls = call_data[4 + 2 * WORD :]
    entry = uint_at(calls, WORD)  # of the second of two
    length_at = entry + uint_at(calls, entry + 2 * WORD)
    content = length_at + WORD
    target = calls[entry + 12 : entry + WORD]
    return "0x" + target.hex(), calls[content : content + uint_at(calls, length_at)]


def encode_transfer(to: str, value: int) -> bytes:
    """Calldata of ERC-20 `transfer`."""
    return _TRANSFER + address_word(to) + word(value)


def encode_balance_of(owner: str) -> bytes:
    """Calldata of ERC-20 `balanceOf`."""
    return _BALANCE_OF + address_word(owner)


def encode_allowance(owner: str, spender: str) -> bytes:
    """Calldata of ERC-20 `allowance`."""
    return _ALLOWANCE + address_word(owner) + address_word(spender)


def encode_basis_points_rate() -> bytes:
    """Calldata of `basisPointsRate`: the fee that Tether's contracts take of a transfer, once its switch is on."""
    return _BASIS_POINTS_RATE


def encode_authorization_state(payer: str, nonce: int) -> bytes:
    """Calldata of EIP-3009 `authorizationState`: true once the nonce is used or cancelled."""
    return _AUTHORIZATION_STATE + address_word(payer) + word(nonce)


def encode_nonce_bitmap(owner: str, nonce: int) -> bytes:
    """Calldata of Permit2's `nonceBitmap` for the word that holds `nonce`; see `nonce_is_set`."""
    return _NONCE_BITMAP + address_word(owner) + word(nonce >> 8)


def nonce_is_set(bitmap: int, nonce: int) -> bool:
    """Whether a Permit2 nonce is consumed, given its word of the bitmap."""
    return bool(bitmap >> (nonce & 0xFF) & 1)


def encode_aggregate3(calls: Sequence[tuple[str, bytes]], *, last_must_succeed: bool = False) -> bytes:
    """Calldata of Multicall3's `aggregate3` in which every call may fail by itself, or every one but the last."""
    heads, tails, offset = [], [], len(calls) * WORD
    for number, (target, data) in enumerate(calls, 1):
        may_fail = number < len(calls) or not last_must_succeed
        tail = address_word(target) + word(may_fail) + word(3 * WORD) + _tail(data)
        heads.append(word(offset))
        tails.append(tail)
        offset += len(tail)
    return b"".join((_AGGREGATE3, word(WORD), word(len(calls)), *heads, *tails))


def decode_aggregate3(data: bytes, count: int) -> list[tuple[bool, bytes]]:
    """The (success, return data) of each of `count` calls.

    Raises:
        ValueError: If the bytes are not such an answer, as from a chain without Multicall3.
    """
    if uint_at(data, 0) != WORD or uint_at(data, WORD) != count:
        raise ValueError("this is not Multicall3's answer")
    start, results = 2 * WORD, []
    for index in range(count):
        entry = start + uint_at(data, start + index * WORD)
        content = entry + uint_at(data, entry + WORD)
        length = uint_at(data, content)
        if content + WORD + length > len(data):
            raise ValueError("Multicall3's answer is cut short")
        results.append((uint_at(data, entry) == 1, data[content + WORD : content + WORD + length]))
    return results


def uint_at(data: bytes, at: int) -> int:
    """The word that begins at a byte.

    Raises:
        ValueError: The bytes end before it does.
    """
    if at + WORD > len(data):
        raise ValueError("an ABI answer is cut short")
    return int.from_bytes(data[at : at + WORD], "big")


def decode_revert(data: bytes) -> str:
    """What a reverted call says for itself, for people: its message, panic code, or error selector."""
    try:
        if data[:4] == _ERROR_STRING:
            length = uint_at(data, 4 + WORD)
            return data[4 + 2 * WORD : 4 + 2 * WORD + length][:200].decode("utf-8", "replace")
        if data[:4] == _PANIC:
            return f"panic {uint_at(data, 4):#x}"
    except ValueError:
        return "a malformed revert"
    return f"error 0x{data[:4].hex()}" if data else "reverted without a reason"
