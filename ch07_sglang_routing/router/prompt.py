"""What a policy wants to know of a request's body, and what disaggregated engines want to find in it.

The body itself is never written anew: it goes on as the bytes that came, with at most a few fields put in at its end.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import chain
from typing import Any

from ch07_sglang_routing.router.http1 import BadMessage, Head
from ch07_sglang_routing.router.policies import Ask

LOOK_AT_MOST = 2 * 2**20  # bytes; parsing more would hold up everybody else for milliseconds
GENERATES = (b"/v1/completions", b"/v1/chat/completions", b"/generate")
Json = dict[str, Any]


def parsed(body: bytes) -> Json:
    """The body's object; an empty one where there is none: saying what is wrong with a body is the engine's part."""
    if not body or len(body) > LOOK_AT_MOST:
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def ask_of(head: Head, body: Json, rank: float) -> Ask:
    """Session: the field x-session-id, else OpenAI's prompt_cache_key or user."""
    named = head.fields.get(b"x-session-id", b"").decode("latin-1")
    session = named or body.get("prompt_cache_key") or body.get("user") or ""
    return Ask(_prompt(body), session if isinstance(session, str) else "", rank)


def _prompt(body: Json) -> Sequence[int] | str:
    """What prompts are compared by: text or token ids as they came; a chat as roles and contents in their order.

    The engine's chat template turns equal beginnings into equal tokens, so it need not be known here.
    """
    if (messages := body.get("messages")) is not None:
        if not isinstance(messages, list):
            return ""
        parts = [json.dumps(body["tools"])] if body.get("tools") else []  # templates put them first
        for message in messages:
            if isinstance(message, dict):
                content = message.get("content")
                text = content if isinstance(content, str) else json.dumps(content)
                parts.append(f"\x02{message.get('role')}\x03{text}")
        return "".join(parts)
    prompt = body.get("prompt", body.get("text", body.get("input_ids", "")))
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        if all(type(token) is int and 0 <= token < 2**31 for token in prompt):
            return prompt
        if all(isinstance(text, str) for text in prompt):
            return "".join(prompt)
        if all(isinstance(tokens, list) for tokens in prompt):
            return [token for token in chain.from_iterable(prompt) if type(token) is int and 0 <= token < 2**31]
    return ""


def with_fields(body: bytes, fields: Json) -> bytes:
    """A JSON object with these fields as its last: of fields that come twice, readers take the last.

    Raises BadMessage: it is no object.
    """
    before, brace, after = body.rpartition(b"}")
    if not brace or after.strip():
        raise BadMessage(400, "the body is no JSON object")
    comma = b"" if before.strip() == b"{" else b","
    return before + comma + json.dumps(fields).encode()[1:-1] + b"}"


def bootstrap_fields(body: Json, host: str, port: int | None, rng: random.Random) -> Json:
    """What SGLang's prefill and decode servers find each other by (disaggregation over its bootstrap server).

    Both get the same request at once: the decode server asks host:port, which the prefill server listens on, for the KV
    cache that goes by the number of this room. A batch of prompts has a list of each.
    """
    prompt = body.get("prompt", body.get("text", body.get("input_ids")))
    batch = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    if not batch:
        return {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": rng.getrandbits(63)}
    number = len(prompt)
    rooms = [rng.getrandbits(63) for _ in range(number)]
    return {"bootstrap_host": [host] * number, "bootstrap_port": [port] * number, "bootstrap_room": rooms}
