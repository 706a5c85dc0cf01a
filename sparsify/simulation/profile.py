"""Masks with published statistics, for models whose weights are not here: shapes, zeros, and how unequal and how lasting neurons are.

Neuron i of a layer fires for a share p_i of the tokens. The p_i of a layer have a Beta distribution with the layer's mean; its
`concentration` says how equal they are: near 0 some always fire and the others never, large values make all equal. From one token to
the next a neuron keeps its state with probability `persistence`, and is drawn again otherwise; so its share of the tokens stays p_i.
Experts are drawn for each layer and token, each as likely as any other, and kept with `expert_persistence` in the same way. Published
are shapes and zeros; the other numbers are assumptions, and each says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field

from sparsify.errors import RecipeError, nearest
from sparsify.simulation.device import Figure
from sparsify.simulation.footprint import ModelShape
from sparsify.simulation.trace import LayerTrace, Masks

PROFILES = "profiles"
"""Folder of this package with their files."""
PREFIX = "profile:"
"""What a profile's name has before it on the command line."""


class Share(Figure):
    value: float = Field(ge=0, le=1, allow_inf_nan=False)


class Concentration(Figure):
    value: float = Field(gt=0, allow_inf_nan=False)


class Profile(BaseModel):
    """A model's published sparsity.

    Attributes:
        shape: Fields of ModelShape.
        zeros_first_layer: Share of neurons that are zero in the first layer (of a routed expert); linear to the last layer's.
        zeros_last_layer: The same in the last layer.
        concentration: Sum of the two parameters of the Beta distribution of the neurons' frequencies.
        persistence: Probability that a neuron keeps its state.
        expert_persistence: Probability that a token keeps an expert of the token before.
        weight_bits: Bits of a weight of the published measurement.
        resident_bytes: What stays in memory in addition to attention, output layer, keys and values: predictors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: dict[str, int]
    shape_source: str
    zeros_first_layer: Share
    zeros_last_layer: Share
    concentration: Concentration
    persistence: Share
    expert_persistence: Share
    weight_bits: Figure
    resident_bytes: Figure

    @property
    def model_shape(self) -> ModelShape:
        return ModelShape(**self.shape)

    def layer_masks(self, layer: int, tokens: int, seed: int) -> Masks:
        """Masks of the neurons of a layer, [tokens, slots]; of a seed always the same."""
        shape = self.model_shape
        random = np.random.default_rng((seed, layer))
        part = layer / max(1, shape.layers - 1)
        mean = 1 - (self.zeros_first_layer.value * (1 - part) + self.zeros_last_layer.value * part)
        # Which neurons fire often is a property of the model, not of the text: it does not depend on the seed.
        concentration = self.concentration.value
        frequencies = np.random.default_rng((layer,)).beta(
            mean * concentration, (1 - mean) * concentration, shape.slots
        )
        masks = np.zeros((tokens, shape.slots), np.bool_)
        fires = random.random(shape.slots) < frequencies
        experts = random.permutation(shape.experts)[: shape.experts_per_token]
        for token in range(tokens):
            if token:
                drawn = random.random(shape.slots) >= self.persistence.value
                fires = np.where(drawn, random.random(shape.slots) < frequencies, fires)
                experts = self._next_experts(experts, random)
            if shape.experts == 1:
                masks[token] = fires
                continue
            for expert in experts:
                place = slice(expert * shape.neurons, (expert + 1) * shape.neurons)
                masks[token, place] = fires[place]
        return masks

    def _next_experts(self, before: np.ndarray, random: np.random.Generator) -> np.ndarray:
        kept = [expert for expert in before if random.random() < self.expert_persistence.value]
        others = [expert for expert in random.permutation(self.model_shape.experts) if expert not in kept]
        return np.array(kept + others[: len(before) - len(kept)])


@dataclass(frozen=True)
class ProfileTrace:
    """A decode with a profile's statistics, made layer by layer whenever it is iterated.

    Attributes:
        profile: Whose.
        tokens: How many.
        seed: Of the text, so to say: other seeds, other tokens of the same model.
    """

    profile: Profile
    tokens: int
    seed: int

    def layers(self) -> Iterator[LayerTrace]:
        for layer in range(self.profile.model_shape.layers):
            yield LayerTrace([self.profile.layer_masks(layer, self.tokens, self.seed)])


def profile_names() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / PROFILES).glob("*.yaml"))


def read_profile(name: str) -> Profile:
    """A profile of the package.

    Raises:
        RecipeError: If there is none of that name.
    """
    if name not in profile_names():
        raise RecipeError(
            f"There is no profile {name!r}.",
            allowed=f"{nearest(name, profile_names())}Profiles: {', '.join(profile_names())}.",
        )
    path = Path(__file__).parent / PROFILES / f"{name}.yaml"
    return Profile.model_validate(yaml.safe_load(path.read_text("utf-8")))
