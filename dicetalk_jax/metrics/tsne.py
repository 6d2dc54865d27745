"""An image of emotion priors by t-SNE.

It shows whether clips gather by emotion rather than by identity.
"""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

PERPLEXITY = 30
MARKERS = 'os^Dv*'
# Share of white by level; strong and unknown levels have the full colour.
PALE = {1: 0.6, 2: 0.3}
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
  """Projects features to the plane by t-SNE, with PCA initialisation and a fixed seed.

  The perplexity is 30, or less where clips are few.

  Args:
    features: `[N,D]`, N at least 4.

  Returns:
    `[N,2]`.
  """
  from sklearn.manifold import TSNE  # takes a second

  perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
  return TSNE(perplexity=perplexity, init='pca', random_state=0).fit_transform(
    np.asarray(features, np.float32)
  )


def picture(
  features: np.ndarray, identity: np.ndarray, emotion: np.ndarray, level: np.ndarray
) -> np.ndarray:
  """Draws the clips of the first identities, 6 at most.

  The colour shows the emotion, its shade the level, and the marker the identity.

  Args:
    features: `[N,D]`, usually mu.
    identity, emotion: `[N]`, any labels.
    level: int `[N]`, 1-3; 0 where it is unknown.

  Returns:
    uint8 `[600,800,3]`.
  """
  kinds = np.unique(emotion)
  identities = np.unique(identity)[: len(MARKERS)]
  shown = np.isin(identity, identities)
  points = project(features[shown])
  identity = identity[shown]
  emotion = emotion[shown]
  level = level[shown]

  figure = Figure(figsize=(8, 6), dpi=100)
  axes = figure.add_axes((0.02, 0.02, 0.74, 0.96), xticks=[], yticks=[])
  for i, kind in enumerate(kinds):
    colour = _COLOURS[i % len(_COLOURS)]
    for name, marker in zip(identities, MARKERS):
      own = (emotion == kind) & (identity == name)
      x, y = points[own].T
      pale = np.array([PALE.get(int(one), 0.0) for one in level[own]]).reshape(-1, 1)
      shades = colour * (1 - pale) + pale
      axes.scatter(x, y, color=shades, marker=marker, s=36, edgecolors=colour)
    axes.scatter([], [], color=colour, label=str(kind))
  for name, marker in zip(identities, MARKERS):
    axes.scatter([], [], color='black', marker=marker, label=str(name))
  axes.legend(
    loc='center left', bbox_to_anchor=(1, 0.5), frameon=False, fontsize='small'
  )
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()
