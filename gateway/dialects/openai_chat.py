"""OpenAI chat completions as callers speak it: reading and checking a request.

Whatever JSON arrives, the outcome is a `ChatRequest` or a 400 that names the field and says what to do. Fields that are not
known here are left in `raw_body`: an upstream of the same dialect gets them unchanged, others never see them. Answers are
written by `openai_answers`, upstreams of this dialect are spoken to by `openai_upstream`.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

from gateway.api.errors import ApiError
from gateway.dialects.canonical import Block, ChatRequest, Message, Tool, ToolResultBlock
from gateway.dialects.openai_content import read_parts, read_text_parts, read_tool_calls
from gateway.dialects.openai_fields import array, fail, integer, number, obj, optional_text, text, wrong_type

NAME: Final = "openai_chat"
GATEWAY_FIELDS: Final = frozenset({"models", "provider", "strategy", "route", "farebox"})
"""Fields that speak to the gateway (OpenRouter's names included); no upstream sees them."""
MESSAGES_MAX: Final = 4096
TOOLS_MAX: Final = 512
MODELS_MAX: Final = 32
STOPS_MAX: Final = 16
CHOICES_MAX: Final = 16
OUTPUT_TOKENS_MAX: Final = 10_000_000
MODEL_NAME_MAX: Final = 256
_PRICED: Final = frozenset({
    "model", "models", "messages", "tools", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options",
    "response_format", "service_tier", "modalities", "audio", "prediction", "best_of", "plugins", "web_search_options",
    "functions",
})  # fmt: skip


def parse_request(body: object, raw: bytes = b"") -> ChatRequest:
    """Check a request and bring it into the canonical form.

    Args:
        body: The decoded JSON body, any JSON value.
        raw: The body's bytes; forwarded as they are where nothing in them has to change.

    Raises:
        ApiError: 400, with `param` in dotted and indexed form, if anything is not as the dialect says.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_type", "The body must be a JSON object with at least `model` and `messages`.")
    _refuse_retired(body)
    _refuse_unpriced(body)
    models = _models(body)
    tools = _tools(body.get("tools"))
    stream = _flag(body, "stream")
    response_format, response_schema = _response_format(body.get("response_format"))
    return ChatRequest(
        dialect=NAME,
        model=models[0] if body.get("model") is None and models else _model(body.get("model"), "model"),
        models=models,
        messages=_messages(body.get("messages")),
        tools=tools,
        tool_choice=_tool_choice(body.get("tool_choice"), tools),
        max_output_tokens=_output_limit(body),
        temperature=number(body, "temperature", 0, 2),
        top_p=number(body, "top_p", 0, 1),
        stop=_stop(body.get("stop")),
        response_format=response_format,
        response_schema=response_schema,
        stream=stream,
        include_usage=_include_usage(body.get("stream_options")),
        choices=integer(body, "n", 1, CHOICES_MAX) or 1,
        extra={"raw": raw} if raw else {},
        raw_body=body,
    )


def _refuse_retired(body: dict[str, Any]) -> None:
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if body.get(name) is not None:
            fail(name, "unsupported_parameter", f"is the retired form; use `{instead}`.")


def _refuse_unpriced(body: dict[str, Any]) -> None:
    """What would cost more upstream than the quote says: the route's price is the one for plain text."""
    for name in body:
        # Servers written in Go match names whatever their case: the last spelling would win over the one that was priced.
        if name not in _PRICED and name.casefold() in _PRICED:
            fail(name[:64], "unsupported_parameter", f"must be written `{name.casefold()}`.")
    for name in ("web_search_options", "plugins", "best_of", "audio", "prediction"):
        if body.get(name) is not None:
            fail(name, "unsupported_parameter", "has a price of its own, which is not quoted here; leave it out.")
    tier = body.get("service_tier")
    if tier is not None and tier not in ("auto", "default", "flex"):
        fail(
            "service_tier",
            "unsupported_parameter",
            "must be `auto`, `default` or `flex`: others have prices of their own.",
        )
    modalities = body.get("modalities")
    if modalities is not None and modalities != ["text"]:
        fail("modalities", "unsupported_parameter", 'must be `["text"]`: others have prices of their own.')


def _model(value: object, param: str) -> str:
    name = text(value, param, "the id of a model (see GET /v1/models) or `auto`")
    if not name.strip() or len(name) > MODEL_NAME_MAX or not name.isprintable():
        fail(param, "invalid_value", f"must be a printable name of 1 to {MODEL_NAME_MAX} characters.")
    return name


def _models(body: dict[str, Any]) -> tuple[str, ...]:
    value = body.get("models")
    if value is None:
        return ()
    names = array(value, "models", MODELS_MAX)
    return tuple(_model(name, f"models[{index}]") for index, name in enumerate(names))


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        fail(name, "invalid_type", "must be true or false.")
    return value


def _include_usage(value: object) -> bool:
    if value is None:
        return False
    options = obj(value, "stream_options")
    include = options.get("include_usage")
    if include is not None and not isinstance(include, bool):
        fail("stream_options.include_usage", "invalid_type", "must be true or false.")
    return bool(include)


def _output_limit(body: dict[str, Any]) -> int | None:
    limit = integer(body, "max_tokens", 1, OUTPUT_TOKENS_MAX)
    newer = integer(body, "max_completion_tokens", 1, OUTPUT_TOKENS_MAX)
    return limit if newer is None else newer


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        wrong_type("stop", value, "a string or an array of strings")
    stops = array(value, "stop", STOPS_MAX, empty_allowed=True)
    return tuple(text(stop, f"stop[{index}]", "a string") for index, stop in enumerate(stops))


def _response_format(value: object) -> tuple[Any, dict[str, Any] | None]:
    if value is None:
        return "text", None
    form = obj(value, "response_format")
    kind = form.get("type")
    if kind in ("text", "json_object"):
        return kind, None
    if kind != "json_schema":
        fail("response_format.type", "invalid_value", "must be `text`, `json_object` or `json_schema`.")
    schema = obj(form.get("json_schema"), "response_format.json_schema")
    text(schema.get("name"), "response_format.json_schema.name", "the schema's name")
    if schema.get("schema") is not None:
        obj(schema["schema"], "response_format.json_schema.schema")
    return "json_schema", schema


def _tools(value: object) -> tuple[Tool, ...]:
    if value is None:
        return ()
    return tuple(
        _tool(item, f"tools[{i}]") for i, item in enumerate(array(value, "tools", TOOLS_MAX, empty_allowed=True))
    )


def _tool(value: object, param: str) -> Tool:
    tool = obj(value, param)
    if tool.get("type") != "function":
        fail(f"{param}.type", "invalid_value", "must be `function`, the only kind of tool that every route knows.")
    function = obj(tool.get("function"), f"{param}.function")
    name = text(function.get("name"), f"{param}.function.name", "the function's name")
    if not name or len(name) > MODEL_NAME_MAX:
        fail(f"{param}.function.name", "invalid_value", f"must have 1 to {MODEL_NAME_MAX} characters.")
    parameters = function.get("parameters")
    return Tool(
        name=name,
        description=optional_text(function, "description", f"{param}.function"),
        parameters={"type": "object", "properties": {}}
        if parameters is None
        else obj(parameters, f"{param}.function.parameters"),
    )


def _tool_choice(value: object, tools: tuple[Tool, ...]) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value not in ("auto", "none", "required"):
            fail("tool_choice", "invalid_value", "must be `auto`, `none`, `required` or name a function.")
        if value == "required" and not tools:
            fail("tool_choice", "invalid_value", "is `required`, but there are no `tools`.")
        return value
    choice = obj(value, "tool_choice", "a string or an object")
    if choice.get("type") != "function":
        fail("tool_choice.type", "invalid_value", "must be `function`.")
    function = obj(choice.get("function"), "tool_choice.function")
    name = text(function.get("name"), "tool_choice.function.name", "the function's name")
    if all(tool.name != name for tool in tools):
        fail("tool_choice.function.name", "invalid_value", f"is {name[:64]!r}, which is not among `tools`.")
    return f"tool:{name}"


def _messages(value: object) -> tuple[Message, ...]:
    known_calls: set[str] = set()
    return tuple(
        _message(item, f"messages[{index}]", known_calls)
        for index, item in enumerate(array(value, "messages", MESSAGES_MAX))
    )


def _message(value: object, param: str, known_calls: set[str]) -> Message:
    message = obj(value, param)
    role = message.get("role")
    content = message.get("content")
    if role == "user":
        return Message("user", read_parts(content, f"{param}.content"))
    if role in ("system", "developer"):
        return Message("system", read_text_parts(content, f"{param}.content"))
    if role == "assistant":
        return Message("assistant", _assistant_blocks(message, content, param, known_calls))
    if role == "tool":
        return Message("tool", (_tool_result(message, content, param, known_calls),))
    return _unknown_role(role, param)


def _assistant_blocks(message: dict[str, Any], content: object, param: str, known_calls: set[str]) -> tuple[Block, ...]:
    calls = read_tool_calls(message.get("tool_calls"), f"{param}.tool_calls")
    known_calls.update(call.id for call in calls)
    if content is None:
        if not calls and message.get("refusal") is None and message.get("audio") is None:
            fail(f"{param}.content", "missing_required_parameter", "is required unless `tool_calls` are given.")
        return calls
    return read_text_parts(content, f"{param}.content") + calls


def _tool_result(message: dict[str, Any], content: object, param: str, known_calls: set[str]) -> Block:
    call_id = text(message.get("tool_call_id"), f"{param}.tool_call_id", "the id of the call that this answers")
    if call_id not in known_calls:
        fail(f"{param}.tool_call_id", "invalid_value", "answers no `tool_calls` of an earlier assistant message.")
    blocks = read_text_parts(content, f"{param}.content")
    return ToolResultBlock(call_id, "".join(block.text for block in blocks))


def _unknown_role(role: object, param: str) -> NoReturn:
    if role is None:
        fail(f"{param}.role", "missing_required_parameter", "is required.")
    fail(f"{param}.role", "invalid_value", "must be `system`, `developer`, `user`, `assistant` or `tool`.")
