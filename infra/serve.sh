#!/usr/bin/env bash
# The Prefect server of this project, by default on the loopback interface. Settings come from the environment; systemd
# and compose.yaml read them from a file.
#
#   PREFECT_API_AUTH_STRING                 user:password; requests without it are then refused. Workers and
#                                           commands read the same variable
#   FM_HOST, FM_PORT                        where to listen (127.0.0.1, 4200)
#   PREFECT_SERVER_DATABASE_CONNECTION_URL  postgresql+asyncpg://user:password@host/name; default: SQLite in
#                                           PREFECT_HOME
set -euo pipefail

host="${FM_HOST:-127.0.0.1}"
if [ -n "${PREFECT_API_AUTH_STRING-}" ]; then
    export PREFECT_SERVER_API_AUTH_STRING="$PREFECT_API_AUTH_STRING"
elif [ "$host" != 127.0.0.1 ]; then
    echo "serve.sh: anyone who can reach $host can start and stop runs; set PREFECT_API_AUTH_STRING" >&2
fi
export DO_NOT_TRACK=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false \
    PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED="${PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED:-events,flow_runs}"
exec prefect server start --host "$host" --port "${FM_PORT:-4200}"
