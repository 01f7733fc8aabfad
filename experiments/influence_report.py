"""What `influence_lm` prints and draws of the scores."""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from experiments import influence_kinds
from experiments.influence_task import Task
from tda.data import retrieval
from tda.evaluation import ranking, tails
from tda.evaluation.workdir import Workdir
from tda.report import influence as figures
from tda.report import style, tables
from tda.report.names import display

SHOWN = 100  # characters of a document, or of either side of a query
LABEL = 30  # of a prompt in a table


def show(
  setting: ConfigDict,
  workdir: Workdir,
  task: Task,
  scores: Mapping[str, np.ndarray],
  found: Mapping[str, np.ndarray],
) -> None:
  """Prints, records and draws.

  Args:
    setting: of the run.
    workdir: where figures and numbers go.
    task: what was asked.
    scores: [D, Q] of every method, "ekfac" among them.
    found: "surprisal" [Q], "layers" [L, Q] and "orders" [orders + 1, Q].
  """
  workdir.say(
    f"\nnats of the completions: mean {found['surprisal'].mean():.3f}"
  )
  workdir.record("surprisal", float(found["surprisal"].mean()))
  _best(setting, task, scores["ekfac"])
  names = task.held or [prompt for prompt, _ in task.pairs]
  labels = [*names][: max(1, setting.shown)]
  workdir.say(f"\n{_concentration(workdir, scores['ekfac'], labels)}")
  workdir.say(f"\n{_layers(workdir, found['layers'], labels)}")
  workdir.say(f"\n{_prefilter(setting, workdir, scores)}")
  if task.kinds is not None:
    workdir.say(f"\n{_retrieved(workdir, task, scores)}")
    workdir.say(f"\n{_ordered(workdir, task, found['orders'])}")
  elif len({*map(influence_kinds.of, task.names)}) > 1:
    workdir.say(f"\n{_by_kind(workdir, task, scores)}")
  print(f"\nfigures and metrics.json in {workdir.path}")


def _best(setting: ConfigDict, task: Task, scores: np.ndarray) -> None:
  best = retrieval.candidates(scores, min(setting.top, len(scores)))
  for q, (prompt, completion) in enumerate(task.pairs[: setting.shown]):
    source = f"{task.held[q]}: " if task.held else ""
    shown = f"{prompt[-SHOWN:]!r} -> {completion[:SHOWN]!r}"
    print(f"\n{source}{shown}")
    for place in best[:, q]:
      kind = ""
      if task.kinds is not None and task.fact is not None:
        kind = "" if task.fact[place] == q else ", another"
      shown = " ".join(task.texts[place][:SHOWN].split())
      print(f"  {scores[place, q]:+10.4g}  {task.names[place]}{kind}: {shown}")


def _concentration(
  workdir: Workdir, scores: np.ndarray, labels: list[str]
) -> str:
  """Share of the first hundredth, and the exponent of the tail."""
  first = max(1, len(scores) // 100)
  portion, size = first / len(scores), max(10, first)
  some = [x for x in scores.T if (x > 0).any()]
  if not some:
    return "no document has a positive influence on any query"
  share = float(np.mean([tails.sparsity(x, portion) for x in some]))
  fits = [
    tails.pareto(x, count=size) if len(np.unique(x[x > 0])) >= size else None
    for x in scores.T
  ]
  exponents = [fit.exponent for fit in fits if fit is not None]
  labels = labels[: len(style.COLOURS)]
  drawn = slice(len(labels))
  path = workdir.path / "tails.png"
  figures.tail(path, scores[:, drawn], fits[drawn], labels)
  workdir.record("top_percent_share", share)
  line = f"the first {portion:.1%} of documents carry {share:.0%} of positive"
  line += " influence"
  if exponents:
    middle = float(np.median(exponents))
    workdir.record("tail_exponent", middle)
    line += f"; exponent of the tail {middle:.2f} (median)"
  return line


def _layers(workdir: Workdir, layers: np.ndarray, labels: list[str]) -> str:
  if not layers.size:
    return "no layers are stacked, so that there are no shares of them"
  each = layers / layers.sum(axis=0)
  figures.layers(workdir.path / "layers.png", each[:, : len(labels)], labels)
  shares = each.mean(axis=1)
  workdir.record("layer_shares", [float(x) for x in shares])
  cells = " ".join(f"{x:.2f}" for x in shares)
  return f"share of influence by layer, first to last: {cells}"


def _prefilter(
  setting: ConfigDict, workdir: Workdir, scores: Mapping[str, np.ndarray]
) -> str:
  """How much of the full scan a lexical first stage would have kept."""
  among = min(setting.prefilter, len(scores["ekfac"]))
  k = min(10, len(scores["ekfac"]))
  kept = {
    name: float(
      retrieval.recall(scores[name], scores["ekfac"], k, among).mean()
    )
    for name in ("bm25", "tfidf")
  }
  workdir.record("prefilter_recall", kept)
  cells = ", ".join(f"{display(k)} {x:.2f}" for k, x in kept.items())
  return (
    f"of EK-FAC's first {k} documents the first {among} by words hold {cells}"
  )


def _by_kind(
  workdir: Workdir, task: Task, scores: Mapping[str, np.ndarray]
) -> str:
  kinds = [influence_kinds.of(name) for name in task.names]
  sizes = [len(said) for said in task.texts]
  asked = [influence_kinds.of(name) for name in task.held]
  labels = asked or [prompt[-LABEL:] for prompt, _ in task.pairs]
  ekfac = scores["ekfac"]
  shown = influence_kinds.table(workdir, kinds, sizes, labels, ekfac)
  if asked:
    shown += f"\n\n{influence_kinds.own(workdir, kinds, asked, scores)}"
  return shown


def _retrieved(
  workdir: Workdir, task: Task, scores: Mapping[str, np.ndarray]
) -> str:
  """Recall and reciprocal rank by method, and mean scores by kind."""
  assert task.kinds is not None
  mine, copies = task.of_fact(), task.copies()
  body, results = [], {}
  for name, x in scores.items():
    found = ranking.means(x, copies)
    whole = x[copies].mean()
    for kind in dict.fromkeys(task.kinds[task.kinds != "copy"]):
      of_kind = mine & (task.kinds == kind)[:, None]
      found[str(kind)] = float(x[of_kind].mean() / whole)
    found["others"] = float(x[~mine].mean() / whole)
    results[name] = found
    body.append([display(name), *(f"{value:z.3f}" for value in found.values())])
  workdir.record("retrieval", results)
  body.sort(key=lambda row: -float(row[2]))
  header = ["method", *next(iter(results.values()))]
  table = tables.aligned(header, body, [False, *[True] * (len(header) - 1)])
  return (
    "Copies of the fact among all documents; then the mean score of other kinds"
    f" of documents on it, relative to copies\n{table}"
  )


def _ordered(workdir: Workdir, task: Task, orders: np.ndarray) -> str:
  """Influence of each order of a fact's words, and of another fact.

  Medians over the queries, since the means are those of the few largest.
  """
  names = [*task.orders, "another fact"]
  pairs = zip(names, np.median(orders, axis=1), strict=True)
  found = {name: float(x) for name, x in pairs}
  workdir.record("orders", found)
  cells = ", ".join(f"{k} {x:.3g}" for k, x in found.items())
  return f"median influence of a text by the order of its words: {cells}"
