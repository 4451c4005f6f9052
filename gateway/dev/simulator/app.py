"""The simulator as an ASGI application: the providers' endpoints, and the control endpoints below `/_/`.

Plain ASGI, because the simulator has to be much faster than what is measured against it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs

import orjson

from gateway.dev.simulator import anthropic_messages, gemini, openai_chat, wire
from gateway.dev.simulator.answers import Answer, Ask, compose
from gateway.dev.simulator.attempts import Attempt, AttemptLog, Outcome
from gateway.dev.simulator.behaviours import Behaviour, Behaviours, InvalidBehaviour, parse_behaviour
from gateway.dev.simulator.connection import ClientGone, Connection, Message
from gateway.dev.simulator.wire import BadRequest, Dialect, Fault

_OPENAI: Final[Dialect] = openai_chat
_ANTHROPIC: Final[Dialect] = anthropic_messages
_GEMINI: Final[Dialect] = gemini
_GEMINI_PATH = re.compile(r"/gemini/v1(?:beta)?/models/(?P<model>.+):(?P<method>generateContent|streamGenerateContent)")
_PREFIXES: Final = (("/anthropic/", _ANTHROPIC), ("/gemini/", _GEMINI), ("/", _OPENAI))
_BEHAVIOURS: Final = "/_/behaviours/"
_CONTEXT_TOKENS: Final = 8_192
"""What a context-length error names where the model has no limit of its own."""


class _Target(NamedTuple):
    dialect: Dialect
    model: str = ""
    streams: bool = False


class SimulatorApp:
    """The providers and what controls them.

    Args:
        log: Where attempts go.
        behaviours: Who behaves how.
    """

    def __init__(self, log: AttemptLog | None = None, behaviours: Behaviours | None = None) -> None:
        self._log = log or AttemptLog()
        self._behaviours = behaviours or Behaviours()

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer one request."""
        assert scope["type"] == "http"
        connection = Connection(scope, receive, send)
        try:
            raw = await connection.body()
            if scope["path"].startswith("/_/"):
                await self._control(connection, scope, raw)
            else:
                await self._provide(connection, scope, raw)
        except ClientGone:
            pass  # an attempt that this ended says so in the log
        finally:
            await connection.release()

    async def _provide(self, connection: Connection, scope: MutableMapping[str, Any], raw: bytes) -> None:
        path: str = scope["path"]
        headers = dict(scope["headers"])
        query = parse_qs(scope["query_string"].decode("latin-1")) if scope["query_string"] else {}
        target = _route(path)
        dialect = (
            target.dialect if target else next(dialect for prefix, dialect in _PREFIXES if path.startswith(prefix))
        )
        authenticated = dialect.authenticated(headers, query)
        attempt = self._log.open(
            dialect=dialect.NAME, path=path, authenticated=authenticated, headers=scope["headers"], body=raw
        )
        outcome: Outcome = "crashed"
        try:
            if target is None or scope["method"] != "POST":
                fault = Fault("not_found", message=f"Invalid URL ({scope['method']} {path})")
                outcome = await self._fail(connection, attempt, dialect, fault)
            elif not authenticated:
                outcome = await self._fail(connection, attempt, dialect, Fault("missing_key"))
            else:
                outcome = await self._understand(connection, attempt, target, headers, query)
        except ClientGone:
            outcome = "disconnected"
            attempt.client_disconnected = True
        finally:
            attempt.outcome = outcome
            attempt.ended = time.time()

    async def _understand(
        self,
        connection: Connection,
        attempt: Attempt,
        target: _Target,
        headers: dict[bytes, bytes],
        query: dict[str, list[str]],
    ) -> Outcome:
        dialect = target.dialect
        try:
            if target.streams and query.get("alt") != ["sse"]:
                raise BadRequest("The simulator streams with alt=sse only.", "alt")
            body = orjson.loads(attempt.raw_body)
            if not isinstance(body, dict):
                raise BadRequest("The body is not a JSON object.")
            ask = dialect.read(body, headers, target.model, streams=target.streams)
        except orjson.JSONDecodeError:
            return await self._fail(
                connection,
                attempt,
                dialect,
                Fault("bad_request", message="We could not parse the JSON body of your request."),
            )
        except BadRequest as error:
            fault = Fault("bad_request", message=error.message, param=error.param)
            return await self._fail(connection, attempt, dialect, fault)
        attempt.model, attempt.stream = ask.model, ask.stream
        try:
            behaviour = self._behaviours.meet(ask.model)
        except InvalidBehaviour as error:
            fault = Fault("unknown_model", model=ask.model, message=str(error))
            return await self._fail(connection, attempt, dialect, fault)
        return await self._behave(connection, attempt, dialect, ask, behaviour)

    async def _behave(
        self, connection: Connection, attempt: Attempt, dialect: Dialect, ask: Ask, behaviour: Behaviour
    ) -> Outcome:
        if behaviour.silence:
            await connection.hang()
            attempt.client_disconnected = True
            return "silence"
        fault_ = _fault(ask, behaviour)
        if behaviour.reset or fault_:
            await connection.pause(behaviour.first_token_ms / 1000)
            if fault_:
                return await self._fail(connection, attempt, dialect, fault_)
            await connection.reset()
            return "reset"
        answer = compose(ask, behaviour, attempt.number, int(attempt.time))
        if ask.stream:
            return await _stream(connection, attempt, dialect, answer, behaviour)
        return await _whole(connection, attempt, dialect, answer, behaviour)

    async def _fail(self, connection: Connection, attempt: Attempt, dialect: Dialect, fault: Fault) -> Outcome:
        error = dialect.error(fault, attempt.number)
        attempt.status = error.status
        await connection.answer(error.status, error.headers, error.body)
        return "error"

    async def _control(self, connection: Connection, scope: MutableMapping[str, Any], raw: bytes) -> None:
        method, path = scope["method"], scope["path"]
        model = path.removeprefix(_BEHAVIOURS) if path.startswith(_BEHAVIOURS) else ""
        if path == "/_/attempts" and method == "GET":
            kept = self._log.kept()
            wanted = parse_qs(scope["query_string"].decode("latin-1")).get("model", [""])[0]
            attempts = [attempt.as_json() for attempt in kept if _is_of(attempt, wanted)]
            return await _reply(
                connection,
                200,
                {"attempts": attempts, "total": self._log.total, "dropped": self._log.total - len(kept)},
            )
        if path == "/_/attempts" and method == "DELETE":
            self._log.clear()
            return await _reply(connection, 200, {})
        if path == "/_/behaviours" and method == "GET":
            everybody = {
                name: behaviour.model_dump(exclude_unset=True) for name, behaviour in self._behaviours.all().items()
            }
            return await _reply(connection, 200, {"behaviours": everybody})
        if method == "DELETE" and (path == "/_/behaviours" or model):
            self._behaviours.reset(model or None)
            return await _reply(connection, 200, {})
        if model and method == "PUT":
            try:
                behaviour = parse_behaviour(orjson.loads(raw))
                self._behaviours.set(model, behaviour)
            except orjson.JSONDecodeError as error:
                return await _reply(connection, 400, {"error": f"the body is not JSON: {error}"})
            except InvalidBehaviour as error:
                return await _reply(connection, 400, {"error": str(error)})
            return await _reply(connection, 200, behaviour.model_dump())
        return await _reply(
            connection,
            404,
            {
                "error": "there are GET and DELETE of /_/attempts and of /_/behaviours, PUT and DELETE of /_/behaviours/{model}"
            },
        )


async def _reply(connection: Connection, status: int, body: dict[str, Any]) -> None:
    await connection.answer(status, [wire.JSON_HEADER], orjson.dumps(body))


def _route(path: str) -> _Target | None:
    if path == "/openai/v1/chat/completions":
        return _Target(_OPENAI)
    if path == "/anthropic/v1/messages":
        return _Target(_ANTHROPIC)
    match = _GEMINI_PATH.fullmatch(path)
    return _Target(_GEMINI, match["model"], match["method"] == "streamGenerateContent") if match else None


def _is_of(attempt: Attempt, model: str) -> bool:
    """Whether an attempt was at a model: at any for an empty name, and at those below it for one that ends with a slash."""
    asked = attempt.model or ""
    return not model or asked == model or (model.endswith("/") and asked.startswith(model))


def _fault(ask: Ask, behaviour: Behaviour) -> Fault | None:
    """The error that the request meets before any answer."""
    if behaviour.status is not None:
        return Fault("status", ask.model, behaviour.status, retry_after_s=behaviour.retry_after_s)
    limit = behaviour.context_tokens
    too_long = limit is not None and ask.input_tokens + (ask.max_tokens or 0) > limit
    if behaviour.error == "context_length" or too_long:
        limit = limit or _CONTEXT_TOKENS
        return Fault(
            "context_length",
            ask.model,
            input_tokens=max(limit + 1, ask.input_tokens + (ask.max_tokens or 0)),
            context_tokens=limit,
        )
    if behaviour.error is not None:
        return Fault(behaviour.error, ask.model, input_tokens=ask.input_tokens, retry_after_s=behaviour.retry_after_s)
    return None


async def _whole(
    connection: Connection, attempt: Attempt, dialect: Dialect, answer: Answer, behaviour: Behaviour
) -> Outcome:
    speed = behaviour.tokens_per_second
    duration_s = behaviour.first_token_ms / 1000
    if speed is not None:
        duration_s += max(0, answer.tokens - 1) / speed
    await connection.pause(duration_s)
    if behaviour.error_after_tokens is not None:
        error = dialect.error(Fault("status", answer.model, 500), attempt.number)
        attempt.status = error.status
        await connection.answer(error.status, error.headers, error.body)
        return "error"
    data = dialect.whole(answer)
    headers = [wire.JSON_HEADER, *dialect.headers(attempt.number)]
    attempt.status = 200
    if behaviour.malformed_after_tokens is not None:
        await connection.answer(200, headers, data[: len(data) // 2])
        return "malformed"
    if behaviour.cut_after_tokens is None and behaviour.stall_after_tokens is None:
        attempt.tokens_sent = answer.tokens
        await connection.answer(200, headers, data)
        return "ok"
    await connection.begin(200, [*headers, (b"content-length", str(len(data)).encode())])
    await connection.write(data[: len(data) // 2])
    return await _break(connection, attempt, behaviour)


async def _break(connection: Connection, attempt: Attempt, behaviour: Behaviour) -> Outcome:
    """Leave the body as it is: cut, or stalled for as long as the client bears it."""
    if behaviour.stall_after_tokens is not None:
        await connection.hang()
        attempt.client_disconnected = True
        return "stall"
    if behaviour.cut_by == "reset":
        await connection.reset()
    else:
        await connection.break_off()
    return "cut"


async def _stream(
    connection: Connection, attempt: Attempt, dialect: Dialect, answer: Answer, behaviour: Behaviour
) -> Outcome:
    attempt.status = 200
    headers = [wire.EVENT_STREAM_HEADER, (b"cache-control", b"no-cache"), *dialect.headers(attempt.number)]
    await connection.begin(200, headers)
    first_s = behaviour.first_token_ms / 1000
    token_s = 0.0 if behaviour.tokens_per_second is None else 1 / behaviour.tokens_per_second
    clock = asyncio.get_running_loop().time
    started = clock()
    sent = 0
    outcome: Outcome = "ok"
    at = _first_set(
        behaviour.cut_after_tokens,
        behaviour.stall_after_tokens,
        behaviour.malformed_after_tokens,
        behaviour.error_after_tokens,
    )
    for data, tokens, end in dialect.stream(answer):
        # Opening events are sent at once; only tokens take time.
        if tokens and (first_s or token_s):
            await connection.pause(started + first_s + sent * token_s - clock())
        if at is not None and sent + max(0, tokens - 1) >= at and (tokens or sent):
            at = None
            if behaviour.malformed_after_tokens is not None:
                outcome = "malformed"
                await connection.write(dialect.malformed_event())
            elif behaviour.error_after_tokens is not None:
                await connection.write(dialect.error_event(attempt.number))
                await connection.end()
                return "error_event"
            else:
                return await _break(connection, attempt, behaviour)
        if end and behaviour.missing_end:
            outcome = "missing_end"
            break
        await connection.write(data)
        if tokens:
            sent += tokens
            attempt.tokens_sent = sent
    await connection.end()
    return outcome


def _first_set(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
