#!/usr/bin/env bash
# Ends the build of the daemon's image: compiles the code, which its user may not write to, and tries the commands.
# ROOT names another folder than the one that this script lies in.
set -euo pipefail
cd "${ROOT:-$(dirname "$0")/..}"

.venv/bin/python -m compileall -q src
.venv/bin/bullpen --version
.venv/bin/vllm-bootstrap --version
