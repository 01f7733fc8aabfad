"""What do queries of one task draw on: the same documents, or the answer's own?

  python -m experiments.procedural --store=FOLDER --queries=queries.jsonl
  python -m experiments.procedural --store=FOLDER

Asks a store of `experiments.build_store` many queries of several tasks, a JSONL
file of "prompt", "completion", "task" and perhaps "answer"; or those of its
config, whose tasks are the kinds of the documents that were held out, or of
planted facts. Prints, for raw scores and for scores relative to each document's
own influence, correlations within and across tasks, the slope of influence over
rank, whether documents that hold the answer are among the first, and which
kinds of document are over-represented there (Ruis et al. 2024).
"""

import collections
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import app, flags, logging

from experiments import influence_kinds, store_task
from experiments.store_task import Run
from tda import streams
from tda.attribution import language as attribution
from tda.attribution import logra
from tda.evaluation import procedural
from tda.models import decoder, training
from tda.report import influence as figures
from tda.report import tables
from tda.report.names import display
from tda.store import disk, lenses, search

_STORE = flags.DEFINE_string(
  "store", None, "What build_store had as --workdir.", required=True
)
_QUERIES = flags.DEFINE_string("queries", None, "A JSONL file; see above.")
_METHODS = flags.DEFINE_multi_enum(
  "method", ["logra", "relatif"], lenses.METHODS, "Of tda.store.lenses."
)
_DAMPING = flags.DEFINE_float("damping", 0.1, "Relative to mean eigenvalues.")
_INVERSE = flags.DEFINE_enum(
  "inverse", "eigen", ["eigen", "hyperpower", "diagonal"], "Of the Fisher."
)
_FIRST = flags.DEFINE_float("first", 0.05, "Share of documents that are first.")


class Query(NamedTuple):
  """What is asked."""

  task: str
  prompt: str
  completion: str
  answer: str | None


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # checkpoints report every step
  run = store_task.reopened(_STORE.value)
  store = disk.opened(run.store)
  asked = read(_QUERIES.value) if _QUERIES.value else own(run)
  pairs = [(x.prompt, x.completion) for x in asked]
  rows = attribution.completions(
    pairs, run.corpus.tokenizer, run.setting.length
  )
  model, aim = run.model, decoder.objective(run.model.config)
  log = logra.reopened(store, aim, model.params, rows)
  loop = streams.Loop(run.setting.batch_size, "queries")
  features = log.ask(model.params, rows, loop=loop)
  nats = training.surprisals(
    model.config, model.params, rows, loop._replace(label="surprisals")
  )
  folder = pathlib.Path(_STORE.value, "procedural")
  folder.mkdir(exist_ok=True)
  print(f"{len(asked)} queries of {len({x.task for x in asked})} tasks")
  results = {}
  for method in dict.fromkeys(_METHODS.value):
    lens = lenses.lens(
      store, features, method, damping=_DAMPING.value, inverse=_INVERSE.value
    )
    names, scores = search.by_document(search.scores(lens), store.names)
    per_nat = scores / nats
    print(f"\n{display(method)}, per nat of the completion")
    results[method] = analysed(run, asked, names, per_nat)
    matrix = procedural.correlations(per_nat)
    order = np.argsort([x.task for x in asked], kind="stable")
    figures.correlations(
      folder / f"correlations_{method}.png",
      matrix[np.ix_(order, order)],
      [asked[i].task for i in order],
    )
  path = folder / "results.json"
  path.write_text(json.dumps(results, indent=2) + "\n")
  print(f"\nfigures and results.json in {folder}")


def read(path: str) -> list[Query]:
  """The queries of a JSONL file."""
  queries = []
  for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
    if not line.strip():
      continue
    try:
      x = json.loads(line)
      answer = x.get("answer")
      queries.append(Query(x["task"], x["prompt"], x["completion"], answer))
    except (ValueError, KeyError, AttributeError) as error:
      raise ValueError(
        f"line {number} of {path} is no JSON object with a task, a prompt and a"
        f" completion: {error!r}"
      ) from error
  return queries


def own(run: Run) -> list[Query]:
  """Those of the store's config."""
  task = run.task
  if not any(said for _, said in task.pairs):
    raise ValueError(
      f"{_STORE.value} has no queries of its own: give --queries"
    )
  if task.held:
    names = [influence_kinds.of(name) for name in task.held]
  else:  # of facts the first words after the name
    names = [" ".join(prompt.split()[-2:]) for prompt, _ in task.pairs]
  answers = [None if task.held else said.strip(" .") for _, said in task.pairs]
  each = zip(names, task.pairs, answers, strict=True)
  return [Query(name, *pair, answer) for name, pair, answer in each if pair[1]]


def analysed(
  run: Run, asked: Sequence[Query], names: Sequence[str], scores: np.ndarray
) -> dict:
  """Prints what there is to say of scores [D, Q], and returns it."""
  tasks = [x.task for x in asked]
  count = max(2, round(_FIRST.value * len(scores)))
  between = procedural.between(procedural.correlations(scores), tasks)
  slopes = grouped(tasks, procedural.slope(scores, count))
  texts = dict(zip(run.task.names, run.task.texts, strict=True))
  right = procedural.holds([texts[x] for x in names], [x.answer for x in asked])
  answers = procedural.found(scores, right, count)
  header = ["task", *between]
  body = [
    [k, *(f"{x:.2f}" for x in row.values())] for k, row in between.items()
  ]
  print("correlation of queries, mean over pairs of different ones")
  print(tables.aligned(header, body, [False, *[True] * len(between)]))
  cells = ", ".join(f"{k} {x:.2f}" for k, x in slopes.items())
  print(f"slope of influence over rank, first {count} documents: {cells}")
  if answers["queries"]:
    print(
      f"of {answers['queries']:.0f} queries with an answer in the corpus"
      f" {answers['found']:.0%} have one of its documents among the first"
      f" {count}; by chance {answers['chance']:.0%}"
    )
  kinds = run.task.kinds
  if kinds is None:
    said = [influence_kinds.of(name) for name in names]
  else:
    known = dict(zip(run.task.names, kinds, strict=True))
    said = [str(known[name]) for name in names]
  many = {}
  if len({*said}) > 1:
    found = procedural.multipliers(scores, said, count)
    many = {kind: grouped(tasks, x) for kind, x in found.items()}
    body = [
      [task, *(f"{many[kind][task]:.2f}" for kind in many)]
      for task in dict.fromkeys(tasks)
    ]
    print(f"times as frequent among the first {count} as in the corpus")
    print(tables.aligned(["task", *many], body, [False, *[True] * len(many)]))
  return {
    "correlations": between,
    "slopes": slopes,
    "answers": answers,
    "multipliers": many,
  }


def grouped(tasks: Sequence[str], values: np.ndarray) -> dict[str, float]:
  """Mean of values [Q] by task, of those that are numbers."""
  of = collections.defaultdict(list)
  for task, x in zip(tasks, values, strict=True):
    of[task].append(float(x))
  return {
    task: float(np.nanmean(x)) if np.isfinite(x).any() else float("nan")
    for task, x in of.items()
  }


if __name__ == "__main__":
  app.run(main)
