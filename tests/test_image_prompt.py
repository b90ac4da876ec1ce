"""Image prompts: merge and subtraction exactly, diffusers' IP-Adapter to rounding, and a model left as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from families import ROWS
from PIL import Image
from safetensors.torch import load_file, save_file
from small_run import refused, said
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor

from tropism import catalog
from tropism.base import WORDS
from tropism.evaluate import deterministic
from tropism.image_prompts import relevance, weights, without_content
from tropism.models.image_prompts import IMAGES, ImagePrompted, adapted, encoder_folder, read_adapter
from tropism.models.pipelines import load_pipeline
from tropism.steer import steer
from tropism.worlds.scenes import parse, render

FOLDER = catalog.WEIGHTS / "ip"
FILE = FOLDER / "ip_adapter.safetensors"
TEXTS = ["a circle left of a star on a white background", "a red cross on a gray background"]

CAPTION = "a green circle left of a pink star on a white background"  # what the reward of scenes can read


def drawn(text: str, seed: int = 0) -> Image.Image:
    return Image.fromarray(render(parse(text), seed))


RED = drawn("a red circle on a black background")
BLUE = drawn("a blue star on a white background")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return load_pipeline(catalog.WEIGHTS / "sd", onednn=False)


def believed(model, seed: int = 1) -> Tensor:
    """What is believed of two states with their prompts, and without."""
    x, t = normal(2, *model.latent_shape, seed=seed), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        told = model.denoiser(x, t, model.encode(TEXTS)).x0
        null = {name: value.expand(2, *value.shape[1:]) for name, value in model.null().items()}
        return torch.cat([told, model.denoiser(x, t, null).x0])


# The mathematics.


def test_content_is_taken_out_as_often_as_asked() -> None:
    images, text = normal(3, 8), normal(8, seed=1)
    assert torch.equal(without_content(images, text, 0.0), images)
    assert torch.allclose(without_content(images + 0.7 * text, text, 0.7), images, atol=1e-6)
    with pytest.raises(ValueError, match="has 8 numbers and the text's 6; wanted those of one CLIP"):
        without_content(images, text[:6])


def test_relevance_is_attention_over_positions() -> None:
    """Against loops over everything: keys ask, positions answer, padding is no word."""
    query, key = normal(2, 3, 5, 4), normal(2, 2, 3, 6, 4, seed=1)
    real = torch.zeros(2, 2, 6, dtype=torch.bool)
    real[0, 0, 1:3], real[0, 1, 1:2], real[1, 0, 1:5], real[1, 1, 1:4] = True, True, True, True
    found = relevance(query, key, real)
    for b in range(2):
        for m in range(2):
            words = [i for i in range(6) if real[b, m, i]]
            each = [(query[b, h] @ key[b, m, h, i] / 2).softmax(0) for h in range(3) for i in words]
            assert torch.allclose(found[b, m], torch.stack(each).mean(0), atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(2, 2), atol=1e-6)
    with pytest.raises(ValueError, match="an entity has no words"):
        relevance(query, key, real & (torch.arange(6) > 9))


def test_weights_sum_to_one_and_are_normalised_after_heads_and_words() -> None:
    query, key, real = 3 * normal(2, 3, 5, 4), normal(2, 2, 3, 6, 4, seed=1), torch.ones(2, 2, 6, dtype=torch.bool)
    found = weights(relevance(query, key, real))
    assert torch.allclose(found.sum(1), torch.ones(2, 5), atol=1e-6) and bool((found > 0).all())
    a_head = [weights(relevance(query[:, [h]], key[:, :, [h]], real)) for h in range(3)]
    assert float((torch.stack(a_head).mean(0) - found).abs().max()) > 0.02  # the other order is another answer


def test_a_gate_moves_the_pictures_and_makes_them_no_louder() -> None:
    shares, logits = weights(normal(2, 3, 5).abs()), normal(2, 5, seed=1)
    gated = weights(shares, logits)
    assert torch.allclose(gated.sum(1).mean(-1), torch.ones(2), atol=1e-6)
    assert torch.allclose(gated.sum(1), logits.sigmoid() / logits.sigmoid().mean(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(weights(shares, torch.full((2, 5), 0.3)), shares, atol=1e-6)


def test_relevance_carries_no_gradient() -> None:
    query = normal(1, 1, 4, 2).requires_grad_()
    assert not relevance(query, normal(1, 1, 1, 2, 2), torch.ones(1, 1, 2, dtype=torch.bool)).requires_grad


# Against diffusers.


def plain_pipeline() -> StableDiffusionPipeline:
    """As any user of diffusers would load it."""
    pipe = StableDiffusionPipeline.from_pretrained(catalog.WEIGHTS / "sd", dtype=torch.float32)
    pipe.register_modules(feature_extractor=CLIPImageProcessor.from_pretrained(FOLDER / "image_encoder"))
    pipe.load_ip_adapter(
        str(catalog.WEIGHTS), subfolder="ip", weight_name="ip_adapter.safetensors", image_encoder_folder="image_encoder"
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_plain_diffusers_loads_the_adapter_and_draws_the_same() -> None:
    noise, pipe = normal(2, 8, 8, 8), plain_pipeline()
    pipe.set_ip_adapter_scale(0.8)
    told = dict(guidance_scale=3.0, num_inference_steps=5, output_type="pt")
    theirs = pipe(TEXTS, ip_adapter_image=[[RED]], latents=noise, **told).images
    prompted = load_pipeline(catalog.WEIGHTS / "sd").image_prompted([RED], scale=0.8)
    ours = deterministic(prompted, 5, 3.0).images(TEXTS, x=noise)
    assert float((ours - theirs).abs().max()) <= 1e-3
    without = pipe(TEXTS, ip_adapter_image=[[BLUE]], latents=noise, **told).images
    assert float((without - theirs).abs().max()) > 0.1


def test_the_network_is_diffusers_to_rounding(model) -> None:
    pipe, prompted = plain_pipeline(), model.image_prompted([RED])
    x, t, text = normal(2, 8, 8, 8, seed=1), torch.tensor([500, 300]), prompted.encode(TEXTS)[WORDS]
    embeds = pipe.prepare_ip_adapter_image_embeds([RED], None, "cpu", 1, False)[0].expand(2, -1, -1)
    with torch.no_grad():
        theirs = pipe.unet(x, t, text, added_cond_kwargs={"image_embeds": [embeds]}).sample
        for each in (prompted, model.image_prompted([RED], entities=["a circle"])):
            assert float((each.net(x, t, each.encode(TEXTS)) - theirs).abs().max()) <= 1e-5


def test_one_reference_is_weighed_by_one(model) -> None:
    plain, merged = model.image_prompted([RED]), model.image_prompted([RED], entities=["a circle"])
    assert float((believed(plain) - believed(merged)).abs().max()) <= 1e-5
    assert float((believed(plain) - believed(model)).abs().max()) > 0.1


def test_a_layer_adds_each_reference_where_it_is_relevant(model) -> None:
    """One cross-attention against the formula, written out with its own layers."""
    prompted = model.image_prompted([RED, BLUE], entities=["a circle", "a star"], scale=0.7)
    cond, attn = prompted.encode(TEXTS), prompted.network.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    tokens, layer, hidden = model.null()[WORDS].shape[1], attn.processor.inner, normal(2, 64, 192)
    images = prompted.network.encoder_hid_proj([cond[IMAGES]])[0]

    def heads(value: Tensor) -> Tensor:
        return value.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def attended(key: Tensor, value: Tensor) -> Tensor:
        return (
            F.scaled_dot_product_attention(heads(attn.to_q(hidden)), heads(key), heads(value))
            .transpose(1, 2)
            .flatten(2)
        )

    text, entities = cond[WORDS][:, :tokens], cond[WORDS][:, tokens:].unflatten(1, (2, tokens))
    key = torch.stack([heads(attn.to_k(entities[:, m])) for m in range(2)], dim=1)
    shares = weights(relevance(heads(attn.to_q(hidden)), key, entities.abs().amax(-1) > 0))
    said = attended(attn.to_k(text), attn.to_v(text))
    for m in range(2):
        own = attended(layer.to_k_ip[0](images[:, m]), layer.to_v_ip[0](images[:, m]))
        said = said + 0.7 * shares[:, m, :, None] * own
    found = attn.processor(attn, hidden, (cond[WORDS], [images]))
    assert float((found - attn.to_out[0](said)).detach().abs().max()) <= 1e-5
    assert (entities.abs().amax(-1) > 0).sum(-1).tolist() == [[2, 2], [2, 2]]  # "a" and the shape


def test_guidance_leads_away_from_zeros_with_and_without_entities(model) -> None:
    for names in ((), ["a circle", "a star"]):
        prompted = model.image_prompted([RED, BLUE], entities=names)
        null, cond = prompted.null(), prompted.encode(TEXTS)
        assert null.keys() == cond.keys() and not null[IMAGES].any()
        assert null[WORDS].shape[1:] == cond[WORDS].shape[1:] and null[IMAGES].shape[1:] == cond[IMAGES].shape[1:]
        assert believed(prompted).isfinite().all()


def test_blocks_are_the_scales_of_diffusers(model) -> None:
    pipe = plain_pipeline()
    pipe.set_ip_adapter_scale({"up": {"block_0": [0.0, 0.5]}})
    view = adapted(model, FILE, 1.0, {"up_blocks.0.attentions.1": 0.5})

    def scales(network) -> Mapping[str, list[float]]:
        return {name: each.scale for name, each in network.attn_processors.items() if hasattr(each, "to_k_ip")}

    assert scales(view.network) == scales(pipe.unet) and len(set(map(tuple, scales(view.network).values()))) == 2
    assert scales(adapted(model, FILE, {"up": {"block_0": [0.0, 0.5]}}).network) == scales(pipe.unet)
    named = model.image_prompted([RED], blocks={"style": 1.0})
    assert scales(named.network) == scales(adapted(model, FILE, {"up": {"block_0": [0.0, 1.0]}}).network)
    with pytest.raises(ValueError, match=r"there is no block 'up_blocks\.7' with an image prompt; wanted some"):
        adapted(model, FILE, 1.0, {"up_blocks.7": 1.0})


def random_adapter(unet, file: Path) -> Path:
    """For any network of the family, from embeddings of 6 numbers."""
    wide, state = unet.config.cross_attention_dim, {}
    for place, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            layer = unet.get_submodule(name.removesuffix(".processor")).to_k
            for one in ("k", "v"):
                state[f"ip_adapter.{place}.to_{one}_ip.weight"] = normal(*layer.weight.shape, seed=place)
    state |= {"image_proj.proj.weight": normal(4 * wide, 6), "image_proj.proj.bias": normal(4 * wide)}
    save_file(state | {"image_proj.norm.weight": torch.ones(wide), "image_proj.norm.bias": torch.zeros(wide)}, file)
    return file


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_families_are_diffusers_with_the_adapter(family: str, tmp_path: Path) -> None:
    model, embeds = ROWS[family].model(onednn=False), normal(2, 6)
    file = random_adapter(model.pipe.unet, tmp_path / "ip.safetensors")
    prompted = ImagePrompted(adapted(model, file, 0.5), embeds)
    merged = ImagePrompted(adapted(model, file, 0.5), embeds[:1], ["a fox"])
    x, t, cond = normal(1, *model.latent_shape), torch.tensor([400]), prompted.encode(["a fox"])
    with torch.no_grad():
        ours, one, before = prompted.net(x, t, cond), merged.net(x, t, merged.encode(["a fox"])), model.net(x, t, cond)
        pipe = ROWS[family].build()
        pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip.safetensors", image_encoder_folder=None)
        pipe.set_ip_adapter_scale(0.5)
        added = model._added(x, cond)
        theirs = [
            pipe.unet(x, t, cond[WORDS], added_cond_kwargs=added | {IMAGES: [each[None]]}).sample
            for each in (embeds, embeds[:1])
        ]
    assert float((ours - theirs[0]).abs().max()) <= 1e-5 and float((one - theirs[1]).abs().max()) <= 1e-5
    assert float((ours - before).abs().max()) > 1e-3


# A model that stays as it was.


def test_the_model_draws_as_before(model) -> None:
    before, processors = believed(model), dict(model.pipe.unet.attn_processors)
    prompted = model.image_prompted([RED, BLUE], entities=["a circle", "a star"])
    believed(prompted)
    assert torch.equal(believed(model), before) and prompted.network is not model.network
    assert all(each is processors[name] for name, each in model.pipe.unet.attn_processors.items())
    assert model.pipe.unet.config.encoder_hid_dim_type is None and model.pipe.unet.encoder_hid_proj is None
    shared = {id(each) for each in model.network.parameters()}
    own = [each for each in prompted.network.parameters() if id(each) not in shared]
    assert sum(each.numel() for each in own) == sum(each.numel() for each in load_file(FILE).values())


def test_a_trained_adapter_is_drawn_with(model) -> None:
    tuned = load_pipeline(catalog.WEIGHTS / "sd", onednn=False)
    tuned.add_lora(2, generator=torch.Generator().manual_seed(0))
    for parameter in tuned.parameters():
        parameter.data.add_(0.05)
    assert float((believed(tuned.image_prompted([RED])) - believed(model.image_prompted([RED]))).abs().max()) > 0.01
    with tuned.reference():
        assert torch.allclose(believed(tuned.image_prompted([RED])), believed(model.image_prompted([RED])), atol=1e-5)


def test_prompts_may_have_references_of_their_own(model) -> None:
    view = adapted(model, FILE)
    both, one = normal(2, 1, 128), normal(2, 1, 128)[:1]
    own = ImagePrompted(view, {TEXTS[0]: both[0], TEXTS[1]: both[1]})
    assert torch.equal(believed(own)[0], believed(ImagePrompted(view, one[0]))[0])
    assert not torch.equal(believed(own)[1], believed(ImagePrompted(view, one[0]))[1])


# As a steerer.


def test_references_change_what_is_drawn_and_calls_are_counted(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    model = load_pipeline(catalog.WEIGHTS / "sd")
    told = dict(num_inference_steps=4, output_type="latent", seed=1)
    plain = steer(model, lambda images: images.mean((1, 2, 3)), [])
    shown = steer(model, lambda images: images.mean((1, 2, 3)), "image-prompt", references=[str(tmp_path / "a.png")])
    silent = steer(
        model, lambda images: images.mean((1, 2, 3)), "image-prompt", references=[str(tmp_path / "a.png")], scale=0.0
    )
    before = plain(TEXTS, **told).images
    assert float((shown(TEXTS, **told).images - before).abs().max()) > 0.1
    assert shown.trace.calls == plain.trace.calls == 8 and shown.trace.scored == 0
    assert float((silent(TEXTS, **told).images - before).abs().max()) < 1e-4
    assert torch.equal(plain(TEXTS, **told).images, before)


def test_it_goes_with_a_search(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    found = steer(
        load_pipeline(catalog.WEIGHTS / "sd"), lambda images: images.mean((1, 2, 3)), "image-prompt+best-of-n",
        references=[str(tmp_path / "a.png")], particles=2,
    )(TEXTS, num_inference_steps=3)  # fmt: skip
    assert found.trace.calls == 12 and found.trace.scored == 2


def test_the_command_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    RED.save("a.png")
    BLUE.resize((80, 60)).save("b.png")
    words = ["sample", "--model", "scenes-sd", "--prompt", CAPTION, "--inference-steps", "3"]
    shown = [*words, "--steer", "image-prompt", "--references", "a.png", "b.png", "--ip-adapter", str(FILE)]
    assert "steered by image-prompt" in said([*shown, "--scale", "1", "--out", "shown.png"], capsys).out
    assert said([*shown, "--entities", "a circle", "a star", "--out", "merged.png"], capsys).code == 0
    assert said([*words, "--out", "plain.png"], capsys).code == 0
    found = [np.asarray(Image.open(f"{name}.png")).astype(int) for name in ("plain", "shown", "merged")]
    assert all(int(abs(a - b).max()) > 20 for a, b in zip(found, [*found[1:], found[0]], strict=True))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "references is empty; wanted the files of one or more pictures"),
        (["--references", "no.png"], "the column references names 'no.png', which is no file"),
        (["--references", "text.txt"], "text.txt is not a picture"),
        (["--references", "a.png", "--entities", "a", "b"], "there are 1 references and the entities"),
        (["--references", "a.png", "--blocks", "style=x"], "blocks has 'style=x'; wanted NAME or NAME=SCALE"),
        (["--references", "a.png", "--blocks", "attic"], "there is no block 'attic' with an image prompt"),
        (["--references", "a.png", "--ip-adapter", "no"], "ip_adapter is no, which is no file"),
        (["--references", "a.png", "--ip-adapter", "text.txt"], "text.txt is not a safetensors file"),
        (["--references", "a.png", "--ip-adapter", "half.safetensors"], "wanted image_proj and ip_adapter, filled"),
        (["--references", "a.png", "--ip-adapter", "plus.safetensors"], "is a Plus, Full or FaceID adapter"),
        (["--references", "a.png", "--ip-adapter", "other.safetensors"], "is no IP-Adapter of this network"),
        (["--references", "a.png", "--ip-adapter", "far.safetensors"], "there is no CLIP in"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    RED.save("a.png")
    Path("text.txt").write_text("no picture")
    weights, named = load_file(FILE), {"image_encoder": str(FOLDER / "image_encoder")}
    save_file(weights, "far.safetensors")
    save_file({"image_proj.proj.weight": weights["image_proj.proj.weight"]}, "half.safetensors")
    save_file({"image_proj.latents": torch.zeros(1), "ip_adapter.1.to_k_ip.weight": torch.zeros(1)}, "plus.safetensors")
    other = {name: value[:8, :8].contiguous() if value.ndim == 2 else value for name, value in weights.items()}
    save_file(other, "other.safetensors", named)
    command = [
        "sample",
        "--model",
        "scenes-sd",
        "--prompt",
        CAPTION,
        "--inference-steps",
        "1",
        "--steer",
        "image-prompt",
    ]
    assert sentence in refused([*command, "--out", "x.png", *words], capsys)
    assert not Path("x.png").exists()


def test_other_models_say_that_they_take_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    RED.save("a.png")
    words = ["sample", "--model", "scenes", "--prompt", CAPTION, "--steer", "image-prompt", "--references", "a.png"]
    assert "this model takes no image prompt; take a pipeline of Stable Diffusion" in refused(words, capsys)


def test_the_shipped_adapter_is_small_and_has_its_clip_beside_it() -> None:
    state, metadata = read_adapter(FILE)
    assert FILE.stat().st_size <= 3 * 2**20 and metadata == {"style": "up_blocks.0.attentions.1"}
    assert encoder_folder(FILE, metadata) == FOLDER / "image_encoder"
    assert {value.dtype for part in state.values() for value in part.values()} == {torch.float16}
