#!/usr/bin/env bash
# Makes the Python code of the messages in src/bullpen/proto anew from their .proto files, with the compiler that
# `make tools` installs.
# `scripts/make_protos.sh --check` changes nothing and fails where the code is not what the files give.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
messages=src/bullpen/proto

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
(cd "$messages" && find . -name '*.proto' -printf '%P\n' | sort) >"$scratch/files"
mkdir "$scratch/made"
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
