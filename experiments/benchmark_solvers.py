"""What preconditioning and solving many queries at once save.

    python -m experiments.benchmark_solvers [--config=configs/digits_mlp.py]

Conjugate gradients with the exact Gauss-Newton Hessian of a trained model, to a
residual of 1e-3:

  iterations   mean over queries, by preconditioner and damping (relative to the
               mean eigenvalue of each layer), of each query alone and of a
               block of all
  seconds      of all queries as a block, of all side by side in one program,
               and one after the other, in interleaved rounds of one process

On two CPU cores the command prints (of 32 queries to the digits MLP)

  preconditioner         damping 0.1  damping 1  damping 10  damping 100
  none            alone       >300.0      167.0        58.1         23.7
  none            block        106.8       27.4        13.0          9.0
  diagonal        alone       >300.0      217.1        52.6         15.4
  diagonal        block        150.5       36.2         9.3          4.5
  kfac            alone       >300.0     >268.4        77.5         21.9
  kfac            block        223.8       59.6        16.5          6.5
  ekfac           alone       >300.0     >267.4        79.5         22.5
  ekfac           block        220.2       56.1        16.4          6.2

  block 10.7 s, side by side 61.6 s, in turn 73.0 s; block / in turn 0.147

(the seconds partly beside other jobs). A block takes three to six times fewer
iterations. EK-FAC costs some below a damping of 100 rather than saving them.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments import launch, reports
from tda import blocks, gradients, streams
from tda.curvature import fitting, operators
from tda.evaluation import problem, stages
from tda.inverse import block_krylov, iterative, krylov, spectral
from tda.report import tables
from tda.streams import Batch

DAMPINGS = flags.DEFINE_multi_float(
  "dampings", [0.1, 1.0, 10.0, 100.0], "Relative to the mean eigenvalue."
)
LABELS = flags.DEFINE_string("labels", "exact", "Of the preconditioners.")
QUERIES = flags.DEFINE_integer("queries", 32, "Solved at once.")
LIMIT = flags.DEFINE_integer("limit", 300, "The most iterations.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed rounds.")
TIMED = flags.DEFINE_float("timed_damping", 1.0, "Where seconds are taken.")
MICROBATCH = flags.DEFINE_integer("microbatch", 128, "Examples at a time.")
PRECONDITIONERS = ("none", "diagonal", "kfac", "ekfac")
TOLERANCE = 1e-3
ALONE, BLOCK = "alone", "block"


class Case(NamedTuple):
  """What all solves share: (how, damping, preconditioner, b) -> Info."""

  solve: Callable[..., iterative.Info]
  fits: dict[str, Any]
  queries: blocks.Blocks

  def __call__(self, how: str, name: str, damping: float, b: Any = None) -> Any:
    delta = spectral.relative(damping)
    eigenvalues = self.fits["ekfac"].eigenvalues
    added = {k: delta.of(x) for k, x in eigenvalues.items()}
    first = self.fits[name] and spectral.inverse(self.fits[name], delta)
    return self.solve(how, added, first, self.queries if b is None else b)


def main(_) -> None:
  task = problem.build(launch.setting())
  workdir = launch.workdir("benchmark_solvers", task.setting)
  case = build(task, stages.trained(task, workdir))
  rows, size = [], _size(case.queries)
  cells = [(n, how) for n in PRECONDITIONERS for how in (ALONE, BLOCK)]
  for name, how in tqdm(cells, desc="solves"):
    found = [_iterations(case(how, name, d)) for d in DAMPINGS.value]
    rows.append([name, how, *found])
  header = ["preconditioner", "", *(f"damping {d:g}" for d in DAMPINGS.value)]
  workdir.say(
    f"Iterations to a residual of {TOLERANCE:g}, mean over queries (>: limit)"
  )
  workdir.say(tables.aligned(header, rows))
  block, side_by_side, in_turn = seconds(case)
  workdir.say(
    f"\nall {size} queries at damping {TIMED.value:g} without preconditioner, "
    f"seconds:\n  block         {block:.2f}\n  side by side  {side_by_side:.2f}"
    f"\n  in turn       {in_turn:.2f}\nblock / in turn {block / in_turn:.3f}"
  )
  reports.write(workdir, __doc__)


def build(task: problem.Problem, params: Any) -> Case:
  """The model's fitted curvatures and the queries' gradients."""
  data = jax.tree.map(jnp.asarray, task.dataset.train)
  found = blocks.trace(task.objective.outputs, params, streams.example(data))
  fit = fitting.fitter(found, task.objective, labels=LABELS.value)
  fits = {"none": None, **fit(params, data, key=task.key_for("labels"))}
  rows = jax.tree.map(lambda x: x[: QUERIES.value], dict(task.queries))
  run = jax.jit(gradients.of_measurement(found, task.measurement))
  b = run(params, Batch(rows, jnp.arange(len(rows["y"])), None))[0]

  def solve(how, params, data, added, first, b):
    product = operators.curvature(
      found, task.objective, params, data, microbatch=MICROBATCH.value
    )
    method = {
      ALONE: krylov.conjugate_gradients,
      BLOCK: block_krylov.block_conjugate_gradients,
    }[how](
      operators.damped(product, added),
      precondition=first,
      tolerance=TOLERANCE,
      check=False,
    )
    return iterative.run(method, b, LIMIT.value)

  compiled = jax.jit(solve, static_argnums=0)
  return Case(
    lambda how, added, *rest: compiled(how, params, data, added, *rest)[1],
    fits,
    b,
  )


def seconds(case: Case) -> tuple[float, float, float]:
  """Medians of a block, of all side by side, and of one after the other."""
  one = [
    jax.tree.map(lambda x, i=i: x[i : i + 1], case.queries)
    for i in range(_size(case.queries))
  ]
  call = lambda how, b: case(how, "none", TIMED.value, b)
  ways = (
    lambda: call(BLOCK, case.queries),
    lambda: call(ALONE, case.queries),
    lambda: [call(ALONE, b) for b in one],
  )
  times = [[_seconds(way) for way in ways] for _ in range(ROUNDS.value + 1)]
  block, side_by_side, in_turn = zip(*times[1:], strict=True)
  median = statistics.median
  return median(block), median(side_by_side), median(in_turn)


def _seconds(call: Callable) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def _iterations(info: iterative.Info) -> str:
  met = np.asarray(info.status) == iterative.Status.CONVERGED
  mean = float(np.mean(np.asarray(info.iterations)))
  return f"{mean:.1f}" if met.all() else f">{mean:.1f}"


def _size(b: blocks.Blocks) -> int:
  return jax.tree.leaves(b)[0].shape[0]


if __name__ == "__main__":
  app.run(main)
