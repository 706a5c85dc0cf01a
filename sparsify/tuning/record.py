"""The result of a tuning: the schema of tune.json."""

from __future__ import annotations

from pydantic import BaseModel

RECORD_FILE = "tune.json"
WEIGHTED = "weighted"
"""Key of the weighted loss, next to the names of the domains."""


class TrialRecord(BaseModel):
    """One proxy run. Losses in nats per token; `loo_` values are leave-one-out predictions."""

    folder: str
    shares: dict[str, float]
    """Delivered token share of each source."""
    part_shares: list[float]
    """Delivered token share of each varied part."""
    losses: dict[str, float]
    loo_losses: dict[str, float]
    """Predictions of the regression fitted to all other trials."""
    weighted_loss: float
    loo_weighted_loss: float
    zeros: float
    loo_zeros: float


class Domain(BaseModel):
    weight: float
    """Weight of the domain's loss in the weighted loss; the weights sum to 1."""
    default_share: float
    tuned_share: float
    default_loss: float
    """Predicted, like `tuned_loss`; nats per token."""
    tuned_loss: float
    loo_error: float
    """Root mean square of the leave-one-out errors, nats per token."""
    loo_r2: float
    """1 is perfect; at 0 or below, the mean of the other trials predicts as well."""


class Quality(BaseModel):
    loo_error: float
    loo_r2: float


class ShareCurve(BaseModel):
    """Predicted losses against one part's share, while the others keep the default's proportions."""

    part: str
    shares: list[float]
    losses: dict[str, list[float]]
    """Losses by domain, and the weighted loss under WEIGHTED."""
    half_widths: dict[str, list[float]]
    """Half widths of the 90% intervals."""
    trial_losses: dict[str, list[float]]
    """Each trial moved to the curve: the curve at the trial's share plus the trial's residual."""


class Confirmation(BaseModel):
    """Default and tuned mixture, trained with another seed, on held-out sequences that no trial was evaluated on."""

    num_tokens: int
    seed: int
    default_losses: dict[str, float]
    tuned_losses: dict[str, float]
    default_loss: float
    """Weighted, like `tuned_loss`; nats per token."""
    tuned_loss: float
    difference: float
    """Tuned minus default."""
    half_width: float
    """Half width of the difference's 90% interval over held-out sequences. One seed: it excludes training noise."""
    default_zeros: float
    tuned_zeros: float

    @property
    def better(self) -> bool:
        """Whether the interval of the difference is entirely below 0."""
        return self.difference + self.half_width < 0

    @property
    def verdict(self) -> str:
        gap = f"{self.difference:+.4f} ± {self.half_width:.4f} nats per token"
        if self.better:
            return f"The tuned mixture beats the default: {gap}."
        if self.difference < 0:
            return f"The tuned mixture did not beat the default by more than the uncertainty: {gap}."
        return f"The tuned mixture did not beat the default: {gap}."


class TuneRecord(BaseModel):
    recipe: str = ""
    command: str = ""
    over: list[str] = []
    trial_tokens: int = 0
    parts: list[str]
    """The varied sources or groups of sources, in the order of `part_shares`."""
    default_part_shares: list[float]
    tuned_part_shares: list[float]
    trials: list[TrialRecord]
    """The first trial is the recipe's own mixture."""
    domains: dict[str, Domain]
    weighted: Quality
    zeros: Quality
    default_zeros: float
    """Predicted, like `tuned_zeros`."""
    tuned_zeros: float
    default_loss: float
    """Weighted and predicted, like `tuned_loss`; nats per token."""
    tuned_loss: float
    half_width: float
    """Half width of the 90% interval of `tuned_loss` - `default_loss`."""
    features: str
    ridge: float
    reason: str | None
    """Why the trials do not support the tuned mixture; null if they do."""
    at_bounds: list[str]
    """The bounds of `over` on which the tuned mixture lies, in words. Beyond them may be a better mixture."""
    curves: list[ShareCurve]
    confirmation: Confirmation | None = None
    mixture_file: str | None = None
    """Path of the tuned mixture's YAML file, if it was written."""

    @property
    def recommended(self) -> bool:
        """Whether the trials, and the confirmation if there is one, support the tuned mixture."""
        return self.reason is None and (self.confirmation is None or self.confirmation.better)

    @property
    def verdict(self) -> str:
        if self.reason is not None:
            found = "The trials do not support a mixture other than the default: " + self.reason + "."
        else:
            gap = f"{self.tuned_loss - self.default_loss:+.4f} ± {self.half_width:.4f}"
            found = f"The trials support the tuned mixture: {gap} nats per token of the weighted loss (90% interval)."
        if self.at_bounds:
            found += f" It lies on the edge of --over: {'; '.join(self.at_bounds)}."
        confirmed = "" if self.confirmation is None else " " + self.confirmation.verdict
        return f"{found}{confirmed}" + ("" if self.recommended else " Keep the default mixture.")
