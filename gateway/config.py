"""Reads `farebox.toml` and the `FAREBOX_*` variables into `Settings`, and reports every mistake with its place and its fix.

The environment wins over the file, the file over the defaults. Variables name nested fields with two underscores
(`FAREBOX_PAYMENTS__QUOTE_TTL_S=60`, `FAREBOX_NETWORKS__0__RPC_URLS='["https://…"]'`); lists and tables are JSON, and an
empty variable counts as unset.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from gateway import config_checks, toml_places
from gateway.config_checks import KeyPath, dotted
from gateway.settings import Settings

ENV_PREFIX = "FAREBOX_"
CONFIG_VARIABLE = "FAREBOX_CONFIG"
SECRETS = {"secret": "FAREBOX_SECRET", "signer_keys": "FAREBOX_SIGNER_KEYS", "treasury_key": "FAREBOX_TREASURY_KEY"}
_OTHER_VARIABLES = {CONFIG_VARIABLE, "FAREBOX_DEBUG", "FAREBOX_WALLET_KEY", "FAREBOX_GATEWAY", "FAREBOX_RPC_URL"}
"""Variables of the command and of the agent SDK, which may be set on the same machine."""
_SECRET_HEADERS = {"authorization", "api-key", "x-api-key", "x-goog-api-key", "proxy-authorization", "cookie"}
_HIDDEN = {*SECRETS, "headers", "rpc_urls", "database_url"}
"""Fields whose values are never repeated in a message."""
_PASSWORD = re.compile(r"//[^/@]*:[^/@]+@|[?&]password=")
"""A password in a database's URL."""
_SYNTAX_PLACE = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)")


@dataclass(frozen=True, slots=True)
class Problem:
    """A mistake in the configuration. A warning does not keep the gateway from starting."""

    place: str
    """`farebox.toml:12:1`, or the variable's name."""
    what: str
    fix: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.what}. {self.fix}"


class ConfigError(Exception):
    """The configuration cannot be used; `problems` says all that is wrong with it."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Report:
    """What came of reading a configuration: `settings` is None if there are problems that are not warnings."""

    settings: Settings | None
    problems: list[Problem]


def load(path: Path | None, env: Mapping[str, str]) -> Settings:
    """Read and check the configuration.

    Args:
        path: The TOML file; None reads the environment only.
        env: The environment, normally `os.environ`.

    Raises:
        ConfigError: Listing every problem.
    """
    report = inspect(path, env)
    if report.settings is None:
        raise ConfigError([problem for problem in report.problems if not problem.warning])
    return report.settings


def read_file(path: Path) -> dict[str, Any]:
    """What a configuration file says, unchecked. Numbers with a fraction come as their text: prices are never floats.

    Raises:
        ConfigError: If it cannot be read or is not TOML.
    """
    return _parse(path)[0]


def inspect(path: Path | None, env: Mapping[str, str]) -> Report:
    """Read and check the configuration, with warnings. Arguments as for `load`."""
    merged = _Merged()
    problems: list[Problem] = []
    if path is not None:
        try:
            merged.data, text = _parse(path)
        except ConfigError as error:
            return Report(None, error.problems)
        merged.places = {key: f"{path}:{line}:{column}" for key, (line, column) in toml_places.places(text).items()}
        problems += _secrets_in_file(merged)
    problems += _read_environment(merged, env)
    settings: Settings | None = None
    try:
        settings = Settings(**merged.data)
    except ValidationError as error:
        problems += [_structural(merged, details) for details in error.errors(include_url=False)]
    for finding in config_checks.findings(merged.data, env):
        if finding.path[:1] in merged.unreadable:
            continue
        problems.append(Problem(merged.place(finding.path), finding.what, finding.fix, finding.warning))
    usable = all(problem.warning for problem in problems)
    return Report(settings if usable else None, sorted(problems, key=lambda problem: problem.warning))


@dataclass(slots=True)
class _Merged:
    """File and environment in one, and where each value came from."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    unreadable: set[KeyPath] = field(default_factory=set)
    """Fields whose variable is not JSON: reported once, not also as missing."""

    def place(self, path: KeyPath) -> str:
        """Where `path` was said, or else the nearest thing around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return f"{ENV_PREFIX}{path[0]}".upper() if path else "the configuration"

    def put(self, container: dict[str, Any], fragment: Mapping[str, Any], path: KeyPath, variable: str) -> None:
        """Merge one variable's `fragment` over the table `container` at `path`."""
        for name, value in fragment.items():
            # The environment has no case and the file may: one provider stays one.
            key = next((known for known in container if known.casefold() == name.casefold()), name)
            here = (*path, key)
            current = container.get(key)
            if _is_index_table(value) and (isinstance(current, list) or here in _LISTS):
                container[key] = self.put_items(current or [], value, here, variable)
            elif isinstance(value, dict) and isinstance(current, dict):
                self.put(current, value, here, variable)
            else:
                container[key] = _decoded(value) if _inside_list(path) else value
                self.claim(here, variable)

    def put_items(self, items: list[Any], fragment: Mapping[str, Any], path: KeyPath, variable: str) -> list[Any]:
        """Merge values that a variable gave by number (`…__0__…`) into a list; an item may follow the last, not skip one."""
        for name, value in sorted(fragment.items(), key=lambda item: int(item[0])):
            index = min(int(name), len(items))
            if index == len(items):
                items.append({})
            if isinstance(value, dict) and isinstance(items[index], dict):
                self.places.setdefault((*path, index), variable)
                self.put(items[index], value, (*path, index), variable)
            else:
                items[index] = _decoded(value)
                self.claim((*path, index), variable)
        return items

    def claim(self, path: KeyPath, variable: str) -> None:
        """The value at `path` is now the variable's: what the file said below it counts no more."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
        self.places[path] = variable


_LISTS: set[KeyPath] = {("networks",), ("models",), ("signer_keys",)}


def _is_index_table(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(name.isdecimal() for name in value)


def _inside_list(path: KeyPath) -> bool:
    return any(isinstance(part, int) for part in path)


def _decoded(value: Any) -> Any:
    """Below a list index nobody has read the JSON yet."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _parse(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_bytes().decode()
        return tomllib.loads(text, parse_float=str), text.replace("\r\n", "\n")
    except OSError as error:
        problem = Problem(str(path), f"cannot be read ({error.strerror})", "Name an existing file with --config")
    except UnicodeDecodeError as error:
        problem = Problem(f"{path}", f"is not UTF-8 text (byte {error.start})", "Save it as UTF-8")
    except tomllib.TOMLDecodeError as error:
        match = _SYNTAX_PLACE.fullmatch(str(error))
        place = f"{path}:{match[2]}:{match[3]}" if match and match[2] else f"{path}:{text.count(chr(10)) + 1}:1"
        what = f"this is not TOML: {match[1] if match else error}"
        problem = Problem(place, what, "Text needs quotes, tables a [header], and every key stands once")
    raise ConfigError([problem]) from None


def _secrets_in_file(merged: _Merged) -> Iterator[Problem]:
    for name, variable in SECRETS.items():
        if name in merged.data:
            del merged.data[name]
            what = f"{name} is a secret and does not belong in a file"
            yield Problem(
                merged.place((name,)), what, f"Remove it here (and replace it: it was on disk) and set {variable}"
            )
    database_url = merged.data.get("database_url")
    if isinstance(database_url, str) and _PASSWORD.search(database_url):
        del merged.data["database_url"]
        fix = "Remove it here (and replace it: it was on disk) and set FAREBOX_DATABASE_URL"
        yield Problem(merged.place(("database_url",)), "database_url holds a password", fix)
    providers = merged.data.get("providers")
    for provider, values in providers.items() if isinstance(providers, dict) else ():
        headers = values.get("headers") if isinstance(values, dict) else None
        for header in headers if isinstance(headers, dict) else ():
            if header.lower() in _SECRET_HEADERS:
                path = ("providers", provider, "headers", header)
                fix = "Remove it, put the key into a variable of the environment, and name that in api_key_env"
                yield Problem(merged.place(path), f"{dotted(path)} is a secret and does not belong in a file", fix)


def _read_environment(merged: _Merged, env: Mapping[str, str]) -> Iterator[Problem]:
    named = config_checks.key_variables(merged.data)
    unknown = []
    for variable, value in sorted(env.items()):
        if not variable.upper().startswith(ENV_PREFIX) or variable in _OTHER_VARIABLES or not value:
            continue
        # One variable at a time, so that every value keeps the name of the variable it came from.
        source = EnvSettingsSource(Settings)
        source.env_vars = {variable.lower(): value}
        try:
            fragment = source()
        except SettingsError:
            merged.unreadable.add((_field_of(variable),))
            fix = """Write lists as '["a", "b"]' and tables as '{"name": "value"}'"""
            yield Problem(variable, "the value is not JSON", fix)
            continue
        if fragment:
            merged.put(merged.data, fragment, (), variable)
        else:
            unknown.append(variable)
    named |= config_checks.key_variables(merged.data)
    for variable in unknown:
        if variable not in named:
            yield _unknown_variable(variable)


def _field_of(variable: str) -> str:
    return variable[len(ENV_PREFIX) :].lower().split("__")[0]


def _unknown_variable(variable: str) -> Problem:
    name = _field_of(variable)
    near = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.75)
    if near:
        return Problem(variable, "there is no such setting", f"Did you mean {ENV_PREFIX}{near[0].upper()}?")
    # Other programs may have variables of their own with this prefix.
    return Problem(variable, "the gateway has no such setting and ignores it", "Unset it if it was meant for it", True)


def _structural(merged: _Merged, details: ErrorDetails) -> Problem:
    path: KeyPath = details["loc"]
    what, fix = _describe(path, details)
    return Problem(merged.place(path), what, fix)


def _describe(path: KeyPath, details: ErrorDetails) -> tuple[str, str]:
    """What is wrong with a value, and what to write instead."""
    name, kind, value = dotted(path), details["type"], details["input"]
    shown = "this value" if _HIDDEN.intersection(path) else repr(value)[:80]
    pattern = details.get("ctx", {}).get("pattern", "")
    if kind == "extra_forbidden":
        fields = _fields_of(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), fields, n=1, cutoff=0.6)
        fix = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(fields)}"
        return f"there is no setting {name}", fix
    if kind == "missing":
        return f"{name} is missing", f"Add {path[-1]} = …"
    if kind == "literal_error":
        expected = details["ctx"]["expected"]
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", expected), n=1)
        return f"{name}: {shown} is not known", f"Did you mean {near[0]!r}?" if near else f"Write {expected}"
    if "[0-9]{1,12}" in pattern or (kind == "string_type" and str(path[-1]).endswith("_usd")):
        return f"{name}: {shown} is not a dollar amount", 'Write it like "0.05": not negative, at most nine decimals'
    if "0x" in pattern:
        return f"{name}: {shown} is not an address", "Write 0x and 40 hex digits"
    message = details["msg"]
    return f"{name}: {shown} will not do", message[0].upper() + message[1:]


def _fields_of(path: KeyPath) -> list[str]:
    """The field names that a table at `path` may have."""
    model: Any = Settings
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        else:
            arguments = [entry for entry in typing.get_args(model) if entry is not types.NoneType]
            model = arguments[-1] if arguments else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def example() -> str:
    """A complete, documented configuration file."""
    return Path(__file__).with_name("farebox.example.toml").read_text(encoding="utf-8")
