"""Topping up by the x402 scheme `upto`: all of the maximum is taken at once, so that it is a transfer like one of `exact`.

Only the call differs, which the batch contract makes: the payer names it as the facilitator. Who signs, is credited when there
is evidence, resumed after a crash and told of a failure is `exact`'s matter, see `payments.tenders.evidence`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from payments.chain.networks import UPTO_PERMIT2_PROXY_ADDRESS
from payments.chain.transactions import encode_upto_settle
from payments.settlement.outbox import order_facilitator
from payments.tenders.exact import PAYMENT, ExactTender
from payments.x402.wire import UptoAuthorization

KIND = "upto_topup"
TOP_UP = replace(PAYMENT, through=order_facilitator)
"""Settlements of the kind ``upto_topup``: the whole of a payer's authorization pays the treasury and is its balance."""


class UptoTopUp(ExactTender):
    """One authorization of `upto`, taken whole. Arguments as for `ExactTender`."""

    scheme: Literal["exact", "upto"] = "upto"
    kind = KIND

    @property
    def _authorization(self) -> UptoAuthorization:
        assert isinstance(self._payment.authorization, UptoAuthorization)
        return self._payment.authorization

    @property
    def sender(self) -> str:
        """See `ExactTender`."""
        return self._authorization.facilitator

    def _call(self, *, deploy: bool) -> tuple[str, bytes]:
        del deploy  # there is no wallet to deploy: an account signs by its key
        payment, authorization = self._payment, self._authorization
        call = encode_upto_settle(authorization, payment.signature, authorization.value, payment.permit)
        return UPTO_PERMIT2_PROXY_ADDRESS, call
