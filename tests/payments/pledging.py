"""What the tests of `upto` share: a desk that takes pledges, on a real chain and a real database."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

from contracts.devnet import Devnet, Wallet, place_operator_contracts, rpc
from payments.chain.networks import UPTO_PERMIT2_PROXY_ADDRESS, Network, Token
from payments.chain.rpc import Rpc
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.reconciliation import reconcile
from payments.settlement.engine import Settlements
from payments.settlement.outcomes import Outcomes
from payments.store import Store
from payments.tenders import upto_settlement
from payments.tenders.base import Outcome
from payments.tenders.exact_services import ExactServices
from payments.tenders.upto import UptoHold
from payments.tenders.upto_scheme import UptoScheme
from payments.verification.eip712 import permit2_upto_digest
from payments.x402.wire import Payment, UptoAuthorization
from tests.payments.desks import VALUE, opened
from tests.payments.exact_samples import DETAILS, QUOTED, assert_books_balance, quote_of
from tests.payments.settling import PAY_TO, sign

COST = 7_654_321
"""Not whole in atomic units: 7,655 of them, and 679 nano-USD too much."""
ANSWER_S = 60
LIMIT = 3 * QUOTED
ANSWERED = Outcome({"model": "m"})


@dataclasses.dataclass
class Desk:
    chain: Devnet
    network: Network
    services: ExactServices
    scheme: UptoScheme
    batch_contract: str

    @property
    def store(self) -> Store:
        return self.services.store

    @property
    def outcomes(self) -> Outcomes:
        assert isinstance(self.services.settlements, Settlements)
        return self.services.settlements.outcomes

    def sign(self, wallet: Wallet, token: Token, *, valid_s: int = 300, **changes: object) -> Payment:
        terms = {
            "payer": wallet.address.lower(),
            "token": token.address,
            "amount": VALUE,
            "spender": UPTO_PERMIT2_PROXY_ADDRESS,
            "nonce": secrets.randbits(256),
            "deadline": int(time.time()) + valid_s,
            "to": PAY_TO,
            "valid_after": 0,
            "facilitator": self.batch_contract,
        }
        authorization = UptoAuthorization(**terms | changes)  # type: ignore[arg-type]
        signature = sign(wallet, permit2_upto_digest(authorization, token.chain_id))
        requirement = self.scheme.requirement(token, QUOTED, 300)
        return Payment(
            2, "upto", self.network.caip2, requirement, None, secrets.token_bytes(32), authorization, signature
        )

    async def authorize(self, payment: Payment, request: bytes = b"d" * 32) -> UptoHold:
        assert payment.accepted is not None
        token = self.network.token_at(payment.accepted.asset)
        assert token is not None
        requirement = self.scheme.requirement(token, QUOTED, 300)
        tender = self.scheme.tender(payment, token, requirement, request, int(time.time()))
        hold = await tender.authorize(quote_of(), DETAILS)
        assert isinstance(hold, UptoHold)
        return hold

    async def settled(self, receipt_id: str) -> bool:
        """Wait for what becomes of a pledge's settlement."""
        return await self.paid(receipt_id, 20)

    async def paid(self, receipt_id: str, timeout_s: float = 0) -> bool:
        outcome = await self.services.settlements.outcome(upto_settlement.settlement_id(receipt_id), timeout_s)
        return outcome.paid

    async def under_way(self, receipt_id: str) -> bool:
        outcome = await self.services.settlements.outcome(upto_settlement.settlement_id(receipt_id), 0)
        return outcome.open

    async def balance(self, account: str) -> int:
        return await self.store.read(lambda tx: transfers.balance(tx, account).balance)

    async def pay_in(self, wallet: Wallet, token: Token, amount: int) -> None:
        """Give a wallet credit, as if it had paid that."""
        custody, account = account_id("custody", token.asset), payer_account(wallet.address.lower(), token.asset)
        await self.store.write(
            lambda tx: transfers.post(tx, id="paid-in", debit=custody, credit=account, amount=amount, reference="test")
        )

    async def check_books(self) -> None:
        await assert_books_balance(self.store)
        rpc(self.chain.rpc_url, "anvil_mine", "0x3")
        async with Rpc([self.chain.rpc_url]) as node:
            report = await reconcile(self.store, node, self.network, PAY_TO)
        assert report.findings == []
        assert all(token.booked == () for token in report.tokens)


@contextlib.asynccontextmanager
async def gateway(database: Path | str, chain: Devnet, network: Network) -> AsyncIterator[Desk]:
    signer = chain.wallets[0]
    batch_contract, _ = place_operator_contracts(chain.rpc_url, PAY_TO, signer.address, [signer.address])
    async with opened(database, chain, network, batch_contract=batch_contract) as (services, _):
        scheme = UptoScheme(network, PAY_TO, batch_contract, services, answer_s=ANSWER_S, exposure_max_nano_usd=LIMIT)
        yield Desk(chain, network, services, scheme, batch_contract)
