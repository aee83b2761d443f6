"""``python -m bullpen.demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bullpen.demo.main import run


def main() -> int:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(prog="python -m bullpen.demo", description="Real vLLM, cold and warm.")
    parser.add_argument("--cache", type=Path, help="where the models are kept (default: in $XDG_CACHE_HOME)")
    parser.add_argument("--keep", action="store_true", help="leave the daemon's state directory for a look at it")
    parser.add_argument("--json", action="store_true", help="print one document with the figures")
    options = parser.parse_args()
    return run(cache=options.cache, keep=options.keep, json_output=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
