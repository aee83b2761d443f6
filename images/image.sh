#!/usr/bin/env bash
# Builds or pushes one of the images: `images/image.sh build|push launcher|endpoint|client`.
#
#   CONTAINER_IMG_REG=registry.example/me   the registry and namespace that images are named after
#   IMAGE_TAG=…                    their tag (default: the commit, or the version without git)
#   ENGINE=cpu                     the daemon's images for a CPU (default: cuda); their tags end in -cpu
#   BASE_IMAGE=…                   another base
#   CONTAINER_ENGINE=podman        the program that builds (default: docker, or podman where there is no docker)
#   DRY_RUN=1                      print the commands and change nothing
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    printf 'bullpen images: %s\n' "$*" >&2
    exit 2
}

run() {
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
    if [[ -z ${DRY_RUN:-} ]]; then "$@"; fi
}

action=${1:-} name=${2:-}
[[ $action == build || $action == push ]] || fail "say build or push, not '$action'."
case $name in
    launcher) repository=launcher ;;
    endpoint) repository=vllm-bootstrap ;;
    client) repository=bullpen-client ;;
    *) fail "say launcher, endpoint or client, not '$name'." ;;
esac
registry=${CONTAINER_IMG_REG:-}
[[ -n $registry ]] ||
    fail "CONTAINER_IMG_REG is not set. Name your registry, as in: make $action-$name CONTAINER_IMG_REG=registry.example/me"
engine=${ENGINE:-cuda}
[[ $engine == cuda || $engine == cpu ]] || fail "ENGINE is '$engine'; it can be cuda or cpu."

builder=${CONTAINER_ENGINE:-}
if [[ -z $builder ]]; then
    builder=docker
    if ! command -v docker >/dev/null && command -v podman >/dev/null; then builder=podman; fi
fi
if [[ -z ${DRY_RUN:-} ]] && ! command -v "$builder" >/dev/null; then
    missing="neither docker nor podman is"
    if [[ -n ${CONTAINER_ENGINE:-} ]]; then missing="$CONTAINER_ENGINE is not"; fi
    fail "$missing on the PATH. Install one, or print the commands with DRY_RUN=1."
fi

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' src/bullpen/__init__.py)
revision=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
tag=${IMAGE_TAG:-${revision/unknown/$version}}
if [[ $engine == cpu && $name != client ]]; then tag+=-cpu; fi
image=$registry/$repository:$tag

if [[ $action == push ]]; then
    run "$builder" push "$image"
    exit
fi
options=(--tag "$image" --build-arg "VERSION=$version" --build-arg "REVISION=$revision")
# Podman's own format has no health checks, and drops the SHELL that RUN is written for.
if [[ ${builder##*/} == podman ]]; then options+=(--format docker); fi
base=BASE_IMAGE
if [[ $name == client ]]; then
    options+=(--file images/client.Dockerfile)
else
    options+=(--target "$name" --build-arg "ENGINE=$engine")
    if [[ $engine == cpu ]]; then base=CPU_BASE_IMAGE; fi
fi
if [[ -n ${BASE_IMAGE:-} ]]; then options+=(--build-arg "$base=$BASE_IMAGE"); fi
run "$builder" build "${options[@]}" .
