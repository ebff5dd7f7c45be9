"""A comparison before it starts: every mistake is found here, nothing is asked."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlmray import metrics
from vlmray.benchmark.baseline import read_baseline
from vlmray.benchmark.judge.settings import JUDGE, JUDGEMENTS, JudgeConfig, read_judge
from vlmray.benchmark.samples import SampleFacts, describe_samples, read_facts
from vlmray.config import BenchmarkConfig, Candidate, InferConfig, known_options, shared_options
from vlmray.dataset.selection import describe_columns, open_selection, refuse_requests, reword
from vlmray.engines.auto import EngineChoice
from vlmray.engines.openai.client import EndpointError
from vlmray.errors import OptionError, RunError
from vlmray.inference.endpoint.checking import check_served
from vlmray.inference.plan import InferenceRun, choose_engine_of, plan_inference
from vlmray.publishing.hub import HubRepo
from vlmray.publishing.trackers import check_tracker
from vlmray.schema import Row
from vlmray.storage.filesystem import check_apart
from vlmray.storage.run_folder import RunFolder

DEFAULT_METRICS = ("exact_match", "anls", "token_f1")
SPEED = "speed.json"
RESULTS = "results.json"
_ENGINES = {"engine", "endpoint"}

logger = logging.getLogger(__name__)


class BenchmarkError(RunError):
    """A run that could not go on; everything answered is in the output folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A run before it starts: everything checked that can be checked without asking a model."""

    config: BenchmarkConfig
    candidates: tuple[Candidate, ...]
    configs: Mapping[str, BenchmarkConfig]
    """Options of each model, by its name."""

    metrics: tuple[str, ...]
    """Names of the metrics, the deciding one first; empty where speed alone is measured."""

    runs: Mapping[str, InferenceRun]
    """What each model is asked and where its answers go, by its name."""

    folder: RunFolder
    samples: tuple[SampleFacts, ...]
    baseline: Mapping[str, Mapping[str, Row]] | None
    """Rows of the earlier run by model and sample id."""

    judge: JudgeConfig | None = None
    repo: HubRepo | None = None
    """Where the predictions are pushed to."""


def plan_benchmark(config: BenchmarkConfig, choices: Mapping[str, EngineChoice] | None = None) -> Benchmark:
    """Open the dataset, the folders and the earlier run, and check all options against them.

    Args:
        config: The options.
        choices: Of the engine of each model, where they are made already.

    Raises:
        ValueError: an option does not fit the dataset, the models, the folder or the earlier run.
        FileNotFoundError: a model or adapter is not there.
    """
    candidates = config.candidates()
    check_tracker(config.report_to)
    check_apart(config.output_dir, config.dataset_name)
    folder = RunFolder.find(config.output_dir, "benchmark")
    choices = choices or choose_engines([config])
    configs = {each.name: choices[each.name].settle(config.of(each)) for each in candidates}
    if plain := next((each for each in candidates if not each.options.keys() & _ENGINES), None):
        config = choices[plain.name].settle(config)
    asked = {each.name: _infer_config(configs[each.name], each) for each in candidates}
    worded = dataclasses.replace(asked[candidates[0].name], prompt_template=config.prompt_template)
    questions = open_selection(worded, config.dataset_split, config.sample_slices)
    refuse_requests(questions.spec)
    runs = {}
    for candidate in candidates:
        name = candidate.name
        with _own_mistakes(candidate):
            said = reword(questions, asked[name]) if candidate.options else questions
            runs[name] = plan_inference(asked[name], questions=said, choice=choices[name])
    names = _metric_names(config, questions.spec.metric)
    judge = read_judge(config.judge) if config.judge else None
    samples = tuple(read_facts(runs[candidates[0].name]))
    if names and not any(sample.answers for sample in samples):
        raise OptionError(
            "dataset_name",
            f"{config.dataset_name} has no answers to compare with in split {config.dataset_split!r}",
            "pass --metrics none to measure speed alone",
        )
    if judge is not None:
        _check_judge(judge)
    if config.overwrite:
        folder.delete(SPEED)
        folder.delete(JUDGEMENTS)
    baseline = (
        read_baseline(config.baseline, describe_samples(configs, runs, samples), [*runs])
        if config.baseline
        else None
    )
    logger.info("%s: %s", config.dataset_name, describe_columns(questions.source, questions.spec))
    return Benchmark(
        config=config, candidates=candidates, metrics=names, runs=runs, folder=folder, samples=samples,
        configs=configs, baseline=baseline, judge=judge, repo=HubRepo.of(config, "dataset"),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------


def choose_engines(configs: Sequence[BenchmarkConfig]) -> dict[str, EngineChoice]:
    """Choose the engine of each model, for benchmarks of the same ones: one for all that name none.

    Raises:
        ValueError: An option is for an engine that is not installed or not that of the others, or a folder is
            another job's.
    """
    candidates = configs[0].candidates()
    own = {each.name: configs[0].of(each) for each in candidates}

    def choose(name: str, *chosen_for: Candidate) -> EngineChoice:
        models = [(each.model_id, each.adapter) for each in chosen_for]
        folders = [_output_dir(config, each) for config in configs for each in chosen_for]
        return choose_engine_of(own[name], models, folders)

    alone = [each for each in candidates if own[each.name].engine != "auto" or own[each.name].endpoint]
    together = [each for each in candidates if each not in alone]
    found = {each.name: choose(each.name, each) for each in alone}
    for place, candidate in enumerate(together):
        if place == 0 or candidate.options:  # which may be for one engine only
            choice = choose(candidate.name, *together)
            found |= dict.fromkeys((each.name for each in together), choice)
            if choice.engine != "vllm":
                break
    for candidate in together:
        possible, option = own[candidate.name].possible_engines()
        if (engine := found[candidate.name].engine) not in possible:
            raise OptionError(
                "models",
                f"{candidate.name}: --{option} is for --engine {' and '.join(possible)}, and the others are "
                f"answered by {engine}",
                f"name the engine of each, as in {candidate.name}=MODEL@engine={possible[0]}",
            )
    return found


@contextlib.contextmanager
def _own_mistakes(candidate: Candidate) -> Iterator[None]:
    """Say of a mistake in the options of one model that it is one of these."""
    try:
        yield
    except OptionError as error:
        if error.option not in candidate.options:
            raise
        raise OptionError("models", f"{candidate.name}: {error}") from error


def _infer_config(config: BenchmarkConfig, candidate: Candidate) -> InferConfig:
    options = shared_options(config, InferConfig)
    primary = [name for name in _metric_names(config, None) if name != JUDGE][:1]
    options |= {
        "model_id": candidate.model_id,
        "adapter": candidate.adapter,
        "verify_adapter": config.verify_adapter and candidate.adapter is not None,
        "engine": config.answering_engine,
        "output_dir": _output_dir(config, candidate),
        "output_format": "parquet",
        "metric": primary[0] if primary else None,
        "push_to_hub": None,
        "hub_private_repo": None,
        "report_to": "none",
    }
    return InferConfig(**known_options(InferConfig, options, config.answering_engine))


def _output_dir(config: BenchmarkConfig, candidate: Candidate) -> str:
    return f"{config.output_dir}/{candidate.name}"


def _metric_names(config: BenchmarkConfig, own: str | None) -> tuple[str, ...]:
    """Return the metrics asked for; `own` is the dataset's, which decides where none was asked for."""
    if config.metrics == "none":
        return ()
    judged = (JUDGE,) if config.judge else ()
    if config.metrics is None:
        return tuple(dict.fromkeys([own, *DEFAULT_METRICS, *judged])) if own else ()
    names = tuple(dict.fromkeys([*(name.strip() for name in config.metrics.split(",")), *judged]))
    known = (*metrics.METRICS, metrics.BLEU, *judged)
    for name in names:
        if name not in known:
            raise OptionError("metrics", f": {name!r} is unknown", f"known: {', '.join(known)}")
    if names[0] == metrics.BLEU:
        raise OptionError("metrics", ": the first one decides, and BLEU says nothing of single answers")
    if names[0] == JUDGE and config.baseline:
        raise OptionError(
            "baseline", "compares by a rule, and judge decides", "name a rule first in --metrics"
        )
    return names


def _check_judge(judge: JudgeConfig) -> None:
    """See that the judge is there before anything starts."""
    try:
        check_served(judge.endpoint, judge.model_id, judge.key())
    except EndpointError as error:
        raise OptionError("judge", f": {error}") from error
