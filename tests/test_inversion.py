"""The inversion binary: its curves, its count of products, second runs."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAPER, ORDERS = "start 5e-5", ("order 2", "order 3", "order 9")


def run(*flags):
  command = [sys.executable, "-m", "experiments.inversion", "--smoke", *flags]
  return subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inversion")
  done = run(f"--workdir={folder}")
  assert done.returncode == 0, done.stderr[-2000:]
  return folder, done


def case(folder, n):
  with np.load(folder / f"case_32_{n}.npz") as found:
    return dict(found)


def test_fewer_products_than_from_the_papers_start(finished):
  folder, done = finished
  products = json.loads((folder / "metrics.json").read_text())["products"]
  assert set(products) == {"32 16", "32 256"}
  for counts in products.values():
    assert all(0 < counts[name] <= counts[PAPER] / 2 for name in ORDERS)
  assert "every order needs fewer in 2 of 2 cases" in done.stdout
  assert "Cholesky" in done.stdout
  for name in ("convergence", "time"):
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("n", [16, 256])
def test_the_curves_are_those_of_their_methods(finished, n):
  found = case(finished[0], n)
  goal = 4 * np.finfo(np.float32).eps * found["condition"][0]
  for name in (PAPER, *ORDERS, "conjugate gradients", "LiSSA"):
    assert found[name].shape == (41,) and np.isfinite(found[name]).all()
  for name in (PAPER, *ORDERS):
    assert found[name][-1] <= goal and found[f"{name}: status"] == 0
    assert found[name][int(found[f"{name}: stop"])] == found[name][-1]
  assert found[PAPER][8] > 0.9  # what the paper's start costs
  lissa = found["LiSSA"]
  assert (np.diff(lissa) < 0).all() and lissa[-1] > 100 * goal
  # A second cluster of eigenvalues at most: few products with vectors.
  assert found["conjugate gradients"].min() <= goal


def test_a_second_run_redoes_nothing(finished):
  folder, done = finished
  before = {p: p.stat().st_mtime_ns for p in folder.glob("*.npz")}
  assert len(before) == 4
  again = run(f"--workdir={folder}")
  assert again.returncode == 0, again.stderr[-2000:]
  assert {p: p.stat().st_mtime_ns for p in folder.glob("*.npz")} == before
  tables = lambda text: text.split("\n", 1)[1].rsplit("\n\n", 1)[0]
  assert tables(again.stdout) == tables(done.stdout)
  refused = run(f"--workdir={folder}", "--seed=1")
  assert refused.returncode != 0 and "seed: 0 there, 1 here" in refused.stderr
