#!/usr/bin/env bash
# Says whether the daemon of this container lives: exit code 0, or 1 with one sentence.
# It asks at the address that the daemon leaves in its state directory, whatever port it was told.
set -euo pipefail

file=${BULLPEN_STATE_DIR:-$HOME/.local/state/bullpen}/url
if ! url=$(cat "$file" 2>/dev/null) || [[ -z $url ]]; then
    echo "no daemon has said in $file where it listens"
    exit 1
fi
if ! problem=$(curl --fail --silent --show-error --noproxy '*' --max-time 4 --output /dev/null "$url/health" 2>&1); then
    echo "$url/health does not answer: $problem"
    exit 1
fi
echo "$url lives"
