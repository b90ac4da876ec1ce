"""Whatever is sent to a reward server, it answers with one sentence of its own; it never breaks."""

from __future__ import annotations

import base64
import io
import json
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from reward_servers import number, numbered, web

from tropism.rewards import as_reward
from tropism.rewards.serving import Desk
from tropism.rewards.wire import CONTENT_TYPES, Call, Limits, Refused, pack

DESK = Desk(as_reward(number), "v1", limits=Limits(bytes=100_000, images=4, pixels=400))
CLIENT = web(bytes=100_000, images=4, pixels=400)
GOOD = pack(Call("a", numbered(2), ["x", "y"], {"n": [1, 2]}))
MANY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PICTURES = st.lists(st.sampled_from([base64.b64encode(PNG).decode(), "", "AAAA", "é"]) | JSON, max_size=3)
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["a", "", "a b"]) | JSON,
        "prompts": st.lists(st.text(max_size=5), max_size=3) | JSON,
        "columns": st.dictionaries(st.sampled_from(["samples", "prompts", "n", ""]), st.lists(LEAVES, max_size=3))
        | JSON,
        "images": PICTURES | JSON,
        "more": JSON,
    },
)


def check(status: int, content: bytes) -> None:
    """A good reply, or a sentence."""
    assert status in (200, 400, 401, 404, 405, 413, 415, 422), (status, content)
    said = json.loads(content)
    if status == 200:
        assert set(said) == {"id", "version", "scores", "failures"}
    else:
        assert list(said) == ["error"]
        assert said["error"] and "\n" not in said["error"] and "Traceback" not in said["error"]


def post(body: bytes, kind: str = "application/json") -> None:
    answer = CLIENT.post("/score", content=body, headers={"Content-Type": kind})
    check(answer.status_code, answer.content)


@MANY
@given(CALLS)
def test_calls_of_any_shape(said: dict[str, Any]) -> None:
    post(json.dumps(said).encode())


@MANY
@given(st.binary(max_size=300), st.sampled_from([*CONTENT_TYPES.values(), "text/plain", ""]))
def test_bytes_of_any_kind(body: bytes, kind: str) -> None:
    post(body, kind)


def edited(draw: st.DrawFn, good: bytes) -> bytes:
    """Some bytes changed, and perhaps the end cut off."""
    body = bytearray(good)
    for _ in range(draw(st.integers(1, 6))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body[: draw(st.integers(0, len(body)))]) if draw(st.booleans()) else bytes(body)


@MANY
@given(st.data())
def test_tensors_that_were_damaged(data: st.DataObject) -> None:
    """Without HTTP around it, so that what is not refused is raised."""
    body = edited(data.draw, GOOD)
    try:
        said = DESK.answer(CONTENT_TYPES["safetensors"], body)
    except Refused as error:
        check(error.status, json.dumps({"error": str(error)}).encode())
    else:
        check(200, json.dumps(said, allow_nan=False).encode())


@MANY
@given(st.data())
def test_pictures_that_were_damaged(data: st.DataObject) -> None:
    picture = base64.b64encode(edited(data.draw, PNG)).decode()
    post(json.dumps({"id": "a", "prompts": ["x"], "images": [picture]}).encode())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS"]), st.text(max_size=10), st.binary(max_size=20))
def test_pages_of_any_name(verb: str, page: str, body: bytes) -> None:
    answer = CLIENT.request(verb, f"/{quote(page, safe='', errors='replace')}", content=body)
    check(answer.status_code, answer.content)


def test_the_good_ones_are_good() -> None:
    """Else nothing above means anything."""
    assert DESK.answer(CONTENT_TYPES["safetensors"], GOOD)["scores"] == [0.0, 1.0]
    with pytest.raises(Refused):
        DESK.answer(CONTENT_TYPES["safetensors"], GOOD[:-1])
    post(json.dumps({"id": "a", "prompts": ["x"], "images": [base64.b64encode(PNG).decode()]}).encode())
