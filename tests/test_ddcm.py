"""Editing without inversion: the same caption gives the same picture, and what captions share is not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import ROWS
from policies import seeded
from torch import Tensor

from tropism import pictures
from tropism.models.toy import MixtureDenoiser
from tropism.samplers import Consistency, walk
from tropism.samplers.ddcm import DDCM
from tropism.schedules import RectifiedFlow, ddpm_table
from tropism.steer import steer
from tropism.steering import infedit

OBJECT, BACKGROUND = 4, 12
CENTRES = torch.cat([3 * torch.eye(OBJECT), torch.zeros(OBJECT, BACKGROUND)], dim=1)
SCHEDULES = [RectifiedFlow(), ddpm_table(1000, 0.00085, 0.012, "scaled_linear")]


def mixture(schedule: object) -> MixtureDenoiser:
    """Four objects in four dimensions, beside a background that has nothing to do with them."""
    weights = torch.full((OBJECT,), 1 / OBJECT)
    return MixtureDenoiser(CENTRES, torch.full((OBJECT,), 0.5), weights, schedule, torch.eye(OBJECT) + 1e-12)


def edited(
    schedule: object, source: Tensor, before: Tensor, after: Tensor, moves: int, strength: float = 1.0
) -> Tensor:
    edit = DDCM(source, {"label": before}, "row", strength)
    cond = {"label": after, "row": torch.arange(len(source))}
    noise = torch.randn(source.shape, generator=seeded(5))
    top = 1.0 if isinstance(schedule, RectifiedFlow) else 0.999
    *_, last = edit(Consistency(), mixture(schedule), noise, torch.linspace(top, 0, moves + 1), cond, seeded(6))
    return last.x_next


def sources(count: int = 256) -> tuple[Tensor, Tensor]:
    label = torch.arange(count) % OBJECT
    return CENTRES[label] + 0.5 * torch.randn(count, OBJECT + BACKGROUND, generator=seeded(1)), label


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["flow", "table"])
@pytest.mark.parametrize("moves", [1, 4, 20])
def test_the_same_caption_gives_the_same_picture(schedule: object, moves: int) -> None:
    clean, label = sources()
    assert torch.allclose(edited(schedule, clean, label, label, moves), clean, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["flow", "table"])
@pytest.mark.parametrize("moves", [4, 20])
def test_the_object_changes_and_the_background_does_not(schedule: object, moves: int) -> None:
    clean, label = sources()
    other = (label + 1) % OBJECT
    found = edited(schedule, clean, label, other, moves)
    seen = torch.cdist(found[:, :OBJECT], CENTRES[:, :OBJECT]).argmin(1)
    assert float((seen == other).float().mean()) == 1.0
    assert torch.allclose(found[:, OBJECT:], clean[:, OBJECT:], atol=1e-5)
    regenerated = walk(Consistency(), mixture(schedule), torch.randn(clean.shape, generator=seeded(5)),
                       torch.linspace(0.99, 0, moves + 1), {"label": other}, seeded(6))  # fmt: skip
    *_, last = regenerated
    assert float((last.x_next - clean)[:, OBJECT:].square().mean()) > 0.1


def test_less_strength_makes_fewer_moves() -> None:
    clean, label = sources(8)
    edit = DDCM(clean, {"label": label}, "row", 0.5)
    cond = {"label": (label + 1) % OBJECT, "row": torch.arange(8)}
    moves = list(edit(Consistency(), mixture(RectifiedFlow()), clean, torch.linspace(1, 0, 11), cond, seeded()))
    assert len(moves) == 5 and float(moves[0].t[0]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"strength is 0\.0"):
        DDCM(clean, {"label": label}, "row", 0.0)


def test_attending_is_told_of_every_pass_and_its_mask_keeps_what_it_covers() -> None:
    clean, label = sources(8)
    inside, told = torch.cat([torch.zeros(OBJECT), torch.ones(BACKGROUND)]), []

    @contextmanager
    def attending(rows: Tensor, done: float) -> Iterator[Callable[[Tensor], Tensor | None]]:
        told.append((rows.tolist(), done))
        yield lambda like: None if done < 0.5 else inside
        told.append("left")

    edit = DDCM(clean, {"label": label}, "row", attending=attending)
    cond = {"label": (label + 1) % OBJECT, "row": torch.arange(8)}
    moves = list(edit(Consistency(), mixture(RectifiedFlow()), clean, torch.linspace(1, 0, 5), cond, seeded()))
    rows = list(range(8))
    assert told == [(rows, 0.0), "left", (rows, 0.25), "left", (rows, 0.5), "left", (rows, 0.75), "left"]
    assert float((moves[1].prediction.x0 - clean)[:, :OBJECT].abs().max()) > 0.5
    assert torch.equal(moves[-1].x_next[:, :OBJECT], clean[:, :OBJECT])


def test_a_picture_comes_back_from_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random encoder of a tiny pipeline inverts nothing, so the latent of the picture is said to be what it is."""
    for name in ("sd", "sd3", "lcm"):
        model = ROWS[name].model()
        told = dict(num_inference_steps=4, output_type="latent", num_images_per_prompt=3)
        plain = steer(model, lambda images: [0.0] * len(images), [])(["a fox"], **told).images
        pictures.save(pictures.to_image(model.decode(plain)[0]), tmp_path / "fox.png")
        guide = infedit.Settings(str(tmp_path / "fox.png"), "a fox")
        guide.check()
        with monkeypatch.context() as patched:
            patched.setattr(type(model), "latents", lambda self, images, found=plain[:1]: found)
            pipeline = steer(model, lambda images: [0.0] * len(images), guide, batch_size=2)
            same, other = (pipeline([text], **told).images for text in ("a fox", "a green hill"))
        assert torch.allclose(same, plain[:1].expand_as(same), atol=2e-4 * float(plain.abs().max()))
        assert float((other - plain[:1]).abs().max()) > 0.01
