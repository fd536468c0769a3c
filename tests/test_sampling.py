"""Sampling and chosen emotions, through systems, commands and exports."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, refused
from untrained import make_system

from empdg_jax import config as config_lib
from empdg_jax import main
from empdg_jax.config import Config, InputError
from empdg_jax.data.prepare import Dataset
from empdg_jax.inference import evaluate, respond
from empdg_jax.inference.system import System
from empdg_jax.models.encoder_decoder import Inputs
from empdg_jax.training import steps

SAMPLED = ("--config.eval.temperature=0.9", "--config.eval.top_p=0.9")


@pytest.fixture(scope="module")
def system(sample_config: Config, sample_dataset: Dataset) -> System:
  """A system that samples."""
  return make_system(sample_config, sample_dataset, eval__temperature=1.0)


def words(system: System, encoded: Any, size: int, first: int = 0) -> list[str]:
  """Returns the responses to encoded contexts, in their order."""
  found = dict(system.respond(encoded, size, first))
  return [found[index].text for index in range(len(encoded))]


def test_positions_and_seeds_give_the_words(
  system: System, sample_dataset: Dataset
) -> None:
  """Whatever the batches, and wherever a file is cut."""
  encoded = sample_dataset.encoded("test")[:12]
  at_once = words(system, encoded, 12)
  assert words(system, encoded, 4) == at_once
  assert words(system, encoded[5:], 4, first=5) == at_once[5:]
  assert words(system.with_decoding(sampling_seed=0), encoded, 4) == at_once
  assert words(system.with_decoding(sampling_seed=1), encoded, 4) != at_once
  assert words(system.with_decoding(temperature=0.0), encoded, 4) != at_once
  # The same context at other positions.
  assert len(set(words(system, [encoded[0]] * 8, 8))) > 4


def test_every_turn_draws_anew(system: System) -> None:
  responder = respond.Responder(system)
  said = ["i lost my dog .", "oh no .", "i lost my dog ."]
  assert responder.respond(said).text == responder.respond(said).text
  first = responder.respond(said[:1])
  assert first.text == words(system, [responder.encode(said[:1])], 1)[0]
  encoded = responder.encode(said)
  assert responder.respond(said).text == words(system, [encoded], 1, 1)[0]


def test_generate_numbers_its_lines(system: System) -> None:
  """Groups of lines go on counting; an unusable line counts nothing."""
  responder = respond.Responder(system)
  line = json.dumps(["i lost my dog ."])
  lines = [line, line, "no JSON", line, line]
  found = list(respond.generate(responder, lines, 2))
  said = [values["response"] for values in found if "error" not in values]
  encoded = [responder.encode(["i lost my dog ."])] * 4
  assert said == words(system, encoded, 4)
  assert len(set(said)) > 1


def test_choices_of_each_row(system: System, sample_dataset: Dataset) -> None:
  """Rows of one batch keep to their own nucleus, seed and emotion."""
  encoded = [sample_dataset.encoded("test")[0]] * 4
  choices = steps.Choices(
    np.array([-1, -1, -1, 5], np.int32),
    np.ones(4, np.float32),
    np.array([1e-6, 1.0, 1.0, 1e-6], np.float32),
    np.array([0, 3, 4, 0], np.int32),
    np.array([0, 0, 0, 0], np.int32),
  )
  found = dict(system.respond(encoded, 4, choices=choices))
  greedy = system.with_decoding(temperature=0.0)
  assert found[0].text == words(greedy, encoded[:1], 1)[0]
  drawn = words(system.with_decoding(sampling_seed=3), encoded[:1], 1)
  assert found[1].text == drawn[0]
  assert found[2].text != found[1].text
  assert found[0].emotion != system.emotions[5]
  assert found[3].emotion == system.emotions[5]
  # The probabilities of two emotions have changed places.
  perceived, chosen = found[0].emotions, found[3].emotions
  assert perceived is not None
  assert chosen is not None
  np.testing.assert_allclose(np.sort(chosen), np.sort(perceived), rtol=1e-6)
  assert chosen.argmax() == 5


@pytest.mark.parametrize("name", ["emoprepend", "moel", "empdg_wo_d"])
def test_the_emotion_changes_the_response(
  name: str, sample_config: Config, sample_dataset: Dataset
) -> None:
  """That of every system that perceives emotions; -1 changes nothing."""
  system = make_system(sample_config, sample_dataset, model__name=name)
  encoded = sample_dataset.encoded("test")[0]
  read = encoded.context, encoded.state, encoded.emotion_context

  def outputs(emotion: int | None) -> Any:
    chosen = None if emotion is None else jnp.array([emotion])
    ids = (jnp.array([one]) for one in read)
    return system.model.apply(
      {"params": system.params},
      Inputs(*ids, emotion=chosen),
      jnp.array([encoded.target[:3]]),
    )

  perceived = outputs(None)
  kept, chosen = outputs(-1), outputs(3)
  np.testing.assert_array_equal(kept.logits, perceived.logits)
  assert chosen.encoded.emotion_logits.argmax() == 3
  assert not np.allclose(chosen.logits, perceived.logits, atol=1e-6)


def test_the_origin_of_an_evaluation(system: System) -> None:
  """Evaluations without sampling stay what they were before there was any."""
  origin = evaluate.origin(system.config, 1)
  assert (origin["temperature"], origin["top_p"]) == (1.0, 1.0)
  greedy = system.with_decoding(temperature=0.0, sampling_seed=7)
  assert set(evaluate.origin(greedy.config, 1)) == {
    "step", "source", "max_decode_steps", "beam_size", "length_penalty",
  }  # fmt: skip


def test_configurations_from_before_sampling() -> None:
  values = json.loads(config_lib.to_json(Config()))
  for name in ("temperature", "top_p", "sampling_seed"):
    del values["eval"][name]
  read = config_lib.from_json(json.dumps(values), "old")
  assert read == Config()
  assert (read.eval.temperature, read.eval.top_p) == (0.0, 1.0)


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ("temperature=-1", "config.eval.temperature=-1.0: expected more than 0"),
    ("temperature=nan", "config.eval.temperature=nan: expected a finite"),
    ("temperature=warm", "config.eval.temperature='warm': expected a number"),
    ("top_p=0", "config.eval.top_p=0.0: expected more than 0"),
    ("top_p=1.1", "config.eval.top_p=1.1: expected at most 1"),
    ("sampling_seed=-1", "config.eval.sampling_seed=-1: expected more than 0"),
    ("temperature=1 beam_size=4", "config.eval.temperature=1.0: expected 0"),
  ],
)
def test_bad_input(
  flags: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
  given = [f"--config.eval.{flag}" for flag in flags.split()]
  said = refused(
    capsys, "prepare", "--config=quickstart", *SMALL, *given
  )  # fmt: skip
  assert says in said
  if "beam" in flags:
    assert "sampling needs a beam of 1" in said


def test_a_system_checks_how_to_decode(system: System) -> None:
  with pytest.raises(InputError, match="a beam of 1"):
    system.with_decoding(beam_size=4)


@pytest.mark.slow
def test_commands_and_exports_on_eight_devices(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """`evaluate` of a run and of its export, on one device and on eight."""
  run, export = tmp_path / "run", tmp_path / "export"
  data = f"--config.data.data_dir={tmp_path / 'data'}"
  steps_ = ("--config.train.mle_steps=20", "--config.train.mle_eval_every=20")
  train = ("train", "--config=empdg_wo_d", f"--workdir={run}", *SMALL, data)
  assert main.main([*train, *steps_]) == 0
  assert main.main(["export", f"--workdir={run}", f"--out={export}"]) == 0
  evaluations = []
  flags = "--xla_force_host_platform_device_count="
  for source in (f"--workdir={run}", f"--bundle={export}"):
    for devices in (1, 8):
      out = tmp_path / f"{len(evaluations)}"
      subprocess.run(
        [sys.executable, "-m", "empdg_jax.main", "evaluate", source, data]
        + [f"--out={out}", "--config.eval.sampling_seed=3", *SAMPLED],
        check=True,
        capture_output=True,
        env={**os.environ, "XLA_FLAGS": f"{flags}{devices}"},
      )
      lines = (out / "predictions.jsonl").read_text().splitlines()
      evaluations.append([json.loads(line)["response"] for line in lines])
      values = json.loads((out / "metrics.json").read_text())
      assert values["temperature"] == 0.9
  assert all(found == evaluations[0] for found in evaluations)
  capsys.readouterr()
  # The example of a command line, whose seed gives the same words again.
  contexts = tmp_path / "contexts.jsonl"
  contexts.write_text('["i lost my dog ."]\n' * 3)
  argv = ["generate", f"--bundle={export}", f"--input={contexts}", *SAMPLED]
  assert main.main(argv) == main.main(argv) == 0
  said = capsys.readouterr().out.splitlines()
  assert said[:3] == said[3:]
  assert len(set(said)) > 1
