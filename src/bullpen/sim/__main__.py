"""Run the simulator by itself: `python -m bullpen.sim --model some/model --port 8000`."""

import sys

from bullpen.sim.server import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
