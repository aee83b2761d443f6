"""The demo: two real vLLM servers started warm beside one that is started cold (``main.run``)."""
