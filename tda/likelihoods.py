"""Likelihoods: what a loss does with a model's outputs, for one example.

A `Likelihood` gives the loss as a function of the outputs, draws labels from
the model, and applies the output Hessian H = ∂²loss/∂outputs² and a square
root L of it (L Lᵀ = H). An `Objective` joins it to a model. Outputs below
float32 are raised to float32 first, and results come out in that dtype, so
bfloat16 logits do not meet a bfloat16 softmax; float64 stays.

Notation: C classes, T positions, V vocabulary entries.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
Loss = Callable[[PyTree, PyTree], jax.Array]  # (params, example) -> []

REDUCTIONS = ("sum", "mean")


def _one(target: PyTree) -> jax.Array:
  del target
  return jnp.ones(())


class Likelihood(NamedTuple):
  """Pure functions of ONE example's outputs and target.

  `factor` relates the loss to the density that `sample` draws from: loss =
  factor · (−log density) + constant. With g the gradient at a drawn label,
  E[g gᵀ] = factor · H, so a Fisher built from sampled labels divides g by
  √factor. It is 1 except for a mean over tokens.
  """

  loss: Callable[..., jax.Array]  # (outputs, target) -> []
  sample: Callable[..., PyTree]  # (key, outputs, target) -> target
  hessian: Callable[..., jax.Array]  # (outputs, target, v) -> H v
  sqrt_hessian: Callable[..., jax.Array]  # (outputs, target, u) -> L u
  factor: Callable[[PyTree], jax.Array] = _one  # target -> []


class Objective(NamedTuple):
  """A model's outputs, the likelihood on them, and where the target is.

  Of examples that are sequences `segments` says which part each position is of,
  example -> int [T], from 1 on: rows of several documents are attributed one by
  one, and padding, of part 0, is left out of the curvature's inputs.
  """

  outputs: Callable[[PyTree, PyTree], jax.Array]  # (params, example) -> array
  likelihood: Likelihood
  target: Callable[[PyTree], PyTree]  # example -> target
  segments: Callable[[PyTree], jax.Array] | None = None

  def loss(self, params: PyTree, example: PyTree) -> jax.Array:
    """The training loss of one example, a scalar."""
    outputs = self.outputs(params, example)
    return self.likelihood.loss(outputs, self.target(example))


def upcast(x: jax.typing.ArrayLike) -> jax.Array:
  """x in float32, or in its own dtype where that is wider."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def categorical() -> Likelihood:
  """Softmax cross entropy of logits [C] with an integer class.

  H = diag(p) − p pᵀ and L u = √p∘u − p (√p·u). A class outside 0..C−1 gives a
  loss of NaN rather than another class's.
  """

  def loss(outputs: jax.Array, target: jax.Array) -> jax.Array:
    logits_C, target = _one_class("categorical", outputs, target)
    return -_picked(jax.nn.log_softmax(logits_C), target)

  def sample(key: jax.Array, outputs: jax.Array, target: jax.Array) -> PyTree:
    logits_C, target = _one_class("categorical", outputs, target)
    return jax.random.categorical(key, logits_C).astype(target.dtype)

  def hessian(outputs: jax.Array, target: jax.Array, v: jax.Array) -> jax.Array:
    logits_C, _ = _one_class("categorical", outputs, target)
    return _softmax_hessian(logits_C, upcast(v))

  def sqrt_hessian(
    outputs: jax.Array, target: jax.Array, u: jax.Array
  ) -> jax.Array:
    logits_C, _ = _one_class("categorical", outputs, target)
    return _softmax_root(logits_C, upcast(u))

  return Likelihood(loss, sample, hessian, sqrt_hessian)


def gaussian(scale: float = 1.0) -> Likelihood:
  """Squared error ‖outputs − target‖² / (2 scale²), summed over the entries.

  This is −log N(target; outputs, scale² I) with the constant dropped; `scale`
  is a standard deviation in the target's unit. H = I / scale². Outputs and
  target have one shape, any.
  """
  if not (scale > 0 and math.isfinite(scale)):
    raise ValueError(
      f"gaussian(scale={scale!r}): the scale is a standard deviation, a"
      " finite number above 0."
    )

  def residual(outputs: jax.Array, target: jax.Array) -> jax.Array:
    if jnp.shape(outputs) != jnp.shape(target):
      raise ValueError(
        f"gaussian: outputs of shape {jnp.shape(outputs)} and target of shape"
        f" {jnp.shape(target)} differ; reshape one to the other."
      )
    return upcast(outputs) - upcast(target)

  def loss(outputs: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(residual(outputs, target))) / (2 * scale**2)

  def sample(key: jax.Array, outputs: jax.Array, target: jax.Array) -> PyTree:
    mean = residual(outputs, jnp.zeros_like(target))
    return mean + scale * jax.random.normal(key, mean.shape, mean.dtype)

  def hessian(outputs: jax.Array, target: jax.Array, v: jax.Array) -> jax.Array:
    del outputs, target
    return upcast(v) / scale**2

  def sqrt_hessian(
    outputs: jax.Array, target: jax.Array, u: jax.Array
  ) -> jax.Array:
    del outputs, target
    return upcast(u) / scale

  return Likelihood(loss, sample, hessian, sqrt_hessian)


def token_categorical(reduction: str = "sum") -> Likelihood:
  """Softmax cross entropy at each position: logits [T, V].

  The target is a tuple `(tokens [T] int, mask [T])`; a mask entry other than
  0 keeps its position. `reduction` is over the kept positions of one example:
  "sum", or "mean" = the sum divided by their number (H likewise). A masked
  position contributes exactly zero whatever its logits and token are, and an
  example with none kept has loss 0. Labels are drawn at the kept positions,
  each given the true previous tokens; mask and masked tokens are returned
  as they came.
  """
  if reduction not in REDUCTIONS:
    raise ValueError(
      f"token_categorical(reduction={reduction!r}): choose one of"
      f" {', '.join(map(repr, REDUCTIONS))}."
    )

  def factor(target: PyTree) -> jax.Array:
    if reduction == "sum":
      return jnp.ones(())
    return 1.0 / jnp.maximum(jnp.count_nonzero(target[1]), 1)

  def loss(outputs: jax.Array, target: PyTree) -> jax.Array:
    logits_TxV, tokens_T, kept_T = _tokens(outputs, target)
    log_p_T = _picked(
      jax.nn.log_softmax(logits_TxV), jnp.where(kept_T, tokens_T, 0)
    )
    total = -jnp.sum(jnp.where(kept_T, log_p_T, 0))
    return factor(target).astype(total.dtype) * total

  def sample(key: jax.Array, outputs: jax.Array, target: PyTree) -> PyTree:
    logits_TxV, tokens_T, kept_T = _tokens(outputs, target)
    drawn_T = jax.random.categorical(key, logits_TxV).astype(tokens_T.dtype)
    return jnp.where(kept_T, drawn_T, tokens_T), target[1]

  def hessian(outputs: jax.Array, target: PyTree, v: jax.Array) -> jax.Array:
    logits_TxV, _, kept_T = _tokens(outputs, target)
    v_TxV = jnp.where(kept_T[:, None], upcast(v), 0)
    curved_TxV = _softmax_hessian(logits_TxV, v_TxV)
    return factor(target).astype(curved_TxV.dtype) * curved_TxV

  def sqrt_hessian(
    outputs: jax.Array, target: PyTree, u: jax.Array
  ) -> jax.Array:
    logits_TxV, _, kept_T = _tokens(outputs, target)
    u_TxV = jnp.where(kept_T[:, None], upcast(u), 0)
    root_TxV = _softmax_root(logits_TxV, u_TxV)
    return jnp.sqrt(factor(target)).astype(root_TxV.dtype) * root_TxV

  return Likelihood(loss, sample, hessian, sqrt_hessian, factor)


def from_loss(loss: Loss) -> Objective:
  """An objective from a bare loss, whose "outputs" are the loss itself.

  Enough for gradients and for empirical labels; drawing labels or applying
  the output Hessian needs the model's outputs and raises `ValueError`.
  """

  def outputs(params: PyTree, example: PyTree) -> jax.Array:
    value = loss(params, example)
    if jnp.shape(value) != ():
      raise ValueError(
        f"from_loss: the loss returned shape {jnp.shape(value)}, not a scalar."
        " It takes ONE example; for a loss over a batch pass lambda params,"
        " example: loss(params, jax.tree.map(lambda x: x[None], example)), and"
        " reduce what it returns."
      )
    return value

  def unavailable(*_: Any) -> jax.Array:
    raise ValueError(
      "from_loss: sampled and exact labels need the model's outputs, and a bare"
      ' loss hides them. Use labels="empirical", or build an'
      " Objective(outputs, likelihood, target)."
    )

  def identity(outputs: jax.Array, target: PyTree) -> jax.Array:
    del target
    return upcast(outputs)

  likelihood = Likelihood(identity, unavailable, unavailable, unavailable)
  return Objective(outputs, likelihood, lambda example: None)


def margin(objective: Objective) -> Loss:
  """The measurement log(p / (1 − p)), p the probability of the true class.

  For outputs that are logits [C]; larger is more confident and right.
  """

  def measurement(params: PyTree, example: PyTree) -> jax.Array:
    logits_C, target = _one_class(
      "margin", objective.outputs(params, example), objective.target(example)
    )
    if logits_C.size < 2:
      raise ValueError(
        f"margin: logits of shape {logits_C.shape} have one class, whose"
        " probability is always 1; two or more are needed."
      )
    true_C = jnp.arange(logits_C.size) == target
    others = jax.nn.logsumexp(jnp.where(true_C, -jnp.inf, logits_C))
    return _picked(logits_C, target) - others

  return measurement


def _softmax_hessian(logits: jax.Array, v: jax.Array) -> jax.Array:
  """(diag(p) − p pᵀ) v along the last axis.

  Two terms, not p (v − p·v): XLA of JAX 0.10 compiles that one to wrong numbers
  on a CPU, where many v share one p.
  """
  p = jax.nn.softmax(logits)
  return p * v - p * jnp.vecdot(p, v)[..., None]


def _softmax_root(logits: jax.Array, u: jax.Array) -> jax.Array:
  """√p∘u − p (√p·u) along the last axis; two terms, as above."""
  p = jax.nn.softmax(logits)
  root = jnp.sqrt(p)
  return root * u - p * jnp.vecdot(root, u)[..., None]


def _picked(values: jax.Array, index: jax.Array) -> jax.Array:
  """values[..., index], or NaN where the index is out of range."""
  inside = (index >= 0) & (index < values.shape[-1])
  safe = jnp.where(inside, index, 0)
  picked = jnp.take_along_axis(values, safe[..., None], axis=-1)[..., 0]
  return jnp.where(inside, picked, jnp.nan)


def _one_class(
  name: str, outputs: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Checked float32 logits [C] and integer class []."""
  logits_C, target = upcast(outputs), jnp.asarray(target)
  if logits_C.ndim != 1 or target.shape != ():
    raise ValueError(
      f"{name}: outputs of shape {logits_C.shape} and target of shape"
      f" {target.shape}; it takes the logits [C] and the class [] of ONE"
      " example (index a batch axis away, or use token_categorical for"
      " logits [T, V])."
    )
  _check_integer(name, target)
  return logits_C, target


def _tokens(
  outputs: jax.Array, target: PyTree
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Checked float32 logits [T, V], tokens [T] and whether each is kept [T].

  Masked logits become 0, so that a NaN there stays out of every gradient.
  """
  if not (isinstance(target, tuple | list) and len(target) == 2):
    raise ValueError(
      "token_categorical: the target is a tuple (tokens [T], mask [T]), not"
      f" {jax.tree.map(jnp.shape, target)}; without padding use"
      " (tokens, jnp.ones_like(tokens))."
    )
  logits_TxV = upcast(outputs)
  tokens_T, mask_T = map(jnp.asarray, target)
  shapes = logits_TxV.shape, tokens_T.shape, mask_T.shape
  if logits_TxV.ndim != 2 or {shapes[1], shapes[2]} != {shapes[0][:1]}:
    raise ValueError(
      "token_categorical: outputs, tokens and mask of shapes"
      f" {shapes[0]}, {shapes[1]}, {shapes[2]}; it takes [T, V], [T] and [T] of"
      " ONE example."
    )
  _check_integer("token_categorical", tokens_T)
  kept_T = mask_T != 0
  return jnp.where(kept_T[:, None], logits_TxV, 0), tokens_T, kept_T


def _check_integer(name: str, target: jax.Array) -> None:
  if not jnp.issubdtype(target.dtype, jnp.integer):
    raise ValueError(
      f"{name}: target of dtype {target.dtype} and shape {target.shape}; class"
      " indices are integers (argmax of a one-hot, or gaussian() for"
      " regression)."
    )
