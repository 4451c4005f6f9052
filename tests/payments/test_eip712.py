"""Digests and recovery against eth-account, an implementation that shares no code with ours."""

from __future__ import annotations

from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import _hash_eip191_message, encode_typed_data
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from payments.chain.networks import KNOWN_NETWORKS, Token
from payments.errors import PaymentMalformed, PaymentRefused
from payments.verification.eip712 import (
    eip3009_digest,
    permit2_domain_separator,
    permit2_exact_digest,
    token_domain_separator,
)
from payments.verification.signatures import checksum_address, keccak256, recover
from payments.x402.wire import Eip3009Authorization, Permit2Authorization
from tests.payments.x402_samples import USDC, eip3009_message, permit2_message

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

addresses = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
uint256 = st.integers(0, 2**256 - 1)
tokens = st.builds(
    Token,
    symbol=st.just("T"),
    chain_id=st.integers(1, 2**63),
    address=addresses,
    decimals=st.just(6),
    transfer_method=st.just("eip3009"),
    domain_name=st.text(st.characters(codec="utf-8"), max_size=40),
    domain_version=st.text(st.characters(codec="utf-8"), max_size=5),
)
eip3009 = st.builds(Eip3009Authorization, addresses, addresses, uint256, uint256, uint256, uint256)
permit2 = st.builds(
    Permit2Authorization, addresses, addresses, uint256, addresses, uint256, uint256, addresses, uint256
)
keys = st.integers(1, ORDER - 1)
SIGNED = keccak256(b"something signed")
SIGNATURE = bytes(Account.unsafe_sign_hash(SIGNED, "0x" + "22" * 32).signature)


@given(eip3009, tokens, keys)
@settings(max_examples=60, deadline=None)
def test_eip3009_digest_and_signer_are_those_of_eth_account(
    authorization: Eip3009Authorization, token: Token, key: int
) -> None:
    message = eip3009_message(
        {
            "from": authorization.payer,
            "to": authorization.to,
            "value": str(authorization.value),
            "validAfter": str(authorization.valid_after),
            "validBefore": str(authorization.valid_before),
            "nonce": f"0x{authorization.nonce:064x}",
        },
        token,
    )
    _same_digest_and_signer(eip3009_digest(authorization, token), message, key)


@given(permit2, st.integers(1, 2**63), keys)
@settings(max_examples=60, deadline=None)
def test_permit2_digest_and_signer_are_those_of_eth_account(
    authorization: Permit2Authorization, chain_id: int, key: int
) -> None:
    message = permit2_message(
        {
            "permitted": {"token": authorization.token, "amount": str(authorization.amount)},
            "spender": authorization.spender,
            "nonce": str(authorization.nonce),
            "deadline": str(authorization.deadline),
            "witness": {"to": authorization.to, "validAfter": str(authorization.valid_after)},
        },
        chain_id,
    )
    _same_digest_and_signer(permit2_exact_digest(authorization, chain_id), message, key)


def _same_digest_and_signer(digest: bytes, message: Any, key: int) -> None:
    assert digest == bytes(_hash_eip191_message(message))
    account = Account.from_key(key.to_bytes(32, "big"))
    signature = bytes(account.sign_message(message).signature)
    assert recover(digest, signature) == account.address.lower()


def test_domain_separators_are_those_of_eth_account_for_every_known_token() -> None:
    for network in KNOWN_NETWORKS.values():
        for token in network.tokens:
            domain = {
                "name": token.domain_name,
                "version": token.domain_version,
                "chainId": token.chain_id,
                "verifyingContract": token.address,
            }
            assert token_domain_separator(token) == encode_typed_data(domain, {"A": []}, {}).header


def test_permit2_domain_separator_is_the_one_deployed_on_ethereum() -> None:
    # `DOMAIN_SEPARATOR()` of 0x000000000022D473030F116dDEE9F6B43aC78BA3 on chain 1.
    assert permit2_domain_separator(1).hex() == "866a5aba21966af95d6c7ab78eb2b2fc913915c28be3b9aa07cc04ff903e3f28"


@pytest.mark.parametrize("v", [0, 1, 2, 26, 29, 30, 255])
def test_v_is_27_or_28(v: int) -> None:
    assert _refusal(SIGNATURE[:64] + bytes([v])) == "bad_signature"


def test_v_does_not_reach_points_whose_x_lies_beyond_the_order() -> None:
    # v = 29 and 30 mean x = r + order, which is a point for about half of these r; Ethereum does not take them.
    for r in range(1, 12):
        for v in (29, 30):
            assert _refusal(r.to_bytes(32, "big") + SIGNATURE[32:64] + bytes([v])) == "bad_signature"


def test_the_mirrored_signature_is_refused() -> None:
    s = int.from_bytes(SIGNATURE[32:64], "big")
    mirrored = SIGNATURE[:32] + (ORDER - s).to_bytes(32, "big") + bytes([55 - SIGNATURE[64]])
    assert _refusal(mirrored) == "bad_signature"


@pytest.mark.parametrize("number", [0, ORDER, ORDER + 1, 2**256 - 1])
@pytest.mark.parametrize("at", [0, 32])
def test_r_and_s_are_within_the_order(number: int, at: int) -> None:
    signature = SIGNATURE[:at] + number.to_bytes(32, "big") + SIGNATURE[at + 32 :]
    assert _refusal(signature) == "bad_signature"


def test_the_largest_low_s_is_accepted_and_the_next_one_is_not() -> None:
    half = ORDER // 2
    recover(SIGNED, SIGNATURE[:32] + half.to_bytes(32, "big") + SIGNATURE[64:])
    assert _refusal(SIGNATURE[:32] + (half + 1).to_bytes(32, "big") + SIGNATURE[64:]) == "bad_signature"


def test_lengths_other_than_an_ecdsa_signatures_are_told_apart() -> None:
    with pytest.raises(PaymentMalformed) as malformed:
        recover(SIGNED, SIGNATURE[:64])
    assert malformed.value.code == "malformed_signature"
    for length in (66, 130, 4096):
        assert _refusal(SIGNATURE.ljust(length, b"\0")) == "bad_signature"


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=80))
def test_arbitrary_signatures_raise_nothing_but_payment_errors(digest: bytes, signature: bytes) -> None:
    try:
        address = recover(digest, signature)
    except (PaymentMalformed, PaymentRefused):
        return
    assert len(address) == 42
    assert address == address.lower()


@given(st.binary(), addresses)
def test_keccak_and_checksums_are_those_of_eth_utils(data: bytes, address: str) -> None:
    assert keccak256(data) == keccak(data)
    assert checksum_address(address) == to_checksum_address(address)


def test_the_digest_is_in_the_tokens_own_domain() -> None:
    authorization = Eip3009Authorization("0x" + "1" * 40, "0x" + "2" * 40, 1, 0, 2, 3)
    elsewhere = KNOWN_NETWORKS[8453].tokens[0]
    assert eip3009_digest(authorization, USDC) != eip3009_digest(authorization, elsewhere)


def _refusal(signature: bytes) -> str:
    with pytest.raises(PaymentRefused) as refusal:
        recover(SIGNED, signature)
    return refusal.value.code
