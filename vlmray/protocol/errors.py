"""Errors in the shape of OpenAI's API."""

from __future__ import annotations

from vlmray.protocol.answers import ErrorDetail

_TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int = 0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(
            message=message, type=_TYPES.get(status, "invalid_request_error"), param=param, code=code
        )
        self.headers = {"Retry-After": str(retry_s)} if retry_s else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
