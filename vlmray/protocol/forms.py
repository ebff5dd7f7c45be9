"""What clients want answers to be: OpenAI's `response_format`, and vLLM's `structured_outputs`.

body -> ResponseFormat or StructuredOutputs -> Form
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vlmray.protocol.words import describe
from vlmray.schema import Form

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class JsonSchema(BaseModel):
    """A schema and what it is called."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="of the JSON that is wanted")
    strict: bool | None = Field(default=None, description="answers keep it in any case")


class ResponseFormat(BaseModel):
    """What OpenAI's API calls the form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            found = "no json_schema" if self.json_schema is None else "a json_schema"
            raise ValueError(f"has type {self.type!r} and {found}")
        return self

    @property
    def form(self) -> Form | None:
        """The form, if any text will not do."""
        if self.type == "text":
            return None
        return schema_form(self.json_schema.schema_ if self.json_schema else _ANY_OBJECT)


def _parse(value: Any) -> Any:
    """Read a schema that is written as text, as vLLM takes it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"is no JSON: {describe(value)}") from error


class StructuredOutputs(BaseModel):
    """What vLLM's servers call so; a form of another kind is refused."""

    model_config = ConfigDict(extra="allow")

    json_: Annotated[dict[str, Any], BeforeValidator(_parse)] | None = Field(default=None, alias="json")
    json_object: bool | None = None
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    regex: str | None = None

    @model_validator(mode="after")
    def _check(self) -> StructuredOutputs:
        for name, value in (self.model_extra or {}).items():
            if value:
                raise ValueError(f"has {name}, which is not supported; use json, choice or regex")
        if len(self._forms) > 1:
            raise ValueError("has several forms, of which an answer can have one")
        return self

    @property
    def _forms(self) -> list[Form]:
        found = [schema_form(_ANY_OBJECT)] if self.json_object else []
        found += [schema_form(self.json_)] if self.json_ is not None else []
        found += [Form(choices=tuple(dict.fromkeys(self.choice)))] if self.choice is not None else []
        return found + ([Form(regex=self.regex)] if self.regex is not None else [])

    @property
    def form(self) -> Form | None:
        """The form, if any text will not do."""
        return next(iter(self._forms), None)


def schema_form(schema: dict[str, Any]) -> Form:
    """Return the form of JSON that keeps a schema."""
    return Form(schema=json.dumps(schema, ensure_ascii=False))
