#!/usr/bin/env bash
# Installs what an image needs of Debian or Ubuntu: `images/install-packages.sh cuda|cpu|client`.
# DRY_RUN=1 prints the commands and changes nothing.
#
# The versions are the release's own: its archive keeps only the newest of each, so that a pin would soon fail.
set -euo pipefail

what=${1:-}
packages=(ca-certificates tini)
case $what in
    cuda) packages+=(curl gcc libc6-dev) ;; # on a GPU Triton compiles its launchers
    cpu) packages+=(curl libnuma1) ;;
    client) ;;
    *)
        echo "images/install-packages.sh: say cuda, cpu or client, not '$what'" >&2
        exit 2
        ;;
esac

# Bases such as pytorch's have a Python of their own, with its headers.
has_python() {
    python3 -c 'import ensurepip, pathlib, sys, sysconfig
sys.exit(not ((3, 11) <= sys.version_info < (3, 15) and pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()))' 2>/dev/null
}
if [[ $what != client ]] && ! has_python; then packages+=(python3 python3-venv python3-dev); fi

run() {
    printf '%s\n' "$*"
    if [[ -z ${DRY_RUN:-} ]]; then "$@"; fi
}

export DEBIAN_FRONTEND=noninteractive
run apt-get update
run apt-get install -y --no-install-recommends "${packages[@]}"
run rm -rf /var/lib/apt/lists
