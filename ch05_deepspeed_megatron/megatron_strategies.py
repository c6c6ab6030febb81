"""The training step of train_megatron.py as strategies of chapter 2's parity harness, one for each layout.

A name is written tp2+pp2+sp+zero1+overlap: sizes first, then sequence parallelism, the distributed optimizer, and the
reduction of gradients during backward. What the ranks leave over is data parallel.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from contextlib import ExitStack

import torch
from torch import nn

from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, share
from ch03_ddp import strategies as ddp_strategies
from ch05_deepspeed_megatron import megatron_mapping as mapping
from ch05_deepspeed_megatron import megatron_model, megatron_step
from ch05_deepspeed_megatron.megatron_layout import Layout
from common.dist import Context, read_launch
from common.script import UserError


class RaggedLlama(ddp_strategies.RaggedLlama):
    """The same model and rows. Frozen are whole matrices of Megatron's: gate and up are one there, and share a fate."""

    frozen_names = (
        "model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight",
        "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight",
    )  # fmt: skip


def context(device: torch.device) -> Context:
    """Of the session that is open: a strategy is given a model and a communicator only."""
    return Context(read_launch(), device, "", None, 60)  # type: ignore[arg-type]


class Megatron(Strategy):
    """A replica takes its share of every micro-batch, filled up so that all stages know what shape comes."""

    layout = Layout()
    zero1 = overlap = False
    clip = 1e9  # nothing is clipped: the harness compares steps by whole gradients

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        self.comm = comm
        example = next(model.parameters())
        self.ctx = context(example.device)
        self.replica = self.layout.replica(self.ctx)
        config = copy.deepcopy(model.config)
        config.rms_norm_eps = torch.finfo(example.dtype).eps  # what torch's norm takes where none is said
        self.open = ExitStack()
        self.open.enter_context(self.layout.groups(self.ctx))
        self.model = megatron_model.build(config, self.layout, self.ctx, dtype=example.dtype)
        given = dict(model.named_parameters())

        def read(name: str, dim: int | None, part: int, parts: int) -> torch.Tensor:
            return given[name].detach().chunk(parts, dim)[part] if dim is not None else given[name].detach()

        mapping.fill(self.model, self.ctx, read)
        mine = dict(self.model.named_parameters())
        for name, rule in self.rules().items():
            mine[name].requires_grad = all(given[theirs].requires_grad for theirs in rule.names)
        self.plant()
        self.ddp, self.optimizer = megatron_model.wrap(
            self.model, self.ctx, lr=0.1, clip=self.clip, distributed_optimizer=self.zero1, overlap=self.overlap,
            bucket_elements=2000,
        )  # fmt: skip
        for part in self.optimizer.chained_optimizers:
            # SGD, on the same shards: the distributed optimizer wants Adam, under which a gradient's scale is lost.
            # Those are views of weights, which an optimizer takes only once it is made; Megatron does it so, too.
            shards = [shard for group in part.optimizer.param_groups for shard in group["params"]]
            part.optimizer = make_optimizer([nn.Parameter(torch.empty(0))])
            part.optimizer.param_groups[0]["params"] = shards

    def plant(self) -> None:
        """What a faulty one does to the model before gradients' buffers and the optimizer are made."""

    @classmethod
    def why_not(cls, model: nn.Module, ranks: int) -> str | None:  # type: ignore[override]
        if next(model.parameters()).dtype != torch.float32:
            return "Megatron-Core computes the loss and the rotary positions in float32"
        try:
            cls.layout.check(model.config, ranks)
        except UserError as error:
            return str(error)
        return None

    def rules(self) -> dict[str, mapping.Rule]:
        return mapping.rules(self.model, self.layout.stage(self.ctx))

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        size = self.replica.world_size
        mine = [share(batch, self.replica.rank, size) for batch in micro_batches]
        rows = -(-max(len(inputs) for inputs, _ in micro_batches) // size)
        tokens = ddp_strategies.token_count(micro_batches)
        loss = megatron_step.backward(self.ddp, megatron_step.even(mine, rows), tokens)
        self.comm.all_reduce(loss)
        return loss

    def gradients(self) -> dict[str, torch.Tensor]:
        if self.zero1:
            mapping.gather_gradients(self.ddp)
        return dict(mapping.whole_here(self.model, self.ctx, "main_grad"))

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(mapping.whole_here(self.model, self.ctx, "data"))

    def grad_norm(self) -> torch.Tensor:
        """As the optimizer's own step finds it, to clip by."""
        self.optimizer.prepare_grads()
        return torch.tensor(self.optimizer.get_grad_norm())

    def update(self) -> None:
        megatron_step.update(self.optimizer)

    def close(self) -> None:
        self.open.close()


class SkipsNorms(Megatron):
    """Planted: the gradients of norms under sequence parallelism are not summed over the ranks that share it."""

    layout = Layout(tp=2, sequence_parallel=True)

    def plant(self) -> None:
        for name, parameter in self.model.named_parameters():
            if "layernorm" in name:
                parameter.sequence_parallel = False  # as torch.nn.RMSNorm leaves it


class SkipsTiedEmbedding(Megatron):
    """Planted: the two copies of a tied embedding keep each its own stage's gradient."""

    layout = Layout(pp=2)

    def plant(self) -> None:
        self.model.share_embeddings_and_output_weights = False


class MeansOfMeans(Megatron):
    """Planted: each replica's micro-batches are divided by its own number of tokens, the mean of those by their number,
    as Megatron does by default."""

    def plant(self) -> None:
        self.model.config.calculate_per_token_loss = False


class UnmarkedShards(Megatron):
    """Planted: weights without the mark of a shard, as perform_initialization=False leaves them. Gradients are right;
    their norm counts those of the first tensor-parallel rank only."""

    layout = Layout(tp=2)

    def plant(self) -> None:
        for parameter in self.model.parameters():
            parameter.tensor_model_parallel = False


PLANTED = {
    "norms-not-summed": SkipsNorms,
    "tied-not-summed": SkipsTiedEmbedding,
    "mean-of-means": MeansOfMeans,
    "shards-not-marked": UnmarkedShards,
}


def option(name: str) -> type[Megatron]:
    """The class of a layout, under its own name in this module, so that other processes find it.

    Raises:
        UserError: no name of that form.
    """
    if name in PLANTED:
        return PLANTED[name]
    if name not in globals():
        layout, flags = Layout(), set()
        for part in name.split("+"):
            if match := re.fullmatch(r"(tp|pp)([1-9]\d*)", part):
                layout = dataclasses.replace(layout, **{match[1]: int(match[2])})
            elif part in ("dp", "sp", "zero1", "overlap"):
                flags.add(part)
            else:
                raise UserError(f"no option {name!r}; write as in tp2+pp2+sp+zero1, or one of {', '.join(PLANTED)}")
        layout = dataclasses.replace(layout, sequence_parallel="sp" in flags)
        body = {"layout": layout, "zero1": "zero1" in flags, "overlap": "overlap" in flags, "__module__": __name__}
        globals()[name] = type(name, (Megatron,), body)
    return globals()[name]


OPTIONS = [
    "dp", "dp+zero1", "dp+zero1+overlap", "tp2", "tp2+zero1", "tp2+sp", "tp2+sp+zero1", "pp2", "pp2+zero1", "tp2+pp2",
    "tp2+pp2+sp+zero1",
]  # fmt: skip
for _name in OPTIONS:
    option(_name)
