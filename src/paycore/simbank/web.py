"""What the bank's and the forwarder's HTTP servers share: bodies with a limit, JSON answers, errors as JSON."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from paycore.simbank.requests import broken_rules

MAX_BODY_BYTES = 65_536

Body = TypeVar("Body", bound=BaseModel)


class ApiError(Exception):
    """An answer that is not the one asked for: ``{"code", "message"}`` and whatever else belongs to it."""

    def __init__(self, status: int, code: str, message: str, **more: object) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "message": message, **more}


def error_answer(_request: Request, error: Exception) -> Response:
    """Starlette's exception handler for ApiError."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status)


def target_of(request: Request) -> str:
    """Return what a signature covers of the request line: method, path and query, as they came."""
    raw_path: bytes = request.scope["raw_path"]
    query: bytes = request.scope["query_string"]
    target = raw_path + b"?" + query if query else raw_path
    return f"{request.method} {target.decode('ascii', 'replace')}"


async def limited_body(request: Request) -> bytes:
    """Read the body. Raises ApiError when it is over MAX_BODY_BYTES."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, "TOO_LARGE", f"body: at most {MAX_BODY_BYTES} bytes")
    return body


def parsed(model: type[Body], body: bytes) -> Body:
    """Read a JSON body strictly. Raises ApiError naming each field and the rule it breaks."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise ApiError(400, "INVALID_REQUEST", broken_rules(error)) from None
