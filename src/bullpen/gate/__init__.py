"""The gate: a door inside each server, through which every request to the model passes.

An engine can fall asleep safely only when no request is under way, and a node can tell how long a model has been idle
only if it sees every request, also those of callers who talk to the server directly. So the gate stands inside the
server: as a class that vLLM puts around its own application (`--middleware bullpen.gate.asgi.GateMiddleware`), and in
the simulator's request handler.

- `state` has the gate itself: its mode, who is inside, who waits, and the rules by which a request is judged.
- `asgi` puts it around an ASGI application.

It is worked through the server's own address, by callers on this machine alone; to all others it does not exist:

- `GET /bullpen/gate` says `{"mode", "in_flight", "held", "idle_seconds"}`.
- `POST /bullpen/gate?mode=open|hold|refuse` sets the mode and says the same. `hold` lets new requests wait, `refuse`
  sends them away with 503; requests that are inside already go on to their end in every mode.

Counted, held and refused are POST requests and websockets, whatever their path, except the gate's own paths and the
development endpoints. Everything else (health, metrics, models) always passes, and so does a request with the header
`x-bullpen-pass: 1` from this machine, which is not counted: with it Bullpen tries out a server behind a closed gate.

Two variables of the environment set it: `BULLPEN_GATE_HOLD_SECONDS`, how long a request may wait (600), and
`BULLPEN_DEV_ENDPOINTS=loopback`, which hides the development endpoints (`/sleep`, `/collective_rpc`, ...) from callers
on other machines.

Each process has a gate of its own: with several API servers (`--api-server-count`) each knows only its own requests.
Only the standard library is used, for this runs in the engine's interpreter.
"""
