from __future__ import annotations

import math

from sparsify.training.telemetry import LayerAlarms


def test_each_alarm_is_raised_once_with_its_layer() -> None:
    alarms = LayerAlarms()
    assert alarms.check([0.8, 0.9, math.nan]) == []
    assert alarms.check([0.8, 0.9995, 0.5]) == [
        "layer 1 dies: 99.95% of its activations are zero",
    ]
    assert alarms.check([0.75, 0.9999, 0.45]) == []
    assert alarms.check([0.69, 1.0, 0.45]) == ["layer 0 densifies: 69.0% zeros, down from 80.0%"]
    assert alarms.check([0.5, 1.0, 0.45]) == []


def test_an_alarm_is_raised_again_after_recovery() -> None:
    alarms = LayerAlarms()
    assert len(alarms.check([1.0])) == 1
    assert alarms.check([0.95]) == []
    assert alarms.check([1.0]) == ["layer 0 dies: 100.00% of its activations are zero"]


def test_a_dense_model_raises_no_alarm() -> None:
    alarms = LayerAlarms()
    assert [alarms.check(layers) for layers in ([0.0] * 4, [1e-6] * 4, [0.0] * 4)] == [[], [], []]
