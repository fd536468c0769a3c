"""Pre-trained word vectors for the embedding table."""

import contextlib
import gzip
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from empdg_jax import storage
from empdg_jax.config import InputError
from empdg_jax.data.vocab import SPECIAL_TOKENS, Vocabulary


def random_embeddings(
  vocab_size: int, dim: int, rng: np.random.Generator
) -> np.ndarray:
  """Draws small normal values, `[vocab_size, dim]` float32.

  Words get a quarter of the scale of `load_vectors`, special tokens a tenth of
  that.
  """
  embeddings = rng.normal(0.0, 0.25 * dim**-0.5, (vocab_size, dim))
  # CLS and LAB gather what attention brings to their position, which must not
  # drown in their own embedding.
  embeddings[: len(SPECIAL_TOKENS)] *= 0.1
  return embeddings.astype(np.float32)


def _open_lines(
  stack: contextlib.ExitStack, path: str, where: str
) -> Iterator[str]:
  """Opens a file of vectors, which `stack` closes; returns its lines."""
  file = storage.disk_path(path, where)
  storage.check_plain(file)
  gzipped = path.endswith(".gz")
  # A plain file ends, and GloVe's largest has 5.6 GB; a bomb may not.
  most = 2**31 if gzipped else math.inf
  opened = stack.enter_context((gzip.open if gzipped else open)(file, "rb"))
  return storage.bounded_lines(opened, path, most)


def load_vectors(
  path: str, vocabulary: Vocabulary, dim: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
  """Reads vectors in GloVe's text format: a word and its numbers a line.

  The vectors found are scaled to a root mean square of `dim ** -0.5`.

  Args:
    path: The file, gzipped if its name ends in `.gz`.
    vocabulary: The words to look for.
    dim: The embedding's size d; vectors may have fewer dimensions.
    rng: The generator of the dimensions and words that the file lacks.

  Returns:
    Embeddings, `[len(vocabulary), dim]` float32, and the share of the
    vocabulary's words (special tokens aside) found in the file.

  Raises:
    InputError: The file cannot be read, a line is ragged or holds something
      other than numbers, or the vectors are longer than `dim`.
  """
  embeddings = random_embeddings(len(vocabulary), dim, rng)
  width = 0
  found: set[int] = set()
  with (
    storage.errors(
      f"config.data.vectors: cannot read {path!r}; give a file in GloVe's text "
      "format, or '' for none",
      InputError,
    ),
    contextlib.ExitStack() as stack,
  ):
    lines = _open_lines(stack, path, "config.data.vectors")
    for number, line in enumerate(lines, start=1):
      # At spaces alone: some of GloVe's words hold other white space.
      word, *values = line.rstrip("\r\n").split(" ")
      width = width or len(values)
      if len(values) != width or not values:
        raise InputError(
          f"{path}:{number}: {len(values)} numbers; expected {width or 1}"
          " as on the first line"
        )
      if width > dim:
        raise InputError(
          f"{path}: vectors of {width} numbers do not fit "
          f"config.model.emb_dim={dim}"
        )
      # Only these rows are parsed: most of the file is other words.
      if (token := vocabulary.ids.get(word)) is not None:
        with storage.errors(f"{path}:{number}: no numbers", InputError):
          embeddings[token, :width] = np.array(values, np.float32)
        if not np.isfinite(embeddings[token]).all():
          raise InputError(f"{path}:{number}: expected finite numbers")
        found.add(token)
  if not width:
    raise InputError(f"{path}: holds no vector")
  # The model multiplies embeddings by sqrt(dim), which makes these of size 1.
  # At GloVe's own size they would be ten times as large, and for thousands of
  # steps they would drown out the layers.
  rows = sorted(found)
  if rows and (size := np.sqrt(np.mean(embeddings[rows, :width] ** 2))):
    embeddings[rows, :width] *= dim**-0.5 / size
  return embeddings, len(found) / (len(vocabulary) - len(SPECIAL_TOKENS))


def join_vectors(paths: Sequence[str], out: pathlib.Path) -> None:
  """Writes vectors side by side: a word, then its numbers in each file.

  Args:
    paths: Files in GloVe's text format that have the same words in the same
      order, as those of one release have, gzipped if their names end in `.gz`.
    out: The file to write, gzipped.

  Raises:
    InputError: A file cannot be read, or their words differ.
  """
  where = "--vectors"
  with contextlib.ExitStack() as stack:
    stack.enter_context(storage.errors(f"{where}: cannot join", InputError))
    files = [_open_lines(stack, path, where) for path in paths]
    temporary = stack.enter_context(storage.atomic_path(out))
    # Level 1: the numbers hardly compress, and there are 400,000 lines.
    with gzip.open(temporary, "wt", compresslevel=1, encoding="utf-8") as to:
      lines = itertools.zip_longest(*files, fillvalue="")
      for number, row in enumerate(lines, start=1):
        split = [line.rstrip("\r\n").partition(" ") for line in row]
        word = split[0][0]
        for path, (other, _, _) in zip(paths, split, strict=True):
          if other != word:
            raise InputError(
              f"{path}:{number}: the word {other!r:.50}, where {paths[0]} has "
              f"{word!r:.50}; files side by side need the same words"
            )
        to.write(" ".join([word, *(numbers for _, _, numbers in split)]) + "\n")
