"""Our agent with a wallet of its own, and what the gateway's books say of that wallet."""

from __future__ import annotations

import sqlite3
from typing import Any

from eth_account import Account
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, USDT, mint
from contracts.jsonrpc import rpc
from gateway.dev.stack import Stack

FUNDS = 10**7
"""Of each token, in atomic units."""


def new_wallet(stack: Stack) -> LocalAccount:
    """A wallet that nobody used before, with ten dollars of each token and a little gas."""
    account: LocalAccount = Account.create()
    for token in (USDC, USDT):
        mint(stack.rpc_url, token, account.address, FUNDS)
    rpc(stack.rpc_url, "anvil_setBalance", account.address, hex(10**18))
    return account


def rows(stack: Stack, query: str, *parameters: Any) -> list[dict[str, Any]]:
    """What the gateway's database says."""
    with sqlite3.connect(stack.database_url.removeprefix("sqlite:///")) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(query, parameters)]


def channels_of(stack: Stack, wallet: LocalAccount) -> list[dict[str, Any]]:
    """The wallet's channels."""
    return rows(stack, "SELECT * FROM channel WHERE payer = ?", wallet.address.lower())


def deposits_of(stack: Stack, wallet: LocalAccount) -> list[dict[str, Any]]:
    """Its deposits into channels."""
    query = "SELECT * FROM settlement WHERE kind = 'channel_deposit' AND payer = ?"
    return rows(stack, query, wallet.address.lower())
