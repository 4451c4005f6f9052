"""Where each key of a TOML document stands."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway import toml_places

DOCUMENT = '''
# a comment with = and [brackets]
"quoted.key" = 'it''s' # not valid, replaced below
title = """a [table] = 1
second "line" \\""" """
dotted.name.here = 1979-05-27 07:32:00
[a.b]
list = [ # comment ]
  1, "two ]", [3, {x = 1, "y z" = 'q'}],
]
[[items]]
n = 1
[[items]]
n = 2
[items.sub]
deep = true
[[items.more]]
k = 0x1F
'''.replace("'it''s' # not valid, replaced below", "'its'")


def test_every_key_is_found_where_it_stands() -> None:
    tomllib.loads(DOCUMENT)
    lines = DOCUMENT.split("\n")
    found = toml_places.places(DOCUMENT)
    expected = {
        ("quoted.key",): '"quoted.key"',
        ("title",): "title",
        ("dotted", "name", "here"): "dotted",
        ("a", "b"): "[a.b]",
        ("a", "b", "list"): "list",
        ("a", "b", "list", 1): '"two ]"',
        ("a", "b", "list", 2, 1, "x"): "x = 1",
        ("a", "b", "list", 2, 1, "y z"): '"y z"',
        ("items", 0, "n"): "n = 1",
        ("items", 1, "n"): "n = 2",
        ("items", 1, "sub"): "[items.sub]",
        ("items", 1, "sub", "deep"): "deep",
        ("items", 1, "more", 0, "k"): "k = 0x1F",
    }
    for path, text in expected.items():
        line, column = found[path]
        assert lines[line - 1][column - 1 :].startswith(text), path


VALUES = st.recursive(
    st.sampled_from(
        ["1", "-2.5e3", "true", "inf", "07:32:00", '"a # b"', "'c, ]'", '"\\"}"', '"""\n[x]\n"""', "'''\n=\n'''"]
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]"),
        st.lists(inner, max_size=3).map(
            lambda items: "{" + ", ".join(f"k{i} = {item}" for i, item in enumerate(items)) + "}"
        ),
    ),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.sampled_from(["[t{}]", "[[arr]]", "[arr2.t{}]", "# note"]), VALUES), max_size=6))
def test_every_value_of_a_valid_document_has_a_place(parts: list[tuple[str, str]]) -> None:
    text = "\n".join(f"{header.format(i)}\nv{i} = {value}" for i, (header, value) in enumerate(parts))
    found = toml_places.places(text)

    def walk(value: Any, path: tuple[str | int, ...]) -> None:
        assert path == () or path in found or any(known[: len(path)] == path for known in found)
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, (*path, key))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                walk(item, (*path, index))

    walk(tomllib.loads(text), ())
