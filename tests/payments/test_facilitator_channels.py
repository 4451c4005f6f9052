"""The facilitator and another server's payment channels, with everything real: from the deposit to the refund."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import Devnet, approve_permit2, balance_of, rpc, send_as
from payments import accounts
from payments.chain.channel_contract import encode_config
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, Network
from payments.chain.transactions import selector
from payments.verification.signatures import checksum_address
from payments.x402.channels import hex32
from tests.payments.channelling import Channel, channel_of, claims
from tests.payments.facilitating import SHOP, Running, drain, facilitator, held_by_shop, until_submitted
from tests.payments.settling import rows

DEPOSIT, PRICE = 10_000, 700
WORD = "invalid_batch_settlement_evm_"


def state(channel: Channel, balance: int, claimed: int = 0, nonce: int = 0, withdrawing: int = 0) -> dict[str, Any]:
    return {
        "channelId": hex32(channel.number),
        "balance": str(balance),
        "totalClaimed": str(claimed),
        "withdrawRequestedAt": withdrawing,
        "refundNonce": str(nonce),
    }


@pytest.mark.parametrize("symbol", ["USDC", "USDT", "USDC by Permit2"])
async def test_a_channels_whole_life(chain: Devnet, network: Network, database: Path | str, symbol: str) -> None:
    token = next(token for token in network.tokens if token.symbol == symbol[:4])
    if symbol != "USDC":
        token = dataclasses.replace(token, transfer_method="permit2")
        approve_permit2(chain.rpc_url, chain.usdc if symbol[:4] == "USDC" else chain.usdt, chain.wallets[2].private_key)
    channel = channel_of(chain, network, token=token)
    payer = channel.payer.address.lower()
    async with facilitator(chain, network, database) as running:
        opening = channel.deposits(DEPOSIT, PRICE)
        assert await running.verify(opening) == {"isValid": True, "payer": payer, "extra": state(channel, 0)}
        assert await rows(running.services.store) == []
        opened = await running.settle(opening)
        assert opened["success"], opened
        assert (opened["payer"], opened["amount"]) == (payer, str(DEPOSIT))
        assert opened["extra"] == {"channelState": state(channel, DEPOSIT)}
        assert (await running.settle(opening))["errorReason"] == "duplicate_settlement"

        verified = await running.verify(channel.pays(2 * PRICE))
        assert verified == {"isValid": True, "payer": payer, "extra": state(channel, DEPOSIT)}

        claim = claims((channel, 2 * PRICE, 2 * PRICE))
        claimed = await running.settle(claim)
        assert (claimed["success"], claimed["amount"]) == (True, str(2 * PRICE)), claimed
        assert await running.settle(claim) == claimed, "it is told to whoever asks"
        assert held_by_shop(chain) == 0
        settled = await running.settle(channel.settles())
        assert settled["success"], settled
        assert (settled["success"], settled["amount"]) == (True, str(2 * PRICE)), settled
        assert held_by_shop(chain) == 2 * PRICE
        assert (await running.settle(channel.settles()))["errorReason"] == f"{WORD}nothing_to_settle"

        before = balance_of(chain.rpc_url, chain.usdc if symbol[:4] == "USDC" else chain.usdt, payer)
        left = DEPOSIT - 3 * PRICE
        refund = channel.refunds(left, 0, 3 * PRICE, 3 * PRICE)
        refunded = await running.settle(refund)
        assert (refunded["success"], refunded["amount"], refunded["payer"]) == (True, str(left), payer), refunded
        assert refunded["extra"] == {"channelState": state(channel, 3 * PRICE, 3 * PRICE, 1)}
        assert (await running.settle(refund))["transaction"] == refunded["transaction"]
        assert balance_of(chain.rpc_url, chain.usdc if symbol[:4] == "USDC" else chain.usdt, payer) == before + left
        # Another round of what can be repeated.
        assert (await running.settle(channel.settles()))["amount"] == str(PRICE)
        assert held_by_shop(chain) == 3 * PRICE
        empty = await running.settle(channel.refunds(1, 1, 3 * PRICE))
        assert empty["errorReason"] == f"{WORD}refund_no_balance"


async def until_pending(chain: Devnet) -> dict[str, Any]:
    """The transaction that waits for a block, once there is one."""
    async with asyncio.timeout(20):
        while True:
            for pending in rpc(chain.rpc_url, "txpool_content")["pending"].values():
                for transaction in pending.values():
                    return dict(transaction)
            await asyncio.sleep(0.01)


async def open_channel(running: Running, channel: Channel) -> None:
    answer = await running.settle(channel.deposits(DEPOSIT, PRICE))
    assert answer["success"], answer


async def test_many_channels_are_claimed_in_one_transaction(chain: Devnet, network: Network, tmp_path: Path) -> None:
    channels = [channel_of(chain, network, payer) for payer in range(2, 7)]
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        await asyncio.gather(*(open_channel(running, channel) for channel in channels))
        claimed = await running.settle(claims(*((channel, PRICE, PRICE) for channel in channels)))
        assert (claimed["success"], claimed["amount"]) == (True, str(5 * PRICE))
        # A batch in which only some have something new.
        more = await running.settle(claims((channels[0], 2 * PRICE, PRICE + 1), (channels[1], PRICE, PRICE)))
        assert (more["success"], more["amount"]) == (True, "1")
        nothing = await running.settle(claims((channels[1], PRICE, PRICE), (channels[2], PRICE, PRICE - 5)))
        assert (nothing["success"], nothing["transaction"], nothing["amount"]) == (True, "", "0")


async def test_the_same_at_once_is_done_once_and_told_to_all(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    channel = channel_of(chain, network)
    async with facilitator(chain, network, database) as running:
        opening = channel.deposits(DEPOSIT, PRICE)
        opened = await asyncio.gather(*(running.settle(opening) for _ in range(6)))
        assert [answer["success"] for answer in opened].count(True) == 1
        assert {answer.get("errorReason") for answer in opened} == {None, "duplicate_settlement"}
        for call in (claims((channel, PRICE, PRICE)), channel.settles(), channel.refunds(DEPOSIT, 0, PRICE)):
            answers = await asyncio.gather(*(running.settle(call) for _ in range(6)))
            assert all(answer["success"] for answer in answers), answers
            assert len({answer["transaction"] for answer in answers}) == 1
        kinds = sorted(kind for (kind,) in await rows(running.services.store, "kind"))
        assert kinds == [f"facilitated_{name}" for name in ("claim", "deposit", "refund", "settle")]
    assert held_by_shop(chain) == PRICE


async def test_an_unknown_outcome_is_pending_and_found_later(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    channel = channel_of(chain, network)
    for call in (
        channel.deposits(DEPOSIT, PRICE),
        claims((channel, PRICE, PRICE)),
        channel.settles(),
        channel.refunds(DEPOSIT, 0, PRICE),
    ):
        rpc(chain.rpc_url, "evm_setAutomine", False)
        async with facilitator(chain, network, database, settlement_wait_s=0.5) as running:
            pending = await running.settle(call)
            assert pending["errorReason"] == "settlement_pending", pending
        rpc(chain.rpc_url, "evm_setAutomine", True)
        rpc(chain.rpc_url, "evm_mine")
        async with facilitator(chain, network, database) as running:
            answer = await running.settle(call)
            assert answer["success"], answer
            assert answer["transaction"]


async def test_a_deposit_that_reverts_is_the_payers(chain: Devnet, network: Network, tmp_path: Path) -> None:
    channel = channel_of(chain, network)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with facilitator(chain, network, tmp_path / "farebox.db", client_failures_per_hour=1) as running:
        opening = channel.deposits(DEPOSIT, PRICE)
        settling = asyncio.create_task(running.settle(opening))
        await until_submitted(chain, running)
        drain(chain, channel.payer.address)
        rpc(chain.rpc_url, "evm_mine")
        failed = await settling
        assert failed["errorReason"] == f"{WORD}deposit_transaction_failed", failed
        assert (await running.settle(opening))["errorReason"] == f"{WORD}deposit_transaction_failed"
        other = channel_of(chain, network, 3)
        assert (await running.settle(other.deposits(DEPOSIT, PRICE)))["errorReason"] == "client_suspended"
        assert (await running.settle(other.deposits(10**18, PRICE)))["errorReason"] == "client_suspended"


async def test_what_was_done_by_somebody_else_is_done(chain: Devnet, network: Network, tmp_path: Path) -> None:
    """A stranger sends our very calls before us: the evidence is theirs, and nobody is told that it failed."""
    channel = channel_of(chain, network)
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        await open_channel(running, channel)
        for call in (claims((channel, PRICE, PRICE)), channel.settles(), channel.refunds(DEPOSIT, 0, PRICE)):
            rpc(chain.rpc_url, "evm_setAutomine", False)
            settling = asyncio.create_task(running.settle(call))
            ours = await until_pending(chain)
            stranger = chain.wallets[9].address
            rpc(chain.rpc_url, "anvil_impersonateAccount", stranger)
            theirs = {"from": stranger, "to": ours["to"], "data": ours["input"], "gasPrice": hex(10**12)}
            sent = rpc(chain.rpc_url, "eth_sendTransaction", theirs)
            rpc(chain.rpc_url, "evm_mine")
            rpc(chain.rpc_url, "evm_setAutomine", True)
            answer = await settling
            assert (answer["success"], answer.get("transaction")) == (True, sent), answer
    assert held_by_shop(chain) == PRICE


async def test_a_claim_that_failed_may_be_made_again(
    chain: Devnet, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = channel_of(chain, network)
    claim = claims((channel, PRICE, PRICE))
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        await open_channel(running, channel)
        balance = rpc(chain.rpc_url, "eth_getStorageAt", BATCH_SETTLEMENT_ADDRESS, slot_of(channel), "latest")
        rpc(chain.rpc_url, "evm_setAutomine", False)
        settling = asyncio.create_task(running.settle(claim))
        await until_pending(chain)
        rpc(chain.rpc_url, "anvil_setStorageAt", BATCH_SETTLEMENT_ADDRESS, slot_of(channel), "0x" + "0" * 64)
        rpc(chain.rpc_url, "evm_mine")
        rpc(chain.rpc_url, "evm_setAutomine", True)
        failed = await settling
        assert failed["errorReason"] == f"{WORD}claim_transaction_failed", failed
        refused = await running.settle(claim)
        assert refused["errorReason"] == f"{WORD}cumulative_exceeds_balance", refused
        rpc(chain.rpc_url, "anvil_setStorageAt", BATCH_SETTLEMENT_ADDRESS, slot_of(channel), balance)
        answers = await asyncio.gather(*(running.settle(claim) for _ in range(3)))
        assert all(answer["success"] for answer in answers), answers
        assert len({answer["transaction"] for answer in answers}) == 1


def slot_of(channel: Channel) -> str:
    from payments.verification.signatures import keccak256

    return "0x" + keccak256(channel.number.to_bytes(32, "big") + (0).to_bytes(32, "big")).hex()


async def test_we_sign_only_for_the_key_that_is_bound_to_the_receiver(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    ours = dataclasses.replace(channel_of(chain, network), authorizer=chain.wallets[0])
    async with facilitator(chain, network, database, require_key=True) as running:
        offered = running.services.facilitator.supported()["kinds"][-1]
        assert offered["extra"] == {"receiverAuthorizer": checksum_address(chain.wallets[0].address.lower())}
        store = running.services.store
        keys = {
            name: (await store.write(lambda tx, to=to: accounts.create_key(tx, "k", "default", pay_to=to)))[1]  # type: ignore[misc]
            for name, to in (("shop", SHOP), ("free", None), ("other", "0x" + "66" * 20))
        }

        async def as_(name: str, path: str, call: dict[str, Any]) -> dict[str, Any]:
            answer = await running.http.post(path, json=call, headers={"authorization": f"Bearer {keys[name]}"})
            assert answer.status_code == 200, answer.text
            parsed: dict[str, Any] = answer.json()
            return parsed

        opening = ours.deposits(DEPOSIT, PRICE)
        unbound = await as_("free", "/verify", opening)
        assert unbound["invalidReason"] == f"{WORD}authorizer_not_configured"
        assert "--pay-to" in unbound["invalidMessage"]
        assert (await as_("other", "/verify", opening))["invalidReason"] == "invalid_payment_requirements"
        assert (await as_("shop", "/verify", opening))["isValid"]
        assert (await as_("shop", "/settle", opening))["success"]
        # The payer itself, with a key of its own, gets nothing signed.
        for call in (
            claims((ours, PRICE, PRICE), signed=False),
            ours.refunds(DEPOSIT, 0, PRICE, signed=False),
            ours.refunds(DEPOSIT - PRICE, 0, PRICE, PRICE, signed=False),
        ):
            for name in ("free", "other"):
                refused = await as_(name, "/settle", call)
                assert refused["success"] is False
                assert refused["errorReason"] in {
                    f"{WORD}authorizer_not_configured",
                    "invalid_payment_requirements",
                }, refused
        assert len(await rows(store)) == 1
        for call in (
            claims((ours, PRICE, PRICE), signed=False),
            ours.settles(),
            ours.refunds(DEPOSIT - PRICE, 0, PRICE, PRICE, signed=False),
        ):
            answer = await as_("shop", "/settle", call)
            assert answer["success"], answer
        own = channel_of(chain, network, 3)
        unsigned = await as_("shop", "/settle", claims((own, PRICE, PRICE), signed=False))
        assert unsigned["errorReason"] == f"{WORD}authorizer_address_mismatch"
    assert held_by_shop(chain) == PRICE
    async with facilitator(chain, network, database) as running:
        assert "extra" not in running.services.facilitator.supported()["kinds"][-1], "nothing is signed for anybody"
        open_to_all = await running.settle(ours.refunds(1, 1, PRICE, signed=False))
        assert open_to_all["errorReason"] == f"{WORD}authorizer_not_configured"


async def test_channels_are_signed_for_with_the_key_that_they_name(
    chain: Devnet, network: Network, tmp_path: Path
) -> None:
    old = dataclasses.replace(channel_of(chain, network), authorizer=chain.wallets[0])
    keys = (chain.wallets[7].private_key, chain.wallets[0].private_key)
    async with facilitator(chain, network, tmp_path / "db", require_key=True, signer_keys=keys) as running:
        offered = running.services.facilitator.supported()["kinds"][-1]
        assert offered["extra"] == {"receiverAuthorizer": checksum_address(chain.wallets[7].address.lower())}
        store = running.services.store
        _, key = await store.write(lambda tx: accounts.create_key(tx, "k", "default", pay_to=SHOP))
        for call in (old.deposits(DEPOSIT, PRICE), claims((old, PRICE, PRICE), signed=False), old.settles()):
            answer = await running.http.post("/settle", json=call, headers={"authorization": f"Bearer {key}"})
            assert answer.json()["success"], answer.text
    assert held_by_shop(chain) == PRICE


async def test_a_payers_announced_withdrawal_is_told(chain: Devnet, network: Network, tmp_path: Path) -> None:
    channel = channel_of(chain, network)
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        await open_channel(running, channel)
        initiate = selector("initiateWithdraw((address,address,address,address,address,uint40,bytes32),uint128)")
        data = initiate + encode_config(channel.config) + DEPOSIT.to_bytes(32, "big")
        rpc(chain.rpc_url, "anvil_impersonateAccount", channel.payer.address)
        send_as(chain.rpc_url, channel.payer.address, BATCH_SETTLEMENT_ADDRESS, "0x" + data.hex())
        verified = await running.verify(channel.pays(2 * PRICE))
        assert verified["extra"]["withdrawRequestedAt"] > 0
        assert (await running.settle(claims((channel, 2 * PRICE, 2 * PRICE))))["success"]
