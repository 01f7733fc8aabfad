"""Documents and tokenizers."""

import json

import numpy as np
import pytest

from tda.data import text


def test_folder_in_the_order_of_names(tmp_path):
  (tmp_path / "b.txt").write_text("second")
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "x.txt").write_bytes(b"caf\xe9")
  (tmp_path / "c.md").write_text("other")
  found = {"a/x.txt": "caf\ufffd", "b.txt": "second"}
  assert text.folder(tmp_path) == found and list(found) == sorted(found)
  assert text.folder(tmp_path, "*.md") == {"c.md": "other"}
  with pytest.raises(ValueError, match=r"matches '\*\.py'"):
    text.folder(tmp_path, "*.py")
  (tmp_path / "d.txt").write_text(" \n")
  with pytest.raises(
    ValueError, match=r"1 documents of .* are empty \(d\.txt\)"
  ):
    text.folder(tmp_path)
  assert text.folder(tmp_path, skip_empty=True) == found


def test_jsonl(tmp_path):
  path = tmp_path / "x.jsonl"
  rows = [{"text": "a\u2028b", "id": 1}, {"text": "c"}]
  lines = [json.dumps(row, ensure_ascii=False) for row in rows]
  path.write_text("\n\n".join(lines) + "\n", "utf-8")
  assert text.jsonl(path) == {"line 1": "a\u2028b", "line 3": "c"}
  with pytest.raises(ValueError, match=r"line 1 of .*'body'; it has \['id', "):
    text.jsonl(path, "body")
  path.write_text('{"text": "a", "more": "b"}\n{"text": "c", "more": "d"}\n')
  both = text.jsonl(path, "more,text")
  assert both == {"line 1": "b\na", "line 2": "d\nc"}
  path.write_text('{"text": ""}\n')
  with pytest.raises(ValueError, match=r"1 documents of .* empty .line 1\)"):
    text.jsonl(path)
  with pytest.raises(ValueError, match="there is no file"):
    text.jsonl(tmp_path / "y.jsonl")


def test_documents_by_name(tmp_path):
  assert "def fnmatch(" in text.documents("stdlib", "f*.py")["fnmatch.py"]
  (tmp_path / "x.jsonl").write_text('{"a": "b"}\n{"a": ""}\n')
  assert text.documents(str(tmp_path / "x.jsonl"), "a") == {"line 1": "b"}
  found = text.documents(str(tmp_path), "*.jsonl")
  assert found["x.jsonl"].startswith('{"a"')


def test_passages_end_where_something_does():
  whole = "One. Two words\n\nThree, four. Five\nsix seveneightnine ten"
  assert text.passages(whole, 20) == [
    "One. Two words\n\n",
    "Three, four. Five\n",
    "six seveneightnine ",
    "ten",
  ]
  for size in range(1, 60):
    pieces = text.passages(whole, size)
    assert "".join(pieces) == whole
    assert max(map(len, pieces)) <= size
  assert text.passages("", 3) == [""]
  with pytest.raises(ValueError, match="passages of 0 characters"):
    text.passages(whole, 0)


def test_bytes():
  by = text.tokenizer("bytes")
  (tokens,) = text.encode(["né"], by)
  np.testing.assert_array_equal(tokens, [110, 195, 169, 256])
  assert tokens.dtype == np.int32
  assert by.decode(tokens) == "né"
  assert tokens.max() < by.vocab


def test_a_file_of_tokenizers(tmp_path):
  package = pytest.importorskip("tokenizers")
  vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
  made = package.Tokenizer(package.models.BPE(vocab, [("a", "b")]))
  made.save(str(tmp_path / "tokenizer.json"))
  by = text.tokenizer(tmp_path)
  (tokens,) = text.encode(["abb"], by)
  assert tokens.tolist() == [3, 2, 0] and by.vocab == 4
  with pytest.raises(ValueError, match="4 tokens has no '</s>'"):
    text.tokenizer(tmp_path / "tokenizer.json", end="</s>")
  with pytest.raises(ValueError, match=r"unknown tokenizer .*'bytes'"):
    text.tokenizer("gpt2")


def test_a_tokenizer_is_learned(tmp_path):
  pytest.importorskip("tokenizers")
  made = text.learned(["the then them"] * 9, 260, "<|end|>")
  made.save(str(tmp_path / "tokenizer.json"))
  by = text.tokenizer(tmp_path, "<|end|>")
  assert by.vocab <= 260
  (tokens,) = text.encode(["then né\n  x"], by)
  assert len(tokens) < len("then né\n  x".encode())
  assert by.decode(tokens[:-1]) == "then né\n  x"
  with pytest.raises(ValueError, match="vocab=256"):
    text.learned(["a"], 256, "<|end|>")


def test_pieces_join_to_the_text_and_keep_characters_whole():
  by = text.byte_tokenizer()
  found = text.pieces([*by.encode("né 𝄞"), by.end], by)
  assert found == ["n", "", "é", " ", "", "", "", "𝄞", ""]
  broken = text.pieces([*by.encode("a"), 0xC3], by)
  assert broken == ["a", "\ufffd"] and text.pieces([], by) == []
  # As some decoders do, of which the first word has no space before it.
  words = by._replace(decode=lambda ids: " ".join(f"w{i}" for i in ids))
  assert text.pieces([1, 2, 3], words) == ["w1", " w2", " w3"]


def test_words_are_numbered_alike_in_all_texts():
  (first, second), count = text.words(["A dog, a cat.", "The cat"])
  assert first[0] == first[3] and first[4] == second[1]  # after the comma
  assert second[0] not in first
  assert count == 6 and {*first, *second} == {*range(6)}
