"""Tail-patch: what one more step on a document that was found does.

From the trained parameters a single step of an optimizer is taken on one
document, and the measurement of the query that it was found for is taken again
(Chang et al. 2024, §4.3, of log-probabilities of a completion). A method whose
first documents change it more has found more that the model can still learn
from; it need not be what the model learned from.

Notation: N documents, Q queries, k found for each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tda import streams
from tda.likelihoods import Loss, PyTree
from tda.streams import Loop


def tail_patch(
  loss: Loss,
  measurement: Loss,
  params: PyTree,
  train: PyTree,
  queries: PyTree,
  found: np.ndarray,
  optimizer: optax.GradientTransformation,
  *,
  opt_state: PyTree | None = None,
  loop: Loop = Loop(16),
) -> np.ndarray:
  """How much the measurement falls by a step on each document found [Q, k].

  Two forward passes and a gradient for each pair; a batch of pairs is computed
  one after another.

  Args:
    loss: (params, document) -> scalar.
    measurement: (params, query) -> scalar, as −log p of a completion.
    params: trained parameters.
    train: documents, pytree of arrays with leading axis N.
    queries: pytree of arrays with leading axis Q.
    found: places of documents [Q, k].
    optimizer: of the step.
    opt_state: its state, as at the end of training; a fresh one unless given.
    loop: how to run over the pairs.

  Raises:
    ValueError: places that are not those of documents, for each query.
  """
  n, count = streams.rows(train), streams.rows(queries)
  found = np.asarray(found)
  if (
    found.ndim != 2
    or len(found) != count
    or not found.size
    or not 0 <= found.min() <= found.max() < n
  ):
    raise ValueError(
      f"documents {found.shape} found for {count} queries among {n}: places"
      f" from 0 to {n - 1}, [queries, k]"
    )
  state = optimizer.init(params) if opt_state is None else opt_state
  places = found.reshape(-1)
  asked = np.repeat(np.arange(count), found.shape[1])
  pairs = {
    "document": jax.tree.map(lambda x: np.asarray(x)[places], train),
    "query": jax.tree.map(lambda x: np.asarray(x)[asked], queries),
  }

  def fall(args, pair):
    params, state = args
    grads = jax.grad(loss)(params, pair["document"])
    updates, _ = optimizer.update(grads, state, params)
    after = optax.apply_updates(params, updates)
    return measurement(params, pair["query"]) - measurement(
      after, pair["query"]
    )

  def run(args, batch):
    values = jax.lax.map(lambda pair: fall(args, pair), batch.rows)
    return values, jnp.isfinite(values)

  values = streams.each(run, (params, state), pairs, loop)
  return values.reshape(found.shape)
