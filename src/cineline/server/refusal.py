"""What a client is told that cannot have what it asks for, in OpenAI's shape."""

from __future__ import annotations

import re
from typing import Any

from cineline.errors import InvalidRequest

FIELD = re.compile(r"(\w+)[=:]")
"""How a sentence of `InvalidRequest` begins that is about a field."""


class Refusal(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP. message: one sentence with the value, the rule and the remedy. code: for programs.
        param: the field that it is about. retry_after_s: when to try again, where that is known.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        param = None if self.param is None else self.param.encode("ascii", "backslashreplace").decode()
        return {"error": {"message": self.message, "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Beside it."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """A value that cannot be used."""
    return Refusal(400, message, code, param)


def refused(error: InvalidRequest) -> Refusal:
    """What the model, or the type of a field, refuses."""
    named = FIELD.match(str(error))
    return invalid(str(error), named[1] if named else None)
