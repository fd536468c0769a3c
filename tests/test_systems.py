"""Every system through the same commands; run by `make test-slow`."""

import io
import json
import pathlib
import runpy
import signal
from typing import Any

import numpy as np
import pytest
from helpers import SMALL, example_of, run_example

from empdg_jax import config as config_lib
from empdg_jax import main
from empdg_jax.config import Config
from empdg_jax.data import text
from empdg_jax.inference.predictions import read_predictions
from empdg_jax.models import registry
from empdg_jax.training import train_log
from empdg_jax.training.train_state import learning_rate

ROOT = pathlib.Path(__file__).resolve().parents[1]
SYSTEMS = tuple(registry.SYSTEMS)
TINY = (
  *SMALL,
  "--config.train.mle_steps=4",
  "--config.train.mle_eval_every=4",
  "--config.train.discriminator_steps=1",
  "--config.train.adversarial_rounds=1",
  "--config.train.g_steps=1",
  "--config.train.sample_steps=2",
  "--config.train.log_every=1",
  "--config.eval.max_decode_steps=3",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Where all systems' runs are."""
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=SYSTEMS)
def workdir(
  request: pytest.FixtureRequest, runs: pathlib.Path, sample_config: Config
) -> pathlib.Path:
  """A system's run, stopped once by Ctrl-C, resumed and evaluated."""
  workdir = runs / request.param
  argv = [
    "train",
    f"--config={ROOT}/configs/{request.param}.py",
    *TINY,
    f"--config.data.data_dir={sample_config.data.data_dir}",
    f"--workdir={workdir}",
  ]
  write = train_log.MetricWriter.write

  def write_and_interrupt(self: Any, step: int, *rest: Any) -> None:
    write(self, step, *rest)
    if step == 2:
      signal.raise_signal(signal.SIGINT)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_log.MetricWriter, "write", write_and_interrupt)
    assert main.main(argv) == config_lib.INTERRUPTED
  assert main.main(argv) == 0
  assert main.main(["evaluate", f"--workdir={workdir}", "--samples=1"]) == 0
  return workdir


@pytest.mark.slow
def test_a_system_trains_stops_resumes_and_evaluates(
  workdir: pathlib.Path,
) -> None:
  name = workdir.name
  logged = [
    json.loads(line)
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  losses = [v for v in logged if v["name"] == "train/loss"]
  steps = [v["step"] for v in losses]
  assert steps[:4] == [1, 2, 3, 4]  # The resumed run repeats none.
  assert all(np.isfinite(v["value"]) for v in losses)
  phases = ["mle"]
  if name in ("empdg", "empdg_wo_g"):
    phases += ["discriminator", "adversarial"]
  assert list(dict.fromkeys(v["phase"] for v in logged)) == phases
  values = json.loads((workdir / "eval/test/metrics.json").read_text())
  assert values["model"] == name
  assert values["parameters"] > 1_000
  accuracies = {v["name"] for v in logged if "accuracy" in v["name"]}
  lines = read_predictions(workdir / "eval/test/predictions.jsonl")
  if name == "transformer":  # Absent, not 0.
    assert not accuracies
    assert values["emotion_accuracy"] is None
    assert {line["predicted_emotion"] for line in lines} == {None}
  else:
    assert accuracies == {"train/emotion_accuracy", "valid/emotion_accuracy"}
    assert 0.0 <= values["emotion_accuracy"] <= 1.0


@pytest.mark.slow
def test_a_system_talks(
  workdir: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  perceives = workdir.name != "transformer"
  monkeypatch.setattr(
    "sys.stdin", io.StringIO('{"context": ["I lost my dog."]}\n')
  )
  assert main.main(["generate", f"--workdir={workdir}"]) == 0
  answer = json.loads(capsys.readouterr().out)
  assert isinstance(answer["response"], str)
  assert ("emotion" in answer) == perceives
  monkeypatch.setattr("sys.stdin", io.StringIO("I lost my dog.\n\n"))
  assert main.main(["chat", f"--workdir={workdir}"]) == 0
  assert ("perceived:" in capsys.readouterr().out) == perceives


@pytest.mark.slow
def test_a_system_is_exported(
  workdir: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """The export answers as the run, and its `respond.jax` does as well."""
  out = tmp_path / "export"
  assert main.main(["export", f"--workdir={workdir}", f"--out={out}"]) == 0
  context = '{"context": ["I lost my dog."]}\n'
  capsys.readouterr()
  for flag in (f"--workdir={workdir}", f"--bundle={out}"):
    monkeypatch.setattr("sys.stdin", io.StringIO(context))
    assert main.main(["generate", flag]) == 0
  ours, theirs = capsys.readouterr().out.splitlines()
  assert ours == theirs
  said = run_example(example_of(out / "README.md"), out, ["i lost my dog ."])
  *emotion, reply = said.splitlines()
  assert len(emotion) == (workdir.name != "transformer")
  assert text.join_tokens(reply.split()) == json.loads(ours)["response"]


@pytest.mark.slow
def test_all_systems_compare(
  runs: pathlib.Path, workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Whichever have run by now, in the paper's order."""
  folders = sorted(map(str, runs.iterdir()))
  assert str(workdir) in folders
  assert main.main(["compare", *folders, "--format=json"]) == 0
  compared = json.loads(capsys.readouterr().out)
  names = [row["name"] for row in compared["rows"]]
  assert sorted(names) == sorted(folder.name for folder in runs.iterdir())
  pairs = len(names) * (len(names) - 1) // 2
  of_perplexity = [t for t in compared["tests"] if t["metric"] == "perplexity"]
  assert len(of_perplexity) == pairs


def test_every_configuration_is_valid() -> None:
  for path in (ROOT / "configs").glob("[a-z]*.py"):
    config_lib.validate(runpy.run_path(str(path))["get_config"]())


@pytest.mark.parametrize("devices", [1, 8, 32])
def test_the_pods_rate_grows_with_the_root_of_its_batch(devices: int) -> None:
  """After the same number of examples, warm-up included."""
  default = Config().train
  pod = runpy.run_path(str(ROOT / "configs" / "pod.py"))["get_config"]
  train_config = pod(str(devices)).train
  scale = train_config.batch_size / default.batch_size
  assert scale == 2 * devices
  ours = learning_rate(train_config, 300)
  theirs = learning_rate(default, 300)
  for step in (500, 1_000, 8_000, 50_000):
    expected = scale**0.5 * float(theirs(step * 64 - 1))
    rate = float(ours(step * 64 / scale - 1))
    assert rate == pytest.approx(expected, rel=1e-4)
