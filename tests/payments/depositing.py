"""What the tests of deposits share: addresses that an operator watches on the test chain, and who gives to them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from contracts.devnet import Devnet, DevToken, Wallet, call_data, place_operator_contracts, send_signed
from payments.chain.networks import Network, Token
from payments.chain.rpc import Rpc
from payments.deposits import Deposits
from payments.ledger import transfers
from payments.ledger.accounts import payer_account
from payments.reconciliation import Report, open_books, reconcile
from payments.store import Store
from tests.payments.settling import mine

USD = 1_000_000_000
CENT = 10_000
"""In atomic units."""
CONFIRMATIONS = 2


@pytest.fixture
def treasury(chain: Devnet) -> Wallet:
    return chain.wallets[3]


@pytest.fixture
def factory(chain: Devnet, treasury: Wallet) -> str:
    _, factory = place_operator_contracts(chain.rpc_url, treasury.address, treasury.address, [chain.wallets[0].address])
    return factory.lower()


@pytest.fixture
async def deposits(
    chain: Devnet, network: Network, store: Store, treasury: Wallet, factory: str
) -> AsyncIterator[Deposits]:
    mine(chain.rpc_url, CONFIRMATIONS + 1)
    async with Rpc([chain.rpc_url]) as node:
        await open_books(store, node, network, treasury.address)
        yield Deposits(store, node, network, treasury.address.lower(), factory, confirmations=CONFIRMATIONS)


def give(chain: Devnet, token: DevToken, address: str, value: int, sender: Wallet | None = None) -> str:
    sender = sender or chain.wallets[5]
    return send_signed(
        chain.rpc_url, sender.private_key, token.address, call_data("transfer(address,uint256)", address, value)
    )


async def balance(store: Store, wallet: Wallet, token: Token) -> int:
    account = payer_account(wallet.address.lower(), token.asset)
    return (await store.read(lambda tx: transfers.balance(tx, account))).balance


async def proof(deposits: Deposits, store: Store) -> Report:
    """The books of both, against the chain."""
    return await reconcile(
        store, deposits._rpc, deposits.network, deposits.treasury, confirmations=CONFIRMATIONS, deposits=deposits
    )
