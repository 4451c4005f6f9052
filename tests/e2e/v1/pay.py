"""One question, paid by a stock x402 v1 client. Runs in the environment of `v1-requirements.lock`, where Farebox is not.

Arguments: the client (httpx or requests), the URL, the JSON body. The private key is in WALLET_KEY. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from eth_account import Account

HEADERS = {"content-type": "application/json"}


async def with_httpx(account: Any, url: str, body: str) -> dict[str, Any]:
    """Pay with the asynchronous httpx client."""
    from x402.clients.httpx import x402HttpxClient  # type: ignore[import-not-found]

    async with x402HttpxClient(account=account, timeout=30) as client:
        if not json.loads(body).get("stream"):
            answer = await client.post(url, content=body, headers=HEADERS)
            return _told(answer, answer.text)
        async with client.stream("POST", url, content=body, headers=HEADERS) as answer:
            lines = [line async for line in answer.aiter_lines()]
            return _told(answer, "\n".join(lines))


def with_requests(account: Any, url: str, body: str) -> dict[str, Any]:
    """Pay with the requests session."""
    from x402.clients.requests import x402_requests  # type: ignore[import-not-found]

    with x402_requests(account) as session:
        streamed = bool(json.loads(body).get("stream"))
        answer = session.post(url, data=body, headers=HEADERS, stream=streamed, timeout=30)
        text = "\n".join(answer.iter_lines(decode_unicode=True)) if streamed else answer.text
    return _told(answer, text)


def _told(answer: Any, text: str) -> dict[str, Any]:
    """What was answered, and the payment that was answered."""
    headers = {name.lower(): value for name, value in answer.headers.items()}
    sent = answer.request.headers["X-PAYMENT"]
    return {"status": answer.status_code, "headers": headers, "text": text, "sent": sent}


def main() -> None:
    """Pay and print."""
    from x402.clients.base import decode_x_payment_response  # type: ignore[import-not-found]

    client, url, body = sys.argv[1:]
    account = Account.from_key(os.environ["WALLET_KEY"])
    result = asyncio.run(with_httpx(account, url, body)) if client == "httpx" else with_requests(account, url, body)
    paid = result["headers"].get("x-payment-response")
    result["payment_response"] = None if paid is None else decode_x_payment_response(paid)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
