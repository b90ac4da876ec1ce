"""What the tests of remote rewards share: a server in this process, and a client that reaches it without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from tropism.rewards import as_reward
from tropism.rewards.remote import Patience, Remote
from tropism.rewards.serving import Desk, make_app
from tropism.rewards.wire import Limits

URL = "http://127.0.0.1:8000"
QUICK = Patience(timeout=5.0, attempts=3, backoff=0.001)
Handler = Callable[[httpx2.Request], httpx2.Response]


def numbered(count: int, size: int = 8, first: int = 0) -> Tensor:
    """(count, 3, size, size): picture i is i / 4096 everywhere, exactly."""
    return torch.arange(first, first + count).div(4096)[:, None, None, None].expand(-1, 3, size, size).contiguous()


def number(images: Tensor) -> Tensor:
    """The reward that knows a numbered picture."""
    return images[:, 0, 0, 0] * 4096


def web(function: Callable[..., Any] = number, token: str | None = None, **options: Any) -> TestClient:
    """A browser for a server of a function; ``options`` are those of ``Limits`` and ``Desk``."""
    limits = {name: options.pop(name) for name in ("bytes", "images", "pixels") if name in options}
    desk = Desk(as_reward(function), options.pop("version", "v1"), limits=Limits(**limits), **options)
    return TestClient(make_app(desk, token), raise_server_exceptions=False)


def passing(client: TestClient) -> Handler:
    """What carries a request to a server in this process, and its reply back."""

    def carry(request: httpx2.Request) -> httpx2.Response:
        answer = client.request(request.method, request.url.path, content=request.read(), headers=request.headers)
        return httpx2.Response(answer.status_code, content=answer.content, headers=answer.headers)

    return carry


def remote(carry: Handler, **options: Any) -> Remote:
    """A client whose requests go to ``carry``."""
    return Remote(URL, **{"patience": QUICK, "transport": httpx2.MockTransport(carry), **options})


def texts(count: int) -> Sequence[str]:
    """As many different prompts."""
    return [f"prompt {row}" for row in range(count)]
