"""The other way to start vLLM servers warm: import vLLM in a parent, fork each server, leave the rest to vLLM.

A stand-in for launchers of that kind, with nothing around it that takes time: no REST, no bookkeeping. vLLM's
environment is left as it is, so the engine core, and what it starts, are fresh interpreters.

Talks in lines of JSON. It prints ``{"seconds": …}`` once vLLM is imported, takes ``{"argv": […], "log": "…"}`` on its
standard input and answers each with ``{"pid": …, "at": …}``: the forked server, and when the fork began by
``time.monotonic``.
"""

from __future__ import annotations

import time

BEGUN = time.monotonic()

import json  # noqa: E402 - the import of vLLM is what is timed
import multiprocessing  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

import uvloop  # noqa: E402
from vllm.entrypoints.launchers.api_server.entry import run_server  # noqa: E402
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args  # noqa: E402
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402


def serve(argv: list[str], log: str) -> None:
    """Be the server: read the command line with vLLM's parser and run vLLM's server."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    validate_parsed_serve_args(arguments)
    uvloop.run(run_server(arguments))


def main() -> None:
    """Fork one server for each line."""
    fork = multiprocessing.get_context("fork")
    print(json.dumps({"seconds": time.monotonic() - BEGUN}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        begun = time.monotonic()
        server = fork.Process(target=serve, args=(request["argv"], request["log"]))
        server.start()
        print(json.dumps({"pid": server.pid, "at": begun}), flush=True)
        multiprocessing.active_children()  # collects the servers that have ended


if __name__ == "__main__":
    main()
