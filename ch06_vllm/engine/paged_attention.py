"""Attention over a paged KV cache: many sequences of different lengths in one step, without padding their prompts.

A step's tokens lie one after another in one tensor [tokens, heads, head_dim], first those of the sequences that compute
a single token, then the longer chunks. Single tokens attend together, through a C loop over the block tables where
there is a C compiler, else over gathered blocks; a chunk attends by torch's own kernel.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from common.bootstrap import cache_dir
from common.logs import get_logger

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}


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
    q_thd: torch.Tensor, k_tkd: torch.Tensor, v_tkd: torch.Tensor, cache: LayerCache, step: Step
) -> torch.Tensor:
    """Write the step's keys and values to the cache, and attend.

    Args:
        q_thd: [tokens, heads, head_dim]; k_tkd and v_tkd with the heads of keys, each for heads / kv_heads of queries.

    Returns:
        [tokens, heads, head_dim].
    """
    cache.key_slots.index_copy_(0, step.slots, k_tkd)
    cache.value_slots.index_copy_(0, step.slots, v_tkd)
    out = torch.empty_like(q_thd)
    singles = len(step.lengths)
    if singles:
        kernel = compiled(q_thd.dtype, q_thd.shape[2]) if q_thd.device.type == "cpu" else None
        (kernel or gathered)(q_thd[:singles], cache, step.tables, step.lengths, out[:singles])
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


def gathered(
    q_nhd: torch.Tensor, cache: LayerCache, tables: torch.Tensor, lengths: torch.Tensor, out_nhd: torch.Tensor
) -> None:
    """Copy every sequence's blocks side by side, padded to the longest, and attend: any device and type."""
    k, v = (x[tables].flatten(1, 2).transpose(1, 2) for x in (cache.keys, cache.values))  # [n, kv_heads, length, d]
    mask = torch.arange(k.shape[2], device=q_nhd.device) < lengths[:, None]
    attended = F.scaled_dot_product_attention(
        q_nhd.unsqueeze(2), k, v, mask[:, None, None], enable_gqa=q_nhd.shape[1] > k.shape[1]
    )
    out_nhd.copy_(attended.squeeze(2))


@functools.cache
def compiled(dtype: torch.dtype, head_dim: int) -> Callable[..., None] | None:
    """paged_attention.c for this type and size; None where there is no C compiler, or no such variant."""
    if dtype not in FLAGS:
        return None
    try:
        function = ctypes.CDLL(str(_build(dtype, head_dim))).paged_attention
    except (OSError, subprocess.SubprocessError) as error:
        get_logger().warning("paged attention without its C loop, slower", because=str(error).splitlines()[0][:120])
        return None
    function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int] * 5 + [ctypes.c_float]

    def attend(
        q_nhd: torch.Tensor, cache: LayerCache, tables: torch.Tensor, lengths: torch.Tensor, out_nhd: torch.Tensor
    ) -> None:
        q_nhd = q_nhd.contiguous()
        sequences, heads = q_nhd.shape[:2]
        block_size, kv_heads = cache.keys.shape[1:3]
        tensors = (q_nhd, cache.keys, cache.values, tables, lengths, out_nhd)
        sizes = (sequences, heads, kv_heads, block_size, tables.shape[1])
        if function(*(x.data_ptr() for x in tensors), *sizes, head_dim**-0.5):
            raise MemoryError("out of memory for attention scores")

    return attend


def _build(dtype: torch.dtype, head_dim: int) -> Path:
    """The shared library, compiled once into the project's cache. It takes OpenMP from torch, which is loaded: with a
    copy of its own, the threads of both would fight for the cores."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise OSError("no C compiler")
    options = [
        "-O3",
        "-march=native",
        "-ffast-math",
        "-fno-finite-math-only",
        "-fPIC",
        f"-DHEAD_DIM={head_dim}",
        *FLAGS[dtype],
    ]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, _cpu(), *options]).encode()).hexdigest()[:16]
    library = cache_dir() / "kernels" / f"paged_attention-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.so")
        objects = partial.with_suffix(".o")
        for command in (
            [compiler, *options, "-fopenmp", "-c", str(SOURCE), "-o", str(objects)],
            [compiler, "-shared", str(objects), "-lm", "-o", str(partial)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        objects.unlink()
        partial.replace(library)
    return library


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return ""
