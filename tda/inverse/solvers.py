"""Responses that are solved for with products of the exact curvature.

    make = solvers.maker(found, objective, "cg")
    response = make(params, data, damping, preconditioner)
    blocks, info = response.solve(query_gradients)

A `Solver` is a response like any other, except that it runs from Python: with a
progress bar, in pieces of about a second, and with an account of every query.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import tqdm

from tda.blocks import Blocks, Trace
from tda.curvature import operators
from tda.curvature.labels import Labels
from tda.inverse import iterative, krylov, neumann
from tda.inverse.iterative import Info, Method
from tda.inverse.spectral import Damping, Response
from tda.likelihoods import Objective, PyTree

Array = jax.Array
Make: TypeAlias = Callable[..., "Solver"]

METHODS = ("cg", "astra", "lissa")


class Budget(NamedTuple):
  """What a solver may spend.

  Attributes:
    limit: the most iterations, each a product with all the data (cg) or with
      one minibatch.
    tolerance: of ‖b − A x‖ / ‖b‖, at which cg ends a query.
    microbatch: examples that cg's products take at a time; None: all.
    minibatch: examples of each step of astra and lissa; N if there are fewer.
  """

  limit: int = 100
  tolerance: float = 1e-3
  microbatch: int | None = 512
  minibatch: int = 256


DEFAULT = Budget()
PIECE = 1.0  # seconds between two looks at what has converged


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("operands",),
  meta_fields=("build", "limit", "damping", "labels", "label"),
)
@dataclasses.dataclass(frozen=True)
class Solver:
  """(C + δ)⁻¹ by iteration.

  Attributes:
    build: operands -> Method; called inside jit.
    operands: arrays the operator is made of.
    limit: the most iterations.
    damping: δ, for the record.
    labels: of C, for the record.
    label: of the progress bar; None shows none.
  """

  build: Callable[[PyTree], Method]
  operands: PyTree
  limit: int
  damping: Damping | None = None
  labels: Labels | None = None
  label: str | None = None

  def __call__(self, b: Blocks) -> Blocks:
    """The response of blocks [Q, *stack, G, O, I]."""
    return self.solve(b)[0]

  def solve(self, b: Blocks) -> tuple[Blocks, Info]:
    """The response, and how the solve of every query ended."""
    program = self.build, self.operands
    state = start(*program, b)
    total, done, piece = _count(b), 0, 1
    running = total
    with tqdm.tqdm(
      total=total, desc=self.label, unit="query", disable=not self.label
    ) as bar:
      while done < self.limit and running:
        steps = min(piece, self.limit - done)
        began = time.monotonic()
        state, active = advance(*program, state, steps)
        running = int(active.sum())
        spent = (time.monotonic() - began) / steps
        if done:  # the first piece includes compilation
          piece = max(1, min(2 * piece, int(PIECE / max(spent, 1e-6))))
        done += steps
        bar.set_postfix(iterations=done, refresh=False)
        bar.update(total - running - bar.n)
    return result(*program, state)


def maker(
  found: Trace,
  objective: Objective,
  method: str,
  *,
  kind: str = "gauss_newton",
  budget: Budget = DEFAULT,
) -> Make:
  """Solvers with the products of one curvature.

  Args:
    found: trace of `objective.outputs`.
    objective: model and likelihood.
    method: "cg", "astra" or "lissa"; see `krylov` and `neumann`.
    kind: "gauss_newton" or "empirical", as in `operators.curvature`.
    budget: iterations, tolerance and batches.

  Returns:
    make(params, data, damping, preconditioner=None, *, key=None, ...) ->
    Solver. The damping is a number or by block [*stack, 1, 1, 1]; astra needs
    the preconditioner, cg may have one; the key draws minibatches. A second
    solver of the same shapes compiles nothing again.
  """
  if method not in METHODS:
    raise ValueError(f"unknown solver {method!r}; choose of {list(METHODS)}")

  def whole(operands):
    matvec = operators.curvature(
      found,
      objective,
      operands["params"],
      operands["data"],
      kind=kind,
      microbatch=budget.microbatch,
    )
    return operators.damped(matvec, operands["damping"])

  def sampled(operands):
    data = operands["data"]
    product = operators.minibatches(
      found,
      objective,
      operands["params"],
      data,
      size=min(budget.minibatch, jax.tree.leaves(data)[0].shape[0]),
      key=operands["key"],
      kind=kind,
    )
    return lambda v, k: operators.damped(
      lambda u: product(u, k), operands["damping"]
    )(v)

  def build(operands):
    first = operands["preconditioner"]
    if method == "cg":
      return krylov.conjugate_gradients(
        whole(operands), precondition=first, tolerance=budget.tolerance
      )
    products, exact = sampled(operands), whole(operands)
    if method == "lissa":
      return neumann.lissa(products, step=operands["step"], exact=exact)
    return neumann.astra(products, first, step=operands["step"], exact=exact)

  @jax.jit
  def step(operands):
    like = {
      name: jnp.zeros((1, *block.stack, *block.shape))
      for name, block in found.blocks.items()
    }
    first = operands["preconditioner"] if method == "astra" else None
    return neumann.safe_step(
      sampled(operands), like, precondition=first, batches=4
    )

  def make(
    params: PyTree,
    data: PyTree,
    damping: Mapping[str, Array] | float,
    preconditioner: Response | None = None,
    *,
    key: Array | None = None,
    named: Damping | None = None,
    label: str | None = None,
  ) -> Solver:
    if method == "astra" and preconditioner is None:
      raise ValueError("astra starts from a fitted curvature: give one")
    if method != "cg" and key is None:
      raise ValueError(f"{method} draws minibatches at random: give a key")
    operands: dict[str, Any] = {
      "params": params,
      "data": jax.tree.map(jnp.asarray, data),
      "damping": damping,
      "preconditioner": preconditioner,
    }
    if method != "cg":
      operands |= {"key": key}
      operands |= {"step": step(operands)}
    labels = Labels("exact" if kind == "gauss_newton" else "empirical")
    return Solver(build, operands, budget.limit, named, labels, label)

  return make


# Jitted by what is computed alone: names and dampings compile nothing anew.


@functools.partial(jax.jit, static_argnums=0)
def start(build: Callable, operands: PyTree, b: Blocks) -> Any:
  """The state before the first iteration."""
  return build(operands).init(b)


@functools.partial(jax.jit, static_argnums=0)
def advance(
  build: Callable, operands: PyTree, state: Any, steps: int
) -> tuple[Any, Array]:
  """The state after further iterations, and which queries go on."""
  method = build(operands)
  state = iterative.advance(method, state, steps)
  return state, method.active(state)


@functools.partial(jax.jit, static_argnums=0)
def result(
  build: Callable, operands: PyTree, state: Any
) -> tuple[Blocks, Info]:
  """What a state amounts to."""
  return build(operands).result(state)


def _count(b: Blocks) -> int:
  return jax.tree.leaves(b)[0].shape[0]
