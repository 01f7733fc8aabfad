"""The comparison of gradient stores, and that the libraries agree."""

import importlib
import logging
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("ml_collections")

from experiments import own_store, store_peers, timing

ROOT = pathlib.Path(__file__).parent.parent
SETTING = store_peers.Setting(4, "mlp", 1, 32, 8, 3, smoke=True)
ABSENT = bool(store_peers.missing())


def test_peers_that_are_not_installed_are_named(monkeypatch, tmp_path):
  monkeypatch.setattr(store_peers, "MODULES", ("numpy", "no_such_peer"))
  with pytest.raises(ValueError, match="needs no_such_peer:") as raised:
    store_peers.measure(SETTING, tmp_path)
  assert "pip install --no-deps" in str(raised.value)


@pytest.mark.skipif(not ABSENT, reason="the peers are installed")
def test_the_part_is_refused_without_them():
  command = [sys.executable, "-m", "experiments.benchmark_store"]
  done = subprocess.run(
    [*command, "--smoke", "--part=peers"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode != 0 and "logix-ai" in done.stderr


def test_what_libraries_do_not_have_in_common_is_refused(monkeypatch, tmp_path):
  monkeypatch.setattr(store_peers, "MODULES", ())
  with pytest.raises(ValueError, match=r"sites='all'.*'mlp', 'linear'"):
    store_peers.measure(SETTING._replace(sites="all"), tmp_path)
  with pytest.raises(ValueError, match="dimension 32 of a decoder of width 32"):
    own_store.config(256, 32, width=32)


def test_the_fastest_is_chosen_once_warm():
  each = (9.0, 4.0, 2.0, 4.0), (1.0, 3.0, 3.0, 3.0)
  seconds = [iter(x) for x in each]
  assert timing.fastest([lambda x=x: next(x) for x in seconds]) == (0, 9.0)
  assert timing.fastest([lambda: 5.0]) == (0, 5.0)


def test_overlap_counts_the_first_rows():
  found, others = np.array([[3, 1], [5, 2]]), np.array([[1, 4], [2, 5]])
  assert store_peers.overlap(found, others) == 0.75


def test_libraries_are_compared(monkeypatch, tmp_path, capsys):
  """With this library in the place of a peer."""
  monkeypatch.setattr(store_peers, "plain", lambda *_: lambda: None)
  found = store_peers.compared(SETTING, {"other": own_store.Side}, tmp_path)
  assert {*found} == {"tda", "tda bfloat16", "other", "times as fast"}
  assert found["other"]["same first rows"] == 1
  assert found["tda bfloat16"]["same first rows"] > 0.9
  for name in ("build", "search", "query"):
    ratio = found["other"][name] / found["tda"][name]
    np.testing.assert_allclose(found["times as fast"][name], ratio)
  assert "times as fast as the faster peer: gradient" in capsys.readouterr().out


@pytest.mark.parametrize("may", [True, False])
def test_a_search_is_cold_only_where_caches_can_be_dropped(
  may, monkeypatch, tmp_path
):
  monkeypatch.setattr(store_peers, "plain", lambda *_: lambda: None)
  monkeypatch.setattr(timing, "dropped", lambda: may)
  found = store_peers.compared(SETTING, {"other": own_store.Side}, tmp_path)
  assert np.isfinite(found["tda"]["cold"]) == may


@pytest.fixture
def own(tmp_path):
  """This library's side, and rows of which not all is predicted."""
  given, rows, queries = store_peers.subject(SETTING)
  rows["mask"][2, 20:], rows["mask"][3, :5] = 0, 0
  (tmp_path / "own").mkdir()
  side = own_store.Side(given, rows, tmp_path / "own", batch=4)
  side.build()
  return side, side.ask(queries), queries


def test_own_store_finds_the_products(own):
  side, asked, _ = own
  scores, rows = side.search("built", asked, 8)
  by_row = np.take_along_axis(asked @ side.ask(side.rows).T, rows, axis=1)
  np.testing.assert_allclose(scores, by_row, rtol=1e-4, atol=1e-3)
  assert (np.sort(rows) == np.arange(8)).all()
  values = np.eye(9, side.columns, dtype=np.float32)
  side.fill(values)
  assert (
    side.search("filled", values[::-1], 1)[1][:, 0] == 8 - np.arange(9)
  ).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bergson", "logix"])
def test_a_peer_finds_the_same(name, own, tmp_path):
  pytest.importorskip(name)
  side, asked, queries = own
  make = importlib.import_module(f"experiments.{name}_store").Side
  with store_peers.quiet():
    peer = make(
      side.given, side.rows, tmp_path, batch=3, directions=side.directions()
    )
    peer.build()
    there = peer.ask(queries)
  logging.disable(logging.NOTSET)
  # The order of the numbers is each library's own.
  np.testing.assert_allclose(
    np.sort(np.abs(there)), np.sort(np.abs(asked)), rtol=1e-3, atol=1e-4
  )
  for which in (0, 1):
    np.testing.assert_allclose(
      peer.search("built", there, 3)[which],
      side.search("built", asked, 3)[which],
      rtol=1e-4,
    )
  ours = side.scores(asked)
  for method, found in peer.scores(there).items():
    scale = np.linalg.norm(ours[method]) / np.linalg.norm(found)
    size = np.abs(ours[method]).max()
    np.testing.assert_allclose(
      scale * found, ours[method], rtol=1e-3, atol=1e-4 * size, err_msg=method
    )
  random = np.random.default_rng(0)
  values = random.standard_normal((50, side.columns), np.float32)
  for each in (side, peer):
    each.fill(values)
  theirs, here = (x.search("filled", values[:5], 9) for x in (peer, side))
  np.testing.assert_allclose(theirs[0], here[0], rtol=1e-4)
  assert (theirs[1] == here[1]).all()
