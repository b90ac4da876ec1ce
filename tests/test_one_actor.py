"""OneActor: the formula on a closed form, what is tuned and what is not, the file, and a word in prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import ROWS
from policies import seeded
from torch import Tensor

from tropism.base import Cond, Prediction
from tropism.guidance import ROW, Guided
from tropism.guidance.cluster import WORDS, Clustered, moved
from tropism.one_actor import Actor, Projector, cast, standardised, tune
from tropism.policy import Policy
from tropism.samplers import DDIM
from tropism.schedules import RectifiedFlow
from tropism.steer import steer
from tropism.steering import one_actor

LENGTH, WIDTH = 4, 3
TARGET, OTHERS = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-1.0, 0.0, 3.0])
PLACES = torch.tensor([[False, True, False, False], [False, False, True, False]])


class Linear:
    """A belief that is linear in the words: its x0 is the sum of all of them. It counts the rows it is asked for."""

    schedule = RectifiedFlow()

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.rows += len(x)
        said = cond[WORDS].sum(1)
        return Prediction(said, x - said)


def asked(t: list[float]) -> tuple[Tensor, Tensor, Cond]:
    rows = torch.arange(len(t)) % 2
    words = torch.randn(len(t), LENGTH, WIDTH, generator=seeded(3))
    return torch.randn(len(t), WIDTH, generator=seeded(4)), torch.tensor(t), {WORDS: words, ROW: rows}


def guided(scale: float = 3.0) -> tuple[Linear, Guided]:
    inner = Linear()
    return inner, Guided(inner, {WORDS: torch.full((1, LENGTH, WIDTH), 0.25)}, scale)


def clustered(inner: Guided, **settings: float) -> Clustered:
    return Clustered(inner, TARGET, OTHERS, PLACES, **settings)


def test_guidance_is_the_published_sum() -> None:
    """Of answers that are linear in the words everything is known."""
    x, t, cond = asked([0.9, 0.5, 0.7])
    found = clustered(guided(3.0)[1], likeness=0.8, exclude=0.5)(x, t, cond)
    null, plain = torch.full((3, WIDTH), 0.25 * LENGTH), cond[WORDS].sum(1)
    for half, sign in (("x0", 1.0), ("eps", -1.0)):
        base = 0.0 if half == "x0" else x
        u, toward, away = (base + sign * each for each in (null, plain + 0.8 * TARGET, plain + OTHERS))
        expected = u + 3.0 * (toward - u) - 0.5 * (away - u)
        assert torch.allclose(getattr(found, half), expected, atol=1e-5)


def test_no_likeness_is_plain_guidance() -> None:
    x, t, cond = asked([0.9, 0.5, 0.7])
    inner, plain = guided()
    found, expected = clustered(plain, likeness=0.0)(x, t, cond), plain(x, t, cond)
    assert torch.equal(found.x0, expected.x0) and torch.equal(found.eps, expected.eps)
    assert inner.rows == 2 * 2 * 3


def test_exclusion_costs_a_third_pass_and_only_where_it_is_used() -> None:
    for exclude, times, rows in ((0.0, [0.9, 0.5], 4), (0.5, [0.9, 0.5], 6), (0.5, [0.1, 0.2], 4)):
        inner, plain = guided()
        clustered(plain, exclude=exclude, low=0.33)(*asked(times))
        assert inner.rows == rows
    with pytest.raises(ValueError, match=r"exclude is 0\.5, which changes .* guidance, and there is a Linear"):
        Clustered(Linear(), TARGET, OTHERS, PLACES, exclude=0.5)


def test_rows_outside_the_times_are_left_alone() -> None:
    x, t, cond = asked([0.9, 0.2, 0.4, 0.3])
    plain = guided()[1]
    found, expected = clustered(plain, exclude=0.5, low=0.33, high=0.8)(x, t, cond), plain(x, t, cond)
    same = torch.tensor([True, True, False, True])
    assert torch.allclose(found.x0[same], expected.x0[same], atol=1e-6)
    assert float((found.x0[2] - expected.x0[2]).abs().min()) > 0.1


def test_an_offset_goes_to_the_word_of_each_row() -> None:
    words = torch.zeros(2, LENGTH, WIDTH)
    found = moved(words, PLACES, TARGET, torch.tensor([1.0, 0.5]))
    assert torch.equal(found[0, 1], TARGET) and torch.equal(found[1, 2], 0.5 * TARGET)
    assert float(found.abs().sum()) == pytest.approx(1.5 * float(TARGET.abs().sum()))


# On a pipeline.

PROMPTS = ["a x", "a x on a hill"]  # words that the small tokenizer has are letters


def drawn(count: int = 4) -> tuple[object, object]:
    model = ROWS["sd"].model()
    return model, cast(Policy(model, DDIM(0.0), 3, 2.0), PROMPTS[:1] * count)


def test_only_the_projector_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = drawn()
    kept: list[Projector] = []
    made = Projector.__init__

    def noted(self: Projector, *sizes: int) -> None:
        made(self, *sizes)
        kept.append(self)

    monkeypatch.setattr(Projector, "__init__", noted)
    weights = [parameter for part in (model.pipe.unet, model.pipe.text_encoder) for parameter in part.parameters()]
    before = [parameter.clone() for parameter in weights]
    state = torch.random.get_rng_state()
    few = tune(model, found, "x", PROMPTS, steps=1, rows=2)
    assert all(parameter.grad is None for parameter in weights)
    assert all(torch.equal(now, old) for now, old in zip(weights, before, strict=True))
    assert all(
        float(parameter.grad.abs().sum()) > 0 for name, parameter in kept[0].named_parameters() if "last" in name
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    again, more = (tune(model, found, "x", PROMPTS, steps=steps, rows=2) for steps in (1, 3))
    assert torch.equal(few.target, again.target) and not torch.equal(few.target, more.target)
    assert few.target.shape == (found_width(model),) and not torch.equal(few.target, few.others)


def found_width(model: object) -> int:
    return int(model.null()[WORDS].shape[2])


def test_a_word_is_where_it_comes_first() -> None:
    places = ROWS["sd"].model().word_places(["a x on x", "x"], "x")
    assert places.nonzero().tolist() == [[0, 2], [1, 1]]  # after the mark of the start


def test_what_features_share_is_taken_out() -> None:
    own = torch.randn(6, 3, 4, 4, generator=seeded(8))
    shared = own + 50.0 * torch.randn(1, 3, 4, 4, generator=seeded(9))
    assert torch.allclose(standardised(shared), standardised(own), atol=1e-3)
    assert torch.equal(standardised(torch.ones(3, 2)), torch.zeros(3, 2))


def test_features_are_what_the_middle_sees() -> None:
    model, found = drawn()
    seen: list[Tensor] = []
    handle = model.pipe.unet.mid_block.register_forward_hook(lambda module, given, answer: seen.append(given[0]))
    x, t = torch.randn(2, *model.latent_shape, generator=seeded(1)), torch.full((2,), 0.5)
    features = model.features(x, t, model.encode(PROMPTS))
    handle.remove()
    assert torch.equal(features, seen[0].float()) and len(found.features) == 4
    assert not model.pipe.unet.mid_block._forward_pre_hooks


def test_an_actor_steers_a_pipeline(tmp_path: Path) -> None:
    model, found = drawn()
    actor = tune(model, found, "x", PROMPTS, steps=2, rows=2)
    file = actor.save(tmp_path / "fox.safetensors")
    told = dict(num_inference_steps=3, output_type="latent")

    def images(**settings: float) -> tuple[Tensor, float]:
        guide = one_actor.Settings(str(file), **settings)
        guide.check()
        pipeline = steer(model, lambda images: [0.0] * len(images), guide, batch_size=2)
        return pipeline(PROMPTS, **told).images, pipeline.trace.calls

    plain = steer(model, lambda images: [0.0] * len(images), [])(PROMPTS, **told).images
    none, calls = images(likeness=0.0)
    assert torch.equal(none, plain) and calls == 6
    assert float((images()[0] - plain).abs().max()) > 1e-3
    assert images(exclude=1.0, times=(0.0, 1.0))[1] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["fox.safetensors"]
    with pytest.raises(ValueError, match="the prompt 'a hill' does not have the word 'x'"):
        steer(model, lambda images: [0.0] * len(images), one_actor.Settings(str(file)))(["a hill"])
    narrow = Actor("x", torch.zeros(2), torch.zeros(2)).save(tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="was tuned for words of 2 numbers and this model's have"):
        steer(model, lambda images: [0.0] * len(images), one_actor.Settings(str(narrow)))(["a x"])


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    actor = Actor("fox", TARGET, OTHERS)
    read = Actor.load(actor.save(tmp_path / "new" / "fox.safetensors"))
    assert read.word == "fox" and torch.equal(read.target, TARGET) and torch.equal(read.others, OTHERS)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="text is no actor"):
        Actor.load(tmp_path / "text")


def test_what_cannot_be_tuned_is_one_sentence() -> None:
    model, found = drawn()
    for settings, said in (
        (dict(target=9), "target is 9, rows 3 and steps 200 with 4 samples drawn"),
        (dict(rows=4), "rows 4 and steps 200 with 4 samples drawn"),
    ):
        with pytest.raises(ValueError, match=said):
            tune(model, found, "x", PROMPTS, **settings)
    with pytest.raises(ValueError, match="does not have the word"):
        tune(model, found, "x", ["a hill"], rows=2)
    with pytest.raises(ValueError, match="'fox' is 3 tokens of this model"):
        tune(model, found, "fox", ["a fox"], rows=2)
    with pytest.raises(ValueError, match="which this model has not"):
        flow = ROWS["sd3"].model()
        cast(Policy(flow, DDIM(0.0), 2), ["a fox"])
