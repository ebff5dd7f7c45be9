"""A cache of answers over runs: whole, of the right model, and no run's undoing."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vlmray.config import EndpointConfig, InferConfig
from vlmray.errors import OptionError
from vlmray.inference.plan import plan_inference
from vlmray.inference.reuse import facts
from vlmray.inference.reuse.answers import Answers, Found
from vlmray.inference.reuse.facts import model_facts
from vlmray.inference.reuse.folder import Answer, AnswerFolder, open_cache
from vlmray.models.source import ModelSource

FACTS = {"model_fingerprint": "0123"}


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def answer(number: int, text: str = "Grüße, 3") -> Answer:
    return Answer(f"<image> {number}?", text, 400, 3, 0.1 + 0.2 * number, 5e-324, None, "stop")


def some(*numbers: int) -> dict[bytes, Answer]:
    return {key(number): answer(number) for number in numbers}


def cache(path: Path) -> AnswerFolder:
    return AnswerFolder.open(str(path), {"job": "answer_cache"}).of_model(FACTS)


def parts(path: Path) -> list[Path]:
    return sorted(path.glob("*/part-*.parquet"))


def found(answers: Answers, *numbers: int) -> dict[bytes, Answer]:
    return {name: each.answer for name, each in answers.find(map(key, numbers)).items()}


# What is kept


@pytest.mark.parametrize("most_chars", [0, 10**9], ids=["nothing held", "all held"])
def test_another_run_finds_what_one_has_kept(most_chars: int, tmp_path: Path) -> None:
    one = Answers(cache(tmp_path), most_chars)
    one.keep(some(1, 2, 3))
    one.keep(some(3, 4))
    assert one.find(map(key, (1, 4, 9))) == {key(n): Found(answer(n), is_of_run=True) for n in (1, 4)}
    other = Answers(cache(tmp_path), most_chars)
    assert other.find(map(key, (2, 3, 9))) == {key(n): Found(answer(n), is_of_run=False) for n in (2, 3)}
    other.keep(some(2))
    assert len(parts(tmp_path)) == 2  # what is there is not written again


def test_memory_is_bounded_and_what_was_asked_for_stays(tmp_path: Path) -> None:
    answers = Answers(most_chars=3 * 600)
    answers.keep(some(1, 2, 3))
    assert found(answers, 1) == some(1)
    answers.keep(some(4))
    assert found(answers, 1, 2, 3, 4) == some(1, 3, 4)


def test_two_runs_at_a_time_lose_nothing(tmp_path: Path) -> None:
    def run(first: int) -> None:
        answers = Answers(cache(tmp_path))
        for number in range(first, first + 40, 4):
            answers.keep(some(*range(number, number + 6)))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, [0, 20, 20, 40]))
    answers = Answers(cache(tmp_path))
    assert found(answers, *range(90)) == some(*range(82))
    assert answers.problems() is None
    assert not list(tmp_path.rglob(".*"))


def _cut(data: bytes) -> bytes:
    return data[:-40]


def _flip(data: bytes) -> bytes:
    """Change a byte of an answer, which only its checksum tells."""
    at = data.index(answer(1).prediction.encode())  # type: ignore[union-attr]
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda data: b"", lambda data: b"no Parquet at all"])
def test_what_is_damaged_is_asked_for_again_and_told(damage: Any, tmp_path: Path) -> None:
    writer = Answers(cache(tmp_path))
    writer.keep(some(1, 2))
    (bad,) = parts(tmp_path)
    writer.keep(some(3, 4))
    bad.write_bytes(damage(bad.read_bytes()))
    answers = Answers(cache(tmp_path))
    assert found(answers, 1, 2, 3, 4) == some(3, 4)
    problem = answers.problems() or ""
    assert problem.startswith(f"--answer_cache: {bad} is damaged (")
    assert problem.endswith("; its answers are asked for again")
    assert found(answers, 1) == {}
    assert answers.problems() == problem  # it is not read over and over
    answers.keep(some(1, 2))
    assert found(Answers(cache(tmp_path)), 1, 2, 3, 4) == some(1, 2, 3, 4)


def test_a_part_that_is_deleted_meanwhile_is_asked_for_again(tmp_path: Path) -> None:
    Answers(cache(tmp_path)).keep(some(1))
    answers = Answers(cache(tmp_path))
    parts(tmp_path)[0].unlink()
    assert found(answers, 1) == {}
    assert (answers.problems() or "").endswith("; its answers are asked for again")


def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("Connection reset by peer")

    answers = Answers(cache(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(AnswerFolder, "write_bytes", fail)
        answers.keep(some(1))
        answers.keep(some(2))
    assert found(answers, 1, 2) == some(1, 2)
    problem = "--answer_cache: answers are not kept: Connection reset by peer (and 1 more of the kind)"
    assert answers.problems() == problem
    assert parts(tmp_path) == []


# Of which model


def config(folder: Path, **options: Any) -> InferConfig:
    given = {
        "engine": "transformers", "model_id": "tiny-random", "dataset_name": "charts?num_rows=4",
        "sample_slices": "[:]", "output_dir": str(folder / "out"), "answer_cache": str(folder / "cache"),
    }  # fmt: skip
    return InferConfig(**{**given, **options})


def test_what_loads_a_model_tells_it_from_others_and_nothing_else_does(tmp_path: Path) -> None:
    asked = config(tmp_path)
    model = ModelSource.open("tiny-random")
    mine = model_facts(asked, model, device="CPU")

    def changed(name: str) -> dict[str, Any]:
        other = copy.copy(asked)
        object.__setattr__(other, name, "other")
        return model_facts(other, model, device="CPU")

    loading = {
        field.name for field in dataclasses.fields(EndpointConfig) if field.metadata["affects"] == "result"
    } - {"chat_template"}  # by its text
    names = {field.name for field in dataclasses.fields(InferConfig)} - {"chat_template"}
    assert {name for name in names if changed(name) != mine} == loading
    assert {"dtype", "quantization", "max_pixels", "engine", "endpoint"} <= loading
    assert json.loads(json.dumps(mine)) == mine


def test_weights_adapter_template_device_and_versions_tell_a_model_from_others(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "template").write_text("{{ messages }}")
    plain = config(tmp_path)
    told = config(tmp_path, chat_template=str(tmp_path / "template"))
    tiny, adapted = ModelSource.open("tiny-random"), ModelSource.open(str(tiny_model), str(tiny_adapter))
    found = [
        model_facts(plain, tiny, device="CPU"), model_facts(plain, tiny, device="GPU"),
        model_facts(plain, tiny, device="CPU", served=True), model_facts(told, tiny, device="CPU"),
        model_facts(plain, adapted, device="CPU"),
        model_facts(plain, ModelSource(name="other", path="other"), device="CPU"),
    ]  # fmt: skip
    monkeypatch.setattr(facts, "versions", lambda engine: {"vlmray": "9", "torch": "9", "ray": "9"})
    found.append(model_facts(plain, tiny, device="CPU"))
    folders = {
        AnswerFolder.open(str(tmp_path / "c"), {"job": "answer_cache"}).of_model(each).model for each in found
    }
    assert len(folders) == len(found)
    assert len(list((tmp_path / "c").glob("*/model.json"))) == len(found)


def test_an_answer_of_one_model_is_none_of_another(tmp_path: Path) -> None:
    Answers(cache(tmp_path)).keep(some(1))
    other = AnswerFolder.open(str(tmp_path), {"job": "answer_cache"}).of_model({"model_fingerprint": "4567"})
    assert found(Answers(other), 1) == {}


# Before anything starts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_cache": "out"}, "out and --output_dir out lie in one another; choose another folder"),
        ({"answer_cache": "out/cache"}, "out/cache and --output_dir out lie in one another"),
        (
            {"answer_cache": "s3://b/c", "output_dir": "s3://b/c/d"},
            "s3://b/c and --output_dir s3://b/c/d lie",
        ),
        ({"answer_cache": "data/c", "dataset_name": "data"}, "data/c and --dataset_name data lie in one ano"),
        ({"answer_cache": "file/c"}, "file/c cannot be written: "),
        ({"answer_cache": "x3://b/c"}, "x3://b/c cannot be written: "),
        ({"answer_cache": "run"}, r"run holds another run \(job was 'infer', now 'answer_cache'\); choose"),
        ({"temperature": 0.5}, "keeps greedy answers, and --temperature 0.5 draws others each time; leave"),
        (
            {"engine": "fake", "model_id": "fake"},
            "is for --engine transformers and vllm and openai; --engine",
        ),
    ],
)
def test_a_folder_that_will_not_do_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "run" / "options.json").write_text('{"model_id": "other"}')
    with pytest.raises(ValueError, match=f"^--answer_cache {message}"):
        plan_inference(config(Path(), **options))


def test_a_dry_run_makes_no_cache(tmp_path: Path) -> None:
    assert plan_inference(config(tmp_path, dry_run=True)).cache is not None
    assert list(tmp_path.iterdir()) == []
    run = plan_inference(config(tmp_path))
    assert run.cache == open_cache(run.config)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["options.json"]
    with pytest.raises(OptionError, match=r"^--answer_cache is empty"):
        config(tmp_path, answer_cache="")
