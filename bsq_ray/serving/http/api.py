"""The HTTP application: routes, errors and the loading of models.

    /v1/encode … /v1/generate   inference_routes.py     /v1/models, /healthz, /metrics   here
    /, /docs, /openapi.json     page_routes.py

It does not depend on Ray: the replicas of its models can be anywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.http import page_routes
from bsq_ray.serving.http.admission import AdmissionControl
from bsq_ray.serving.http.body_prefetch import PrefetchedBodyMiddleware
from bsq_ray.serving.http.inference_routes import InferenceEndpoints
from bsq_ray.serving.http.openapi import error_responses
from bsq_ray.serving.http.path_prefix import HeadMiddleware, RelativeRedirectMiddleware
from bsq_ray.serving.http.schemas import HealthResponse, ModelsResponse
from bsq_ray.serving.registry import ModelRegistry, ServedModel
from bsq_ray.serving.service_config import Limits

_log = logging.getLogger("bsq_ray.serving")
# Seconds before the next attempt to load a model whose replica failed.
_LOAD_RETRY_DELAY_S = 5.0


def create_app(
    models: ModelRegistry,
    limits: Limits,
    *,
    token_hash: str | None,
    loopback_only: bool,
    collect_metrics: Callable[[], Awaitable[str]],
    prefetch_bodies: bool = True,
) -> FastAPI:
    """Create the application.

    Args:
        models: models that load while the application already responds.
        token_hash, loopback_only: see `AdmissionControl`.
        collect_metrics: returns the text of `/metrics`.
        prefetch_bodies: see `IngressScaling`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_load_until_ready(model)) for model in models]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(
        title="bsq_ray", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
        # Relative to the address of openapi.json.
        servers=[{"url": "."}],
    )  # fmt: skip
    app.add_middleware(RelativeRedirectMiddleware)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(PrefetchedBodyMiddleware, skip_receive=prefetch_bodies)
    app.add_exception_handler(ApiError, _handle_api_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(RequestValidationError, _handle_invalid_parameter)
    app.add_exception_handler(Exception, _handle_unexpected_error)
    admission = AdmissionControl(limits, token_hash, loopback_only)
    app.include_router(InferenceEndpoints(models, admission, limits).router())
    _add_status_routes(app, models, admission=admission, collect_metrics=collect_metrics)
    app.include_router(page_routes.router)
    return app


def _add_status_routes(
    app: FastAPI, models: ModelRegistry, *, admission: AdmissionControl, collect_metrics: Callable[[], Awaitable[str]]
) -> None:
    @app.get(
        "/v1/models", summary="Models, their capabilities, and whether they are loaded", response_model=ModelsResponse,
        responses=error_responses(401, 403),
    )  # fmt: skip
    async def list_models(request: Request) -> Response:
        admission.authenticate(request)
        return JSONResponse({"models": models.to_json()})

    @app.get(
        "/healthz", summary="Whether all models are loaded", response_model=HealthResponse,
        responses={503: {"model": HealthResponse, "description": "models are loading"}},
    )  # fmt: skip
    async def healthz() -> Response:
        """Needs no token."""
        loading_models = models.loading
        if loading_models:
            return JSONResponse({"status": "loading", "models": loading_models}, 503, {"Retry-After": "2"})
        return JSONResponse({"status": "ok"})

    @app.get(
        "/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse,
        responses=error_responses(401, 403),
    )  # fmt: skip
    async def prometheus_metrics(request: Request) -> Response:
        admission.authenticate(request)
        return Response(await collect_metrics(), media_type="text/plain; version=0.0.4")


async def _handle_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        # The rest of the body is not read.
        headers["Connection"] = "close"
    return JSONResponse({"error": error.message}, error.status, headers)


async def _handle_http_exception(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail).lower()}, error.status_code, error.headers)


async def _handle_invalid_parameter(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg'][0].lower()}{first['msg'][1:]}"}, 422)


async def _handle_unexpected_error(_: Request, error: Exception) -> JSONResponse:
    _log.error("a request failed", exc_info=error)
    return JSONResponse({"error": "internal error; see the log of the service"}, 500)


async def _load_until_ready(model: ServedModel) -> None:
    """Load a model; retry after a failure, because Ray Serve restarts the failed replica."""
    while not model.metadata:
        try:
            with suppress(ApiError):
                await model.load()
        except Exception as error:
            _log.error("the model %s cannot be loaded; retrying", model.name, exc_info=error)
            await asyncio.sleep(_LOAD_RETRY_DELAY_S)
        await asyncio.sleep(0.2)
