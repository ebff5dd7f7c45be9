"""How likely the tokens of an answer were, as OpenAI's API asks for it and says it."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from vlmray.schema import TokenLogprob

_LEAST = -9999.0
"""What stands for a log-probability that JSON cannot write."""


class WantedLogprobs(BaseModel):
    """What a request says of them."""

    logprobs: bool | None = Field(default=None, description="tell how likely each token of the answer was")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="and so many of the likeliest in its place; needs logprobs"
    )

    @field_validator("top_logprobs")
    @classmethod
    def _check_top(cls, found: int | None, info: ValidationInfo) -> int | None:
        if found and not info.data.get("logprobs"):
            raise ValueError(f"is {found}, and needs logprobs: true")
        return found

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told of beside each; None: nothing is told."""
        return (self.top_logprobs or 0) if self.logprobs else None


class LikelyToken(BaseModel):
    """A token that might have been written."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(
        description="in UTF-8; null: it is no text, as the token that ends answers"
    )

    @classmethod
    def of(cls, token: TokenLogprob) -> LikelyToken:
        """Write what an engine says of one."""
        data = None if token.data is None else list(token.data)
        return LikelyToken(token=token.token, logprob=max(token.logprob, _LEAST), bytes=data)


class WrittenToken(LikelyToken):
    """A token that was written, and the likeliest in its place."""

    top_logprobs: list[LikelyToken]


class ChoiceLogprobs(BaseModel):
    """All tokens of an answer, or of a piece of it."""

    content: list[WrittenToken]
    refusal: None = None

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprob]) -> ChoiceLogprobs:
        """Write what an engine says."""
        return cls(
            content=[
                WrittenToken(
                    **LikelyToken.of(token).model_dump(), top_logprobs=list(map(LikelyToken.of, token.top))
                )
                for token in tokens
            ]
        )
