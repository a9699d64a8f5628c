#!/usr/bin/env bash
# Everything this machine can test: format, lint, types, tests. Arguments go to pytest.
#
#   bash infra/test.sh            all of it
#   bash infra/test.sh -k flows   format, lint and those tests
EXTRAS="[test]"
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

failed=() skipped=()
check() { # NAME COMMAND...
    local name="$1"
    shift
    if "$@"; then say "$name: passed"; else failed+=("$name"); say "$name: FAILED"; fi
}

mkdir -p build
pyright_pid=""
check "format" ruff format --check .
check "lint" ruff check .
# pyright is a Node program that its Python package fetches when it is not there yet.
if [ $# -gt 0 ]; then
    skipped+=("types: they are checked when all is")
elif pyright --version >/dev/null 2>&1; then
    pyright >build/pyright.log 2>&1 &  # beside the tests, which leave some of a core
    pyright_pid=$!
else
    skipped+=("types: pyright cannot fetch Node here")
fi
command -v chromium >/dev/null && command -v chromedriver >/dev/null ||
    skipped+=("the browser tests: no chromium with chromedriver (apt-get install chromium chromium-driver)")
PATH="$PATH:/usr/sbin" command -v sshd pdsh ip slurmctld munged >/dev/null && [ "$(id -u)" -eq 0 ] ||
    skipped+=("the clusters, or one of them: they want root, and openssh-server, pdsh, iproute2, slurm-wlm, munge")
command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 ||
    skipped+=("the team's server: no PostgreSQL (apt-get install postgresql)")
command -v systemd-analyze >/dev/null || skipped+=("the check of the systemd units: no systemd-analyze")
ls runs/digits/evaluation/step-*/*.json >/dev/null 2>&1 ||
    skipped+=("how good the demo's digits are: no finished demo here (bash infra/demo.sh)")
[ ${#skipped[@]} -eq 0 ] || printf 'skipped: %s\n' "${skipped[@]}"
[ ${#failed[@]} -eq 0 ] || say "failed before the tests: ${failed[*]}"

# Tests that share a server or a run stay together in one process (tests/conftest.py). With more processes than
# cores, Prefect's SQLite was locked so long that its automations lost events.
workers=$(($(nproc) < 4 ? $(nproc) : 4))
# Each has its share of the cores: torch's threads would spin for those of the others.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) / workers))}"
status=0
python -m pytest --numprocesses "$workers" --no-loadscope-reorder "$@" || status=$?
if [ -n "$pyright_pid" ]; then
    check "types" wait "$pyright_pid"
    tail -n 20 build/pyright.log
fi
[ ${#failed[@]} -eq 0 ] || exit 1
exit "$status"
