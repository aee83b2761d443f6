#!/usr/bin/env bash
# Adds the user that the image's program runs as, and the folders it writes to.
# DRY_RUN=1 prints the commands and changes nothing.
set -euo pipefail

name=bullpen
id=1000

run() {
    printf '%s\n' "$*"
    if [[ -z ${DRY_RUN:-} ]]; then "$@"; fi
}

# Ubuntu's image has a user of that number.
owner=$(getent passwd "$id" | cut -d: -f1 || true)
if [[ -n $owner ]]; then run userdel --remove "$owner"; fi
run groupadd --force --gid "$id" "$name"
run useradd --uid "$id" --gid "$id" --create-home --shell /bin/bash "$name"
run install -d -o "$id" -g "$id" -m 0700 /var/lib/bullpen
# A new volume takes over owner and mode of the folder that it is mounted on.
run install -d -o "$id" -g "$id" "/home/$name/.cache" "/home/$name/.cache/huggingface"
