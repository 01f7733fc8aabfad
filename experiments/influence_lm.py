"""Which documents made a language model say this?

  python -m experiments.influence_lm --config=configs/planted_lm.py
  python -m experiments.influence_lm --workdir=FOLDER_OF_RESULTS \
    --config.documents=FOLDER --config.pattern="*.txt" \
    --config.model=workdir/train_lm/stdlib_lm/model \
    --config.prompts="('def main(',)" --config.completions="('argv):',)"
  python -m experiments.influence_lm --config=configs/maths_lm.py \
    --config.model=SmolLM2-135M-Instruct.Q4_1.gguf \
    --config.documents=gsm8k_train.jsonl
  python -m experiments.influence_lm --config=configs/mixed_lm.py \
    --config.documents=corpora --config.tokenizer=corpora

Without completions it is asked what made the model answer the prompts as it
does, and without prompts it is asked for the second halves of --config.ask
documents of each folder, which are held out. Scores every document of a corpus
for every prompt and completion by EK-FAC influence, products and cosines of
gradients, and words in common; shows the first documents of each query, the
shares of the layers and of the folders, and how heavy the tail is. Of planted
facts it is known which documents teach them: then it says how often they are
found. A finished stage is read from --workdir, and one that was stopped goes
on.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from experiments import (
  influence_page,
  influence_report,
  influence_task,
  language,
  reports,
)
from experiments.influence_page import Fitted
from experiments.influence_task import Task
from experiments.language import Model
from tda import coverage, records, streams
from tda.attribution import influence
from tda.attribution import language as attribution
from tda.attribution.responses import Cosine, Identity
from tda.blocks import Trace
from tda.curvature import fitting
from tda.data.packing import Rows
from tda.evaluation.workdir import Workdir
from tda.inverse import spectral
from tda.models import decoder, training
from tda.report import convergence, run

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/planted_lm.py", "Config file; its fields are flags too."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/influence_lm/CONFIG unless given."
)
METHODS = ("ekfac", "gradient_dot", "gradient_cosine")
# Of these a fit does not depend.
ASKED = {"name", "prompts", "completions", "answer_tokens", "damping", "rank"}
ASKED |= {"ask", "query_batch", "top", "shown", "prefilter"}


def main(_) -> None:
  setting = _CONFIG.value
  path = language.begun("influence_lm", setting, _WORKDIR.value)
  task = influence_task.asked(setting)
  corpus = language.corpus(setting, task.texts)
  tokenizer, rows = corpus.tokenizer, corpus.rows
  asks_itself = not any(completion for _, completion in task.pairs)
  if asks_itself:  # wrong prompts are told before anything is trained
    influence_task.check_prompts(setting, tokenizer, task)
  else:
    queries = attribution.completions(task.pairs, tokenizer, setting.length)
    words = influence_task.lexical(task)
  # What a query asks for may change; what was fitted for others is kept.
  workdir = language.workdir(path, setting, corpus, ASKED)
  model = language.ready(setting, workdir, corpus)
  if asks_itself:
    task, queries = influence_task.answered(setting, workdir, model, task)
    words = influence_task.lexical(task)
  traced = language.traced(setting, model, rows)
  fit = functools.cache(lambda: fitted(setting, workdir, model, traced, rows))
  which = records.digest(queries)[:8]
  which += f"_{setting.damping}_{setting.rank}".replace(" ", "_")
  found = workdir.stage(
    f"scores_{which}",
    lambda: scored(setting, workdir, fit(), task, (rows, queries), which),
  )
  scores = {k: found[k] for k in METHODS if k in found} | words
  influence_report.show(setting, workdir, task, scores, found)
  asked = influence_page.asked(setting, task, scores["ekfac"], found["layers"])
  tokens = workdir.stage(
    f"tokens_{which}_{setting.top}_{setting.shown}",
    lambda: influence_page.tokens(setting, fit(), asked, (rows, queries)),
  )
  shown = influence_page.section(asked, model.tokenizer, tokens)
  covered = run.covered(coverage.coverage(traced))
  reports.write(workdir, __doc__, shown, covered)


def fitted(
  setting: ConfigDict, workdir: Workdir, model: Model, found: Trace, rows: Rows
) -> Fitted:
  """The inverse curvature, whose spectrum is drawn."""
  objective = decoder.objective(model.config)
  loop = streams.Loop(
    setting.batch_size,
    "EK-FAC",
    language.mesh(setting),
    directory=workdir.folder("fit"),
  )
  key = jax.random.key(setting.seed)
  fit = fitting.fitter(
    found, objective, methods=["ekfac"], labels=setting.labels
  )
  with workdir.timed("fit"):
    curvature = fit(model.params, rows, key=key, loop=loop)["ekfac"]
  convergence.spectra(workdir.path / "spectrum.png", curvature.eigenvalues)
  inverse = spectral.inverse(curvature, spectral.damping(setting.damping))
  return Fitted(model, objective, found, inverse)


def scored(
  setting: ConfigDict,
  workdir: Workdir,
  fit: Fitted,
  task: Task,
  packed: tuple[Rows, Rows],
  which: str,
) -> dict[str, np.ndarray]:
  """Scores [D, Q] of every method, of EK-FAC also by layer [L, Q].

  And of the words of each fact in several orders [orders + 1, Q].
  """
  rows, queries = packed
  model, params, inverse = fit.model, fit.model.params, fit.inverse
  loop = streams.Loop(setting.batch_size, "EK-FAC", language.mesh(setting))
  responses = {
    "ekfac": inverse,
    "gradient_dot": Identity(),
  }
  if not (attribution.cut(rows) or setting.rank):  # which have no cosine
    responses["gradient_cosine"] = Cosine(Identity())
  score = influence.scorer(
    fit.found,
    fit.objective,
    query_batch=setting.query_batch,
    rank=setting.rank or None,
    shares="segments",
    by_site=True,
  )
  kept = loop._replace(directory=workdir.folder(f"scan_{which}"))
  with workdir.timed(f"scan_{which}"):
    results = score(params, rows, queries, responses, loop=kept.stage("scan"))
  results = {k: attribution.by_document(x, rows) for k, x in results.items()}

  def of_texts(texts: list[str]) -> np.ndarray:
    probes = language.packed(setting, model.tokenizer, texts, "orders")
    only, stage = {"ekfac": inverse}, kept.stage("orders")
    found = score(params, probes, queries, only, loop=stage)["ekfac"]
    return attribution.by_document(found, probes).values

  loop = loop._replace(label="surprisals")
  return {
    **{k: x.values for k, x in results.items()},
    "orders": influence_task.own(task.orders, of_texts),
    "layers": _by_layer(results["ekfac"].by_site or {}),
    "surprisal": training.surprisals(model.config, params, queries, loop),
  }


def _by_layer(sites: Mapping[str, np.ndarray]) -> np.ndarray:
  """Sums of absolute influence of each layer of stacked blocks [L, Q]."""
  layered = [x for x in sites.values() if x.ndim == 3]
  if not layered:
    return np.zeros((0, 0))
  return np.abs(sum(layered)).sum(axis=0)


if __name__ == "__main__":
  app.run(main)
