"""From tokens to text while they come: whole characters only, and nothing that may turn out to begin a stop text."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Of one request.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        stop: texts that end the output.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stream = DecodeStream(ids=prompt[-8:], skip_special_tokens=True)  # a word's first space depends on them
        self.pending = ""
        self.held_back = max(map(len, stop), default=1) - 1

    def add(self, token: int) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop text if one is complete."""
        self.pending += self.stream.step(self.tokenizer, token) or ""
        found = [(at, text) for text in self.stop if (at := self.pending.find(text)) >= 0]
        if found:
            at, text = min(found)
            return self.pending[:at], text
        shown = len(self.pending) - self.held_back
        if shown <= 0:
            return "", None
        text, self.pending = self.pending[:shown], self.pending[shown:]
        return text, None

    def rest(self) -> str:
        """What was held back, when the request ends without a stop text."""
        return self.pending
