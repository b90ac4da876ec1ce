"""Melodies as sound, sound as spectrograms, and spectrograms as sound again.

A spectrogram is (48, 32): a bin a semitone from C4, low to high, and four frames a beat of half a second. A value is
the amplitude at that frequency in a Hann window, in decibels: 0 is 48 dB below the loudest, 1. The window is two
frames long at C4 and shrinks with the square root of the frequency, half-way to a constant Q, so that a note that is a
few cents off stays in its bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile

from .grammar import BEATS, Melody, Note

Float = NDArray[np.float32]

RATE = 8000  # samples a second; the highest bin, B7, is 3951 Hz
BINS, FRAMES_A_BEAT = 48, 4
FRAMES = FRAMES_A_BEAT * BEATS[1]
BEAT = RATE // 2  # samples
HOP = BEAT // FRAMES_A_BEAT
LOUDEST, RANGE = 0.6, 48.0  # amplitude of value 1, decibels down to value 0
SILENT = 0.125  # seconds at the end of every note, so that one that is played again can be told from one that is held
JITTER = 0.008  # seconds by which a note may come early or late
ZOOM = 3  # pixels of a value in a picture

# Amplitudes of the partials, seconds of attack and release, seconds in which the first partial falls to 1/e.
TIMBRES: dict[str, tuple[tuple[float, ...], float, float, float]] = {
    "sine": ((1.0,), 0.02, 0.03, np.inf),
    "organ": ((1.0, 0.6, 0.5, 0.4), 0.03, 0.04, np.inf),
    "plucked": ((1.0, 0.3, 0.12), 0.004, 0.02, 0.7),
}
LEVELS = {"loud": 0.5, "soft": 0.125}  # amplitude of the first partial


def frequency(semitones: float) -> float:
    """Hertz of so many semitones above C4, with A4 at 440."""
    return float(440.0 * 2.0 ** ((semitones - 9) / 12))


def _note(note: Note, melody: Melody, rng: np.random.Generator, cents: float, tone: Float) -> tuple[int, Float]:
    """(first sample, samples) of a note; ``tone`` are the levels of this clip's partials."""
    _, attack, release, decay = TIMBRES[melody.instrument]
    start = note.beat * BEAT + round(float(rng.uniform(-JITTER, JITTER)) * RATE)
    long = note.beats * BEAT / RATE - SILENT
    t = np.arange(round((long + release) * RATE), dtype=np.float32) / RATE
    hull = np.minimum(t / attack, 1.0) * np.clip((long + release - t) / release, 0.0, 1.0)
    orders = np.arange(1, len(tone) + 1, dtype=np.float32)[:, None]
    phases = rng.uniform(0, 2 * np.pi, (len(tone), 1)).astype(np.float32)
    waves = np.sin(2 * np.pi * frequency(note.pitch + cents / 100) * orders * t + phases)
    if np.isfinite(decay):  # higher partials die sooner
        waves *= np.exp(-t * orders / (decay * float(rng.uniform(0.85, 1.15))))
    level = LEVELS[melody.loudness] * 10 ** (float(rng.normal(0, 1.2)) / 20)
    return start, (level * hull * (tone @ waves)).astype(np.float32)


def synthesise(melody: Melody, seed: int) -> Float:
    """(32000,) samples, of 8 beats; what is after the melody is silent. The seed decides tuning (a few cents), timbre,
    phases, levels and how early or late notes are."""
    rng = np.random.default_rng(seed)
    wave = np.zeros(BEATS[1] * BEAT + BEAT, np.float32)  # room for a note that comes late
    partials = np.array(TIMBRES[melody.instrument][0], np.float32)
    tone = partials * 10 ** (rng.normal(0, 1.0, len(partials)).astype(np.float32) * (np.arange(len(partials)) > 0) / 20)
    cents = float(rng.normal(0, 3.0))
    for note in melody.notes:
        start, samples = _note(note, melody, rng, cents, tone.astype(np.float32))
        samples, start = samples[max(0, -start) :], max(0, start)
        wave[start : start + len(samples)] += samples
    return wave[: BEATS[1] * BEAT]


@cache
def _analysis() -> Float:
    """(2 HOP, 2 BINS): windows times cosine and sine of every bin, so that a sinusoid gives its amplitude."""
    columns = []
    for hertz in map(frequency, range(BINS)):
        share = (np.arange(2 * HOP) - HOP) / HOP * np.sqrt(hertz / frequency(0))  # of half the window
        window = np.where(abs(share) < 1, 1 + np.cos(np.pi * share), 0.0)
        turns = 2j * np.pi * hertz * np.arange(2 * HOP) / RATE
        columns.append(np.exp(turns) * window * 2 / window.sum())
    table = np.stack(columns, 1)
    return np.concatenate([table.real, table.imag], 1).astype(np.float32)


def spectrogram(wave: Float) -> Float:
    """(N,) samples, N at most 32000 -> (48, 32) in [0, 1]. Raises ValueError for a longer one."""
    if wave.ndim != 1 or len(wave) > FRAMES * HOP:
        raise ValueError(f"the sound has shape {wave.shape}; wanted (N,), at most {FRAMES * HOP} samples")
    padded = np.zeros((FRAMES + 1) * HOP, np.float32)
    padded[HOP // 2 : HOP // 2 + len(wave)] = wave
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * HOP)[::HOP]
    parts = frames @ _analysis()
    amplitude = np.hypot(parts[:, :BINS], parts[:, BINS:]).T
    values: Float = np.clip(1 + 20 * np.log10(np.maximum(amplitude, 1e-9) / LOUDEST) / RANGE, 0, 1).astype(np.float32)
    return values


def render(melody: Melody, seed: int) -> Float:
    """The (48, 32) spectrogram of a melody as it is played with this seed."""
    return spectrogram(synthesise(melody, seed))


def render_batch(melodies: Sequence[Melody], seeds: Sequence[int] | NDArray[np.int64]) -> Float:
    """(N, 48, 32)."""
    return np.stack([render(melody, int(seed)) for melody, seed in zip(melodies, seeds, strict=True)])


def _amplitude(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a sinusoid with that value; 0 of 0."""
    quietest = 10 ** (-RANGE / 20)
    above: NDArray[np.float64] = 10 ** ((np.clip(values, 0, 1) - 1) * RANGE / 20) - quietest
    return LOUDEST * above / (1 - quietest)


def resynthesise(values: Float) -> Float:
    """(48, 32) -> (32000,): one sinusoid a bin, whose decibels run straight from frame to frame."""
    if values.shape != (BINS, FRAMES):
        raise ValueError(f"the spectrogram has shape {values.shape}; wanted {(BINS, FRAMES)}")
    centres, samples = (np.arange(FRAMES) + 0.5) * HOP, np.arange(FRAMES * HOP)
    rng, wave = np.random.default_rng(0), np.zeros(FRAMES * HOP)
    for bin, row in enumerate(values):
        phase = rng.uniform(0, 2 * np.pi)  # in step, all sinusoids would peak at once
        if (row > 0).any():
            hull = _amplitude(np.interp(samples, centres, row))
            wave += hull * np.sin(2 * np.pi * frequency(bin) * samples / RATE + phase)
    return wave.astype(np.float32)


def write_wav(path: str | Path, wave: Float) -> None:
    """16-bit samples; what is louder than 1 is clipped."""
    wavfile.write(path, RATE, (np.clip(wave, -1, 1) * 32767).astype(np.int16))


def to_pictures(values: Float) -> Float:
    """(N, 48, 32) -> (N, 3, 144, 96) grey pictures, low notes at the bottom."""
    large = values[:, None, ::-1].repeat(ZOOM, 2).repeat(ZOOM, 3)
    return np.ascontiguousarray(large.repeat(3, 1))


def from_pictures(pictures: Float) -> Float:
    """``to_pictures`` backwards, by means over colours and pixels: (N, 3, 144, 96) -> (N, 48, 32)."""
    shape = (3, BINS * ZOOM, FRAMES * ZOOM)
    if pictures.ndim != 4 or pictures.shape[1:] != shape:
        raise ValueError(
            f"pictures of a spectrogram have shape {pictures.shape}; wanted (N, {', '.join(map(str, shape))})"
        )
    cells = pictures.reshape(-1, 3, BINS, ZOOM, FRAMES, ZOOM).mean((1, 3, 5))
    return np.ascontiguousarray(cells[:, ::-1]).astype(np.float32)
