"""CoMoSpeech on melodies: a student of one move against its teacher of fifty, with and without the prior mean.

``shipped``: students of the model melodies. ``mean``: two teachers of their own, trained alike but for the mean of the
noise (the decoder is shown it in both), and students of both by equal updates. Of 96 held-out prompts, twice each: the
mean squared error to a performance, the sliced W2 (64 directions) to performances, both in the model's units (of root
mean square 0.5) and over real frames; the share of beats that the verifier hears right, and of clips of which all is.
"Another performance" is what the data get of data. The time is that of 64 clips, sides taking turns.

    python benchmarks/comospeech.py shipped --seeds 3
    python benchmarks/comospeech.py mean --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism import catalog
from tropism.data.prompts import PromptSet, batches
from tropism.methods import comospeech, lcm
from tropism.methods.comospeech import unmasked
from tropism.models.melodies import SCALE, Decoder, Melodies, load_melodies
from tropism.policy import Policy
from tropism.samplers import DDIM
from tropism.train import train
from tropism.worlds import melodies as world

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import melodies as recipe
from consistency_toys import sliced_w2
from side_by_side import machine

PROMPTS, EACH, TEACHER = 96, 2, 50
BATCH: dict[str, Any] = dict(prompts_per_step=256, images_per_prompt=1, minibatch=32, updates=8, passes=4)
COLUMNS = ("error", "sliced W2", "beats", "all right")


def judged(drawn: Tensor, texts: list[str], real: Tensor, mask: Tensor) -> list[float]:
    """As ``COLUMNS``: x (N, 1, 48, 32) against performances of the same prompts."""
    verdicts = [
        world.verify(each, text) for each, text in zip((drawn / SCALE).clamp(0, 1)[:, 0].numpy(), texts, strict=True)
    ]
    error = ((drawn - real).square() * mask).sum() / (mask.sum() * drawn.shape[2])
    beats = sum(verdict.score for verdict in verdicts) / len(texts)
    passed = sum(verdict.passed for verdict in verdicts) / len(texts)
    return [float(error), sliced_w2((drawn * mask).flatten(1), (real * mask).flatten(1)), beats, passed]


def performances(texts: list[str], seed: int) -> Tensor:
    values = world.render_batch([world.parse(text) for text in texts], range(seed, seed + len(texts)))
    return torch.from_numpy(values)[:, None] * SCALE


def distilled(model: Melodies, seed: int, updates: int, mean: bool) -> Policy:
    """One move, after so many updates from clips of the training split."""
    model.train_full()
    kind = comospeech if mean else lcm
    settings = kind.Settings(**BATCH, student_steps=1, inference_steps=TEACHER, distance="l2", data="pictures")
    settings.check()
    method = settings.build(
        model, None, torch.Generator().manual_seed(seed), catalog.pictures("melodies", PromptSet([""]))
    )
    method = replace(method, view=unmasked)
    work = batches(PromptSet(world.prompts(4000, 0)), BATCH["prompts_per_step"], 1, seed)
    adam = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    steps = max(1, updates // (BATCH["updates"] * BATCH["passes"]))
    train(method, work, adam, steps=steps, max_norm=settings.max_grad_norm, rate=settings.rate)
    return method.policy


def ratio(teacher: Policy, student: Policy, texts: list[str]) -> str:
    """Median over three turns of the time of the teacher over that of the student."""
    took: list[list[float]] = [[], []]
    for _ in range(3):
        for side, policy in zip(took, (teacher, student), strict=True):
            start = time.process_time()
            policy.draw(texts, torch.Generator().manual_seed(0))
            side.append(time.process_time() - start)
    slow, fast = (statistics.median(side) for side in took)
    each = sorted(a / b for a, b in zip(*took, strict=True))
    return f"{slow:.3f} s and {fast:.3f} s of CPU, ratio {slow / fast:.1f} (turns: {each[0]:.1f} to {each[-1]:.1f})"


def compare(make: Callable[[], Melodies], mean: bool, options: Namespace) -> None:
    """The teacher and its students, one line each."""
    texts = world.prompts(PROMPTS, 7, "held_out") * EACH
    real, model = performances(texts, 10_000), make()
    mask = model.encode(texts)["mask"]

    def show(name: str, drawn: Tensor) -> None:
        print(f"{name:<36}" + "".join(f"{value:12.4f}" for value in judged(drawn, texts, real, mask)), flush=True)

    def draw(policy: Policy) -> Tensor:
        return policy.draw(texts, torch.Generator().manual_seed(3))

    show("another performance", performances(texts, 20_000))
    teacher = Policy(model, DDIM(0.0), TEACHER)
    show(f"teacher, {TEACHER} moves", draw(teacher))
    show("teacher, 1 move", draw(teacher.with_(steps=1)))
    for seed in range(options.seeds):
        own = make()
        student = distilled(own, seed, options.updates, mean)
        for steps in (1, 2):
            show(f"student, seed {seed}, {steps} move{'s' * (steps > 1)}", draw(student.with_(steps=steps)))
    print(f"64 clips: {ratio(teacher, student, texts[:64])}", flush=True)


def trained(mean: bool, options: Namespace, folder: Path) -> Path:
    """The weights of a teacher of its own."""
    texts, x = recipe.clips(options.clips, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Decoder(world.BINS, world.FRAMES, options.width, options.depth)
    model = Melodies(network, recipe.fit_table(texts, x), recipe.read, shifted=mean)
    recipe.train(model, x, texts, Namespace(steps=options.steps, batch=32, lr=2e-3, seed=0, check=16, out=folder))
    return folder / "melodies.safetensors"


def main() -> None:
    """Trains, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("shipped", "mean"))
    parser.add_argument("--seeds", type=int, default=3, help="students of each teacher")
    parser.add_argument("--updates", type=int, default=256, help="of a student, of 32 clips each")
    parser.add_argument("--steps", type=int, default=1000, help="of a teacher, of 32 clips each")
    parser.add_argument("--clips", type=int, default=3000, help="that a teacher learns from")
    parser.add_argument("--width", type=int, default=64, help="of the teachers")
    parser.add_argument("--depth", type=int, default=2, help="of the teachers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts, started = machine(), time.process_time()
    print(f"{facts['date']}, {facts['processor']}, one of {facts['cores']} cores, torch {torch.__version__}")
    print(f"{'':<36}" + "".join(f"{name:>12}" for name in COLUMNS))
    if options.what == "shipped":
        compare(catalog.models.melodies, True, options)
    else:
        with tempfile.TemporaryDirectory() as place:
            for mean in (True, False):
                print("with the mean" if mean else "without the mean", flush=True)
                folder = Path(place) / str(mean)
                folder.mkdir()
                file = trained(mean, options, folder)
                compare(lambda file=file, mean=mean: load_melodies(file, recipe.read, shifted=mean), mean, options)
    print(f"{time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()
