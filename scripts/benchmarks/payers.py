"""Wallets that pay, and what they sign beforehand, with the official client's own code."""

from __future__ import annotations

import base64
import itertools
import json
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
from eth_account import Account
from x402 import x402ClientSync
from x402.http import x402HTTPClientSync
from x402.mechanisms.evm.exact import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSigner

from contracts.devnet import USDC, mint, rpc
from contracts.jsonrpc import batch

TRANSFER_TOPIC = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"
JSON = {"content-type": "application/json"}
USD_EACH = 100


class Payers:
    """Wallets that pay in turn.

    Args:
        keys: Their private keys in hex.
    """

    def __init__(self, keys: list[str]) -> None:
        clients = [
            x402HTTPClientSync(register_exact_evm_client(x402ClientSync(), EthAccountSigner(Account.from_key(key))))
            for key in keys
        ]
        self._clients: Iterator[x402HTTPClientSync] = itertools.cycle(clients)

    @classmethod
    def fund(cls, rpc_url: str, count: int) -> Payers:
        """New wallets with USDC and nothing else."""
        accounts = [Account.from_key("0x" + secrets.token_hex(32)) for _ in range(count)]
        for account in accounts:
            mint(rpc_url, USDC, account.address, USD_EACH * 10**USDC.decimals)
        return cls(["0x" + bytes(account.key).hex() for account in accounts])

    def sign(self, url: str, body: str, count: int) -> list[dict[str, str]]:
        """Ask for a quote once, and sign it `count` times, each time with another nonce.

        Returns:
            The header that each paid request carries.

        Raises:
            RuntimeError: If the answer is not a 402.
        """
        asked = httpx.post(url, content=body, headers=JSON, timeout=30)
        if asked.status_code != 402:
            raise RuntimeError(f"{url} did not ask for a payment but answered {asked.status_code}: {asked.text[:300]}")
        content = asked.json()
        headers = []
        for client in itertools.islice(self._clients, count):
            required = client.get_payment_required_response(asked.headers.get, content)
            headers.append(dict(client.encode_payment_signature_header(client.create_payment_payload(required))))
        return headers


def transaction_of(payment_response: str) -> str | None:
    """The transaction that a `PAYMENT-RESPONSE` names; None if it does not say that the payment succeeded."""
    content: dict[str, Any] = json.loads(base64.b64decode(payment_response))
    return str(content["transaction"]) if content.get("success") is True and content.get("transaction") else None


def transfers_to(rpc_url: str, recipient: str, token: str = USDC.address) -> list[str]:
    """The transactions of all transfers of a token to an address, one entry for each transfer."""
    topic = "0x" + recipient.removeprefix("0x").lower().rjust(64, "0")
    criteria = {
        "fromBlock": "0x0",
        "toBlock": "latest",
        "address": token,
        "topics": [TRANSFER_TOPIC, None, topic],
    }
    return [log["transactionHash"] for log in batch(rpc_url, [("eth_getLogs", [criteria])], timeout_s=60)[0]]


def with_ether(rpc_url: str) -> tuple[str, str]:
    """A new account that can pay gas: its address and private key."""
    account = Account.from_key("0x" + secrets.token_hex(32))
    rpc(rpc_url, "anvil_setBalance", account.address, hex(10**21))
    return account.address, "0x" + bytes(account.key).hex()
