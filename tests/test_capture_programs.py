"""Control flow, frameworks, selection: capture reads any pure function."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capture_checks import (
  Case,
  check_case,
  check_gradients,
  collect,
  first,
  materialize,
  tail,
)
from control_cases import CONTROL, layer
from flax import nnx
from sharing_cases import GENERIC, SHARED

from tda import blocks, taps

PROGRAMS = {**CONTROL, **SHARED, **GENERIC}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name):
  check_case(PROGRAMS[name])


@pytest.mark.parametrize("name", ["nothing_saveable", "dots_saveable"])
def test_remat_keeps_its_policy(name):
  """Products are computed again in the backward pass, or they are not."""
  policy = getattr(jax.checkpoint_policies, name)
  step = jax.checkpoint(layer, policy=policy)
  loss = lambda p, ex: tail(step(p, step(p, ex["x"])))
  params, batch = materialize(CONTROL["remat"], np.float32)
  found = blocks.trace(loss, params, first(batch))

  def captured(params, batch):
    outputs, backward = taps.linearize(found, taps.GRADIENT)(params, batch)
    return backward(jnp.ones_like(outputs))

  def products(fn):
    text = jax.jit(fn).lower(params, batch).as_text()
    return text.count("stablehlo.dot_general")

  plain = products(jax.vmap(jax.grad(loss), (None, 0)))
  assert products(captured) == plain
  # Two layers: forward, inputs' gradient of one, and two of weights. Without
  # saving, both forward products once more.
  assert plain == {"dots_saveable": 5, "nothing_saveable": 7}[name]


class Block(nn.Module):
  """Attention and a feed-forward layer, as a scan's body."""

  @nn.compact
  def __call__(self, h, _):
    x = nn.LayerNorm()(h)
    q, k, v = (
      nn.DenseGeneral((2, 3), name=name)(x)
      for name in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
    x = jnp.einsum("hts,shd->thd", weights, v)
    h = h + nn.DenseGeneral(4, axis=(-2, -1), name="out")(x)
    return h + nn.Dense(4)(nn.gelu(nn.Dense(6)(h))), None


class Decoder(nn.Module):
  """Embedding, convolution, scanned and rematerialised blocks, head."""

  @nn.compact
  def __call__(self, ids):
    h = nn.Embed(6, 4)(ids)
    h = nn.Conv(4, (3,))(h[None])[0]
    stack = nn.scan(
      nn.remat(Block, prevent_cse=False),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=2,
    )
    h, _ = stack(name="blocks")(h, None)
    return nn.Dense(6, use_bias=False)(nn.RMSNorm()(h))


def _linen():
  model = Decoder()
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.arange(5))
  loss = lambda p, ex: tail(jax.nn.log_softmax(model.apply(p, ex["ids"])))
  return loss, params, {"ids": (5,)}


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 3, (2, 2), strides=2, rngs=rngs)
    self.norm = nnx.LayerNorm(3, rngs=rngs)
    self.head = nnx.Linear(12, 4, rngs=rngs)

  def __call__(self, x):
    h = self.norm(nnx.relu(self.conv(x)))
    return self.head(h.reshape(-1))


def _nnx():
  graph, state = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))
  loss = lambda state, ex: tail(nnx.merge(graph, state)(ex["x"]))
  return loss, state, {"x": (4, 4, 1)}


class Network(eqx.Module):
  conv: eqx.nn.Conv2d
  norm: eqx.nn.LayerNorm
  mlp: eqx.nn.MLP

  def __init__(self, key):
    keys = jax.random.split(key)
    self.conv = eqx.nn.Conv2d(1, 3, 2, stride=2, key=keys[0])
    self.norm = eqx.nn.LayerNorm(3)
    self.mlp = eqx.nn.MLP(3, 2, 5, 2, key=keys[1])

  def __call__(self, x):
    h = jax.nn.relu(self.conv(x)).reshape(3, -1).T
    return jax.vmap(lambda x: self.mlp(self.norm(x)))(h)


def _equinox():
  model = eqx.filter_eval_shape(Network, jax.random.key(0))
  is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  params, static = eqx.partition(model, is_shape)
  loss = lambda p, ex: tail(eqx.combine(p, static)(ex["x"]))
  return loss, params, {"x": (1, 4, 4)}


FRAMEWORKS = {
  "linen": (
    _linen,
    {
      "params/Embed_0/embedding": "lookup",
      "params/Conv_0/kernel": "matrix",
      "params/blocks/LayerNorm_0/scale": "vector",
      "params/blocks/LayerNorm_0/bias": "vector",
      "params/blocks/query/kernel": "matrix",
      "params/blocks/key/kernel": "matrix",
      "params/blocks/value/kernel": "matrix",
      "params/blocks/out/kernel": "matrix",
      "params/blocks/Dense_0/kernel": "matrix",
      "params/blocks/Dense_1/kernel": "matrix",
      "params/RMSNorm_0/scale": "vector",
      "params/Dense_0/kernel": "matrix",
    },
  ),
  "nnx": (
    _nnx,
    {
      "conv/kernel": "matrix",
      "norm/scale": "vector",
      "norm/bias": "vector",
      "head/kernel": "matrix",
    },
  ),
  "equinox": (
    _equinox,
    {
      "conv/weight": "matrix",
      "norm/weight": "vector",
      "norm/bias": "vector",
      "mlp/layers/0/weight": "matrix",
      "mlp/layers/1/weight": "matrix",
      "mlp/layers/2/weight": "matrix",
    },
  ),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_framework(name):
  """Every parameter has a site; all biases of linear layers are merged."""
  make, kinds = FRAMEWORKS[name]
  with jax.enable_x64(True):
    loss, shapes, example = make()
    leaves, treedef = jax.tree.flatten(shapes)
    drawn, batch = materialize(
      Case(loss, [leaf.shape for leaf in leaves], example, {})
    )
    params = jax.tree.unflatten(treedef, drawn)
    found = blocks.trace(loss, params, first(batch), strict=True)
    got = {b.name.removesuffix("/value"): b.kind for b in found.blocks.values()}
    assert got == kinds
    size = sum(block.size for block in found.blocks.values())
    assert size == sum(leaf.size for leaf in drawn)
    check_gradients(found, loss, params, batch, rtol=1e-9, atol=1e-10)


def test_keys_constants_and_several_outputs():
  """Dropout by a key in the example; outputs as a dict; a closed-over array."""
  mask = jnp.arange(3.0)[None]
  params, batch = materialize(CONTROL["jit"], np.float32)
  batch["key"] = jax.random.split(jax.random.key(0), 4)

  def fn(p, ex):
    h = layer(p, ex["x"] + mask)
    kept = jax.random.bernoulli(ex["key"], 0.5, h.shape)
    h = jnp.where(kept, h, 0)
    return {"first": h.sum(), "last": h @ p["w"]}

  @jax.jit
  def captured(params, batch):
    found = blocks.trace(fn, params, first(batch))  # inside of jit as well
    outputs, backward = taps.linearize(found, taps.GRADIENT)(params, batch)
    grads = backward(jax.tree.map(jnp.ones_like, outputs))
    return jax.vmap(lambda g: blocks.to_tree(found, g))(grads)

  def loss(p, ex):
    return sum(jnp.sum(x) for x in jax.tree.leaves(fn(p, ex)))

  expected = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
  chex.assert_trees_all_close(captured(params, batch), expected, rtol=1e-5)


def _mixed(p, ex):
  """A site, a generic leaf, a leaf of two parts and an unused one."""
  h = ex["x"] @ p["mlp"]["w"] + p["mlp"]["b"][None]
  return tail(h @ p["two"][0] @ p["two"][1] * jnp.exp(p["gain"]))


MIXED = {
  "mlp": {"w": (3, 3), "b": (3,)},
  "two": (2, 3, 3),
  "gain": (),
  "unused": (2,),
}


def _trace(**options):
  params, batch = materialize(
    Case(_mixed, MIXED, {"x": (2, 3)}, {}), np.float32
  )
  return blocks.trace(_mixed, params, first(batch), **options), params, batch


@pytest.mark.parametrize(
  ("select", "kept"),
  [
    (None, ["gain", "mlp/w", "two[0]", "two[1]"]),
    ("mlp/*", ["mlp/w"]),
    (["two[1]", "g*"], ["gain", "two[1]"]),
  ],
)
def test_selection_by_name(select, kept):
  found, params, batch = _trace(select=select)
  assert sorted(found.blocks) == kept
  assert {*found.blocks, *found.omitted} == {
    "gain",
    "mlp/w",
    "two[0]",
    "two[1]",
  }
  (got,) = collect(found, params, batch, taps.GRADIENT)
  grad = lambda p, ex: blocks.to_blocks(found, jax.grad(_mixed)(p, ex))
  expected = jax.jit(jax.vmap(grad, (None, 0)))(params, batch)
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
  tree = jax.eval_shape(lambda g: blocks.to_tree(found, g), first(got))
  chex.assert_trees_all_equal_shapes(tree, params)


@pytest.mark.parametrize(
  ("select", "words"),
  [
    (None, ["gain enters exp", "unused is never used"]),
    ("g*", ["gain enters exp"]),
    ("mlp/*", []),
  ],
)
def test_strict_names_what_no_site_covers(select, words):
  if not words:
    assert list(_trace(select=select, strict=True)[0].blocks) == ["mlp/w"]
    return
  with pytest.raises(ValueError, match="; ".join(words)):
    _trace(select=select, strict=True)


@pytest.mark.parametrize(
  ("params", "options", "words"),
  [
    ({"w": np.arange(3)}, {}, "'w' has dtype int32; only floating"),
    ({"w": np.ones(3)}, {"select": ["w", "k*"]}, r"'k\*' matches none"),
    ({"v": np.ones(3)}, {}, "no gradient by any"),
    ({"w": np.ones((2, 2))}, {}, "failed on ONE example"),
  ],
)
def test_bad_input(params, options, words):
  loss = lambda p, ex: jnp.sum(p.get("w", 1) * ex["x"])
  with pytest.raises(ValueError, match=words):
    blocks.trace(loss, params, {"x": np.ones(3, np.float32)}, **options)


def test_other_structures_than_traced():
  found, params, batch = _trace()
  run = taps.linearize(found, taps.GRADIENT)
  with pytest.raises(ValueError, match="function takes"):
    run(params["mlp"], batch)
  with pytest.raises(ValueError, match="'unused' has shape and dtype"):
    run({**params, "unused": jnp.ones(3)}, batch)
  with pytest.raises(ValueError, match="one example"):
    run(params, batch["x"])
  with pytest.raises(ValueError, match="rows differ in shape"):
    run(params, {"x": batch["x"][..., :2]})
