"""Small problems, and the explicit matrices that methods approximate.

Shared by the tests of curvature, responses and scores, which run in float64.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.linalg import block_diag

from tda import blocks, likelihoods, streams
from tda.blocks import Blocks, Trace
from tda.curvature.kronecker import Basis, Curvature
from tda.curvature.labels import Labels
from tda.likelihoods import Objective

N, T, ROWS = 10, 3, 5


class Problem(NamedTuple):
  """An objective with parameters, training data and its trace."""

  objective: Objective
  params: Any
  data: dict[str, np.ndarray]
  found: Trace


def affine(layer, x):
  y = x @ layer["w"]
  return y + jnp.broadcast_to(layer["b"], y.shape) if "b" in layer else y


def linear(p, x):
  return affine(p["out"], x)


def deep_linear(p, x):
  return affine(p["out"], affine(p["in"], x))


def tanh(p, x):
  return affine(p["out"], jnp.tanh(affine(p["in"], x)))


def pooled(p, x):
  """A layer at every position, then one output per example."""
  return affine(p["out"], jnp.tanh(affine(p["in"], x)).mean(axis=0))


def tied(p, x):
  """One square weight used twice, and not symmetrically."""
  return affine(p["out"], jnp.tanh(p["w"].T @ jnp.tanh(p["w"].T @ x)))


def mixed(p, ids):
  """Lookup, scanned layers over positions, a scale and an output layer."""

  def layer(h, w):
    return h + jnp.tanh(affine(w, h)), None

  h = jax.lax.scan(layer, p["table"][ids], p["layers"])[0]
  return affine(p["out"], (h * jnp.broadcast_to(p["scale"], h.shape)).mean(0))


def dense_layer(i, o, *lead):
  return {"w": (*lead, i, o), "b": (*lead, o)}


MODELS = {
  "linear": (linear, {"out": dense_layer(4, 3)}, (4,)),
  "positions": (linear, {"out": dense_layer(4, 3)}, (T, 4)),
  "deep_linear": (
    deep_linear,
    {"in": {"w": (4, 3)}, "out": {"w": (3, 3)}},
    (4,),
  ),
  "tanh": (tanh, {"in": dense_layer(12, 5), "out": dense_layer(5, 3)}, (12,)),
  "pooled": (pooled, {"in": {"w": (4, 4)}, "out": dense_layer(4, 3)}, (T, 4)),
  "tied": (tied, {"w": (4, 4), "out": dense_layer(4, 3)}, (4,)),
  "mixed": (
    mixed,
    {
      "table": (ROWS, 4),
      "layers": dense_layer(4, 4, 2),
      "scale": (4,),
      "out": dense_layer(4, 3),
    },
    (T,),
  ),
}


def problem(name: str, likelihood: str = "categorical", n: int = N) -> Problem:
  """One of `MODELS`; its target is drawn, whatever the model says."""
  model, shapes, x_shape = MODELS[name]
  rng = np.random.default_rng(0)
  is_shape = lambda s: isinstance(s, tuple)
  params = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s) / 2), shapes, is_leaf=is_shape
  )
  x = rng.normal(size=(n, *x_shape))
  if name == "mixed":
    x = rng.integers(0, ROWS, size=(n, *x_shape))
  outputs = jax.eval_shape(model, params, x[0]).shape
  if likelihood == "categorical":
    kind, y = likelihoods.categorical(), rng.integers(outputs[-1], size=n)
  else:
    kind, y = likelihoods.gaussian(0.5), rng.normal(size=(n, *outputs))
  objective = Objective(
    lambda p, ex: model(p, ex["x"]), kind, lambda ex: ex["y"]
  )
  data = {"x": x, "y": y}
  found = blocks.trace(objective.outputs, params, streams.example(data))
  return Problem(objective, params, data, found)


def gradients(p: Problem, data: Any = None, fn: Any = None) -> Blocks:
  """Per-example gradients of the loss or of `fn` by `vmap(grad)`, [N, ...]."""
  one = jax.grad(p.objective.loss if fn is None else fn)
  rows = jax.tree.map(jnp.asarray, p.data if data is None else data)
  grads = jax.vmap(one, (None, 0))(p.params, rows)
  return jax.vmap(lambda g: blocks.to_blocks(p.found, g))(grads)


def flat(found: dict[str, Any]) -> dict[str, np.ndarray]:
  """Blocks [N, ...] as [N, size]."""
  return {k: np.asarray(x).reshape(len(x), -1) for k, x in found.items()}


def in_blocks(p: Problem, matrix: Any) -> dict[str, np.ndarray]:
  """Diagonal blocks [size, size] of a matrix over the ravelled parameters."""
  _, unravel = ravel_pytree(p.params)
  unit = jnp.eye(len(matrix))
  maps = flat(jax.vmap(lambda v: blocks.to_blocks(p.found, unravel(v)))(unit))
  return {k: b.T @ np.asarray(matrix) @ b for k, b in maps.items()}


def drawn_curvature(shapes: dict[str, tuple], plain: Any = ()) -> Curvature:
  """Random eigenvalues in random bases; those in `plain` have no input one."""
  rng = np.random.default_rng(1)

  def frame(shape, width):
    q = np.linalg.qr(rng.normal(size=(*shape[:-2], width, width)))[0]
    return jnp.asarray(q)

  bases, eigenvalues = {}, {}
  for name, shape in shapes.items():
    inputs = None if name in plain else frame(shape, shape[-1])
    bases[name] = Basis(inputs, frame(shape, shape[-2]))
    eigenvalues[name] = jnp.asarray(rng.gamma(1.0, size=shape))
  return Curvature(bases, eigenvalues, "ekfac", Labels("exact"), N)


def basis(curvature: Curvature) -> dict[str, np.ndarray]:
  """Q_out ⊗ Q_in by block [size, size], whose order is [*stack, G, O, I]."""
  frames = {}
  for name, eigenvalues in curvature.eigenvalues.items():
    outputs, inputs = eigenvalues.shape[-2:]
    count = eigenvalues.size // (outputs * inputs)
    sides = [
      np.broadcast_to(np.eye(width), (count, width, width))
      if q is None
      else np.asarray(q).reshape(-1, width, width)
      for q, width in (
        (curvature.basis[name].outputs, outputs),
        (curvature.basis[name].inputs, inputs),
      )
    ]
    frames[name] = block_diag(*map(np.kron, *sides))
  return frames


def explicit(curvature: Curvature) -> dict[str, np.ndarray]:
  """The curvature as a matrix by block, [size, size]."""
  matrices = {}
  for name, q in basis(curvature).items():
    values = np.asarray(curvature.eigenvalues[name]).reshape(-1)
    matrices[name] = (q * values) @ q.T
  return matrices


def damping(curvature: Curvature, value: float) -> dict[str, np.ndarray]:
  """The diagonal [size] of damping relative to each layer's mean."""
  found = {}
  for name, x in curvature.eigenvalues.items():
    mean = np.mean(np.asarray(x), axis=(-3, -2, -1), keepdims=True)
    found[name] = (value * np.broadcast_to(mean, x.shape)).reshape(-1)
  return found
