"""The melodies world: prompts, sound, spectrograms, and a verifier that hears what was played and nothing else.

``python tests/test_melodies_world.py 2000`` prints the rates over that many melodies.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from tropism.worlds.melodies import (
    BINS,
    FRAMES,
    FRAMES_A_BEAT,
    HOLD,
    PITCHES,
    RATE,
    REST,
    VOICES,
    Melody,
    Note,
    alter,
    from_pictures,
    hear,
    judge,
    parse,
    prompt,
    prompts,
    render,
    render_batch,
    resynthesise,
    sample_melody,
    score,
    spectrogram,
    split_of,
    synthesise,
    to_pictures,
    verify,
    verify_batch,
    write_wav,
)
from tropism.worlds.melodies.grammar import CHANGES, HELD_OUT_SHARE
from tropism.worlds.melodies.sound import BEAT, LEVELS, LOUDEST, RANGE, Float, frequency

melodies = st.integers(0, 2**32 - 1).map(lambda seed: sample_melody(np.random.default_rng(seed)))


@cache
def played(count: int, seed: int = 0) -> tuple[list[Melody], Float]:
    rng = np.random.default_rng(seed)
    some = [sample_melody(rng) for _ in range(count)]
    return some, render_batch(some, range(seed, seed + count))


def passed(values: Float, some: list[Melody]) -> float:
    return float(np.mean([judge(hear(each), melody).passed for each, melody in zip(values, some, strict=True)]))


@settings(deadline=None, max_examples=200)
@given(melodies)
def test_a_prompt_reads_back_as_its_melody(melody: Melody) -> None:
    assert parse(prompt(melody)) == melody
    assert melody.words[-1] != REST and sum(note.beats for note in melody.notes) == sum(w != REST for w in melody.words)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the instrument is ''"),
        ("loud organ C4 E4 G4", "has 3 beats; wanted 4 to 8"),
        ("loud organ " + "C4 " * 9, "has 9 beats; wanted 4 to 8"),
        ("loud organ C4 E4 G4 H4", "a word of the melody is 'H4'; wanted one of C4"),
        ("loud trumpet C4 E4 G4 C5", "the instrument is 'trumpet'; wanted one of sine"),
        ("medium organ C4 E4 G4 C5", "the loudness is 'medium'"),
        ("loud organ C4 E4 G4 rest", "ends in a rest"),
        ("loud organ C4 rest hold C5", "beat 3 is a hold after no note"),
        ("loud organ hold C4 C4 C5", "beat 1 is a hold"),
        ("loud organ C4 hold hold hold", "held for more than 3 beats"),
    ],
)
def test_what_is_no_melody_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refused:
        parse(text)
    assert "\n" not in str(refused.value) and "loud organ C4 E4 hold rest G4" in str(refused.value)


def test_prompts_are_of_their_split_and_do_not_depend_on_how_many() -> None:
    for split in ("train", "held_out"):
        some = prompts(60, 3, split)
        assert {split_of(parse(text)) for text in some} == {split} and prompts(20, 3, split) == some[:20]
    some, _ = played(1000)
    share = sum(split_of(melody) == "held_out" for melody in some) / 1000
    assert abs(share - HELD_OUT_SHARE) < 4 * (HELD_OUT_SHARE * (1 - HELD_OUT_SHARE) / 1000) ** 0.5


def test_a_held_out_tune_is_held_out_in_every_key_and_on_every_instrument() -> None:
    for text in prompts(40, 5, "held_out"):
        melody = parse(text)
        lowest = min(note.pitch for note in melody.notes)
        words = tuple(PITCHES[PITCHES.index(word) - lowest] if word in PITCHES else word for word in melody.words)
        assert split_of(Melody(words, "plucked", "soft")) == split_of(Melody(words)) == "held_out"


def test_the_score_says_what_sounds_in_every_frame() -> None:
    found = score("soft organ C4 hold rest B5", FRAMES_A_BEAT)
    assert found.mask.sum() == 16 and list(np.flatnonzero(found.begins)) == [0, 12]
    assert list(np.flatnonzero(found.ends)) == [7, 15]
    low, silent, high = found.voices[:8], found.voices[8:12], found.voices[12:16]
    assert set(low) == {2} and set(silent) == {VOICES - 1} and set(high) == {23 * 6 + 2}
    assert set(found.voices[16:]) == {VOICES - 1}
    empty = score("", FRAMES_A_BEAT)
    assert empty.mask.all() and not empty.begins.any() and set(empty.voices) == {VOICES - 1}


def test_a_sinusoid_has_its_amplitude_in_its_bin_and_none_far_away() -> None:
    t = np.arange(4 * RATE) / RATE
    for bin in (0, 9, 24, 47):
        values = spectrogram((0.3 * np.sin(2 * np.pi * frequency(bin) * t + 1)).astype(np.float32))
        wanted = 1 + 20 * np.log10(0.3 / LOUDEST) / RANGE
        inner = values[:, 1:-1]  # the first and the last window reach over the ends
        assert np.abs(inner[bin] - wanted).max() < 2e-3
        assert inner[np.abs(np.arange(BINS) - bin) > 2].max(initial=0) < 0.1
    assert frequency(9) == 440.0


def test_the_seed_decides_how_it_sounds_and_nothing_else() -> None:
    melody = parse("loud organ C4 E4 hold rest G4 C5")
    assert np.array_equal(synthesise(melody, 3), synthesise(melody, 3))
    assert np.abs(render(melody, 3) - render(melody, 4)).max() > 0.01
    wave = synthesise(melody, 3)
    assert wave.shape == (8 * BEAT,) and not wave[6 * BEAT + 100 :].any()
    assert 0.8 * LEVELS["loud"] < np.abs(wave).max() < 3.5 * LEVELS["loud"]


def test_own_prompts_pass() -> None:
    some, values = played(600)
    assert passed(values, some) >= 0.995


@pytest.mark.parametrize("change", CHANGES)
def test_altered_prompts_fail(change: str) -> None:
    some, values = played(600)
    rng = np.random.default_rng(1)
    others = [alter(melody, rng, change) for melody in some]
    assert all(other != melody for other, melody in zip(others, some, strict=True))
    assert passed(values, others) <= 0.005


def test_a_little_noise_is_not_heard_and_much_is() -> None:
    some, values = played(300)
    rng = np.random.default_rng(2)
    noise = rng.normal(size=values.shape).astype(np.float32)
    assert passed((values + 0.02 * noise).clip(0, 1), some) >= 0.98
    assert passed(rng.random(values.shape).astype(np.float32), some) == 0


def test_the_score_of_a_verdict_is_the_share_of_beats() -> None:
    melody = parse("loud sine C4 E4 G4 C5")
    values = render(melody, 0)
    assert verify(values, "loud sine C4 E4 G4 C5").score == 1
    wrong = verify(values, "loud sine C4 F4 G4 C5")
    assert wrong.score == 0.75 and wrong.parts == {"notes": False, "instrument": True, "loudness": True}
    assert verify(values, "loud sine C4 E4 G4 C5 C5").score == 0.8  # one is missing
    assert verify(render(parse("loud sine C4 E4 G4 C5 C5"), 0), "loud sine C4 E4 G4 C5").score == 0.8  # one too many
    silence = hear(np.zeros((BINS, FRAMES)))
    assert silence.words == () and silence.instrument is None and judge(silence, melody).score == 0


def test_notes_played_again_are_told_from_held_ones() -> None:
    for instrument in ("sine", "organ", "plucked"):
        again, held = (Melody(("C4", word, "C4", "G4"), instrument) for word in ("C4", HOLD))
        for seed in range(20):
            assert hear(render(again, seed)).words == again.words and hear(render(held, seed)).words == held.words
    assert parse("loud sine C4 hold C4 G4").notes == (Note(0, 0, 2), Note(0, 2, 1), Note(7, 3, 1))


def test_a_spectrogram_can_be_heard_again(tmp_path: Path) -> None:
    some, values = played(60)
    again = np.stack([spectrogram(resynthesise(each)) for each in values])
    assert passed(again, some) >= 0.98 and np.abs(again - values).mean() < 0.005
    write_wav(tmp_path / "tune.wav", resynthesise(values[0]))
    rate, samples = wavfile.read(tmp_path / "tune.wav")
    assert rate == RATE and samples.dtype == np.int16
    heard = hear(spectrogram(samples.astype(np.float32) / 32767))
    assert heard.words == some[0].words


def test_pictures_are_spectrograms_and_back() -> None:
    some, values = played(8)
    pictures = to_pictures(values)
    assert pictures.shape == (8, 3, 144, 96) and np.abs(from_pictures(pictures) - values).max() < 1e-6
    low = Melody(("C4", "C4", "C4", "C4"))
    assert to_pictures(render(low, 0)[None])[0, 0, -3:].max() > 0.9  # low notes are at the bottom
    assert all(verdict.passed for verdict in verify_batch(pictures, [prompt(melody) for melody in some]))
    with pytest.raises(ValueError, match=r"wanted \(N, 3, 144, 96\)"):
        from_pictures(pictures[:, :, :100])
    with pytest.raises(ValueError, match="8 pictures and 1 prompts"):
        verify_batch(pictures, [prompt(some[0])])
    with pytest.raises(ValueError, match=r"has shape \(32, 48\); wanted \(48, 32\)"):
        hear(values[0].T)
    with pytest.raises(ValueError, match="at most 32000 samples"):
        spectrogram(np.zeros(32001, np.float32))


def main() -> None:
    count = int(sys.argv[1])
    some, values = played(count)
    print(f"own {passed(values, some):.4f}")
    for change in CHANGES:
        rng = np.random.default_rng(1)
        print(f"altered {change} {passed(values, [alter(melody, rng, change) for melody in some]):.4f}")
    print(f"heard again {passed(np.stack([spectrogram(resynthesise(each)) for each in values]), some):.4f}")


if __name__ == "__main__":
    main()
