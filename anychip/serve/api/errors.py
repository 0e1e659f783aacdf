"""Errors in OpenAI's form. They never hold a path, a stack or a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """What a client is told. `param` names a field of its request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first thing wrong with a request, without what it held."""
    if not errors:
        return ApiError(400, "The request is not valid.")
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    kind = str(first["type"])
    if kind == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    param = ".".join(place)[:200] or None
    code = "unknown_parameter" if kind == "extra_forbidden" else "invalid_value"
    message = "is not a parameter of this server" if kind == "extra_forbidden" else str(first["msg"]).lower()
    return ApiError(400, f"{param or 'The body'}: {message}.", param=param, code=code)
