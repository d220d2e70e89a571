"""Whatever a request holds, it is answered, and never by 5xx.

CRESCENDO_REQUESTS=10000 asks for more of them than the usual 100.
"""

import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from pipeline.serving.guard import UPLOADS
from pipeline.serving.schemas import EditRequest, ImageRequest
from tests.serving.test_upscaling import png

REQUESTS = int(os.environ.get("CRESCENDO_REQUESTS", "100"))
SIZES = st.sampled_from(["auto", "40x24", "1024x1024", "99999x1", "0x0", "1x", "٣x٣", "32x32\n"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 4, 10, 100, 2**31, 2**63 - 1, 2**63, 1e308])
ANYTHING: Any = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text() | SIZES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MOSTLY = {  # what is often right, so that requests come further than to the first wrong field
    "prompt": st.text(max_size=80),
    "n": st.sampled_from([1, 2]),
    "steps": st.sampled_from([1, 2, 4]),
    "seed": st.integers(0, 2**63 - 1),
    "size": SIZES,
    "response_format": st.sampled_from(["url", "b64_json"]),
    "factor": st.sampled_from(["2", "4"]),
    "strength": st.floats(0.005, 0.5),
}
SCHEMAS = {"/v1/images/generations": ImageRequest, UPLOADS: EditRequest}


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `TestClient.request`."""
    path = draw(
        st.sampled_from([*SCHEMAS, *SCHEMAS, "/v1/models", "/v1/models/x", "/images/x.png", "/readyz"])
    )
    if path not in SCHEMAS:
        suffix = draw(st.sampled_from(["", "/", "?a=%00", "/..%2f..", "%ff"]))
        method = draw(st.sampled_from(["GET", "POST", "HEAD", "DELETE"]))
        return {"method": method, "url": path + suffix, "content": draw(st.binary(max_size=20))}
    fields = {}
    for name in SCHEMAS[path].model_fields:
        if draw(st.booleans()):
            usual = MOSTLY.get(name, ANYTHING)
            fields[name] = draw(st.one_of(usual, usual, usual, ANYTHING))
    fields |= draw(st.dictionaries(st.text(), ANYTHING, max_size=1))
    if path == UPLOADS:
        image = draw(st.sampled_from([png(), png(8, 8), png()[:60], b""]) | st.binary(max_size=60))
        data = {name: str(value) for name, value in fields.items() if name != "image"}
        return {"method": "POST", "url": path, "data": data, "files": {"image": ("x.png", image)}}
    content = json.dumps(fields).encode()
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(max_size=4)) + content[place:]
    return {
        "method": "POST",
        "url": path,
        "content": content,
        "headers": {"Content-Type": draw(st.sampled_from(["application/json"] * 3 + ["text/plain", ""]))},
    }


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@settings(max_examples=REQUESTS, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(request=requests())
def test_no_request_breaks_the_service(client: TestClient, request: dict[str, Any]) -> None:
    answer = client.request(**request)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and request["method"] != "HEAD":
        error = answer.json()["error"]
        assert len(error["message"].splitlines()) <= 1 and "Traceback" not in answer.text
