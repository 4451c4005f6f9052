"""Where each key of a TOML document stands, for error messages. Only for text that `tomllib` has already accepted."""

from __future__ import annotations

import re

Path = tuple[str | int, ...]
Place = tuple[int, int]
"""Line and column, counted from 1."""

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}\s#]+(?: [0-9][^,\]}\s#]*)?")
_STRINGS = (
    re.compile(r'"""(?:\\.|[^\\])*?"{3,5}', re.DOTALL),
    re.compile(r"'''.*?'{3,5}", re.DOTALL),
    re.compile(r'"(?:\\.|[^"\\])*"'),
    re.compile(r"'[^']*'"),
)


def places(text: str) -> dict[Path, Place]:
    """The line and column of every key and array element of a valid TOML document, by its path."""
    return _Scanner(text).scan()


class _Scanner:
    """One pass over the text; `at` is how far it has come."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[Path, Place] = {}
        self.array_lengths: dict[Path, int] = {}

    def scan(self) -> dict[Path, Place]:
        table: Path = ()
        while self.skip_blank():
            if self.text.startswith("[[", self.at):
                table = self.header(2)
            elif self.text[self.at] == "[":
                table = self.header(1)
            else:
                self.entry(table)
        return self.found

    def skip_blank(self) -> bool:
        match = _BLANK.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.at < len(self.text)

    def mark(self, path: Path, start: int) -> None:
        line = self.text.count("\n", 0, start) + 1
        self.found.setdefault(path, (line, start - self.text.rfind("\n", 0, start)))

    def key(self) -> list[str]:
        parts = []
        while True:
            self.skip_blank()
            if self.text[self.at] in "\"'":
                start = self.at
                self.string()
                parts.append(self.text[start + 1 : self.at - 1])
            else:
                match = _BARE_KEY.match(self.text, self.at)
                assert match is not None
                self.at = match.end()
                parts.append(match.group())
            self.skip_blank()
            if self.text[self.at] != ".":
                return parts
            self.at += 1

    def header(self, brackets: int) -> Path:
        """`[a.b]` or `[[a.b]]`; a name that is an array of tables means its last one."""
        start = self.at
        self.at += brackets
        parts = self.key()
        self.at += brackets
        path: Path = ()
        for place, part in enumerate(parts):
            path = (*path, part)
            if brackets == 2 and place == len(parts) - 1:
                self.array_lengths[path] = self.array_lengths.get(path, 0) + 1
                self.mark(path, start)
            if path in self.array_lengths:
                path = (*path, self.array_lengths[path] - 1)
        self.mark(path, start)
        return path

    def entry(self, table: Path) -> None:
        """`key = value`."""
        start = self.at
        path = table
        for part in self.key():
            path = (*path, part)
            self.mark(path, start)
        self.at += 1  # the equals sign
        self.value(path)

    def value(self, path: Path) -> None:
        self.skip_blank()
        opening = self.text[self.at]
        if opening in "\"'":
            self.string()
        elif opening == "[":
            self.array(path)
        elif opening == "{":
            self.inline_table(path)
        else:
            match = _SCALAR.match(self.text, self.at)
            assert match is not None
            self.at = match.end()

    def string(self) -> None:
        for pattern in _STRINGS:
            match = pattern.match(self.text, self.at)
            if match is not None:
                self.at = match.end()
                return
        raise AssertionError("tomllib accepted an unfinished string")

    def array(self, path: Path) -> None:
        self.at += 1
        index = 0
        while self.skip_blank() and self.text[self.at] != "]":
            if self.text[self.at] == ",":
                self.at += 1
                continue
            self.mark((*path, index), self.at)
            self.value((*path, index))
            index += 1
        self.at += 1

    def inline_table(self, path: Path) -> None:
        self.at += 1
        while self.skip_blank() and self.text[self.at] != "}":
            if self.text[self.at] == ",":
                self.at += 1
                continue
            self.entry(path)
        self.at += 1
