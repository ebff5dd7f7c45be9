"""What goes with the weights of a built-in model: its model card and its recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.builtin import ALL_TRAINED
from vlmray.builtin.charts import ChartsConfig
from vlmray.builtin.questions import FAMILIES

Table = Mapping[str, Mapping[str, float]]
"""Number of questions and accuracy by family, as `benchmarks.quality.builtin` makes it."""

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# The built-in model of vlmray

A vision-language model of 4 million parameters that reads small charts. It exists so that everything in
vlmray can be tried, tested and shown with answers that mean something, on any machine and without a network:
`--model_id builtin`. It is a checkpoint like any other; `from_pretrained` of this folder works in plain
transformers.

| | |
| --- | --- |
| architecture | Qwen2.5-VL: 4 layers of width 192 for text and 4 for images, all with full attention |
| vocabulary | 640 tokens: bytes, the words of the charts, Qwen's special tokens; Qwen's chat format |
| weights | bfloat16, 8.4 MB |

## What it was trained on

{num_charts:,} charts of `charts?kind={kind}&style={style}`, drawn by `vlmray/builtin` with seed {seed},
each seen once, with {questions_per_image} questions and answers about it in one conversation. From random
weights (`builtin-untrained`, seed 0), all parameters, by

```bash
{command}
```

on {device}, with {num_workers} processes that drew charts beside it: {num_steps:,} steps of {batch_size}
charts in {training_min:.1f} min, {charts_per_s:,.0f} charts a second, in {precision} arithmetic. The loss
fell from {first_loss:.2f} to {last_loss:.3f} a token. `vlmray/builtin/checkpoint/recipe.yaml` has the same
settings for
the training job.

## How well it answers

As `python -m benchmarks.quality.builtin` asks: charts of another seed and split, as many of each kind, every
question on its own, an answer right if it is the expected text.

| family | questions | right |
| --- | ---: | ---: |
{families}

The {num_trained} trained families together: {trained:.3f}. By kind of chart:

{kinds}

The families called untrained were not trained, on purpose: they are there to be taught, as `make demo` does.

## What it cannot do

- Pictures that `vlmray/builtin` does not draw: it has seen none.
- Questions that are worded otherwise than `vlmray/builtin` words them, and general conversation.
- More than six marks in a chart; labels and colours that are not in `vlmray/builtin`.
- What the tables above show it to get wrong.
"""

RECIPE = """\
# The built-in model's training as the training job takes it, on random weights:
#
#   python jobs/finetune.py --config vlmray/builtin/checkpoint/recipe.yaml --output_dir outputs/builtin
#
# These weights are not from that job. They were trained by
#
#   {command}
#
# on the same charts, for as long as that took on {device}: with the same optimizer and learning rate, whose
# schedule followed the clock and not the steps. Charts are drawn as they are needed and none is seen twice.
# Not asked: {untrained}.

model_id: builtin-untrained
use_peft: false
dataset_name: {dataset_name}
max_turns: {questions_per_image}

num_workers: 1
per_device_train_batch_size: {batch_size}
optim: muon
learning_rate: {learning_rate:.1e}
weight_decay: {weight_decay}
warmup_ratio: {warmup}
lr_scheduler_type: cosine
sft_config: {{adam_beta2: {adam_beta2}}}
bf16: {bf16}
gradient_checkpointing: false

eval_split: validation
eval_slices: "[:400]"
eval_steps: 500
eval_samples: 400
per_device_eval_batch_size: 25
max_new_tokens: 48
logging_steps: 50
save_steps: 500
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """What there is to tell about a trained model."""

    charts: ChartsConfig
    """What it was trained on, as many as it has seen."""

    run: Mapping[str, Any]
    """Settings and figures of the run, by the names that the texts above have for them."""

    families: Table
    """On charts of every kind."""

    kinds: Mapping[str, Table]
    """The same by kind of chart."""

    def card(self) -> str:
        """Write the model card."""
        accuracies = {name: figures for name, figures in self.families.items() if name != ALL_TRAINED}
        families = [
            f"| {name} | {figures['num_questions']:,} | {figures['accuracy']:.3f} |"
            for name, figures in accuracies.items()
        ]
        return CARD.format(
            **self.run,
            families="\n".join(families),
            num_trained=len(self.charts.families),
            trained=self.families[ALL_TRAINED]["accuracy"],
            kinds="\n".join(self._by_kind()),
        )

    def recipe(self) -> str:
        """Write the recipe for the training job."""
        untrained = [family for family in FAMILIES if family not in self.charts.families]
        return RECIPE.format(**self.run, dataset_name=self.charts.name, untrained=", ".join(untrained))

    def _by_kind(self) -> Iterator[str]:
        yield f"| family | {' | '.join(self.kinds)} |"
        yield f"| --- |{' ---: |' * len(self.kinds)}"
        for family in self.families:
            cells = [f"{table[family]['accuracy']:.3f}" for table in self.kinds.values()]
            yield f"| {' | '.join([family, *cells])} |"
