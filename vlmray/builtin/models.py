"""The built-in models by name, and where they come from.

| `--model_id` | what it is |
| --- | --- |
| `builtin` | reads the built-in charts; ships in `vlmray/builtin/checkpoint`, see the model card there |
| `builtin-untrained` | what training of `builtin` began from: the same architecture, random weights |
| `tiny-random` | the smallest model of that kind, with random weights: answers without meaning |

Those with random weights are built on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlmray.builtin.charts import ChartsConfig, parse_charts_name
from vlmray.builtin.random_models import build_tiny_random_model, build_untrained_model

BUILTIN = "builtin"
UNTRAINED = "builtin-untrained"
TINY_RANDOM = "tiny-random"

BUILTIN_FOLDER = Path(__file__).parent / "checkpoint"
"""Where the trained model lies in the package."""


def trained_charts() -> ChartsConfig:
    """Return what the built-in model was trained on, as its recipe has it."""
    import yaml

    recipe = yaml.safe_load((BUILTIN_FOLDER / "recipe.yaml").read_text(encoding="utf-8"))
    return parse_charts_name(recipe["dataset_name"])


# The last part of each folder's name: raise it whenever the built files change.
BUILDS: dict[str, tuple[Callable[[Path], object], str]] = {
    TINY_RANDOM: (build_tiny_random_model, "v2"),
    UNTRAINED: (build_untrained_model, "v1"),
}
