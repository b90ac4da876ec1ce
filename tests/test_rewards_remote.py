"""A remote reward: exact scores in the right order, and what becomes of everything that can go wrong on the way."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from reward_servers import number, numbered, passing, remote, texts, web
from torch import Tensor

from tropism.base import Reward
from tropism.rewards import RewardError, as_reward
from tropism.rewards.wire import Call, pack


def exact(images: Tensor, prompts: list[str], answer: list[float]) -> Tensor:
    """Depends on every pixel, the prompt and a column."""
    pixels, words = images.double().pow(3).mean((1, 2, 3)).sqrt(), torch.tensor([len(p) for p in prompts]) / 7
    return pixels + words + torch.tensor(answer)


def png(colour: int, size: tuple[int, int] = (8, 8)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# --- what is equal ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("images", [1, 3, 100])
def test_scores_are_those_of_the_reward_itself_to_the_last_bit(dtype: torch.dtype, images: int) -> None:
    pictures = torch.rand(7, 3, 9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    prompts, answer = texts(7), [0.1, 2.0, -3.5, 1e-8, 5.0, 6.0, 1e9]
    reward = remote(passing(web(exact)), images=images)
    assert (
        isinstance(reward, Reward) and (reward.name, reward.served) == ("remote", "exact") and not reward.differentiable
    )
    found = reward(pictures, prompts, answer=answer)
    assert found.dtype == torch.float32
    assert torch.equal(found, as_reward(exact)(pictures, prompts, answer=answer))


def test_png_rounds_to_eight_bits_and_no_more() -> None:
    pictures = torch.arange(256).div(255)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    found = remote(passing(web(lambda images: images.mean((1, 2, 3)))), format="png")(pictures, texts(256))
    assert torch.equal(found, pictures.mean((1, 2, 3)))


def test_a_picture_without_a_score_is_nan_and_its_neighbours_keep_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    def picky(images: Tensor) -> list[float | None]:
        if bool((number(images) == 2).any()):
            raise RuntimeError("I will not look at number 2\nand more")
        return [None if value == 4 else value for value in number(images).tolist()]

    reward = remote(passing(web(picky)), images=4)
    found = reward(numbered(6), texts(6))
    assert found.isnan().tolist() == [False, False, True, False, True, False]
    assert found[~found.isnan()].tolist() == [0, 1, 3, 5]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 of 6 images have no score" in said and "I will not look at number 2" in said and "and more" not in said
    assert reward.missing == 2


@pytest.mark.parametrize(
    "function",
    [lambda images: 1 / 0, lambda images: [float("inf")] * len(images), lambda images: images, lambda images: "good"],
    ids=["raises", "infinite", "shape", "text"],
)
def test_a_reward_that_fails_gives_null_and_never_zero(function: Callable[..., Any]) -> None:
    client = web(function)
    body = pack(Call("a", numbered(2), ["x", "y"], {}))
    answer = client.post("/score", content=body, headers={"Content-Type": "application/octet-stream"})
    assert answer.status_code == 200
    assert answer.json()["scores"] == [None, None]
    assert len(answer.json()["failures"]) == 1 and "\n" not in answer.json()["failures"][0]


# --- who is let in, and with what ---


@pytest.mark.parametrize("given", [None, "wrong", "secre", "secret2", "Bearer secret"])
def test_without_the_token_nothing_is_told(given: str | None) -> None:
    client = web(token="secret")
    headers = {} if given is None else {"Authorization": f"Bearer {given}"}
    for verb, page in (("GET", "/info"), ("POST", "/score")):
        answer = client.request(verb, page, headers=headers, content=b"")
        assert answer.status_code == 401
        assert answer.json() == {
            "error": "the bearer token is missing or wrong; give the one that the server was started with"
        }
    assert client.get("/health").json() == {"status": "ok"}
    with pytest.raises(RewardError, match=r"^the reward server at [^ ]+ refused, 401: the bearer token is missing"):
        remote(passing(client), token=None if given is None else given.split()[-1] + "x")


def test_with_the_token_everything_works() -> None:
    reward = remote(passing(web(token="secret")), token="secret")
    assert reward(numbered(3), texts(3)).tolist() == [0, 1, 2]


def test_unknown_pages_and_verbs() -> None:
    client = web()
    for asked in ("GET /nothing 404", "GET /score 405", "POST /info 405", "GET /docs 404", "GET /openapi.json 404"):
        verb, page, status = asked.split()
        answer = client.request(verb, page)
        assert answer.status_code == int(status)
        assert answer.json()["error"].endswith(f"{verb} {page}; wanted GET /health, GET /info or POST /score")


def call(**changes: Any) -> bytes:
    said = {"id": "a", "prompts": ["x"], "columns": {}, "images": [png(255)]} | changes
    return json.dumps({name: value for name, value in said.items() if value is not None}).encode()


REFUSED: list[tuple[bytes, int, str]] = [
    (b"", 422, "the call is not JSON"),
    (b"{", 422, "the call is not JSON"),
    (b"\xff\xfe\xfa", 422, "the call is not JSON"),
    (b"[" * 25_000, 422, "the call is not JSON"),
    (b"[]", 422, "the call is a JSON list"),
    (call(id=None), 422, "id is not 1 to 64 letters"),
    (call(id="a" * 65), 422, "id is not 1 to 64 letters"),
    (call(id=3), 422, "id is not 1 to 64 letters"),
    (call(more=1), 422, "the call has 'more'; wanted id, prompts, columns and images alone"),
    (call(prompts=[]), 422, "prompts is not a list of texts"),
    (call(prompts="x"), 422, "prompts is not a list of texts"),
    (call(prompts=[1]), 422, "prompts is not a list of texts"),
    (call(columns={"a": [1, 2]}), 422, "columns is not an object of lists of 1 values"),
    (call(columns=[1]), 422, "columns is not an object of lists of 1 values"),
    (call(columns={"a": [float("nan")]}), 422, "the call is not JSON"),
    (call(images=None), 422, "images is not a list of 1 PNG files"),
    (call(images=[png(1), png(2)]), 422, "images is not a list of 1 PNG files"),
    (call(images=["?"]), 422, "not a PNG file in base64"),
    (call(images=[png(1)[:60]]), 422, "not a PNG file in base64"),
    (call(images=[base64.b64encode(b"GIF89a").decode()]), 422, "not a PNG file in base64"),
    (call(prompts=["x", "y"], images=[png(1), png(1, (8, 9))]), 422, "different sizes"),
    (call(prompts=["x"] * 5, images=[png(1)] * 5), 413, "5 prompts; wanted at most 4"),
    (call(images=[png(1, (40, 30))]), 413, "40 x 30 pixels; wanted at most 1000"),
    (call(prompts=["x"] * 3, images=[png(1, (30, 30))] * 3), 413, "more than 30000 bytes as float32"),
    (call(prompts=["x" * 30_000]), 413, "more than 30000 bytes; send fewer"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "sentence"), REFUSED)
def test_what_is_refused(body: bytes, status: int, sentence: str) -> None:
    client = web(bytes=30_000, images=4, pixels=1000)
    answer = client.post("/score", content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert answer.status_code == status
    assert sentence in answer.json()["error"] and "\n" not in answer.json()["error"]
    good = client.post("/score", content=call(), headers={"Content-Type": "application/json"})
    assert good.json()["scores"] == [4096]


TENSORS: list[tuple[Tensor, str]] = [
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8; wanted floats"),
    (torch.zeros(1, 4, 8, 8), "(1, 4, 8, 8) of torch.float32"),
    (torch.zeros(3, 8, 8), "(3, 8, 8)"),
    (torch.zeros(1, 3, 0, 8), "(1, 3, 0, 8)"),
    (torch.zeros(2, 3, 8, 8), "2 pictures and 1 prompts"),
    (torch.zeros(1, 3, 40, 30), "30 x 40 pixels"),
]


@pytest.mark.parametrize(("images", "sentence"), TENSORS)
def test_tensors_that_are_refused(images: Tensor, sentence: str) -> None:
    body = pack(Call("a", images, ["x"], {}))
    answer = web(pixels=1000).post("/score", content=body, headers={"Content-Type": "application/octet-stream"})
    assert answer.status_code in (413, 422)
    assert sentence in answer.json()["error"]


def test_a_body_is_not_read_beyond_the_limit_whatever_it_says_of_its_length() -> None:
    client, sent = web(bytes=1000), []

    def endless():  # type: ignore[no-untyped-def]
        for _ in range(100):
            sent.append(1)
            yield b"x" * 100

    assert client.post("/score", content=endless()).status_code == 413
    assert client.post("/score", content=b"x", headers={"Content-Length": "9" * 30}).status_code == 413
    assert client.post("/score", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
