"""Sites: gradients, covariances and coordinates equal their definitions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capture_cases import ELEMENTWISE, SITES
from capture_checks import (
  BATCH,
  MOMENTS,
  NORMS,
  ROWS,
  check_case,
  collect,
  first,
  materialize,
  tail,
)
from control_cases import CONTROL
from sharing_cases import SHARED

from tda import blocks


@pytest.mark.parametrize("name", SITES)
def test_site(name):
  check_case(SITES[name])


# Second moments, against a model that reports its inputs and takes a shift of
# each site's output.


def _dense(p, ex, shift):
  return tail(ex["x"] @ p["w"] + p["b"][None] + shift), _biased(ex["x"])


def _heads_out(p, ex, shift):
  y = jnp.einsum("td,dhk->thk", ex["x"], p["w"]) + p["b"][None]
  return tail(jax.nn.softmax(y + shift)), _biased(ex["x"])


def _heads_in(p, ex, shift):
  y = jnp.einsum("thk,hkd->td", ex["x"], p["w"])
  return tail(y + shift), ex["x"].reshape(5, -1)


def _experts(p, ex, shift):
  y = jnp.einsum("etd,edf->etf", ex["x"], p["w"])
  return tail(y + shift), ex["x"]


def _convolved(p, ex, shift):
  y = jax.lax.conv_general_dilated(
    ex["x"][None],
    p["w"],
    (2, 1),
    ((1, 0), (0, 0)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  x = jnp.pad(ex["x"], ((1, 0), (0, 0), (0, 0)))
  patches = [
    x[2 * i : 2 * i + 3, j : j + 2].reshape(-1)
    for i in range(2)
    for j in range(3)
  ]
  y = y + p["b"][None, None, None]
  return tail(y[0].reshape(6, 2) + shift), _biased(jnp.stack(patches))


def _stacked(p, ex, shift):
  def step(h, operands):
    p, shift = operands
    return jnp.tanh(h @ p["w"] + p["b"][None] + shift), _biased(h)

  y, inputs = jax.lax.scan(step, ex["x"], (p, shift))
  return tail(y), inputs


def _recurrence(p, ex, shift):
  def step(h, operands):
    x, shift = operands
    return jnp.tanh(h @ p["w"] + p["b"] + x + shift), h

  y, inputs = jax.lax.scan(step, jnp.ones(3, shift.dtype), (ex["x"], shift))
  return tail(y), _biased(inputs)


def _twice(p, ex, shift):
  h = jnp.tanh(ex["x"] @ p["w"] + p["b"][None] + shift[:5])
  y = h @ p["w"] + p["b"][None] + shift[5:]
  return tail(y), _biased(jnp.concatenate([ex["x"], h]))


def _embedded(p, ex, shift):
  return tail(p["w"][ex["ids"]] + shift), jax.nn.one_hot(
    ex["ids"], ROWS, dtype=shift.dtype
  )


def _scaled(p, ex, shift):
  """The gradient of a scale is summed over positions first."""
  return tail((p["w"] + shift)[None] * ex["x"]), jnp.ones((1, 1), shift.dtype)


def _biased(inputs_TxI):
  ones = jnp.ones((*inputs_TxI.shape[:-1], 1), inputs_TxI.dtype)
  return jnp.concatenate([inputs_TxI, ones], axis=-1)


# Model, parameters, example, shift of the outputs, [*stack, G, T, O].
MODELS = {
  "dense": (_dense, {"w": (3, 2), "b": (2,)}, (5, 3), (5, 2), (1, 5, 2)),
  "heads_out": (
    _heads_out,
    {"w": (3, 2, 4), "b": (2, 4)},
    (5, 3),
    (5, 2, 4),
    (1, 5, 8),
  ),
  "heads_in": (_heads_in, {"w": (2, 4, 3)}, (5, 2, 4), (5, 3), (1, 5, 3)),
  "experts": (_experts, {"w": (2, 3, 4)}, (2, 5, 3), (2, 5, 4), (2, 5, 4)),
  "convolution": (
    _convolved,
    {"w": (3, 2, 2, 2), "b": (2,)},
    (4, 4, 2),
    (6, 2),
    (1, 6, 2),
  ),
  "scan": (
    _stacked,
    {"w": (3, 3, 3), "b": (3, 3)},
    (5, 3),
    (3, 5, 3),
    (3, 1, 5, 3),
  ),
  "recurrent": (
    _recurrence,
    {"w": (3, 3), "b": (3,)},
    (4, 3),
    (4, 3),
    (1, 4, 3),
  ),
  "shared": (_twice, {"w": (3, 3), "b": (3,)}, (5, 3), (10, 3), (1, 10, 3)),
  "embedding": (_embedded, {"w": (ROWS, 3)}, (5,), (5, 3), (1, 5, 3)),
  "scale": (_scaled, {"w": (3,)}, (5, 3), (3,), (1, 1, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_second_moments_are_their_definition(name):
  model, shapes, example, shift_shape, outputs_shape = MODELS[name]
  data = "ids" if model is _embedded else "x"
  case = ELEMENTWISE["scale"]._replace(params=shapes, example={data: example})
  with jax.enable_x64(True):
    params, batch = materialize(case)
    shift = jnp.zeros(shift_shape)
    loss = lambda p, ex: model(p, ex, shift)[0]
    found = blocks.trace(loss, params, first(batch))
    assert list(found.blocks) == ["w"]
    got = collect(found, params, batch, MOMENTS)[0]["w"]

    def factors_of(ex):
      grad, inputs = jax.grad(model, 2, has_aux=True)(params, ex, shift)
      dy = grad.reshape(outputs_shape)
      return inputs.reshape(*dy.shape[:-1], -1), dy

    a, dy = jax.jit(jax.vmap(factors_of))(batch)
    inputs = jnp.einsum("b...ti,b...tj->...ij", a, a)
    if found.blocks["w"].kind == "lookup":
      inputs = jnp.diagonal(inputs, axis1=-2, axis2=-1)
    gram = jnp.einsum("b...to,b...tp->...op", dy, dy)
    np.testing.assert_allclose(got.inputs, inputs, atol=1e-12)
    np.testing.assert_allclose(got.outputs, gram, atol=1e-12)
    np.testing.assert_array_equal(got.positions, BATCH * a.shape[-2])


COORDINATES = {
  name: {**SITES, **CONTROL, **SHARED}[name]
  for name in (
    "positions",
    "heads_in",
    "conv2d_groups_bias",
    "transposed_table",
    "bias_in_the_weight",
    "folded_scan",
    "scan_of_some_layers",
    "fused_projections",
    "tied_embedding",
    "irregular_layers",
  )
}


@pytest.mark.parametrize("name", COORDINATES)
def test_blocks_and_trees_are_transposes(name):
  """<block, to_blocks(tree)> = <to_tree(block), tree>, each entry once."""
  case = COORDINATES[name]
  with jax.enable_x64(True):
    params, batch = materialize(case)
    found = blocks.trace(case.loss, params, first(batch))
    values = jax.jit(lambda p: blocks.to_blocks(found, p))(params)
    size = sum(block.size for block in found.blocks.values())
    assert {k: v.size for k, v in values.items()} == {
      k: b.size for k, b in found.blocks.items()
    }
    assert size <= sum(leaf.size for leaf in jax.tree.leaves(params))
    rng = np.random.default_rng(1)
    other = {
      k: jnp.asarray(rng.normal(size=v.shape)) for k, v in values.items()
    }
    tree = jax.jit(lambda x: blocks.to_tree(found, x))(other)
    again = jax.jit(lambda x: blocks.to_blocks(found, x))(tree)
    dot = lambda x, y: sum(
      jnp.vdot(u, v)
      for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )
    np.testing.assert_allclose(dot(other, values), dot(tree, params))
    chex.assert_trees_all_close(again, other)


LANES = {
  name: {**SITES, **CONTROL, **SHARED}[name]
  for name in (
    "positions",
    "index",
    "recurrent",
    "switch",
    "tied_embedding",
  )
}


@pytest.mark.parametrize("name", LANES)
def test_padding_counts_for_nothing(name):
  """A batch padded with NaN gives the statistics of the batch without."""
  case = LANES[name]
  with jax.enable_x64(True):
    params, batch = materialize(case)
    lanes = jnp.asarray([1.0, 1.0, 0.0, 1.0])
    spoiled = jax.tree.map(
      lambda x: (
        x.at[2].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
      ),
      batch,
    )
    found = blocks.trace(case.loss, params, first(batch))
    statistics = (MOMENTS, NORMS)
    fewer = jax.tree.map(lambda x: x[lanes > 0], batch)
    got = collect(found, params, spoiled, *statistics, lanes=lanes)
    expected = collect(found, params, fewer, *statistics)
    chex.assert_trees_all_close(got[0], expected[0], atol=1e-12)
    for x, y in zip(
      jax.tree.leaves(got[1:]), jax.tree.leaves(expected[1:]), strict=True
    ):
      np.testing.assert_allclose(x[lanes > 0], y, atol=1e-12)
      np.testing.assert_array_equal(x[2], jnp.zeros_like(x[2]))


@pytest.mark.parametrize("name", ["siamese", "recurrent", "tied_embedding"])
def test_norms_of_shared_parameters_have_cross_terms(name):
  case = {**CONTROL, **SHARED}[name]
  with jax.enable_x64(True):
    params, batch = materialize(case)
    found = blocks.trace(case.loss, params, first(batch))
    (norms,) = collect(found, params, batch, NORMS)
    grads = jax.jit(jax.vmap(jax.grad(case.loss), (None, 0)))(params, batch)
    total = sum(
      jnp.sum(g.reshape(BATCH, -1) ** 2, axis=1) for g in jax.tree.leaves(grads)
    )
    np.testing.assert_allclose(sum(norms.values()), total, rtol=1e-12)
