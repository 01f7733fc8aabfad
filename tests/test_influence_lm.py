"""The binary that asks a language model, as a user meets it."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import influence_task

ROOT = pathlib.Path(__file__).parent.parent
run = functools.partial(
  subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False
)


def command(folder, *flags):
  return [
    sys.executable,
    "-m",
    "experiments.influence_lm",
    "--config=configs/planted_lm.py:smoke",
    f"--workdir={folder}",
    *flags,
  ]


def test_planted_facts_are_asked_for_and_a_run_is_read_again(tmp_path):
  small = ("--config.facts=2", "--config.steps=6", "--config.rank=4")
  done = run(command(tmp_path, *small))
  assert done.returncode == 0, done.stderr[-2000:]
  metrics = json.loads((tmp_path / "metrics.json").read_text())
  assert {"ekfac", "gradient_dot", "bm25", "tfidf"} == {*metrics["retrieval"]}
  assert metrics["retrieval"]["bm25"]["MRR"] == 1
  assert sum(metrics["layer_shares"]) == pytest.approx(1)
  assert len(metrics["orders"]) == 5
  assert {"tails.png", "layers.png"} <= {x.name for x in tmp_path.iterdir()}
  (file,) = tmp_path.glob("scores_*.npz")
  with np.load(file) as scores:
    assert scores["ekfac"].shape == (28, 2)
    assert np.isfinite(scores["ekfac"]).all() and scores["surprisal"].min() > 0
    influence = scores["ekfac"]
  (file,) = tmp_path.glob("tokens_*.npz")
  with np.load(file) as tokens:
    starts = np.cumsum(tokens["sizes"]) - tokens["sizes"]
    of_documents = np.add.reduceat(tokens["values"], starts)
  orders = [np.argsort(sign * influence, axis=0)[:5] for sign in (1, -1)]
  shown = influence[np.unique(orders)]
  # Queries of rank 4 are compressed anew, which moves small scores a little.
  scale = np.abs(influence).max(axis=0)
  assert (np.abs(of_documents - shown) < 1e-3 * scale).all()
  report = (tmp_path / "report.html").read_text()
  for text in ("⟨end⟩", "recall@4", "blocks/mlp", "eigenvalue against", "rank"):
    assert text in report
  again = run(command(tmp_path, *small, "--config.shown=1"))
  assert again.returncode == 0, again.stderr[-2000:]
  assert again.stdout.count(" -> ") == 1 and "training" not in again.stderr
  other = run(command(tmp_path, *small, "--config.seed=1"))
  assert other.returncode != 0 and "seed" in other.stderr


def test_what_is_asked_wrongly_is_told_before_training(tmp_path):
  flags = ("--config.documents=stdlib", "--config.prompts=('def ',)")
  for more, message in (
    (("--config.tune=True",), "nothing to tune"),
    (("--config.answer_tokens=125",), "'def ' has 4 tokens"),
    (("--config.completions=('a','b')",), "1 prompts and 2 completions"),
    (("--config.sites=all",), "sites='all'"),
  ):
    done = run(command(tmp_path, *flags, *more))
    assert done.returncode != 0
    assert message in done.stderr


def test_prompts_alone_ask_what_the_model_answers(tmp_path):
  corpus = tmp_path / "corpus.jsonl"
  said = [f"{i} apples and {i} pears are {2 * i}" for i in range(8)]
  lines = [json.dumps({"q": "How many?", "a": one}) for one in said]
  corpus.write_text("\n".join(lines))
  done = run(
    command(
      tmp_path / "results",
      f"--config.documents={corpus}",
      "--config.pattern=q,a",
      "--config.limit=6",
      "--config.layers=1",
      "--config.prompts=('How many?',)",
      "--config.answer_tokens=3",
      "--config.top=6",
    )
  )
  assert done.returncode == 0, done.stderr[-2000:]
  metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
  ((prompt, answer),) = metrics["answers"]
  assert prompt == "How many?" and 1 <= len(answer) <= 3
  shown = re.findall(r"(line \d): How many", done.stdout)
  assert sorted(shown) == [f"line {i + 1}" for i in range(6)]


def test_own_scores_are_of_each_query_s_text_in_every_order():
  orders = {"sentence": ["s0", "s1", "s2"], "turned": ["t0", "t1", "t2"]}

  def of_texts(texts):
    value = lambda one, q: 100 * (one[0] == "t") + 10 * int(one[1]) + q
    return np.array([[value(one, q) for q in range(3)] for one in texts])

  found = influence_task.own(orders, of_texts)
  expected = [[0, 11, 22], [100, 111, 122], [15, 11, 7]]
  np.testing.assert_array_equal(found, expected)
  assert influence_task.own({}, of_texts).size == 0
