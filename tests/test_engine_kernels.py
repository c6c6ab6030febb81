"""The engine's loops: in C and in torch against each other; attention against torch's own over contiguous keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ch06_vllm.engine import kernels as module
from ch06_vllm.engine.kernels import InC, InTorch, kernels
from ch06_vllm.engine.paged_attention import Chunk, LayerCache, Step, attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}


@dataclass
class Sequences:
    """Of different lengths, with their keys scattered over a paged cache, and the same side by side."""

    cache: LayerCache
    tables: list[list[int]]
    keys: list[torch.Tensor]  # each [length, kv_heads, head_dim]
    values: list[torch.Tensor]

    def padded(self) -> torch.Tensor:
        width = max(map(len, self.tables))
        return torch.tensor([table + [0] * (width - len(table)) for table in self.tables], dtype=torch.int32)

    def lengths(self) -> torch.Tensor:
        return torch.tensor([len(k) for k in self.keys], dtype=torch.int32)

    def slots(self, number: int) -> torch.Tensor:
        size = self.cache.keys.shape[1]
        blocks = torch.tensor(self.tables[number])
        return (blocks[:, None] * size + torch.arange(size)).flatten()[: len(self.keys[number])]


def sequences(lengths: list[int], kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> Sequences:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    blocks = [-(-length // block_size) for length in lengths]
    free = torch.randperm(sum(blocks) + 3, generator=generator).tolist()
    tables = [[free.pop() for _ in range(count)] for count in blocks]
    shape = (sum(blocks) + 3, block_size, kv_heads, head_dim)
    cache = LayerCache(drawn(*shape), drawn(*shape))  # what no sequence has written is not zero
    made = Sequences(cache, tables, *([drawn(n, kv_heads, head_dim) for n in lengths] for _ in "kv"))  # type: ignore[arg-type]
    for number in range(len(lengths)):
        cache.key_slots[made.slots(number)] = made.keys[number]
        cache.value_slots[made.slots(number)] = made.values[number]
    return made


def expected(q_thd: torch.Tensor, k_tkd: torch.Tensor, v_tkd: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last positions, in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q_thd, k_tkd, v_tkd))
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    group = len(q) // len(k)
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(0, 1)


def one_token_each(made: Sequences) -> Step:
    nothing = torch.empty(0, dtype=torch.long)
    return Step(nothing, nothing, nothing, made.padded(), made.lengths(), [], nothing)


def in_c(dtype: torch.dtype, head_dim: int) -> InC:
    found = kernels("cpu", dtype, head_dim)
    assert isinstance(found, InC), "no C compiler"
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 64), (8, 1, 128)])
def test_one_token_a_sequence(heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    made = sequences([1, 2, 3, 15, 16, 17, 100, 331], kv_heads, head_dim, block_size, dtype)
    q_nhd = torch.randn(8, heads, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.cat(
        [expected(q_nhd[n : n + 1], k, v) for n, (k, v) in enumerate(zip(made.keys, made.values, strict=True))]
    )
    for way in (in_c(dtype, head_dim), InTorch()):
        out_nhd = way.attend(q_nhd, made.cache, one_token_each(made))
        torch.testing.assert_close(out_nhd.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


def test_attention_in_c_stands_large_scores_and_rows_that_lie_apart() -> None:
    made = sequences([40, 7], 2, 16, 4, torch.float32)
    q_nhd = 300 * torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))[:, 1:5]
    out_nhd = in_c(torch.float32, 16).attend(q_nhd, made.cache, one_token_each(made))
    wanted = torch.cat(
        [expected(q_nhd[n : n + 1], k, v) for n, (k, v) in enumerate(zip(made.keys, made.values, strict=True))]
    )
    torch.testing.assert_close(out_nhd.double(), wanted, rtol=0, atol=1e-3)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 300])  # 300 x 96 is above SMALL: several threads
def test_norm_and_gate_in_c_are_those_of_torch(rows: int, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1.6e-2, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 2e-6}
    weight = (1 + drawn(96) / 10).to(dtype)
    for delta in (None, drawn(rows, 96, seed=1).to(dtype)):
        x_c, x_torch = (drawn(rows, 96, seed=2).to(dtype) for _ in range(2))
        normed = in_c(dtype, 16).add_norm(x_c, delta, weight, 1e-5)
        wanted = InTorch().add_norm(x_torch, delta, weight, 1e-5)
        assert torch.equal(x_c, x_torch)  # the sum, to the bit
        torch.testing.assert_close(normed, wanted, **tolerance)
    gate_up = drawn(rows, 2 * 96, seed=3).to(dtype)
    torch.testing.assert_close(in_c(dtype, 16).gate(gate_up), InTorch().gate(gate_up), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_in_c_is_that_of_torch_and_stores_what_it_rotated(dtype: torch.dtype) -> None:
    tokens, heads, kv_heads, head_dim, slots = 5, 4, 2, 16, 24
    angles = drawn(40, head_dim // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    nothing = torch.empty(0, dtype=torch.long)
    step = Step(
        nothing, torch.tensor([7, 0, 39, 3, 4]), torch.tensor([23, 0, 5, 11, 10]), nothing, nothing, [], nothing
    )
    found = []
    for way in (in_c(dtype, head_dim), InTorch()):
        qkv_thd = drawn(tokens, heads + 2 * kv_heads, head_dim, seed=1).to(dtype)
        cache = LayerCache(*(torch.full((slots // 4, 4, kv_heads, head_dim), 9.0, dtype=dtype) for _ in "kv"))
        q_thd, k_tkd, v_tkd = qkv_thd.split((heads, kv_heads, kv_heads), dim=1)
        way.rotate_and_store(q_thd, k_tkd, v_tkd, cos, sin, cache, step)
        assert torch.equal(cache.key_slots[step.slots], k_tkd)
        assert torch.equal(cache.value_slots[step.slots], drawn(*qkv_thd.shape, seed=1).to(dtype)[:, -kv_heads:])
        untouched = torch.ones(slots, dtype=torch.bool).index_fill(0, step.slots, False)
        assert (cache.key_slots[untouched] == 9).all()
        assert (cache.value_slots[untouched] == 9).all()
        found.append(qkv_thd.float())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=8e-2 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_step_of_single_tokens_and_chunks(block_size: int, dtype: torch.dtype) -> None:
    """Four generate, one begins, one goes on with its prompt."""
    heads, kv_heads, head_dim = 4, 2, 64
    made = sequences([1, 5, 16, 50, 9, 40], kv_heads, head_dim, block_size, dtype)
    new = [1, 1, 1, 1, 9, 13]
    rows = [slice(sum(new[:n]), sum(new[: n + 1])) for n in range(6)]
    slots = [made.slots(n)[-new[n] :] for n in range(6)]
    singles = Sequences(made.cache, made.tables[:4], made.keys[:4], made.values[:4])
    step = Step(
        torch.zeros(sum(new), dtype=torch.long), torch.zeros(sum(new), dtype=torch.long), torch.cat(slots),
        singles.padded(), singles.lengths(),
        [Chunk(rows[4], 0, 9, made.slots(4)), Chunk(rows[5], 27, 40, made.slots(5))], torch.tensor([0]),
    )  # fmt: skip
    q_thd = torch.randn(sum(new), heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    k_tkd, v_tkd = (torch.cat([x[-n:] for x, n in zip(of, new, strict=True)]) for of in (made.keys, made.values))
    out_thd = attention(q_thd, k_tkd, v_tkd, made.cache, step, kernels("cpu", dtype, head_dim))
    for n in range(6):
        wanted = expected(q_thd[rows[n]], made.keys[n], made.values[n])
        torch.testing.assert_close(out_thd[rows[n]].double(), wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.fixture
def fresh() -> Iterator[None]:
    kernels.cache_clear()
    yield
    kernels.cache_clear()


@pytest.mark.parametrize("why", ["no compiler", "a compiler that is none", "a compiler that fails"])
def test_without_a_compiler_there_is_a_warning_and_no_loop(
    why: str, fresh: None, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []

    class Recorder:
        def warning(self, message: str, **fields: str) -> None:
            warnings.append(message)

    monkeypatch.setattr(module, "get_logger", Recorder)
    monkeypatch.delenv("CC", raising=False)
    if why == "no compiler":
        monkeypatch.setattr(module.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CC", "false" if why.endswith("fails") else "no-such-compiler")
    for _ in range(2):
        assert isinstance(kernels("cpu", torch.float32, 16), InTorch)
    assert warnings == ["no C loops, the engine is slower"]  # once


def test_it_is_compiled_once(fresh: None, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_c(torch.float32, 16)
    kernels.cache_clear()
    (library,) = (own_cache / "kernels").iterdir()
    assert library.suffix == ".so"
    monkeypatch.setattr(module.subprocess, "run", None)
    assert in_c(torch.float32, 16)


def test_a_type_without_a_loop_has_none() -> None:
    assert isinstance(kernels("cpu", torch.float16, 16), InTorch)
    assert isinstance(kernels("cpu", torch.float64, 16), InTorch)
