"""The picture of attention: its numbers, its files, what is refused."""

import pathlib
import struct

import numpy as np
import pytest
import reference
from reference import in_float64

from empdg_jax import config, main
from empdg_jax.analysis import attention
from empdg_jax.config import Config, InputError
from empdg_jax.data import vocab
from empdg_jax.data.prepare import Dataset
from empdg_jax.inference import respond
from empdg_jax.inference.system import System
from empdg_jax.models import registry
from empdg_jax.parallel import devices
from empdg_jax.training.run_folder import Run


def make_responder(
  sample_config: Config, dataset: Dataset, name: str
) -> respond.Responder:
  """A system with random parameters none of which is 0 or 1."""
  import jax

  from empdg_jax.training.train_state import init_params

  chosen = config.from_json(config.to_json(sample_config), "copy")
  chosen.model.name = name
  chosen.eval.max_decode_steps = 6
  model = registry.create_model(chosen.model, len(dataset.vocabulary), 32)
  params = reference.random_params(
    jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  )
  return respond.Responder(
    System(
      Run(pathlib.Path(), chosen, dataset.vocabulary, dataset.corpus.emotions),
      params,
    )
  )


@pytest.fixture(scope="module")
def responder(
  sample_config: Config, sample_dataset: Dataset
) -> respond.Responder:
  return make_responder(sample_config, sample_dataset, "empdg_wo_d")


CONTEXT = ["I feel so sad today.", "why is that?", "I lost my happy dog."]


def test_attention_is_the_models(responder: respond.Responder) -> None:
  attended = attention.attend(responder, CONTEXT)
  encoded = responder.encode(CONTEXT)
  assert attended.semantic == ("CLS", *encoded.words)
  assert attended.emotional == ("LAB", *encoded.emotion_words)
  assert {"sad", "lost", "happy"} <= set(attended.emotional)
  columns = len(attended.semantic) + len(attended.emotional)
  assert attended.weights.shape == (len(attended.reply), columns)
  np.testing.assert_allclose(attended.weights.sum(axis=1), 1.0, rtol=1e-5)

  system = responder.system
  ids = [system.vocabulary.ids.get(t, vocab.UNK) for t in attended.reply]
  expected = reference.generator(
    in_float64(devices.unreplicate(system.params)),
    system.config.model,
    reference.Example(
      encoded.context, encoded.state, encoded.emotion_context, ids
    ),
  )
  np.testing.assert_allclose(
    attended.weights, expected.attention, rtol=1e-3, atol=1e-5
  )
  probs = reference.softmax(expected.emotion_logits)
  assert attended.emotions is not None
  assert tuple(attended.emotions) == system.emotions
  np.testing.assert_allclose(
    list(attended.emotions.values()), probs, rtol=1e-3, atol=1e-6
  )


def test_it_draws_both_files(
  responder: respond.Responder, tmp_path: pathlib.Path
) -> None:
  attended = attention.attend(responder, CONTEXT)
  png, svg = attention.draw(attended, tmp_path / "new" / "picture.of.it")
  assert (png.name, svg.name) == ("picture.of.it.png", "picture.of.it.svg")
  data = png.read_bytes()
  assert data[:8] == b"\x89PNG\r\n\x1a\n"
  width, height = struct.unpack(">II", data[16:24])
  assert 500 < height < width
  drawn = svg.read_text()
  for word in (*attended.semantic, *attended.emotional, *attended.reply):
    assert f"<!-- {word} -->" in drawn
  # Emotional words stand out, in both contexts.
  assert drawn.count(attention._EMOTIONAL) == 2 * (len(attended.emotional) - 1)
  assert sorted(p.name for p in png.parent.iterdir()) == [png.name, svg.name]


def test_a_transformer_has_one_context_and_no_emotion(
  sample_config: Config, sample_dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  transformer = make_responder(sample_config, sample_dataset, "transformer")
  attended = attention.attend(transformer, CONTEXT[-1:])
  assert attended.emotional == ()
  assert attended.emotions is None
  assert attended.weights.shape[1] == len(attended.semantic)
  assert all(p.exists() for p in attention.draw(attended, tmp_path / "one"))


def test_bad_input(
  responder: respond.Responder,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  for context in ([""], ["   "]):
    with pytest.raises(InputError, match="the context is empty"):
      attention.attend(responder, context)
  assert main.main(["attention"]) == 2
  assert "--context is missing" in capsys.readouterr().err
  (tmp_path / "file").write_text("")
  attended = attention.attend(responder, CONTEXT[-1:])
  with pytest.raises(InputError, match="cannot write"):
    attention.draw(attended, tmp_path / "file" / "picture")
