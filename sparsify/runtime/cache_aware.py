"""Cache-aware masking: among elements of similar size it prefers those whose weights are in memory (DIP-CA, arXiv 2412.01380).

Before the largest k of a vector are chosen, the sizes of those that are not resident are multiplied by γ: 1 is plain top-k, 0 takes what
is resident first. The choice depends on the cache, so it belongs to one sequence that is decoded token by token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsify.runtime.cache_policies import CachePolicy, CacheStep, Mask

WARM_UP_TOKENS = 4.0
"""Time constant of the warm-up: the power of γ is the number of tokens divided by this."""


def gamma_at(gamma: float, token: int) -> float:
    """γ of a token, counted from 0, with warm-up: 1 at the first, while nothing is resident, then towards γ."""
    return 1 - (1 - gamma) * (1 - gamma ** (token / WARM_UP_TOKENS))


class CacheAwareTopK:
    """Chooses the elements of one vector of one layer, token by token, and moves its cache along.

    Args:
        policy: Of the cache of the matrices that read the vector.
        kept: Elements that a token keeps.
        gamma: Factor of the sizes of what is not resident, 0 to 1.
        warm_up: Whether γ begins at 1 (`gamma_at`).
        fixed_top: The so many largest elements have their size whether they are resident or not.

    Raises:
        ValueError: If γ is outside 0 to 1.
    """

    def __init__(
        self, policy: CachePolicy, kept: int, gamma: float, *, warm_up: bool = True, fixed_top: int = 0
    ) -> None:
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}; 0 to 1")
        self.policy, self.kept, self.gamma = policy, kept, gamma
        self._warm_up, self._fixed_top = warm_up, fixed_top
        self._token = 0

    def choose(self, sizes: NDArray[np.floating]) -> tuple[Mask, CacheStep]:
        """The mask of the next token and what it does to the cache.

        Args:
            sizes: Magnitudes of the vector's elements, [slots].
        """
        gamma = gamma_at(self.gamma, self._token) if self._warm_up else self.gamma
        scores = np.where(self.policy.resident, sizes, gamma * sizes)
        if self._fixed_top:
            top = _largest(sizes, self._fixed_top)
            scores[top] = sizes[top]
        mask = np.zeros(len(sizes), np.bool_)
        mask[_largest(scores, self.kept)] = True
        self._token += 1
        return mask, self.policy.step(mask)

    def reset(self) -> None:
        """The state before the first token of a sequence."""
        self._token = 0
        self.policy.reset()


def _largest(values: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """Where the so many largest are, of equals the first."""
    return np.argsort(-values, kind="stable")[:count]
