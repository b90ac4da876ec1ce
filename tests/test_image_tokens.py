"""The tokenizer's quantisation, and the small transformer over its tokens."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderTiny

from tropism.distillation import Before
from tropism.distillation.tokens import mapped, samples
from tropism.models.image_tokens import ImageTokens, chain_model
from tropism.models.token_gpt import TokenGPT, Words, load_tokens
from tropism.models.tokenizer import Tokenizer, fsq, fsq_codes
from tropism.policy import Policy
from tropism.samplers import solver

LEVELS = (4, 3)


def network() -> TokenGPT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TokenGPT(words=7, prefix=4, length=6, levels=LEVELS, width=64, layers=2).eval()


def told(rows: int = 3) -> dict[str, torch.Tensor]:
    return Words(["a", "red", "circle"], 4)(["a red circle", "a circle", ""][:rows])


def test_quantised_points_are_codes():
    """Every code is reached, no other point is, and the gradient passes."""
    codes = fsq_codes(LEVELS)
    assert codes.shape == (12, 2) and len(codes.unique(dim=0)) == 12
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
    found = fsq(z, LEVELS)
    apart = torch.cdist(found.detach(), codes)
    assert float(apart.min(1).values.max()) < 1e-6 and len(apart.argmin(1).unique()) == 12
    found.sum().backward()
    assert bool((z.grad > 0).all()) or bool((z.grad >= 0).all() and z.grad.max() > 0.1)
    with pytest.raises(ValueError, match="wanted at least 2"):
        fsq_codes((5, 1))


def test_a_tokenizer_is_saved_and_refuses_another_size(tmp_path):
    made = Tokenizer(channels=3, side=4, levels=LEVELS, width=32, layers=1).eval()
    made.save(tmp_path)
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    again = Tokenizer.load(tmp_path).eval()
    tokens = again.encode(latents)
    assert tokens.shape == (2, 16, 2) and again.decode(tokens).shape == latents.shape
    assert float((again.decode(tokens) - made.decode(tokens)).abs().max()) < 0.01  # half precision
    with pytest.raises(ValueError, match=r"latents are \(3, 5, 5\); wanted \(3, 4, 4\)"):
        made.encode(torch.zeros(1, 3, 5, 5))
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        Tokenizer.load(tmp_path / "none")


@torch.no_grad()
def test_logits_with_a_cache_are_those_of_a_full_pass():
    """What ``draw`` draws from token by token, with guidance, is what the whole network says of the finished tokens."""
    net, cond = network(), told()
    seen = []
    net.head.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    null = {"words": torch.zeros_like(cond["words"])}
    tokens = net.draw(cond, null, 2.0, torch.Generator().manual_seed(0))
    cached = torch.stack(seen, dim=1)
    seen.clear()
    whole = torch.cat([net.logits(tokens, cond), net.logits(tokens, null)])
    assert float((cached - whole).abs().max()) < 1e-5


@torch.no_grad()
def test_the_chain_draws_the_same_tokens():
    """By ``samplers.NextToken`` and with a cache: the same rows from the same generators."""
    net, cond = network(), told()
    model = ImageTokens(net, lambda prompts: told(len(prompts)), lambda tokens: tokens, guidance_scale=2.0)
    policy = Policy(model, solver(model.denoiser), 6)
    null = {"words": torch.zeros_like(cond["words"])}
    model.null = lambda: {"words": torch.zeros(1, 4, dtype=torch.int64)}

    def rows():
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    *_, last = policy.chain(torch.zeros(3, 6, 2), cond, rows())
    assert torch.equal(last.x_next, net.draw(cond, null, 2.0, rows()))


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_cache_changes_neither_pairs_nor_samples(scale, monkeypatch):
    """What a distillation asks of its teacher: the flow's codes, and draws, are those of the whole network."""
    model = ImageTokens(network(), lambda prompts: told(len(prompts)), lambda tokens: tokens, guidance_scale=scale)
    model.null = lambda: {"words": torch.zeros(1, 4, dtype=torch.int64)}
    model.train_full()
    teacher, cond = Policy(Before(model), solver(model.denoiser), 6, microbatch=2), model.encode(["a", "b", "c"])
    noise = teacher.noise(3, torch.Generator().manual_seed(1))
    cached = mapped(teacher, noise, cond, model.codes, 8)
    drawn = samples(teacher, ["a", "b", "c"], torch.Generator().manual_seed(2))
    assert drawn.shape == (3, 6, 2) and torch.isin(drawn, model.codes).all()
    for parameter in model.parameters():
        parameter.add_(0.1)
    assert torch.equal(mapped(teacher, noise, cond, model.codes, 8), cached)
    monkeypatch.setattr(ImageTokens, "one_by_one", lambda *arguments: None)
    assert torch.equal(mapped(teacher, noise, cond, model.codes, 8), cached)


@torch.no_grad()
def test_later_tokens_are_not_seen():
    net, cond = network(), told()
    x = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
    drawn, t = torch.ones(3, 6, dtype=torch.bool), torch.ones(3, 6)
    other = x.clone()
    other[:, 3:] += 1
    assert torch.equal(net.logits(x, cond)[:, :4], net.logits(other, cond)[:, :4])
    assert torch.allclose(net.flow(x, drawn, x, t, cond)[:, :3], net.flow(other, drawn, other, t, cond)[:, :3])
    assert not torch.allclose(net.flow(x, drawn, x, t, cond), net.flow(x, ~drawn, x, t, cond)) or not net.noisy.any()


@torch.no_grad()
@pytest.mark.parametrize("toy", [False, True])
def test_a_mean_alone_is_that_beside_the_logits(toy):
    model = chain_model() if toy else ImageTokens(network(), lambda prompts: told(len(prompts)), lambda x: x)
    length, dimension = model.latent_shape
    cond = model.encode(["sticky"] * 3)
    x = torch.randn(3, length, dimension, generator=torch.Generator().manual_seed(0))
    drawn, t = torch.tensor([[True], [False], [True]]).expand(3, length), torch.rand(3, length)
    torch.testing.assert_close(model.mean(x, drawn, x, t, cond), model.flow(x, drawn, x, t, cond)[0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_folder_is_a_model(tmp_path):
    Tokenizer(channels=4, side=4, levels=LEVELS, width=32, layers=1).save(tmp_path / "tokenizer")
    net = TokenGPT(words=4, prefix=4, length=16, levels=LEVELS, width=64, layers=1)
    net.save(tmp_path / "network")
    vae = AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 2,
        decoder_block_out_channels=(8,) * 2,
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"there is no tokens\.json"):
        load_tokens(tmp_path)
    facts = {"words": ["a", "red", "circle"], "vae": "vae", "guidance_scale": 1.5}
    (tmp_path / "tokens.json").write_text(json.dumps(facts))
    model = load_tokens(tmp_path)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = model.latents(images)
    assert tokens.shape == (2, *model.latent_shape) and model.decode(tokens).shape == images.shape
    student = model.few_step("ode", 1)
    shown = Policy(student, solver(student.denoiser), 1).images(["a red circle"] * 2, torch.Generator().manual_seed(0))
    assert shown.shape == images.shape and bool(shown.isfinite().all())
