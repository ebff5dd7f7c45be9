"""How often is a model called worse on some part of a dataset where nothing changed? Simulated.

    python -m benchmarks.quality.slices

Both models answer each question right with the chance that its chart has; of one family the second loses the
share `lost`. `alarms` is the share of searches that find anything: where nothing is lost, 5 % at most is what
the correction for looking promises. `found` is the share that finds that family, and `beside` how many slices
are found beyond it, on average: those that hold some of its samples.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from vlmray.benchmark.samples import SampleFacts
from vlmray.benchmark.scoreboard import score_models
from vlmray.benchmark.slices.finding import SliceSearch, find_worse

FAMILIES = {"count": "4", "compare": "yes", "naming": "blue", "list": "red, blue", "read": "12", "sum": "9"}
BAD = "naming"
SIZES = (100, 400)


def main() -> None:
    """Simulate, and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num_runs", type=int, default=500)
    parser.add_argument("--num_resamples", type=int, default=499)
    options = parser.parse_args()
    print(f"{'images':>6} {'lost':>6} {'slices':>6} {'alarms':>8} {'found':>8} {'beside':>6}")
    figures = []
    for num_images in SIZES:
        for lost in (0.0, 0.25, 0.5):
            found = simulate(num_images, lost, options.num_runs, options.num_resamples)
            figures.append({"num_images": num_images, "lost": lost, **found})
            shares = f"{100 * found['alarms']:6.1f} % {100 * found['found']:6.1f} % {found['beside']:6.2f}"
            print(f"{num_images:6} {100 * lost:4.0f} % {found['slices']:6.0f} {shares}", flush=True)
    print(json.dumps({**vars(options), "figures": figures}))


def simulate(num_images: int, lost: float, num_runs: int, num_resamples: int) -> dict[str, float]:
    """Return how often slices are found where the second model loses a share of one family's answers."""
    rng = np.random.default_rng(num_images)
    counts = {"alarms": 0, "found": 0, "beside": 0, "slices": 0}
    for _ in range(num_runs):
        search = _search(rng, num_images, lost, num_resamples)
        is_bad = [(each.found.kind, each.found.group) == ("family", BAD) for each in search.worse]
        counts["slices"] += search.num_slices
        counts["alarms"] += bool(is_bad)
        counts["found"] += any(is_bad)
        counts["beside"] += len(is_bad) - sum(is_bad)
    return {name: count / num_runs for name, count in counts.items()}


def _search(rng: np.random.Generator, num_images: int, lost: float, num_resamples: int) -> SliceSearch:
    """Draw two questions about each image and both models' answers, and look for slices."""
    families = rng.choice([*FAMILIES], 2 * num_images).tolist()
    samples = [
        SampleFacts(
            sample_id=f"{place}", question="?" * int(rng.integers(10, 60)), answers=(FAMILIES[family],),
            family=family, image=f"{place // 2}", num_pixels=10_000 * (1 + place // 2 % 7),
        )
        for place, family in enumerate(families)
    ]  # fmt: skip
    chance = np.repeat(rng.beta(3.5, 1.5, num_images), 2)
    keeps = np.where(np.array(families) == BAD, 1 - lost, 1.0)
    rows = {
        model: {
            sample.sample_id: {"prediction": sample.answers[0] if right else "wrong", "error": None}
            for sample, right in zip(samples, rng.random(len(samples)) < chance * kept, strict=True)
        }
        for model, kept in (("base", 1.0), ("other", keeps))
    }
    return find_worse(score_models(samples, rows, ["exact_match"], num_resamples=num_resamples), samples)


if __name__ == "__main__":
    main()
