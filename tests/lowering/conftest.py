"""Lets programs with cuDNN's attention be lowered without cuDNN."""

import pytest

from tests import cudnn


@pytest.fixture(scope='session', autouse=True)
def cudnn_is_there():
  with pytest.MonkeyPatch.context() as patch:
    cudnn.detect(patch)
    yield
