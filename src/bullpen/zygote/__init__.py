"""The zygote: a fork server that has an engine imported and gives away warm processes.

It runs in the *engine's* interpreter and uses the standard library alone, so the daemon's dependencies and the
engine's pins never meet. The story, in the order of a start:

1. ``boot`` is the tiny main module. It makes the package importable without touching ``sys.path``.
2. ``server.Zygote`` listens on a Unix socket and lets its *world* (``worlds.vllm``, ``worlds.sim``) preload the
   engine, module by module, telling its clients about each one (``preload``).
3. Spares are forked ahead. Asked for a process, the zygote checks that it may fork at all (``guards``), then hands
   over a spare's pid, its pidfd and one end of a private channel.
4. From then on the client talks to the process itself (``child``): ``check`` has the engine's own parser look at a
   command line, ``start`` turns the process into the server. Until ``start`` arrives it ends when the channel does,
   so a client that dies leaves nothing behind.
5. The zygote reaps what it forked and reports each exit status.

The messages are described in ``protocol``. Alone, for trying it out::

    python -m bullpen.zygote --engine vllm --socket /run/me/zygote.sock     # a directory of mode 0700
    python -m bullpen.zygote.client /run/me/zygote.sock -- --model facebook/opt-125m --port 8000
"""
