"""Options of the job that compares."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from vlmray.config.common import NAME, QuestionsConfig, check_at_least, parse_replica_range
from vlmray.errors import OptionError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model, alone or with an adapter, under the name that a comparison gives it."""

    name: str
    model_id: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig(QuestionsConfig):
    """Compare models and adapters on a visual-question dataset: how right they are, and how fast."""

    # Not options here: --models and --metrics say it.
    model_id: str = dataclasses.field(default="several", init=False)
    metric: str | None = dataclasses.field(default=None, init=False)

    models: str
    """What is compared: 'base=MODEL,tuned=MODEL+ADAPTER'; the others are compared with the first. With
    --endpoint: the names it serves them by."""

    dataset_split: str = "test"
    """Split to answer."""

    sample_slices: str = "[:]"
    """Rows to answer, as Python slices: '[:100]', '[:]', '[::10]'."""

    metrics: str | None = None
    """Metrics of the answers, the first one decides: 'relaxed_accuracy,anls,rouge,bleu'; none: measure speed
    alone; default: the dataset's own, exact_match, anls and token_f1."""

    max_new_tokens: int = 64
    """Tokens to generate per answer, at most."""

    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""

    output_dir: str = "outputs/benchmark"
    """Where answers and report go: a local folder. The same command with the same folder goes on."""

    endpoint: str | None = None
    """Ask the OpenAI-compatible server at this URL instead of starting one. Its key: VLMRAY_API_KEY."""

    offline: bool = False
    """Answer by the batch pipeline instead of a server; speed under load is then not measured."""

    concurrency: str = "1,8"
    """Requests in flight, for each measurement of speed; the answers are asked for with the largest."""

    request_rate: str | None = None
    """Measure speed at these requests per second, sent at random times, instead of at --concurrency."""

    speed_samples: int = 64
    """Requests of each measurement of speed, after those that warm up; 0: do not measure it."""

    price_per_hour: float | None = None
    """Price of the machines, in any currency, for the cost of 1,000 samples."""

    baseline: str | None = None
    """A results.json of an earlier run on the same samples: each model is also compared with the one that
    had its name."""

    engine: Literal["transformers", "fake"] = "transformers"
    """What generates: transformers, or a scripted stand-in for tests."""

    batch_size: int = 16
    """Requests that share a forward pass, at most."""

    num_replicas: str | None = None
    """Model replicas: N, or MIN,MAX to scale with the load; default: one per GPU, or one without GPUs."""

    gpus_per_replica: float | None = None
    """GPUs of each replica (0.5: half of one, memory too); default: 1 where the cluster has GPUs, else 0."""

    def __post_init__(self) -> None:
        QuestionsConfig.__post_init__(self)
        check_at_least(self, 1, "max_new_tokens", "batch_size")
        check_at_least(self, 0, "temperature", "speed_samples", "price_per_hour", "gpus_per_replica")
        if self.offline and (self.endpoint or self.request_rate):
            raise OptionError("offline", "asks no server", "leave out --endpoint and --request_rate")
        if "://" in self.output_dir:
            raise OptionError("output_dir", f"{self.output_dir} must be a local folder")
        if self.metrics == "none" and (self.offline or not self.speed_samples):
            raise OptionError("metrics", "none leaves nothing to do without a measurement of speed")
        if self.metrics == "none" and self.baseline:
            raise OptionError("baseline", "compares scores", "--metrics none has none")
        self.candidates()
        self.loads()
        parse_replica_range(self.num_replicas, least=1)

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the models, the one that the others are compared with first."""
        found: dict[str, Candidate] = {}
        for entry in self.models.split(","):
            name, _, model = (part.strip() for part in entry.partition("="))
            if not NAME.fullmatch(name) or not model:
                raise OptionError(
                    "models",
                    f"has {entry!r}",
                    "expected name=model or name=model+adapter, with commas between them and names of "
                    "letters, digits and .-_",
                )
            if name in found:
                raise OptionError("models", f": the name {name!r} is given twice")
            model_id, _, adapter = model.partition("+")
            if self.endpoint and adapter:
                raise OptionError(
                    "models", f"{entry}: a server's models have one name each", "pass name=NAME"
                )
            found[name] = Candidate(name, model_id, adapter or None)
        return tuple(found.values())

    def loads(self) -> tuple[float, ...]:
        """Return the loads to measure speed at: requests per second, or else requests in flight."""
        if self.request_rate is not None:
            return _numbers("request_rate", self.request_rate, float)
        return _numbers("concurrency", self.concurrency, int)

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
