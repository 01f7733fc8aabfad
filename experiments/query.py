"""Which documents of a store made a language model say this?

  python -m experiments.query --store=workdir/build_store/store
  python -m experiments.query --store=FOLDER --prompt="def main(" \
    --completion="argv):" --method=relatif
  python -m experiments.query --store=FOLDER --queries=queries.jsonl

Queries are those of the store's config, a prompt and a completion, or many from
a JSONL file of them ("prompt" and "completion"). Prints the first and last
documents of each by an exact search of the whole store, or of what a lexical
first stage keeps, and writes them to a folder of STORE/queries, whose report
shows them token by token. Of planted facts it says how often they are found, by
every method, and with --tail_patch=K by how many nats one step of Adam on each
of the first K documents, at a tenth of the rate of training, makes the answer
likelier (Chang et al. 2024).
"""

import time
from collections.abc import Sequence

import numpy as np
import optax
from absl import app, flags

from experiments import (
  influence_page,
  influence_task,
  query_page,
  reports,
  store_task,
)
from experiments.store_task import Asked, Run
from tda import records, streams
from tda.data import retrieval
from tda.evaluation import ranking
from tda.evaluation.tail_patch import tail_patch
from tda.evaluation.workdir import Workdir
from tda.models import decoder
from tda.report import tables
from tda.report.names import display
from tda.store import lenses, search
from tda.store.disk import Store
from tda.store.search import Ends, Lens

_PROMPT = flags.DEFINE_string("prompt", None, "What is said before.")
_COMPLETION = flags.DEFINE_string("completion", None, "What is asked about.")
_QUERIES = flags.DEFINE_string("queries", None, "A JSONL file of both.")
_METHOD = flags.DEFINE_enum("method", "logra", lenses.METHODS, "See lenses.")
_K = flags.DEFINE_integer("k", 5, "Documents of each end of each query.")
_SHOWN = flags.DEFINE_integer("shown", 5, "Queries that are printed.")
_FIRST = flags.DEFINE_integer(
  "first_stage", 0, "Rank only the so many best by BM25; 0: all."
)
_PATCH = flags.DEFINE_integer(
  "tail_patch", 0, "Of planted facts: a step on each of the so many first."
)
_DAMAGED = flags.DEFINE_bool(
  "damaged", False, "Search the rest where shards cannot be read."
)
flags.adopt_module_key_flags(store_task)
flags.mark_flag_as_required("store")
SHOWN = 100  # characters of a document, or of either side of a query


def main(_) -> None:
  run = store_task.reopened()
  pairs = wanted(run)
  asked = store_task.asked(run, pairs)
  store = asked.store
  lens = asked.seen(_METHOD.value, damaged=_DAMAGED.value)
  among = candidates(run, store, pairs)
  started = time.monotonic()
  found = search.ends(
    lens, _K.value, among=among, damaged=_DAMAGED.value, label="search"
  )
  seconds = time.monotonic() - started
  how = {
    "method": _METHOD.value,
    "k": _K.value,
    "first_stage": _FIRST.value,
    "damping": store_task.DAMPING.value,
    "inverse": store_task.INVERSE.value,
  }
  which = records.digest([asked.rows, *map(str, how.values())])[:8]
  workdir = Workdir(run.workdir.path / "queries" / which, how)
  show(run, pairs, found)
  for said in found.lost:
    workdir.say(f"not searched: {said}")
  print(f"\n{store.rows} rows searched in {seconds:.2f} s")
  if among is not None and not found.lost:
    workdir.say(kept(lens, among))
  planted = run.task.kinds is not None and pairs == run.task.pairs
  if planted and not found.lost:
    workdir.say(f"\n{retrieved(run, workdir, asked)}")
  for key, value in written(pairs, found).items():
    workdir.record(key, value)
  shown = query_page.section(run, asked, lens, pairs[: _SHOWN.value], found)
  reports.write(workdir, __doc__, shown)


def wanted(run: Run) -> list[tuple[str, str]]:
  """Prompts and completions of the flags, or of the store's config."""
  prompt, completion = _PROMPT.value, _COMPLETION.value
  if (prompt is None) != (completion is None):
    raise ValueError("give --prompt and --completion, or neither")
  if prompt is not None and completion is not None:
    return [(prompt, completion)]
  if _QUERIES.value is not None:
    names = "prompt", "completion"
    lines = store_task.read(_QUERIES.value, names)
    return [(x["prompt"], x["completion"]) for x in lines]
  pairs = [pair for pair in run.task.pairs if pair[1]]
  if not pairs:
    raise store_task.no_queries()
  return pairs


def candidates(
  run: Run, store: Store, pairs: list[tuple[str, str]]
) -> np.ndarray | None:
  """Which rows are of documents with the queries' words, [N, Q]."""
  if not _FIRST.value:
    return None
  words = influence_task.lexical(run.task._replace(pairs=pairs))["bm25"]
  best = retrieval.candidates(words, _FIRST.value)
  documents = np.zeros(words.shape, bool)
  np.put_along_axis(documents, best, True, axis=0)
  places = {name: i for i, name in enumerate(run.task.names)}
  return documents[[places[name] for name in store.names]]


def kept(lens: Lens, among: np.ndarray) -> str:
  """How much of the whole search the first stage keeps."""
  scores, k = search.scores(lens), min(10, _K.value)
  first = retrieval.candidates(scores, k)
  share = np.take_along_axis(among, first, axis=0).mean()
  return f"of the first {k} rows the first stage holds {share:.2f}"


def show(run: Run, pairs: list[tuple[str, str]], found: Ends) -> None:
  texts = dict(zip(run.task.names, run.task.texts, strict=True))
  for q, (prompt, completion) in enumerate(pairs[: _SHOWN.value]):
    print(f"\n{prompt[-SHOWN:]!r} -> {completion[:SHOWN]!r}")
    for end, title in ((found.top, "for it"), (found.bottom, "against it")):
      print(f" {title}")
      for score, name in zip(end.scores[q], end.names[q], strict=True):
        if not name:  # what is left of a damaged store is less
          continue
        said = " ".join(texts.get(name, "")[:SHOWN].split())
        print(f"  {score:+10.4g}  {name}: {said}")


def retrieved(run: Run, workdir: Workdir, asked: Asked) -> str:
  """Recall and reciprocal rank of the copies of each planted fact."""
  task, all_scores, body = run.task, {}, []
  copies, names = task.copies(), asked.store.names
  places = {name: i for i, name in enumerate(dict.fromkeys(names))}
  order = [places[name] for name in task.names]
  for method in lenses.METHODS:
    if method == "trak" and asked.rows.shape[1] > 2**13:
      continue  # one matrix of all columns
    _, total = search.by_document(search.scores(asked.seen(method)), names)
    all_scores[method] = total[order]
  all_scores |= influence_task.lexical(task)
  results = {k: ranking.means(x, copies) for k, x in all_scores.items()}
  if _PATCH.value:
    falls = patched(run, asked, list(all_scores.values()))
    for found, fall in zip(results.values(), falls, strict=True):
      found["tail-patch"] = fall
  workdir.record("retrieval", results)
  for name, found in sorted(results.items(), key=lambda x: -x[1]["MRR"]):
    body.append([display(name), *(f"{x:.3f}" for x in found.values())])
  header = ["method", *next(iter(results.values()))]
  return tables.aligned(header, body, [False, *[True] * (len(header) - 1)])


def patched(
  run: Run, asked: Asked, scores: Sequence[np.ndarray]
) -> list[float]:
  """Mean fall of −log p by a step on each of the first documents, by scores."""
  by, length = run.corpus.tokenizer, run.setting.length
  documents, _ = influence_page.alone(run.task.texts, by, length)
  if len(documents["x"]) > len(run.task.texts):
    raise ValueError(
      f"a document is longer than a row of {length}: a step on one takes a row"
    )
  loss, params = decoder.objective(run.model.config).loss, run.model.params
  first = [retrieval.candidates(x, _PATCH.value).T for x in scores]
  found = np.concatenate(first, axis=1)
  step = optax.adam(run.setting.learning_rate / 10)
  loop = streams.Loop(64, "tail-patch")
  falls = tail_patch(
    loss, loss, params, documents, asked.queries, found, step, loop=loop
  )
  return [float(x.mean()) for x in np.split(falls, len(scores), axis=1)]


def written(pairs: list[tuple[str, str]], found: Ends) -> dict:
  def ranked(end, q):
    each = zip(end.scores[q], end.names[q], end.rows[q], strict=True)
    return [
      {"score": float(score), "document": name, "row": int(row)}
      for score, name, row in each
      if row >= 0
    ]

  return {
    "not searched": found.lost,
    "queries": [
      {
        "prompt": prompt,
        "completion": completion,
        "first": ranked(found.top, q),
        "last": ranked(found.bottom, q),
      }
      for q, (prompt, completion) in enumerate(pairs)
    ],
  }


if __name__ == "__main__":
  app.run(main)
