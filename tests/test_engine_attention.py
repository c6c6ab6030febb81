"""Paged attention: the C loop and the gathered blocks against torch's own attention over contiguous keys."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ch06_vllm.engine import paged_attention
from ch06_vllm.engine.paged_attention import Chunk, LayerCache, Step, attention, compiled, gathered

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 64), (8, 1, 128)])
def test_one_token_a_sequence(heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    kernel = compiled(dtype, head_dim)
    assert kernel, "no C compiler"
    made = sequences([1, 2, 3, 15, 16, 17, 100, 331], kv_heads, head_dim, block_size, dtype)
    q_nhd = torch.randn(8, heads, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.cat(
        [expected(q_nhd[n : n + 1], k, v) for n, (k, v) in enumerate(zip(made.keys, made.values, strict=True))]
    )
    for attend in (kernel, gathered):
        out_nhd = torch.full_like(q_nhd, torch.nan)
        attend(q_nhd, made.cache, made.padded(), made.lengths(), out_nhd)
        torch.testing.assert_close(out_nhd.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


def test_the_c_loop_stands_large_scores_and_queries_that_are_not_contiguous() -> None:
    kernel = compiled(torch.float32, 16)
    assert kernel
    made = sequences([40, 7], 2, 16, 4, torch.float32)
    q_nhd = 300 * torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))[:, 1:5]
    out_nhd = torch.empty(2, 4, 16)
    kernel(q_nhd, made.cache, made.padded(), made.lengths(), out_nhd)
    wanted = torch.cat(
        [expected(q_nhd[n : n + 1], k, v) for n, (k, v) in enumerate(zip(made.keys, made.values, strict=True))]
    )
    torch.testing.assert_close(out_nhd.double(), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_step_of_single_tokens_and_chunks(block_size: int, dtype: torch.dtype) -> None:
    """Four generate, one begins, one goes on with its prompt; the step's own keys are written before it attends."""
    heads, kv_heads, head_dim = 4, 2, 64
    made = sequences([1, 5, 16, 50, 9, 40], kv_heads, head_dim, block_size, dtype)
    new = [1, 1, 1, 1, 9, 13]
    rows = [slice(sum(new[:n]), sum(new[: n + 1])) for n in range(6)]
    slots = [made.slots(n)[-new[n] :] for n in range(6)]
    for where in slots:  # not there yet
        made.cache.key_slots[where] = made.cache.value_slots[where] = 9
    singles = Sequences(made.cache, made.tables[:4], made.keys[:4], made.values[:4])
    step = Step(
        torch.zeros(sum(new), dtype=torch.long), torch.zeros(sum(new), dtype=torch.long), torch.cat(slots),
        singles.padded(), singles.lengths(),
        [Chunk(rows[4], 0, 9, made.slots(4)), Chunk(rows[5], 27, 40, made.slots(5))], torch.tensor([0]),
    )  # fmt: skip
    q_thd = torch.randn(sum(new), heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    k_tkd, v_tkd = (torch.cat([x[-n:] for x, n in zip(of, new, strict=True)]) for of in (made.keys, made.values))
    out_thd = attention(q_thd, k_tkd, v_tkd, made.cache, step)
    for n in range(6):
        wanted = expected(q_thd[rows[n]], made.keys[n], made.values[n])
        torch.testing.assert_close(out_thd[rows[n]].double(), wanted, rtol=0, atol=TOLERANCE[dtype])
        assert torch.equal(made.cache.key_slots[made.slots(n)], made.keys[n])
        assert torch.equal(made.cache.value_slots[made.slots(n)], made.values[n])


@pytest.fixture
def fresh() -> Iterator[None]:
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@pytest.mark.parametrize("why", ["no compiler", "a compiler that is none", "a compiler that fails"])
def test_without_a_compiler_there_is_a_warning_and_no_loop(
    why: str, fresh: None, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("book"), "propagate", True)
    monkeypatch.delenv("CC", raising=False)
    if why == "no compiler":
        monkeypatch.setattr(paged_attention.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CC", "false" if why.endswith("fails") else "no-such-compiler")
    with caplog.at_level(logging.WARNING, "book"):
        assert compiled(torch.float32, 16) is None
        assert compiled(torch.float32, 16) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
    assert "without its C loop, slower" in caplog.text
    made = sequences([3], 1, 16, 4, torch.float32)
    nothing = torch.empty(0, dtype=torch.long)
    step = Step(nothing, nothing, made.slots(0)[-1:], made.padded(), made.lengths(), [], nothing)
    q_thd = torch.randn(1, 1, 16)
    out_thd = attention(q_thd, made.keys[0][-1:], made.values[0][-1:], made.cache, step)
    wanted = expected(q_thd, made.keys[0], made.values[0])
    torch.testing.assert_close(out_thd.double(), wanted, rtol=0, atol=2e-6)


def test_it_is_compiled_once(fresh: None, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled(torch.float32, 16)
    compiled.cache_clear()
    (library,) = (own_cache / "kernels").iterdir()
    assert library.suffix == ".so"
    monkeypatch.setattr(paged_attention.subprocess, "run", None)
    assert compiled(torch.float32, 16)


def test_a_type_without_a_loop_has_none() -> None:
    assert compiled(torch.float16, 16) is None
    assert compiled(torch.float64, 16) is None
