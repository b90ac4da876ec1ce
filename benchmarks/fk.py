"""Feynman-Kac steering of the scenes flow model against one sample, best-of-n and beams at equal network calls.

    python benchmarks/fk.py --arms levels                      # what noise costs: one sample a caption at each level
    python benchmarks/fk.py --arms ode sde fk beam --reward scenes
    python benchmarks/fk.py --arms overhead

Every arm draws for the same captions. A particle system shows its best sample by the reward it was steered with; the
verified rate is the share of these that pass ``scenes_pass``, "by draw" that of one sample drawn by weight. Calls are
rows of the network and of the reward, a caption. JSON and pictures go to ``--out``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, Schedule
from tropism.catalog import build_reward, load_model, parse_reward, read_prompt_set
from tropism.evaluate import first_images, interval, paired_gain
from tropism.particles import (
    POTENTIALS,
    Particles,
    Score,
    Trace,
    Walker,
    beam_search,
    best_of_n,
    fk_steer,
    schedule,
)
from tropism.pictures import grid, save
from tropism.policy import Policy
from tropism.randomness import normal, row_generators, row_seeds
from tropism.samplers import EulerODE, FlowSDE

Made = tuple[Particles, Trace]


class Timed:
    """A denoiser (or, by ``wrap``, a reward) that adds up the processor seconds spent in it."""

    def __init__(self, inner: Denoiser) -> None:
        self.within, self.seconds = inner, 0.0

    @property
    def schedule(self) -> Schedule:
        return self.within.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        began = time.process_time()
        said = self.within(x, t, cond)
        self.seconds += time.process_time() - began
        return said

    def wrap(self, score: Score) -> Score:
        def timed(x0: Tensor, rows: Tensor) -> Tensor:
            began = time.process_time()
            value = score(x0, rows)
            self.seconds += time.process_time() - began
            return value

        return timed


class Bench:
    """The model, the captions, and how an arm is run and judged."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, device = args, torch.device("cpu")
        self.model = load_model("scenes-flow", torch.bfloat16, device)
        prompts = read_prompt_set(args.prompts)
        self.text = list(first_images(prompts, args.captions).text)
        self.rewards = {
            name: build_reward(parse_reward(name), "scenes-flow", device) for name in (args.reward, "scenes_pass")
        }
        self.rows: list[dict[str, object]] = []
        self.passes: dict[str, Tensor] = {}
        self.pictures: dict[str, Tensor] = {}

    def policy(self, noise: float) -> Policy:
        kernel = FlowSDE(noise) if noise else EulerODE()
        return Policy(self.model, kernel, self.args.steps, microbatch=self.args.microbatch)

    def score(self, count: int, name: str) -> Score:
        def scored(x0: Tensor, rows: Tensor) -> Tensor:
            texts = [self.text[row // count] for row in rows.tolist()]
            return self.rewards[name](self.model.decode(x0), texts)

        return scored

    def start(self, count: int) -> tuple[Tensor, Cond, list[torch.Generator]]:
        """Noise (P, K, ...), cond and a generator a row; caption and particle decide them, not the arm."""
        generators = row_generators(row_seeds(len(self.text) * 64, torch.Generator().manual_seed(self.args.seed)))
        own = [generators[place * 64 + k] for place in range(len(self.text)) for k in range(count)]
        x = normal((len(own), *self.model.latent_shape), own, torch.device("cpu"))
        cond = self.model.encode([text for text in self.text for _ in range(count)])
        return x.reshape(len(self.text), count, *self.model.latent_shape), cond, own

    @torch.no_grad()
    def run(self, name: str, noise: float, count: int, how: Callable[..., Made]) -> Made:
        x, cond, own = self.start(count)
        began = time.perf_counter()
        found, trace = how(self.policy(noise), x, cond, self.score(count, self.args.reward), generator=own)
        seconds = time.perf_counter() - began
        self.judge(name, found, trace, seconds)
        return found, trace

    @torch.no_grad()
    def judge(self, name: str, found: Particles, trace: Trace, seconds: float) -> None:
        shown = self.model.decode(found.at(found.best()))
        drawn = self.model.decode(found.at(found.draw(torch.Generator().manual_seed(1))))
        verify = self.rewards["scenes_pass"]
        passed, by_draw = verify(shown, self.text), verify(drawn, self.text)
        self.passes[name], self.pictures[name] = passed, shown
        rate, per = interval(passed), len(self.text)
        row: dict[str, object] = {
            "arm": name,
            "verified": [rate.mean, rate.low, rate.high],
            "pass by draw": float(by_draw.mean()),
            "calls": trace.network_rows / per,
            "reward calls": trace.reward_rows / per,
            "ess": float(found.ess.mean()),
            "unique": float(found.unique_ancestors.double().mean()),
            "reward": float(found.reward.max(1).values.nanmean()),
            "log evidence": float(found.log_evidence.mean()),
            "seconds": seconds,
        }
        self.rows.append(row)
        print(
            f"{name:34} {rate.mean:6.1%} ({rate.low:.1%} to {rate.high:.1%})  by draw {row['pass by draw']:.1%}  "
            f"calls {row['calls']:.0f} + {row['reward calls']:.0f}  ESS {row['ess']:.2f}  unique {row['unique']:.2f}  "
            f"reward {row['reward']:.3f}  {seconds:.0f} s",
            flush=True,
        )

    def gains(self, base: str) -> None:
        for name, passed in self.passes.items():
            if name != base:
                gain = paired_gain(self.passes[base], passed)
                print(f"{name} - {base}: {gain.mean:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})")

    def keep(self) -> None:
        out: Path = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        about = {"args": {k: str(v) for k, v in vars(self.args).items()}, "rows": self.rows}
        about["passes"] = {name: values.tolist() for name, values in self.passes.items()}
        (out / "fk.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        shown = {name: images[:8] for name, images in self.pictures.items()}
        if shown:
            captions = [f"{name}: {text}" for name in shown for text in self.text[:8]]
            save(grid(torch.cat(list(shown.values())), captions, columns=8), out / "fk.png")


def levels(bench: Bench) -> None:
    """One sample a caption at each noise level; 0 is the ODE."""
    for noise in bench.args.levels:
        bench.run(f"one sample, noise {noise}", noise, 1, best_of_n)


def ode(bench: Bench) -> None:
    """Chains without steering or noise; the first of each is "one sample"."""
    unsteered(bench, "ODE", 0.0)


def sde(bench: Bench) -> None:
    """The same along the SDE that is steered."""
    unsteered(bench, "SDE", bench.args.noise)


def unsteered(bench: Bench, label: str, noise: float) -> None:
    found, trace = bench.run(f"best of {bench.args.count}, {label}", noise, bench.args.count, best_of_n)
    one = replace(found, x=found.x[:, :1], log_weight=found.log_weight[:, :1], ancestor=found.ancestor[:, :1])
    one, share = replace(one, reward=found.reward[:, :1]), bench.args.count
    cost = Trace((), trace.network_rows // share, trace.reward_rows // share)
    bench.judge(f"one sample, {label}", one, cost, 0.0)


def steered(bench: Bench) -> None:
    """Every potential asked for, at every scale."""
    args = bench.args
    at = schedule(args.steps, args.every, args.first, args.last)
    for potential in args.potentials:
        for scale in args.scales:

            def how(walk: Policy, *rest: object, generator: object) -> Made:
                options = {"scale": scale, "potential": POTENTIALS[potential], "at": at, "ess_below": args.ess_below}  # noqa: B023
                return fk_steer(walk, *rest, generator=generator, **options)  # type: ignore[arg-type]

            _, trace = bench.run(f"FK {args.count}, {potential}, scale {scale:g}", args.noise, args.count, how)
            resampled = [f"{step.index}: {float(step.resampled.float().mean()):.0%}" for step in trace.steps[:-1]]
            print("    resampled at", ", ".join(resampled))


def beams(bench: Bench) -> None:
    """Half as many beams, each expanded to two at every move: the same calls of the network."""
    moves = range(bench.args.steps - 1)

    def how(walk: Policy, *rest: object, generator: object) -> Made:
        return beam_search(walk, *rest, expand=2, at=moves, generator=generator)  # type: ignore[arg-type]

    bench.run(f"beam {bench.args.count // 2} x 2", bench.args.noise, bench.args.count // 2, how)


@torch.no_grad()
def overhead(bench: Bench) -> None:
    """Processor time (one thread) outside the denoiser and the reward, of FK with rewards at every second move."""
    args, shares = bench.args, list[float]()
    policy = bench.policy(args.noise)
    for _ in range(3):
        x, cond, own = bench.start(args.count)
        timed = Timed(policy.denoiser)
        walk = Walker(policy.kernel, timed, policy.ts, args.microbatch)
        score = timed.wrap(bench.score(args.count, args.reward))
        began = time.process_time()
        fk_steer(walk, x, cond, score, scale=10.0, at=range(0, args.steps, 2), generator=own)
        wall = time.process_time() - began
        shares.append(1 - timed.seconds / wall)
        print(
            f"{wall:.2f} s of the processor, {wall - timed.seconds:.3f} s ({shares[-1]:.2%}) outside network and reward"
        )


ARMS = {"levels": levels, "ode": ode, "sde": sde, "fk": steered, "beam": beams, "overhead": overhead}


def main() -> None:
    """Runs the arms asked for."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--arms", nargs="+", choices=ARMS, default=["ode", "sde", "fk"])
    flags.add_argument("--prompts", default="scenes-held-out-pair:64")
    flags.add_argument("--captions", type=int, default=64)
    flags.add_argument("--reward", default="scenes")
    flags.add_argument("--count", type=int, default=8, help="particles of a caption")
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--noise", type=float, default=0.7, help="of the SDE")
    flags.add_argument("--levels", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 1.0])
    flags.add_argument("--potentials", nargs="+", choices=POTENTIALS, default=["difference"])
    flags.add_argument("--scales", type=float, nargs="+", default=[10.0])
    flags.add_argument("--every", type=int, default=2)
    flags.add_argument("--first", type=float, default=0.2)
    flags.add_argument("--last", type=float, default=0.8)
    flags.add_argument("--ess-below", type=float, default=1.0)
    flags.add_argument("--microbatch", type=int, default=64)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--out", type=Path, default=Path("runs/fk"))
    args = flags.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}, {args}")
    bench = Bench(args)
    for arm in args.arms:
        ARMS[arm](bench)
        bench.keep()
    for base in [name for name in bench.passes if name.startswith(("best of", "one sample,"))]:
        bench.gains(base)


if __name__ == "__main__":
    main()
