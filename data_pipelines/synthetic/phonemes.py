"""The phoneme set, a small lexicon and random sentences."""

import numpy as np

VOWELS = ('AA', 'AE', 'AH', 'AO', 'EH', 'ER', 'IH', 'IY', 'OW', 'UH', 'UW', 'AX')
CONSONANTS = (
  'P',
  'B',
  'M',
  'F',
  'V',
  'T',
  'D',
  'N',
  'L',
  'S',
  'Z',
  'SH',
  'CH',
  'JH',
  'TH',
  'DH',
  'K',
  'G',
  'NG',
  'HH',
  'R',
  'W',
  'Y',
)
# ARPAbet with ZH folded into SH, plus schwa and silence. The index is what clips store.
PHONEMES = ('SIL', *VOWELS, *CONSONANTS)
INDEX = {p: i for i, p in enumerate(PHONEMES)}

DIPHTHONGS = {
  'AY': ('AA', 'IH'),
  'EY': ('EH', 'IY'),
  'OY': ('AO', 'IH'),
  'AW': ('AA', 'UH'),
}

# Base durations in milliseconds; a diphthong is two halves of one long vowel.
_LONG = ('AA', 'AO', 'ER', 'IY', 'OW', 'UW')
DURATION = {
  'SIL': 200.0,
  'AX': 60.0,
  **{p: 130.0 if p in _LONG else 100.0 for p in VOWELS if p != 'AX'},
  **dict.fromkeys(('P', 'T', 'K'), 85.0),
  **dict.fromkeys(('B', 'D', 'G'), 70.0),
  **dict.fromkeys(('M', 'N', 'NG', 'L', 'R', 'W', 'Y'), 70.0),
  **dict.fromkeys(('F', 'S', 'SH', 'TH'), 110.0),
  **dict.fromkeys(('V', 'Z', 'DH'), 70.0),
  'CH': 120.0,
  'JH': 90.0,
  'HH': 60.0,
}
_DIPHTHONG_HALF = 80.0

# Rich in lip closures, lip-teeth contact, rounding and wide open vowels: the shapes
# that an eye can check.
LEXICON = {
  'my': 'M AY',
  'baby': 'B EY B IY',
  'mama': 'M AA M AX',
  'papa': 'P AA P AX',
  'move': 'M UW V',
  'boom': 'B UW M',
  'palm': 'P AA M',
  'bobby': 'B AA B IY',
  'five': 'F AY V',
  'wave': 'W EY V',
  'river': 'R IH V ER',
  'apple': 'AE P AX L',
  'people': 'P IY P AX L',
  'summer': 'S AH M ER',
  'movie': 'M UW V IY',
  'beautiful': 'B Y UW T AX F AX L',
  'water': 'W AO T ER',
  'window': 'W IH N D OW',
  'yellow': 'Y EH L OW',
  'blue': 'B L UW',
  'moon': 'M UW N',
  'open': 'OW P AX N',
  'above': 'AX B AH V',
  'before': 'B IH F AO R',
  'father': 'F AA DH ER',
  'mother': 'M AH DH ER',
  'we': 'W IY',
  'you': 'Y UW',
  'saw': 'S AO',
  'keep': 'K IY P',
  'food': 'F UW D',
  'shoe': 'SH UW',
  'cheese': 'CH IY Z',
  'home': 'HH OW M',
  'lemon': 'L EH M AX N',
  'think': 'TH IH NG K',
  'good': 'G UH D',
  'the': 'DH AX',
  'a': 'AX',
  'away': 'AX W EY',
  'happy': 'HH AE P IY',
  'job': 'JH AA B',
  'boy': 'B OY',
  'now': 'N AW',
  'voice': 'V OY S',
  'perfect': 'P ER F IH K T',
}


def sentence(seed: int) -> tuple[str, ...]:
  """Draws a sentence of 5 to 8 words; ',' stands for a short pause.

  It is a function of `seed` alone.
  """
  rng = np.random.default_rng([0x5E27, seed])
  vocabulary = list(LEXICON)
  words: list[str] = []
  length = int(rng.integers(5, 9))
  for i, choice in enumerate(rng.choice(len(vocabulary), length, replace=False)):
    words.append(vocabulary[choice])
    if i < length - 1 and rng.random() < 0.12:
      words.append(',')
  return tuple(words)


def text(words: tuple[str, ...]) -> str:
  """Writes the words as a line of text."""
  line = ' '.join(words).replace(' ,', ',')
  return line[:1].upper() + line[1:] + '.'


def pronounce(words: tuple[str, ...]) -> list[tuple[str, float]]:
  """Gives (phoneme, base duration in ms) of words; diphthongs are two equal halves."""
  track = []
  for word in words:
    symbols = ['SIL'] if word == ',' else LEXICON[word].split()
    for symbol in symbols:
      if symbol in DIPHTHONGS:
        track += [(half, _DIPHTHONG_HALF) for half in DIPHTHONGS[symbol]]
      else:
        track.append((symbol, DURATION[symbol]))
  return track
