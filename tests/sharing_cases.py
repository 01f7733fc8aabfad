"""Losses that use parameters twice, or in no product with an activation."""

import functools

import jax
import jax.numpy as jnp
from capture_checks import Case, tail
from control_cases import (
  BIAS,
  LAYER,
  WEIGHT,
  at,
  layer,
  layers,
  of_layer,
  scanned,
)
from jax import lax


@jax.custom_jvp
def warped(x, w):
  """A product whose rule of derivative is not its derivative."""
  return x @ w


@warped.defjvp
def _(primals, tangents):
  (x, w), (dx, dw) = primals, tangents
  return x @ w, 3 * (dx @ w) + 2 * (x @ dw)


@jax.custom_vjp
def reflected(x, w):
  return x @ w


reflected.defvjp(
  lambda x, w: (x @ w, (x, w)),
  lambda res, dy: (dy @ res[1].T, -(res[0].T @ dy)),
)


@jax.custom_vjp
def clipped(x):
  return x


clipped.defvjp(lambda x: (x, None), lambda _, dy: (jnp.clip(dy, -0.3, 0.3),))


def _attention(p, x):
  q, k, v = (x @ p["w"][:, 3 * i : 3 * i + 3] for i in range(3))
  return jax.nn.softmax(q @ k.T) @ v


def _tied(p, x):
  return layer(p, p["table"][jnp.argmax(x, axis=1)]) @ p["table"].T


def _derivative(p, x):
  """A loss on the derivative of a network by its input."""
  return jax.grad(lambda x: jnp.sum(layer(p, x) ** 2))(x)


def _normalized(p, x):
  return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)[None]) * p["b"][None]


SHARED = {
  "custom_jvp": of_layer(
    lambda p, x: warped(layer(p, x), p["v"]),
    {"w": LAYER, "v": ("vector", (1, 9, 1))},
    {"v": "enters custom_jvp_call"},
    v=(3, 3),
  ),
  "custom_vjp": of_layer(
    lambda p, x: reflected(layer(p, x), p["v"]),
    {"w": LAYER, "v": ("vector", (1, 9, 1))},
    {"v": "enters custom_vjp_call"},
    v=(3, 3),
  ),
  "custom_vjp_on_activations": of_layer(lambda p, x: clipped(layer(p, x))),
  "siamese": of_layer(lambda p, x: layer(p, x) - layer(p, x[::-1] ** 2)),
  "twice_in_depth": of_layer(lambda p, x: layer(p, layer(p, x))),
  "transposed_twin": of_layer(
    lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["w"].T,
    {"w": ("diagonal", (1, 9, 1)), "b": BIAS},
    {"w": "is used in more than one layout"},
  ),
  "transposed_twin_same_bias": of_layer(
    lambda p, x: layer(p, x) @ p["w"].T + p["b"][None],
    {"w": ("diagonal", (1, 9, 1)), "b": BIAS},
    {"w": "is used in more than one layout"},
  ),
  "reversed_bias": of_layer(
    lambda p, x: layer(p, x) + x @ p["w"] + p["b"][::-1][None],
    {"w": WEIGHT, "b": ("diagonal", (1, 3, 1))},
    {"b": "is used in more than one layout"},
  ),
  "biases_reversed_together": of_layer(
    lambda p, x: layer(p, x) + jnp.sin(x**2 @ p["w"] + p["b"][::-1][None]),
    {"w": WEIGHT, "b": ("diagonal", (1, 3, 1))},
    {"b": "is used in more than one layout"},
  ),
  "sometimes_biased": of_layer(
    lambda p, x: layer(p, x @ p["w"]), {"w": WEIGHT, "b": BIAS}
  ),
  "bias_of_two_layers": of_layer(
    lambda p, x: layer(p, x) @ p["v"] + p["b"][None],
    {"w": WEIGHT, "b": BIAS, "v": WEIGHT},
    v=(3, 3),
  ),
  "regularised_bias": of_layer(
    lambda p, x: jnp.append(layer(p, x), p["b"] ** 2),
    {"w": WEIGHT, "b": BIAS},
    {"b": "enters integer_pow"},
  ),
  "scan_and_outside": of_layer(
    lambda p, x: layer(p, lax.fori_loop(0, 2, lambda _, h: layer(p, h), x))
  ),
  "two_scans": of_layer(
    lambda p, x: scanned(p, scanned(p, x)), layers(3), stack=(3,)
  ),
  "tied_embedding": of_layer(
    _tied,
    {"table": ("diagonal", (1, 9, 1)), "w": LAYER},
    {"table": "is used in more than one layout"},
    table=(3, 3),
  ),
  "fused_projections": Case(
    lambda p, ex: tail(_attention(p, ex["x"])),
    {"w": (3, 9)},
    {"x": (4, 3)},
    {f"w[{i}]": WEIGHT for i in range(3)},
  ),
  "unrolled_layers": of_layer(
    lambda p, x: functools.reduce(lambda h, i: layer(at(p, i), h), range(3), x),
    {f"w[{i}]": LAYER for i in range(3)},
    stack=(3,),
  ),
  "layers_in_reverse": of_layer(
    lambda p, x: x @ p["w"][2] @ p["w"][0] @ p["w"][1].T,
    {f"w[{i}]": WEIGHT for i in range(3)},
  )._replace(params={"w": (3, 3, 3)}),
  "irregular_layers": of_layer(
    lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][1].T + p["b"].sum(0)[None],
    {"w": ("diagonal", (1, 18, 1)), "b": ("vector", (1, 6, 1))},
    {"w": "is used in more than one layout", "b": "enters reduce_sum"},
    stack=(2,),
  ),
  "derivative_by_input": of_layer(
    _derivative,
    {"w": ("diagonal", (1, 9, 1)), "b": BIAS},
    {"w": "is used in more than one layout"},
  ),
}

GENERIC = {
  "weight_norm": of_layer(
    _normalized,
    {"w": ("vector", (1, 9, 1)), "b": BIAS},
    {"w": "meets another parameter in mul; meets only constants in div"},
  ),
  "masked": of_layer(
    lambda p, x: x @ (p["w"] * jnp.tri(3, dtype=x.dtype)) + p["b"][None],
    {"w": ("vector", (1, 9, 1)), "b": BIAS},
    {"w": "meets only constants in mul"},
  ),
  "merged_low_rank": of_layer(
    lambda p, x: x @ (p["w"] + p["down"] @ p["up"]) + p["b"][None],
    {
      "down": BIAS,
      "up": BIAS,
      "w": ("vector", (1, 9, 1)),
      "b": BIAS,
    },
    {
      "down": "meets another parameter in dot_general",
      "up": "meets another parameter in dot_general",
      "w": "meets only constants in add",
    },
    down=(3, 1),
    up=(1, 3),
  ),
  "low_rank_branch": of_layer(
    lambda p, x: layer(p, x) + x @ p["down"] @ p["up"],
    {
      "w": LAYER,
      "down": ("matrix", (1, 1, 3)),
      "up": ("matrix", (1, 3, 1)),
    },
    down=(3, 1),
    up=(1, 3),
  ),
  "softmax": of_layer(
    lambda p, x: layer(p, x) * jax.nn.softmax(p["gate"])[None],
    {"w": LAYER, "gate": BIAS},
    {"gate": ""},
    gate=(3,),
  ),
  "class_token": of_layer(
    lambda p, x: layer(p, jnp.concatenate([p["token"][None], x])),
    {"token": BIAS, "w": LAYER},
    {"token": "enters concatenate"},
    token=(3,),
  ),
  "penalty": of_layer(
    lambda p, x: jnp.append(layer(p, x), jnp.abs(p["v"])),
    {"w": LAYER, "v": BIAS},
    {"v": "enters abs"},
    v=(3,),
  ),
  "returned": Case(
    lambda p, ex: p["w"],
    {"w": ()},
    {"x": ()},
    {"w": ("vector", (1, 1, 1))},
    {"w": "is returned as it is"},
  ),
  "returned_by_a_branch": of_layer(
    lambda p, x: lax.cond(x.sum() > 0, lambda: p["b"], lambda: p["v"]) @ p["w"],
    {"b": BIAS, "v": BIAS, "w": WEIGHT},
    {"b": "is returned as it is", "v": "is returned as it is"},
    v=(3,),
  ),
  "returned_by_a_scan": of_layer(
    lambda p, x: lax.scan(lambda h, x: (h, h), p["b"], x)[1] @ p["w"],
    {"b": BIAS, "w": WEIGHT},
    {"b": "is returned as it is"},
  ),
  "broadcast_into_a_scan": of_layer(
    lambda p, x: layer(
      p,
      lax.scan(
        lambda h, v: (jnp.sin(h * v), None),
        x,
        jnp.broadcast_to(p["v"], (2, 2, 3)),
      )[0],
    ),
    {"v": BIAS, "w": LAYER},
    {"v": "is broadcast into a loop"},
    v=(3,),
  ),
  "empty": of_layer(
    lambda p, x: layer(p, x) + p["v"].sum(),
    {"w": LAYER, "v": ("vector", (1, 0, 1))},
    {"v": "enters reduce_sum"},
    v=(0,),
  ),
  "rounded": of_layer(
    lambda p, x: layer(p, x) * p["v"].astype(int).astype(x.dtype)[None], v=(3,)
  ),
  "stopped": of_layer(
    lambda p, x: layer(p, x) * lax.stop_gradient(p["v"])[None], v=(3,)
  ),
  "compared": of_layer(
    lambda p, x: layer(p, x) * (p["w"] > 0).astype(x.dtype)[:1]
  ),
}
