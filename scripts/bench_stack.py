#!/usr/bin/env python3
"""What a stack costs to have: memory of the gateway, how soon it is ready, how long the demo takes.

Prints one JSON line. Memory is the gateway process's resident set in MB (10^6 bytes): idle after the start, and idle again
after some requests, which load the tokenizer. Exits 1 if a target is missed: the idle gateway in 180 MB, the demo in 60 s once
everything is installed, and web3 nowhere in the serving process.

Usage: .venv/bin/python scripts/bench_stack.py [--no-demo]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
from rich.console import Console

from gateway.dev.stack import Stack, running

ROOT = Path(__file__).resolve().parents[1]
IDLE_MB_MAX = 180
DEMO_S_MAX = 60
DEMO_TIMEOUT_S = 300
IDLE_S = 3.0
REQUESTS = 200
SERVING_MODULES = ("gateway.app", "gateway.services", "gateway.commands.serving")
FOREIGN = ("web3", "eth_account")
FOREIGN_LIBRARIES = ("ckzg", "cytoolz", "bitarray")
"""Compiled parts that only web3 and eth-account bring along: mapped memory shows them even if they were imported late."""
QUESTION = {
    "model": "deepseek-v4-flash",
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "max_tokens": 64,
}


def main() -> int:
    """Measure, print, and say by the exit code whether all targets are met."""
    parser = argparse.ArgumentParser(description="Memory of the gateway, time to ready, time of the demo.")
    parser.add_argument("--no-demo", action="store_true", help="leave the demo out")
    with_demo = not parser.parse_args().no_demo
    with Console(stderr=True).status("starting a stack …") as status:
        result = measure_stack()
        if with_demo:
            status.update("running the demo …")
            result["demo_s"] = measure_demo()
            result["demo_s_max"] = DEMO_S_MAX
    missed = [
        name
        for name, met in (
            ("idle memory", max(result["idle_mb"], result["idle_after_requests_mb"]) <= IDLE_MB_MAX),
            ("web3", not result["foreign_modules"] and not result["foreign_libraries"]),
            ("demo", not with_demo or result["demo_s"] <= DEMO_S_MAX),
        )
        if not met
    ]
    print(json.dumps(result | {"missed": missed, "ok": not missed}))
    return 1 if missed else 0


def measure_stack() -> dict[str, Any]:
    """Start a development stack twice on one data directory and look at its gateway."""
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder:
        began = time.monotonic()
        with running(Path(folder)) as (stack, gateway):
            ready_s = time.monotonic() - began
            time.sleep(IDLE_S)
            idle_mb = resident_mb(gateway.pid)
            _ask(stack)
            time.sleep(IDLE_S)
            after_mb = resident_mb(gateway.pid)
            libraries = mapped(gateway.pid, FOREIGN_LIBRARIES)
        began = time.monotonic()
        with running(Path(folder)):
            again_s = time.monotonic() - began
    return {
        "idle_mb": round(idle_mb, 1),
        "idle_after_requests_mb": round(after_mb, 1),
        "idle_mb_max": IDLE_MB_MAX,
        "requests": REQUESTS,
        "foreign_modules": imported(SERVING_MODULES, FOREIGN),
        "foreign_libraries": libraries,
        "stack_ready_s": round(ready_s, 2),
        "stack_ready_again_s": round(again_s, 2),
    }


def measure_demo() -> float:
    """Seconds that `scripts/demo --json` takes once everything is installed.

    Raises:
        RuntimeError: If the demo fails.
    """
    subprocess.run(["bash", "-c", "source scripts/_setup.sh && setup_python && setup_node anvil"], cwd=ROOT, check=True)
    began = time.monotonic()
    demo = subprocess.run(
        ["scripts/demo", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=DEMO_TIMEOUT_S, check=False
    )
    seconds = time.monotonic() - began
    if demo.returncode != 0 or json.loads(demo.stdout)["ok"] is not True:
        raise RuntimeError(f"the demo failed: {demo.stderr[-2000:]}")
    return round(seconds, 1)


def resident_mb(pid: int) -> float:
    """A process's resident memory, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(f"the kernel says nothing about the memory of process {pid}")


def mapped(pid: int, names: tuple[str, ...]) -> list[str]:
    """Which of these libraries a process has mapped."""
    files = {Path(line.split()[-1]) for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if ".so" in line}
    return [name for name in names if any(name in file.parts or file.name.startswith(name) for file in files)]


def imported(modules: tuple[str, ...], foreign: tuple[str, ...]) -> list[str]:
    """Which of the `foreign` packages come with an import of `modules`."""
    program = f"import sys, {', '.join(modules)}; print(*sorted({set(foreign)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def _ask(stack: Stack) -> None:
    """Quotes, and answers paid by API key, streamed and not."""
    with httpx.Client(base_url=stack.gateway_url, timeout=30) as http:
        for index in range(REQUESTS):
            headers = {"authorization": f"Bearer {stack.api_key}"} if index % 2 else {}
            answer = http.post("/v1/chat/completions", json=QUESTION | {"stream": index % 4 == 1}, headers=headers)
            if answer.status_code != (200 if index % 2 else 402):
                raise RuntimeError(f"unexpected answer {answer.status_code}: {answer.text[:300]}")


if __name__ == "__main__":
    sys.exit(main())
