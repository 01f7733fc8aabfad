"""What a decoder says: the most likely tokens, one after another."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from tda.models.config import DecoderConfig
from tda.models.decoder import Decoder

PyTree = Any
AT_A_TIME = 8  # prompts whose logits [T, V] are held


def greedy(
  config: DecoderConfig,
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  count: int,
  *,
  end: int | None = None,
  label: str | None = None,
) -> list[list[int]]:
  """Continuations of the prompts by at most `count` tokens.

  Each token is a forward pass over whole rows, without a cache of keys and
  values: for a few answers that are asked about, not for serving.

  Args:
    config: of the decoder.
    params: of the decoder.
    prompts: token ids of each, one or more.
    count: tokens to add.
    end: a token that ends a continuation, and is not in it.
    label: of the progress bar; None shows none.

  Raises:
    ValueError: an empty prompt, or one that leaves no room for `count` tokens.
  """
  sizes = np.array([len(prompt) for prompt in prompts])
  if not len(sizes) or not sizes.all() or count < 1:
    raise ValueError(
      f"prompts of {sizes.tolist()} tokens, {count} to add: one or more of each"
    )
  length = int(sizes.max()) + count
  if length > config.max_length:
    raise ValueError(
      f"a prompt of {sizes.max()} tokens and {count} to add are more than the"
      f" context, {config.max_length}"
    )
  tokens_QxT = np.zeros((len(sizes), length), np.int32)
  for row, prompt in zip(tokens_QxT, prompts, strict=True):
    row[: len(prompt)] = prompt
  module = Decoder(config)

  @jax.jit
  def following(params: PyTree, tokens_QxT: jax.Array, at_Q: jax.Array):
    def token(row: tuple[jax.Array, jax.Array]) -> jax.Array:
      row_T, at = row
      logits_TxV = cast(jax.Array, module.apply({"params": params}, row_T))
      return logits_TxV[at].argmax()

    return jax.lax.map(token, (tokens_QxT, at_Q), batch_size=AT_A_TIME)

  each = np.arange(len(sizes))
  ended_Q = np.zeros(len(sizes), bool)
  with tqdm.tqdm(
    total=count, desc=label, unit="token", disable=not label
  ) as bar:
    for step in range(count):
      found_Q = following(params, jnp.asarray(tokens_QxT), sizes + step - 1)
      tokens_QxT[each, sizes + step] = found_Q
      ended_Q |= np.asarray(found_Q) == end
      bar.update()
      if ended_Q.all():
        break
  said = [
    row[size : size + count].tolist()
    for row, size in zip(tokens_QxT, sizes, strict=True)
  ]
  return [one[: one.index(end)] if end in one else one for one in said]
