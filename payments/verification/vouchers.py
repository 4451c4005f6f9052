"""The EIP-712 digests of payment channels, written out by hand: vouchers, deposits, and what the receiver's side signs.

A voucher is verified without the chain and without the database: two keccaks over a fixed layout and one recovery, so that a
request paid through a channel costs little more than a bare recovery (40 µs).

Source: EIP-712, and the x402 scheme `batch-settlement` on EVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import coincurve

from payments.chain.networks import (
    BATCH_SETTLEMENT_ADDRESS,
    ERC3009_DEPOSIT_COLLECTOR_ADDRESS,
    NOBODY,
    Token,
)
from payments.errors import PaymentError, PaymentRefused
from payments.verification.eip712 import permit2_prefix, token_prefix
from payments.verification.signatures import keccak256, recover
from payments.x402.channels import (
    VOUCHER_SIGNATURE,
    ChannelConfig,
    Erc3009Deposit,
    Permit2Deposit,
    Voucher,
)

_CONFIG = keccak256(
    b"ChannelConfig(address payer,address payerAuthorizer,address receiver,address receiverAuthorizer,address token,"
    b"uint40 withdrawDelay,bytes32 salt)"
)
_VOUCHER = keccak256(b"Voucher(bytes32 channelId,uint128 maxClaimableAmount)")
_REFUND = keccak256(b"Refund(bytes32 channelId,uint256 nonce,uint128 amount)")
_CLAIM_ENTRY_TYPE = b"ClaimEntry(bytes32 channelId,uint128 maxClaimableAmount,uint128 totalClaimed)"
_CLAIM_ENTRY = keccak256(_CLAIM_ENTRY_TYPE)
_CLAIM_BATCH = keccak256(b"ClaimBatch(ClaimEntry[] claims)" + _CLAIM_ENTRY_TYPE)
_RECEIVE_WITH_AUTHORIZATION = keccak256(
    b"ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
)
_TOKEN_PERMISSIONS = keccak256(b"TokenPermissions(address token,uint256 amount)")
_DEPOSIT_WITNESS = keccak256(b"DepositWitness(bytes32 channelId)")
_PERMIT_WITNESS_TRANSFER_FROM = keccak256(
    b"PermitWitnessTransferFrom(TokenPermissions permitted,address spender,uint256 nonce,uint256 deadline,"
    b"DepositWitness witness)DepositWitness(bytes32 channelId)TokenPermissions(address token,uint256 amount)"
)
_DOMAIN = keccak256(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
_ADDRESS_PADDING = bytes(12)


@lru_cache(maxsize=65_536)
def channel_id(config: ChannelConfig, chain_id: int) -> int:
    """The id of a channel on a chain: a bytes32 as a big-endian integer."""
    struct = keccak256(
        b"".join(
            (
                _CONFIG,
                _word(config.payer),
                _word(config.payer_authorizer),
                _word(config.receiver),
                _word(config.receiver_authorizer),
                _word(config.token),
                config.withdraw_delay.to_bytes(32, "big"),
                config.salt.to_bytes(32, "big"),
            )
        )
    )
    return int.from_bytes(keccak256(_prefix(chain_id) + struct), "big")


def voucher_digest(channel: int, amount: int, chain_id: int) -> bytes:
    """The 32 bytes that a channel's payer signs for `amount` atomic units in all."""
    struct = keccak256(_VOUCHER + channel.to_bytes(32, "big") + amount.to_bytes(32, "big"))
    return keccak256(_prefix(chain_id) + struct)


def verify_voucher(voucher: Voucher, payer_authorizer: str, chain_id: int) -> None:
    """Return if a voucher is signed by `payer_authorizer` (lower-case hex).

    Raises:
        PaymentRefused: With the official code if it is not, or only a contract could tell.
    """
    if payer_authorizer == NOBODY:
        raise PaymentRefused(
            VOUCHER_SIGNATURE,
            "vouchers judged by a contract wallet are not taken: open a channel with a payerAuthorizer that has a key",
        )
    try:
        signer = recover(voucher_digest(voucher.channel_id, voucher.amount, chain_id), voucher.signature)
    except PaymentError as error:
        raise PaymentRefused(VOUCHER_SIGNATURE, error.message) from None
    if signer != payer_authorizer:
        raise PaymentRefused(VOUCHER_SIGNATURE, "the voucher is not signed by the channel's payerAuthorizer")


def erc3009_deposit_nonce(channel: int, salt: int) -> int:
    """The EIP-3009 nonce of a deposit: it binds the authorization to the channel."""
    return int.from_bytes(keccak256(channel.to_bytes(32, "big") + salt.to_bytes(32, "big")), "big")


def erc3009_deposit_digest(deposit: Erc3009Deposit, config: ChannelConfig, channel: int, token: Token) -> bytes:
    """The 32 bytes that the payer signs for a deposit by EIP-3009, in the domain of `token`."""
    struct = keccak256(
        b"".join(
            (
                _RECEIVE_WITH_AUTHORIZATION,
                _word(config.payer),
                _word(ERC3009_DEPOSIT_COLLECTOR_ADDRESS),
                deposit.amount.to_bytes(32, "big"),
                deposit.valid_after.to_bytes(32, "big"),
                deposit.valid_before.to_bytes(32, "big"),
                erc3009_deposit_nonce(channel, deposit.salt).to_bytes(32, "big"),
            )
        )
    )
    return keccak256(token_prefix(token) + struct)


def permit2_deposit_digest(deposit: Permit2Deposit, chain_id: int) -> bytes:
    """The 32 bytes that the payer signs for a deposit by Permit2."""
    permitted = keccak256(_TOKEN_PERMISSIONS + _word(deposit.token) + deposit.permitted.to_bytes(32, "big"))
    witness = keccak256(_DEPOSIT_WITNESS + deposit.channel_id.to_bytes(32, "big"))
    struct = keccak256(
        b"".join(
            (
                _PERMIT_WITNESS_TRANSFER_FROM,
                permitted,
                _word(deposit.spender),
                deposit.nonce.to_bytes(32, "big"),
                deposit.deadline.to_bytes(32, "big"),
                witness,
            )
        )
    )
    return keccak256(permit2_prefix(chain_id) + struct)


def claim_batch_digest(entries: Sequence[tuple[int, int, int]], chain_id: int) -> bytes:
    """What the receiver's authorizer signs for a batch of claims: (channel, voucher amount, total claimed) each."""
    hashes = b"".join(
        keccak256(_CLAIM_ENTRY + b"".join(value.to_bytes(32, "big") for value in entry)) for entry in entries
    )
    return keccak256(_prefix(chain_id) + keccak256(_CLAIM_BATCH + keccak256(hashes)))


def refund_digest(channel: int, nonce: int, amount: int, chain_id: int) -> bytes:
    """What the receiver's authorizer signs to give `amount` atomic units back to the payer."""
    struct = keccak256(b"".join((_REFUND, *(value.to_bytes(32, "big") for value in (channel, nonce, amount)))))
    return keccak256(_prefix(chain_id) + struct)


def sign_digest(key: coincurve.PrivateKey, digest: bytes) -> bytes:
    """r, s, v as contracts take them."""
    signature: bytes = key.sign_recoverable(digest, hasher=None)
    return signature[:64] + bytes((signature[64] + 27,))


@lru_cache(maxsize=256)
def _prefix(chain_id: int) -> bytes:
    return b"\x19\x01" + keccak256(
        b"".join(
            (
                _DOMAIN,
                keccak256(b"x402 Batch Settlement"),
                keccak256(b"1"),
                chain_id.to_bytes(32, "big"),
                _word(BATCH_SETTLEMENT_ADDRESS),
            )
        )
    )


def _word(address: str) -> bytes:
    return _ADDRESS_PADDING + bytes.fromhex(address[2:])
