"""The training step of train_ddp.py as strategies of chapter 2's parity harness, one for each option."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers
from torch import nn

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.harness import Case
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, share
from ch03_ddp import hooks, step
from ch03_ddp.feed import IGNORE


class RaggedLlama(harness.Problem):
    """A Llama of two layers, on rows of unequal length."""

    frozen_names = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight")

    def build(self, case: Case) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=self.shape.vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=case.tied,
            initializer_range=0.2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        # The library's norm goes through float32, whatever it is given: nothing could agree to more than 7 digits.
        for layer in model.model.layers:
            layer.input_layernorm, layer.post_attention_layernorm = (nn.RMSNorm(config.hidden_size) for _ in range(2))
        model.model.norm = nn.RMSNorm(config.hidden_size)
        model = model.to(getattr(torch, case.dtype))
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not (case.frozen and name in self.frozen_names)
        return model

    def loss_sum(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return step.loss_sum(model, inputs, targets)

    def token_count(self, micro_batches: list[Batch]) -> int:
        return token_count(micro_batches)

    def steps(self, case: Case) -> Iterator[list[Batch]]:
        generator = torch.Generator().manual_seed(2)
        for micro_batches in super().steps(case):
            for _, targets in micro_batches:
                lengths = torch.randint(1, targets.shape[1] + 1, (len(targets), 1), generator=generator)
                targets[torch.arange(targets.shape[1]) >= lengths] = IGNORE
            yield micro_batches


def token_count(micro_batches: list[Batch]) -> int:
    return sum(int((targets != IGNORE).sum()) for _, targets in micro_batches)


class Plain(Strategy):
    """The step as it is, in several buckets though the model is small. Each rank has a share of every micro-batch."""

    bucket_mib, bucket_view, static_graph = 0.01, True, False
    hook = "none"
    compiled = False
    scaled = False

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        super().__init__(model, comm, make_optimizer)
        if self.compiled:
            # The many cases of a matrix ask for many variants; beyond the limit the rest would silently run uncompiled.
            torch._dynamo.config.recompile_limit = 100
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            step.compile_layers(model)
        device = next(model.parameters()).device
        # As for float16, with the factor that the gradients have to lose again, but in the case's own precision.
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=self.scaled)
        self.precision = step.Precision(torch.float32, device, scaler)
        self.ddp = step.wrap(
            model, bucket_mib=self.bucket_mib, bucket_view=self.bucket_view, static_graph=self.static_graph
        )
        if comm.size > 1:
            hooks.register(self.ddp, self.hook)

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        mine = [share(batch, self.comm.rank, self.comm.size) for batch in micro_batches]
        loss = step.backward(self.ddp, mine, token_count(micro_batches), self.comm.size, self.precision)
        self.precision.scaler.unscale_(self.optimizer)
        self.comm.all_reduce(loss)
        return loss

    def update(self) -> None:
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.optimizer.zero_grad()


class OneBucket(Plain):
    bucket_mib = 25


class NoBucketView(Plain):
    bucket_view = False


class StaticGraph(Plain):
    static_graph = True


class Scaled(Plain):
    scaled = True


class Compiled(Plain):
    compiled = True


class IdentityHook(Plain):
    hook = "identity"


OPTIONS = {
    "plain": Plain,
    "one-bucket": OneBucket,
    "no-bucket-view": NoBucketView,
    "static-graph": StaticGraph,
    "loss-scaling": Scaled,
    "compile": Compiled,
    "identity-hook": IdentityHook,
}
