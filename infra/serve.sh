#!/usr/bin/env bash
# The Prefect server of this project, by default on the loopback interface. Settings come from the environment; systemd
# and compose.yaml read them from a file.
#
#   FM_HOST, FM_PORT                        where to listen (127.0.0.1, 4200)
#   PREFECT_API_AUTH_STRING                 user:password; requests without it are refused. By default one is generated
#                                           and kept in PREFECT_HOME/api-auth-PORT (mode 0600), where workers and
#                                           commands that are started in this project find it (flows/prefect_plugin.py)
#   PREFECT_SERVER_CORS_ALLOWED_ORIGINS     origins of web pages that may use the API; by default the UI's own
#   PREFECT_SERVER_DATABASE_CONNECTION_URL  postgresql+asyncpg://user:password@host/name; default: SQLite in
#                                           PREFECT_HOME
#   POSTGRES_PASSWORD, POSTGRES_HOST        the same for user and database prefect, the password as it is
set -euo pipefail

refuse() { printf 'serve.sh: %s\n' "$*" >&2; exit 2; }

host="${FM_HOST:-127.0.0.1}" port="${FM_PORT:-4200}"
[ -n "${PREFECT_HOME-}${HOME-}" ] || refuse "neither PREFECT_HOME nor HOME is set; set PREFECT_HOME"
home="${PREFECT_HOME:-$HOME/.prefect}"

kept_password() { # the password in PREFECT_HOME, generated at the first call
    local file="$home/api-auth-$port"
    mkdir -p "$home" 2>/dev/null || refuse "cannot create $home; set PREFECT_HOME or PREFECT_API_AUTH_STRING"
    if [ ! -e "$file" ] && [ ! -L "$file" ]; then
        (umask 077 && python -c 'import secrets; print("operator:" + secrets.token_urlsafe(24))' >"$file.$$") &&
            mv "$file.$$" "$file" || refuse "cannot write $file; set PREFECT_HOME or PREFECT_API_AUTH_STRING"
    fi
    [ -f "$file" ] && [ -O "$file" ] && [ ! -L "$file" ] || refuse "$file is not a file of this user; remove it"
    chmod 600 "$file" && touch "$file" # the newest of several homes is that of the server on this port
    grep -qE '^[^:]+:.{8,}$' "$file" || refuse "$file does not hold user:password; remove it"
    cat "$file"
}

[ -n "${PREFECT_API_AUTH_STRING-}" ] || PREFECT_API_AUTH_STRING="$(kept_password)"
export PREFECT_API_AUTH_STRING PREFECT_SERVER_API_AUTH_STRING="$PREFECT_API_AUTH_STRING"
case "$PREFECT_API_AUTH_STRING" in *?:?*) ;; *) refuse "PREFECT_API_AUTH_STRING must be user:password" ;; esac
if [ -n "${POSTGRES_PASSWORD-}" ] && [ -z "${PREFECT_SERVER_DATABASE_CONNECTION_URL-}" ]; then
    quoted="$(python -c 'import os, urllib.parse; print(urllib.parse.quote(os.environ["POSTGRES_PASSWORD"], safe=""))')"
    export PREFECT_SERVER_DATABASE_CONNECTION_URL="postgresql+asyncpg://prefect:$quoted@${POSTGRES_HOST:-127.0.0.1}/prefect"
fi
unset POSTGRES_PASSWORD
own="http://127.0.0.1:$port,http://localhost:$port"
case "$host" in 127.0.0.1 | localhost | 0.0.0.0) ;; *) own="$own,http://$host:$port" ;; esac
export DO_NOT_TRACK=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false \
    PREFECT_SERVER_UI_API_URL="${PREFECT_SERVER_UI_API_URL:-/api}" \
    PREFECT_SERVER_CORS_ALLOWED_ORIGINS="${PREFECT_SERVER_CORS_ALLOWED_ORIGINS:-$own}" \
    PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED="${PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED:-events,flow_runs}"
exec prefect server start --host "$host" --port "$port"
