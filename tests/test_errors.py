"""Errors that users see."""

from __future__ import annotations

import pickle

import pytest

from vlmray.errors import OptionError, RunError, mistake_in, one_line


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OptionError("seed", "must be at least 0, got -1"), "--seed must be at least 0, got -1"),
        (OptionError("optim", "'x' is unknown", "known: muon"), "--optim 'x' is unknown; known: muon"),
        (OptionError("metrics", ": 'x' is unknown"), "--metrics: 'x' is unknown"),
    ],
)
def test_a_mistake_is_a_line_that_begins_with_its_option(error: OptionError, text: str) -> None:
    copy = pickle.loads(pickle.dumps(error))  # from a worker to the driver
    for found in (error, copy):
        assert str(found) == text
        assert (found.option, found.problem, found.hint) == (error.option, error.problem, error.hint)
    assert isinstance(error, ValueError)


def test_what_a_value_is_refused_for_becomes_a_mistake_in_its_option() -> None:
    with pytest.raises(OptionError, match=r"^--port: invalid literal for int") as raised, mistake_in("port"):
        int("x")
    assert isinstance(raised.value.__cause__, ValueError)
    with pytest.raises(KeyError), mistake_in("port"):
        {}["x"]


def test_every_job_fails_by_the_same_error() -> None:
    from vlmray.benchmark import BenchmarkError
    from vlmray.engines.openai.client import EndpointError
    from vlmray.finetune import FinetuneError
    from vlmray.inference import InferenceError

    for kind in (InferenceError, FinetuneError, BenchmarkError, EndpointError):
        assert issubclass(kind, RunError)


def test_one_line_of_an_error_that_says_nothing() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert one_line("x" * 400, 10) == "x" * 10


def test_a_mistake_that_a_worker_finds_is_told_as_one_found_here() -> None:
    from vlmray.cluster import root_cause

    error = OptionError("adapter", "x does not fit the model")
    died = RuntimeError(f"The actor died:\n  File ...\n    raise\nvlmray.errors.OptionError: {error}")
    assert root_cause(error) == root_cause(died) == "--adapter x does not fit the model"
