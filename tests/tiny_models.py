"""Four tiny models with random weights, in the Hugging Face format, whose greedy outputs vary with the whole prompt."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers

from common import data, lm, script

CONTEXT = 80
OUTPUT = 16  # tokens of a reference
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
MODELS = {
    "llama": lambda **sizes: transformers.LlamaConfig(**sizes, tie_word_embeddings=True),
    "llama3": lambda **sizes: transformers.LlamaConfig(**sizes, rope_parameters=LLAMA3, tie_word_embeddings=False),
    "qwen3": lambda **sizes: transformers.Qwen3Config(**sizes, head_dim=32, tie_word_embeddings=False),
    "qwen2": lambda **sizes: transformers.Qwen2Config(**sizes, tie_word_embeddings=True),
}


@functools.cache
def tokenizer() -> Any:
    """Byte-level, with 331 tokens: an odd number, which tensor parallel ranks cannot share out evenly."""
    sources = Path(data.__file__).read_text(encoding="utf-8")
    trained = data.train_tokenizer([sources, "naïve café 日本語 テスト 🙂🙃 “…” " * 30], 331)
    assert trained.get_vocab_size() == 331
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=data.END_OF_TEXT)


def build(folder: Path, name: str) -> Path:
    """The folder of one model."""
    script.seed_everything(len(name))
    config = MODELS[name](**SIZES, vocab_size=len(tokenizer()))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # as drawn, norms are 1 and biases 0: a mistake with them would not be seen
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            elif "embed_tokens" in parameter_name:
                parameter *= 2
    lm.save(model, tokenizer(), folder / name)
    return folder / name
