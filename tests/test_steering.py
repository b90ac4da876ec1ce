"""The frame of steering: samples that depend on their seed alone, costs that are counted, guides that compose, outputs
that are the pipeline's own."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import ROWS
from PIL import Image
from policies import Line, seeded
from small_run import refused, said, small_place
from torch import Tensor

from tropism import catalog
from tropism.base import Cond, Denoiser, Prediction, Prompts, Schedule
from tropism.config import BadInput
from tropism.evaluate import deterministic, draw_images
from tropism.models.toy import GaussianPolicy
from tropism.policy import Policy
from tropism.randomness import branches, row_seeds
from tropism.rewards import as_reward
from tropism.samplers import DDIM
from tropism.steer import steer
from tropism.steering import Plain, Steered, Task, Trace, image_seeds, steer_policy
from tropism.steering.beam import Settings as Beam
from tropism.steering.best_of_n import Settings as BestOfN
from tropism.steering.fk import Settings as Fk

NAMES = ["left", "right", "up"]
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
COMMAND = ["--model", "model", "--reward", "brightness"]


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    return tmp_path


def toy(guidance: float = 1.0, microbatch: int = 64) -> Policy:
    return Policy(GaussianPolicy(NAMES, MEANS, 0.5), DDIM(1.0), 6, guidance, microbatch=microbatch)


def asked(*names: str) -> Prompts:
    return Prompts(list(names), torch.arange(len(names)), {})


def drawn(steerers: list, names: list[str], seeds: Tensor, **policy) -> tuple[Steered, Trace]:
    return steer_policy(toy(**policy), Line(), asked(*names), steerers, seeds)


@dataclass(frozen=True)
class Moved:
    """A guide: the inner belief with x0 times ``factor``, then plus ``shift``."""

    factor: float = 1.0
    shift: float = 0.0

    def check(self) -> None:
        pass

    def guide(self, task: Task) -> Task:
        return task.guided(lambda inner: _Moved(inner, self))


@dataclass(frozen=True, eq=False)
class _Moved:
    inner: Denoiser
    how: Moved

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        x0, eps = self.inner(x, t, cond)
        return Prediction(x0 * self.how.factor + self.how.shift, eps)


def test_branches_begin_with_the_seed_itself() -> None:
    seeds = row_seeds(5, seeded())
    wide = branches(seeds, 4)
    assert torch.equal(wide[:, 0], seeds) and len(wide.unique()) == 20
    assert torch.equal(branches(seeds[2:3], 6)[0, :4], wide[2])


def test_plain_is_how_the_policy_draws() -> None:
    seeds = image_seeds(3, 7)
    found, trace = drawn([], NAMES, seeds)
    assert torch.equal(found.latents, torch.cat(list(draw_images(toy(), NAMES, 7))))
    assert (trace.calls, trace.scored) == (6, 0)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_best_of_n_costs_n_and_is_the_best_of_them(guidance: float) -> None:
    seeds = image_seeds(3, 1)
    found, trace = drawn([BestOfN(particles=5)], NAMES, seeds, guidance=guidance)
    every = [
        steer_policy(toy(guidance), Line(), asked(*NAMES), [], branches(seeds, 5)[:, place])[0].latents
        for place in range(5)
    ]
    scores = torch.stack([each @ Line.direction for each in every])
    assert torch.allclose(found.latents @ Line.direction, scores.max(0).values, atol=1e-6)
    assert bool((scores.max(0).values > scores[0]).any())
    assert (trace.calls, trace.scored) == (6 * 5 * (1 if guidance == 1 else 2), 5)
    assert trace.seconds > trace.reward_seconds > 0


SEARCHES = [BestOfN(particles=3), Fk(particles=3, every=1, scale=2.0), Beam(particles=2, every=1)]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: type(search).__module__.rpartition(".")[2])
def test_a_sample_depends_on_its_seed_alone(search: BestOfN) -> None:
    seeds = image_seeds(3, 2)
    together, _ = drawn([search], NAMES, seeds)
    small, _ = drawn([search], NAMES, seeds, microbatch=2)
    alone, _ = drawn([search], ["up"], seeds[2:])
    assert torch.allclose(together.latents, small.latents, atol=1e-6)
    assert torch.allclose(together.latents[2:], alone.latents, atol=1e-6)


@pytest.mark.parametrize(
    ("search", "moves", "scored"),
    [(SEARCHES[1], [2, 3, 4, 6], 12), (SEARCHES[2], [3, 4, 5, 6], 14)],
    ids=["fk", "beam"],
)
def test_searches_say_what_they_decided(search: Fk | Beam, moves: list[int], scored: int) -> None:
    """Six moves, of which those from 0.2 to 0.8 of the chain decide: 2, 3 and 4. A beam looks at the states after."""
    found, trace = drawn([search], NAMES * 8, image_seeds(24, 5))
    plain, _ = drawn([], NAMES * 8, image_seeds(24, 5))
    assert float(((found.latents - plain.latents) @ Line.direction).mean()) > 0.5
    assert [step["move"] for step in trace.steps] == moves
    assert trace.scored == scored
    assert all(1 <= step["unique_ancestors"] <= search.particles for step in trace.steps)
    assert all(1 <= step["ess"] <= search.particles + 1e-9 for step in trace.steps)


def test_what_has_no_score_is_never_the_best() -> None:
    def some(samples: Tensor, prompts: list[str]) -> list[float | None]:
        values: list[float | None] = samples[:, 0].tolist()
        values[values.index(max(values))] = None
        return values

    reward = as_reward(some, "some")
    found, _ = steer_policy(toy(), reward, asked("left"), [BestOfN(particles=4)], image_seeds(1, 0))
    every = steer_policy(toy(), reward, asked(*["left"] * 4), [], branches(image_seeds(1, 0), 4)[0])[0].latents[:, 0]
    assert float(found.latents[0, 0]) == pytest.approx(float(every.sort().values[-2]), abs=1e-6)


def test_guides_compose_from_the_inside_out() -> None:
    seeds = image_seeds(3, 3)
    found, _ = drawn([Moved(factor=0.0), Moved(shift=2.0)], NAMES, seeds)
    assert torch.allclose(found.latents, torch.full((3, 2), 2.0))  # the last move of DDIM is to x0
    found, _ = drawn([Moved(shift=2.0), Moved(factor=0.0), BestOfN(particles=2)], NAMES, seeds)
    assert torch.allclose(found.latents, torch.zeros(3, 2))


def test_two_searches_and_strangers_are_refused() -> None:
    with pytest.raises(ValueError, match="both decide how chains are run"):
        drawn([BestOfN(), Plain()], NAMES, image_seeds(3, 0))
    with pytest.raises(ValueError, match="SimpleNamespace is neither a guide nor a search"):
        drawn([SimpleNamespace()], NAMES, image_seeds(3, 0))
    with pytest.raises(ValueError, match="wanted one seed a prompt"):
        drawn([], NAMES, image_seeds(2, 0))


def test_a_guide_says_that_it_needs_a_gradient() -> None:
    class Follows(Moved):
        def guide(self, task: Task) -> Task:
            task.score.value(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
            return task

    with pytest.raises(TypeError, match="reward 'plain' has no gradient, which this guide follows; take"):
        steer_policy(toy(), as_reward(lambda images: [0.0], "plain"), asked("up"), [Follows()], image_seeds(1, 0))


# Any pipeline.


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("animatediff")])
def test_the_output_is_the_pipelines_own(name: str) -> None:
    model = ROWS[name].model(steps=2)
    kind = type(model.output([]))
    pipeline = steer(model, brightness(), "best-of-n", particles=2)
    output = pipeline(["a fox", "a hill"], num_inference_steps=ROWS[name].steps, seed=4, output_type="pt")
    assert type(output) is kind and kind.__name__.endswith("PipelineOutput")
    assert output.images.shape == (2, 3, 16, 16) and output.trace is pipeline.trace
    plain = torch.cat(list(draw_images(deterministic(model, ROWS[name].steps), ["a fox", "a hill"], 4)))
    assert bool((output.images.mean((1, 2, 3)) >= plain.mean((1, 2, 3)) - 1e-6).all())
    assert output.trace.scored == 2


def test_clips_come_as_frames() -> None:
    model = ROWS["animatediff"].model()
    frames = model.latent_shape[1]
    pipeline = steer(model, brightness(), "best-of-n", particles=2)
    output = pipeline(["a fox"], num_inference_steps=2, output_type="pt")
    assert type(output).__name__ == "AnimateDiffPipelineOutput"
    assert output.frames.shape == (1, frames, 3, 16, 16)
    (shown,) = pipeline(["a fox"], num_inference_steps=2).frames
    assert [frame.size for frame in shown] == [(16, 16)] * frames


@pytest.mark.parametrize(("moves", "expected"), [(20, (4, 8, 12, 16)), (10, (4, 8)), (4, (1,)), (3, (1,)), (1, ())])
def test_moves_that_decide(moves: int, expected: tuple[int, ...]) -> None:
    assert Fk().decisions(moves) == expected


def brightness() -> Callable[[Tensor], Tensor]:
    def bright(images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    return bright


def test_steer_in_python() -> None:
    pipeline = steer(ROWS["sd"].model(steps=2).pipe, brightness(), BestOfN(particles=2), guidance_scale=1.0)
    output = pipeline("a fox", num_images_per_prompt=3, num_inference_steps=2)
    assert len(output.images) == 3 and isinstance(output.images[0], Image.Image)
    assert output.trace.calls == 2 * 2
    latent = pipeline("a fox", num_images_per_prompt=3, num_inference_steps=2, output_type="latent").images
    assert latent.shape[0] == 3 and latent.ndim == 4


@pytest.mark.parametrize(
    ("by", "settings", "sentence"),
    [
        ("best-of", {}, "there is no steerer 'best-of'; did you mean best-of-n?"),
        ("best-of-n+best-of-n", {}, "with best-of-n twice; give it once"),
        ("best-of-n", {"particle": 2}, "best-of-n has no setting particle; wanted some of particles"),
        ("best-of-n", {"particles": 0}, "particles is 0; wanted at least 1"),
        ("fk", {"window": (0.9, 0.1)}, "window is 0.9 0.1; wanted two shares of the chain"),
        ("fk", {"ess_below": 0.0}, "ess_below is 0.0; wanted above 0"),
        ("fk+beam", {}, "fk and beam both decide how chains are run"),
        ("fk", {"noise_level": 0.0}, "chains of one origin must part"),
        (BestOfN(), {"particles": 2}, "particles given beside steerers that are made already"),
    ],
)
def test_steer_refuses_in_one_sentence(by: str, settings: dict, sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        steer(ROWS["sd"].model(), brightness(), by, **settings)
    assert sentence in str(caught.value)


def test_a_setting_means_the_same_in_every_steerer() -> None:
    from tropism import flags

    known: dict[str, object] = {}
    for name in catalog.steerer_names():
        (kind,) = catalog.steerer_settings(name)
        for setting in flags.settings_of(kind, ""):
            assert setting.doc, f"{name} does not explain {setting.name}"
            assert known.setdefault(setting.name, setting.kind) == setting.kind, f"{setting.name} of {name}"


# The command.


def test_sample_steers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", *COMMAND, "--prompt", "a red fox", "--out", "one", "--guidance-scale", "1"]
    text = said([*words, "--steer", "best-of-n", "--particles", "3"], capsys).out
    assert "steered by best-of-n towards brightness (9 network calls an image)" in text
    assert len(list((place / "one").glob("*.png"))) == 2


def test_who_follows_no_reward_needs_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "--model", "scenes-sd", "--prompt", "a star", "--inference-steps", "2", "--out", "x.png"]
    text = said([*words, "--steer", "adaptive"], capsys).out  # of which the verifier could make nothing
    assert "steered by adaptive (" in text and "towards" not in text
    assert "Got the word 'star'" in refused([*words, "--steer", "adaptive+best-of-n", "--particles", "2"], capsys)


def test_settings_of_a_steerer_come_from_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "steer.yaml").write_text("steer: best-of-n\nparticles: 2\nguidance_scale: 1\nreward: [brightness]\n")
    words = ["sample", "--model", "model", "--config", "steer.yaml", "--prompt", "a fox", "--out", "x.png"]
    assert "(6 network calls an image)" in said(words, capsys).out


def test_compare_steering_writes_what_it_prints(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare-steering", "best-of-n", *COMMAND, "--eval-reward", "contrast", "--prompts", "prompts.txt"]
    text = said([*words, "--images", "4", "--particles", "2", "--out", "cs", "--shown", "2"], capsys).out
    assert "plain" in text and "written to cs" in text
    report = json.loads((place / "cs" / "report.json").read_text())
    plain, best = report["rows"]
    assert (plain["way"], best["way"]) == ("plain", "best-of-n")
    assert (best["calls"], best["scored"]) == (2 * plain["calls"], 2) and plain["scored"] == 0
    assert best["brightness_gain"] >= 0 and math.isclose(
        best["brightness_gain"], best["brightness"] - plain["brightness"], abs_tol=1e-6
    )
    assert set(plain["scores"]) == {"brightness", "contrast"} and len(plain["scores"]["contrast"]) == 4
    assert report["steerers"] == {"best-of-n": [{"particles": 2}]}
    with (place / "cs" / "report.csv").open() as file:
        assert [row["way"] for row in csv.DictReader(file)] == ["plain", "best-of-n"]
    assert Image.open(place / "cs" / "pictures.png").size[0] > 0 and (place / "cs" / "chart.png").is_file()


def test_each_way_keeps_its_own_default_of_a_name_they_share(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "model", "--reward", "redness"]
    ways = ["compare-steering", "mpgd", "tfg", *model, "--prompts", "prompts.txt", "--images", "2", "--shown", "1"]
    assert "(tfg: 0)" in said([*ways, "--help"], capsys).out

    def strengths(*words: str) -> list[tuple[float, float]]:
        out = f"cs{len(words)}"
        assert not said([*ways, "--inference-steps", "2", "--out", out, *words], capsys).err
        made = json.loads((place / out / "report.json").read_text())["steerers"]
        return [(each["mu"], each["scale"]) for (each,) in made.values()]

    assert strengths() == [(1.0, 10.0), (0.0, 10.0)]
    assert strengths("--mu", "0.5") == [(0.5, 10.0), (0.5, 10.0)]
    (place / "mu.yaml").write_text("mu: 2\n")
    assert strengths("--config", "mu.yaml", "--scale", "1") == [(2.0, 1.0), (2.0, 1.0)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sample", *COMMAND, "--prompt", "x"], "reward is given and steer is not"),
        (["sample", "--steer", "fkk", "--prompt", "x"], "there is no steerer 'fkk'"),
        (["sample", *COMMAND, "--steer", "best-of-n", "--particles", "0", "--prompt", "x"], "particles is 0"),
        (["sample", *COMMAND, "--particles", "2", "--prompt", "x"], "there is no setting --particles"),
        (["compare-steering", "best-of-n", "best-of-n"], "wanted one or more ways, each once"),
        (["compare-steering", "best-of-n", "--tuned", "nowhere"], "tuned is nowhere, but there is no such folder"),
        (["steerers", "nothing"], "there is no steerer 'nothing'"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    words: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.iterdir())
    assert sentence in refused(words, capsys)
    assert sorted(place.iterdir()) == before


def test_steerers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["steerers"], capsys).out
    assert all(f"{name}: " in text for name in catalog.steerer_names())
    assert "--particles" in said(["steerers", "best_of_n"], capsys).out
    assert "--particles" in said(["sample", "--steer", "best-of-n", "--help"], capsys).out
