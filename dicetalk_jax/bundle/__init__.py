"""A model folder on disk: components, settings and emotion priors.

    bundle.json           format version; settings; one entry per component
    <component>.<n>/      one Orbax checkpoint of flat parameters by dotted name
    priors/<emotion>.npz  mean and standard deviation of one Gaussian per emotion,
                          and the fingerprint of the embedder that made it

The entry of a component has its `config`, its `provenance`, the number of its
`parameters`, its `fingerprint` and the folder of its `checkpoint`. A component that
belongs to another model folder is a reference: its entry names that folder too, under
`folder`, and is only valid while the fingerprint there is the same
(`model_references.py` makes references and packs portable copies). The entry of an
emotion model also names the embedder whose `priors` it learned on.

`bundle.json` is the switch: a component is saved next to its predecessor, then the
file is replaced, then the predecessor is removed. A run that is killed in between
leaves the old model whole. Folders may be local or remote (`gs://...`).

Every function takes a path. Those that read also take a `ModelFolder`, which has read
the index already.
"""

from dicetalk_jax.bundle.checkpoints import (
  fingerprint,
  load_component,
  save_component,
  shapes,
)
from dicetalk_jax.bundle.index import (
  EMOTION_MODEL,
  FORMAT,
  INDEX,
  Entry,
  Folder,
  ModelFolder,
  absolute,
  clear_settings,
  components,
  holder,
  require,
  same,
  save_settings,
  set_entries,
  settings,
)
from dicetalk_jax.bundle.priors import (
  PRIORS,
  RELEASED,
  Prior,
  check_replaceable,
  clear_priors,
  emotions,
  learned_priors,
  load_prior,
  load_priors,
  read_prior,
  readable,
  save_priors,
)

__all__ = [
  'EMOTION_MODEL',
  'FORMAT',
  'INDEX',
  'PRIORS',
  'RELEASED',
  'Entry',
  'Folder',
  'ModelFolder',
  'Prior',
  'absolute',
  'check_replaceable',
  'clear_priors',
  'clear_settings',
  'components',
  'emotions',
  'fingerprint',
  'holder',
  'learned_priors',
  'load_component',
  'load_prior',
  'load_priors',
  'read_prior',
  'readable',
  'require',
  'same',
  'save_component',
  'save_priors',
  'save_settings',
  'set_entries',
  'settings',
  'shapes',
]
