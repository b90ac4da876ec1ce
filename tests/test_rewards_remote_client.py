"""The client of a remote reward: what it asks again, how long it waits, and replies that it does not believe."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import httpx2
import pytest
import torch
from reward_servers import Handler, number, numbered, passing, remote, texts, web
from torch import Tensor

from tropism.rewards import RewardError
from tropism.rewards.remote import Patience, Remote, from_environment


def flaky(carry: Handler, *failures: Any) -> tuple[Handler, list[str]]:
    """``carry``, but the first calls for scores fail: an exception is raised, a number is a status; None is good."""
    left, seen = list(failures), list[str]()

    def handle(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/score":
            seen.append(request.url.path)
            failure = left.pop(0) if left else None
            if isinstance(failure, int):
                return httpx2.Response(failure, json={"error": "said so"})
            if failure is not None:
                raise failure
        return carry(request)

    return handle, seen


@pytest.mark.parametrize(
    "failure",
    [500, 502, 503, 429, httpx2.ConnectError("refused"), httpx2.ReadTimeout("slow"), httpx2.RemoteProtocolError("cut")],
    ids=str,
)
def test_what_passes_is_asked_again(failure: Any) -> None:
    carry, seen = flaky(passing(web()), failure, failure)
    assert remote(carry)(numbered(3), texts(3)).tolist() == [0, 1, 2]
    assert len(seen) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 301])
def test_what_is_refused_is_not_asked_again(status: int) -> None:
    carry, seen = flaky(passing(web()), status)
    with pytest.raises(RewardError, match=rf"refused, {status}: said so"):
        remote(carry)(numbered(3), texts(3))
    assert len(seen) == 1


def test_when_patience_ends_scores_are_missing_and_when_all_are_it_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    carry, seen = flaky(passing(web()), None, *[503] * 3)
    reward = remote(carry, images=2, parallel=1)
    found = reward(numbered(6), texts(6))
    assert found[[0, 1, 4, 5]].tolist() == [0, 1, 4, 5] and found[2:4].isnan().all()
    assert len(seen) == 5
    assert "2 of 6 images have no score (no answer (503: said so; attempt 3 of 3)), 2 so far" in capsys.readouterr().err
    carry, seen = flaky(passing(web()), *[503] * 100)
    with pytest.raises(RewardError, match=r"no answer \(503: said so; attempt 3 of 3\); is the server running\?$"):
        remote(carry, images=2, parallel=1)(numbered(6), texts(6))
    assert len(seen) == 3 + 1 + 1, "when one request has waited in vain, the others try once"


def test_waits_double_are_bounded_and_are_drawn_at_random() -> None:
    waits = list(Patience(attempts=12, backoff=0.5).waits())
    assert len(waits) == 11 and len(set(waits)) == 11
    for place, wait in enumerate(waits):
        most = min(30.0, 0.5 * 2**place)
        assert most / 2 <= wait <= most


def test_a_server_that_does_not_answer_is_given_up_in_time() -> None:
    """It takes the connection and says nothing: two attempts of a fifth of a second, a wait of 0.01, no more."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(RewardError, match=r"no reward server at .*, no answer \(ReadTimeout: .*; attempt 2 of 2\)"):
            Remote(f"http://127.0.0.1:{silent.getsockname()[1]}", patience=Patience(0.2, attempts=2, backoff=0.01))
    assert 0.4 <= time.monotonic() - started < 2


def test_before_a_run_patience_is_short() -> None:
    """Eight attempts of a run would keep someone waiting who has only mistyped the address."""
    tried = list[int]()

    def nobody(request: httpx2.Request) -> httpx2.Response:
        tried.append(1)
        raise httpx2.ConnectError("refused")

    with pytest.raises(RewardError, match="attempt 3 of 8"):
        remote(nobody, patience=Patience(backoff=0.001))
    assert len(tried) == 3


def test_requests_are_under_way_at_once_and_their_scores_keep_the_order() -> None:
    """The first request is answered only when four are there, and the last comes back first."""
    gate, carry = threading.Barrier(4, timeout=10), passing(web())

    def handle(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/score":
            time.sleep(0.05 * (4 - gate.wait()))
        return carry(request)

    assert remote(handle, images=2, parallel=4)(numbered(8), texts(8)).tolist() == list(range(8))


@pytest.mark.parametrize("parallel", [1, 3])
def test_the_server_scores_one_call_at_a_time_unless_told(parallel: int) -> None:
    inside, most, lock = [0], [0], threading.Lock()

    def slow(images: Tensor) -> Tensor:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.03)
        with lock:
            inside[0] -= 1
        return number(images)

    reward = remote(passing(web(slow, parallel=parallel)), images=1, parallel=6)
    assert reward(numbered(6), texts(6)).tolist() == list(range(6))
    assert most[0] == parallel


def test_a_request_that_comes_again_is_answered_and_not_scored_again() -> None:
    """The reply was lost on the way: the client asks again, byte for byte, and the reward is not asked."""
    calls = list[int]()

    def counting(images: Tensor) -> list[float]:
        calls.append(len(images))
        return [float(len(calls))] * len(images)

    carry, lost = passing(web(counting)), [True]

    def handle(request: httpx2.Request) -> httpx2.Response:
        answer = carry(request)
        if request.url.path == "/score" and lost:
            lost.pop()
            raise httpx2.ReadError("the reply was lost")
        return answer

    reward = remote(handle)
    assert reward(numbered(2), texts(2)).tolist() == [1, 1]
    assert reward(numbered(2), texts(2)).tolist() == [2, 2], "a new call of the same pictures is another call"
    assert calls == [2, 2]


INFO = {"name": "x", "version": "v", "max_images": 1, "max_bytes": 1}


def replying(**changes: Any) -> Handler:
    """A server that answers every call with a good reply but for ``changes``."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/info":
            return httpx2.Response(200, json=changes.get("info") or web().get("/info").json())
        answer = passing(web())(request).json()
        return httpx2.Response(200, json=answer | changes)

    return handle


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"id": "other"}, "a reply to another call"),
        ({"scores": [1.0]}, "no list of 2 scores"),
        ({"scores": "12"}, "no list of 2 scores"),
        ({"scores": [1.0, "2"]}, "'2' as a score"),
        ({"scores": [True, 1]}, "True as a score"),
        ({"scores": [1e300, 1]}, "infinite score"),
        ({"version": "v2"}, r"was version v1 and is v2 now, so its scores cannot be compared"),
    ],
)
def test_replies_that_do_not_answer_the_call(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RewardError, match=sentence) as caught:
        remote(replying(**changes))(numbered(2), texts(2))
    assert "\n" not in str(caught.value)


def test_a_server_that_is_restarted_with_another_reward_is_seen() -> None:
    servers = [web(version="v1"), web(lambda images: images.mean((1, 2, 3)), version="v2")]
    reward = remote(lambda request: passing(servers[0])(request))
    assert reward(numbered(2), texts(2)).tolist() == [0, 1]
    servers.pop(0)
    with pytest.raises(RewardError, match="serve the first one again, or start a new run"):
        reward(numbered(2), texts(2))


def test_the_client_keeps_to_the_limits_of_the_server() -> None:
    carry, seen = flaky(passing(web(images=3)))
    assert remote(carry, images=100)(numbered(7), texts(7)).tolist() == list(range(7))
    assert len(seen) == 3
    carry, seen = flaky(passing(web(bytes=4000)))
    assert remote(carry)(numbered(8), texts(8)).tolist() == list(range(8))
    assert len(seen) == 2
    with pytest.raises(RewardError, match="takes 4000 bytes at once and a picture here has 12288"):
        remote(passing(web(bytes=4000)))(numbered(1, size=32), ["x"])


def test_what_is_no_reward_server() -> None:
    def nobody(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("Connection refused")

    for carry, sentence in [
        (nobody, r"no reward server at http://127\.0\.0\.1:8000, no answer \(ConnectError: Connection"),
        (lambda request: httpx2.Response(200, text="<html>"), "what answers at .* is no reward server"),
        (lambda request: httpx2.Response(404, text="<html>"), "refused, 404: <html>"),
        (lambda request: httpx2.Response(200, json=[1]), "what answers at .* is no reward server"),
        (replying(info={"name": "x"}), "what answers at .* is no reward server"),
        (replying(info=INFO | {"max_images": 0}), "what answers at .* is no reward server"),
        (replying(info=INFO | {"max_bytes": "many"}), "what answers at .* is no reward server"),
    ]:
        with pytest.raises(RewardError, match=sentence):
            remote(carry)
    for url in ("127.0.0.1:8000", "http://", "ftp://x", "http://user@host", "http://a b", "http://[::1"):
        with pytest.raises(RewardError, match=r"wanted http://HOST:PORT"):
            Remote(url)


def test_what_cannot_be_sent() -> None:
    reward = remote(passing(web()))
    for samples, columns, sentence in [
        (torch.zeros(2, 2), {}, r"got \(2, 2\) of torch.float32; wanted images"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {}, "torch.uint8; wanted images"),
        ([1, 2], {}, "got list; wanted images"),
        (numbered(3), {}, "3 images and 2 prompts"),
        (numbered(2), {"a": [object(), 1]}, r"the columns \['a'\] are not JSON"),
        (numbered(2), {"a": [float("nan"), 1]}, r"the columns \['a'\] are not JSON"),
    ]:
        with pytest.raises(RewardError, match=sentence):
            reward(samples, texts(2), **columns)


@pytest.mark.parametrize("token", ["", "two words", "naïve", "a\nb"])
def test_tokens_that_no_header_can_carry(token: str) -> None:
    with pytest.raises(RewardError, match="wanted letters, digits and signs"):
        remote(passing(web()), token=token)


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dict[str, Any]()
    monkeypatch.setattr(
        "tropism.rewards.remote.Remote", lambda url, token, **rest: made.update(rest, url=url, token=token)
    )
    variables = {"TOKEN": "t", "TIMEOUT": "7.5", "ATTEMPTS": "2", "IMAGES": "5"}
    from_environment("http://h:1", {f"TROPISM_REWARD_{name}": value for name, value in variables.items()})
    assert made == {"url": "http://h:1", "token": "t", "patience": Patience(7.5, 2), "images": 5}
    with pytest.raises(RewardError, match="TROPISM_REWARD_IMAGES is 'many'; wanted a number such as 16"):
        from_environment("http://h:1", {"TROPISM_REWARD_IMAGES": "many"})
    with pytest.raises(RewardError, match="wanted a timeout above 0"):
        from_environment("http://h:1", {"TROPISM_REWARD_TIMEOUT": "0"})
