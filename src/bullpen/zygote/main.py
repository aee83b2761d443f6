"""The zygote's command line."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bullpen.zygote import child, worlds
from bullpen.zygote.preload import ModuleReport, PreloadReport
from bullpen.zygote.server import Zygote, listen

EPILOG = """\
example, in two terminals; the first prints where it listens:
  python -m bullpen.zygote --engine vllm
  python -m bullpen.zygote.client SOCKET -- --model NAME --port 8000

The module bullpen.zygote.protocol describes what is said over the socket.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a zygote, or (``--channel``) one process that a zygote could not fork."""
    options = parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever the locale: logs are UTF-8
    world = worlds.load(options.engine)
    if options.channel is not None:
        return run_spawned(world, options.channel)
    listener = open_listener(options)
    if listener is None:
        return 2
    address = listener.getsockname()
    zygote = Zygote(
        options.engine,
        world,
        listener,
        spares=options.spares,
        exit_with_client=options.exit_with_client,
        spawn_command=[sys.executable, str(Path(__file__).with_name("boot.py")), "--engine", options.engine],
    )
    code = zygote.run()
    remove_address(address, options)
    child.flush_output()
    # Not sys.exit: an engine's native libraries complain about what they leave behind.
    os._exit(code)


def open_listener(options: argparse.Namespace) -> socket.socket | None:
    """The socket to listen on: inherited from whoever started us, or a new one."""
    if options.listener is not None:
        return socket.socket(fileno=options.listener)
    path = options.socket or Path(tempfile.mkdtemp(prefix="bullpen-zygote-")) / "zygote.sock"
    try:
        listener = listen(path)
    except OSError as problem:
        print(f"bullpen zygote: cannot listen on {path}: {problem}", file=sys.stderr)
        return None
    print(f"bullpen zygote: engine {options.engine}, listening on {path}", flush=True)
    return listener


def remove_address(address: str, options: argparse.Namespace) -> None:
    """Remove the socket, and its folder where that was made for it. An inherited one is its giver's business."""
    if options.listener is None:
        with suppress(OSError):
            Path(address).unlink()
        if options.socket is None:
            with suppress(OSError):
                Path(address).parent.rmdir()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bullpen.zygote",
        description="Import an engine once and fork servers from that warm state over a Unix socket.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", required=True, choices=worlds.NAMES, help="what to import")
    parser.add_argument("--socket", type=Path, help="where to listen (a directory of mode 0700; default: a new one)")
    parser.add_argument("--spares", type=int, default=1, help="processes to keep forked ahead (default: 1)")
    parser.add_argument("--exit-with-client", action="store_true", help="end when the last client hangs up")
    parser.add_argument("--listener", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--channel", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_spawned(world: worlds.World, descriptor: int) -> int:
    """Be a leased process in a fresh interpreter: import first, then wait for the configuration."""
    channel = socket.socket(fileno=descriptor)
    child.detach(channel)
    for name, value in world.early_environment.items():
        os.environ.setdefault(name, value)

    def ignore(module: ModuleReport, done: int, total: int) -> None:
        """Nobody watches this import."""

    world.preload(PreloadReport(), ignore)
    child.live(world, channel)
