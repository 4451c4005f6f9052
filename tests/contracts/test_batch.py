"""The batch contract: many settlements in one transaction, each by itself, and only for the operator's signers."""

from __future__ import annotations

import contextlib

import pytest

from contracts import operators
from contracts.devnet import Devnet, RpcRefused, balance_of, call_data, place_operator_contracts, receipt, rpc, send_as
from payments.chain.batches import Executed, batch_gas_limit, encode_execute, logs_of_call, logs_of_calls
from payments.chain.transactions import TRANSFER_TOPIC, Call
from tests.contracts.calls import authorization, encoded, events, read, selector, sign_authorization

TRANSFER = "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,uint8,bytes32,bytes32)"
GAS_EACH = 150_000
BURNER = "0x00000000000000000000000000000000000b0413"
BOMBER = "0x00000000000000000000000000000000000b0b0b"


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


def execute(chain: Devnet, batch: str, calls: list[Call], *, sender: int = 9, gas: int | None = None) -> dict:  # type: ignore[type-arg]
    """Send a batch whatever becomes of it, and return its receipt."""
    transaction = {
        "from": chain.wallets[sender].address,
        "to": batch,
        "data": "0x" + encode_execute(calls).hex(),
        "gas": hex(batch_gas_limit(calls) if gas is None else gas),
    }
    sent = rpc(chain.rpc_url, "eth_sendTransaction", transaction)
    with contextlib.suppress(RpcRefused):  # raised for one that reverted
        receipt(chain.rpc_url, sent)
    mined: dict = rpc(chain.rpc_url, "eth_getTransactionReceipt", sent)  # type: ignore[type-arg]
    return mined


def results_of(mined: dict, count: int) -> list[Executed] | None:  # type: ignore[type-arg]
    """What the calls of a batch came to; None if nothing was executed."""
    if mined["status"] != "0x1":
        return None
    results = logs_of_calls(mined)
    assert len(results) == count
    assert [logs_of_call(mined, position) is not None for position in range(count)] == [
        result.success for result in results
    ]
    return results


def test_every_payment_of_a_batch_is_made_and_its_logs_are_told_apart(chain: Devnet, batch: str) -> None:
    before = balance_of(chain.rpc_url, chain.usdc, chain.wallets[7].address)

    mined = execute(chain, batch, [payment(chain, payer, 1_000 + payer) for payer in range(5)])

    assert balance_of(chain.rpc_url, chain.usdc, chain.wallets[7].address) - before == 5_010
    results = results_of(mined, 5)
    assert results is not None
    assert [result.success for result in results] == [True] * 5
    for payer, result in enumerate(results):
        moved = [log for log in result.logs if log["topics"][0] == TRANSFER_TOPIC]
        assert [int(log["data"], 16) for log in moved] == [1_000 + payer]
        assert moved[0]["topics"][1][-40:] == chain.wallets[payer].address[2:].lower()


def test_a_payment_that_fails_undoes_only_itself(chain: Devnet, batch: str) -> None:
    good, bad, other = payment(chain, 0, 5), payment(chain, 1, 10**15), payment(chain, 2, 7)

    results = results_of(execute(chain, batch, [good, bad, other]), 3)

    assert results is not None
    assert [result.success for result in results] == [True, False, True]
    assert results[1].logs == []


def test_a_call_that_burns_all_it_gets_leaves_the_others_theirs(chain: Devnet, batch: str) -> None:
    rpc(chain.rpc_url, "anvil_setCode", BURNER, "0x5b600056")  # jumps to itself for ever
    # Returns a megabyte of zeros: reading it would cost the caller more than making it.
    rpc(chain.rpc_url, "anvil_setCode", BOMBER, "0x620a00006000f3")
    calls = [payment(chain, 0, 5), Call(BURNER, b"", GAS_EACH), Call(BOMBER, b"", 4_000_000), payment(chain, 1, 7)]

    mined = execute(chain, batch, calls)

    results = results_of(mined, 4)
    assert results is not None
    assert [result.success for result in results] == [True, False, True, True]
    spent = int(mined["gasUsed"], 16)
    assert spent < 2 * 120_000 + GAS_EACH + 4_000_000


def test_a_batch_with_too_little_gas_does_nothing_at_all(chain: Devnet, batch: str) -> None:
    """For want of gas no single payment fails, which would look as if it could not be made."""
    calls = [payment(chain, payer, 9) for payer in range(4)]
    enough = batch_gas_limit(calls)
    treasury = chain.wallets[7].address
    before = balance_of(chain.rpc_url, chain.usdc, treasury)
    outcomes = []

    for eighths in range(1, 9):
        results = results_of(execute(chain, batch, calls, gas=enough * eighths // 8), 4)
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
    for sender in (stranger, owner):
        with pytest.raises(RpcRefused) as refused:
            send_as(chain.rpc_url, sender.address, batch, data)
        assert refused.value.data == selector("NotSigner()")

    with pytest.raises(RpcRefused) as refused:
        send_as(chain.rpc_url, signer.address, batch, call_data("setSigner(address,bool)", stranger.address, 1))
    assert refused.value.data == selector("NotOwner()")

    send_as(chain.rpc_url, owner.address, batch, call_data("setSigner(address,bool)", stranger.address, 1))
    send_as(chain.rpc_url, owner.address, batch, call_data("setSigner(address,bool)", signer.address, 0))
    send_as(chain.rpc_url, stranger.address, batch, data)
    with pytest.raises(RpcRefused):
        send_as(chain.rpc_url, signer.address, batch, data)


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
