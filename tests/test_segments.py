"""Parts of a row: their shares of a gradient, and directions of low rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda import factors, segments
from tda.factors import Dense, Lookup, Outer
from tda.segments import LowRank

B, T, OUT, IN, Q, P, R = 3, 6, 4, 5, 2, 3, 2
LANES = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1]])


@pytest.fixture(autouse=True, scope="module")
def float64():
  with jax.enable_x64(True):
    yield


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def parts(kind):
  dy = normal(B, 2 if kind == "groups" else 1, T, OUT, seed=1)
  if kind == "lookup":
    ids = np.random.default_rng(2).integers(0, IN, (B, T))
    return Lookup(jnp.asarray(ids), dy[:, 0], IN)
  a = normal(B, dy.shape[1], T, IN - (kind == "bias"), seed=2)
  return Outer(a, dy, kind == "bias")


def low_rank(groups):
  return LowRank(normal(Q, groups, OUT, R), normal(Q, groups, IN, R, seed=3))


def shares(made):
  """Gradients of every position alone [B, T, G, OUT, IN]."""
  keep = lambda t: jnp.broadcast_to(jnp.arange(T) == t, (B, T))
  each = [factors.gradient(segments._only(made, keep(t))) for t in range(T)]
  return jnp.stack(each, axis=1)


@pytest.mark.parametrize("kind", ["plain", "bias", "groups", "lookup"])
@pytest.mark.parametrize("count", [P, None])
@pytest.mark.parametrize("direct", [True, False])
def test_products_by_part(kind, count, direct, monkeypatch):
  """Directions whole and of low rank, by position or by share formed."""
  monkeypatch.setattr(segments, "_directly", lambda *_: direct)
  made, lanes = parts(kind), jnp.asarray(LANES)
  compact = low_rank(2 if kind == "groups" else 1)
  whole = compact.full()
  by_token = jnp.einsum("btgoi,qgoi->btq", shares(made), whole)
  of_part = jax.nn.one_hot(lanes - 1, P, dtype=by_token.dtype)
  expected = jnp.einsum("btp,btq->bpq", of_part, by_token)
  if count is None:
    expected = by_token * (lanes > 0)[..., None]
  for direction in (whole, compact):
    found = segments.dots(made, direction, lanes, count)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    total = segments.dot(made, direction)
    np.testing.assert_allclose(total, by_token.sum(1), rtol=1e-10, atol=1e-12)


def test_the_route_of_fewest_operations():
  """By position for few directions or tokens, by share for many of them."""
  made = parts("plain")
  few, many = jnp.zeros((1, 1, OUT, IN)), jnp.zeros((40, 1, OUT, IN))
  assert segments._directly(made, few, 1)
  assert not segments._directly(made, many, 1)
  assert segments._directly(made, many, 10 * T)


def test_a_statistic_of_each_part_adds_nothing_between_them():
  made, lanes = parts("bias"), jnp.asarray(LANES)
  found = segments.each(factors.norm, made, lanes, P)
  grads = shares(made)
  for b in range(B):
    for p in range(P):
      mine = grads[b, LANES[b] == p + 1].sum(axis=0)
      assert found[b, p] == pytest.approx(jnp.square(mine).sum())


@pytest.mark.parametrize(
  ("made", "lanes", "message"),
  [
    (Dense(jnp.zeros((B, 1, OUT, IN))), LANES, "tied to the head"),
    (parts("plain"), LANES[:, :4], "6 positions in sequences of"),
  ],
)
def test_parts_that_cannot_be_told_apart(made, lanes, message):
  with pytest.raises(ValueError, match=message):
    segments.dots(made, jnp.zeros((Q, 1, OUT, IN)), jnp.asarray(lanes), P)


def test_compression_is_exact_at_the_rank_and_near_the_best_below():
  rng = np.random.default_rng(0)
  spectrum = np.geomspace(1, 1e-4, 20)
  turn = lambda n: np.linalg.qr(rng.normal(size=(2, 3, n, 20)))[0]
  matrix = jnp.asarray(turn(40) * spectrum @ turn(30).swapaxes(-1, -2))
  small = jnp.asarray(rng.normal(size=(2, 1, 4, 3)))
  found = segments.compress({"w": matrix, "small": small}, 6)
  assert found["small"] is small
  assert found["w"].shape == matrix.shape
  error = jnp.linalg.norm(found["w"].full() - matrix, axis=(-2, -1))
  best = np.sqrt(np.square(spectrum[6:]).sum())
  np.testing.assert_array_less(error, 1.01 * best)
  exact = segments.compress({"w": found["w"].full()}, 6)["w"].full()
  np.testing.assert_allclose(exact, found["w"].full(), atol=1e-12)
  with pytest.raises(ValueError, match="rank=0"):
    segments.compress({"w": matrix}, 0)
