"""What the tests of channels at the facilitator share: a resource server's channels, and the calls that it makes."""

from __future__ import annotations

import copy
import dataclasses
import secrets
import time
from typing import Any

from contracts.devnet import Devnet, Wallet
from payments.chain.networks import PERMIT2_DEPOSIT_COLLECTOR_ADDRESS, Network, Token
from payments.verification import vouchers
from payments.verification.signatures import checksum_address
from payments.x402.channels import ChannelConfig, Erc3009Deposit, Permit2Deposit, hex32
from tests.payments.facilitating import SHOP
from tests.payments.settling import sign

DELAY_S = 900


@dataclasses.dataclass(frozen=True)
class Channel:
    """One payer's channel with a shop, whose claims and refunds `authorizer` signs."""

    network: Network
    payer: Wallet
    authorizer: Wallet
    token: Token
    receiver: str = SHOP
    salt: int = 0

    @property
    def config(self) -> ChannelConfig:
        payer, authorizer = self.payer.address.lower(), self.authorizer.address.lower()
        return ChannelConfig(payer, payer, self.receiver, authorizer, self.token.address, DELAY_S, self.salt)

    @property
    def number(self) -> int:
        return vouchers.channel_id(self.config, self.token.chain_id)

    @property
    def config_json(self) -> dict[str, Any]:
        config = self.config
        return {
            "payer": checksum_address(config.payer),
            "payerAuthorizer": config.payer_authorizer,
            "receiver": config.receiver,
            "receiverAuthorizer": config.receiver_authorizer,
            "token": config.token,
            "withdrawDelay": config.withdraw_delay,
            "salt": hex32(config.salt),
        }

    def requirement(self, amount: int = 0) -> dict[str, Any]:
        return {
            "scheme": "batch-settlement",
            "network": self.network.caip2,
            "asset": self.token.address,
            "amount": str(amount),
            "payTo": self.receiver,
            "maxTimeoutSeconds": 300,
            "extra": {
                "name": self.token.domain_name,
                "version": self.token.domain_version,
                "assetTransferMethod": self.token.transfer_method,
                "receiverAuthorizer": checksum_address(self.config.receiver_authorizer),
                "withdrawDelay": DELAY_S,
            },
        }

    def call(self, payload: dict[str, Any], *, bare: bool = False) -> dict[str, Any]:
        """The body of a call with this payload; a server's own calls have bare requirements."""
        wants = self.requirement()
        if bare:
            wants |= {"extra": {}, "maxTimeoutSeconds": 0}
        payment = {"x402Version": 2, "payload": payload, "accepted": copy.deepcopy(wants)}
        return {"x402Version": 2, "paymentPayload": payment, "paymentRequirements": wants}

    def voucher(self, amount: int) -> dict[str, Any]:
        signature = sign(self.payer, vouchers.voucher_digest(self.number, amount, self.token.chain_id))
        return {
            "channelId": hex32(self.number),
            "maxClaimableAmount": str(amount),
            "signature": "0x" + signature.hex(),
        }

    def pays(self, amount: int) -> dict[str, Any]:
        return self.call({"type": "voucher", "channelConfig": self.config_json, "voucher": self.voucher(amount)})

    def deposit(self, value: int, *, valid_s: int = 300, salt: int | None = None) -> Erc3009Deposit | Permit2Deposit:
        """Signed by its payer."""
        deadline, salt = int(time.time()) + valid_s, secrets.randbits(256) if salt is None else salt
        if self.token.transfer_method == "eip3009":
            unsigned = Erc3009Deposit(value, 0, deadline, salt, b"")
            digest = vouchers.erc3009_deposit_digest(unsigned, self.config, self.number, self.token)
            return dataclasses.replace(unsigned, signature=sign(self.payer, digest))
        permit = Permit2Deposit(
            value,
            self.payer.address.lower(),
            self.token.address,
            value,
            PERMIT2_DEPOSIT_COLLECTOR_ADDRESS,
            salt,
            deadline,
            self.number,
            b"",
        )
        digest = vouchers.permit2_deposit_digest(permit, self.token.chain_id)
        return dataclasses.replace(permit, signature=sign(self.payer, digest))

    def deposits(self, value: int, amount: int, *, valid_s: int = 300, salt: int | None = None) -> dict[str, Any]:
        deposit = self.deposit(value, valid_s=valid_s, salt=salt)
        signature = "0x" + deposit.signature.hex()
        if isinstance(deposit, Erc3009Deposit):
            authorization: dict[str, Any] = {
                "erc3009Authorization": {
                    "validAfter": "0",
                    "validBefore": str(deposit.valid_before),
                    "salt": hex32(deposit.salt),
                    "signature": signature,
                }
            }
        else:
            authorization = {
                "permit2Authorization": {
                    "from": deposit.payer,
                    "permitted": {"token": deposit.token, "amount": str(value)},
                    "spender": deposit.spender,
                    "nonce": str(deposit.nonce),
                    "deadline": str(deposit.deadline),
                    "witness": {"channelId": hex32(self.number)},
                    "signature": signature,
                }
            }
        return self.call(
            {
                "type": "deposit",
                "channelConfig": self.config_json,
                "voucher": self.voucher(amount),
                "deposit": {"amount": str(value), "authorization": authorization},
            }
        )

    def row(self, amount: int, total: int) -> dict[str, Any]:
        voucher = self.voucher(amount)
        return {
            "voucher": {"channel": self.config_json, "maxClaimableAmount": str(amount)},
            "signature": voucher["signature"],
            "totalClaimed": str(total),
        }

    def authorized_claims(self, *rows: tuple[Channel, int, int]) -> str:
        entries = [(channel.number, amount, total) for channel, amount, total in rows]
        return "0x" + sign(self.authorizer, vouchers.claim_batch_digest(entries, self.token.chain_id)).hex()

    def refunds(
        self, amount: int, nonce: int, voucher: int, claimed: int | None = None, *, signed: bool = True
    ) -> dict[str, Any]:
        """A refund, with a claim of `claimed` before it where that is given."""
        payload: dict[str, Any] = {
            "type": "refund",
            "channelConfig": self.config_json,
            "voucher": self.voucher(voucher),
            "amount": str(amount),
            "refundNonce": str(nonce),
            "claims": [] if claimed is None else [self.row(voucher, claimed)],
        }
        if signed:
            digest = vouchers.refund_digest(self.number, nonce, amount, self.token.chain_id)
            payload["refundAuthorizerSignature"] = "0x" + sign(self.authorizer, digest).hex()
            if claimed is not None:
                payload["claimAuthorizerSignature"] = self.authorized_claims((self, voucher, claimed))
        return self.call(payload, bare=True)

    def settles(self) -> dict[str, Any]:
        return self.call({"type": "settle", "receiver": self.receiver, "token": self.token.address}, bare=True)


def claims(*rows: tuple[Channel, int, int], signed: bool = True) -> dict[str, Any]:
    """A claim of several channels: each with its voucher's amount and the total claimed of it."""
    first = rows[0][0]
    payload: dict[str, Any] = {
        "type": "claim",
        "claims": [channel.row(amount, total) for channel, amount, total in rows],
    }
    if signed:
        payload["claimAuthorizerSignature"] = first.authorized_claims(*rows)
    return first.call(payload, bare=True)


def channel_of(chain: Devnet, network: Network, payer: int = 2, **more: Any) -> Channel:
    """A channel of one of the chain's wallets in USDC, for a shop whose authorizer is wallet 8."""
    return Channel(network, chain.wallets[payer], chain.wallets[8], **{"token": network.tokens[0], **more})
