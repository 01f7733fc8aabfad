"""TracIn against explicit sums of gradient products."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from tda import blocks
from tda.attribution import tracin
from tda.runs import Checkpoint


def test_checkpoints_are_weighted_by_what_was_applied():
  with jax.enable_x64(True):
    p = oracles.problem("tanh")
    points = [
      Checkpoint(
        5 * i,
        0,
        jax.tree.map(lambda x, i=i: i * x, p.params),
        (),
        jax.tree.map(lambda x, c=c: jnp.full_like(x, c), p.params),
        c,
        0,
      )
      for i, c in ((1, 0.5), (2, 0.8))
    ]
    scores = tracin.scorer(p.found, p.objective)(points, p.data, p.data)
    joined = lambda q: np.concatenate(
      [*oracles.flat(oracles.gradients(q)).values()], axis=1
    )
    first, second = (
      joined(p._replace(params=point.params)) for point in points
    )
    want = (0.5 * first @ first.T + 0.3 * second @ second.T) / len(first)
    np.testing.assert_allclose(scores.values, want, rtol=1e-8, atol=1e-12)
    assert scores.method == "tracin" and scores.normaliser == len(first)
    with pytest.raises(ValueError, match="one checkpoint or more"):
      tracin.scorer(p.found, p.objective)([], p.data, p.data)


def test_entries_have_rates_of_their_own():
  with jax.enable_x64(True):
    p = oracles.problem("tanh")
    rates = jax.tree.map(lambda x: jnp.abs(x) + 0.1, p.params)
    point = Checkpoint(5, 0, p.params, (), rates, 1.0, 1.0)
    scores = tracin.scorer(p.found, p.objective)([point], p.data, p.data)
    joined = lambda blocks: np.concatenate(
      [*oracles.flat(blocks).values()], axis=1
    )
    grads = joined(oracles.gradients(p))
    each = blocks.to_blocks(p.found, rates)
    c = joined({name: x[None] for name, x in each.items()})
    np.testing.assert_allclose(
      scores.values, (grads * c) @ grads.T / len(grads), rtol=1e-8, atol=1e-12
    )
