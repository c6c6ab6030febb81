"""From tokens to text while they come: whole characters only, and nothing that may turn out to begin a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Of one request.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        stop: texts that end the output.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        known = 8  # tokens of the prompt: a word's first space depends on them
        while known < len(prompt) and tokenizer.decode(prompt[-known:]).startswith("\ufffd"):
            known *= 2  # they begin within a character
        before, cut = list(prompt[-known:]), []
        while before and tokenizer.decode(before).endswith("\ufffd"):  # it ends within a character, which is to come
            cut.insert(0, before.pop())
        self.stream = DecodeStream(ids=before, skip_special_tokens=True)
        for token in cut:
            self._next(token)
        self.pending = ""
        self.held_back = max(map(len, stop), default=1) - 1

    def add(self, token: int) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop text if one is complete.

        The one that is complete first ends the text, wherever the tokens have their borders.
        """
        self.pending += self._next(token)
        found = [(at + len(text), at, text) for text in self.stop if (at := self.pending.find(text)) >= 0]
        if found:
            _, at, text = min(found)
            return self.pending[:at], text
        shown = len(self.pending) - self.held_back
        if shown <= 0:
            return "", None
        text, self.pending = self.pending[:shown], self.pending[shown:]
        return text, None

    def rest(self) -> str:
        """What was held back, when the request ends without a stop text."""
        return self.pending

    def _next(self, token: int) -> str:
        try:
            return self.stream.step(self.tokenizer, token) or ""
        except Exception as error:  # it has no class of its own
            if "prefix" not in str(error):
                raise
            # Byte tokens that are no text change the text before them, which was given out: begin anew.
            self.stream = DecodeStream(skip_special_tokens=True)
            return self.stream.step(self.tokenizer, token) or ""
