# Sourced by the scripts here: finds Python and Node, and installs what the lock files name. Quick when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV_VERSION=0.13.8

say() { printf '\033[2m%s\033[0m\n' "$*" >&2; }
stop() { printf '%s\n' "$*" >&2; exit 1; }

find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3 python; do
    if command -v "$name" >/dev/null &&
      "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  stop "Farebox needs Python 3.11, 3.12 or 3.13, and none was found on PATH. Install one from python.org or your system's packages."
}

stamp_of() { cat "$@" | cksum | cut -d' ' -f1; }

setup_python() {
  local wanted python
  wanted="$UV_VERSION $(stamp_of uv.lock pyproject.toml)"
  if [ "$(cat .venv/farebox-stamp 2>/dev/null)" = "$wanted" ]; then return; fi
  python=$(find_python)
  if [ ! -x .venv/bin/python ]; then
    say "Making a virtual environment with $("$python" --version) …"
    "$python" -m venv .venv ||
      stop "Python's venv module does not work here. On Debian and Ubuntu: apt-get install python3-venv"
  fi
  say "Installing the Python packages that uv.lock names …"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
  .venv/bin/uv sync --quiet --frozen --all-extras --python .venv/bin/python
  echo "$wanted" > .venv/farebox-stamp
}

# $1: "anvil" when only the local chain is needed (then an `anvil` on PATH does), "all" for the contract tools as well.
setup_node() {
  local wanted major
  if [ "$1" = anvil ] && command -v anvil >/dev/null; then return; fi
  wanted=$(stamp_of package-lock.json)
  if [ "$(cat node_modules/farebox-stamp 2>/dev/null)" = "$wanted" ]; then return; fi
  command -v node >/dev/null && command -v npm >/dev/null ||
    stop "Farebox needs Node.js 20 or newer with npm for its local chain (Anvil). Install it from nodejs.org or your system's packages."
  major=$(node -p 'process.versions.node.split(".")[0]')
  [ "$major" -ge 20 ] || stop "Farebox needs Node.js 20 or newer; this is $(node --version)."
  say "Installing the local chain and the contract tools that package-lock.json names …"
  npm ci --loglevel=error --ignore-scripts --no-fund --no-audit >&2 ||
    stop "npm could not install them; its message above says why. An \`anvil\` from getfoundry.sh on PATH is enough for the demo."
  echo "$wanted" > node_modules/farebox-stamp
}
