"""Listing folders: links are followed, and what cannot be listed is named."""

import os
import pathlib

import pytest

from data_pipelines.corpora.clip_file import Skipped
from data_pipelines.corpora.file_tree import Tree
from dicetalk_jax import files
from tests.data_pipelines import made_clips


def test_links_to_folders_and_files_are_followed(tmp_path):
  made_clips.touch(tmp_path, 'disk/anna/a.mp4', 'disk/b.mp4', 'corpus/carl/c.mp4')
  (tmp_path / 'corpus/anna').symlink_to('../disk/anna')
  (tmp_path / 'corpus/b.mp4').symlink_to(tmp_path / 'disk/b.mp4')
  (tmp_path / 'disk/anna/a.mp4').write_bytes(b'123')
  tree = Tree(tmp_path / 'corpus')
  assert tree.files == ('anna/a.mp4', 'b.mp4', 'carl/c.mp4')
  assert tree.size('anna/a.mp4') == 3
  assert tree.left_out == ()


def test_links_that_lead_back_end(tmp_path):
  made_clips.touch(tmp_path, 'anna/a.mp4', 'carl/c.mp4')
  (tmp_path / 'anna/all').symlink_to(tmp_path)
  (tmp_path / 'carl/self').symlink_to('.')
  (tmp_path / 'carl/other').symlink_to('../anna')
  assert Tree(tmp_path).files == ('anna/a.mp4', 'carl/c.mp4', 'carl/other/a.mp4')


def test_a_link_to_nowhere_is_a_file_that_is_missing(tmp_path):
  (tmp_path / 'a.mp4').symlink_to('nowhere.mp4')
  tree = Tree(tmp_path)
  assert tree.files == ('a.mp4',)
  with pytest.raises(FileNotFoundError):
    tree.size('a.mp4')


def test_names_that_are_not_utf8_are_named(tmp_path):
  made_clips.touch(tmp_path, 'anna/a.mp4')
  os.makedirs(os.fsencode(tmp_path) + b'/rom\xe9')
  for name in (b'rom\xe9/b.mp4', b'anna/\xff.mp4', b'.hidden\xff'):
    pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b'/' + name)).touch()
  tree = Tree(tmp_path)
  assert tree.files == ('anna/a.mp4',)
  assert tree.left_out == (
    Skipped(r'anna/\xff.mp4', 'name is not UTF-8'),
    Skipped(r'rom\xe9', 'name is not UTF-8'),
  )


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
  made_clips.touch(tmp_path, 'anna/a.mp4', 'carl/c.mp4')
  scandir = os.scandir

  def refused(path):
    if os.path.basename(path) == 'carl':
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  monkeypatch.setattr(files.os, 'scandir', refused)
  tree = Tree(tmp_path)
  assert tree.files == ('anna/a.mp4',)
  assert tree.left_out == (
    Skipped('carl', 'folder cannot be read', 'Permission denied'),
  )
