"""What a simulated model says, whatever the wire format: the same question always gets the same answer.

How tokens are counted: a word, with the white space before it, is one token. The input is the words of all text in messages,
system prompt, tool descriptions and results, one for each tool, and 100 for each picture, sound or file. Arguments of a tool
call are one token per six characters of their JSON. Real tokenizers find more tokens in the same text, so what was priced by
one of them covers what is reported here.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Final, Literal

import orjson

from gateway.dev.simulator.behaviours import Behaviour

Finish = Literal["stop", "stop_sequence", "length", "tool_calls", "content_filter"]

OUTPUT_TOKENS: Final = 40
MEDIA_TOKENS: Final = 100
_ARGUMENT_CHARACTERS: Final = 6
_QUESTION_WORDS_MAX: Final = 24
_SCHEMA_DEPTH_MAX: Final = 12
_WORD = re.compile(r"\s*\S+|\s+$")
_SENTENCE: Final = (
    "This answer comes from a simulated model that knows nothing about it but keeps talking for as long as it was told to, "
    "one word after another, so that streams have a length and prices have something to multiply."
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the request offers."""

    name: str
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, as far as the answer depends on it."""

    model: str
    stream: bool
    question: str
    """The text of the last user turn."""
    input_tokens: int
    max_tokens: int | None = None
    tools: tuple[Tool, ...] = ()
    must_call: str | None = None
    """A tool's name, or an empty string for any; None where the model may decide."""
    after_tool_result: bool = False
    json_schema: dict[str, Any] | None = None
    """The answer has to be JSON; an empty schema allows any object."""
    stop: tuple[str, ...] = ()
    choices: int = 1
    usage_in_stream: bool = True


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call; the JSON of its arguments in the pieces in which it is streamed, each a token."""

    name: str
    arguments: dict[str, Any]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens. `input` includes `cached` and `written`, `output` includes `reasoning`."""

    input: int
    cached: int
    written: int
    output: int
    reasoning: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says. `reasoning` and `text` are tokens; `usage` is None where the provider leaves it out."""

    number: int
    created: int
    """Unix seconds."""
    model: str
    reasoning: tuple[str, ...]
    text: tuple[str, ...]
    calls: tuple[Call, ...]
    finish: Finish
    usage: Counts | None
    stop_sequence: str | None = None
    choices: int = 1
    usage_in_stream: bool = True
    tokens: int = field(default=0)
    """How many tokens the client sees, over all choices."""


def compose(ask: Ask, behaviour: Behaviour, number: int, created: int) -> Answer:
    """Decide on the answer. `number` tells answers apart, `created` is in Unix seconds."""
    limit = ask.max_tokens
    reasoning_count = behaviour.reasoning_tokens if limit is None else min(behaviour.reasoning_tokens, limit)
    room = None if limit is None else limit - reasoning_count
    calls = _calls(ask, behaviour)
    call_tokens = sum(len(call.pieces) for call in calls)
    # A call that does not fit is not begun: two of the dialects could not say half of one.
    if room is not None and call_tokens > room:
        calls, call_tokens = (), 0
    text: tuple[str, ...] = ()
    stop_sequence: str | None = None
    finish: Finish = "tool_calls"
    if not calls:
        finish, text, stop_sequence = _text(ask, behaviour, room)
    if behaviour.finish is not None:
        finish = behaviour.finish
    shown = _running_text("", reasoning_count) if behaviour.show_reasoning else ()
    counts = Counts(
        input=ask.input_tokens,
        cached=(cached := min(behaviour.cached_input_tokens, ask.input_tokens)),
        written=min(behaviour.cache_write_tokens, ask.input_tokens - cached),
        output=(reasoning_count + len(text) + call_tokens) * ask.choices,
        reasoning=reasoning_count * ask.choices,
    )
    return Answer(
        number=number,
        created=created,
        model=ask.model,
        reasoning=shown,
        text=text,
        calls=calls,
        finish=finish,
        usage=None if behaviour.missing_usage else counts,
        stop_sequence=stop_sequence,
        choices=ask.choices,
        usage_in_stream=ask.usage_in_stream,
        tokens=(len(shown) + len(text) + call_tokens) * ask.choices,
    )


def count_words(text: str) -> int:
    """The tokens of a text."""
    return len(text.split())


def _text(ask: Ask, behaviour: Behaviour, room: int | None) -> tuple[Finish, tuple[str, ...], str | None]:
    if behaviour.text is not None:
        tokens = tuple(_WORD.findall(behaviour.text))[: behaviour.output_tokens]
    elif ask.json_schema is not None:
        tokens = tuple(_WORD.findall(_json_text(ask)))
    else:
        wanted = OUTPUT_TOKENS if behaviour.output_tokens is None else behaviour.output_tokens
        tokens = _running_text(ask.question, wanted)
    finish: Finish = "stop"
    matched = None
    if ask.stop:
        whole = "".join(tokens)
        found = [(place, stop) for stop in ask.stop if stop and (place := whole.find(stop)) >= 0]
        if found:
            place, matched = min(found)
            finish, tokens = "stop_sequence", tuple(_WORD.findall(whole[:place]))
    if room is not None and len(tokens) > room:
        return "length", tokens[:room], None
    return finish, tokens, matched


@functools.lru_cache(maxsize=1024)
def _running_text(question: str, count: int) -> tuple[str, ...]:
    words = question.split()[:_QUESTION_WORDS_MAX]
    opening = ["You", "asked:", *words, "—"] if words else []
    chosen = list(islice((*opening, *islice(cycle(_SENTENCE.split()), max(0, count - len(opening)))), count))
    return tuple(word if place == 0 else f" {word}" for place, word in enumerate(chosen))


def _json_text(ask: Ask) -> str:
    assert ask.json_schema is not None
    if not ask.json_schema:
        return orjson.dumps({"answer": "".join(_running_text(ask.question, OUTPUT_TOKENS))}).decode()
    return orjson.dumps(_example(ask.json_schema, ask.json_schema, ask.question, 0)).decode()


def _calls(ask: Ask, behaviour: Behaviour) -> tuple[Call, ...]:
    if not ask.tools:
        return ()
    if ask.must_call:
        tools: tuple[Tool, ...] = tuple(tool for tool in ask.tools if tool.name == ask.must_call) or ask.tools
    else:
        tools = ask.tools
    wanted = 0 if ask.after_tool_result and ask.must_call is None else behaviour.tool_calls
    if ask.must_call is not None:
        wanted = max(1, wanted)
    return tuple(_call(tool, ask, behaviour) for tool in islice(cycle(tools), wanted))


def _call(tool: Tool, ask: Ask, behaviour: Behaviour) -> Call:
    arguments = behaviour.tool_arguments
    if arguments is None:
        example = _example(tool.schema, tool.schema, ask.question, 0)
        arguments = example if isinstance(example, dict) else {}
    text = orjson.dumps(arguments).decode()
    pieces = tuple(text[place : place + _ARGUMENT_CHARACTERS] for place in range(0, len(text), _ARGUMENT_CHARACTERS))
    return Call(tool.name, arguments, pieces)


def _example(schema: object, root: dict[str, Any], question: str, depth: int) -> Any:
    """The plainest value that the JSON schema allows; strings are the question. Formats and patterns are not looked at."""
    if not isinstance(schema, dict) or depth > _SCHEMA_DEPTH_MAX:
        return None
    if "const" in schema:
        return schema["const"]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return _example(_resolve(reference, root), root, question, depth + 1)
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(name), list) and schema[name]:
            return _example(schema[name][0], root, question, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    # Gemini's own schemas write the types in capitals.
    match str(kind).lower():
        case "object":
            properties = schema.get("properties")
            members = properties.items() if isinstance(properties, dict) else ()
            return {name: _example(member, root, question, depth + 1) for name, member in members}
        case "array":
            return [_example(schema.get("items", {}), root, question, depth + 1)]
        case "integer" | "number":
            minimum = schema.get("minimum", 1)
            return minimum if isinstance(minimum, int | float) else 1
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return " ".join(question.split()[:_QUESTION_WORDS_MAX]) or "something"


def _resolve(reference: str, root: dict[str, Any]) -> object:
    found: object = root
    for name in reference.removeprefix("#").split("/")[1:]:
        found = found.get(name) if isinstance(found, dict) else None
    return found
