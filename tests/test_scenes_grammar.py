"""The scenes world: wording, sampling and drawing."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropism.worlds.scenes import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    Group,
    Scene,
    alter,
    caption,
    captions,
    parse,
    render,
    render_batch,
    sample_scene,
    split_of,
    words,
)
from tropism.worlds.scenes.grammar import MAX_WORDS, attributes
from tropism.worlds.scenes.render import BACKGROUND_RGB, COLOR_RGB, OFF_AXIS, REACH, place

groups = st.builds(
    Group, st.sampled_from(SHAPES), st.sampled_from(COLORS), st.sampled_from((None, *SIZES)), st.sampled_from(COUNTS)
)
singles = st.builds(
    Group, st.sampled_from(SHAPES), st.sampled_from(COLORS), st.sampled_from((None, *SIZES)), st.just(1)
)
pairs = st.tuples(singles, singles).filter(lambda two: (two[0].shape, two[0].color) != (two[1].shape, two[1].color))
scenes = st.one_of(
    st.builds(lambda group, tone: Scene((group,), None, tone), groups, st.sampled_from(BACKGROUNDS)),
    st.builds(Scene, pairs, st.sampled_from(RELATIONS), st.sampled_from(BACKGROUNDS)),
)


def draw(n: int, seed: int = 0, split: str = "any") -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split) for _ in range(n)]  # type: ignore[arg-type]


@given(scenes)
@settings(max_examples=400, deadline=None)
def test_a_caption_reads_back_as_its_scene(scene: Scene) -> None:
    text = caption(scene)
    assert parse(text) == scene
    assert caption(parse(text)) == text
    assert len(text.split()) <= MAX_WORDS
    assert set(text.split()) <= set(words())


def test_the_vocabulary_is_closed_sorted_and_fully_used() -> None:
    used = {word for scene in draw(4000) for word in caption(scene).split()}
    assert sorted(used) == words()


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (Scene((Group("circle", "red", "small"),), None, "black"), "a small red circle on a black background"),
        (Scene((Group("square", "blue", None, 3),), None, "gray"), "three blue squares on a gray background"),
        (Scene((Group("cross", "orange"),), None, "white"), "an orange cross on a white background"),
        (
            Scene((Group("cross", "orange", "large", 2),), None, "beige"),
            "two large orange crosses on a beige background",
        ),
        (
            Scene((Group("circle", "red"), Group("star", "orange")), "above", "white"),
            "a red circle above an orange star on a white background",
        ),
        (
            Scene((Group("ring", "red"), Group("star", "blue", "large")), "left of", "white"),
            "a red ring left of a large blue star on a white background",
        ),
    ],
)
def test_articles_plurals_and_relations(scene: Scene, text: str) -> None:
    assert caption(scene) == text
    assert parse(text) == scene


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a blu circle on a white background", "'blu'"),
        ("a red hexagon on a white background", "'hexagon'"),
        ("an red circle on a white background", "'an'"),
        ("a orange circle on a white background", "'a'"),
        ("two red circle on a white background", "'circle'"),
        ("a red circles on a white background", "'circles'"),
        ("five red circles on a white background", "'five'"),
        ("a huge red circle on a white background", "'huge'"),
        ("a red circle left a blue square on a white background", "'a'"),
        ("a red circle beside a blue square on a white background", "'beside'"),
        ("a red circle on a red background", "'red'"),
        ("a red circle on a white table", "'table'"),
        ("a red circle on a white background today", "'today'"),
        ("a red circle", "end of the caption"),
        ("", "end of the caption"),
        ("a red circle above a red circle on a white background", "two different objects"),
        ("two red circles above a red star on a white background", "counts 2 and 1"),
    ],
)
def test_a_bad_caption_is_refused_in_one_sentence_that_names_the_word(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word) as error:
        parse(text)
    message = str(error.value)
    assert message.startswith("Got ") and "wanted" in message and message.endswith(".") and "\n" not in message


def test_scenes_that_no_caption_can_say_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        Group("blob", "red")
    with pytest.raises(ValueError, match="count"):
        Group("ring", "red", None, 5)
    with pytest.raises(ValueError, match="relation"):
        Scene((Group("ring", "red"),), "above")
    with pytest.raises(ValueError, match="relation"):
        Scene((Group("ring", "red"), Group("star", "red")), None)
    with pytest.raises(ValueError, match="background"):
        Scene((Group("ring", "red"),), None, "green")


def test_kinds_are_what_they_say() -> None:
    rng = np.random.default_rng(1)
    for kind in KINDS:
        assert {sample_scene(rng, "any", kind).kind for _ in range(50)} == {kind}
    assert {scene.kind for scene in draw(100)} == set(KINDS)
    with pytest.raises(ValueError, match="kind"):
        sample_scene(rng, "any", "triple")
    with pytest.raises(ValueError, match="split"):
        sample_scene(rng, "test")  # type: ignore[arg-type]


def test_the_splits_share_no_combination_and_train_has_every_part() -> None:
    def combination(scene: Scene) -> tuple[object, ...]:
        return (scene.relation, *((group.shape, group.color, group.count) for group in scene.groups))

    train, held = draw(4000, 2, "train"), draw(4000, 3, "held_out")
    assert not {combination(scene) for scene in train} & {combination(scene) for scene in held}
    assert {split_of(scene) for scene in train} == {"train"}
    assert {group.shape for scene in train for group in scene.groups} == set(SHAPES)
    assert {group.color for scene in train for group in scene.groups} == set(COLORS)
    assert {scene.relation for scene in train} == {None, *RELATIONS}
    assert {group.count for scene in train for group in scene.groups} == set(COUNTS)
    for kind in KINDS:
        singles = {(g.shape, g.color) for s in train if s.kind == kind for g in s.groups}
        assert {shape for shape, _ in singles} == set(SHAPES)


def test_about_fifteen_percent_is_held_out() -> None:
    shares = [split_of(scene) == "held_out" for scene in draw(6000, 4)]
    assert 0.11 < float(np.mean(shares)) < 0.19


def test_a_mirrored_wording_is_in_the_same_split() -> None:
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene in [scene for scene in draw(600, 5) if scene.relation]:
        assert split_of(Scene(scene.groups[::-1], mirror[scene.relation or ""], scene.background)) == split_of(scene)


def test_the_splits_are_the_same_in_every_process() -> None:
    """Guards trained models: a different split would leak held-out combinations into what they have seen."""
    text = "\n".join(captions(200, 0, "held_out"))
    code = "from tropism.worlds.scenes import captions; print('\\n'.join(captions(200, 0, 'held_out')))"
    root = Path(__file__).parents[1]
    again = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert again.stdout.strip() == text
    everything = [
        (shape, color, count)
        for shape in SHAPES
        for color in COLORS
        for count in COUNTS
        if split_of(Scene((Group(shape, color, None, count),))) == "held_out"
    ]
    assert hashlib.sha256(repr(everything).encode()).hexdigest()[:16] == "4f672e0fb82b5f0f"


def test_captions_are_distinct_of_the_split_and_repeatable() -> None:
    found = captions(500, 7, "train", ("single", "pair"))
    assert len(set(found)) == len(found) == 500
    assert found == captions(500, 7, "train", ("single", "pair"))
    assert found != captions(500, 8, "train", ("single", "pair"))
    assert {parse(text).kind for text in found} == {"single", "pair"}
    assert {split_of(parse(text)) for text in found} == {"train"}
    assert captions(0, 0) == []
    with pytest.raises(ValueError, match="ask for fewer"):
        captions(5000, 0, "held_out", ("single",))


@given(scenes, st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_alter_changes_exactly_one_attribute(scene: Scene, seed: int) -> None:
    for name in attributes(scene):
        other = alter(scene, np.random.default_rng(seed), name)
        changed = [
            field
            for one, two in zip(scene.groups, other.groups, strict=True)
            for field in ("shape", "color", "size", "count")
            if getattr(one, field) != getattr(two, field)
        ]
        changed += [field for field in ("relation", "background") if getattr(scene, field) != getattr(other, field)]
        assert changed == [name]
        assert parse(caption(other)) == other
    assert alter(scene, np.random.default_rng(seed)) != scene


def test_alter_refuses_an_attribute_the_scene_has_not() -> None:
    with pytest.raises(ValueError, match="attribute"):
        alter(Scene((Group("ring", "red"),)), np.random.default_rng(0), "relation")


def test_a_picture_is_determined_by_scene_and_seed() -> None:
    some = draw(40, 9)
    batch = render_batch(some, np.arange(40))
    assert batch.shape == (40, 64, 64, 3) and batch.dtype == np.uint8
    for i, scene in enumerate(some):
        assert np.array_equal(batch[i], render(scene, i))
        assert not np.array_equal(batch[i], render(scene, i + 1000))
    assert render(some[0], 0, size=128).shape == (128, 128, 3)
    with pytest.raises(ValueError, match="seeds"):
        render_batch(some, [1, 2])
    with pytest.raises(ValueError, match="size"):
        render(some[0], 0, size=4)


def test_pictures_have_not_changed() -> None:
    """Guards trained models: they have learnt exactly these pictures, give or take a grey level of rounding."""
    scene = parse("a small red ring left of a large blue star on a beige background")
    picture = render(scene, 3).astype(np.float64)
    centres = [(round(item.x, 2), round(item.y, 2)) for item in place(scene, 3)]
    assert centres == [(11.16, 38.33), (40.44, 39.84)]
    assert picture.mean(axis=(0, 1)) == pytest.approx([210.62, 190.04, 167.02], abs=0.2)


def test_objects_are_inside_apart_and_related_with_a_margin() -> None:
    four_large = [Scene((Group(shape, "red", "large", 4),)) for shape in SHAPES] * 20
    for seed, scene in enumerate(draw(1500, 10) + four_large):
        items = place(scene, seed)
        for item in items:
            reach = item.radius * REACH
            assert reach < min(item.x, item.y, 64 - item.x, 64 - item.y)
        for one, two in combinations(items, 2):
            assert math.hypot(one.x - two.x, one.y - two.y) > REACH * (one.radius + two.radius) + 2.9
        if scene.relation:
            along, across = items[1].x - items[0].x, items[1].y - items[0].y
            if scene.relation in ("above", "below"):
                along, across = across, along
            assert (along > 0) == (scene.relation in ("left of", "above"))
            assert abs(across) <= OFF_AXIS * abs(along) + 1e-9


def test_the_palette_is_well_separated() -> None:
    tones = [np.asarray(rgb, float) for rgb in [*COLOR_RGB.values(), *BACKGROUND_RGB.values()]]
    assert set(COLOR_RGB) == set(COLORS) and set(BACKGROUND_RGB) == set(BACKGROUNDS)
    assert min(float(np.linalg.norm(one - two)) for one, two in combinations(tones, 2)) > 85.0


def test_edges_are_smooth_and_the_rest_is_flat() -> None:
    picture = render(parse("a large red circle on a white background"), 1)
    flat = [(picture == np.asarray(tone)).all(axis=2) for tone in (COLOR_RGB["red"], BACKGROUND_RGB["white"])]
    edge = ~(flat[0] | flat[1])
    assert 30 < edge.sum() < 120 < flat[0].sum() < 500
