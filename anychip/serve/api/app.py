"""The application: paths and what answers there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anychip import __version__
from anychip.serve.api.chat import chat
from anychip.serve.api.completions import complete
from anychip.serve.api.door import Door
from anychip.serve.api.errors import ApiError, from_validation
from anychip.serve.api.keys import Keys
from anychip.serve.api.schema import ChatRequest, CompletionRequest
from anychip.serve.api.service import Service

PAGE = Path(__file__).parents[1] / "page"
_MEDIA = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_PAGE_FILES = {file.name: _MEDIA[file.suffix] for file in PAGE.iterdir() if file.suffix in _MEDIA}
# Newer releases of FastAPI can report to collectors; this server reports to nobody.
_SILENT: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
_ERROR = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "An answer, or with stream: true its pieces.", "content": {"text/event-stream": {}}}
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, **_ERROR}
    for status, text in (
        (400, "The request is not valid."),
        (401, "No valid API key."),
        (403, "The Host or the Origin is not allowed."),
        (404, "Unknown path or model."),
        (408, "The body came too slowly."),
        (413, "The body is too large."),
        (429, "Full; try again later."),
        (503, "Shutting down."),
    )
}


def make_app(
    service: Service, keys: Keys, *, hosts: Iterable[str] = (), origins: Iterable[str] = (), page: bool = True
) -> ASGIApp:
    """The whole server as an ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    app = FastAPI(
        title="anychip",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
        telemetry=_SILENT,
    )
    _add_error_handlers(app)
    _add_api(app, service)
    if page:
        _add_page(app)
    _describe_errors(app)
    return Door(_Counted(app, service), keys, service.limits, hosts, origins)


def _add_api(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", summary="Whether requests are answered")
    async def health() -> Response:
        if service.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", summary="Counters for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", summary="The model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)

    @app.post("/v1/chat/completions", summary="Answer a conversation", responses=_ANSWER)
    async def chat_completions(asked: ChatRequest, http: Request) -> Response:
        return await chat(service, asked, http)

    @app.post("/v1/completions", summary="Continue a text", responses=_ANSWER)
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        return await complete(service, asked, http)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "anychip",
        "max_model_len": service.talker.engine.context_length,
        "sampling": service.talker.sampling.model_dump(),
    }


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return _file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> FileResponse:
        return _file(name)


def _file(name: str) -> FileResponse:
    """A file of the page. Names are looked up, never joined to a path unseen."""
    if name not in _PAGE_FILES:
        raise ApiError(404, "There is nothing here.", code="not_found")
    return FileResponse(PAGE / name, media_type=_PAGE_FILES[name], headers={"Cache-Control": "no-cache"})


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        what = {404: "There is nothing here.", 405: "This path does not take that method."}
        message = what.get(error.status_code, "The request cannot be answered.")
        return ApiError(error.status_code, message, headers=error.headers).response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, "The server failed on this request.").response


def _describe_errors(app: FastAPI) -> None:
    """OpenAPI without FastAPI's own form of errors, which this server does not use."""
    document = app.openapi()
    text = {"type": ["string", "null"]}
    document["components"]["schemas"]["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text},
            }
        },
    }
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    document["paths"]["/healthz"]["get"]["responses"]["503"] = {"description": "Shutting down."}
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}


class _Counted:
    """Counts answers by path and status. Unknown paths share one name, so that nobody can fill the memory."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self.service.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counting if scope["type"] == "http" else send)
