"""An experiment's scores from stores of projected gradients.

Of one model or, with `along`, of a run's checkpoints. A method of one model is
written "logra KIND K": its directions are "random", "sparse" or
"principal", K of them for each side of a block.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from tda import blocks, projections, streams
from tda.attribution import less, logra
from tda.attribution.logra import Logger
from tda.blocks import Trace
from tda.curvature import fitting
from tda.evaluation.problem import Problem
from tda.evaluation.workdir import Arrays, Workdir
from tda.likelihoods import PyTree
from tda.projections import Sides
from tda.runs import Checkpoint
from tda.store import lenses, search
from tda.store.search import Lens
from tda.streams import Loop

ALONG: Mapping[str, tuple[str, str]] = MappingProxyType(
  {
    "less": ("updates", "cosine"),
    "gradient_cosine": ("gradients", "cosine"),
    "gradient_dot": ("gradients", "dot"),
  }
)
"""What `along` stores of a checkpoint for a method, and how it is compared."""


def named(methods: Sequence[str]) -> list[str]:
  """Those methods that are from stores.

  Raises:
    ValueError: one that is not written as above.
  """
  found = [name for name in methods if name.split()[0] == "logra"]
  for name in found:
    _, *rest = name.split()
    if (
      len(rest) != 2
      or rest[0] not in projections.KINDS
      or not rest[1].isdecimal()
    ):
      raise ValueError(
        f"unknown method {name!r}: write 'logra KIND K' with a kind of"
        f" {list(projections.KINDS)} and a number, as 'logra random 16'"
      )
  return found


def attributed(
  problem: Problem, params: PyTree, member: int, workdir: Workdir
) -> Arrays:
  """Scores [N, Q] of one model, by "METHOD@DAMPING" for relative dampings."""
  setting, results = problem.setting, {}
  dampings = [setting.damping, *setting.sweep_dampings]
  parsed = {text: problem.damping(text) for text in dict.fromkeys(dampings)}
  train, queries = problem.dataset.train, dict(problem.queries)
  for name in named(setting.methods):
    log = logra.logger(
      problem.objective,
      params,
      train,
      sides=_sides(problem, params, *name.split()[1:]),
    )
    folder = workdir.folder(f"stores_{member}/{name.replace(' ', '_')}")
    loop = streams.Loop(setting.fit_batch_size, label=name)
    store = log.build(folder, params, train, dtype="float32", loop=loop)
    asked = log.ask(params, queries, measurement=problem.measurement, loop=loop)
    for text, damping in parsed.items():
      if damping.kind == "relative":
        lens = lenses.lens(store, asked, damping=damping.value)
        results[f"{name}@{text}"] = search.scores(lens).astype(np.float32)
  return results


def along(
  folder: str | Path,
  log: Logger,
  found: Trace,
  points: Sequence[Checkpoint],
  train: PyTree,
  queries: PyTree,
  means: np.ndarray,
  *,
  rates: Sequence[float],
  loop: Loop = Loop(),
) -> Arrays:
  """Scores [N, S] by the methods of `ALONG`, of a run with Adam's defaults.

  Args:
    folder: of a store of Adam's updates and one of gradients at every
      checkpoint, which are not built again.
    log: whose directions all of them have.
    found: trace of its objective.
    points: checkpoints, as of `runs.checkpoints`.
    train: pytree of arrays with leading axis N.
    queries: the same with Q.
    means: [S, Q], of which queries a subtask is the mean; see `less`.
    rates: η_k, one for each checkpoint.
    loop: how to run over the data.
  """
  seen: dict[str, list[Lens]] = {name: [] for name in ALONG}
  for i, (point, rate) in enumerate(zip(points, rates, strict=True), 1):
    stage = loop.stage(f"checkpoint {i}")
    asked = log.ask(point.params, queries, loop=stage)
    asked_SxF = (means @ asked).astype(np.float32)
    kept = {"updates": less.updates(found, point), "gradients": None}
    stores = {
      name: log.build(
        Path(folder) / f"{name}_{i}",
        point.params,
        train,
        dtype="float32",
        updates=updates,
        loop=stage.stage(name),
      )
      for name, updates in kept.items()
    }
    for name, (features, method) in ALONG.items():
      lens = lenses.lens(stores[features], asked_SxF, method)
      seen[name].append(lens._replace(directions=rate * lens.directions))
  return {name: search.scores(x) for name, x in seen.items()}


def _sides(
  problem: Problem, params: PyTree, kind: str, dimension: str
) -> dict[str, Sides]:
  objective, train = problem.objective, problem.dataset.train
  found = blocks.trace(objective.outputs, params, streams.example(train))

  def basis():
    fit = fitting.fitter(found, objective, methods=["kfac"])
    loop = streams.Loop(problem.setting.fit_batch_size)
    return fit(params, train, loop=loop)["kfac"].basis

  key = problem.key_for("projections")
  return projections.of_kind(kind, found, key, int(dimension), basis)
