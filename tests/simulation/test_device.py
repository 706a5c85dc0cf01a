"""Device files and published profiles: what they must say, and what they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsify.errors import RecipeError, StorageError
from sparsify.simulation.device import device_names, read_device
from sparsify.simulation.machine import measure_machine
from sparsify.simulation.profile import ProfileTrace, profile_names, read_profile


def test_every_number_of_the_devices_and_profiles_has_a_source() -> None:
    assert {"phone", "laptop", "dip_a18"} <= set(device_names())
    for name in device_names():
        assert read_device(name).dram_bytes_per_second.source
    for name in profile_names():
        assert read_profile(name).concentration.source.startswith("assumed")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "dram_bytes_per_second: field required"),
        ("name: x\ndram_bytes_per_second: {value: 1.0}", "dram_bytes_per_second.source: field required"),
        ("name: x\ndram_bytes_per_second: {value: -1, source: y}", "greater than 0"),
        ("name: x\nflash_speed: {value: 1, source: y}", "flash_speed"),
        ("- 1", "holds no settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_device_file_that_lacks_something_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_device(str(path))


def test_an_unknown_device_names_the_known() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'phone'"):
        read_device("phon")
    with pytest.raises(RecipeError, match="turbosparse_mistral"):
        read_profile("turbosparse_mistra")


def test_this_machine_is_measured_and_its_file_is_read_again(tmp_path: Path) -> None:
    lines: list[str] = []
    found = measure_machine(tmp_path, lines.append)
    assert lines
    assert not list(tmp_path.iterdir())
    assert 1e8 < found.dram_bytes_per_second.value < 1e12
    assert found.reads_per_second is not None
    assert 1e6 < found.flash_bytes_per_second.value < 1e11
    assert found.reads_per_second.value * 4096 < 2 * found.flash_bytes_per_second.value
    path = tmp_path / "own.yaml"
    path.write_text(found.model_dump_json())  # JSON is YAML
    assert read_device(str(path)) == found
    with pytest.raises(StorageError, match="not a folder"):
        measure_machine(path)


def test_a_profile_has_the_published_zeros_and_its_own_hot_neurons() -> None:
    profile = read_profile("turbosparse_mistral")
    small = profile.model_copy(update={"shape": profile.shape | {"layers": 2, "neurons": 4000}})
    traces = [ProfileTrace(small, 60, seed) for seed in (1, 2)]
    for one, other in zip(*(trace.layers() for trace in traces), strict=True):
        first, second = one.masks[0], other.masks[0]
        assert first.mean() == pytest.approx(0.1, abs=0.01)
        hot = first.mean(0) > 0.9
        assert second[:, hot].mean() > 0.85  # the same neurons are hot in another text
        stays = (first[1:] & first[:-1]).sum() / first[:-1].sum()
        independent = (first.mean(0) ** 2).sum() / first.mean(0).sum()
        assert stays > independent + 0.02  # neurons last longer than their frequency says
    assert [np.array_equal(a.masks[0], b.masks[0]) for a, b in zip(traces[0].layers(), traces[0].layers(), strict=True)]


def test_a_mixtures_tokens_use_two_experts_each() -> None:
    profile = read_profile("turbosparse_mixtral")
    small = profile.model_copy(update={"shape": profile.shape | {"layers": 1, "neurons": 500}})
    (layer,) = ProfileTrace(small, 40, 1).layers()
    by_expert = layer.masks[0].reshape(40, 8, 500)
    assert (by_expert.any(2).sum(1) == 2).all()
    assert layer.masks[0].mean() == pytest.approx(0.15 * 2 / 8, rel=0.15)
    assert by_expert.any(2).any(0).all()
