"""What `build_store` and `query` share: a corpus, its model and its logger."""

import json
import pathlib
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from experiments import influence_task, language
from experiments.influence_task import Task
from experiments.language import Corpus, Model
from tda import blocks, projections, streams
from tda.attribution import logra
from tda.attribution.logra import Logger
from tda.blocks import Trace
from tda.curvature import fitting
from tda.evaluation.workdir import Workdir
from tda.models import decoder
from tda.store import disk

PROJECTIONS = ("random", "sparse", "principal")
STORE = "store"


class Run(NamedTuple):
  """A corpus whose gradients are stored."""

  setting: ConfigDict
  task: Task  # its documents, and the queries that the setting has
  corpus: Corpus
  workdir: Workdir
  model: Model

  @property
  def traced(self) -> Trace:
    """The blocks whose gradients are stored."""
    return blocks.trace(
      decoder.objective(self.model.config).outputs,
      self.model.params,
      streams.example(self.corpus.rows),
      select=decoder.SITES[self.setting.sites],
    )

  @property
  def store(self) -> str:
    """The folder of its gradients."""
    return self.workdir.folder(STORE)


def opened(setting: ConfigDict, path: str) -> Run:
  """The run of a setting; its model is trained if it has to be."""
  if setting.projection not in PROJECTIONS:
    raise ValueError(
      f"projection={setting.projection!r}: choose of {list(PROJECTIONS)}"
    )
  asks = bool(setting.prompts or setting.ask or setting.documents == "planted")
  task = influence_task.asked(setting, queries=asks)
  corpus = language.corpus(setting, task.texts)
  workdir = language.workdir(path, setting, corpus, ())
  return Run(
    setting, task, corpus, workdir, language.ready(setting, workdir, corpus)
  )


def reopened(path: str) -> Run:
  """That of a folder that `build_store` made."""
  record = pathlib.Path(path) / "config.json"
  if not record.exists():
    raise ValueError(
      f"{path} is no folder of experiments.build_store: give as --store what"
      " that had as --workdir"
    )
  fields = json.loads(record.read_text())
  known = {k: v for k, v in fields.items() if k not in ("data", "weights")}
  return opened(ConfigDict(known), path)


def logger(run: Run, loop: streams.Loop) -> Logger:
  """What turns documents and queries into rows of the store."""
  setting, rows, model = run.setting, run.corpus.rows, run.model
  objective = decoder.objective(model.config)
  select = decoder.SITES[setting.sites]
  key = jax.random.key(setting.seed)
  sides = None
  if pathlib.Path(run.store, logra.PROJECTION).exists():
    sides = logra.directions(disk.opened(run.store))  # the same to the bit
  elif setting.projection != "random":
    found = run.traced
    if setting.projection == "sparse":
      sides = projections.sparse(found, key, setting.dimension)
    else:
      fit = fitting.fitter(found, objective, methods=["kfac"])
      kept = loop._replace(directory=run.workdir.folder("moments"))
      basis = fit(model.params, rows, loop=kept)["kfac"].basis
      sides = projections.principal(found, key, setting.dimension, basis)
  return logra.logger(
    objective,
    model.params,
    rows,
    key=key,
    dimension=setting.dimension,
    sides=sides,
    select=select,
    shares="segments",
  )
