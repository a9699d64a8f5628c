#!/usr/bin/env bash
# Everything this machine can test: format, lint, types, tests. Arguments go to pytest.
#
#   bash infra/test.sh            all of it, under 15 minutes on two cores with the installation
#   bash infra/test.sh -k flows   the same with fewer tests
EXTRAS="[test]"
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

failed=() skipped=()
check() { # NAME COMMAND...
    local name="$1"
    shift
    if "$@"; then say "$name: passed"; else failed+=("$name"); say "$name: FAILED"; fi
}

check "format" ruff format --check .
check "lint" ruff check .
# pyright is a Node program that its Python package fetches when it is not there yet.
if pyright --version >/dev/null 2>&1; then
    check "types" pyright
else
    skipped+=("types: pyright cannot fetch Node here")
fi
command -v chromium >/dev/null && command -v chromedriver >/dev/null ||
    skipped+=("the browser tests: no chromium with chromedriver (apt-get install chromium chromium-driver)")
[ ${#skipped[@]} -eq 0 ] || printf 'skipped: %s\n' "${skipped[@]}"
[ ${#failed[@]} -eq 0 ] || say "failed before the tests: ${failed[*]}"

status=0
python -m pytest "$@" || status=$?
[ ${#failed[@]} -eq 0 ] || exit 1
exit "$status"
