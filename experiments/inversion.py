"""How fast are inverses by matrix products, and how many products are needed?

    python -m experiments.inversion [--smoke] [--dims=512,1024]

The simulation of Zhou et al. 2024 (HyperINF), §4.1: A = Σ a aᵀ / N + 0.01 I
with a ~ N(0, I), and the error ‖A⁻¹v − x‖ / ‖A⁻¹v‖ for v ~ N(0, I) over 40
iterations, in float32 against a float64 solution, of

  start 5e-5            Schulz's iteration, of order 2, as the paper runs it
  order 2, 3, 9         `tda.inverse.hyperpower`, told of the damping 0.01
  LiSSA                 the corrected x ← x + (v − A x) / (‖A‖_F + 1)
  conjugate gradients   (these two with a product with a vector in an iteration)

Float32 accuracy is an error of 4 ε κ(A), where ε = 1.2e-7. Then the time of a
whole inverse against `jnp.linalg.inv` and a Cholesky solve, in interleaved
rounds of one process, for the matrix of N = 800.

Every case is a stage of --workdir: an interrupted run is taken up, and one of
more dimensions adds to it.

On two CPU cores, in 964 seconds, it prints

    Matrix products to float32 accuracy (to the end; !: not converged)
      dim      N        κ  start 5e-5     order 2     order 3     order 9
      512    200    657.2     48 (50)     18 (18)     18 (18)     15 (15)
      512    800    60.37     44 (44)     16 (18)     15 (18)     15 (15)
      512   6400     3.13     38 (40)     16 (18)     15 (18)     15 (20)
      512  12800    2.232     38 (40)     16 (16)     15 (18)     15 (20)
     1024    200     1071     48 (50)     18 (18)     18 (18)     15 (15)
     1024    800    444.5     50 (50)     18 (18)     18 (18)     15 (15)
     1024   6400    5.233     40 (42)     16 (18)     18 (18)     15 (20)
     1024  12800    3.123     38 (40)     16 (18)     15 (18)     15 (20)
     2048    200     1719     48 (48)     18 (20)     18 (18)     15 (15)
     2048    800    675.4     48 (50)     18 (18)     18 (18)     15 (15)
     2048   6400    12.46     40 (44)     18 (20)     18 (21)     15 (20)
     2048  12800    5.359     40 (42)     18 (20)     18 (21)     15 (20)
     4096    200     3019     48 (48)     20 (20)     18 (18)     15 (15)
     4096    800     1066     48 (50)     18 (20)     18 (18)     15 (20)
     4096   6400    64.88     44 (46)     18 (20)     18 (21)     15 (20)
     4096  12800     12.3     40 (44)     18 (20)     18 (24)     15 (25)
    every order needs fewer in 16 of 16 cases

    Seconds of an inverse, median over rounds
      dim     order 2     order 3     order 9  linalg.inv    Cholesky
       64     0.00056     0.00045     0.00044     0.00011     6.2e-05
      128      0.0022      0.0019      0.0019     0.00023     0.00018
      256       0.016       0.013       0.013       0.003      0.0024
      512       0.091       0.061       0.041       0.013      0.0064
     1024        0.45        0.39        0.38       0.041       0.034
     2048         3.2         2.7         2.3        0.21        0.22
     4096          24          20          23         1.4         1.4
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments import reports
from tda.evaluation.workdir import Arrays, Workdir
from tda.inverse import hyperpower, krylov, neumann, polynomials
from tda.inverse.iterative import Method
from tda.report import convergence, tables

SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes.")
DIMS = flags.DEFINE_list(
  "dims", ["512", "1024", "2048", "4096"], "Dimensions of the simulation."
)
COUNTS = flags.DEFINE_list(
  "counts", ["200", "800", "6400", "12800"], "Numbers N of vectors a."
)
TIMED = flags.DEFINE_list(
  "timed", ["64", "128", "256", "512", "1024", "2048", "4096"], "To be timed."
)
SEED = flags.DEFINE_integer("seed", 0, "Of the vectors.")
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/inversion/SIZE unless given."
)

Case: TypeAlias = tuple[int, int]  # dimension, N
ITERATIONS, DAMPING, PAPER = 40, 0.01, "start 5e-5"
ORDERS = {"order 2": 2, "order 3": 3, "order 9": 9}
ROUNDS, ROUND_SECONDS, TIME_LIMIT = 7, 0.1, 20.0  # of timing a dimension


class Solver(NamedTuple):
  method: Method
  step: Callable[[Any], Any]
  whole: bool  # whether x is the inverse, of A, or a solution, of v


def main(_) -> None:
  started = time.monotonic()
  dims, counts, timed = (
    [*map(int, flag.value)] for flag in (DIMS, COUNTS, TIMED)
  )
  if SMOKE.value:
    dims, counts, timed = [32], [16, 256], [16, 32]
  size = "smoke" if SMOKE.value else "full"
  config = {"seed": SEED.value, "iterations": ITERATIONS, "size": size}
  workdir = Workdir(WORKDIR.value or f"workdir/inversion/{size}", config)
  print(f"{jax.devices()[0]}; results in {workdir.path}")

  cases, seconds = {}, {}
  for dim, n in tqdm([(d, n) for d in dims for n in counts], "simulation"):
    compute = functools.partial(simulated, dim, n)
    cases[dim, n] = workdir.stage(f"case_{dim}_{n}", compute)
  for dim in tqdm(timed, "timing"):
    compute = functools.partial(timings, dim)
    seconds[dim] = workdir.stage(f"time_{dim}", compute)
  workdir.say(products_table(cases))
  workdir.say(f"\n{time_table(seconds)}")
  draw(cases, seconds, workdir)
  workdir.record("products", {f"{d} {n}": v for (d, n), v in needed(cases)})
  workdir.record("seconds_of_an_inverse", medians(seconds))
  total = round(time.monotonic() - started, 1)
  print(f"\n{total:.0f} seconds; figures in {workdir.path}")
  reports.write(workdir, __doc__)


def matrix(dim: int, n: int) -> np.ndarray:
  """A, float32."""
  rng = np.random.default_rng([SEED.value, dim, n])
  rows = rng.standard_normal((n, dim), np.float32)
  return rows.T @ rows / n + DAMPING * np.eye(dim, dtype=np.float32)


@functools.cache
def inverting() -> dict[str, Solver]:
  """The methods that are given A as an argument, compiled once for a shape."""
  methods = {PAPER: hyperpower.method(2, start=5e-5)}
  for name, order in ORDERS.items():
    methods[name] = hyperpower.method(order, floor=DAMPING)
  return {
    name: Solver(method, jax.jit(method.step, donate_argnums=0), True)
    for name, method in methods.items()
  }


def solving(a: jax.Array) -> dict[str, Solver]:
  """The methods of products with A; not compiled, since they would hold it."""
  times = lambda x: jnp.matmul(x, a, precision=jax.lax.Precision.HIGHEST)
  step = 1 / (jnp.linalg.norm(a) + 1)
  methods = {
    "LiSSA": neumann.lissa(lambda x, _: times(x), step=step),
    "conjugate gradients": krylov.conjugate_gradients(
      times, tolerance=0, check=False
    ),
  }
  return {
    k: Solver(method, method.step, False) for k, method in methods.items()
  }


def simulated(dim: int, n: int) -> Arrays:
  """Errors [iterations + 1] of every solver, and when each stopped."""
  a = matrix(dim, n)
  v = np.random.default_rng([SEED.value, dim]).standard_normal(dim, np.float32)
  exact = np.linalg.solve(a.astype(float), v.astype(float))
  values = np.linalg.eigvalsh(a)
  found: Arrays = {"condition": values[-1:] / values[:1]}
  operator, vector = jnp.asarray(a), jnp.asarray(v)
  for name, solver in (inverting() | solving(operator)).items():
    errors, stop, status = _errors(solver, operator, vector, exact)
    found |= {name: errors, f"{name}: stop": stop, f"{name}: status": status}
  return found


def goal(found: Arrays) -> float:
  """The error that counts as float32 accuracy."""
  return 4 * float(np.finfo(np.float32).eps * found["condition"][0])


def _errors(
  solver: Solver, a: jax.Array, v: jax.Array, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  method, step, whole = solver
  state = method.init(a if whole else v[None])
  errors: list[float] = []
  stop = ITERATIONS
  for k in range(ITERATIONS + 1):
    if k and stop == ITERATIONS:
      state = step(state)
    x = state.x @ v if whole else method.result(state)[0][0]
    error = np.linalg.norm(np.asarray(x, float) - exact)
    errors.append(float(error / np.linalg.norm(exact)))
    if not method.active(state).any():
      stop = min(stop, k)
  return np.array(errors), np.array(stop), np.asarray(state.status)


def needed(
  cases: Mapping[Case, Arrays],
) -> Iterator[tuple[Case, dict[str, int | None]]]:
  """(dimension, N), and products of matrices to float32 accuracy by solver."""
  for case, found in cases.items():
    counts: dict[str, int | None] = {}
    for name in (PAPER, *ORDERS):
      met = np.flatnonzero(found[name] <= goal(found))
      each = polynomials.products(ORDERS.get(name, 2))
      counts[name] = int(met[0]) * each if len(met) else None
    yield case, counts


def products_table(cases: Mapping[Case, Arrays]) -> str:
  """Products needed, and those after which the convergence test stops."""
  names = (PAPER, *ORDERS)
  header, body = ["dim", "N", "κ", *names], []
  fewer = 0
  for (dim, n), counts in needed(cases):
    found = cases[dim, n]
    cells = []
    for name in names:
      each = polynomials.products(ORDERS.get(name, 2))
      stop = int(found[f"{name}: stop"]) * each
      end = "" if not found[f"{name}: status"] else "!"
      reached = "-" if counts[name] is None else counts[name]
      cells.append(f"{reached} ({stop}){end}")
    paper, *ours = (counts[name] or np.inf for name in names)
    fewer += max(ours) < paper
    body.append([str(dim), str(n), f"{found['condition'][0]:.4g}", *cells])
  return (
    "Matrix products to float32 accuracy (to the end; !: not converged)\n"
    f"{tables.aligned(header, body, [True] * len(header))}\n\n"
    f"every order needs fewer in {fewer} of {len(cases)} cases"
  )


def timings(dim: int) -> Arrays:
  """Seconds [rounds] of an inverse by every way, in interleaved rounds."""
  a = jnp.asarray(matrix(dim, 800))
  inverse = functools.partial(hyperpower.inverse, floor=DAMPING)
  ways: dict[str, Callable[[jax.Array], Any]] = {
    k: functools.partial(inverse, order=order) for k, order in ORDERS.items()
  }
  if jax.default_backend() != "cpu":  # where narrow products are no faster
    narrow = functools.partial(inverse, order=9, dtype=jnp.bfloat16)
    ways["order 9, bfloat16"] = narrow
  ways["linalg.inv"] = jnp.linalg.inv
  ways["Cholesky"] = lambda a: jax.scipy.linalg.cho_solve(
    jax.scipy.linalg.cho_factor(a), jnp.eye(dim)
  )
  compiled = {k: jax.jit(way).lower(a).compile() for k, way in ways.items()}
  began = time.perf_counter()
  taken: dict[str, list[float]] = {k: [] for k in ways}
  calls = dict.fromkeys(ways, 1)
  for done in range(ROUNDS + 1):  # the first is a warm-up where it is short
    for name, run in compiled.items():
      spent = _seconds(run, a, calls[name])
      taken[name].append(spent)
      if not done:
        calls[name] = max(1, int(ROUND_SECONDS / spent))
    if time.perf_counter() - began > TIME_LIMIT:
      break
  return {k: np.array(v[1:] or v) for k, v in taken.items()}


def _seconds(run: Callable, a: jax.Array, calls: int) -> float:
  start = time.perf_counter()
  for _ in range(calls):
    result = run(a)
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls


def medians(seconds: Mapping[int, Arrays]) -> dict[str, dict[int, float]]:
  """Way -> dimension -> seconds."""
  ways = [*next(iter(seconds.values()))]
  return {
    way: {d: float(np.median(found[way])) for d, found in seconds.items()}
    for way in ways
  }


def time_table(seconds: Mapping[int, Arrays]) -> str:
  """Median seconds, a row for each dimension."""
  ways = medians(seconds)
  header = ["dim", *ways]
  body = [
    [str(dim), *(f"{by_dim[dim]:.2g}" for by_dim in ways.values())]
    for dim in seconds
  ]
  table = tables.aligned(header, body, [True] * len(header))
  return f"Seconds of an inverse, median over rounds\n{table}"


def draw(
  cases: Mapping[Case, Arrays], seconds: Mapping[int, Arrays], workdir: Workdir
) -> None:
  """Error against iteration, and time against dimension."""
  named = {f"dimension {d}, N = {n}": x for (d, n), x in cases.items()}
  k = np.arange(ITERATIONS + 1)
  names = (PAPER, *ORDERS, "conjugate gradients", "LiSSA")
  convergence.lines(
    workdir.path / "convergence.png",
    {c: {m: (k, x[m]) for m in names} for c, x in named.items()},
    xlabel="iteration (order p: p products of matrices, order 9: 5)",
    ylabel="error ‖A⁻¹v − x‖ / ‖A⁻¹v‖",
    level={c: goal(x) for c, x in named.items()},
  )
  ways = medians(seconds)
  convergence.lines(
    workdir.path / "time.png",
    {"": {k: ([*v], [*v.values()]) for k, v in ways.items()}},
    xlabel="dimension",
    ylabel="seconds of an inverse",
    log_x=True,
  )


if __name__ == "__main__":
  app.run(main)
