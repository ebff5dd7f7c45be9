"""Errors on their way to clients."""

from __future__ import annotations

from fastapi.responses import JSONResponse, Response

from vlmray.protocol.answers import ErrorBody
from vlmray.protocol.errors import ApiError


class BusyError(Exception):
    """There is no room for the request now."""


def to_response(error: ApiError) -> Response:
    """Write an error as OpenAI does."""
    body = ErrorBody(error=error.detail).model_dump()
    return JSONResponse(body, status_code=error.status, headers=error.headers)
