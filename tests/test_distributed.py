"""Two real processes on one mesh compute what one process does."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import conformance
import jax
import numpy as np
import pytest
import store_cases
import test_solvers
import tiny
from conformance import Variation
from test_streams import dataset
from two_processes import DAMPING, METHODS

TESTS = Path(__file__).parent
SECONDS = 150  # of patience with a busy machine; 30 are enough alone


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def started(port: int, process: int, folder: Path) -> subprocess.Popen:
  paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
  script = TESTS / "two_processes.py"
  with open(folder / f"log_{process}", "w") as log:
    return subprocess.Popen(
      [sys.executable, script, str(port), str(process), folder],
      env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
      stdout=log,
      stderr=log,
    )


def finished(pair: list[subprocess.Popen]) -> bool:
  """Whether both succeeded; neither outlives the other's failure."""
  until = time.monotonic() + SECONDS
  try:
    while time.monotonic() < until:
      codes = [process.poll() for process in pair]
      if any(codes) or None not in codes:
        return codes == [0, 0]
      time.sleep(0.1)
    return False
  finally:
    for process in pair:
      process.kill()
      process.wait()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """The scores that each of two processes ended with."""
  for _ in range(3):
    folder = tmp_path_factory.mktemp("two")
    port = free_port()
    pair = [started(port, process, folder) for process in range(2)]
    if finished(pair):
      return [dict(np.load(folder / f"scores_{i}.npz")) for i in range(2)]
    logs = [(folder / f"log_{i}").read_text()[-3000:] for i in range(2)]
    if "Failed to add port" not in logs[0]:  # not taken by somebody else
      break
  pytest.fail("\n\n".join(logs))


@pytest.fixture(scope="module")
def alone():
  return conformance.run(Variation(methods=METHODS))


def test_each_process_writes_its_part_of_a_store(together, tmp_path):
  want = store_cases.rows(store_cases.build(tmp_path / "s"))
  for found in together:
    for name in ("stored", "turned", "whole"):
      np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-6)
  assert [[*found["shards"]] for found in together] == [[0, 2, 4], [1, 3, 5]]


def test_a_process_that_fails_alone_ends_the_other_too(together, tmp_path):
  said = list(zip(*(found["said"] for found in together), strict=True))
  data, directions, names, written, dtype = said
  assert all("were given different data" in x for x in data)
  assert all("different models, directions" in x for x in directions)
  assert "process 1 failed, and says why" in names[0]
  assert "1 names of 23 rows" in names[1]
  assert "process 1 failed, and says why" in written[0]
  assert "could not be written: No space left" in written[1]
  assert "rows of float32 of other blocks" in dtype[0]
  assert "process 0 failed, and says why" in dtype[1]
  want = store_cases.rows(store_cases.build(tmp_path / "s"))
  for found in together:
    np.testing.assert_allclose(found["again"], want, rtol=1e-5, atol=1e-6)
  # What the first had written was kept, and the rest went to both of them.
  assert [[*found["left"]] for found in together] == [[1, 3, 5], [2, 4]]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_compute_what_one_does(together, alone, method):
  for found in together:
    error = np.abs(found[method] - alone[method]).max()
    assert error <= 1e-5 * np.abs(alone[method]).max()


def test_two_processes_solve_what_one_does(together):
  with jax.enable_x64(True):
    alone = test_solvers.attribute(["cg"], DAMPING)["cg"].values
  for found in together:
    np.testing.assert_allclose(found["cg"], alone, rtol=1e-6, atol=1e-12)


def test_two_processes_replay_what_one_does(together):
  with jax.enable_x64(True):
    alone = tiny.replayed().weights[0]
  for found in together:
    np.testing.assert_allclose(found["unrolled"], alone, rtol=1e-8, atol=1e-12)


def test_two_processes_take_up_a_pass_that_was_stopped(together):
  expected = 2 * dataset()["x"].sum(axis=0)
  for found in together:
    np.testing.assert_allclose(found["total"], expected, rtol=1e-5)
