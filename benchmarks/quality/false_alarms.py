"""How often are two equal models called different? Simulated, with charts that share their difficulty.

    python -m benchmarks.quality.false_alarms

Both models answer each question right with the chance that its chart has, drawn anew for each model: neither
is better. `verdict` is the share of runs that the permutation test over images calls different at 0.05,
`McNemar` what the exact test over samples would have called so, `interval` the share of intervals of the
difference that miss 0. Near 5 % is what they promise; of 1,000 runs, chance alone moves it by 1.4 points
either way, and with few changed answers McNemar's exact test stays below. `power` is the verdict's share
where the second model is better by the difference that the report says would show in 4 of 5 samples.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from vlmray.metrics.significance import ALPHA, paired_difference


def main() -> None:
    """Simulate, and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num_runs", type=int, default=1000)
    parser.add_argument("--num_resamples", type=int, default=999)
    options = parser.parse_args()
    print(f"{'images':>6} {'questions':>9} {'verdict':>8} {'McNemar':>8} {'interval':>8} {'power':>8}")
    figures = []
    for num_images, most in ((100, 1), (400, 1), (100, 4), (370, 3)):
        found = simulate(num_images, most, options.num_runs, options.num_resamples)
        figures.append({"num_images": num_images, "most_questions": most, **found})
        shares = " ".join(
            f"{100 * found[name]:6.1f} %" for name in ("verdict", "mcnemar", "interval", "power")
        )
        print(f"{num_images:6} {f'1 to {most}' if most > 1 else '1':>9} {shares}")
    print(json.dumps({**vars(options), "figures": figures}))


def simulate(num_images: int, most: int, num_runs: int, num_resamples: int) -> dict[str, float]:
    """Return how often each method speaks of a difference."""
    rng = np.random.default_rng(num_images * 10 + most)
    calls = {"verdict": 0, "mcnemar": 0, "interval": 0, "power": 0}
    for seed in range(num_runs):
        images = np.repeat(np.arange(num_images), rng.integers(1, most + 1, num_images))
        chance = rng.beta(3, 1.5, num_images)[images]
        first, second = (answer(rng, chance, images) for _ in range(2))
        found = paired_difference(first, second, images.tolist(), num_resamples=num_resamples, seed=seed)
        calls["verdict"] += found.p_value < ALPHA
        calls["mcnemar"] += found.mcnemar_p is not None and found.mcnemar_p < ALPHA
        calls["interval"] += not found.low <= 0 <= found.high
        if found.smallest is not None:
            worse = np.clip(chance - found.smallest, 0, 1)
            lifted = paired_difference(
                answer(rng, worse, images), second, images.tolist(), num_resamples=num_resamples, seed=seed
            )
            calls["power"] += lifted.p_value < ALPHA
    return {name: count / num_runs for name, count in calls.items()}


def answer(rng: np.random.Generator, chance: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Draw right (1) and wrong (0); a model has good and bad days with a chart as a whole."""
    whole = rng.random(images.max() + 1)[images]  # one draw for all questions of a chart
    alone = rng.random(len(images))
    return (np.where(rng.random(len(images)) < 0.5, whole, alone) < chance).astype(float)


if __name__ == "__main__":
    main()
