"""Attention over a paged KV cache: many sequences of different lengths in one step, without padding their prompts.

A step's tokens lie one after another in one tensor [tokens, heads, head_dim], first those of the sequences that compute
a single token, then the longer chunks. Single tokens attend together, over their block tables (kernels.py); a chunk
attends by torch's own kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ch06_vllm.engine.kernels import InC, InTorch


@dataclass
class Chunk:
    """Consecutive tokens of one sequence: rows first to last of the step, positions start to end of the sequence."""

    rows: slice
    start: int
    end: int
    slots: torch.Tensor  # [end], where its keys lie


@dataclass
class Step:
    """What the model computes in one step.

    Attributes:
        tokens, positions: [tokens].
        slots: [tokens], block * block_size + offset: where each token's key and value go.
        tables: [singles, blocks], int32: the block tables of the sequences with one token, padded with 0.
        lengths: [singles], int32: how many tokens they attend to, the new one among them.
        chunks: of the other sequences.
        samples: [sampled], the rows whose next token is to be chosen.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    chunks: list[Chunk]
    samples: torch.Tensor

    def to(self, device: torch.device) -> Step:
        if device.type == "cpu":
            return self
        chunks = [Chunk(c.rows, c.start, c.end, c.slots.to(device)) for c in self.chunks]
        moved = (getattr(self, n).to(device) for n in ("tokens", "positions", "slots", "tables", "lengths"))
        return Step(*moved, chunks, self.samples.to(device))


@dataclass
class LayerCache:
    """One layer's keys and values, [blocks, block_size, kv_heads, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor
    key_slots: torch.Tensor = field(init=False)  # the same memory as [slots, kv_heads, head_dim]
    value_slots: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.key_slots, self.value_slots = self.keys.flatten(0, 1), self.values.flatten(0, 1)


def attention(
    q_thd: torch.Tensor, k_tkd: torch.Tensor, v_tkd: torch.Tensor, cache: LayerCache, step: Step, kernels: InTorch | InC
) -> torch.Tensor:
    """Every token of the step to those before it in its sequence, whose keys and values are in the cache.

    Args:
        q_thd: [tokens, heads, head_dim]; k_tkd and v_tkd with the heads of keys, each for heads / kv_heads of queries.

    Returns:
        [tokens, heads, head_dim].
    """
    singles = len(step.lengths)
    if not step.chunks:
        return kernels.attend(q_thd, cache, step)
    out = q_thd.new_empty(q_thd.shape)
    if singles:
        out[:singles] = kernels.attend(q_thd[:singles], cache, step)
    for chunk in step.chunks:
        out[chunk.rows] = _chunk_attention(q_thd[chunk.rows], k_tkd[chunk.rows], v_tkd[chunk.rows], cache, chunk)
    return out


def _chunk_attention(
    q_thd: torch.Tensor, k_tkd: torch.Tensor, v_tkd: torch.Tensor, cache: LayerCache, chunk: Chunk
) -> torch.Tensor:
    mask = None
    if chunk.start:  # what came before is in the cache, and now the chunk too
        k_tkd, v_tkd = cache.key_slots[chunk.slots], cache.value_slots[chunk.slots]
        mask = torch.ones(len(q_thd), chunk.end, dtype=torch.bool, device=q_thd.device).tril(chunk.start)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_thd, k_tkd, v_tkd))
    attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] > k.shape[1])
    return attended.squeeze(0).transpose(0, 1)
