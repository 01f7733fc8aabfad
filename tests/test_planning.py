"""Counts of operations against the products in the gradient's own jaxpr."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from tda import blocks, planning, streams
from tda.models.cnn import CNN
from tda.models.config import DecoderConfig
from tda.models.decoder import Decoder
from tda.models.mlp import MLP


def _products(jaxpr, times=1):
  """Multiply-adds of the matrix products in a jaxpr."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      inner = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
      total += times * inner * math.prod(eqn.outvars[0].aval.shape)
    for inner in core.jaxprs_in_params(eqn.params):
      length = eqn.params.get("length", 1) if "scan" in str(eqn) else 1
      total += _products(getattr(inner, "jaxpr", inner), times * length)
  return total


def _traced(module, x):
  params = module.init(jax.random.key(0), x)["params"]
  apply = lambda params, ex: module.apply({"params": params}, ex["x"])
  found = blocks.trace(apply, params, {"x": x}, select="*kernel")
  loss = lambda params: jnp.sum(jnp.sin(apply(params, {"x": x})))
  return found, jax.make_jaxpr(jax.grad(loss))(params).jaxpr


@pytest.mark.parametrize(
  "module",
  [
    MLP((7, 5)),
    Decoder(DecoderConfig(11, 8, 3, heads=2, max_length=6, scan_layers=True)),
    Decoder(DecoderConfig(11, 8, 3, heads=2, max_length=6, scan_layers=False)),
  ],
  ids=["mlp", "scanned", "unrolled"],
)
def test_a_plain_gradient_is_counted_as_it_is(module):
  x = jnp.zeros(6) if isinstance(module, MLP) else jnp.zeros(6, jnp.int32)
  found, jaxpr = _traced(module, x)
  # A bias is counted as one more input, whose gradient is a plain sum.
  biases = sum(
    math.prod(use.output.shape) * scans
    for block in found.blocks.values()
    for use in block.uses
    if use.bias is not None
    for scans in [math.prod(block.stack)]
  )
  leading = isinstance(module, MLP)
  extra = 3 * biases - (7 if leading else 0)
  assert planning.operations(found, None) == _products(jaxpr) + extra


def test_limits_of_one_dense_layer():
  loss = lambda params, ex: jnp.sum(jnp.sin(ex["x"] @ params["w"]))
  params, rows = {"w": jnp.zeros((8, 4))}, {"x": jnp.zeros((2, 16, 8))}
  found = blocks.trace(loss, params, streams.example(rows))
  forward = 16 * 8 * 4  # the data needs no gradient: backward is the weight's
  limit = lambda cost: planning.limit(found, cost)
  assert limit(planning.moments) == ((forward + 16 * (64 + 16)) / (2 * forward))
  # Rotating a gradient of 8 by 4 costs less than rotating 16 positions.
  assert limit(planning.squares) == (
    (2 * forward + 8 * 4 * (8 + 4)) / (2 * forward)
  )
  assert limit(planning.dots(3)) == (2 * forward + 3 * 8 * 4) / (2 * forward)


@pytest.mark.parametrize(
  ("queries", "batch", "expected"),
  [
    (1, 2, 5 * 3 * 50),  # by position
    (400, 200, 5 * 600 + 400 * 600 + 400 * 3 * 600 // 200),  # written out
  ],
)
def test_queries_of_low_rank_go_the_cheaper_way(queries, batch, expected):
  site = planning.Site("matrix", 5, (1, 20, 30))
  assert planning.low_rank_dots(queries, 3, batch)(site) == expected
  none_saved = planning.low_rank_dots(queries, 12, batch)
  assert none_saved(site) == planning.dots(queries)(site)
  lookup = planning.Site("lookup", 5, (1, 20, 30))
  assert planning.low_rank_dots(queries, 3, batch)(lookup) == queries * 5 * 150


def test_a_convolution_counts_its_patches():
  module = CNN((4,), 5, 3)
  found, _ = _traced(module, jnp.zeros((6, 6, 2)))
  conv = 9 * (9 * 2 + 1) * 4  # 3 x 3 positions, a bias
  dense, head = (9 * 4 + 1) * 5, 6 * 3
  assert planning.operations(found, None) == 2 * conv + 3 * (dense + head)
