"""The ASGI application: routes of OpenAI's images API, of probes, and of the page."""

from __future__ import annotations

import base64
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Form, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from pipeline.errors import one_line
from pipeline.inference.generator import check_seed, check_steps
from pipeline.inference.png import encode_png
from pipeline.serving import schemas
from pipeline.serving.answers import Refused, add_handlers
from pipeline.serving.batching import ImageJob
from pipeline.serving.guard import UPLOADS, Guard
from pipeline.serving.limits import MAX_UPSCALED_PIXELS
from pipeline.serving.model import Served
from pipeline.serving.service import Service
from pipeline.serving.sizes import parse_size, served_size, size_text
from pipeline.serving.upscaling import enlargement, upscale_jobs, with_alpha

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PNG = "image/png"
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorAnswer} for status in (400, 401, 403, 413, 429, 503)
}
DRAWN_SEEDS = 2**32  # below it, seeds that are drawn; JavaScript is exact up to 2^53


def create_app(service: Service, token: str | None = None) -> FastAPI:
    """The application of a service. `token` None: requests need none."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await run_in_threadpool(service.close)

    app = FastAPI(
        title="Crescendo",
        version="1",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    add_handlers(app)
    app.include_router(_images(service))
    app.include_router(_facts(service))
    app.include_router(_page())
    app.add_middleware(Guard, token=token, metrics=service.metrics)
    return app


# --- Images.


def _images(service: Service) -> APIRouter:
    router = APIRouter(tags=["images"], responses=REFUSALS)

    _add_generations(router, service)
    _add_edits(router, service)

    @router.get(
        "/images/{name}.png", response_class=Response, responses={200: {"content": {PNG: {}}}, 404: {}}
    )
    async def image(name: str) -> Response:
        """An image that an answer gave by its URL."""
        content = await service.images.get(name)
        if content is None:
            raise Refused(404, "no_such_image", "there is no such image, or it is not kept any more")
        return Response(content, media_type=PNG)

    return router


def _add_generations(router: APIRouter, service: Service) -> None:
    @router.post("/v1/images/generations", response_model_exclude_none=True)
    async def generate(request: Request, body: schemas.ImageRequest) -> schemas.ImageAnswer:
        """Images from a prompt."""
        model, n, seed = service.model, body.n or 1, _first_seed(body.seed, body.n or 1)
        config = model.generator.snapshot.config
        check_steps(model.generator.snapshot, body.steps)
        asked = parse_size(body.size)
        size = served_size(config, asked)
        service.admit(request, n)
        jobs = [
            ImageJob(
                model=model,
                prompt=body.prompt,
                seed=seed + i,
                steps=body.steps,
                size=None if size == (config.resolution, config.resolution) else size,
            )
            for i in range(n)
        ]
        drawn = await service.run(request, jobs)
        made = model.generator.made(num_steps=body.steps, size=size)
        files = [
            await run_in_threadpool(encode_png, image, made | {"prompt": job.prompt, "seed": job.seed})
            for job, image in zip(jobs, drawn, strict=True)
        ]
        notes = _notes(model, body)
        if asked not in (None, size):
            notes.append(f"size: {body.size} is not made by this model, {size_text(size)} is the nearest")
        answer = _answer(model, size_text(size), body.steps or model.default_steps, notes)
        data = await _data(service, request, files, seed, body.response_format)
        return answer.model_copy(update={"data": data})


def _add_edits(router: APIRouter, service: Service) -> None:
    @router.post(UPLOADS, response_model_exclude_none=True)
    async def edit(
        request: Request, body: Annotated[schemas.EditRequest, Form(media_type="multipart/form-data")]
    ) -> schemas.ImageAnswer:
        """An uploaded image, enlarged by 2 or 4: what `crescendo upscale` does."""
        model, n, seed = service.model, body.n or 1, _first_seed(body.seed, body.n or 1)
        service.admit(request, n)
        content = await body.image.read()
        pixels, alpha = await run_in_threadpool(service.uploads.decode, content)
        settings, steps, size, notes = enlargement(model, body, pixels)
        if n * size[0] * size[1] > MAX_UPSCALED_PIXELS:
            problem = (
                f"{n} of {size_text(size)} px are too many, the limit is {MAX_UPSCALED_PIXELS} px in all"
            )
            raise Refused(400, "too_large", problem)
        jobs = upscale_jobs(model, pixels, body.prompt, range(seed, seed + n), settings)
        enlarged = await service.run(request, jobs)
        made = await run_in_threadpool(model.generator.made_of, content, body.prompt, seed, settings)
        files = [
            await run_in_threadpool(encode_png, with_alpha(image, alpha), made | {"seed": job.seed})
            for job, image in zip(jobs, enlarged, strict=True)
        ]
        answer = _answer(model, size_text(size), steps, _notes(model, body) + notes)
        data = await _data(service, request, files, seed, body.response_format)
        return answer.model_copy(update={"data": data})


def _first_seed(seed: int | None, n: int) -> int:
    """`seed`, or one that is drawn. Raises ConfigError where the seed of the last image is out of range."""
    first = secrets.randbelow(DRAWN_SEEDS) if seed is None else seed
    check_seed(first + n - 1)
    return first


def _notes(model: Served, body: schemas.ImageRequest | schemas.EditRequest) -> list[str]:
    """Where what is served differs from what was asked for."""
    notes = []
    if body.model not in (None, model.name):
        notes.append(f"model: {one_line(body.model)} is not here, {model.label} was served")
    if body.model_extra:
        notes.append(f"without effect: {one_line(', '.join(sorted(body.model_extra)))[:500]}")
    return notes


def _answer(model: Served, size: str, steps: int, notes: list[str]) -> schemas.ImageAnswer:
    return schemas.ImageAnswer(
        created=int(time.time()),
        data=[],
        model=model.name,
        version=model.number,
        digest=model.digest,
        size=size,
        steps=steps,
        notes=notes,
    )


async def _data(
    service: Service, request: Request, images: Sequence[bytes], seed: int, form: schemas.Format | None
) -> list[schemas.ServedImage]:
    """Files in the form that was asked for."""

    async def url(image: bytes) -> str:
        return f"{request.base_url}images/{await service.images.add(image)}.png"

    return [
        schemas.ServedImage(
            b64_json=None if form == "url" else base64.b64encode(image).decode(),
            url=None if form == "b64_json" else await url(image),
            seed=seed + i,
        )
        for i, image in enumerate(images)
    ]


# --- Facts.


def _facts(service: Service) -> APIRouter:
    router = APIRouter(tags=["facts"])

    @router.get("/v1/models")
    async def models() -> schemas.ModelList:
        """The model that is served."""
        return schemas.ModelList(data=[schemas.ModelCard(**service.model.card())])

    @router.get("/v1/models/{name:path}", responses={404: {"model": schemas.ErrorAnswer}})
    async def model(name: str) -> schemas.ModelCard:
        """The model that is served, whatever the name."""
        return schemas.ModelCard(**service.model.card())

    @router.get(
        "/v1/films/{stage}.png", response_class=Response, responses={200: {"content": {PNG: {}}}, 404: {}}
    )
    async def film(stage: str) -> Response:
        """Samples of the same captions and seeds, while a stage of the model's training went on."""
        content = service.model.films.get(stage)
        if content is None:
            raise Refused(404, "no_such_film", "there is no film strip of that stage")
        return Response(content, media_type=PNG)

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @router.get("/readyz", response_model_exclude_none=True)
    async def readyz() -> schemas.Readiness:
        """What is served, and what is not."""
        return service.readiness()

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


# --- The page.


def _page() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    folder = resources.files("pipeline.serving") / "page"
    for path, (name, media_type) in PAGE.items():
        router.add_api_route(path, _file((folder / name).read_bytes(), media_type), response_class=Response)
    return router


def _file(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return Response(content, media_type=media_type)

    return file
