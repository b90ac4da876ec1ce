"""Names: of methods, models, prompts and rewards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tropism import catalog
from tropism.catalog import RewardSpec, parse_reward
from tropism.config import BadInput
from tropism.rewards import JpegCompressibility
from tropism.worlds.scenes import parse, split_of


def test_methods_are_found() -> None:
    names = catalog.method_names()
    assert {"ddpo", "alignprop", "raft", "flow-grpo"} <= set(names)
    assert "settings" not in names
    assert all(names.values())
    assert catalog.method_settings("flow_grpo") is catalog.method_settings("flow-grpo")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("brightness", RewardSpec("brightness", "brightness", None, 1.0, True)),
        ("jpeg-compressibility=-2", RewardSpec("jpeg-compressibility", "jpeg_compressibility", None, -2.0, True)),
        ("clip=0.5", RewardSpec("clip", "clip", None, 0.5, True)),
        ("clip:./some/folder=0.5", RewardSpec("clip:./some/folder", "clip", "./some/folder", 0.5, True)),
        ("remote:http://h:1=2", RewardSpec("remote:http://h:1", "remote", "http://h:1", 2.0, True)),
        ("hpsv2:owner/model", RewardSpec("hpsv2:owner/model", "hpsv2", "owner/model", 1.0, True)),
        ("module:function=1e-2", RewardSpec("module:function", "function", "module", 0.01, False)),
        ("./a=b.py:f=3", RewardSpec("./a=b.py:f", "f", "./a=b.py", 3.0, False)),
        ("a.b.c:f", RewardSpec("a.b.c:f", "f", "a.b.c", 1.0, False)),
    ],
)
def test_reward_specs(text: str, spec: RewardSpec) -> None:
    assert parse_reward(text) == spec


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("brightness=much", "the weight of reward 'brightness=much' is 'much'; wanted a number"),
        ("brightness=nan", "wanted a finite number"),
        ("brightness:x", "wanted brightness alone"),
        ("hpsv2", "wanted hpsv2:FOLDER"),
        ("remote", "wanted remote:http://127.0.0.1:8000"),
        ("xyz", "wanted one of brightness"),
        (":f", "there is no reward"),
        ("f:", "there is no reward"),
    ],
)
def test_wrong_reward_specs(text: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        parse_reward(text)


def test_a_weight_of_zero_is_watched_but_some_reward_must_count() -> None:
    assert [spec.weight for spec in catalog.check_rewards(["brightness", "contrast=0"])] == [1.0, 0.0]
    with pytest.raises(BadInput, match="at least one with a weight that is not 0"):
        catalog.check_rewards(["brightness=0"])


def test_every_packaged_reward_without_weights_can_be_built() -> None:
    device = torch.device("cpu")
    for name, packaged in catalog.packaged_rewards().items():
        if not packaged.takes_source:
            assert catalog.build_reward(parse_reward(name), "x", device).name == name
    assert isinstance(catalog.build_reward(parse_reward("jpeg-compressibility"), "x", device), JpegCompressibility)


def test_functions_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper_of_mine.py").write_text("factor = 2\n")
    (tmp_path / "rewards_of_mine.py").write_text(
        "import helper_of_mine\n"
        "def f(images):\n    return images.mean((1, 2, 3)) * helper_of_mine.factor\n"
        "class C:\n    def __call__(self, images, prompts):\n        return [len(p) for p in prompts]\n"
        "class D:\n    def __init__(self):\n        raise OSError('no weights')\n"
    )
    images = torch.full((2, 3, 4, 4), 0.25)
    for text in ("rewards_of_mine:f", "./rewards_of_mine.py:f"):
        (spec,) = catalog.check_rewards([text])
        reward = catalog.build_reward(spec, "x", torch.device("cpu"))
        assert reward(images, ["a", "bb"]).tolist() == [0.5, 0.5]
    (spec,) = catalog.check_rewards(["rewards_of_mine:C"])
    assert catalog.build_reward(spec, "x", torch.device("cpu"))(images, ["a", "bb"]).tolist() == [1.0, 2.0]
    with pytest.raises(BadInput, match=r"D\(\) raised OSError: no weights"):
        catalog.check_rewards(["rewards_of_mine:D"])


def test_a_users_reward_keeps_its_promise_and_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("promising.py").write_text(
        "class Red:\n    name = 'red'\n    differentiable = True\n"
        "    def __call__(self, samples, prompts, **columns):\n        return samples[:, 0].mean((1, 2))\n"
        "def brightness(images):\n    return images.mean((1, 2, 3))\n"
    )
    red, own, packaged = catalog.check_rewards(["promising:Red", "promising:brightness", "brightness"])
    assert [spec.name for spec in (red, own, packaged)] == ["Red", "promising:brightness", "brightness"]
    built = [catalog.build_reward(spec, "x", torch.device("cpu")) for spec in (red, own)]
    assert [reward.differentiable for reward in built] == [True, False]
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    assert built[0](images, ["a", "b"]).requires_grad


def test_several_servers_are_called_by_their_addresses() -> None:
    texts = ["remote:http://127.0.0.1:8000", "remote:http://127.0.0.1:8001=0.5", "clip"]
    assert [spec.name for spec in catalog.check_rewards(texts[:1])] == ["remote"]
    specs = catalog.check_rewards(texts)
    assert [spec.name for spec in specs] == ["remote_http_127_0_0_1_8000", "remote_http_127_0_0_1_8001", "clip"]
    assert [spec.source for spec in specs] == ["http://127.0.0.1:8000", "http://127.0.0.1:8001", None]
    assert [spec.weight for spec in specs] == [1.0, 0.5, 1.0] and {spec.kind for spec in specs} == {"remote", "clip"}


def test_a_users_module_with_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_rewards.py").write_text("def f(:\n")
    with pytest.raises(BadInput, match="import raised SyntaxError"):
        catalog.check_rewards(["./broken_rewards.py:f"])


def test_prompt_sets_by_name() -> None:
    assert len(catalog.read_prompt_set("scenes")) == 512
    held_out = catalog.read_prompt_set("scenes-held-out").text
    assert len(held_out) == 64
    assert {split_of(parse(text)) for text in held_out} == {"held_out"}
    pairs = catalog.read_prompt_set("scenes-pair:7").text
    assert len(pairs) == 7
    assert {parse(text).kind for text in pairs} == {"pair"}
    assert {parse(t).kind for t in catalog.read_prompt_set("scenes-held-out-single").text} == {"single"}


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 2}\n')
    found = catalog.read_prompt_set(str(file))
    assert (list(found.text), list(found.columns["answer"])) == (["a", "b"], [1, 2])


def test_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catalog.check_model("owner/model") == "owner/model"
    with pytest.raises(BadInput, match="there is no model 'modle'"):
        catalog.check_model("modle")
    with pytest.raises(BadInput, match=r"has no model_index\.json"):
        catalog.check_model(str(tmp_path))
    monkeypatch.setattr(catalog.models, "WEIGHTS", tmp_path)
    with pytest.raises(BadInput, match="not in this installation"):
        catalog.check_model("scenes")
    for name in ("sd", "flow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    assert catalog.check_model("scenes") == catalog.check_model("scenes-flow") == tmp_path / "flow"
    assert catalog.check_model("scenes-sd") == tmp_path / "sd"
    assert catalog.own_rewards("scenes") == ["scenes"]
    assert catalog.own_prompts("scenes-flow", held_out=True) == "scenes-held-out"
    assert catalog.own_prompts("scenes-tokens", held_out=True) == "scenes-held-out-single"
    assert catalog.own_prompts("scenes-tokens", held_out=False) == "scenes-single"
    with pytest.raises(BadInput, match=r"scenes-tokens is not in this installation"):
        catalog.load_model("scenes-tokens", torch.float32, torch.device("cpu"))
    assert catalog.own_prompts("owner/model", held_out=False) is None
