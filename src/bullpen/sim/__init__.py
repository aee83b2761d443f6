"""The simulator: a small stand-in that answers vLLM's HTTP API with set delays and failures.

It loads no model and needs no accelerator; it exists so that everything around an engine can be worked on without one.
Its processes have vLLM's shape: a server process, and an engine child forked from it that holds the sleep state.

What it simulates beside plain answers:

- Sleep and wake with vLLM's endpoints of development mode (`VLLM_SERVER_DEV_MODE=1`): levels, tags, their order. After
  level 2 answers are wrong until `reload_weights` was called. Without `--enable-sleep-mode` a sleep is answered like
  any other, and frees and discards nothing; that is what vLLM does on CUDA.
- Memory of mock GPUs, in files that others can read, and running out of it: see `gpus`.
- Failures, one or several at a time, set once or changed while it runs: see `settings`.
- The gate of `bullpen.gate`, at the same path and with the same variables as in vLLM.

How a request travels, which is also the order in which to read the modules:

- `options` and `settings` say what was asked for: the command line (vLLM's) and the `BULLPEN_SIM_*` environment.
- `server` is the server process: it binds the port, forks the engine child, starts up phase by phase, serves, ends.
- `engine_child` is the other process, with `memory` and `gpus`; `engine` is the server's side of it.
- `http` reads requests and writes replies; `door` has the gate; `routes` says which reply belongs to which request.
- `requests` checks a JSON body, `scheduler` paces the tokens, `words` has the text, `writer` joins both, `answers`
  shapes the JSON.
- `metrics` counts, `log` writes lines in vLLM's shape.

Only the standard library is used, and importing starts nothing: no thread, no event loop, no descriptor.
"""
