"""The report on what is tracked adds up and can be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capture_checks import Case, first, materialize, tail
from control_cases import scanned

from tda import blocks
from tda.coverage import coverage, format_coverage, gradient_norms


def _loss(p, ex):
  h = scanned(p["layers"], p["table"][ex["ids"]])
  h = h @ p["part"][:2].T * jnp.exp(p["gain"])
  return tail(h @ p["head"])


PARAMS = {
  "layers": {"w": (2, 3, 3), "b": (2, 3)},
  "table": (6, 3),
  "part": (5, 3),
  "gain": (),
  "head": (2, 2),
  "left": (7,),
}


def _trace(select=None):
  params, batch = materialize(Case(_loss, PARAMS, {"ids": (4,)}, {}))
  return blocks.trace(_loss, params, first(batch), select=select), params, batch


def test_counts_add_up():
  found, params, _ = _trace(select=["layers/*", "table", "gain", "part"])
  report = coverage(found)
  total = sum(x.size for x in jax.tree.leaves(params))
  assert report.parameters == total
  assert {row.name: row.shape for row in report.rows} == {
    "table": (1, 3, 6),
    "layers/w": (2, 1, 3, 4),
    "part": (1, 2, 3),
    "gain": (1, 1, 1),
  }
  assert [row.name for row in report.omitted] == ["head"]
  assert report.unused == {"part": 9, "left": 7}
  every = (*report.rows, *report.omitted)
  counted = sum(row.parameters for row in every) + sum(report.unused.values())
  assert counted == total
  shares = {row.name: row.share for row in report.rows}
  assert shares["layers/w"] == pytest.approx(24 / total)
  assert [row.name for row in report.rows if row.reason] == ["gain"]


def test_shares_of_gradient_are_those_of_the_gradients():
  with jax.enable_x64(True):
    found, params, batch = _trace()
    norms = jax.jit(gradient_norms(found))(params, batch)
    grads = jax.jit(jax.vmap(jax.grad(_loss), (None, 0)))(params, batch)
    square = lambda x: jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=1)
    expected = {
      "layers/w": square(grads["layers"]["w"]) + square(grads["layers"]["b"]),
      **{
        name: square(grads[name]) for name in ("table", "part", "gain", "head")
      },
    }
    assert norms.keys() == expected.keys()
    for name, values in expected.items():
      np.testing.assert_allclose(norms[name], values, rtol=1e-12)
    report = coverage(found, norms)
    total = sum(values.mean() for values in expected.values())
    for row in report.rows:
      assert row.gradient == pytest.approx(expected[row.name].mean() / total)
    assert sum(row.gradient for row in report.rows) == pytest.approx(1)


def test_table():
  found, *_ = _trace(select=["layers/*", "gain"])
  norms = {"layers/w": np.array([1.0, 5.0]), "gain": np.array([0.0, 2.0])}
  assert format_coverage(coverage(found, norms)).splitlines() == [
    "block     kind    shape    parameters  share  gradient  reason",
    "layers/w  matrix  2x1x3x4          24  34.8%     75.0%",
    "gain      vector  1x1x1             1   1.4%     25.0%  enters exp",
    "table     lookup  1x3x6            18  26.1%            not selected",
    "part      matrix  1x2x3             6   8.7%            not selected",
    "head      matrix  1x2x2             4   5.8%            not selected",
    "left                                7  10.1%            no gradient",
    "part                                9  13.0%            no gradient",
    "25 (36.2%) of 69 parameters tracked, 1 (1.4%) of them generic",
  ]
  assert str(coverage(found)) == format_coverage(coverage(found))


def test_norms_are_of_losses():
  with pytest.raises(ValueError, match="returns shapes"):
    gradient_norms(
      blocks.trace(
        lambda p, ex: p["w"] * ex, {"w": np.ones(3)}, np.ones(3, np.float32)
      )
    )
