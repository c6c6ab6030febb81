"""Weights from a Hugging Face folder into any Megatron layout and back, and the same logits on the way.

You learn   how tensor and pipeline parallelism cut a Llama: which rows or columns of which matrix a rank has; why
            queries, keys and values lie interleaved in one matrix; that each rank reads only its slices from the disk
Laptop      torchrun --standalone --nproc-per-node=4 ch05_deepspeed_megatron/megatron_convert.py --tp 2 --pp 2
A folder    torchrun --standalone --nproc-per-node=2 ch05_deepspeed_megatron/megatron_convert.py --tp 2 \\
                --preset FOLDER --out COPY
GPU node    torchrun --standalone --nproc-per-node=gpu ch05_deepspeed_megatron/megatron_convert.py --preset 1b --tp 4 \\
                --pp 2
Cluster     sbatch ch03_ddp/launch/train.sbatch ch05_deepspeed_megatron/megatron_convert.py --preset 8b --tp 8
You see     the largest difference between Megatron's logits and transformers', 5e-6 of 4 in float32, and the same hash
            of the weights before and after

A preset is first made and saved as a folder, with random weights. Rank 0 alone runs transformers, to compare.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ch04_fsdp import export, weights
from ch05_deepspeed_megatron import megatron_mapping as mapping
from ch05_deepspeed_megatron import megatron_model, megatron_step
from ch05_deepspeed_megatron.megatron_layout import Layout, add_layout_flags, checked
from common import lm, script
from common.dist import Context, read_launch, session
from common.logs import get_logger
from common.script import UserError, at_least

log = get_logger()


def load(model: nn.Module, folder: Path, ctx: Context) -> int:
    """Fill this rank's part of the model from safetensors. It reads its own rows and columns, no whole tensor.

    Returns:
        The bytes that this rank has read.

    Raises:
        UserError: a tensor is missing, of another shape or unreadable: the checkpoint is of another model.
    """
    wanted = mapping.shapes(model.hf_config)
    stored = weights.Stored(folder, wanted.keys() | {"lm_head.weight"})

    def read(name: str, dim: int | None, part: int, parts: int) -> torch.Tensor:
        size = wanted[name][dim or 0] // parts
        own = slice(part * size, (part + 1) * size)
        return stored.read(name, wanted[name], (slice(None), own) if dim == 1 else own)

    mapping.fill(model, ctx, read)
    return stored.bytes_read


def initialize(model: nn.Module, seed: int, ctx: Context) -> None:
    """Random weights that depend on the seed and a parameter's name alone: those of ch04_fsdp/weights.py, so that runs
    by FSDP and by any layout of Megatron start alike. Each rank draws a whole tensor at a time and keeps its slice."""
    config, wanted = model.hf_config, mapping.shapes(model.hf_config)

    def read(name: str, dim: int | None, part: int, parts: int) -> torch.Tensor:
        whole = torch.empty(wanted[name], device=ctx.device)
        weights.draw(whole, name, seed, config.initializer_range)
        return whole.chunk(parts, dim)[part] if dim is not None else whole

    mapping.fill(model, ctx, read)


def save(model: nn.Module, tokenizer: Any, folder: Path, ctx: Context) -> None:
    """One Hugging Face folder. A collective: rank 0 writes, the others send it one shard at a time."""
    config = model.hf_config
    config.architectures, config.dtype = ["LlamaForCausalLM"], next(model.parameters()).dtype
    if ctx.is_main:
        export.write_folder(folder, config, tokenizer, mapping.whole_tensors(model, ctx))
        log.info("saved the model", folder=folder)
    else:
        for _ in mapping.whole_tensors(model, ctx):
            pass
    ctx.barrier("model saved")


@torch.no_grad()
def logits(model: nn.Module, inputs: torch.Tensor, ctx: Context) -> torch.Tensor | None:
    """Whole logits, [b, t, vocab], on rank 0: stage after stage, then the words that each rank has."""
    layout = model.layout
    first, last = layout.owners(0, ctx.world_size), layout.owners(layout.pp - 1, ctx.world_size)
    if ctx.rank not in layout.owners(layout.stage(ctx), ctx.world_size):
        return None  # of another replica
    step = ctx.world_size // layout.pp  # to the same shard's rank on the next stage
    length = inputs.shape[1] // (layout.tp if layout.sequence_parallel else 1)
    if ctx.rank not in first:
        received = torch.empty(length, len(inputs), model.hf_config.hidden_size, device=ctx.device,
                               dtype=next(model.parameters()).dtype)  # fmt: skip
        dist.recv(received, ctx.rank - step)
        model.set_input_tensor(received)
    out = megatron_step.forward(model, inputs)
    if ctx.rank not in last:
        dist.send(out.contiguous(), ctx.rank + step)
    elif ctx.rank != 0:
        dist.send(out.contiguous(), 0)
    if not ctx.is_main:
        return None
    parts = []
    for owner in last:
        if owner == 0:
            parts.append(out)
        else:
            shape = (*inputs.shape, model.hf_config.vocab_size // layout.tp)
            parts.append(torch.empty(shape, dtype=next(model.parameters()).dtype, device=ctx.device))
            dist.recv(parts[-1], owner)
    return torch.cat(parts, -1)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, or a Hugging Face folder")
    add_layout_flags(parser)
    parser.add_argument("--kv-heads", type=at_least(1), help="key-value heads of a preset, instead of its own number")
    parser.add_argument("--untied", action="store_true", help="give a preset a head of its own")
    parser.add_argument("--seq-len", type=at_least(2), default=64)
    parser.add_argument("--out", type=Path, help="keep the folder that is written (default: it is removed)")
    args = parser.parse_args(argv)
    layout = Layout(args.tp, args.pp, args.sequence_parallel)
    config = checked(args.preset, layout, read_launch().world_size, args.seq_len)
    if lm.is_preset(args.preset):
        config.num_key_value_heads = args.kv_heads or config.num_key_value_heads
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"--kv-heads {args.kv_heads} does not divide {config.num_attention_heads} heads; take a divisor"
            )
        config.tie_word_embeddings &= not args.untied
        layout.check(config, read_launch().world_size)
    elif args.kv_heads or args.untied:
        raise UserError("--kv-heads and --untied change a preset; a folder has its own shape, leave them out")
    if args.out and args.out.exists():
        raise UserError(f"{args.out} is there already; give a new folder")
    script.start(__file__, args)
    with session(args.device) as ctx, tempfile.TemporaryDirectory() as own, layout.groups(ctx):
        shared = Path(ctx.exchange("folder", own)[0])
        source = Path(args.preset)
        if lm.is_preset(args.preset):
            source = shared / "made"
            if ctx.is_main:
                export.write_folder(source, config, None, lm.build(config, seed=args.seed).named_parameters())
            ctx.barrier("preset made")
        model = megatron_model.build(config, layout, ctx)
        read = load(model, source, ctx)
        torch.manual_seed(args.seed)
        inputs = torch.randint(config.vocab_size, (2, args.seq_len)).to(ctx.device)
        ours = logits(model, inputs, ctx)
        target = args.out or shared / "back"
        save(model, None, target, ctx)
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        told = ctx.gather((read, held))
        result: dict[str, Any] = {}
        if ours is not None:
            result = compare(source, target, inputs, ours) | {
                "tp": layout.tp, "pp": layout.pp, "world_size": ctx.world_size,
                "parameters": lm.parameter_count(config), "tied": config.tie_word_embeddings,
                "largest_read_gib": max(read for read, _ in told) / 2**30,
                "largest_held_gib": max(held for _, held in told) / 2**30,
            }  # fmt: skip
        ctx.barrier("compared")
    if result and not (result["largest_logit_difference"] < 1e-4 and result["weights_equal"]):
        raise script.CheckFailed("Megatron-Core's model is not transformers'", result)
    return result


@torch.no_grad()
def compare(source: Path, target: Path, inputs: torch.Tensor, ours: torch.Tensor) -> dict[str, Any]:
    """Both folders by plain transformers, the first one against Megatron's logits."""
    before, after = lm.load(str(source), inputs.device), lm.load(str(target), inputs.device)
    theirs = before(input_ids=inputs, use_cache=False).logits
    return {
        "largest_logit_difference": (ours - theirs).abs().max().item(),
        "largest_logit": theirs.abs().max().item(),
        "logits_after_equal": torch.equal(theirs, after(input_ids=inputs, use_cache=False).logits),
        "weights_equal": lm.weights_sha256(before) == lm.weights_sha256(after),
    }


if __name__ == "__main__":
    script.run(main)
