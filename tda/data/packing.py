"""Tokenised documents in rows of one length, several in a row.

Notation: T positions of a row, N rows, S pieces of documents.

A row is cut from T + 1 tokens: "x" are the first T, "y" the last T, so that
position t predicts y[t] from x[..t]. Pieces of documents stand one after
another; "segments" numbers them from 1 within a row, 0 where nothing stands.
"mask" is 1 where x[t] and y[t] are of the same piece: no prediction crosses
from a document to the next, and the first token of each is predicted by none.
"documents" says whose token y[t] is, as a place in the list of documents, and
-1 where the mask is 0: sums over it give each document's share of a row's loss.

A document of more than T + 1 tokens is cut into pieces that share one token,
the last target of one being the first input of the next: every token but the
document's first is predicted exactly once, each piece from its own beginning.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Rows = dict[str, np.ndarray]


class Piece(NamedTuple):
  """Tokens of a document, and its place in the list."""

  document: int
  tokens: np.ndarray


class Source:
  """Packed rows one by one: a `grain.sources.RandomAccessDataSource`.

  `grain.MapDataset.source(Source(rows))` is a data set of them.
  """

  def __init__(self, rows: Rows):
    self._rows = rows

  def __len__(self) -> int:
    return len(self._rows["x"])

  def __getitem__(self, index: int) -> Rows:
    return {name: x[index] for name, x in self._rows.items()}


def pack(
  documents: Sequence[np.ndarray],
  length: int,
  *,
  seed: int | None = None,
  vocab: int | None = None,
) -> Rows:
  """Rows of `length` positions that hold all documents.

  Pieces are taken in random order by `seed` (None: as they come) and each goes
  into the row with the least room that it fits in: the same arguments give the
  same rows, and few positions stay empty.

  Args:
    documents: token ids [any] of each, two or more.
    length: T.
    seed: of the order of the pieces.
    vocab: if given, ids are checked to be below it.

  Returns:
    {"x", "y", "segments", "documents", "mask"}: int32 [N, T].
  """
  _check(documents, length, vocab)
  pieces = list(_pieces(documents, length))
  if seed is not None:
    order = np.random.default_rng(seed).permutation(len(pieces))
    pieces = [pieces[i] for i in order]
  bins = _best_fit([len(piece.tokens) for piece in pieces], length + 1)
  rows = [_row([pieces[i] for i in inside], length) for inside in bins]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def completion(
  prompt: Sequence[int], answer: Sequence[int], length: int
) -> Rows:
  """One row [T] whose loss is that of the answer's tokens alone.

  The measurement of Grosse et al. (2023): −log p(answer | prompt), summed.
  """
  tokens = np.asarray([*prompt, *answer], np.int32)
  if not len(prompt) or not len(answer) or len(tokens) > length + 1:
    raise ValueError(
      f"a prompt of {len(prompt)} and an answer of {len(answer)} tokens: each"
      f" needs one or more, and both together at most {length + 1}, one more"
      " than the row's length"
    )
  row = _row([Piece(0, tokens)], length)
  row["mask"][: len(prompt) - 1] = 0
  row["documents"][: len(prompt) - 1] = -1
  return row


def filled(rows: Rows) -> float:
  """Share of positions that predict something."""
  return float(rows["mask"].mean())


def _pieces(documents: Sequence[np.ndarray], length: int) -> Iterator[Piece]:
  for number, document in enumerate(documents):
    for start in range(0, len(document) - 1, length):
      yield Piece(number, np.asarray(document[start : start + length + 1]))


def _best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
  """Places of the pieces in each row, in the order of opening."""
  bins: list[list[int]] = []
  left: list[list[int]] = [[] for _ in range(room + 1)]  # rows by room left
  for i, size in enumerate(sizes):
    space = next((k for k in range(size, room) if left[k]), room)
    if space == room:
      bins.append([])
      place = len(bins) - 1
    else:
      place = left[space].pop()
    bins[place].append(i)
    left[space - size].append(place)
  return bins


def _row(pieces: Sequence[Piece], length: int) -> Rows:
  tokens = np.zeros(length + 1, np.int32)
  segments = np.zeros(length + 1, np.int32)
  documents = np.full(length + 1, -1, np.int32)
  start = 0
  for number, piece in enumerate(pieces, 1):
    inside = slice(start, start + len(piece.tokens))
    tokens[inside], segments[inside] = piece.tokens, number
    documents[inside] = piece.document
    start = inside.stop
  mask = (segments[:-1] == segments[1:]) & (segments[1:] > 0)
  return {
    "x": tokens[:-1],
    "y": tokens[1:].copy(),
    "segments": segments[:-1],
    "documents": np.where(mask, documents[1:], -1).astype(np.int32),
    "mask": mask.astype(np.int32),
  }


def _check(
  documents: Sequence[np.ndarray], length: int, vocab: int | None
) -> None:
  if length < 1:
    raise ValueError(f"rows of length {length}: they need one position or more")
  if not len(documents):
    raise ValueError("there are no documents to pack")
  short = [i for i, x in enumerate(documents) if len(x) < 2]
  if short:
    raise ValueError(
      f"{len(short)} documents have fewer than two tokens, the first of them at"
      f" {short[0]}: nothing in them is predicted. Leave them out, or end"
      " documents with a token (tda.data.text.encode does)"
    )
  if vocab is not None:
    low = min(int(np.min(x)) for x in documents)
    high = max(int(np.max(x)) for x in documents)
    if low < 0 or high >= vocab:
      raise ValueError(
        f"token ids from {low} to {high} for a vocabulary of {vocab}: these"
        " documents are of another tokenizer"
      )
