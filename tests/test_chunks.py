"""Chunks of a batch give what the whole batch gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda import blocks, chunks, taps
from tda.curvature import kronecker


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("size", [12, 13])
def test_chunks_change_nothing(size, count):
  rows = {"x": jnp.arange(size * 3.0).reshape(size, 3), "none": None}
  each = lambda rows: {"y": jnp.square(rows["x"]).sum(axis=1)}
  total = lambda rows: rows["x"].sum(axis=0)
  got = chunks.apply(each, rows, count, per_example=True)
  np.testing.assert_array_equal(got["y"], each(rows)["y"])
  got = chunks.apply(total, rows, count, per_example=False)
  np.testing.assert_array_equal(got, total(rows))


def test_chunks_see_fewer_rows():
  seen = []

  def fn(rows):
    seen.append(rows.shape[0])
    return rows

  chunks.apply(fn, jnp.zeros((12, 1)), 4, per_example=True)
  assert set(seen) == {3}


@pytest.mark.parametrize(
  ("size", "need", "expected"),
  [(12, 0.0, 1), (12, 1.0, 1), (12, 4.2, 6), (7, 2.0, 2), (4, 100.0, 4)],
)
def test_count(size, need, expected):
  assert chunks.count(size, need) == expected


def test_a_large_footprint_is_chunked_and_exact(optimized):
  # Two positions of a wide layer: gradients outweigh what they come from.
  def loss(params, x):
    return jnp.sum(jnp.sin(x @ params["w"]))

  params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(30, 20)))}
  batch = jnp.asarray(np.random.default_rng(1).normal(size=(14, 2, 30)))
  found = blocks.trace(loss, params, batch[0])
  run = taps.linearize(found, kronecker.SQUARES)

  def squares(params, batch):
    return run(params, batch)[1](jnp.ones(len(batch)))["w"]

  grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)["w"]
  expected = jnp.square(grads).sum(axis=0).T[None]
  np.testing.assert_allclose(squares(params, batch), expected, rtol=2e-5)
  held = jax.jit(squares).lower(params, batch).compile().memory_analysis()
  assert held.temp_size_in_bytes < grads.nbytes
