"""The synthesiser: its phoneme track is exact, its audio predicts the mouth, and
emotion is audible.
"""

import numpy as np
import pytest

from data_pipelines.synthetic import phonemes, speech, visemes
from data_pipelines.synthetic.clip import make_clip
from dicetalk_jax.data.clip_record import SAMPLE_RATE, SAMPLES_PER_FRAME

_VOICE = speech.Voice(f0=120.0, tract=1.0)


def speak(seed, emotion='neutral', intensity=1.0, voice=_VOICE):
  manner = speech.prosody(emotion, intensity)
  return speech.synthesise(
    phonemes.sentence(seed), voice, manner, np.random.default_rng(seed)
  )


def level(wave):
  return float(np.sqrt(np.mean(wave**2)))


def part(utterance, start, end):
  return utterance.audio[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]


@pytest.mark.parametrize('seed', range(5))
def test_phonemes_tile_the_utterance_and_audio_fills_whole_frames(seed):
  utterance = speak(seed)
  starts, ends, names = zip(*utterance.intervals)
  assert (
    starts[0] == 0
    and starts[1:] == ends[:-1]
    and ends[-1] == pytest.approx(utterance.duration)
  )
  assert all(end > start for start, end in zip(starts, ends))
  assert set(names) <= set(phonemes.PHONEMES) and names[0] == names[-1] == 'SIL'
  assert (
    utterance.audio.dtype == np.float32
    and len(utterance.audio) == utterance.frames * SAMPLES_PER_FRAME
  )
  assert np.abs(utterance.audio).max() < 1


def test_sentences_have_five_to_eight_different_words_of_the_lexicon():
  for seed in range(50):
    words = [w for w in phonemes.sentence(seed) if w != ',']
    assert (
      5 <= len(words) <= 8
      and len(set(words)) == len(words)
      and set(words) <= set(phonemes.LEXICON)
    )
  assert all(
    p in phonemes.PHONEMES for p, _ in phonemes.pronounce(tuple(phonemes.LEXICON))
  )


def test_audio_agrees_with_its_track():
  kinds = {
    **dict.fromkeys(phonemes.VOWELS, 'vowel'),
    **dict.fromkeys(('P', 'T', 'K'), 'closure'),
    'SIL': 'silence',
  }
  loud = {'vowel': [], 'closure': [], 'silence': []}
  sibilance = {'S': [], 'AA': []}
  for seed in range(12):
    utterance = speak(seed)
    for start, end, name in utterance.intervals:
      middle = part(utterance, start + 0.3 * (end - start), start + 0.6 * (end - start))
      if name in kinds:
        loud[kinds[name]].append(level(middle))
      if name in sibilance:
        power = np.abs(np.fft.rfft(middle, 1024)) ** 2
        sibilance[name].append(power[256:].sum() / power.sum())  # above 4 kHz
  assert np.mean(loud['silence']) < 0.01 * np.mean(loud['vowel'])
  assert np.mean(loud['closure']) < 0.2 * np.mean(loud['vowel'])
  assert min(sibilance['S']) > 0.8 and max(sibilance['AA']) < 0.1


def test_pitch_follows_the_speaker_and_the_emotion():

  def pitch(utterance):
    """Median over the vowels' autocorrelation peaks, in Hz."""
    peaks = []
    for start, end, name in utterance.intervals:
      wave = part(utterance, start, end)
      if name in ('AA', 'AE', 'AO', 'AH') and len(wave) > 800:
        lags = np.correlate(wave, wave, 'full')[len(wave) - 1 :]
        shortest = SAMPLE_RATE // 450
        peaks.append(
          SAMPLE_RATE / (shortest + np.argmax(lags[shortest : SAMPLE_RATE // 60]))
        )
    return np.median(peaks)

  low, high = speech.Voice(100.0, 1.0), speech.Voice(200.0, 1.0)
  assert pitch(speak(3, voice=high)) / pitch(speak(3, voice=low)) == pytest.approx(
    2, rel=0.06
  )
  surprised, sad = speak(3, 'surprised'), speak(3, 'sad')
  assert pitch(surprised) > 1.3 * pitch(sad)
  assert surprised.duration < 0.85 * sad.duration and level(
    surprised.audio
  ) > 1.3 * level(sad.audio)
  assert speech.prosody('sad', 0.0) == speech.prosody('neutral', 1.0)


def _mel_bank(bands=24, size=512):
  mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), bands + 2)
  hertz, bins = 700 * (10 ** (mel / 2595) - 1), np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
  return np.stack(
    [
      np.clip(np.minimum((bins - a) / (b - a), (c - bins) / (c - b)), 0, None)
      for a, b, c in zip(hertz, hertz[1:], hertz[2:])
    ]
  )


def _windows(audio, bank):
  """400 ms of log-mel around every frame centre, one column per 20 ms."""
  hop = SAMPLE_RATE // 50
  padded = np.pad(audio, (10 * hop, 10 * hop + 400))
  spectra = np.fft.rfft(
    np.lib.stride_tricks.sliding_window_view(padded, 400)[::hop] * np.hanning(400), 512
  )
  mel = np.log(np.abs(spectra) ** 2 @ bank.T + 1e-4)
  rows = 2 * np.arange(len(audio) // SAMPLES_PER_FRAME)[:, None] + np.arange(1, 21)
  return mel[rows].reshape(len(rows), -1)


def test_audio_predicts_the_mouth_of_unseen_sentences_beyond_loudness():
  clips = [
    make_clip(s % 17, 'neutral', 1, s, render=False)
    for s in (*range(60), *range(1000, 1012))
  ]
  bank = _mel_bank()
  x, y = [_windows(c.audio, bank) for c in clips], [c.opening for c in clips]
  train_x, train_y, test_x, test_y = (
    np.concatenate(v) for v in (x[:60], y[:60], x[60:], y[60:])
  )
  mean, std = train_x.mean(0), train_x.std(0) + 1e-6

  def scale(v):
    return (v - mean) / std

  gram = scale(train_x).T @ scale(train_x) + 300 * np.eye(len(mean))
  weights = np.linalg.solve(gram, scale(train_x).T @ (train_y - train_y.mean()))
  r = np.corrcoef(scale(test_x) @ weights, test_y)[0, 1]
  loudness = np.concatenate(
    [np.log(1e-3 + c.audio.reshape(-1, SAMPLES_PER_FRAME).std(1)) for c in clips[60:]]
  )
  assert r > 0.8
  assert np.corrcoef(loudness, test_y)[0, 1] < r - 0.15


def test_bilabials_close_the_lips_and_open_vowels_open_them():
  openings = {'closed': [], 'open': []}
  for seed in range(8):
    emotion = ('neutral', 'happy', 'surprised', 'disgusted')[seed % 4]
    clip = make_clip(seed, emotion, 3, seed, render=False)
    names = np.array(phonemes.PHONEMES)[clip.phoneme]
    openings['closed'].append(clip.opening[np.isin(names, visemes.BILABIALS)])
    openings['open'].append(clip.opening[np.isin(names, ('AA', 'AE', 'AO'))])
  assert np.concatenate(openings['closed']).mean() < 0.01
  assert np.concatenate(openings['open']).mean() > 0.10
