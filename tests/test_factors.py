"""Products of factored gradients against the materialised gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda import factors
from tda.factors import Dense, Lookup, Outer


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def _normal(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape))


def _lookup(batch, positions, outputs, rows):
  rng = np.random.default_rng(0)
  # Some ids repeat within an example, and -1 and `rows` are outside.
  ids = jnp.asarray(rng.integers(-1, rows + 1, (batch, positions)))
  ids = ids.at[:, -1].set(ids[:, 0])
  return Lookup(ids, _normal(batch, positions, outputs), rows)


def _outer(groups, positions, bias):
  a, dy = _normal(4, groups, positions, 6), _normal(4, groups, positions, 3)
  return Outer(a, dy, bias)


CASES = {
  "one position": lambda: _outer(1, 1, True),
  "one position, no bias": lambda: _outer(1, 1, False),
  "one position, groups": lambda: _outer(2, 1, True),
  "positions": lambda: _outer(1, 2, True),
  "many positions": lambda: _outer(1, 9, True),
  "positions, groups": lambda: _outer(2, 5, False),
  "lookup, sparse": lambda: _lookup(4, 5, 3, 9),
  "lookup, full": lambda: _lookup(4, 8, 3, 5),
  "dense": lambda: Dense(_normal(4, 2, 3, 5)),
}


def _materialised(parts):
  """From the definition: sum over positions of dy aᵀ."""
  if isinstance(parts, Dense):
    return np.asarray(parts.grad)
  dy = np.asarray(parts.dy)
  if isinstance(parts, Lookup):
    one_hot = np.asarray(parts.ids)[..., None] == np.arange(parts.rows)
    return np.einsum("bto,bti->boi", dy, one_hot)[:, None]
  a = np.asarray(parts.a)
  if parts.bias:
    a = np.concatenate([a, np.ones_like(a[..., :1])], axis=-1)
  return np.einsum("bgto,bgti->bgoi", dy, a)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("queries", [1, 2, 5, 20])
def test_dot(make, queries):
  grad = _materialised(make())
  directions = _normal(queries, *grad.shape[1:])
  expected = np.einsum("bgoi,qgoi->bq", grad, directions)
  np.testing.assert_allclose(
    factors.dot(make(), directions), expected, rtol=1e-12, atol=1e-12
  )


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_quadratic_products(make):
  grad = _materialised(make())
  weights = jnp.square(_normal(*grad.shape[1:]))
  results = {
    "gradient": (factors.gradient(make()), grad),
    "squares": (factors.squares(make()), (grad**2).sum(axis=0)),
    "norm": (factors.norm(make()), (grad**2).sum(axis=(1, 2, 3))),
    "weighted": (
      factors.weighted_norm(make(), weights),
      np.einsum("bgoi,goi->b", grad**2, weights),
    ),
  }
  for name, (got, expected) in results.items():
    np.testing.assert_allclose(
      got, expected, rtol=1e-12, atol=1e-12, err_msg=name
    )


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("width", [None, 2])
def test_rotation(make, width):
  """By any matrices: those of a basis, or `width` directions a side."""
  grad = _materialised(make())
  _, groups, outputs, inputs = grad.shape
  left = _normal(groups, outputs, outputs)[..., :width]
  right = _normal(groups, inputs, inputs)[..., :width]
  rotated = factors.rotate(make(), right, left)
  expected = np.einsum("bgoi,gop,gij->bgpj", grad, left, right)
  np.testing.assert_allclose(
    _materialised(rotated), expected, rtol=1e-12, atol=1e-12
  )


def test_few_directions_never_form_the_gradient():
  """However many positions would make a full basis do so."""
  parts = _outer(1, 40, True)
  side = lambda size, count: _normal(1, size, count)
  full = factors.rotate(parts, side(7, 7), side(3, 3))
  few = factors.rotate(parts, side(7, 1), side(3, 1))
  assert isinstance(full, Dense) and isinstance(few, Outer)


def test_entries_bound_what_products_form():
  # With one position the cheaper side is held: outputs for each query, or
  # the gradient once there are more queries than inputs.
  single = Outer(_normal(4, 1, 1, 6), _normal(4, 1, 1, 3), True)
  assert factors.entries(single) == 0
  assert factors.entries(single, _normal(2, 1, 3, 7)) == 2 * 3
  assert factors.entries(single, _normal(20, 1, 3, 7)) == 6 * 3
  many = dataclasses.replace(
    single, a=_normal(4, 1, 5, 6), dy=_normal(4, 1, 5, 3)
  )
  assert factors.entries(many) == 3 * 7
  # A sparse lookup never forms its table.
  assert factors.entries(_lookup(4, 5, 3, 10_000)) < 10_000
