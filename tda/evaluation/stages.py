"""The stages that the experiments share: train, attribute, retrain.

Each is computed once for a working folder and read from it afterwards.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda import checkpoints, streams
from tda.attribution import inverses, methods, trak
from tda.curvature import labels as labels_lib
from tda.data import packing, retrieval
from tda.evaluation import along, retraining, stored
from tda.evaluation.problem import Problem
from tda.evaluation.settings import Setting
from tda.evaluation.workdir import Workdir
from tda.inverse import solvers
from tda.inverse.iterative import Status

PyTree = Any
Round = tuple[str, tuple[str, ...], tuple[str, ...]]
OWN_LABELS = dict.fromkeys(inverses.EXACT, "exact GGN")
OWN_LABELS["datainf"] = "empirical"
"""What some methods invert, whatever the labels of the others."""


def trained(problem: Problem, workdir: Workdir, member: int = 0) -> PyTree:
  """The parameters of a model that is attributed, trained on all the data."""
  ones, key = problem.weights()[0], problem.run_key(member)
  folder = workdir.folder(f"params_{member}" if member else "params")
  if checkpoints.exists(folder):
    like = jax.eval_shape(problem.train, ones, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
    return checkpoints.load(folder, zeros)
  with workdir.timed("train"):
    params = jax.block_until_ready(jax.jit(problem.train)(ones, key))
    checkpoints.save(folder, params)
  return params


class Attribution(NamedTuple):
  """One row of the table."""

  scores: np.ndarray  # [N, Q]
  labels: str  # of the curvature; empty for methods without one
  damping: str  # as the setting has it; empty for methods without one
  note: str = ""  # what a solver could not do
  models: int = 1  # whose scores it is the mean of


def attributed(problem: Problem, workdir: Workdir) -> dict[str, Attribution]:
  """Scores of every method, by name.

  Those of the sweep are called "METHOD@DAMPING" and "METHOD@DAMPING, LABELS",
  those of an ensemble of M models "... of M".
  """
  count = problem.setting.ensemble
  members = [trained(problem, workdir, i) for i in range(count)]
  each = [
    _attributed(problem, params, i, workdir) for i, params in enumerate(members)
  ]
  rows = dict(each[0])
  for name, row in each[0].items() if count > 1 else ():
    scores = np.mean([found[name].scores for found in each], axis=0)
    mean = row._replace(scores=scores, note="", models=count)
    rows[f"{name} of {count}"] = mean
  if "trak" in problem.setting.methods:
    for some in {1, count}:
      compute = functools.partial(_trak, problem, members[:some])
      values = workdir.stage(f"trak_{some}", compute)
      name = f"trak of {some}" if some > 1 else "trak"
      rows[name] = Attribution(values["trak"], "", "", models=some)
  if "bm25" in problem.setting.methods:
    rows["bm25"] = Attribution(_bm25(problem), "", "")
  return rows


def _bm25(problem: Problem) -> np.ndarray:
  documents = packing.tokens(problem.dataset.train)
  return retrieval.bm25(documents, packing.tokens(dict(problem.queries)))


def _trak(problem: Problem, members: list[PyTree]) -> dict[str, np.ndarray]:
  scores = trak.attribute(
    problem.objective,
    members,
    problem.dataset.train,
    dict(problem.queries),
    key=problem.key_for("projections"),
    dimension=problem.setting.trak_dimension,
    measurement=problem.measurement,
    loop=streams.Loop(problem.setting.fit_batch_size, label="trak"),
  )
  return {"trak": scores.values}


def _attributed(
  problem: Problem, params: PyTree, member: int, workdir: Workdir
) -> dict[str, Attribution]:
  """Of one model."""
  suffix = f"_{member}" if member else ""
  setting = problem.setting
  rows: dict[str, Attribution] = {}
  for i, (labels, dampings, chosen) in enumerate(_rounds(setting)):
    named = {str(problem.damping(text)): text for text in dampings}

    def compute(labels=labels, dampings=dampings, chosen=chosen):
      found = methods.attribute(
        problem.objective,
        params,
        problem.dataset.train,
        dict(problem.queries),
        methods=chosen,
        labels=labels,
        dampings=[problem.damping(text) for text in dampings],
        key=problem.key_for(f"labels {labels}"),
        measurement=problem.measurement,
        query_batch=setting.query_batch,
        budget=solvers.Budget(limit=setting.solver_iterations),
        loop=streams.Loop(setting.fit_batch_size, label=f"{labels} labels"),
      )
      ended = {
        f"{name} status": np.asarray(scores.info.status)
        for name, scores in found.items()
        if scores.info is not None
      }
      return {name: scores.values for name, scores in found.items()} | ended

    main = i == 0
    solved = set(chosen) <= set(OWN_LABELS)
    stage = "scores" if main else f"scores_{labels.replace(':', '_')}"
    stage += "_solved" if solved and not main else ""
    computed = workdir.stage(stage + suffix, compute)
    for entry, values in computed.items():
      method, _, damping = entry.partition("@")
      if entry.endswith(" status"):
        continue
      if method not in inverses.NAMES:
        rows[method] = Attribution(values, "", "")
        continue
      damping = named[damping] if damping else dampings[0]
      said = OWN_LABELS.get(method, labels)
      own = method in OWN_LABELS or labels == setting.labels
      name = method if main else f"{method}@{damping}"
      name += "" if main or own else f", {labels}"
      note = _unsolved(computed.get(f"{entry} status"))
      rows[name] = Attribution(values, said, damping, note)
  if any(name in along.METHODS for name in setting.methods):
    computed = workdir.stage(
      "along" + suffix,
      lambda: along.attributed(problem, params, member, workdir),
    )
    rows |= {
      name: Attribution(values, along.LABELS.get(name, ""), "")
      for name, values in computed.items()
    }
  return rows | _stored(problem, params, member, workdir)


def _stored(
  problem: Problem, params: PyTree, member: int, workdir: Workdir
) -> dict[str, Attribution]:
  """Of one model, by the methods that keep projected gradients."""
  if not stored.named(problem.setting.methods):
    return {}
  suffix = f"_{member}" if member else ""
  computed = workdir.stage(
    f"stored{suffix}",
    lambda: stored.attributed(problem, params, member, workdir),
  )
  rows = {}
  for entry, values in computed.items():
    method, _, damping = entry.partition("@")
    main = damping == problem.setting.damping
    row = Attribution(values, "empirical", damping)
    rows[method if main else entry] = row
  return rows


def _unsolved(status: np.ndarray | None) -> str:
  """How many queries a solver left unsolved, and why."""
  if status is None:
    return ""
  counts = {
    one.name.lower(): int(np.sum(status == one))
    for one in Status
    if one != Status.CONVERGED
  }
  parts = [f"{count} {name}" for name, count in counts.items() if count]
  return f"{', '.join(parts)} of {len(status)}" if parts else ""


def retrained(problem: Problem, workdir: Workdir) -> dict[str, np.ndarray]:
  """The bank on random subsets: "weights" [M, N], "value" [M, R, Q], ..."""
  setting = problem.setting
  n = streams.rows(problem.dataset.train)
  weights = retraining.subsets(
    problem.key_for("subsets"), n, setting.subsets, setting.subset_fraction
  )

  def compute():
    keys = jax.random.split(problem.key_for("bank"), setting.retrain_seeds)
    if setting.same_seed:
      keys = problem.run_key()[None]
    kept = int((weights[0] != 0).sum())
    measured = retraining.bank(
      problem.train if setting.masked else problem.trained_on(kept),
      problem.measure,
      weights,
      keys,
      directory=workdir.folder("bank_parts"),
      label="retrain",
    )
    return {"weights": np.asarray(weights), **measured}

  return workdir.stage("bank", compute)


def _rounds(setting: Setting) -> list[Round]:
  """(labels, dampings, methods): the main round, then the sweep's."""
  others = {"trak", "bm25", *along.METHODS, *stored.named(setting.methods)}
  ends = tuple(m for m in setting.methods if m not in others)
  rounds: list[Round] = []
  if ends:
    rounds.append((setting.labels, (setting.damping,), ends))
  of = lambda names: tuple(m for m in setting.methods if m in names)
  fitted, solved = of(inverses.FITTED), of(OWN_LABELS)
  dampings = tuple(setting.sweep_dampings) or (setting.damping,)
  further = tuple(d for d in setting.sweep_dampings if d != setting.damping)
  for labels in setting.sweep_labels if fitted else ():
    same = labels_lib.parse(labels) == labels_lib.parse(setting.labels)
    if chosen := further if same else dampings:
      rounds.append((labels, chosen, fitted))
  if solved and further:
    rounds.append((setting.labels, further, solved))
  return rounds
