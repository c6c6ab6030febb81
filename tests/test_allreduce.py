"""All-reduce by hand: sums, bytes and rounds of every algorithm; and the pictures' recordings, replayed."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as td

from ch02_hardware_parallelism import (
    allreduce,
    alpha_beta,
    bench_ring,
    patterns,
    patterns_by_hand,
    topologies,
    virtual_cluster,
)
from ch02_hardware_parallelism.alpha_beta import AlphaBeta
from ch02_hardware_parallelism.journal import Journal, replay
from ch02_hardware_parallelism.messages import Peers
from ch02_hardware_parallelism.patterns_by_hand import PATTERNS
from ch02_hardware_parallelism.predicted import messages, predicted_s
from common import dist, script
from tests import inprocess
from tests.spawn import run_ranks, values

LENGTHS = (0, 1, 3, 1000)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
CHUNK_KIB = 1
REASON = virtual_cluster.why_not()


def contestants(size: int) -> dict:
    """Every algorithm, and the ring and the racks in other orders."""
    found = dict(allreduce.ALGORITHMS)
    for order in {tuple(reversed(range(size))), (*range(0, size, 2), *range(1, size, 2))}:
        found[f"ring {order}"] = functools.partial(allreduce.ring, order=order)
    found["one rack"] = functools.partial(allreduce.hierarchical, rack_of=[7] * size)
    found["a rack a rank"] = functools.partial(allreduce.hierarchical, rack_of=list(range(size)))
    found["racks mixed"] = functools.partial(allreduce.hierarchical, rack_of=[rank % 2 for rank in range(size)])
    return found


def whole_numbers(rank: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Small, so that every dtype sums them exactly, and different by rank and place."""
    return ((torch.arange(length) + 3 * rank) % 11 - 5).to(dtype)


def on_a_rank() -> dict:
    """All of it on one rank: what was wrong, what was sent, and the recordings."""
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        size, wrong, sent = ctx.world_size, [], {}
        for (name, run), length, dtype in itertools.product(contestants(size).items(), LENGTHS, DTYPES):
            x, peers = whole_numbers(ctx.rank, length, dtype), Peers()
            run(x, peers)
            expected = sum(whole_numbers(rank, length, dtype) for rank in range(size))
            if not torch.equal(x, expected):
                wrong.append(f"{name} {length} {dtype}")
            sent[name, length, dtype] = (peers.sent_bytes, peers.sent_messages)
        x = whole_numbers(ctx.rank, 1000, torch.float32)
        allreduce.ring(x, Peers(), torch.maximum)
        if not torch.equal(x, torch.stack([whole_numbers(r, 1000, torch.float32) for r in range(size)]).amax(0)):
            wrong.append("maximum")
        allreduce.PIECE = 64  # many pieces under way, the last ones shorter
        for length in (3, 97, 1000):
            x = whole_numbers(ctx.rank, length, torch.float64)
            allreduce.ring(x, Peers())
            if not torch.equal(x, sum(whole_numbers(r, length, torch.float64) for r in range(size))):
                wrong.append(f"pieces {length}")
        allreduce.PIECE = 2**22
        for source in range(size):
            x = torch.full([5], ctx.rank)
            allreduce.tree_broadcast(x, Peers(), source)
            if not (x == source).all():
                wrong.append(f"broadcast from {source}")
        recordings = {name: patterns.record(pattern, CHUNK_KIB, ctx) for name, pattern in PATTERNS.items()}
        return {"wrong": wrong, "sent": sent, "recordings": recordings}


@functools.cache
def seen(size: int) -> list[dict]:
    return values(run_ranks(on_a_rank, size))


SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4, 5])


@SIZES
def test_every_algorithm_sums(size: int) -> None:
    assert [rank["wrong"] for rank in seen(size)] == [[]] * size


@SIZES
@pytest.mark.parametrize("length", LENGTHS)
def test_bytes_are_those_of_the_theory(size: int, length: int) -> None:
    optimal = ["naive", "tree", "ring"] + ["halving_doubling"] * (size in (1, 2, 4))
    for name, dtype in itertools.product(optimal, DTYPES):
        total = sum(rank["sent"][name, length, dtype][0] for rank in seen(size))
        assert total == alpha_beta.total_wire_bytes("all_reduce", length * dtype.itemsize, size), (name, dtype)


# ---------------------------------------------------------------- recordings


def recordings(size: int, name: str) -> list[patterns.Recording]:
    return [rank["recordings"][name] for rank in seen(size)]


@SIZES
@pytest.mark.parametrize("name", PATTERNS)
def test_the_replay_ends_as_the_collective_promises(size: int, name: str) -> None:
    pattern, recorded = PATTERNS[name], recordings(size, name)
    story = patterns.told(pattern, recorded, CHUNK_KIB)
    assert patterns.broken_promises(pattern, story.states[-1]) == []
    assert patterns.broken_promises(pattern, [held for _, held in recorded]) == []
    assert sum(map(sum, story.traffic())) == sum(message.bytes for message in story.messages)
    assert all(0 < m.begin_s <= m.end_s for m in story.messages)


@SIZES
def test_rounds(size: int) -> None:
    def rounds(name: str) -> int:
        return patterns.told(PATTERNS[name], recordings(size, name), CHUNK_KIB).rounds

    levels = math.ceil(math.log2(size))
    assert rounds("broadcast") == levels
    assert rounds("all_gather") == rounds("reduce_scatter") == size - 1
    assert rounds("all_reduce-ring") == 2 * (size - 1)
    assert rounds("scatter") == rounds("gather") == min(1, size - 1)
    assert rounds("all_reduce-naive") == 2 * min(1, size - 1)
    if size in (1, 2, 4):
        assert rounds("all_reduce-tree") == rounds("all_reduce-halving_doubling") == 2 * levels
        assert rounds("all_to_all") == size - 1


class Forgetful:
    """A sum that is skipped once."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return out if self.calls == 2 and td.get_rank() == 1 else torch.add(a, b, out=out)


def forgets(x: torch.Tensor, peers: Peers) -> None:
    allreduce.ring(x, peers, Forgetful())


def twice(x: torch.Tensor, peers: Peers) -> None:
    """Every rank is in it more than once."""
    allreduce.tree(x, peers)
    allreduce.ring(x, peers)


BROKEN = {run: replace(PATTERNS["all_reduce-ring"], run=run) for run in (forgets, twice)}


def record_broken() -> list[patterns.Recording]:
    with dist.session("cpu", timeout_s=60) as ctx:
        return [patterns.record(pattern, CHUNK_KIB, ctx) for pattern in BROKEN.values()]


def test_a_broken_algorithm_is_caught_by_replay_and_by_values() -> None:
    ranks = values(run_ranks(record_broken, 3))
    for number, pattern in enumerate(BROKEN.values()):
        recorded = [rank[number] for rank in ranks]
        assert patterns.broken_promises(pattern, patterns.told(pattern, recorded, CHUNK_KIB).states[-1])
        assert patterns.broken_promises(pattern, [held for _, held in recorded])


def test_mixtures_of_many_ranks_contributions_are_told_apart() -> None:
    """Coded as 1000 cell + 2^rank, rank 10's cell 0 would look like the sum of rank 3's cell 1 and rank 4's cell 0."""
    buffers = [patterns.own_contributions(rank, 12, 12, chunk_kib=2).view(12, -1) for rank in range(12)]
    after = torch.zeros_like(buffers[0])
    after[0], after[1], after[2] = buffers[10][0], buffers[3][1] + buffers[4][0], 2 * buffers[10][0]
    one, two, double, *others = patterns.found_in(after, 12, 12)
    assert (one, two, double) == ({(10, 0): 1}, {(3, 1): 1, (4, 0): 1}, {(10, 0): 2})
    assert not any(others)
    everything = patterns.found_in(torch.stack(buffers).sum(0), 12, 12)
    assert everything == [patterns_by_hand.total(0, cell, 12) for cell in range(12)]


def patterns_with_a_broken_ring(tmp: str) -> None:
    PATTERNS["all_reduce-ring"] = BROKEN[forgets]
    script.run(functools.partial(patterns.main, ["--no-gif", "--run-dir", tmp]))


def test_a_broken_algorithm_still_has_its_result_and_its_pictures(tmp_path: Path) -> None:
    zero, *others = run_ranks(patterns_with_a_broken_ring, 3, str(tmp_path))
    assert (zero.returncode, [rank.returncode for rank in others]) == (1, [0, 0])
    assert zero.stderr.splitlines()[-1].startswith("failed: all_reduce-ring went wrong: rank ")
    result = json.loads(zero.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert (result["messages"], result["replay_matches"], result["values_match"]) == (12, False, False)
    assert (tmp_path / "panels.png").exists()


@pytest.mark.parametrize("lost", ["begin", "end"])
def test_a_recording_that_lacks_an_event_is_not_replayed(lost: str) -> None:
    journals = [journal for journal, _ in recordings(3, "all_gather")]
    events = [event for event in journals[1].events if event.what != lost]
    cut = Journal(journals[1].watched, events if lost == "begin" else events[:1])
    if lost == "begin":
        cut.events = []  # rank 1 has no memory of anything
    with pytest.raises(ValueError, match=r"waits for a message|never received"):
        replay([journals[0], cut, journals[2]])


def test_cells_must_fit_the_messages() -> None:
    journals = [journal for journal, _ in recordings(2, "all_gather")]
    with pytest.raises(ValueError, match="not whole cells"):
        replay(journals, cell_bytes=1000)


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_predictions_on_a_flat_network_are_the_textbooks(ranks: int) -> None:
    a, b, n = 1e-4, 1e-8, 2**20
    log, share = math.log2(ranks), (ranks - 1) / ranks
    link = AlphaBeta(a, b)
    assert predicted_s("naive", n, ranks, link) == pytest.approx(2 * a + 2 * (ranks - 1) * n * b)
    assert predicted_s("tree", n, ranks, link) == pytest.approx(2 * log * (a + n * b))
    assert predicted_s("ring", n, ranks, link) == pytest.approx(2 * (ranks - 1) * (a + n / ranks * b))
    assert predicted_s("halving_doubling", n, ranks, link) == pytest.approx(2 * log * a + 2 * share * n * b)
    assert predicted_s("ring", n, 1, link) == 0


def test_a_ring_that_ignores_the_racks_pays_twice_at_the_uplink() -> None:
    near, far = AlphaBeta(0, 1e-9), AlphaBeta(0, 1e-7)
    bad = functools.partial(allreduce.ring, order=(0, 2, 1, 3))
    guess = functools.partial(predicted_s, size=2**20, ranks=4, link=near, rack_of=[0, 0, 1, 1], uplink=far)
    assert guess("ring") == pytest.approx(1.5 * 2**20 * 1e-7)
    assert guess(bad) == pytest.approx(2 * guess("ring"))
    assert guess("hierarchical") == pytest.approx(2**20 * 1e-7, rel=0.02)  # half in, half out, and the near ones
    assert guess("naive") == pytest.approx(4 * 2**20 * 1e-7)


@pytest.mark.parametrize("name", allreduce.ALGORITHMS)
def test_the_rehearsal_sends_what_the_ranks_send(name: str) -> None:
    sent = [rank["sent"][name, 1000, torch.float32] for rank in seen(4)]
    rehearsed = messages(name, 4000, 4)
    for rank, (size, count) in enumerate(sent):
        mine = [message.bytes for message in rehearsed if message.source == rank]
        assert (sum(mine), len(mine)) == (size, count)


def test_peers_among() -> None:
    assert values(run_ranks(ask_among, 3)) == [[2, 3], [0, 3], "not one"]


def ask_among() -> object:
    with dist.session("cpu", timeout_s=60) as ctx:
        peers = Peers()
        try:
            part = peers.among([1, 2, 0] if ctx.rank < 2 else [0, 1])
        except ValueError:
            return "not one"
        return [part.rank, part.size]


# ---------------------------------------------------------------- scripts


def test_patterns_draws(tmp_path: Path) -> None:
    flags = ["--collective", "all_reduce-ring", "--ranks", "3", "--order", "0,2,1", "--run-dir", tmp_path]
    done = inprocess.run_script("ch02_hardware_parallelism/patterns.py", flags)
    assert done.returncode == 0, done.stderr
    assert done.result is not None
    size = 3 * 64 * 1024
    expected = {"rounds": 4, "messages": 12, "bytes": alpha_beta.total_wire_bytes("all_reduce", size, 3)}
    assert expected.items() <= done.result.items()
    assert done.result["replay_matches"] is True
    assert "round 1: 0→2" in done.stdout
    assert (tmp_path / "animation.gif").read_bytes().startswith(b"GIF8")
    for name in ("panels.png", "traffic.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_one_rank_has_nothing_to_draw_and_says_so(tmp_path: Path) -> None:
    flags = ["--ranks", "1", "--no-gif", "--run-dir", tmp_path]
    done = inprocess.run_script("ch02_hardware_parallelism/patterns.py", flags)
    assert done.returncode == 0, done.stderr
    assert done.result is not None
    assert (done.result["rounds"], done.result["messages"]) == (0, 0)


def test_bench_ring_runs(tmp_path: Path) -> None:
    flags = ["--sizes-mib", "1", "--repeats", "3", "--piece-kib", "64", "--run-dir", tmp_path]
    done = inprocess.run_script("ch02_hardware_parallelism/bench_ring.py", flags)
    assert done.returncode == 0, done.stderr
    assert done.result is not None
    low, high = done.result["ring_over_gloo_1mib_quartiles"]
    assert 0 < low <= done.result["ring_over_gloo_1mib"] <= high


def wrong_ring(tmp: str, module: str, *flags: str) -> None:
    """One number of one rank is off."""

    def broken(x: torch.Tensor, peers: Peers, order: object = None) -> None:
        allreduce.tree(x, peers)
        x[-1] += peers.rank

    allreduce.ring = allreduce.ALGORITHMS["ring"] = broken
    main = {"bench_ring": bench_ring.main, "topologies": topologies.main}[module]
    script.run(functools.partial(main, [*flags, "--repeats", "3", "--run-dir", tmp]))


@pytest.mark.parametrize(
    ("module", "flags", "wrong", "says"),
    [
        ("bench_ring", ["--sizes-mib", "1"], 5, "5 all-reduces gave wrong sums"),
        ("topologies", ["--sizes-kib", "1,64"], 17, "wrong sums by ring:"),
    ],
)
def test_wrong_sums_have_a_result_and_exit_code_1(
    module: str, flags: list[str], wrong: int, says: str, tmp_path: Path
) -> None:
    zero, one = run_ranks(wrong_ring, 2, str(tmp_path), module, *flags)
    assert (zero.returncode, one.returncode) == (1, 1)
    assert zero.stderr.splitlines()[-1].startswith(f"failed: {says}")
    assert json.loads(zero.stdout.splitlines()[-1].removeprefix("RESULT "))["wrong"] == wrong


@pytest.mark.parametrize(("s_per_byte", "large"), [(1e-7, 2**19), (1e-9, 2**21), (2e-12, 2**29), (0, 2**29)])
def test_the_probe_grows_with_the_link(monkeypatch: pytest.MonkeyPatch, s_per_byte: float, large: int) -> None:
    asked = []

    def one_way_s(peers: object, other: int, size: int, *_: object) -> float:
        asked.append(size)
        return 1e-5 + size * s_per_byte

    monkeypatch.setattr(topologies, "one_way_s", one_way_s)
    link = topologies.ping_pong(None, 1, 3, torch.device("cpu"))  # type: ignore[arg-type]
    assert asked[-3:] == [8, large // 4, large]
    assert link.beta_s_per_byte == pytest.approx(s_per_byte, rel=1e-3, abs=1e-15)


def compare_here(sizes_kib: list[int]) -> dict:
    return topologies.compare(argparse.Namespace(device="cpu", sizes_kib=sizes_kib, repeats=1))


@pytest.mark.parametrize("racks", [1, 2])
def test_topologies_takes_the_network_as_it_finds_it(racks: int) -> None:
    shape = {"hosts": 4, "ranks": 1, "racks": racks, "rate_bytes_per_s": 1e9, "uplink_bytes_per_s": 1e9}
    host = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env = host | {"VIRTUAL_CLUSTER": json.dumps(shape)}
    result = values(run_ranks(compare_here, 4, [1, 16], env=env))[0]
    assert (result["world_size"], result["racks"]) == (4, racks)
    names = {*allreduce.ALGORITHMS, "ring_bad_order"} if racks == 2 else {*allreduce.ALGORITHMS} - {"hierarchical"}
    for kib in (1, 16):
        times = {key.removesuffix(f"_{kib}kib_ms") for key in result if key.endswith(f"_{kib}kib_ms")}
        assert {name.removesuffix("_predicted") for name in times} == names | {"library"}
        assert result[f"winner_{kib}kib"] in names
    assert ("uplink_alpha_us" in result) == (racks == 2)


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_topologies_over_a_virtual_cluster(tmp_path: Path) -> None:
    flags = ["--topologies", "racks", "--sizes-kib", "64", "--repeats", "1", "--run-dir", tmp_path]
    done = inprocess.run_script("ch02_hardware_parallelism/topologies.py", flags)
    assert done.returncode == 0, done.stderr
    assert done.result is not None
    assert (done.result["racks_world_size"], done.result["racks_racks"]) == (4, 2)
    predicted = [done.result[f"racks_{name}_64kib_predicted_ms"] for name in ("ring", "ring_bad_order")]
    assert predicted[0] < predicted[1]
    assert (tmp_path / "topologies.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("patterns.py --collective gossip", "invalid choice: 'gossip'"),
        ("patterns.py --order 0,1,1,3", "not a permutation; name each of the 4 ranks once"),
        ("patterns.py --order 0,1", "not a permutation"),
        ("patterns.py --order 0,1,2,x", "'x' is not a whole number"),
        ("patterns.py --collective broadcast --order 0,1,2,3", "is no ring; drop --order"),
        ("patterns.py --ranks 0", "0 is below 1"),
        ("patterns.py --ranks 12 --chunk-kib 1", "--chunk-kib 1 has no room to count what 12 ranks contribute"),
        ("bench_ring.py --sizes-mib 0", "0 is below 1"),
        ("bench_ring.py --ranks 1", "1 is below 2"),
        ("topologies.py --sizes-kib 4,", "'' is not a whole number"),
        ("topologies.py --sizes-kib 4,999999999999", "take a smaller --sizes-kib"),
        ("topologies.py --rate fast", "'fast' is not like 100mbit"),
        ("topologies.py --uplink-rate 0", "a rate of 0 cannot be shaped"),
        ("bench_ring.py --sizes-mib 16,999999999", "take a smaller --sizes-mib"),
    ],
)
def test_bad_input_is_one_line(line: str, said: str, tmp_path: Path) -> None:
    name, *flags = line.split()
    done = inprocess.run_script(f"ch02_hardware_parallelism/{name}", [*flags, "--run-dir", tmp_path / "run"])
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert "; " in error
    assert not (tmp_path / "run").exists()


def test_an_order_that_is_no_permutation() -> None:
    class Three:
        rank, size = 0, 3

    for order in ([0, 1], [0, 1, 1], [1, 2, 3]):
        with pytest.raises(ValueError, match="not a permutation"):
            allreduce.ring(torch.zeros(3), Three(), order=order)  # type: ignore[arg-type]


def test_each_pattern_names_what_it_promises() -> None:
    assert set(allreduce.ALGORITHMS) == {name.removeprefix("all_reduce-") for name in PATTERNS if "-" in name}
    assert patterns_by_hand.total(0, 2, 3) == {(0, 2): 1, (1, 2): 1, (2, 2): 1}
