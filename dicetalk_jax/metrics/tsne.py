"""A picture of emotion priors: do clips gather by emotion, and not by person?
(t-SNE, paper section 4.5).
"""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

PERPLEXITY = 30
MARKERS = 'os^Dv*'
PALE = {
  1: 0.6,
  2: 0.3,
}  # share of white by level; strong and unknown levels have the full colour
_COLOURS = (
  np.array(
    [
      [31, 119, 180],
      [255, 127, 14],
      [44, 160, 44],
      [214, 39, 40],
      [148, 103, 189],
      [110, 110, 110],
      [227, 119, 194],
      [23, 190, 207],
      [188, 189, 34],
      [140, 86, 75],
    ]
  )
  / 255
)


def project(features: np.ndarray) -> np.ndarray:
  """t-SNE with PCA initialisation and a fixed seed: `[N,D]` to `[N,2]`, N at least 4.

  The perplexity is 30, or less where clips are few.
  """
  from sklearn.manifold import TSNE  # takes a second

  perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
  return TSNE(perplexity=perplexity, init='pca', random_state=0).fit_transform(
    np.asarray(features, np.float32)
  )


def picture(
  features: np.ndarray, identity: np.ndarray, emotion: np.ndarray, level: np.ndarray
) -> np.ndarray:
  """Draws the clips of the first people (6 at most): colour = emotion, shade = level,
  marker = person.

  Args:
    features: `[N,D]`, usually mu.
    identity, emotion: `[N]`, any labels.
    level: int `[N]`, 1-3; 0 where it is unknown.

  Returns:
    uint8 `[600,800,3]`.
  """
  people, kinds = np.unique(identity)[: len(MARKERS)], np.unique(emotion)
  shown = np.isin(identity, people)
  points = project(features[shown])
  figure = Figure(figsize=(8, 6), dpi=100)
  axes = figure.add_axes((0.02, 0.02, 0.74, 0.96), xticks=[], yticks=[])
  for i, kind in enumerate(kinds):
    colour = _COLOURS[i % len(_COLOURS)]
    for person, marker in zip(people, MARKERS):
      own = (emotion[shown] == kind) & (identity[shown] == person)
      pale = np.array([PALE.get(int(x), 0) for x in level[shown][own]]).reshape(-1, 1)
      axes.scatter(
        *points[own].T,
        color=colour * (1 - pale) + pale,
        marker=marker,
        s=36,
        edgecolors=colour,
      )
    axes.scatter([], [], color=colour, label=str(kind))
  for person, marker in zip(people, MARKERS):
    axes.scatter([], [], color='black', marker=marker, label=str(person))
  axes.legend(
    loc='center left', bbox_to_anchor=(1, 0.5), frameon=False, fontsize='small'
  )
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()
