"""Finds the dense control of a run, and what the run's zeros cost against it."""

from __future__ import annotations

from collections.abc import Mapping

from sparsify.comparison.arms import Arm, read_arm
from sparsify.comparison.schema import Control, ControlState
from sparsify.training.history import curve_records


def find_control(arm: Arm, compared: Mapping[str, Arm]) -> tuple[Control | None, ControlState]:
    """The dense control of a run: the one in its own folder, else one among the compared runs.

    Args:
        arm: The run.
        compared: All runs of the comparison, by name.

    Returns:
        The control, and how it is about it.
    """
    if arm.is_dense:
        return None, "is dense"
    own, state = _own_control(arm)
    candidates = {"its own": own} if own is not None else compared
    for name, candidate in candidates.items():
        if candidate.is_control_of(arm):
            control = _gap(arm, candidate, name)
            if control is not None:
                return control, "compared"
            state = "not measured yet"
    return None, state


def _own_control(arm: Arm) -> tuple[Arm | None, ControlState]:
    folder = arm.run.control
    if not folder.recipe.is_file() or folder.load_recipe().activation.ffn_activation != "swiglu":
        return None, "no control"
    if not curve_records(folder):
        return None, "not measured yet"
    return read_arm(folder.path), "no control"


def _gap(arm: Arm, control: Arm, name: str) -> Control | None:
    """Both at the newest number of tokens that both were measured at; None if there is none."""
    of_control = {point.tokens: point for point in control.points}
    common = [point for point in arm.points if point.tokens in of_control]
    if not common:
        return None
    newest = common[-1]
    there = of_control[newest.tokens]
    return Control(
        name=name,
        path=str(control.run.path),
        tokens=newest.tokens,
        loss=there.loss,
        gap=newest.loss - there.loss,
        source_gaps={
            source: loss - there.sources[source] for source, loss in newest.sources.items()
        },
        points=control.points,
    )
