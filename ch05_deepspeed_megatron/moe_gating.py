"""Gating, live: who gets which token, who is left out, what pulls the load into balance, and what travels for it.

You learn   what top 1 and top 2 decide; when an expert is full and what becomes of the rest; why the balancing loss
            must be differentiable though the choice is not; what noise is for; the bytes of the two all-to-alls
Laptop      torchrun --standalone --nproc-per-node=2 ch05_deepspeed_megatron/moe_gating.py
Numbers     ... moe_gating.py --tokens 64 --experts 8 --capacity-factor 1
GPU node    torchrun --standalone --nproc-per-node=gpu ch05_deepspeed_megatron/moe_gating.py --tokens 4096 --hidden 1024
Cluster     srun python ch05_deepspeed_megatron/moe_gating.py
You see     DeepSpeed's own gate on a handful of tokens; a load that was 3:1 become nearly even by 100 steps on the
            balancing loss alone; the bytes of a layer, counted and by formula
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as td
from torch import nn

from ch04_fsdp import zero_peers
from ch04_fsdp.traffic import Traffic
from ch05_deepspeed_megatron.moe_model import NOISE, Experts, SparseMLP
from common import dist, script


def skewed(args: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and a gate's weight that likes expert 0: x [s, h], weight [e, h]."""
    generator = torch.Generator().manual_seed(args.seed)
    x_sh = torch.randn(args.tokens, args.hidden, generator=generator)
    weight_eh = torch.randn(args.experts, args.hidden, generator=generator) / args.hidden**0.5
    liked_h = torch.randn(args.hidden, generator=generator)
    x_sh += liked_h
    weight_eh[0] += 1.5 * liked_h / liked_h.norm() / args.hidden**0.5
    return x_sh.to(device), weight_eh.to(device)


def gate_of(spec: Experts, weight_eh: torch.Tensor) -> Any:
    """DeepSpeed's gate, which draws nothing unless the spec says so."""
    from deepspeed.moe.sharded_moe import TopKGate

    made = TopKGate(
        weight_eh.shape[1], spec.experts, spec.top_k, spec.capacity_factor, spec.capacity_factor, spec.min_capacity,
        None if spec.noise == "none" else spec.noise, spec.drop_tokens, spec.random, None, spec.random,
    )  # fmt: skip
    made.to(weight_eh.device)
    with torch.no_grad():
        made.wg.weight.copy_(weight_eh)
    return made


def choices(spec: Experts, x_sh: torch.Tensor, weight_eh: torch.Tensor) -> dict[str, Any]:
    """What the gate decides about a rank's tokens."""
    balance, capacity, _, chosen_ks, _, weight_ks, count_e = gate_of(spec, weight_eh)(x_sh, None, True)
    kept = chosen_ks >= 0
    return {
        "balance": balance.item(),
        "capacity": int(capacity),
        "chosen": chosen_ks.T.tolist(),  # -1: dropped
        "weights": weight_ks.T.tolist(),
        "load": count_e.tolist(),
        "dropped": int((~kept).sum()),
        "lost_tokens": int((~kept).all(0).sum()),  # that no expert sees
        "slots_used": int(kept.sum()) / (spec.experts * int(capacity)),
    }


def show(title: str, found: dict[str, Any], tokens: int) -> None:
    print(
        f"{title:24} load {found['load']}  capacity {found['capacity']}  dropped {found['dropped']} choices, "
        f"{found['lost_tokens']} of {tokens} tokens see no expert  balance {found['balance']:.3f}"
    )


def rebalance(x_sh: torch.Tensor, weight_eh: torch.Tensor, spec: Experts, steps: int) -> dict[str, Any]:
    """Gradient descent on the balancing loss alone.

    experts x sum(mean probability x share of tokens): the share has no gradient, it is the price of each expert; the
    probability does, and moves away from what is dear.
    """
    gate = gate_of(spec, weight_eh)
    optimizer = torch.optim.SGD(gate.parameters(), lr=1.0)
    before, after, pull = None, None, None
    for _ in range(steps):
        balance, *_, count_e = gate(x_sh, None, True)
        balance.backward()
        if before is None:
            before = count_e.tolist()
            probability_se = (x_sh @ weight_eh.T).softmax(-1).requires_grad_()
            share_e = count_e / count_e.sum()
            (spec.experts * (probability_se.mean(0) * share_e).sum()).backward()
            pull = (probability_se.grad[0] * len(x_sh)).tolist()
        after = count_e.tolist()
        optimizer.step()
        optimizer.zero_grad()
    return {"before": before, "after": after, "price": pull, "balance": balance.item()}


def changed_by_noise(spec: Experts, x_sh: torch.Tensor, weight_eh: torch.Tensor) -> float:
    """The share of tokens that the noisy gate sends elsewhere than the quiet one, of 20 drawings."""
    quiet = gate_of(replace(spec, noise="none"), weight_eh)(x_sh, None, True)[3][0]
    noisy = gate_of(spec, weight_eh)
    moved = [(noisy(x_sh, None, True)[3][0] != quiet).float().mean() for _ in range(20)]
    return torch.stack(moved).mean().item()


def all_to_alls(spec: Experts, x_sh: torch.Tensor) -> dict[str, int]:
    """Bytes that this rank sends for one layer, forward and backward: counted, and by formula."""
    expert = nn.Sequential(nn.Linear(x_sh.shape[1], x_sh.shape[1]), nn.ReLU()).to(x_sh.device)
    layer = SparseMLP(expert, x_sh.shape[1], spec).to(x_sh.device)
    layer.moe.set_deepspeed_parallelism()
    x_bth = x_sh[None].clone().requires_grad_()
    with Traffic() as traffic:
        out_bth = layer(x_bth)
        out_bth.square().mean().backward()
    sent = [call for call in traffic.seen if call.kind == "all_to_all"]
    buffer = spec.experts * spec.capacity(len(x_sh)) * x_sh.shape[1] * x_sh.element_size()
    return {
        "calls": len(sent),
        "counted": int(sum(call.sent_bytes for call in sent)),
        "formula": 4 * buffer * (spec.ep_size - 1) // spec.ep_size,
        "useful": 4 * len(x_sh) * spec.top_k * x_sh.shape[1] * x_sh.element_size() * (spec.ep_size - 1) // spec.ep_size,
    }


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--tokens", type=script.at_least(8), default=24, help="of a rank")
    parser.add_argument("--experts", type=script.at_least(2), default=4)
    parser.add_argument("--hidden", type=script.at_least(4), default=16)
    parser.add_argument("--capacity-factor", type=script.positive, default=1.25)
    parser.add_argument("--noise", choices=NOISE[1:], default="RSample")
    args = parser.parse_args(argv)
    base = Experts(args.experts, capacity_factor=args.capacity_factor, min_capacity=1, random=False).check()
    script.start(__file__, args)
    with dist.session(args.device) as ctx:
        replace(base, ep_size=ctx.world_size).check(ctx.world_size)
        zero_peers.join(ctx.launch, ctx.device).init_distributed(dist_backend=td.get_backend(), verbose=False)
        x_sh, weight_eh = skewed(args, ctx.device)
        one, two = (choices(replace(base, top_k=k), x_sh, weight_eh) for k in (1, 2))
        roomy = choices(replace(base, top_k=1, drop_tokens=False), x_sh, weight_eh)
        pulled = rebalance(x_sh, weight_eh, base, steps=100)
        noisy = changed_by_noise(replace(base, noise=args.noise, drop_tokens=False), x_sh, weight_eh)
        sent = all_to_alls(replace(base, top_k=1, ep_size=ctx.world_size), x_sh)
        twice = all_to_alls(replace(base, top_k=2, ep_size=ctx.world_size), x_sh)
        if ctx.is_main:
            for title, found in (("top 1", one), ("top 2", two), ("top 1, nothing dropped", roomy)):
                show(title, found, args.tokens)
            for token in range(4):
                weights = " + ".join(
                    f"{w:.2f} of expert {e}" if e >= 0 else "dropped"
                    for e, w in zip(two["chosen"][token], two["weights"][token], strict=True)
                )
                print(f"    top 2, token {token}: {weights}")
            prices = ", ".join(f"{price:.2f}" for price in pulled["price"])
            print(f"balancing loss: prices {prices}; in 100 steps load {pulled['before']} -> {pulled['after']}")
            print(f"noise ({args.noise}): {noisy:.0%} of the tokens go elsewhere than without")
            print(f"all-to-all, bytes a rank, top 1: counted {sent['counted']:,}, formula {sent['formula']:,}")
        td.barrier()
    fair = args.tokens / args.experts
    return {
        "load_top1": one["load"],
        "dropped_top1": one["dropped"],
        "lost_tokens_top1": one["lost_tokens"],
        "dropped_top2": two["dropped"],
        "lost_tokens_top2": two["lost_tokens"],
        "dropped_roomy": roomy["dropped"],
        "slots_used_roomy": roomy["slots_used"],
        "fullest_before": max(pulled["before"]) / fair,
        "fullest_after": max(pulled["after"]) / fair,
        "moved_by_noise": noisy,
        "all_to_alls": sent["calls"],
        "all_to_all_bytes": sent["counted"],
        "all_to_all_bytes_formula": sent["formula"],
        "all_to_all_bytes_top2": twice["counted"],
        "all_to_all_bytes_top2_formula": twice["formula"],
        "world_size": ctx.world_size,
    }


if __name__ == "__main__":
    script.run(main)
