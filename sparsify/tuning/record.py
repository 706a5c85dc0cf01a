"""What a tuning found, as tune.json holds it."""

from __future__ import annotations

from pydantic import BaseModel

RECORD_FILE = "tune.json"
WEIGHTED = "weighted"
"""Stands beside the domains' names for their weighted loss."""


class Trial(BaseModel):
    """One proxy run. Losses in nats per token."""

    folder: str
    shares: dict[str, float]
    """Delivered token share of each source."""
    part_shares: list[float]
    """The same, of each part that is varied."""
    losses: dict[str, float]
    left_out_losses: dict[str, float]
    """What the regression predicts for this trial from all the others."""
    weighted_loss: float
    left_out_weighted_loss: float
    zeros: float
    left_out_zeros: float


class Domain(BaseModel):
    """One domain under the regression."""

    weight: float
    """Of its loss in the weighted loss; the weights sum to 1."""
    default_share: float
    tuned_share: float
    default_loss: float
    """Predicted, as is `tuned_loss`: nats per token."""
    tuned_loss: float
    left_out_error: float
    """Root mean square of the leave-one-out errors, nats per token."""
    left_out_r2: float
    """1 is perfect; 0 or less: the mean of the other trials predicts as well."""


class Quality(BaseModel):
    """Leave-one-out quality of one regression."""

    left_out_error: float
    left_out_r2: float


class Curve(BaseModel):
    """Predicted losses while one part's share moves and the others keep the default's proportions."""

    part: str
    shares: list[float]
    losses: dict[str, list[float]]
    """By domain; the weighted loss under WEIGHTED."""
    half_widths: dict[str, list[float]]
    """Halves of the 90% intervals."""
    trial_losses: dict[str, list[float]]
    """Each trial's loss, brought onto the curve: the curve at the trial's share plus what the regression leaves of it."""


class Confirmation(BaseModel):
    """Default and tuned mixture trained with another seed, judged on held-out sequences that no trial was judged on."""

    num_tokens: int
    seed: int
    default_losses: dict[str, float]
    tuned_losses: dict[str, float]
    default_loss: float
    """Weighted, as is `tuned_loss`: nats per token."""
    tuned_loss: float
    difference: float
    """Tuned minus default."""
    half_width: float
    """Half of the 90% interval of the difference over sequences of held-out text. One seed: it holds no noise of training."""
    default_zeros: float
    tuned_zeros: float

    @property
    def better(self) -> bool:
        """Whether the tuned mixture beat the default by more than the held-out text leaves open."""
        return self.difference + self.half_width < 0

    @property
    def verdict(self) -> str:
        """In words."""
        gap = f"{self.difference:+.4f} ± {self.half_width:.4f} nats per token"
        if self.better:
            return f"The tuned mixture beats the default: {gap}."
        if self.difference < 0:
            return f"The tuned mixture did not beat the default by more than the held-out text leaves open: {gap}."
        return f"The tuned mixture did not beat the default: {gap}."


class TuneRecord(BaseModel):
    """The whole tuning."""

    recipe: str = ""
    command: str = ""
    over: list[str] = []
    trial_tokens: int = 0
    parts: list[str]
    """What was varied: sources or groups of them, in the order of `part_shares`."""
    default_part_shares: list[float]
    tuned_part_shares: list[float]
    trials: list[Trial]
    """The first is the recipe's own mixture."""
    domains: dict[str, Domain]
    weighted: Quality
    zeros: Quality
    default_zeros: float
    """Predicted, as is `tuned_zeros`."""
    tuned_zeros: float
    default_loss: float
    """Weighted and predicted, as is `tuned_loss`: nats per token."""
    tuned_loss: float
    half_width: float
    """Half of the 90% interval of `tuned_loss` - `default_loss`."""
    features: str
    ridge: float
    reason: str | None
    """Why the trials do not support the tuned mixture; null where they do."""
    at_bounds: list[str]
    """Which bounds of `over` the tuned mixture lies on, in words: beyond them it may be better still."""
    curves: list[Curve]
    confirmation: Confirmation | None = None
    mixture_file: str | None = None
    """The tuned mixture as YAML, where it was written."""

    @property
    def recommended(self) -> bool:
        """Whether trials, and the confirmation where there is one, speak for the tuned mixture."""
        return self.reason is None and (self.confirmation is None or self.confirmation.better)

    @property
    def verdict(self) -> str:
        """The outcome in a sentence or two."""
        if self.reason is not None:
            found = (
                "The trials do not support another mixture than the default: " + self.reason + "."
            )
        else:
            gap = f"{self.tuned_loss - self.default_loss:+.4f} ± {self.half_width:.4f}"
            found = f"The trials support the tuned mixture: {gap} nats per token of the weighted loss (90% interval)."
        if self.at_bounds:
            found += f" It lies on the edge of --over: {'; '.join(self.at_bounds)}."
        confirmed = "" if self.confirmation is None else " " + self.confirmation.verdict
        return f"{found}{confirmed}" + ("" if self.recommended else " Keep the default mixture.")
