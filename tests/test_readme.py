"""The README's library examples run as they stand and do what they say."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_library_examples_run(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, more = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
  assert len(code.strip().splitlines()) <= 26
  scope: dict = {}
  exec(compile(code, str(README), "exec"), scope)
  scores, data = scope["scores"], scope["data"]
  assert scores.values.shape == (1400, 10)
  assert np.isfinite(scores.values).all()
  top = scores.values.argsort(axis=0)[-3:].T
  same = data["y"][top] == data["y"][1400:1410, None]
  assert same.mean() > 0.7  # by chance 0.1
  assert str(top.tolist()[0][0]) in capsys.readouterr().out
  exec(compile(more, str(README), "exec"), scope)
  same = data["y"][scope["found"].top.rows] == data["y"][1400:1410, None]
  assert same.mean() > 0.7
  assert (tmp_path / "store" / "manifest.json").exists()
