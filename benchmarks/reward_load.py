"""Clients that ask a reward server for scores while it is killed (-9) and restarted: is a score lost, or another's?

Every picture carries its number in its pixels and the reward reads it off, so a score says whose it is. The server is
``tropism reward serve`` in a process of its own, the clients are threads with a ``Remote`` each.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2
import torch

from tropism.rewards.remote import Patience, Remote

REWARD = """\
import time

def number(images):
    time.sleep({wait} * len(images))
    return images[:, 0, 0, 0] * 65536
"""
UP = 60.0  # seconds in which a server must answer


@dataclass
class Result:
    """What came of it."""

    images: int
    lost: int  # pictures without a score
    wrong: int  # pictures with another's score
    kills: int
    broken: int  # requests that the kills broke or kept out, and that were made again
    seconds: float


class Counting(httpx2.HTTPTransport):
    """The usual way to a server, which counts the requests that fail."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = 0

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            return super().handle_request(request)
        except httpx2.TransportError:
            self.broken += 1
            raise


class Server:
    """A server at one port, which can be killed and started again."""

    def __init__(self, folder: Path, wait: float) -> None:
        (folder / "numbered.py").write_text(REWARD.format(wait=wait))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._folder = folder
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ["reward", "serve", "./numbered.py:number", "--port", str(self.port), "--device", "cpu"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tropism", *words], cwd=self._folder, stdout=subprocess.DEVNULL
        )

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + UP
        while time.monotonic() < end and self._process.poll() is None:
            try:
                httpx2.get(f"{self.url}/health", timeout=1, trust_env=False)
                return
            except httpx2.TransportError:
                time.sleep(0.05)
        raise SystemExit(f"the server did not answer in {UP:g} seconds (exit code {self._process.poll()})")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def pictures(numbers: Sequence[int], size: int) -> torch.Tensor:
    """(N, 3, size, size) that carry their numbers, up to 65,535, exactly."""
    return torch.tensor(numbers).div(65536)[:, None, None, None].expand(-1, 3, size, size).contiguous()


def load(images: int, clients: int, kills: int, size: int = 8, wait: float = 0.001, batch: int = 50) -> Result:
    """``images`` pictures shared by ``clients``, in calls of ``batch``; a kill at each equal share of the scores."""
    shares = [list(range(images))[client::clients] for client in range(clients)]
    found, transports = dict[int, float](), [Counting() for _ in range(clients)]
    patience = Patience(timeout=30, attempts=14, backoff=0.05)

    def run(client: int, reward: Remote) -> None:
        for start in range(0, len(shares[client]), batch):
            numbers = shares[client][start : start + batch]
            scores = reward(pictures(numbers, size), [str(number) for number in numbers])
            found.update(zip(numbers, scores.tolist(), strict=True))

    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), wait)
        try:
            with ThreadPoolExecutor(clients) as pool:
                server.wait()
                rewards = [
                    Remote(server.url, patience=patience, images=10, parallel=2, transport=transport)
                    for transport in transports
                ]
                began = time.perf_counter()
                running = [pool.submit(run, *each) for each in enumerate(rewards)]
                for kill in range(1, kills + 1):
                    while len(found) < images * kill / (kills + 1) and not all(each.done() for each in running):
                        time.sleep(0.002)
                    server.kill()
                    server.start()
                for each in running:
                    each.result()
                seconds = time.perf_counter() - began
        finally:
            server.kill()
    lost = images - sum(score == score for score in found.values())
    wrong = sum(score == score and score != number for number, score in found.items())
    return Result(images, lost, wrong, kills, sum(each.broken for each in transports), seconds)


def main() -> None:
    """Prints what came of it; exit code 1 when a score was lost or another's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("images", 20_000), ("clients", 8), ("kills", 5), ("size", 64), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--wait", type=float, default=0.0, help="seconds that the reward takes for an image")
    result = load(**vars(parser.parse_args()))
    print(", ".join(f"{name} {value:,.5g}" for name, value in asdict(result).items()))
    print(f"{result.images / result.seconds:.0f} images/s, restarts included")
    sys.exit(bool(result.lost or result.wrong))


if __name__ == "__main__":
    main()
