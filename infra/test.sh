#!/usr/bin/env bash
# Format, lint, types and tests.
#
#   bash infra/test.sh              the default tests: those that need no expensive fixture (tests/support/tiers.py)
#   bash infra/test.sh --all        everything that this machine can run
#   bash infra/test.sh -k shards    further arguments go to pytest; types are not checked then
EXTRAS="[test]"
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

tier=default
if [ "${1-}" = "--all" ]; then
    tier=all
    shift
fi
failed=() skipped=()
check() { # NAME COMMAND...
    local name="$1"
    shift
    if "$@"; then say "$name: passed"; else failed+=("$name"); say "$name: FAILED"; fi
}

mkdir -p build
pyright_pid=""
# pyright is a Node program; its Python package downloads Node if it is not installed.
if [ $# -gt 0 ]; then
    skipped+=("types: checked only without arguments for pytest")
elif pyright --version >/dev/null 2>&1; then
    pyright >build/pyright.log 2>&1 &  # in parallel with the tests, which do not use all of the CPU time
    pyright_pid=$!
else
    skipped+=("types: pyright cannot download Node here")
fi
check "format" ruff format --check .
check "lint" ruff check .
if [ "$tier" = all ]; then
    command -v chromium >/dev/null && command -v chromedriver >/dev/null ||
        skipped+=("the browser tests: no chromium with chromedriver (apt-get install chromium chromium-driver)")
    PATH="$PATH:/usr/sbin" command -v sshd pdsh ip slurmctld munged >/dev/null && [ "$(id -u)" -eq 0 ] ||
        skipped+=("tests of one or both clusters: they need root and openssh-server, pdsh, iproute2, slurm-wlm, munge")
    command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 ||
        skipped+=("the tests of the team server: no PostgreSQL (apt-get install postgresql)")
    command -v systemd-analyze >/dev/null || skipped+=("the check of the systemd units: no systemd-analyze")
    ls runs/digits/evaluation/step-*/*.json >/dev/null 2>&1 ||
        skipped+=("the quality of the demo's digits: no finished demo here (bash infra/demo.sh)")
fi
[ ${#skipped[@]} -eq 0 ] || printf 'skipped: %s\n' "${skipped[@]}"
[ ${#failed[@]} -eq 0 ] || say "failed before the tests: ${failed[*]}"

# Tests that share a server or a run stay in one process (tests/support/scheduling.py). With more busy processes
# than cores, Prefect's SQLite database was locked so long that its automations lost events.
workers=$(($(nproc) < 4 ? $(nproc) : 4))
# Each process gets its share of the cores: more threads of torch would compete with the other processes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) / workers))}"
# Many tests wait most of the time: one more process has those alone.
status=0
python -m pytest --numprocesses "$((workers + 1))" --waiting-process --no-loadscope-reorder --tier "$tier" "$@" || status=$?
if [ -n "$pyright_pid" ]; then
    check "types" wait "$pyright_pid"
    tail -n 20 build/pyright.log
fi
[ ${#failed[@]} -eq 0 ] || exit 1
exit "$status"
