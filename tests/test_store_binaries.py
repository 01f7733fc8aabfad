"""Building, asking and analysing a store as a user does."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

ROOT = pathlib.Path(__file__).parent.parent
SMALL = ("--config.facts=3", "--config.steps=6", "--config.layers=1")


def run(binary, *flags):
  command = [sys.executable, "-m", f"experiments.{binary}", *flags]
  return subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )


def build(folder, *flags):
  config = "--config=configs/store.py:smoke"
  return run("build_store", config, f"--workdir={folder}", *SMALL, *flags)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp("store")
  done = build(folder, "--config.per_shard=9", "--config.kept=int8")
  assert done.returncode == 0, done.stderr[-2000:]
  return folder, done


def test_a_store_is_built_once(built):
  folder, done = built
  metrics = json.loads((folder / "metrics.json").read_text())
  assert metrics["store"]["rows"] == 42 and "ask it with" in done.stdout
  files = {
    path: path.stat().st_mtime_ns for path in (folder / "store").rglob("0")
  }
  assert len(files) > 4
  again = build(folder, "--config.per_shard=9", "--config.kept=int8")
  assert again.returncode == 0, again.stderr[-2000:]
  assert all(path.stat().st_mtime_ns == at for path, at in files.items())


def test_planted_facts_are_looked_for(built):
  folder, _ = built
  flags = ("--k=3", "--first_stage=20", "--tail_patch=1")
  done = run("query", f"--store={folder}", *flags)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.count(" for it") == 3 and "the first stage" in done.stdout
  (path,) = (folder / "queries").iterdir()
  found = json.loads((path / "metrics.json").read_text())["queries"]
  assert "copy of fact 0" in (path / "report.html").read_text()
  assert [len(x["first"]) for x in found] == [3] * 3
  for query in found:
    scores = [x["score"] for x in query["first"] + query["last"][::-1]]
    assert scores == sorted(scores, reverse=True)
  retrieval = json.loads((path / "metrics.json").read_text())["retrieval"]
  assert retrieval["bm25"]["MRR"] == 1
  assert np.isfinite([x["tail-patch"] for x in retrieval.values()]).all()
  assert {"logra", "relatif", "dot", "cosine", "trackstar"} <= {*retrieval}


def test_queries_of_a_file_are_asked_and_analysed(built, tmp_path):
  folder, _ = built
  lines = [
    {"task": "x", "prompt": "The ", "completion": name, "answer": "the"}
    for name in ("one", "other")
  ]
  path = tmp_path / "queries.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  done = run("query", f"--store={folder}", f"--queries={path}", "--method=dot")
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.count(" for it") == 2 and "recall" not in done.stdout
  done = run("procedural", f"--store={folder}", f"--queries={path}")
  assert done.returncode == 0, done.stderr[-2000:]
  (analysed,) = (folder / "procedural").iterdir()
  results = json.loads((analysed / "metrics.json").read_text())
  assert {*results} == {"logra", "relatif", "bm25"}
  assert "per nat of the completion" in (analysed / "report.html").read_text()
  assert -1 <= results["logra"]["correlations"]["x"]["x"] <= 1
  assert results["logra"]["answers"]["queries"] == 2
  for method in results:
    image = analysed / f"correlations_{method}.png"
    assert image.read_bytes()[:4] == b"\x89PNG"
  path.write_text('{"prompt": "The "}')
  for binary in ("query", "procedural"):
    done = run(binary, f"--store={folder}", f"--queries={path}")
    assert done.returncode != 0 and "line 1 of" in done.stderr


def test_what_is_asked_wrongly_is_told(built, tmp_path):
  folder, _ = built
  store = f"--store={folder}"
  for flags, message in (
    ((store, "--prompt=a"), "give --prompt and --completion"),
    ((store, "--k=43"), "the first 43 of 42 rows"),
    ((store, "--prompt=a", f"--completion={'b' * 200}"), "at most 129"),
    ((f"--store={tmp_path}",), "no folder of experiments.build_store"),
  ):
    done = run("query", *flags)
    assert done.returncode != 0 and message in done.stderr, done.stderr[-800:]
  done = build(tmp_path / "other", "--config.projection=dense")
  assert done.returncode != 0 and "projection='dense'" in done.stderr
