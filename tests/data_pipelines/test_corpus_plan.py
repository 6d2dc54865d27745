"""Plans: names of data sets, and ids of clips."""

from data_pipelines.builders import corpus
from data_pipelines.builders.corpus_plan import make_plan
from data_pipelines.corpora.clip_file import Skipped
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax.data.clip_source import ClipSource
from tests.data_pipelines import made_clips
from tests.data_pipelines.made_clips import RED


def test_names_of_data_sets_say_what_is_in_them(tmp_path):
  made_clips.touch(tmp_path, 'p/a.mp4', 'q/a.mp4')
  name = make_plan(CorpusConfig('folder'), str(tmp_path)).name
  assert (
    name.startswith('full_512px_')
    and make_plan(CorpusConfig('folder'), str(tmp_path)).name == name
  )
  assert make_plan(CorpusConfig('folder', expand=1.0), str(tmp_path)).name != name
  made_clips.touch(tmp_path, 'r/a.mp4')
  assert make_plan(CorpusConfig('folder'), str(tmp_path)).name != name


def test_duplicates_are_left_out(tmp_path):
  made_clips.touch(tmp_path, 'p/a.mp4', 'p/a.mkv', 'q/b.mp4')
  plan = make_plan(CorpusConfig('folder'), str(tmp_path))
  assert plan.skipped == (Skipped('p/a.mp4', 'the same clip twice', 'p/a.mkv'),)


def test_clips_whose_ids_would_be_equal_are_all_kept(tmp_path):
  for path in ('a/b_c.mp4', 'a_b/c.mp4', 'x.mp4', 'x_p00.mp4', 'y_p00.mp4'):
    made_clips.write(tmp_path / 'in' / path, 2.0 if path == 'x.mp4' else 0.6)
  config = CorpusConfig(
    'folder', size=32, min_seconds=0.4, max_seconds=1.0, detector=RED
  )
  plan = make_plan(config, str(tmp_path / 'in'))
  ids = {clip.video: clip.clip_id for clips in plan.clips.values() for clip in clips}
  assert ids['x.mp4'] == 'x' and ids['y_p00.mp4'] == 'y_p00' and not plan.skipped
  for path, start in (
    ('a/b_c.mp4', 'a_b_c_'),
    ('a_b/c.mp4', 'a_b_c_'),
    ('x_p00.mp4', 'x_p00_'),
  ):
    assert ids[path].startswith(start) and len(ids[path]) == len(start) + 8
  folder, report = corpus.prepare_corpus(plan, tmp_path, workers=1)
  made = {
    clip for split in report.splits for clip in ClipSource(folder, split).table.clip_id
  }
  assert made == {*ids.values(), 'x_p00', 'x_p01'} - {'x'} and not report.skipped
  (tmp_path / 'in/labels.csv').write_text(
    'file\n' + '\n'.join(sorted(ids, reverse=True))
  )
  again = make_plan(config, str(tmp_path / 'in'))  # in another order
  assert {
    clip.video: clip.clip_id for clips in again.clips.values() for clip in clips
  } == ids
