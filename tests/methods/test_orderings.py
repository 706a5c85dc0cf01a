"""What training-free masks do to a trained model, the quickstart's base: orderings that published work reports.

A threshold against top-k on the product is not among them: on this model both cost 0.002 nats at 70% zeros.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.methods import base
from sparsify.methods.base import Fitted, LayerValues
from sparsify.methods.calibrate import CalibrationStage
from sparsify.methods.pooled import ZerosSettings, layer_threshold
from sparsify.models import SiteRule
from sparsify.sparsity.measure import realised_density
from sparsify.sparsity.probe import SparsityProbe
from tests.conftest import TOKENIZER
from tests.methods.conftest import Calibrate, Calibrated, measured

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("orderings")]

ZEROS = 0.7
TOKENS = 4096


class OnlyAttention:
    """Thresholds on what projections of the attention read."""

    paper = "none"
    Settings = ZerosSettings
    reconstructs = False
    read: tuple[str, ...]

    def __init__(self, settings: ZerosSettings) -> None:
        self._share = settings.target_zeros

    @property
    def sites(self) -> dict[str, SiteRule]:
        return dict.fromkeys(self.read, SiteRule())

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        return layer_threshold(layer, site, self._share)


class QueryAndOutput(OnlyAttention):
    name = "query_and_output"
    read = ("attn_in.q", "attn_out")


class AllAttention(OnlyAttention):
    name = "all_attention"
    read = ("attn_in.q", "attn_in.k", "attn_in.v", "attn_out")


class Damage:
    """Converts the quickstart's base, each method once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calibrate = Calibrate("quickstart", {}, folder / "cache", sequence_tokens=256, watched_sequences=6)
        self._found: dict[Path, Calibrated] = {}

    def of(self, method: str, zeros: float = ZEROS, **settings: Any) -> float:
        """Loss above the dense model's, in nats per token of held-out text."""
        dense, masked = self.stages(method, zeros, **settings)
        return masked.loss - dense.loss

    def converted(self, method: str, **conversion: Any) -> Calibrated:
        to = self._folder / re.sub(r"[^\w.]+", "-", f"{method} {conversion}")
        if to not in self._found:
            self._found[to] = self._calibrate(str(TOKENIZER), "swiglu", to, tokens=TOKENS, method=method, **conversion)
        return self._found[to]

    def stages(self, method: str, zeros: float = ZEROS, **settings: Any) -> list[CalibrationStage]:
        return self.converted(method, target_zeros=zeros, method_settings=settings).calibration.stages


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> Damage:
    return Damage(tmp_path_factory.mktemp("orderings"))


@pytest.mark.parametrize("statistic", ["rms", "mean_abs"])
def test_chess_does_less_than_cats_at_equal_zeros(statistic: str, damage: Damage) -> None:
    assert damage.of("chess", up_statistic=statistic) < damage.of("cats")


def test_the_product_is_more_tolerant_than_a_factor(damage: Damage) -> None:
    on_product = damage.of("percentile")
    assert on_product < min(damage.of("cats"), damage.of("countdown"))


def test_query_and_output_are_more_tolerant_than_the_whole_attention(
    damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in (QueryAndOutput, AllAttention):
        monkeypatch.setitem(base._METHODS, method.name, method)
    assert damage.of("query_and_output") < damage.of("all_attention")


def test_dips_split_costs_less_than_a_uniform_one_where_blocks_read_half(damage: Damage) -> None:
    assert damage.of("dip", 0.5) < damage.of("dip", 0.5, split="uniform")


def test_dip_costs_less_than_the_product_alone_where_blocks_read_seven_tenths(damage: Damage) -> None:
    assert damage.of("dip", 0.3) < damage.of("topk", 0.9)  # (2 + 0.1) / 3


def test_the_zeros_that_are_compared_are_equal(damage: Damage) -> None:
    for method in ("percentile", "topk", "cats", "chess", "countdown"):
        assert damage.stages(method)[-1].zeros == pytest.approx(ZEROS, abs=0.02)


@pytest.mark.parametrize(
    ("method", "density"),
    [("percentile", 0.8), ("topk", 0.8), ("top_p", 0.8), ("cats", 0.6), ("chess", 0.6), ("countdown", 0.6)]
    + [(method, 0.5) for method in ("teal", "wina", "r_sparse", "la_rosa", "prox", "dip")],
)
def test_other_text_reads_the_wanted_share_of_the_weights(method: str, density: float, damage: Damage) -> None:
    found = damage.converted(method, target_density=density)
    model = load_sparse(found.folder)
    with SparsityProbe(model) as probe:
        measured(model, found)
    assert realised_density(probe.statistics(), model.config) == pytest.approx(density, abs=0.01)
