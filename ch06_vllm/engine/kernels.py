"""What a layer does beside its matrix products, twice: in torch, for every device and type, and fused in C for CPUs.

The C loops (kernels.c) are compiled when they are first needed. Without a compiler the engine answers the same, slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from common.bootstrap import cache_dir
from common.logs import get_logger

if TYPE_CHECKING:
    from ch06_vllm.engine.paged_attention import LayerCache, Step

SOURCE = Path(__file__).with_suffix(".c")
TYPES = {torch.float32: "", torch.bfloat16: "-DBFLOAT16"}
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class InTorch:
    """The reference. Shapes as in kernels.c."""

    def add_norm(
        self, x_te: torch.Tensor, delta_te: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """x += delta, in place; returns x / rms(x) * weight (Zhang and Sennrich 2019)."""
        if delta_te is not None:
            x_te += delta_te
        return F.rms_norm(x_te, x_te.shape[-1:], weight, eps)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[t, 2f] -> silu of the first half times the second, [t, f] (Shazeer 2020)."""
        gate_tf, up_tf = gate_up.chunk(2, dim=-1)
        return F.silu(gate_tf) * up_tf

    def rotate_and_store(
        self, q_thd: torch.Tensor, k_tkd: torch.Tensor, v_tkd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        cache: LayerCache, step: Step,
    ) -> None:  # fmt: skip
        """Rotary position embedding (Su et al. 2021) of q and k, in place: pairs (i, i + d/2) turn by the angle of
        their position; cos and sin are [positions, d]. Then keys and values go into their slots of the cache."""
        cos, sin = cos[step.positions].unsqueeze(1), sin[step.positions].unsqueeze(1)
        for x in (q_thd, k_tkd):
            first, second = x.chunk(2, dim=-1)
            x.copy_(x * cos + torch.cat((-second, first), dim=-1) * sin)
        cache.key_slots.index_copy_(0, step.slots, k_tkd)
        cache.value_slots.index_copy_(0, step.slots, v_tkd)

    def attend(self, q_nhd: torch.Tensor, cache: LayerCache, step: Step) -> torch.Tensor:
        """Of the sequences with one new token: copy their blocks side by side, padded to the longest, and attend."""
        k, v = (x[step.tables].flatten(1, 2).transpose(1, 2) for x in (cache.keys, cache.values))  # [n, k, length, d]
        mask = torch.arange(k.shape[2], device=q_nhd.device) < step.lengths[:, None]
        return F.scaled_dot_product_attention(
            q_nhd.unsqueeze(2), k, v, mask[:, None, None], enable_gqa=q_nhd.shape[1] > k.shape[1]
        ).squeeze(2)


class InC:
    """kernels.c, for one type and head size. Tensors must be contiguous where nothing else is said."""

    def __init__(self, library: ctypes.CDLL, head_dim: int) -> None:
        self.library, self.scale = library, head_dim**-0.5
        library.add_norm.argtypes = [POINTER] * 4 + [INT] * 2 + [FLOAT]
        library.gate.argtypes = [POINTER] * 2 + [INT] * 2
        library.rotate_and_store.argtypes = [POINTER] * 9 + [INT] * 6
        library.attend.argtypes = [POINTER] * 6 + [INT] * 6 + [FLOAT]

    def add_norm(
        self, x_te: torch.Tensor, delta_te: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(x_te)
        width = x_te.shape[-1]
        delta = None if delta_te is None else delta_te.data_ptr()
        self.library.add_norm(
            x_te.data_ptr(), delta, weight.data_ptr(), out.data_ptr(), x_te.numel() // width, width, eps
        )
        return out

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self.library.gate(gate_up.data_ptr(), out.data_ptr(), rows, width)
        return out

    def rotate_and_store(
        self, q_thd: torch.Tensor, k_tkd: torch.Tensor, v_tkd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        cache: LayerCache, step: Step,
    ) -> None:  # fmt: skip
        tensors = (q_thd, k_tkd, v_tkd, cos, sin, step.positions, step.slots, cache.keys, cache.values)
        tokens, heads = q_thd.shape[:2]
        rows = (q_thd.stride(0), k_tkd.stride(0), v_tkd.stride(0))
        self.library.rotate_and_store(*(x.data_ptr() for x in tensors), tokens, heads, k_tkd.shape[1], *rows)

    def attend(self, q_nhd: torch.Tensor, cache: LayerCache, step: Step) -> torch.Tensor:
        out = q_nhd.new_empty(q_nhd.shape)
        tensors = (q_nhd, cache.keys, cache.values, step.tables, step.lengths, out)
        block_size, kv_heads = cache.keys.shape[1:3]
        sizes = (*q_nhd.shape[:2], kv_heads, block_size, step.tables.shape[1], q_nhd.stride(0))
        if self.library.attend(*(x.data_ptr() for x in tensors), *sizes, self.scale):
            raise MemoryError("out of memory for attention scores")
        return out


@functools.cache
def kernels(device: str, dtype: torch.dtype, head_dim: int) -> InTorch | InC:
    """The fused ones where there are any for this device (torch.device.type), type and size."""
    if device != "cpu" or dtype not in TYPES or head_dim % 2:
        return InTorch()
    try:
        return InC(ctypes.CDLL(str(_build(dtype, head_dim))), head_dim)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()[:1]
        get_logger().warning("no C loops, the engine is slower", because="".join(said)[:160])
        return InTorch()


def _build(dtype: torch.dtype, head_dim: int) -> Path:
    """The shared library, compiled once into the project's cache. It takes OpenMP from torch, which is loaded: with a
    copy of its own, the threads of both would fight for the cores."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise OSError("no C compiler")
    options = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC"]
    options += [f"-DHEAD_DIM={head_dim}", *TYPES[dtype].split()]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, _cpu(), *options]).encode()).hexdigest()[:16]
    library = cache_dir() / "kernels" / f"{key}.so"
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
