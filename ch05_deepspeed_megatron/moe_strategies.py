"""DeepSpeed-MoE as strategies of chapter 2's parity harness, and the problems that they are compared on.

An option is written ep2+zero1 (experts over 2 ranks, ZeRO stage 1), with a planted fault ep2+zero0+divided-by-copies.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.harness import Case
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, share, trainable
from ch03_ddp.strategies import RaggedLlama, token_count
from ch04_fsdp import zero_peers
from ch05_deepspeed_megatron import moe_model, moe_step
from ch05_deepspeed_megatron.moe_model import Experts, SparseMLP
from ch05_deepspeed_megatron.moe_reference import OneProcessMoE
from common import dist
from common.script import UserError

AUX_WEIGHT = 0.1
FAULTS = ("divided-by-copies", "deepspeeds-norm")


class Mixture(RaggedLlama):
    """Chapter 3's Llama of two layers, the second with four experts, as one process computes it."""

    # Of all experts the same: ranks with unequal gradients fill DeepSpeed's buckets unequally, and its sums do not fit.
    frozen_names = (
        *(f"model.layers.1.mlp.experts.{number}.up_proj.weight" for number in range(4)),
        "model.layers.0.input_layernorm.weight",
    )

    def __init__(self, spec: Experts, *, whole: bool = False) -> None:
        self.spec, self.whole = spec, whole

    def build(self, case: Case) -> nn.Module:
        self.case = case
        model = super().build(replace(case, frozen=False))
        torch.manual_seed(1)
        layer = model.model.layers[1]
        layer.mlp = OneProcessMoE(layer.mlp, model.config.hidden_size, self.spec)
        model.aux_weight = 0.0 if self.whole else AUX_WEIGHT
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not (case.frozen and name in self.frozen_names)
        return model.to(getattr(torch, case.dtype))

    def sequences(self, case: Case, *, last: bool) -> int:
        """An uneven micro-batch is smaller, but divides: ranks with unequal passes have unequal capacity, and their
        all-to-all does not fit. Top 2 without drops takes the group's fullest expert for capacity: there it need not.
        Top 1 does too, but never more than the rank's own tokens.
        """
        if last and case.uneven and (self.spec.drop_tokens or self.spec.top_k == 1):
            return 2 * case.ranks
        return super().sequences(case, last=last)

    def loss_sum(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Pass by pass: what each rank sees of each micro-batch. Whole: all at once."""
        if self.whole:
            return super().loss_sum(model, inputs, targets)
        sizes = [self.sequences(self.case, last=n == self.case.accumulation - 1) for n in range(self.case.accumulation)]
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        for micro_batch in zip(inputs.split(sizes), targets.split(sizes), strict=True):
            for rank in range(self.case.ranks):
                mine = share(micro_batch, rank, self.case.ranks)
                loss = super().loss_sum(model, *mine)
                (mixture,) = (module for module in model.modules() if isinstance(module, OneProcessMoE))
                total = total + loss + AUX_WEIGHT * mixture.auxiliary * token_count([mine])
        return total


PROBLEMS = {
    "top1": Mixture(Experts(top_k=1, drop_tokens=False, random=False, min_capacity=1)),
    "top2": Mixture(Experts(top_k=2, drop_tokens=False, random=False, min_capacity=1)),
    "top2-drops": Mixture(Experts(top_k=2, capacity_factor=0.6, random=False, min_capacity=1)),
    "top2-whole": Mixture(Experts(top_k=2, drop_tokens=False, random=False, min_capacity=1), whole=True),
    "top1-residual": Mixture(Experts(top_k=1, drop_tokens=False, random=False, min_capacity=1, residual=True)),
}


def widen(layer: SparseMLP) -> None:
    """Let DeepSpeed compute and reduce in the type it is given. Its gate casts to float32, and nothing could agree to
    more than seven digits; chapter 3 changes the Llama's norms for the same reason. The divisor is the same code."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.moe import sharded_moe

    known = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    get_accelerator().supported_dtypes = lambda: known
    gate = layer.moe.deepspeed_moe.gate
    sharded_moe.einsum = lambda rule, a, b: torch.einsum(rule, a, b.to(a.dtype))

    def forward(x_sh: torch.Tensor, used: None = None, sparse_routes: bool = False, tutel: bool = False):
        logits_se, factor, least = gate.wg(x_sh), gate.capacity_factor, gate.min_capacity
        if gate.k == 1:
            return sharded_moe.top1gating(
                logits_se, factor, least, used, None, gate.drop_tokens, gate.use_rts, gate.ep_group, sparse_routes
            )
        return sharded_moe.top2gating(logits_se, factor, least, gate.drop_tokens, gate.ep_group, False, sparse_routes)

    gate.forward = forward


class ExpertParallel(Strategy):
    """train_moe.py's step by DeepSpeed. Each rank has a share of every micro-batch."""

    ep_size, stage = 1, 0
    fault = ""

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        self.model, self.comm = model, comm
        device = next(model.parameters()).device
        zero_peers.library(device)
        mixture = model.model.layers[1].mlp
        wanted = dict(model.named_parameters())
        dense = mixture.mlp if mixture.spec.residual else mixture.experts[0]
        sparse = SparseMLP(dense, model.config.hidden_size, replace(mixture.spec, ep_size=self.ep_size))
        model.model.layers[1].mlp = sparse.to(next(model.parameters()).dtype).to(device)
        widen(sparse)
        with torch.no_grad():
            for name, parameter in moe_model.named(model):
                parameter.copy_(wanted[name])
                parameter.requires_grad = wanted[name].requires_grad
        made = make_optimizer(p for _, p in trainable(model))
        made.param_groups = moe_model.parameter_groups(made.param_groups)
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # only counted
            "gradient_clipping": 0.0,  # without it DeepSpeed clips at 1
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 20000},
            "zero_allow_untested_optimizer": True,  # it does not know SGD
        }
        self.engine = moe_model.initialize(model, made, settings, dist.read_launch(), device)
        self.engine.communication_data_type = next(model.parameters()).dtype  # its config knows no float64
        if self.fault == "divided-by-copies":
            whole = self.engine.allreduce_no_retain
            # BUG: the divisor is left to the group that reduces, as in DeepSpeed's issue 6545. fix: all ranks
            self.engine.allreduce_no_retain = lambda bucket, dp_group, numel_per_bucket, dp_world_size: whole(
                bucket, dp_group, numel_per_bucket
            )

    @classmethod
    def why_not(cls, model: nn.Module, ranks: int) -> str | None:
        if ranks % cls.ep_size:
            return f"{ranks} ranks do not divide into expert-parallel groups of {cls.ep_size}"
        if cls.stage and next(model.parameters()).dtype == torch.float64:
            return "ZeRO's own copies of the weights are float32"
        return None

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        self.engine.set_train_batch_size(len(micro_batches) * self.comm.size)
        mine = [share(batch, self.comm.rank, self.comm.size) for batch in micro_batches]
        weight, tokens = self.model.aux_weight, token_count(micro_batches)
        loss, balance = moe_step.backward(self.engine, mine, tokens, self.comm.size, weight)
        total = loss + weight * balance
        self.comm.all_reduce(total)
        return total

    def gradients(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_grad

        trained = [(name, p) for name, p in moe_model.named(self.model) if p.requires_grad]
        found = {name: safe_get_full_grad(p) if self.stage else p.grad for name, p in trained}
        return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in moe_model.named(self.model)}

    def grad_norm(self) -> torch.Tensor:
        """What train_moe.py clips by; nothing is clipped here."""
        if self.fault == "deepspeeds-norm":
            from deepspeed.runtime.utils import clip_grad_norm_

            return clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1e9)
        return self.engine.optimizer.scaled_global_norm() if self.stage else moe_step.norm_without_zero(self.model)

    def update(self) -> None:
        self.engine.step()

    def close(self) -> None:
        self.engine.destroy()


def option(name: str) -> type[ExpertParallel]:
    """The class of ep2+zero1, or of ep2+zero0+FAULT.

    Raises:
        UserError: there is no such option.
    """
    parts = name.split("+")
    good = 2 <= len(parts) <= 3 and parts[0][:2] == "ep" and parts[0][2:].isdecimal() and int(parts[0][2:])
    if not good or parts[1] not in ("zero0", "zero1", "zero2") or (parts[2:] and parts[2] not in FAULTS):
        raise UserError(
            f"no option {name!r}; they are written ep2+zero1 (ZeRO 0 to 2), and with a fault ep2+zero0+{FAULTS[0]}"
        )
    if parts[2:] and parts[1] != "zero0":
        raise UserError(f"{name}: the faults are those of stage 0; take ...+zero0+{parts[2]}")
    body = {"ep_size": int(parts[0][2:]), "stage": int(parts[1][4:]), "fault": "".join(parts[2:])}
    return type(name, (ExpertParallel,), body)


OPTIONS = [f"ep{size}+zero{stage}" for size in (1, 2, 4) for stage in (0, 1, 2)]
