"""Nonsense and attacks around the channels of other servers: the protocol's own words, nothing moves, no gas is spent."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from pathlib import Path
from typing import Any

from contracts.devnet import Devnet, balance_of
from payments.chain.networks import Network
from payments.verification.signatures import checksum_address
from payments.x402.channel_actions import CLAIMS_MAX
from tests.payments.channelling import Channel, channel_of, claims
from tests.payments.facilitating import SHOP, Change, Running, at, facilitator
from tests.payments.settling import rows

DEPOSIT, PRICE = 10_000, 700
WORD = "invalid_batch_settlement_evm_"
PAYLOAD = "paymentPayload.payload"
ODD_NUMBERS: tuple[Any, ...] = ("1e3", "-1", " 5", "0x10", "007", "", str(2**128), 5, None, True, 1.5, [])


def changed(call: dict[str, Any], *changes: Change) -> dict[str, Any]:
    copied = copy.deepcopy(call)
    for change in changes:
        change(copied)
    return copied


def stranger(channel: Channel) -> Channel:
    """The same channel as another key would sign for it."""
    return dataclasses.replace(channel, payer=dataclasses.replace(channel.payer, private_key="0x" + "31" * 32))


async def refused_everywhere(running: Running, cases: list[tuple[str, dict[str, Any], str]]) -> None:
    for name, call, reason in cases:
        for answer in (await running.verify(call), await running.settle(call)):
            said = answer.get("invalidReason", answer.get("errorReason"))
            assert (answer.get("isValid", answer.get("success")), said) == (False, reason), (name, answer)


async def test_deposits_that_are_wrong(chain: Devnet, network: Network, tmp_path: Path) -> None:
    channel = channel_of(chain, network)
    good, other = channel.deposits(DEPOSIT, PRICE), channel_of(chain, network, 3)
    authorization = f"{PAYLOAD}.deposit.authorization.erc3009Authorization"
    usdt = channel_of(chain, network, token=network.tokens[1])
    cases = [
        ("no authorization", changed(good, at(f"{PAYLOAD}.deposit.authorization", {})), "invalid_payload"),
        ("an amount of nothing", changed(good, at(f"{PAYLOAD}.deposit.amount", "0")), "invalid_payload"),
        (
            "another amount",
            changed(good, at(f"{PAYLOAD}.deposit.amount", "1")),
            f"{WORD}receive_authorization_signature",
        ),
        (
            "a stranger's voucher",
            changed(good, at(f"{PAYLOAD}.voucher", stranger(channel).voucher(PRICE))),
            f"{WORD}voucher_signature",
        ),
        (
            "another channel's voucher",
            changed(good, at(f"{PAYLOAD}.voucher", other.voucher(PRICE))),
            f"{WORD}channel_id_mismatch",
        ),
        (
            "another payer",
            changed(good, at(f"{PAYLOAD}.channelConfig", other.config_json)),
            f"{WORD}channel_id_mismatch",
        ),
        ("expired", channel.deposits(DEPOSIT, PRICE, valid_s=3), f"{WORD}payload_authorization_valid_before"),
        (
            "of the future",
            changed(good, at(f"{authorization}.validAfter", str(2**40))),
            f"{WORD}payload_authorization_valid_after",
        ),
        ("a voucher over more than that", channel.deposits(DEPOSIT, DEPOSIT + 1), f"{WORD}cumulative_exceeds_balance"),
        ("more than there is", channel.deposits(10**15, PRICE), f"{WORD}insufficient_balance"),
        ("without an allowance", usdt.deposits(DEPOSIT, PRICE), f"{WORD}permit2_allowance_required"),
        (
            "another receiver",
            changed(good, at("paymentRequirements.payTo", "0x" + "66" * 20)),
            f"{WORD}receiver_mismatch",
        ),
        (
            "another token",
            changed(good, at("paymentRequirements.asset", network.tokens[1].address)),
            "invalid_payment_requirements",
        ),
        (
            "another authorizer",
            changed(good, at("paymentRequirements.extra.receiverAuthorizer", SHOP)),
            f"{WORD}receiver_authorizer_mismatch",
        ),
        ("no authorizer", changed(good, at("paymentRequirements.extra", {})), f"{WORD}receiver_authorizer_mismatch"),
        (
            "another delay",
            changed(good, at("paymentRequirements.extra.withdrawDelay", 1_000)),
            f"{WORD}withdraw_delay_mismatch",
        ),
        ("an unknown type", changed(good, at(f"{PAYLOAD}.type", "gift")), "invalid_payload"),
        ("no type", changed(good, at(f"{PAYLOAD}.type", ...)), "invalid_payload"),
        ("a type that is a list", changed(good, at(f"{PAYLOAD}.type", ["deposit"])), "invalid_payload"),
        ("another scheme accepted", changed(good, at("paymentPayload.accepted.scheme", "exact")), "invalid_payload"),
    ]
    cases += [
        (f"odd {member} {odd!r}", changed(good, at(f"{PAYLOAD}.{member}", odd)), "invalid_payload")
        for member in ("deposit.amount", "voucher.maxClaimableAmount")
        for odd in ODD_NUMBERS
    ]
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        await refused_everywhere(running, cases)
        assert await rows(running.services.store) == []
        assert (await running.settle(good))["success"]


async def test_vouchers_that_are_wrong(chain: Devnet, network: Network, tmp_path: Path) -> None:
    channel = channel_of(chain, network)
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        unopened = await running.verify(channel.pays(PRICE))
        assert unopened["invalidReason"] == f"{WORD}channel_not_found"
        assert (await running.settle(channel.deposits(DEPOSIT, PRICE)))["success"]
        assert (await running.settle(claims((channel, 3 * PRICE, 2 * PRICE))))["success"]
        cases = [
            (channel.pays(2 * PRICE), f"{WORD}cumulative_below_claimed"),
            (channel.pays(PRICE), f"{WORD}cumulative_below_claimed"),
            (channel.pays(DEPOSIT + 1), f"{WORD}cumulative_exceeds_balance"),
            (stranger(channel).pays(4 * PRICE), f"{WORD}voucher_signature"),
            (
                changed(channel.pays(3 * PRICE), at(f"{PAYLOAD}.voucher.maxClaimableAmount", "9999")),
                f"{WORD}voucher_signature",
            ),
        ]
        for call, reason in cases:
            assert (await running.verify(call))["invalidReason"] == reason
        assert (await running.verify(channel.pays(2 * PRICE + 1)))["isValid"]
        # A voucher moves nothing by itself, and a request for a refund is the server's to complete.
        asks = changed(channel.pays(2 * PRICE), at(f"{PAYLOAD}.type", "refund"))
        assert (await running.verify(asks))["isValid"]
        for call in (channel.pays(3 * PRICE), asks):
            assert (await running.settle(call))["errorReason"] == f"{WORD}payload_type"
        assert len(await rows(running.services.store)) == 2


async def test_a_bad_voucher_is_refused_without_asking_the_chain(
    chain: Devnet, network: Network, tmp_path: Path
) -> None:
    channel = channel_of(chain, network)
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        assert (await running.settle(channel.deposits(DEPOSIT, PRICE)))["success"]
        looks: list[int] = []
        chain_of = running.services.facilitator._schemes[network.caip2, "batch-settlement"]._chain  # type: ignore[attr-defined]
        look = chain_of._look

        async def counted(waiting: Any) -> None:
            looks.append(len(waiting))
            await look(waiting)

        chain_of._look = counted
        assert (await running.verify(stranger(channel).pays(PRICE)))["isValid"] is False
        assert looks == []
        answers = await asyncio.gather(*(running.verify(channel.pays(PRICE + more)) for more in range(10)))
        assert all(answer["isValid"] for answer in answers)
        assert sum(looks) == 10
        assert len(looks) < 10, "those that come together are one call"


async def test_claims_that_are_wrong(chain: Devnet, network: Network, tmp_path: Path) -> None:
    channel, second = channel_of(chain, network), channel_of(chain, network, 3)
    elsewhere = channel_of(chain, network, 4, receiver="0x" + "66" * 20)
    good = claims((channel, PRICE, PRICE))
    foreign = dataclasses.replace(second, authorizer=chain.wallets[7])
    row = f"{PAYLOAD}.claims"
    cases = [
        ("no claims", changed(good, at(row, [])), "invalid_payload"),
        ("claims that are no list", changed(good, at(row, {})), "invalid_payload"),
        ("too many", changed(good, at(row, [channel.row(PRICE, PRICE)] * (CLAIMS_MAX + 1))), "invalid_payload"),
        ("a row that is none", changed(good, at(row, [5])), "invalid_payload"),
        ("more than was signed for", claims((channel, PRICE, PRICE + 1)), f"{WORD}claim_payload"),
        ("one channel twice", claims((channel, PRICE, PRICE), (channel, PRICE, 1)), f"{WORD}claim_payload"),
        (
            "another server's channel",
            claims((elsewhere, PRICE, PRICE), (channel, PRICE, PRICE)),
            f"{WORD}receiver_mismatch",
        ),
        (
            "one of another server's",
            changed(claims((channel, PRICE, PRICE), (elsewhere, PRICE, PRICE)), at("paymentRequirements.payTo", SHOP)),
            f"{WORD}receiver_mismatch",
        ),
        (
            "two authorizers",
            claims((channel, PRICE, PRICE), (foreign, PRICE, PRICE)),
            f"{WORD}authorizer_address_mismatch",
        ),
        ("a stranger's voucher", claims((stranger(channel), PRICE, PRICE)), f"{WORD}voucher_signature"),
        ("not signed", claims((channel, PRICE, PRICE), signed=False), f"{WORD}authorizer_not_configured"),
        (
            "signed by another",
            changed(
                good, at(f"{PAYLOAD}.claimAuthorizerSignature", foreign.authorized_claims((channel, PRICE, PRICE)))
            ),
            f"{WORD}claim_payload",
        ),
        (
            "signed for less",
            changed(good, at(f"{PAYLOAD}.claimAuthorizerSignature", channel.authorized_claims((channel, PRICE, 1)))),
            f"{WORD}claim_payload",
        ),
        ("from an empty channel", claims((second, PRICE, PRICE)), f"{WORD}cumulative_exceeds_balance"),
        ("more than the channel has", claims((channel, 2 * DEPOSIT, 2 * DEPOSIT)), f"{WORD}cumulative_exceeds_balance"),
        (
            "one good, one empty",
            claims((channel, PRICE, PRICE), (second, PRICE, PRICE)),
            f"{WORD}cumulative_exceeds_balance",
        ),
    ]
    cases += [
        (
            f"odd total {odd!r}",
            changed(good, at(row, [channel.row(PRICE, PRICE) | {"totalClaimed": odd}])),
            "invalid_payload",
        )
        for odd in ODD_NUMBERS
    ]
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        assert (await running.settle(channel.deposits(DEPOSIT, PRICE)))["success"]
        for name, call, reason in cases:
            answer = await running.settle(call)
            assert (answer["success"], answer.get("errorReason")) == (False, reason), (name, answer)
        assert (await running.verify(good))["invalidReason"] == f"{WORD}payload_type"
        assert len(await rows(running.services.store)) == 1
        assert (await running.settle(good))["success"]
        # As many as may be, in a body that is larger than a payment's.
        full = changed(
            good, at(row, [dataclasses.replace(channel, salt=salt).row(PRICE, PRICE) for salt in range(CLAIMS_MAX)])
        )
        assert (await running.settle(full))["errorReason"] == f"{WORD}claim_payload"


async def test_settles_and_refunds_that_are_wrong(chain: Devnet, network: Network, tmp_path: Path) -> None:
    channel, second = channel_of(chain, network), channel_of(chain, network, 3)
    good = channel.refunds(DEPOSIT, 0, PRICE)
    cases = [
        (
            "for another receiver",
            changed(channel.settles(), at(f"{PAYLOAD}.receiver", "0x" + "66" * 20)),
            f"{WORD}settle_payload",
        ),
        (
            "in another token",
            changed(channel.settles(), at(f"{PAYLOAD}.token", network.tokens[1].address)),
            f"{WORD}settle_payload",
        ),
        ("a receiver that is none", changed(channel.settles(), at(f"{PAYLOAD}.receiver", "me")), "invalid_payload"),
        ("nothing to settle", channel.settles(), f"{WORD}nothing_to_settle"),
        ("a refund of nothing", channel.refunds(0, 0, PRICE), f"{WORD}refund_amount_invalid"),
        ("the wrong nonce", channel.refunds(DEPOSIT, 1, PRICE), f"{WORD}refund_simulation_failed"),
        ("an unopened channel's", second.refunds(DEPOSIT, 0, PRICE), f"{WORD}refund_no_balance"),
        ("not signed", channel.refunds(DEPOSIT, 0, PRICE, signed=False), f"{WORD}authorizer_not_configured"),
        ("another amount than signed", changed(good, at(f"{PAYLOAD}.amount", "1")), f"{WORD}refund_payload"),
        (
            "another server's",
            changed(good, at("paymentRequirements.payTo", "0x" + "66" * 20)),
            f"{WORD}receiver_mismatch",
        ),
        (
            "another channel's voucher",
            changed(good, at(f"{PAYLOAD}.voucher", second.voucher(PRICE))),
            f"{WORD}channel_id_mismatch",
        ),
        (
            "with another channel's claim",
            changed(good, at(f"{PAYLOAD}.claims", [second.row(1, 1)])),
            f"{WORD}refund_payload",
        ),
        (
            "with a claim that is not signed",
            changed(good, at(f"{PAYLOAD}.claims", [channel.row(PRICE, PRICE)])),
            f"{WORD}authorizer_not_configured",
        ),
        ("a member too many", changed(good, at(f"{PAYLOAD}.memo", "x")), "invalid_payload"),
    ]
    cases += [
        (f"odd {member} {odd!r}", changed(good, at(f"{PAYLOAD}.{member}", odd)), "invalid_payload")
        for member in ("amount", "refundNonce")
        for odd in ODD_NUMBERS
        if (member, odd) != ("refundNonce", str(2**128))
    ]
    before = balance_of(chain.rpc_url, chain.usdc, channel.payer.address)
    async with facilitator(chain, network, tmp_path / "farebox.db") as running:
        assert (await running.settle(channel.deposits(DEPOSIT, PRICE)))["success"]
        for name, call, reason in cases:
            answer = await running.settle(call)
            assert (answer["success"], answer.get("errorReason")) == (False, reason), (name, answer)
        assert len(await rows(running.services.store)) == 1
        # More than there is means all that there is; what is told is what was given back.
        more = channel.refunds(DEPOSIT + 5, 0, PRICE)
        answer = await running.settle(more)
        assert (answer["success"], answer["amount"]) == (True, str(DEPOSIT)), answer
        assert (await running.settle(channel.refunds(DEPOSIT, 0, PRICE)))["success"] is False
    assert balance_of(chain.rpc_url, chain.usdc, channel.payer.address) == before


async def test_the_authorizers_address_has_no_letter_case(chain: Devnet, network: Network, tmp_path: Path) -> None:
    channel = channel_of(chain, network)
    spelled = checksum_address(channel.config.receiver_authorizer)
    for spelling in (spelled, spelled.lower(), "0x" + spelled[2:].upper()):
        call = changed(channel.deposits(DEPOSIT, PRICE), at("paymentRequirements.extra.receiverAuthorizer", spelling))
        async with facilitator(chain, network, tmp_path / "farebox.db") as running:
            assert (await running.verify(call))["isValid"], spelling
