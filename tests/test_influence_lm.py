"""The binary that asks a language model, as a user meets it."""

import functools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

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
  assert metrics["orders"]["sentence"] == 1 and len(metrics["orders"]) == 4
  assert {"tails.png", "layers.png"} <= {x.name for x in tmp_path.iterdir()}
  (file,) = tmp_path.glob("scores_*.npz")
  with np.load(file) as scores:
    assert scores["ekfac"].shape == (28, 2)
    assert np.isfinite(scores["ekfac"]).all() and scores["surprisal"].min() > 0
  again = run(command(tmp_path, *small, "--config.shown=1"))
  assert again.returncode == 0, again.stderr[-2000:]
  assert again.stdout.count(" -> ") == 1 and "training" not in again.stderr
  other = run(command(tmp_path, *small, "--config.seed=1"))
  assert other.returncode != 0 and "seed" in other.stderr


def test_queries_of_other_documents_come_with_completions(tmp_path):
  flags = ("--config.documents=stdlib", "--config.prompts=('def ',)")
  for more, message in (
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
    )
  )
  assert done.returncode == 0, done.stderr[-2000:]
  metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
  assert 1 <= len(metrics["answers"]["How many?"].encode()) <= 9
  assert "line 3: How many? 2 apples" in done.stdout
  assert "line 7" not in done.stdout
