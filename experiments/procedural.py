"""What do queries of one task draw on: the same documents, or the answer's own?

  python -m experiments.procedural --store=FOLDER --queries=queries.jsonl
  python -m experiments.procedural --store=FOLDER

Asks a store of `experiments.build_store` many queries of several tasks, a JSONL
file of "prompt", "completion", "task" and perhaps "answer"; or those of its
config, whose tasks are the kinds of the documents that were held out, or of
planted facts. Prints, for raw scores and for scores relative to each document's
own influence, correlations within and across tasks, the slope of influence over
rank, whether documents that hold the answer are among the first, and which
kinds of document are over-represented there (Ruis et al. 2024); and the same of
BM25, for what words alone would say.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments import influence_kinds, influence_task, reports, store_task
from experiments.store_task import Run
from tda import records, streams
from tda.evaluation import procedural
from tda.evaluation.workdir import Workdir
from tda.models import training
from tda.report import influence as figures
from tda.report import tables
from tda.report.names import display
from tda.store import lenses, search

_QUERIES = flags.DEFINE_string("queries", None, "A JSONL file; see above.")
_METHODS = flags.DEFINE_multi_enum(
  "method", ["logra", "relatif"], lenses.METHODS, "Of tda.store.lenses."
)
_FIRST = flags.DEFINE_float("first", 0.05, "Share of documents that are first.")
flags.adopt_module_key_flags(store_task)
flags.mark_flag_as_required("store")


class Query(NamedTuple):
  """What is asked."""

  task: str
  prompt: str
  completion: str
  answer: str | None


def main(_) -> None:
  run = store_task.reopened()
  queries = read(_QUERIES.value) if _QUERIES.value else own(run)
  pairs = [(x.prompt, x.completion) for x in queries]
  asked = store_task.asked(run, pairs)
  loop = streams.Loop(run.setting.batch_size, "surprisals")
  nats = training.surprisals(
    run.model.config, run.model.params, asked.queries, loop
  )
  how: dict[str, Any] = {
    "first": _FIRST.value,
    "damping": store_task.DAMPING.value,
    "inverse": store_task.INVERSE.value,
  }
  said = [*map(str, how.values()), *map(str, queries)]
  which = records.digest([asked.rows, *said])[:8]
  workdir = Workdir(run.workdir.path / "procedural" / which, how)
  tasks = [x.task for x in queries]
  workdir.say(f"{len(queries)} queries of {len({*tasks})} tasks")
  for method in dict.fromkeys(_METHODS.value):
    scores = search.scores(asked.seen(method))
    names, scores = search.by_document(scores, asked.store.names)
    workdir.say(f"\n{display(method)}, per nat of the completion")
    analysed(run, workdir, method, queries, names, scores / nats)
  workdir.say("\nBM25: what the words alone have in common")
  words = influence_task.lexical(run.task._replace(pairs=pairs))["bm25"]
  analysed(run, workdir, "bm25", queries, run.task.names, words)
  reports.write(workdir, __doc__)


def read(path: str) -> list[Query]:
  """The queries of a JSONL file."""
  return [
    Query(x["task"], x["prompt"], x["completion"], x.get("answer"))
    for x in store_task.read(path, ("task", "prompt", "completion"))
  ]


def own(run: Run) -> list[Query]:
  """Those of the store's config."""
  task = run.task
  if not any(said for _, said in task.pairs):
    raise store_task.no_queries()
  if task.held:
    names = [influence_kinds.of(name) for name in task.held]
  else:  # of facts the first words after the name
    names = [" ".join(prompt.split()[-2:]) for prompt, _ in task.pairs]
  answers = [None if task.held else said.strip(" .") for _, said in task.pairs]
  each = zip(names, task.pairs, answers, strict=True)
  return [Query(name, *pair, answer) for name, pair, answer in each if pair[1]]


def analysed(
  run: Run,
  workdir: Workdir,
  method: str,
  queries: Sequence[Query],
  names: Sequence[str],
  scores: np.ndarray,
) -> None:
  """Says, records and draws what there is to say of scores [D, Q]."""
  tasks = [x.task for x in queries]
  count = max(2, round(_FIRST.value * len(scores)))
  matrix = procedural.correlations(scores)
  between = procedural.between(matrix, tasks)
  workdir.say(
    "correlation of queries, mean over pairs of different ones\n"
    + table({k: list(row.values()) for k, row in between.items()}, between)
  )
  order = np.argsort(tasks, kind="stable")
  figures.correlations(
    workdir.path / f"correlations_{method}.png",
    matrix[np.ix_(order, order)],
    [tasks[i] for i in order],
  )
  slopes = grouped(tasks, procedural.slope(scores, count))
  cells = ", ".join(f"{k} {x:.2f}" for k, x in slopes.items())
  workdir.say(
    f"\nslope of influence over rank, first {count} documents: {cells}"
  )
  texts = dict(zip(run.task.names, run.task.texts, strict=True))
  right = procedural.holds(
    [texts[x] for x in names], [x.answer for x in queries]
  )
  answers = procedural.found(scores, right, count)
  if answers["queries"]:
    workdir.say(
      f"of {answers['queries']:.0f} queries with an answer in the corpus"
      f" {answers['found']:.0%} have one of its documents among the first"
      f" {count}; by chance {answers['chance']:.0%}"
    )
  found = procedural.multipliers(scores, kinds(run, names), count)
  many = {kind: grouped(tasks, x) for kind, x in found.items()}
  if len(many) > 1:
    rows = {task: [x[task] for x in many.values()] for task in between}
    workdir.say(
      f"\ntimes as frequent among the first {count} as in the corpus\n"
      + table(rows, many)
    )
  results = {"correlations": between, "slopes": slopes, "answers": answers}
  workdir.record(method, results | {"multipliers": many})


def kinds(run: Run, names: Sequence[str]) -> list[str]:
  """Those of planted documents, or their folders."""
  if run.task.kinds is None:
    return [influence_kinds.of(name) for name in names]
  known = dict(zip(run.task.names, run.task.kinds, strict=True))
  return [str(known[name]) for name in names]


def table(rows: Mapping[str, Sequence[float]], columns: Iterable[str]) -> str:
  header = ["task", *columns]
  body = [[task, *(f"{x:.2f}" for x in cells)] for task, cells in rows.items()]
  return tables.aligned(header, body, [False, *[True] * (len(header) - 1)])


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
