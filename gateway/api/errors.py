"""One place decides what an error looks like: an OpenAI-style body, the right status, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "payment_required",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    412: "payment_required",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}


class ApiError(Exception):
    """An answer that is not a success.

    Args:
        status: The HTTP status.
        code: A stable snake_case word for programs.
        message: What was wrong and what to do, for people.
        param: The field of the request that was wrong, in dotted form.
        headers: Further response headers.
        extra: Further members of the `error` object.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def body(self) -> dict[str, Any]:
        """The response body, in the form that OpenAI clients read."""
        return {"error": error_object(self.status, self.code, self.message, self.param) | self.extra}


def error_object(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The `error` member alone, as also sent inside a stream."""
    return {"message": message, "type": TYPES_BY_STATUS.get(status, "api_error"), "code": code, "param": param}
