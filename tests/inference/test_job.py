"""The pipeline on a real Ray of two CPUs: same answers however the work is cut, nothing lost or repeated."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmray import cluster
from vlmray.builtin.charts import ChartDataset, parse_charts_name
from vlmray.cli import run_job
from vlmray.config import InferConfig
from vlmray.dataset.prompts import format_qwen_vl_messages
from vlmray.images.decoding import decode_image
from vlmray.inference.job import run_inference
from vlmray.inference.pipeline import iter_finished
from vlmray.inference.plan import InferenceError, InferenceRun, plan_inference
from vlmray.inference.summary import Summary
from vlmray.inference.timeline import STAGES
from vlmray.models.loading import generate_text_from_sample, load_qwen_vl_model_and_processor
from vlmray.schema import GenerationRequest

pytestmark = pytest.mark.usefixtures("two_cpus")

CHARTS = "charts?num_rows=48&seed=3"


def infer(output_dir: Path, **options: Any) -> Summary:
    return run_inference(planned(output_dir, **options))


def planned(output_dir: Path, **options: Any) -> InferenceRun:
    defaults = {
        "engine": "fake",
        "model_id": "fake",
        "dataset_name": CHARTS,
        "sample_slices": "[:]",
        "output_dir": str(output_dir),
        "batch_size": 4,
    }
    return plan_inference(InferConfig(**{**defaults, **options}))


def predictions(output_dir: Path) -> dict[str, Any]:
    rows = pq.read_table(output_dir / "predictions").to_pylist()
    assert max(Counter(row["sample_id"] for row in rows).values()) == 1
    return {row["sample_id"]: row["prediction"] for row in rows}


def generated(log: Path) -> Counter[str]:
    return Counter(log.read_text().split())


@pytest.fixture(scope="module")
def undisturbed(two_cpus: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one uninterrupted run."""
    folder = tmp_path_factory.mktemp("expected")
    infer(folder)
    return folder


@pytest.fixture(scope="module")
def expected(undisturbed: Path) -> dict[str, Any]:
    """What one uninterrupted run answers."""
    return predictions(undisturbed)


def told(output_dir: Path) -> dict[str, Any]:
    """What a run says of itself, but how fast it was."""
    summary = json.loads((output_dir / "run.json").read_text())["summary"]
    timed = ("elapsed_s", "samples_per_s", "tokens_per_s", "usage")
    return {name: value for name, value in summary.items() if name not in timed}


def test_files_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    summary = infer(tmp_path)
    rows = {row["sample_id"]: row for row in pq.read_table(tmp_path / "predictions").to_pylist()}
    assert (summary.num_rows, summary.num_answered, summary.num_failed) == (48, 48, 0)
    assert sorted(rows) == [f"test-{index:06d}" for index in range(48)]
    for sample_id, row in rows.items():
        assert json.loads((tmp_path / f"{sample_id}_out.json").read_text()) == row
        asked = json.loads((tmp_path / f"{sample_id}_in.json").read_text())
        assert asked["question"] in asked["messages"][-1]["content"][-1]["text"]
        assert (tmp_path / asked["image"]).read_bytes().startswith(b"\xff\xd8\xff")  # JPEG
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert manifest["summary"]["num_answered"] == 48
    assert list(manifest["stages_s"]) == list(STAGES)
    assert all(seconds > 0 for seconds in manifest["stages_s"].values())
    assert 0 < manifest["overlap"]["model_busy_share"] <= 1
    assert 0 <= manifest["overlap"]["cpu_hidden_share"] <= 1
    page = (tmp_path / "report.html").read_text()
    assert "<title>fake on Built-in charts, 48 rows</title>" in page
    assert page.count("charts?num_<wbr>rows=48&amp;seed=3") == 1  # exact, among the options alone
    assert (manifest["summary"]["usage"]["energy_kwh"], "kWh" in page) == (None, False)  # there is no GPU


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 16},
        {"num_replicas": "2"},
        {"num_replicas": "1,2"},
        {"sample_slices": "[::-1]"},
        {"sample_slices": "[1::2],[::2]"},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_how_the_work_is_cut(
    tmp_path: Path, undisturbed: Path, expected: dict[str, Any], options: dict[str, Any]
) -> None:
    infer(tmp_path, **options)
    assert predictions(tmp_path) == expected
    assert told(tmp_path) == told(undisturbed)


def test_a_replica_works_on_one_chunk_at_a_time(tmp_path: Path) -> None:
    """Ray calls it with two."""
    run = plan_inference(
        InferConfig(
            engine="fake",
            model_id="fake?latency_s=0.01",
            dataset_name=CHARTS,
            sample_slices="[:]",
            output_dir=str(tmp_path),
            batch_size=4,
            num_replicas="1",
        )
    )
    chunks = list(iter_finished(run, cluster.plan_replicas((1, 1), None)))
    assert sum(chunk.num_rows for chunk in chunks) == 48
    turns = sorted(
        (span.started_s, span.ended_s) for chunk in chunks for span in chunk.spans if span.stage == "generate"
    )
    assert len(turns) == len(chunks) > 3
    assert all(before[1] <= after[0] + 1e-3 for before, after in itertools.pairwise(turns))


@pytest.mark.parametrize("output_format", ["files", "parquet", "both"])
def test_a_second_run_generates_only_what_is_missing(tmp_path: Path, output_format: str) -> None:
    log = tmp_path / "log"
    options = {"model_id": f"fake?log={log}", "output_format": output_format}
    infer(tmp_path / "out", sample_slices="[:20]", **options)
    summary = infer(
        tmp_path / "out", sample_slices="[10:40:3],[:4]", batch_size=3, num_replicas="2", **options
    )
    assert summary.num_rows == 14
    assert summary.num_resumed == 8
    infer(tmp_path / "out", sample_slices="[:]", **options)
    assert set(generated(log).values()) == {1}
    assert len(generated(log)) == 48
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Only the work of this run is shown: 26 rows are from an earlier one." in page


def test_a_finished_folder_needs_no_ray_and_no_model(tmp_path: Path) -> None:
    log = tmp_path / "log"
    infer(tmp_path / "out", model_id=f"fake?log={log}")
    before = (tmp_path / "out" / "test-000000_out.json").stat().st_mtime_ns
    assert infer(tmp_path / "out", model_id=f"fake?log={log}").num_resumed == 48
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (manifest["stages_s"], manifest["overlap"]) == ({}, None)
    assert set(generated(log).values()) == {1}
    assert (tmp_path / "out" / "test-000000_out.json").stat().st_mtime_ns == before


def test_another_model_or_prompt_is_refused_in_the_same_folder(tmp_path: Path) -> None:
    infer(tmp_path, sample_slices="[:2]")
    other = {"sample_slices": "[:2]", "model_id": "fake?answer=7", "system_prompt": "Be brief."}
    with pytest.raises(
        ValueError, match=r"model_id was 'fake', now 'fake\?answer=7'.*system_prompt.*--overwrite"
    ):
        infer(tmp_path, **other)
    assert "7" not in predictions(tmp_path).values()
    infer(tmp_path, overwrite=True, **other)
    assert set(predictions(tmp_path).values()) == {"7"}


def test_failed_rows_are_recorded_and_tried_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = {"model_id": f"fake?error_every=6&log={log}"}
    summary = infer(tmp_path / "out", **options)
    assert (summary.num_answered, summary.num_failed) == (40, 8)
    assert "error_every" in json.loads((tmp_path / "out" / "test-000006_out.json").read_text())["error"]
    infer(tmp_path / "out", **options)
    again = {name for name, times in generated(log).items() if times == 2}
    assert again == {f"test-{index:06d}" for index in range(0, 48, 6)}
    assert len(predictions(tmp_path / "out")) == 48


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """40 rows of ChartQA's columns, five of them with images that are not images."""
    charts = ChartDataset(parse_charts_name("charts?num_rows=40&questions_per_image=1"), "test")
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": row["image"], "path": None}, "query": row["question"], "label": row["answers"],
         "human_or_machine": 0}
        for row in charts
    ]  # fmt: skip
    whole = rows[19]["image"]["bytes"]
    for index, data in {3: b"", 11: b"no image", 19: whole[:200], 20: None, 39: b"\x89PNG"}.items():
        rows[index]["image"] = {"bytes": data, "path": None}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    return tmp_path / "test.parquet"


def test_broken_images_become_error_records(
    tmp_path: Path, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--engine fake --model_id fake --dataset_name {broken} --sample_slices [:]".split()
    with pytest.raises(SystemExit) as stopped:
        run_job("infer", [*options, "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 0
    assert "40 rows in = 35 answered + 5 failed" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out" / "predictions").to_pylist()
    failed = {row["sample_id"]: row["error"] for row in rows if row["error"]}
    assert sorted(failed) == [f"test-{index:06d}" for index in (3, 11, 19, 20, 39)]
    assert all("image" in error for error in failed.values())

    strict = ["--output_dir", str(tmp_path / "strict"), "--max_errors", "0", "--batch_size", "1"]
    with pytest.raises(SystemExit) as stopped:
        run_job("infer", [*options, *strict])
    assert stopped.value.code == 1
    assert "error: 1 rows failed, --max_errors allows 0" in capsys.readouterr().err
    assert list((tmp_path / "strict").glob("*_out.json"))


def test_max_errors_stops_and_keeps_what_is_finished(tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match="--max_errors allows 0"):
        infer(tmp_path, model_id="fake?error_every=40", max_errors=0)
    assert not (tmp_path / "run.json").exists()
    assert list(tmp_path.glob("*_out.json"))


def test_a_replica_that_dies_loses_and_repeats_nothing(tmp_path: Path, expected: dict[str, Any]) -> None:
    log = tmp_path / "log"
    infer(tmp_path / "out", model_id=f"fake?crash_on=000021&log={log}")
    assert Path(f"{log}.crashed").exists()
    assert predictions(tmp_path / "out") == expected


def test_rows_that_always_kill_their_replica_become_errors(tmp_path: Path, expected: dict[str, Any]) -> None:
    """Two in one chunk; the others of it are answered once more at most, and those alone are not."""
    log, poisonous = tmp_path / "log", ["test-000018", "test-000021"]
    model_id = f"fake?crash_on=000018|000021&crash_every_time=1&log={log}"
    summary = infer(tmp_path / "out", model_id=model_id, sample_slices="[16:40]")
    assert (summary.num_answered, summary.num_failed) == (22, 2)
    rows = {row["sample_id"]: row for row in pq.read_table(tmp_path / "out" / "predictions").to_pylist()}
    for name in poisonous:
        assert rows[name]["error"] == "the replica died 3 times while answering it"
        assert rows.pop(name)["finish_reason"] == "error"
    assert {name: row["prediction"] for name, row in rows.items()} == {name: expected[name] for name in rows}
    assert generated(log).keys() == rows.keys()
    assert max(generated(log).values()) <= 2
    assert list(planned(tmp_path / "out", model_id=model_id, sample_slices="[16:40]").pending) == [18, 21]


def test_a_model_that_does_not_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match="told to fail on loading"):
        infer(tmp_path, model_id="fake?fail_load=1")


def test_more_gpus_than_the_cluster_has_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--gpus_per_replica 1 .*the cluster has 0"):
        infer(tmp_path, gpus_per_replica=1)


def test_three_replicas_leave_cpus_for_the_other_stages(tmp_path: Path, expected: dict[str, Any]) -> None:
    infer(tmp_path, num_replicas="3", batch_size=2)
    assert predictions(tmp_path) == expected


def test_uris_are_read_and_written(tmp_path: Path) -> None:
    rows = [dict(row) for row in ChartDataset(parse_charts_name(CHARTS), "test")]
    data = tmp_path / "data"
    data.mkdir()
    for number, start in enumerate((0, 30)):
        table = pa.Table.from_pylist(rows[start : start + 30])
        pq.write_table(table, data / f"test-{number:05d}.parquet", row_group_size=7)
    uri = (tmp_path / "out").as_uri()
    summary = run_inference(
        plan_inference(
            InferConfig(
                engine="fake",
                model_id="fake",
                dataset_name=data.as_uri(),
                sample_slices="[:]",
                output_dir=uri,
            )
        )
    )
    assert summary.num_answered == 48
    assert len(predictions(tmp_path / "out")) == 48


def test_real_model_answers_as_it_does_alone(tmp_path: Path, tiny_model: Path) -> None:
    """Ray, batches and left padding change nothing: each text is that of a plain `generate` of its row."""
    infer(tmp_path, engine="transformers", model_id=str(tiny_model), sample_slices="[:12]", max_new_tokens=8)
    model, processor = load_qwen_vl_model_and_processor(str(tiny_model), dtype="float32")
    charts = ChartDataset(parse_charts_name(CHARTS), "test")
    for index, (_, text) in enumerate(sorted(predictions(tmp_path).items())):
        question = format_qwen_vl_messages(charts[index]["question"])
        request = GenerationRequest(
            request_id="alone", messages=question, images=[decode_image(charts[index]["image"])]
        )
        assert text == generate_text_from_sample(model, processor, request, max_new_tokens=8)[0]
