"""The shape of the code: who imports whom, how long a file may get, and what a process must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "gateway": {"gateway", "payments"},
    "payments": {"payments", "contracts"},
    "contracts": {"contracts"},
    "agents_sdk": {"agents_sdk"},
}
MAY_IMPORT_FOR_DEVELOPMENT = {
    "gateway/dev": {"contracts"},
    "gateway/commands/agents.py": {"agents_sdk"},
    "gateway/commands/ask.py": {"agents_sdk"},
    "gateway/commands/channel.py": {"agents_sdk"},
    "gateway/commands/wallet.py": {"agents_sdk"},
}
LINES_MAX = 450
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """The first part of every module named in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute, or their direction cannot be seen"
            yield (node.module or "").partition(".")[0]


def allowed(module: str) -> set[str]:
    own = MAY_IMPORT[module.partition("/")[0]]
    more = (extra for place, extra in MAY_IMPORT_FOR_DEVELOPMENT.items() if f"{module}/".startswith(f"{place}/"))
    return own.union(*more)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )


def test_imports_go_one_way() -> None:
    assert len(MODULES) > 100
    wrong = [
        f"{module} imports {name}"
        for path in MODULES
        for module in [path.relative_to(ROOT).as_posix()]
        for name in sorted(set(imported(path.read_text())))
        if name in {*MAY_IMPORT, "tests", "scripts"} - allowed(module)
    ]
    assert wrong == []


def test_files_stay_short() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > LINES_MAX} == {}


def test_every_module_says_what_it_is_for() -> None:
    bare = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        # Empty `__init__.py` files only mark a folder as a package.
        if tree.body and ast.get_docstring(tree) is None:
            bare.append(path.relative_to(ROOT).as_posix())
    assert bare == []


def test_the_serving_process_loads_neither_web3_nor_a_wallet_nor_a_client() -> None:
    """Each costs tens of megabytes; a gateway signs with libsecp256k1 and talks over aiohttp."""
    unwanted = [
        "web3",
        "eth_account",
        "eth_keys",
        "httpx",
        "x402",
        "requests",
        "contracts.devnet",
        "contracts.anvil",
        "agents_sdk",
        "gateway.dev",
    ]
    done = python(f"import sys, gateway.app; print([name for name in {unwanted!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def installed_with(requirements: list[str]) -> set[str]:
    """The distributions that these requirements bring, in their normal form."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        key = (_normal(requirement.name), frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        try:
            needs = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in {"", *key[1]}):
                waiting.append(need)
    return {name for name, _ in found}


def _normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-").replace(".", "-")


@pytest.fixture(scope="module")
def server_only() -> list[str]:
    """The modules that only `farebox[gateway]` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = installed_with(project["dependencies"])
    extra = installed_with(project["optional-dependencies"]["gateway"]) - base
    modules = [
        module
        for module, distributions in metadata.packages_distributions().items()
        if {_normal(distribution) for distribution in distributions} <= extra
    ]
    assert {"starlette", "uvicorn", "orjson", "sqlmodel", "coincurve"} <= set(modules)
    return sorted(modules)


BLOCKED = """
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"{{name}} is not in the base install", name=name)
sys.meta_path.insert(0, Blocker())
for name in {wanted!r}:
    importlib.import_module(name)
"""


def test_the_base_install_has_the_agent_and_the_command(server_only: list[str]) -> None:
    agent = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in MODULES]
    wanted = [name.removesuffix(".__init__") for name in agent if name.startswith("agents_sdk")] + ["gateway.cli"]
    done = python(BLOCKED.format(modules=server_only, wanted=wanted))
    assert done.returncode == 0, done.stderr


def test_the_server_is_what_the_base_install_lacks(server_only: list[str]) -> None:
    """That the test above blocks something."""
    done = python(BLOCKED.format(modules=server_only, wanted=["gateway.app"]))
    assert "is not in the base install" in done.stderr
