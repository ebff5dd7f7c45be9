"""Options of the job that compares."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmray.config.common import NAME, DatasetConfig, ReplicaConfig, RunConfig, check_at_least, check_verifies
from vlmray.config.endpoint import EndpointConfig
from vlmray.config.marks import mark, option
from vlmray.config.parsing import build_config
from vlmray.config.passing import PushConfig, TrackingConfig
from vlmray.config.sampling import ConfidenceConfig, ReuseConfig, SamplingConfig
from vlmray.errors import OptionError

_OPTION = re.compile(r"@(?=[a-z_]+=)")
"""What stands before an option of a model; other @ are part of its name."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model, alone or with an adapter, under the name that a comparison gives it."""

    name: str
    model_id: str
    adapter: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those that are its own, as they were written."""

    def __str__(self) -> str:
        """Say what stands behind the name."""
        model = self.model_id + (f" + {self.adapter}" if self.adapter else "")
        return ", ".join([model, *(f"{name}={value}" for name, value in self.options.items())])


_OF_SCORES = ("baseline", "target_accuracy", "judge", "plan", "margin", "push_to_hub", "answer_cache")
"""Options that mean nothing where speed alone is measured."""

OWN_OPTIONS = frozenset(
    each.name for cls in (SamplingConfig, EndpointConfig, ReplicaConfig) for each in dataclasses.fields(cls)
) - {"verify_adapter"} | {"prompt_template", "system_prompt", "max_new_tokens", "batch_size"}
"""Options that a model may have for itself: what loads it, what it is asked, and how it draws answers."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(
    TrackingConfig,
    PushConfig,
    RunConfig,
    ConfidenceConfig,
    ReuseConfig,
    EndpointConfig,
    ReplicaConfig,
    DatasetConfig,
):
    """Compare models and adapters on a visual-question dataset: how right they are, and how fast."""

    models: str = field(metadata=mark("result", holds_json=True))
    """What is compared: 'base=MODEL,tuned=MODEL+ADAPTER,small=MODEL@max_pixels=200704'; the others are
    compared with the first. With --endpoint: the names it serves them by. After @: options of this model
    alone. As JSON, or a mapping in the YAML file: '{"base": "MODEL", "tuned": {"model_id": "MODEL",
    "adapter": "ADAPTER", "prompt_template": "{question}, in short"}}'."""

    datasets: str | None = option(None, affects="run")
    """JSON file of several datasets, in the place of --dataset_name: a list of mappings, each with name,
    dataset_name and what else differs of dataset_split, sample_slices, metrics, margin and others."""

    dataset_split: str = option("test", affects="result")
    """Split to answer."""

    sample_slices: str = option("[:]", affects="rows")
    """Rows to answer, as Python slices: '[:100]', '[:]', '[::10]'."""

    metrics: str | None = option(None, affects="run")
    """Metrics of the answers, the first one decides: 'relaxed_accuracy,anls,rouge,bleu'; none: measure speed
    alone; default: the dataset's own, exact_match, anls and token_f1."""

    judge: str | None = option(None, affects="run")
    """JSON file of a model that grades the answers: its endpoint and model_id, and what else differs of
    prompt_template, scale and others. Adds the metric judge; named first in --metrics, it decides."""

    max_new_tokens: int = option(64, affects="result")
    """Tokens to generate per answer, at most."""

    output_dir: str = option("outputs/benchmark", affects="run")
    """Where answers and report go: a local folder. The same command with the same folder goes on."""

    offline: bool = option(False, affects="run")
    """Answer by the batch pipeline instead of a server; speed under load is then not measured."""

    concurrency: str = option("1,8", affects="speed")
    """Requests in flight, for each measurement of speed; the answers are asked for with the largest."""

    request_rate: str | None = option(None, affects="speed")
    """Measure speed at these requests per second, sent at random times, instead of at --concurrency."""

    speed_samples: int = option(64, affects="speed")
    """Requests of each measurement of speed, after those that warm up; 0: do not measure it."""

    price_per_hour: float | None = option(None, affects="run")
    """Price of the machines, in any currency, for the cost of 1,000 samples."""

    margin: float | None = option(None, affects="run")
    """Say also whether each model is shown to be worse than the first by less than so many points of the
    deciding metric."""

    plan: str | None = option(None, affects="run")
    """Ask nothing, but tell from the answers of a finished run how many samples would show so many points of
    difference, and what so many samples would show: 'difference=2' or 'samples=5000', with commas."""

    baseline: str | None = option(None, affects="run")
    """A results.json of an earlier run on the same samples: each model is also compared with the one that
    had its name."""

    batch_size: int = option(16, affects="speed", engines=("transformers", "openai", "fake"))
    """Requests that share a forward pass, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "max_new_tokens", "batch_size")
        check_at_least(self, 0, "speed_samples", "price_per_hour")
        if self.offline and (self.endpoint or self.request_rate):
            raise OptionError("offline", "asks no server", "leave out --endpoint and --request_rate")
        if "://" in self.output_dir:
            raise OptionError("output_dir", f"{self.output_dir} must be a local folder")
        if self.metrics == "none" and (self.offline or not self.speed_samples):
            raise OptionError("metrics", "none leaves nothing to do without a measurement of speed")
        if self.datasets and (self.metrics == "none" or self.baseline):
            raise OptionError(
                "datasets",
                "is about scores",
                "leave out --metrics none and --baseline",
            )
        if self.margin is not None and not 0 < self.margin < 100:
            raise OptionError("margin", f"{self.margin:g} must be points above 0 and below 100")
        self._check_scores()
        candidates = self.candidates()
        has_adapters = any(candidate.adapter for candidate in candidates)
        check_verifies(self, has_adapters=has_adapters, hint="name one in --models as model+adapter")
        for candidate in candidates:
            if candidate.options:
                self.of(candidate)
        self.loads()
        self.planned()

    def _check_scores(self) -> None:
        """Refuse what is about scores or predictions where there are none."""
        of_scores = [name for name in _OF_SCORES if getattr(self, name) is not None]
        if self.metrics == "none" and of_scores:
            raise OptionError(
                of_scores[0], "is about predictions and their scores", "--metrics none has none"
            )
        if self.push_to_hub and self.plan:
            raise OptionError("push_to_hub", "is about predictions", "leave out --plan, which makes none")

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the models, the one that the others are compared with first."""
        found: dict[str, Candidate] = {}
        for candidate in _read_models(self.models):
            if candidate.name in found:
                raise OptionError("models", f": the name {candidate.name!r} is given twice")
            if candidate.adapter and (candidate.options.get("endpoint") or self.endpoint):
                raise OptionError(
                    "models", f"{candidate.name}: a server's models have one name each", "pass name=NAME"
                )
            found[candidate.name] = candidate
        if not found:
            raise OptionError("models", "names none")
        return tuple(found.values())

    def of(self, candidate: Candidate) -> BenchmarkConfig:
        """Return the options of one model: its own in the place of those that are said for all."""
        if not candidate.options:
            return self
        if unknown := sorted(candidate.options.keys() - OWN_OPTIONS):
            raise OptionError(
                "models",
                f"{candidate.name}: {unknown[0]!r} is no option of a single model",
                f"these are: {', '.join(sorted(OWN_OPTIONS))}",
            )
        alone = {candidate.name: {"model_id": candidate.model_id, "adapter": candidate.adapter}}
        verifies = self.verify_adapter and candidate.adapter is not None
        said = {**dataclasses.asdict(self), "models": json.dumps(alone), "verify_adapter": verifies}
        try:
            return build_config(BenchmarkConfig, {**said, **candidate.options})
        except ValueError as error:
            raise OptionError("models", f"{candidate.name}: {error}") from error

    def loads(self) -> tuple[float, ...]:
        """Return the loads to measure speed at: requests per second, or else requests in flight."""
        if self.request_rate is not None:
            return _numbers("request_rate", self.request_rate, float)
        return _numbers("concurrency", self.concurrency, int)

    def planned(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Return the differences (in points) and the numbers of samples that are to be planned for."""
        differences: list[float] = []
        sizes: list[int] = []
        for part in self.plan.split(",") if self.plan else ():
            kind, _, text = (each.strip() for each in part.partition("="))
            if kind == "difference":
                differences += _numbers("plan", text, float)
            elif kind == "samples":
                sizes += (int(number) for number in _numbers("plan", text, int))
            else:
                raise OptionError("plan", f"has {part!r}", "expected difference=POINTS or samples=NUMBER")
        return tuple(differences), tuple(sizes)

    @property
    def answering_engine(self) -> str:
        """The engine that answers; an option that it does not know is refused."""
        return "openai" if self.endpoint else self.engine

    @property
    def most_in_flight(self) -> int:
        """Requests in flight while the answers are asked for."""
        return int(max(_numbers("concurrency", self.concurrency, int)))


def _numbers(name: str, text: str, kind: type[int] | type[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise OptionError(name, f"must be numbers above 0 with commas between them, got {text!r}")
    return numbers


def _read_models(text: str) -> Iterator[Candidate]:
    """Yield the models of `--models`, written short or as JSON."""
    if text.lstrip().startswith("{"):
        for name, said in _read_object(text):
            own: dict[str, Any] = {**said} if isinstance(said, dict) else {"model_id": said}
            model_id, adapter = own.pop("model_id", None), own.pop("adapter", None)
            if not isinstance(model_id, str) or not isinstance(adapter, str | None):
                expected = (
                    'expected {"NAME": "MODEL"} or {"NAME": {"model_id": "MODEL", "adapter": "FOLDER"}}'
                )
                raise OptionError("models", f"has {name!r}: {said!r}", expected)
            yield _candidate(name, model_id, adapter, own, name)
        return
    for entry in text.split(","):
        name, _, said = (part.strip() for part in entry.partition("="))
        model, *pairs = _OPTION.split(said)
        model_id, _, adapter = (part.strip() for part in model.partition("+"))
        options = dict(pair.split("=", 1) for pair in pairs)
        if len(options) < len(pairs):
            raise OptionError("models", f"has {entry!r}, with an option given twice")
        yield _candidate(name, model_id, adapter or None, options, entry)


def _candidate(
    name: str, model_id: str, adapter: str | None, options: Mapping[str, Any], entry: str
) -> Candidate:
    if not NAME.fullmatch(name) or not model_id:
        raise OptionError(
            "models",
            f"has {entry!r}",
            "expected name=model or name=model+adapter, with commas between them, names of letters, digits "
            "and .-_, and options as @max_pixels=200704; what holds commas or @ is written as JSON",
        )
    return Candidate(name, model_id, adapter, options)


def _read_object(text: str) -> list[tuple[str, Any]]:
    """Return names and values of a JSON object, in which names may be repeated."""
    found: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found[:] = pairs  # the outermost object is read last
        return dict(pairs)

    try:
        json.loads(text, object_pairs_hook=keep)
    except ValueError as error:
        raise OptionError("models", f"is no JSON object: {error}") from error
    return found
