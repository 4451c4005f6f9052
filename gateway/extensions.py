"""The x402 extensions of a gateway: what a 402 declares, and what a request that answers one of them is granted.

`payments.x402.extensions` knows each of them; here is which are declared when, and how they meet a call.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import orjson

from gateway.access.keys import WalletCaller
from gateway.api.errors import ApiError
from gateway.api.http import Call
from payments.sign_in import use_nonce
from payments.store import Store
from payments.x402.extensions import bazaar, eip2612, erc20_approval, identifier, offer_receipt, sign_in_with_x
from payments.x402.extensions.offer_receipt import OfferSigner
from payments.x402.extensions.sign_in_with_x import SignInWithX
from payments.x402.requirements import Requirement

NAMES = (identifier.NAME, sign_in_with_x.NAME, offer_receipt.NAME, bazaar.NAME, eip2612.NAME, erc20_approval.NAME)


class Extensions:
    """All that the gateway's answers and requests can be extended with.

    Args:
        store: Where used sign-in nonces are kept.
        signer: Signs offers and receipts.
        sign_in: Makes and checks sign-in challenges.
        origin: The gateway's own URL without a path. It is what wallets sign for, so it is the operator's and never the
            request's: a proxy in between could have its own name signed.
        default: Declared to whoever asks for none.
        example_model: Named in the example of a request; None if nothing can be called.
        sponsored: The networks, in CAIP-2 form, on which approvals are brought to the chain for their payers.
    """

    def __init__(
        self,
        store: Store,
        signer: OfferSigner,
        sign_in: SignInWithX,
        origin: str,
        default: Sequence[str],
        example_model: str | None,
        sponsored: frozenset[str] = frozenset(),
    ) -> None:
        self.signer = signer
        self.example_model = example_model
        self.origin = origin.rstrip("/")
        self._store = store
        self._sign_in = sign_in
        self._default = tuple(default)
        self._sponsored = sponsored

    def asked(self, accept_payment: str | None) -> list[str]:
        """The extensions that a caller asks for by name, in its order."""
        names = (item.strip() for item in (accept_payment or "").split(","))
        return [name for name in dict.fromkeys(names) if name in NAMES]

    def declared(
        self, call: Call, asked: Sequence[str], requirements: Sequence[Requirement], resource_url: str
    ) -> dict[str, Any]:
        """The declarations of a 402 for a call, the most wanted one first."""
        declared = {}
        now = int(time.time())
        for name in dict.fromkeys([*asked, *self._default]):
            if name == identifier.NAME:
                declared[name] = identifier.DECLARATION
            elif name == sign_in_with_x.NAME:
                declared[name] = self._sign_in.declaration(self.origin + call.path, urlsplit(self.origin).netloc, now)
            elif name == offer_receipt.NAME:
                declared[name] = self.signer.offers(requirements, resource_url, now)
            elif name == bazaar.NAME and call.path == bazaar.CHAT_PATH and self.example_model is not None:
                declared[name] = bazaar.declaration(self.example_model)
            elif name == eip2612.NAME and any(map(eip2612.helps, requirements)):
                declared[name] = eip2612.DECLARATION
            elif name == erc20_approval.NAME and any(map(self._sponsors, requirements)):
                declared[name] = erc20_approval.DECLARATION
        return declared

    def _sponsors(self, requirement: Requirement) -> bool:
        return requirement.network in self._sponsored and erc20_approval.helps(requirement)

    async def signed_in(self, call: Call) -> WalletCaller | None:
        """The wallet that answered a challenge with this request; its nonce is used up. None if there is no answer.

        Raises:
            SignInRefused: The answer is not good, or was used before.
            StoreBusy: The nonce cannot be used up now.
        """
        header = call.header(sign_in_with_x.HEADER)
        if header is None:
            return None
        url, domain = self.origin + call.path, urlsplit(self.origin).netloc
        found = self._sign_in.verify(header, url, domain, int(time.time()))
        await self._store.write(lambda tx: use_nonce(tx, found.nonce, found.expires_at))
        return WalletCaller(found.address)

    def receipt(self, network: str, resource_url: str, payer: str, transaction: str | None) -> dict[str, Any]:
        """The signed receipt for a payment that arrived, as `PAYMENT-RESPONSE` carries it."""
        return {
            offer_receipt.NAME: self.signer.receipt(network, resource_url, payer, transaction or "", int(time.time()))
        }

    def keys(self) -> dict[str, Any]:
        """The answer of `/.well-known/farebox-keys`: whose signatures on offers and receipts are this gateway's."""
        return {
            offer_receipt.NAME: {"format": "eip712", "address": self.signer.address},
            "origin": self.origin,
        }

    def example(self) -> bytes:
        """The body of the example request.

        Raises:
            ApiError: 404 if nothing can be called.
        """
        if self.example_model is None:
            raise ApiError(404, "nothing_listed", "this gateway sells nothing yet: it has no models")
        return orjson.dumps(bazaar.declaration(self.example_model)["info"]["input"]["body"])
