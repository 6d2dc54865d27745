"""Corpora, finished clips and data sets may lie in a bucket."""

from etils.epath import gpath
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import pytest

from data_pipelines import prepare
from data_pipelines.builders import corpus, corpus_workers
from data_pipelines.builders.corpus_plan import make_plan
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax.data import clip_record
from dicetalk_jax.data.clip_source import ClipSource
from tests.data_pipelines import made_clips
from tests.data_pipelines.made_clips import FLAGS, RED


class _Bucket(MemoryFileSystem):
  """An object store for `s3://`, in memory."""

  protocol = 's3'
  store, pseudo_dirs = {}, ['']

  @classmethod
  def _strip_protocol(cls, path):
    path = path.removeprefix('s3://').strip('/')
    return path and f'/{path}'


def test_a_corpus_and_its_data_set_in_a_bucket(tmp_path, monkeypatch, capsys):
  fsspec.register_implementation('s3', _Bucket, clobber=True)
  # Otherwise TensorFlow's own file systems serve.
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)
  bucket = fsspec.filesystem('s3')
  for name in ('p', 'q'):
    bucket.pipe_file(
      f'mine/in/{name}/a.mp4', made_clips.write(tmp_path / 'a.mp4', 0.6).read_bytes()
    )
  prepare.main(['folder', '--root=s3://mine/in', '--out=s3://mine/out', *FLAGS])
  folder = capsys.readouterr().out.splitlines()[-1]
  assert folder.startswith('s3://mine/out/folder/full_32px_')
  bucket.get(f'{folder}/', f'{tmp_path}/copy/', recursive=True)
  (train,) = ClipSource(tmp_path / 'copy')
  assert clip_record.decode_frames(train).shape == (15, 32, 32, 3)
  assert not [path for path in bucket.find('mine/out') if 'work' in path]


def test_finished_clips_are_found_by_one_listing(tmp_path, monkeypatch):
  fsspec.register_implementation('s3', _Bucket, clobber=True)
  bucket, asked = fsspec.filesystem('s3'), []
  people = [f'p{i}' for i in range(20)]
  for name in people:
    bucket.pipe_file(f'found/in/{name}/a.mp4', b'404')
  plan = make_plan(
    CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED), 's3://found/in'
  )
  worker = corpus_workers.Worker(
    plan.config, plan.tree, plan.expressions, corpus.ClipCache('s3://found/work')
  )
  for name in ('info', 'cat_file', 'ls'):
    real = getattr(_Bucket, name)
    monkeypatch.setattr(
      _Bucket,
      name,
      lambda self, path, *args, _real=real, _name=name, **kwargs: (
        asked.append((_name, path)),
        _real(self, path, *args, **kwargs),
      )[1],
    )
  dict(corpus._prepare_all(worker, plan, lambda worker, clips: iter(())))
  assert len(asked) < 5  # one listing of a folder that is empty

  def run(worker, clips):
    return corpus_workers.prepare_clips(worker, clips, 1)

  made = dict(corpus._prepare_all(worker, plan, run))
  assert len(made) == 20
  asked.clear()

  def none(worker, clips):
    return iter(()) if not clips else pytest.fail('all are done')

  assert dict(corpus._prepare_all(worker, plan, none)) == made
  read = [path for name, path in asked if name == 'cat_file']
  assert len(read) == len(set(read)) == 20 and not [
    path for _, path in asked if 'found/in' in path
  ]
