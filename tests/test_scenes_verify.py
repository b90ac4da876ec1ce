"""The scenes world: the checker accepts what a caption says and nothing else.

``python tests/test_scenes_verify.py 2000`` prints the rates over that many scenes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tropism.worlds.scenes import (
    BACKGROUNDS,
    SHAPES,
    Scene,
    alter,
    caption,
    parse,
    render,
    render_batch,
    sample_scene,
    verify,
    verify_batch,
)
from tropism.worlds.scenes.grammar import attributes
from tropism.worlds.scenes.render import BACKGROUND_RGB, COLOR_RGB
from tropism.worlds.scenes.verify import look

Picture = NDArray[np.float32]


def soften(picture: NDArray[np.uint8], blur: float, noise: float, rng: np.random.Generator) -> Picture:
    """A picture (H, W, 3) as a decoder might return it: (H, W, 3) floats in [0, 1]."""
    soft = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), blur) if blur else picture.astype(np.float32)
    noisy: Picture = np.clip(soft / 255.0 + rng.normal(0.0, noise / 255.0, picture.shape), 0.0, 1.0).astype(np.float32)
    return noisy


def rates(n: int, seed: int, blur: float, noise: float) -> tuple[float, float, float]:
    """Share accepted with the own caption, share accepted with a caption altered in one place, seconds a check."""
    rng = np.random.default_rng(seed)
    own = altered = 0
    seconds = 0.0
    for i in range(n):
        scene = sample_scene(rng, "any")
        picture = soften(render(scene, i), blur, noise, rng)
        start = time.perf_counter()
        own += verify(picture, caption(scene)).passed
        altered += verify(picture, caption(alter(scene, rng))).passed
        seconds += time.perf_counter() - start
    return own / n, altered / n, seconds / (2 * n)


@cache
def sharp() -> tuple[float, float, float]:
    return rates(1500, 1, 0.0, 0.0)


@cache
def soft() -> tuple[float, float, float]:
    return rates(1500, 2, 0.7, 5.0)


def test_own_captions_are_accepted() -> None:
    assert sharp()[0] >= 0.995


def test_altered_captions_are_refused() -> None:
    assert sharp()[1] <= 0.005


def test_blurred_and_noisy_pictures_are_judged_as_well() -> None:
    own, altered, _ = soft()
    assert own >= 0.97
    assert altered <= 0.005


def test_a_check_takes_little_time() -> None:
    """5 ms on an idle core; wide enough here for a busy one."""
    assert min(sharp()[2], soft()[2]) < 0.02


@pytest.mark.parametrize("attribute", ["shape", "color", "count", "size", "relation", "background"])
def test_the_part_that_was_altered_is_the_part_that_fails(attribute: str) -> None:
    rng = np.random.default_rng(3)
    exact = total = 0
    while total < 120:
        scene = sample_scene(rng, "any")
        if attribute not in attributes(scene):
            continue
        verdict = verify(render(scene, total), caption(alter(scene, rng, attribute)))
        failed = [name for name, held in verdict.parts.items() if not held]
        exact += [name.removeprefix("second ") for name in failed] == [attribute]
        total += 1
        assert not verdict.passed and 0.0 < verdict.score < 1.0
    assert exact >= 0.9 * total


def test_parts_are_the_claims_of_the_caption() -> None:
    one = "a red circle on a white background"
    two = "a small red circle above a blue star on a white background"
    first, second = (verify(render(parse(text), 0), text) for text in (one, two))
    assert first.passed and first.score == 1.0
    assert set(first.parts) == {"shape", "color", "count", "background"}
    assert second.passed and second.score == 1.0
    assert set(second.parts) == {
        *("shape", "color", "size", "second shape", "second color", "count", "relation", "background")
    }


def test_the_score_is_the_documented_weighted_share() -> None:
    picture = render(parse("a small red circle on a white background"), 0)
    assert verify(picture, "a small red circle on a black background").score == pytest.approx(7 / 8)
    assert verify(picture, "a small blue circle on a white background").score == pytest.approx(6 / 8)
    assert verify(picture, "two small blue circles on a white background").score == pytest.approx(4 / 8)
    pair = render(parse("a red circle above a blue star on a white background"), 0)
    assert verify(pair, "a red circle above a green star on a white background").score == pytest.approx(8 / 9)
    assert verify(pair, "a red circle below a blue star on a white background").score == pytest.approx(7 / 9)


def test_more_that_is_right_scores_higher() -> None:
    picture = render(parse("a red circle left of a blue star on a white background"), 4)
    texts = [
        "a red circle left of a blue star on a white background",
        "a red circle left of a blue star on a gray background",
        "a red circle left of a blue ring on a gray background",
        "a red circle right of a blue ring on a gray background",
        "three green squares on a gray background",
    ]
    scores = [verify(picture, text).score for text in texts]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores) and scores[-1] == 0.0


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_picture_only_has_its_background(background: str) -> None:
    picture = np.empty((64, 64, 3), np.uint8)
    picture[:] = BACKGROUND_RGB[background]
    for subject in ("a red ring", "a red ring above a blue star", "four small pink stars"):
        verdict = verify(picture, f"{subject} on a {background} background")
        assert [name for name, held in verdict.parts.items() if held] == ["background"]


def test_noise_is_never_accepted() -> None:
    rng = np.random.default_rng(6)
    for i in range(150):
        rough = cv2.GaussianBlur(rng.random((64, 64, 3)), (0, 0), (0.1, 1.0, 2.0, 4.0, 8.0)[i % 5])
        picture = np.clip((rough - 0.5) * (1.0, 3.0, 8.0)[i % 3] + 0.5, 0.0, 1.0)
        assert not verify(picture, caption(sample_scene(rng, "any"))).passed


def test_forms_that_are_no_known_shape_are_not_named() -> None:
    forms = {
        "bar": [(-14, -2), (14, -2), (14, 2), (-14, 2)],
        "half": [(-10, 0), (10, 0), (7, 7), (0, 10), (-7, 7)],
        "upside-down triangle": [(-9, -7), (9, -7), (0, 9)],
        "corner": [(-9, -9), (-3, -9), (-3, 3), (9, 3), (9, 9), (-9, 9)],
    }
    for corners in forms.values():
        fine = np.full((512, 512, 3), 246, np.uint8)
        cv2.fillPoly(fine, [np.asarray(corners, np.int32) * 8 + 256], COLOR_RGB["red"])
        seen = look(cv2.resize(fine, (64, 64), interpolation=cv2.INTER_AREA))
        assert len(seen.objects) == 1
        assert seen.objects[0].shape is None and seen.objects[0].color == "red"


def test_an_extra_object_fails_the_count_only() -> None:
    text = "a red circle on a white background"
    picture = render(parse("a red circle above a blue star on a white background"), 5)
    verdict = verify(picture, text)
    assert verdict.parts == {"shape": True, "color": True, "count": False, "background": True}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_seen_is_what_was_drawn(shape: str) -> None:
    for size in ("small", "large"):
        seen = look(
            render(parse(f"two {size} green {shape}{'es' if shape == 'cross' else 's'} on a gray background"), 8)
        )
        assert seen.background == "gray"
        assert [(item.shape, item.color, item.size) for item in seen.objects] == [(shape, "green", size)] * 2


def test_every_accepted_layout_gives_the_same_verdict() -> None:
    scene = parse("two large orange crosses on a black background")
    picture = render(scene, 2)
    floats = picture.astype(np.float32) / 255.0
    variants: list[NDArray[np.generic]] = [picture, floats, floats.transpose(2, 0, 1), render(scene, 2, size=128)]
    assert {verify(variant, caption(scene)) == verify(picture, caption(scene)) for variant in variants} == {True}


def test_a_batch_is_judged_item_by_item() -> None:
    rng = np.random.default_rng(7)
    some: list[Scene] = [sample_scene(rng, "any") for _ in range(12)]
    images = render_batch(some, range(12)).transpose(0, 3, 1, 2).astype(np.float32) / 255.0
    texts = [caption(scene) for scene in some]
    assert verify_batch(images, texts) == [verify(image, text) for image, text in zip(images, texts, strict=True)]
    assert not any(verdict.passed for verdict in verify_batch(images[1:], texts[:-1]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64), np.uint8), "shape"),
        (np.zeros((64, 64, 4), np.uint8), "shape"),
        (np.zeros((64, 64, 3), np.int64), "int64"),
        (np.full((64, 64, 3), -1.0), r"\[0, 1\]"),
        (np.full((64, 64, 3), 200.0), r"\[0, 1\]"),
        (np.full((64, 64, 3), np.nan), "nan"),
    ],
)
def test_a_bad_picture_is_refused(image: NDArray[np.generic], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(image, "a red circle on a white background")


def test_a_batch_needs_as_many_captions() -> None:
    with pytest.raises(ValueError, match="captions"):
        verify_batch(np.zeros((2, 3, 64, 64)), ["a red circle on a white background"])


def _report(n: int) -> None:
    kinds: dict[str, Callable[[], tuple[float, float, float]]] = {
        "sharp": lambda: rates(n, 11, 0.0, 0.0),
        "blur 0.7 noise 5": lambda: rates(n, 12, 0.7, 5.0),
        "blur 1.2 noise 8": lambda: rates(n, 13, 1.2, 8.0),
    }
    for name, measure in kinds.items():
        own, altered, seconds = measure()
        print(f"{name:18s} own {own:.2%}  altered {altered:.2%}  {1e3 * seconds:.2f} ms a check  (n = {n})")


if __name__ == "__main__":
    _report(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
