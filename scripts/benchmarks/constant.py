"""The physical limit of a 402 on this machine: uvicorn with an application that answers the same bytes to everything."""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import uvicorn

from benchmarks.serving import wait_until_answering
from contracts.anvil import end_with_parent, free_port


@dataclass(frozen=True, slots=True)
class Constant:
    """A running constant: where it is, and its process id."""

    url: str
    pid: int


@contextlib.contextmanager
def running(status: int, headers: dict[str, str], body: bytes) -> Iterator[Constant]:
    """Answer every request with this, from a process of its own, until the end of the block."""
    port = free_port()
    answer = {"status": status, "headers": headers, "body": base64.b64encode(body).decode()}
    process = subprocess.Popen(
        [sys.executable, __file__, "--port", str(port)], stdin=subprocess.PIPE, text=True, preexec_fn=end_with_parent()
    )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(answer))
        process.stdin.close()
        url = f"http://127.0.0.1:{port}/"
        wait_until_answering(process, url)
        yield Constant(url, process.pid)
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    """Serve; what to answer comes as JSON from standard input."""
    parser = argparse.ArgumentParser(description="Answers the same to everything.")
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    answer = json.loads(sys.stdin.read())
    body = base64.b64decode(answer["body"])
    start = {
        "type": "http.response.start",
        "status": answer["status"],
        "headers": [(name.encode(), value.encode()) for name, value in answer["headers"].items()],
    }
    end = {"type": "http.response.body", "body": body}

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        await send(start)
        await send(end)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="off")
    return 0


if __name__ == "__main__":
    sys.exit(main())
