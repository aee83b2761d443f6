#!/usr/bin/env bash
# Makes a virtual environment with the client and what it needs, pinned: `images/install-client.sh FOLDER`.
# Arguments after the folder go to pip, as in `images/install-client.sh /tmp/client --no-deps`.
# DRY_RUN=1 prints the commands and changes nothing.
set -euo pipefail
folder=${1:?say where to, as in: images/install-client.sh /opt/client}
shift
cd "$(dirname "$0")/.."

run() {
    printf '%s\n' "$*"
    if [[ -z ${DRY_RUN:-} ]]; then "$@"; fi
}

run python3 -m venv "$folder"
run "$folder/bin/python" -m pip install --disable-pip-version-check --no-input --no-cache-dir \
    --constraint requirements/bullpen.txt "$@" './packaging/client[grpc]'
run "$folder/bin/python" -c 'import bullpen; print("bullpen-client", bullpen.__version__)'
