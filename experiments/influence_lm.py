"""Which documents made a language model say this?

  python -m experiments.influence_lm --config=configs/planted_lm.py
  python -m experiments.influence_lm --workdir=FOLDER_OF_RESULTS \
    --config.documents=FOLDER --config.pattern="*.txt" \
    --config.model=workdir/train_lm/stdlib_lm/model \
    --config.prompts="('def main(',)" --config.completions="('argv):',)"
  python -m experiments.influence_lm --workdir=FOLDER_OF_RESULTS \
    --config.documents=gsm8k.jsonl --config.pattern=question,answer \
    --config.model=SmolLM2.gguf --config.tune=True --config.steps=30 \
    --config.prompts="('Tom has 3 apples ... How many are left?\\n',)"

Without completions it is asked what made the model answer the prompts as it
does. Scores every document of a corpus for every prompt and completion by
EK-FAC influence, products and cosines of gradients, and words in common; shows
the first documents of each query, the shares of the layers and how heavy the
tail is. Of planted facts it is known which documents teach them: then it says
how often they are found. A finished stage is read from --workdir, and one that
was stopped goes on.
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import language
from experiments.language import Model
from tda import blocks, records, streams
from tda.attribution import influence
from tda.attribution import language as attribution
from tda.attribution.responses import Cosine, Identity
from tda.curvature import fitting
from tda.data import retrieval, text
from tda.data.packing import Rows
from tda.evaluation import ranking, tails
from tda.evaluation.workdir import Workdir
from tda.inverse import spectral
from tda.models import decoder, generation, training
from tda.report import tables
from tda.report.names import display

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/planted_lm.py", "Config file; its fields are flags too."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/influence_lm/CONFIG unless given."
)
SHOWN = 100  # characters of a document
SITES = ("mlp", "linear")
METHODS = ("ekfac", "gradient_dot", "gradient_cosine")
ASKED = {"name", "prompts", "completions", "damping", "rank", "query_batch"}
ASKED |= {
  "top",
  "shown",
  "prefilter",
  "answer_tokens",
}  # of which a fit does not depend


class Task(NamedTuple):
  """A corpus, what is asked of it, and what is known to be right."""

  names: list[str]
  texts: list[str]
  pairs: list[tuple[str, str]]
  kinds: np.ndarray | None  # [D], of planted documents
  fact: np.ndarray | None  # [D]


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # checkpoints report every step
  setting = _CONFIG.value
  default = pathlib.Path("workdir/influence_lm", setting.name)
  path = _WORKDIR.value or str(default)
  devices = jax.device_count()
  print(f"{devices} {jax.default_backend()} device(s); results in {path}")
  task = asked(setting)
  model = language.load(setting) if setting.model else None
  tokenizer = model.tokenizer if model else language.tokenizer(setting)
  rows = language.packed(setting, tokenizer, task.texts, "documents")
  asks_itself = task.kinds is None and not setting.completions
  if not asks_itself:  # wrong ones are told before anything is trained
    queries = attribution.completions(task.pairs, tokenizer, setting.length)
  # What a query asks for may change; what was fitted for others is kept.
  workdir = Workdir(
    path,
    {k: v for k, v in setting.to_dict().items() if k not in ASKED}
    | {"data": records.digest(rows)}
    | {"weights": records.digest(model.params) if model else "trained here"},
  )
  if model is None or setting.tune:
    model = language.train(setting, workdir, tokenizer, rows, model)
  if asks_itself:
    task = answered(setting, workdir, model, task)
    queries = attribution.completions(task.pairs, tokenizer, setting.length)
  which = records.digest(queries)[:8]
  which += f"_{setting.damping}_{setting.rank}".replace(" ", "_")
  found = workdir.stage(
    f"scores_{which}",
    lambda: scored(setting, workdir, model, rows, queries, which),
  )
  scores = {k: found[k] for k in METHODS if k in found} | lexical(task)
  print(f"\nnats of the completions: mean {found['surprisal'].mean():.3f}")
  workdir.record("surprisal", float(found["surprisal"].mean()))
  _show(setting, task, scores["ekfac"])
  print(f"\n{_concentration(workdir, scores['ekfac'])}")
  print(f"\n{_layers(workdir, found['layers'])}")
  print(f"\n{_prefilter(setting, workdir, scores)}")
  if task.kinds is not None:
    print(f"\n{_retrieved(workdir, task, scores)}")


def asked(setting: ConfigDict) -> Task:
  """The documents and the queries of a setting."""
  if setting.sites not in SITES:
    raise ValueError(
      f"sites={setting.sites!r}: gradients of documents are those of {SITES}"
    )
  if setting.documents == "planted":
    if setting.facts < 2 or setting.copies < 1:
      raise ValueError(
        f"{setting.facts} facts with {setting.copies} copies: take 2 facts or"
        " more, and 1 copy or more, which are what is looked for"
      )
    corpus = language.planted(setting)
    pairs = list(zip(corpus.prompts, corpus.answers, strict=True))
    known = zip(corpus.kinds, corpus.fact, strict=True)
    names = [f"{kind} of fact {fact}" for kind, fact in known]
    return Task(names, corpus.documents, pairs, corpus.kinds, corpus.fact)
  prompts = setting.prompts
  completions = setting.completions or [""] * len(prompts)
  if len(prompts) != len(completions) or not prompts:
    raise ValueError(
      f"{len(prompts)} prompts and {len(completions)} completions: give"
      " --config.prompts and --config.completions, tuples of text of the same"
      " length, or prompts alone, for what the model answers"
    )
  texts = text.documents(setting.documents, setting.pattern)
  names = [*texts][: setting.limit or None]
  pairs = list(zip(prompts, completions, strict=True))
  return Task(names, [texts[name] for name in names], pairs, None, None)


def answered(
  setting: ConfigDict, workdir: Workdir, model: Model, task: Task
) -> Task:
  """With what the model itself says as completions."""
  by, prompts = model.tokenizer, [prompt for prompt, _ in task.pairs]
  tokens = [by.encode(prompt) for prompt in prompts]

  def compute():
    found = generation.greedy(
      model.config,
      model.params,
      tokens,
      setting.answer_tokens,
      end=by.end,
      label="answers",
    )
    padded = np.full((len(found), setting.answer_tokens), -1)
    for row, one in zip(padded, found, strict=True):
      row[: len(one)] = one
    return {"answers": padded}

  which = records.digest({"prompts": np.array(prompts)})[:8]
  which = f"answers_{which}_{setting.answer_tokens}"
  rows = workdir.stage(which, compute)["answers"]
  said = [by.decode(row[row >= 0].tolist()) for row in rows]
  silent = [
    prompt for prompt, one in zip(prompts, said, strict=True) if not one
  ]
  if silent:
    raise ValueError(
      f"the model ends after {silent[0]!r} without a word: ask otherwise, or"
      " give --config.completions"
    )
  workdir.record("answers", dict(zip(prompts, said, strict=True)))
  return task._replace(pairs=list(zip(prompts, said, strict=True)))


def scored(
  setting: ConfigDict,
  workdir: Workdir,
  model: Model,
  rows: Rows,
  queries: Rows,
  which: str,
) -> dict[str, np.ndarray]:
  """Scores [D, Q] of every method, of EK-FAC also by layer [L, Q]."""
  objective = decoder.objective(model.config)
  params = model.params
  found = blocks.trace(
    objective.outputs,
    params,
    streams.example(rows),
    select=decoder.SITES[setting.sites],
  )
  mesh = language.mesh(setting)
  loop = streams.Loop(setting.batch_size, "EK-FAC", mesh)
  kept = loop._replace(directory=workdir.folder("fit"))
  key = jax.random.key(setting.seed)
  fit = fitting.fitter(
    found, objective, methods=["ekfac"], labels=setting.labels
  )
  with workdir.timed("fit"):
    curvature = fit(params, rows, key=key, loop=kept)["ekfac"]
  inverse = spectral.inverse(curvature, spectral.damping(setting.damping))
  responses = {
    "ekfac": inverse,
    "gradient_dot": Identity(),
  }
  if not (attribution.cut(rows) or setting.rank):  # which have no cosine
    responses["gradient_cosine"] = Cosine(Identity())
  score = influence.scorer(
    found,
    objective,
    query_batch=setting.query_batch,
    rank=setting.rank or None,
    shares="segments",
    by_site=True,
  )
  kept = loop._replace(directory=workdir.folder(f"scan_{which}"))
  with workdir.timed("scan"):
    results = score(params, rows, queries, responses, loop=kept.stage("scan"))
  results = {k: attribution.by_document(x, rows) for k, x in results.items()}
  return {
    **{k: x.values for k, x in results.items()},
    "layers": _by_layer(results["ekfac"].by_site or {}),
    "surprisal": training.surprisals(model.config, params, queries, loop),
  }


def lexical(task: Task) -> dict[str, np.ndarray]:
  """Scores [D, Q] by the words that documents and queries share."""
  count = len(task.texts)
  words, _ = text.words([*task.texts, *map("".join, task.pairs)])
  of = {"bm25": retrieval.bm25, "tfidf": retrieval.tfidf}
  return {k: score(words[:count], words[count:]) for k, score in of.items()}


def _by_layer(sites: Mapping[str, np.ndarray]) -> np.ndarray:
  """Sums of absolute influence of each layer of stacked blocks [L, Q]."""
  layered = [x for x in sites.values() if x.ndim == 3]
  if not layered:
    return np.zeros((0, 0))
  return np.abs(sum(layered)).sum(axis=0)


def _show(setting: ConfigDict, task: Task, scores: np.ndarray) -> None:
  best = retrieval.candidates(scores, min(setting.top, len(scores)))
  for q, (prompt, completion) in enumerate(task.pairs[: setting.shown]):
    print(f"\n{prompt!r} -> {completion!r}")
    for place in best[:, q]:
      kind = ""
      if task.kinds is not None and task.fact is not None:
        kind = "" if task.fact[place] == q else ", another"
      shown = " ".join(task.texts[place][:SHOWN].split())
      print(f"  {scores[place, q]:+10.4g}  {task.names[place]}{kind}: {shown}")


def _concentration(workdir: Workdir, scores: np.ndarray) -> str:
  """Share of the first hundredth, and the exponent of the tail."""
  first = max(1, len(scores) // 100)
  portion, size = first / len(scores), max(10, first)
  some = [x for x in scores.T if (x > 0).any()]
  if not some:
    return "no document has a positive influence on any query"
  share = float(np.mean([tails.sparsity(x, portion) for x in some]))
  exponents = [
    tails.pareto(x, count=size).exponent
    for x in some
    if len(np.unique(x[x > 0])) >= size
  ]
  workdir.record("top_percent_share", share)
  line = f"the first {portion:.1%} of documents carry {share:.0%} of positive"
  line += " influence"
  if exponents:
    middle = float(np.median(exponents))
    workdir.record("tail_exponent", middle)
    line += f"; exponent of the tail {middle:.2f} (median)"
  return line


def _layers(workdir: Workdir, layers: np.ndarray) -> str:
  if not layers.size:
    return "no layers are stacked, so that there are no shares of them"
  shares = (layers / layers.sum(axis=0)).mean(axis=1)
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


def _retrieved(
  workdir: Workdir, task: Task, scores: Mapping[str, np.ndarray]
) -> str:
  """Recall and reciprocal rank by method, and mean scores by kind."""
  assert task.kinds is not None and task.fact is not None
  mine = task.fact[:, None] == np.arange(len(task.pairs))
  copies = mine & (task.kinds == "copy")[:, None]
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


if __name__ == "__main__":
  app.run(main)
