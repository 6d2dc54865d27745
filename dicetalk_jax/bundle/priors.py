"""The emotion priors of a model folder: one Gaussian per emotion.

Each prior carries the fingerprint of the embedder that made it, because an emotion
model misreads the priors of any embedder but the one that it learned on.
"""

from collections.abc import Collection, Mapping
import zipfile

from etils import epath
import jax
import numpy as np

from dicetalk_jax.bundle.index import EMOTION_MODEL, Folder, components, writing
from dicetalk_jax.errors import WeightsError

PRIORS = 'priors'
RELEASED = 'released'  # in place of a fingerprint: the embedder was not published

Prior = tuple[np.ndarray, np.ndarray]  # mean and standard deviation


def emotions(folder: Folder) -> list[str]:
  """Names of the emotions that the folder has a prior for, sorted."""
  return sorted(
    path.stem
    for path in (epath.Path(folder) / PRIORS).glob('*.npz')
    if not path.name.startswith('.')
  )


def load_prior(folder: Folder, emotion: str) -> Prior:
  """The prior of one emotion, for the emotion model of the folder.

  Raises:
    WeightsError: the folder does not have it (names those it has), the file is damaged,
      or the emotion model learned on the priors of another embedder.
  """
  known = emotions(folder)
  if emotion not in known:
    raise WeightsError(
      f"there is no emotion '{emotion}' in {folder}; it has: "
      f'{", ".join(known) or "none"}'
    )
  prior, embedder = read_prior(folder, emotion)
  learned_on = learned_priors(folder)
  if not readable(embedder, learned_on):
    raise WeightsError(
      f"the emotion '{emotion}' of {folder} comes from the embedder {embedder}, but "
      f'the emotion model there learned on priors of another one ({learned_on}) and '
      'would misread it; train the diffusion model with this embedder, or delete '
      f'{PRIORS}/{emotion}.npz there and use a prior that belongs to the model'
    )
  return prior


def load_priors(folder: Folder, embedder: str = '') -> dict[str, Prior]:
  """All priors by emotion: (mean, standard deviation), float32.

  Args:
    folder: the model folder.
    embedder: a fingerprint leaves out the priors of other embedders; '' keeps all,
      whether the emotion model of the folder can read them or not.
  """
  priors = {}
  for emotion in emotions(folder):
    prior, made_by = read_prior(folder, emotion)
    if not embedder or made_by in ('', embedder):
      priors[emotion] = prior
  return priors


def read_prior(folder: Folder, emotion: str) -> tuple[Prior, str]:
  """A prior and the fingerprint of its embedder ('' if unknown).

  The emotion model of the folder may be unable to read it; see `load_prior`.

  Raises:
    WeightsError: the file is missing or damaged.
  """
  path = epath.Path(folder) / PRIORS / f'{emotion}.npz'
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      mu = np.asarray(arrays['mu'], np.float32)
      sigma = np.asarray(arrays['sigma'], np.float32)
      embedder = str(arrays['embedder']) if 'embedder' in arrays else ''
  except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
    raise WeightsError(
      f'{path} is not an emotion prior (two arrays, mu and sigma); copy the model '
      'folder again'
    ) from error
  return (mu, sigma), embedder


def learned_priors(folder: Folder) -> str:
  """The embedder whose priors the emotion model learned on; '' if unknown."""
  return components(folder).get(EMOTION_MODEL, {}).get('priors', '')


def readable(embedder: str, learned_on: str) -> bool:
  """Whether an emotion model understands priors, as far as both embedders are known."""
  return '' in (embedder, learned_on) or embedder == learned_on


def save_priors(
  folder: Folder,
  priors: Mapping[str, Prior],
  embedder: str = '',
  *,
  replace: bool = False,
) -> None:
  """Writes or replaces the Gaussians of some emotions: all of them, or none.

  Args:
    folder: made if missing.
    priors: emotion -> (mean, standard deviation), float32 `[256]` each.
    embedder: fingerprint of the embedder that made them; '' if it is not known.
    replace: whether they may replace priors of other embedders.

  Raises:
    WeightsError: one of them would replace the prior of another embedder.
  """
  if not replace:
    check_replaceable(folder, priors, embedder)
  if jax.process_index() != 0:
    return
  place = epath.Path(folder) / PRIORS
  parts = {emotion: place / f'.{emotion}.part' for emotion in priors}
  with writing(place):
    place.mkdir(parents=True, exist_ok=True)
    try:
      for emotion, (mu, sigma) in priors.items():
        with parts[emotion].open('wb') as file:
          np.savez(
            file,
            mu=np.asarray(mu, np.float32),
            sigma=np.asarray(sigma, np.float32),
            embedder=np.array(embedder),
          )
      for emotion, part in parts.items():
        part.replace(place / f'{emotion}.npz')
    finally:
      for part in parts.values():
        part.unlink(missing_ok=True)


def check_replaceable(folder: Folder, names: Collection[str], embedder: str) -> None:
  """Raises WeightsError if priors of another embedder have one of the names.

  An unknown embedder, '', counts as another one than a known one.
  """
  for emotion in sorted(set(names) & set(emotions(folder))):
    made_by = read_prior(folder, emotion)[1]
    if made_by not in ('', embedder):
      raise WeightsError(
        f"{folder} has the emotion '{emotion}' of another embedder ({made_by}, not "
        f'{embedder or "an unknown one"}), which is never replaced, since the emotion '
        'model may have learned on it; choose another name, or a model folder of this '
        'embedder'
      )


def clear_priors(folder: Folder) -> None:
  """Removes all priors. Process 0 calls this alone."""
  for emotion in emotions(folder):
    (epath.Path(folder) / PRIORS / f'{emotion}.npz').unlink()
