"""The answers of a batch file, as OpenAI's batch API writes them: same order, same ids.

results, custom_ids of the source -> write_output -> batch_output.jsonl
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

from vlmray.dataset.slices import sample_id
from vlmray.dataset.text.values import with_numbers
from vlmray.engines.logprobs import from_json
from vlmray.inference.plan import InferenceRun
from vlmray.inference.result_folder import BATCH_OUTPUT
from vlmray.protocol.answers import ChatCompletion, Choice, Usage
from vlmray.schema import Row

_ROWS_PER_READ = 64  # their images are in them
_COLUMNS = (
    "sample_id", "prediction", "num_prompt_tokens", "num_completion_tokens", "logprobs", "finish_reason",
    "error",
)  # fmt: skip


def write_output(run: InferenceRun) -> None:
    """Write the line of every selected request."""
    results = {row["sample_id"]: row for table in run.folder.scan(_COLUMNS) for row in table.to_pylist()}
    lines = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in _lines(run, results))
    run.folder.write_bytes(BATCH_OUTPUT, lines.encode("utf-8", "replace"))


def _lines(run: InferenceRun, results: dict[str, Row]) -> Iterator[dict[str, Any]]:
    created = int(time.time())
    for start in range(0, len(run.selected), _ROWS_PER_READ):
        chunk = run.selected[start : start + _ROWS_PER_READ]
        asked = run.source.read(chunk, ["custom_id", "body"])
        for index, row in zip(chunk, asked, strict=True):
            result = results[sample_id(run.config.dataset_split, index)]
            yield to_line(row["custom_id"], row["body"], result, created)


def to_line(custom_id: Any, asked: Any, row: Row, created: int) -> dict[str, Any]:
    """Return what a batch says of one request."""
    asked = asked if isinstance(asked, dict) else {}
    digest = hashlib.sha256(f"{row['sample_id']}\0{custom_id}".encode("utf-8", "replace")).hexdigest()[:24]
    line = {"id": f"batch_req_{digest}", "custom_id": with_numbers(custom_id)}
    if row["error"] is not None:
        code = "invalid_request" if row["num_completion_tokens"] is None else "request_failed"
        return {**line, "response": None, "error": {"code": code, "message": row["error"]}}
    body = ChatCompletion(
        id=f"chatcmpl-{digest}", created=created, model=str(asked.get("model")), usage=_usage(row),
        choices=[
            Choice.of(
                f"chatcmpl-{digest}",
                row["prediction"] or "",
                is_cut=row["finish_reason"] == "length",
                is_call=asked.get("tool_choice") not in (None, "none", "auto"),
                logprobs=from_json(row["logprobs"]) if row["logprobs"] is not None else None,
            )
        ],
    )  # fmt: skip
    response = {"status_code": 200, "request_id": digest, "body": body.model_dump()}
    return {**line, "response": response, "error": None}


def _usage(row: Row) -> Usage:
    return Usage.of(row["num_prompt_tokens"] or 0, row["num_completion_tokens"] or 0)
