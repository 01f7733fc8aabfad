"""Statistics on cotangents: precision, devices, staging, operands."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capture_cases import SITES
from capture_checks import (
  MOMENTS,
  collect,
  first,
  materialize,
  tail,
)
from control_cases import CONTROL, layer, scanned
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tda import blocks, factors, taps


def _dense_inputs(block, parts, lanes, operand):
  if isinstance(parts, factors.Outer):
    return parts
  inputs = jax.nn.one_hot(parts.ids, parts.rows, dtype=parts.dy.dtype)
  return factors.Outer(inputs[:, None], parts.dy[:, None])


PARTS = taps.Statistic(_dense_inputs, True, lambda block: True)


@pytest.mark.parametrize("name", ["positions", "conv1d", "index", "scan"])
def test_bfloat16_is_accumulated_in_float32(name):
  """The only difference to `vmap(grad)` is that its sums are rounded.

  T products of bfloat16 numbers, summed with a relative error of at most eps
  each time, err by at most (T + 1) eps sum|dy||a|.
  """
  case = {**SITES, **CONTROL}[name]
  params, batch = materialize(case, jnp.bfloat16)
  found = blocks.trace(case.loss, params, first(batch))
  got, parts = collect(found, params, batch, taps.GRADIENT, PARTS)
  grad = lambda p, ex: blocks.to_blocks(found, jax.grad(case.loss)(p, ex))
  expected = jax.jit(jax.vmap(grad, (None, 0)))(params, batch)
  for key, grad in got.items():
    assert grad.dtype == jnp.float32
    part = jax.tree.map(lambda x: x.astype(jnp.float32), parts[key])
    positions = part.dy.shape[-2]
    magnitude = jax.tree.map(jnp.abs, part)
    stack = len(found.blocks[key].stack)
    gradient = factors.gradient
    for _ in range(stack):
      gradient = jax.vmap(gradient, 1, 1)
    bound = gradient(magnitude) * (positions + 1)
    eps = lambda dtype: float(jnp.finfo(dtype).eps)
    exact = gradient(part)
    chex.assert_tree_all_finite(grad)
    assert (jnp.abs(grad - exact) <= eps(jnp.float32) * bound).all()
    error = jnp.abs(expected[key].astype(jnp.float32) - grad)
    assert (error <= eps(jnp.bfloat16) * bound).all()


def test_gradients_of_a_bfloat16_scale_are_summed_in_float32():
  """1 + 2⁻⁹ + ... + 2⁻⁹ stays 1 when every sum is rounded to bfloat16."""
  x = jnp.full((512, 1), 2.0**-9, jnp.bfloat16).at[0].set(1)
  loss = lambda p, ex: jnp.sum((p["w"][None] * ex["x"]).astype(jnp.float32))
  params = {"w": jnp.ones(1, jnp.bfloat16)}
  found = blocks.trace(loss, params, {"x": x})
  (got,) = collect(found, params, {"x": x[None]}, taps.GRADIENT)
  np.testing.assert_allclose(got["w"], np.full((1, 1, 1, 1), 1 + 511 / 512))


def test_statistics_follow_the_sharding_of_data_and_model():
  """On a mesh of 4 x 2 devices, without an annotation."""
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )
  put = lambda x, *axes: jax.device_put(
    x, NamedSharding(mesh, PartitionSpec(*axes))
  )

  def loss(p, ex):
    h = jnp.tanh(scanned(p["layers"], ex["x"]))
    return tail(jnp.tanh(h @ p["up"]) @ p["down"])

  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    "layers": {"w": draw(2, 4, 4), "b": draw(2, 4)},
    "up": draw(4, 8),
    "down": draw(8, 4),
  }
  batch = {"x": draw(8, 2, 4)}
  found = blocks.trace(loss, params, first(batch))

  @jax.jit
  def run(params, batch):
    outputs, backward = taps.linearize(found, taps.GRADIENT)(params, batch)
    _, total = taps.linearize(found, MOMENTS)(params, batch)
    ones = jnp.ones_like(outputs)
    return backward(ones), total(ones)

  expected = run(params, batch)
  placed = {
    "layers": {
      "w": put(params["layers"]["w"], None, None, "model"),
      "b": put(params["layers"]["b"], None, "model"),
    },
    "up": put(params["up"], None, "model"),
    "down": put(params["down"], "model"),
  }
  grads, moments = run(placed, {"x": put(batch["x"], "data")})
  chex.assert_trees_all_close((grads, moments), expected, rtol=2e-5, atol=1e-5)
  local = lambda x: x.addressable_shards[0].data.shape
  assert local(grads["up"])[0] == 2
  assert math.prod(local(grads["up"])) == grads["up"].size // 8
  assert math.prod(local(grads["down"])) == grads["down"].size // 8
  assert local(grads["layers/w"])[0] == 2


def test_the_loss_is_traced_once():
  calls = []

  def loss(p, ex):
    calls.append(1)
    return tail(layer(p, ex["x"]))

  case = CONTROL["jit"]
  params, batch = materialize(case, np.float32)
  found = blocks.trace(loss, params, first(batch))
  assert len(calls) == 1

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(params, batch):
    outputs, backward = taps.linearize(found, taps.GRADIENT)(params, batch)
    return backward(jnp.ones_like(outputs))

  run(params, batch)
  run(params, jax.tree.map(lambda x: 2 * x, batch))
  assert len(calls) == 1


def test_an_ensemble_of_parameters_is_vmapped():
  """Statistics of several models at once, as in a bank of retrainings."""
  case = CONTROL["cond_on_example"]
  with jax.enable_x64(True):
    _, batch = materialize(case)
    models = [materialize(case, seed=seed)[0] for seed in range(3)]
    found = blocks.trace(case.loss, models[0], first(batch))

    @jax.jit
    def moments(params):
      outputs, backward = taps.linearize(found, MOMENTS)(params, batch)
      return backward(jnp.ones_like(outputs))

    stack = lambda *x: jnp.stack(x)
    got = jax.vmap(moments)(jax.tree.map(stack, *models))
    expected = jax.tree.map(stack, *map(moments, models))
    chex.assert_trees_all_close(got, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["scan", "recurrent", "cond_in_scan"])
def test_operands_ride_the_scans_of_their_block(name):
  """A statistic that rotates each layer by a basis of its own."""
  rotated = taps.Statistic(
    lambda block, parts, lanes, operand: factors.gradient(
      factors.rotate(parts, *operand)
    ),
    per_example=True,
    linear=lambda block: True,
  )
  case = CONTROL[name]
  params, batch = materialize(case, np.float32)
  found = blocks.trace(case.loss, params, first(batch))
  stack = found.blocks["w"].stack
  rng = np.random.default_rng(0)
  bases = [
    jnp.asarray(rng.normal(size=(*stack, 1, n, n)), jnp.float32) for n in (4, 3)
  ]
  (got,) = collect(found, params, batch, rotated, operands={"w": bases})
  (grads,) = collect(found, params, batch, taps.GRADIENT)
  expected = jnp.einsum("b...oi,...ij,...op->b...pj", grads["w"], *bases)
  np.testing.assert_allclose(got["w"], expected, rtol=1e-4, atol=1e-4)
