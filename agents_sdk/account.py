"""What a wallet asks of its gateway about its balance: steps without I/O of their own, see `agents_sdk.steps`.

Whatever moves money is asked for under a name that is written down first, so that it is not done twice when an answer is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import httpx

from agents_sdk import credit
from agents_sdk.answers import document_in, error_code_in, error_in, retry_after
from agents_sdk.channels import book
from agents_sdk.channels.payments import ChannelFull
from agents_sdk.channels.refunds import is_served, refund
from agents_sdk.channels.rows import Book
from agents_sdk.errors import AnswerUnreadable, OutcomeUnknown, RequestRefused
from agents_sdk.exchange import Exchange, digest_of
from agents_sdk.money import atomic_to_nano_down, nano_to_usd, usd_to_nano
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
from agents_sdk.shared import Shared
from agents_sdk.steps import SIDE_TIMEOUTS, Lost, Read, Send, Sleep, Steps, fetch

T = TypeVar("T")
DONE = frozenset({"paid", "failed", "rejected", "review"})
"""Withdrawals whose state does not change soon."""
FIRST_QUESTION = {"model": "auto", "messages": [{"role": "user", "content": "Say ok."}], "max_tokens": 8}
"""The smallest: it carries the deposit of a channel that is opened before it is needed."""
POLL_S = 1.0
PAUSE_S_MAX = 30.0
_WALLET = "/v1/wallet"
_KEY = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)


def balance(shared: Shared) -> Steps[list[Balance]]:
    """The wallet's balances; also notes them, so that they are spent."""
    document = yield from _ask(shared, "GET", _WALLET, again=True)
    balances = _read(lambda: [_balance(each) for each in document["balances"]], "balances")
    amounts = {each.asset: usd_to_nano(each.available_usd) for each in balances}
    shared.journal.set_credit(shared.origin, shared.wallet.address, amounts)
    shared.look_for_credit = False
    return balances


def history(shared: Shared, limit: int, before: str | None) -> Steps[HistoryPage]:
    """A page of the wallet's history."""
    query = urlencode({"limit": limit} | ({} if before is None else {"before": before}))
    document = yield from _ask(shared, "GET", f"{_WALLET}/history?{query}", again=True)
    return _read(lambda: HistoryPage(tuple(map(_entry, document["history"])), document["next"]), "history")


def topup(shared: Shared, usd: str, asset: str | None) -> Steps[TopUp]:
    """Pay into the wallet's balance. Asked again while the outcome of the first is unknown, it is the same payment."""
    usd = nano_to_usd(usd_to_nano(usd))
    request = _post(shared, f"{_WALLET}/topups", {"amount_usd": usd} | ({} if asset is None else {"asset": asset}))
    policy = replace(shared.settings.policy, schemes=("exact",))
    status, content = yield from _paid(shared, request, policy=policy, asset=asset, from_credit=False)
    if status == 200:
        document = document_in(content)
        return _read(
            lambda: TopUp(document["asset"], document["credited_usd"], document["receipt"], document["transaction"]),
            "top-up",
        )
    if status in (409, 504) or status >= 500:
        raise OutcomeUnknown(
            f"the top-up of {usd} USD is not known to have arrived ({_message(status, content)}); ask for the same "
            "again: it is the same payment"
        )
    code = error_code_in(content)
    if code == "insufficient_funds":
        which = asset or "any token that may be paid in"
        raise RequestRefused(status, code, f"the wallet does not hold {usd} USD of {which}")
    raise RequestRefused(status, code, _message(status, content))


def withdraw(
    shared: Shared, usd: str, asset: str | None, idempotency_key: str | None, wait_s: float
) -> Steps[Withdrawal]:
    """Take the balance out to the wallet, and wait until that is decided."""
    amount = usd if usd == "all" else nano_to_usd(usd_to_nano(usd))
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        raise ValueError(f"{idempotency_key!r} is not an idempotency key: 1 to 128 characters (A-Z a-z 0-9 . _ : -)")
    chosen = asset or (yield from _only_asset(shared))
    intent = f"withdraw|{shared.origin}|{shared.wallet.address}|{chosen}|{amount}"
    key = idempotency_key or shared.journal.intend(intent)[0]
    body = {"amount_usd": amount, "asset": chosen}
    try:
        document = yield from _ask(shared, "POST", f"{_WALLET}/withdrawals", body, {"idempotency-key": key}, again=True)
    except RequestRefused:
        shared.journal.end_intent(intent)
        raise
    made = _read(lambda: _withdrawal(document), "withdrawal")
    shared.journal.end_intent(intent)
    while made.state not in DONE and wait_s > 0:
        yield Sleep(min(POLL_S, wait_s))
        wait_s -= POLL_S
        made = yield from withdrawal(shared, made.id)
    return made


def withdrawal(shared: Shared, withdrawal_id: str) -> Steps[Withdrawal]:
    """One of the wallet's withdrawals."""
    document = yield from _ask(shared, "GET", f"{_WALLET}/withdrawals/{quote(withdrawal_id, safe='')}", again=True)
    return _read(lambda: _withdrawal(document), "withdrawal")


def withdrawals(shared: Shared) -> Steps[list[Withdrawal]]:
    """The wallet's newest withdrawals."""
    document = yield from _ask(shared, "GET", f"{_WALLET}/withdrawals", again=True)
    return _read(lambda: [_withdrawal(each) for each in document["withdrawals"]], "withdrawals")


def deposit_addresses(shared: Shared) -> Steps[list[DepositAddress]]:
    """The wallet's own addresses, made if they were not."""
    document = yield from _ask(shared, "POST", f"{_WALLET}/deposit-addresses", {}, again=True)

    def read() -> list[DepositAddress]:
        return [
            DepositAddress(
                made["network"],
                made["address"],
                tuple(each["symbol"] for each in document["tokens"] if each["network"] == made["network"]),
            )
            for made in document["deposit_addresses"]
        ]

    return _read(read, "deposit addresses")


def deposit_address(shared: Shared, network: str | None) -> Steps[DepositAddress]:
    """The one on a network; on the only one if none is named."""
    found = yield from deposit_addresses(shared)
    matching = [each for each in found if network in (None, each.network)]
    if len(matching) == 1:
        return matching[0]
    networks = ", ".join(each.network for each in found)
    raise RequestRefused(404, "network", f"name one of the networks that have deposit addresses here: {networks}")


def create_key(shared: Shared, name: str) -> Steps[NewApiKey]:
    """Make an API key; not asked for again by itself, since a lost answer could have carried one."""
    document = yield from _ask(shared, "POST", f"{_WALLET}/keys", {"name": name}, again=False)
    return _read(lambda: NewApiKey(document["key"], document["id"], document["name"]), "key")


def list_keys(shared: Shared) -> Steps[list[ApiKey]]:
    """The wallet's keys."""
    document = yield from _ask(shared, "GET", f"{_WALLET}/keys", again=True)
    return _read(lambda: [_key(each) for each in document["keys"]], "keys")


def revoke_key(shared: Shared, key_id: str) -> Steps[ApiKey]:
    """Make a key useless."""
    if not key_id:
        raise RequestRefused(404, "key_not_found", "this wallet has no key without an id")
    document = yield from _ask(shared, "DELETE", f"{_WALLET}/keys/{quote(key_id, safe='')}", again=True)
    return _read(lambda: _key(document), "key")


def channels(shared: Shared) -> list[Channel]:
    """The wallet's channels, by the journal."""
    return [_channel(each) for each in book.of_wallet(shared.journal, shared.wallet.address)]


def open_channel(shared: Shared, usd: str, asset: str | None) -> Steps[Channel]:
    """Fill a channel up; a deposit travels with a request, so this asks the smallest question, unless there is enough."""
    policy = replace(
        shared.settings.policy, schemes=("batch-settlement",), channel_deposit=nano_to_usd(usd_to_nano(usd))
    )
    if asset is not None and "/" in asset and policy.networks is None:
        policy = replace(policy, networks=[asset.rpartition("/")[0]])
    request = _post(shared, "/v1/chat/completions", FIRST_QUESTION)
    try:
        # Whoever has credit would pay with that, and open nothing.
        status, content = yield from _paid(
            shared, request, policy=policy, asset=asset, from_credit=False, fill_channel=True
        )
    except ChannelFull as full:
        return _channel(book.get(shared.journal, full.channel_id))
    opened = book.paid_for(shared.journal, shared.wallet.address, digest_of(request))
    if status != 200 or opened is None:
        raise RequestRefused(status, error_code_in(content), _message(status, content))
    return _channel(book.get(shared.journal, opened))


def refund_channel(shared: Shared, channel_id: str | None, usd: str | None) -> Steps[Refund]:
    """Get back what a channel holds beyond what was charged; the only channel that has something, if none is named."""
    amount = None if usd is None else usd_to_nano(usd)
    known = book.of_wallet(shared.journal, shared.wallet.address)
    if channel_id is None:
        channel_id = yield from _only_channel(shared, known)
    if channel_id.lower() not in {each.terms.channel_id for each in known}:
        raise RequestRefused(404, "channel", f"this agent's log knows no channel {channel_id}")
    return (yield from refund(shared, channel_id.lower(), amount))


def _only_channel(shared: Shared, known: list[Book]) -> Steps[str]:
    filled = known if len(known) == 1 else [each for each in known if each.unspent]
    if len(filled) > 1:
        served = []
        for each in filled:
            if (yield from is_served(shared, each)):
                served.append(each)
        filled = served or filled
    if len(filled) == 1:
        return filled[0].terms.channel_id
    if filled:
        names = ", ".join(f"{each.terms.channel_id} ({each.terms.asset})" for each in filled)
        raise RequestRefused(404, "channel", f"name one of the channels: {names}")
    nothing = "none of the wallet's channels holds anything that is not charged" if known else "there is no channel"
    raise RequestRefused(404, "channel", nothing)


# ---------------------------------------------------------------------- asking


def _post(shared: Shared, path: str, document: dict[str, Any]) -> Send:
    body = json.dumps(document).encode()
    url = shared.settings.base_url.join(path)
    headers = httpx.Headers({
        "host": url.netloc.decode("ascii"), "content-type": "application/json", "content-length": str(len(body)),
        "accept": "application/json",
    })  # fmt: skip
    return Send("POST", url, headers, body, SIDE_TIMEOUTS)


def _paid(shared: Shared, request: Send, **options: Any) -> Steps[tuple[int, bytes]]:
    """Carry a request through that has to be paid; `options` are `Exchange`'s. Status and body of the answer."""
    for left in reversed(range(shared.settings.tries_max)):
        answer = yield from Exchange(shared, request, **options).run()
        content: bytes | Lost = answer.body or b"" if answer.reply is None else (yield Read(answer.reply))
        if answer.watch is not None:
            answer.watch.finish("broken" if isinstance(content, Lost) else "whole")
        if not isinstance(content, Lost):
            return answer.status, content
        if not left:
            raise content.error
    raise AssertionError("tries_max is at least 1")


def _ask(
    shared: Shared,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
    *,
    again: bool,
) -> Steps[dict[str, Any]]:
    """Ask as the signed-in wallet, and again (if it does no harm) when the answer is lost or the gateway cannot now."""
    url = shared.settings.base_url.join(path)
    content = b"" if body is None else json.dumps(body).encode()
    signed_in_anew = False
    tries = 0
    while True:
        session = yield from credit.session(shared)
        tries += 1
        last = not again or tries >= shared.settings.tries_max
        try:
            reply, answer = yield from fetch(
                method, url, content, {"authorization": f"Bearer {session.token}", **(headers or {})}
            )
        except httpx.TransportError:
            if last:
                raise
            yield Sleep(shared.settings.backoff_s * tries)
            continue
        if reply.status == 401 and not signed_in_anew:
            shared.session, signed_in_anew = None, True
            tries -= 1
        elif (reply.status >= 500 or reply.status == 429) and not last:
            asked = retry_after(reply.headers)
            yield Sleep(min(PAUSE_S_MAX, shared.settings.backoff_s * tries if asked is None else asked))
        elif reply.status >= 400:
            raise RequestRefused(reply.status, error_code_in(answer), _message(reply.status, answer))
        else:
            return document_in(answer)


def _only_asset(shared: Shared) -> Steps[str]:
    filled = [each for each in (yield from balance(shared)) if usd_to_nano(each.available_usd)]
    if len(filled) == 1:
        return filled[0].asset
    have = ", ".join(f"{each.available_usd} USD in {each.asset}" for each in filled) or "nothing"
    raise RequestRefused(400, "asset", f"name the asset to withdraw; the wallet's balance is {have}")


def _message(status: int, body: bytes) -> str:
    error = document_in(body).get("error")
    if isinstance(error, str):
        return error
    return str(error_in(body).get("message", f"HTTP {status}"))


# ---------------------------------------------------------------------- reading


def _read(read: Callable[[], T], what: str) -> T:
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AnswerUnreadable(f"the gateway's answer about the wallet's {what} cannot be read") from error


def _balance(document: dict[str, Any]) -> Balance:
    available = nano_to_usd(usd_to_nano(document["available_usd"]))
    return Balance(str(document["asset"]), available, str(document.get("held_usd", "0.00")))


def _entry(document: dict[str, Any]) -> HistoryEntry:
    return HistoryEntry(
        document["id"], document["type"], document["asset"], document["amount_usd"], document["state"],
        _time(document["time"]), document["receipt"], document["transaction"],
    )  # fmt: skip


def _withdrawal(document: dict[str, Any]) -> Withdrawal:
    return Withdrawal(
        document["id"], document["asset"], document["amount_usd"], document["fee_usd"], document["state"],
        document["reason"], document["transaction"], _time(document["created"]),
    )  # fmt: skip


def _key(document: dict[str, Any]) -> ApiKey:
    revoked = document["revoked_ms"]
    return ApiKey(
        document["id"], document["name"], document["prefix"], _from_ms(document["created_ms"]),
        None if revoked is None else _from_ms(revoked),
    )  # fmt: skip


def _channel(channel: Book) -> Channel:
    terms = channel.terms

    def usd(amount: int) -> str:
        return nano_to_usd(atomic_to_nano_down(amount, terms.decimals))

    return Channel(
        id=terms.channel_id,
        asset=terms.asset,
        deposited_usd=usd(channel.balance),
        charged_usd=nano_to_usd(channel.charged_nano_usd),
        under_way_usd=nano_to_usd(channel.under_way_nano_usd),
        unspent_usd=usd(channel.unspent),
        claimable_usd=usd(min(channel.signed, channel.balance)),
        receiver=terms.receiver,
        gateway=channel.origin,
        withdraw_delay_s=terms.config["withdrawDelay"],
    )


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _from_ms(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
