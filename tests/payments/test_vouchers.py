"""The digests and the calldata of channels, written by hand, against those of the official package."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from eth_account import Account
from web3 import Web3
from x402.mechanisms.evm.batch_settlement import types as official
from x402.mechanisms.evm.batch_settlement.abi import BATCH_SETTLEMENT_ABI
from x402.mechanisms.evm.batch_settlement.authorizer_signer import (
    LocalAuthorizerSigner,
    sign_claim_batch,
    sign_refund,
)
from x402.mechanisms.evm.batch_settlement.client.eip3009 import create_batch_settlement_eip3009_deposit_payload
from x402.mechanisms.evm.batch_settlement.client.permit2 import create_batch_settlement_permit2_deposit_payload
from x402.mechanisms.evm.batch_settlement.client.voucher import sign_voucher
from x402.mechanisms.evm.batch_settlement.encoding import build_erc3009_collector_data, build_permit2_collector_data
from x402.mechanisms.evm.batch_settlement.utils import compute_channel_id
from x402.mechanisms.evm.signers import EthAccountSigner
from x402.schemas import PaymentRequirements

from payments.chain import channel_contract
from payments.chain.networks import KNOWN_NETWORKS, NOBODY
from payments.chain.signers import Signer
from payments.errors import PaymentRefused
from payments.verification import vouchers
from payments.verification.signatures import recover
from payments.x402.channel_actions import Claim
from payments.x402.channels import (
    ChannelPayment,
    Erc3009Deposit,
    Permit2Deposit,
    Voucher,
    decode_channel_payment,
    hex32,
)
from payments.x402.headers import PaymentHeader

CHAIN_ID = 8453
NETWORK = f"eip155:{CHAIN_ID}"
USDC, USDT = KNOWN_NETWORKS[CHAIN_ID].tokens
PAYER, AUTHORIZER = Account.create(), Account.create()
SALT = "0x" + "ab" * 32
CONTRACT = Web3().eth.contract(abi=BATCH_SETTLEMENT_ABI)


def config(token: str = USDC.address) -> official.ChannelConfig:
    return official.ChannelConfig(
        PAYER.address,
        PAYER.address,
        "0x" + "7e" * 20,
        AUTHORIZER.address,
        Web3.to_checksum_address(token),
        86_400,
        SALT,
    )


def as_tuple(channel: official.ChannelConfig) -> tuple[Any, ...]:
    receiver = Web3.to_checksum_address(channel.receiver)
    members = (channel.payer, channel.payer_authorizer, receiver, channel.receiver_authorizer, channel.token)
    return (*members, channel.withdraw_delay, bytes.fromhex(channel.salt[2:]))


def decoded(payload: dict[str, Any]) -> ChannelPayment:
    header = PaymentHeader(2, "batch-settlement", NETWORK, None, None, b"")
    return decode_channel_payment(header, payload)


def voucher_payment(amount: int = 12_345) -> ChannelPayment:
    payload = official.VoucherPayload()
    payload.channel_config = config()
    payload.voucher = sign_voucher(EthAccountSigner(PAYER), compute_channel_id(config(), NETWORK), amount, NETWORK)
    return decoded(payload.to_dict())


def requirements(token: str, method: str) -> PaymentRequirements:
    return PaymentRequirements(
        scheme="batch-settlement",
        network=NETWORK,
        asset=token,
        amount="100",
        pay_to="0x" + "7e" * 20,
        max_timeout_seconds=300,
        extra={"name": "USD Coin", "version": "2", "assetTransferMethod": method},
    )


def test_a_channel_has_the_official_id() -> None:
    payment = voucher_payment()
    assert hex32(vouchers.channel_id(payment.config, CHAIN_ID)) == compute_channel_id(config(), NETWORK)
    assert vouchers.channel_id(payment.config, 1) != vouchers.channel_id(payment.config, CHAIN_ID)


def test_an_official_voucher_is_verified_and_no_other() -> None:
    payment = voucher_payment()
    vouchers.verify_voucher(payment.voucher, PAYER.address.lower(), CHAIN_ID)
    signed = payment.voucher
    for forged in (
        Voucher(signed.channel_id, signed.amount + 1, signed.signature),
        Voucher(signed.channel_id ^ 1, signed.amount, signed.signature),
        Voucher(signed.channel_id, signed.amount, secrets.token_bytes(64) + b"\x1b"),
        Voucher(signed.channel_id, signed.amount, b"\x01" * 3),
    ):
        with pytest.raises(PaymentRefused) as refused:
            vouchers.verify_voucher(forged, PAYER.address.lower(), CHAIN_ID)
        assert refused.value.code == "invalid_batch_settlement_evm_voucher_signature"
    for authorizer, chain_id in ((NOBODY, CHAIN_ID), (PAYER.address.lower(), 1)):
        with pytest.raises(PaymentRefused):
            vouchers.verify_voucher(signed, authorizer, chain_id)


def test_official_deposits_are_understood_and_their_signatures_the_payers() -> None:
    cumulative = "100"
    by_eip3009 = create_batch_settlement_eip3009_deposit_payload(
        EthAccountSigner(PAYER), requirements(USDC.address, "eip3009"), config(), 1_000, cumulative
    )
    payment = decoded(by_eip3009.to_dict())
    assert isinstance(payment.deposit, Erc3009Deposit)
    digest = vouchers.erc3009_deposit_digest(payment.deposit, payment.config, payment.voucher.channel_id, USDC)
    assert recover(digest, payment.deposit.signature) == PAYER.address.lower()

    by_permit2 = create_batch_settlement_permit2_deposit_payload(
        EthAccountSigner(PAYER), requirements(USDT.address, "permit2"), config(USDT.address), 1_000, cumulative
    )
    payment = decoded(by_permit2.to_dict())
    assert isinstance(payment.deposit, Permit2Deposit)
    digest = vouchers.permit2_deposit_digest(payment.deposit, CHAIN_ID)
    assert recover(digest, payment.deposit.signature) == PAYER.address.lower()


def test_deposits_are_called_as_the_official_abi_says() -> None:
    for token, method in ((USDC, "eip3009"), (USDT, "permit2")):
        create = (
            create_batch_settlement_eip3009_deposit_payload
            if method == "eip3009"
            else create_batch_settlement_permit2_deposit_payload
        )
        payload = create(EthAccountSigner(PAYER), requirements(token.address, method), config(token.address), 77, "100")
        assert payload.deposit is not None
        authorization = payload.deposit.authorization
        if authorization.erc3009_authorization is not None:
            signed = authorization.erc3009_authorization
            data = build_erc3009_collector_data(signed.valid_after, signed.valid_before, signed.salt, signed.signature)
            collector = "0x4020806089470a89826cB9fB1f4059150b550004"
        else:
            assert authorization.permit2_authorization is not None
            permit = authorization.permit2_authorization
            data = build_permit2_collector_data(permit.nonce, permit.deadline, permit.signature)
            collector = "0x4020425FAf3B746C082C2f942b4E5159887B0005"
        wanted = CONTRACT.encode_abi("deposit", [as_tuple(config(token.address)), 77, collector, data])
        ours = decoded(payload.to_dict())
        assert ours.deposit is not None
        assert "0x" + channel_contract.encode_deposit(ours.config, ours.deposit).hex() == wanted


def test_claims_and_refunds_are_signed_and_called_as_the_official_ones() -> None:
    payment = voucher_payment()
    channel, signature = payment.voucher.channel_id, payment.voucher.signature
    key = Signer.from_hex(AUTHORIZER.key.hex()).key
    signer = LocalAuthorizerSigner(AUTHORIZER)
    theirs = [official.VoucherClaim(config(), "12345", "0x" + signature.hex(), "999")] * 2
    authorized = vouchers.sign_digest(key, vouchers.claim_batch_digest([(channel, 12_345, 999)] * 2, CHAIN_ID))
    assert "0x" + authorized.hex() == sign_claim_batch(signer, theirs, NETWORK)
    claims = [Claim(payment.config, 12_345, signature, 999)] * 2
    claim = CONTRACT.encode_abi(
        "claimWithSignature", [[((as_tuple(config()), 12_345), signature, 999)] * 2, authorized]
    )
    settle = CONTRACT.encode_abi("settle", [Web3.to_checksum_address(config().receiver), config().token])
    both = CONTRACT.encode_abi("multicall", [[bytes.fromhex(claim[2:]), bytes.fromhex(settle[2:])]])
    encoded = channel_contract.encode_claim_and_settle(claims, authorized, config().receiver, USDC.address)
    assert "0x" + encoded.hex() == both

    refund = vouchers.sign_digest(key, vouchers.refund_digest(channel, 3, 500, CHAIN_ID))
    assert "0x" + refund.hex() == sign_refund(signer, hex32(channel), 500, 3, NETWORK)
    wanted = CONTRACT.encode_abi("refundWithSignature", [as_tuple(config()), 500, 3, refund])
    assert "0x" + channel_contract.encode_refund(payment.config, 500, 3, refund).hex() == wanted
