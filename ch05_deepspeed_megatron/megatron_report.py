"""What a training run tells, where a model lies in pieces on several ranks: chapter 3's report, answered by all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from ch01_intro import training
from ch03_ddp.feed import IGNORE
from ch03_ddp.report import Report
from ch05_deepspeed_megatron import megatron_convert, megatron_step
from ch05_deepspeed_megatron import megatron_mapping as mapping
from ch05_deepspeed_megatron.megatron_model import inner
from common import data, lm


class MegatronReport(Report):
    """Each method is a collective of the whole job; `model` is what wrap() returned."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.ctx.rank % self.args.tp or self.ctx.rank >= self.ctx.world_size // self.args.pp:
            self.samples = None  # a replica's ranks all take the same sequences: one of them notes it

    def finish(self, model: nn.Module, *, preempted: bool) -> dict[str, Any]:
        self.ddp, config = model, inner(model).hf_config
        described = SimpleNamespace(config=config, parameters=inner(model).parameters)
        result = super().finish(described, preempted=preempted)  # type: ignore[arg-type]
        return result | {"parameters": lm.parameter_count(config)}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """training.evaluate, through the pipeline's schedule; replicas share the blocks out."""
        args, ctx, model = self.args, self.ctx, self.model_of(model)
        layout = inner(model).layout
        replica = layout.replica(ctx)
        blocks, count = data.Blocks(self.corpus.validation, args.seq_len), training.validation_blocks(self.corpus, args)
        mine = np.arange(replica.rank, count, replica.world_size)
        batches = [blocks.batch(mine[at : at + args.batch_size]) for at in range(0, len(mine), args.batch_size)]
        if not batches:  # a stage that waits for nothing is still simpler than one that is left out
            inputs, targets = blocks.batch(np.zeros(1, dtype=np.int64))
            batches = [(inputs, torch.full_like(targets, IGNORE))]
        placed = [(x.to(ctx.device), y.to(ctx.device)) for x, y in megatron_step.even(batches, args.batch_size)]
        model.eval()
        total = megatron_step.run(model, placed, forward_only=True)
        model.train()
        torch.distributed.all_reduce(total)
        return total.item() / (count * args.seq_len)

    def model_of(self, model: Any) -> nn.Module:
        return model if isinstance(model, nn.Module) else self.ddp

    def weights_sha256(self, model: Any) -> str:
        """Of the whole model. A rank whose shards are not those of its fellow in the first replica, or whose copy of a
        norm or of a tied embedding is not the others', answers something else."""
        model, ctx = inner(self.model_of(model)), self.ctx
        layout = model.layout
        whole = mapping.sha256(model, ctx)
        named = dict(model.named_parameters())
        tied = [p for name, p in named.items() if name.startswith(("embedding", "output_layer"))]
        tied = tied if model.hf_config.tie_word_embeddings else []
        own = [digest(named.values()), digest(p for p in named.values() if p.dim() == 1), digest(tied)]
        said = [text.split() for text in ctx.exchange("shards", " ".join(own))]
        owners = layout.owners(layout.stage(ctx), ctx.world_size)
        tp_rank = ctx.rank % layout.tp
        same = own[0] == said[owners[tp_rank]][0] and own[1] == said[owners[0]][1]
        return whole if same and (not tied or own[2] == said[tp_rank][2]) else own[0]

    def save_model(self, model: Any) -> None:
        if self.args.out:
            tokenizer = self.corpus.tokenizer() if self.ctx.is_main else None
            megatron_convert.save(inner(self.ddp), tokenizer, self.out / "model", self.ctx)

    @torch.no_grad()
    def sample(self, model: Any) -> None:
        """--prompt continued as training.sample does it, without a cache: each token runs the whole text again."""
        args, ctx, model = self.args, self.ctx, inner(self.ddp)
        if not args.sample_tokens:
            return
        tokenizer = self.corpus.tokenizer()
        ids = tokenizer(args.prompt or tokenizer.eos_token).input_ids
        generator = torch.Generator().manual_seed(args.seed)
        model.eval()
        for _ in range(min(args.sample_tokens, model.hf_config.max_position_embeddings - len(ids))):
            padded = torch.tensor([ids + [0] * (-len(ids) % model.layout.tp)], device=ctx.device)  # seen by nobody
            logits = megatron_convert.logits(model, padded, ctx)
            chosen = torch.zeros(1, dtype=torch.int64, device=ctx.device)
            if logits is not None:
                likely = logits[0, len(ids) - 1].float().cpu().div(0.7).topk(50)
                chosen[0] = likely.indices[torch.multinomial(likely.values.softmax(0), 1, generator=generator)]
            torch.distributed.broadcast(chosen, 0)
            ids.append(int(chosen))
        model.train()
        if ctx.is_main:
            print(f"--- the model continues {args.prompt!r}\n{tokenizer.decode(ids)}\n---", flush=True)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    made = hashlib.sha256()
    for tensor in tensors:
        made.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()
