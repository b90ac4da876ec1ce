"""open_clip weights under transformers' names: the same numbers as a forward pass written from open_clip's layout."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_rewards_preprocess import LENGTH, SIDE, pictures, tiny_config, write_tokenizer
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tropism.models.clip_rewards import HPSv2
from tropism.rewards import RewardError, open_clip_to_transformers, read_tensors

PROMPTS = ["a red fox", "two blue cubes on a table", "a red fox", "a very long story of a fox " * 9]
WIDTH, HIDDEN, OUT, LAYERS, HEADS, PATCH = 32, 64, 16, 2, 4, 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Architecture, tokenizer and preprocessing, no weights."""
    path: Path = tmp_path_factory.mktemp("base")
    tokenizer = write_tokenizer(path)
    tokenizer.save_pretrained(path)
    tiny_config(tokenizer).save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(path)
    return path


def open_clip_weights(vocabulary: int) -> dict[str, Tensor]:
    """Random weights with the names and shapes of open_clip's ``CLIP``."""
    patches = (SIDE // PATCH) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (), "positional_embedding": (LENGTH, WIDTH), "text_projection": (WIDTH, OUT),
        "token_embedding.weight": (vocabulary, WIDTH), "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (patches + 1, WIDTH), "visual.proj": (WIDTH, OUT),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }  # fmt: skip
    for norm in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    for tower in ("", "visual."):
        for layer in range(LAYERS):
            block = f"{tower}transformer.resblocks.{layer}."
            shapes |= {f"{block}attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}attn.in_proj_bias": (3 * WIDTH,)}
            for name, shape in [
                ("attn.out_proj", (WIDTH, WIDTH)), ("mlp.c_fc", (HIDDEN, WIDTH)), ("mlp.c_proj", (WIDTH, HIDDEN)),
                ("ln_1", (WIDTH,)), ("ln_2", (WIDTH,)),
            ]:  # fmt: skip
                shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(5)
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + value if "ln_" in name and name.endswith("weight") else value for name, value in weights.items()}


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return nn.functional.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def tower(x: Tensor, weights: dict[str, Tensor], prefix: str, mask: Tensor | None) -> Tensor:
    for layer in range(LAYERS):
        block = f"{prefix}transformer.resblocks.{layer}."
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        own = {n.removeprefix(f"{block}attn."): w for n, w in weights.items() if n.startswith(f"{block}attn.")}
        attention.load_state_dict(own)
        y = norm(x, weights, f"{block}ln_1")
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = norm(x, weights, f"{block}ln_2") @ weights[f"{block}mlp.c_fc.weight"].T + weights[f"{block}mlp.c_fc.bias"]
        x = x + nn.functional.gelu(y) @ weights[f"{block}mlp.c_proj.weight"].T + weights[f"{block}mlp.c_proj.bias"]
    return x


@torch.no_grad()
def open_clip_cosines(weights: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> Tensor:
    """(B,) cosines, computed from open_clip's own names: projections multiply from the right, attention is fused."""
    x = nn.functional.conv2d(pixels, weights["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, WIDTH), x], dim=1)
    x = norm(x + weights["visual.positional_embedding"], weights, "visual.ln_pre")
    x = norm(tower(x, weights, "visual.", None)[:, 0], weights, "visual.ln_post") @ weights["visual.proj"]
    y = weights["token_embedding.weight"][tokens] + weights["positional_embedding"][: tokens.shape[1]]
    causal = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
    y = norm(tower(y, weights, "", causal), weights, "ln_final")
    y = y[torch.arange(len(y)), tokens.argmax(-1)] @ weights["text_projection"]
    return nn.functional.cosine_similarity(x, y)


@pytest.mark.parametrize("kind", ["hps.pt", "plain.safetensors", "parallel.pth"])
def test_converted_weights_give_the_numbers_of_open_clip(base: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = write_tokenizer(base)
    weights = open_clip_weights(len(tokenizer))
    file = tmp_path / kind
    if kind == "hps.pt":
        torch.save({"epoch": 1, "name": "hps", "state_dict": weights}, file)
    elif kind == "parallel.pth":
        torch.save({f"module.{name}": value for name, value in weights.items()}, file)
    else:
        save_file(weights, file)
    reward = HPSv2.from_open_clip(file, base)
    images = pictures(4, SIDE, SIDE)
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
    wanted = open_clip_cosines(weights, reward.preprocess(images), tokens)
    assert wanted.std() > 0.05
    torch.testing.assert_close(reward(images, PROMPTS), wanted, atol=1e-5, rtol=1e-5)


def test_hps_fits_the_whole_picture_and_surrounds_it_with_black(base: Path, tmp_path: Path) -> None:
    torch.save(open_clip_weights(len(write_tokenizer(base))), tmp_path / "w.pt")
    reward = HPSv2.from_open_clip(tmp_path / "w.pt", base)
    wide = pictures(1, 16, 2 * 16)
    bordered = torch.zeros(1, 3, SIDE, SIDE)
    bordered[:, :, SIDE // 4 : 3 * SIDE // 4] = wide
    torch.testing.assert_close(reward(wide, ["a fox"]), reward(bordered, ["a fox"]))


def test_saved_once_it_is_a_transformers_folder(base: Path, tmp_path: Path) -> None:
    torch.save(open_clip_weights(len(write_tokenizer(base))), tmp_path / "w.pt")
    reward = HPSv2.from_open_clip(tmp_path / "w.pt", base)
    reward.model.save_pretrained(tmp_path / "converted")
    again = HPSv2.from_pretrained(tmp_path / "converted", processor=base)
    assert torch.equal(again(pictures(2), PROMPTS[:2]), reward(pictures(2), PROMPTS[:2]))


def test_weights_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    weights = open_clip_weights(len(write_tokenizer(base)))
    with pytest.raises(RewardError, match=r"'visual.attnpool.k_proj.weight', which a transformers CLIPModel"):
        open_clip_to_transformers({**weights, "visual.attnpool.k_proj.weight": torch.zeros(1)})
    with pytest.raises(RewardError, match=r"'ls_1.gamma' in a block"):
        open_clip_to_transformers({"transformer.resblocks.0.ls_1.gamma": torch.zeros(1)})
    text = ("ln_", "token_", "transformer.")
    prefixed = {f"text.{name}" if name.startswith(text) else name: value for name, value in weights.items()}
    assert set(open_clip_to_transformers(prefixed)) == set(open_clip_to_transformers(weights))
    del weights["ln_final.bias"]
    torch.save(weights, tmp_path / "short.pt")
    with pytest.raises(RewardError, match="are not those of a CLIP like"):
        HPSv2.from_open_clip(tmp_path / "short.pt", base)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from a weight file was run')",))


def test_files_are_read_without_running_what_is_in_them(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1), "extra": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    (tmp_path / "broken.safetensors").write_bytes(b"not a header")
    for name in ("evil.pt", "old.pth", "broken.safetensors"):
        with pytest.raises(RewardError, match="could not be read as plain tensors"):
            read_tensors(tmp_path / name)
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(RewardError, match="holds no named tensors"):
        read_tensors(tmp_path / "list.pt")
