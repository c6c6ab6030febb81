"""A Llama with mixture-of-experts layers: DeepSpeed's MoE in place of the MLP, its experts spread over the ranks.

    spec = Experts(experts=8, ep_size=2, top_k=2)          # 8 experts a layer, over 2 ranks; a token goes to 2 of them
    model = build(config, spec, ctx.device, seed=0)
    engine = initialize(model, optimizer(model, lr), settings, ctx.launch, ctx.device)

Who holds what on 4 ranks with ep_size 2 and 4 experts (E + D in DeepSpeed's words):

    rank                     0         1         2         3
    everything but experts   a copy    a copy    a copy    a copy      gradients summed over all four
    experts                  0, 1      2, 3      0, 1      2, 3        summed over {0, 2} and over {1, 3}

Ranks {0, 1} and {2, 3} are the expert-parallel groups: a token goes to its expert's rank and comes back by an
all-to-all inside its group. Ranks {0, 2} and {1, 3} are the expert-data-parallel groups: copies of the same experts.
"DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training", arXiv:2201.05596; gating as in GShard
(arXiv:2006.16668, top 2) and the Switch Transformer (arXiv:2101.03961, top 1).
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from torch import nn

from ch01_intro import training
from ch04_fsdp import weights, zero_peers
from ch04_fsdp.options import check_fits
from common import lm, profiling
from common.dist import Context, Launch
from common.script import UserError

NOISE = ("none", "Jitter", "RSample")
EXPERT = re.compile(r"\.moe\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")


@dataclass(frozen=True)
class Experts:
    """How the experts are made, chosen and spread.

    Attributes:
        experts: of each MoE layer.
        ep_size: ranks that share them out; each of those holds experts / ep_size.
        top_k: experts that a token goes to, 1 or 2.
        capacity_factor: an expert takes tokens x top_k / experts x this of a rank and pass, at least min_capacity; the
            rest is dropped: it passes by the layer on the residual stream.
        drop_tokens: False: as much room as the fullest expert needs, padded for all the others.
        residual: a dense MLP beside the experts, and a learned mixture of the two ("Residual-MoE").
        noise: on the gate's input (Jitter) or on its choice (RSample, top 1 only).
        every: each so-manyth layer has experts, the last of them first counted.
        random: top 1: which tokens of a full expert are dropped is drawn, not the last ones; top 2: the second expert
            is drawn by its probability, and not always the second best.
    """

    experts: int = 4
    ep_size: int = 1
    top_k: int = 1
    capacity_factor: float = 1.25
    min_capacity: int = 4
    drop_tokens: bool = True
    residual: bool = False
    noise: str = "none"
    every: int = 2
    random: bool = True

    def check(self, ranks: int | None = None) -> Experts:
        """
        Raises:
            UserError: the experts cannot be made or spread like this.
        """
        if self.top_k not in (1, 2):
            raise UserError(
                f"--top-k {self.top_k}: DeepSpeed's gates send a token to 1 expert or to 2; take one of those"
            )
        if self.experts < max(2, self.top_k):
            raise UserError(f"--experts {self.experts} leaves the gate nothing to choose; take 2 or more")
        if self.experts % self.ep_size:
            raise UserError(
                f"--experts {self.experts} are no multiple of --ep-size {self.ep_size}, and each rank holds as many; "
                "change one"
            )
        if self.noise == "RSample" and self.top_k == 2:
            raise UserError(
                "--noise RSample belongs to --top-k 1: DeepSpeed's top-2 gate draws its second choice anyway"
            )
        if ranks is not None and ranks % self.ep_size:
            raise UserError(
                f"--ep-size {self.ep_size} does not divide {ranks} ranks; take one that does, such as "
                f"{max(n for n in range(1, ranks + 1) if ranks % n == 0 and self.experts % n == 0)}"
            )
        return self

    def capacity(self, tokens: int) -> int:
        """Tokens that an expert takes of `tokens` on a rank in a pass, if any are dropped. In float32, as DeepSpeed."""
        room = torch.ceil((tokens / self.experts) * torch.tensor(self.capacity_factor * self.top_k))
        return max(self.min_capacity, int(room))


class SparseMLP(nn.Module):
    """What stands where a Llama layer's MLP was. Notes what the gate said, for the loss and for the report.

    Attributes:
        auxiliary: of the last forward pass: the load-balancing loss, 0-d; 1 if all experts get the same.
        counts: [experts] int64: tokens that chose each expert on this rank while training, since `clear`.
        dropped: how many of them found it full.
    """

    def __init__(self, expert: nn.Module, hidden: int, spec: Experts) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.spec = spec
        with contextlib.redirect_stdout(sys.stderr):
            self.moe = MoE(
                hidden, expert, spec.experts, spec.ep_size, k=spec.top_k, capacity_factor=spec.capacity_factor,
                eval_capacity_factor=spec.capacity_factor, min_capacity=spec.min_capacity, use_residual=spec.residual,
                noisy_gate_policy=None if spec.noise == "none" else spec.noise, drop_tokens=spec.drop_tokens,
                use_rts=spec.random, top2_2nd_expert_sampling=spec.random,
            )  # fmt: skip
        self.auxiliary: torch.Tensor = torch.zeros(())
        self.clear()

    def clear(self) -> None:
        self.counts: torch.Tensor | int = 0
        self.dropped: torch.Tensor | int = 0

    def forward(self, x_bth: torch.Tensor) -> torch.Tensor:
        out_bth, self.auxiliary, counts_e = self.moe(x_bth)
        if self.training:
            self.counts = self.counts + counts_e
            if self.spec.drop_tokens:
                room = self.spec.capacity(x_bth.shape[0] * x_bth.shape[1])
                self.dropped = self.dropped + (counts_e - room).clamp(min=0).sum()
        return out_bth


def build(config: Any, spec: Experts, device: torch.device, *, seed: int = 0) -> nn.Module:
    """A Llama with experts: the same model for every ep_size, the experts different from each other.

    Raises:
        UserError: the experts cannot be made like this, or no layer of the model is one of them.
    """
    spec.check()
    if spec.every > config.num_hidden_layers:
        raise UserError(f"--every {spec.every} is more than the model's {config.num_hidden_layers} layers; take fewer")
    zero_peers.library(device)
    model = lm.build(config, device, seed=seed)
    put_experts(model, spec)
    model.to(device)
    draw_experts(model, seed)
    return model


def put_experts(model: nn.Module, spec: Experts) -> None:
    for number, layer in enumerate(model.model.layers, 1):
        if number % spec.every == 0:
            layer.mlp = SparseMLP(layer.mlp, model.config.hidden_size, spec)


def sparse_layers(model: nn.Module) -> list[SparseMLP]:
    return [module for module in model.modules() if isinstance(module, SparseMLP)]


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of this rank by names that are the same for every ep_size: expert 3 is expert 3, whoever holds it."""
    first = {f"{name}.": _first_expert(layer) for name, layer in model.named_modules() if isinstance(layer, SparseMLP)}
    for name, parameter in model.named_parameters():
        if found := EXPERT.search(name):
            number = first[f"{name[: found.start()]}."] + int(found[1])
            name = f"{name[: found.start()]}.experts.{number}.{name[found.end() :]}"
        yield name.replace(".moe.deepspeed_moe.gate.wg.", ".gate.").replace(".moe.", "."), parameter


def _first_expert(layer: SparseMLP) -> int:
    """The number of the first expert on this rank. DeepSpeed deals ranks out to groups one after the other."""
    spec = layer.spec
    rank = td.get_rank() if td.is_initialized() else 0
    return rank % spec.ep_size * (spec.experts // spec.ep_size)


def is_expert(parameter: torch.Tensor) -> bool:
    """Is it one of a group's experts, so that other ranks hold others? (DeepSpeed's own mark.)"""
    return not getattr(parameter, "allreduce", True)


@torch.no_grad()
def draw_experts(model: nn.Module, seed: int) -> None:
    """Random weights for each expert by its name. DeepSpeed makes them copies of one MLP, on every rank: experts that
    start equal have equal gradients but for the tokens they get, and a gate can hardly tell them apart."""
    for name, parameter in named(model):
        if is_expert(parameter):
            weights.draw(parameter, name, seed, model.config.initializer_range)


def optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW as in chapter 1, with groups of their own for experts: what DeepSpeed knows by which ranks to sum over."""
    made = training.make_optimizer(model, lr)
    made.param_groups = parameter_groups(made.param_groups)
    return made


def parameter_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group split into what all ranks share and what only an expert-data-parallel group does."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    named_groups = [{**group, "name": f"group {number}"} for number, group in enumerate(groups)]
    return [group for group in split(named_groups) if group["params"]]


def initialize(
    model: nn.Module, made: torch.optim.Optimizer, settings: dict[str, Any], launch: Launch, device: torch.device
) -> Any:
    """A DeepSpeedEngine. What DeepSpeed prints about its groups goes where logs go."""
    with contextlib.redirect_stdout(sys.stderr):
        library = zero_peers.join(launch, device)
        return library.initialize(model=model, optimizer=made, config=settings)[0]


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every parameter of the whole model, all experts, in one order on all ranks. A collective."""
    layer_of = {parameter: layer for layer in sparse_layers(model) for parameter in layer.parameters()}
    for name, parameter in named(model):
        if not is_expert(parameter):
            yield name, parameter.detach()
            continue
        layer = layer_of[parameter]
        parts = [torch.empty_like(parameter) for _ in range(layer.spec.ep_size)]
        td.all_gather(parts, parameter.detach(), group=layer.moe.deepspeed_moe.ep_group)
        before, number, after = re.split(r"\.experts\.(\d+)\.", name)
        held = layer.spec.experts // layer.spec.ep_size
        for rank, part in enumerate(parts):
            yield f"{before}.experts.{int(number) % held + rank * held}.{after}", part


def sha256(model: nn.Module) -> str:
    """One hash of the whole model, the same for every ep_size if every bit is. A collective."""
    return weights.sha256_of(sorted(whole_parameters(model), key=lambda pair: pair[0]))


def check_memory(config: Any, spec: Experts, ctx: Context, stage: int, dtype: torch.dtype) -> None:
    """Before anything is allocated: what a rank holds without ZeRO's savings. Activations come on top.

    Raises:
        UserError: it does not fit.
    """
    layers = config.num_hidden_layers // spec.every
    more = spec.experts // spec.ep_size - 1 + spec.residual
    held = lm.parameter_count(config) + layers * more * 3 * config.hidden_size * config.intermediate_size
    each = 2 * dtype.itemsize + (12 if stage or dtype != torch.float32 else 8)  # 12: with a float32 copy of the weights
    need = each * held * (ctx.launch.local_world_size if ctx.device.type == "cpu" else 1)
    cure = "take fewer --experts, a larger --ep-size or a smaller --preset"
    check_fits(need, ctx.device, ctx, f"a rank's {held:,} parameters", cure)


def flops_per_token(config: Any, spec: Experts, seq_len: int) -> float:
    """As profiling.flops_per_token, with the experts that a token meets, dropped or not."""
    more = spec.top_k - 1 + spec.residual
    layers = config.num_hidden_layers // spec.every
    return profiling.flops_per_token(config, seq_len) + 6.0 * layers * more * 3 * config.hidden_size * (
        config.intermediate_size
    )


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """parameters: of the whole model; on_this_rank; active: those that a token meets."""
    mine = sum(p.numel() for p in model.parameters())
    whole = active = sum(p.numel() for p in model.parameters() if not is_expert(p))
    for layer in sparse_layers(model):
        held = sum(p.numel() for p in layer.parameters() if is_expert(p)) * layer.spec.ep_size
        whole += held
        active += held // layer.spec.experts * layer.spec.top_k
    return {"parameters": whole, "parameters_of_a_rank": mine, "active_parameters": active}


@contextlib.contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """In this block gates draw nothing and take single tokens too: to validate, and to write a sample word by word."""
    gates = [layer.moe.deepspeed_moe.gate for layer in sparse_layers(model)]
    before = [(gate.use_rts, gate.top2_2nd_expert_sampling, gate.min_capacity) for gate in gates]
    for gate in gates:
        gate.use_rts = gate.top2_2nd_expert_sampling = False
        gate.min_capacity = 1  # the top-1 gate refuses a pass of fewer tokens than this
    try:
        yield
    finally:
        for gate, was in zip(gates, before, strict=True):
            gate.use_rts, gate.top2_2nd_expert_sampling, gate.min_capacity = was
