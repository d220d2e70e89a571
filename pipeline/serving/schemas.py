"""Requests and answers of the API: OpenAI's, and what is Crescendo's own (seed, steps, factor, strength)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

from pipeline.inference.generator import MAX_SEED, MAX_STRENGTH, MIN_STRENGTH
from pipeline.serving.limits import MAX_IMAGES, MAX_PROMPT, MAX_STEPS

Format = Literal["b64_json", "url"]
Count = Annotated[int, Field(ge=1, le=MAX_IMAGES, description="Images; image i has seed + i.")]
Steps = Annotated[
    int,
    Field(ge=1, le=MAX_STEPS, description="Network passes of a refined model, sampler steps of others."),
]
Seed = Annotated[
    int, Field(ge=0, le=MAX_SEED, description="Of the first image; the answer has the one that was drawn.")
]
FORMAT = Field(None, description="None gives both.")
MODEL = Field(None, max_length=256, description="Any name; the answer says what was served.")


class ImageRequest(BaseModel):
    """What to draw. Other fields of OpenAI's API have no effect; the answer names them in `notes`."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(max_length=MAX_PROMPT, description="Empty for no caption.")
    model: str | None = MODEL
    n: Count | None = 1
    size: str | None = Field(
        None, max_length=32, description="auto, or WIDTHxHEIGHT; the nearest that the model makes is served."
    )
    response_format: Format | None = FORMAT
    seed: Seed | None = None
    steps: Steps | None = None
    stream: Literal[False] | None = None


class EditRequest(BaseModel):
    """An image to enlarge. Other fields of OpenAI's API have no effect; the answer names them in `notes`."""

    model_config = ConfigDict(extra="allow")

    image: UploadFile = Field(description="PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF.")
    prompt: str = Field("", max_length=MAX_PROMPT, description="What the image shows.")
    model: str | None = MODEL
    n: Count | None = 1
    size: str | None = Field(None, max_length=32, description="Without a factor: the nearer one is taken.")
    factor: Literal["2", "4"] | None = None
    response_format: Format | None = FORMAT
    seed: Seed | None = None
    steps: Steps | None = None
    strength: Annotated[float, Field(ge=MIN_STRENGTH, le=MAX_STRENGTH)] | None = None


class ServedImage(BaseModel):
    """One PNG file."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImageAnswer(BaseModel):
    """Images, and what they were made by."""

    created: int
    data: list[ServedImage]
    model: str
    version: str | None = None
    digest: str
    size: str
    steps: int
    output_format: Literal["png"] = "png"
    notes: list[str] = Field(description="Where what was served differs from what was asked for.")


class ModelCard(BaseModel):
    """The model that is served, and its lineage."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: str | None
    digest: str
    kind: str
    resolution: int
    sizes: list[str]
    passes: list[int]
    default_steps: int
    parameters: int
    text_encoder: str
    upscales: bool
    films: list[str] = Field(description="Stages of training whose film strips are at /v1/films/STAGE.png.")
    lineage: dict[str, str]


class ModelList(BaseModel):
    """One model."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Readiness(BaseModel):
    """Whether requests are served, by what, and what stands in the way of a newer version."""

    status: Literal["ready"] = "ready"
    model: str
    version: str | None = None
    digest: str
    refused: dict[str, str] | None = None
    registry: str = "reachable"


class ErrorAnswer(BaseModel):
    """As OpenAI's API words errors."""

    error: dict[str, Any]
