#!/usr/bin/env bash
# The complete pipeline on a new machine: environment, Prefect server and worker, deployments, and the flow
# train-digits on scikit-learn's handwritten digits. A second call continues, or verifies what is complete.
usage() {
    cat <<'TEXT'
usage: bash infra/demo.sh [--keep] [--stop] [--name NAME] [-- JSON]

  --keep        leave the Prefect server and worker running afterwards
  --stop        stop the server and worker of an earlier --keep, and exit
  --name NAME   name of the run; its directory is runs/NAME (default: digits)
  -- JSON       configuration to override, e.g. --name short -- '{"train": {"images": 20000}}'

Needs Python >= 3.11. Writes to .venv, runs and datasets only.
Exit status: 0 done, 2 an error that you can fix, 3 stopped and resumable, 1 anything else.
TEXT
}

set -euo pipefail
keep=false stop=false name="" overrides="{}"
while [ $# -gt 0 ]; do
    case "$1" in
        --keep) keep=true ;;
        --stop) stop=true ;;
        --name) name="${2-}"; shift ;;
        --help | -h) usage; exit 0 ;;
        --) overrides="${2-}"; shift $(($# - 1)) ;;
        *) printf 'demo.sh: %s is not an option; see --help\n' "$1" >&2; exit 2 ;;
    esac
    shift
done

# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

STATE="$ROOT/runs/.prefect"
CONFIG="$STATE/demo.yaml"
mkdir -p "$STATE" || refuse "cannot create $STATE; the demo writes below $ROOT"
exec 9>"$STATE/lock"
flock --nonblock 9 || refuse "another demo is running in $ROOT; wait for it or stop it"
export PREFECT_HOME="$STATE" PREFECT_WORKER_QUERY_SECONDS=2 PYTHONUNBUFFERED=1 COLUMNS=200
began=$SECONDS flow_run="" final=false watcher="" follower="" started=()

is_running() { # SERVICE: whether an earlier call left it running
    local pid
    pid="$(cat "$STATE/$1.pid" 2>/dev/null)" || return 1
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qE "prefect $1 start|infra/serve.sh"
}

start() { # SERVICE COMMAND...: in a session of its own, so that all of its processes can be ended
    local service="$1"
    shift
    # bash makes background processes ignore SIGINT, but Prefect's worker sends itself a SIGINT to exit.
    setsid env --default-signal=INT,QUIT "$@" >"$STATE/$service.log" 2>&1 </dev/null 9>&- &
    printf '%s' "$!" >"$STATE/$service.pid"
    started+=("$service")
}

stop_service() { # SERVICE: SIGTERM to its session, SIGKILL after 20 s
    local pid
    pid="$(cat "$STATE/$1.pid")"
    rm -f "$STATE/$1.pid"
    kill -TERM -- "-$pid" 2>/dev/null || return 0
    for _ in $(seq 100); do
        kill -0 -- "-$pid" 2>/dev/null || return 0
        sleep 0.2
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
}

free_port() { # 4200, or a free port if 4200 is in use
    python - <<'PYTHON'
import socket
for port in (4200, 0):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        print(probe.getsockname()[1])
        break
PYTHON
}

api() { # METHOD PATH [JSON]: a request to our server, with the password that serve.sh keeps
    API_AUTH="$(cat "$STATE/api-auth-$port" 2>/dev/null || true)" python - "$PREFECT_API_URL" "$@" <<'PYTHON'
import base64, os, sys, urllib.request
base, method, path, *body = sys.argv[1:]
data = body[0].encode() if body else None
secret = base64.b64encode(os.environ["API_AUTH"].encode()).decode()
headers = {"content-type": "application/json", "authorization": f"Basic {secret}"}
request = urllib.request.Request(base + path, data, headers, method=method)
print(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20).read().decode())
PYTHON
}

state_of_run() { # type, then message
    api GET "/flow_runs/$flow_run" | python -c 'import json, sys
state = json.load(sys.stdin)["state"]
print(state["type"], state["message"] or "", sep="\n")'
}

is_final() { case "$1" in COMPLETED | CANCELLED | FAILED | CRASHED) ;; *) return 1 ;; esac; }

cancel_run() { # the trainer saves and exits within Prefect's 30 s
    say "stopping the run; complete checkpoints are kept"
    api POST "/flow_runs/$flow_run/set_state" '{"state": {"type": "CANCELLING"}}' >/dev/null
    local outcome="" seconds=60
    while [ $seconds -gt 0 ]; do
        outcome="$(state_of_run)"
        case "$outcome" in *"to resume: "*) break ;; esac
        # The message that says how to resume is set after the state.
        if is_final "$(head -n 1 <<<"$outcome")" && [ $seconds -gt 12 ]; then seconds=12; fi
        seconds=$((seconds - 1))
        sleep 1
    done
    say "$(tail -n +2 <<<"$outcome")"
}

clean_up() {
    local status=$? service
    trap - EXIT INT TERM
    [ -z "$follower" ] || kill "$follower" 2>/dev/null || true
    [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
    [ -n "$flow_run" ] || flow_run="$(created_run)"
    [ -z "$flow_run" ] || $final || cancel_run || true
    if ! $keep || [ "$status" -eq 3 ]; then
        for service in worker server; do
            case " ${started[*]-} " in *" $service "*) stop_service "$service" ;; esac
        done
    fi
    exit "$status"
}

created_run() { sed -n 's/.*UUID: \([0-9a-f-]*\).*/\1/p' "$STATE/run.log" 2>/dev/null | head -n 1; }

wait_for_server() {
    for _ in $(seq 600); do
        api GET /health >/dev/null 2>&1 && return
        is_running server || break
        sleep 0.2
    done
    tail -n 20 "$STATE/server.log" >&2
    say "demo.sh: the Prefect server did not start; its log: $STATE/server.log" >&2
    exit 1
}

write_config() { # the preset overridden by --name and the JSON; prints the parameter for Prefect
    python - "$CONFIG" "$name" "$overrides" <<'PYTHON'
import json, sys
from pathlib import Path
from fm_core.config import dump_yaml, load_config, merge
from fm_core.errors import UserError
target, name, overrides = sys.argv[1:]
try:
    tree = json.loads(overrides)
    if not isinstance(tree, dict):
        raise UserError(f"after -- a JSON object of sections is expected, not {overrides}")
    tree = merge(tree, {"run": {"name": name}} if name else {})
    Path(target).write_text(dump_yaml(load_config("infra/configs/digits.yaml", tree)))
except json.JSONDecodeError as error:
    sys.exit(f"demo.sh: after -- JSON is expected, not {overrides} ({error})")
except UserError as error:
    sys.exit(f"demo.sh: {error}")
print(json.dumps(tree))
PYTHON
}

if $stop; then
    for service in worker server; do
        if is_running "$service"; then stop_service "$service" && say "stopped the Prefect $service"; fi
    done
    exit 0
fi

require_space 1024 "the demo"
parameter="$(write_config)" || exit 2
rm -f "$STATE/run.log"
trap clean_up EXIT
trap 'exit 3' INT TERM

if is_running server; then
    port="$(cat "$STATE/port")"
    say "using the Prefect server that is already running here"
else
    port="$(free_port)"
    [ "$port" = 4200 ] || say "port 4200 is in use; the Prefect server takes $port"
    printf '%s' "$port" >"$STATE/port"
    FM_HOST=127.0.0.1 FM_PORT="$port" PREFECT_API_URL="http://127.0.0.1:$port/api" start server bash infra/serve.sh
fi
export PREFECT_API_URL="http://127.0.0.1:$port/api"
say "Prefect UI: http://127.0.0.1:$port" "its login asks once for the password in $STATE/api-auth-$port"
wait_for_server

{
    prefect work-pool create local --type process --base-job-template infra/work-pool.json --overwrite
    prefect work-pool set-concurrency-limit local 1  # with its own --limit a worker exits at a retry (infra/docs/operations.md)
} >"$STATE/deploy.log" 2>&1
is_running worker || start worker prefect worker start --pool local --type process
prefect --no-prompt deploy --all --prefect-file infra/prefect.yaml >>"$STATE/deploy.log" 2>&1 ||
    { tail -n 30 "$STATE/deploy.log" >&2; exit 1; }
say "deployed: $(grep -oE "'[a-z0-9-]+/default'" "$STATE/deploy.log" | sort -u | tr -d "'" | paste -sd ' ')"

say "prefect deployment run train-digits --watch"
prefect deployment run train-digits --watch --param "config=$parameter" 9>&- > >(tee "$STATE/run.log" |
    grep --line-buffered -vE 'prefect\.artifact|heartbeat|pull-step|submitted-flow-run|-run\.(Pending|Submitting)' |
    sed -u -E 's/^● *[0-9:.]+ [0-9a-f]+ (prefect|flow-matching)\./  /') 2>&1 &
watcher=$!
fm status --config "$CONFIG" --follow 9>&- &
follower=$!
wait "$watcher" || true
watcher=""
flow_run="$(created_run)"
[ -n "$flow_run" ] || exit 1
outcome="$(state_of_run)"
until is_final "$(head -n 1 <<<"$outcome")"; do # the watching command may exit before the run ends
    sleep 2
    outcome="$(state_of_run)"
done
final=true
state="$(head -n 1 <<<"$outcome")" message="$(tail -n +2 <<<"$outcome")"
case "$state: $message" in
    COMPLETED:*) status=0 ;;
    CANCELLED:*) status=3 ;;
    "FAILED: Flow run encountered"* | CRASHED:*) status=1 ;;
    *) status=2 ;;
esac

say "" "$state after $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s: $message"
[ $status -ne 0 ] || say "report: $(realpath "$(sed -n 's/.*report: //p' <<<"$message")")"
! $keep || say "Prefect UI: http://127.0.0.1:$port/runs/flow-run/$flow_run (stop it with: bash infra/demo.sh --stop)"
exit "$status"
