"""What one layer of a Llama keeps for its backward pass, by precision and recomputation: bytes on one rank.

Chapter 1's memory.activation_formula derives what each module saves and adds it up for the whole model, in float32
and under autocast. Here the layer is taken apart, because recomputation keeps some of its tensors and FSDP's mixed
precision makes others of them:

    precision   residual stream   matrix products   a norm saves, for N tokens of width h, besides 1 / rms (4 N)
    fp32        float32           float32           its input and x / rms(x), both float32: 8 N h
    autocast    float32           16 bits           the same
    low         16 bits           16 bits           a float32 copy of its input, and x / rms(x) in 16 bits: 6 N h

autocast is DDP's: weights stay float32, and each is copied to 16 bits once a step. low is what fully_shard's
MixedPrecisionPolicy and DeepSpeed do: the weights themselves arrive in 16 bits, so that nothing is cast twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PRECISIONS = ("fp32", "autocast", "low")


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class Layer:
    """One layer's tensors for `tokens` = micro-batch x sequence length, on one of `tp` tensor-parallel ranks.

    Tensor parallelism cuts heads and MLP, not the residual stream and the norms (sequence parallelism would).
    """

    config: Any
    tokens: int
    precision: str
    tp: int = 1

    @property
    def size(self) -> int:
        """Bytes of a number in a matrix product."""
        return 4 if self.precision == "fp32" else 2

    @property
    def stream(self) -> int:
        """The residual stream between two layers. It is also the input that a recomputed layer keeps."""
        return self.tokens * self.config.hidden_size * (2 if self.precision == "low" else 4)

    @property
    def inner(self) -> int:
        """One tensor of the MLP's width, N f."""
        return self.tokens * self.config.intermediate_size // self.tp * self.size

    @property
    def heads(self) -> int:
        """q, k and v, N D (H + 2 K)."""
        of = self.config.num_attention_heads + 2 * self.config.num_key_value_heads
        return self.tokens * head_dim(self.config) * of // self.tp * self.size

    @property
    def mixed(self) -> int:
        """What attention makes of v, N D H."""
        return self.tokens * head_dim(self.config) * self.config.num_attention_heads // self.tp * self.size

    @property
    def log_sum_exp(self) -> int:
        return 4 * self.tokens * self.config.num_attention_heads // self.tp

    @property
    def rotary(self) -> int:
        """Frequencies of the rotary angles: a buffer of D / 2 numbers, and a copy of it."""
        return head_dim(self.config) // 2

    @property
    def norm(self) -> int:
        return self.tokens * (self.config.hidden_size * (6 if self.precision == "low" else 8) + 4)

    def _input(self, products: int) -> int:
        """The input of some matrix products: one tensor, but for autocast, where each product casts its own copy."""
        return self.tokens * self.config.hidden_size * self.size * (products if self.precision == "autocast" else 1)

    @property
    def attention(self) -> int:
        return self._input(3) + self.heads + self.mixed + self.log_sum_exp

    @property
    def mlp(self) -> int:
        """Its input; gate, silu(gate), up and the product of the last two."""
        return self._input(2) + 4 * self.inner

    @property
    def saved(self) -> int:
        """All that backward needs of this layer."""
        return 2 * self.norm + self.attention + self.mlp

    def kept(self, recompute: str, number: int) -> int:
        """What layer `number` keeps from forward to backward under one of recompute.py's choices."""
        if recompute.startswith("every-"):
            recompute = "none" if number % int(recompute[6:]) else "block"
        if recompute == "block":
            return self.stream
        if recompute == "mlp":  # of the MLP its input: what the second norm puts out, float32 under autocast
            width = self.config.hidden_size * (2 if self.precision == "low" else 4)
            return 2 * self.norm + self.attention + self.tokens * width
        if recompute == "ops":  # its input, and the result of every matrix product: q, k, v, o; gate, up, down
            products = self.heads + self._input(1) + 2 * self.inner + self._input(1)
            return self.stream + products + self.mixed + self.log_sum_exp
        return self.saved

    def recomputed(self, recompute: str, number: int) -> int:
        """What comes into being a second time in its backward pass, so that all that backward needs is there."""
        kept = self.kept(recompute, number)
        if kept == self.saved:
            return 0
        if recompute == "mlp":
            return 4 * self.inner
        alive = self.saved + (
            self.stream if self.precision == "low" else 0
        )  # else the first norm saves the input itself
        if recompute == "ops":  # the result of the last product is kept until the layer's end, though nobody needs it
            alive += self._input(1)
        return alive - kept


@dataclass(frozen=True)
class Ends:
    """Before the first layer and behind the last: embedding, rotary angles, final norm, head and loss."""

    config: Any
    micro_batch: int
    seq_len: int
    precision: str
    tp: int = 1

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_len

    @property
    def begin(self) -> int:
        """Token ids, and the cosines and sines for all layers."""
        return 8 * self.tokens + 2 * self.seq_len * head_dim(self.config) * (2 if self.precision == "low" else 4)

    @property
    def head(self) -> int:
        """The final norm, and the head's input."""
        layer = Layer(self.config, self.tokens, self.precision)
        return layer.norm + self.tokens * self.config.hidden_size * layer.size

    @property
    def targets(self) -> int:
        return 8 * self.tokens

    @property
    def logits(self) -> int:
        """In the type of the matrix products; the loss makes float32 of them."""
        return self.tokens * self.config.vocab_size // self.tp * (4 if self.precision == "fp32" else 2)

    @property
    def log_softmax(self) -> int:
        """float32, and what backward needs of the loss. Backward makes two more of this size."""
        return 4 * self.tokens * self.config.vocab_size // self.tp


def saved(config: Any, micro_batch: int, seq_len: int, precision: str, recompute: str = "none") -> int:
    """All that a forward pass with its loss leaves for backward, without autocast's copies of the weights."""
    ends, layer = Ends(config, micro_batch, seq_len, precision), Layer(config, micro_batch * seq_len, precision)
    layers = sum(layer.kept(recompute, number) for number in range(config.num_hidden_layers))
    return ends.begin + layers + ends.head + ends.targets + ends.log_softmax
