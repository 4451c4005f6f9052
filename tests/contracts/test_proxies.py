"""The x402 proxies over the real Permit2: what a payer signed is what happens, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from eth_account import Account
from x402.mechanisms.evm.exact.client import ExactEvmScheme
from x402.mechanisms.evm.upto.client import UptoEvmScheme
from x402.schemas import PaymentRequirements

from contracts.devnet import Devnet, DevToken, RpcRefused, Wallet, allowance, approve_permit2, balance_of, rpc
from tests.contracts.calls import (
    ALWAYS,
    ZERO_ADDRESS,
    Permit2Payment,
    events,
    now,
    permit2_payment,
    read,
    selector,
    send,
    sign_permit,
    sign_permit2,
)

PERMIT = "((address,uint256),uint256,uint256)"
PERMIT_2612 = "(uint256,uint256,bytes32,bytes32,uint8)"
EXACT_SETTLE = f"settle({PERMIT},address,(address,uint256),bytes)"
EXACT_SETTLE_WITH_PERMIT = f"settleWithPermit({PERMIT_2612},{PERMIT},address,(address,uint256),bytes)"
UPTO_SETTLE = f"settle({PERMIT},uint256,address,(address,address,uint256),bytes)"
UPTO_SETTLE_WITH_PERMIT = f"settleWithPermit({PERMIT_2612},{PERMIT},uint256,address,(address,address,uint256),bytes)"


def exact(chain: Devnet, settler: Wallet, payment: Permit2Payment, signature: bytes) -> dict[str, Any]:
    return send(
        chain, settler, chain.exact_proxy, EXACT_SETTLE, payment.permit, payment.owner, payment.witness, signature
    )


def upto(chain: Devnet, settler: Wallet, payment: Permit2Payment, amount: int, signature: bytes) -> dict[str, Any]:
    arguments = (payment.permit, amount, payment.owner, payment.witness, signature)
    return send(chain, settler, chain.upto_proxy, UPTO_SETTLE, *arguments)


def signed_2612(chain: Devnet, payer: Wallet, value: int) -> tuple[int, int, bytes, bytes, int]:
    signed = sign_permit(chain, payer, chain.permit2, value, nonce=0)
    return (value, ALWAYS, signed.r.to_bytes(32, "big"), signed.s.to_bytes(32, "big"), signed.v)


@pytest.fixture(params=["usdc", "usdt"])
def token(request: pytest.FixtureRequest, chain: Devnet) -> DevToken:
    """Each token, with Permit2 approved by the payer, wallet 0."""
    wanted: DevToken = getattr(chain, request.param)
    approve_permit2(chain.rpc_url, wanted, chain.wallets[0].private_key)
    return wanted


def test_exact_moves_the_whole_amount_to_the_signed_recipient_once(chain: Devnet, token: DevToken) -> None:
    payer, payee, settler = chain.wallets[:3]
    payment = permit2_payment(token, payer, 250_000, (payee.address, 0))
    signature = sign_permit2(chain, payer, payment)
    before = [balance_of(chain.rpc_url, token, each.address) for each in (payer, payee)]

    receipt = exact(chain, settler, payment, signature)

    after = [balance_of(chain.rpc_url, token, each.address) for each in (payer, payee)]
    assert [after[0] - before[0], after[1] - before[1]] == [-250_000, 250_000]
    assert len(events(receipt, chain.exact_proxy, "Settled()")) == 1
    assert len(events(receipt, token.address, "Transfer(address,address,uint256)")) == 1
    with pytest.raises(RpcRefused) as refusal:
        exact(chain, settler, payment, signature)
    assert refusal.value.data == selector("InvalidNonce()")


@pytest.mark.parametrize("altered", ["recipient", "valid_after", "amount", "token", "nonce", "deadline", "owner"])
def test_whoever_settles_exact_can_alter_nothing(chain: Devnet, altered: str) -> None:
    payer, payee, thief = chain.wallets[:3]
    for token in (chain.usdc, chain.usdt):
        for wallet in (payer, thief):
            approve_permit2(chain.rpc_url, token, wallet.private_key)
    payment = permit2_payment(chain.usdt, payer, 1_000, (payee.address, 0))
    signature = sign_permit2(chain, payer, payment)
    changes: dict[str, dict[str, Any]] = {
        "recipient": {"witness": (thief.address, 0)},
        "valid_after": {"witness": (payee.address, 1)},
        "amount": {"amount": 1_001},
        "token": {"token": chain.usdc.address},
        "nonce": {"nonce": payment.nonce + 1},
        "deadline": {"deadline": payment.deadline + 1},
        "owner": {"owner": thief.address},
    }
    with pytest.raises(RpcRefused) as refusal:
        exact(chain, thief, dataclasses.replace(payment, **changes[altered]), signature)
    assert refusal.value.data == selector("InvalidSigner()")
    exact(chain, thief, payment, signature)


def test_exact_says_why_it_refuses(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    token = chain.usdt
    approve_permit2(chain.rpc_url, token, payer.private_key)
    soon = now(chain) + 1000
    cases = {
        "InvalidDestination()": permit2_payment(token, payer, 1, (ZERO_ADDRESS, 0)),
        "InvalidAmount()": permit2_payment(token, payer, 0, (payee.address, 0)),
        "PaymentTooEarly()": permit2_payment(token, payer, 1, (payee.address, soon)),
        "InvalidOwner()": dataclasses.replace(permit2_payment(token, payer, 1, (payee.address, 0)), owner=ZERO_ADDRESS),
    }
    for error, payment in cases.items():
        with pytest.raises(RpcRefused) as refusal:
            exact(chain, settler, payment, sign_permit2(chain, payer, payment))
        assert refusal.value.data == selector(error)
    past = permit2_payment(token, payer, 1, (payee.address, 0), deadline=now(chain) - 1)
    with pytest.raises(RpcRefused) as refusal:
        exact(chain, settler, past, sign_permit2(chain, payer, past))
    assert refusal.value.data.startswith(selector("SignatureExpired(uint256)"))


def test_without_an_allowance_nothing_is_paid(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    for token in (chain.usdc, chain.usdt):
        payment = permit2_payment(token, payer, 1, (payee.address, 0))
        with pytest.raises(RpcRefused, match="TRANSFER_FROM_FAILED"):
            exact(chain, settler, payment, sign_permit2(chain, payer, payment))


def test_a_nonce_is_the_owners_across_tokens(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    for token in (chain.usdc, chain.usdt):
        approve_permit2(chain.rpc_url, token, payer.private_key)
    first, second = (permit2_payment(token, payer, 1, (payee.address, 0)) for token in (chain.usdc, chain.usdt))
    exact(chain, settler, first, sign_permit2(chain, payer, first))
    with pytest.raises(RpcRefused) as refusal:
        exact(chain, settler, second, sign_permit2(chain, payer, second))
    assert refusal.value.data == selector("InvalidNonce()")


def test_a_permit_can_be_settled_along_with_the_payment(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    payment = permit2_payment(chain.usdc, payer, 1_000, (payee.address, 0))
    signature = sign_permit2(chain, payer, payment)
    arguments = (payment.permit, payer.address, payment.witness, signature)
    with pytest.raises(RpcRefused) as refusal:
        send(chain, settler, chain.exact_proxy, EXACT_SETTLE_WITH_PERMIT, signed_2612(chain, payer, 999), *arguments)
    assert refusal.value.data == selector("Permit2612AmountMismatch()")

    receipt = send(
        chain, settler, chain.exact_proxy, EXACT_SETTLE_WITH_PERMIT, signed_2612(chain, payer, 1_000), *arguments
    )
    assert len(events(receipt, chain.exact_proxy, "SettledWithPermit()")) == 1
    assert allowance(chain.rpc_url, chain.usdc, payer.address, chain.permit2) == 0


def test_a_permit_that_somebody_has_used_already_does_not_stop_the_payment(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    payment = permit2_payment(chain.usdc, payer, 1_000, (payee.address, 0))
    permit = signed_2612(chain, payer, 1_000)
    value, deadline, r, s, v = permit
    permit_call = "permit(address,address,uint256,uint256,uint8,bytes32,bytes32)"
    send(chain, settler, chain.usdc.address, permit_call, payer.address, chain.permit2, value, deadline, v, r, s)
    arguments = (payment.permit, payer.address, payment.witness, sign_permit2(chain, payer, payment))
    send(chain, settler, chain.exact_proxy, EXACT_SETTLE_WITH_PERMIT, permit, *arguments)


def test_upto_settles_what_was_used_and_only_once(chain: Devnet, token: DevToken) -> None:
    payer, payee, facilitator = chain.wallets[:3]
    payment = permit2_payment(token, payer, 1_000, (payee.address, facilitator.address, 0))
    signature = sign_permit2(chain, payer, payment)
    before = [balance_of(chain.rpc_url, token, each.address) for each in (payer, payee)]

    receipt = upto(chain, facilitator, payment, 300, signature)

    after = [balance_of(chain.rpc_url, token, each.address) for each in (payer, payee)]
    assert [after[0] - before[0], after[1] - before[1]] == [-300, 300]
    assert len(events(receipt, chain.upto_proxy, "Settled()")) == 1
    with pytest.raises(RpcRefused) as refusal:
        upto(chain, facilitator, payment, 700, signature)
    assert refusal.value.data == selector("InvalidNonce()")


@pytest.mark.parametrize("amount", [0, 1_000])
def test_upto_may_settle_nothing_or_everything(chain: Devnet, token: DevToken, amount: int) -> None:
    payer, payee, facilitator = chain.wallets[:3]
    payment = permit2_payment(token, payer, 1_000, (payee.address, facilitator.address, 0))
    before = balance_of(chain.rpc_url, token, payee.address)
    upto(chain, facilitator, payment, amount, sign_permit2(chain, payer, payment))
    assert balance_of(chain.rpc_url, token, payee.address) - before == amount


def test_upto_never_settles_more_than_was_signed(chain: Devnet, token: DevToken) -> None:
    payer, payee, facilitator = chain.wallets[:3]
    payment = permit2_payment(token, payer, 1_000, (payee.address, facilitator.address, 0))
    signature = sign_permit2(chain, payer, payment)
    with pytest.raises(RpcRefused) as refusal:
        upto(chain, facilitator, payment, 1_001, signature)
    assert refusal.value.data == selector("AmountExceedsPermitted()")
    with pytest.raises(RpcRefused) as refusal:
        upto(chain, facilitator, dataclasses.replace(payment, amount=1_001), 1_001, signature)
    assert refusal.value.data == selector("InvalidSigner()")


def test_upto_is_settled_by_the_named_facilitator_only(chain: Devnet, token: DevToken) -> None:
    payer, payee, facilitator, thief = chain.wallets[:4]
    payment = permit2_payment(token, payer, 1_000, (payee.address, facilitator.address, 0))
    signature = sign_permit2(chain, payer, payment)
    with pytest.raises(RpcRefused) as refusal:
        upto(chain, thief, payment, 1_000, signature)
    assert refusal.value.data == selector("UnauthorizedFacilitator()")
    posing = dataclasses.replace(payment, witness=(payee.address, thief.address, 0))
    redirecting = dataclasses.replace(payment, witness=(facilitator.address, facilitator.address, 0))
    for settler, altered in ((thief, posing), (facilitator, redirecting)):
        with pytest.raises(RpcRefused) as refusal:
            upto(chain, settler, altered, 1_000, signature)
        assert refusal.value.data == selector("InvalidSigner()")


def test_upto_takes_a_permit_along_too(chain: Devnet) -> None:
    payer, payee, facilitator = chain.wallets[:3]
    payment = permit2_payment(chain.usdc, payer, 1_000, (payee.address, facilitator.address, 0))
    arguments = (payment.permit, 300, payer.address, payment.witness, sign_permit2(chain, payer, payment))
    permit = signed_2612(chain, payer, 1_000)
    receipt = send(chain, facilitator, chain.upto_proxy, UPTO_SETTLE_WITH_PERMIT, permit, *arguments)
    assert len(events(receipt, chain.upto_proxy, "SettledWithPermit()")) == 1


def test_a_signature_for_one_proxy_is_none_for_the_other(chain: Devnet, token: DevToken) -> None:
    payer, payee, facilitator = chain.wallets[:3]
    for_upto = permit2_payment(token, payer, 1_000, (payee.address, facilitator.address, 0))
    as_exact = dataclasses.replace(for_upto, witness=(payee.address, 0))
    with pytest.raises(RpcRefused) as refusal:
        exact(chain, facilitator, as_exact, sign_permit2(chain, payer, for_upto))
    assert refusal.value.data == selector("InvalidSigner()")


@pytest.mark.parametrize("scheme", ["exact", "upto"])
def test_a_token_cannot_settle_again_from_inside_its_transfer(chain: Devnet, scheme: str) -> None:
    payer, payee, settler = chain.wallets[:3]
    hostile = dataclasses.replace(chain.usdt, address="0x" + "66" * 20)
    witness = (payee.address, 0) if scheme == "exact" else (payee.address, settler.address, 0)
    proxy, function = (chain.exact_proxy, EXACT_SETTLE) if scheme == "exact" else (chain.upto_proxy, UPTO_SETTLE)
    # A token whose every function calls `settle` with zeros and keeps the first 4 bytes of the answer in slot 0.
    call_settle = f"63{selector(function)[2:]}60e01b600052" + "6000600061020060006000" + f"73{proxy[2:].lower()}5af150"
    keep_answer = "600460006103003e61030051600055"
    rpc(chain.rpc_url, "anvil_setCode", hostile.address, "0x" + call_settle + keep_answer + "00")
    payment = permit2_payment(hostile, payer, 1, witness)
    signature = sign_permit2(chain, payer, payment)
    if scheme == "exact":
        exact(chain, settler, payment, signature)
    else:
        upto(chain, settler, payment, 1, signature)
    answer = rpc(chain.rpc_url, "eth_getStorageAt", hostile.address, "0x0", "latest")
    assert answer[:10] == selector("ReentrancyGuardReentrantCall()")


def requirements(chain: Devnet, scheme: str, token: DevToken, **extra: str) -> PaymentRequirements:
    return PaymentRequirements(
        scheme=scheme,
        network=f"eip155:{chain.chain_id}",
        asset=token.address,
        amount="1000",
        pay_to=chain.wallets[1].address,
        max_timeout_seconds=60,
        extra={"name": token.name, "version": token.version, "assetTransferMethod": token.transfer_method, **extra},
    )


def from_official_client(payload: dict[str, Any], *witness: str) -> tuple[Permit2Payment, bytes]:
    signed = payload["permit2Authorization"]
    payment = Permit2Payment(
        token=signed["permitted"]["token"],
        amount=int(signed["permitted"]["amount"]),
        nonce=int(signed["nonce"]),
        deadline=int(signed["deadline"]),
        owner=signed["from"],
        witness=(*(signed["witness"][name] for name in witness), int(signed["witness"]["validAfter"])),
    )
    return payment, bytes.fromhex(payload["signature"][2:])


def test_the_official_clients_exact_usdt_payment_settles(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    approve_permit2(chain.rpc_url, chain.usdt, payer.private_key)
    client = ExactEvmScheme(Account.from_key(payer.private_key))
    payment, signature = from_official_client(
        client.create_payment_payload(requirements(chain, "exact", chain.usdt)), "to"
    )
    before = balance_of(chain.rpc_url, chain.usdt, payee.address)
    exact(chain, settler, payment, signature)
    assert balance_of(chain.rpc_url, chain.usdt, payee.address) - before == 1_000


def test_the_official_clients_upto_payment_settles(chain: Devnet) -> None:
    payer, payee, facilitator = chain.wallets[:3]
    approve_permit2(chain.rpc_url, chain.usdt, payer.private_key)
    client = UptoEvmScheme(Account.from_key(payer.private_key))
    wanted = requirements(chain, "upto", chain.usdt, facilitatorAddress=facilitator.address)
    payment, signature = from_official_client(client.create_payment_payload(wanted), "to", "facilitator")
    before = balance_of(chain.rpc_url, chain.usdt, payee.address)
    upto(chain, facilitator, payment, 400, signature)
    assert balance_of(chain.rpc_url, chain.usdt, payee.address) - before == 400


def test_the_official_clients_exact_usdc_payment_settles(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    client = ExactEvmScheme(Account.from_key(payer.private_key))
    payload = client.create_payment_payload(requirements(chain, "exact", chain.usdc))
    signed = payload["authorization"]
    terms = (
        signed["from"],
        signed["to"],
        int(signed["value"]),
        int(signed["validAfter"]),
        int(signed["validBefore"]),
        bytes.fromhex(signed["nonce"][2:]),
    )
    call = "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,bytes)"
    before = balance_of(chain.rpc_url, chain.usdc, payee.address)
    send(chain, settler, chain.usdc.address, call, *terms, bytes.fromhex(payload["signature"][2:]))
    assert balance_of(chain.rpc_url, chain.usdc, payee.address) - before == 1_000


def test_the_proxies_name_permit2_and_their_witness(devnet: Devnet) -> None:
    for proxy, witness in (
        (devnet.exact_proxy, "Witness(address to,uint256 validAfter)"),
        (devnet.upto_proxy, "Witness(address to,address facilitator,uint256 validAfter)"),
    ):
        assert int.from_bytes(read(devnet, proxy, "PERMIT2()"), "big") == int(devnet.permit2, 16)
        described = f"Witness witness)TokenPermissions(address token,uint256 amount){witness}"
        assert described.encode() in read(devnet, proxy, "WITNESS_TYPE_STRING()")
