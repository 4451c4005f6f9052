"""The content of OpenAI chat messages: parts of text, images, audio and files, and the assistant's tool calls."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote_to_bytes

from gateway.dialects.canonical import Block, MediaBlock, TextBlock, ToolCallBlock
from gateway.dialects.openai_fields import array, fail, obj, text, wrong_type

PARTS_MAX: Final = 4096
TOOL_CALLS_MAX: Final = 512
URL_CHARACTERS_MAX: Final = 8192
AUDIO_FORMATS: Final = {"wav": "audio/wav", "mp3": "audio/mpeg"}
_TEXT_OR_PARTS: Final = "a string or an array of content parts"


def read_parts(content: object, param: str) -> tuple[Block, ...]:
    """What a user said: text or parts of every kind."""
    if isinstance(content, str):
        return (TextBlock(content),)
    if not isinstance(content, list):
        wrong_type(param, content, _TEXT_OR_PARTS)
    return tuple(
        _part(obj(part, f"{param}[{index}]"), f"{param}[{index}]")
        for index, part in enumerate(array(content, param, PARTS_MAX))
    )


def read_text_parts(content: object, param: str) -> tuple[TextBlock, ...]:
    """What the system, the assistant or a tool said: text or parts of text (an assistant's refusal is text too)."""
    if isinstance(content, str):
        return (TextBlock(content),)
    if not isinstance(content, list):
        wrong_type(param, content, _TEXT_OR_PARTS)
    blocks: list[TextBlock] = []
    for index, item in enumerate(array(content, param, PARTS_MAX, empty_allowed=True)):
        place = f"{param}[{index}]"
        part = obj(item, place)
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            fail(f"{place}.type", "invalid_value", "must be `text` in a message of this role.")
        blocks.append(TextBlock(text(part.get(kind), f"{place}.{kind}", "a string")))
    return tuple(blocks)


def read_tool_calls(value: object, param: str) -> tuple[ToolCallBlock, ...]:
    """The tools that the assistant asked for."""
    if value is None:
        return ()
    calls = array(value, param, TOOL_CALLS_MAX, empty_allowed=True)
    return tuple(_tool_call(call, f"{param}[{index}]") for index, call in enumerate(calls))


def _tool_call(value: object, param: str) -> ToolCallBlock:
    call = obj(value, param)
    if call.get("type", "function") != "function":
        fail(f"{param}.type", "invalid_value", "must be `function`.")
    function = obj(call.get("function"), f"{param}.function")
    return ToolCallBlock(
        id=text(call.get("id"), f"{param}.id", "the call's id"),
        name=text(function.get("name"), f"{param}.function.name", "the function's name"),
        arguments=text(function.get("arguments"), f"{param}.function.arguments", "the arguments as JSON text"),
    )


def _part(part: dict[str, Any], param: str) -> Block:
    kind = part.get("type")
    if kind == "text":
        return TextBlock(text(part.get("text"), f"{param}.text", "a string"))
    if kind == "image_url":
        return _image(part.get("image_url"), f"{param}.image_url")
    if kind == "input_audio":
        return _audio(obj(part.get("input_audio"), f"{param}.input_audio"), f"{param}.input_audio")
    if kind == "file":
        return _file(obj(part.get("file"), f"{param}.file"), f"{param}.file")
    if kind is None:
        fail(f"{param}.type", "missing_required_parameter", "is required.")
    return fail(f"{param}.type", "invalid_value", "must be `text`, `image_url`, `input_audio` or `file`.")


def _image(value: object, param: str) -> MediaBlock:
    image = obj(value, param, "an object with a `url`")
    url = text(image.get("url"), f"{param}.url", "an https or data URL")
    if url.startswith("data:"):
        return _data_url(url, "image", f"{param}.url")
    if not url.startswith(("https://", "http://")) or len(url) > URL_CHARACTERS_MAX:
        fail(
            f"{param}.url", "invalid_value", f"must be an https or data URL (at most {URL_CHARACTERS_MAX} characters)."
        )
    return MediaBlock("image", url=url)


def _audio(audio: dict[str, Any], param: str) -> MediaBlock:
    data = text(audio.get("data"), f"{param}.data", "base64 data")
    media_type = AUDIO_FORMATS.get(text(audio.get("format"), f"{param}.format", "`wav` or `mp3`"))
    if media_type is None:
        fail(f"{param}.format", "invalid_value", "must be `wav` or `mp3`.")
    return MediaBlock("audio", data=data, media_type=media_type)


def _file(file: dict[str, Any], param: str) -> MediaBlock:
    if file.get("file_id") is not None:
        fail(f"{param}.file_id", "unsupported_parameter", "names a file at one provider; send the file as `file_data`.")
    data = text(file.get("file_data"), f"{param}.file_data", "the file as a data URL")
    if data.startswith("data:"):
        return _data_url(data, "file", f"{param}.file_data")
    return MediaBlock("file", data=data, media_type="application/pdf")


def _data_url(url: str, kind: Any, param: str) -> MediaBlock:
    head, comma, data = url.partition(",")
    media_type, *parameters = head.removeprefix("data:").split(";")
    if not comma or "base64" not in parameters or "/" not in media_type:
        fail(param, "invalid_value", "must be of the form `data:<media type>;base64,<data>`.")
    if "%" in data[:4096]:
        data = unquote_to_bytes(data).decode("ascii", "replace")
    return MediaBlock(kind, data=data, media_type=media_type)
