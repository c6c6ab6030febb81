"""A decoder by its dimensions, and those of the Llama 3 models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from common import lm
from common.script import UserError


@dataclass(frozen=True)
class Shape:
    """A Llama-style decoder by its dimensions, named as in a transformers config: lm.parameter_count and
    profiling.flops_per_token take one for the other."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None

    @property
    def width(self) -> int:
        """Size of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @cached_property
    def parameters(self) -> int:
        return lm.parameter_count(self)

    @cached_property
    def layer_parameters(self) -> int:
        ends = self.head_parameters * (1 if self.tie_word_embeddings else 2) + self.hidden_size  # and the last norm
        return (self.parameters - ends) // self.num_hidden_layers

    @property
    def head_parameters(self) -> int:
        """Of the output head; the embedding has as many."""
        return self.vocab_size * self.hidden_size


# arXiv:2407.21783, table 3, with Llama 3's vocabulary of 128,256
SHAPES = {
    "llama-8b": Shape("llama-8b", 128256, 4096, 14336, 32, 32, 8),
    "llama-70b": Shape("llama-70b", 128256, 8192, 28672, 80, 64, 8),
    "llama-405b": Shape("llama-405b", 128256, 16384, 53248, 126, 128, 8),
}


def find_shape(name: str) -> Shape:
    """A built-in shape, a preset of common.lm, or the config of a local folder.

    Raises:
        UserError: nothing of that name; the line lists those known.
    """
    if name in SHAPES:
        return SHAPES[name]
    if name in lm.PRESETS:
        fields = {key: value for key, value in lm.PRESETS[name].items() if key in Shape.__dataclass_fields__}
        return Shape(name, **fields)
    try:
        config = lm.config(name)
    except UserError:
        known = ", ".join([*SHAPES, *lm.PRESETS])
        raise UserError(f"no model {name!r}; take one of {known}, or a folder with config.json") from None
    names = [key for key in Shape.__dataclass_fields__ if key not in ("name", "head_dim")]
    return Shape(name, *(getattr(config, key) for key in names), head_dim=getattr(config, "head_dim", None))
