"""What methods are called in figures and tables."""

_NAMES = {
  "arnoldi": "Arnoldi",
  "astra": "ASTRA",
  "bm25": "BM25",
  "cg": "CG",
  "datainf": "DataInf",
  "ekfac": "EK-FAC",
  "fast_source": "FAST-SOURCE",
  "gradient_dot": "gradient dot product",
  "hyperinf": "HyperINF",
  "kfac": "K-FAC",
  "less": "LESS",
  "lissa": "LiSSA",
  "logra": "LoGra",
  "relatif": "ℓ-RelatIF",
  "source": "SOURCE",
  "tfidf": "TF-IDF",
  "trackstar": "TrackStar",
  "tracin": "TracIn",
  "trak": "TRAK",
  "unrolled": "exact unrolling",
}


def display(method: str) -> str:
  """As papers write it; of a name not known here only underscores go."""
  first, *rest = method.split(" ", 1)
  return " ".join([_NAMES.get(first, first.replace("_", " ")), *rest])
