#!/usr/bin/env bash
# The Python environment of this project: find it, create it or complete it.
#
# Sourced by demo.sh and test.sh, which set EXTRAS ("" or "[test]"); run directly, it creates .venv.
# Sets ROOT, changes to it, and puts the environment's commands first on PATH.
#
#   PYTHON           the Python >= 3.11 that creates .venv; by default the first on PATH
#   FM_ENVIRONMENT   an existing environment to use unchanged instead of .venv
#
# pip uses its own configuration as usual (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf, ...), except for settings that
# would install elsewhere: PIP_USER, PIP_TARGET, PIP_PREFIX and PIP_ROOT are ignored.

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
EXTRAS="${EXTRAS-}"

say() { printf '%s\n' "$@"; }
refuse() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 2; }

# No usage data is sent to anyone, and the user's own Prefect settings are neither used nor changed.
unset_prefect() { local name; for name in $(compgen -e PREFECT_ || true); do unset "$name"; done; }
unset_prefect
export DO_NOT_TRACK=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS=false \
    PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false \
    SE_AVOID_STATS=true

require_space() { # MiB, what for
    local free
    free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024))
    [ "$free" -ge "$1" ] || refuse "$free MiB free under $ROOT; $2 needs $1 MiB"
}

is_recent() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
        if is_recent "$name"; then command -v "$name"; return; fi
    done
    refuse "no Python >= 3.11 with its venv module found${PYTHON:+ at $PYTHON}; install one, or set PYTHON=/path/to/python3.11"
}

has_gpu() { [ -e /dev/nvidiactl ] || [ -e /dev/kfd ]; }

say_torch_build() {
    has_gpu && return
    cat <<'TEXT'
No GPU found. The default torch build is the CUDA build: several GB to download and to store, with its libraries.
The CPU build (0.2 GB) is sufficient here. If pip is not configured for it yet, stop now, look up PyTorch's
index of CPU builds (pytorch.org, "Get started", CPU), and run
    PIP_EXTRA_INDEX_URL=<that index> bash infra/demo.sh      (or infra/test.sh)
TEXT
}

installs_elsewhere() { # whether pip.conf has a setting that no option of pip takes back; prints it
    env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT .venv/bin/python -m pip --disable-pip-version-check config list 2>/dev/null |
        grep -E "^(global|install)\.(target|prefix|root)="
}

fingerprint() { cat infra/constraints.txt pyproject.toml <(printf '%s' "$ROOT") | sha256sum | cut -d' ' -f1; }

is_complete() {
    local stamp
    for stamp in ".venv/complete$EXTRAS" ".venv/complete[test]"; do
        [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] && return
    done
    return 1
}

highlights() { grep --line-buffered -oE '^ *Downloading .* MB\)|^Installing collected packages|^ERROR.*' | sed -u 's/^ */  /'; }

install() {
    local python log=.venv/install.log
    python="$(find_python)"
    mkdir -p .venv && exec 8>.venv/lock
    flock 8  # demo.sh and test.sh may run at the same time
    if is_complete; then exec 8>&-; return; fi
    if has_gpu; then require_space 12288 "the environment, with a CUDA build of torch,"
    else require_space 3072 "the environment, with a CPU build of torch,"; fi
    say_torch_build
    say "Installing into $ROOT/.venv with $("$python" --version); this happens once. pip's output: $log"
    is_recent .venv/bin/python || "$python" -m venv .venv
    if installs_elsewhere >"$log"; then
        refuse "pip.conf says $(paste -sd ' ' "$log"), so pip would not install into .venv; set PIP_CONFIG_FILE=/dev/null or change it"
    fi
    env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT PIP_USER=0 \
        .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off \
        --constraint infra/constraints.txt --editable ".$EXTRAS" > >(tee "$log" | highlights) 2>&1 ||
        { say "pip could not install the environment; see $log" >&2; exit 1; }
    [ -x .venv/bin/prefect ] || refuse "pip did not install into $ROOT/.venv; see $log"
    fingerprint >".venv/complete$EXTRAS"
    exec 8>&-
}

if [ -n "${FM_ENVIRONMENT-}" ]; then
    [ -x "$FM_ENVIRONMENT/bin/prefect" ] || refuse "FM_ENVIRONMENT=$FM_ENVIRONMENT has no bin/prefect"
    export PATH="$FM_ENVIRONMENT/bin:$PATH"
else
    is_complete || install
    export PATH="$ROOT/.venv/bin:$PATH"
fi
# The environment may be installed for another checkout, and PYTHONPATH may hold another package "flows": this
# checkout's modules take precedence.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
