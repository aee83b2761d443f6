#!/usr/bin/env bash
# Resolves requirements/*.txt anew: one pinned set per file, each the same for Python 3.11 to 3.14.
# Pins that still fit stay as they are; `scripts/lock.sh --upgrade` moves all of them.
# Needs uv (https://docs.astral.sh/uv/) on the PATH. Nothing but metadata is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."

torch='torch==2.13.0+cpu'
uv=${UV:-uv}
options=(--quiet --universal --python-version 3.11 --no-header --no-annotate "$@")

# Leaves out the markers that are true wherever Bullpen runs.
tidy() { # file, head line
    sed -i -E \
        -e "s/implementation_name == 'cpython' and //g" \
        -e "s/ and (implementation_name == 'cpython'|sys_platform == 'linux')//g" \
        -e "s/ ; (implementation_name == 'cpython'|sys_platform == 'linux'|platform_python_implementation != 'PyPy')$//" \
        -e "s/\((platform_machine == '[^']*')\)/\1/g" "$1"
    sed -i "1i # $2\n# Made by scripts/lock.sh; install with --no-deps." "$1"
}

cd requirements
"$uv" pip compile "${options[@]}" --overrides engine-cpu.overrides engine-cpu.in -o engine-cpu.txt
tidy engine-cpu.txt "vLLM's CPU build and all it needs."
echo "$torch" >>engine-cpu.txt

# One environment holds an engine, Bullpen and the tools, so the sets agree wherever two of them name a package.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
engine=$scratch/engine.txt
grep -vE '^torch==' engine-cpu.txt >"$engine"

"$uv" pip compile "${options[@]}" -c "$engine" ../pyproject.toml -o bullpen.txt
tidy bullpen.txt 'What Bullpen itself needs.'

# Not by --group: uv leaves the groups of a project alone that is not its own to manage.
python3 - >"$scratch/dev.in" <<'CODE'
import tomllib

with open("../pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["dependency-groups"]["dev"], sep="\n")
CODE
"$uv" pip compile "${options[@]}" -c "$engine" -c bullpen.txt --overrides dev.overrides "$scratch/dev.in" -o dev.txt
tidy dev.txt 'Tools for tests and checks.'

"$uv" pip compile "${options[@]}" -c bullpen.txt -c dev.txt --overrides engine-cuda.overrides engine-cuda.in -o engine-cuda.txt
tidy engine-cuda.txt 'vLLM for NVIDIA GPUs and all it needs.'

"$uv" pip compile "${options[@]}" -c bullpen.txt published-client.in -o published-client.txt
tidy published-client.txt "vllm-bootstrap's published client and all it needs."
