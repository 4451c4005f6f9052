"""The official client pays from a contract wallet: all that it is given is a signer whose address is the wallet's."""

from __future__ import annotations

from typing import Any

import httpx
from eth_account.signers.local import LocalAccount
from x402.client import x402ClientSync
from x402.http import x402HTTPClientSync
from x402.mechanisms.evm.exact.register import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSigner

from contracts.devnet import USDC, balance_of, mint, rpc
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from payments.chain.transactions import address_word, word
from tests.e2e.clients import ask, decoded
from tests.e2e.conftest import QUESTION
from tests.payments.contract_wallets import code

SMART = "0x5A11E7000000000000000000000000000000Cafe"


class WalletSigner:
    """Signs for a contract wallet with its owner's key, in the wallet's own format."""

    def __init__(self, address: str, owner: LocalAccount) -> None:
        self.address = address
        self._owner = EthAccountSigner(owner)

    def sign_typed_data(self, *typed_data: Any) -> bytes:
        return self._owner.sign_typed_data(*typed_data) + b"by its owner"


def test_a_contract_wallet_pays_with_the_official_client(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    rpc(stack.rpc_url, "anvil_setCode", SMART, "0x" + code("Wallet")["deployed"])
    owner = "0x" + address_word(wallet.address.lower()).hex()
    rpc(stack.rpc_url, "anvil_setStorageAt", SMART, "0x" + word(0).hex(), owner)
    mint(stack.rpc_url, USDC, SMART, 10**7)
    client = x402ClientSync()
    register_exact_evm_client(client, WalletSigner(SMART, wallet))
    wrapped = x402HTTPClientSync(client)
    asked = ask(http, QUESTION)
    required = wrapped.get_payment_required_response(asked.headers.get, asked.json())
    headers = dict(wrapped.encode_payment_signature_header(client.create_payment_payload(required)))
    answer = ask(http, QUESTION, headers)
    assert answer.status_code == 200, answer.text
    assert decoded(answer.headers["payment-response"])["payer"].lower() == SMART.lower()
    assert balance_of(stack.rpc_url, USDC, SMART) < 10**7
    assert len(simulator.attempts()) == 1
    assert ask(http, QUESTION, headers).headers["x-farebox-replayed"] == "true"
