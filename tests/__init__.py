"""The tests, and what they spare the hundreds of processes that they start and the thousands of clients that they make.

Where Python is told to write no bytecode, each process would compile all its imports, which is half of what starting one costs:
it is written then to where it is out of the way. And nobody here speaks TLS, but every HTTP client would read all certificates
first, which takes 30 ms: they are looked for where there are none.
"""

import json
import os
import sys
from pathlib import Path

_BEFORE = "ENVIRONMENT_BEFORE_THE_TESTS"
AS_IT_WAS: dict[str, str] = json.loads(os.environ.setdefault(_BEFORE, json.dumps(dict(os.environ))))
"""The environment for programs that do go out to the network; workers get it from the process that started them."""

os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)

if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(sys.prefix) / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
