"""What can the built-in model do? Accuracy by question family on charts that it has not seen.

    python -m benchmarks.quality.builtin --num_charts 2000
    python -m benchmarks.quality.builtin --num_charts 300 --style varied --kind bar,hbar,line,pie
    python -m benchmarks.quality.builtin --num_charts 500 --quantization 4bit

Every chart is asked one question of every family, each question on its own, by the engine alone. The seed is
not that of training. Questions of a family are about different charts, so with 2,000 of them the standard
error of a share is at most 0.011.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlmray.builtin.charts import KINDS, ChartsConfig, ChartsSource
from vlmray.builtin.models import BUILTIN, trained_charts
from vlmray.builtin.questions import FAMILIES
from vlmray.builtin.random_charts import STYLES
from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.rows import read_rows
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.inference import stages
from vlmray.inference.stages import Task

ROWS_PER_CALL = 1024

TRAINED = trained_charts()
ALL_TRAINED = "trained, all"


def main() -> None:
    """Answer the charts and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_id", default=BUILTIN)
    parser.add_argument("--adapter")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--num_charts", type=int, default=2000)
    parser.add_argument("--kind", default=",".join(TRAINED.kinds), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--style", choices=STYLES, default=TRAINED.style)
    parser.add_argument("--seed", type=int, default=TRAINED.seed + 1000)
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()
    started = time.perf_counter()
    engine = build_engine(
        engine="transformers", model_id=options.model_id, adapter=options.adapter, dtype="float32",
        quantization=options.quantization, batch_size=options.batch_size,
    )  # fmt: skip
    charts = every_family(options.num_charts, seed=options.seed, kind=options.kind, style=options.style)
    table = tabulate(score(charts, engine))
    elapsed_s = time.perf_counter() - started
    print(f"{options.model_id}, {options.num_charts} charts of {charts.name}\n")
    print(f"{'family':28} {'questions':>9} {'right':>7}")
    for family, figures in table.items():
        print(f"{family:28} {figures['num_questions']:9} {figures['accuracy']:7.3f}")
    print(f"\n{charts.num_rows / elapsed_s:.0f} answers/s, model loading included")
    print(json.dumps({**vars(options), "families": table, "answers_per_s": charts.num_rows / elapsed_s}))


def every_family(num_charts: int, *, seed: int, kind: str, style: str) -> ChartsConfig:
    """Return charts that are asked one question of every family each."""
    return ChartsConfig(
        num_rows=num_charts * len(FAMILIES),
        questions_per_image=len(FAMILIES),
        seed=seed,
        kind=kind,
        style=style,
    )


def score(charts: ChartsConfig, engine: Engine) -> dict[str, list[float]]:
    """Return the scores of the test split's answers by family.

    Raises:
        SystemExit: A question was not answered.
    """
    scores: dict[str, list[float]] = {family: [] for family in FAMILIES}
    for row in answer(ChartsSource(charts.name, "test"), engine):
        if row["error"] is not None:
            raise SystemExit(f"{row['sample_id']}: {row['error']}")
        scores[row["family"]].append(row["score"])
    return scores


def tabulate(
    scores: Mapping[str, Sequence[float]], trained: Sequence[str] = TRAINED.families
) -> dict[str, dict[str, float]]:
    """Return the share of right answers by family, trained ones first, then all of these together."""
    return {
        **{family: mean(scores[family]) for family in trained},
        ALL_TRAINED: mean([score for family in trained for score in scores[family]]),
        **{f"{family} (untrained)": mean(scores[family]) for family in FAMILIES if family not in trained},
    }


def answer(source: ChartsSource, engine: Engine) -> Iterator[dict[str, Any]]:
    """Yield every row of a source with its score, as inference without Ray would."""
    spec = get_dataset_columns("charts", source.column_names)
    task = Task(prompt_template=spec.prompt_template, metric=spec.metric, max_new_tokens=48)
    for start in range(0, len(source), ROWS_PER_CALL):
        indices = range(start, min(start + ROWS_PER_CALL, len(source)))
        rows = stages.prepare_rows(read_rows(source, spec, "test", indices), task)
        yield from (stages.score_row(row, task) for row in stages.generate_rows(rows, engine, task))


def mean(scores: Sequence[float]) -> dict[str, float]:
    """Return the share of right answers."""
    return {"num_questions": len(scores), "accuracy": math.fsum(scores) / len(scores)}


if __name__ == "__main__":
    main()
