"""Shared attention: aligned words copy their maps, places attend as in the picture, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from families import ROWS
from policies import seeded
from torch import Tensor

from tropism import pictures
from tropism.models.shared_attention import Sharing, aligned
from tropism.steer import steer
from tropism.steering import infedit

HEADS, WIDTH, WORDS, PLACES = 2, 8, 5, 16


def layer(cross: bool) -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention(WIDTH, WIDTH if cross else None, heads=HEADS, dim_head=4).eval()


def states(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=seeded(seed))


def maps(attn: Attention, x: Tensor, words: Tensor) -> Tensor:
    """(R, heads, T, L)."""
    query, key = attn.head_to_batch_dim(attn.to_q(x)), attn.head_to_batch_dim(attn.to_k(words))
    return attn.get_attention_scores(query, key).unflatten(0, (len(x), HEADS))


def mapped(attn: Attention, weights: Tensor, words: Tensor) -> Tensor:
    value = attn.head_to_batch_dim(attn.to_v(words))
    return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(weights.flatten(0, 1), value)))


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ([0, 5, 6, 7, 9], [0, 5, 8, 7, 9], [0, 1, -1, 3, 4]),
        ([0, 5, 7, 9, 9], [0, 5, 6, 7, 9], [0, 1, -1, 2, 3]),
        ([0, 5, 6, 7, 9], [0, 5, 6, 7, 9], [0, 1, 2, 3, 4]),
        ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [-1] * 5),
    ],
    ids=["a word changed", "a word came", "nothing changed", "all changed"],
)
def test_words_of_both_captions_are_found(before: list[int], after: list[int], found: list[int]) -> None:
    assert aligned([before], [after]).tolist() == [found]


def test_aligned_words_copy_the_map_of_the_picture() -> None:
    attn, place = layer(True), torch.tensor([[0, 1, -1, 2, 3], [0, -1, 2, 3, 4]])
    x, words = states(8, PLACES), states(8, WORDS, 1)
    with torch.no_grad():
        answer = Sharing(place, cross=True, own=True)(attn, x, words)
        own = maps(attn, x, words)
        expected = own.clone()
        for row in range(2):
            for word, origin in enumerate(place[row].tolist()):
                if origin >= 0:
                    expected[2 + row, :, :, word] = own[row, :, :, origin]
        assert torch.allclose(answer, mapped(attn, expected, words), atol=1e-6)
        plain = AttnProcessor()(attn, x, words)
    rest = torch.tensor([0, 1, 4, 5, 6, 7])  # the pictures, and all rows without the caption
    assert torch.allclose(answer[rest], plain[rest], atol=1e-6)
    assert float((answer[2:4] - plain[2:4]).abs().min(2).values.max()) > 1e-4


def test_places_attend_as_in_the_picture_to_values_of_their_own() -> None:
    attn, x = layer(False), states(8, PLACES)
    with torch.no_grad():
        answer = Sharing(torch.zeros(2, WORDS, dtype=torch.long), cross=True, own=True)(attn, x)
        own = maps(attn, x, x)
        own[2:4], own[6:8] = own[0:2], own[4:6]
        assert torch.allclose(answer, mapped(attn, own, x), atol=1e-6)


def test_what_is_not_shared_is_diffusers_own() -> None:
    place = torch.tensor([[0, 1, -1, 2, 3], [0, -1, 2, 3, 4]])
    with torch.no_grad():
        for attn, words in ((layer(True), states(4, WORDS, 1)), (layer(False), None)):
            answer = Sharing(place, cross=False, own=False, blend=0.5)(attn, states(4, PLACES), words)
            assert torch.equal(answer, AttnProcessor()(attn, states(4, PLACES), words))


def test_nothing_moves_where_no_changed_word_is_attended_to() -> None:
    """A word that went is seen at places 0 to 7 by the picture, the word that came at 8 to 11 by the edit."""
    weights = torch.zeros(2, 1, PLACES, 3)
    weights[0, :, :8, 1], weights[1, :, 8:12, 1] = 1.0, 0.8
    weights[..., 0] = 1 - weights[..., 1]
    sharing = Sharing(torch.tensor([[0, -1, 2]]), cross=False, own=False, blend=0.5)
    sharing._refined(weights)
    found = sharing.mask(torch.zeros(1, 3, 4, 4))
    assert found.flatten().tolist() == [1.0] * 12 + [0.0] * 4
    finer = sharing.mask(torch.zeros(1, 3, 8, 8))
    assert float(finer[0, 0, :3].min()) == 1 and float(finer[0, 0, 7].max()) == 0
    same = Sharing(torch.tensor([[0, 1, 2]]), cross=True, own=True, blend=0.5)
    same._refined(weights)
    assert float(same.mask(torch.zeros(1, 3, 4, 4)).max()) == 0


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("name", ["sd", "sdxl", "lcm"])
def test_a_pipeline_edits_so_and_draws_as_before(
    name: str, onednn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ROWS[name].model(onednn=onednn)
    told = dict(num_inference_steps=4, output_type="latent", num_images_per_prompt=3, guidance_scale=2.0)

    def plain() -> Tensor:
        return steer(model, lambda images: [0.0] * len(images), [])(["a fox"], **told).images

    before, processors = plain(), dict(model._network().attn_processors)
    pictures.save(pictures.to_image(model.decode(before)[0]), tmp_path / "fox.png")
    monkeypatch.setattr(type(model), "latents", lambda self, images: before[:1])

    def edited(prompt: str, **settings: float) -> Tensor:
        guide = infedit.Settings(str(tmp_path / "fox.png"), "a fox", **settings)
        guide.check()
        pipeline = steer(model, lambda images: [0.0] * len(images), guide, batch_size=2)
        return pipeline([prompt], **told).images

    exact = dict(atol=2e-4 * float(before.abs().max()))
    ways = [dict(cross_share=1.0), dict(self_share=1.0), dict(cross_share=0.5, self_share=0.5, blend=0.3)]
    for way in ways:
        assert torch.allclose(edited("a fox", **way), before[:1].expand_as(before), **exact)
    freely = edited("a green hill")
    assert all(float((edited("a green hill", **way) - freely).abs().max()) > 1e-3 for way in ways)
    assert torch.equal(edited("a green hill", cross_share=0.0, self_share=0.0), freely)
    assert dict(model._network().attn_processors) == processors
    assert torch.equal(plain(), before)


def test_processors_come_back_when_the_network_fails() -> None:
    model = ROWS["sd"].model()
    before = dict(model._network().attn_processors)
    control = model.shared_attention(["a fox"], ["a hill"], 1.0, 1.0)
    with pytest.raises(ValueError, match=r"cannot be shared by 2 rows"), torch.no_grad(), control(torch.arange(1), 0.0):
        model.denoiser(torch.randn(3, *model.latent_shape), torch.full((3,), 0.5), model.encode(["a fox"] * 3))
    assert dict(model._network().attn_processors) == before


def test_models_without_such_attention_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROWS["sd3"].model()
    pictures.save(pictures.to_image(torch.zeros(3, 16, 16)), tmp_path / "fox.png")
    monkeypatch.setattr(type(model), "latents", lambda self, images: torch.zeros(1, *self.latent_shape))
    guide = infedit.Settings(str(tmp_path / "fox.png"), "a fox", self_share=0.5)
    with pytest.raises(ValueError, match="need a UNet's attention, which this model has not"):
        steer(model, lambda images: [0.0] * len(images), guide)(["a hill"], num_inference_steps=2)
    clips = ROWS["animatediff"].model()
    with pytest.raises(ValueError, match="attention of a clip model cannot be shared"):
        clips.shared_attention(["a"], ["b"], 1.0, 1.0)
    for wrong, said in ((dict(cross_share=1.5), "cross_share is 1.5"), (dict(blend=1.0), "blend is 1.0")):
        with pytest.raises(ValueError, match=said):
            infedit.Settings(str(tmp_path / "fox.png"), "a fox", **wrong).check()
