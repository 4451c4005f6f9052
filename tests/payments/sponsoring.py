"""What the tests of sponsored approvals share: wallets without coin, the transactions that they sign, and a gateway's part."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from eth_account import Account

from contracts.devnet import Devnet, Wallet, mint, rpc
from payments.chain.networks import PERMIT2_ADDRESS, Network, Token
from payments.chain.rlp import rlp_encode
from payments.chain.transactions import encode_allowance
from payments.settlement.engine import Settlements
from payments.sponsoring.records import Budget
from payments.sponsoring.sponsor import Sponsor
from payments.store import Store
from payments.tenders.exact import ExactHold
from payments.tenders.exact_scheme import ExactScheme
from payments.tenders.exact_services import ExactServices
from payments.verification.approvals import encode_approve
from payments.verification.signatures import keccak256
from payments.x402.extensions.erc20_approval import Erc20Approval
from payments.x402.fields import UINT256_MAX
from payments.x402.wire import Payment
from tests.payments.desks import VALUE, opened
from tests.payments.exact_samples import DETAILS, QUOTED, quote_of
from tests.payments.settling import PAY_TO, key_of, pay

BUDGET = Budget(hourly_wei=10**16, payer_wei=10**15)
GWEI = 10**9


def penniless(chain: Devnet, usd: int = 5) -> Wallet:
    """A wallet with dollars and without the chain's own coin, which never approved anything."""
    account = Account.create()
    for coin in (chain.usdc, chain.usdt):
        mint(chain.rpc_url, coin, account.address, usd * 10**6)
    return Wallet(account.address, "0x" + bytes(account.key).hex())


def signed_approval(wallet: Wallet, token: Token, **changes: Any) -> Erc20Approval:
    """What an official client signs: `approve(Permit2, max)` as the wallet's first transaction."""
    terms: dict[str, Any] = {
        "chain_id": token.chain_id,
        "nonce": 0,
        "priority_fee": GWEI // 10,
        "max_fee": 3 * GWEI,
        "gas": 70_000,
        "to": token.address,
        "value": 0,
        "data": encode_approve(PERMIT2_ADDRESS, UINT256_MAX),
        "access": (),
        "signer": wallet,
    }
    terms |= changes
    fields = [terms[name] for name in ("chain_id", "nonce", "priority_fee", "max_fee", "gas")]
    fields += [bytes.fromhex(terms["to"][2:]), terms["value"], terms["data"], terms["access"]]
    signature = key_of(terms["signer"]).sign_recoverable(keccak256(b"\x02" + rlp_encode(fields)), hasher=None)
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
    raw = b"\x02" + rlp_encode([*fields, signature[64], r, s])
    return Erc20Approval(wallet.address.lower(), token.address, PERMIT2_ADDRESS, UINT256_MAX, raw)


def allowance(chain: Devnet, wallet: Wallet) -> int:
    data = "0x" + encode_allowance(wallet.address.lower(), PERMIT2_ADDRESS).hex()
    return int(rpc(chain.rpc_url, "eth_call", {"to": chain.usdt.address, "data": data}, "latest"), 16)


def coin_of(chain: Devnet, wallet: Wallet) -> int:
    return int(rpc(chain.rpc_url, "eth_getBalance", wallet.address, "latest"), 16)


@dataclasses.dataclass
class Desk:
    """A gateway's exact payments in USDT, with a sponsor."""

    chain: Devnet
    network: Network
    services: ExactServices
    settlements: Settlements
    sponsor: Sponsor

    @property
    def store(self) -> Store:
        return self.services.store

    @property
    def usdt(self) -> Token:
        return self.network.tokens[1]

    def payment(self, wallet: Wallet, **changes: Any) -> Payment:
        """A payment over Permit2, with the approval that it needs."""
        scheme = ExactScheme(self.network, PAY_TO, self.services)
        return dataclasses.replace(
            pay(wallet, self.usdt, VALUE),
            accepted=scheme.requirement(self.usdt, QUOTED, 300),
            approval=signed_approval(wallet, self.usdt, **changes),
        )

    async def authorize(self, payment: Payment) -> ExactHold:
        scheme = ExactScheme(self.network, PAY_TO, self.services)
        requirement = scheme.requirement(self.usdt, QUOTED, 300)
        digest = hashlib.sha256(b"request").digest()
        tender = scheme.tender(payment, self.usdt, requirement, digest, int(time.time()))
        return await tender.authorize(quote_of(), DETAILS)

    async def rows(self, columns: str = "state") -> list[tuple[Any, ...]]:
        query = f"SELECT {columns} FROM sponsored_approval ORDER BY created_ms"
        return await self.store.read(lambda tx: tx.execute(query).fetchall())


@contextlib.asynccontextmanager
async def gateway(
    database: Path | str, chain: Devnet, network: Network, *, budget: Budget = BUDGET, watched: bool = True
) -> AsyncIterator[Desk]:
    """What a start of the gateway opens; unless `watched` nobody looks after approvals."""
    async with opened(database, chain, network) as (services, settlements):
        services.sponsor = sponsor = Sponsor(services.store, settlements, budget)
        if watched:
            await sponsor.start()
        try:
            yield Desk(chain, network, services, settlements, sponsor)
        finally:
            await sponsor.stop()
