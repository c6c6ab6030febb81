"""Activations between forward and backward: all kept, checkpointed, cut among ranks, in prepared buffers, on the host.

You learn   what each key of the section activation_checkpointing saves, in bytes; that none of them changes a gradient;
            what partitioning needs (ranks that hold the same activations) and what it costs (an all-gather a layer)
Laptop      torchrun --standalone --nproc-per-node=2 ch05_deepspeed_megatron/activation_memory.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch05_deepspeed_megatron/activation_memory.py --preset 1b \
                --seq-len 2048
Training    torchrun ... ch05_deepspeed_megatron/train_deepspeed.py \
                --deepspeed-config ch05_deepspeed_megatron/configs/activations.json
You see     a row a way: bytes held between forward and backward, measured and by formula, seconds, the same gradients

The ranks are one model-parallel group: each has the same weights and the same batch, as the ranks of a tensor-parallel
group have the same residual stream between two layers. On a CPU the host is the device: nothing can move there.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from ch02_hardware_parallelism.training import timed_ms
from ch03_ddp import step as ddp_step
from ch04_fsdp import activations, resident, zero_peers
from ch05_deepspeed_megatron import activation_checkpointing
from ch05_deepspeed_megatron.activation_checkpointing import ModelParallel
from common import dist, lm, profiling, script

MIB = 2**20
PARTITIONED = {"partition_activations": True}
WAYS: dict[str, dict[str, bool] | None] = {
    "all kept": None,
    "checkpointed": {"partition_activations": False},
    "partitioned": PARTITIONED,
    "contiguous": PARTITIONED | {"contiguous_memory_optimization": True},
    "cpu": {"cpu_checkpointing": True},
    "partitioned, cpu": PARTITIONED | {"cpu_checkpointing": True},
}
WITHIN = 0.05


def formula(config: Any, way: str, batch: int, seq_len: int, ranks: int, device: torch.device) -> float:
    """Bytes that a forward pass with its loss leaves on the device for backward."""
    section = WAYS[way]
    if section is None:
        return activations.saved(config, batch, seq_len, "fp32")
    layers, stream = config.num_hidden_layers, activations.Layer(config, batch * seq_len, "fp32").stream
    ends = activations.saved(config, batch, seq_len, "fp32", "block") - layers * stream
    on_host = section.get("cpu_checkpointing") and device.type == "cuda"
    if section.get("partition_activations"):
        return ends + (0 if on_host else layers * stream / ranks)
    return ends + (stream if on_host else layers * stream)  # DeepSpeed lets the last one stay on the device


def held(device: torch.device) -> int:
    """Bytes in use, exactly."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident.malloc_bytes() or profiling.memory(device).current


def one_step(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> dict[str, Any]:
    before = held(device)
    loss = ddp_step.loss_sum(model, *batch) / batch[1].numel()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    kept = held(device) - before
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"kept": kept, "loss": loss.item(), "gradients": gradients}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano", help=", ".join(lm.PRESETS))
    parser.add_argument("--layers", type=script.at_least(1), help="in place of the preset's")
    parser.add_argument("--batch-size", type=script.at_least(1), default=4)
    parser.add_argument("--seq-len", type=script.at_least(2), default=256)
    parser.add_argument("--rounds", type=script.at_least(1), default=3, help="of timed steps, in turns")
    args = parser.parse_args(argv)
    if not lm.is_preset(args.preset):
        raise script.UserError(f"no preset {args.preset!r}; one of {', '.join(lm.PRESETS)}")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    script.start(__file__, args)
    config = lm.config(args.preset, args.seq_len)
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    with dist.session(args.device) as ctx:
        library = zero_peers.join(ctx.launch, ctx.device)
        library.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        mpu = ModelParallel(torch.distributed.group.WORLD)
        model = lm.build(config, ctx.device, seed=args.seed).train()
        generator = torch.Generator().manual_seed(args.seed)
        tokens = torch.randint(config.vocab_size, (args.batch_size, args.seq_len + 1), generator=generator)
        batch = tuple(part.contiguous().to(ctx.device) for part in (tokens[:, :-1], tokens[:, 1:]))
        resident.return_at_once()
        ways, found, times = list(WAYS), {}, {way: [] for way in WAYS}
        for way in ways:
            switch(model, way, mpu)
            one_step(model, batch, ctx.device)  # what is set up at first use
            found[way] = one_step(model, batch, ctx.device)
        for _ in range(args.rounds):
            for way in ways:
                switch(model, way, mpu)
                times[way].append(timed_ms(lambda: one_step(model, batch, ctx.device), ctx.device))
        return report(found, times, config, args, ctx)


def switch(model: torch.nn.Module, way: str, mpu: ModelParallel) -> None:
    section = WAYS[way]
    if section is None:
        for layer in model.model.layers:
            layer.gradient_checkpointing = False
        return
    activation_checkpointing.apply(model, section | {"number_checkpoints": len(model.model.layers)}, mpu)


def apart(gradients: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Largest difference, of the largest element of its tensor. inf where a gradient is missing."""
    if gradients.keys() != reference.keys():
        return float("inf")
    return max(float((gradients[name] - g).abs().max() / g.abs().max()) for name, g in reference.items())


def report(
    found: dict[str, Any], times: dict[str, list[float]], config: Any, args: argparse.Namespace, ctx: dist.Context
) -> dict[str, Any]:
    reference = found["all kept"]["gradients"]
    mine = {way: (did["kept"], apart(did["gradients"], reference)) for way, did in found.items()}
    every = ctx.gather(mine)
    if not ctx.is_main:
        return {}
    result: dict[str, Any] = {"world_size": ctx.world_size, "checkpoints": config.num_hidden_layers}
    wrong, allowed = [], 0.0 if ctx.device.type == "cpu" else 1e-5
    print(f"{'':18}{'held MiB':>9}{'formula':>9}{'step ms':>9}  largest difference of a gradient")
    for way in found:
        predicted = formula(config, way, args.batch_size, args.seq_len, ctx.world_size, ctx.device) / MIB
        kept = max(rank[way][0] for rank in every) / MIB
        different = max(rank[way][1] for rank in every)
        ms = statistics.median(times[way])
        print(f"{way:18}{kept:9.2f}{predicted:9.2f}{ms:9.0f}  {different:.1e}")
        key = way.replace(", ", "_").replace(" ", "_")
        result |= {f"{key}_mib": kept, f"{key}_predicted_mib": predicted, f"{key}_ms": ms}
        if abs(kept / predicted - 1) > WITHIN:
            wrong.append(f"{way}: {kept:.2f} MiB, not {predicted:.2f}")
        if different > allowed:
            wrong.append(f"{way}: its gradients are {different:.1e} from those without it")
    if ctx.device.type == "cpu":
        print("cpu_checkpointing moves nothing here: on CPU ranks the host's memory is the device's")
    result["as_expected"] = not wrong
    if wrong:
        raise script.CheckFailed("; ".join(wrong), result)
    return result


if __name__ == "__main__":
    script.run(main)
