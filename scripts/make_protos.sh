#!/usr/bin/env bash
# Makes the Python code of the messages in src/bullpen/proto anew from their .proto files.
# `scripts/make_protos.sh --check` changes nothing and fails where the code is not what the files give.
# GRPC_TOOLS_PYTHON names an interpreter that has grpcio-tools; without it a temporary environment is made.
set -euo pipefail
cd "$(dirname "$0")/.."

# Its code runs with every protobuf from 6.31.1 to 7.x; that of a newer one asks for a newer protobuf.
tools='grpcio-tools==1.78.0'
messages=src/bullpen/proto

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=${GRPC_TOOLS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$scratch/venv"
    python=$scratch/venv/bin/python
    "$python" -m pip install --quiet "$tools"
fi

mkdir "$scratch/made"
(cd "$messages" && find . -name '*.proto' -printf '%P\n' | sort) >"$scratch/files"
xargs "$python" -m grpc_tools.protoc -I "$messages" --python_out="$scratch/made" --pyi_out="$scratch/made" <"$scratch/files"
sed 's/\.proto$//' "$scratch/files" | while read -r name; do
    for made in "${name}_pb2.py" "${name}_pb2.pyi"; do
        if [ "${1:-}" != --check ]; then
            cp "$scratch/made/$made" "$messages/$made"
        elif ! cmp --silent "$scratch/made/$made" "$messages/$made"; then
            echo "$messages/$made is not what its .proto file gives: run scripts/make_protos.sh" >&2
            exit 1
        fi
    done
done
