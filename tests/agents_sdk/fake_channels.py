"""A gateway that is paid through channels and lies on order. It checks every signature, and remembers the highest voucher: that
is what it could claim."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from eth_account import Account
from eth_account.messages import encode_typed_data
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from x402.http.utils import (
    decode_payment_required_header,
    decode_payment_signature_header,
    encode_payment_required_header,
    encode_payment_response_header,
)
from x402.mechanisms.evm.batch_settlement.constants import VOUCHER_TYPES
from x402.mechanisms.evm.batch_settlement.types import ChannelConfig
from x402.mechanisms.evm.batch_settlement.utils import compute_channel_id, get_batch_settlement_eip712_domain
from x402.schemas import PaymentPayload, PaymentRequired, SettleResponse

from tests.agents_sdk.fake_gateway import NETWORK, TRANSACTION, FakeGateway

AUTHORIZER = "0x" + "a7" * 20
MISMATCH = "invalid_batch_settlement_evm_cumulative_amount_mismatch"
NO_BALANCE = "invalid_batch_settlement_evm_refund_no_balance"
EXCEEDS = "invalid_batch_settlement_evm_cumulative_exceeds_balance"
PRICE = 500
"""Of every request, in atomic units."""
COST_USD = "0.000113"


@dataclass
class FakeChannels(FakeGateway):
    """Takes what it is sent, unless the script says otherwise: ``correct`` and ``exceeds`` refuse, anything else serves.

    `state` and `voucher` are what it says in corrective answers besides or instead of the truth, `told` and `cost_usd` what it
    says that was charged, `terms` what it offers.
    """

    terms: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    voucher: dict[str, Any] | None = None
    told: dict[str, Any] = field(default_factory=dict)
    cost_usd: str = COST_USD
    given_back: str = "9887"
    """What it says that a refund gave back."""
    rotate: bool = False
    """Offers another channel with every 402."""
    vouchers: list[int] = field(default_factory=list)
    """The amounts that came, served or not."""
    deposits: dict[str, int] = field(default_factory=dict)
    """Distinct authorizations → amount."""
    channels: set[str] = field(default_factory=set)
    served: int = 0
    signatures: dict[int, str] = field(default_factory=dict)

    @property
    def claimable(self) -> int:
        """What it could claim on chain."""
        return max(self.vouchers, default=0)

    def _required(self, request: Request, error: str) -> Response:
        answer = super()._required(request, error)
        required = decode_payment_required_header(answer.headers["payment-required"])
        assert isinstance(required, PaymentRequired)
        authorizer = "0x" + secrets.token_hex(20) if self.rotate else AUTHORIZER
        for offer in required.accepts:
            offer.scheme = "batch-settlement"
            del offer.extra["paymentFlow"]
            offer.extra |= {
                "receiverAuthorizer": authorizer,
                "withdrawDelay": 86_400,
                "minDeposit": "5000",
            } | self.terms
            if error == MISMATCH:
                offer.extra["channelState"] = self._status() | self.state
                if self.voucher is not None:
                    offer.extra["voucherState"] = self.voucher
        answer.headers["payment-required"] = encode_payment_required_header(required)
        return answer

    def _status(self) -> dict[str, Any]:
        return {
            "channelId": next(iter(self.channels), "0x" + "00" * 32),
            "balance": str(sum(self.deposits.values())),
            "totalClaimed": "0",
            "withdrawRequestedAt": 0,
            "refundNonce": "0",
            "chargedCumulativeAmount": str(self.served * 113),
        }

    async def _paid(self, request: Request, header: str, body: bytes) -> Response:
        payload = decode_payment_signature_header(header)
        assert isinstance(payload, PaymentPayload)
        payer = self._take_voucher(payload)
        self.payments.append(payload)
        step = self.script.pop(0) if self.script else "ok"
        if step == "correct":
            return self._required(request, MISMATCH)
        if step == "exceeds":
            return self._required(request, EXCEEDS)
        self.served += 1
        extra = {"chargedAmount": "113", "channelState": self._status() | self.told}
        settled = SettleResponse(success=True, transaction=TRANSACTION, network=NETWORK, payer=payer, extra=extra)
        headers = {"PAYMENT-RESPONSE": encode_payment_response_header(settled)}
        answer = self._answer(request, body, headers, step)
        if isinstance(answer, JSONResponse):
            answer.headers["x-farebox-cost-usd"] = self.cost_usd
        return answer

    async def refund(self, request: Request) -> Response:
        """Asked for with GET."""
        header = request.headers.get("payment-signature")
        if header is None:
            return self._required(request, "payment_required")
        payload = decode_payment_signature_header(header)
        assert isinstance(payload, PaymentPayload)
        assert payload.payload["type"] == "refund"
        payer = self._take_voucher(payload)
        step = self.script.pop(0) if self.script else "ok"
        if step in ("correct", "empty"):
            return self._required(request, MISMATCH if step == "correct" else NO_BALANCE)
        settled = SettleResponse(
            success=True, transaction=TRANSACTION, network=NETWORK, payer=payer, amount=self.given_back
        )
        return JSONResponse({}, headers={"PAYMENT-RESPONSE": encode_payment_response_header(settled)})

    def _take_voucher(self, payload: PaymentPayload) -> str:
        inner = payload.payload
        config, voucher = ChannelConfig.from_dict(inner["channelConfig"]), inner["voucher"]
        channel_id = compute_channel_id(config, NETWORK)
        assert voucher["channelId"] == channel_id
        amount = int(voucher["maxClaimableAmount"])
        assert signer_of(channel_id, amount, voucher["signature"]) == config.payer == config.payer_authorizer
        self.channels.add(channel_id)
        self.vouchers.append(amount)
        self.signatures[amount] = voucher["signature"]
        if inner["type"] == "deposit":
            authorization = inner["deposit"]["authorization"]["erc3009Authorization"]
            self.deposits[authorization["salt"]] = int(inner["deposit"]["amount"])
        return config.payer


def signer_of(channel_id: str, amount: int, signature: str) -> str:
    """Who signed a voucher."""
    message = {"channelId": bytes.fromhex(channel_id[2:]), "maxClaimableAmount": amount}
    signable = encode_typed_data(get_batch_settlement_eip712_domain(84532), VOUCHER_TYPES, message)
    return str(Account.recover_message(signable, signature=signature))


def sign_voucher(key: str, channel_id: str, amount: int) -> dict[str, str]:
    """A voucher as a corrective answer shows it."""
    message = {"channelId": bytes.fromhex(channel_id[2:]), "maxClaimableAmount": amount}
    signed = Account.sign_typed_data(key, get_batch_settlement_eip712_domain(84532), VOUCHER_TYPES, message)
    return {"signedMaxClaimable": str(amount), "signature": "0x" + bytes(signed.signature).hex()}
