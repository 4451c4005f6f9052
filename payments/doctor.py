"""Examines a real network before money depends on it: nodes, tokens, contracts, gas, treasury. Reads only, spends nothing.

The tokens' domains are also checked at the start of the gateway, which refuses to run on a mismatch: every payment signed
in a wrong domain would fail, and a wrong number of decimals would charge a wrong price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from payments.chain.networks import (
    EXACT_PERMIT2_PROXY_ADDRESS,
    MULTICALL3_ADDRESS,
    PERMIT2_ADDRESS,
    Network,
    Token,
)
from payments.chain.rpc import Reply, Request, Rpc, RpcError, RpcUnavailable
from payments.chain.transactions import encode_balance_of, selector
from payments.money import NANO_DECIMALS, atomic_to_nano_down, nano_to_usd
from payments.verification.eip712 import permit2_domain_separator, token_domain_separator

_DECIMALS = "0x" + selector("decimals()").hex()
_DOMAIN_SEPARATOR = "0x" + selector("DOMAIN_SEPARATOR()").hex()
_WEI_PER_NANO = 10 ** (18 - NANO_DECIMALS)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    status: Literal["ok", "warn", "fail"]
    what: str
    advice: str = ""
    """What to do; empty if it is well."""


class TokenMismatch(Exception):
    """A token on the chain is not what the configuration says. The message names it and what to change."""


async def verify_tokens(rpc: Rpc, network: Network) -> None:
    """Compare the network's chain id, tokens and contracts with the chain.

    Raises:
        TokenMismatch: Something differs; payments would fail or be priced wrongly.
        RpcUnavailable: No node answered.
    """
    findings = await _examine_contracts(rpc, network)
    failed = [f"{finding.what}: {finding.advice}" for finding in findings if finding.status == "fail"]
    if failed:
        raise TokenMismatch("; ".join(failed))


async def examine(
    rpc: Rpc,
    network: Network,
    *,
    signers: Sequence[str],
    pay_to: str,
    treasury_key_address: str | None,
    gas_minimum_wei: int,
    treasury_minimum_nano_usd: int = 0,
) -> list[Finding]:
    """Look at everything that payments on `network` need.

    Args:
        rpc: The configured nodes.
        network: The configured chain and tokens.
        signers: Addresses of the accounts that pay gas.
        pay_to: The treasury's address.
        treasury_key_address: The address of the configured treasury key, None if there is none.
        gas_minimum_wei: Below it a signer is short of gas.
        treasury_minimum_nano_usd: Below it, in a token, the treasury is short of money for refunds.

    Returns:
        What was found, good and bad. Raises nothing for a network that does not answer: that is a finding.
    """
    try:
        findings = await _examine_contracts(rpc, network)
        findings += await _examine_signers(rpc, network, signers, gas_minimum_wei)
        findings += await _examine_treasury(rpc, network, pay_to, treasury_key_address, treasury_minimum_nano_usd)
    except RpcUnavailable as error:
        return [
            Finding("fail", f"no node of chain {network.chain_id} answers: {error}", "check rpc_urls of the network")
        ]
    return findings


async def _examine_contracts(rpc: Rpc, network: Network) -> list[Finding]:
    requests: list[Request] = [("eth_chainId", ()), ("eth_blockNumber", ())]
    for token in network.tokens:
        requests += [_call(token.address, _DECIMALS), _call(token.address, _DOMAIN_SEPARATOR)]
    requests.append(("eth_getCode", (MULTICALL3_ADDRESS, "latest")))
    permit2 = any(token.transfer_method == "permit2" for token in network.tokens)
    if permit2:
        requests.append(_call(PERMIT2_ADDRESS, _DOMAIN_SEPARATOR))
        requests.append(("eth_getCode", (EXACT_PERMIT2_PROXY_ADDRESS, "latest")))
    chain_id, head, *replies = await rpc.batch(requests)
    if chain_id != hex(network.chain_id):
        told = chain_id if isinstance(chain_id, RpcError) else int(chain_id, 16)
        what = f"the nodes of chain {network.chain_id} say their chain is {told}"
        return [Finding("fail", what, "give the network its own rpc_urls")]
    findings = [Finding("ok", f"chain {network.chain_id} is at block {_number(head)}")]
    for index, token in enumerate(network.tokens):
        findings += _judge_token(token, *replies[2 * index : 2 * index + 2])
    rest = replies[2 * len(network.tokens) :]
    findings.append(_judge_code("Multicall3", MULTICALL3_ADDRESS, rest[0]))
    if permit2:
        if rest[1] == "0x" + permit2_domain_separator(network.chain_id).hex():
            findings.append(Finding("ok", f"Permit2 is at {PERMIT2_ADDRESS}"))
        else:
            findings.append(
                Finding("fail", f"Permit2 is not at {PERMIT2_ADDRESS}", "accept only EIP-3009 tokens on this chain")
            )
        findings.append(_judge_code("the x402 exact proxy", EXACT_PERMIT2_PROXY_ADDRESS, rest[2]))
    return findings


def _judge_token(token: Token, decimals: Reply, separator: Reply) -> list[Finding]:
    name = f"{token.symbol} at {token.address}"
    on_chain = _number(decimals)
    if on_chain is None:
        return [Finding("fail", f"there is no token {name}", "correct the token's address")]
    findings = []
    if on_chain != token.decimals:
        advice = f"set decimals = {on_chain} for it"
        findings.append(Finding("fail", f"{name} has {on_chain} decimals, not {token.decimals}", advice))
    if token.transfer_method == "eip3009" and separator != "0x" + token_domain_separator(token).hex():
        told = "has no EIP-712 domain" if _number(separator) is None else "has another EIP-712 domain"
        what = f'{name} {told} than name "{token.domain_name}", version "{token.domain_version}"'
        findings.append(Finding("fail", what, "correct domain_name and domain_version, or use transfer_method permit2"))
    return findings or [Finding("ok", f"{name}: {token.decimals} decimals, {token.transfer_method}")]


def _judge_code(name: str, address: str, code: Reply) -> Finding:
    if isinstance(code, str) and len(code) > 2:
        return Finding("ok", f"{name} is at {address}")
    return Finding("fail", f"{name} is not at {address}", "payments that need it cannot be settled on this chain")


async def _examine_signers(rpc: Rpc, network: Network, signers: Sequence[str], minimum_wei: int) -> list[Finding]:
    if not signers:
        return [
            Finding("fail", "no signer key is configured", "set FAREBOX_SIGNER_KEYS to a JSON list of private keys")
        ]
    requests: list[Request] = [("eth_getBalance", (signer, "latest")) for signer in signers]
    findings = []
    for signer, reply in zip(signers, await rpc.batch(requests), strict=True):
        wei = _number(reply)
        if wei is None:
            findings.append(Finding("fail", f"the balance of the signer {signer} cannot be read", "check the nodes"))
            continue
        what = f"the signer {signer} has {nano_to_usd(wei // _WEI_PER_NANO)} coins of chain {network.chain_id} for gas"
        if wei == 0:
            findings.append(Finding("fail", what, "send it some: it pays the gas of settlements"))
        elif wei < minimum_wei:
            findings.append(Finding("warn", what, "send it some soon"))
        else:
            findings.append(Finding("ok", what))
    return findings


async def _examine_treasury(
    rpc: Rpc, network: Network, pay_to: str, treasury_key_address: str | None, minimum_nano_usd: int
) -> list[Finding]:
    findings = []
    if treasury_key_address is None:
        advice = "set FAREBOX_TREASURY_KEY, or credit stays credit"
        findings.append(Finding("warn", "there is no treasury key, so nothing can be refunded", advice))
    elif treasury_key_address.lower() != pay_to.lower():
        what = f"the treasury key is for {treasury_key_address}, payments go to {pay_to}"
        findings.append(Finding("fail", what, "make pay_to the treasury key's address"))
    data = "0x" + encode_balance_of(pay_to).hex()
    replies = await rpc.batch([_call(token.address, data) for token in network.tokens])
    for token, reply in zip(network.tokens, replies, strict=True):
        atomic = _number(reply)
        if atomic is None:
            continue  # what is wrong with the token was found above
        nano = atomic_to_nano_down(atomic, token.decimals)
        what = f"the treasury {pay_to} has {nano_to_usd(nano)} {token.symbol} on chain {network.chain_id}"
        low = nano < minimum_nano_usd
        findings.append(Finding("warn" if low else "ok", what, "send it some: refunds are paid from it" if low else ""))
    return findings


def _call(to: str, data: str) -> Request:
    return "eth_call", ({"to": to, "data": data}, "latest")


def _number(reply: Reply) -> int | None:
    """A reply as an integer; None if the contract is not there or refuses."""
    if not isinstance(reply, str) or len(reply) <= 2:
        return None
    return int(reply, 16)
