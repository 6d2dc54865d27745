"""Eight simulated CPU devices, one compilation cache for the whole run, the longest
files first, goldens as a fixture.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# Tests compile much and compute little.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  ' --xla_cpu_use_fusion_emitters=false',
)

import pathlib
import signal

from absl import flags
import jax
import pytest

from tests import shape_checks

# Before any test imports models.
shape_checks.install()

TESTS = pathlib.Path(__file__).parent
GOLDENS = TESTS / 'goldens'

# The files that take longest, see durations.md. Between the first file that reads the
# three trained tasks and the others, so that no worker waits for the training.
LONGEST = (
  'training/test_tasks.py',
  'test_whole_path.py',
  'lowering/test_variants.py',
  'lowering/test_training.py',
  'training/test_equal_runs.py',
  'training/test_embedder_task.py',
  'training/test_lock.py',
  'training/test_loop.py',
)

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_threefry_partitionable', True)


def pytest_configure(config):
  # Scripts ignore Ctrl-C in their background; tests that send it start from here.
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags
  jax.config.update('jax_compilation_cache_dir', str(config.cache.mkdir('jax')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def pytest_collection_modifyitems(items):
  """Puts the longest files first, so that no worker is left with one at the end."""
  order = {name: i for i, name in enumerate(LONGEST)}
  items.sort(
    key=lambda item: order.get(str(item.path.relative_to(TESTS)), len(LONGEST))
  )


@pytest.fixture(scope='session')
def goldens() -> pathlib.Path:
  return GOLDENS


@pytest.fixture
def mesh():
  mesh = jax.make_mesh(
    (2, 4), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  with jax.set_mesh(mesh):
    yield mesh
