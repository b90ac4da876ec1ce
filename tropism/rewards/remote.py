"""A reward that a server computes (``tropism reward serve``, or anything that speaks as ``wire`` says).

A call is cut into requests that are under way at once. What cannot be reached, or says that it is busy or broken (429,
5xx), is asked again, after waits that double and are drawn at random; what is refused (other 4xx) is an error at once.
A request has a name of its own which the reply repeats, so that no reply is taken for another. Samples whose requests
all failed have no score (NaN, never 0) and are counted; when nothing at all came back, it is an error.
"""

from __future__ import annotations

import ipaddress
import math
import random
import re
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx2
import torch
from torch import Tensor

from .scores import RewardError, to_values
from .wire import CONTENT_TYPES, FLOATS, TOKEN, TOKEN_WANTED, Call, Format, is_token, pack, read_reply

AT_MOST = 30.0  # seconds between two attempts
IMAGES = 16  # of one request
FIRST = 3  # attempts before anything has begun: whoever waits then has mistaken the address
START = "start one with tropism reward serve"
URL = re.compile(r"https?://[^\s/@?#]+(/[^\s?#]*)?")


class Unreachable(Exception):
    """No usable answer after the last attempt."""


class Signs(NamedTuple):
    """What the requests of one call tell each other."""

    stop: threading.Event  # the call has failed: nobody waits any longer
    gone: threading.Event  # one of them has run out of patience: who comes later tries once


class Part(NamedTuple):
    """What became of one request."""

    scores: list[float]
    why: str | None = None  # scores are missing
    reached: bool = True


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for. With these numbers it may be away for some 45 seconds, and can restart."""

    timeout: float = 120.0  # seconds that the server may take for one request
    attempts: int = 8
    backoff: float = 0.5  # seconds before the second attempt, then twice that, and so on, each times 0.5 to 1

    def __post_init__(self) -> None:
        if not self.timeout > 0 or self.attempts < 1 or not self.backoff >= 0:
            raise RewardError(f"{self}; wanted a timeout above 0, at least 1 attempt, and a backoff of 0 or more")

    def waits(self) -> Iterator[float]:
        """Seconds before each attempt but the first."""
        for attempt in range(self.attempts - 1):
            yield min(AT_MOST, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)


class Remote:
    """The reward of the server at ``url`` (http://HOST:PORT). Asks the server what it is when it is made.

    Args:
        token: what the server wants to be shown, if anything.
        images: in one request, if the server takes as many; ``parallel`` requests are under way at once.
        format: ``safetensors`` sends floats as they are, ``png`` eight bits a channel, which is a third or less.
        transport: for tests; how httpx2 reaches the server.

    Raises:
        RewardError: no such server, not let in, or what answers is no reward server.
    """

    differentiable = False
    concurrent = True  # may run while the next images are sampled

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        patience: Patience | None = None,
        images: int = IMAGES,
        parallel: int = 4,
        format: Format = "safetensors",
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        if not _is_address(url) or images < 1 or parallel < 1 or format not in CONTENT_TYPES:
            raise RewardError(
                f"the url is {url}, images {images}, parallel {parallel}, format {format}; wanted http://HOST:PORT, at "
                f"least 1, at least 1, and one of {', '.join(CONTENT_TYPES)}"
            )
        if token is not None and not is_token(token):
            raise RewardError(f"the token for {url} is empty, or has spaces or other characters; {TOKEN_WANTED}")
        self.url, self.format, self.parallel = url.rstrip("/"), format, parallel
        self.patience = patience or Patience()
        self.missing = 0  # samples without a score so far
        self._client = httpx2.Client(
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=httpx2.Timeout(self.patience.timeout, connect=min(10.0, self.patience.timeout)),
            trust_env=not _is_loopback(url),  # a proxy has no business between two processes of one machine
            transport=transport,
        )
        said = self._info()
        self.name, self.served, self.version = "remote", str(said["name"]), str(said["version"])
        self.images, self._most = min(images, int(said["max_images"])), int(said["max_bytes"])

    def _info(self) -> Mapping[str, Any]:
        try:
            answer = self._ask("GET", "/info", None, _signs(), at_most=FIRST)
        except Unreachable as error:
            raise RewardError(f"there is no reward server at {self.url}, {error}; {START}") from error
        with suppress(ValueError, TypeError, KeyError):
            said = answer.json()
            if said["name"] and said["version"] and min(int(said["max_images"]), int(said["max_bytes"])) >= 1:
                return dict(said)
        raise RewardError(f"what answers at {self.url} is no reward server; {START}")

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], B prompts -> (B,) float32 on the images' device; NaN where there is no score.

        Raises RewardError: refused, another reward than at first, or no answer to any request.
        """
        images = self._checked(samples, prompts)
        rows = list(torch.arange(len(prompts)).split(self._per_request(images)))
        signs = _signs()
        with ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(self._score, images, prompts, columns, each.tolist(), signs) for each in rows]
            try:
                parts = [future.result() for future in futures]
            except BaseException:
                signs.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._say_what_is_missing(parts, len(prompts))
        values = [value for part in parts for value in part.scores]
        return to_values(values, len(prompts), f"reward '{self.name}'", images.device)

    def _checked(self, samples: Any, prompts: Sequence[str]) -> Tensor:
        if not isinstance(samples, Tensor) or samples.ndim != 4 or samples.shape[1] != 3 or samples.dtype not in FLOATS:
            got = type(samples).__name__
            if isinstance(samples, Tensor):
                got = f"{tuple(samples.shape)} of {samples.dtype}"
            raise RewardError(f"reward '{self.name}' got {got}; wanted images (B, 3, H, W), floats in [0, 1]")
        if len(samples) != len(prompts):
            raise RewardError(f"reward '{self.name}' got {len(samples)} images and {len(prompts)} prompts")
        return samples.detach()

    def _per_request(self, images: Tensor) -> int:
        """As many images as the server takes, with a tenth of its bytes left for the rest of the call."""
        each = images[:1].numel() * max(images.element_size(), 4)
        room = int(0.9 * self._most) // max(each, 1)
        if not room:
            raise RewardError(f"reward '{self.name}' takes {self._most} bytes at once and a picture here has {each}")
        return min(self.images, room)

    def _score(
        self, images: Tensor, prompts: Sequence[str], columns: Mapping[str, Any], rows: list[int], signs: Signs
    ) -> Part:
        """These rows, in one request."""
        picked = {name: [values[row] for row in rows] for name, values in columns.items()}
        call = Call(str(uuid.uuid4()), images[rows], [prompts[row] for row in rows], picked)
        try:
            body = pack(call, self.format)
        except (TypeError, ValueError) as error:
            raise RewardError(f"the columns {sorted(columns)} are not JSON ({error}); wanted plain values") from error
        try:
            content = self._ask("POST", "/score", body, signs).content
        except Unreachable as error:
            return Part([math.nan] * len(rows), str(error), reached=False)
        try:
            version, scores, failures = read_reply(content, call)
        except ValueError as error:
            raise RewardError(f"the reward server at {self.url} answered with {error}") from error
        if version != self.version:
            raise RewardError(
                f"the reward at {self.url} was version {self.version} and is {version} now, so its scores cannot be "
                "compared; serve the first one again, or start a new run"
            )
        return Part(scores, _short(failures[0]) if failures else None)

    def _ask(
        self, verb: str, page: str, body: bytes | None, signs: Signs, at_most: int | None = None
    ) -> httpx2.Response:
        """The answer, once there is one that is no failure. Raises Unreachable and RewardError."""
        headers = {} if body is None else {"Content-Type": CONTENT_TYPES[self.format]}
        why, attempt = "not tried", 0
        for wait in (0.0, *self.patience.waits())[:at_most]:
            if signs.stop.wait(wait) or (wait and signs.gone.is_set()):
                break
            attempt += 1
            try:
                answer = self._client.request(verb, self.url + page, content=body, headers=headers)
            except httpx2.TransportError as error:
                why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                continue
            if answer.status_code == 200:
                return answer
            why = f"{answer.status_code}: {_sentence(answer)}"
            if answer.status_code < 500 and answer.status_code != 429:
                raise RewardError(f"the reward server at {self.url} refused, {why}")
        signs.gone.set()
        raise Unreachable(f"no answer ({why}; attempt {attempt} of {self.patience.attempts})")

    def _say_what_is_missing(self, parts: Sequence[Part], count: int) -> None:
        why = next((part.why for part in parts if part.why is not None), None)
        if parts and not any(part.reached for part in parts):
            raise RewardError(f"reward '{self.name}' ({self.served} at {self.url}): {why}; is the server running?")
        missing = sum(math.isnan(score) for part in parts for score in part.scores)
        self.missing += missing
        if missing:
            said = f"{missing} of {count} images have no score ({why or 'the reward gave none'}), {self.missing} so far"
            print(f"warning: reward '{self.name}' ({self.served}): {said}", file=sys.stderr)


def _signs() -> Signs:
    return Signs(threading.Event(), threading.Event())


def from_environment(url: str, environment: Mapping[str, str]) -> Remote:
    """The reward at ``url`` with the token, timeout, attempts and images a request of TROPISM_REWARD_... variables."""

    def number(name: str, usual: float) -> float:
        text = environment.get(f"TROPISM_REWARD_{name}", str(usual))
        try:
            return type(usual)(text)
        except ValueError:
            raise RewardError(f"TROPISM_REWARD_{name} is {text!r}; wanted a number such as {usual}") from None

    patience = Patience(number("TIMEOUT", Patience.timeout), int(number("ATTEMPTS", Patience.attempts)))
    return Remote(url, environment.get(TOKEN), patience=patience, images=int(number("IMAGES", IMAGES)))


def _is_address(url: str) -> bool:
    try:
        return URL.fullmatch(url) is not None and bool(httpx2.URL(url).host)
    except httpx2.InvalidURL:
        return False


def _is_loopback(url: str) -> bool:
    host = httpx2.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sentence(answer: httpx2.Response) -> str:
    """What an error says, short."""
    try:
        said = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        said = answer.text
    return _short(said)


def _short(said: Any) -> str:
    """In one line, and not for ever."""
    return " ".join(str(said).split())[:300] or "no reason given"
