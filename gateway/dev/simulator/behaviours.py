"""How a simulated model behaves: the fields, their short form inside a model's name, and who has which behaviour now.

A name that is `sim`, or that has `sim-` at its start or after one of ``/ + @``, says its behaviour itself, so that a static
configuration needs no control calls. Words are joined by hyphens; some are followed by a whole number:

    fast, slow          no delay (the default); 1.5 s to the first token, then 20 tokens/s
    ttft-<ms>           first_token_ms           tps-<n>          tokens_per_second
    tokens-<n>          output_tokens            reasoning-<n>    reasoning_tokens
    thinking            show_reasoning           cached-<n>       cached_input_tokens
    error-<status>      status                   retry-<s>        retry_after_s
    context             error=context_length     window-<n>       context_tokens
    filter              error=content_filter     refusal          finish=content_filter
    quota               error=quota              first-<n>        fail_first
    reset               reset                    silent           silence
    cut-<n>             cut_after_tokens         stall-<n>        stall_after_tokens
    malformed-<n>       malformed_after_tokens   abort-<n>        error_after_tokens
    noend               missing_end              nousage          missing_usage
    tool                tool_calls=1

For example `sim-ttft-300-tps-50`, `sim-error-429-retry-2`, `acme/sim-error-503-first-2`, `gpt-5.4+sim-cut-5`. Any other name
has the default behaviour. What the control endpoint sets for a name replaces what the name says.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

ErrorKind = Literal["context_length", "content_filter", "quota"]

_MODELS_MAX = 10_000
"""Names come from requests, so what is remembered of them is bounded."""
_NAME = re.compile(r"(?:^|[/+@])sim(?:-(?P<words>.*))?$", re.IGNORECASE | re.DOTALL)

_FAULTS_BEFORE: Final = ("status", "error", "reset", "silence")
_FAULTS_WITHIN: Final = (
    "cut_after_tokens",
    "stall_after_tokens",
    "malformed_after_tokens",
    "error_after_tokens",
    "missing_end",
)
_FAULTS: Final = frozenset({*_FAULTS_BEFORE, *_FAULTS_WITHIN, "missing_usage", "retry_after_s", "fail_first", "finish"})

Count = Field(default=None, ge=0, le=1_000_000)


class InvalidBehaviour(Exception):
    """A behaviour that cannot be; the message says which field or word, and why."""


class Behaviour(BaseModel):
    """What a simulated model does. The default is a prompt, complete, correct answer.

    Errors, resets and answers that are not streamed take `first_token_ms` too; a stream begins at once and only its tokens take
    time. A fault "after tokens" comes before the next token, or after the last one before the stream's closing events; a
    shorter answer does not reach it. Where the answer is not streamed, a cut or a stall leaves half of the body,
    `malformed_after_tokens` half of the JSON, `error_after_tokens` is a 500, and `missing_end` has no effect.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    first_token_ms: float = Field(default=0, ge=0, le=3_600_000)
    tokens_per_second: float | None = Field(default=None, gt=0, le=1_000_000)
    """None sends as fast as the client reads."""
    output_tokens: int | None = Count
    """Length of the answer before `max_tokens`; None is 40, or the whole of `text`."""
    text: str | None = None
    """The answer; None makes one from the question."""
    reasoning_tokens: int = Field(default=0, ge=0, le=1_000_000)
    show_reasoning: bool = False
    """Send the reasoning as the dialect does, rather than only count it."""
    cached_input_tokens: int = Field(default=0, ge=0)
    """How much of the input is reported as read from a cache; never more than the input."""
    cache_write_tokens: int = Field(default=0, ge=0)
    """Likewise written to a cache; only Anthropic reports it."""
    context_tokens: int | None = Field(default=None, ge=1)
    """Input and `max_tokens` beyond it are a context-length error."""

    status: int | None = Field(default=None, ge=400, le=599)
    error: ErrorKind | None = None
    """An error in the provider's own words, and with the status that it uses for it."""
    retry_after_s: int | None = Field(default=None, ge=0, le=86_400)
    fail_first: int | None = Field(default=None, ge=0)
    """Only so many requests meet the faults set here; the later ones succeed."""
    reset: bool = False
    """Reset the connection before any header."""
    silence: bool = False
    """Read the request and never answer."""
    cut_after_tokens: int | None = Count
    cut_by: Literal["close", "reset"] = "close"
    stall_after_tokens: int | None = Count
    malformed_after_tokens: int | None = Count
    """One event of the stream is not JSON."""
    error_after_tokens: int | None = Count
    """The stream ends with the provider's own error event."""
    missing_end: bool = False
    """The body ends in order, but without the dialect's end: `[DONE]`, `message_stop`, the chunk with the finish reason."""
    finish: Literal["stop", "length", "content_filter"] | None = None
    missing_usage: bool = False
    tool_calls: int = Field(default=0, ge=0, le=8)
    """So many calls, where tools are offered and the last turn is not a tool's result. One where the request demands one."""
    tool_arguments: dict[str, Any] | None = None
    """None makes them from the tool's schema."""

    @model_validator(mode="after")
    def _one_fault_at_a_time(self) -> Self:
        for group in (_FAULTS_BEFORE, _FAULTS_WITHIN):
            # By identity: cutting after 0 tokens is a fault as well.
            chosen = [name for name in group if (value := getattr(self, name)) is not None and value is not False]
            if len(chosen) > 1:
                raise ValueError(f"only one of these can happen: {', '.join(chosen)}")
        return self

    def healthy(self) -> Behaviour:
        """The same without its faults."""
        return Behaviour(**{name: getattr(self, name) for name in self.model_fields_set - _FAULTS})


def parse_behaviour(fields: object) -> Behaviour:
    """Check what a control call sent.

    Raises:
        InvalidBehaviour: A field is unknown, has a wrong type or range, or contradicts another.
    """
    try:
        return Behaviour.model_validate(fields)
    except ValidationError as error:
        raise InvalidBehaviour("; ".join(_explain(dict(problem)) for problem in error.errors())) from None


def _explain(problem: dict[str, Any]) -> str:
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown field `{place}`; there are: {', '.join(Behaviour.model_fields)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"`{place}`: {message}" if place else message


_PLAIN_WORDS: Final[dict[str, dict[str, Any]]] = {
    "fast": {},
    "slow": {"first_token_ms": 1_500, "tokens_per_second": 20},
    "thinking": {"show_reasoning": True},
    "context": {"error": "context_length"},
    "filter": {"error": "content_filter"},
    "quota": {"error": "quota"},
    "refusal": {"finish": "content_filter"},
    "reset": {"reset": True},
    "silent": {"silence": True},
    "noend": {"missing_end": True},
    "nousage": {"missing_usage": True},
    "tool": {"tool_calls": 1},
}
_NUMBER_WORDS: Final = {
    "ttft": "first_token_ms",
    "tps": "tokens_per_second",
    "tokens": "output_tokens",
    "reasoning": "reasoning_tokens",
    "cached": "cached_input_tokens",
    "window": "context_tokens",
    "error": "status",
    "retry": "retry_after_s",
    "first": "fail_first",
    "cut": "cut_after_tokens",
    "stall": "stall_after_tokens",
    "malformed": "malformed_after_tokens",
    "abort": "error_after_tokens",
}


def behaviour_in_name(model: str) -> Behaviour | None:
    """The behaviour that a model's name says; None where it says none.

    Raises:
        InvalidBehaviour: The name has the form, with a word that is not in the grammar.
    """
    match = _NAME.search(model)
    if match is None:
        return None
    fields: dict[str, Any] = {}
    words = iter((match["words"] or "fast").lower().split("-"))
    for word in words:
        if word in _PLAIN_WORDS:
            fields |= _PLAIN_WORDS[word]
        elif word in _NUMBER_WORDS:
            value = next(words, "")
            if not re.fullmatch(r"[0-9]{1,9}", value):
                raise InvalidBehaviour(f"`{word}` in the model name `{model}` needs a whole number after it")
            fields[_NUMBER_WORDS[word]] = int(value)
        else:
            known = ", ".join([*_PLAIN_WORDS, *_NUMBER_WORDS])
            raise InvalidBehaviour(f"`{word}` in the model name `{model}` is not a behaviour; there are: {known}")
    return parse_behaviour(fields)


@dataclass(slots=True)
class _Entry:
    behaviour: Behaviour
    healthy: Behaviour
    requests: int = 0


class Behaviours:
    """Who behaves how, and how many requests each has had since that was said."""

    def __init__(self) -> None:
        self._set: dict[str, _Entry] = {}
        self._named: OrderedDict[str, _Entry] = OrderedDict()

    def set(self, model: str, behaviour: Behaviour) -> None:
        """Replace a model's behaviour, and count its requests anew.

        Raises:
            InvalidBehaviour: Too many models have one already.
        """
        if len(self._set) >= _MODELS_MAX and model not in self._set:
            raise InvalidBehaviour(f"{_MODELS_MAX} models have a behaviour already; delete some")
        self._set[model] = _entry(behaviour)

    def reset(self, model: str | None = None) -> None:
        """Forget what was set and counted, for one model or for all."""
        if model is None:
            self._set.clear()
            self._named.clear()
        else:
            self._set.pop(model, None)
            self._named.pop(model, None)

    def all(self) -> dict[str, Behaviour]:
        """What was set, by model."""
        return {model: entry.behaviour for model, entry in self._set.items()}

    def meet(self, model: str) -> Behaviour:
        """How the model behaves to the request that has just come.

        Raises:
            InvalidBehaviour: The name is of the form that says a behaviour, but says none.
        """
        entry = self._set.get(model) or self._named.get(model)
        if entry is None:
            entry = self._named[model] = _entry(behaviour_in_name(model) or Behaviour())
            if len(self._named) > _MODELS_MAX:
                self._named.popitem(last=False)
        entry.requests += 1
        limit = entry.behaviour.fail_first
        return entry.behaviour if limit is None or entry.requests <= limit else entry.healthy


def _entry(behaviour: Behaviour) -> _Entry:
    return _Entry(behaviour, behaviour.healthy())
