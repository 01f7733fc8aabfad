"""A run's folder: its config, the results of its stages, its metrics.

    config.json    the run's settings; another run's folder is refused
    metrics.json   results, and `seconds` by stage
    report.html    what was said and drawn, by `tda.report.run`
    STAGE.npz      what a finished stage returned; it is not run again

Stages that take long keep parts of their own in folders beside these.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tda import parts

Arrays = dict[str, np.ndarray]


class Workdir:
  """A folder that belongs to one setting.

  Raises:
    ValueError: the folder holds a run of another setting, naming the fields
      that differ.
  """

  def __init__(self, path: str | os.PathLike, config: Mapping[str, Any]):
    self.path = Path(path)
    self.path.mkdir(parents=True, exist_ok=True)
    self.said: list[str] = []
    self.config = fields = json.loads(json.dumps(dict(config)))
    record = self.path / "config.json"
    if record.exists():
      _check_same(record, json.loads(record.read_text()), fields)
    else:
      _write(record, fields)

  def stage(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays of a stage: read if it was finished, else computed."""
    path = self.path / f"{name}.npz"
    if path.exists():
      with np.load(path) as found:
        return dict(found)
    start = time.monotonic()
    arrays = compute()
    self.record("seconds", {name: round(time.monotonic() - start, 2)})
    with parts.replacing(path) as file:
      np.savez(file, allow_pickle=False, **arrays)
    return arrays

  @contextlib.contextmanager
  def timed(self, name: str) -> Iterator[None]:
    """Records the seconds that a stage took, once it is done.

    The most of several times: a finished one that is read again takes less.
    """
    start = time.monotonic()
    yield
    before = self.metrics().get("seconds", {}).get(name, 0)
    taken = round(time.monotonic() - start, 2)
    self.record("seconds", {name: max(taken, before)})

  def folder(self, name: str) -> str:
    """Where a stage keeps its parts."""
    return str(self.path / name)

  def say(self, text: str) -> None:
    """Prints a result, which the run's report shows as well."""
    print(text)
    self.said.append(text)

  def metrics(self) -> dict[str, Any]:
    """What has been recorded so far."""
    path = self.path / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else {}

  def record(self, key: str, value: Any) -> None:
    """Adds to metrics.json; a mapping joins the one already there."""
    metrics = self.metrics()
    if isinstance(value, Mapping) and isinstance(metrics.get(key), dict):
      value = {**metrics[key], **value}
    _write(self.path / "metrics.json", {**metrics, key: value})


def _write(path: Path, value: Any) -> None:
  with parts.replacing(path) as file:
    file.write((json.dumps(value, indent=2) + "\n").encode())


def _check_same(record: Path, found: dict, config: dict) -> None:
  names = sorted({*found, *config})
  other = [n for n in names if found.get(n) != config.get(n)]
  if other:
    changes = ", ".join(
      f"{n}: {found.get(n)!r} there, {config.get(n)!r} here" for n in other
    )
    raise ValueError(
      f"{record.parent} holds a run of another config ({changes}): choose "
      "another --workdir, or delete that one"
    )
