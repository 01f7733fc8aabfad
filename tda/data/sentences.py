"""Planted facts as a data set: one document an example, its words the tokens.

Small enough that a model of it is trained anew by the hundred: what methods say
of a language model can be held against what happens without the documents.
"""

import numpy as np

from tda.data import facts, packing, text
from tda.data.datasets import Arrays, Dataset, checked_size

FACTS = 24  # unless train_size says otherwise


def planted(
  *, seed: int = 0, train_size: int = 0, test_size: int = 0
) -> Dataset:
  """The documents of `facts.planted`, shuffled, and a query for each fact.

  Rows have "x", "y", "segments" and "mask" [T] as in `tda.data.packing`, one
  document each, padded behind; queries are measured at their answers only.
  `relevant` are the documents that state the fact in the words of its query.

  Args:
    seed: of the facts and of the order.
    train_size: documents, a multiple of the 14 of each fact; 0 for 24 facts.
    test_size: queries; 0 for all facts.
  """
  each = len(facts.planted(1, seed).documents)
  count, rest = divmod(train_size, each)
  if rest or train_size < 0:
    raise ValueError(
      f"train_size={train_size}: each planted fact has {each} documents, take a"
      " multiple of that, or 0"
    )
  corpus = facts.planted(count or FACTS, seed)
  asked = checked_size("test_size", test_size, len(corpus.prompts))
  order = np.random.RandomState(seed).permutation(len(corpus.documents))
  documents = [corpus.documents[i] for i in order]
  sides = corpus.prompts[:asked], corpus.answers[:asked]
  words, known = text.words([*documents, *sides[0], *sides[1]])
  ended = [np.append(one, known) for one in words[: len(documents)]]
  prompts, answers = words[len(documents) : -asked], words[-asked:]
  length = max(map(len, ended)) - 1
  return Dataset(
    "planted",
    _rows([one[:1] for one in ended], [one[1:] for one in ended], length),
    _rows(prompts, answers, length),
    vocab=known + 1,
    relevant=facts.copies(corpus)[order, :asked],
  )


def _rows(
  prompts: list[np.ndarray], answers: list[np.ndarray], length: int
) -> Arrays:
  rows = [
    packing.completion(prompt.tolist(), answer.tolist(), length)
    for prompt, answer in zip(prompts, answers, strict=True)
  ]
  names = ("x", "y", "segments", "mask")
  return {name: np.stack([row[name] for row in rows]) for name in names}
