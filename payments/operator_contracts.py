"""The operator's own contracts on a real network: created once, at the same address by whoever creates them, and looked at.

`create` spends gas, the rest only reads. What the contracts do is in `contracts/src`; where they are to be, in
`contracts.operators`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from contracts import operators
from contracts.operators import CREATE2_DEPLOYER, Creation
from payments.chain.networks import Network
from payments.chain.rpc import Reply, Request, Rpc, RpcError, RpcUnavailable
from payments.chain.signers import FeeEstimate, Signer
from payments.chain.transactions import Call, Fees, address_word, selector, sign_transaction
from payments.doctor import Finding

MINED_WITHIN_S = 180.0
_OWNER = "0x" + selector("owner()").hex()
_IS_SIGNER = selector("isSigner(address)")
_POLL_S_MAX = 1.0


class CreationFailed(Exception):
    """A contract could not be created; the message says why. Nothing is lost but gas: creating it again goes on from there."""


@dataclass(frozen=True, slots=True)
class Created:
    """A contract that is there now."""

    contract: str
    address: str
    """Lower-case hex."""
    transaction_hash: str | None
    """None: it was there before."""


async def create(
    rpc: Rpc, network: Network, payer: Signer, *, treasury: str, owner: str, batch_signers: Sequence[str] | None
) -> list[Created]:
    """Create what is missing, one contract after the other, and wait until each is mined.

    Args:
        rpc: The chain's nodes.
        network: Says what gas may cost at most.
        payer: Of the gas. Nobody else may send with this key meanwhile.
        treasury: Whom deposit addresses pay.
        owner: Of the batch contract.
        batch_signers: Who may send batches from the beginning; None if no batch contract is wanted.

    Raises:
        CreationFailed: The chain lacks the deterministic deployer, refuses a creation, or does not mine it in time.
        RpcUnavailable: No node answered.
    """
    wanted = [
        operators.forwarder(treasury),
        operators.deposit_factory(treasury),
    ]  # in the order in which they need each other
    if batch_signers is not None:
        wanted.append(operators.batch(owner, batch_signers))
    try:
        chain_id, deployer = await rpc.ask([("eth_chainId", ()), _code_at(CREATE2_DEPLOYER)])
        if chain_id != hex(network.chain_id):
            raise CreationFailed(f"the nodes of chain {network.chain_id} say their chain is {int(chain_id, 16)}")
        if not _is_code(deployer):
            raise CreationFailed(f"chain {network.chain_id} lacks the deterministic deployer at {CREATE2_DEPLOYER}")
        return [await _create(rpc, network, payer, each) for each in wanted]
    except RpcError as error:
        raise CreationFailed(f"the node refuses: {error}") from error


async def _create(rpc: Rpc, network: Network, payer: Signer, wanted: Creation) -> Created:
    (code,) = await rpc.ask([_code_at(wanted.address)])
    if _is_code(code):
        return Created(wanted.contract, wanted.address, None)
    call = {"from": payer.address, "to": CREATE2_DEPLOYER, "data": "0x" + wanted.deployer_data.hex()}
    nonce, gas, history = await rpc.ask(
        [
            ("eth_getTransactionCount", (payer.address, "pending")),
            ("eth_estimateGas", (call,)),
            FeeEstimate.REQUEST,
        ]
    )
    cap = Fees(network.max_fee_gwei * 10**9, network.max_priority_fee_gwei * 10**9)
    estimate = FeeEstimate(0, cap)
    estimate.read(history)
    if estimate.fees is None:
        raise CreationFailed("the node does not say what gas costs")
    transaction = sign_transaction(
        payer.key,
        chain_id=network.chain_id,
        nonce=int(nonce, 16),
        call=Call(CREATE2_DEPLOYER, wanted.deployer_data, int(gas, 16) * 6 // 5),
        fees=estimate.fees,
    )
    await rpc.ask([("eth_sendRawTransaction", ("0x" + transaction.raw.hex(),))])
    await _mined(rpc, network, transaction.hash)
    (code,) = await rpc.ask([_code_at(wanted.address)])
    if not _is_code(code):
        raise CreationFailed(f"{wanted.contract} is not at {wanted.address} after {transaction.hash}")
    return Created(wanted.contract, wanted.address, transaction.hash)


async def _mined(rpc: Rpc, network: Network, transaction_hash: str) -> None:
    deadline = time.monotonic() + MINED_WITHIN_S
    while time.monotonic() < deadline:
        (receipt,) = await rpc.ask([("eth_getTransactionReceipt", (transaction_hash,))])
        if receipt is not None:
            if receipt["status"] != "0x1":
                raise CreationFailed(f"{transaction_hash} reverted")
            return
        await asyncio.sleep(min(_POLL_S_MAX, network.block_time_ms / 4000))
    raise CreationFailed(f"{transaction_hash} is not mined after {MINED_WITHIN_S:.0f} s; look at it, then try again")


async def examine_own(
    rpc: Rpc, *, batch_contract: str | None, deposit_factory: str | None, signers: Sequence[str], pay_to: str
) -> list[Finding]:
    """Look at the operator's contracts that are configured: their code, who may send batches, whom deposits pay.

    Returns:
        Nothing for a network without them, or one that does not answer: `payments.doctor.examine` says so.
    """
    findings: list[Finding] = []
    try:
        if batch_contract is not None:
            findings += await _examine_batch(rpc, batch_contract, signers)
        if deposit_factory is not None:
            findings += await _examine_factory(rpc, deposit_factory, pay_to)
    except RpcUnavailable:
        return []
    return findings


async def _examine_batch(rpc: Rpc, address: str, signers: Sequence[str]) -> list[Finding]:
    anybody = operators.batch(address, [])  # its code is the same whoever owns it
    requests: list[Request] = [_code_at(address), _made_of(anybody), _read(address, _OWNER)]
    requests += [_read(address, "0x" + (_IS_SIGNER + address_word(signer)).hex()) for signer in signers]
    code, expected, owner, *allowed = await rpc.batch(requests)
    if (wrong := _judge("FareboxBatch", "batch_contract", address, code, expected)) is not None:
        return [wrong]
    by = f"0x{owner[-40:]}" if isinstance(owner, str) else "its owner"
    findings = [Finding("ok", f"FareboxBatch is at {address}, owned by {by}")]
    for signer, reply in zip(signers, allowed, strict=True):
        if not isinstance(reply, str) or len(reply) != 66 or int(reply, 16) != 1:
            advice = f"let {by} call setSigner({signer}, true): until then its batches are refused"
            findings.append(Finding("fail", f"the signer {signer} may not send batches", advice))
    return findings


async def _examine_factory(rpc: Rpc, address: str, pay_to: str) -> list[Finding]:
    forwarder, factory = operators.forwarder(pay_to), operators.deposit_factory(pay_to)
    code, expected, forwarder_code, forwarder_expected = await rpc.batch(
        [_code_at(address), _made_of(factory), _code_at(forwarder.address), _made_of(forwarder)]
    )
    wrong = _judge(f"DepositForwarders for {pay_to}", "deposit_factory", address, code, expected)
    wrong = wrong or _judge(
        f"DepositForwarder for {pay_to}", "pay_to", forwarder.address, forwarder_code, forwarder_expected
    )
    return [wrong or Finding("ok", f"DepositForwarders is at {address} and pays {pay_to}")]


def _judge(name: str, setting: str, address: str, code: Reply, expected: Reply) -> Finding | None:
    """What is wrong with the code at an address; None if it is the expected one."""
    if not isinstance(code, str) or not isinstance(expected, str):
        return Finding("fail", f"the code at {address} cannot be read", "check the nodes")
    if code == expected:
        return None
    what = f"{name} is not at {address}" + (", other code is" if _is_code(code) else ": there is no contract")
    return Finding("fail", what, f"correct {setting}; `farebox contracts deploy` creates it and says what to write")


def _made_of(creation: Creation) -> Request:
    """A creation that is only simulated returns the code that it would leave, immutables included."""
    return "eth_call", ({"data": "0x" + creation.code.hex()}, "latest")


def _code_at(address: str) -> Request:
    return "eth_getCode", (address, "latest")


def _read(to: str, data: str) -> Request:
    return "eth_call", ({"to": to, "data": data}, "latest")


def _is_code(reply: Reply) -> bool:
    return isinstance(reply, str) and len(reply) > 2
