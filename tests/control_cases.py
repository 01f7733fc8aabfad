"""Losses whose control flow capture must follow."""

import functools

import jax
import jax.numpy as jnp
from capture_checks import Case, tail
from jax import lax

WEIGHT = ("matrix", (1, 3, 3))  # a kernel [3, 3] alone
LAYER = ("matrix", (1, 3, 4))  # with its bias
BIAS = ("vector", (1, 3, 1))


def layer(p, x):
  """x [T, 3] through a kernel [3, 3] and a bias [3]."""
  return jnp.tanh(x @ p["w"] + p["b"][None])


def of_layer(
  apply, blocks=None, reasons=None, *, stack=(), x=(2, 3), **more
) -> Case:
  """A loss of a `layer`, its parameters stacked or not, and more parameters."""
  return Case(
    lambda p, ex: tail(apply(p, ex["x"])),
    {"w": (*stack, 3, 3), "b": (*stack, 3), **more},
    {"x": x},
    blocks or {"w": LAYER},
    reasons or {},
  )


def layers(*stack):
  return {"w": ("matrix", (*stack, *LAYER[1]))}


def at(p, i):
  return jax.tree.map(lambda v: v[i], p)


def scanned(p, x, **options):
  return lax.scan(lambda h, p: (layer(p, h), None), x, p, **options)[0]


def _nested(p, x):
  return lax.scan(lambda h, p: (scanned(p, h), None), x, p)[0]


def _rematerialized(p, x):
  step = jax.checkpoint(lambda h, p: (layer(p, h), None))
  return lax.scan(step, x, p)[0]


def recurrent(p, x, **options):
  def step(h, x):
    h = jnp.tanh(h @ p["w"] + p["b"] + x)
    return h, h

  return lax.scan(step, jnp.ones(3, x.dtype), x, **options)[1]


def _layers_inside_time(p, x):
  step = lambda h, x: (scanned(p, h) + x, None)
  return lax.scan(step, x[:1], x[:, None])[0]


def _learned_start(p, x):
  step = lambda h, x: (jnp.tanh(layer(p, h) + x), None)
  return lax.scan(step, p["start"][None], x[:, None])[0]


def _branch(predicate):
  def apply(p, x):
    other = lambda x: x @ p["other"]
    return lax.cond(predicate(p, x), lambda x: layer(p, x), other, x)

  return apply


def _switched(p, x):
  branches = [
    lambda x: layer(p, x),
    lambda x: x @ p["other"],
    lambda x: x * p["scale"][None],
  ]
  return lax.switch(jnp.argmax(x[0]), branches, x)


def _branch_in_scan(p, x):
  def step(h, p):
    return lax.cond(h.sum() > 0, layer, lambda p, h: h, p, h), None

  return lax.scan(step, x, p)[0]


def _infinite_branch(p, x):
  """The branch that is not taken has an infinite derivative."""
  h = layer(p, x)
  zero = h - lax.stop_gradient(h)
  root = lambda x: jnp.sqrt(x @ p["other"])
  return lax.cond(x.sum() > 9, root, lambda x: x @ p["other"], zero)


def _doublings(x):
  """A while loop of a length that depends on the example."""
  return lax.while_loop(
    lambda n: n < jnp.abs(x).sum(), lambda n: 2 * n, jnp.ones((), x.dtype)
  )


def _settled(w, x):
  unsettled = lambda h: jnp.sum(h**2) > 1e-2
  return lax.while_loop(unsettled, lambda h: jnp.sin(h @ w) / 4, x)


CONTROL = {
  "jit": of_layer(jax.jit(layer)),
  "nested_jit": of_layer(jax.jit(jax.jit(layer))),
  "bias_outside_jit": of_layer(
    lambda p, x: jax.jit(jnp.dot)(x, p["w"]) + p["b"][None],
    {"w": WEIGHT, "b": BIAS},
  ),
  "remat": of_layer(jax.checkpoint(layer)),
  "scan": of_layer(scanned, layers(3), stack=(3,)),
  "scan_reversed": of_layer(
    functools.partial(scanned, reverse=True), layers(3), stack=(3,)
  ),
  "scan_unrolled": of_layer(
    functools.partial(scanned, unroll=2), layers(3), stack=(3,)
  ),
  "scan_of_remat": of_layer(_rematerialized, layers(3), stack=(3,)),
  "nested_scan": of_layer(_nested, layers(2, 3), stack=(2, 3)),
  "folded_scan": of_layer(
    lambda p, x: _nested(
      jax.tree.map(lambda v: v.reshape(2, 3, *v.shape[1:]), p), x
    ),
    layers(2, 3),
    stack=(6,),
  ),
  "scan_of_some_layers": of_layer(
    lambda p, x: layer(at(p, 2), scanned(at(p, slice(2)), x)),
    {"w[0]": ("matrix", (2, *LAYER[1])), "w[1]": LAYER},
    stack=(3,),
  ),
  "recurrent": of_layer(recurrent, x=(4, 3)),
  "recurrent_unrolled": of_layer(
    functools.partial(recurrent, unroll=2), x=(4, 3)
  ),
  "recurrent_stacked": of_layer(
    lambda p, x: lax.scan(lambda x, p: (recurrent(p, x), None), x, p)[0],
    layers(3),
    stack=(3,),
    x=(4, 3),
  ),
  "layers_inside_time": of_layer(
    lambda p, x: lax.scan(
      lambda h, x: (scanned(p, h) + x, None), x[:1], x[:, None]
    )[0],
    layers(3),
    stack=(3,),
  ),
  "learned_start": of_layer(
    _learned_start,
    {"w": LAYER, "start": BIAS},
    {"start": "starts a loop"},
    start=(3,),
  ),
  "fori_loop": of_layer(
    lambda p, x: lax.fori_loop(0, 3, lambda _, h: layer(p, h), x)
  ),
  "fori_loop_over_layers": of_layer(
    lambda p, x: lax.fori_loop(0, 3, lambda i, h: layer(at(p, i), h), x),
    {"w": ("vector", (1, 27, 1)), "b": ("lookup", (1, 3, 3))},
    {"w": "enters dynamic_slice"},
    stack=(3,),
  ),
  "map": of_layer(lambda p, x: lax.map(lambda x: layer(p, x[None]), x)),
  "cond_on_example": of_layer(
    _branch(lambda p, x: x.sum() > 0),
    {"w": LAYER, "other": WEIGHT},
    other=(3, 3),
  ),
  "cond_on_constant": of_layer(
    _branch(lambda p, x: jnp.arange(3).sum() > 2),
    {"w": LAYER, "other": WEIGHT},
    other=(3, 3),
  ),
  "cond_on_parameter": of_layer(
    _branch(lambda p, x: (jnp.ones((1, 3)) @ p["w"]).sum() > 0),
    {"w": WEIGHT, "b": BIAS, "other": WEIGHT},
    other=(3, 3),
  ),
  "switch": of_layer(
    _switched,
    {"w": LAYER, "other": WEIGHT, "scale": BIAS},
    other=(3, 3),
    scale=(3,),
  ),
  "cond_in_scan": of_layer(_branch_in_scan, layers(3), stack=(3,)),
  "scan_in_cond": of_layer(
    lambda p, x: lax.cond(x.sum() > 0, scanned, lambda p, x: x, p, x),
    layers(3),
    stack=(3,),
  ),
  "cond_in_cond": of_layer(
    lambda p, x: lax.cond(
      x.sum() > 0,
      lambda x: lax.cond(x[0, 0] > 0, lambda x: layer(p, x), jnp.sin, x),
      jnp.cos,
      x,
    ),
  ),
  "cond_with_infinite_branch": of_layer(
    _infinite_branch, {"w": LAYER, "other": WEIGHT}, other=(3, 3)
  ),
  "while": of_layer(lambda p, x: layer(p, x) * _doublings(x)),
  "while_over_stopped_parameters": of_layer(
    lambda p, x: layer(p, x) + _settled(*lax.stop_gradient((p["w"], x)))
  ),
  "stopped_while": of_layer(
    lambda p, x: layer(p, x) + lax.stop_gradient(_settled(p["v"], x)),
    {"w": LAYER, "v": ("vector", (1, 9, 1))},
    {"v": "enters while"},
    v=(3, 3),
  ),
  "vmap": of_layer(lambda p, x: jax.vmap(lambda x: layer(p, x[None]))(x)),
  "vmap_over_parameters": of_layer(
    lambda p, x: jax.vmap(layer)(p, jnp.broadcast_to(x, (2, *x.shape))),
    {"w": ("matrix", (2, 3, 4))},
    stack=(2,),
  ),
}
