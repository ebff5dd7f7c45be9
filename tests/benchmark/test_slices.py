"""Where a model got worse: found where it is, and seldom where nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from vlmray.benchmark.report import render_benchmark_html
from vlmray.benchmark.samples import SampleFacts
from vlmray.benchmark.scoreboard import Scoreboard, score_models
from vlmray.benchmark.slices.finding import FEWEST_IMAGES, find_worse
from vlmray.benchmark.slices.groups import break_down
from vlmray.benchmark.verdicts import Results
from vlmray.reports.gallery import GalleryItem

ANSWERS = {"count": "4", "compare": "yes", "naming": "blue", "list": "red, blue", "read": "12"}


def make_samples(num_images: int) -> list[SampleFacts]:
    """Two questions about each image, of all kinds that samples are told apart by."""
    rng = np.random.default_rng(0)
    families = rng.choice([*ANSWERS], 2 * num_images).tolist()
    return [
        SampleFacts(
            sample_id=f"{i}", question="?" * int(rng.integers(10, 60)), answers=(ANSWERS[family],),
            family=family, image=f"{i // 2}", num_pixels=10_000 * (1 + i // 2 % 5),
        )
        for i, family in enumerate(families)
    ]  # fmt: skip


def score(samples: Sequence[SampleFacts], *models: Sequence[bool], num_resamples: int = 999) -> Scoreboard:
    """Score models by whether each answer is right; the first is the base."""
    rows: dict[str, dict[str, Any]] = {
        f"m{place}": {
            sample.sample_id: {"prediction": sample.answers[0] if right else "wrong", "error": None}
            for sample, right in zip(samples, answered, strict=True)
        }
        for place, answered in enumerate(models)
    }
    return score_models(samples, rows, ["exact_match"], num_resamples=num_resamples)


def draw(rng: np.random.Generator, samples: Sequence[SampleFacts]) -> np.ndarray:
    """Answer 7 of 10 right; half of the chance is that of the image."""
    num_images = len(samples) // 2
    chance = np.repeat(rng.beta(3.5, 1.5, num_images), 2)
    return np.stack([rng.random(len(samples)) < chance for _ in range(2)])


def test_where_nothing_changed_little_is_found() -> None:
    """In 5 of 100 searches at most, whatever was looked at."""
    samples, rng = make_samples(60), np.random.default_rng(1)
    num_searches, num_found = 40, 0
    for _ in range(num_searches):
        search = find_worse(score(samples, *draw(rng, samples), num_resamples=999), samples)
        assert search.num_slices == 14
        num_found += bool(search.worse)
    assert num_found <= 7  # of 2 that are expected; beyond lies 1 of 1,000 cases


@pytest.mark.parametrize("kind", ["family", "answer", "question", "image size"])
def test_a_bad_slice_is_found_with_all_that_it_lost(kind: str) -> None:
    samples, rng = make_samples(200), np.random.default_rng(2)
    base, other = draw(rng, samples)
    group, places = list(break_down(samples)[kind].items())[-1]
    other[places] &= rng.random(len(places)) < 0.2
    search = find_worse(score(samples, base, other), samples)
    (found,) = [each for each in search.worse if (each.found.kind, each.found.group) == (kind, group)]
    assert found.found.difference.mean == pytest.approx(other[places].mean() - base[places].mean())
    assert list(found.lost) == [samples[place].sample_id for place in places if base[place] > other[place]]


def test_looking_at_more_models_asks_for_more_evidence() -> None:
    samples, rng = make_samples(60), np.random.default_rng(3)
    base, other = draw(rng, samples)
    other &= np.array([sample.family != "list" or i % 3 == 0 for i, sample in enumerate(samples)])
    alone = find_worse(score(samples, base, base & other), samples)
    beside = find_worse(score(samples, base, base & other, *[base] * 6), samples)
    (found,) = [each for each in alone.worse if each.found.group == "list"]
    again = [each for each in beside.worse if each.found.group == "list"]
    assert not again or again[0].found.p_corrected > found.found.p_corrected
    assert beside.num_slices == alone.num_slices


def test_few_images_are_not_looked_at_and_better_is_not_worse() -> None:
    samples = make_samples(FEWEST_IMAGES - 1)
    wrong, right = [False] * len(samples), [True] * len(samples)
    assert find_worse(score(samples, right, wrong), samples).num_slices == 0
    samples = make_samples(60)
    wrong, right = [False] * len(samples), [True] * len(samples)
    assert find_worse(score(samples, wrong, right), samples).worse == ()
    assert find_worse(score(samples, right, right), samples).worse == ()
    assert len(find_worse(score(samples, right, wrong), samples).worse) == 14


def test_the_report_shows_each_with_examples_or_says_that_there_is_none() -> None:
    samples, rng = make_samples(200), np.random.default_rng(4)
    base, other = draw(rng, samples)
    other &= np.array([sample.family != "list" for sample in samples])

    def page(*models: Sequence[bool]) -> tuple[Results, str]:
        board = score(samples, *models)
        search = find_worse(board, samples)
        items = [
            [GalleryItem(sample_id=name, question="?") for name in each.lost[:2]] for each in search.worse
        ]
        results = Results(
            title="", models={name: name for name in board.models}, board=board, against_baseline={},
            speed=(), price_per_hour=None, errors={}, num_samples=len(samples), galleries={}, elapsed_s=1.0,
            slices=search, slice_items=items,
        )  # fmt: skip
        return results, render_benchmark_html(results)

    results, html = page(base, other)
    assert "Where it got worse" in html
    assert "Worse: family list" in html
    assert any(
        "m1 is worse than m0 on" in verdict and "family list (-" in verdict for verdict in results.verdicts
    )
    assert results.to_json()["slices"]["worse"][0]["lost"]
    results, html = page([True] * len(samples), [False] * len(samples))
    assert results.verdicts[-1].startswith("m1 is worse than m0 on 14 of 14 slices, in points: ")
    assert results.verdicts[-1].endswith("(-100.0) and 10 more.")
    results, html = page(base, base)
    assert "Where it got worse" not in html
    assert "none found. 14 slices by family, answer, question, image size" in html
    assert results.to_json()["slices"] == {
        "kinds": ["family", "answer", "question", "image size"], "num_slices": 14, "worse": [],
    }  # fmt: skip
