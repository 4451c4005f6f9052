"""What others than the gateway do on the chain: submit a payer's authorization, drain its wallet, cancel what it signed."""

from __future__ import annotations

from typing import Any

from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, call_data, outbidding, send_as
from contracts.jsonrpc import rpc
from tests.e2e.clients import decoded

CHAIN_ID = 84532
HIGH_FEE = 50 * 10**9
"""Wei a unit of gas: more than the gateway pays where nobody else is in a hurry."""


def transfer_call(headers: dict[str, str]) -> str:
    """The EIP-3009 call of a v2 payment, as anybody can make it who has seen the header."""
    payload = decoded(headers["PAYMENT-SIGNATURE"])["payload"]
    authorization, signature = payload["authorization"], bytes.fromhex(payload["signature"][2:])
    return call_data(
        "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,uint8,bytes32,bytes32)",
        authorization["from"],
        authorization["to"],
        *(int(authorization[name]) for name in ("value", "validAfter", "validBefore")),
        int(authorization["nonce"], 16),
        signature[64],
        int.from_bytes(signature[:32], "big"),
        int.from_bytes(signature[32:64], "big"),
    )


def submit(rpc_url: str, stranger: str, headers: dict[str, str]) -> str:
    """A stranger (an account that Anvil signs for) executes a payment, and it is mined."""
    return send_as(rpc_url, stranger, USDC.address, transfer_call(headers))


def send_dearly(rpc_url: str, sender: str, data: str, to: str = USDC.address, gas: int = 200_000) -> str:
    """Put a transaction before all others that wait to be mined, and before what comes; not waited for."""
    transaction = {"from": sender, "to": to, "data": data, "gas": hex(gas)}
    fees = outbidding(rpc_url, sender, HIGH_FEE)
    sent: str = rpc(rpc_url, "eth_sendTransaction", transaction | fees)
    return sent


def cancel_call(account: LocalAccount, headers: dict[str, str]) -> str:
    """The call that cancels a payment's authorization, signed by its payer."""
    nonce = decoded(headers["PAYMENT-SIGNATURE"])["payload"]["authorization"]["nonce"]
    signed = account.sign_typed_data(
        domain_data={
            "name": USDC.name,
            "version": USDC.version,
            "chainId": CHAIN_ID,
            "verifyingContract": USDC.address,
        },
        message_types={
            "CancelAuthorization": [{"name": "authorizer", "type": "address"}, {"name": "nonce", "type": "bytes32"}]
        },
        message_data={"authorizer": account.address, "nonce": bytes.fromhex(nonce[2:])},
    )
    return call_data(
        "cancelAuthorization(address,bytes32,uint8,bytes32,bytes32)",
        account.address,
        int(nonce, 16),
        signed.v,
        signed.r,
        signed.s,
    )


def drain_call(to: str, atomic: int) -> str:
    """The call that sends USDC away."""
    return call_data("transfer(address,uint256)", to, atomic)


def pending(rpc_url: str) -> int:
    """Transactions that wait to be mined."""
    status: dict[str, Any] = rpc(rpc_url, "txpool_status")
    return int(status["pending"], 16)
