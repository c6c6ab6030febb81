"""DeepSpeed's checkpoints: exact resumes, kills, other ranks and stages, one Hugging Face folder, several hosts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ch01_intro import training
from ch02_hardware_parallelism import virtual_cluster
from ch03_ddp import preemption
from ch03_ddp.survive import spoil
from ch03_ddp.train_ddp import open_feed
from ch04_fsdp import weights, zero_peers
from ch05_deepspeed_megatron import (
    check_launch,
    checkpoints,
    consolidate,
    engine,
    ops,
    options,
    survive_zero,
    train_deepspeed,
    universal,
    universal_format,
    zero_files,
)
from common import data, dist, exercises, lm, process, script
from common.logs import Metrics
from tests.spawn import run_ranks, values

LAUNCH = process.ROOT / "ch05_deepspeed_megatron/launch"
HOSTFILE = LAUNCH / "hostfile"
STEP = "step-00000002"
SSHD = Path("/usr/sbin/sshd")
FROZEN = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")  # in the jobs of that name


@pytest.fixture(scope="module")
def tiny(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a short training of a model of 150,000 tied parameters, of which 3 ranks cannot have equal parts."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = lm.config("nano", 64)
    config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers = 2048, 50, 100, 2
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 5, 5, 10
    corpus = training.load_corpus(Namespace(preset="nano", data=str(text_folder), seq_len=16))
    lm.save(lm.build(config), corpus.tokenizer(), folder)
    return [
        "--preset", str(folder), "--data", str(text_folder), "--seq-len", "16", "--batch-size", "1", "--global-batch",
        "6", "--steps", "6", "--lr", "3e-3", "--warmup", "0", "--val-tokens", "256", "--sample-tokens", "0",
        "--log-every", "1", "--threads", "1", "--device", "cpu",
    ]  # fmt: skip


def flags_of(tiny: list[str], stage: int, dtype: str, *more: str) -> list[str]:
    return [*tiny, "--deepspeed-config", str(options.CONFIGS / f"zero{stage}.json"), "--dtype", dtype, *more]


# ---------------------------------------------------------------- engines in one session, as that costs seconds


class Trained:
    """An engine and its checkpoints, a few steps at a time."""

    def __init__(self, args: Namespace, settings: dict, out: Path, ctx: dist.Context) -> None:
        self.args, self.ctx, self.position = args, ctx, 0
        self.corpus = training.load_corpus(args)
        made_by = options.of_a_resume(args, self.corpus, ctx, settings)
        self.keeper = checkpoints.Keeper(out, made_by, ctx, keep=9)
        model = engine.build(args.preset, settings, ctx, seq_len=args.seq_len, dropout=args.dropout)
        if out.name.endswith("frozen"):
            for name, parameter in model.named_parameters():
                parameter.requires_grad = name not in FROZEN
        self.engine = engine.initialize(model, settings, ctx)
        script.seed_everything(ctx.rank)

    def steps(self, first: int, last: int) -> list[float]:
        """The losses."""
        feed, losses = open_feed(self.args, self.corpus, self.ctx, self.position), []
        for _ in range(first, last):
            engine.set_learning_rate(self.engine, self.args.lr)
            batch = next(feed)
            loss = zero_peers.backward(self.engine, batch.micro_batches, batch.tokens, self.ctx.world_size)
            zero_peers.update(self.engine)
            torch.distributed.all_reduce(loss)
            losses.append(loss.item())
            self.position = batch.position
        return losses

    def save(self, step: int) -> None:
        self.keeper.save(step, self.engine, self.position)

    def load(self, path: Path) -> int:
        """What is frozen is in every job of a seed what it was: here it is 0 before the load."""
        from deepspeed import zero

        frozen = [parameter for parameter in self.engine.module.parameters() if not parameter.requires_grad]
        with zero.GatheredParameters(frozen, modifier_rank=0), torch.no_grad():
            for parameter in frozen:
                parameter.zero_()
        step, self.position = self.keeper.load(path, self.engine)
        return step

    def optimizer(self) -> dict[str, Any]:
        zero = self.engine.optimizer
        return {
            "steps": sorted(float(state["step"]) for state in zero.optimizer.state.values()),
            "weight_decay": [group["weight_decay"] for group in zero.param_groups],
            "loss_scale": float(zero.cur_scale) if hasattr(zero, "cur_scale") else float(zero.loss_scale),
            "clip": zero.clip_grad,
        }

    def sha256(self) -> str:
        return weights.sha256_of(engine.whole_weights(self.engine))


Job = tuple[list[str], Path]


def prepared(jobs: list[Job]) -> list[tuple[Namespace, dict, Path]]:
    """Before the session: within one, DeepSpeed divides by its ranks."""
    ready = []
    for flags, out in jobs:
        args = options.parse(None, flags)
        ready.append((args, options.settings(args), out))
    return ready


def save_and_resume(jobs: list[Job]) -> list[dict[str, Any]]:
    """On each rank: two steps, a save, two more; and again, from the save on."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it is slow on a CPU, and right
    ready, found = prepared(jobs), []
    with dist.session("cpu", threads=1) as ctx:
        for args, settings, out in ready:
            one = Trained(args, settings, out, ctx)
            before = one.steps(0, 2)
            one.save(2)
            told = {
                "optimizer": one.optimizer(),
                "sha256": one.sha256(),
                "dtype": str(next(one.engine.parameters()).dtype),
            }
            after = one.steps(2, 4)
            again = Trained(args, settings, out, ctx)
            assert again.load(out / STEP) == 2
            resumed = {"optimizer": again.optimizer(), "sha256": again.sha256()}
            told |= {"losses": before + after, "end": one.sha256()}
            resumed |= {"losses": before + again.steps(2, 4), "end": again.sha256()}
            found.append({"alone": told, "resumed": resumed})
    return found


def go_on(jobs: list[Job], sources: list[Path]) -> list[dict[str, Any]]:
    """On each rank: load another job's checkpoint, save it as it is held here, and two steps more."""
    ready, found = prepared(jobs), []
    with dist.session("cpu", threads=1) as ctx:
        for (args, settings, out), source in zip(ready, sources, strict=True):
            one = Trained(args, settings, out, ctx)
            one.load(source)
            one.save(2)
            found.append({"optimizer": one.optimizer(), "losses": one.steps(2, 4)})
    return found


SAVED = [
    (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"), (3, "fp16"), (1, "frozen"),
    (2, "frozen"), (3, "frozen"),
]  # fmt: skip


def type_of(name: str) -> str:
    return "fp32" if name == "frozen" else name


@pytest.fixture(scope="module")
def saved(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """Checkpoints of 2 ranks, by stage and type, and what training and resuming was like."""
    folder = tmp_path_factory.mktemp("saved")
    jobs = [
        (
            flags_of(tiny, stage, type_of(dtype), "--dropout", "0.1" if dtype.endswith("16") else "0.0"),
            folder / f"{stage}-{dtype}",
        )
        for stage, dtype in SAVED
    ]
    first, second = values(run_ranks(save_and_resume, 2, jobs, timeout_s=150))
    assert [x["alone"]["losses"] for x in first] == [x["alone"]["losses"] for x in second]
    return folder, {f"{stage}-{dtype}": found for (stage, dtype), found in zip(SAVED, first, strict=True)}


def test_a_resume_is_exact(saved: tuple[Path, dict[str, dict]]) -> None:
    """In each stage and type: weights, moments and loss scale after the load, losses and weights at the end."""
    folder, found = saved
    for name, told in found.items():
        for what, value in told["resumed"].items():
            assert value == told["alone"][what], (name, what)
        dtype = name.split("-")[1]
        assert told["alone"]["dtype"] == str(training.DTYPES[type_of(dtype)])
        assert told["alone"]["optimizer"]["loss_scale"] == (65536 if dtype == "fp16" else 1)
        assert len(set(told["alone"]["losses"])) == 4
        assert not list((folder / name).glob(".*")), "nothing half-written is left"


def test_other_ranks_and_stages(saved: tuple[Path, dict[str, dict]], tiny: list[str], tmp_path: Path) -> None:
    """Saved by 2 ranks, read by 3, which cut each parameter elsewhere: the same bits, and the same training."""
    folder, found = saved
    ways = [(3, 3, "fp32"), (3, 1, "fp32"), (1, 3, "fp32"), (2, 2, "fp32"), (3, 2, "frozen"), (1, 3, "frozen")]
    jobs = [(flags_of(tiny, stage, "fp32"), tmp_path / f"{was}-{stage}-{kind}") for was, stage, kind in ways]
    sources = [folder / f"{was}-{kind}" / STEP for was, _, kind in ways]
    told = values(run_ranks(go_on, 3, jobs, sources, timeout_s=120))[0]
    for (was, stage, kind), (_, out), now in zip(ways, jobs, told, strict=True):
        source, alone = folder / f"{was}-{kind}", found[f"{was}-{kind}"]["alone"]
        before = universal.hashes(source / STEP)
        assert len(before) == 3 * 20 - 2 * len(FROZEN) * (kind == "frozen")
        assert universal.hashes(out / STEP) == before, (was, stage, kind)
        assert set(now["optimizer"].pop("steps")) == set(alone["optimizer"]["steps"])
        assert now["optimizer"] == {name: value for name, value in alone["optimizer"].items() if name != "steps"}
        assert now["losses"] == pytest.approx(alone["losses"][2:], abs=2e-6), (was, stage, kind)
        assert not list(source.glob(".*")), "the universal copy is gone"


def test_what_cannot_be_made_universal(saved: tuple[Path, dict[str, dict]], tmp_path: Path) -> None:
    source = tmp_path / STEP
    shutil.copytree(saved[0] / "3-fp32" / STEP, source)
    with pytest.raises(script.UserError, match="is of ZeRO stage 3, this engine of 0; take"):
        universal_format.convert(source / checkpoints.TAG, tmp_path / "out", 0)
    (source / checkpoints.TAG / universal_format.OFFLOADED).mkdir()
    with pytest.raises(script.UserError, match="only as many ranks can read; take"):
        universal_format.convert(source / checkpoints.TAG, tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()


def train(flags: list[str]) -> dict:
    return train_deepspeed.main(flags)


@pytest.mark.timeout(900)  # DeepSpeed's operators are compiled where they are not yet: minutes
@pytest.mark.skipif(bool(exercises.missing_for("aio")), reason=f"needs {exercises.missing_for('aio')}")
def test_a_resume_from_a_disk_is_exact(tiny: list[str], tmp_path: Path) -> None:
    """ZeRO-Infinity: the optimizer's state goes from its swap files to the checkpoint, and into those of another job."""
    ops.build([ops.ADAM, ops.AIO], torch.device("cpu"))
    disk = tmp_path / "disk"
    disk.mkdir()
    config = options.CONFIGS / "zero3_nvme.json"
    flags = [*tiny, "--preset", "nano", "--deepspeed-config", str(config), "--nvme-dir", str(disk), "--dtype", "fp32",
             "--steps", "4", "--global-batch", "2", "--run-dir", str(tmp_path / "run")]  # fmt: skip
    whole, again = tmp_path / "whole", tmp_path / "again"
    first = values(run_ranks(train, 2, [*flags, "--out", str(whole), "--save-every", "2"], timeout_s=120))[0]
    source = whole / "checkpoints" / STEP
    assert list((source / checkpoints.TAG / universal_format.OFFLOADED).rglob("*.swp"))
    second = values(run_ranks(train, 2, [*flags, "--out", str(again), "--resume", str(source)], timeout_s=120))[0]
    assert second["resumed_at_step"] == 2
    assert losses(again)[-2:] == losses(whole)[-2:]
    assert second["weights_sha256"] == first["weights_sha256"]


# ---------------------------------------------------------------- kills, preemption, spoilt checkpoints


def killed_in_its_second_save(flags: list[str]) -> None:
    """Rank 1 dies when DeepSpeed's files are there and their folder has no name yet."""
    write, written = checkpoints.Keeper._write, []

    def write_or_die(self: checkpoints.Keeper, *saved: Any) -> None:
        written.append(saved)
        if len(written) == 2 and self.ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *saved)

    checkpoints.Keeper._write = write_or_die  # type: ignore[method-assign]
    train_deepspeed.main(flags)


def told_to_stop(flags: list[str]) -> dict:
    """Rank 1 alone gets SIGTERM, in the middle of its second step."""
    ask, asked = preemption.Preemption.ask, []

    def ask_and_be_told(self: preemption.Preemption) -> None:
        asked.append(1)
        if len(asked) == 2 and self.ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        ask(self)

    preemption.Preemption.ask = ask_and_be_told  # type: ignore[method-assign]
    return train_deepspeed.main(flags)


@pytest.fixture(scope="module")
def alone(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[float]]:
    """RESULT and losses of a training on 2 ranks in stage 3 that is left alone."""
    out = tmp_path_factory.mktemp("alone")
    flags = flags_of(tiny, 3, "bf16", "--dropout", "0.1", "--out", str(out), "--run-dir", str(out / "run"))
    result = values(run_ranks(train, 2, flags, timeout_s=90))[0]
    return result, losses(out)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in Metrics.read(out / "losses.jsonl") if "loss" in row]


def test_killed_preempted_and_spoilt(alone: tuple[dict, list[float]], tiny: list[str], tmp_path: Path) -> None:
    """One job's life: SIGKILL in a save, SIGTERM to one rank, a byte flipped in the newest checkpoint, the end."""
    words = ["--dropout", "0.1", "--out", str(tmp_path / "out"), "--run-dir", str(tmp_path / "run"), "--save-every", "2",
             "--val-every", "2", "--keep", "2", "--resume", "auto"]  # fmt: skip
    flags = flags_of(tiny, 3, "bf16", *words)
    folder = tmp_path / "out/checkpoints"
    died = run_ranks(killed_in_its_second_save, 2, flags, timeout_s=90)
    assert died[1].returncode == -signal.SIGKILL
    assert not died[0].timed_out, "the other rank does not wait for it"
    assert [path.name for path in sorted(folder.iterdir()) if path.is_dir()] == [
        ".step-00000004.partial",
        "step-00000002",
    ]
    assert list((folder / ".step-00000004.partial" / checkpoints.TAG).glob("*optim_states.pt"))

    left = values(run_ranks(told_to_stop, 2, flags, timeout_s=90))[0]
    assert left["preempted"]
    assert (left["resumed_at_step"], left["steps"]) == (2, 4)
    newest = folder / "step-00000004"
    assert [path.name for path in sorted(folder.iterdir()) if path.is_dir()] == ["step-00000002", newest.name]
    assert json.loads((folder / "best.json").read_text())["name"] == "step-00000002"

    spoil(next((newest / checkpoints.TAG).glob("*zero_pp_rank_1_*optim_states.pt")))
    ended = run_ranks(train, 2, flags, timeout_s=90)
    result = values(ended)[0]
    assert f"{newest.name} is corrupt" in ended[0].stderr
    assert result["resumed_at_step"] == 2
    assert losses(tmp_path / "out") == alone[1]
    assert result["weights_sha256"] == alone[0]["weights_sha256"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--stages 4", "no ZeRO stage 4"),
        ("--steps 9", "leave no room"),
        ("--global-batch 6", "is no multiple of 2 ranks"),
    ],
)
def test_bad_words_for_survive(line: str, said: str) -> None:
    with pytest.raises(script.UserError, match=f"{said}.*; "):
        survive_zero.main(line.split())


# ---------------------------------------------------------------- one Hugging Face folder


@torch.no_grad()
def test_consolidated_is_what_was_trained(saved: tuple[Path, dict[str, dict]], tmp_path: Path) -> None:
    """Stages 1, 2 and 3, whatever they compute in: float32, each tensor once, in plain transformers."""
    from transformers import AutoModelForCausalLM

    folder, found = saved
    logits = []
    for name in ("1-fp32", "2-fp32", "3-fp32", "3-bf16", "1-frozen", "2-frozen", "3-frozen"):
        out = tmp_path / name
        told = consolidate.main(
            [str(folder / name / STEP), str(out), "--file-mib", "0.2", "--run-dir", str(tmp_path / "run")]
        )
        assert told["files"] > 1
        files = set(weights.files_of_tensors(out).values())
        assert told["weights_gib"] * 2**30 == 4 * told["parameters"]
        stored = [key for path in files for key in safe_open(path, framework="pt").keys()]  # noqa: SIM118
        assert len(stored) == len(set(stored)) == 20
        assert "lm_head.weight" not in stored
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.dtype == torch.float32
        assert lm.weights_sha256(model) == found[name]["alone"]["sha256"]
        logits.append(model(torch.arange(16)[None]).logits)
    torch.testing.assert_close(logits[0], logits[2], atol=1e-4, rtol=0)


def test_consolidated_is_what_deepspeed_consolidates(saved: tuple[Path, dict[str, dict]]) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for name in ("2-bf16", "3-fp16"):
        source = saved[0] / name / STEP
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(source), checkpoints.TAG)
        ours = dict(zero_files.parameters(source / checkpoints.TAG, keep_open_bytes=1))
        assert set(theirs) - set(ours) == {"lm_head.weight"}
        assert all(torch.equal(theirs[key], value) for key, value in ours.items())


def test_bad_words_for_consolidate(saved: tuple[Path, dict[str, dict]], tmp_path: Path) -> None:
    source = tmp_path / STEP
    for path, said in ((tmp_path, "is no checkpoint of train_deepspeed.py"), (source, "is corrupt")):
        if path == source:
            shutil.copytree(saved[0] / "3-fp32" / STEP, source)
            spoil(next((source / checkpoints.TAG).glob("*_rank_1_*optim_states.pt")))
        with pytest.raises(script.UserError, match=said):
            consolidate.main([str(path), str(tmp_path / "out"), "--run-dir", str(tmp_path / "run")])
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- several hosts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host0 slots=0\n", ":1: slots=0 is no number above 0"),
        ("host0 slots=2x\n", "slots=2x is no number"),
        ("host0 slots=1\nhost1 slots=2\nhost0 slots=1\n", ":3: host0 is there twice"),
        ("host0 slots=1 gpus=2\n", "'gpus=2' is not known"),
        ("host0\n", "has 0 counts of slots"),
        ("host0 slots=1 slots=2\n", "has 2 counts of slots"),
        ("-oProxyCommand=x slots=1\n", "is no host"),
        ("# nothing\n\n", "names no host"),
        ("localhost slots=1\nhost1 slots=1\n", "cannot find localhost"),
    ],
)
def test_a_bad_hostfile(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(script.UserError, match=f"{re.escape(said)}.*; "):
        check_launch.main(["--hostfile", str(tmp_path / "hostfile"), "--no-ssh", "--", check_launch.TRAINING])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--hostfile NONE -- {0}", "cannot read the hostfile NONE"),
        ("--hostfile {1}", "no SCRIPT"),
        ("--hostfile {1} -- no-such.py", "there is no script no-such.py"),
        ("--hostfile {1} -- {0} --batch-size 3 --global-batch 4", "no multiple of 2 ranks"),
        ("--hostfile {1} -- {0} --steps 0", "0 is below 1"),
        ("--hostfile {1} -- {0} --deepspeed-config {2}", "did you mean 'stage'"),
    ],
)
def test_a_bad_job_starts_nothing(line: str, said: str, tmp_path: Path, no_launcher: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"train_batch_size": "auto", "zero_optimization": {"stag": 1}}')
    words = line.format(check_launch.TRAINING, HOSTFILE, bad).split()
    before = dict(os.environ)
    with pytest.raises(script.UserError, match=re.escape(said)):
        check_launch.main(["--no-ssh", *words])
    assert {key: value for key, value in os.environ.items() if key in before} == before
    assert "WORLD_SIZE" not in os.environ


def test_a_good_job(no_launcher: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["--hostfile", str(HOSTFILE), "--", check_launch.TRAINING, "--batch-size", "2", "--global-batch", "8"]
    told = check_launch.main(["--no-ssh", *words])
    assert told == {"hosts": 2, "ranks": 2, "first_host": "host0", "stage": 2, "global_batch": 8, "micro_batches": 2}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(script.UserError, match="needs pdsh, which is not here; install pdsh"):
        check_launch.main(words)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_launch_files_are_sound(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word in ("Prerequisites", "Start", "Check", "Stop"):
        assert re.search(rf"^# {word}\b", text, re.MULTILINE), f"{path.name} does not say {word}"
    for name in re.findall(r"\bch0\d_\w+/[\w./-]+\.\w+", text):
        assert (process.ROOT / name).is_file(), f"{path.name} names {name}"
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    if path.name == "deepspeed.sbatch":
        ours, theirs = ({line for line in p.read_text().splitlines() if line.startswith("#SBATCH")}
                        for p in (path, process.ROOT / "ch03_ddp/launch/train.sbatch"))  # fmt: skip
        assert theirs ^ ours == {"#SBATCH --job-name=train", "#SBATCH --job-name=deepspeed"}


BY_PDSH = """
set -eu
if [ "$HOST_INDEX" = 0 ]; then
    mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && touch '{keys}/mounted'
fi
until [ -e '{keys}/mounted' ]; do sleep 0.05; done
{sshd} -D -e -f '{keys}/sshd_config' &
if [ "$HOST_INDEX" = 0 ]; then
    export SSH_CONFIG='{keys}/config' HOSTFILE=ch05_deepspeed_megatron/launch/hostfile DS_ENV_FILE='{keys}/env'
    bash ch05_deepspeed_megatron/launch/deepspeed.sh {train} && touch '{keys}/done' || touch '{keys}/done'
else
    until [ -e '{keys}/done' ]; do sleep 0.2; done
fi
kill %1
"""
LACKS: Callable[[], str | None] = lambda: next(  # noqa: E731
    (f"needs {name}" for name in ("pdsh", "ssh") if not shutil.which(name)), virtual_cluster.why_not()
)


@pytest.mark.skipif(LACKS() is not None or os.geteuid() != 0 or not SSHD.exists(), reason="needs root, pdsh and sshd")
def test_two_hosts_by_the_deepspeed_launcher(alone: tuple[dict, list[float]], tiny: list[str], tmp_path: Path) -> None:
    """pdsh, a real ssh, two hosts of one rank each: the training of two ranks on one host, bit for bit."""
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    (keys / "sshd_config").write_text(
        f"HostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nStrictModes no\nPidFile none\nPermitRootLogin yes\n"
        "UsePAM no\nPort 2222\n"
    )
    (keys / "config").write_text(
        f"Host *\n  Port 2222\n  IdentityFile {keys}/user\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        "  BatchMode yes\n  LogLevel ERROR\n  ConnectionAttempts 20\n"
    )
    (keys / "env").write_text(f"XDG_CACHE_HOME={data.cache_dir().parent}\nHF_HUB_OFFLINE=1\nCUDA_VISIBLE_DEVICES=\n")
    flags = flags_of(tiny, 3, "bf16", "--dropout", "0.1", "--run-dir", str(tmp_path / "run"))
    command = BY_PDSH.format(keys=keys, sshd=SSHD, train=" ".join([check_launch.TRAINING, *flags]))
    done = virtual_cluster.run(["bash", "-c", command], rate="10gbit", launch="command", timeout_s=150)
    assert done.returncode == 0, done.stderr
    (line,) = re.findall(r"^RESULT (\{.*\"weights_sha256\".*)", done.stdout, re.MULTILINE)
    result = json.loads(line)
    assert (result["world_size"], result["ranks_agree"]) == (2, True)
    assert result["weights_sha256"] == alone[0]["weights_sha256"]
