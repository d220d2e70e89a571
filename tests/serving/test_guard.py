"""What is refused: strangers, other origins, too much at once; and what a bug tells clients: nothing."""

import asyncio
import json

import pytest
from starlette.testclient import TestClient

from pipeline.serving.app import create_app
from pipeline.serving.limits import KEPT_BYTES, ImageStore, Limits, RateLimiter
from pipeline.serving.model import Served
from pipeline.serving.service import Service
from tests.serving.conftest import client_of

PATH = "/v1/images/generations"
TOKEN = "a-token-of-some-length"


def stalled(model: Served, **limits: float) -> Service:
    """A service whose work is never done, since it was not started."""
    return Service(model, Limits(**limits))


def error_of(answer) -> str:
    (error,) = answer.json().values()
    return error["code"]


def test_requests_need_the_token_where_there_is_one(model: Served) -> None:
    client = client_of(stalled(model), TOKEN)
    for path in ("/v1/models", "/metrics", "/openapi.json", "/elsewhere"):
        for given in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Bearer é".encode("latin-1")}):
            answer = client.get(path, headers=given)
            assert (answer.status_code, error_of(answer)) == (401, "invalid_api_key")
    assert client.post(PATH, json={"prompt": "x"}).status_code == 401
    for scheme in ("Bearer", "bearer"):
        assert client.get("/v1/models", headers={"Authorization": f"{scheme} {TOKEN}"}).status_code == 200
    for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz"):
        assert client.get(path).status_code == 200
    assert client.get("/healthz", headers={"Host": "generator.example"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "[", ""])
def test_a_name_that_is_made_to_point_to_loopback_is_refused(client: TestClient, host: str) -> None:
    answer = client.get("/v1/models", headers={"Host": host})
    assert (answer.status_code, error_of(answer)) == (403, "unknown_host")


def test_pages_of_other_origins_are_refused(client: TestClient) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9"):
        answer = client.post(PATH, json={"prompt": "x"}, headers={"Origin": origin})
        assert (answer.status_code, error_of(answer)) == (403, "cross_origin")
    assert client.post(PATH, json={}, headers={"Origin": "http://127.0.0.1"}).status_code == 400


def test_what_can_be_got_has_a_head(client: TestClient) -> None:
    for path in ("/", "/healthz", "/v1/models", "/metrics"):
        assert client.head(path).status_code == 200
    assert client.head(PATH).status_code == 405 and client.head("/elsewhere").status_code == 404


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "application/json"])
def test_a_body_that_is_no_json_object_says_what_is_to_be_sent(client: TestClient, kind: str) -> None:
    content = "[]" if kind == "application/json" else json.dumps({"prompt": "x"})
    answer = client.post(PATH, content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_more_than_may_wait_is_refused_and_leaves_nothing(model: Served) -> None:
    service = stalled(model, queue=2, timeout=0.01)
    client = client_of(service)
    for n, status, code in ((3, 429, "queue_full"), (2, 503, "timeout"), (2, 503, "timeout")):
        answer = client.post(PATH, json={"prompt": "x", "n": n})
        assert (answer.status_code, error_of(answer)) == (status, code)
        assert int(answer.headers["Retry-After"]) >= 1 and service.batcher.waiting == 0


def test_a_client_that_asks_too_often_is_told_when_to_come_back(model: Served) -> None:
    client = client_of(stalled(model, rate=2, timeout=0.01))
    answers = [client.post(PATH, json={"prompt": "x"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 503, 429]
    assert error_of(answers[2]) == "rate_limit_exceeded" and 25 < int(answers[2].headers["Retry-After"]) <= 30


def test_the_rate_is_of_each_client() -> None:
    limiter = RateLimiter(4)
    assert [limiter.wait_for("a", 2), limiter.wait_for("b", 4), limiter.wait_for("a", 2)] == [0, 0, 0]
    assert 14 < limiter.wait_for("a", 1) <= 15 and 14 < limiter.wait_for("b", 1) <= 15


def test_images_are_kept_up_to_a_limit() -> None:
    async def gone() -> list[bool]:
        store = ImageStore()
        names = [await store.add(bytes(KEPT_BYTES // 2)) for _ in range(3)]
        return [await store.get(name) is None for name in names]

    assert asyncio.run(gone()) == [True, False, False]


def test_work_of_a_client_that_has_gone_is_not_done(model: Served) -> None:
    service, sent = stalled(model), []
    body = json.dumps({"prompt": "x", "n": 3}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": headers}

    async def receive() -> dict:
        return messages.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(create_app(service)(scope, receive, send))
    assert sent[0]["status"] == 499 and service.batcher.waiting == 0
    assert (
        b'crescendo_requests_total{route="/v1/images/generations",status="499"} 1.0' in service.metrics.text()
    )


def test_a_bug_tells_clients_nothing(model: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Served, "card", fail)
    answer = client_of(stalled(model)).get("/v1/models")
    assert (answer.status_code, error_of(answer)) == (500, "internal_error")
    assert "secret" not in answer.text and "Traceback" not in answer.text


def test_errors_of_every_kind_have_one_shape(client: TestClient) -> None:
    for answer, status in (
        (client.get("/none"), 404),
        (client.get(PATH), 405),
        (client.get("/images/..%2f..%2fetc%2fpasswd.png"), 404),
        (client.get("/v1/images/../../etc/passwd"), 404),
    ):
        assert answer.status_code == status and set(answer.json()) == {"error"}


def test_the_service_says_how_it_is(client: TestClient, model: Served) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz").json()
    assert ready["status"] == "ready" and ready["digest"] == model.digest
    client.post(PATH, json={"prompt": "x"})
    metrics = client.get("/metrics").text
    assert f'digest="{model.digest}"' in metrics and "crescendo_batch_images_count" in metrics
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/models"} <= set(
        client.get("/openapi.json").json()["paths"]
    )
    headers = client.get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
