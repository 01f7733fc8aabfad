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
import numpy as np
import tqdm
from jax.sharding import Mesh

from tda import meshes
from tda.blocks import Blocks, Trace
from tda.curvature import operators
from tda.curvature.labels import Labels
from tda.inverse import block_krylov, iterative, neumann
from tda.inverse.iterative import Info, Matvec, Method
from tda.inverse.spectral import Damping, Response
from tda.likelihoods import Objective, PyTree

Array = jax.Array
Make: TypeAlias = Callable[..., "Solver"]


class Budget(NamedTuple):
  """What a solver may spend.

  Attributes:
    limit: the most iterations, each a product with all the data (cg) or with
      one minibatch.
    tolerance: of ‖b − A x‖ / ‖b‖, at which cg ends a query.
    microbatch: examples that cg's products take at a time; None: all.
    minibatch: examples of each step of astra and lissa; N if there are fewer.
    rank: eigenvectors that arnoldi keeps, of twice as many products.
    preconditioner: of cg, where it is called by name: "ekfac", "kfac",
      "diagonal" or "none".
  """

  limit: int = 100
  tolerance: float = 1e-3
  microbatch: int | None = 512
  minibatch: int = 256
  rank: int = 100
  preconditioner: str = "ekfac"


DEFAULT = Budget()
PIECE = 1.0  # seconds between two looks at what has converged
PIECE_OF_MANY = 8  # iterations, where several processes run


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("operands",),
  meta_fields=("build", "limit", "mesh", "damping", "labels", "label"),
)
@dataclasses.dataclass(frozen=True)
class Solver:
  """(C + δ)⁻¹ by iteration.

  Attributes:
    build: operands -> Method; called inside jit.
    operands: arrays the operator is made of.
    limit: the most iterations.
    mesh: the devices that the data is spread over, or None.
    damping: δ, for the record.
    labels: of C, for the record.
    label: of the progress bar; None shows none.
  """

  build: Callable[[PyTree], Method]
  operands: PyTree
  limit: int
  mesh: Mesh | None = None
  damping: Damping | None = None
  labels: Labels | None = None
  label: str | None = None

  def __call__(self, b: Blocks) -> Blocks:
    """The response of blocks [Q, *stack, G, O, I]."""
    return self.solve(b)[0]

  def solve(self, b: Blocks) -> tuple[Blocks, Info]:
    """The response, and how the solve of every query ended."""
    program = self.build, self.operands
    state = start(*program, meshes.replicate(b, self.mesh))
    total, done, piece = _count(b), 0, 1
    running = total
    with tqdm.tqdm(
      total=total, desc=self.label, unit="query", disable=not self.label
    ) as bar:
      while done < self.limit and running:
        steps = min(piece, self.limit - done)
        began = time.monotonic()
        state, active = advance(*program, state, steps)
        running = int(meshes.fetch(active).sum())
        spent = (time.monotonic() - began) / steps
        if jax.process_count() > 1:  # all of them take the same pieces
          piece = min(2 * piece, PIECE_OF_MANY)
        elif done:  # the first piece includes compilation
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
    method: "cg", "astra" or "lissa"; see `block_krylov` and `neumann`.
    kind: "gauss_newton" or "empirical", as in `operators.curvature`.
    budget: iterations, tolerance and batches.

  Returns:
    make(params, data, damping, preconditioner=None, *, key=None, mesh=None) ->
    Solver. The damping is a number or by block [*stack, 1, 1, 1]; astra needs
    the preconditioner, cg may have one; the key draws minibatches; the data's
    rows are split over the "data" axis of a mesh. A second solver of the same
    shapes compiles nothing again.
  """
  if method not in METHODS:
    raise ValueError(f"unknown solver {method!r}; choose of {list(METHODS)}")

  @functools.cache  # what is compiled belongs to these two objects
  def programs(count: int) -> tuple[Callable, Callable]:
    products = _Products(found, objective, kind, budget, count)
    step = functools.partial(_step, products, method == "astra")
    return functools.partial(_BUILD[method], products), jax.jit(step)

  def make(
    params: PyTree,
    data: PyTree,
    damping: Mapping[str, Array] | float,
    preconditioner: Response | None = None,
    *,
    key: Array | None = None,
    mesh: Mesh | None = None,
    named: Damping | None = None,
    label: str | None = None,
  ) -> Solver:
    if method == "astra" and preconditioner is None:
      raise ValueError("astra starts from a fitted curvature: give one")
    if method != "cg" and key is None:
      raise ValueError(f"{method} draws minibatches at random: give a key")
    build, step = programs(jax.tree.leaves(data)[0].shape[0])
    rows, weights = _placed(data, mesh)
    operands: dict[str, Any] = {
      "data": rows,
      "weights": weights,
      **meshes.replicate(
        {
          "params": params,
          "damping": damping,
          "preconditioner": preconditioner,
        },
        mesh,
      ),
    }
    if method != "cg":
      operands |= {"key": key}
      operands |= {"step": step(operands)}
    labels = Labels("exact" if kind == "gauss_newton" else "empirical")
    return Solver(build, operands, budget.limit, mesh, named, labels, label)

  return make


class _Products(NamedTuple):
  """Products of a curvature with its damping."""

  found: Trace
  objective: Objective
  kind: str
  budget: Budget
  examples: int  # rows of the data that are no filler

  def whole(self, operands: PyTree) -> Matvec:
    """With all the data."""
    matvec = operators.curvature(
      self.found,
      self.objective,
      operands["params"],
      operands["data"],
      kind=self.kind,
      weights=operands["weights"],
      microbatch=self.budget.microbatch,
    )
    return operators.damped(matvec, operands["damping"])

  def sampled(self, operands: PyTree) -> operators.Stochastic:
    """With a minibatch drawn for each k."""
    product = operators.minibatches(
      self.found,
      self.objective,
      operands["params"],
      operands["data"],
      size=min(self.budget.minibatch, self.examples),
      of=self.examples,
      key=operands["key"],
      kind=self.kind,
    )
    return lambda v, k: operators.damped(
      lambda u: product(u, k), operands["damping"]
    )(v)


def _cg(products: _Products, operands: PyTree) -> Method:
  return block_krylov.block_conjugate_gradients(
    products.whole(operands),
    precondition=operands["preconditioner"],
    tolerance=products.budget.tolerance,
  )


def _astra(products: _Products, operands: PyTree) -> Method:
  return neumann.astra(
    products.sampled(operands),
    operands["preconditioner"],
    step=operands["step"],
    exact=products.whole(operands),
  )


def _lissa(products: _Products, operands: PyTree) -> Method:
  return neumann.lissa(
    products.sampled(operands),
    step=operands["step"],
    exact=products.whole(operands),
  )


_BUILD = {"cg": _cg, "astra": _astra, "lissa": _lissa}
METHODS = tuple(_BUILD)


def _step(products: _Products, preconditioned: bool, operands: PyTree) -> Array:
  """The step of a series that its first minibatches allow."""
  like = {
    name: jnp.zeros((1, *block.stack, *block.shape))
    for name, block in products.found.blocks.items()
  }
  first = operands["preconditioner"] if preconditioned else None
  return neumann.safe_step(
    products.sampled(operands), like, precondition=first, batches=4
  )


def _placed(data: PyTree, mesh: Mesh | None) -> tuple[PyTree, Array]:
  """Rows on their devices, filled up to a multiple of them, and weights."""
  size = jax.tree.leaves(data)[0].shape[0]
  filler = 0 if mesh is None else -size % mesh.shape["data"]
  rows = np.minimum(np.arange(size + filler), size - 1)
  weights = (np.arange(size + filler) < size).astype(np.float32)
  if filler:
    data = jax.tree.map(lambda x: np.asarray(x)[rows], data)
  return meshes.spread((data, weights), mesh)


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
