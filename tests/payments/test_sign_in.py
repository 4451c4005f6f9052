"""Signing in with a wallet: only who holds the key, only with the message made here, only once, and not for ever."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount

from payments.recovery import sweep_expired
from payments.sign_in import CHALLENGE_TTL_S, STATEMENT, SignIn, SignInRefused, use_nonce
from payments.store import Store
from payments.x402.extensions.sign_in_with_x import SignInWithX

NOW = 1_790_000_000
SECRET = b"s" * 32
DOMAIN, URI = "gateway.example:8402", "https://gateway.example:8402"
WALLET: LocalAccount = Account.from_key("0x" + "11" * 32)
STRANGER: LocalAccount = Account.from_key("0x" + "22" * 32)
ADDRESS = WALLET.address.lower()
SESSION_TTL_S = 3600


def signing_in(secret: bytes = SECRET, domain: str = DOMAIN, uri: str = URI) -> SignIn:
    return SignIn(secret=secret, domain=domain, uri=uri, chain_id=84532, session_ttl_s=SESSION_TTL_S)


SIGN_IN = signing_in()


def sign(message: str, wallet: LocalAccount = WALLET) -> str:
    """What wallet software returns for `personal_sign`."""
    signed = Account.sign_message(encode_defunct(text=message), wallet.key)
    return f"0x{signed.signature.hex()}"


def refusal(message: str, signature: str, now: int = NOW, sign_in: SignIn = SIGN_IN) -> str:
    with pytest.raises(SignInRefused) as refused:
        sign_in.verify(message, signature, now)
    assert refused.value.status == 401
    return refused.value.code


@pytest.mark.parametrize("spelling", [WALLET.address, ADDRESS, "0x" + ADDRESS[2:].upper()])
def test_the_wallet_signs_in_with_the_message_it_was_given(spelling: str) -> None:
    challenge = SIGN_IN.challenge(spelling, NOW)
    assert challenge.expires_at == NOW + CHALLENGE_TTL_S
    assert SIGN_IN.verify(challenge.message, sign(challenge.message), NOW) == (
        ADDRESS,
        challenge.nonce,
        challenge.expires_at,
    )


def test_the_message_is_an_eip_4361_one_for_this_gateway() -> None:
    challenge = SIGN_IN.challenge(ADDRESS, NOW)
    assert challenge.message.splitlines() == [
        f"{DOMAIN} wants you to sign in with your Ethereum account:",
        WALLET.address,
        "",
        STATEMENT,
        "",
        f"URI: {URI}",
        "Version: 1",
        "Chain ID: 84532",
        f"Nonce: {challenge.nonce}",
        "Issued At: 2026-09-21T14:13:20Z",
        "Expiration Time: 2026-09-21T14:18:20Z",
    ]


@pytest.mark.parametrize(
    "address", ["", "0x", ADDRESS[:-1], ADDRESS + "0", ADDRESS[2:], "0x" + "g" * 40, ADDRESS + "\n"]
)
def test_no_message_is_made_for_what_is_no_address(address: str) -> None:
    with pytest.raises(SignInRefused) as refused:
        SIGN_IN.challenge(address, NOW)
    assert (refused.value.code, refused.value.status) == ("invalid_address", 400)


def test_somebody_else_cannot_sign_for_the_wallet() -> None:
    message = SIGN_IN.challenge(ADDRESS, NOW).message
    assert refusal(message, sign(message, STRANGER)) == "bad_signature"


@pytest.mark.parametrize(
    "signature", ["", "0x", "zz", "0x" + "00" * 65, "0x" + "ff" * 65, "0x" + "11" * 64, "0x" + "11" * 200]
)
def test_what_is_no_signature_is_refused(signature: str) -> None:
    assert refusal(SIGN_IN.challenge(ADDRESS, NOW).message, signature) == "bad_signature"


def test_a_signature_for_another_challenge_does_not_do() -> None:
    one, other = SIGN_IN.challenge(ADDRESS, NOW), SIGN_IN.challenge(ADDRESS, NOW)
    assert one.nonce != other.nonce
    assert refusal(one.message, sign(other.message)) == "bad_signature"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (DOMAIN, "evil.example"),
        (WALLET.address, STRANGER.address),
        (WALLET.address, ADDRESS),
        (STATEMENT, STATEMENT + " Really."),
        (f"URI: {URI}", "URI: https://evil.example"),
        ("Version: 1", "Version: 2"),
        ("Chain ID: 84532", "Chain ID: 8453"),
        ("Chain ID: 84532", "Chain ID: 084532"),
        ("Issued At: 2026-09-21T14:13:20Z", "Issued At: 2026-09-21T14:13:21Z"),
        ("Issued At: 2026-09-21T14:13:20Z", "Issued At: 2026-99-99T14:13:20Z"),
        ("Expiration Time: 2026-09-21T14:18:20Z", "Expiration Time: 2036-09-21T14:18:20Z"),
        ("Expiration Time: 2026-09-21T14:18:20Z", "Expiration Time: 2026-99-99T14:18:20Z"),
        ("Z", "Z\nResources:\n- https://evil.example"),
        ("\n", "\r\n"),
    ],
)
def test_a_message_with_one_thing_changed_is_refused_even_if_the_wallet_signed_it(ours: str, theirs: str) -> None:
    message = SIGN_IN.challenge(ADDRESS, NOW).message
    changed = message.replace(ours, theirs, 1) if ours != "Z" else message + theirs[1:]
    assert changed != message
    signer = STRANGER if theirs == STRANGER.address else WALLET
    assert refusal(changed, sign(changed, signer)) == "invalid_message"


@pytest.mark.parametrize("at", [0, 23, 24, 55])
def test_a_nonce_that_was_not_handed_out_is_refused(at: int) -> None:
    challenge = SIGN_IN.challenge(ADDRESS, NOW)
    digit = "0" if challenge.nonce[at] != "0" else "1"
    changed = challenge.message.replace(challenge.nonce, challenge.nonce[:at] + digit + challenge.nonce[at + 1 :])
    assert refusal(changed, sign(changed)) == "invalid_message"


def test_a_challenge_ends_after_five_minutes() -> None:
    message = SIGN_IN.challenge(ADDRESS, NOW).message
    SIGN_IN.verify(message, sign(message), NOW + CHALLENGE_TTL_S - 1)
    assert refusal(message, sign(message), NOW + CHALLENGE_TTL_S) == "challenge_expired"


@pytest.mark.parametrize(
    "elsewhere",
    [signing_in(domain="evil.example"), signing_in(uri="https://evil.example"), signing_in(secret=b"t" * 32)],
    ids=["domain", "uri", "secret"],
)
def test_a_message_of_another_gateway_does_not_open_this_one(elsewhere: SignIn) -> None:
    message = elsewhere.challenge(ADDRESS, NOW).message
    elsewhere.verify(message, sign(message), NOW)
    assert refusal(message, sign(message)) == "invalid_message"


async def test_of_many_uses_of_one_challenge_one_succeeds(store: Store) -> None:
    challenge = SIGN_IN.challenge(ADDRESS, NOW)
    uses = [store.write(lambda tx: use_nonce(tx, challenge.nonce, challenge.expires_at)) for _ in range(20)]
    outcomes = await asyncio.gather(*uses, return_exceptions=True)
    assert outcomes.count(None) == 1
    assert {outcome.code for outcome in outcomes if isinstance(outcome, SignInRefused)} == {"challenge_used"}


async def test_a_used_challenge_is_remembered_until_it_has_expired(store: Store) -> None:
    challenge = SIGN_IN.challenge(ADDRESS, NOW)
    await store.write(lambda tx: use_nonce(tx, challenge.nonce, challenge.expires_at))
    assert await store.write(lambda tx: sweep_expired(tx, challenge.expires_at * 1000 - 1)) == 0
    with pytest.raises(SignInRefused):
        await store.write(lambda tx: use_nonce(tx, challenge.nonce, challenge.expires_at))
    assert await store.write(lambda tx: sweep_expired(tx, challenge.expires_at * 1000)) == 1


def test_a_session_stands_for_its_wallet_until_it_expires() -> None:
    opened = SIGN_IN.open_session(ADDRESS, NOW)
    assert opened.token.startswith("fbs_")
    assert SIGN_IN.session(opened.token, NOW + SESSION_TTL_S - 1) == opened
    with pytest.raises(SignInRefused) as refused:
        SIGN_IN.session(opened.token, NOW + SESSION_TTL_S)
    assert refused.value.code == "session_expired"


def _with_byte(token: str, at: int) -> str:
    raw = bytearray(base64.urlsafe_b64decode(token.removeprefix("fbs_") + "="))
    raw[at] ^= 1
    return "fbs_" + base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode()


@pytest.mark.parametrize("at", [0, 19, 20, 24, 25, 40])
def test_a_session_with_one_bit_changed_is_refused(at: int) -> None:
    token = SIGN_IN.open_session(ADDRESS, NOW).token
    with pytest.raises(SignInRefused) as refused:
        SIGN_IN.session(_with_byte(token, at), NOW)
    assert refused.value.code == "invalid_session"


@pytest.mark.parametrize("token", ["", "fbs_", "fbs_%%%", "fbs_é", "fbs_A", "fbs_" + "A" * 54, "fbs_" + "A" * 5000])
def test_what_is_no_session_is_refused(token: str) -> None:
    with pytest.raises(SignInRefused) as refused:
        SIGN_IN.session(token, NOW)
    assert refused.value.code == "invalid_session"


def test_a_session_of_another_gateway_is_refused() -> None:
    token = signing_in(secret=b"t" * 32).open_session(ADDRESS, NOW).token
    with pytest.raises(SignInRefused) as refused:
        SIGN_IN.session(token, NOW)
    assert refused.value.code == "invalid_session"


async def test_a_challenge_of_one_replica_is_used_up_in_all_of_them_and_after_a_restart(database: Path | str) -> None:
    """Replicas share the secret and the database, and nothing else."""
    networks, url, now = ("eip155:8453",), "https://gateway.example/v1/chat/completions", int(time.time())
    one, other = SignInWithX(b"secret", networks), SignInWithX(b"secret", networks)
    info = one.declaration(url, "gateway.example", now)["info"] | {"chainId": networks[0]}
    account = Account.create()
    message = (
        f"gateway.example wants you to sign in with your Ethereum account:\n{account.address}\n\n{info['statement']}\n\n"
        f"URI: {url}\nVersion: 1\nChain ID: 8453\nNonce: {info['nonce']}\nIssued At: {info['issuedAt']}\n"
        f"Expiration Time: {info['expirationTime']}"
    )
    signature = "0x" + bytes(account.sign_message(encode_defunct(text=message)).signature).hex()
    proof = base64.b64encode(json.dumps(info | {"address": account.address, "signature": signature}).encode()).decode()

    async def use(replica: SignInWithX) -> None:
        store = Store(database)
        try:
            found = replica.verify(proof, url, "gateway.example", now)
            assert found.address == account.address.lower()
            await store.write(lambda tx: use_nonce(tx, found.nonce, found.expires_at))
        finally:
            store.close()

    await use(other)
    for replica in (one, other, SignInWithX(b"secret", networks)):
        with pytest.raises(SignInRefused) as refused:
            await use(replica)
        assert refused.value.code == "challenge_used"
    with pytest.raises(SignInRefused):
        await use(SignInWithX(b"another secret", networks))
