"""Second moments, products in another basis, and their precision."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda import factors, moments

B, O, I = 5, 3, 4  # noqa: E741

# (groups, positions, bias), (positions,) of a lookup, inputs if dense.
KINDS = {
  "outer": (1, 1, False),
  "outer_bias": (1, 1, True),
  "outer_groups": (2, 1, True),
  "positions": (1, 6, False),
  "positions_bias": (1, 6, True),
  "positions_groups": (2, 6, True),
  "lookup": (7,),
  "lookup_sparse": (3,),
  "dense": I,
  "dense_column": 1,
}


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def make(name, dtype=np.float64):
  """Factors, and their inputs [B, G, T, I] and output gradients [B, G, T, O]
  in numpy; None for a dense gradient, which is returned instead."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  kind = KINDS[name]
  if isinstance(kind, int):
    grad = draw(B, 2, O, kind)
    return factors.Dense(jnp.asarray(grad)), None, None, grad
  if len(kind) == 1:
    # Repeated indices, and some outside the table on either side.
    ids, dy = rng.integers(-1, I + 1, (B, *kind)), draw(B, *kind, O)
    a = (ids[..., None] == np.arange(I)).astype(float)[:, None]
    made = factors.Lookup(jnp.asarray(ids), jnp.asarray(dy), I)
    dy = dy[:, None]
  else:
    groups, positions, bias = kind
    a, dy = draw(B, groups, positions, I), draw(B, groups, positions, O)
    made = factors.Outer(jnp.asarray(a), jnp.asarray(dy), bias)
    if bias:
      a = np.concatenate([a, np.ones((B, groups, positions, 1))], axis=-1)
  return made, a, dy, np.einsum("bgto,bgti->bgoi", dy, a)


def draw_like(grad, *lead):
  rng = np.random.default_rng(1)
  return rng.normal(size=(*lead, *grad.shape[1:]))


close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)


@jax.jit
def products(made, directions, weights):
  return {
    "gradient": factors.gradient(made),
    "dot": factors.dot(made, directions),
    "dots of few": factors.dot(made, directions[:2]),
    "dots of some": factors.dot(made, directions[:4]),
    "squares": factors.squares(made),
    "norm": factors.norm(made),
    "weighted norm": factors.weighted_norm(made, weights),
  }


def expected_products(grad, directions, weights):
  dots = np.einsum("bgoi,qgoi->bq", grad, directions)
  return {
    "gradient": grad,
    "dot": dots,
    "dots of few": dots[:, :2],
    "dots of some": dots[:, :4],
    "squares": np.sum(grad**2, axis=0),
    "norm": np.sum(grad**2, axis=(1, 2, 3)),
    "weighted norm": np.einsum("bgoi,goi->b", grad**2, weights),
  }


@pytest.mark.parametrize("sides", ["both", "inputs", "outputs"])
@pytest.mark.parametrize(
  "name", ["outer_groups", "positions_bias", "dense", "lookup"]
)
def test_rotation(name, sides):
  """And the products taken after it, as an eigenvalue refit takes them."""
  made, _, _, grad = make(name)
  rng = np.random.default_rng(2)
  _, groups, outputs, inputs = grad.shape
  left = rng.normal(size=(groups, inputs, inputs))
  right = rng.normal(size=(groups, outputs, outputs))
  if sides == "outputs":
    left = None
  else:
    grad = np.einsum("bgoi,gij->bgoj", grad, left)
  if sides == "inputs":
    right = None
  else:
    grad = np.einsum("bgoi,gop->bgpi", grad, right)
  directions, weights = draw_like(grad, 7), np.square(draw_like(grad))
  rotated = jax.jit(factors.rotate)(made, left, right)
  chex.assert_trees_all_close(
    products(rotated, directions, weights),
    expected_products(grad, directions, weights),
    rtol=1e-11,
    atol=1e-12,
  )


@jax.jit
def moments_of(made, lanes):
  padded = zeroed(made, lanes)
  return {
    (masked, diagonal): moments.moments(
      padded if masked else made, lanes if masked else None, diagonal
    )
    for masked in (True, False)
    for diagonal in (True, False)
  }


@pytest.mark.parametrize("name", [k for k in KINDS if k != "dense"])
def test_moments(name):
  made, a, dy, grad = make(name)
  if a is None:
    a, dy = np.ones((B, 2, 1, 1)), grad.swapaxes(2, 3)
  mask = np.array([1, 0, 1, 1, 0.0])
  for (masked, diagonal), got in moments_of(made, mask).items():
    lanes = mask if masked else np.ones(B)
    inputs = np.einsum("b,bgti,bgtj->gij", lanes, a, a)
    outputs = np.einsum("b,bgto,bgtp->gop", lanes, dy, dy)
    if name.startswith("lookup"):
      inputs = np.diagonal(inputs, axis1=1, axis2=2)
    elif diagonal:
      outputs = np.diagonal(outputs, axis1=1, axis2=2)
    close(got.inputs, inputs)
    close(got.outputs, outputs)
    close(got.positions, lanes.sum() * a.shape[2])


def zeroed(made, lanes):
  """What capture hands over: no gradients where examples do not count."""
  field = "grad" if isinstance(made, factors.Dense) else "dy"
  value = getattr(made, field)
  mask = jnp.asarray(lanes).reshape(-1, *[1] * (value.ndim - 1))
  return type(made)(**{**vars(made), field: value * mask})


def test_moments_of_a_materialised_matrix_are_refused():
  made = make("dense")[0]
  with pytest.raises(ValueError, match="once a gradient is materialised"):
    moments.moments(made, None, False)


@pytest.mark.parametrize("name", [k for k in KINDS if "dense" not in k])
def test_products_of_bfloat16_accumulate_in_float32(name):
  """T products of rounded numbers, none of the sums rounded to bfloat16."""
  made, _, _, _ = make(name, np.float32)
  cast = lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x
  made = jax.tree.map(cast, made)
  exact = factors.gradient(
    jax.tree.map(lambda x: x.astype(float) if x.dtype != int else x, made)
  )
  eps = float(jnp.finfo(jnp.float32).eps)
  everything = lambda made: (
    factors.gradient(made),
    moments.moments(made, None, False),
    factors.norm(made),
    factors.squares(made),
  )
  got, *others = jax.jit(everything)(made)
  assert got.dtype == jnp.float32
  # Sums of at most 7 products of which none exceeds 16.
  np.testing.assert_allclose(got, exact, atol=7 * 16 * eps)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(others))
