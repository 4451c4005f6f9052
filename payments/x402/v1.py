"""The x402 v1 form of what a 402 offers, for clients that read the body instead of the header.

v1 names networks by words (``base-sepolia``) and knows the scheme exact by EIP-3009 only, so other schemes, a Permit2 token and
a network without such a word have no v1 form.
"""

from __future__ import annotations

from typing import Any

from payments.chain.networks import Network
from payments.x402.requirements import Requirement

RESOURCE_DESCRIPTION = "An answer of an AI model"
RESOURCE_MIME_TYPE = "application/json"


def v1_requirement(
    requirement: Requirement, network: Network, resource_url: str, description: str = RESOURCE_DESCRIPTION
) -> dict[str, Any] | None:
    """The JSON-able v1 offer that means the same as `requirement`, or None if v1 clients cannot pay it.

    Args:
        requirement: The v2 offer.
        network: Its chain.
        resource_url: What is being paid for.
        description: The same in words.
    """
    if (
        requirement.scheme != "exact"
        or network.v1_name is None
        or requirement.extra.get("assetTransferMethod") != "eip3009"
    ):
        return None
    return {
        "scheme": requirement.scheme,
        "network": network.v1_name,
        "maxAmountRequired": str(requirement.amount),
        "resource": resource_url,
        # v1 clients demand the two, whatever they say.
        "description": description,
        "mimeType": RESOURCE_MIME_TYPE,
        "payTo": requirement.pay_to,
        "maxTimeoutSeconds": requirement.max_timeout_s,
        "asset": requirement.asset,
        "extra": requirement.extra,
    }
