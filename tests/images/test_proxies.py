"""The reverse proxies of docs/cloud.md, as they are printed there: REST and gRPC through one TLS port."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import Daemon

ROOT = Path(__file__).parents[2]
UNPACKED = ROOT / ".venv" / "proxies" / "usr"
PLACES = f"{UNPACKED}/sbin:{UNPACKED}/bin:{os.environ['PATH']}:/usr/sbin"
START_SECONDS = 20.0
CALLS = """
import ssl
import sys
import grpc
import httpx
from bullpen.client import SyncVLLMManager

# Caddy now and then makes a refusal that comes before it has sent the whole request on a plain failure.
TRIES = 5
port, roots = sys.argv[1], open(sys.argv[2], "rb").read()
url = f"https://localhost:{port}"
http = httpx.AsyncHTTPTransport(verify=ssl.create_default_context(cafile=sys.argv[2]))
with SyncVLLMManager(url, grpc_address=url, access_key="secret", transport=http) as manager:
    with manager.run("tiny", ready_timeout=60) as launch:
        one = manager.complete(launch.launch_id, prompt="Once", max_tokens=3)
        pieces = list(manager.stream(launch.launch_id, prompt="Once", max_tokens=3))
        long = manager.complete(launch.launch_id, prompts=["x" * 2_000_000] * 3, max_tokens=1)
        print(len(one.text) > 0, len(pieces) > 1, len(long), manager.status(launch.launch_id).state)
with grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(roots)) as channel:
    for method in ("grpc.health.v1.Health/Check", "vllm_bootstrap.InferenceService/Complete", "bullpen.v1.Inference/No",
                   "grpc.reflection.v1.ServerReflection/No", "grpc.reflection.v1alpha.ServerReflection/No"):
        call = channel.unary_unary(f"/{method}")
        for _ in range(TRIES):
            found = "OK"
            try:
                call(b"", timeout=10)
            except grpc.RpcError as problem:
                found = problem.code().name
            if found != "UNKNOWN":
                break
        print(method, found)
"""


def printed(language: str) -> str:
    """The one example in that language on the page."""
    [block] = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "cloud.md").read_text(), re.DOTALL)
    return str(block)


def replaced(text: str, **words: object) -> str:
    """An example with this test's own ports and files; each word must be in it."""
    for word, value in words.items():
        assert word in text, word
        text = text.replace(word, str(value))
    return text


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cert.pem` and `key.pem` for localhost."""
    folder = tmp_path_factory.mktemp("tls")
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes a certificate, is not installed")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *files], cwd=folder, check=True, capture_output=True, timeout=30)
    return folder


@contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[None]:
    """A program that is to listen on a port."""
    log = folder / "proxy.log"
    with log.open("wb") as output:
        environment = {"HOME": str(folder), "PATH": os.environ["PATH"]}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield
    finally:
        process.kill()  # caddy would wait for connections that nobody uses
        process.wait(10)


def nginx(program: str, port: int, daemon: dict[str, object], certificate: Path, folder: Path) -> list[str]:
    server = replaced(
        printed("nginx"),
        **{
            "listen 443": f"listen 127.0.0.1:{port}",
            "box.example.com;": "localhost;",
            "/etc/letsencrypt/live/box.example.com/fullchain.pem": certificate / "cert.pem",
            "/etc/letsencrypt/live/box.example.com/privkey.pem": certificate / "key.pem",
        },
        **daemon,
    )
    kept = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(f"{head}http {{\naccess_log off;\n{kept}{server}}}\n")
    return [program, "-e", "stderr", "-c", str(folder / "nginx.conf")]


def caddy(program: str, port: int, daemon: dict[str, object], certificate: Path, folder: Path) -> list[str]:
    tls = f"https://localhost:{port} {{\n\tbind 127.0.0.1\n\ttls {certificate}/cert.pem {certificate}/key.pem"
    site = replaced(printed("caddyfile"), **{"box.example.com {": tls}, **daemon)
    (folder / "Caddyfile").write_text(f"{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{site}")
    return [program, "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nginx", "caddy"])
def test_rest_and_grpc_through_one_port(name: str, certificate: Path, tmp_path: Path) -> None:
    program = shutil.which(name, path=PLACES)
    ask = "-v" if name == "nginx" else "version"
    if program is None or subprocess.run([program, ask], check=False, capture_output=True, timeout=30).returncode:
        pytest.skip(f"{name} is not here, or lacks its libraries")
    port, rpc = free_port(), free_port()
    with Daemon(tmp_path / "state", access_key="secret", grpc_port=rpc) as box:
        box.wait_ready()
        box.wait_grpc()
        daemon: dict[str, object] = {
            "127.0.0.1:8000": box.url.removeprefix("http://"),
            "127.0.0.1:8001": f"127.0.0.1:{rpc}",
        }
        make = nginx if name == "nginx" else caddy
        with running(make(program, port, daemon, certificate, tmp_path), port, tmp_path):
            trust = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificate / "cert.pem")}
            done = subprocess.run(
                [sys.executable, "-c", CALLS, str(port), certificate / "cert.pem"],
                env={**os.environ, **trust, "BULLPEN_STATE_DIR": str(tmp_path / "nobody")},
                check=False,
                capture_output=True,
                text=True,
                timeout=100,
            )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "True True 3 ready",
        "grpc.health.v1.Health/Check OK",
        "vllm_bootstrap.InferenceService/Complete UNAUTHENTICATED",
        "bullpen.v1.Inference/No UNAUTHENTICATED",
        "grpc.reflection.v1.ServerReflection/No UNAUTHENTICATED",
        "grpc.reflection.v1alpha.ServerReflection/No UNAUTHENTICATED",
    ]
