"""What every training script of the book shares: its flags, schedule, evaluation, state and sample.

Later chapters change how the step is distributed and keep the rest, so that their losses, flags and RESULT fields can
be laid side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ch01_intro import bigram, checkpoint
from common import data, lm, profiling
from common.dist import Context
from common.logs import Metrics, get_logger
from common.script import UserError, at_least, atomic_write, parser, positive

log = get_logger()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RandomState = dict[str, Any]


def training_parser(doc: str | None, dtypes: Sequence[str] = ("fp32", "bf16")) -> argparse.ArgumentParser:
    """The flags of all training scripts. --batch-size is per rank and step.

    fp16 is for those that scale the loss: its gradients would vanish otherwise (chapter 3).
    """
    made = parser(doc)
    group = made.add_argument_group("training")
    group.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, a model folder, or a hub id")
    group.add_argument("--data", default="stdlib", help="stdlib, a file, a folder, or a hub data set id")
    group.add_argument("--steps", type=at_least(1), default=300)
    group.add_argument("--batch-size", type=at_least(1), default=4, help="sequences a rank and step")
    group.add_argument("--seq-len", type=at_least(2), default=128)
    group.add_argument("--lr", type=positive, default=2e-3, help="peak learning rate")
    group.add_argument("--warmup", type=at_least(0), default=20, help="steps of linear warm-up")
    group.add_argument(
        "--dtype", choices=("auto", *dtypes), default="auto", help="of the matrix products; weights fp32"
    )
    group.add_argument("--val-tokens", type=at_least(1), default=32768, help="tokens of held-out text to evaluate on")
    group.add_argument("--out", type=Path, help="keep checkpoints and the trained model there (default: keep neither)")
    group.add_argument(
        "--save-every", type=at_least(0), default=0, help="steps between checkpoints; 0: at the end only"
    )
    group.add_argument("--resume", default="never", help="never, auto (the newest checkpoint in --out) or a checkpoint")
    group.add_argument("--log-every", type=at_least(1), default=10)
    group.add_argument("--prompt", default="def ", help="text that the sample at the end starts from")
    group.add_argument("--sample-tokens", type=at_least(0), default=100, help="length of that sample; 0: none")
    group.add_argument("--threads", type=at_least(1), help="CPU threads a rank (default: cores / local ranks)")
    return made


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """auto: bf16 where the hardware multiplies it natively (GPUs, CPUs with AVX512-BF16 or AMX), else fp32."""
    if choice != "auto":
        return DTYPES[choice]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load_corpus(args: argparse.Namespace) -> data.Corpus:
    """The corpus in tokens of a model's own tokenizer, or of one trained for the preset.

    Raises:
        UserError: the data is not there, or too short for one block of --seq-len.
    """
    lm.config(args.preset)  # a misspelt name is found before anything is asked of a hub
    if lm.is_preset(args.preset):
        corpus = data.prepare(args.data, lm.TOKENIZER_VOCAB[args.preset])
    else:
        file = Path(args.preset) / "tokenizer.json"
        if Path(args.preset).is_dir() and not file.exists():
            raise UserError(f"{args.preset} has no tokenizer.json; a model folder needs its tokenizer to read --data")
        if not file.exists():
            tokenizer = lm.load_tokenizer(args.preset)
            file = data.cache_dir() / "tokenizers" / args.preset.replace("/", "--") / "tokenizer.json"
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(file) as opened:
                    opened.write(tokenizer.backend_tokenizer.to_str())
            except OSError as error:
                raise UserError(f"cannot write {file} ({error.strerror}); set XDG_CACHE_HOME") from None
        corpus = data.prepare(args.data, tokenizer_file=file)
    for split, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= args.seq_len:
            raise UserError(
                f"the {split} text has {len(tokens)} tokens, too few for --seq-len {args.seq_len}; take more text or a "
                "shorter --seq-len"
            )
    return corpus


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A preset with random weights from --seed, or the weights of a model folder.

    Raises:
        UserError: the device does not have the memory; checked before anything is allocated.
    """
    config = lm.config(args.preset, args.seq_len)
    longest = config.max_position_embeddings
    if args.seq_len > longest:
        raise UserError(f"--seq-len {args.seq_len} is longer than the {longest} positions of {args.preset}; shorten it")
    # float32 weight, gradient and two Adam moments; activations come on top
    need, free = 16 * lm.parameter_count(config), profiling.available_memory(device)
    if need > free:
        raise UserError(
            f"{args.preset} needs {need / 2**30:.0f} GiB for weights, gradients and optimizer, and {device} has "
            f"{free / 2**30:.0f} GiB free; take a smaller --preset, or shard it (chapter 4)"
        )
    if lm.is_preset(args.preset):
        return lm.build(config, device, seed=args.seed)
    return lm.load(args.preset, device)


def make_optimizer(model: nn.Module, lr: float, *, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: in one kernel, or as torch does it when not asked."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused or None)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak. `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def evaluate(model: nn.Module, corpus: data.Corpus, args: argparse.Namespace, ctx: Context) -> float:
    """Mean loss (nats a token) over the first --val-tokens of the validation text, shared out among the ranks."""
    blocks = data.Blocks(corpus.validation, args.seq_len)
    count = validation_blocks(corpus, args)
    mine = np.arange(ctx.rank, count, ctx.world_size)
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, tokens: ranks may have unequal shares
    dtype = compute_dtype(args.dtype, ctx.device)
    model.eval()
    for start in range(0, math.ceil(count / ctx.world_size), args.batch_size):
        share = mine[start : start + args.batch_size]
        # A sharded model's forward pass is a collective (chapter 4): a rank that is done takes part with any block.
        inputs, targets = blocks.batch(share if len(share) else np.zeros(1, dtype=np.int64))
        with torch.autocast(ctx.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=inputs.to(ctx.device), use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.to(ctx.device).flatten(), reduction="sum")
        if len(share):
            total += torch.tensor([losses.item(), targets.numel()], dtype=torch.float64)
    model.train()
    torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


def validation_blocks(corpus: data.Corpus, args: argparse.Namespace) -> int:
    return max(1, min(len(data.Blocks(corpus.validation, args.seq_len)), args.val_tokens // args.seq_len))


def bigram_loss(corpus: data.Corpus, args: argparse.Namespace) -> float:
    """What a bigram model reaches on the same validation tokens, fitted to the whole training text, seen or not."""
    validation = corpus.validation[: validation_blocks(corpus, args) * args.seq_len + 1]
    return bigram.validation_loss(corpus.train, validation, corpus.vocab_size)


def plot_losses(history: list[float], result: dict[str, Any], path: Path) -> None:
    """The training loss by step, with the validation loss and the bigram model's as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps = np.arange(1, len(history) + 1)
    window = max(1, len(history) // 50)
    smooth = np.convolve(history, np.ones(window) / window, mode="valid")
    axes.plot(steps, history, color="#c6d7e8", linewidth=0.8, label="training loss, each step")
    axes.plot(steps[window - 1 :], smooth, color="#1f5c99", linewidth=1.8, label=f"mean of {window} steps")
    axes.axhline(result["bigram_val_loss"], color="#b3541e", linestyle="--", label="bigram model, validation")
    axes.plot(steps[-1], result["val_loss"], "o", color="#2e7d32", label=f"validation {result['val_loss']:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Learning from real text")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def settings(args: argparse.Namespace, corpus: data.Corpus, ctx: Context) -> dict[str, Any]:
    """What a checkpoint and the run that resumes it must have in common for the continuation to be exact."""
    names = ("preset", "steps", "batch_size", "seq_len", "lr", "warmup", "seed")
    dtype = str(compute_dtype(args.dtype, ctx.device))
    return {n: getattr(args, n) for n in names} | {
        "data": corpus.folder.name, "dtype": dtype, "world_size": ctx.world_size,
    }  # fmt: skip


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, batches: data.ShardedBatches) -> dict[str, Any]:
    """Everything that the next step depends on."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "position": batches.position,
        "rng": random_state(),
    }


def random_state() -> RandomState:
    """Where this process's random number generators stand, in types that torch.load takes with weights_only."""
    np_state = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [np_state[0], torch.from_numpy(np_state[1].astype(np.int64)), *np_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_state(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, batches: data.ShardedBatches
) -> None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    batches.position = state["position"]
    restore_random_state(state["rng"])


def restore_random_state(rng: RandomState) -> None:
    version, numbers, gauss = rng["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = rng["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume means; None to start at step 0.

    Raises:
        UserError: --out holds checkpoints and --resume was not given, so that they would be mixed or overwritten.
    """
    if args.save_every and args.out is None:
        raise UserError("--save-every needs a place for its checkpoints; pass --out DIR")
    if args.resume == "auto":
        if args.out is None:
            raise UserError("--resume auto looks for checkpoints in --out; pass --out DIR")
        found = checkpoint.every(args.out / "checkpoints")
        return found[-1] if found else None
    if args.resume != "never":
        return Path(args.resume)
    if args.out and checkpoint.every(args.out / "checkpoints"):
        raise UserError(f"{args.out} already holds checkpoints; pass --resume auto to go on, or another --out")
    return None


def open_losses(folder: Path, step: int, source: Path | None = None) -> Metrics:
    """losses.jsonl in `folder`, cut back to `step`: what a killed run wrote after its last checkpoint comes again.

    A run that goes on in a new folder takes along what stands beside the checkpoint `source`.
    """
    path = folder / "losses.jsonl"
    history = path if path.exists() or source is None else source.parent.parent / "losses.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); pass another --out") from None
    kept = [row for row in Metrics.read(history) if row["step"] <= step] if history.exists() and step else []
    with atomic_write(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
    return Metrics(path)


def sample(model: nn.Module, tokenizer: Any, prompt: str, tokens: int, seed: int, *, to_the_end: bool = False) -> str:
    """`prompt` continued by `tokens` tokens, drawn at temperature 0.7 from the 50 likeliest.

    to_the_end: not fewer, though the model ends the text: where each pass is a collective, ranks must not differ.
    """
    device = next(model.parameters()).device
    ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").input_ids.to(device)
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            min_new_tokens=tokens if to_the_end else None, do_sample=True, temperature=0.7, top_k=50,
            pad_token_id=0,
        )  # fmt: skip
    model.train()
    return str(tokenizer.decode(out[0]))
