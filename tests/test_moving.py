"""The world of moving scenes: captions are read back, drawn clips pass their own caption and no other."""

from __future__ import annotations

import numpy as np
import pytest

from tropism.worlds.moving import (
    DIRECTIONS,
    FRAMES,
    MOTIONS,
    Clip,
    alter,
    caption,
    captions,
    frames_of,
    parse,
    path,
    render,
    render_batch,
    sample_clip,
    strip,
    verify,
    verify_batch,
    words,
)
from tropism.worlds.scenes import Group, Scene, split_of
from tropism.worlds.scenes import words as scene_words

COUNT = 200


def drawn(count: int, seed: int) -> tuple[list[Clip], np.ndarray]:
    """Clips and their frames (N, F, 64, 64, 3)."""
    rng = np.random.default_rng(seed)
    clips = [sample_clip(rng, "any") for _ in range(count)]
    return clips, render_batch(clips, range(count))


def test_captions_are_read_back_and_say_everything() -> None:
    texts = captions(400, 0, "train")
    assert len(set(texts)) == 400 and all(caption(parse(text)) == text for text in texts)
    assert {parse(text).motion for text in texts} == set(MOTIONS)
    assert all(split_of(parse(text).scene) == "held_out" for text in captions(50, 0, "held_out"))
    said = {word for text in texts for word in text.replace(",", " , ").split()}
    assert said - set(scene_words()) == set(words())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a red circle on a white background", "Got '' after the comma"),
        ("a red circle on a white background, moving away", "Got 'moving away' after the comma"),
        ("a red blob on a white background, keeping still", "Got the word 'blob'"),
        ("two red circles on a white background, keeping still", "wanted 'single'"),
    ],
)
def test_a_caption_that_is_none_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(text)


def test_a_path_is_even_straight_and_inside_the_picture() -> None:
    rng = np.random.default_rng(1)
    for seed in range(200):
        clip = sample_clip(rng)
        items = path(clip, seed)
        places = np.array([(item.x, item.y) for item in items])
        steps = np.diff(places, axis=0)
        assert len(items) == FRAMES and np.ptp(steps, axis=0).max() < 1e-9
        wanted = np.array(DIRECTIONS.get(clip.motion, (0, 0)))
        assert np.allclose(steps[0], wanted * np.abs(steps[0]).max())
        assert 6 <= np.abs(steps[0]).max() <= 9 or clip.motion == "still"
        reach = 1.1 * items[0].radius
        assert places.min() - reach >= 0.999 and places.max() + reach <= 63.001


def test_its_own_caption_passes() -> None:
    clips, frames = drawn(COUNT, 2)
    passed = [verdict.passed for verdict in verify_batch(frames, map(caption, clips))]
    assert np.mean(passed) >= 0.99


def test_another_caption_fails() -> None:
    clips, frames = drawn(COUNT, 3)
    rng = np.random.default_rng(4)
    others = [caption(alter(clip, rng)) for clip in clips]
    assert np.mean([verdict.passed for verdict in verify_batch(frames, others)]) <= 0.01
    wrong = [caption(alter(clip, rng, "motion")) for clip in clips]
    assert np.mean([verdict.moved for verdict in verify_batch(frames, wrong)]) <= 0.01


def reverse(frames: np.ndarray) -> np.ndarray:
    return frames[::-1]


def swap(frames: np.ndarray) -> np.ndarray:
    return frames[[0, 2, 1, 3]]


def freeze(frames: np.ndarray) -> np.ndarray:
    return frames[[0] * len(frames)]


def blank(frames: np.ndarray) -> np.ndarray:
    return np.concatenate([frames[:-1], np.full_like(frames[:1], frames[-1, 0, 0])])


@pytest.mark.parametrize("spoil", [reverse, swap, freeze, blank])
def test_a_clip_whose_frames_are_wrong_fails(spoil) -> None:
    clips, frames = drawn(COUNT, 5)
    moving = [i for i, clip in enumerate(clips) if clip.motion in DIRECTIONS]
    verdicts = [verify(spoil(frames[i]), caption(clips[i])) for i in moving]
    assert np.mean([verdict.passed for verdict in verdicts]) <= 0.01
    if spoil is blank:
        assert all(np.isnan(verdict.off) and verdict.frame_rate == 3 / 4 for verdict in verdicts)


def test_a_strip_is_its_frames() -> None:
    clips, frames = drawn(6, 6)
    strips = strip(frames)
    assert strips.shape == (6, 64, FRAMES * 64, 3)
    planes = strips.transpose(0, 3, 1, 2).astype(np.float32) / 255
    texts = list(map(caption, clips))
    assert np.array_equal(frames_of(strips[0]), frames[0])
    assert verify_batch(planes, texts) == verify_batch(frames, texts)
    with pytest.raises(ValueError, match="two or more square frames"):
        verify(strips[0][:, :-1], texts[0])
    with pytest.raises(ValueError, match="6 captions"):
        verify_batch(planes[:5], texts)


def test_bad_clips_are_refused() -> None:
    red = Group("circle", "red", "large")
    with pytest.raises(ValueError, match="Got motion 'around'"):
        Clip(Scene((red,)), "around")
    with pytest.raises(ValueError, match="Got 10 frames"):
        render(Clip(Scene((red,)), "leftward"), 0, frames=10)
    with pytest.raises(ValueError, match="Got attribute 'count'"):
        alter(Clip(Scene((red,)), "leftward"), np.random.default_rng(0), "count")
