"""What `influence_lm` asks: a corpus, prompts, and the model's answers."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments import influence_kinds, language
from experiments.language import Model
from tda import records
from tda.attribution import language as attribution
from tda.data import facts, retrieval, text
from tda.data.packing import Rows
from tda.data.text import Tokenizer
from tda.evaluation.workdir import Workdir
from tda.models import generation

SITES = ("mlp", "linear")


class Task(NamedTuple):
  """A corpus, what is asked of it, and what is known to be right."""

  names: list[str]
  texts: list[str]
  pairs: list[tuple[str, str]]
  kinds: np.ndarray | None = None  # [D], of planted documents
  fact: np.ndarray | None = None  # [D]
  # Documents that were held out, each asked for its second half: names [Q].
  held: tuple[str, ...] = ()
  # Of a planted fact's words, each [Q].
  orders: Mapping[str, list[str]] = MappingProxyType({})

  def of_fact(self) -> np.ndarray:
    """Which planted documents are on the fact of each query, bool [D, Q]."""
    assert self.fact is not None
    return self.fact[:, None] == np.arange(len(self.pairs))

  def copies(self) -> np.ndarray:
    """Which of these are copies, that are to be found."""
    assert self.kinds is not None
    return self.of_fact() & (self.kinds == "copy")[:, None]


def asked(setting: ConfigDict, *, queries: bool = True) -> Task:
  """The documents of a setting, and its queries unless they come later."""
  if setting.sites not in SITES:
    raise ValueError(
      f"sites={setting.sites!r}: gradients of documents are those of {SITES}"
    )
  if setting.tune and not setting.model:
    raise ValueError("there is nothing to tune: give --config.model")
  if setting.documents == "planted":
    if setting.facts < 2 or setting.copies < 1:
      raise ValueError(
        f"{setting.facts} facts with {setting.copies} copies: take 2 facts or"
        " more, and 1 copy or more, which are what is looked for"
      )
    corpus = language.planted(setting)
    pairs = list(zip(corpus.prompts, corpus.answers, strict=True))
    known = zip(corpus.kinds, corpus.fact, strict=True)
    return Task(
      [f"{kind} of fact {fact}, {i}" for i, (kind, fact) in enumerate(known)],
      corpus.documents,
      pairs,
      corpus.kinds,
      corpus.fact,
      orders=facts.orders(corpus),
    )
  if not setting.documents:
    raise ValueError(
      "no documents: give --config.documents, a folder or a file.jsonl"
    )
  texts = text.documents(setting.documents, setting.pattern)
  names = [*texts][: setting.limit or None]
  if setting.ask and not setting.prompts:
    held = influence_kinds.drawn(names, setting.ask, setting.seed)
    names = [name for name in names if name not in held]
    pairs = [influence_kinds.halves(texts[name]) for name in held]
    return Task(names, [texts[x] for x in names], pairs, held=tuple(held))
  if not queries:
    return Task(names, [texts[name] for name in names], [])
  prompts = setting.prompts
  completions = setting.completions or [""] * len(prompts)
  if len(prompts) != len(completions) or not prompts:
    raise ValueError(
      f"{len(prompts)} prompts and {len(completions)} completions: give"
      " --config.prompts and --config.completions, tuples of text of the same"
      " length, or prompts alone, for what the model answers, or --config.ask,"
      " a number of documents"
    )
  pairs = list(zip(prompts, completions, strict=True))
  return Task(names, [texts[name] for name in names], pairs)


def check_prompts(
  setting: ConfigDict, tokenizer: Tokenizer, task: Task
) -> None:
  """Refuses prompts that leave no room for an answer, before any training."""
  for prompt, _ in task.pairs:
    size = len(tokenizer.encode(prompt))
    if not 0 < size <= setting.length - setting.answer_tokens:
      raise ValueError(
        f"the prompt {prompt!r} has {size} tokens, and its answer up to"
        f" {setting.answer_tokens}: together they are to be at most"
        f" --config.length={setting.length}"
      )


def answered(
  setting: ConfigDict, workdir: Workdir, model: Model, task: Task
) -> tuple[Task, Rows]:
  """The task with what the model itself says, and the queries of that."""
  by, prompts = model.tokenizer, [prompt for prompt, _ in task.pairs]
  tokens = [list(by.encode(prompt)) for prompt in prompts]

  def compute():
    found = generation.greedy(
      model.config,
      model.params,
      tokens,
      setting.answer_tokens,
      end=by.end,
      label="answers",
    )
    padded = np.full((len(found), setting.answer_tokens), -1)
    for row, one in zip(padded, found, strict=True):
      row[: len(one)] = one
    return {"answers": padded}

  which = records.digest({"prompts": np.array(prompts)})[:8]
  which = f"answers_{which}_{setting.answer_tokens}"
  rows = workdir.stage(which, compute)["answers"]
  ids = [row[row >= 0].tolist() for row in rows]
  silent = [prompts[i] for i, one in enumerate(ids) if not one]
  if silent:
    raise ValueError(
      f"the model ends after {silent[0]!r} without a word: ask otherwise, or"
      " give --config.completions"
    )
  pairs = [(prompts[i], by.decode(one)) for i, one in enumerate(ids)]
  workdir.record("answers", [list(pair) for pair in pairs])
  # Of the tokens themselves: text need not come back as the same ones.
  said = list(zip(tokens, ids, strict=True))
  queries = attribution.completions(said, by, setting.length)
  return task._replace(pairs=pairs), queries


def lexical(task: Task) -> dict[str, np.ndarray]:
  """Scores [D, Q] by the words that documents and queries share."""
  count = len(task.texts)
  words, _ = text.words([*task.texts, *map("".join, task.pairs)])
  of = {"bm25": retrieval.bm25, "tfidf": retrieval.tfidf}
  return {k: score(words[:count], words[count:]) for k, score in of.items()}


def own(
  orders: Mapping[str, list[str]],
  of_texts: Callable[[list[str]], np.ndarray],
) -> np.ndarray:
  """Scores of each query's own text in every order, [orders + 1, Q].

  Last the mean over the first order of the other queries' texts.
  """
  if not orders:
    return np.zeros((0, 0))
  values = of_texts([text for many in orders.values() for text in many])
  each = values.reshape(len(orders), -1, values.shape[1])
  mine = np.diagonal(each, axis1=1, axis2=2)
  others = (each[0].sum(axis=0) - mine[0]) / (len(each[0]) - 1)
  return np.vstack([mine, others])
