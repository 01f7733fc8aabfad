"""What a decoder says is what is most likely, token by token."""

import jax.numpy as jnp
import pytest
from language_models import draw, tiny

from tda.models import generation
from tda.models.decoder import Decoder

PROMPTS = ([3, 1, 4, 1, 5], [2], [9, 2, 6])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_token_is_the_most_likely_after_those_before(family):
  config = tiny(family)
  params = draw(config)
  found = generation.greedy(config, params, PROMPTS, 4)
  assert [len(one) for one in found] == [4] * 3
  for prompt, said in zip(PROMPTS, found, strict=True):
    whole = jnp.asarray([*prompt, *said])
    logits = Decoder(config).apply({"params": params}, whole)
    assert logits.argmax(axis=-1)[len(prompt) - 1 : -1].tolist() == said


def test_an_end_ends_and_is_left_out():
  config = tiny("llama")
  params = draw(config)
  whole = generation.greedy(config, params, PROMPTS, 4)
  end = whole[0][1]
  for full, cut in zip(
    whole, generation.greedy(config, params, PROMPTS, 4, end=end), strict=True
  ):
    assert cut == (full[: full.index(end)] if end in full else full)


def test_what_does_not_fit_is_told():
  config = tiny("llama")
  params = draw(config)
  for prompts, count, message in (
    (([],), 4, "tokens, 4 to add"),
    (([1],), 0, "0 to add"),
    (([1] * 13,), 4, "a prompt of 13 tokens and 4 .* context, 16"),
  ):
    with pytest.raises(ValueError, match=message):
      generation.greedy(config, params, prompts, count)
