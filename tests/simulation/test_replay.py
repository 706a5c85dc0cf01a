"""The memory-only equations of DIP's simulator, and laws of caches, prefetch and time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.simulation.device import Device, read_device
from sparsify.simulation.footprint import Bits, Footprint, ModelShape, footprint
from sparsify.simulation.replay import Caching, Moves, replay
from sparsify.simulation.timeline import Decode, time_decode
from sparsify.simulation.trace import Fetch, LayerTrace, RecordedTrace, capacities, divide, units_of

PHI3_MEDIUM = ModelShape(40, 5120, 17920, 40, 10, 128, 32064)
LLAMA3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
MISTRAL_7B = ModelShape(32, 4096, 14336, 32, 8, 128, 32000)
INT4 = Bits(attention=4, ffn=4, output_layer=4, keys_and_values=8)
A18 = read_device("dip_a18")


def device(**other: Any) -> Device:
    plain = {"dram_bytes_per_second": 60e9, "flash_bytes_per_second": 1e9}
    figures = {
        key: value if isinstance(value, bool) else {"value": value, "source": "test"}
        for key, value in (plain | other).items()
    }
    return Device(name="test", **figures)


def decode(moves: Moves, device: Device = A18, static: float = 0.0, fetch: Fetch | None = None) -> Decode:
    return time_decode(device, fetch or units_of("neurons", MISTRAL_7B, INT4), moves, static)


def moves(hits: Any, late: Any, ahead: Any = 0, prefetched: Any = 0) -> Moves:
    """[tokens, layers] each, of one unit."""
    shape = np.broadcast_shapes(*(np.shape(one) for one in (hits, late, ahead, prefetched)))
    return Moves(*(np.broadcast_to(one, shape)[..., None].astype(np.int64) for one in (hits, ahead, late, prefetched)))


@pytest.mark.parametrize(
    ("shape", "static", "ffn"), [(PHI3_MEDIUM, 1.60, 5.51), (LLAMA3_8B, 1.07, 2.82), (MISTRAL_7B, 0.87, 2.82)]
)
def test_footprints_of_known_models(shape: ModelShape, static: float, ffn: float) -> None:
    found = footprint(shape, INT4, 2048)
    assert found.static / 1e9 == pytest.approx(static, abs=0.005)
    assert found.ffn / 1e9 == pytest.approx(ffn, abs=0.005)


@pytest.mark.parametrize(
    ("density", "hits", "speeds"),
    [
        (1.0, 0.5, (0.354, 0.689, 0.691)),
        (0.5, 0.5, (0.70, 1.36, 1.37)),
        (0.5, 0.65, (0.98, 1.90, 1.91)),
        (0.5, 0.8, (1.63, 3.14, 3.17)),
    ],
)
def test_tokens_per_second_of_the_memory_only_equations(density: float, hits: float, speeds: tuple[float, ...]) -> None:
    for shape, speed in zip((PHI3_MEDIUM, LLAMA3_8B, MISTRAL_7B), speeds, strict=True):
        needed = density * shape.neurons
        found = time_decode(
            A18,
            units_of("neurons", shape, INT4),
            moves(np.full((1, shape.layers), needed * hits), np.full((1, shape.layers), needed * (1 - hits))),
            footprint(shape, INT4, 2048).static,
        )
        assert found.tokens_per_second == pytest.approx(speed, abs=0.0051)
        assert found.hit_rate == pytest.approx(hits, abs=1e-3)


def test_the_first_token_comes_from_flash_and_the_same_again_from_memory() -> None:
    mask = np.zeros((2, 14336), np.bool_)
    mask[:, :1000] = True
    trace = RecordedTrace([LayerTrace([mask])])
    fetch = units_of("neurons", MISTRAL_7B, INT4)
    found = replay(trace, Caching("lru", [2000]))
    num_bytes = 1000 * fetch.units[0].slot_bytes
    first = decode(Moves(*(one[:1] for one in (found.hits, found.ahead, found.late, found.prefetched))))
    both = decode(found)
    assert first.seconds == pytest.approx(num_bytes / 1e9)
    assert both.seconds - first.seconds == pytest.approx(num_bytes / 60e9)
    assert both.stall_bytes == first.stall_bytes == num_bytes


def test_at_once_takes_the_longer_of_flash_and_memory() -> None:
    found = moves(np.full((3, 4), 5000), np.full((3, 4), 100))
    summed, longer = (decode(found, device(concurrent=one)) for one in (False, True))
    slot = units_of("neurons", MISTRAL_7B, INT4).units[0].slot_bytes
    flash, dram = 100 * slot / 1e9, 5000 * slot / 60e9
    assert summed.seconds == pytest.approx(12 * (flash + dram))
    assert longer.seconds == pytest.approx(12 * max(flash, dram))


def test_a_device_that_gathers_computes_on_late_slots_as_well_and_after_them() -> None:
    found = moves(np.full((3, 4), 5000), np.full((3, 4), 100))
    slot = units_of("neurons", MISTRAL_7B, INT4).units[0].slot_bytes
    flash, dram = 100 * slot / 1e9, 5100 * slot / 60e9
    for concurrent in (False, True):
        gathering = decode(found, device(gathers=True, concurrent=concurrent))
        assert gathering.seconds == pytest.approx(12 * (flash + dram))
    slower = decode(found, device(gathers=True, slot_bytes_per_second=30e9))
    assert slower.seconds == pytest.approx(12 * (flash + 2 * dram))
    placing = decode(found, device(gathers=True, places_seconds=1e-3))
    assert placing.seconds == pytest.approx(12 * (flash + dram + 1e-3))


def test_memory_goes_to_what_every_token_reads_once_some_slots_have_theirs() -> None:
    fetch = units_of("gate_first", MISTRAL_7B, INT4)
    some = MISTRAL_7B.neurons * fetch.units[0].slot_bytes / 8
    nothing, half, more = (divide(fetch, MISTRAL_7B, some + share * fetch.static_bytes) for share in (0.0, 0.5, 1.5))
    assert nothing.held_share == 0.0
    assert half.held_share == pytest.approx(0.5)
    assert half.capacities == nothing.capacities
    assert more.held_share == 1.0
    spare = some + 0.5 * fetch.static_bytes
    assert more.capacities == [int(spare / MISTRAL_7B.layers / fetch.units[0].slot_bytes)]
    # Slots that are fewer than a token needs are no cache where all must be in memory at once.
    assert divide(fetch, MISTRAL_7B, some, most_needed=1434).capacities == [0]
    assert divide(fetch, MISTRAL_7B, 10 * some + fetch.static_bytes, most_needed=100) == divide(
        fetch, MISTRAL_7B, 10 * some + fetch.static_bytes
    )


def test_pages_latencies_and_rates_of_reads_add_what_they_say() -> None:
    found = moves(np.zeros((2, 3)), np.full((2, 3), 10))
    fetch = units_of("neurons", ModelShape(3, 100, 50, 4, 4, 25, 10), Bits.of_weights(16))
    assert fetch.units[0].slot_bytes == 600
    plain = decode(found, device(), fetch=fetch)
    paged = decode(found, device(page_bytes=512.0), fetch=fetch)
    assert paged.flash_bytes / plain.flash_bytes == pytest.approx(1024 / 600)
    assert paged.stall_bytes == plain.stall_bytes == 2 * 3 * 10 * 600
    late = decode(found, device(read_latency_seconds=1e-3), fetch=fetch)
    assert late.seconds - plain.seconds == pytest.approx(6e-3)
    rated = decode(found, device(reads_per_second=1e4), fetch=fetch)
    assert rated.seconds == pytest.approx(6 * 10 / 1e4)
    assert rated.flash_reads == 60
    fixed = decode(found, device(token_seconds=0.5), fetch=fetch)
    assert fixed.seconds - plain.seconds == pytest.approx(1.0)


def test_what_is_streamed_comes_from_flash_with_every_token() -> None:
    found = moves(np.zeros((2, 4)), np.zeros((2, 4)))
    fetch = units_of("neurons", MISTRAL_7B, INT4)
    streamed = time_decode(device(), fetch, found, 6e9, 1e9)
    assert streamed.seconds == pytest.approx(2 * (6e9 / 60e9 + 1e9 / 1e9))
    # At once, only the first layer waits, less what it computes; the others' bytes come during the layer before.
    hidden = time_decode(device(concurrent=True), fetch, found, 6e9, 8e7)
    assert hidden.seconds == pytest.approx(2 * 0.1)
    longer = time_decode(device(concurrent=True), fetch, found, 6e9, 2e8)
    assert longer.seconds == pytest.approx(2 * 0.2, rel=0.15)
    assert longer.flash_bytes == pytest.approx(4e8, rel=0.13)


def test_a_prefetch_is_hidden_behind_the_layer_before_and_waits_for_flash() -> None:
    slot = units_of("neurons", MISTRAL_7B, INT4).units[0].slot_bytes
    ahead = np.zeros((1, 2))
    ahead[0, 1] = 100
    # The first layer computes long enough on 6,000 resident slots for 100 slots to arrive; not on 3,000.
    for resident, waited in ((6000, 0.0), (3000, 100 * slot / 1e9 - 3000 * slot / 60e9)):
        found = moves([[resident, 0]], np.zeros((1, 2)), ahead, ahead)
        done = decode(found)
        assert done.flash_seconds == pytest.approx(waited, abs=1e-12)
        assert done.stall_bytes == 0
        assert done.recall == 1
    # The first layer reads late itself: its reads are before the prefetch.
    busy = decode(moves([[6000, 0]], [[50, 0]], ahead, ahead))
    assert busy.flash_seconds == pytest.approx(50 * slot / 1e9)


def test_units_share_the_memory_by_projection() -> None:
    shape = ModelShape(2, 8, 24, 2, 2, 4, 10)
    bits = Bits.of_weights(16)
    inputs = units_of("inputs", shape, bits)
    assert [(unit.slots, unit.slot_bytes) for unit in inputs.units] == [(8, 2 * 24 * 2), (24, 8 * 2)]
    whole = sum(unit.slots * unit.slot_bytes for unit in inputs.units)
    assert whole == 3 * 8 * 24 * 2
    assert capacities(inputs, 2, 2 * whole) == [8, 24]
    assert capacities(inputs, 2, whole) == [4, 12]
    for fetch, static in (("neurons", 0), ("gate_first", 1), ("down", 2)):
        made = units_of(fetch, shape, bits)
        assert made.static_bytes == static * 2 * 8 * 24 * 2
        assert made.units[0].slot_bytes == (3 - static) * 8 * 2
    experts = units_of("gate_first", ModelShape(2, 8, 24, 2, 2, 4, 10, 4, 2), bits)
    assert experts.static_bytes == 2 * experts.static_read_bytes
    assert experts.units[0].slots == 96


def random_trace(seed: int, layers: int = 3, tokens: int = 30, slots: int = 40) -> RecordedTrace:
    """Neurons of unequal frequency; what the first inputs say decides part of the next layer."""
    random = np.random.default_rng(seed)
    often = np.random.default_rng(7).random((layers, slots)) ** 2
    made = []
    for layer in range(layers):
        inputs = random.standard_normal((tokens, 6)).astype(np.float16)
        masks = random.random((tokens, slots)) < often[layer]
        if made:  # the first quarter of the slots follows the layer before
            masks[:, :10] = made[-1].inputs[:, :1] > 0
        made.append(LayerTrace([masks], inputs))
    return RecordedTrace(made)


@given(st.integers(0, 1000), st.integers(0, 40), st.sampled_from(["none", "persistence", "hot", "cluster", "low_rank"]))
def test_what_is_needed_is_resident_ahead_or_late(seed: int, capacity: int, prefetch: str) -> None:
    trace = random_trace(seed)
    found = replay(trace, Caching("lfu", [capacity], prefetch), [random_trace(seed + 1)])
    needed = np.stack([layer.masks[0].sum(1) for layer in trace.recorded], 1)
    assert np.array_equal((found.hits + found.ahead + found.late)[..., 0], needed)
    assert (found.ahead <= found.prefetched).all()
    plain = replay(trace, Caching("lfu", [capacity]))
    assert np.array_equal(found.hits, plain.hits)  # guesses do not change what is resident
    assert found.late.sum() <= plain.late.sum()
    done, without = (decode(one, device(concurrent=True)) for one in (found, plain))
    assert done.stall_bytes <= without.stall_bytes
    assert done.over_fetch >= 1


def test_predictors_recall_what_depends_on_the_layer_before() -> None:
    trace, other = random_trace(1, tokens=60), [random_trace(2, tokens=300)]
    recall = {
        name: decode(replay(trace, Caching("no_cache", [0], name), other)).recall
        for name in ("persistence", "hot", "cluster", "low_rank")
    }
    assert recall["low_rank"] > recall["hot"] > recall["persistence"] > 0.2
    with pytest.raises(ValueError, match="low_rank needs masks of other text"):
        replay(trace, Caching("lru", [4], "low_rank"))
    with pytest.raises(ValueError, match="static set needs masks of other text"):
        replay(trace, Caching("static", [4]))


def test_clusters_find_patterns_that_come_together() -> None:
    """Three kinds of tokens, each with its own neurons in both layers."""
    random = np.random.default_rng(0)

    def made(tokens: int) -> RecordedTrace:
        kinds = random.integers(0, 3, tokens)
        masks = [np.zeros((tokens, 30), np.bool_) for _ in range(2)]
        for token, kind in enumerate(kinds):
            for own in masks:
                own[token, kind * 10 : kind * 10 + 10] = True
        return RecordedTrace([LayerTrace([own]) for own in masks])

    found = replay(made(40), Caching("no_cache", [0], "cluster"), [made(100)])
    assert found.late[:, 1].sum() == 0
    assert found.prefetched[:, 1].sum() == found.ahead[:, 1].sum() == 40 * 10


def test_sums_of_parts_are_the_time() -> None:
    found = decode(replay(random_trace(3), Caching("lru", [20])), A18, 1e6)
    parts = (found.static_seconds, found.slots_seconds, found.flash_seconds, found.fixed_seconds)
    assert found.seconds == pytest.approx(sum(parts))
    assert isinstance(footprint(MISTRAL_7B, INT4, 1), Footprint)
