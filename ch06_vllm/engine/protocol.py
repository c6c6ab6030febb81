"""OpenAI's completions and chat completions: what a body may say, and the JSON that goes back. Errors are vLLM's.

https://platform.openai.com/docs/api-reference; the fields that OpenAI lacks (top_k, ignore_eos, priority,
return_token_ids) are vLLM's. Pydantic checks a body once; nothing of it is in the path of a token.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from json.encoder import encode_basestring_ascii
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from ch06_vllm.engine.request import Logprob, Output, SamplingParams

Json = dict[str, Any]
Body = TypeVar("Body", bound="_Body")
MAX_PROMPTS = 1024  # of one request, as in vLLM

# What this engine does not do, and the values that ask for nothing. A request that means it gets an error, not another
# answer than it asked for; what is in no list here changes no answer and is ignored (user, metadata, ...).
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "logit_bias": ({},), "bad_words": ([],), "allowed_token_ids": (), "stop_token_ids": ([],), "min_p": (0,),
    "min_tokens": (0,), "use_beam_search": (False,), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "truncate_prompt_tokens": (),
    "prompt_logprobs": (), "prompt_embeds": (), "add_special_tokens": (True,), "response_format": ({"type": "text"},),
    "structured_outputs": (), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "reasoning_effort": ("none",), "audio": (), "modalities": (["text"],),
    "continue_final_message": (False,), "add_generation_prompt": (True,), "documents": (), "chat_template": (),
}  # fmt: skip


class RequestError(Exception):
    """An answer other than 200. `kind` is the error's type, by default as vLLM calls it."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, kind: str = "BadRequestError"
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(message, status, param, kind)


def error_body(message: str, status: int, param: str | None = None, kind: str | None = None) -> Json:
    kind = kind or HTTPStatus(status).phrase
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


# ---------------------------------------------------------------- what a body may say


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Body(BaseModel, extra="allow"):
    model: str | None = None
    n: int | None = Field(1, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    ignore_eos: bool | None = False
    priority: int | None = 0
    return_token_ids: bool | None = False

    def sampling(self, max_tokens: int, logprobs: int | None, defaults: Json) -> SamplingParams:
        """`defaults` are the model's, for what the body leaves open.

        Raises:
            RequestError: a value is out of range.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        wanted: Json = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "logprobs": logprobs}
        wanted["top_k"] = 0 if self.top_k == -1 else self.top_k  # -1 is all, as in vLLM
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                stop=tuple(stop),
                ignore_eos=bool(self.ignore_eos),
                **defaults | {name: value for name, value in wanted.items() if value is not None},
            )
        except ValueError as error:
            raise RequestError(str(error), param=str(error).partition(" ")[0]) from None

    def choices(self, params: SamplingParams) -> list[SamplingParams]:
        """For each of the n answers; a seed gives each its own random numbers, the first those that it gives alone."""
        seeds = [None if self.seed is None else self.seed + number for number in range(self.n or 1)]
        return [replace(params, seed=seed) for seed in seeds]


class CompletionBody(_Body):
    prompt: Any = None
    max_tokens: int | None = 16
    logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """
        Raises:
            RequestError: it is not a text, some texts, token ids, or some lists of them.
        """
        prompt = self.prompt
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _are(prompt, int)):
            prompt = [prompt]
        if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS:
            raise RequestError(
                f"{len(prompt)} prompts are too many; send at most {MAX_PROMPTS} at once", param="prompt"
            )
        if not isinstance(prompt, list) or not prompt or not all(prompt):
            raise RequestError(
                "there is no prompt; give a text, a list of texts, token ids or lists of them", param="prompt"
            )
        if not (_are(prompt, str) or all(isinstance(part, list) and _are(part, int) for part in prompt)):
            raise RequestError("prompt is neither text, texts, token ids nor lists of token ids", param="prompt")
        return prompt


class ChatBody(_Body):
    messages: list[Json] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(0, ge=0)
    chat_template_kwargs: Json | None = None

    def plain_messages(self) -> list[Json]:
        """With each content as one text, which may have come in parts.

        Raises:
            RequestError: a part is no text, or a message has no role.
        """
        messages = []
        for number, message in enumerate(self.messages):
            content = message.get("content")
            if isinstance(content, list):
                if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                    raise RequestError("this model reads text only", param=f"messages.{number}.content")
                content = "".join(part["text"] for part in content)
            if not isinstance(message.get("role"), str) or not isinstance(content, str):
                raise RequestError("a message needs a role and a content", param=f"messages.{number}")
            messages.append({**message, "content": content})
        return messages


def _are(values: Sequence[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


def parse(kind: type[Body], raw: bytes) -> Body:
    """
    Raises:
        RequestError: the bytes are no JSON object, a field has a wrong type, or one asks for what this engine lacks.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {str(error)[:200]}", param="body", kind="Bad Request") from None
    if not isinstance(value, dict):
        raise RequestError("the body is not a JSON object", param="body", kind="Bad Request")
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"][:1])) or "body"
        raise RequestError(f"{where}: {first['msg']}", param=where, kind="Bad Request") from None
    if body.ignore_eos and not body.stop:
        value.pop("min_tokens", None)  # it goes on to max_tokens anyway
    for name, neutral in UNSUPPORTED.items():
        if value.get(name) is not None and not any(value[name] == nothing for nothing in neutral):
            raise RequestError(f"{name} is not supported by this engine; leave it out", param=name)
    if body.stream_options and not body.stream:
        raise RequestError("Stream options can only be defined when `stream=True`.", param="stream_options")
    if body.stream_options and body.stream_options.continuous_usage_stats:
        raise RequestError(
            "continuous_usage_stats is not supported by this engine; ask for include_usage", param="stream_options"
        )
    return body


# ---------------------------------------------------------------- what goes back


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens, "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }  # fmt: skip


class Reply:
    """One request's answer: whole, or event by event.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
    """

    name, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Any, request_id: str | None = None) -> None:
        self.id = f"{self.name}-{request_id or uuid.uuid4().hex}"
        self.head = {"id": self.id, "object": self.whole, "created": int(time.time()), "model": model}
        self.tokenizer = tokenizer
        self._offsets: dict[int, int] = {}
        # All of an event but the text, so that a token costs no json.dumps of a nested object.
        self._begin = json.dumps(self.head | {"object": self.part})[:-1] + ', "choices": [{"index": '

    def event(self, number: int, output: Output, extra: Json) -> bytes:
        """What a step brought to answer `number`; `extra` are further fields of the choice."""
        more = "".join(f', "{name}": {json.dumps(value)}' for name, value in extra.items())
        if output.logprobs:
            more += f', "logprobs": {json.dumps(self.logprobs(output.logprobs, number))}'
        else:
            more += ', "logprobs": null'
        if output.finish_reason:
            more += f', "finish_reason": "{output.finish_reason}", "stop_reason": {json.dumps(output.stop_reason)}'
        else:
            more += ', "finish_reason": null'
        return f"data: {self._begin}{number}, {self._text(output.text)}{more}}}]}}\n\n".encode()

    def opening(self, count: int) -> bytes:
        """Events before the first token."""
        return b""

    def closing(self, totals: Json) -> bytes:
        """The event with the usage."""
        return sse(self.head | {"object": self.part, "choices": [], "usage": totals})

    def complete(self, outputs: Sequence[Output], extras: Sequence[Json], totals: Json) -> Json:
        choices = [
            {"index": number, **self._choice(output.text),
             "logprobs": self.logprobs(output.logprobs, number) if output.logprobs else None,
             "finish_reason": output.finish_reason, "stop_reason": output.stop_reason, **extra}
            for number, (output, extra) in enumerate(zip(outputs, extras, strict=True))
        ]  # fmt: skip
        return {**self.head, "choices": choices, "usage": totals}

    def logprobs(self, logprobs: Sequence[Logprob], number: int) -> Json:
        at = self._offsets.get(number, 0)
        offsets = []
        for one in logprobs:
            offsets.append(at)
            at += len(self.token(one.token_id))
        self._offsets[number] = at
        return {
            "text_offset": offsets,
            "tokens": [self.token(one.token_id) for one in logprobs],
            "token_logprobs": [finite(one.logprob) for one in logprobs],
            "top_logprobs": [
                {self.token(token): finite(value) for token, value in ((one.token_id, one.logprob), *one.top)}
                for one in logprobs
            ],
        }

    def token(self, token_id: int) -> str:
        text: str = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def _text(self, text: str) -> str:
        return f'"text": {encode_basestring_ascii(text)}'

    def _choice(self, text: str) -> Json:
        return {"text": text}


class ChatReply(Reply):
    name, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, count: int) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(
            sse(self.head | {"object": self.part, "choices": [{"index": n, "delta": role, "finish_reason": None}]})
            for n in range(count)
        )

    def logprobs(self, logprobs: Sequence[Logprob], number: int) -> Json:
        def told(token: int, value: float) -> Json:
            text = self.token(token)
            return {"token": text, "logprob": finite(value), "bytes": list(text.encode())}

        return {
            "content": [
                told(one.token_id, one.logprob) | {"top_logprobs": [told(*top) for top in one.top]} for one in logprobs
            ]
        }

    def _text(self, text: str) -> str:
        return f'"delta": {{"content": {encode_basestring_ascii(text)}}}'

    def _choice(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}}


def finite(logprob: float) -> float:
    """JSON knows no infinity."""
    return max(logprob, -9999.0)


def sse(value: Json) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
