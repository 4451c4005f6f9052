"""The `farebox` command in processes of its own: what it imports, a base install without the server, the unexpected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.commands.shared import SERVER_MODULES
from tests.gateway.command_line import FILE


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FAREBOX_")} | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False, timeout=60
    )


def test_the_command_itself_imports_nothing_of_the_server() -> None:
    code = "import sys, gateway.cli; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert not SERVER_MODULES & set(json.loads(done.stdout.replace("'", '"')))


BASE_INSTALL = """
import sys
for name in {modules!r}:
    sys.modules[name] = None  # what Python does for a module that is not installed
sys.argv = ["farebox", *{arguments!r}]
from gateway.cli import main
main()
"""


@pytest.mark.parametrize("arguments", [["serve"], ["config", "check"], ["keys", "list"], ["doctor"], ["explain"]])
def test_a_missing_extra_is_named(arguments: list[str]) -> None:
    done = python(BASE_INSTALL.format(modules=sorted(SERVER_MODULES), arguments=arguments))
    assert done.returncode == 1
    assert "pip install 'farebox[gateway]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_base_install_has_help_and_the_agent() -> None:
    for arguments in (["--help"], ["ask", "--help"], ["config", "--help"], ["--version"]):
        done = python(BASE_INSTALL.format(modules=sorted(SERVER_MODULES), arguments=arguments))
        assert done.returncode == 0, done.stderr


def test_what_nobody_expected_is_a_sentence_too() -> None:
    code = "import sys, gateway.cli as c\nsys.argv = ['farebox']\ndef app(): raise RuntimeError('boom')\nc.app = app\nc.main()"
    done = python(code)
    assert done.returncode == 1
    assert "RuntimeError: boom" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in python(code, FAREBOX_DEBUG="1").stderr


def test_ids_in_pipes_stand_in_one_piece() -> None:
    code = (
        "from gateway.commands.shared import out, table\nshown = table('id', 'transaction', 'why')\n"
        "shown.add_row('refund:0x' + 'ab' * 32 + ':0:2', '0x' + 'cd' * 32, 'because ' * 20)\nout.print(shown)"
    )
    heads, row = python(code, COLUMNS="80").stdout.splitlines()
    assert heads.split() == ["id", "transaction", "why"]
    assert row.split()[:2] == ["refund:0x" + "ab" * 32 + ":0:2", "0x" + "cd" * 32]


def test_a_real_process_creates_a_key_from_its_environment(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "keys", "create", "agent", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "FAREBOX_DATA_DIR": str(tmp_path / "d"), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["key"].startswith("fbk_")
    assert (tmp_path / "d" / "farebox.db").exists()


def test_who_has_read_enough_of_an_export_is_told_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "FAREBOX_DATA_DIR": str(tmp_path / "d"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "gateway.cli"]
    subprocess.run([*command, "keys", "create", "a", "--fund-usd", "1"], env=env, cwd=tmp_path, check=True, timeout=60)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*command, "ledger", "export"], env=env, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_gateway_says_where_it_listens_and_nothing_of_its_schema(tmp_path: Path) -> None:
    (tmp_path / "farebox.toml").write_text(FILE)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "gateway.cli", "serve", "--port", "0"]
    with subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(json.loads(line))
                if lines[-1]["event"] == "listening":
                    break
        finally:
            process.terminate()
    assert lines[-1]["url"].startswith("http://127.0.0.1:")
    assert not lines[-1]["url"].endswith(":0")
    assert [line["event"] for line in lines if "alembic" in line["event"] or "upgrade" in line["event"]] == []
