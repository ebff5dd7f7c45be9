"""A cache of answers over runs: a folder that any number of runs read and add to.

    options.json                        says that it is one
    0123456789abcdef/model.json         of which model, loaded how, the answers beside it are
    0123456789abcdef/part-*.parquet     answers with the keys of their requests, a file for each chunk

A file is whole or not there, and is never deleted, so nobody waits for anybody. No Ray here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, cast

import pyarrow as pa
import pyarrow.parquet as pq

from vlmray.config import InferConfig
from vlmray.errors import OptionError
from vlmray.inference.result_folder import RESULT_SCHEMA, pick
from vlmray.schema import Row
from vlmray.storage.filesystem import check_apart, lie_in_one_another
from vlmray.storage.fingerprints import digest
from vlmray.storage.run_folder import RunFolder

_MODEL = "model.json"
_PART = re.compile(r"part-[0-9a-f]{32}\.parquet")


class Answer(NamedTuple):
    """The columns of a row that the engine's answer to it fills."""

    prompt: str | None
    prediction: str | None
    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    confidence: float | None
    min_token_probability: float | None
    logprobs: str | None
    finish_reason: str | None

    @classmethod
    def of(cls, row: Row) -> Self:
        """Return what a row was answered."""
        return cls(**cast(dict[str, Any], pick(row, COLUMNS)))

    @property
    def num_chars(self) -> int:
        """Length of its texts."""
        return len(self.prompt or "") + len(self.prediction or "") + len(self.logprobs or "")


COLUMNS = tuple(Answer.__annotations__)
_SCHEMA = pa.schema([("key", pa.binary(32)), *(RESULT_SCHEMA.field(name) for name in COLUMNS)])


@dataclass(frozen=True, slots=True)
class AnswerFolder(RunFolder):
    """A cache, or the part of it that is of one model."""

    option: ClassVar[str] = "answer_cache"

    model: str = ""
    """The folder in it of the model whose answers are looked for."""

    def of_model(self, facts: Mapping[str, Any]) -> Self:
        """Return the part that is of a model; what tells it from others is written beside its answers."""
        found = dataclasses.replace(self, model=digest(json.dumps(facts, sort_keys=True)))
        if not found.has(f"{found.model}/{_MODEL}"):
            found.write_json(f"{found.model}/{_MODEL}", facts)
        return found

    def parts(self) -> list[str]:
        """Name the files of the model's answers."""
        return [name for name in self._list(self.model) if _PART.fullmatch(name)]

    def keys(self, part: str) -> list[bytes]:
        """Return whose answers a part holds; raises what `read` does."""
        keys: list[bytes] = self._table(part, ["key"])["key"].to_pylist()
        return keys

    def read(self, part: str) -> dict[bytes, Answer]:
        """Return the answers of a part by their keys.

        Raises:
            ValueError: It is damaged, or gone.
        """
        table = self._table(part, _SCHEMA.names)
        keys, *columns = (table[name].to_pylist() for name in _SCHEMA.names)
        return dict(zip(keys, map(Answer, *columns), strict=True))

    def write(self, answers: Mapping[bytes, Answer]) -> str:
        """Write answers as one part, named by their keys: writing it twice is writing it once."""
        part = f"part-{hashlib.sha256(b''.join(sorted(answers))).hexdigest()[:32]}.parquet"
        rows = [{"key": key, **answer._asdict()} for key, answer in answers.items()]
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(rows, _SCHEMA)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self.write_bytes(f"{self.model}/{part}", sink.getvalue().to_pybytes())
        return part

    def remove_leftovers(self, names: str = ".+") -> None:
        """Leave what looks half-written: others may be writing it."""

    def _table(self, part: str, columns: list[str]) -> pa.Table:
        name = f"{self.model}/{part}"
        try:
            file = pq.ParquetFile(pa.BufferReader(self._read(name)), page_checksum_verification=True)
            return file.read(columns).cast(pa.schema([_SCHEMA.field(column) for column in columns]))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(self._damaged(name, error, "its answers are asked for again")) from error


def open_cache(config: InferConfig) -> AnswerFolder | None:
    """Open the cache that a run is to use, if any; it is made where it is not there.

    Raises:
        ValueError: It cannot be written, holds something else, or lies in another folder of the run.
    """
    folder = config.answer_cache
    if folder is None:
        return None
    check_apart(folder, config.dataset_name, config.model_id, config.adapter, option=AnswerFolder.option)
    if lie_in_one_another(folder, config.output_dir):
        problem = f"{folder} and --output_dir {config.output_dir} lie in one another"
        raise OptionError(AnswerFolder.option, problem, "choose another folder")
    return AnswerFolder.open(folder, {"job": AnswerFolder.option}, dry_run=config.dry_run)
