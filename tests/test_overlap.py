"""Chapter 2, the comparisons on links: silent twins of training steps, and the flags that are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ch02_hardware_parallelism import compare_dp_tp, museum, overlap
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.data_parallel import BucketedDataParallel
from ch02_hardware_parallelism.library_data import LibraryDDP
from ch02_hardware_parallelism.model import build
from ch02_hardware_parallelism.strategy import Strategy
from ch02_hardware_parallelism.training import Text, adamw, flags, shape_of, train_step
from common import dist
from common.script import UserError
from tests.spawn import run_ranks, values

TINY = ["--width", "32", "--layers", "1", "--vocab", "512", "--seq-len", "16", "--batch-size", "4", "--steps", "1"]


def twins() -> dict[str, tuple[list[tuple[str, int, bool]], torch.Tensor]]:
    """By kind: the messages that a silent twin did not send, and this rank's weights after some steps without them."""
    args = flags(None).parse_args(TINY)
    BucketedDataParallel.bucket_bytes, LibraryDDP.bucket_mib = 2**14, 2**-6
    found = {}
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        text = Text(args, ctx.device)

        def make(kind: type[Strategy], comm: Comm) -> Strategy:
            return kind(build(shape_of(args), seed=0), comm, adamw(args.lr))

        for name, kind in overlap.KINDS.items():
            twin, messages = overlap.silent_twin(partial(make, kind), text)
            for _ in range(3):
                train_step(twin, text.step())
            overlap.send(messages, Comm())  # hangs if the ranks' differ
            weights = torch.cat([w.flatten() for w in twin.weights().values()])
            found[name] = [(collective, x.numel(), later) for collective, x, later in messages], weights
    return found


def test_silent_twins_send_nothing_and_know_what_they_would_have_sent() -> None:
    first, second = values(run_ranks(twins, 2))
    numbers = sum(p.numel() for p in build(shape_of(flags(None).parse_args(TINY))).parameters())
    for kind in overlap.KINDS:
        messages, weights = first[kind]
        assert messages == second[kind][0]
        assert weights.isfinite().all()
        if kind != "zero1":  # whose weights stay those of its first step
            assert not torch.equal(weights, second[kind][1])
    messages = {kind: first[kind][0] for kind in overlap.KINDS}
    assert messages["naive"] == [("all_reduce", numbers, False), ("all_reduce", 2, False)]
    assert messages["zero1"] == [
        ("reduce_scatter", numbers, False),
        ("all_reduce", 2, False),
        ("all_gather", numbers // 2, False),
    ]
    for kind in ("buckets", "ddp"):
        *buckets, loss = messages[kind]
        assert len(buckets) > 2
        assert {(collective, later) for collective, _, later in buckets} == {("all_reduce", True)}
        assert sum(size for _, size, _ in buckets) == numbers
        assert loss[1:] == ({"buckets": 2, "ddp": 1}[kind], False)


def measured() -> dict:
    args = flags(None).parse_args(TINY)
    args.bucket_mib = 2**-6
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        return overlap.measure(args, ctx)


def test_each_kind_is_held_against_its_own_parts() -> None:
    result = values(run_ranks(measured, 2))[0]
    for kind in overlap.KINDS:
        exposed = result[f"{kind}_exposed_ms"]
        assert result[f"{kind}_hidden"] == 1 - exposed / result[f"{kind}_communication_ms"]
    assert len({result[f"{kind}_compute_ms"] for kind in overlap.KINDS}) == len(overlap.KINDS)


@pytest.mark.parametrize("script", [overlap, compare_dp_tp])
@pytest.mark.parametrize("rates", ["fast", "1gbit,", "1gbit,1tbit"])
def test_a_bad_rate_leaves_nothing_behind(script: ModuleType, rates: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rate .*(write|take)"):
        script.main(["--rates", rates, "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [overlap, compare_dp_tp, museum])
def test_by_hand_is_refused_where_it_would_do_nothing(script: ModuleType) -> None:
    with pytest.raises(UserError, match="unrecognized arguments: --by-hand"):
        script.main(["--by-hand"])
