"""The samples that models are compared on: what is known of them, and as requests."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmray.config import BenchmarkConfig, sampling_of
from vlmray.dataset.rows import images_of, read_rows
from vlmray.engines.openai.wire import with_own_seed
from vlmray.images.decoding import ImageError, image_size
from vlmray.inference import stages
from vlmray.inference.plan import InferenceRun
from vlmray.models.templates.chat import template_fingerprint
from vlmray.schema import GenerationRequest, Row

CHUNK = 32  # rows read, and written, at a time


def read_facts(run: InferenceRun) -> Iterator[SampleFacts]:
    """Read what each sample is about; images that are alike byte for byte are one image."""
    split = run.config.dataset_split
    for start in range(0, len(run.selected), CHUNK):
        for row in read_rows(run.source, run.spec, split, run.selected[start : start + CHUNK]):
            keys = [_key(image) for image in images_of(row) if image is not None]
            yield SampleFacts(
                sample_id=row["sample_id"],
                question=row["question"],
                answers=tuple(row["answers"]),
                family=row["family"],
                choices=tuple(row["choices"]),
                own_metrics={run.spec.metric: own} if (own := row.get("own_metric")) else {},
                image="+".join(keys) or None,
                num_pixels=_num_pixels(row["images"]),
            )


def _key(image: bytes | str) -> str:
    return image if isinstance(image, str) else hashlib.sha256(image).hexdigest()[:16]


def _num_pixels(images: Sequence[bytes | None]) -> int | None:
    try:
        return sum(math.prod(image_size(image)) for image in images if image is not None) or None
    except ImageError:
        return None  # its row says why


def read_requests(run: InferenceRun, indices: Sequence[int]) -> Iterator[tuple[Row, list[GenerationRequest]]]:
    """Read and prepare rows; yield each with its requests, which are none where it cannot be asked."""
    for start in range(0, len(indices), CHUNK):
        chunk = indices[start : start + CHUNK]
        rows = read_rows(run.source, run.spec, run.config.dataset_split, chunk)
        for row in stages.prepare_rows(rows, run.task, keep_images=False, fetches_images=run.fetches_images):
            requests = stages.make_requests([row], run.task) if row["error"] is None else []
            yield row, list(map(with_own_seed, requests))


def describe_samples(
    configs: Mapping[str, BenchmarkConfig], runs: Mapping[str, InferenceRun], samples: Sequence[SampleFacts]
) -> dict[str, Any]:
    """Say what was asked: two runs that say the same can be compared.

    Args:
        configs: Options of each model, by its name.
        runs: What each is asked.
        samples: What they are asked about.
    """
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.sample_id}\0{sample.question}\0{sample.answers}\0{sample.image}\n".encode())
    first, *others = configs
    config, prompt = configs[first], _describe_prompt(configs[first], runs[first])
    own = {name: _describe_prompt(configs[name], runs[name]) for name in others}
    own = {name: described for name, described in own.items() if described != prompt}
    return {
        "dataset": {
            "dataset_name": config.dataset_name, "dataset_split": config.dataset_split,
            "num_samples": len(samples), "samples_sha256": digest.hexdigest(),
        },
        "prompt": prompt,
        **({"own_prompts": own} if own else {}),
    }  # fmt: skip


def prompt_of(described: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return how a model was asked, of what `describe_samples` says."""
    found: Mapping[str, Any] = described.get("own_prompts", {}).get(name) or described.get("prompt", {})
    return found


def _describe_prompt(config: BenchmarkConfig, run: InferenceRun) -> dict[str, Any]:
    return {
        "prompt_template": run.task.prompt_template, "system_prompt": run.task.system_prompt,
        "max_new_tokens": config.max_new_tokens, "temperature": config.temperature, **_drawn(config),
        **_worded(config), **_formed(run),
    }  # fmt: skip


def _worded(config: BenchmarkConfig) -> dict[str, Any]:
    """Return how prompts were worded, as far as that was said."""
    wording = {"chat_template_kwargs": config.chat_template_kwargs, **template_fingerprint(config)}
    return {name: value for name, value in wording.items() if value}


def _formed(run: InferenceRun) -> dict[str, Any]:
    """Return what answers had to be, where they had to be something."""
    form = run.task.form
    return {} if form is None else {"form": form.schema or form.regex or list(form.choices)}


def _drawn(config: BenchmarkConfig) -> dict[str, Any]:
    """Return how answers were drawn, as far as that was said: earlier results say no more."""
    found = {name: value for name, value in sampling_of(config).items() if name not in ("seed", "top_p")}
    said = {"top_p": (config.top_p, 1), "num_samples": (config.num_samples, 1)}
    return found | {name: value for name, (value, usual) in said.items() if value != usual}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFacts:
    """What a sample is about, whatever a model says to it."""

    sample_id: str
    question: str
    answers: tuple[str, ...]
    family: str | None = None
    choices: tuple[str, ...] = ()
    own_metrics: Mapping[str, str] = field(default_factory=dict)
    """Metrics by which it is scored in the place of others."""

    image: str | None = None
    """What tells its images from others; None: it has none."""

    num_pixels: int | None = None

    @property
    def image_key(self) -> str:
        """What its scores are tied together by."""
        return self.image or self.sample_id
