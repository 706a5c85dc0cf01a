"""Guesses of what a layer will need, so that it can be read while the layer before it computes.

| prefetcher    | guesses for a layer                                                                                           |
|---------------|---------------------------------------------------------------------------------------------------------------|
| `none`        | nothing                                                                                                       |
| `persistence` | what it needed for the token before                                                                           |
| `hot`         | what it needs most often                                                                                      |
| `cluster`     | what it needs where the layer before it needs what it needs now: patterns of other text in clusters           |
| `low_rank`    | what a linear predictor of low rank says that reads the input of the layer before it                          |

The last three are fitted to other sequences and guess as many slots as the layer needs there on average. For the first layer, before the
token is known, `cluster` and `low_rank` are `hot`. Clusters of patterns are those of arXiv 2507.14179; that patterns are predictable
enough to prefetch by them is the claim of arXiv 2412.12178, which does not say how it predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

PREFETCHERS = ("none", "persistence", "hot", "cluster", "low_rank")
FITTED = PREFETCHERS[2:]
"""Those that are fitted to other sequences."""
PROMPT_TOKENS, LEAST_TOKENS = 512, 32
"""Of a prompt, those that are kept to fit prefetchers; and without so many nothing is guessed."""
CLUSTERS = 32
RANK = 32
RIDGE = 0.03
"""Of the low-rank predictor, as a share of the mean of its Gram matrix's diagonal."""
ROUNDS = 8
"""Of k-means."""

Prefetch = Literal["none", "persistence", "frequency", "cluster", "low_rank"]
"""In a runtime, which has no other text: `frequency` takes what was needed most so far, and the last two are fitted to prompts."""
PREFETCHES = get_args(Prefetch)

Slots = NDArray[np.bool_]
Masks = NDArray[np.bool_]
Rows = NDArray[np.float16]


@dataclass(frozen=True)
class Seen:
    """What is known when a layer's slots are guessed.

    Attributes:
        needed: What the layer before it needs for this token, bool [slots]; None for the first layer.
        inputs: What that layer's block reads, [hidden], of any float dtype; None for the first layer, or where it was not recorded.
        before: What the layer itself needed for the token before; None at the first token.
    """

    needed: Slots | None
    inputs: NDArray[np.floating] | None
    before: Slots | None


class Prefetcher(Protocol):
    """Guesses the slots of one unit of one layer."""

    def guess(self, seen: Seen) -> Slots:
        """What to read, bool [slots]."""
        ...


class Persistence:
    def __init__(self, slots: int) -> None:
        self._nothing = np.zeros(slots, np.bool_)

    def guess(self, seen: Seen) -> Slots:
        return self._nothing if seen.before is None else seen.before


class Hot:
    """The most frequent slots.

    Args:
        masks: Of other text, [tokens, slots].
    """

    def __init__(self, masks: Masks) -> None:
        self._hot = likeliest(masks.mean(0), mean_needed(masks))

    def guess(self, seen: Seen) -> Slots:
        return self._hot


class Clusters:
    """Centres of the patterns of the layer before, by k-means, and the slots that are likely in each cluster.

    Args:
        previous: Masks of the layer before, [tokens, slots].
        masks: Of the layer itself, for the same tokens.
        seed: Of the first centres.
    """

    def __init__(self, previous: Masks, masks: Masks, seed: int) -> None:
        self._centres, members = _k_means(previous.astype(np.float32), CLUSTERS, seed)
        self._squares = (self._centres**2).sum(1)
        count = mean_needed(masks)
        frequencies = [masks[members == one].mean(0) for one in range(len(self._centres))]
        self._likely = np.stack([likeliest(frequency, count) for frequency in frequencies])

    def guess(self, seen: Seen) -> Slots:
        assert seen.needed is not None, "the first layer has none before it"
        near = self._squares - 2 * _without_blas(seen.needed.astype(np.float32), self._centres.T)
        return self._likely[near.argmin()]


class LowRank:
    """Scores of the slots, mean + (x - mean x) @ left @ right, x being what the block of the layer before reads.

    Args:
        inputs: x for other text, [tokens, hidden].
        masks: Of the layer itself, for the same tokens.
    """

    def __init__(self, inputs: Rows, masks: Masks) -> None:
        x, y = inputs.astype(np.float32), masks.astype(np.float32)
        self._x_mean, self._y_mean = x.mean(0), y.mean(0)
        x, y = x - self._x_mean, y - self._y_mean
        # By the tokens' products with each other: a runtime has seen fewer tokens than a state has numbers.
        products = x @ x.T
        ridge = RIDGE * float(products.trace()) / x.shape[1]
        dual = np.linalg.solve(products + ridge * np.eye(len(x), dtype=np.float32), y)
        computed = products @ dual
        # The best map of that rank: the full one, projected on the main directions of what it computes for the fitted tokens.
        squares, tokens = np.linalg.eigh(computed @ computed.T)
        some = tokens[:, squares > 1e-9 * max(squares[-1], 1e-30)][:, -RANK:]
        main = some.T @ computed
        main /= np.maximum(np.linalg.norm(main, axis=1, keepdims=True), 1e-30)
        self._left, self._right = x.T @ (dual @ main.T), main
        self._count = mean_needed(masks)

    def guess(self, seen: Seen) -> Slots:
        assert seen.inputs is not None, "the first layer has none before it"
        directions = _without_blas(seen.inputs - self._x_mean, self._left)
        return likeliest(self._y_mean + _without_blas(directions, self._right), self._count)


@dataclass(frozen=True)
class OtherText:
    """What a prefetcher of a layer is fitted to.

    Attributes:
        masks: Of the layer, [tokens, slots].
        previous: Of the layer before it; None for the first layer.
        inputs: What the block of the layer before it reads, [tokens, hidden]; None for the first layer, or if not recorded.
    """

    masks: Masks
    previous: Masks | None = None
    inputs: Rows | None = None


class PromptExamples:
    """What the first tokens of prompts needed, to which prefetchers of a runtime are fitted.

    Args:
        layers: Of the model.
    """

    def __init__(self, layers: int) -> None:
        self._fired: list[list[NDArray[np.uint8]]] = [[] for _ in range(layers)]
        self._inputs: list[list[Rows]] = [[] for _ in range(layers)]
        self._tokens = [0] * layers
        self._slots = 0

    @staticmethod
    def num_bytes(layers: int, hidden: int, neurons: int) -> int:
        """Memory that they, and prefetchers fitted to them, take at most."""
        kept = PROMPT_TOKENS * (neurons // 8 + 2 * hidden) + 4 * max(RANK, CLUSTERS) * (hidden + 2 * neurons)
        return layers * kept + 6 * 4 * PROMPT_TOKENS * (hidden + neurons + PROMPT_TOKENS)

    def add(self, layer: int, fired: Masks, inputs: Rows) -> None:
        """Adds tokens of a layer, [tokens, slots] and [tokens, hidden], until there are PROMPT_TOKENS."""
        room = PROMPT_TOKENS - self._tokens[layer]
        if room > 0:
            self._slots = fired.shape[1]
            self._fired[layer].append(np.packbits(fired[:room], axis=1))
            self._inputs[layer].append(inputs[:room].astype(np.float16))
            self._tokens[layer] += min(room, len(fired))

    def fitted(self, name: str) -> list[Prefetcher | None]:
        """One prefetcher of that name for each layer; None for all without a prompt that is long enough."""
        if min(self._tokens) < LEAST_TOKENS:
            return [None] * len(self._tokens)
        return [prefetcher(name, self._slots, self._other(layer)) for layer in range(len(self._tokens))]

    def _other(self, layer: int) -> OtherText:
        previous = self._masks(layer - 1) if layer else None
        return OtherText(self._masks(layer), previous, np.concatenate(self._inputs[layer - 1]) if layer else None)

    def _masks(self, layer: int) -> Masks:
        return np.unpackbits(np.concatenate(self._fired[layer]), axis=1, count=self._slots).astype(np.bool_)


class Guesses:
    """What a runtime guesses of its layers, from what they needed so far.

    Args:
        prefetch: How.
        layers: Of the model.
        slots: Of a layer.
    """

    def __init__(self, prefetch: Prefetch, layers: int, slots: int) -> None:
        self._prefetch: Prefetch = prefetch
        self._last: list[NDArray[np.intp] | None] = [None] * layers
        self._uses = [np.zeros(slots, np.int64) for _ in range(layers if prefetch == "frequency" else 0)]
        self.examples = PromptExamples(layers) if prefetch in FITTED else None
        self._fitted: list[Prefetcher | None] = []

    def learn(self, layer: int, fired: Masks, inputs: Rows) -> None:
        """Adds what a prompt needed."""
        if self.examples is not None:
            self.examples.add(layer, fired, inputs)
            self._fitted = []

    def fit(self) -> None:
        """Fits to what was learned, unless that is done; outside of steps."""
        if self.examples is not None and not self._fitted:
            self._fitted = self.examples.fitted(self._prefetch)

    def use(self, layer: int, needed: NDArray[np.intp]) -> None:
        """Adds what a step needs."""
        self._last[layer] = needed
        if self._uses:
            self._uses[layer][needed] += 1

    def of(self, layer: int, seen: Seen) -> NDArray[np.intp] | None:
        """What a layer will probably need, given what is known of the one before it; None if nothing is known."""
        likely = self._last[layer]
        if self.examples is not None:
            guesser = self._fitted[layer] if self._fitted else None
            return None if guesser is None else np.flatnonzero(guesser.guess(seen))
        if self._uses and likely is not None:
            uses = self._uses[layer]
            return np.argpartition(-uses, min(len(likely), len(uses) - 1))[: len(likely)]
        return likely


def prefetcher(name: str, slots: int, other: OtherText | None, seed: int = 0) -> Prefetcher | None:
    """The prefetcher of that name for one unit of one layer; None for `none`.

    Args:
        name: One of PREFETCHERS.
        slots: Of the unit.
        other: What it is fitted to; `none` and `persistence` need nothing.
        seed: Of the first cluster centres.

    Raises:
        ValueError: If the name is unknown, or what it is fitted to is missing.
    """
    if name == "none":
        return None
    if name == "persistence":
        return Persistence(slots)
    if name not in PREFETCHERS:
        raise ValueError(f"No prefetcher {name!r}; there are {', '.join(PREFETCHERS)}")
    if other is None:
        raise ValueError(f"{name} needs masks of other text")
    if name == "hot" or other.previous is None:
        return Hot(other.masks)
    if name == "cluster":
        return Clusters(other.previous, other.masks, seed)
    if other.inputs is None:
        raise ValueError("low_rank needs the inputs of the blocks, which were not recorded")
    return LowRank(other.inputs, other.masks)


def mean_needed(masks: Masks) -> int:
    return round(float(masks.sum(1).mean()))


def likeliest(scores: NDArray[np.floating], count: int) -> Slots:
    """The so many slots of the highest score, of equals the first."""
    chosen = np.zeros(len(scores), np.bool_)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen


def _without_blas(x: NDArray[np.floating], matrix: NDArray[np.floating]) -> NDArray[np.floating]:
    """x @ matrix. A runtime guesses on a thread of OpenMP, where threads of BLAS may wait for each other forever."""
    return np.einsum("i,ij->j", x, matrix)


def _k_means(x: NDArray[np.float32], clusters: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Centres of the non-empty clusters, and each row's."""
    random = np.random.default_rng(seed)
    centres = x[np.sort(random.permutation(len(x))[: min(clusters, len(x))])]
    members = _distances(x, centres).argmin(1)
    for _ in range(ROUNDS):
        centres = np.stack([x[members == one].mean(0) for one in np.unique(members)])
        members = _distances(x, centres).argmin(1)
    used, members = np.unique(members, return_inverse=True)
    return centres[used], members


def _distances(x: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distances of rows and centres, but for a term that is the same for all centres of a row."""
    return (centres**2).sum(1) - 2 * x @ centres.T
