"""How to run one kind of server: its command line and environment, its probes, the phases of its start, its failures.

An adapter describes an engine to the rooms above and does nothing by itself: it starts no process, opens no socket and
reads no clock. What it knows of vLLM it knows from vLLM's own text, command line and log lines alike.
"""
