"""Payment headers that are not what they should be: refused in order, they take nothing, hold nothing and surprise nobody."""

from __future__ import annotations

import asyncio
import base64
import copy
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest

from contracts.devnet import USDC, USDT
from payments.chain.transactions import SECP256K1_HALF_ORDER
from payments.verification.signatures import checksum_address
from tests.e2e.clients import JSON, decoded, encoded
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import Ground, amount_of, error_of, turn
from tests.e2e.grounds import ground as new_ground
from tests.e2e.payers import RICH, WAYS, Payer, Way, accept, changed, headers

ORDER = 2 * SECP256K1_HALF_ORDER + 1
SEED = 402
MUTATIONS_EACH = 150
AT_ONCE = 16
REFUSED = frozenset({400, 402, 409, 412, 431})

NUMBERS: list[Any] = [
    "0",
    "00",
    "01",
    "+1",
    "-1",
    "-0",
    " 1",
    "1 ",
    "1e6",
    "1E6",
    "1.0",
    "0x10",
    "1_000",
    "１",
    "٥",
    "²",
]
NUMBERS += [str(2**256), str(2**256 - 1), str(2**128), str(2**64), "9" * 100, "9" * 5000, "NaN", "Infinity", "true"]
NUMBERS += [0, 1, -1, 1.5, 1e308, 2**63, 2**53 + 1, True, False]
TEXTS: list[Any] = ["", "0x", "0X" + "1" * 40, "0x" + "g" * 40, "0x" + "1" * 39, "0x" + "0" * 40, "0x" + "F" * 64]
TEXTS += ["0x" + "1" * 200_000, "\x00", "\u202e", "😀", "a" * 10_000, "%s%n", "../../x", "'; DROP TABLE receipt; --"]
OTHERS: list[Any] = [None, [], {}, [[]], {"a": {}}, [None] * 100, {"": ""}, {"__proto__": 1, "constructor": {}}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with new_ground(tmp_path_factory.mktemp("forms")) as made:
        yield made


@pytest.fixture
def ground(shared: Ground) -> Iterator[Ground]:
    with turn(shared) as mine:
        yield mine


def moved(ground: Ground, payer: Payer) -> int:
    """Atomic units of both tokens that have left a payer."""
    return sum(RICH - ground.balance(token, payer.address) for token in (USDC, USDT))


# ---------------------------------------------------------------------------------------------------------- signatures


def signature_place(way: Way) -> tuple[str, ...]:
    return ("payload", "voucher", "signature") if way.startswith("channel") else ("payload", "signature")


def resigned(signed: dict[str, str], way: Way, new: str) -> dict[str, str]:
    def change(payment: dict[str, Any]) -> None:
        *parents, last = signature_place(way)
        for name in parents:
            payment = payment[name]
        payment[last] = new

    return changed(signed, change)


def forms_of(signature: str) -> list[str]:
    """Everything that is nearly this signature."""
    raw = bytes.fromhex(signature[2:])
    r, s, v = raw[:32], int.from_bytes(raw[32:64], "big"), raw[64]
    mirrored = r + (ORDER - s).to_bytes(32, "big")
    compact = r + (s | ((v - 27) << 255)).to_bytes(32, "big")
    forms = [
        mirrored + bytes((55 - v,)),
        mirrored + raw[64:],
        *(raw[:64] + bytes((other,)) for other in (0, 1, 2, 26, 29, 30, 35, 36, 255, 55 - v)),
        compact,
        *(raw[:length] for length in (1, 32, 63, 64)),
        *(raw + bytes(length) for length in (1, 31, 32, 2_000, 4_000)),
        bytes(65),
        r + bytes(32) + raw[64:],
        bytes(32) + raw[32:],
        ORDER.to_bytes(32, "big") + raw[32:],
        r + ORDER.to_bytes(32, "big") + raw[64:],
        b"\xff" * 65,
        raw[::-1],
        bytes(160) + bytes.fromhex("6492" * 16),
    ]
    return ["0x" + form.hex() for form in forms]


@pytest.mark.parametrize("way", WAYS)
def test_no_other_form_of_a_signature_pays_before_or_after_it_was_used(ground: Ground, way: Way) -> None:
    payer = Payer(ground.stack)
    signed = payer.pay(ground.http, way, QUESTION)
    value: Any = decoded(signed["PAYMENT-SIGNATURE"])
    for name in signature_place(way):
        value = value[name]
    others = [resigned(signed, way, form) for form in forms_of(value)]
    for other in others:
        answer = ground.ask(other, QUESTION)
        assert answer.status_code in (400, 402), (decoded(other["PAYMENT-SIGNATURE"])["payload"], answer.text)
    assert (ground.served(), moved(ground, payer)) == (0, 0)

    assert ground.ask(signed, QUESTION).status_code == 200
    for other in others:
        assert ground.ask(other, QUESTION).status_code in REFUSED
    assert ground.served() == 1
    ground.check_quiet()
    deposited = 10 * amount_of(signed) if way.startswith("channel") else amount_of(signed)
    assert 0 < moved(ground, payer) <= deposited


@pytest.mark.parametrize("way", WAYS)
def test_letter_case_makes_neither_a_wrong_payment_nor_a_second_one(ground: Ground, way: Way) -> None:
    payer = Payer(ground.stack)
    signed = payer.pay(ground.http, way, QUESTION)
    shouted = changed(signed, lambda p: respell(p, _upper))
    checked = changed(signed, lambda p: respell(p, _checksummed))
    assert ground.ask(checked, QUESTION).status_code == 200
    for again in (shouted, signed):
        answer = ground.ask(again, QUESTION)
        # Another spelling is another payload, which the authorization is not bound to; it is no second payment.
        assert answer.status_code in (402, 409), answer.text
    assert ground.served() == 1


def respell(node: Any, case: Any) -> Any:
    """Every address and nonce of a payment in another spelling, in place."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list)):
            respell(value, case)
        elif isinstance(value, str) and value.startswith("0x") and len(value) in (42, 66):
            node[key] = case(value)


def _upper(value: str) -> str:
    return "0x" + value[2:].upper()


def _checksummed(value: str) -> str:
    return checksum_address(value) if len(value) == 42 else value


# -------------------------------------------------------------------------------------------------------- the whole form


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node below this one."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def mutated(payment: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A payment with one to three places of it changed, in whatever way."""
    payment = copy.deepcopy(payment)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        # The likelier a place matters the likelier it is chosen: the extensions are long, and mostly somebody else's.
        found = [path for path in places(payment) if path[0] != "extensions" or chance.random() < 0.1]
        *parents, last = chance.choice(found)
        node: Any = payment
        for name in parents:
            node = node[name]
        act = chance.random()
        if act < 0.1:
            del node[last]
        elif act < 0.2 and isinstance(node, dict):
            node[f"{last}X"] = node[last]
        elif act < 0.3 and isinstance(node[last], str):
            text = node[last]
            at = chance.randrange(len(text) + 1)
            node[last] = chance.choice([text[:at], text[at:], text[:at] + "0" + text[at:], text.swapcase(), text * 2])
        elif act < 0.4:
            node[last] = chance.choice([[node[last]], {"a": node[last]}, str(node[last])])
        else:
            node[last] = copy.deepcopy(chance.choice(chance.choice([NUMBERS, TEXTS, OTHERS])))
    return payment


@pytest.mark.parametrize("way", WAYS)
async def test_no_damage_to_a_payment_is_more_than_a_refusal(ground: Ground, way: Way) -> None:
    """Seeded: the same each time. What is said is what a payer can act on, in the one form that errors have."""
    payer, chance = Payer(ground.stack), random.Random(f"{SEED} {way}")
    payment = payer.sign(way, payer.ask(ground.http, way, QUESTION))
    sent = [encoded(mutated(payment, chance)) for _ in range(MUTATIONS_EACH)]
    answers = await send_all(ground, [accept(way) | {"PAYMENT-SIGNATURE": each} for each in sent])
    for header, answer in zip(sent, answers, strict=True):
        if answer.status_code != 200:
            check_refusal(header, answer)
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses[400] > MUTATIONS_EACH // 4, statuses
    assert statuses[402] + statuses[409] > MUTATIONS_EACH // 10, statuses
    # Harmless changes (a description, an extension of somebody else's) leave one payment: it pays once.
    assert len({answer.content for answer in answers if answer.status_code == 200}) <= 1
    assert ground.served() <= 1
    ground.check_quiet()
    assert moved(ground, payer) <= 10 * int(payment["accepted"]["amount"])


def check_refusal(header: str, answer: httpx.Response) -> None:
    assert answer.status_code in REFUSED, (header, answer.text)
    body = answer.json()
    if answer.status_code == 402:
        assert body["error"], header
        assert body["accepts"], header
    else:
        assert set(body["error"]) >= {"message", "type", "code", "param"}, header
        assert body["error"]["message"], header
        assert len(body["error"]["message"]) < 1_000, header


async def test_no_damage_to_a_v1_payment_is_more_than_a_refusal(ground: Ground) -> None:
    payer, chance = Payer(ground.stack), random.Random(SEED)
    signed = payer.sign("exact USDC", payer.ask(ground.http, "exact USDC", QUESTION))
    payment = {"x402Version": 1, "scheme": "exact", "network": "base-sepolia", "payload": signed["payload"]}
    sent = [encoded(mutated(payment, chance)) for _ in range(MUTATIONS_EACH)]
    answers = await send_all(ground, [{"X-PAYMENT": each} for each in sent])
    for header, answer in zip(sent, answers, strict=True):
        if answer.status_code != 200:
            check_refusal(header, answer)
    ground.check_quiet()
    assert ground.served() <= 1
    assert moved(ground, payer) <= int(signed["accepted"]["amount"])


async def test_no_damage_to_a_request_for_a_refund_is_more_than_a_refusal(ground: Ground) -> None:
    payer, chance = Payer(ground.stack), random.Random(SEED)
    payment = payer.sign("channel USDC", payer.ask(ground.http, "channel USDC", QUESTION))
    assert ground.ask(headers("channel USDC", payment), QUESTION).status_code == 200
    channel = payer.channels["USDC"]
    payload = {"type": "refund", "channelConfig": channel.config_json(), "voucher": channel.voucher(1), "amount": "5"}
    refund = payment | {"payload": payload}
    sent = [encoded(mutated(refund, chance)) for _ in range(MUTATIONS_EACH)]
    answers = await send_all(ground, [{"PAYMENT-SIGNATURE": each} for each in sent], "GET")
    for header, answer in zip(sent, answers, strict=True):
        if answer.status_code != 402:  # a refund costs nothing, so that its 402 need not offer anything
            check_refusal(header, answer)
    ground.check_quiet()
    assert ground.served() == 1


async def test_no_damage_to_a_sign_in_lets_anybody_in(ground: Ground) -> None:
    chance = random.Random(SEED)
    address = Payer(ground.stack, usdc=0, usdt=0, approved=False).address
    signed = {
        "domain": "127.0.0.1",
        "address": address,
        "uri": f"{ground.stack.gateway_url}/v1/chat/completions",
        "version": "1",
        "chainId": "eip155:84532",
        "type": "eip191",
        "nonce": "a" * 32,
        "issuedAt": "2026-11-28T00:00:00Z",
        "signature": "0x" + "11" * 65,
    }
    sent = [{"SIGN-IN-WITH-X": encoded(mutated(signed, chance))} for _ in range(MUTATIONS_EACH)]
    sent += [{"SIGN-IN-WITH-X": base64.b64encode(document).decode()} for document in documents()]
    for answer in await send_all(ground, sent):
        assert answer.status_code in (400, 402, 431), answer.text
    assert ground.served() == 0


async def send_all(ground: Ground, sent: list[dict[str, str]], method: str = "POST") -> list[httpx.Response]:
    content, turns = orjson.dumps(QUESTION) if method == "POST" else b"", asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=ground.stack.gateway_url, timeout=60, limits=limits) as http:

        async def send(each: dict[str, str]) -> httpx.Response:
            async with turns:
                return await http.request(method, "/v1/chat/completions", content=content, headers=JSON | each)

        return await asyncio.gather(*map(send, sent))


def documents() -> list[bytes]:
    """What can stand inside base64 and is no payment, or is one twice."""
    twice = b'{"x402Version":2,"x402Version":1}'
    return [
        b"",
        b" ",
        b"null",
        b"1",
        b'"x"',
        b"[]",
        b"{}",
        twice,
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"x402Version": 2, "accepted": "\xff"}',
        b'{"x402Version": 2, "accepted": "\\ud800"}',
        b'{"x402Version": NaN}',
        b'{"x402Version": 1e999}',
        b'{"x402Version": ' + b"9" * 5_000 + b"}",
        b"[" * 5_000 + b"]" * 5_000,
        b'{"a":' * 1_500 + b"1" + b"}" * 1_500,
        b'{"x402Version": 2}' * 2,
        b"\x00" * 100,
        b'{"' + b"a" * 8_000 + b'": 1}',
    ]


async def test_what_is_no_payment_is_400_whatever_it_is(ground: Ground) -> None:
    standard = [base64.b64encode(document).decode() for document in documents()]
    payer = Payer(ground.stack)
    signed = payer.pay(ground.http, "exact USDC", QUESTION)["PAYMENT-SIGNATURE"]
    spelled = [
        signed + "=",
        signed + "====",
        signed[:-4],
        signed[1:],
        signed[:200] + "\t" + signed[200:],
        signed[:200] + " " + signed[200:],
        "=" + signed,
        signed.replace("A", "-", 1) + "_",
        signed + signed,
        "data:application/json;base64," + signed,
        decoded_text(signed),
        "%" + signed,
        ".".join([signed] * 2),
    ]
    for name in ("PAYMENT-SIGNATURE", "X-PAYMENT"):
        answers = await send_all(ground, [{name: each} for each in [*standard, *spelled]])
        for header, answer in zip([*standard, *spelled], answers, strict=True):
            assert answer.status_code == 400, (name, header, answer.text)
            check_refusal(header, answer)
    assert (ground.served(), moved(ground, payer)) == (0, 0)


def decoded_text(header: str) -> str:
    return base64.b64decode(header).decode()


def test_a_member_that_stands_twice_is_read_once_and_pays_once(ground: Ground) -> None:
    """Readers differ in which of two equal names they take: what we take is what was signed, or nothing."""
    payer = Payer(ground.stack)
    text = decoded_text(payer.pay(ground.http, "exact USDC", QUESTION)["PAYMENT-SIGNATURE"])
    for doubled in (
        text.replace('"value":', '"value":"1","value":', 1),
        text.replace('"value":', '"value":"999999999","value":', 1),
    ):
        header = base64.b64encode(doubled.encode()).decode()
        answer = ground.ask({"PAYMENT-SIGNATURE": header}, QUESTION)
        assert answer.status_code in (200, 402, 409), answer.text
    assert ground.served() <= 1
    ground.check_quiet()
    assert moved(ground, payer) in (0, int(orjson.loads(text)["accepted"]["amount"]))


@pytest.mark.parametrize(
    "change",
    [
        {"valid_before": 1_000},
        {"valid_before": 0},
        {"valid_before": 2**256 - 1},
        {"valid_after": 2**256 - 1},
        {"valid_after": 2**63},
        {"value": 0},
        {"value": 2**256 - 1},
        {"value": 1},
        {"to": "0x" + "00" * 20},
        {"to": "0x" + "de" * 20},
        {"nonce": 0},
        {"nonce": 2**256 - 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("channel")])
def test_terms_at_their_limits_truly_signed_pay_once_or_not_at_all(
    ground: Ground, way: Way, change: dict[str, Any]
) -> None:
    payer = Payer(ground.stack)
    signed = payer.pay(ground.http, way, QUESTION, **change)
    answers = [ground.ask(signed, QUESTION) for _ in range(2)]
    fine = change in ({"valid_before": 2**256 - 1}, {"nonce": 0}, {"nonce": 2**256 - 1})
    assert [answer.status_code for answer in answers] == [200 if fine else 402] * 2, answers[0].text
    if not fine:
        assert error_of(answers[0]) in ("expired", "not_yet_valid", "wrong_amount", "wrong_recipient")
    assert ground.served() == int(fine)
    ground.check_quiet()
    assert (moved(ground, payer) > 0) == fine


@pytest.mark.parametrize("change", [{"value": 0}, {"value": 1}, {"value": 2**128 - 1}, {"deposit": 1}], ids=str)
def test_a_channel_whose_sums_make_no_sense_serves_nobody(ground: Ground, change: dict[str, Any]) -> None:
    payer = Payer(ground.stack)
    signed = payer.pay(ground.http, "channel USDC", QUESTION, **change)
    answer = ground.ask(signed, QUESTION)
    assert answer.status_code == 402, answer.text
    assert error_of(answer).startswith("invalid_batch_settlement_evm_")
    assert (ground.served(), moved(ground, payer)) == (0, 0)
