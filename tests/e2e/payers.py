"""Payers that sign by hand, so that they can sign anything: in every scheme, true or false, and the same again.

The official clients refuse most of what these sign. The signatures are over our own digests, which tests of the official
clients prove right.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any, Literal

import coincurve
import httpx
import orjson
from sha3 import keccak_256

from contracts.devnet import PERMIT2_ADDRESS, USDC, USDT, DevToken, call_data, mint, rpc, send_as
from gateway.dev.stack import Stack
from payments.chain.networks import (
    EXACT_PERMIT2_PROXY_ADDRESS,
    PERMIT2_DEPOSIT_COLLECTOR_ADDRESS,
    UPTO_PERMIT2_PROXY_ADDRESS,
    Token,
)
from payments.verification import eip712, vouchers
from payments.x402.channels import ChannelConfig, Erc3009Deposit, Permit2Deposit, hex32
from payments.x402.wire import Eip3009Authorization, Permit2Authorization, UptoAuthorization
from tests.e2e.clients import JSON, decoded, encoded

CHAIN_ID = 84532
RICH = 10**7
"""Atomic units of each token that a payer begins with: 10 dollars."""
Way = Literal["exact USDC", "exact USDT", "upto USDC", "upto USDT", "channel USDC", "channel USDT"]
WAYS: tuple[Way, ...] = ("exact USDC", "exact USDT", "upto USDC", "upto USDT", "channel USDC", "channel USDT")
SCHEMES = {"exact": "exact", "upto": "upto", "channel": "batch-settlement"}
DEV_TOKENS = {"USDC": USDC, "USDT": USDT}


def token(symbol: str, chain_id: int = CHAIN_ID, address: str | None = None) -> Token:
    """One of the two tokens as our own code knows it."""
    dev = DEV_TOKENS[symbol]
    return Token(
        symbol,
        chain_id,
        (address or dev.address).lower(),
        dev.decimals,
        dev.transfer_method,
        dev.name,
        dev.version,
    )


class Payer:
    """A wallet that nobody has seen before.

    Args:
        stack: Where it pays.
        usdc: Atomic units that it gets; `usdt` likewise.
        approved: Whether Permit2 may move both.
        key: Its private key, by default a new one.
    """

    def __init__(
        self, stack: Stack, *, usdc: int = RICH, usdt: int = RICH, approved: bool = True, key: bytes | None = None
    ) -> None:
        self.stack = stack
        self.key = coincurve.PrivateKey(key or secrets.token_bytes(32))
        self.address = "0x" + keccak_256(self.key.public_key.format(compressed=False)[1:]).hexdigest()[-40:]
        rpc(stack.rpc_url, "anvil_setBalance", self.address, hex(10**18))
        rpc(stack.rpc_url, "anvil_impersonateAccount", self.address)
        for dev, amount in ((USDC, usdc), (USDT, usdt)):
            if amount:
                mint(stack.rpc_url, dev, self.address, amount)
            if approved:
                self.approve(dev)
        self.channels: dict[str, Channel] = {}

    def approve(self, dev: DevToken, atomic: int = 2**256 - 1) -> None:
        """Let Permit2 take up to `atomic` units."""
        self.acts(dev.address, "approve(address,uint256)", PERMIT2_ADDRESS, atomic)

    def acts(self, to: str, signature: str, *arguments: str | int) -> str:
        """Send a transaction of its own, and wait for it."""
        return send_as(self.stack.rpc_url, self.address, to, call_data(signature, *arguments))

    def ask(
        self, http: httpx.Client, way: Way, body: dict[str, Any], path: str = "/v1/chat/completions"
    ) -> dict[str, Any]:
        """The 402 for a request: what its header says."""
        answer = http.post(path, content=orjson.dumps(body), headers=JSON | accept(way))
        assert answer.status_code == 402, answer.text
        required: dict[str, Any] = decoded(answer.headers["payment-required"])
        return required

    def pay(
        self,
        http: httpx.Client,
        way: Way,
        body: dict[str, Any],
        *,
        path: str = "/v1/chat/completions",
        **changes: Any,
    ) -> dict[str, str]:
        """Ask for the price and sign it, with changes as `sign` takes them; the headers that go with the request."""
        return headers(way, self.sign(way, self.ask(http, way, body, path), **changes))

    def sign(self, way: Way, required: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """A payment, decoded, truly signed over what it says.

        Args:
            way: Scheme and token.
            required: What the 402 said.
            changes: Of the terms before they are signed, by name: `value`, `to`, `valid_after`, `valid_before`, `nonce`,
                `spender`, `facilitator`, `chain_id` (of the domain), `token_address` (of the domain, or the permission).
        """
        scheme, symbol = way.split()
        offer = offer_of(required, way)
        if scheme == "channel":
            payload = self.channel(offer, symbol).next(int(offer["amount"]), **changes)
        elif scheme == "exact" and symbol == "USDC":
            payload = self._eip3009(offer, symbol, changes)
        else:
            payload = self._permit2(offer, symbol, scheme, changes)
        payment = {"x402Version": 2, "accepted": offer, "payload": payload, "resource": required.get("resource")}
        return payment | {"extensions": required.get("extensions") or {}}

    def channel(self, offer: dict[str, Any], symbol: str) -> Channel:
        """Its channel in a token, made by the first offer that it is to pay."""
        if symbol not in self.channels:
            self.channels[symbol] = Channel(self, offer, symbol)
        return self.channels[symbol]

    def signature(self, digest: bytes) -> str:
        """Of a digest, as hex."""
        return "0x" + vouchers.sign_digest(self.key, digest).hex()

    def _eip3009(self, offer: dict[str, Any], symbol: str, changes: dict[str, Any]) -> dict[str, Any]:
        signed = Eip3009Authorization(
            payer=self.address,
            to=changes.get("to", offer["payTo"]).lower(),
            value=changes.get("value", int(offer["amount"])),
            valid_after=changes.get("valid_after", 0),
            valid_before=changes.get("valid_before", int(time.time()) + 300),
            nonce=changes.get("nonce", secrets.randbits(256)),
        )
        domain = token(symbol, changes.get("chain_id", CHAIN_ID), changes.get("token_address"))
        authorization = {
            "from": self.address,
            "to": signed.to,
            "value": str(signed.value),
            "validAfter": str(signed.valid_after),
            "validBefore": str(signed.valid_before),
            "nonce": hex32(signed.nonce),
        }
        return {"authorization": authorization, "signature": self.signature(eip712.eip3009_digest(signed, domain))}

    def _permit2(self, offer: dict[str, Any], symbol: str, scheme: str, changes: dict[str, Any]) -> dict[str, Any]:
        upto = scheme == "upto"
        terms: dict[str, Any] = {
            "payer": self.address,
            "token": changes.get("token_address", DEV_TOKENS[symbol].address).lower(),
            "amount": changes.get("value", int(offer["amount"])),
            "spender": changes.get("spender", UPTO_PERMIT2_PROXY_ADDRESS if upto else EXACT_PERMIT2_PROXY_ADDRESS),
            "nonce": changes.get("nonce", secrets.randbits(256)),
            "deadline": changes.get("valid_before", int(time.time()) + 3600),
            "to": changes.get("to", offer["payTo"]).lower(),
            "valid_after": changes.get("valid_after", 0),
        }
        witness: dict[str, Any] = {"to": terms["to"], "validAfter": str(terms["valid_after"])}
        chain_id = changes.get("chain_id", CHAIN_ID)
        if upto:
            facilitator = changes.get("facilitator", offer["extra"]["facilitatorAddress"]).lower()
            witness["facilitator"] = facilitator
            digest = eip712.permit2_upto_digest(UptoAuthorization(**terms, facilitator=facilitator), chain_id)
        else:
            digest = eip712.permit2_exact_digest(Permit2Authorization(**terms), chain_id)
        authorization = {
            "from": self.address,
            "permitted": {"token": terms["token"], "amount": str(terms["amount"])},
            "spender": terms["spender"],
            "nonce": str(terms["nonce"]),
            "deadline": str(terms["deadline"]),
            "witness": witness,
        }
        return {"permit2Authorization": authorization, "signature": self.signature(digest)}


class Channel:
    """A payer's side of a channel. It believes what the gateway tells it, as a stock client does.

    Args:
        payer: Who pays.
        offer: An offer of the scheme.
        symbol: Of the token.
    """

    def __init__(self, payer: Payer, offer: dict[str, Any], symbol: str) -> None:
        self.payer, self.token = payer, token(symbol)
        extra = offer["extra"]
        self.config = ChannelConfig(
            payer=payer.address,
            payer_authorizer=payer.address,
            receiver=offer["payTo"].lower(),
            receiver_authorizer=extra["receiverAuthorizer"].lower(),
            token=self.token.address,
            withdraw_delay=extra["withdrawDelay"],
            salt=secrets.randbits(256),
        )
        self.number = vouchers.channel_id(self.config, CHAIN_ID)
        self.deposited = 0
        self.charged = 0

    def next(self, price: int, **changes: Any) -> dict[str, Any]:
        """The payload that pays `price` more; the first one deposits ten times as much, or `deposit`."""
        amount = changes.get("value", self.charged + price)
        deposit = changes.get("deposit", 0 if self.deposited else 10 * price)
        payload: dict[str, Any] = {
            "type": "voucher",
            "channelConfig": self.config_json(),
            "voucher": self.voucher(amount, changes.get("number", self.number), changes.get("chain_id", CHAIN_ID)),
        }
        if deposit:
            payload |= {"type": "deposit", "deposit": self.deposit(deposit, **changes)}
            self.deposited += deposit
        return payload

    def heard(self, answer: httpx.Response) -> None:
        """Take over what an answer says was charged."""
        told = decoded(answer.headers["payment-response"])["extra"]["channelState"]
        self.charged = int(told["chargedCumulativeAmount"])

    def voucher(self, amount: int, number: int | None = None, chain_id: int = CHAIN_ID) -> dict[str, str]:
        """A signed voucher."""
        number = self.number if number is None else number
        digest = vouchers.voucher_digest(number, amount, chain_id)
        return {
            "channelId": hex32(number),
            "maxClaimableAmount": str(amount),
            "signature": self.payer.signature(digest),
        }

    def deposit(self, amount: int, **changes: Any) -> dict[str, Any]:
        """A signed deposit."""
        until = changes.get("valid_before", int(time.time()) + 300)
        if self.token.transfer_method == "eip3009":
            erc = Erc3009Deposit(amount, changes.get("valid_after", 0), until, secrets.randbits(256), b"")
            digest = vouchers.erc3009_deposit_digest(erc, self.config, self.number, self.token)
            authorization: dict[str, Any] = {
                "validAfter": str(erc.valid_after),
                "validBefore": str(until),
                "salt": hex32(erc.salt),
                "signature": self.payer.signature(digest),
            }
            return {"amount": str(amount), "authorization": {"erc3009Authorization": authorization}}
        permit = Permit2Deposit(
            amount=amount,
            payer=self.payer.address,
            token=self.token.address,
            permitted=amount,
            spender=PERMIT2_DEPOSIT_COLLECTOR_ADDRESS,
            nonce=changes.get("nonce", secrets.randbits(256)),
            deadline=until,
            channel_id=self.number,
            signature=b"",
        )
        authorization = {
            "from": permit.payer,
            "permitted": {"token": permit.token, "amount": str(amount)},
            "spender": permit.spender,
            "nonce": str(permit.nonce),
            "deadline": str(until),
            "witness": {"channelId": hex32(self.number)},
            "signature": self.payer.signature(vouchers.permit2_deposit_digest(permit, CHAIN_ID)),
        }
        return {"amount": str(amount), "authorization": {"permit2Authorization": authorization}}

    def config_json(self) -> dict[str, Any]:
        """The channel's configuration as it goes over the wire."""
        config = self.config
        return {
            "payer": config.payer,
            "payerAuthorizer": config.payer_authorizer,
            "receiver": config.receiver,
            "receiverAuthorizer": config.receiver_authorizer,
            "token": config.token,
            "withdrawDelay": config.withdraw_delay,
            "salt": hex32(config.salt),
        }

    def acts(self, function: str, *arguments: int) -> str:
        """A transaction of the payer's with the contract, whose first argument is the channel's configuration."""
        from contracts.devnet import BATCH_SETTLEMENT_ADDRESS
        from payments.chain.channel_contract import encode_config
        from payments.chain.transactions import selector, word

        shape = "(address,address,address,address,address,uint40,bytes32)"
        signature = f"{function}({','.join([shape, *(['uint128'] * len(arguments))])})"
        data = selector(signature) + encode_config(self.config) + b"".join(map(word, arguments))
        return send_as(self.payer.stack.rpc_url, self.payer.address, BATCH_SETTLEMENT_ADDRESS, "0x" + data.hex())


def accept(way: Way) -> dict[str, str]:
    """The header that asks for an offer."""
    return {"accept-payment": SCHEMES[way.split()[0]]}


def headers(way: Way, payment: dict[str, Any]) -> dict[str, str]:
    """The headers of a request that carries a payment."""
    return accept(way) | {"PAYMENT-SIGNATURE": encoded(payment)}


def offer_of(required: dict[str, Any], way: Way) -> dict[str, Any]:
    """Of what a 402 offers, this way to pay."""
    scheme, symbol = way.split()
    found: dict[str, Any] = next(
        offer
        for offer in required["accepts"]
        if offer["scheme"] == SCHEMES[scheme] and offer["asset"].lower() == DEV_TOKENS[symbol].address.lower()
    )
    return found


def changed(signed: dict[str, str], change: Callable[[dict[str, Any]], Any]) -> dict[str, str]:
    """The headers with their payment changed after it was signed: `change` does it in place."""
    payment = decoded(signed["PAYMENT-SIGNATURE"])
    change(payment)
    return signed | {"PAYMENT-SIGNATURE": encoded(payment)}
