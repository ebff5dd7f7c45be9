"""`jobs/infer.py` over a file of OpenAI batch requests, killed midway."""

from __future__ import annotations

from pathlib import Path

from helpers.batches import NUM_REQUESTS, check_output, write_batch
from helpers.processes import descendants, finished, is_alive, parquet_rows, run, start, wait_until
from vlmray.config import InferConfig
from vlmray.dataset.rows import read_rows
from vlmray.engines import build_engine
from vlmray.inference.plan import plan_inference
from vlmray.inference.stages import generate_rows, prepare_rows


def answer_at_once(batch: Path) -> list[str]:
    """What the model answers to the requests that can be asked, without Ray and in one call."""
    run = plan_inference(
        InferConfig(
            dataset_name=str(batch),
            sample_slices="[:]",
            model_id="tiny-random",
            max_new_tokens=4,
            output_dir=str(batch.parent / "unused"),
            dry_run=True,
        )
    )
    rows = prepare_rows(read_rows(run.source, run.spec, "test", run.selected), run.task, keep_images=False)
    engine = build_engine(engine="transformers", model_id="tiny-random")
    try:
        answered = generate_rows(rows, engine, run.task)
    finally:
        engine.close()
    return [row["prediction"] or "" for row in answered if row["error"] is None]


def test_a_killed_batch_resumes_to_a_line_for_each_request(tmp_path: Path) -> None:
    batch, out = write_batch(tmp_path / "batch.jsonl", "tiny-random"), tmp_path / "out"
    options = [
        "--dataset_name", batch, "--sample_slices", "[:]", "--model_id", "tiny-random",
        "--max_new_tokens", "4", "--batch_size", "4", "--output_dir", out,
    ]  # fmt: skip
    job = start(*options)
    wait_until(lambda: len(finished(out)) >= 40 or job.poll() is not None)
    replicas = descendants("_Replica", job.pid)
    job.kill()
    job.communicate(timeout=30)
    wait_until(lambda: not any(map(is_alive, replicas)))
    kept = finished(out)
    assert 40 <= len(kept) < NUM_REQUESTS
    assert not (out / "batch_output.jsonl").exists()
    times = {name: (out / f"{name}_out.json").stat().st_mtime_ns for name in kept}
    again = run(*options)
    assert again.returncode == 0, again.stderr
    answers = check_output(out / "batch_output.jsonl")
    rows = parquet_rows(out)
    assert len(rows) == NUM_REQUESTS
    repeated = {name for name in kept if (out / f"{name}_out.json").stat().st_mtime_ns != times[name]}
    assert repeated == {name for name in kept if rows[name]["error"]}
    assert answers == answer_at_once(batch)
    assert len(set(answers)) > 10  # so that one in another's place would show
