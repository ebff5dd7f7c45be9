"""Rows of a dataset as the requests that inference would make of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlmray.config import InferConfig
from vlmray.dataset.rows import read_rows
from vlmray.dataset.selection import open_selection
from vlmray.inference import stages
from vlmray.schema import GenerationRequest


def read_requests(config: InferConfig, forced_by: Any = None) -> list[GenerationRequest]:
    """Read what a run would ask, rows left out that it would not.

    Args:
        config: Of the run.
        forced_by: A tokenizer; each request then ends after as many tokens as its first answer has.
    """
    asked = open_selection(config, config.dataset_split, config.sample_slices)
    task = stages.Task(
        prompt_template=asked.spec.prompt_template, metric=asked.spec.metric,
        max_new_tokens=config.max_new_tokens,
    )  # fmt: skip
    rows = read_rows(asked.source, asked.spec, asked.split, asked.selected)
    rows = [row for row in stages.prepare_rows(rows, task) if row["error"] is None]
    requests = stages.make_requests(rows, task)
    if forced_by is None:
        return requests
    lengths = [len(forced_by(row["answers"][0])["input_ids"]) + 1 for row in rows]
    return [dataclasses.replace(each, max_new_tokens=n) for each, n in zip(requests, lengths, strict=True)]
