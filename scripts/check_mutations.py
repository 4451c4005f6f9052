#!/usr/bin/env python3
"""Would the tests notice? Breaks the code that moves money in one small way at a time, and runs the tests that must fail.

Each mutation is applied to a copy of the tree; the tests named with it run there until one fails. One that no test notices is
a hole in the tests, not in the code. Prints a table or, with --json, one line; exits 1 if a mutation survives, or does not
apply any more because the code it is about has changed: then change it here.

Usage: .venv/bin/python scripts/check_mutations.py [NAME…] [--json] [--jobs N] [--look]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
COPIED = ("payments", "gateway", "contracts", "agents_sdk", "tests", "scripts", "pyproject.toml")
TIMEOUT_S = 600
_SECONDS = itertools.count(1_700_000_000)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the tests said of a mutation: `noticed`, `survived`, `not run`, or `gone` if it does not apply any more."""

    name: str
    path: str
    outcome: str
    seconds: float
    noticed_by: str


def main() -> int:
    """Run the mutations and say by the exit code whether all were noticed."""
    parser = argparse.ArgumentParser(description="Break the code that moves money, and see whether the tests notice.")
    parser.add_argument("names", nargs="*", help="mutations whose names contain one of these; all without any")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--look", action="store_true", help="run no test: only see whether they still apply")
    arguments = parser.parse_args()
    chosen = [each for each in MUTATIONS if not arguments.names or any(name in each.name for name in arguments.names)]
    if arguments.look:
        gone = [
            f"{each.name}: occurs {count} times in {each.path}"
            for each in chosen
            if (count := occurrences(each, ROOT)) != 1
        ]
        print("\n".join(gone or [f"all {len(chosen)} mutations apply"]))
        return 1 if gone else 0
    with tempfile.TemporaryDirectory(prefix="farebox-mutations-") as folder:
        verdicts = run_all(chosen, Path(folder), arguments.jobs, quiet=arguments.json)
    survivors = [verdict.name for verdict in verdicts if verdict.outcome != "noticed"]
    if arguments.json:
        rows = [asdict(verdict) for verdict in verdicts]
        print(json.dumps({"mutations": len(verdicts), "survivors": survivors, "rows": rows, "ok": not survivors}))
    else:
        print(f"{len(verdicts) - len(survivors)} of {len(verdicts)} mutations were noticed")
    return 1 if survivors or not verdicts else 0


class NotRun(Exception):
    """Tests could not be run; says what pytest said."""


def run_all(mutations: Sequence[Mutation], folder: Path, jobs: int, *, quiet: bool) -> list[Verdict]:
    """All of them, several at once, each in a tree of its own."""
    trees: queue.Queue[Path] = queue.Queue()
    for number in range(jobs):
        trees.put(copy_tree(folder / str(number)))

    def run(mutation: Mutation) -> Verdict:
        tree = trees.get()
        try:
            verdict = check(mutation, tree)
        finally:
            trees.put(tree)
        if not quiet:
            print(f"{verdict.outcome:<9} {verdict.seconds:6.1f} s  {verdict.name:<55} {verdict.noticed_by}", flush=True)
        return verdict

    with ThreadPoolExecutor(jobs) as workers:
        return list(workers.map(run, mutations))


def copy_tree(to: Path) -> Path:
    """A copy of what tests import; what is large and never mutated is linked."""
    to.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)
    for name in ("node_modules", "package.json", "package-lock.json"):
        (to / name).symlink_to(ROOT / name)
    return to


def check(mutation: Mutation, tree: Path) -> Verdict:
    """Break one thing, run the tests that must notice, and mend it again."""
    started = time.monotonic()
    path = tree / mutation.path
    original = path.read_text()
    if original.count(mutation.old) != 1:
        return Verdict(
            mutation.name, mutation.path, "gone", 0.0, f"its text occurs {original.count(mutation.old)} times"
        )
    write(path, original.replace(mutation.old, mutation.new))
    try:
        noticed_by = first_failure(tree, mutation.tests)
        outcome = "noticed" if noticed_by else "survived"
    except NotRun as not_run:
        outcome, noticed_by = "not run", str(not_run)
    finally:
        write(path, original)
    return Verdict(mutation.name, mutation.path, outcome, round(time.monotonic() - started, 1), noticed_by or "")


def occurrences(mutation: Mutation, tree: Path) -> int:
    """How often the code that a mutation is about is there; it must be once."""
    return (tree / mutation.path).read_text().count(mutation.old)


def write(path: Path, text: str) -> None:
    """Change a file so that Python sees it: compiled modules are told apart by the second and the size of their source."""
    path.write_text(text)
    changed_at = next(_SECONDS)
    os.utime(path, (changed_at, changed_at))


def first_failure(tree: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails; None if all pass.

    Raises:
        NotRun: The tests could not be run at all, as with code that cannot be read.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONPYCACHEPREFIX": str(tree / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode != 1 or not failed:
        raise NotRun(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}".strip())
    return failed[0].split()[1].rpartition("/")[2]


if __name__ == "__main__":
    sys.exit(main())
