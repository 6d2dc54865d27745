"""Makes `dicetalk_jax/detect/mtcnn.safetensors` from the weights of a package.

    pip install --no-deps mtcnn==1.0.0 && pip install joblib lz4
    python -m tools.mtcnn_weights

The package stores its weights as pickles of joblib, which run code when they are read:
use the published package only.
"""

import importlib.metadata
import importlib.util
import pathlib

import joblib
import numpy as np
from safetensors.numpy import save_file

from dicetalk_jax.detect.mtcnn import WEIGHTS
from dicetalk_jax.models import mtcnn, parameters

VERSION = '1.0.0'
# The lists of the package are in this order: each layer, its bias, its slope; then the
# heads.
LAYERS = {
  'pnet': ('conv1', 'prelu1', 'conv2', 'prelu2', 'conv3', 'prelu3', 'conv4_1')
  + ('conv4_2',),
  'rnet': ('conv1', 'prelu1', 'conv2', 'prelu2', 'conv3', 'prelu3', 'fc4', 'prelu4')
  + ('fc5_1', 'fc5_2'),
  'onet': ('conv1', 'prelu1', 'conv2', 'prelu2', 'conv3', 'prelu3', 'conv4', 'prelu4')
  + ('fc5', 'prelu5', 'fc6_1', 'fc6_2', 'fc6_3'),
}


def package_weights() -> dict[str, np.ndarray]:
  """Reads the weights of the installed package, by our names.

  They are Keras's, whose kernels have our axes; slopes lose their axes of one.
  """
  spec = importlib.util.find_spec('mtcnn')  # does not import it, so no TensorFlow
  if spec is None or importlib.metadata.version('mtcnn') != VERSION:
    raise SystemExit(f'error: mtcnn {VERSION} is missing; see this file for the way')
  folder = pathlib.Path(spec.submodule_search_locations[0], 'assets', 'weights')
  params = {}
  for network, layers in LAYERS.items():
    values = iter(joblib.load(folder / f'{network}.lz4'))
    for layer in layers:
      if layer.startswith('prelu'):
        params[f'{network}.{layer}.negative_slope'] = next(values).ravel()
      else:
        params[f'{network}.{layer}.kernel'] = next(values)
        params[f'{network}.{layer}.bias'] = next(values)
    assert next(values, None) is None, network
  return params


def main() -> None:
  params = package_weights()
  _, target = parameters.abstract(mtcnn.MTCNN)
  wanted = {name: x.shape for name, x in target.items()}
  assert wanted == {name: x.shape for name, x in params.items()}
  metadata = {
    'source': f'https://pypi.org/project/mtcnn/{VERSION}',
    'licence': 'MIT, see mtcnn.LICENCE.txt',
  }
  save_file(params, WEIGHTS, metadata)
  print(f'wrote {WEIGHTS}')


if __name__ == '__main__':
  main()
