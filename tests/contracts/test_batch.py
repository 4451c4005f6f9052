"""The batch contract: many settlements in one transaction, each by itself, and only for the operator's signers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from contracts import operators
from contracts.devnet import Devnet, RpcRefused, balance_of, call_data, place_operator_contracts, receipt, rpc, send_as
from payments.chain.batches import (
    Executed,
    batch_gas_limit,
    encode_batch,
    encode_execute,
    logs_of_call,
    logs_of_calls,
)
from payments.chain.transactions import TRANSFER_TOPIC, Call
from tests.contracts import hostile_code
from tests.contracts.calls import authorization, encoded, events, read, selector, sign_authorization

TRANSFER = "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,uint8,bytes32,bytes32)"
GAS_EACH = 150_000
HOSTILE = "0x00000000000000000000000000000000000b0b0b"

Encode = Callable[[Sequence[Call]], bytes]
BOTH = pytest.mark.parametrize("encode", [encode_execute, encode_batch])


@pytest.fixture
def batch(chain: Devnet) -> str:
    """The operator's contract; wallet 8 owns it, wallet 9 is its signer."""
    owner, signer = chain.wallets[8:10]
    treasury = chain.wallets[7].address
    return place_operator_contracts(chain.rpc_url, treasury, owner.address, [signer.address])[0]


def payment(chain: Devnet, payer: int, value: int, number: int = 0) -> Call:
    """A payment of a wallet to wallet 7, as a call of the token."""
    wallet = chain.wallets[payer]
    terms = authorization(wallet, chain.wallets[7].address, value, nonce=bytes([payer, number]).rjust(32, b"\1"))
    signed = sign_authorization(chain, wallet, terms)
    r, s = signed.r.to_bytes(32, "big"), signed.s.to_bytes(32, "big")
    data = encoded(TRANSFER, *terms.arguments, signed.v, r, s)
    return Call(chain.usdc.address.lower(), bytes.fromhex(data[2:]), GAS_EACH)


def execute(
    chain: Devnet,
    batch: str,
    calls: list[Call],
    *,
    sender: int = 9,
    gas: int | None = None,
    encode: Encode = encode_batch,
) -> dict[str, Any]:
    """Send a batch whatever becomes of it, and return its receipt. It is packed if it can be."""
    transaction = {
        "from": chain.wallets[sender].address,
        "to": batch,
        "data": "0x" + encode(calls).hex(),
        "gas": hex(batch_gas_limit(calls) if gas is None else gas),
    }
    sent = rpc(chain.rpc_url, "eth_sendTransaction", transaction)
    with contextlib.suppress(RpcRefused):  # raised for one that reverted
        receipt(chain.rpc_url, sent)
    mined: dict[str, Any] = rpc(chain.rpc_url, "eth_getTransactionReceipt", sent)
    return mined


def results_of(mined: dict[str, Any], count: int) -> list[Executed] | None:
    """What the calls of a batch came to; None if nothing was executed."""
    if mined["status"] != "0x1":
        return None
    results = logs_of_calls(mined)
    assert len(results) == count
    assert [logs_of_call(mined, position) is not None for position in range(count)] == [
        result.success for result in results
    ]
    return results


@BOTH
def test_every_payment_of_a_batch_is_made_and_its_logs_are_told_apart(
    chain: Devnet, batch: str, encode: Encode
) -> None:
    before = balance_of(chain.rpc_url, chain.usdc, chain.wallets[7].address)

    mined = execute(chain, batch, [payment(chain, payer, 1_000 + payer) for payer in range(5)], encode=encode)

    assert balance_of(chain.rpc_url, chain.usdc, chain.wallets[7].address) - before == 5_010
    results = results_of(mined, 5)
    assert results is not None
    assert [result.success for result in results] == [True] * 5
    for payer, result in enumerate(results):
        moved = [log for log in result.logs if log["topics"][0] == TRANSFER_TOPIC]
        assert [int(log["data"], 16) for log in moved] == [1_000 + payer]
        assert moved[0]["topics"][1][-40:] == chain.wallets[payer].address[2:].lower()


@BOTH
def test_a_payment_that_fails_undoes_only_itself(chain: Devnet, batch: str, encode: Encode) -> None:
    good, bad, other = payment(chain, 0, 5), payment(chain, 1, 10**15), payment(chain, 2, 7)

    results = results_of(execute(chain, batch, [good, bad, other], encode=encode), 3)

    assert results is not None
    assert [result.success for result in results] == [True, False, True]
    assert results[1].logs == []


@pytest.mark.parametrize(
    ("code", "gas", "success"),
    [
        (hostile_code.BURNS_ALL, GAS_EACH, False),
        (hostile_code.RETURNS_MEGABYTES, 10_000_000, True),
        (hostile_code.REVERTS_WITH_MEGABYTES, 10_000_000, False),
        (hostile_code.REVERTS_WITH_MEGABYTES, GAS_EACH, False),
        (hostile_code.RETURNS_FALSE, GAS_EACH, True),
    ],
    ids=["burns all", "returns megabytes", "reverts with megabytes", "runs out of gas for them", "returns false"],
)
def test_a_hostile_token_leaves_the_others_theirs_and_uses_no_more_gas_than_it_was_given(
    chain: Devnet, batch: str, code: str, gas: int, success: bool
) -> None:
    rpc(chain.rpc_url, "anvil_setCode", HOSTILE, code)
    calls = [payment(chain, 0, 5), Call(HOSTILE, b"", gas), payment(chain, 1, 7)]

    mined = execute(chain, batch, calls)

    results = results_of(mined, 3)
    assert results is not None
    assert [result.success for result in results] == [True, success, True]
    assert results[1].logs == []  # success alone proves nothing
    assert int(mined["gasUsed"], 16) < 2 * 120_000 + gas


def test_a_token_that_calls_back_settles_nothing_more_and_cannot_speak_for_the_contract(
    chain: Devnet, batch: str
) -> None:
    rpc(chain.rpc_url, "anvil_setCode", HOSTILE, hostile_code.CALLS_BACK)
    treasury = chain.wallets[7].address
    before = balance_of(chain.rpc_url, chain.usdc, treasury)
    for number, encode in enumerate((encode_execute, encode_batch)):
        inner = encode([payment(chain, 3, 900)])
        calls = [payment(chain, 0, 5, number), Call(HOSTILE, inner, 500_000), payment(chain, 1, 7, number)]

        results = results_of(execute(chain, batch, calls), 3)

        assert results is not None
        assert [result.success for result in results] == [True, True, True]
        # What it says in its own name is a log of its own call, and no border between calls.
        assert [log["address"].lower() for log in results[1].logs] == [HOSTILE]
        assert rpc(chain.rpc_url, "eth_getStorageAt", HOSTILE, "0x0", "latest") == "0x" + "00" * 32
    assert balance_of(chain.rpc_url, chain.usdc, treasury) - before == 2 * (5 + 7)


@BOTH
def test_a_batch_with_too_little_gas_does_nothing_at_all(chain: Devnet, batch: str, encode: Encode) -> None:
    """For want of gas no single payment fails, which would look as if it could not be made."""
    calls = [payment(chain, payer, 9) for payer in range(4)]
    enough = batch_gas_limit(calls)
    treasury = chain.wallets[7].address
    before = balance_of(chain.rpc_url, chain.usdc, treasury)
    outcomes = []

    for eighths in range(1, 9):
        results = results_of(execute(chain, batch, calls, gas=enough * eighths // 8, encode=encode), 4)
        outcomes.append(results is not None)
        if results is not None:
            assert [result.success for result in results] == [True] * 4
            break
        assert balance_of(chain.rpc_url, chain.usdc, treasury) == before

    assert outcomes[0] is False
    assert outcomes[-1] is True


def test_only_a_signer_may_send_a_batch(chain: Devnet, batch: str) -> None:
    owner, signer, stranger = chain.wallets[8], chain.wallets[9], chain.wallets[3]
    data = "0x" + encode_execute([payment(chain, 0, 5)]).hex()
    packed = "0x" + encode_batch([payment(chain, 0, 5)]).hex()
    assert packed[:10] != data[:10]
    for sender in (stranger, owner):
        for attempt in (data, packed):
            with pytest.raises(RpcRefused) as refused:
                send_as(chain.rpc_url, sender.address, batch, attempt)
            assert refused.value.data == selector("NotSigner()")

    with pytest.raises(RpcRefused) as refused:
        send_as(chain.rpc_url, signer.address, batch, call_data("setSigner(address,bool)", stranger.address, 1))
    assert refused.value.data == selector("NotOwner()")

    send_as(chain.rpc_url, owner.address, batch, call_data("setSigner(address,bool)", stranger.address, 1))
    send_as(chain.rpc_url, owner.address, batch, call_data("setSigner(address,bool)", signer.address, 0))
    send_as(chain.rpc_url, stranger.address, batch, data)
    with pytest.raises(RpcRefused):
        send_as(chain.rpc_url, signer.address, batch, data)


def test_what_is_not_alike_is_not_packed(chain: Devnet, batch: str) -> None:
    alike = [payment(chain, payer, 1_000) for payer in range(3)]
    packed = encode_batch(alike)
    assert len(packed) < len(encode_execute(alike)) * 2 // 3
    other = payment(chain, 3, 1_000)
    for changed in (
        dataclasses.replace(other, to=chain.usdt.address.lower()),
        dataclasses.replace(other, gas=GAS_EACH + 1),
        dataclasses.replace(other, data=other.data + b"\0"),
        dataclasses.replace(other, data=b"\0" * 4 + other.data[4:]),
        with_argument(other, 0, 2**160),  # no address
        with_argument(other, 1, 7),  # to somebody else
        with_argument(other, 2, 2**96),
        with_argument(other, 3, 2**48),
        with_argument(other, 4, 2**256 - 1),  # without end
        with_argument(other, 6, 256),
    ):
        assert encode_batch([*alike, changed]) == encode_execute([*alike, changed])
    widest = with_argument(with_argument(other, 2, 2**96 - 1), 4, 2**48 - 1)
    assert encode_batch([*alike, widest])[:4] == packed[:4]


def with_argument(call: Call, position: int, value: int) -> Call:
    start = 4 + 32 * position
    return dataclasses.replace(call, data=call.data[:start] + value.to_bytes(32, "big") + call.data[start + 32 :])


def test_packed_transfers_of_another_length_are_refused(chain: Devnet, batch: str) -> None:
    whole = encode_batch([payment(chain, 0, 5)])
    token, to = chain.usdc.address, chain.wallets[7].address
    transfers = whole[4 + 5 * 32 :][:141]
    for cut in (transfers[:-1], transfers + b"\0"):
        data = encoded("executeTransfers(address,address,uint256,bytes)", token, to, GAS_EACH, cut)
        with pytest.raises(RpcRefused) as refused:
            send_as(chain.rpc_url, chain.wallets[9].address, batch, data)
        assert refused.value.data == selector("NotTransfers()")


def test_only_the_owner_gives_the_contract_away(chain: Devnet, batch: str) -> None:
    owner, stranger = chain.wallets[8], chain.wallets[3]
    with pytest.raises(RpcRefused):
        send_as(chain.rpc_url, stranger.address, batch, call_data("setOwner(address)", stranger.address))
    send_as(chain.rpc_url, owner.address, batch, call_data("setOwner(address)", stranger.address))
    assert read(chain, batch, "owner()")[-20:].hex() == stranger.address[2:].lower()


def test_the_contract_is_created_where_it_was_said_to_be(chain: Devnet) -> None:
    owner, first, second = (wallet.address for wallet in chain.wallets[3:6])
    wanted = operators.batch(owner, [second, first])
    assert wanted == operators.batch(owner, [first, second])

    sent = send_as(chain.rpc_url, owner, operators.CREATE2_DEPLOYER, "0x" + wanted.deployer_data.hex())

    assert read(chain, wanted.address, "owner()")[-20:].hex() == owner[2:].lower()
    assert len(events(receipt(chain.rpc_url, sent), wanted.address, "SignerChanged(address,bool)")) == 2
    created = rpc(chain.rpc_url, "eth_getCode", wanted.address, "latest")
    placed, _ = place_operator_contracts(chain.rpc_url, owner, owner, [first, second])
    assert placed == wanted.address
    assert rpc(chain.rpc_url, "eth_getCode", placed, "latest") == created
