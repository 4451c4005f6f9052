"""What the tests of `upto` at the facilitator share: a resource server's calls for what a payer signed, and what it takes."""

from __future__ import annotations

import copy
import dataclasses
import secrets
import time
from typing import Any

from contracts.devnet import Devnet, Wallet
from payments.chain.networks import UPTO_PERMIT2_PROXY_ADDRESS, Network, Token
from payments.verification.eip712 import permit2_upto_digest
from payments.x402.wire import UptoAuthorization
from tests.payments.facilitating import SHOP, held_by_shop
from tests.payments.settling import sign

MAXIMUM = 5_000
TAKEN = 1_234


@dataclasses.dataclass(frozen=True)
class Market:
    """A shop that is paid by `upto`, on a chain with the facilitator's batch contract."""

    chain: Devnet
    network: Network
    batch_contract: str

    def call(self, wallet: Wallet, token: Token | None = None, *, valid_s: int = 300, **terms: Any) -> dict[str, Any]:
        """The body of `/verify`; `terms` are what the payer signs instead."""
        token = token or self.network.tokens[0]
        authorization = UptoAuthorization(
            **{
                "payer": wallet.address.lower(),
                "token": token.address,
                "amount": MAXIMUM,
                "spender": UPTO_PERMIT2_PROXY_ADDRESS,
                "nonce": secrets.randbits(256),
                "deadline": int(time.time()) + valid_s,
                "to": SHOP,
                "valid_after": 0,
                "facilitator": self.batch_contract,
                **terms,
            }
        )
        wants = {
            "scheme": "upto",
            "network": self.network.caip2,
            "asset": token.address,
            "amount": str(MAXIMUM),
            "payTo": SHOP,
            "maxTimeoutSeconds": 300,
            "extra": {
                "name": token.domain_name,
                "version": token.domain_version,
                "assetTransferMethod": "permit2",
                "facilitatorAddress": self.batch_contract,
            },
        }
        payload = {
            "signature": "0x" + sign(wallet, permit2_upto_digest(authorization, token.chain_id)).hex(),
            "permit2Authorization": {
                "from": authorization.payer,
                "permitted": {"token": authorization.token, "amount": str(authorization.amount)},
                "spender": authorization.spender,
                "nonce": str(authorization.nonce),
                "deadline": str(authorization.deadline),
                "witness": {
                    "to": authorization.to,
                    "facilitator": authorization.facilitator,
                    "validAfter": str(authorization.valid_after),
                },
            },
        }
        payment = {"x402Version": 2, "payload": payload, "accepted": copy.deepcopy(wants)}
        return {"x402Version": 2, "paymentPayload": payment, "paymentRequirements": wants}

    @property
    def held_by_shop(self) -> int:
        return held_by_shop(self.chain)


def taking(call: dict[str, Any], amount: int) -> dict[str, Any]:
    """The body of `/settle` for the same payment."""
    return {**call, "paymentRequirements": call["paymentRequirements"] | {"amount": str(amount)}}
