"""What an agent installs: a wallet that pays a Farebox gateway for each request, within limits that you set.

    from agents_sdk import Agent, SpendingPolicy

    agent = Agent(wallet=os.environ["FAREBOX_WALLET_KEY"], base_url="https://gateway.example",
                  policy=SpendingPolicy(max_per_request="0.05", max_per_day="2"))

    # The stock OpenAI SDK, synchronous or not, streamed or not:
    client = agent.openai()
    stream = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "Why?"}], stream=True)
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="")
    print(agent.receipts(limit=1)[0])

    # Any httpx code:
    with agent.http_client() as http:
        http.post("/v1/chat/completions", json={"model": "auto", "messages": [...]})

    # Many requests on one deposit, then what is left back; and a balance to keep:
    agent = Agent(..., policy=SpendingPolicy(schemes=("batch-settlement", "exact"), channel_deposit="1.00"))
    agent.wallet.channels(); agent.wallet.refund_channel(); agent.wallet.topup("5"); agent.wallet.withdraw("all")

A 402 is answered by signing a payment after the policy and the itemised quote were checked. When an answer is lost, the
same payment is sent again, never a new one. What a payment leaves over is the wallet's credit and is spent first.
"""

from agents_sdk.agent import Agent
from agents_sdk.errors import (
    AnswerUnreadable,
    ApprovalFailed,
    ApprovalNeeded,
    ChannelDisputed,
    FareboxError,
    LimitExceeded,
    NetworkFeeTooHigh,
    NetworkNotAllowed,
    OutcomeUnknown,
    PolicyViolation,
    QuoteRejected,
    RecipientNotAllowed,
    RequestRefused,
    SignInRefused,
    TokenNotAllowed,
)
from agents_sdk.policy import SpendingPolicy
from agents_sdk.receipts import Receipt
from agents_sdk.results import (
    ApiKey,
    Balance,
    Channel,
    DepositAddress,
    HistoryEntry,
    HistoryPage,
    NewApiKey,
    Refund,
    TopUp,
    Withdrawal,
)
from agents_sdk.tokens import Token

__all__ = [
    "Agent",
    "AnswerUnreadable",
    "ApiKey",
    "ApprovalFailed",
    "ApprovalNeeded",
    "Balance",
    "Channel",
    "ChannelDisputed",
    "DepositAddress",
    "FareboxError",
    "HistoryEntry",
    "HistoryPage",
    "LimitExceeded",
    "NetworkFeeTooHigh",
    "NetworkNotAllowed",
    "NewApiKey",
    "OutcomeUnknown",
    "PolicyViolation",
    "QuoteRejected",
    "Receipt",
    "RecipientNotAllowed",
    "Refund",
    "RequestRefused",
    "SignInRefused",
    "SpendingPolicy",
    "Token",
    "TokenNotAllowed",
    "TopUp",
    "Withdrawal",
]
