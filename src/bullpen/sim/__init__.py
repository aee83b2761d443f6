"""The simulator: a small stand-in that answers vLLM's HTTP API with set delays and failures.

It loads no model and needs no accelerator; it exists so that everything around an engine can be worked on without one.
Its processes have vLLM's shape: a server process, and an engine child forked from it that holds the sleep state.

How a request travels, which is also the order in which to read the modules:

- `options` and `settings` say what was asked for: the command line (vLLM's) and the `BULLPEN_SIM_*` environment.
- `server` is the server process: it binds the port, forks the engine child, starts up phase by phase, serves, ends.
- `engine_child` is the other process; `engine` is the server's side of it.
- `http` reads requests and writes replies; `routes` says which reply belongs to which request.
- `requests` checks a JSON body, `scheduler` paces the tokens, `words` has the text, `writer` joins both, `answers`
  shapes the JSON.
- `metrics` counts, `log` writes lines in vLLM's shape.

Only the standard library is used, and importing starts nothing: no thread, no event loop, no descriptor.
"""
