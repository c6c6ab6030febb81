"""Chapter 1: exact resumes, gradients of two ranks, bad input, collectives, the bigram yardstick."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ch01_intro import bigram, checkpoint, training
from common import data, lm, process
from common.logs import Metrics
from common.script import UserError
from tests.inprocess import run_script
from tests.spawn import fork_script

TRAIN = "ch01_intro/train_baseline.py"
TINY = ["--steps", "9", "--batch-size", "1", "--seq-len", "16", "--val-tokens", "16", "--sample-tokens", "0"]


# --- exact resume ---------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_on_call(module: str, name: str, call: int, after: bool = False) -> None:
    """Patch module.name so that its `call`-th call ends the process: before it does anything, or right after."""
    owner = __import__(module, fromlist=["_"])
    *classes, attribute = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original, count = getattr(owner, attribute), 0

    def patched(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == call and not after:
            die()
        result = original(*args, **kwargs)
        if count == call:
            die()
        return result

    setattr(owner, attribute, patched)


def die_in_the_second_state() -> None:
    """End the process between two of the many writes of the second checkpoint's state.pt."""
    original, seen = checkpoint._Hashing.write, []

    def patched(self: checkpoint._Hashing, piece: object) -> int:
        if self not in seen:
            seen.append(self)
        if self is not seen[0] and self.file.tell() > 1_000_000:
            die()
        return original(self, piece)

    checkpoint._Hashing.write = patched


CHECKPOINT = "ch01_intro.checkpoint"
KILL_POINTS = {
    # during step 3, before any checkpoint
    "before the first checkpoint": partial(die_on_call, "ch01_intro.training", "learning_rate", 3),
    # during step 5, between two
    "between checkpoints": partial(die_on_call, "ch01_intro.training", "learning_rate", 5),
    "while the state is written": die_in_the_second_state,
    "after the state, before its meta": partial(die_on_call, CHECKPOINT, "_sync", 3, after=True),
    "before the rename": partial(die_on_call, CHECKPOINT, "os.rename", 2),
    "after the rename": partial(die_on_call, CHECKPOINT, "os.rename", 2, after=True),
    "after the last step": partial(die_on_call, "common.lm", "save", 1),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    out = tmp_path_factory.mktemp("alone") / "out"
    done = run_script(TRAIN, [*TINY, "--out", out, "--save-every", "3", "--run-dir", out / "run"])
    assert done.result is not None, done.stderr
    return done.result, Metrics.read(out / "losses.jsonl")


@pytest.mark.parametrize("point", KILL_POINTS)
def test_resume_after_sigkill_is_exact(point: str, uninterrupted: tuple[dict, list[dict]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [*TINY, "--out", out, "--save-every", "3", "--resume", "auto", "--run-dir", out / "run"]
    killed = run_script(TRAIN, flags, before=KILL_POINTS[point])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for path in checkpoint.every(out / "checkpoints") if out.exists() else []:  # whatever is there is whole
        checkpoint.load(path, {})
    resumed = run_script(TRAIN, flags)
    assert resumed.result is not None, resumed.stderr
    alone, losses = uninterrupted
    assert resumed.result["weights_sha256"] == alone["weights_sha256"]
    assert Metrics.read(out / "losses.jsonl") == losses
    assert resumed.result["val_loss"] == alone["val_loss"]
    expected = {"before the first checkpoint": 0, "after the rename": 6, "after the last step": 9}.get(point, 3)
    assert resumed.result["resumed_at_step"] == expected
    assert not list((out / "checkpoints").glob(".*partial"))


def test_a_spoilt_checkpoint_is_refused(uninterrupted: tuple[dict, list[dict]], tmp_path: Path) -> None:
    state = {"weight": torch.arange(1000.0)}
    path = checkpoint.save(tmp_path, 4, state, {"lr": 0.1})
    step, loaded = checkpoint.load(path, {"lr": 0.1})
    assert step == 4
    assert torch.equal(loaded["weight"], state["weight"])
    with pytest.raises(UserError, match=r"was made with lr 0\.1, this run has 0\.2"):
        checkpoint.load(path, {"lr": 0.2})
    raw = bytearray((path / "state.pt").read_bytes())
    raw[len(raw) // 2] ^= 1  # one bit
    (path / "state.pt").write_bytes(raw)
    with pytest.raises(UserError, match="corrupt"):
        checkpoint.load(path, {})


def test_old_checkpoints_are_pruned_and_the_newest_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, {}, {})
    assert [p.name for p in checkpoint.every(tmp_path)] == ["step-00000020", "step-00000030"]


def test_resume_from_an_older_checkpoint_rewrites_the_later_ones(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [*TINY, "--out", out, "--save-every", "3", "--run-dir", out / "run"]
    first = run_script(TRAIN, flags)
    assert first.result is not None, first.stderr
    again = run_script(TRAIN, [*flags, "--resume", out / "checkpoints" / "step-00000006"])
    assert again.result is not None, again.stderr
    assert again.result["resumed_at_step"] == 6
    assert again.result["weights_sha256"] == first.result["weights_sha256"]


def test_a_finished_run_taken_up_in_a_new_folder_takes_its_losses_along(tmp_path: Path) -> None:
    first = run_script(TRAIN, [*TINY, "--out", tmp_path / "a", "--run-dir", tmp_path / "run"])
    assert first.result is not None, first.stderr
    source = tmp_path / "a" / "checkpoints" / "step-00000009"
    again = run_script(TRAIN, [*TINY, "--out", tmp_path / "b", "--resume", source, "--run-dir", tmp_path / "run"])
    assert again.result is not None, again.stderr
    assert again.result["weights_sha256"] == first.result["weights_sha256"]
    assert Metrics.read(tmp_path / "b" / "losses.jsonl") == Metrics.read(tmp_path / "a" / "losses.jsonl")


# --- two ranks ------------------------------------------------------------------------------------------------------

PARITY = """
import json, sys
import torch
from ch01_intro.train_baseline import average_gradients
from common import data, dist, lm
from common.script import seed_everything

with dist.session("cpu", threads=1) as ctx:
    config = lm.config("nano")
    config.num_hidden_layers, config.vocab_size = 2, 128
    model = lm.build(config, seed=3).double()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    tokens = torch.randint(128, (401,), generator=torch.Generator().manual_seed(5)).numpy()
    blocks = data.Blocks(tokens, 10)

    def gradients(batches):
        model.zero_grad()
        inputs, targets = next(batches)
        loss = torch.nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()

    gradients(data.ShardedBatches(blocks, 4, rank=ctx.rank, world_size=ctx.world_size))
    local = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    average_gradients(model, ctx.world_size)
    averaged = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(averaged.values())).item()
    gradients(data.ShardedBatches(blocks, 4 * ctx.world_size))  # the same blocks, in one process
    reference = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    reference_norm = torch.nn.utils.get_total_norm(list(reference.values())).item()
    worst = max((averaged[n] - reference[n]).abs().max().item() / reference[n].abs().max().item() for n in reference)
    apart = max((local[n] - reference[n]).abs().max().item() / reference[n].abs().max().item() for n in reference)
    if ctx.is_main:
        figures = {"worst": worst, "apart": apart, "norm": norm, "reference_norm": reference_norm}
        figures |= {"same_names": sorted(averaged) == sorted(reference), "frozen": frozen.grad is None}
        print("RESULT " + json.dumps(figures))
"""


def test_averaged_gradients_equal_those_of_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    """float64, tied embeddings, one frozen weight; and the ranks' own gradients differ before they are averaged."""
    script = tmp_path / "parity.py"
    script.write_text(PARITY)
    done = process.run(["torchrun", "--standalone", "--nproc-per-node=2", str(script)], timeout_s=120)
    assert done.result is not None, done.stderr
    assert done.result["worst"] < 1e-12
    assert done.result["apart"] > 0.01
    assert math.isclose(done.result["norm"], done.result["reference_norm"], rel_tol=1e-12)
    assert done.result["same_names"]
    assert done.result["frozen"]


def test_two_ranks_train_alike_and_resume_exactly(tmp_path: Path) -> None:
    flags = [*TINY, "--save-every", "6", "--run-dir", str(tmp_path / "run")]
    whole = fork_script(TRAIN, 2, [*flags, "--out", tmp_path / "a"], timeout_s=120)[0]
    assert whole.value is not None, whole.stderr
    assert whole.value["ranks_agree"]
    assert whole.value["world_size"] == 2
    # go back to step 6, as a run that was killed on the way to step 9 would find it
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000009")
    resumed = fork_script(TRAIN, 2, [*flags, "--out", tmp_path / "a", "--resume", "auto"], timeout_s=120)[0]
    assert resumed.value is not None, resumed.stderr
    assert resumed.value["resumed_at_step"] == 6
    assert resumed.value["weights_sha256"] == whole.value["weights_sha256"]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("a few words\n")
    (folder / "binary.txt").write_bytes(b"\x7fELF\0\0\0")
    (folder / "no-text").mkdir()
    (folder / "no-text" / "image.png").write_bytes(b"\x89PNG")
    (folder / "table").mkdir()
    (folder / "table" / "rows.jsonl").write_text('{"question": "why"}\n')
    (folder / "not-json").mkdir()
    (folder / "not-json" / "rows.jsonl").write_text('{"text": "cut off')
    (folder / "broken-model").mkdir()
    (folder / "broken-model" / "config.json").write_text("{")
    saved = folder / "truncated-model"
    tokenizer = data.prepare("stdlib", 2048).tokenizer()
    lm.save(lm.build(lm.config("nano")), tokenizer, saved)
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:5000])
    (folder / "weights-only").mkdir()
    (folder / "weights-only" / "config.json").write_text((saved / "config.json").read_text())
    used = folder / "used"
    checkpoint.save(used / "checkpoints", 5, {}, {"preset": "small"})
    spoilt = folder / "spoilt"
    path = checkpoint.save(spoilt / "checkpoints", 5, {"a": torch.zeros(9)}, {})
    (path / "state.pt").write_bytes(b"junk")
    (folder / "file").write_text("in the way")
    return folder


GENERATE, COLLECTIVES, SCALING = "ch01_intro/generate.py", "ch01_intro/collectives.py", "ch01_intro/scaling.py"
RESUME = "ch01_intro/resume_after_kill.py"
BAD_INPUT = [  # script, flags ({bad} is the folder above), a word of the error line, environment
    (TRAIN, "--steps 0", "below 1", {}),
    (TRAIN, "--steps ten", "not a whole number", {}),
    (TRAIN, "--lr -1", "above 0", {}),
    (TRAIN, "--lr nan", "finite", {}),
    (TRAIN, "--no-such-flag", "unrecognized", {}),
    (TRAIN, "--preset giant", "no model 'giant'", {}),
    (TRAIN, "--preset {bad}/broken-model", "cannot read the model config", {}),
    (TRAIN, "--preset 8b --device cpu --data stdlib --run-dir {bad}/run", "GiB", {}),
    (TRAIN, "--seq-len 4096000", "too few", {}),
    (TRAIN, "--data {bad}/nowhere.txt", "no file or folder", {}),
    (TRAIN, "--data {bad}/empty.txt", "empty", {}),
    (TRAIN, "--data {bad}/short.txt", "too few", {}),
    (TRAIN, "--data {bad}/binary.txt", "not text", {}),
    (TRAIN, "--data {bad}/no-text", "no text", {}),
    (TRAIN, "--data {bad}/table", "columns", {}),
    (TRAIN, "--data {bad}/not-json", "cannot load", {}),
    (TRAIN, "--resume auto", "--out", {}),
    (TRAIN, "--save-every 3", "--out", {}),
    (TRAIN, "--out {bad}/used", "already holds checkpoints", {}),
    (TRAIN, "--out {bad}/used --resume auto", "made with", {}),
    (TRAIN, "--out {bad}/new --resume {bad}/nothing", "no checkpoint", {}),
    (TRAIN, "--out {bad}/file/out", "cannot write", {}),
    (TRAIN, "--run-dir {bad}/file/run", "cannot write", {}),
    (TRAIN, "--device cuda", "no CUDA device", {"CUDA_VISIBLE_DEVICES": ""}),
    (TRAIN, "", "not a number", {"RANK": "x", "WORLD_SIZE": "2"}),
    (TRAIN, "", "does not exist in a world", {"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}),
    (TRAIN, "", "cannot write the cache", {"XDG_CACHE_HOME": "/dev/null/cache"}),
    (GENERATE, "", "--model", {}),
    (GENERATE, "--model {bad}/nowhere", "no model", {}),
    (GENERATE, "--model {bad}/weights-only", "tokenizer", {}),
    (GENERATE, "--model {bad}/truncated-model", "cannot load", {}),
    (COLLECTIVES, "--sizes-kib 1,zero", "whole number", {}),
    (COLLECTIVES, "--join-timeout-s 2", "missing: rank 1", {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29731"}),
    (SCALING, "--max-ranks 1000 --device cpu", "cores", {}),
    (RESUME, "--steps 5 --kills 4", "no room", {}),
]


@pytest.mark.parametrize(("script", "flags", "says", "env"), BAD_INPUT, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_one_line_and_exit_2(
    script: str, flags: str, says: str, env: dict, bad: Path, tmp_path: Path
) -> None:
    argv = flags.format(bad=bad).split()
    if "--run-dir" not in argv:
        argv += ["--run-dir", str(tmp_path / "run")]
    done = run_script(script, argv, env=env, timeout_s=60)
    assert not done.timed_out
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if " rank0 I " not in line]  # log lines may come before it
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error")
    assert says in errors[0]
    assert ";" in errors[0] or "see --help" in errors[0]  # what; what to do
    assert "RESULT" not in done.stdout


def test_a_spoilt_checkpoint_on_resume_is_one_line(bad: Path, tmp_path: Path) -> None:
    done = run_script(TRAIN, [*TINY, "--out", bad / "spoilt", "--resume", "auto", "--run-dir", tmp_path])
    assert done.returncode == 2
    assert "is corrupt" in done.stderr.splitlines()[-1]


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    flags = [*TINY, "--lr", "1e30", "--warmup", "0", "--dtype", "fp32", "--run-dir", tmp_path]
    done = run_script(TRAIN, flags)
    assert done.returncode == 2
    assert "lower --lr" in done.stderr.splitlines()[-1]


# --- the rest -------------------------------------------------------------------------------------------------------


def test_bigram_loss_on_a_known_chain() -> None:
    """On a Markov chain the fitted model reaches the known entropy; on independent tokens it gains nothing."""
    rng = np.random.default_rng(0)
    chain = [0]
    for _ in range(200_000):
        chain.append((chain[-1] + 1) % 8 if rng.random() < 0.9 else int(rng.integers(8)))
    tokens = np.array(chain, dtype=np.uint16)
    p = 0.9 + 0.1 / 8
    entropy = -(p * math.log(p) + 7 * (0.1 / 8) * math.log(0.1 / 8))
    assert bigram.validation_loss(tokens[:150_000], tokens[150_000:], 8) == pytest.approx(entropy, rel=0.02)
    noise = rng.integers(8, size=50_000).astype(np.uint16)
    assert bigram.validation_loss(noise, noise[::-1], 8) == pytest.approx(math.log(8), rel=0.01)


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [training.learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_collective_gives_the_right_values(ranks: int, tmp_path: Path) -> None:
    flags = ["--sizes-kib", "1,5", "--repeats", "1", "--run-dir", tmp_path]
    done = fork_script(COLLECTIVES, ranks, flags, timeout_s=120)[0]
    assert done.value is not None, done.stderr
    assert done.value["world_size"] == ranks
    assert done.value["verified"] == 18
    assert done.value["wrong"] == 0
    assert (tmp_path / "latency.png").stat().st_size > 5000


def test_faults_are_diagnosed(tmp_path: Path) -> None:
    done = run_script(COLLECTIVES, ["--diagnose", "--run-dir", tmp_path])
    assert done.result is not None, done.stderr
    assert "rank 0 has [1024] float32, rank 1 has [1025] float32" in done.result["mismatched_shape_says"]
    assert "missing: rank 1" in done.result["missing_rank_says"]
    assert "no-such-host.invalid" in done.result["wrong_address_says"]
    assert [done.result[f"{fault}_exit"] for fault in ("mismatched_shape", "missing_rank", "wrong_address")] == [
        2,
        2,
        2,
    ]


def test_the_trained_folder_is_a_hugging_face_model(tmp_path: Path) -> None:
    """Saved by the baseline, loaded by transformers alone: same logits, same tokens, and it can be trained further."""
    import transformers

    trained = run_script(TRAIN, [*TINY, "--out", tmp_path / "out", "--run-dir", tmp_path / "run"])
    assert trained.result is not None, trained.stderr
    folder = tmp_path / "out" / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert lm.weights_sha256(model) == trained.result["weights_sha256"]
    text = "def f(x):\n    return x + 1\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    greedy = ["--greedy", "--max-new-tokens", "6", "--prompt", "import "]
    done = run_script(GENERATE, ["--model", folder, *greedy, "--run-dir", tmp_path / "g"])
    assert done.result is not None, done.stderr
    ids = tokenizer("import ", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    assert done.result["text"] == tokenizer.decode(out[0])
    further = run_script(TRAIN, [*TINY, "--preset", folder, "--run-dir", tmp_path / "f"])
    assert further.result is not None, further.stderr
    assert further.result["loss_first"] < trained.result["loss_first"]


def test_run_folder_holds_what_is_needed_to_repeat_the_run(tmp_path: Path) -> None:
    done = run_script(TRAIN, [*TINY, "--run-dir", tmp_path])
    assert json.loads((tmp_path / "result.json").read_text()) == done.result
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__
    assert env["command"][2:] == [*TINY, "--run-dir", str(tmp_path)]
    assert (tmp_path / "loss.png").exists()
