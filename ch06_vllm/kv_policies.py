"""What a KV cache takes, by formula: in blocks, and in one piece for each request, as engines had it before vLLM.

All figures are token slots (places for one token's keys and values) or blocks of them; bytes are slots times
2 x layers x key-value heads x head size x bytes a number.

Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention" (PagedAttention),
whose section 6.1 defines the reservations that it is measured against: Orca (Max), (Pow2) and (Oracle).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """A running request: its prompt's and its whole answer's tokens, and how many of both the cache holds now."""

    prompt: int
    output: int
    tokens: int


def blocks(tokens: int, block_size: int) -> int:
    """Blocks of a sequence: the last may be partly empty."""
    return -(-tokens // block_size)


def power_of_two(tokens: int) -> int:
    """The smallest power of two that is not below it."""
    return 1 << (tokens - 1).bit_length()


def policies(block_size: int, max_model_len: int) -> dict[str, Callable[[Held], int]]:
    """Slots that a request takes while it runs. The last three are reserved from its start to its end, in one piece."""
    return {
        "paged": lambda held: blocks(held.tokens, block_size) * block_size,
        "known": lambda held: held.prompt + held.output,
        "pow2": lambda held: held.prompt + power_of_two(held.output),
        "max": lambda held: max_model_len,
    }


def after_step(requests: Sequence[tuple[int, int]], step: int) -> list[Held]:
    """Who still runs after a step if all of (prompt, output) began in step 1, and what the cache then holds of each.

    The first step computes the prompts and brings each a token; that one is computed in the second step. A request ends
    with its last token, which is never computed.
    """
    return [Held(prompt, output, prompt + step - 1) for prompt, output in requests if output > step]


def peak_blocks(requests: Sequence[tuple[int, int]], block_size: int, shared: int = 0) -> int:
    """Most blocks in use between two steps if all of (prompt, output) begin in the same one.

    Args:
        shared: full blocks at the front of every prompt that all of them share.
    """
    longest = max(output for _, output in requests)
    running = (after_step(requests, step) for step in range(1, longest))
    return max(
        (sum(blocks(held.tokens, block_size) - shared for held in now) + shared for now in running if now), default=0
    )


def prefix_hits(prompts: Sequence[int], prefix: int, block_size: int) -> int:
    """Prompt tokens found in the cache if `prefix` tokens of each prompt are there already, computed by an earlier one.

    Only full blocks are shared, and never a whole prompt: its last token must be computed to know what follows.
    """
    return sum(min(prefix // block_size, (prompt - 1) // block_size) * block_size for prompt in prompts)
