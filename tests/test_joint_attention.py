"""Equal context tokens computed once: the same attention, the same network, fewer tokens."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

from tropism.models.joint_attention import MergedContext, equal_at_the_end, merges_context
from tropism.models.pipelines import wrap_pipeline


def attention(norm: str | None, last: bool) -> Attention:
    torch.manual_seed(0)
    layer = Attention(
        query_dim=16,
        added_kv_proj_dim=16,
        dim_head=8,
        heads=2,
        out_dim=16,
        context_pre_only=last,
        bias=True,
        qk_norm=norm,
        eps=1e-6,
        processor=JointAttnProcessor2_0(),
    )
    return layer.eval()


@pytest.mark.parametrize("norm", [None, "rms_norm"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_one_token_stands_for_many(norm: str | None, last: bool, dtype: torch.dtype, near: float) -> None:
    layer = attention(norm, last)
    x, said = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        image, context = layer(x, encoder_hidden_states=torch.cat([said, said[:, -1:].expand(-1, 30, -1)], dim=1))
        layer.set_processor(MergedContext())
        got, rest = layer.to(dtype)(x.to(dtype), encoder_hidden_states=said.to(dtype), repeats=31)
    torch.testing.assert_close(got.float(), image, rtol=0, atol=near)
    torch.testing.assert_close(rest.float(), context[:, :5], rtol=0, atol=near)


def test_attention_without_context_ignores_the_count() -> None:
    layer = attention(None, False)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        wanted = layer(x)
        layer.set_processor(MergedContext())
        torch.testing.assert_close(layer(x, repeats=31), wanted, rtol=0, atol=1e-6)


def test_equal_at_the_end() -> None:
    x = torch.randn(2, 6, 3)
    assert equal_at_the_end(x) == 1
    x[:, 2:] = x[:, 2:3]
    assert equal_at_the_end(x) == 4
    x[1, 4] += 1
    assert equal_at_the_end(x) == 1  # token 5 differs from token 4 in one of the rows
    x[1, 5] += 1
    assert equal_at_the_end(x) == 2
    assert equal_at_the_end(torch.zeros(2, 6, 3)) == 6


def test_the_twin_gets_fewer_tokens_and_another_context_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropism.models.latent_pipeline.twin_pays", lambda net: True)
    model, seen = wrap_pipeline(tiny.sd3_pipeline()), list[int]()
    tau, cond = torch.tensor([400, 900]), model.encode(tiny.PROMPTS)
    assert merges_context(model._network()) and not merges_context(model.pipe.transformer)
    block = model.pipe.transformer.transformer_blocks[0]
    mixed = copy.deepcopy(model._network())
    mixed.transformer_blocks[0].attn.processor = block.attn.processor
    assert not merges_context(mixed)

    def note(_: object, __: object, said: dict[str, torch.Tensor]) -> None:
        seen.append(said["encoder_hidden_states"].shape[1])

    block.register_forward_pre_hook(note, with_kwargs=True)
    model.net(tiny.noise(2), tau, cond)
    tokens = cond["prompt_embeds"].shape[1]
    model.net(tiny.noise(2), tau, cond | {"prompt_embeds": torch.randn_like(cond["prompt_embeds"])})
    assert seen == [tokens - 255, tokens]
