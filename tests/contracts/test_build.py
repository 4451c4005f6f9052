"""The checked-in artifacts are what the sources and the named npm packages give, byte for byte."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from x402.mechanisms.evm import constants as official

from contracts.builds import artifact
from contracts.devnet import permit2_code

REPOSITORY = Path(__file__).resolve().parents[2]


def check(repository: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", "contracts/build.mjs", "--check"], cwd=repository, capture_output=True, text=True, check=False
    )


def test_artifacts_are_reproduced_byte_for_byte() -> None:
    answer = check(REPOSITORY)
    assert answer.returncode == 0, answer.stderr


def test_a_changed_source_and_an_artifact_that_differs_in_one_byte_are_named(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "contracts", tmp_path / "contracts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "node_modules").symlink_to(REPOSITORY / "node_modules")
    source = tmp_path / "contracts" / "src" / "UsdtLike.sol"
    source.write_text(source.read_text().replace("BASIS_POINTS_MAX = 20;", "BASIS_POINTS_MAX = 21;"))
    for contract in ("FareboxBatch", "Permit2"):
        path = tmp_path / "contracts" / "artifacts" / f"{contract}.json"
        text = path.read_text()
        place = text.index('"deployedBytecode": "0x') + 100
        path.write_text(text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :])
    answer = check(tmp_path)
    assert answer.returncode == 1
    for named in ("UsdtLike.json", "FareboxBatch.json", "Permit2.json"):
        assert named in answer.stderr
    assert "UsdcLike.json" not in answer.stderr


@pytest.mark.parametrize("contract", ["Permit2", "Multicall3"])
def test_public_bytecode_stands_in_the_package_that_the_artifact_names(contract: str) -> None:
    build = artifact(contract)
    package = REPOSITORY / "node_modules" / build["provenance"]["package"]
    described = json.loads((package / "package.json").read_text())
    assert (described["version"], described["license"]) == (build["provenance"]["version"], "MIT")
    assert f'hex"{build["deployedBytecode"][2:]}"' in (package / build["provenance"]["path"]).read_text()


def test_permit2_is_byte_for_byte_the_one_on_the_main_network() -> None:
    """Another package has a copy of what is deployed on Ethereum; ours comes from Uniswap's own."""
    package = REPOSITORY / "node_modules" / "@eth-optimism" / "contracts-bedrock"
    found = re.search(
        r'Permit2TemplateCode\s*=\s*hex"([0-9a-f]+)"', (package / "src/libraries/Preinstalls.sol").read_text()
    )
    assert found is not None
    assert permit2_code(1) == "0x" + found[1]


def shape(entry: dict[str, Any]) -> tuple[Any, ...]:
    """A function, event or error without the names of structs, which calldata does not carry."""

    def types(parameters: list[dict[str, Any]]) -> tuple[Any, ...]:
        return tuple((each["name"], each["type"], types(each.get("components", []))) for each in parameters)

    return (
        entry["type"],
        entry["name"],
        types(entry["inputs"]),
        tuple(each["type"] for each in entry.get("outputs", [])),
        entry.get("stateMutability"),
    )


@pytest.mark.parametrize(
    ("contract", "functions"),
    [
        ("X402ExactPermit2Proxy", official.X402_EXACT_PERMIT2_PROXY_ABI),
        ("X402ExactPermit2Proxy", official.X402_EXACT_PERMIT2_PROXY_SETTLE_WITH_PERMIT_ABI),
        ("X402UptoPermit2Proxy", official.X402_UPTO_PERMIT2_PROXY_ABI),
        ("X402UptoPermit2Proxy", official.X402_UPTO_PERMIT2_PROXY_SETTLE_WITH_PERMIT_ABI),
        ("UsdcLike", official.TRANSFER_WITH_AUTHORIZATION_VRS_ABI),
        ("UsdcLike", official.TRANSFER_WITH_AUTHORIZATION_BYTES_ABI),
        ("UsdcLike", official.AUTHORIZATION_STATE_ABI),
        ("UsdcLike", official.EIP2612_NONCES_ABI),
    ],
)
def test_functions_are_those_that_the_official_client_knows(contract: str, functions: list[dict[str, Any]]) -> None:
    def unnamed(entry: dict[str, Any]) -> tuple[Any, ...]:
        # Getters of public mappings need not name their parameters alike.
        kind, name, inputs, outputs, mutability = shape(entry)
        return (kind, name, tuple(each[1:] for each in inputs), outputs, mutability)

    ours = {unnamed(entry) for entry in artifact(contract)["abi"] if entry["type"] == "function"}
    assert functions
    for function in functions:
        assert unnamed(function) in ours


@pytest.mark.parametrize(
    ("contract", "official_name"),
    [("X402ExactPermit2Proxy", "x402ExactPermit2ProxyABI"), ("X402UptoPermit2Proxy", "x402UptoPermit2ProxyABI")],
)
def test_proxies_have_the_functions_events_and_errors_of_the_official_ones(contract: str, official_name: str) -> None:
    program = f'import {{ {official_name} as abi }} from "@x402/evm"; console.log(JSON.stringify(abi))'
    printed = subprocess.run(
        ["node", "--input-type=module", "-e", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    theirs = {shape(entry) for entry in json.loads(printed.stdout)}
    # Thrown by the official constructor only; ours has no constructor.
    theirs.discard(("error", "InvalidPermit2Address", (), (), None))
    assert {shape(entry) for entry in artifact(contract)["abi"]} == theirs
