"""What the tests of contract wallets share: how a request is paid for at a desk that also takes their payments."""

from __future__ import annotations

import dataclasses
import time

import pytest

from payments.chain.networks import Network, Token
from payments.errors import PaymentError
from payments.tenders.base import Outcome
from payments.tenders.exact_scheme import ExactScheme
from payments.tenders.exact_services import ExactServices
from payments.x402.wire import Payment
from tests.payments import contract_wallets as wallets
from tests.payments.exact_samples import DETAILS, QUOTED, quote_of
from tests.payments.settling import PAY_TO


async def send(services: ExactServices, network: Network, token: Token, payment: Payment) -> bool:
    """Pay for a request; returns whether its inference might have begun before the money was there."""
    scheme = ExactScheme(network, PAY_TO, services, [wallets.FACTORY])
    requirement = scheme.requirement(token, QUOTED, 300)
    payment = dataclasses.replace(payment, accepted=requirement)
    hold = await scheme.tender(payment, token, requirement, b"d" * 32, int(time.time())).authorize(quote_of(), DETAILS)
    early = hold.may_start_early
    await hold.ready()
    await hold.capture(QUOTED, Outcome({}))
    return early


async def refusal(services: ExactServices, network: Network, token: Token, payment: Payment) -> PaymentError:
    """Pay for a request that is refused; returns what is said then."""
    with pytest.raises(PaymentError) as refused:
        await send(services, network, token, payment)
    return refused.value
