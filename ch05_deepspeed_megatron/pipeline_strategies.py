"""DeepSpeed's pipeline as strategies of chapter 2's parity harness, as it should be and with bugs that others shipped.

The engine does a whole step in one call. Here it is stopped before the optimizer, to look at the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import nn

from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, share
from ch03_ddp.feed import IGNORE
from ch03_ddp.strategies import token_count
from ch04_fsdp import zero_peers
from ch05_deepspeed_megatron import pipeline_engine, pipeline_model
from common import dist


class Pipeline(Strategy):
    """Two stages; further ranks are data replicas, of which each has a share of every micro-batch."""

    stages = 2
    partition = "uniform"
    zero = 0
    checkpoint_every = 0
    loss_fn = staticmethod(pipeline_model.loss)
    skipped: tuple[str, ...] = ()  # instructions of the schedule that a bug leaves out

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        self.comm = comm
        first = next(model.parameters())
        zero_peers.join(dist.read_launch(), first.device)
        self.module = pipeline_model.build(
            model.config, self.stages, self.partition, checkpoint_every=self.checkpoint_every, dynamic_shape=True,
            norm_type=nn.RMSNorm, loss_fn=self.loss_fn,
        ).to(first.dtype)  # fmt: skip
        whole = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in pipeline_model.named_parameters(self.module):
                parameter.copy_(whole[name])
                parameter.requires_grad = whole[name].requires_grad
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # only counted: the batches are ours
            "gradient_clipping": 1e9,
            "zero_optimization": {"stage": self.zero, "reduce_bucket_size": 100_000},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.engine = pipeline_engine.initialize(self.module, make_optimizer(trained), settings)
        from deepspeed.runtime.pipe import schedule

        left_out = {getattr(schedule, name) for name in (*self.skipped, "OptimizerStep")}
        self.engine._INSTRUCTION_MAP = {
            what: nothing if what in left_out else does for what, does in self.engine._INSTRUCTION_MAP.items()
        }
        self.replicas = self.engine.dp_world_size

    @classmethod
    def why_not(cls, model: nn.Module, ranks: int) -> str | None:  # type: ignore[override]
        return f"{ranks} ranks do not divide into pipelines of {cls.stages} stages" if ranks % cls.stages else None

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        engine = self.engine
        mine = [share(batch, engine.grid.data_parallel_id, self.replicas) for batch in micro_batches]
        engine.set_train_batch_size(len(mine) * self.replicas)
        pipeline_engine.step(engine, mine, token_count(micro_batches))
        # train_batch's answer, before it is rounded to float32
        last = engine.is_last_stage()
        loss = engine.total_loss / (len(mine) * self.replicas) if last else torch.zeros((), device=engine.device)
        loss = loss.double()
        self.comm.all_reduce(loss)
        return loss

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return pipeline_model.named_parameters(self.module)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in self.named() if p.grad is not None}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.named()}

    def grad_norm(self) -> torch.Tensor:
        """As the step clips by."""
        return pipeline_engine.squared_norm(self.engine).sqrt()

    def update(self) -> None:
        self.engine._exec_optimizer_step()

    def close(self) -> None:
        self.engine.destroy()


def nothing(*_: Any, **__: Any) -> None:
    pass


class Parameters(Pipeline):
    partition = "parameters"


class FourStages(Pipeline):
    """Stages in the middle, which have neither tokens nor a loss."""

    stages = 4


class Recompute(Pipeline):
    checkpoint_every = 1


class Zero1(Pipeline):
    """Each replica has a part of the optimizer's state, and of the gradients once they are summed."""

    zero = 1

    def gradients(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p) for name, p in self.named() if p.requires_grad}

    def grad_norm(self) -> torch.Tensor:
        return torch.as_tensor(self.engine.optimizer.scaled_global_norm())


# ------------------------------------------------- wrong ones


class LossNotDivided(Pipeline):
    """Gradients of micro-batches are added up, and nobody divides by their number."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        count, last = self.engine.gradient_accumulation_steps, self.engine.is_last_stage()
        self.engine._backward_prologue_per_tensor = lambda gradient: gradient * count() if last else gradient


class DividedInEveryStage(Pipeline):
    """DeepSpeed before its pull request 8154: each stage divided again what the last one had divided."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        count, last = self.engine.gradient_accumulation_steps, self.engine.is_last_stage()
        self.engine._backward_prologue_per_tensor = lambda gradient: gradient if last else gradient / count()


class TiedNotSummed(Pipeline):
    """The embedding learns from the first stage, its copy in the head from the last."""

    skipped = ("ReduceTiedGrads",)


class ReplicasNotSummed(Pipeline):
    skipped = ("ReduceGrads",)


def mean_of_means(logits_btv: torch.Tensor, labels: pipeline_model.Labels) -> torch.Tensor:
    return F.cross_entropy(logits_btv.flatten(0, 1), labels[0].flatten(), ignore_index=IGNORE)


class MeanOfMeans(Pipeline):
    """The loss function that everybody writes first: the mean over the micro-batch's own tokens."""

    loss_fn = staticmethod(mean_of_means)


class FirstStagesNorm(Pipeline):
    """DeepSpeed 0.19.8's own clipping in float32 without ZeRO."""

    def grad_norm(self) -> torch.Tensor:
        from deepspeed.runtime.utils import clip_grad_norm_

        return clip_grad_norm_(list(self.module.parameters()), 1e9, mpu=self.engine.mpu).squeeze()


class TiedCountedTwice(Pipeline):
    """The norm over all stages, with both copies of the embedding in it."""

    def grad_norm(self) -> torch.Tensor:
        own = [g.square().sum() for g in self.gradients().values()]
        total = torch.stack(own).sum().double()
        td.all_reduce(total, group=self.engine.mpu.get_pipe_parallel_group())
        return total.sqrt()


OPTIONS = {
    "pipeline": Pipeline,
    "parameters": Parameters,
    "four-stages": FourStages,
    "recompute": Recompute,
    "zero-1": Zero1,
}
PLANTED = {
    "loss-not-divided": LossNotDivided,
    "divided-in-every-stage": DividedInEveryStage,
    "tied-not-summed": TiedNotSummed,
    "replicas-not-summed": ReplicasNotSummed,
    "mean-of-means": MeanOfMeans,
    "first-stages-norm": FirstStagesNorm,
    "tied-counted-twice": TiedCountedTwice,
}
