"""Chapter 2, links: the cost model, theoretical rates, verified collectives, and the prediction of a step."""

from __future__ import annotations

import csv
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch01_intro.topology import detect
from ch02_hardware_parallelism import (
    bench_collectives,
    checked_collectives,
    cuda_links,
    host_links,
    links,
    predict_step,
    process_links,
    virtual_cluster,
)
from ch02_hardware_parallelism.alpha_beta import AlphaBeta, bus_factor, fit, total_wire_bytes
from ch02_hardware_parallelism.links import Port, Row
from common import script
from common.script import UserError
from tests.inprocess import run_script
from tests.spawn import rank_environment, run_ranks, values

FIXTURES = Path(__file__).resolve().parent / "fixtures/topology"
BENCH = "ch02_hardware_parallelism/bench_collectives.py"
LINKS = "ch02_hardware_parallelism/measure_links.py"
PREDICT = "ch02_hardware_parallelism/predict_step.py"


# ---------------------------------------------------------------- the cost model


@settings(max_examples=60, deadline=None)
@given(
    alpha_us=st.floats(0.5, 5000), gb_per_s=st.floats(0.01, 900), noise=st.lists(st.floats(-0.02, 0.02), min_size=8, max_size=8)
)  # fmt: skip
def test_the_fit_finds_alpha_and_beta_again(alpha_us: float, gb_per_s: float, noise: list[float]) -> None:
    truth = AlphaBeta(alpha_us / 1e6, 1 / gb_per_s / 1e9)
    # from a tenth of alpha to ten times alpha: both parts show
    half = truth.alpha_s / truth.beta_s_per_byte
    sizes = [half * 10 ** (k / 3.5 - 1) for k in range(8)]
    exact = fit(sizes, [truth.time_s(n) for n in sizes])
    assert math.isclose(exact.alpha_s, truth.alpha_s, rel_tol=1e-6)
    assert math.isclose(exact.bytes_per_s, truth.bytes_per_s, rel_tol=1e-6)
    noisy = fit(sizes, [truth.time_s(n) * (1 + e) for n, e in zip(sizes, noise, strict=True)])
    assert exact.off_percent < 1e-6
    assert noisy.off_percent < 5
    assert math.isclose(noisy.time_s(half), truth.time_s(half), rel_tol=0.03)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_bus_factors_are_those_of_nccl_tests(n: int) -> None:
    """nccl-tests, src/*.cu, GetBw: busBw = baseBw * factor, baseBw from count * nranks where a rank holds a share."""
    factors = {
        "all_reduce": 2 * (n - 1) / n, "all_gather": (n - 1) / n, "reduce_scatter": (n - 1) / n, "broadcast": 1,
        "reduce": 1, "scatter": (n - 1) / n, "gather": (n - 1) / n, "all_to_all": (n - 1) / n, "send_recv": 1,
    }  # fmt: skip
    assert {name: bus_factor(name, n) for name in bench_collectives.COLLECTIVES} == factors
    # where every rank sends alike, the factor is what each of them sends, over the size
    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"):
        assert math.isclose(total_wire_bytes(name, 840, n) / n / 840, factors[name])


# ---------------------------------------------------------------- theoretical rates


@pytest.mark.parametrize(
    ("generation", "width", "rate"),
    [(3, 16, 15.75), (4, 16, 31.5), (5, 16, 63.0), (6, 16, 121.0), (1, 1, 0.25), (None, 16, None), (5, None, None)],
)
def test_pcie_rates(generation: int | None, width: int | None, rate: float | None) -> None:
    assert links.pcie_gb_per_s(generation, width) == (rate and pytest.approx(rate, rel=1e-3))


@pytest.mark.parametrize(
    ("name", "count", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 18, 450), ("NVIDIA H200", 18, 450), ("NVIDIA B200", 18, 900),
        ("NVIDIA A100-SXM4-80GB", 12, 300), ("Tesla V100-SXM2-16GB", 6, 150), ("NVIDIA RTX A6000", 4, 56.25),
        ("NVIDIA H800", 8, None), ("NVIDIA RTX A5000", 4, None), (None, 18, None),
    ],
)  # fmt: skip
def test_nvlink_rates_are_the_data_sheets_halves(name: str | None, count: int, rate: float | None) -> None:
    assert links.nvlink_gb_per_s(name, count) == rate


def test_memory_rate_of_an_h100() -> None:
    assert links.memory_gb_per_s(Port("", 5, 16, 2619, 5120)) == pytest.approx(3352, rel=1e-3)  # data sheet: 3.35 TB/s
    assert links.memory_gb_per_s(Port()) is None


def test_the_host_link_of_a_superchip_is_not_taken_for_pcie() -> None:
    assert links.host_link("NVIDIA H100 80GB HBM3", Port("", 5, 16)) == ("PCIe 5.0 x16", pytest.approx(63.0, rel=1e-3))
    assert links.host_link("NVIDIA GH200 480GB", Port("", 5, 16)) == ("NVLink-C2C", None)
    assert links.host_link("NVIDIA H100 80GB HBM3", Port()) == ("PCIe", None)


@pytest.mark.parametrize(
    ("machine", "pair", "kind", "rate"),
    [
        ("hgx_h100", (0, 7), "NVLink NV18", 450),
        ("dgx_a100", (7, 2), "NVLink NV12", 300),
        ("nvlink_pairs", (0, 1), "NVLink NV4", 56.25),
        ("nvlink_pairs", (1, 2), "PCIe SYS", 31.5),
        ("pcie_workstation", (0, 1), "PCIe", 31.5),
        ("cloud_vm_multi_nic", (0, 3), "PCIe PHB", 31.5),
    ],
)
def test_what_joins_two_gpus_of_recorded_machines(machine: str, pair: tuple[int, int], kind: str, rate: float) -> None:
    ports = [Port(str(index), 4, 16) for index in range(8)]
    found, theoretical = links.peer_link(detect(FIXTURES / machine), *pair, ports)
    assert found.startswith(kind)
    assert theoretical == pytest.approx(rate, rel=1e-3)


def test_an_unknown_end_leaves_a_pcie_pair_unknown_and_the_slower_end_counts() -> None:
    machine = detect(FIXTURES / "pcie_workstation")
    assert links.peer_link(machine, 0, 1, [])[1] is None
    assert links.peer_link(machine, 0, 1, [Port("", 4, 16), Port()])[1] is None
    assert links.peer_link(machine, 0, 1, [Port("", 4, 16), Port("", 4, 8)])[1] == pytest.approx(15.75, rel=1e-3)
    assert links.peer_link(machine, 0, 9, [])[0] == "unknown path"


def test_numa_pairs() -> None:
    nodes = detect(FIXTURES / "hgx_h100").numa_nodes
    every = {cpu for node in nodes for cpu in node.cpus}
    assert [(a.id, b.id, why) for a, b, why in links.numa_pairs(nodes, every)] == [
        (0, 0, ""), (0, 1, ""), (1, 0, ""), (1, 1, "")
    ]  # fmt: skip
    reasons = [why for *_, why in links.numa_pairs(nodes, set(nodes[0].cpus))]
    assert reasons[0] == ""
    assert all("may not run on node 1" in why for why in reasons[1:])


class FakeNvml:
    """NVML as far as query_ports uses it; the second GPU does not tell its bus width."""

    NVML_CLOCK_MEM = 2

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}{handle}".encode()

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:
        return 4

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:
        return 16

    def nvmlDeviceGetMaxClockInfo(self, handle: int, clock: int) -> int:
        assert clock == self.NVML_CLOCK_MEM
        return 1593

    def nvmlDeviceGetMemoryBusWidth(self, handle: int) -> int:
        if handle:
            raise self.NVMLError("not supported")
        return 5120


def test_ports_from_nvml() -> None:
    assert links.query_ports(FakeNvml()) == [Port("GPU-00", 4, 16, 1593, 5120), Port("GPU-11", 4, 16, 1593, None)]


# ---------------------------------------------------------------- measuring links


def test_rows_and_their_table() -> None:
    rows = [Row("a -> b", "PCIe 4.0 x16", (20.0, 21.0, 22.0, 40.0, 10.0), 31.5), Row("c", "DRAM", (7.0,))]
    rows.append(Row("d", "NVLink", skipped="no GPU"))
    assert rows[0].quartiles == (20, 21, 22)
    assert rows[0].percent == pytest.approx(66.67, rel=1e-3)
    text = links.text_table(rows).splitlines()
    assert text[1].endswith("31.5      67%")
    assert text[2].endswith("unknown")
    assert "%" not in text[2]
    assert text[3].endswith("skipped: no GPU")
    assert rows[2].as_json() == {"link": "d", "kind": "NVLink", "theoretical_gb_per_s": None, "skipped": "no GPU"}


def test_measure_links_where_there_is_no_gpu(tmp_path: Path) -> None:
    done = run_script(LINKS, ["--device", "cpu", "--repeats", "3", "--host-mib", "16", "--run-dir", tmp_path])
    assert done.result is not None, done.stderr
    assert done.result["gpus"] == 0
    assert done.result["slowest_peer_gb_per_s"] is None
    for name in ("host_copy", "host_triad", "shared_memory", "tcp_loopback"):
        assert done.result[f"{name}_gb_per_s"] > 0
    rows = json.loads((tmp_path / "links.json").read_text())["links"]
    assert len(rows) == done.result["measured"] + done.result["skipped"]
    assert [row["skipped"] for row in rows if row["link"] == "GPU <-> GPU"] == ["--device cpu was given"]
    assert (tmp_path / "links.png").stat().st_size > 5000


def test_measure_links_refuses_to_compete_with_itself() -> None:
    done = run_script(LINKS, [], env=rank_environment(0, 2, 1))
    assert done.returncode == 2
    assert "plain python" in done.stderr


def test_numa_rows_measure_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores of this machine taken for two nodes: the flow is the same, only the memory is not apart."""
    cpus = sorted(host_links.os.sched_getaffinity(0))
    machine = detect(FIXTURES / "hgx_h100")
    machine.numa_nodes = [
        links.NumaNode(0, tuple(cpus[:1]), distances={0: 10, 1: 21}), links.NumaNode(1, tuple(cpus[-1:])), links.NumaNode(2)
    ]  # fmt: skip
    monkeypatch.setattr(host_links, "node_rates", partial(host_links.node_rates, size=2**20))
    rows = host_links.numa_rows(machine, 3)
    assert [len(row.rates) for row in rows] == [3, 3, 0, 3, 3, 0, 0, 0, 0]
    assert rows[1].kind == "NUMA, distance 21"
    assert "no cores" in rows[2].skipped
    assert sorted(host_links.os.sched_getaffinity(0)) == cpus  # a thread's affinity is its own


def test_processes_hand_over_what_was_sent() -> None:
    wrong: list[str] = []
    rates = process_links.measure(2**20, repeats=2, wrong=wrong, timeout_s=30)
    assert {name: len(found) for name, found in rates.items()} == {"shared memory": 2, "loopback TCP": 2}
    assert wrong == []


ANSWERS_ZERO = """
import sys
from ch02_hardware_parallelism import process_links
process_links.np.copyto = lambda target, source: None  # nothing is taken out of the shared memory
process_links.far_end(*map(int, sys.argv[1:]))
"""


def test_a_message_that_arrives_wrong_has_its_result_and_exit_code_1(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--repeats", "3", "--host-mib", "16", "--run-dir", tmp_path]
    done = run_script(LINKS, flags, before=answer_zero)
    assert done.returncode == 1
    assert done.result is not None
    assert done.result["wrong"] > 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("failed: shared memory")


def answer_zero() -> None:
    process_links.FAR_END = ANSWERS_ZERO


def test_a_second_process_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_links, "FAR_END", "raise SystemExit(1)")
    with pytest.raises(UserError, match="second process did not answer"):
        process_links.measure(2**20, repeats=1, wrong=[], timeout_s=1)


def two_fake_gpus(monkeypatch: pytest.MonkeyPatch, *, peers: bool) -> None:
    """torch.cuda as far as cuda_links uses it, over CPU tensors: the order of calls and the bytes are real, no rate."""
    uuids = iter(["11", "00"])  # CUDA's order need not be NVML's
    fakes = {
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: SimpleNamespace(uuid=next(uuids)),
        "can_device_access_peer": lambda one, two: peers,
        "Stream": lambda device: SimpleNamespace(device=device),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, pin_memory=False, **kw: plain(t, **kw))
    monkeypatch.setattr(cuda_links, "REPEAT_S", 1e-4)


@pytest.mark.parametrize("peers", [True, False])
def test_the_flow_of_the_gpu_measurements(monkeypatch: pytest.MonkeyPatch, peers: bool) -> None:
    two_fake_gpus(monkeypatch, peers=peers)
    meter = cuda_links.Meter(repeats=3)
    machine, gpus = detect(FIXTURES / "hgx_h100"), [torch.device("cpu")] * 2
    ports = links.query_ports(FakeNvml())
    rows = cuda_links.measure(machine, ports, gpus, 2**16, meter)
    assert [row.link for row in rows] == [
        "host -> GPU1, pageable", "GPU1 -> host, pageable", "host -> GPU1, pinned", "GPU1 -> host, pinned",
        "host <-> GPU1, pinned", "GPU1 memory, copy", "GPU1 memory, triad",
        "host -> GPU0, pageable", "GPU0 -> host, pageable", "host -> GPU0, pinned", "GPU0 -> host, pinned",
        "host <-> GPU0, pinned", "GPU0 memory, copy", "GPU0 memory, triad", "GPU1 -> GPU0", "GPU1 <-> GPU0",
    ]  # fmt: skip
    assert all(len(row.rates) == 3 for row in rows)
    assert not meter.wrong
    theory = {row.link: row.theoretical for row in rows}
    assert theory["host <-> GPU0, pinned"] == pytest.approx(2 * 31.5, rel=1e-3)
    assert theory["GPU0 memory, copy"] == pytest.approx(2039, rel=1e-3)
    assert theory["GPU1 memory, copy"] is None
    assert (theory["GPU1 -> GPU0"], theory["GPU1 <-> GPU0"]) == ((450, 900) if peers else (None, None))
    assert rows[-1].kind == ("NVLink NV18" if peers else "through the host, no peer access (NVLink NV18)")
    curve = cuda_links.sweep(gpus, meter, 2**14)
    assert [point["size_bytes"] for point in curve] == [4096, 16384]
    assert set(curve[0]) == {"size_bytes", "h2d_gb_per_s", "d2d_gb_per_s"}


def test_a_copy_that_arrives_wrong_is_kept() -> None:
    meter = cuda_links.Meter(1)
    meter.check("good", torch.arange(4), torch.arange(4))
    meter.check("bad", torch.arange(4), torch.tensor([0, 1, 2, 9]))
    assert meter.wrong == ["bad"]


# ---------------------------------------------------------------- collectives


def by_definition(name: str, rank: int, inputs: list[torch.Tensor]) -> torch.Tensor | None:
    """What `rank` must receive, written out on whole tensors: the slow twin of checked_collectives.expected."""
    n, root = len(inputs), rank == 0
    part = [t.chunk(n) for t in inputs]
    return {
        "all_reduce": lambda: sum(inputs), "reduce": lambda: sum(inputs) if root else None,
        "broadcast": lambda: inputs[0], "reduce_scatter": lambda: sum(inputs).chunk(n)[rank],
        "scatter": lambda: part[0][rank], "all_to_all": lambda: torch.cat([part[r][rank] for r in range(n)]),
        "send_recv": lambda: inputs[(rank - 1) % n],
        # each sends a share only: the first numbers of its pattern
        "all_gather": lambda: torch.cat([part[r][0] for r in range(n)]),
        "gather": lambda: torch.cat([part[r][0] for r in range(n)]) if root else None,
    }[name]()  # fmt: skip


@pytest.mark.parametrize("name", checked_collectives.COLLECTIVES)
@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (3, torch.bfloat16), (8, torch.float16)])
def test_expected_values_in_closed_form(
    name: str, ranks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_collectives, "SLAB", 202)  # several slabs also in a small buffer
    count = 333 * ranks
    inputs = [torch.empty(count, dtype=dtype) for _ in range(ranks)]
    for rank, buffer in enumerate(inputs):
        checked_collectives.put(
            buffer, checked_collectives.pattern(rank, checked_collectives.modulus(name, dtype, ranks))
        )
    assert not torch.equal(inputs[0], inputs[1])
    for rank in range(ranks):
        parts = checked_collectives.expected(name, rank, ranks, count // ranks, dtype)
        want = by_definition(name, rank, inputs)
        if want is None:
            assert parts == []
            continue
        assert checked_collectives.count_wrong(want, parts) == 0
        spoilt = want.clone()
        spoilt[[0, -1]] += 1
        assert checked_collectives.count_wrong(spoilt, parts) == 2
        assert checked_collectives.count_wrong(want.roll(1), parts) > len(want) / 2


def bench(tmp: str, *flags: str) -> dict:
    shared = ["--device", "cpu", "--budget-s", "0.005", "--run-dir", tmp]
    return bench_collectives.main([*shared, *flags])


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_benchmark_verifies_and_writes(ranks: int, tmp_path: Path) -> None:
    flags = ["--min-bytes", "1KiB", "--max-bytes", "64KiB", "--factor", "8", "--json", str(tmp_path / "also.json")]
    done = run_ranks(bench, ranks, str(tmp_path), *flags)
    result = values(done)[0]
    assert (result["world_size"], result["verified"], result["wrong"]) == (ranks, 27, 0)
    assert all(result[f"{name}_alpha_us"] >= 0 for name in bench_collectives.COLLECTIVES)
    rows = json.loads((tmp_path / "collectives.json").read_text())
    assert rows == json.loads((tmp_path / "also.json").read_text())
    assert len(rows) == 27
    for row in rows:
        assert row["size_bytes"] == 4 * row["count"]
        assert row["count"] % ranks == 0
        assert row["algbw_gb_per_s"] == pytest.approx(row["size_bytes"] / row["time_us"] / 1e3)
        assert row["busbw_gb_per_s"] == pytest.approx(row["algbw_gb_per_s"] * bus_factor(row["collective"], ranks))
        assert row["min_us"] <= row["p25_us"] <= row["time_us"] <= row["p75_us"]
    with (tmp_path / "collectives.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(r["collective"], int(r["size_bytes"])) for r in table] == [
        (r["collective"], r["size_bytes"]) for r in rows
    ]
    assert (tmp_path / "collectives.png").stat().st_size > 5000
    assert "# reduce_scatter: " in done[0].stdout
    assert "reduce_scatter is an all_reduce underneath" in done[0].stdout
    assert done[1].stdout == ""


def bench_with_a_wrong_reduce(tmp: str) -> None:
    """One number of one rank is off, as a broken link or a bug would leave it."""

    def broken(send: torch.Tensor, receive: torch.Tensor, ctx: Any) -> None:
        checked_collectives.all_reduce(send, receive, ctx)
        if ctx.rank == 1:
            receive[17] += 1

    bench_collectives.COLLECTIVES["all_reduce"] = broken
    bench_script(tmp, "--collectives", "broadcast,all_reduce", "--max-bytes", "4KiB")


def test_a_wrong_result_is_found(tmp_path: Path) -> None:
    done = run_ranks(bench_with_a_wrong_reduce, 2, str(tmp_path))
    assert [(rank.returncode, rank.timed_out) for rank in done] == [(1, False), (1, False)]
    assert done[0].stderr.splitlines()[-1].startswith("failed: 2 numbers are wrong after all_reduce")
    assert json.loads(done[0].stdout.splitlines()[-1].removeprefix("RESULT "))["wrong"] == 2
    rows = json.loads((tmp_path / "collectives.json").read_text())
    assert [row["wrong"] for row in rows] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--min-bytes", "0"], "'0' is not a size above 0"),
        (["--max-bytes", "many"], "'many' is not a size"),
        (["--collectives", "all_reduce,all_rotate"], "no collective 'all_rotate'"),
        (["--factor", "1"], "1 is below 2"),
    ],
)
def test_bad_flags_of_the_benchmark(flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        bench_collectives.main(flags)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--min-bytes", "2MiB", "--max-bytes", "1MiB"], "--min-bytes 2097152 is above --max-bytes 1048576"),
        (["--max-bytes", "64TiB"], "take a smaller --max-bytes"),
    ],
)
def test_every_rank_refuses_what_cannot_be_measured(flags: list[str], says: str, tmp_path: Path) -> None:
    for rank in run_ranks(bench_script, 2, str(tmp_path / "run"), *flags):
        assert (rank.returncode, rank.timed_out) == (2, False)
        assert says in rank.stderr
        assert "Traceback" not in rank.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["no-such-folder/rows.json", "."])
def test_rows_that_cannot_be_written_are_refused_at_the_start(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in rank_environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"cannot write .*; pass another --json"):
        bench_collectives.main(["--device", "cpu", "--json", str(tmp_path / path), "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def bench_script(tmp: str, *flags: str) -> None:
    script.run(partial(bench, tmp, *flags))


def test_too_little_memory_for_the_arrays() -> None:
    done = run_script(LINKS, ["--device", "cpu", "--host-mib", str(2**26)])
    assert done.returncode == 2
    assert "smaller --host-mib" in done.stderr


@pytest.mark.parametrize("path", [BENCH, PREDICT])
def test_one_rank_has_nobody_to_talk_to(path: str, tmp_path: Path) -> None:
    done = run_script(path, ["--device", "cpu", "--run-dir", tmp_path])
    assert done.returncode == 2
    assert "one rank" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("1KiB", 1024), ("4K", 4096), ("1.5MiB", 3 * 2**19), ("2g", 2**31), ("12", 12), ("8B", 8)]
)
def test_sizes(text: str, size: int) -> None:
    assert bench_collectives.parse_size(text) == size


def test_a_sweep_rounds_up_to_equal_shares() -> None:
    assert bench_collectives.sweep(1, 5000, 8, 12) == [12, 72, 516, 4104]  # 1 and 8 bytes are both 12


def test_the_fit_of_rows_says_how_far_it_is_off() -> None:
    def row(size: int, us: float) -> bench_collectives.Row:
        return bench_collectives.Row("broadcast", size, size // 4, 5, us, us, us, us, 1, 1, 0)

    rows, line = bench_collectives.with_fit([row(1000, 11), row(10000, 20), row(100000, 110)])
    assert line
    assert line.alpha_s == pytest.approx(10e-6)
    assert line.bytes_per_s == pytest.approx(1e9)
    assert [r.fit_error_percent for r in rows] == pytest.approx([0, 0, 0], abs=1e-6)
    assert bench_collectives.with_fit([row(1000, 11)]) == ([row(1000, 11)], None)


# ---------------------------------------------------------------- predicting a step


def test_the_arithmetic_of_a_step() -> None:
    step = predict_step.Step(forward=10, backward=20, reduce=3, optimizer=2, step=36)
    assert step.naive_ms(100) == 136
    assert step.overlapped_ms(100) == 112  # communication is the longer
    assert step.overlapped_ms(5) == 32  # and is hidden altogether


@given(st.integers(10**4, 10**11))
def test_the_line_is_fitted_to_other_sizes_than_it_predicts(gradient_bytes: int) -> None:
    sizes = predict_step.fit_sizes(gradient_bytes)
    assert len(sizes) >= 4
    assert max(sizes) < gradient_bytes
    assert all(size % 4 == 0 for size in sizes)


def predict(tmp: str) -> dict:
    return predict_step.main(
        ["--device", "cpu", "--batch-size", "1", "--seq-len", "8", "--steps", "1", "--fit-s", "0.01", "--run-dir", tmp]
    )


def test_prediction_and_measurement_of_two_ranks(tmp_path: Path) -> None:
    found, other = values(run_ranks(predict, 2, str(tmp_path)))
    assert found == other  # the slowest rank's figures, known to both
    assert found["world_size"] == 2
    assert found["link_mbit"] is None
    assert found["gradient_mib"] == pytest.approx(14.26, abs=0.01)
    line = AlphaBeta(found["alpha_us"] / 1e6, 1 / found["all_reduce_gb_per_s"] / 1e9)
    assert found["communication_predicted_ms"] == pytest.approx(line.time_s(found["gradient_mib"] * 2**20) * 1e3)
    assert found["predicted_ms"] == pytest.approx(found["compute_ms"] + found["communication_predicted_ms"])
    error = 100 * (found["predicted_ms"] / found["measured_ms"] - 1)
    assert found["prediction_error_percent"] == pytest.approx(error)
    assert found["within_15_percent"] is (abs(error) < 15)


def test_copies_alone_send_nothing_and_leave_the_gradients() -> None:
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    predict_step.average_gradients(model, 1, send=False)  # without a process group: a message would fail
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True) if p.grad is not None)


def test_rates_without_namespaces_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(virtual_cluster, "why_not", lambda: "no namespaces; run it as root")
    with pytest.raises(UserError, match="no namespaces; run it as root; or leave out --rates"):
        predict_step.main(["--rates", "100mbit", "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rates", "100mbit,fast"], "'fast' is not like 100mbit"),
        (["--rates", "100mbit,"], "'' is not like 100mbit"),
        (["--rates", "1gbit", "--hosts", "1000"], "1000 hosts are too many"),
    ],
)
def test_clusters_that_cannot_be_are_refused_at_the_start(flags: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        predict_step.main([*flags, "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_rates_starts_its_own_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in rank_environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="plain python"):
        predict_step.main(["--rates", "100mbit", "--run-dir", str(tmp_path)])


def test_prediction_over_a_virtual_link(tmp_path: Path) -> None:
    if reason := virtual_cluster.why_not():
        pytest.skip(f"needs network namespaces: {reason}")
    flags = ["--batch-size", "1", "--seq-len", "16", "--steps", "1", "--fit-s", "0.01", "--run-dir", str(tmp_path)]
    found = predict_step.main(["--device", "cpu", "--rates", "500mbit", *flags])
    assert found["world_size"] == 2
    assert found["measured_ms_500mbit"] > 230  # 14.3 MiB over 62.5 MB/s: no step can be faster
    assert found["predicted_ms_500mbit"] > found["compute_ms_500mbit"]
    inside = json.loads((tmp_path / "500mbit" / "result.json").read_text())
    assert inside["link_mbit"] == 500
    assert found["largest_error_percent"] == pytest.approx(abs(inside["prediction_error_percent"]))
