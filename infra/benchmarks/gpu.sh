#!/usr/bin/env bash
# All measurements on one H100 or H200 in one call, without a network; see gpu.py for the options.
#
#   bash infra/benchmarks/gpu.sh [--wheels FOLDER] [--limit SECONDS] [--json FILE] [--continue] [--part NAME ...]
#
# --wheels   packages from wheels.sh; they are installed into build/benchmarks/site and come before the
#            interpreter's own. Without it, the interpreter has all packages already.
# PYTHON     the interpreter; by default python3. It has a torch of its own if the wheels do not contain one.

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-python3}"
SITE="$ROOT/build/benchmarks/site"
refuse() { printf 'gpu.sh: %s\n' "$*" >&2; exit 2; }

if [ "${1-}" = --wheels ]; then
    [ -d "${2-}" ] || refuse "--wheels ${2-}: no such folder; infra/benchmarks/wheels.sh fills one"
    wheels="$(cd "$2" && pwd)"
    shift 2
    compgen -G "$wheels/*.whl" >/dev/null || refuse "--wheels $wheels: no wheels in it; infra/benchmarks/wheels.sh fills it"
    if [ "$(cat "$SITE/complete" 2>/dev/null)" != "$(ls "$wheels")" ]; then
        rm -rf "$SITE"
        "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile \
            --target "$SITE" "$wheels"/*.whl
        ls "$wheels" >"$SITE/complete"
    fi
    export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$ROOT/infra/benchmarks:$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# Compiled once for several parts.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$ROOT/build/benchmarks/inductor}"
cd "$ROOT"
exec "$PYTHON" infra/benchmarks/gpu.py --spent "$SECONDS" "$@"
