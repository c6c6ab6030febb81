"""The engine's tokens are those of transformers' `generate`, however requests meet in it; and what it refuses."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ch06_vllm.engine import LLM, Config, SamplingParams, engine, model, runner
from ch06_vllm.engine.engine import Engine
from ch06_vllm.engine.kernels import InTorch
from ch06_vllm.engine.model import Model, Shard
from ch06_vllm.engine.paged_attention import Step
from ch06_vllm.engine.request import Logprob, Output, Request
from ch06_vllm.engine.runner import Runner
from ch06_vllm.engine.scheduler import Scheduler, Share
from common import dist, lm
from common.script import UserError
from tests.spawn import run_ranks, values
from tests.tiny_models import CONTEXT, MODELS, OUTPUT, build

GREEDY = SamplingParams(OUTPUT, temperature=0)
CLEAR = 1e-3  # a reference whose two likeliest tokens are nearer than this decides nothing: rounding would


@dataclass(frozen=True)
class Reference:
    """What transformers says: for each prompt the greedy tokens, until `end` or OUTPUT are reached."""

    folder: Path
    prompts: list[list[int]]
    outputs: list[list[int]]
    end: int

    def expected(self, number: int, max_tokens: int) -> tuple[list[int], str]:
        tokens = self.outputs[number][:max_tokens]
        return tokens, "stop" if tokens[-1] == self.end else "length"


def generate(model: Any, prompt: list[int], end: int | None) -> tuple[list[int], float]:
    """The greedy tokens, and by how much the nearest choice among them was clear."""
    done = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=OUTPUT,
        do_sample=False, eos_token_id=end, pad_token_id=0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.cat(done.scores).topk(2).values
    return done.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def make_reference(folder: Path, name: str) -> Reference:
    path = build(folder, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rng = random.Random(name)
    base = rng.choices(range(1, model.config.vocab_size), k=60)
    prompts, outputs = [], []
    while len(prompts) < 16:  # of 1 to 60 tokens, many with a common beginning; some go on where another's answer ended
        prompt = base[: rng.choice([0, 3, 16, 17, 31, 31, 48])] + rng.choices(range(1, 331), k=rng.randint(1, 12))
        if len(prompts) % 5 == 4 and len(prompts[-1]) < 40:
            prompt = prompts[-1] + outputs[-1] + prompt[-2:]
        tokens, clear = generate(model, prompt, None)
        if clear > CLEAR:
            prompts.append(prompt)
            outputs.append(tokens)
    assert len({token for tokens in outputs for token in tokens}) > 60  # no model that says the same to everything
    assert len({tuple(tokens) for tokens in outputs}) == len(outputs)
    # What ends a text: a token that ends some outputs early. transformers and the engine both read it from the folder.
    counts = Counter(token for tokens in outputs for token in set(tokens[2:-2]))
    end = max(counts, key=lambda token: (counts[token], token))
    model.generation_config.eos_token_id = end
    model.generation_config.save_pretrained(path)
    early = next(number for number, tokens in enumerate(outputs) if end in tokens)
    outputs = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in outputs]
    assert generate(model, prompts[early], end)[0] == outputs[early]
    return Reference(path, prompts, outputs, end)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on two
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_reference(folder, name) for name in MODELS}


@pytest.fixture(scope="module")
def loaded_once() -> Iterator[None]:
    """Engines by the hundred: weights and tokenizer are read once for each folder and type."""
    with pytest.MonkeyPatch.context() as patch:
        original = runner.Model

        @functools.cache
        def model(name: str, dtype: str, device: torch.device, max_len: int | None) -> Any:
            made = original(name, dtype, device, Shard(), max_len)
            made.load = functools.cache(made.load)
            return made

        patch.setattr(runner, "Model", lambda name, dtype, device, shard, max_len: model(name, dtype, device, max_len))
        patch.setattr(lm, "load_tokenizer", functools.cache(lm.load_tokenizer))
        yield


# ---------------------------------------------------------------- schedules


@dataclass(frozen=True)
class Arrival:
    pause: int  # steps before it comes
    prompt: int
    max_tokens: int
    priority: int
    cancel_after: int | None  # steps of its own


@dataclass(frozen=True)
class Schedule:
    model: str
    dtype: str
    compiled: bool  # the C loops, where the type has them
    block_size: int
    spare: int  # blocks, beyond what the longest request needs
    max_num_seqs: int
    more_tokens: int  # of the budget, beyond max_num_seqs
    chunked: bool
    caching: bool
    arrivals: list[Arrival]

    def config(self, folder: Path) -> Config:
        budget = self.max_num_seqs + self.more_tokens
        return Config(
            str(folder), dtype=self.dtype, block_size=self.block_size,
            num_blocks=-(-CONTEXT // self.block_size) + self.spare, max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=budget if self.chunked else max(budget, CONTEXT),
            enable_chunked_prefill=self.chunked, enable_prefix_caching=self.caching,
        )  # fmt: skip


SCHEDULES = st.builds(
    Schedule,
    model=st.sampled_from(list(MODELS)),
    dtype=st.sampled_from(["float32", "float32", "float64"]),
    compiled=st.booleans(),
    block_size=st.sampled_from([1, 3, 16]),
    spare=st.sampled_from([0, 0, 5]),
    max_num_seqs=st.sampled_from([1, 3, 6, 6]),
    more_tokens=st.sampled_from([0, 1, 7, 30, 100]),
    chunked=st.booleans(),
    caching=st.booleans(),
    arrivals=st.lists(
        st.builds(
            Arrival,
            pause=st.sampled_from([0, 0, 0, 0, 1, 7]),
            prompt=st.integers(0, 15),
            max_tokens=st.sampled_from([1, 9, OUTPUT, OUTPUT, OUTPUT]),
            priority=st.sampled_from([0, 0, -1, 1]),
            cancel_after=st.sampled_from([None, None, None, None, 0, 3, 9]),
        ),
        min_size=2,
        max_size=12,
    ),
)


class Drive:
    """An engine and the requests of a schedule, checked after every step."""

    def __init__(self, one: Engine, seen: Counter[str]) -> None:
        self.engine, self.seen = one, seen
        self.outputs: dict[str, Output] = {}
        self.left: dict[str, int] = {}  # steps until it is cancelled
        self.cancelled: set[str] = set()

    def add(self, prompt: list[int], params: SamplingParams, priority: int = 0, cancel: int | None = None) -> str:
        request_id = self.engine.add(prompt, params, priority=priority)
        self.outputs[request_id] = Output(request_id)
        if cancel is not None:
            self.left[request_id] = cancel
        return request_id

    def step(self) -> None:
        for request_id in [r for r, left in self.left.items() if left == 0]:
            if self.engine.cancel(request_id):
                self.cancelled.add(request_id)
                self.engine.scheduler.check()
            assert not self.engine.cancel(request_id)
            del self.left[request_id]
        self.left = {request_id: left - 1 for request_id, left in self.left.items()}
        preempted = self.engine.scheduler.num_preemptions
        for output in self.engine.step():
            assert output.request_id not in self.cancelled
            self.outputs[output.request_id].add(output)
        self.engine.scheduler.check()
        self.seen["preemptions"] += self.engine.scheduler.num_preemptions - preempted
        self.seen["steps"] += 1

    def finish(self) -> None:
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, "some request never ends"
        assert self.engine.pool.num_free == self.engine.pool.num_blocks
        assert not self.engine.scheduler.running
        assert not self.engine.scheduler.waiting
        self.engine.pool.check([])
        self.seen["hits"] += self.engine.scheduler.prefix_hits


def test_every_schedule_gives_the_tokens_of_generate(
    references: dict[str, Reference], loaded_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    in_c = model.kernels
    counted = Scheduler.computed

    def computed(scheduler: Scheduler, share: Share) -> None:
        seen["chunks"] += not share.samples
        seen["after preemption"] += share.request.num_preemptions > 0 and share.samples
        counted(scheduler, share)

    monkeypatch.setattr(Scheduler, "computed", computed)

    @settings(max_examples=300, deadline=None)
    @given(SCHEDULES)
    def run(schedule: Schedule) -> None:
        monkeypatch.setattr(model, "kernels", in_c if schedule.compiled else lambda *_: InTorch())
        reference = references[schedule.model]
        drive = Drive(Engine(schedule.config(reference.folder), torch.device("cpu")), seen)
        wanted = {}
        for arrival in schedule.arrivals:
            for _ in range(arrival.pause):
                drive.step()
            params = replace(GREEDY, max_tokens=arrival.max_tokens)
            request_id = drive.add(
                reference.prompts[arrival.prompt], params, arrival.priority, cancel=arrival.cancel_after
            )
            wanted[request_id] = reference.expected(arrival.prompt, arrival.max_tokens)
        drive.finish()
        for request_id, (tokens, reason) in wanted.items():
            output = drive.outputs[request_id]
            if request_id in drive.cancelled:
                assert output.token_ids == tokens[: len(output.token_ids)]
                assert output.finish_reason is None
                seen["cancelled"] += 1
            else:
                assert (output.token_ids, output.finish_reason) == (tokens, reason)
                seen[reason] += 1
        seen["schedules"] += 1

    run()
    # The schedules were what they claim to be.
    assert seen["schedules"] >= 300
    assert min(seen["stop"], seen["length"], seen["cancelled"]) > 50, seen
    assert min(seen["preemptions"], seen["after preemption"], seen["chunks"], seen["hits"]) > 20, seen


@pytest.mark.parametrize("right", [True, False])
def test_a_wrong_cache_would_be_seen(
    right: bool, references: dict[str, Reference], loaded_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: with blocks that are found under the hash of other tokens, it does."""
    if not right:
        monkeypatch.setattr("ch06_vllm.engine.scheduler.block_hash", lambda parent, tokens: parent + b"!")
    reference = references["llama"]
    config = Config(str(reference.folder), block_size=3, num_blocks=64, max_num_seqs=1)
    drive = Drive(Engine(config, torch.device("cpu")), Counter())
    ids = [drive.add(prompt, GREEDY) for prompt in reference.prompts]
    drive.finish()
    assert ([drive.outputs[i].token_ids for i in ids] == reference.outputs) == right


def test_a_prompt_that_was_seen_is_found_in_the_cache(references: dict[str, Reference], loaded_once: None) -> None:
    reference = references["qwen3"]
    number = max(range(16), key=lambda n: len(reference.prompts[n]))
    prompt = reference.prompts[number]
    llm = LLM(str(reference.folder), block_size=3, num_blocks=64, device="cpu")
    first, again = (llm.generate([prompt], GREEDY)[0] for _ in range(2))
    assert first.token_ids == again.token_ids == reference.outputs[number]
    assert (first.cached_tokens, again.cached_tokens) == (0, (len(prompt) - 1) // 3 * 3)
    assert first.prompt_tokens == again.prompt_tokens == len(prompt)


# ---------------------------------------------------------------- log-probabilities and bf16


def transformers_logits(folder: Path, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Of every position, [tokens, vocabulary], float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_transformers(name: str, references: dict[str, Reference], loaded_once: None) -> None:
    reference = references[name]
    llm = LLM(str(reference.folder), block_size=3, num_blocks=100, device="cpu", max_num_seqs=4)
    outputs = llm.generate(reference.prompts[:4], replace(GREEDY, logprobs=5))
    for prompt, output in zip(reference.prompts, outputs, strict=False):
        logits = transformers_logits(reference.folder, prompt + output.token_ids, torch.float32)
        wanted = logits[len(prompt) - 1 : -1].log_softmax(-1)
        assert [one.token_id for one in output.logprobs] == output.token_ids
        for row, one in zip(wanted, output.logprobs, strict=True):
            best = row.topk(5)
            assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-3)
            assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)
            assert [value for _, value in one.top] == pytest.approx([float(row[t]) for t, _ in one.top], abs=1e-3)


def forced_logits(folder: Path, dtype: str, sequences: list[list[int]], start: int) -> list[torch.Tensor]:
    """The engine's logits from position `start` - 1 on, while it is made to say the sequences' own tokens."""
    one = Engine(Config(str(folder), dtype=dtype, block_size=3, num_blocks=200), torch.device("cpu"))
    rows: dict[str, list[torch.Tensor]] = {}
    sequence_of = {}

    def force(logits: torch.Tensor, requests: list[Request]) -> tuple[list[int], list[Logprob | None]]:
        for row, request in zip(logits, requests, strict=True):
            rows.setdefault(request.request_id, []).append(row.float())
        said = [sequence_of[request.request_id][len(request.tokens)] for request in requests]
        return said, [None] * len(requests)

    for sequence in sequences:
        params = SamplingParams(len(sequence) - start, temperature=0, ignore_eos=True)
        sequence_of[one.add(sequence[:start], params)] = sequence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "sample", force)
        while one.has_work:
            one.step()
    return [torch.stack(rows[request_id]) for request_id in sequence_of]


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[Step], None]) -> None:
    """Something wrong in every step that generates; the prompts are computed as they should be."""
    original = Runner._step

    def wrong(self: Runner, shares: list[Share]) -> Step:
        step = original(self, shares)
        if not step.chunks:
            change(step)
        return step

    monkeypatch.setattr(Runner, "_step", wrong)


def wrong_position(step: Step) -> None:
    step.positions += 1


def no_rotation(step: Step) -> None:
    step.positions *= 0


def does_not_see_the_newest(step: Step) -> None:
    step.lengths -= 1


def does_not_see_the_first(step: Step) -> None:
    step.tables[:, 0] = step.tables[:, 1]


FAULTS = (wrong_position, no_rotation, does_not_see_the_newest, does_not_see_the_first)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_as_near_to_the_truth_as_transformers_is(
    name: str, references: dict[str, Reference], loaded_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bits round differently in another order of additions: equal errors are what can be asked for."""
    reference, start = references[name], 20
    rng = random.Random(0)
    sequences = [rng.choices(range(1, 331), k=start + 12 + 5 * n) for n in range(4)]

    def error(of: list[torch.Tensor]) -> float:
        pairs = zip(of, truth, strict=True)
        return float(sum((a - b).norm() ** 2 for a, b in pairs) / sum(b.norm() ** 2 for b in truth)) ** 0.5

    truth = [transformers_logits(reference.folder, s, torch.float64)[start - 1 : -1] for s in sequences]
    theirs = error([transformers_logits(reference.folder, s, torch.bfloat16)[start - 1 : -1] for s in sequences])
    ours = error(forced_logits(reference.folder, "bfloat16", sequences, start))
    assert 0 < ours < 1.5 * theirs < 0.2
    assert error(forced_logits(reference.folder, "float32", sequences, start)) < 1e-5
    for fault in FAULTS:
        with monkeypatch.context() as patch:
            plant(patch, fault)
            assert error(forced_logits(reference.folder, "bfloat16", sequences, start)) > 3 * theirs, fault.__name__


# ---------------------------------------------------------------- sampling, end to end


def test_a_seeded_request_gives_the_same_tokens_alone_and_in_any_batch(
    references: dict[str, Reference], loaded_once: None
) -> None:
    """Also beside others that sample in other ways, and across preemption."""
    reference = references["llama3"]
    ways = [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.9}, {"temperature": 0.5}, {"temperature": 0}]
    asked = [
        (prompt, SamplingParams(**({"max_tokens": OUTPUT, "seed": n, "temperature": 1.3} | ways[n % len(ways)])))  # type: ignore[arg-type]
        for n, prompt in enumerate(reference.prompts)
    ]
    settings = {"dtype": "float64", "block_size": 3, "device": "cpu"}
    alone = LLM(str(reference.folder), num_blocks=200, **settings)
    wanted = [alone.generate([prompt], params)[0] for prompt, params in asked]
    assert len({tuple(output.token_ids) for output in wanted}) == len(asked)
    seen: Counter[str] = Counter()
    for seed in range(6):
        order = random.Random(seed).sample(range(len(asked)), len(asked))
        config = Config(str(reference.folder), num_blocks=36, max_num_batched_tokens=9, max_num_seqs=8, **settings)
        drive = Drive(Engine(config, torch.device("cpu")), seen)
        ids = {number: drive.add(*asked[number]) for number in order}
        drive.finish()
        for number, request_id in ids.items():
            assert drive.outputs[request_id].token_ids == wanted[number].token_ids
    assert seen["preemptions"] > 10


def test_without_a_seed_the_engines_own_decides(references: dict[str, Reference], loaded_once: None) -> None:
    reference = references["llama"]
    asked = [reference.prompts[0]] * 3, SamplingParams(12, temperature=2.0, ignore_eos=True)
    said = [
        [
            output.token_ids
            for output in LLM(str(reference.folder), seed=seed, device="cpu", num_blocks=64).generate(*asked)
        ]
        for seed in (1, 1, 2)
    ]
    assert said[0] == said[1] != said[2]
    assert len({tuple(tokens) for tokens in said[0]}) == 3


def test_what_ends_an_output(references: dict[str, Reference], loaded_once: None) -> None:
    reference = references["llama"]
    llm = LLM(str(reference.folder), device="cpu", num_blocks=64)
    early = next(n for n, tokens in enumerate(reference.outputs) if 3 < len(tokens) < OUTPUT)
    prompt, tokens = reference.prompts[early], reference.outputs[early]
    ended, cut, on = (
        llm.generate([prompt], params)[0]
        for params in (GREEDY, replace(GREEDY, max_tokens=3), replace(GREEDY, ignore_eos=True))
    )
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == (tokens, "stop", None)
    assert (cut.token_ids, cut.finish_reason, cut.stop_reason) == (tokens[:3], "length", None)
    assert (on.token_ids[: len(tokens)], len(on.token_ids), on.finish_reason) == (tokens, OUTPUT, "length")


def test_a_stop_text_ends_the_output_wherever_it_lies(references: dict[str, Reference], loaded_once: None) -> None:
    reference = references["qwen2"]
    llm = LLM(str(reference.folder), device="cpu", num_blocks=64)
    across = 0
    for prompt in reference.prompts:
        free = llm.generate([prompt], replace(GREEDY, ignore_eos=True))[0]
        starts = [at for at in range(len(free.text) - 3) if "\ufffd" not in free.text[at : at + 3]]
        for at in starts[:: max(1, len(starts) // 3)]:
            stop = free.text[at : at + 3]
            output = llm.generate([prompt], replace(GREEDY, ignore_eos=True, stop=("no such text", stop)))[0]
            assert output.text == free.text[: free.text.index(stop)]
            assert (output.finish_reason, output.stop_reason) == ("stop", stop)
            assert output.token_ids == free.token_ids[: len(output.token_ids)]
            across += output.text == free.text[:at]
    assert across > 10


def test_a_text_is_one_prompt_and_one_stop(references: dict[str, Reference], loaded_once: None) -> None:
    llm = LLM(str(references["llama"].folder), device="cpu", num_blocks=64)
    asked = [replace(GREEDY, max_tokens=2), replace(GREEDY, max_tokens=3, stop="ab")]
    assert asked[1].stop == ("ab",)
    (alone,) = llm.generate("def f():", asked[0])
    both = llm.generate(["def f():", "def f():"], asked)
    assert llm.engine
    assert alone.prompt_tokens == both[0].prompt_tokens == len(llm.engine.tokenizer.encode("def f():"))
    assert both[1].token_ids[:2] == both[0].token_ids == alone.token_ids
    assert len(both[1].token_ids) == 3
    with pytest.raises(ValueError, match="shorter"):
        llm.generate(["def f():", "def f():"], asked[:1])
    assert not llm.engine.has_work


# ---------------------------------------------------------------- tensor parallel


def tensor_parallel(jobs: list[Reference], how: str = "ends") -> list[dict[str, Any]]:
    """One rank, for one model after the other: an engine on rank 0, on the others a runner that follows it."""
    done = []
    with dist.session("cpu", timeout_s=60) as ctx:
        shard = Shard(ctx.rank, ctx.world_size)
        for job in jobs:
            config = Config(
                str(job.folder), dtype="float64", block_size=3, num_blocks=32, max_num_seqs=5, max_num_batched_tokens=17
            )
            seen: Counter[str] = Counter()
            if ctx.rank:
                runner = Runner(config, ctx.device, shard)
                runner.follow()
                tokens = []
            else:
                drive = Drive(Engine(config, ctx.device, shard), seen)
                runner = drive.engine.runner
                runner.keep_alive()
                ids = [drive.add(prompt, GREEDY) for prompt in job.prompts]
                drive.step()
                if how == "fails":
                    raise UserError("planted")
                if how == "is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                drive.finish()
                runner.stop()
                tokens = [drive.outputs[i].token_ids for i in ids]
            done.append({"cache": tuple(runner.model.caches[0].keys.shape), "tokens": tokens, "seen": seen})
    return done


def test_two_ranks_give_the_tokens_of_one(references: dict[str, Reference]) -> None:
    first, second = values(run_ranks(tensor_parallel, 2, list(references.values()), timeout_s=150))
    for (name, reference), leads, follows in zip(references.items(), first, second, strict=True):
        assert leads["tokens"] == reference.outputs, name
        assert leads["cache"] == follows["cache"] == (32, 3, 1, 32 if name == "qwen3" else 16)  # one of two key heads
        assert min(leads["seen"]["preemptions"], leads["seen"]["hits"]) > 0


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_who_follows_ends_when_rank_0(how: str, references: dict[str, Reference]) -> None:
    first, second = run_ranks(tensor_parallel, 2, [references["llama"]], how)
    assert first.returncode
    assert second.returncode
    assert not second.timed_out
    assert "lost another rank" in second.stderr


# ---------------------------------------------------------------- checkpoints and what is refused


def copied(folder: Path, to: Path, change: dict[str, Any] | None = None) -> Path:
    """A model folder of the same files, with other values in config.json."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | (change or {})))
    return to


def test_a_checkpoint_of_several_files(references: dict[str, Reference], tmp_path: Path) -> None:
    reference = references["qwen3"]
    model = transformers.AutoModelForCausalLM.from_pretrained(reference.folder)
    folder = copied(reference.folder, tmp_path / "several")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    model.generation_config.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    outputs = LLM(str(folder), device="cpu", num_blocks=64).generate(reference.prompts, GREEDY)
    assert [output.token_ids for output in outputs] == reference.outputs


@pytest.mark.parametrize(
    ("name", "change", "settings", "words"),
    [
        ("llama", {"model_type": "gemma"}, {}, "is a gemma; this engine knows llama, qwen3"),
        ("llama", {"hidden_act": "gelu"}, {}, "has no SiLU"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, {}, "is quantised"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, {}, "by dynamic"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, {}, "attends to 8 tokens back"),
        ("llama", {"intermediate_size": 95}, {}, r"is \[96, 64\], the model's \[95, 64\]"),
        ("llama", {}, {"max_model_len": CONTEXT + 1}, f"made for {CONTEXT} tokens"),
        ("llama", {}, {"num_blocks": 4}, "4 blocks of 16 tokens do not hold one request of 80; .*max_model_len"),
        ("llama", {}, {"kv_cache_gib": 1e-6}, "do not hold one request"),
        ("llama", {}, {"num_blocks": 10**12}, "does not fit into memory"),
        (
            "llama",
            {},
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 79, "max_num_seqs": 2},
            "without chu",
        ),
        ("llama", {}, {"max_num_batched_tokens": 5, "max_num_seqs": 6}, "is below max_num_seqs 6"),
        ("llama", {}, {"dtype": "int8"}, "dtype is 'int8'"),
        ("llama", {}, {"block_size": 0}, "block_size is 0"),
    ],
)
def test_refused(
    name: str, change: dict, settings: dict, words: str, references: dict[str, Reference], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = copied(references[name].folder, tmp_path / "model", change)
    if settings:  # are refused before any weights are read
        monkeypatch.setattr(Model, "load", lambda _: pytest.fail("the weights were read"))
    with pytest.raises(UserError, match=words):
        LLM(str(folder), device="cpu", **settings)


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
        ("llama3", "lm_head.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(
    name: str, lacking: str, references: dict[str, Reference], tmp_path: Path
) -> None:
    folder = copied(references[name].folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lacking]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"has no tensor {re.escape(lacking)}"):
        LLM(str(folder), device="cpu")


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.o_proj.bias", "model.layers.2.input_layernorm.weight"])
def test_a_tensor_too_many_is_named(extra: str, references: dict[str, Reference], tmp_path: Path) -> None:
    folder = copied(references["llama"].folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {extra: torch.zeros(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"has {re.escape(extra)}, which the model has not"):
        LLM(str(folder), device="cpu")


def test_heads_that_ranks_cannot_share(references: dict[str, Reference]) -> None:
    with pytest.raises(UserError, match="num_attention_heads 4 cannot be shared out among 3 ranks"):
        Model(str(references["llama"].folder), "auto", torch.device("cpu"), Shard(0, 3))


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], GREEDY, "the prompt is empty"),
        ([1] * 70, GREEDY, "70 tokens and max_tokens is 16, together more than the model's context of 80"),
        ([1, 331], GREEDY, "outside 0 to 330"),
        ([-1], GREEDY, "outside 0 to 330"),
    ],
)
def test_a_prompt_is_refused_and_leaves_nothing_behind(
    prompt: list[int], params: SamplingParams, words: str, references: dict[str, Reference], loaded_once: None
) -> None:
    reference = references["llama"]
    llm = LLM(str(reference.folder), device="cpu", num_blocks=64)
    with pytest.raises(ValueError, match=words):
        llm.generate([reference.prompts[0], prompt], params)
    assert llm.engine
    assert not llm.engine.has_work
    llm.engine.scheduler.check()
    assert llm.generate([reference.prompts[0]], GREEDY)[0].token_ids == reference.outputs[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.1}, {"stop": ("a", "")}, {"logprobs": 21}, {"logprobs": -1},
    ],
)  # fmt: skip
def test_params_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("stop", "stop text")):
        SamplingParams(**wrong)


def test_a_request_id_is_taken_once(references: dict[str, Reference], loaded_once: None) -> None:
    one = Engine(Config(str(references["llama"].folder), num_blocks=64), torch.device("cpu"))
    assert one.add([1], GREEDY, request_id="a") == "a"
    with pytest.raises(ValueError, match="there is a request 'a' already"):
        one.add([1], GREEDY, request_id="a")
    assert one.cancel("a")
    assert not one.cancel("a")
    assert one.add([1], GREEDY, request_id="a") == "a"


def test_the_whole_head_is_used() -> None:
    """Each rank's part of an odd vocabulary: nothing is left out or counted twice."""
    for world in (1, 2, 3, 7):
        rows = torch.cat([torch.arange(331)[Shard(rank, world).of(331)] for rank in range(world)])
        assert torch.equal(rows, torch.arange(331))
        assert F.one_hot(rows).sum() == 331
