"""The engine's sampler against exact probabilities, and its text against the decoder, without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ch06_vllm.engine import LLM
from ch06_vllm.engine.detokenizer import Detokenizer
from ch06_vllm.engine.protocol import CompletionBody
from ch06_vllm.engine.request import Request, SamplingParams
from ch06_vllm.engine.sampler import sample
from tests.tiny_models import build, tokenizer

GRID = 1000


def asking(params: SamplingParams, u: float = 0.5) -> Any:
    """A request that draws u."""
    return SimpleNamespace(params=params, random=SimpleNamespace(random=lambda: u))


def exact(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """The definition, token by token: temperature, then the top_k most likely, then the fewest that reach top_p."""
    scaled = [x / params.temperature for x in logits]
    weights = torch.tensor(scaled, dtype=torch.float64).softmax(0).tolist()
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))[: params.top_k or None]
    total, reached, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if reached < params.top_p:
            kept.append(token)
        reached += weights[token] / total
    whole = sum(weights[token] for token in kept)
    return {token: weights[token] / whole for token in kept}


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(2, 40),
    st.floats(0.2, 3),
    st.sampled_from([0, 0, 1, 2, 7, 50]),
    st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.999]),
)
def test_the_distribution_is_exact(seed: int, vocabulary: int, temperature: float, top_k: int, top_p: float) -> None:
    """With u over an even grid, each token comes as often as its probability says, to within one point of the grid."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))
    requests = [asking(params, (n + 0.5) / GRID) for n in range(GRID)]
    tokens, _ = sample(logits.expand(GRID, -1), requests)
    wanted = exact(logits.tolist(), params)
    assert set(tokens) <= set(wanted)
    for token, probability in wanted.items():
        assert tokens.count(token) == pytest.approx(GRID * probability, abs=1.1), token


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.99}])
def test_no_u_draws_a_token_of_probability_0(u: float, params: dict) -> None:
    """Neither the first of the vocabulary at u = 0 nor the last at the u that rounds to 1."""
    logits = torch.full((1, 400), -torch.inf)
    logits[0, 100:300] = torch.linspace(0, 1, 200)
    (token,), _ = sample(logits, [asking(SamplingParams(**params), u)])
    assert 100 <= token < 300
    if "top_k" in params:
        assert token >= 297


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_a_row_draws_the_same_in_any_batch(seed: int) -> None:
    rng = random.Random(seed)
    ways = [
        SamplingParams(
            temperature=rng.choice([0, 0.5, 1, 2]), top_k=rng.choice([0, 0, 3, 20]), top_p=rng.choice([1.0, 1.0, 0.7])
        )
        for _ in range(8)
    ]
    logits = 3 * torch.randn(8, 50, generator=torch.Generator().manual_seed(seed))
    requests = [asking(params, rng.random()) for params in ways]
    together, _ = sample(logits, requests)
    alone = [sample(logits[n : n + 1], [request])[0][0] for n, request in enumerate(requests)]
    assert together == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"top_k": 1, "temperature": 1.7}, {"temperature": 1e-7}, {"top_p": 1e-6}]
)
def test_what_equals_greedy(params: dict, dtype: torch.dtype) -> None:
    """Also where several tokens are equally likely, as in 16 bits they often are."""
    logits = torch.randn(200, 60, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:50, 7] = logits[:50, 30] = 9
    if params.get("temperature") == 1e-7:  # equally likely stays equally likely
        logits = logits[50:]
        logits += torch.arange(60) % 2
        logits[:, 5] = 20
    tokens, _ = sample(logits, [asking(SamplingParams(**params), n / 200) for n in range(len(logits))])
    assert tokens == logits.argmax(-1).tolist()


def test_a_request_draws_once_a_token_and_only_when_it_samples() -> None:
    logits = torch.zeros(1, 10)
    seeded = Request("a", [1], SamplingParams(seed=5), 0, 1, 99)
    greedy = Request("b", [1], SamplingParams(temperature=0, seed=5), 0, 2, 99)
    drawn = random.Random(5)
    for _ in range(20):
        (token, _), _ = sample(logits.expand(2, -1), [seeded, greedy])
        assert token == int(drawn.random() * 10)
    assert greedy.random.random() == random.Random(5).random()


def test_logprobs_are_of_the_model_before_temperature_and_cuts() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.3, top_k=2, logprobs=4)
    tokens, (first, second) = sample(logits, [asking(params, 0.99), asking(SamplingParams())])
    assert second is None
    wanted = logits[0].log_softmax(0)
    assert first is not None
    assert first.token_id == tokens[0]
    assert first.logprob == pytest.approx(float(wanted[tokens[0]]))
    assert [token for token, _ in first.top] == wanted.topk(4).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(wanted.topk(4).values.tolist())
    _, (none, _) = sample(logits, [asking(SamplingParams(logprobs=0)), asking(SamplingParams())])
    assert none is not None
    assert none.top == ()


# ---------------------------------------------------------------- text


def byte_level() -> Any:
    return tokenizer().backend_tokenizer


def byte_fallback() -> Any:
    """As Llama 2's: words with their space, and single bytes for what it has no word for."""
    words = ["<unk>", "<s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "é", "日"]
    made = Tokenizer(
        models.BPE(
            {word: n for n, word in enumerate(words)}, [("▁", "a"), ("a", "b"), ("▁a", "b")],
            byte_fallback=True, unk_token="<unk>",
        )
    )  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>"])
    return made


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
TEXT = st.text(st.sampled_from("aab bé日🙂"), max_size=14)


def stream(
    decoder: Any, prompt: list[int], tokens: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], str | None]:
    """The pieces, and the stop text that ended them."""
    detokenizer = Detokenizer(decoder, prompt, stop)
    pieces = []
    for token in tokens:
        piece, found = detokenizer.add(token)
        pieces.append(piece)
        if found is not None:
            return pieces, found
    return [*pieces, detokenizer.rest()], None


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_pieces_add_up_to_the_text(kind: str) -> None:
    decoder = TOKENIZERS[kind]

    @settings(max_examples=150, deadline=None)
    @given(TEXT, st.integers(0, 20))
    @example("🙂🙂🙂", 10)  # the last tokens of the prompt begin within a character, too
    def run(text: str, cut: int) -> None:
        tokens = decoder.encode("a " + text, add_special_tokens=False).ids
        prompt, output = tokens[: 1 + cut], tokens[1 + cut :]
        texts = (decoder.decode(prompt[:end]) for end in range(len(prompt), 0, -1))
        before = next(
            text for text in texts if not text.endswith("\ufffd")
        )  # a character that it has begun comes whole
        pieces, _ = stream(decoder, prompt, output)
        if output:
            assert before + "".join(pieces) == decoder.decode(tokens)
        assert not any("\ufffd" in piece for piece in pieces)

    run()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_that_are_no_text_stop_nothing(kind: str) -> None:
    """What a model of random weights says: whatever was given out is right, up to what later bytes made of it."""
    decoder, rng = TOKENIZERS[kind], random.Random(0)
    right = 0
    for _ in range(400):
        tokens = rng.choices(range(2, decoder.get_vocab_size()), k=12)
        text, whole = "".join(stream(decoder, [], tokens)[0]), decoder.decode(tokens)
        right += whole.startswith(text)
    assert right == 400 if kind == "byte level" else right > 100


def test_a_prompts_text_is_never_given_out() -> None:
    """Not even where it ends within a character, so that its last text becomes another."""
    decoder = byte_level()
    tokens = decoder.encode("naïve 🙂").ids
    for cut in range(1, len(tokens)):
        pieces, _ = stream(decoder, tokens[:cut], tokens[cut:])
        assert "".join(pieces) == "naïve 🙂"[len(decoder.decode(tokens[:cut]).rstrip("\ufffd")) :]


def test_special_tokens_have_no_text() -> None:
    decoder = byte_level()
    end = decoder.token_to_id("<|endoftext|>")
    a, b = decoder.encode("ab 🙂").ids, decoder.encode("b").ids
    assert end is not None
    pieces, _ = stream(decoder, [end], [end, *a, end, *b, end])
    assert "".join(pieces) == "ab 🙂b"


def stopped(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Character by character: the first that completes a stop text ends it; of several, the longest is cut off."""
    for end in range(1, len(text) + 1):
        if found := [one for one in stop if text[:end].endswith(one)]:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_stop_text_cuts_wherever_tokens_have_their_borders(kind: str) -> None:
    decoder = TOKENIZERS[kind]

    @settings(max_examples=300, deadline=None)
    @given(TEXT, st.lists(st.text(st.sampled_from("ab é日🙂"), min_size=1, max_size=4), max_size=3))
    @example("abab", ["bab", "aba"])
    @example("ab", ["a", "ab"])
    @example(" ab", [" ab", "a"])  # one token completes both
    @example("aab", ["aab", "ab", "b"])
    @example("aaab", ["aab"])
    def run(text: str, stop: list[str]) -> None:
        prompt = decoder.encode("a", add_special_tokens=False).ids
        tokens = decoder.encode("a" + text, add_special_tokens=False).ids[len(prompt) :]
        text = decoder.decode(prompt + tokens)[1:]  # where "a" and what follows became one token, it is not the text
        pieces, found = stream(decoder, prompt, tokens, tuple(stop))
        assert ("".join(pieces), found) == stopped(text, tuple(stop))
        shown = ""
        for piece in pieces:  # what was shown never had to be taken back
            shown += piece
            assert stopped(text, tuple(stop))[0].startswith(shown)

    run()


def test_a_models_own_sampling_holds_where_a_body_leaves_it_open() -> None:
    own = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}

    def asked(**body: Any) -> tuple[float, int, float]:
        params = CompletionBody(prompt="a", **body).sampling(4, None, own)
        return params.temperature, params.top_k, params.top_p

    assert asked() == (0.6, 20, 0.95)
    assert asked(temperature=0) == (0, 20, 0.95)
    assert asked(top_k=-1, top_p=1) == (0.6, 0, 1)  # -1 is all, and said


def test_a_folders_generation_config_is_read(tmp_path: Path) -> None:
    folder = build(tmp_path, "llama")
    assert LLM(str(folder), num_blocks=8).engine.default_sampling == {}
    own = {"eos_token_id": [0, 7], "temperature": 0.6, "top_k": 20, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(own))
    llm = LLM(str(folder), num_blocks=8)
    assert llm.engine.default_sampling == {"temperature": 0.6, "top_k": 20}
    assert llm.engine._end_tokens == {0, 7}
