"""The batch-settlement contract and its collectors, driven by what the official client signs and encodes."""

from __future__ import annotations

import dataclasses
import secrets
import time
from typing import Any

import pytest
from eth_account import Account
from x402.mechanisms.evm.batch_settlement import constants as official
from x402.mechanisms.evm.batch_settlement.authorizer_signer import LocalAuthorizerSigner, sign_claim_batch, sign_refund
from x402.mechanisms.evm.batch_settlement.client.voucher import sign_voucher
from x402.mechanisms.evm.batch_settlement.encoding import (
    build_erc3009_collector_data,
    build_erc3009_deposit_nonce,
    build_permit2_collector_data,
)
from x402.mechanisms.evm.batch_settlement.types import ChannelConfig, VoucherClaim
from x402.mechanisms.evm.batch_settlement.utils import compute_channel_id
from x402.mechanisms.evm.signers import EthAccountSigner

from contracts.devnet import (
    BATCH_SETTLEMENT_ADDRESS,
    ERC3009_DEPOSIT_COLLECTOR_ADDRESS,
    PERMIT2_ADDRESS,
    PERMIT2_DEPOSIT_COLLECTOR_ADDRESS,
    Devnet,
    DevToken,
    RpcRefused,
    Wallet,
    approve_permit2,
    balance_of,
    rpc,
)
from tests.contracts.calls import encoded, events, read, selector, send, sign, token_domain

CONFIG = "(address,address,address,address,address,uint40,bytes32)"
CLAIMS = f"(({CONFIG},uint128),bytes,uint128)[]"
DEPOSIT = f"deposit({CONFIG},uint128,address,bytes)"
CLAIM = f"claim({CLAIMS})"
CLAIM_WITH_SIGNATURE = f"claimWithSignature({CLAIMS},bytes)"
REFUND = f"refund({CONFIG},uint128)"
REFUND_WITH_SIGNATURE = f"refundWithSignature({CONFIG},uint128,uint256,bytes)"
INITIATE = f"initiateWithdraw({CONFIG},uint128)"
FINALIZE = f"finalizeWithdraw({CONFIG})"
HOUR_S = 3600
NETWORK = "eip155:84532"
PAYER, RECEIVER, AUTHORIZER, STRANGER = range(4)


def config_of(chain: Devnet, token: DevToken, **changes: Any) -> ChannelConfig:
    wallets = chain.wallets
    config = ChannelConfig(
        payer=wallets[PAYER].address,
        payer_authorizer=wallets[PAYER].address,
        receiver=wallets[RECEIVER].address,
        receiver_authorizer=wallets[AUTHORIZER].address,
        token=token.address,
        withdraw_delay=official.MIN_WITHDRAW_DELAY,
        salt="0x" + secrets.token_hex(32),
    )
    return dataclasses.replace(config, **changes)


def as_tuple(config: ChannelConfig) -> tuple[Any, ...]:
    return (
        config.payer,
        config.payer_authorizer,
        config.receiver,
        config.receiver_authorizer,
        config.token,
        config.withdraw_delay,
        bytes.fromhex(config.salt[2:]),
    )


def call(chain: Devnet, sender: int, signature: str, *arguments: Any) -> dict[str, Any]:
    return send(chain, chain.wallets[sender], BATCH_SETTLEMENT_ADDRESS, signature, *arguments)


def refusal(chain: Devnet, sender: int, signature: str, *arguments: Any) -> str:
    with pytest.raises(RpcRefused) as refused:
        call(chain, sender, signature, *arguments)
    return str(refused.value.data)[:10]


def state(chain: Devnet, config: ChannelConfig) -> tuple[int, int]:
    """Balance and total claimed."""
    channel_id = bytes.fromhex(compute_channel_id(config, NETWORK)[2:])
    answer = read(chain, BATCH_SETTLEMENT_ADDRESS, "channels(bytes32)", channel_id)
    return int.from_bytes(answer[:32], "big"), int.from_bytes(answer[32:], "big")


def collector_data(chain: Devnet, config: ChannelConfig, token: DevToken, amount: int) -> tuple[str, bytes]:
    """The collector for a token, and what the payer signs for it."""
    payer, deadline, channel_id = chain.wallets[PAYER], int(time.time()) + HOUR_S, compute_channel_id(config, NETWORK)
    if token.transfer_method == "eip3009":
        salt = "0x" + secrets.token_hex(32)
        message = {
            "from": payer.address,
            "to": ERC3009_DEPOSIT_COLLECTOR_ADDRESS,
            "value": amount,
            "validAfter": 0,
            "validBefore": deadline,
            "nonce": bytes.fromhex(build_erc3009_deposit_nonce(channel_id, salt)[2:]),
        }
        signed = sign(payer, token_domain(chain, token), official.RECEIVE_AUTHORIZATION_TYPES, message)
        data = build_erc3009_collector_data("0", str(deadline), salt, "0x" + signed.signature.hex())
        return ERC3009_DEPOSIT_COLLECTOR_ADDRESS, data
    nonce = secrets.randbits(200)
    message = {
        "permitted": {"token": token.address, "amount": amount},
        "spender": PERMIT2_DEPOSIT_COLLECTOR_ADDRESS,
        "nonce": nonce,
        "deadline": deadline,
        "witness": {"channelId": bytes.fromhex(channel_id[2:])},
    }
    domain = {"name": "Permit2", "chainId": chain.chain_id, "verifyingContract": PERMIT2_ADDRESS}
    signed = sign(payer, domain, official.BATCH_PERMIT2_WITNESS_TYPES, message)
    data = build_permit2_collector_data(str(nonce), str(deadline), "0x" + signed.signature.hex())
    return PERMIT2_DEPOSIT_COLLECTOR_ADDRESS, data


def deposit(chain: Devnet, config: ChannelConfig, token: DevToken, amount: int) -> dict[str, Any]:
    collector, data = collector_data(chain, config, token, amount)
    return call(chain, STRANGER, DEPOSIT, as_tuple(config), amount, collector, data)


def voucher(config: ChannelConfig, signer: Wallet, ceiling: int, claimed: int | None = None) -> VoucherClaim:
    fields = sign_voucher(
        EthAccountSigner(Account.from_key(signer.private_key)),
        compute_channel_id(config, NETWORK),
        str(ceiling),
        NETWORK,
    )
    total = ceiling if claimed is None else claimed
    return VoucherClaim(config, str(ceiling), fields.signature, str(total))


def rows(claims: list[VoucherClaim]) -> list[tuple[Any, ...]]:
    return [
        (
            (as_tuple(claim.channel), int(claim.max_claimable_amount)),
            bytes.fromhex(claim.signature[2:]),
            int(claim.total_claimed),
        )
        for claim in claims
    ]


def authorizer(chain: Devnet) -> LocalAuthorizerSigner:
    return LocalAuthorizerSigner(chain.wallets[AUTHORIZER].private_key)


def claim_signed(chain: Devnet, claims: list[VoucherClaim]) -> dict[str, Any]:
    signature = bytes.fromhex(sign_claim_batch(authorizer(chain), claims, NETWORK)[2:])
    return call(chain, STRANGER, CLAIM_WITH_SIGNATURE, rows(claims), signature)


@pytest.fixture(params=["usdc", "usdt"])
def token(request: pytest.FixtureRequest, chain: Devnet) -> DevToken:
    wanted: DevToken = getattr(chain, request.param)
    approve_permit2(chain.rpc_url, wanted, chain.wallets[PAYER].private_key)
    return wanted


def test_addresses_and_digests_are_the_official_ones(chain: Devnet) -> None:
    assert BATCH_SETTLEMENT_ADDRESS == official.BATCH_SETTLEMENT_ADDRESS
    assert ERC3009_DEPOSIT_COLLECTOR_ADDRESS == official.ERC3009_DEPOSIT_COLLECTOR_ADDRESS
    assert PERMIT2_DEPOSIT_COLLECTOR_ADDRESS == official.PERMIT2_DEPOSIT_COLLECTOR_ADDRESS
    config = config_of(chain, chain.usdc)
    there = read(chain, BATCH_SETTLEMENT_ADDRESS, f"getChannelId({CONFIG})", as_tuple(config))
    assert "0x" + there.hex() == compute_channel_id(config, NETWORK)
    assert read(chain, BATCH_SETTLEMENT_ADDRESS, "CHANNEL_CONFIG_TYPEHASH()") == official.CHANNEL_CONFIG_TYPEHASH


def test_a_channel_from_deposit_to_settlement(chain: Devnet, token: DevToken) -> None:
    payer, receiver = chain.wallets[PAYER], chain.wallets[RECEIVER]
    config = config_of(chain, token)
    before = [balance_of(chain.rpc_url, token, wallet.address) for wallet in (payer, receiver)]

    opened = deposit(chain, config, token, 100_000)
    deposit(chain, config, token, 50_000)
    assert len(events(opened, BATCH_SETTLEMENT_ADDRESS, f"ChannelCreated(bytes32,{CONFIG})")) == 1
    assert state(chain, config) == (150_000, 0)

    claim_signed(chain, [voucher(config, payer, 30_000, 20_000)])
    claimed = claim_signed(chain, [voucher(config, payer, 90_000)])
    assert state(chain, config) == (150_000, 90_000)
    [log] = events(claimed, BATCH_SETTLEMENT_ADDRESS, "Claimed(bytes32,address,uint128,uint128)")
    assert int(log["data"][2:66], 16) == 70_000

    settled = call(chain, STRANGER, "settle(address,address)", receiver.address, token.address)
    assert len(events(settled, BATCH_SETTLEMENT_ADDRESS, "Settled(address,address,address,uint128)")) == 1
    after = [balance_of(chain.rpc_url, token, wallet.address) for wallet in (payer, receiver)]
    assert [after[0] - before[0], after[1] - before[1]] == [-150_000, 90_000]
    call(chain, STRANGER, "settle(address,address)", receiver.address, token.address)
    assert balance_of(chain.rpc_url, token, receiver.address) == after[1]


def test_many_channels_are_claimed_in_one_call_and_an_old_row_changes_nothing(chain: Devnet) -> None:
    payer = chain.wallets[PAYER]
    configs = [config_of(chain, chain.usdc) for _ in range(3)]
    for config in configs:
        deposit(chain, config, chain.usdc, 1_000)
    claims = [voucher(config, payer, 100 * (index + 1)) for index, config in enumerate(configs)]
    claim_signed(chain, claims)
    claim_signed(chain, [voucher(configs[0], payer, 50), claims[1], voucher(configs[2], payer, 900)])
    assert [state(chain, config) for config in configs] == [(1_000, 100), (1_000, 200), (1_000, 900)]


def test_nothing_is_claimed_beyond_what_was_signed_and_deposited(chain: Devnet) -> None:
    payer, thief = chain.wallets[PAYER], chain.wallets[STRANGER]
    config = config_of(chain, chain.usdc)
    deposit(chain, config, chain.usdc, 1_000)
    good = voucher(config, payer, 500)

    def refused(claim: VoucherClaim, sender: int = RECEIVER) -> str:
        return refusal(chain, sender, CLAIM, rows([claim]))

    assert refused(dataclasses.replace(good, total_claimed="501")) == selector("ClaimExceedsCeiling()")
    assert refused(voucher(config, payer, 1_001)) == selector("ClaimExceedsBalance()")
    assert refused(voucher(config, thief, 500)) == selector("InvalidSignature()")
    assert refused(dataclasses.replace(good, max_claimable_amount="600")) == selector("InvalidSignature()")
    other = config_of(chain, chain.usdc)
    assert refused(dataclasses.replace(good, channel=other)) == selector("ClaimExceedsBalance()")
    assert refused(good, STRANGER) == selector("NotAuthorizedToClaim()")
    forged = sign_claim_batch(LocalAuthorizerSigner(thief.private_key), [good], NETWORK)
    answer = refusal(chain, STRANGER, CLAIM_WITH_SIGNATURE, rows([good]), bytes.fromhex(forged[2:]))
    assert answer == selector("InvalidSignature()")
    assert refusal(chain, RECEIVER, CLAIM, []) == selector("EmptyBatch()")
    call(chain, RECEIVER, CLAIM, rows([good]))
    assert state(chain, config) == (1_000, 500)


def test_only_the_settlement_contract_may_ask_a_collector(chain: Devnet, token: DevToken) -> None:
    config = config_of(chain, token)
    collector, data = collector_data(chain, config, token, 5_000)
    channel_id = bytes.fromhex(compute_channel_id(config, NETWORK)[2:])
    arguments = (config.payer, config.token, 5_000, channel_id, data)
    with pytest.raises(RpcRefused) as refused:
        send(chain, chain.wallets[STRANGER], collector, "collect(address,address,uint256,bytes32,bytes)", *arguments)
    assert refused.value.data == selector("OnlySettlement()")


def test_a_deposit_is_for_the_channel_that_was_signed_for(chain: Devnet, token: DevToken) -> None:
    config = config_of(chain, token)
    collector, data = collector_data(chain, config, token, 5_000)
    others = [
        config_of(chain, token),
        config_of(chain, token, receiver=chain.wallets[STRANGER].address, salt=config.salt),
    ]
    for other in others:
        with pytest.raises(RpcRefused):
            call(chain, STRANGER, DEPOSIT, as_tuple(other), 5_000, collector, data)
    with pytest.raises(RpcRefused):
        call(chain, STRANGER, DEPOSIT, as_tuple(config), 4_999, collector, data)
    call(chain, STRANGER, DEPOSIT, as_tuple(config), 5_000, collector, data)
    with pytest.raises(RpcRefused):
        call(chain, STRANGER, DEPOSIT, as_tuple(config), 5_000, collector, data)


@pytest.mark.parametrize("delay", [official.MIN_WITHDRAW_DELAY - 1, official.MAX_WITHDRAW_DELAY + 1])
def test_a_channel_has_a_delay_within_bounds(chain: Devnet, delay: int) -> None:
    config = config_of(chain, chain.usdc, withdraw_delay=delay)
    collector, data = collector_data(chain, config, chain.usdc, 5_000)
    answer = refusal(chain, STRANGER, DEPOSIT, as_tuple(config), 5_000, collector, data)
    assert answer == selector("WithdrawDelayOutOfRange()")


def test_the_receiver_gives_back_what_is_not_claimed(chain: Devnet, token: DevToken) -> None:
    payer = chain.wallets[PAYER]
    config = config_of(chain, token)
    deposit(chain, config, token, 1_000)
    claim_signed(chain, [voucher(config, payer, 400)])
    channel_id = compute_channel_id(config, NETWORK)
    before = balance_of(chain.rpc_url, token, payer.address)

    signature = bytes.fromhex(sign_refund(authorizer(chain), channel_id, 200, 0, NETWORK)[2:])
    call(chain, STRANGER, REFUND_WITH_SIGNATURE, as_tuple(config), 200, 0, signature)
    assert balance_of(chain.rpc_url, token, payer.address) - before == 200
    answer = refusal(chain, STRANGER, REFUND_WITH_SIGNATURE, as_tuple(config), 200, 0, signature)
    assert answer == selector("InvalidRefundNonce()")
    answer = refusal(chain, STRANGER, REFUND_WITH_SIGNATURE, as_tuple(config), 300, 1, signature)
    assert answer == selector("InvalidSignature()")

    refunded = call(chain, RECEIVER, REFUND, as_tuple(config), 10_000)
    [log] = events(refunded, BATCH_SETTLEMENT_ADDRESS, "Refunded(bytes32,address,uint128)")
    assert int(log["data"], 16) == 400
    assert balance_of(chain.rpc_url, token, payer.address) - before == 600
    assert state(chain, config) == (400, 400)
    assert refusal(chain, STRANGER, REFUND, as_tuple(config), 1) == selector("NotAuthorizedToRefund()")
    assert refusal(chain, RECEIVER, REFUND, as_tuple(config), 0) == selector("ZeroRefund()")


def test_a_payer_takes_the_rest_after_the_delay_and_the_receiver_can_claim_until_then(chain: Devnet) -> None:
    payer, token = chain.wallets[PAYER], chain.usdc
    config = config_of(chain, token)
    deposit(chain, config, token, 1_000)
    before = balance_of(chain.rpc_url, token, payer.address)

    assert refusal(chain, STRANGER, INITIATE, as_tuple(config), 1) == selector("InvalidChannel()")
    answer = refusal(chain, PAYER, INITIATE, as_tuple(config), 1_001)
    assert answer == selector("WithdrawAmountExceedsAvailable()")
    call(chain, PAYER, INITIATE, as_tuple(config), 1_000)
    assert refusal(chain, PAYER, INITIATE, as_tuple(config), 1) == selector("WithdrawalAlreadyPending()")
    assert refusal(chain, PAYER, FINALIZE, as_tuple(config)) == selector("WithdrawDelayNotElapsed()")
    claim_signed(chain, [voucher(config, payer, 300)])

    rpc(chain.rpc_url, "evm_increaseTime", official.MIN_WITHDRAW_DELAY)
    rpc(chain.rpc_url, "evm_mine")
    assert refusal(chain, STRANGER, FINALIZE, as_tuple(config)) == selector("NotAuthorizedToFinalizeWithdraw()")
    call(chain, PAYER, FINALIZE, as_tuple(config))
    assert balance_of(chain.rpc_url, token, payer.address) - before == 700
    assert state(chain, config) == (300, 300)
    late = rows([voucher(config, payer, 400)])
    assert refusal(chain, RECEIVER, CLAIM, late) == selector("ClaimExceedsBalance()")
    assert refusal(chain, PAYER, FINALIZE, as_tuple(config)) == selector("WithdrawalNotPending()")


def test_a_refund_counts_against_a_pending_withdrawal(chain: Devnet) -> None:
    config = config_of(chain, chain.usdc)
    deposit(chain, config, chain.usdc, 1_000)
    channel_id = bytes.fromhex(compute_channel_id(config, NETWORK)[2:])
    call(chain, PAYER, INITIATE, as_tuple(config), 800)
    call(chain, RECEIVER, REFUND, as_tuple(config), 300)
    pending = read(chain, BATCH_SETTLEMENT_ADDRESS, "pendingWithdrawals(bytes32)", channel_id)
    assert int.from_bytes(pending[:32], "big") == 500
    closed = call(chain, RECEIVER, REFUND, as_tuple(config), 1_000)
    assert len(events(closed, BATCH_SETTLEMENT_ADDRESS, f"ChannelClosed(bytes32,{CONFIG})")) == 1
    assert refusal(chain, PAYER, FINALIZE, as_tuple(config)) == selector("WithdrawalNotPending()")


def test_claims_and_settlement_go_in_one_transaction(chain: Devnet) -> None:
    receiver = chain.wallets[RECEIVER]
    config = config_of(chain, chain.usdc)
    deposit(chain, config, chain.usdc, 1_000)
    claims = [voucher(config, chain.wallets[PAYER], 600)]
    signature = bytes.fromhex(sign_claim_batch(authorizer(chain), claims, NETWORK)[2:])
    calls = [
        encoded(CLAIM_WITH_SIGNATURE, rows(claims), signature),
        encoded("settle(address,address)", receiver.address, chain.usdc.address),
    ]
    before = balance_of(chain.rpc_url, chain.usdc, receiver.address)
    call(chain, STRANGER, "multicall(bytes[])", [bytes.fromhex(each[2:]) for each in calls])
    assert balance_of(chain.rpc_url, chain.usdc, receiver.address) - before == 600


def test_a_key_of_its_own_signs_vouchers_and_the_payers_does_not(chain: Devnet) -> None:
    signer = chain.wallets[5]
    config = config_of(chain, chain.usdc, payer_authorizer=signer.address)
    deposit(chain, config, chain.usdc, 1_000)
    by_payer = rows([voucher(config, chain.wallets[PAYER], 100)])
    assert refusal(chain, RECEIVER, CLAIM, by_payer) == selector("InvalidSignature()")
    call(chain, RECEIVER, CLAIM, rows([voucher(config, signer, 100)]))

    without = config_of(chain, chain.usdc, payer_authorizer="0x" + "00" * 20)
    deposit(chain, without, chain.usdc, 1_000)
    call(chain, RECEIVER, CLAIM, rows([voucher(without, chain.wallets[PAYER], 100)]))
    assert state(chain, without) == (1_000, 100)
