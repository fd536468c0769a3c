"""Pre-trained word vectors for the embedding table."""

import gzip
import math

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
  with storage.errors(
    f"config.data.vectors: cannot read {path!r}; give a file in GloVe's text "
    "format, or '' for none",
    InputError,
  ):
    file = storage.disk_path(path, "config.data.vectors")
    storage.check_plain(file)
    gzipped = path.endswith(".gz")
    # A plain file ends, and GloVe's largest has 5.6 GB; a bomb may not.
    most = 2**31 if gzipped else math.inf
    with (gzip.open if gzipped else open)(file, "rb") as opened:
      lines = storage.bounded_lines(opened, path, most)
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
