"""What is heard in a spectrogram, and whether it is what a prompt says. No network: peaks on the grid of beats.

A beat is a rest where nothing is louder than ``HEARD``; else its note is the loudest bin of the two octaves. It begins
anew where that bin rises by ``RISE``, and goes on where it does not. Instruments differ in their second and third
partial, an octave and a twelfth above, at the attack.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from .grammar import BEATS, HOLD, LOUDNESS, PITCHES, REST, Melody, parse
from .sound import BINS, FRAMES, FRAMES_A_BEAT, Float, from_pictures

HEARD = 0.2
RISE = 0.08  # by which a note is louder than just before, where it is played again
SECOND, THIRD = 12, 19  # semitones
SINE, ORGAN = 0.45, 0.3  # how far below the first the second partial of a sine lies, and the third of an organ at most
LOUD = 0.83


@dataclass(frozen=True)
class Heard:
    """``words`` one a beat, without rests at the end; instrument and loudness None where no note is heard."""

    words: tuple[str, ...]
    instrument: str | None
    loudness: str | None


@dataclass(frozen=True)
class Verdict:
    """``score``: the share of beats that are right; ``parts`` hold for notes (all beats), instrument and loudness."""

    score: float
    parts: dict[str, bool] = field(hash=False)

    @property
    def passed(self) -> bool:
        """Whether everything is right."""
        return all(self.parts.values())


def _words(values: Float) -> list[str]:
    """One a beat, of all eight."""
    words: list[str] = []
    for start in range(0, FRAMES, FRAMES_A_BEAT):
        beat = values[: len(PITCHES), start : start + FRAMES_A_BEAT - 1].mean(1)
        pitch = int(beat.argmax())
        if beat[pitch] < HEARD:
            words.append(REST)
            continue
        rise = values[pitch, start] - values[pitch, start - 1] if start else np.inf
        before = next((word for word in reversed(words) if word != HOLD), REST)
        words.append(HOLD if before == PITCHES[pitch] and rise < RISE else PITCHES[pitch])
    return words


def hear(values: ArrayLike) -> Heard:
    """Of a spectrogram (48, 32) in [0, 1]. Raises ValueError for another shape."""
    spectrogram = np.asarray(values, np.float32)
    if spectrogram.shape != (BINS, FRAMES):
        raise ValueError(f"the spectrogram has shape {spectrogram.shape}; wanted {(BINS, FRAMES)}")
    words = _words(spectrogram)
    while words and words[-1] == REST:
        words.pop()
    attacks = [(PITCHES.index(word), beat * FRAMES_A_BEAT) for beat, word in enumerate(words) if word in PITCHES]
    if not attacks:
        return Heard(tuple(words), None, None)
    first, second, third = (
        np.array([spectrogram[pitch + above, at : at + 2].max() for pitch, at in attacks])
        for above in (0, SECOND, THIRD)
    )
    if np.median(first - second) > SINE:
        instrument = "sine"
    else:
        instrument = "organ" if np.median(first - third) < ORGAN else "plucked"
    return Heard(tuple(words), instrument, LOUDNESS[int(np.median(first) > LOUD)])


def judge(heard: Heard, melody: Melody) -> Verdict:
    """What was heard against what is written. What sounds after the melody is wrong."""
    beats = range(max(len(melody.words), len(heard.words)))
    said, wanted = ([*words, *[REST] * BEATS[1]] for words in (heard.words, melody.words))
    right = sum(said[beat] == wanted[beat] for beat in beats)
    parts = {
        "notes": heard.words == melody.words,
        "instrument": heard.instrument == melody.instrument,
        "loudness": heard.loudness == melody.loudness,
    }
    return Verdict(right / len(beats), parts)


def verify(values: ArrayLike, prompt: str) -> Verdict:
    """Judges one spectrogram (48, 32) in [0, 1]."""
    return judge(hear(values), parse(prompt))


def verify_batch(pictures: ArrayLike, prompts: Iterable[str]) -> list[Verdict]:
    """Judges pictures of spectrograms (N, 3, 144, 96) in [0, 1], each against its own prompt."""
    values, texts = from_pictures(np.asarray(pictures, np.float32)), list(prompts)
    if len(values) != len(texts):
        raise ValueError(f"there are {len(values)} pictures and {len(texts)} prompts; wanted as many of each")
    return [verify(each, text) for each, text in zip(values, texts, strict=True)]
