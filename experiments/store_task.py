"""What the binaries on a store share: corpus, model, what is asked of it."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from experiments import influence_task, language
from experiments.influence_task import Task
from experiments.language import Corpus, Model
from tda import projections, streams
from tda.attribution import language as attribution
from tda.attribution import logra
from tda.attribution.logra import Logger
from tda.curvature import fitting
from tda.data import packing
from tda.data.packing import Rows
from tda.evaluation.workdir import Workdir
from tda.models import decoder
from tda.store import disk, fisher, lenses
from tda.store.disk import Store
from tda.store.search import Lens

STORE = flags.DEFINE_string(
  "store", None, "What build_store had as --workdir, of which is asked."
)
DAMPING = flags.DEFINE_float("damping", 0.1, "Relative to mean eigenvalues.")
INVERSE = flags.DEFINE_enum(
  "inverse", "eigen", fisher.INVERSES, "Of the Fisher."
)


class Run(NamedTuple):
  """A corpus whose gradients are stored."""

  setting: ConfigDict
  task: Task  # its documents, and the queries that the setting has
  corpus: Corpus
  workdir: Workdir
  model: Model

  @property
  def store(self) -> str:
    """The folder of its gradients."""
    return self.workdir.folder("store")


class Asked(NamedTuple):
  """A store and the gradients of queries along its directions."""

  store: Store
  log: Logger
  queries: Rows
  rows: np.ndarray  # [Q, F]

  def seen(self, method: str, *, damaged: bool = False) -> Lens:
    """The queries' view of the store, by the flags' damping and inverse."""
    return lenses.lens(
      self.store,
      self.rows,
      method,
      damping=DAMPING.value,
      inverse=INVERSE.value,
      damaged=damaged,
    )


def opened(setting: ConfigDict, path: str) -> Run:
  """The run of a setting; its model is trained if it has to be."""
  if setting.projection not in projections.KINDS:
    raise ValueError(
      f"projection={setting.projection!r}: choose of {list(projections.KINDS)}"
    )
  asks = bool(setting.prompts or setting.ask or setting.documents == "planted")
  task = influence_task.asked(setting, queries=asks)
  corpus = language.corpus(setting, task.texts)
  workdir = language.workdir(path, setting, corpus, ())
  return Run(
    setting, task, corpus, workdir, language.ready(setting, workdir, corpus)
  )


def reopened() -> Run:
  """That of the folder that --store names."""
  logging.set_verbosity(logging.WARNING)  # checkpoints report every step
  path = STORE.value
  if path is None or not pathlib.Path(path, "config.json").exists():
    raise ValueError(
      f"{path} is no folder of experiments.build_store: give as --store what"
      " that had as --workdir"
    )
  fields = json.loads(pathlib.Path(path, "config.json").read_text())
  known = {k: v for k, v in fields.items() if k not in ("data", "weights")}
  return opened(ConfigDict(known), path)


def logger(run: Run, loop: streams.Loop) -> Logger:
  """What turns documents and queries into rows of the store."""
  setting, rows, model = run.setting, run.corpus.rows, run.model
  objective = decoder.objective(model.config)

  def basis():
    fit = fitting.fitter(found, objective, methods=["kfac"])
    kept = loop._replace(directory=run.workdir.folder("moments"))
    return fit(model.params, rows, loop=kept)["kfac"].basis

  if pathlib.Path(run.store, logra.PROJECTION).exists():
    sides = logra.directions(disk.opened(run.store))  # the same to the bit
  else:
    found = language.traced(setting, model, rows)
    key, count = jax.random.key(setting.seed), setting.dimension
    sides = projections.of_kind(setting.projection, found, key, count, basis)
  return logra.logger(
    objective,
    model.params,
    rows,
    sides=sides,
    select=decoder.SITES[setting.sites],
    shares="segments",
  )


def asked(run: Run, pairs: Sequence[tuple[str, str]]) -> Asked:
  """Prompts and completions as rows like those of the store."""
  store, model = disk.opened(run.store), run.model
  queries = packing.trimmed(
    attribution.completions(pairs, run.corpus.tokenizer, run.setting.length)
  )
  objective = decoder.objective(model.config)
  log = logra.reopened(store, objective, model.params, queries)
  loop = streams.Loop(run.setting.batch_size, "queries")
  return Asked(store, log, queries, log.ask(model.params, queries, loop=loop))


def read(path: str, names: Sequence[str]) -> list[Mapping[str, Any]]:
  """The lines of a JSONL file of queries, which have at least these fields."""
  found = []
  for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
    if not line.strip():
      continue
    try:
      fields = json.loads(line)
      missing = [name for name in names if name not in fields]
    except (ValueError, TypeError) as error:
      raise ValueError(
        f"line {number} of {path} is no JSON object: {error}"
      ) from error
    if missing:
      raise ValueError(
        f"line {number} of {path} lacks {missing}: a query has {list(names)}"
      )
    found.append(fields)
  return found


def no_queries() -> ValueError:
  """That a store's config has none."""
  return ValueError(
    f"{STORE.value} has no queries of its own: give --queries, or --prompt and"
    " --completion to experiments.query"
  )
