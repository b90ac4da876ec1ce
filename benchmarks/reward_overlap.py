"""How long a rollout of DDPO takes with a remote reward that is asked while the next images are sampled, and with one
that is asked in between; the scores must be equal to the last bit. The server waits as if it computed elsewhere.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from reward_load import Server

from tropism import catalog, overlap
from tropism.data.prompts import PromptSet
from tropism.methods.ddpo import Settings
from tropism.rewards.remote import Remote


def main() -> None:
    """Alternates the two orders, and prints the medians and all values."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, usual in (("images", 32), ("sample-batch", 8), ("steps", 8), ("pairs", 3)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--wait", type=float, default=0.05, help="seconds that the reward takes for an image")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = catalog.load_model("scenes", torch.float32, torch.device("cpu"))
    settings = Settings(inference_steps=args.steps, sample_batch=args.sample_batch)
    prompts = catalog.read_prompt_set("scenes").text[: args.images // 4]
    batch = PromptSet(prompts).batch(list(range(len(prompts))), 4)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), args.wait)
        try:
            server.wait()
            for _ in range(args.pairs):
                scores = []
                for threaded in seconds:
                    method = settings.build(model, Remote(server.url, images=args.sample_batch), torch.Generator())
                    with (
                        mock.patch.object(overlap, "Scoring", functools.partial(overlap.Scoring, threaded=threaded)),
                        torch.no_grad(),
                    ):
                        began = time.perf_counter()
                        scores.append(method.rollout(batch).reward)
                    seconds[threaded].append(time.perf_counter() - began)
                assert torch.equal(*scores)
        finally:
            server.kill()
    for threaded, name in ((True, "while sampling"), (False, "in between")):
        values = ", ".join(f"{value:.2f}" for value in seconds[threaded])
        print(f"{name}: {statistics.median(seconds[threaded]):.2f} s a rollout of {len(batch.text)} images ({values})")


if __name__ == "__main__":
    main()
