"""The energy of a run: each card counts once, and what is not known for all of them is not said."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest

from helpers.nvml import Card, installed_nvml
from vlmray.inference.energy.adding import Energy
from vlmray.inference.energy.reading import Meter, Reading
from vlmray.inference.summary import Usage
from vlmray.inference.timeline import Span, Timeline

A, SILENT, OTHER = Card("GPU-a"), Card("GPU-silent", watts=None), Card("GPU-other", name="T4")


def reading(at_s: float, joules: float, card: str = "a") -> Reading:
    return Reading(1_700_000_000 + at_s, round(1000 * joules), card)


def kwh(*readings: Reading) -> float | None:
    energy = Energy()
    for each in readings:
        energy.add([each])
    return energy.kwh


def test_a_card_counts_once_whoever_reads_it_and_in_whatever_order() -> None:
    """An hour of two replicas that share a card of 400 watts, and of one on a card of 100 watts."""
    found = [reading(at_s, 9e6 + 400 * at_s) for at_s in range(0, 3601, 90)]
    found += [reading(at_s, 9e6 + 400 * at_s) for at_s in range(30, 3540, 70)]
    found += [reading(at_s, 100 * at_s, "b") for at_s in range(0, 3601, 120)]
    for seed in range(20):
        assert kwh(*random.Random(seed).sample(found, len(found))) == pytest.approx(0.5)


@pytest.mark.parametrize("order", itertools.permutations(range(4)), ids=str)
def test_a_counter_that_begins_anew_tells_nothing(order: tuple[int, ...]) -> None:
    found = [reading(0, 500), reading(10, 600), reading(20, 3), reading(30, 700)]
    assert kwh(*(found[index] for index in order)) is None


def test_a_thread_may_be_held_up_between_clock_and_counter() -> None:
    assert kwh(reading(0, 0), reading(10.001, 3599), reading(10, 3600), reading(20, 7200)) == 0.002


def test_a_card_that_does_not_tell_makes_the_sum_unknown() -> None:
    energy = Energy()
    assert energy.kwh is None
    energy.add([reading(0, 0)])
    energy.add([reading(10, 5)])
    assert energy.kwh is not None
    energy.add([])
    assert energy.kwh is None
    assert kwh(reading(0, 5), reading(10, 5)) is None  # a counter that stands still is none


def test_only_the_stages_of_the_model_have_cards() -> None:
    timeline = Timeline()
    for stage, at_s in (("read", 0), ("load", 1), ("generate", 3), ("write", 4)):
        is_read = stage in ("load", "generate")
        readings = (reading(at_s, 1800 * at_s),) if is_read else ()
        timeline.add([Span(stage, at_s, at_s + 1, readings=readings)])
    assert timeline.energy_kwh == 0.001


def test_energy_is_set_against_answers() -> None:
    used = {"unit": "GPU", "held_s": 60.0, "used_s": 50.0, "price_per_hour": None}
    assert Usage.of(**used, num_answered=500, energy_kwh=0.25).energy_of_1000_wh == 500
    assert Usage.of(**used, num_answered=0, energy_kwh=0.25).energy_of_1000_wh is None
    assert Usage.of(**used, num_answered=500).energy_of_1000_wh is None


@pytest.mark.parametrize(
    ("cards", "asked", "told"),
    [
        ([A], ["0"], ["GPU-a"]),
        ([A, Card("GPU-b")], ["1", "0"], ["GPU-b", "GPU-a"]),
        ([OTHER, A], ["GPU-a"], ["GPU-a"]),
        ([A, SILENT], ["0"], ["GPU-a"]),
        ([A, SILENT], ["1"], []),
        ([A, SILENT], ["0", "1"], []),
        ([A], ["MIG-a"], []),
        ([A], ["1"], []),  # a card in name only
        ([A, OTHER], ["0"], []),  # which of them CUDA counts first is not known
        ([A], [], []),
        ([], ["0"], []),  # no driver
    ],
)
def test_a_meter_reads_all_its_cards_or_nothing(
    cards: list[Card], asked: list[str], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    with installed_nvml(tmp_path, *cards):
        meter = Meter(asked)
        first, second = meter.read(), meter.read()
    assert [each.card for each in first] == told
    assert all(
        a.at_s <= b.at_s and a.millijoules <= b.millijoules for a, b in zip(first, second, strict=True)
    )


def test_indices_are_the_drivers_where_cuda_counts_by_bus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    with installed_nvml(tmp_path, OTHER, A):
        assert [each.card for each in Meter(["1"]).read()] == ["GPU-a"]


def test_without_the_library_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Meter(["GPU-00000000-0000-0000-0000-000000000000"]).read() == ()  # with what is installed here
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Meter(["0"]).read() == ()
