"""What a wallet without coin pays that never approved Permit2, as a script for the kills: funding, approval, settlement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from x402.client import x402ClientSync
from x402.http import x402HTTPClientSync
from x402.mechanisms.evm.exact.register import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSignerWithRPC

from contracts.devnet import USDT, DevToken
from tests.crashes.operations import Exact, Operation, question
from tests.crashes.world import Run
from tests.e2e.clients import ask

ASKING = {"accept-payment": "erc20ApprovalGasSponsoring"}


@dataclass(slots=True)
class Sponsored(Exact):
    """A request paid in USDT: the payer's approval, and the coin for it, go before the payment."""

    loops = ("sponsor",)
    token: DevToken = USDT

    def prepare(self, run: Run) -> None:
        """Sign payment and approval, as the official client does."""
        run.make_penniless()
        client = x402ClientSync()
        register_exact_evm_client(client, EthAccountSignerWithRPC(run.payer, run.world.rpc_url))
        client.set_spend_controls({"allowed_assets": True})
        usdt = USDT.address.lower()
        client.register_policy(lambda _, offers: [offer for offer in offers if offer.asset.lower() == usdt])
        wrapped = x402HTTPClientSync(client)
        asked = ask(run.http, question(), ASKING)
        required = wrapped.get_payment_required_response(asked.headers.get, asked.json())
        self.headers = ASKING | dict(wrapped.encode_payment_signature_header(client.create_payment_payload(required)))

    def check(self, run: Run) -> None:
        """One payment, after one approval, for which the coin was given once."""
        Exact.check(self, run)
        assert run.rows("SELECT state FROM sponsored_approval") == [("approved",)]
        given = run.rows("SELECT id, state, value, reason FROM settlement WHERE kind = 'approval_funding'")
        assert [state in ("mined", "final") for _, state, _, _ in given] == [True], given


SPONSORED: Mapping[str, Callable[[], Operation]] = {"sponsored approval": Sponsored}
