"""The checked-in builds of the contracts; `contracts/build.mjs` writes them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

_DIRECTORY = Path(__file__).resolve().parent / "artifacts"


@functools.cache
def artifact(contract: str) -> dict[str, Any]:
    """The build of a contract, such as ``"UsdcLike"``: ABI, storage layout, creation and runtime code."""
    content: dict[str, Any] = json.loads((_DIRECTORY / f"{contract}.json").read_text())
    return content
