"""One record makes a system known to every command."""

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from empdg_jax import main
from empdg_jax.config import Config
from empdg_jax.models import registry
from empdg_jax.models.baselines import Transformer
from empdg_jax.models.registry import SystemSpec

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Shouter(Transformer):
  """A baseline that reads twice as loud."""

  def project(self, hidden: jax.Array) -> jax.Array:
    """Doubles the logits."""
    return 2.0 * super().project(hidden)


SPEC = SystemSpec(
  Shouter, "Shouter", "a loud Transformer (this test)", paper={"bleu": 1.5}
)


def test_a_new_system_trains_evaluates_compares_and_exports(
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
  config: Config,
  tmp_path: pathlib.Path,
) -> None:
  monkeypatch.setitem(registry.SYSTEMS, "shouter", SPEC)
  # Its configuration file, as those of `configs/`.
  (tmp_path / "shouter.py").write_text(
    "from empdg_jax.config import Config\n"
    "def get_config():\n"
    "  config = Config()\n"
    "  config.model.name = 'shouter'\n"
    "  return config\n"
  )
  workdir = tmp_path / "run"
  flags = [
    f"--config.data.data_dir={config.data.data_dir}",
    "--config.data.source=sample",
    "--config.data.shapes=((48,24,24),)",
    "--config.model.emb_dim=16",
    "--config.model.key_value_depth=8",
    "--config.train.batch_size=8",
    "--config.train.mle_steps=2",
    "--config.train.mle_eval_every=2",
    "--config.eval.max_decode_steps=3",
  ]
  argv = ["train", f"--config={tmp_path}/shouter.py", f"--workdir={workdir}"]
  assert main.main([*argv, *flags]) == 0
  assert main.main(["evaluate", f"--workdir={workdir}", "--split=valid"]) == 0
  capsys.readouterr()
  argv = ["compare", str(workdir), "--split=valid", "--format=json"]
  assert main.main(argv) == 0
  (row,) = json.loads(capsys.readouterr().out)["rows"]
  assert row["name"] == "shouter"
  assert row["title"] == "Shouter"
  assert row["figures"]["bleu"]["paper"] == 1.5
  assert row["figures"]["emotion_accuracy"] is None
  assert main.main([*argv[:-1], "--format=markdown"]) == 0
  assert "Shouter" in capsys.readouterr().out
  out = tmp_path / "export"
  assert main.main(["export", f"--workdir={workdir}", f"--out={out}"]) == 0
  assert SPEC.description in (out / "README.md").read_text()


@pytest.mark.parametrize("name", list(registry.SYSTEMS))
def test_every_system_has_a_configuration(name: str) -> None:
  """The file names its system and states the command that trains it."""
  path = ROOT / "configs" / f"{name}.py"
  values = runpy.run_path(str(path))
  assert values["get_config"]().model.name == name
  assert f"empdg train --config=configs/{name}.py" in values["__doc__"]


def test_the_paper_figures() -> None:
  """As printed in Tables 1 and 2; the Transformer has no accuracy."""
  paper = {name: spec.paper for name, spec in registry.SYSTEMS.items()}
  assert paper["empdg"] == {
    "emotion_accuracy": 0.3431,
    "perplexity_per_example": 34.18,
    "distinct_1": 1.81,
    "distinct_2": 6.94,
  }
  assert "emotion_accuracy" not in paper["transformer"]


def test_more_listeners_than_emotions_are_refused(config: Config) -> None:
  config.model.name, config.model.listener_top_k = "moel", 6
  assert registry.create_model(config.model, 50, 6).num_emotions == 6
  with pytest.raises(ValueError, match="listener_top_k=6: expected at most 5"):
    registry.create_model(config.model, 50, 5)


def test_listener_weights_of_few_emotions() -> None:
  """Two of three listeners speak, with the softmax of their logits."""
  from empdg_jax.models.baselines import listener_weights

  logits = jnp.log(jnp.array([[1.0, 3.0, 0.5]]))
  weights = listener_weights(logits, top_k=2)
  assert weights[0] == pytest.approx([0.25, 0.75, 0.0])
