"""The models of the book: Llama presets built from a config with random weights, or any local folder or hub id."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.script import UserError, seed_everything, sync

PRESETS: dict[str, dict[str, Any]] = {
    # 3.7 M parameters: learns Python's shape on two CPU cores in minutes. Llama's 0.02 for the initial weights suits
    # widths in the thousands; at width 256 it starts training slowly, 1/sqrt(width) does not.
    "nano": {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True, "initializer_range": 0.0625,
    },
    # 124 M: the size of GPT-2 small, with Llama's layers
    "small": {
        "vocab_size": 50304, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 12, "tie_word_embeddings": True,
    },
    # 1.24 B: the shape of Llama 3.2 1B
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    # 8.03 B: the shape of Llama 3.1 8B
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip
# Tokens to train on the corpus. A small one has no use for 128k of them; the model's further ids stay unused.
TOKENIZER_VOCAB = {"nano": 2048, "small": 32768, "1b": 32768, "8b": 32768}
LARGE = 500_000_000  # parameters; above it a model is planned on the meta device before it takes memory


def is_preset(name: str) -> bool:
    return name in PRESETS


def config(name: str, seq_len: int = 1024) -> Any:
    """A transformers config: of a preset, a local folder, or a hub id (which needs the network or a filled cache).

    Raises:
        UserError: nothing of that name; the line lists the presets.
    """
    import transformers

    if name in PRESETS:
        length = max(1024, seq_len)
        return transformers.LlamaConfig(
            **PRESETS[name], max_position_embeddings=length, rope_theta=10000.0, bos_token_id=0, eos_token_id=0,
            pad_token_id=None, attention_bias=False,
        )  # fmt: skip
    _check_name(name)
    try:
        found = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the model config of {name!r} ({_first_line(error)}); check the folder or id"
        ) from None
    if lacking := [n for n in ("num_key_value_heads", "intermediate_size", "hidden_size") if not hasattr(found, n)]:
        raise UserError(f"{name!r} is not a Llama-style decoder (its config has no {lacking[0]}); take one that is")
    return found


def _check_name(name: str) -> None:
    """A folder or what can be a hub id: else the hub would be asked for a misspelt path."""
    if not (Path(name).is_dir() or (name.count("/") == 1 and not Path(name).exists() and name[0] not in "./")):
        raise UserError(
            f"no model {name!r}; take a preset ({', '.join(PRESETS)}), a folder with config.json or a hub id"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def build(config: Any, device: torch.device | str = "cpu", *, seed: int = 0) -> nn.Module:
    """A causal language model with random float32 weights, drawn from `seed` alone.

    A large one is planned on the meta device and takes memory on `device` only, once. With device="meta" it stays a
    plan: shapes and no storage.
    """
    import transformers

    seed_everything(seed)
    plan_first = str(device) == "meta" or parameter_count(config) > LARGE
    with torch.device("meta" if plan_first else device):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    if plan_first and str(device) != "meta":
        materialize(model, device, seed=seed)
    return model


def materialize(model: nn.Module, device: torch.device | str, *, seed: int = 0) -> None:
    """Give a model on the meta device storage on `device`, and its weights and buffers their initial values."""
    model.to_empty(device=device)
    seed_everything(seed)
    with torch.device(device), torch.no_grad():
        for module in model.modules():
            vars(module).pop("_is_hf_initialized", None)  # else init_weights takes it for loaded and skips it
        model.init_weights()  # type: ignore[operator]


def load(path: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights of a local Hugging Face folder or a hub id.

    Raises:
        UserError: the folder is missing, incomplete or corrupt.
    """
    import transformers
    from safetensors import SafetensorError

    config(path)
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.device("cpu"):
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the model in {path!r} ({_first_line(error)}); save it again") from None
    moved: nn.Module = model.to(device)
    return moved


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a local Hugging Face folder or a hub id.

    Raises:
        UserError: nothing of that name, or no tokenizer in it.
    """
    import transformers

    _check_name(path)
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer in {path!r} ({_first_line(error)}); it needs tokenizer.json beside the model"
        ) from None


def save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save a Hugging Face folder (config, safetensors, tokenizer); it appears under its name only when complete."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    for left_by_a_kill in (partial, old):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    model.save_pretrained(partial)  # type: ignore[operator]
    tokenizer.save_pretrained(partial)
    appear(partial, folder, old)


def appear(partial: Path, folder: Path, old: Path) -> None:
    """Give a complete folder its name; the one that may have it now is set aside as `old` meanwhile."""
    for path in [*partial.iterdir(), partial]:  # on the disk before it is there by name
        sync(path)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def parameter_count(config: Any) -> int:
    """Parameters of a Llama-style decoder, tied weights counted once."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * config.num_key_value_heads)
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return int(config.num_hidden_layers * layer + embeddings + hidden)


def weights_sha256(model: nn.Module) -> str:
    """One hash over all parameters by name: equal if and only if every bit is."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
