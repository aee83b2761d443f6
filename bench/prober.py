"""Asks a server a bounded number of times a second how it is, as a process of its own, until its input ends.

``python -m bench.prober URL RATE`` prints ``asking`` when it begins, and at the end the latencies as a JSON list of
seconds. Each is counted from when the request was due, not from when it was sent, so a server that stalls is not asked
less and pays for every request that it delayed. A request that fails counts as null.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 10.0


def probe(url: str, rate: float) -> list[float | None]:
    """Ask ``rate`` times a second until standard input ends; return the latencies."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)
    latencies: list[float | None] = []
    is_answered(connection, parts.path)  # opens the connection
    print("asking", flush=True)
    begun = time.monotonic()
    while True:
        due = begun + len(latencies) / rate
        ended, _, _ = select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))
        if ended:
            return latencies
        latencies.append(time.monotonic() - due if is_answered(connection, parts.path) else None)


def is_answered(connection: http.client.HTTPConnection, path: str) -> bool:
    """Ask once, on the open connection."""
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        reply.read()
        return reply.status == 200
    except (OSError, http.client.HTTPException):
        connection.close()
        return False


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1], float(sys.argv[2]))))
