"""The simplest language model that looks at its context: the next token given only the one before it.

A transformer that does not beat it on held-out text has learned token frequencies, not language.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def validation_loss(train: npt.NDArray[np.integer], validation: npt.NDArray[np.integer], vocab_size: int) -> float:
    """Mean negative log likelihood (nats a token) of a bigram model on `validation`, fitted to `train`.

    P(b | a) = (count(a b) + s P(b)) / (count(a) + s), with P(b) the add-one unigram: Dirichlet smoothing. Of several
    strengths s the one that is best on the validation text itself is taken, in the bigram's favour.
    """
    train, validation = train.astype(np.int64), validation.astype(np.int64)
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    first_counts = np.bincount(train[:-1], minlength=vocab_size)

    before, after = validation[:-1], validation[1:]
    wanted = before * vocab_size + after
    where = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[where] == wanted, pair_counts[where], 0)
    return min(float(-np.log((count + s * unigram[after]) / (first_counts[before] + s)).mean()) for s in STRENGTHS)
