"""What goes wrong, as the API says it: one sentence in the body that OpenAI's clients understand."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class ApiError(Exception):
    """An answer other than 200. `param` names the field of the request that is to blame."""

    status = 400
    kind = "invalid_request_error"
    headers: Mapping[str, str] = MappingProxyType({})
    """Of the answer, beside the usual ones."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The error object of OpenAI's reference."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class Unauthorized(ApiError):
    status = 401
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


class Forbidden(ApiError):
    status = 403


class NotFound(ApiError):
    status = 404


class TooSlow(ApiError):
    """The body did not arrive in time."""

    status = 408


class TooLarge(ApiError):
    status = 413


class UnsupportedMedia(ApiError):
    status = 415


class Overloaded(ApiError):
    """The queue is full; `seconds` is when to come again."""

    status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, seconds: float):
        super().__init__(message, code="queue_full")
        self.headers = {"Retry-After": str(max(1, math.ceil(seconds)))}


class Failed(ApiError):
    """A request that was accepted and then failed by itself."""

    status = 500
    kind = "server_error"


class Unavailable(ApiError):
    """The server is ending, or its engine has died."""

    status = 503
    kind = "server_error"
    headers = MappingProxyType({"Retry-After": "5"})


class TimedOut(ApiError):
    """A request that was accepted and took too long."""

    status = 504
    kind = "timeout_error"
