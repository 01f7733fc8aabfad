"""Documents as text, and tokenizers.

Documents come from a folder of plain-text files, one document each, or from a
JSONL file, one a line. A tokenizer is bytes, which needs nothing, or a
tokenizer.json of Hugging Face, which needs the extra `lm`.
"""

import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import tqdm

from tda import extras

# Of the end of a paragraph, a line, a sentence and a word.
MARKS = ("\n\n", "\n", ". ", " ")


class Tokenizer(NamedTuple):
  """Text to tokens and back.

  Attributes:
    vocab: number of tokens.
    encode: text -> token ids, without any special ones around it.
    decode: token ids -> text.
    end: the token that ends a document.
  """

  vocab: int
  encode: Callable[[str], Sequence[int]]
  decode: Callable[[Sequence[int]], str]
  end: int


def documents(source: str, pattern: str) -> dict[str, str]:
  """Texts by their names, empty ones left out.

  Args:
    source: "stdlib" (of the running Python), a folder, or a file.jsonl.
    pattern: of a folder's files; of a JSONL file the field of the text, or
      several.
  """
  if source == "stdlib":
    source = sysconfig.get_path("stdlib")
  if str(source).endswith(".jsonl"):
    return jsonl(source, pattern, skip_empty=True)
  return folder(source, pattern, skip_empty=True)


def folder(
  path: str | Path, pattern: str = "**/*.txt", *, skip_empty: bool = False
) -> dict[str, str]:
  """{file: text} of all that match in a folder, in the order of names.

  Bytes that are not UTF-8 become U+FFFD. A document without text is an error
  unless `skip_empty`.
  """
  files = [x for x in sorted(Path(path).glob(pattern)) if x.is_file()]
  if not files:
    raise ValueError(
      f"no file of {path} matches {pattern!r}; give the folder of the documents"
      " and a pattern such as '**/*.py'"
    )
  texts = {
    str(file.relative_to(path)): file.read_text("utf-8", errors="replace")
    for file in files
  }
  return _filled(texts, path, skip_empty)


def jsonl(
  path: str | Path, field: str = "text", *, skip_empty: bool = False
) -> dict[str, str]:
  """{"line 1": text} of a JSONL file; blank lines are passed over.

  A `field` "question,answer" is two of them with a line break between.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"there is no file {path}")
  fields, texts = field.split(","), {}
  for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
    if not line.strip():
      continue
    row = json.loads(line)
    found = row if isinstance(row, dict) else {}
    for name in fields:
      if not isinstance(found.get(name), str):
        has = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
          f"line {number} of {path} has no text in {name!r}; it has {has}: give"
          " its name as `field`"
        )
    texts[f"line {number}"] = "\n".join(row[name] for name in fields)
  return _filled(texts, path, skip_empty)


def passages(text: str, size: int) -> list[str]:
  """The text in pieces of at most `size` characters, which joined give it.

  A piece ends where, in its second half, a paragraph last does; where none
  does, after a line, else a sentence, else a word, else anywhere.
  """
  if size < 1:
    raise ValueError(f"passages of {size} characters: take 1 or more")
  pieces, start = [], 0
  while len(text) - start > size:
    middle, last = start + size // 2, start + size
    places = [text.rfind(mark, middle, last) + len(mark) for mark in MARKS]
    end = next((place for place in places if place > middle), last)
    pieces.append(text[start:end])
    start = end
  return [*pieces, text[start:]]


def byte_tokenizer() -> Tokenizer:
  """The 256 bytes of UTF-8 and an end."""

  def decode(tokens: Sequence[int]) -> str:
    kept = bytes(int(token) for token in tokens if token < 256)
    return kept.decode("utf-8", errors="replace")

  return Tokenizer(257, lambda text: list(text.encode("utf-8")), decode, 256)


def wrap(tokenizer: Any, end: str | int) -> Tokenizer:
  """A `tokenizers.Tokenizer`, documents ended by the token `end`."""
  number = tokenizer.token_to_id(end) if isinstance(end, str) else end
  size = tokenizer.get_vocab_size()
  if number is None or not 0 <= number < size:
    raise ValueError(
      f"the tokenizer of {size} tokens has no {end!r} to end documents with;"
      " name one that it has as `end`"
    )
  return Tokenizer(
    size,
    lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    lambda tokens: tokenizer.decode([int(token) for token in tokens]),
    number,
  )


def tokenizer(name: str | Path, end: str | int = "<|endoftext|>") -> Tokenizer:
  """ "bytes", or the path of a tokenizer.json or of its folder."""
  if str(name) == "bytes":
    return byte_tokenizer()
  path = Path(name)
  path = path / "tokenizer.json" if path.is_dir() else path
  if not path.is_file():
    raise ValueError(
      f"unknown tokenizer {str(name)!r}; take 'bytes', which needs nothing, or"
      " the path of a tokenizer.json"
    )
  return wrap(tokenizers().Tokenizer.from_file(str(path)), end)


def learned(texts: Iterable[str], vocab: int, end: str) -> Any:
  """A `tokenizers.Tokenizer`: byte-level BPE, as GPT-2's, of these texts.

  Merges the most frequent pairs (Sennrich et al. 2016) up to `vocab` tokens,
  `end` among them; 257 or more, since every byte is one.
  """
  if vocab < 257:
    raise ValueError(f"vocab={vocab}: every byte and {end!r} are 257 tokens")
  package = tokenizers()
  found = package.ByteLevelBPETokenizer()
  found.train_from_iterator(
    texts, vocab_size=vocab, special_tokens=[end], show_progress=False
  )
  return found


def encode(
  texts: Iterable[str], by: Tokenizer, *, label: str | None = None
) -> list[np.ndarray]:
  """Token ids int32 of each document, its end included.

  `label` names a progress bar; None shows none.
  """
  bar = tqdm.tqdm(texts, desc=label, unit="document", disable=not label)
  return [np.asarray([*by.encode(text), by.end], np.int32) for text in bar]


def pieces(tokens: Sequence[int], by: Tokenizer) -> list[str]:
  """The text that each token adds; joined, that of all.

  A character of several tokens is the last one's, and the others are empty.
  """
  found, context, done = [], 0, 0
  for i in range(1, len(tokens) + 1):
    # A token's text can depend on the one before, as its space does.
    known, text = by.decode(tokens[context:done]), by.decode(tokens[context:i])
    if text.endswith("\ufffd") and i < len(tokens):
      found.append("")
      continue
    found.append(text[len(known) :])
    context, done = done, i
  return found


def words(texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
  """Numbers of the words and marks of each text, and how many differ.

  Small and capital letters are the same.
  """
  found = [re.findall(r"\w+|[^\w\s]", one.lower()) for one in texts]
  every = sorted({word for one in found for word in one})
  known = {word: i for i, word in enumerate(every)}
  return [np.array([known[x] for x in one], int) for one in found], len(every)


def tokenizers() -> ModuleType:
  """The package of that name."""
  return extras.package("tokenizers", "this tokenizer", "lm")


def _filled(
  texts: dict[str, str], path: str | Path, skip: bool
) -> dict[str, str]:
  """The texts that are more than white space."""
  filled = {name: text for name, text in texts.items() if text.strip()}
  empty = [name for name in texts if name not in filled]
  if not filled or (empty and not skip):
    raise ValueError(
      f"{len(empty)} documents of {path} are empty ({', '.join(empty[:5])}) of"
      f" {len(texts)}; skip_empty=True leaves them out"
    )
  return filled
