"""Chapter 4's memory: what trains under a cap and what does not, the disk tier, and what goes wrong with its folder."""

from __future__ import annotations

import copy
import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from ch04_fsdp import disk, larger_than_memory, memory_cap, model, step, weights
from ch04_fsdp.sharding import Sharding
from common import dist, lm, process, profiling
from tests.inprocess import run_script
from tests.spawn import run_ranks, values

TRAIN = "ch04_fsdp/train_fsdp.py"
SHORT = ["--device", "cpu", "--steps", "4", "--seq-len", "32", "--val-tokens", "64", "--sample-tokens", "0",
         "--dtype", "fp32", "--batch-size", "2"]  # fmt: skip
MIB = 2**20


# ---------------------------------------------------------------- a model larger than a device


def test_ddp_dies_fsdp_trains_and_a_disk_trains_it_on_one_rank(tmp_path: Path) -> None:
    found = larger_than_memory.main(["--device", "cpu", "--run-dir", str(tmp_path), "--steps", "3", "--timeout", "60"])
    assert found["cap_gib"] < found["state_gib"]
    for name, ranks in (("one_rank", 1), ("ddp_2_ranks", 2)):
        assert found[name] == "out of memory"
        assert found[f"{name}_exit_codes"] == [2] * ranks, "each rank says it in one line, and none hangs"
        assert re.match(r"out of memory \(\w*Allocator.* allocate \d+ bytes", found[f"{name}_error"])
    for name, ranks in (("fsdp_2_ranks", 2), ("fsdp_4_ranks", 4), ("one_rank_disk", 1)):
        assert found[name] == "trains"
        assert found[f"{name}_exit_codes"] == [0] * ranks
        assert 0 < found[f"{name}_peak_gib"] < found["cap_gib"]
    assert found["losses_apart"] < 1e-3
    # Not only what counts as private: all resident pages, those of the file among them.
    assert found["one_rank_disk_peak_gib"] < 0.4 * found["state_gib"]


def cap_on_a_rank(folder: Path) -> dict[str, bool]:
    size = 64 * MIB
    found = {}
    with memory_cap.limited(size, torch.device("cpu")):
        kept = torch.ones(size // 8)  # half of it
        try:
            torch.ones(size // 4)
            found["refused"] = False
        except RuntimeError as error:
            found["refused"] = "can't allocate memory" in str(error)
        del kept
        found["given again"] = torch.ones(3 * size // 16).numel() > 0
        file = torch.from_file(str(folder / "large"), shared=True, size=size, dtype=torch.float32)
        found["a file is not counted"] = file.fill_(1.0)[-1].item() == 1.0
        peak = memory_cap.Peak(torch.device("cpu"))
        file.sum()
        found["but seen"] = peak.bytes() >= 0 and profiling.memory(torch.device("cpu")).current > 4 * size
    found["lifted"] = torch.ones(size // 2).numel() > 0
    return found


def test_a_cap_refuses_what_is_beyond_it_and_ends_with_its_block(tmp_path: Path) -> None:
    found = values(run_ranks(cap_on_a_rank, 1, tmp_path))[0]
    assert all(found.values()), found


# ---------------------------------------------------------------- the tier


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def resident(folder: Path) -> int:
    """Bytes of the tier's mapping that are in this process's memory, as the kernel says."""
    smaps = Path("/proc/self/smaps").read_text()
    parts = re.findall(rf"{re.escape(str(folder))}/\S+ \(deleted\)\nSize:.*?\nRss:\s+(\d+) kB", smaps, re.DOTALL)
    assert parts, "the file is mapped, and has no name any more"
    return sum(int(part) for part in parts) * 1024


def steps(built: nn.Module, optimizer: torch.optim.Optimizer, ctx: dist.Context, sharding: Sharding, seed: int) -> None:
    """Two, each of two micro-batches; the norm is clipped in one of them. Gradients are reduced after each."""
    generator = torch.Generator().manual_seed(100 * seed + ctx.rank)
    for max_norm in (0.1, 1e9):
        batch = [tuple(torch.randint(0, 256, (2, 2, 8), generator=generator)) for _ in range(2)]
        step.backward(built, batch, 32 * ctx.world_size, ctx.world_size, sharding, sync_each=True)
        step.update(built, optimizer, max_norm)


def small() -> object:
    config = lm.config("nano")
    config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 64, 170, 6
    config.head_dim = 16
    return config


def tier_on_a_rank(folder: Path) -> dict[str, object]:
    """A model whose rows do not divide by the ranks, in memory and on disk, and loaded from a state of the other."""
    found: dict[str, object] = {}
    with dist.session("cpu", timeout_s=60) as ctx:
        hashes, state = {}, None
        for offload in ("none", "disk"):
            sharding = Sharding("full", offload=offload)
            built = model.build(small(), sharding, ctx, seq_len=8, offload_dir=folder)
            optimizer = model.make_optimizer(built, 1e-2)
            steps(built, optimizer, ctx, sharding, 1)
            hashes[offload, "first"] = weights.sha256(built)
            if state is None:
                state = copy.deepcopy(get_state_dict(built, optimizer))
            steps(built, optimizer, ctx, sharding, 2)
            hashes[offload, "second"] = weights.sha256(built)
        tier = disk.of(built)
        assert tier
        # Another run, which goes on from what the one in memory had after its first steps.
        other = model.build(small(), sharding, ctx, seq_len=8, seed=5, offload_dir=folder)
        resumed = model.make_optimizer(other, 1e-2)
        get_state_dict(other, resumed)
        set_state_dict(other, resumed, model_state_dict=state[0], optim_state_dict=state[1])
        disk.settle(other, resumed)
        hashes["resumed", "first"] = weights.sha256(other)
        steps(other, resumed, ctx, sharding, 2)
        hashes["resumed", "second"] = weights.sha256(other)

        # The traffic of one more step, and where everything is then.
        own = disk.of(other)
        assert own
        begin = torch.tensor([own.paged_in, own.paged_out])
        step.backward(other, [tuple(torch.ones(2, 2, 8, dtype=torch.int64))], 16, ctx.world_size, sharding)
        graded = [local(p.grad) for p in other.parameters()]
        step.apply(other, resumed)
        moved = torch.tensor([own.paged_in, own.paged_out]) - begin
        shards = sum(
            sharded.padded_sharded_param_size.numel() * 4
            for module in other.modules() if hasattr(module, "_get_fsdp_state")
            for group in {id(g): g for g in module._get_fsdp_state()._fsdp_param_groups}.values()
            for sharded in group.fsdp_params
        )  # fmt: skip
        first = torch.frombuffer(own._map, dtype=torch.uint8).data_ptr()
        held = [local(p) for p in other.parameters()] + graded
        held += [local(s[kind]) for s in resumed.state.values() for kind in disk.STATE]
        found["outside the file"] = sum(
            not first <= tensor.data_ptr() < first + own.size for tensor in held if tensor.numel()
        )
        found["tensors"] = len(held)
        found["parameters"] = len(list(other.parameters()))
        found["shards in a step"] = (moved / shards).tolist()
        del built, optimizer, tier
        gc.collect()
        found["resident"] = resident(folder) / own.size
        found["uneven"] = sum(local(p).shape[0] * ctx.world_size != p.shape[0] for p in other.parameters())
        found["names"] = [path.name for path in folder.iterdir()]
        found["hashes"] = hashes
    return found


def test_the_tier_changes_no_bit_and_holds_everything(tmp_path: Path) -> None:
    for rank in values(run_ranks(tier_on_a_rank, 3, tmp_path, timeout_s=90)):
        hashes = rank["hashes"]
        for when in ("first", "second"):
            assert hashes["none", when] == hashes["disk", when] == hashes["resumed", when]
        assert hashes["none", "first"] != hashes["none", "second"]
        assert rank["uneven"] > rank["parameters"] / 2, "rows that do not divide are what pads"
        assert rank["tensors"] == 4 * rank["parameters"]
        assert rank["outside the file"] == 0, "weights, gradients and moments, also after a load"
        # Weights come for forward, backward and step, gradients for the reduction and the step, two moments: seven.
        # Weights, moments, and the gradient once are changed: four. No norm was asked for.
        assert rank["shards in a step"] == [7, 4]
        assert rank["resident"] < 0.3, "what has been used has left"
        assert rank["names"] == [], "a killed process leaves nothing"


def test_checkpoints_of_a_disk_are_those_of_memory_bit_for_bit(tmp_path: Path) -> None:
    """A run on disk that goes on from its checkpoint, with its shards on disk or not, ends as one in memory."""

    def train(name: str, *more: str) -> dict:
        done = run_script(TRAIN, [*SHORT, "--run-dir", str(tmp_path / "run" / name), *more])
        assert done.result, done.stderr
        return done.result

    wanted = train("memory", "--offload", "none")["weights_sha256"]
    out = ["--out", str(tmp_path / "out")]
    whole = train("disk", "--offload", "disk", *out, "--save-every", "2")
    assert whole["weights_sha256"] == wanted
    assert whole["paged_in_gib"] > whole["paged_out_gib"] > whole["offload_file_gib"]
    for offload in ("disk", "none"):
        resumed = train(f"resumed-{offload}", "--offload", offload, "--resume",
                        str(tmp_path / "out/checkpoints/step-00000002"))  # fmt: skip
        assert resumed["resumed_at_step"] == 2
        assert resumed["weights_sha256"] == wanted


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--offload", "disk", "--offload-dir", "/nowhere/at/all"], "no folder /nowhere/at/all; make it on the disk"),
        (["--offload-dir", "/tmp"], "--offload-dir belongs to --offload disk"),
        (["--offload", "disk", "--async-save", "--out", "/tmp/x"], "--async-save copies into memory"),
        (["--memory-cap-gib", "0"], "--memory-cap-gib: 0 is not a finite number above 0"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_line(flags: list[str], said: str, tmp_path: Path) -> None:
    done = run_script(TRAIN, [*SHORT, "--run-dir", str(tmp_path), *flags])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in done.stderr


BOTH_DISKS = """
mount -t tmpfs -o size=4m full "$1" && mount -t tmpfs -o ro readonly "$2" && exec "$3" -c '
import sys
from ch04_fsdp import train_fsdp
from common.script import UserError
for folder in sys.argv[1:3]:
    try:
        train_fsdp.main([*sys.argv[3:], "--offload", "disk", "--offload-dir", folder])
    except UserError as error:
        print("said:", error)
' "$1" "$2" "${@:4}"
"""


def test_a_full_disk_and_a_read_only_one_are_found_before_training(tmp_path: Path) -> None:
    """On two real mounts, in a mount namespace of the test's own: root may write to any folder, but not there."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if process.run([*unshare, "mount", "-t", "tmpfs", "none", str(tmp_path)], timeout_s=10).returncode:
        pytest.skip("needs user namespaces")
    folders = [tmp_path / name for name in ("full", "readonly")]
    for folder in folders:
        folder.mkdir()
    arguments = [*map(str, folders), sys.executable, *SHORT, "--run-dir", str(tmp_path / "run")]
    done = process.run([*unshare, "bash", "-c", BOTH_DISKS, "bash", *arguments], timeout_s=60)
    said = re.findall(r"^said: (.*)", done.stdout, re.MULTILINE)
    assert len(said) == 2, done.stderr
    assert re.fullmatch(
        rf"{folders[0]} has 0\.00 GiB free, this rank's shards and optimizer state take 0\.06 GiB; make room or .*",
        said[0],
    )
    assert said[1] == f"cannot offload to {folders[1]} (Read-only file system); pass another --offload-dir"
