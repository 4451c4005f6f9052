"""The USDC-like token, called with signatures that eth-account made."""

from __future__ import annotations

import time
from typing import Any

import pytest
from eth_account.datastructures import SignedMessage
from eth_account.messages import encode_typed_data
from eth_utils.crypto import keccak

from contracts.devnet import Devnet, RpcRefused, allowance, as_owner, balance_of, rpc
from tests.contracts.calls import (
    ALWAYS,
    ZERO_ADDRESS,
    Authorization,
    authorization,
    encoded,
    events,
    now,
    read,
    send,
    sign_authorization,
    sign_cancellation,
    sign_permit,
)

TERMS = "(address,address,uint256,uint256,uint256,bytes32,"
TRANSFER_VRS = "transferWithAuthorization" + TERMS + "uint8,bytes32,bytes32)"
TRANSFER_BYTES = "transferWithAuthorization" + TERMS + "bytes)"
RECEIVE_VRS = "receiveWithAuthorization" + TERMS + "uint8,bytes32,bytes32)"
RECEIVE_BYTES = "receiveWithAuthorization" + TERMS + "bytes)"
CANCEL_VRS = "cancelAuthorization(address,bytes32,uint8,bytes32,bytes32)"
CANCEL_BYTES = "cancelAuthorization(address,bytes32,bytes)"
PERMIT_VRS = "permit(address,address,uint256,uint256,uint8,bytes32,bytes32)"
PERMIT_BYTES = "permit(address,address,uint256,uint256,bytes)"

TRANSFER = "Transfer(address,address,uint256)"
USED = "AuthorizationUsed(address,bytes32)"
CANCELED = "AuthorizationCanceled(address,bytes32)"

SECP256K1_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

# Contract wallets in EVM code: one answers every ERC-1271 question with yes, one with 32 zero bytes.
SAYS_YES = "0x631626ba7e60e01b60005260206000f3"
SAYS_NO = "0x60206000f3"


def parts(signed: SignedMessage) -> tuple[int, bytes, bytes]:
    return signed.v, signed.r.to_bytes(32, "big"), signed.s.to_bytes(32, "big")


def used(chain: Devnet, wanted: Authorization) -> bool:
    state = read(chain, chain.usdc.address, "authorizationState(address,bytes32)", wanted.payer, wanted.nonce)
    return bool(int.from_bytes(state, "big"))


def simulate(chain: Devnet, moment: int, signature: str, *arguments: Any) -> None:
    """Call USDC as if the block's time were `moment`; raises RpcRefused with the reason if it reverts."""
    call = {"to": chain.usdc.address, "data": encoded(signature, *arguments)}
    rpc(chain.rpc_url, "eth_call", call, "latest", {}, {"time": hex(moment)})


def topics(log: dict[str, list[str]]) -> list[int]:
    return [int(topic, 16) for topic in log["topics"][1:]]


def test_domain_separator_is_the_one_that_clients_sign_for(devnet: Devnet) -> None:
    payer = devnet.wallets[0]
    domain = {"name": "USDC", "version": "2", "chainId": 84532, "verifyingContract": devnet.usdc.address}
    types = {"Anything": [{"name": "from", "type": "address"}]}
    signable = encode_typed_data(domain, types, {"from": payer.address})
    assert read(devnet, devnet.usdc.address, "DOMAIN_SEPARATOR()") == signable.header


@pytest.mark.parametrize("signature", [TRANSFER_VRS, TRANSFER_BYTES])
def test_anybody_may_settle_a_signed_transfer(chain: Devnet, signature: str) -> None:
    payer, payee, settler = chain.wallets[:3]
    wanted = authorization(payer, payee.address, 250_000)
    signed = sign_authorization(chain, payer, wanted)
    proof = parts(signed) if signature == TRANSFER_VRS else (bytes(signed.signature),)
    before = [balance_of(chain.rpc_url, chain.usdc, each.address) for each in (payer, payee)]
    assert not used(chain, wanted)

    receipt = send(chain, settler, chain.usdc.address, signature, *wanted.arguments, *proof)

    after = [balance_of(chain.rpc_url, chain.usdc, each.address) for each in (payer, payee)]
    assert [after[0] - before[0], after[1] - before[1]] == [-250_000, 250_000]
    assert used(chain, wanted)
    (moved,) = events(receipt, chain.usdc.address, TRANSFER)
    assert topics(moved) == [int(payer.address, 16), int(payee.address, 16)]
    assert int(moved["data"], 16) == 250_000
    (spent,) = events(receipt, chain.usdc.address, USED)
    assert topics(spent) == [int(payer.address, 16), int.from_bytes(wanted.nonce, "big")]


@pytest.mark.parametrize("signature", [RECEIVE_VRS, RECEIVE_BYTES])
def test_only_the_payee_may_receive(chain: Devnet, signature: str) -> None:
    payer, payee, other = chain.wallets[:3]
    wanted = authorization(payer, payee.address, 1)
    signed = sign_authorization(chain, payer, wanted, "ReceiveWithAuthorization")
    proof = parts(signed) if signature == RECEIVE_VRS else (bytes(signed.signature),)
    with pytest.raises(RpcRefused, match="caller must be the payee"):
        send(chain, other, chain.usdc.address, signature, *wanted.arguments, *proof)
    receipt = send(chain, payee, chain.usdc.address, signature, *wanted.arguments, *proof)
    assert len(events(receipt, chain.usdc.address, TRANSFER)) == 1


def test_a_signature_for_receiving_is_none_for_transferring(chain: Devnet) -> None:
    payer, payee = chain.wallets[:2]
    wanted = authorization(payer, payee.address, 1)
    signed = sign_authorization(chain, payer, wanted, "ReceiveWithAuthorization")
    with pytest.raises(RpcRefused, match="FiatTokenV2: invalid signature"):
        send(chain, payee, chain.usdc.address, TRANSFER_VRS, *wanted.arguments, *parts(signed))


def test_a_nonce_pays_once(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    first, second = (authorization(payer, payee.address, value) for value in (1, 2))
    send(
        chain,
        settler,
        chain.usdc.address,
        TRANSFER_VRS,
        *first.arguments,
        *parts(sign_authorization(chain, payer, first)),
    )
    for again in (first, second):
        signed = sign_authorization(chain, payer, again)
        with pytest.raises(RpcRefused, match="authorization is used or canceled"):
            send(chain, settler, chain.usdc.address, TRANSFER_VRS, *again.arguments, *parts(signed))


@pytest.mark.parametrize("signature", [CANCEL_VRS, CANCEL_BYTES])
def test_a_cancelled_authorization_looks_used_but_moved_nothing(chain: Devnet, signature: str) -> None:
    payer, payee, settler = chain.wallets[:3]
    wanted = authorization(payer, payee.address, 1)
    cancellation = sign_cancellation(chain, payer, wanted.nonce)
    proof = parts(cancellation) if signature == CANCEL_VRS else (bytes(cancellation.signature),)
    receipt = send(chain, settler, chain.usdc.address, signature, payer.address, wanted.nonce, *proof)

    assert used(chain, wanted)
    assert len(events(receipt, chain.usdc.address, CANCELED)) == 1
    assert events(receipt, chain.usdc.address, USED) == []
    assert events(receipt, chain.usdc.address, TRANSFER) == []
    signed = sign_authorization(chain, payer, wanted)
    with pytest.raises(RpcRefused, match="authorization is used or canceled"):
        send(chain, settler, chain.usdc.address, TRANSFER_VRS, *wanted.arguments, *parts(signed))
    with pytest.raises(RpcRefused, match="authorization is used or canceled"):
        send(chain, settler, chain.usdc.address, signature, payer.address, wanted.nonce, *proof)


def test_only_the_payer_may_cancel(chain: Devnet) -> None:
    payer, other = chain.wallets[:2]
    nonce = keccak(text="another's")
    signed = sign_cancellation(chain, other, nonce)
    with pytest.raises(RpcRefused, match="FiatTokenV2: invalid signature"):
        send(chain, other, chain.usdc.address, CANCEL_VRS, payer.address, nonce, *parts(signed))


@pytest.mark.parametrize(
    ("field", "other"),
    [("to", None), ("value", 2), ("valid_after", 1), ("valid_before", ALWAYS), ("nonce", b"\1" * 32)],
)
def test_nothing_that_was_signed_can_be_altered(chain: Devnet, field: str, other: object) -> None:
    payer, payee, settler = chain.wallets[:3]
    wanted = authorization(payer, payee.address, 1)
    signed = sign_authorization(chain, payer, wanted)
    names = ["payer", "to", "value", "valid_after", "valid_before", "nonce"]
    altered = dict(zip(names, wanted.arguments, strict=True)) | {field: other or settler.address}
    with pytest.raises(RpcRefused, match="FiatTokenV2: invalid signature"):
        send(chain, settler, chain.usdc.address, TRANSFER_VRS, *altered.values(), *parts(signed))


def test_another_wallets_signature_is_refused(chain: Devnet) -> None:
    payer, payee, thief = chain.wallets[:3]
    wanted = authorization(payer, payee.address, 1)
    signed = sign_authorization(chain, thief, wanted)
    with pytest.raises(RpcRefused, match="FiatTokenV2: invalid signature"):
        send(chain, thief, chain.usdc.address, TRANSFER_VRS, *wanted.arguments, *parts(signed))


def test_only_canonical_signatures_count(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    wanted = authorization(payer, payee.address, 1)
    v, r, s = parts(sign_authorization(chain, payer, wanted))
    twin = (SECP256K1_ORDER - int.from_bytes(s, "big")).to_bytes(32, "big")
    for proof, reason in (
        ((55 - v, r, twin), "invalid signature 's' value"),
        ((v - 27, r, s), "invalid signature 'v' value"),
        ((v, bytes(32), s), "ECRecover: invalid signature"),
    ):
        with pytest.raises(RpcRefused, match=reason):
            send(chain, settler, chain.usdc.address, TRANSFER_VRS, *wanted.arguments, *proof)
    with pytest.raises(RpcRefused, match="invalid signature length"):
        send(chain, settler, chain.usdc.address, TRANSFER_BYTES, *wanted.arguments, r + s)


def test_an_authorization_counts_only_between_its_times(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    start, end = now(chain) + 1000, now(chain) + 2000
    wanted = authorization(payer, payee.address, 1, valid_after=start, valid_before=end)
    arguments = (*wanted.arguments, *parts(sign_authorization(chain, payer, wanted)))
    # Both ends are outside.
    for moment, reason in ((start, "not yet valid"), (end, "expired")):
        with pytest.raises(RpcRefused, match=f"authorization is {reason}"):
            simulate(chain, moment, TRANSFER_VRS, *arguments)
    for moment in (start + 1, end - 1):
        simulate(chain, moment, TRANSFER_VRS, *arguments)
    rpc(chain.rpc_url, "evm_setTime", start + 10)
    send(chain, settler, chain.usdc.address, TRANSFER_VRS, *arguments)


@pytest.mark.parametrize("whom", ["payer", "payee"])
def test_a_blacklisted_party_neither_pays_nor_is_paid(chain: Devnet, whom: str) -> None:
    payer, payee, settler = chain.wallets[:3]
    wanted = authorization(payer, payee.address, 1)
    proof = parts(sign_authorization(chain, payer, wanted))
    listed = {"payer": payer, "payee": payee}[whom].address
    as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", listed)
    with pytest.raises(RpcRefused, match="Blacklistable: account is blacklisted"):
        send(chain, settler, chain.usdc.address, TRANSFER_VRS, *wanted.arguments, *proof)
    with pytest.raises(RpcRefused, match="Blacklistable: account is blacklisted"):
        send(chain, payer, chain.usdc.address, "transfer(address,uint256)", payee.address, 1)
    as_owner(chain.rpc_url, chain.usdc, "unBlacklist(address)", listed)
    send(chain, settler, chain.usdc.address, TRANSFER_VRS, *wanted.arguments, *proof)


def test_nothing_moves_while_paused(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    wanted = authorization(payer, payee.address, 1)
    proof = parts(sign_authorization(chain, payer, wanted))
    cancellation = parts(sign_cancellation(chain, payer, wanted.nonce))
    as_owner(chain.rpc_url, chain.usdc, "pause()")
    for sender, signature, arguments in (
        (settler, TRANSFER_VRS, (*wanted.arguments, *proof)),
        (settler, CANCEL_VRS, (payer.address, wanted.nonce, *cancellation)),
        (payer, "transfer(address,uint256)", (payee.address, 1)),
        (payer, "approve(address,uint256)", (settler.address, 1)),
    ):
        with pytest.raises(RpcRefused, match="Pausable: paused"):
            send(chain, sender, chain.usdc.address, signature, *arguments)
    as_owner(chain.rpc_url, chain.usdc, "unpause()")
    send(chain, settler, chain.usdc.address, TRANSFER_VRS, *wanted.arguments, *proof)


def test_a_payer_without_the_money_cannot_pay(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    wanted = authorization(payer, payee.address, balance_of(chain.rpc_url, chain.usdc, payer.address) + 1)
    proof = parts(sign_authorization(chain, payer, wanted))
    with pytest.raises(RpcRefused, match="ERC20: transfer amount exceeds balance"):
        send(chain, settler, chain.usdc.address, TRANSFER_VRS, *wanted.arguments, *proof)
    assert not used(chain, wanted)


def test_a_contract_wallet_is_asked_itself(chain: Devnet) -> None:
    settler, payee = chain.wallets[:2]
    wallet = "0x" + "77" * 20
    send(chain, settler, chain.usdc.address, "transfer(address,uint256)", wallet, 10)
    wanted = Authorization(wallet, payee.address, 10, 0, int(time.time()) + 60, keccak(text="contract"))
    rpc(chain.rpc_url, "anvil_setCode", wallet, SAYS_NO)
    with pytest.raises(RpcRefused, match="FiatTokenV2: invalid signature"):
        send(chain, settler, chain.usdc.address, TRANSFER_BYTES, *wanted.arguments, b"whatever it understands")
    rpc(chain.rpc_url, "anvil_setCode", wallet, SAYS_YES)
    send(chain, settler, chain.usdc.address, TRANSFER_BYTES, *wanted.arguments, b"whatever it understands")
    assert balance_of(chain.rpc_url, chain.usdc, wallet) == 0


def test_a_delegated_accounts_own_key_does_not_count(chain: Devnet) -> None:
    payer, payee, settler = chain.wallets[:3]
    wanted = authorization(payer, payee.address, 1)
    proof = parts(sign_authorization(chain, payer, wanted))
    # EIP-7702: the account's code points to a contract, here one without ERC-1271.
    rpc(chain.rpc_url, "anvil_setCode", payer.address, "0xef0100" + chain.multicall3[2:].lower())
    with pytest.raises(RpcRefused, match="FiatTokenV2: invalid signature"):
        send(chain, settler, chain.usdc.address, TRANSFER_VRS, *wanted.arguments, *proof)


@pytest.mark.parametrize("signature", [PERMIT_VRS, PERMIT_BYTES])
def test_a_permit_gives_an_allowance_once(chain: Devnet, signature: str) -> None:
    owner, spender = chain.wallets[:2]
    signed = sign_permit(chain, owner, spender.address, 42, nonce=0)
    proof = parts(signed) if signature == PERMIT_VRS else (bytes(signed.signature),)
    send(chain, spender, chain.usdc.address, signature, owner.address, spender.address, 42, ALWAYS, *proof)
    assert allowance(chain.rpc_url, chain.usdc, owner.address, spender.address) == 42
    with pytest.raises(RpcRefused, match="EIP2612: invalid signature"):
        send(chain, spender, chain.usdc.address, signature, owner.address, spender.address, 42, ALWAYS, *proof)
    send(
        chain, spender, chain.usdc.address, "transferFrom(address,address,uint256)", owner.address, spender.address, 40
    )
    assert allowance(chain.rpc_url, chain.usdc, owner.address, spender.address) == 2
    with pytest.raises(RpcRefused, match="transfer amount exceeds allowance"):
        send(
            chain,
            spender,
            chain.usdc.address,
            "transferFrom(address,address,uint256)",
            owner.address,
            spender.address,
            3,
        )


def test_an_expired_permit_is_refused(chain: Devnet) -> None:
    owner, spender = chain.wallets[:2]
    deadline = now(chain) - 1
    proof = parts(sign_permit(chain, owner, spender.address, 42, nonce=0, deadline=deadline))
    with pytest.raises(RpcRefused, match="FiatTokenV2: permit is expired"):
        send(chain, spender, chain.usdc.address, PERMIT_VRS, owner.address, spender.address, 42, deadline, *proof)


def test_only_the_owner_administers(chain: Devnet) -> None:
    stranger = chain.wallets[0]
    for signature, arguments in (
        ("mint(address,uint256)", (stranger.address, 1)),
        ("blacklist(address)", (stranger.address,)),
        ("unBlacklist(address)", (stranger.address,)),
        ("pause()", ()),
        ("unpause()", ()),
    ):
        with pytest.raises(RpcRefused, match="caller is not the owner"):
            send(chain, stranger, chain.usdc.address, signature, *arguments)


def test_nobody_pays_the_zero_address(chain: Devnet) -> None:
    with pytest.raises(RpcRefused, match="ERC20: transfer to the zero address"):
        send(chain, chain.wallets[0], chain.usdc.address, "transfer(address,uint256)", ZERO_ADDRESS, 1)
