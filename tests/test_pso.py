"""PSO: which samples make a pair, what their likelihood is, the loss of their margin, and pairs that are at hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import MODES, PROMPTS, TANGENT, Off, batch, distilled, toy, weights
from PIL import Image
from small_run import refused, said, train_words
from torch import Tensor

from tropism import catalog
from tropism.base import Prompts
from tropism.config import BadInput
from tropism.data.prompts import PromptSet, batches, read_prompts
from tropism.denoisers import denoising_error, target_of
from tropism.duels import best_and_worst
from tropism.losses.preference import logistic
from tropism.methods.pso import PSO, Settings
from tropism.policy import Policy
from tropism.samplers import DDIM, Consistency, FlowSDE, solver
from tropism.schedules import add_noise
from tropism.train import train

NAN = math.nan
SMALL: dict[str, Any] = dict(inference_steps=4, prompts_per_step=8, images_per_prompt=4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wanted_points(batch: Prompts, generator: torch.Generator) -> Tensor:
    """What the toy is to draw: 0.6 beside the mode of the prompt, standard deviation 0.15."""
    place = torch.tensor([PROMPTS.index(prompt) for prompt in batch.text])
    centres = MODES[place] + 0.6 * TANGENT[place]
    return centres + 0.15 * torch.randn(centres.shape, generator=generator)


def points_in_pairs(batch: Prompts, generator: torch.Generator) -> Tensor:
    """The same, before points at the mode itself."""
    wanted = wanted_points(batch, generator)
    place = torch.tensor([PROMPTS.index(prompt) for prompt in batch.text])
    return torch.stack([wanted, MODES[place] + 0.1 * torch.randn(wanted.shape, generator=generator)], dim=1)


def offline(model: Any, **changes: Any) -> PSO:
    """With targets, or pairs where the settings say so."""
    settings = Settings(**(SMALL | dict(source="targets") | changes))
    settings.check()
    given = {"pairs": points_in_pairs} if settings.needs_pairs else {"pictures": wanted_points}
    return settings.build(model, Off(), seeded(), **given)


# --- the loss ---


def test_the_logistic_loss_is_that_of_the_label() -> None:
    margin = torch.tensor([[-40.0, -1.0, 0.0], [0.5, 3.0, 40.0]], dtype=torch.float64)
    torch.testing.assert_close(logistic(margin), torch.log1p((-margin).exp()), rtol=1e-12, atol=0.0)
    assert logistic(torch.tensor(-1e4)).item() == 1e4  # no overflow


def test_smoothing_has_its_optimum_at_the_log_odds() -> None:
    chance = 0.1
    margin = torch.tensor([math.log((1 - chance) / chance), 5.0], dtype=torch.float64, requires_grad=True)
    loss = logistic(margin, chance)
    flipped = 0.9 * logistic(margin) + 0.1 * logistic(-margin)
    torch.testing.assert_close(loss, flipped, rtol=1e-12, atol=0.0)
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    assert abs(slope[0]) < 1e-12 and slope[1] > 0
    for nonsense in (-0.1, 0.5):
        with pytest.raises(ValueError, match=r"wanted 0 to below 0\.5"):
            logistic(margin, nonsense)


# --- pairs ---


def test_the_best_meet_the_worst_where_one_is_better() -> None:
    """Group 5 has four scores, group 7 two that are equal, group 2 only one, group 1 two."""
    reward = torch.tensor([1.0, 4.0, NAN, 2.0, 3.0, 7.0, 7.0, NAN, 1.0, 2.0, 9.0])
    group = torch.tensor([5, 5, 5, 5, 5, 7, 7, 2, 2, 1, 1])
    assert best_and_worst(reward, group).tolist() == [[1, 0], [10, 9]]
    assert best_and_worst(reward, group, 2).tolist() == [[1, 0], [4, 3], [10, 9]]
    assert best_and_worst(reward, group, 9).tolist() == [[1, 0], [4, 3], [10, 9]]
    assert best_and_worst(torch.full((3,), NAN), torch.zeros(3)).shape == (0, 2)


def test_online_every_random_hop_of_both_chains_is_a_duel() -> None:
    model = distilled("eps", 4)
    method = Settings(**SMALL).build(model, Off(), seeded())
    assert isinstance(method.policy.kernel, Consistency) and method.beta == 50
    ((duels,),) = [list(update) for update in method.experience(batch(4))]
    assert duels.x.shape == (8 * 3, 2, 2) and sorted(set(duels.t.tolist())) == sorted(model.grid(4)[:3].tolist())
    assert (duels.s > 0).all()  # the last hop has no density
    loss = method.loss(duels)
    assert loss.total.item() == pytest.approx(24 * math.log(2), rel=1e-6)  # nothing has moved yet
    assert loss.metrics["margin"] == 0 and duels.info["reward_mean"] < 0


def test_the_margin_is_that_of_the_kernels_log_probabilities() -> None:
    """By hand, after the model has moved."""
    model = distilled("eps", 4, double=True)
    method = Settings(**SMALL, ratio_range=0.0, beta=2.0).build(model, Off(), seeded())
    ((duels,),) = [list(update) for update in method.experience(batch(4))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)

    def log_prob(side: int) -> Tensor:
        answer = model.denoiser(duels.x[:, side], duels.t, duels.cond).x0
        alpha, sigma = (f(duels.s)[:, None] for f in (model.schedule.alpha, model.schedule.sigma))
        return (-0.5 * ((duels.y[:, side] - alpha * answer) / sigma).square()).mean(1)

    with torch.no_grad():
        now = log_prob(0) - log_prob(1)
        with model.reference():
            before = log_prob(0) - log_prob(1)
        loss = method.loss(duels)
    margin = 2.0 * (now - before)
    assert margin.abs().max() > 1e-3
    assert loss.total.item() == pytest.approx(float(logistic(margin).sum()), rel=1e-6)
    assert loss.metrics["margin"].item() == pytest.approx(float(margin.mean()), rel=1e-4, abs=1e-6)


class Fixed:
    """A source of which nothing is asked but likelihoods: the parameter's own, and 0 before."""

    def __init__(self, model: Any, gain: Tensor) -> None:
        self.calls, self.gain = 0, gain

    def passes(self, *_: Any) -> Any:
        raise NotImplementedError

    def log_prob(self, policy: Policy, duels: Any) -> Tensor:
        self.calls += 1
        return self.gain if self.calls % 2 == 0 else torch.zeros_like(self.gain)


def test_bounds_stop_what_is_gained_and_not_what_is_lost() -> None:
    """Winner and loser: beyond their goal, within, and on the wrong side of the bounds."""
    gain = torch.tensor([[0.5, -0.5], [0.05, -0.05], [-0.5, 0.5]], requires_grad=True)
    model = toy()
    method = PSO(Policy(model, DDIM(1.0), 4), Fixed(model, gain), beta=10.0, ratio_range=0.1)
    loss = method.loss(None)  # type: ignore[arg-type]
    most = math.log(1.1) - math.log(0.9)
    wanted = logistic(torch.tensor([10 * most, 1.0, -10.0])).sum()
    assert loss.total.item() == pytest.approx(float(wanted), rel=1e-6)
    (slope,) = torch.autograd.grad(loss.total, gain)
    assert not slope[0].any() and (slope[1:, 0] < 0).all() and (slope[1:, 1] > 0).all()


def test_a_flow_without_hops_is_tuned_by_its_random_moves() -> None:
    """The last of them is random too, but nobody sees its noise except as noise."""
    model = toy("flow").few_step("ode", 4)
    method = Settings(**SMALL).build(model, Off(), seeded())
    assert isinstance(method.policy.kernel, FlowSDE)
    ((duels,),) = [list(update) for update in method.experience(batch(4))]
    assert len(duels.t) == 24 and set(duels.t.tolist()) == set(model.grid(4)[:3].tolist())


# --- what is at hand ---


@pytest.mark.parametrize("source", ["targets", "pairs"])
def test_offline_both_are_noised_alike_at_the_models_times(source: str) -> None:
    model = distilled("eps", 4)
    method = offline(model, source=source, epochs=2, updates=2)
    updates = [list(update) for update in method.experience(batch(8))]
    assert [sum(len(duels.t) for duels in update) for update in updates] == [32] * 4 and method.beta == 5
    duels = updates[0][0]
    assert set(duels.t.tolist()) == set(model.grid(4)[:-1].tolist())
    assert torch.equal(duels.y[:, 0], duels.y[:, 1]) and len(duels.y[:, 0].unique(dim=0)) == len(duels.y)
    assert not torch.equal(updates[0][0].y, updates[2][0].y)  # fresh noise each pass
    loss = method.loss(duels)
    assert loss.total.item() == pytest.approx(len(duels.t) * math.log(2), rel=1e-6)


@pytest.mark.parametrize("target", ["eps", "flow"])
def test_the_denoising_error_is_in_the_networks_own_target(target: Any) -> None:
    model = toy(target)
    hops = model.few_step("consistency", 4)
    assert target_of(hops.denoiser) == target
    x0, eps, t = (
        torch.randn(6, 2, generator=seeded()),
        torch.randn(6, 2, generator=seeded(1)),
        torch.linspace(0.1, 1, 6),
    )
    cond = model.encode(PROMPTS[:6])
    with torch.no_grad():
        said = model.net(add_noise(model.schedule, x0, eps, t), model.schedule.net_time(t), cond)
        found = denoising_error(model.denoiser, x0, eps, t, cond)
        by_hops = denoising_error(hops.denoiser, x0, eps, t, cond)
    error = (said - (eps if target == "eps" else eps - x0)).square().mean(1)
    torch.testing.assert_close(found, error, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by_hops, error, rtol=1e-3, atol=1e-5)  # c_skip is 6e-6 at the first of these times


@pytest.mark.parametrize("source", ["targets", "pairs"])
def test_offline_an_update_does_not_depend_on_minibatches(source: str) -> None:
    changes = []
    for minibatch in (64, 7):
        model = distilled("eps", 4, double=True)
        before, method = weights(model), offline(model, source=source, minibatch=minibatch)
        train(method, [batch(4)], torch.optim.SGD(model.parameters(), lr=1e-3), steps=1, max_norm=0)
        changes.append(weights(model) - before)
    assert changes[0].norm() > 0 and (changes[0] - changes[1]).norm() < 1e-12 * changes[0].norm()


def test_offline_it_comes_to_the_targets_and_keeps_their_spread() -> None:
    """Where regression on them collapses to a point: benchmarks/pso_against_naive.py."""
    model = distilled("eps", 4)
    work = batches(PromptSet(PROMPTS), 8, 8, 0)
    train(offline(model), work, torch.optim.AdamW(model.parameters(), lr=1e-3), steps=60)
    text = list(PROMPTS) * 64
    points = Policy(model, solver(model.denoiser), 4, microbatch=1024).images(text, seeded(1))
    centres = MODES + 0.6 * TANGENT
    bias = sum(float((points[i::8].mean(0) - centres[i]).norm()) for i in range(8)) / 8
    spread = sum(float(points[i::8].std(0).mean()) for i in range(8)) / 8
    assert bias < 0.2 and 0.7 * 0.15 < spread < 1.4 * 0.15  # 0.6 away, and 0.09, at the start


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    for name, grey in {"dark": 0, "light": 255}.items():
        Image.new("RGB", (4, 4), (grey,) * 3).save(tmp_path / f"{name}.png")
    files = {name: str(tmp_path / f"{name}.png") for name in ("dark", "light")}
    rows = [
        {"prompt": "a", "jpg_0": files["light"], "jpg_1": files["dark"], "label_0": 1},
        {"prompt": "b", "jpg_0": files["light"], "jpg_1": files["dark"], "label_0": 0.0},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_pairs_of_a_file_come_with_the_preferred_first(pairs_file: Path) -> None:
    prompts = read_prompts(pairs_file)
    pictures = catalog.pairs(str(pairs_file), prompts)(prompts.batch([0, 1, 0], 1), seeded())
    assert pictures.shape == (3, 2, 3, 4, 4)
    assert pictures.mean((2, 3, 4)).tolist() == [[1, 0], [0, 1], [1, 0]]


def test_the_command_learns_from_pairs(pairs_file: Path, tiny_lcm: Path, monkeypatch: Any, capsys: Any) -> None:
    """And refuses a file without them, before anything is written."""
    monkeypatch.chdir(pairs_file.parent)
    for name in ("dark", "light"):
        Image.open(f"{name}.png").resize((16, 16)).save(f"{name}.png")
    changes = {"model": str(tiny_lcm), "source": "pairs", "eval_every": "0", "save_every": "0"}
    result = said(train_words("pso", **changes, prompts=pairs_file.name, out="run"), capsys)
    assert result.code == 0, result.err
    (pairs_file.parent / "prompts.txt").write_text("a red fox\ntwo blue cubes\n")
    assert "there is no column jpg_0" in refused(train_words("pso", **changes), capsys)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"label_0": 0.5}, "label_0 says 0.5; wanted 1 where jpg_0 is preferred and 0 where jpg_1 is; leave ties out"),
        ({"label_0": True}, "label_0 says True"),
        ({"label_0": "1"}, "label_0 says '1'"),
        ({"jpg_1": "gone.png"}, "the column jpg_1 names 'gone.png', which is no file"),
        ({"jpg_0": None}, "there is no column jpg_0; wanted jpg_0, jpg_1 (paths of pictures) and label_0"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(pairs_file: Path, change: dict[str, Any], sentence: str) -> None:
    rows = [json.loads(line) | change for line in pairs_file.read_text().split("\n")]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    pairs_file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(BadInput) as caught:
        catalog.pairs("pairs.jsonl", read_prompts(pairs_file))
    assert sentence in str(caught.value) and str(caught.value).startswith("prompts is pairs.jsonl: ")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (Settings(inference_steps=1), "inference_steps is 1 and images_per_prompt 8; wanted at least 2"),
        (Settings(images_per_prompt=1), "images_per_prompt 1; wanted at least 2"),
        (Settings(pairs_per_prompt=0), "pairs_per_prompt is 0"),
        (Settings(ratio_range=1.0), "ratio_range is 1.0"),
        (Settings(smoothing=0.5), "smoothing 0.5"),
        (Settings(beta=0.0), "beta is 0.0"),
        (Settings(eta=0.0), "eta 0.0"),
        (Settings(epochs=0), "epochs is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Settings, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        settings.check()
