"""Files that name addresses or other files: refused in one sentence, nothing opened."""

import pathlib
import socket
import struct

import av
import numpy as np
import pytest
import soundfile

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import audio, file_part, image, video, video_reader
from dicetalk_jax.media.soundtrack import Soundtrack
from tests.media import watch

# `{url}` becomes an address of a server here, `{path}` and `{name}` a whole media file.
LISTS = {
  'HLS, of an address': '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}/x.ts\n',
  'HLS, of a file': '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{name}\n',
  'HLS, of a path': '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{path}\n',
  'HLS, with a key': (
    '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n'
    '#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n'
  ),
  'HLS, of lists': '#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}/x.m3u8\n',
  'concat, of a file': 'ffconcat version 1.0\nfile {name}\n',
  'concat, of a path': "ffconcat version 1.0\nfile '{path}'\n",
  'concat, of an address': 'ffconcat version 1.0\nfile {url}/x.mp4\n',
  'DASH': (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S"><Period><AdaptationSet contentType="video">'
    '<Representation id="1" bandwidth="1"><BaseURL>{url}/x.mp4</BaseURL>'
    '</Representation></AdaptationSet></Period></MPD>'
  ),
  'SDP': (
    'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n'
    'm=audio {port} RTP/AVP 0\na=control:{url}\n'
  ),
  'VobSub': '# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:00:000\n',
  'PLS': '[playlist]\nFile1={url}/x.mp3\nNumberOfEntries=1\n',
  'M3U': '{path}\n{url}\n',
  'ASX': '<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
  'QTL': '<?xml version="1.0"?><?quicktime type="x"?><embed src="{url}/x.mov"/>',
  'SMIL': '<smil><body><video src="{url}/x.mp4"/></body></smil>',
  'SVG': (
    '<svg xmlns="http://www.w3.org/2000/svg" '
    'xmlns:xlink="http://www.w3.org/1999/xlink" width="90" height="90">'
    '<image xlink:href="{url}/x.png" width="90" height="90"/></svg>'
  ),
  'XML': '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "{path}">]><x>&a;</x>',
  'PostScript': '%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n({path}) run\n',
}
READERS = [
  audio.load_audio,
  audio.load_span,
  Soundtrack,
  video.read_video,
  video_reader.probe,
  lambda path: [*video_reader.frames(path)],
  image.load_image,
]


def refuse(path, readers=READERS):
  for read in readers:
    with pytest.raises(InputError) as info:
      read(path)
    assert '\n' not in str(info.value) and str(path) in str(info.value)


@pytest.fixture(scope='module')
def other(tmp_path_factory):
  """A whole video with sound, under the names that lists give it."""
  path = tmp_path_factory.mktemp('other') / 'other.mp4'
  frames = np.full((5, 80, 80, 3), 90, np.uint8)
  wave = 0.1 * np.random.default_rng(0).normal(size=3200)
  video.write_video(path, frames, 25, wave)
  return path


@pytest.mark.parametrize('kind', LISTS)
def test_a_list_opens_nothing(tmp_path, other, kind):
  """Whatever its name says that it is."""
  near = tmp_path / 'near.mp4'
  near.write_bytes(other.read_bytes())
  sub = tmp_path / 'list.sub'  # the one that VobSub's index belongs to
  sub.write_bytes(b'\0\0\1\xba' * 99)
  with watch.uncalled() as port, watch.unopened(other, near, sub):
    fields = dict(url=f'http://127.0.0.1:{port}', port=port, path=other, name=near.name)
    for ending in ('m3u8', 'mp4', 'wav', 'png'):
      path = tmp_path / f'list.{ending}'
      path.write_text(LISTS[kind].format_map(fields))
      refuse(path)


def box(name: bytes, content: bytes) -> bytes:
  return struct.pack('>I4s', 8 + len(content), name) + content


def alias(path: pathlib.Path) -> bytes:
  """A data reference of QuickTime to another file, as its Finder wrote it."""
  name = path.name.encode()
  head = bytes(10) + bytes([3]) + b'vol'.ljust(27, b'\0') + bytes(12)
  head += bytes([len(name)]) + name.ljust(63, b'\0') + bytes(16)
  head += struct.pack('>HH', 1, 1) + bytes(16)
  target = b'vol:' + str(path).replace('/', ':').encode()
  target += bytes(len(target) % 2)
  records = struct.pack('>hH', 2, len(target)) + target + struct.pack('>hH', -1, 0)
  return box(b'alis', struct.pack('>I', 0) + head + records)


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
  """A movie with all boxes `old` replaced, and the boxes around them enlarged."""
  parents = (b'moov', b'trak', b'mdia', b'minf', b'dinf', b'dref')
  out, position = b'', 0
  while position < len(data):
    size, name = struct.unpack('>I4s', data[position : position + 8])
    content = data[position + 8 : position + size]
    if name == b'dref':
      content = content[:8] + replaced(content[8:], old, new)
    elif name in parents:
      content = replaced(content, old, new)
    whole = box(name, content)
    out += new if whole == old else whole
    position += size
  return out


def test_data_references_of_a_movie_open_nothing(tmp_path, other):
  with av.open(str(tmp_path / 'x.mov'), 'w') as container:
    stream = container.add_stream('pcm_s16le', rate=16000, layout='mono')
    noise = np.random.default_rng(0).integers(-9999, 9999, (1, 16000)).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(noise, format='s16', layout='mono')
    frame.sample_rate = 16000
    for packet in (*stream.encode(frame), *stream.encode(None)):
      container.mux(packet)
  data = (tmp_path / 'x.mov').read_bytes()
  own = box(b'url ', struct.pack('>I', 1))  # in this file
  assert own in data and len(audio.load_audio(tmp_path / 'x.mov')) == 16000
  with watch.uncalled() as port, watch.unopened(other):
    address = f'http://127.0.0.1:{port}/x\0'.encode()
    for reference in (alias(other), box(b'url ', bytes(4) + address)):
      (tmp_path / 'y.mov').write_bytes(replaced(data, own, reference))
      readers = [video.read_video, video_reader.probe]
      refuse(tmp_path / 'y.mov', readers)
      try:
        wave = audio.load_audio(tmp_path / 'y.mov')
      except InputError as error:
        assert '\n' not in str(error)
      else:  # an address is ignored, and the samples of this file are read
        assert len(wave) == 16000


def test_lists_are_no_formats_that_are_opened():
  """Nor are devices and formats that are several files."""
  allowed = set(file_part._FORMATS.split(','))
  lists = {'hls', 'dash', 'concat', 'sdp', 'rtsp', 'rtp', 'imf', 'vobsub', 'lavfi'}
  assert not allowed & (lists | {'image2', 'image2pipe', 'ffmetadata', 'svg_pipe'})
  known = set(','.join(av.formats_available).split(','))
  assert allowed <= known


def test_the_watch_notices(tmp_path):
  """What the tests above rely on."""
  soundfile.write(tmp_path / 'x.wav', np.ones(100) * 0.1, 16000)
  with (
    pytest.raises(AssertionError, match='opened'),
    watch.unopened(tmp_path / 'x.wav'),
  ):
    audio.load_audio(tmp_path / 'x.wav')
  with pytest.raises(AssertionError, match='called'), watch.uncalled() as port:
    socket.create_connection(('127.0.0.1', port)).close()
