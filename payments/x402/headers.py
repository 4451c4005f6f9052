"""What every payment header says before its scheme has a say; `payments.x402.wire` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field

from payments.x402.extensions.eip2612 import Eip2612Permit
from payments.x402.extensions.erc20_approval import Erc20Approval
from payments.x402.requirements import Requirement


@dataclass(frozen=True, slots=True)
class PaymentHeader:
    """What every decoded payment header says, whatever its scheme."""

    version: int
    """1 or 2."""
    scheme: str
    network: str
    """As the payer wrote it: CAIP-2 in v2, a name such as ``base-sepolia`` in v1."""
    accepted: Requirement | None
    """The offer that the payer chose; v1 does not send it."""
    quote_token: str | None
    """Our quote as the payer echoed it; v1 cannot carry it."""
    digest: bytes
    """SHA-256 over the whole payment in canonical JSON: the same payment sent again has the same digest, any other has not."""
    identifier: str | None = field(default=None, kw_only=True)
    """The payer's own name for it, see `payments.x402.extensions.identifier`."""
    wants_receipt: bool = field(default=False, kw_only=True)
    """Whether the payer was offered a signed receipt and echoed that."""
    permit: Eip2612Permit | None = field(default=None, kw_only=True)
    """Gives Permit2 its allowance in the very call that takes the money: checked with the payment, where that uses Permit2."""
    approval: Erc20Approval | None = field(default=None, kw_only=True)
    """Gives it by a transaction of the payer's own, which we bring to the chain first: checked likewise."""

    @property
    def token_address(self) -> str | None:
        """The token that the payer says it pays in, lower-case hex; None if it does not say."""
        return None if self.accepted is None else self.accepted.asset
