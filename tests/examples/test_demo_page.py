"""The page of the demo, from made-up scores and colours in place of videos."""

from html.parser import HTMLParser
import re

from PIL import Image
import pytest

from dicetalk_jax.media import video
from examples.demo import files, page
from tests.examples.made_report import COUNT, made_person, made_report


class Page(HTMLParser):
  """What a page loads, where it links to, and what one reads."""

  def __init__(self, html: str):
    super().__init__()
    self.loaded: list[str] = []
    self.links: list[str] = []
    self.tags: list[str] = []
    self.text = ''
    self.feed(html)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    attributes = dict(attrs)
    if tag == 'a':
      self.links.append(attributes['href'])
    else:
      names = ('src', 'poster', 'href', 'srcset', 'data')
      self.loaded += [attributes[name] for name in names if name in attributes]

  def handle_data(self, data):
    if self.get_starttag_text() not in ('<style>', '<script>'):
      self.text += data


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('demo')


@pytest.fixture(scope='module')
def report(folder):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(files, 'WIDTH', 32)
    return made_report(folder)


@pytest.fixture(scope='module')
def html(folder, report):
  return page.write(folder, report).read_text(encoding='utf-8')


def test_every_file_that_the_page_loads_lies_next_to_it(folder, html):
  local = [path for path in Page(html).loaded if path != 'data:,']
  # 2 people x 4 emotions x 2 videos and their posters, a portrait and a sheet each, and
  # the four videos at the top with theirs.
  assert len(local) == 2 * (4 * 2 * 2 + 2) + 4 * 2
  for path in local:
    assert not path.startswith(('/', '.'))
    assert (folder / path).is_file(), path


def test_the_page_loads_nothing_from_elsewhere(html):
  assert not any('//' in path for path in Page(html).loaded)
  assert not re.findall(r'@import|@font-face|url\(|fetch\(|XMLHttp', html)
  assert not {'iframe', 'object', 'embed'} & set(Page(html).tags)


def test_links_lead_to_the_report_and_to_where_the_published_weights_are(html):
  links = Page(html).links
  assert 'report.json' in links
  assert 'https://huggingface.co/EEEELY/DICE-Talk' in links


def test_sentences_and_paths_are_shown_as_they_are(html):
  shown = Page(html)
  assert shown.text.count('Say <b>"A & B"</b>.') == 8
  assert not re.search(r'<b>"A|<i>one', html)
  # As one would have to type it.
  assert "--model='my models/<i>one</i>'" in shown.text


def test_the_page_says_what_was_measured(html):
  text = ' '.join(Page(html).text.split())
  assert '5/8 emotions recognised truth 6/8' in text
  assert '-0.25 lip-sync correlation' in text
  assert '61 s for everything' in text
  assert '16-pixel images' in text
  assert 'nobody real is shown' in text


def test_the_page_names_the_commands(html):
  text = Page(html).text
  assert '--image=demo/portrait.png --audio=demo/speech.wav' in text
  assert '--emotion=surprised_3 --output=mine.mp4' in text
  assert 'python -m convert dicetalk' in text


def test_one_person_fills_the_page(report):
  html = page.render(report | {'people': report['people'][:1]})
  assert Page(html).text.count('Say <b>') == 4


def test_videos_are_enlarged_and_have_sound(folder, report):
  written = report['people'][0]['clips'][0]['files']
  for kind in ('generated', 'truth'):
    shown = video.read_video(folder / written[kind]['video'])
    assert shown.frames.shape == (COUNT, 32, 32, 3)
    assert shown.audio is not None
    with Image.open(folder / written[kind]['poster']) as poster:
      assert poster.size == (32, 32)


def test_the_moving_picture_shows_the_first_people_and_stays_small(
  tmp_path, monkeypatch
):
  path = tmp_path / 'demo.webp'
  clips = [made_person(identity)[1] for identity in range(3)]
  monkeypatch.setattr(files, 'CELL', 64)
  files.write_moving_picture(path, clips)
  with Image.open(path) as moving:
    assert moving.n_frames == files.SHOWN_PEOPLE * COUNT
    assert moving.width == 4 * 64
    assert moving.height > 2 * 64  # the emotions stand above

  limit = path.stat().st_size - 1000
  monkeypatch.setattr(files, 'LARGEST', limit)
  files.write_moving_picture(path, clips)
  assert path.stat().st_size <= limit
