"""Make tiny Llama-style models on disk: seeded random weights, a trained tokenizer, a chat template.

Run by the *engine's* interpreter (it needs torch, safetensors and tokenizers, which come with vLLM)::

    python tiny_models.py DIRECTORY NAME=SEED [NAME=SEED ...]

A model that is already complete is left alone, so the demo and the tests share one cache folder.
Nothing is downloaded; the same seed gives the same bytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HIDDEN = 64
LAYERS = 2
HEADS = 2
KV_HEADS = 1
INTERMEDIATE = 128
VOCABULARY = 512
CONTEXT = 512

CORPUS = [
    "In a bullpen the next pitcher is already warm when the coach calls.",
    "The model answers as soon as the server is ready, and the server is ready at once.",
    "A warm start takes less than a second; a cold start takes half a minute.",
    "Which model shall be awake now, and which one may sleep for a while?",
    "user: say something about weights. assistant: they are random, and so is this sentence.",
    "0 1 2 3 4 5 6 7 8 9 10 100 1000, a b c d e f g h i j k l m n o p q r s t u v w x y z",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE tokenizer on the small corpus; return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return int(tokenizer.get_vocab_size())


def write_weights(folder: Path, seed: int) -> None:
    """Write normally distributed weights, the same for the same seed."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    head = HIDDEN // HEADS
    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": torch.ones(HIDDEN),
            prefix + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            prefix + "self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": random(KV_HEADS * head, HIDDEN),
            prefix + "self_attn.v_proj.weight": random(KV_HEADS * head, HIDDEN),
            prefix + "self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
            prefix + "mlp.gate_proj.weight": random(INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": random(INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE),
        }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_config(folder: Path) -> None:
    """Write the configuration of a two-layer Llama."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def make_model(target: Path, seed: int) -> bool:
    """Make one model at ``target``; return False where it was there already.

    It is written beside and renamed, so that an interrupted run leaves nothing half made.
    """
    if (target / "config.json").exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        if write_tokenizer(folder) > VOCABULARY:
            raise RuntimeError("the tokenizer has more tokens than the model has embeddings")
        write_weights(folder, seed)
        write_config(folder)
        try:
            folder.rename(target)
        except OSError:
            if not (target / "config.json").exists():
                raise
            return False
    return True


def main(arguments: list[str]) -> int:
    """Make each ``NAME=SEED`` below the directory and print the paths, one a line."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    root = Path(arguments[0])
    for item in arguments[1:]:
        name, _, seed = item.partition("=")
        make_model(root / name, int(seed or 0))
        print(root / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
