"""Folders of kinds of documents: how they are made, and who is asked."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("ml_collections")

from experiments import corpora, influence_kinds
from tda.evaluation.workdir import Workdir

ROOT = pathlib.Path(__file__).parent.parent


def run(binary, *flags):
  command = [sys.executable, "-m", f"experiments.{binary}", *flags]
  return subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )


def test_sources_take_turns_and_short_passages_are_left_out():
  whole = "a" * 39 + "\n" + "b" * 39 + "\n" + "c" * 5
  texts = {"x/long.txt": whole, "short.txt": "d" * 12, "line 2": "e" * 9}
  rng = np.random.default_rng(0)
  found = corpora.chosen(texts, 9, 40, rng)
  assert found == {
    "x.long-1": "a" * 39 + "\n",
    "x.long-2": "b" * 39 + "\n",
    "short-1": "d" * 12,
  }
  both = corpora.chosen(texts, 2, 40, rng)
  assert {name.rsplit("-")[0] for name in both} == {"x.long", "short"}


def test_held_out_documents_are_of_every_kind_in_turn():
  names = [f"{kind}/{i}" for kind in "ba" for i in range(5)]
  held = influence_kinds.drawn(names, 3, seed=1)
  assert [influence_kinds.of(name) for name in held] == [*"ababab"]
  assert len({*held}) == 6 and {*held} < {*names}
  assert held == influence_kinds.drawn(names, 3, seed=1)
  assert held != influence_kinds.drawn(names, 3, seed=2)
  assert len(influence_kinds.drawn(["x", "y", "z"], 2, seed=0)) == 2
  with pytest.raises(ValueError, match=r"'b' has 5: give .*--config\.ask"):
    influence_kinds.drawn([*names, "a/6"], 5, seed=1)


@pytest.mark.parametrize(
  ("whole", "first"),
  [
    ("one two three", "one two"),
    ("a b cdefgh", "a b"),
    ("ab  cd", "ab"),
    ("unbroken", "unbr"),
  ],
)
def test_halves_meet_where_a_word_ends(whole, first):
  assert influence_kinds.halves(whole) == (first, whole[len(first) :])


def test_shares_of_positive_and_of_all_scores():
  scores = np.array([[1.0, -1.0], [2.0, 0.0], [1.0, -3.0], [-9.0, 0.0]])
  kinds = ["b", "a", "b", "a"]
  found = influence_kinds.shares(scores, kinds)
  assert [*found] == ["a", "b"]
  np.testing.assert_allclose(found["a"], [0.5, 0])
  np.testing.assert_allclose(found["b"], [0.5, 0])
  net = influence_kinds.shares(scores, kinds, net=True)
  np.testing.assert_allclose(net["a"], [-7 / 4, 0])
  np.testing.assert_allclose(net["b"], [0.5, 0])


def test_how_much_is_of_the_query_s_own_kind(tmp_path):
  # Of the second query the only positive score is of the other kind.
  scores = np.array([[3.0, -1.0], [1.0, 4.0], [-2.0, -1.0]])
  workdir = Workdir(tmp_path, {})
  kinds, asked = ["a", "b", "b"], ["a", "a"]
  scores = {"ekfac": scores, "bm25": np.abs(scores)}
  shown = influence_kinds.own(workdir, kinds, asked, scores)
  found = workdir.metrics()["own_kind"]["ekfac"]
  assert found["positive"] == pytest.approx((3 / 4 + 0) / 2)
  assert found["net"] == pytest.approx((3 / 4 - 1 / 4) / 2)
  assert found["net of others"] == pytest.approx((-1 / 4 + 3 / 4) / 2)
  assert found["of first 3"] == pytest.approx(1 / 3)
  assert [line.split()[0] for line in shown.split("\n")[3:]] == [
    "EK-FAC",
    "BM25",
  ]


def test_a_folder_is_made_and_asked(tmp_path):
  chats = {
    f"chat{i}": {"messages": [[{"text": "Hello!"}], [{"text": "Hi " * 60}]]}
    for i in range(8)
  }
  (tmp_path / "chats.json").write_text(json.dumps(chats))
  folder = tmp_path / "corpus"
  made = ("--each=8", "--vocab=300", f"--dialogue={tmp_path / 'chats.json'}")
  done = run("corpora", f"--to={folder}", *made)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "--books would give them" in done.stdout
  said = (folder / "dialogue" / "chat3-1.txt").read_text()
  assert said.startswith("A: Hello!\nB: Hi Hi")
  assert len([*(folder / "code").iterdir()]) == 8
  again = run("corpora", f"--to={folder}", *made)
  assert again.returncode != 0 and "is there already" in again.stderr

  asked = run(
    "influence_lm",
    "--config=configs/mixed_lm.py:smoke",
    f"--config.documents={folder}",
    f"--config.tokenizer={folder}",
    "--config.layers=1",
    f"--workdir={tmp_path / 'results'}",
  )
  assert asked.returncode == 0, asked.stderr[-2000:]
  metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
  shares = metrics["shares"]
  assert [*shares] == ["share of the corpus", "code", "dialogue"]
  for row in shares.values():
    assert [*row] == ["code", "dialogue"]
    assert sum(row.values()) == pytest.approx(1)
  assert shares["dialogue"]["dialogue"] > 0.5 > shares["code"]["dialogue"]
  assert {"ekfac", "bm25"} < {*metrics["own_kind"]}
