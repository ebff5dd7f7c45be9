"""How often is a model that is too much worse called not worse? Simulated, charts share their difficulty.

    python -m benchmarks.quality.margins

The second model answers each question right with the chance that its chart has, less a true loss. `beyond` is
the share of runs that call it not worse by more than the margin where the loss is 1.5 margins, `at` where it
is the margin, which 5 % promises, `inside` where it is half of it, and `equal` where there is none. `planned`
is the power for equal models that a pilot of half the images foretells, the median of its runs; a pilot in
which no answer differs foretells nothing.
`difference` and `planned` behind it are the same of a two-sided comparison, with a true loss of two margins.
Of 1,000 runs, chance alone moves 5 % by 1.4 points either way.
"""

from __future__ import annotations

import argparse
import json
import math

import numpy as np
from scipy import stats

from vlmray.metrics.significance import ALPHA, Difference, detectable, not_worse, paired_difference

LOSSES = {"beyond": 1.5, "at": 1.0, "inside": 0.5, "equal": 0.0}
SETTINGS = (
    # images, questions of each at most, chance of a right answer, margin
    (100, 1, 0.7, 0.1),
    (400, 1, 0.7, 0.05),
    (100, 4, 0.7, 0.07),
    (370, 3, 0.7, 0.04),
    (400, 1, 0.95, 0.02),
    (1500, 2, 0.7, 0.02),
    (100, 1, 0.95, 0.05),
    (50, 3, 0.9, 0.05),
)
COLUMNS = (*LOSSES, "planned", "difference", "planned_difference")


def main() -> None:
    """Simulate, and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num_runs", type=int, default=1000)
    parser.add_argument("--num_resamples", type=int, default=999)
    options = parser.parse_args()
    heads = " ".join(f"{name.split('_')[0]:>10}" for name in COLUMNS)
    print(f"{'images':>6} {'questions':>9} {'right':>6} {'margin':>6} {heads}")
    figures = []
    for num_images, most, right, margin in SETTINGS:
        found = simulate(num_images, most, right, margin, options.num_runs, options.num_resamples)
        figures.append(
            {"num_images": num_images, "most_questions": most, "right": right, "margin": margin, **found}
        )
        shares = " ".join(f"{100 * found[name]:8.1f} %" for name in COLUMNS)
        questions = f"1 to {most}" if most > 1 else "1"
        print(f"{num_images:6} {questions:>9} {right:6} {margin:6} {shares}")
    print(json.dumps({**vars(options), "figures": figures}))


def simulate(
    num_images: int, most: int, right: float, margin: float, num_runs: int, num_resamples: int
) -> dict[str, float]:
    """Return how often the second model is called not worse, by its true loss."""
    rng = np.random.default_rng(num_images * 10 + most)
    calls = dict.fromkeys((*LOSSES, "difference"), 0)
    planned: dict[str, list[float]] = {"planned": [], "planned_difference": []}
    for seed in range(num_runs):
        draw = {"num_resamples": num_resamples, "seed": seed}
        images, first, second = _draw(rng, num_images, most, right, 0.0)
        pilot_size = int(np.searchsorted(images, num_images // 2))
        pilot = slice(0, pilot_size)
        found = paired_difference(first[pilot], second[pilot], images[pilot].tolist(), **draw)
        planned["planned"].append(power(found, len(images), margin, two_sided=False))
        for name, loss in LOSSES.items():
            images, first, second = _draw(rng, num_images, most, right, loss * margin)
            tested = not_worse(first, second, images.tolist(), margin, **draw)
            calls[name] += tested.p_value < ALPHA
        images, first, second = _draw(rng, num_images, most, right, 2 * margin)
        found = paired_difference(first[pilot], second[pilot], images[pilot].tolist(), **draw)
        planned["planned_difference"].append(power(found, len(images), 2 * margin, two_sided=True))
        calls["difference"] += paired_difference(first, second, images.tolist(), **draw).p_value < ALPHA
    medians = {name: float(np.nanmedian(values)) for name, values in planned.items()}
    return {name: count / num_runs for name, count in calls.items()} | medians


def power(pilot: Difference, num_samples: int, difference: float, *, two_sided: bool) -> float:
    """Return the chance to find a difference that a pilot foretells for so many samples."""
    shown = detectable(pilot, num_samples)
    if shown is None:
        return math.nan
    quantile = stats.norm.ppf
    error = shown / (quantile(1 - ALPHA / 2) + quantile(0.8))
    return float(stats.norm.cdf(difference / error - quantile(1 - ALPHA / (2 if two_sided else 1))))


def _draw(
    rng: np.random.Generator, num_images: int, most: int, right: float, loss: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw images, sorted, and the scores of both models; a model has good and bad days with a chart."""
    images = np.repeat(np.arange(num_images), rng.integers(1, most + 1, num_images))
    chance = rng.beta(5 * right, 5 * (1 - right), num_images)[images]
    scores = []
    for model in range(2):
        days = rng.random(num_images)[images]
        drawn = np.where(rng.random(len(images)) < 0.5, days, rng.random(len(images)))
        kept = rng.random(len(images)) >= (loss / right if model else 0.0)
        scores.append(((drawn < chance) & kept).astype(float))
    return images, scores[0], scores[1]


if __name__ == "__main__":
    main()
