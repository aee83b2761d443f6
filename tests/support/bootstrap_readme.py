"""The examples that vllm-bootstrap's README prints."""

from __future__ import annotations

import re
from pathlib import Path

WRITER, EMBEDDER = "meta-llama/Llama-3.1-8B-Instruct", "BAAI/bge-base-en-v1.5"
"""The models that they name."""
SERVER, LOCAL = "http://your-server:8000", "http://localhost:8000"
"""The daemons that they name."""

BLOCK = re.compile(r"^## (.+?)\n\n```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = dict(BLOCK.findall(Path(__file__).with_suffix(".md").read_text()))
"""Their text by their heading."""
