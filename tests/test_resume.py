"""A killed run is taken up by another process, and ends where it would have."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import conformance
import numpy as np
import pytest
from conformance import N, Variation

from tda import meshes
from tda.curvature import kronecker
from tda.streams import Loop

TESTS = Path(__file__).parent
BATCHES = -(-N // 2)  # of two examples

KILLED = """
import os, signal, sys
import conftest, conformance, jax
from tda import meshes
from test_resume import VARIATION

spread, left = meshes.spread, int(sys.argv[2])

def killing(batch, over):
  global left
  left -= 1
  if left == 0:
    os.kill(os.getpid(), signal.SIGKILL)
  return spread(batch, over)

meshes.spread = killing
loop = VARIATION.loop._replace(directory=sys.argv[1])
conformance.run(VARIATION._replace(loop=loop))
"""

VARIATION = Variation(methods=("ekfac",), loop=Loop(2, save_every=0))


def killed(folder: Path, at: int) -> None:
  """Runs until it hands out its batch number `at`, from 1."""
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
  ended = subprocess.run(
    [sys.executable, "-c", KILLED, folder, str(at)],
    env={**os.environ, **cache, "PYTHONPATH": os.pathsep.join(paths)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]


def test_a_killed_run_is_taken_up_on_other_devices(tmp_path, monkeypatch):
  """Killed in its second pass and in its third, then finished on a mesh."""
  killed(tmp_path, BATCHES + 4)
  killed(tmp_path, BATCHES + 1)  # at most three of the second pass are over
  handed, spread = [], meshes.spread

  def counting(batch, over):
    handed.append(batch)
    return spread(batch, over)

  monkeypatch.setattr(meshes, "spread", counting)
  loop = Loop(4, mesh=meshes.mesh(2), directory=str(tmp_path))
  found = conformance.run(VARIATION._replace(loop=loop))["ekfac"]
  assert 0 < len(handed) < 4  # four would be a whole pass
  whole = conformance.run(VARIATION)["ekfac"]
  assert np.abs(found - whole).max() <= 1e-5 * np.abs(whole).max()


def test_sides_of_an_eigenbasis_are_found_once(tmp_path, monkeypatch):
  find, found = kronecker._decomposed, []

  def stopping(name, side, *args):
    if len(found) == 2:
      raise KeyboardInterrupt
    found.append((name, side))
    return find(name, side, *args)

  def counting(name, side, *args):
    found.append((name, side))
    return find(name, side, *args)

  loop = VARIATION.loop._replace(directory=str(tmp_path))
  monkeypatch.setattr(kronecker, "_decomposed", stopping)
  with pytest.raises(KeyboardInterrupt):
    conformance.run(VARIATION._replace(loop=loop))
  monkeypatch.setattr(kronecker, "_decomposed", counting)
  scores = conformance.run(VARIATION._replace(loop=loop))["ekfac"]
  assert len(found) == len({*found}) > 2
  monkeypatch.undo()
  np.testing.assert_array_equal(scores, conformance.run(VARIATION)["ekfac"])
