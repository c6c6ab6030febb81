"""A model folder to serve: of a preset with random weights, or derived from one: quantised, an adapter, a draft.

You learn   what an engine reads: config.json, safetensors, the tokenizer and its chat template; what int8 weights with
            their scales, a LoRA adapter and a draft model are on disk
Laptop      python -m ch06_vllm.make_model --preset nano                     (into the cache, once: its path is printed)
            python -m ch06_vllm.make_model --kind w8a8 --model runs/nano/model --out runs/nano/w8a8
GPU node    python -m ch06_vllm.make_model --preset 1b
Cluster     --out in a folder that all nodes see
You see     the folder, its size and its parameters. Random weights cost an engine exactly what trained ones do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from common import data, lm, script
from common.bootstrap import cache_dir

FORMAT = 1  # part of every key: raise it when what is written changes
FAMILIES = ("llama", "qwen3")
DTYPES = ("bfloat16", "float32")
RANK = 8  # of the adapter
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Eight bits for weights, with a scale for each output channel; eight for activations, with one for each token, taken as
# it comes. The lm_head and all that is no Linear stay as they are. (compressed-tensors' own format)
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": EIGHT_BITS | {"strategy": "channel", "dynamic": False},
        "input_activations": EIGHT_BITS | {"strategy": "token", "dynamic": True},
    }},
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What decides every byte of a model folder. `context`: the longest sequence in tokens, prompt and answer."""

    preset: str = "nano"
    family: str = "llama"
    dtype: str = "bfloat16"
    context: int = 4096
    seed: int = 0
    text: str = "stdlib"  # what the tokenizer is trained on


def model_config(recipe: Recipe) -> Any:
    """Llama as the preset says; Qwen3 in the same sizes: heads wider than hidden/heads, half as many for K and V."""
    if recipe.preset not in lm.PRESETS:
        raise script.UserError(f"no preset {recipe.preset!r}; take one of {', '.join(lm.PRESETS)}")
    config = lm.config(recipe.preset, recipe.context)
    config.max_position_embeddings = recipe.context
    if recipe.family == "qwen3":
        sizes = lm.PRESETS[recipe.preset]
        heads = sizes["num_attention_heads"]
        own = {"num_key_value_heads": max(1, heads // 2), "head_dim": 128, "rope_theta": 1e6}
        own |= {"max_position_embeddings": recipe.context, "bos_token_id": 0, "eos_token_id": 0}
        config = transformers.Qwen3Config(**(sizes | own))
    return config


def model_folder(recipe: Recipe = Recipe(), out: Path | None = None, *, make: bool = True) -> Path:
    """A folder with this model, made once: in the cache, under a key of all that went in, or as `out`.

    `make=False`, here and below: only where it is, or will be.

    Raises:
        UserError: no such preset, or nothing can be written there.
    """
    config = model_config(recipe)
    corpus = data.prepare(recipe.text, lm.TOKENIZER_VOCAB[recipe.preset])

    def write(folder: Path) -> None:
        model = lm.build(config, seed=recipe.seed)
        with torch.no_grad():  # an id that the tokenizer has no text for is never the likeliest
            model.get_output_embeddings().weight[corpus.vocab_size :] = 0  # type: ignore[operator]
        model.to(getattr(torch, recipe.dtype)).save_pretrained(folder)  # type: ignore[operator]
        tokenizer = corpus.tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.model_max_length = recipe.context
        tokenizer.save_pretrained(folder)

    made_of = [asdict(recipe), config.to_dict(), corpus.folder.name, CHAT_TEMPLATE, torch.__version__]
    return keep(f"{recipe.preset}-{recipe.family}-{recipe.dtype}", made_of, write, out, make)


def keep(name: str, made_of: Any, write: Callable[[Path], None], out: Path | None, make: bool = True) -> Path:
    """A folder that `write` fills, once for what it is made of; it has its name only when it is complete."""
    if out is not None and out.exists():
        raise script.UserError(f"{out} exists; name another --out, or remove it")
    key = hashlib.sha256(json.dumps([FORMAT, transformers.__version__, made_of], sort_keys=True).encode()).hexdigest()
    folder = out or cache_dir() / "models" / f"{name}-{key[:16]}"
    if folder.exists() or not make:
        return folder
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    transformers.utils.logging.disable_progress_bar()  # it would say that it writes
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        write(partial)
        for path in [*partial.iterdir(), partial]:
            script.sync(path)
        if not folder.exists():  # else another process was faster, with the same bytes
            partial.rename(folder)
    except OSError as error:
        raise script.UserError(f"cannot write {folder} ({error.strerror or error}); name another --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


# ---------------------------------------------------------------- derived from a model folder


def quantised(model: Path, out: Path | None = None, *, make: bool = True) -> Path:
    """The model with int8 weights (W8A8), as llm-compressor would write it: round to nearest, no calibration."""

    def write(folder: Path) -> None:
        loaded = lm.load(str(model), dtype=stored_dtype(model))
        head, tensors = loaded.get_output_embeddings(), loaded.state_dict()  # type: ignore[operator]
        if loaded.config.tie_word_embeddings:
            del tensors["lm_head.weight"]  # it is the embedding
        for name, module in loaded.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                weight_oi = module.weight.float()  # o: output channels, i: inputs
                scale_o1 = weight_oi.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 127
                tensors[f"{name}.weight"] = (weight_oi / scale_o1).round().to(torch.int8)
                tensors[f"{name}.weight_scale"] = scale_o1.to(module.weight.dtype)
        save_file(contiguous(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        copy_beside(model, folder, {"quantization_config": W8A8})

    return keep(f"{model.name}-w8a8", fingerprint(model), write, out, make)


def draft(model: Path, out: Path | None = None, *, make: bool = True) -> Path:
    """A smaller model with the same vocabulary: the embeddings, the first quarter of the layers, norm and head.

    As a draft it needs no training, and is right more often than one of other random weights.
    """

    def write(folder: Path) -> None:
        loaded = lm.load(str(model), dtype=stored_dtype(model))
        layers = max(1, loaded.config.num_hidden_layers // 4)
        loaded.model.layers = loaded.model.layers[:layers]  # type: ignore[union-attr, index, assignment]
        tensors = loaded.state_dict()
        if loaded.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(contiguous(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        change: dict[str, Any] = {"num_hidden_layers": layers}
        if types := json.loads((model / "config.json").read_text()).get("layer_types"):
            change["layer_types"] = types[:layers]
        copy_beside(model, folder, change)

    return keep(f"{model.name}-draft", fingerprint(model), write, out, make)


def adapter(model: Path, seed: int = 0, out: Path | None = None, *, make: bool = True) -> Path:
    """A LoRA adapter of rank 8 on the query and value projections, in PEFT's format: W x + (alpha / r) B A x."""

    def write(folder: Path) -> None:
        generator = torch.Generator().manual_seed(seed)
        loaded, tensors = lm.load(str(model), dtype=stored_dtype(model)), {}
        for name, module in loaded.named_modules():
            if name.endswith(("q_proj", "v_proj")):
                outputs, inputs = module.weight.shape  # type: ignore[union-attr, misc]
                a_ri = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
                b_or = torch.randn(outputs, RANK, generator=generator) / RANK**0.5  # zero before training: no adapter
                tensors[f"base_model.model.{name}.lora_A.weight"] = a_ri.to(module.weight.dtype)  # type: ignore[arg-type]
                tensors[f"base_model.model.{name}.lora_B.weight"] = b_or.to(module.weight.dtype)  # type: ignore[arg-type]
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "bias": "none"}
        config |= {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))

    return keep(f"{model.name}-lora", [fingerprint(model), seed], write, out, make)


def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def stored_dtype(model: Path) -> torch.dtype:
    """In which the folder's weights are, so that a derived one is in the same."""
    return getattr(lm.config(str(model)), "dtype", None) or torch.float32


def copy_beside(model: Path, folder: Path, change: dict[str, Any]) -> None:
    """What lies beside the weights, with `change` in config.json."""
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change, indent=2))


def fingerprint(model: Path) -> list[Any]:
    """Changes when the folder's files do.

    Raises:
        UserError: it is no model folder.
    """
    lm.config(str(model))
    files = sorted(path for path in model.iterdir() if path.is_file())
    return [str(model.resolve()), [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]]


KINDS = {"w8a8": quantised, "draft": draft}


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", choices=lm.PRESETS, default="nano")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--context", type=script.at_least(16), default=4096, help="longest sequence in tokens")
    parser.add_argument("--text", default="stdlib", help="what the tokenizer is trained on: as --data of chapter 1")
    parser.add_argument("--model", type=Path, help="derive from this folder, not from a preset")
    parser.add_argument("--kind", choices=("model", "lora", *KINDS), default="model")
    parser.add_argument("--out", type=Path, help="the folder to write (default: in the cache)")
    args = parser.parse_args(argv)
    if args.model and args.kind == "model":
        raise script.UserError(f"nothing to derive from {args.model}; say what with --kind")
    script.start(__file__, args)
    base_out = args.out if args.kind == "model" else None
    recipe = Recipe(args.preset, args.family, args.dtype, args.context, args.seed, args.text)
    folder = args.model or model_folder(recipe, base_out)
    if args.kind == "lora":
        folder = adapter(folder, args.seed, args.out)
    elif args.kind != "model":
        folder = KINDS[args.kind](folder, args.out)
    files = list(folder.glob("*.safetensors"))
    print(folder)
    return {
        "model": str(folder), "kind": args.kind, "files": len(files),
        "weights_mib": sum(path.stat().st_size for path in files) / 2**20,
    }  # fmt: skip


if __name__ == "__main__":
    script.run(main)
