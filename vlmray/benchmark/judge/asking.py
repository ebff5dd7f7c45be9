"""Grades of answers: asked once, kept line by line, asked again only where there is none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmray.benchmark.judge.settings import JUDGEMENTS, JudgeConfig
from vlmray.benchmark.plan import Benchmark
from vlmray.benchmark.samples import SampleFacts
from vlmray.engines.openai.client import EndpointError
from vlmray.engines.openai.engine import OpenAIEngine
from vlmray.engines.openai.flow import MOST_IN_FLIGHT, Flow
from vlmray.engines.openai.shares import LocalKeeper
from vlmray.schema import Completion, GenerationRequest, Row

_CHUNK = 256  # answers whose pictures are held at a time
_KEPT_CHARS = 2_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the judge made of an answer."""

    grade: str | None = None
    error: str | None = None
    """Why there is no grade."""

    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the judge made of all answers: by model and sample id."""

    config: JudgeConfig
    first: Mapping[tuple[str, str], Judgement]
    again: Mapping[tuple[str, str], Judgement]
    """Of some of them, asked a second time with the grades in the opposite order."""

    images: Mapping[str, str]
    """What tells the images of samples apart, by sample id."""

    @property
    def grades(self) -> dict[tuple[str, str], float]:
        """What answers are worth, where they have a grade."""
        worth = self.config.scale
        return {key: worth[found.grade] for key, found in self.first.items() if found.grade is not None}

    @property
    def counted(self) -> set[str]:
        """Samples of which all answers have a grade."""
        missing = {sample_id for (_, sample_id), found in self.first.items() if found.grade is None}
        return {sample_id for _, sample_id in self.first} - missing

    @property
    def num_failed(self) -> int:
        """Answers without a grade."""
        return sum(found.grade is None for found in self.first.values())


@dataclass(frozen=True, slots=True)
class _Question:
    """One thing to ask the judge."""

    key: str
    model: str
    sample: SampleFacts
    row: Row
    turned: bool


def judge_rows(benchmark: Benchmark, rows: Mapping[str, Mapping[str, Row]]) -> Judged:
    """Have every answer graded that was not yet.

    Rows that failed are not asked about, nor samples without an answer to compare with. A judge that stops
    answering leaves the rest without a grade, and the same command goes on.
    """
    config = benchmark.judge
    assert config is not None
    answered = [
        (model, sample, row)
        for model, found in rows.items() for sample in benchmark.samples
        if sample.answers and (row := found[sample.sample_id])["error"] is None
    ]  # fmt: skip
    step = max(1, -(-len(answered) // max(1, config.num_twice)))
    doubted = answered[::step] if config.num_twice else []
    first = [_question(config, *each, turned=False) for each in answered]
    again = [_question(config, *each, turned=True) for each in doubted]
    kept = _ask(benchmark, config, [*first, *again])
    return Judged(
        config=config,
        first={(each.model, each.sample.sample_id): kept[each.key] for each in first},
        again={(each.model, each.sample.sample_id): kept[each.key] for each in again},
        images={sample.sample_id: sample.image_key for sample in benchmark.samples},
    )


def _question(config: JudgeConfig, model: str, sample: SampleFacts, row: Row, *, turned: bool) -> _Question:
    about = [config.fingerprint(), sample.question, sample.answers, sample.image, row["prediction"], turned]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    return _Question(digest, model, sample, row, turned)


def _ask(benchmark: Benchmark, config: JudgeConfig, asked: Sequence[_Question]) -> dict[str, Judgement]:
    """Return a judgement of each question, from the file or from the judge."""
    path = Path(benchmark.folder.uri) / JUDGEMENTS
    kept = _read(path, config)
    pending = list({each.key: each for each in asked if each.key not in kept}.values())
    if not pending:
        return kept
    logger.info("%s grades %s answers", config.model_id, f"{len(pending):,}")
    stopped = ""
    with path.open("a", encoding="utf-8") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # the line before was cut off

        def keep(question: _Question, found: Judgement) -> None:
            kept[question.key] = found
            about = {"key": question.key, "model": question.model, "sample_id": question.sample.sample_id}
            file.write(json.dumps({**about, "turned": question.turned, **dataclasses.asdict(found)}) + "\n")
            file.flush()

        try:
            engine = OpenAIEngine(
                config.endpoint, config.model_id,
                LocalKeeper(Flow(config.max_in_flight or MOST_IN_FLIGHT)),
                key=config.key(), timeout_s=config.endpoint_timeout_s,
            )  # fmt: skip
            try:
                for start in range(0, len(pending), _CHUNK):
                    _ask_chunk(benchmark, config, engine, pending[start : start + _CHUNK], keep)
            finally:
                engine.close()
        except EndpointError as error:
            stopped = f"the judge does not answer: {error}"
            logger.warning("%s", stopped)
    return {**{each.key: Judgement(error=stopped) for each in pending}, **kept}


def _ask_chunk(
    benchmark: Benchmark,
    config: JudgeConfig,
    engine: OpenAIEngine,
    chunk: Sequence[_Question],
    keep: Callable[[_Question, Judgement], None],
) -> None:
    """Ask the judge, and keep each of its answers as soon as it is there."""
    ready: list[tuple[_Question, GenerationRequest]] = []
    for question in chunk:
        try:
            ready.append((question, _request(benchmark, config, question)))
        except (ValueError, OSError) as error:
            keep(question, Judgement(error=f"its picture cannot be shown to the judge: {error}"))

    def on_end(index: int, completion: Completion) -> None:
        keep(ready[index][0], _judgement(config, completion))

    engine.generate([request for _, request in ready], on_end=on_end)


def _request(benchmark: Benchmark, config: JudgeConfig, question: _Question) -> GenerationRequest:
    images: list[Any] = []
    if config.with_images and question.sample.image is not None:
        images = list(benchmark.runs[question.model].read_images(question.row))
        if not images:
            raise ValueError("it is named by a URL")
    sample = question.sample
    text = config.word(
        sample.question, sample.answers, question.row["prediction"] or "", turned=question.turned
    )
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return GenerationRequest(
        request_id=question.key, messages=[{"role": "user", "content": content}], images=images,
        max_new_tokens=config.max_new_tokens,
    )  # fmt: skip


def _judgement(config: JudgeConfig, completion: Completion) -> Judgement:
    if completion.error is not None:
        return Judgement(error=completion.error)
    grade = config.read_grade(completion.text)
    text = completion.text[-_KEPT_CHARS:]
    if grade is not None:
        return Judgement(grade=grade, text=text)
    cut = ", cut off by max_new_tokens" if completion.finish_reason == "length" else ""
    return Judgement(error=f"the judge's last line is none of {', '.join(config.scale)}{cut}", text=text)


def _read(path: Path, config: JudgeConfig) -> dict[str, Judgement]:
    """Return the grades that are there; what has none is asked again."""
    kept = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
            key, grade, text = found["key"], found["grade"], found["text"]
        except (ValueError, KeyError, TypeError):
            continue  # the run was killed while it was written
        if grade in config.scale:
            kept[key] = Judgement(grade=grade, text=text)
    return kept
