"""The list of mutations stays about the code as it is; `scripts/check_mutations.py` itself takes minutes and runs by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_mutations.py"


def test_every_mutation_still_applies() -> None:
    looked = subprocess.run([sys.executable, SCRIPT, "--look"], capture_output=True, text=True, check=False)
    assert looked.returncode == 0, f"change scripts/mutations with the code that they break:\n{looked.stdout}"
    assert "mutations apply" in looked.stdout


def test_a_broken_ledger_is_noticed() -> None:
    """One of them, so that what runs by hand is known to run."""
    broken = "a debit does not look at the balance"
    checked = subprocess.run([sys.executable, SCRIPT, broken], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.startswith("noticed")
