"""Exports: written, read, refused, and used without the package."""

import hashlib
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import ALONE, example_of, refused, run_example

from empdg_jax import config as config_lib
from empdg_jax import main
from empdg_jax.config import Config, InputError
from empdg_jax.data import lexicon as lexicon_lib
from empdg_jax.data import pipeline, prepare
from empdg_jax.data.corpora import EMOTIONS
from empdg_jax.inference import export, export_files, predictions
from empdg_jax.inference.system import load_system, params_like
from empdg_jax.training import checkpoint, loop, run_folder
from empdg_jax.training.responding import response_tokens, source_words

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def lexicon_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A lexicon of few words, one of which the vocabulary lacks."""
  path = tmp_path_factory.mktemp("lexicon") / "words.txt"
  path.write_text("lost\ndog\nafraid\nhappy\nzyzzyva\n")
  return path


@pytest.fixture(scope="module")
def workdir(
  sample_config: Config,
  lexicon_file: pathlib.Path,
  tmp_path_factory: pytest.TempPathFactory,
) -> pathlib.Path:
  """A run of a few steps with four checkpoints, evaluated on test."""
  path = tmp_path_factory.mktemp("runs") / "tiny"
  config = config_lib.from_json(config_lib.to_json(sample_config), "copy")
  config.data.lexicon = str(lexicon_file)
  config.train.mle_steps = 60
  config.train.mle_eval_every = config.train.checkpoint_every = 15
  config.eval.max_decode_steps = 6
  loop.train(config, path)
  argv = ["evaluate", f"--workdir={path}", "--checkpoint=60", "--samples=1"]
  assert main.main(argv) == 0
  return path


@pytest.fixture(scope="module")
def exported(workdir: pathlib.Path) -> pathlib.Path:
  """Its latest checkpoint as an export, which no test may change."""
  out = workdir.parent / "export"
  argv = ["export", f"--workdir={workdir}", f"--out={out}", "--checkpoint=60"]
  assert main.main(argv) == 0
  return out


def lines_of(folder: pathlib.Path) -> list[dict]:
  return predictions.read_predictions(folder / "predictions.jsonl")


@pytest.fixture
def copied(exported: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of the export, to change or to damage."""
  folder = tmp_path / "export"
  shutil.copytree(exported, folder)
  return folder


def test_the_folder(exported: pathlib.Path, workdir: pathlib.Path) -> None:
  lines = (exported / "SHA256SUMS").read_text().splitlines()
  listed = dict(reversed(line.split("  ")) for line in lines)
  found = {
    path.relative_to(exported).as_posix()
    for path in exported.rglob("*")
    if path.is_file()
  }
  assert found == {*listed, "SHA256SUMS"}
  assert found == {*export_files.REQUIRED, "eval/metrics.json", "SHA256SUMS"}
  for name, digest in listed.items():
    data = (exported / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    if name.endswith(".npy"):  # Which may hold pickles.
      assert not np.load(exported / name, allow_pickle=False).dtype.hasobject
    else:
      with pytest.raises((pickle.UnpicklingError, ValueError, EOFError)):
        pickle.loads(data)
  for name in ("config.json", "vocab.txt"):
    assert (exported / name).read_bytes() == (workdir / name).read_bytes()
  metrics = json.loads((exported / "eval/metrics.json").read_text())
  one = json.loads((workdir / "eval/test/metrics.json").read_text())
  assert metrics == {"test": one}
  assert one["step"] == 60
  assert not list(exported.parent.glob(".*"))


def test_parameters_by_name(
  exported: pathlib.Path, workdir: pathlib.Path
) -> None:
  """NumPy reads the checkpoint's parameters, and the card lists them."""
  params = safetensors.numpy.load_file(exported / "params.safetensors")
  checkpoints = checkpoint.Checkpoints(workdir)
  like = params_like(run_folder.open_run(workdir))
  expected = checkpoints.restore_params(checkpoint.LATEST, like, 60)
  assert jax.tree.all(
    jax.tree.map(np.array_equal, export_files.nested(params), expected)
  )
  assert all(array.dtype == np.float32 for array in params.values())
  card = (exported / "README.md").read_text()
  rows = re.findall(r"^\| `([\w.]+)` \| ([\dx]+) \|$", card, re.MULTILINE)
  shapes = {name: "x".join(map(str, a.shape)) for name, a in params.items()}
  assert dict(rows) == shapes
  assert "decoder.layers_0.cross_attention.query.kernel" in shapes


def test_evaluation_is_the_runs(
  exported: pathlib.Path,
  workdir: pathlib.Path,
  lexicon_file: pathlib.Path,
  tmp_path: pathlib.Path,
) -> None:
  """Neither the run's lexicon nor its tokenised data are needed."""
  hidden = lexicon_file.with_name("hidden.txt")
  lexicon_file.rename(hidden)
  try:
    argv = ("evaluate", f"--bundle={exported}", f"--out={tmp_path / 'out'}")
    data_dir = f"--config.data.data_dir={tmp_path / 'data'}"
    assert main.main([*argv, data_dir, "--samples=1"]) == 0
  finally:
    hidden.rename(lexicon_file)
  ours = workdir / "eval" / "test"
  assert lines_of(tmp_path / "out") == lines_of(ours)
  for name in ("metrics.json", "predictions.jsonl"):
    found = (tmp_path / "out" / name).read_bytes()
    assert found == (ours / name).read_bytes()


@pytest.mark.slow
def test_evaluation_on_eight_devices(
  exported: pathlib.Path, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  flags = "--xla_force_host_platform_device_count=8"
  argv = ("evaluate", f"--bundle={exported}", f"--out={tmp_path / 'out'}")
  subprocess.run(
    [sys.executable, "-m", "empdg_jax.main", *argv],
    check=True,
    capture_output=True,
    env={**os.environ, "XLA_FLAGS": flags},
  )
  ours = lines_of(workdir / "eval" / "test")
  for line, expected in zip(lines_of(tmp_path / "out"), ours, strict=True):
    assert line.pop("nll") == pytest.approx(expected.pop("nll"), rel=1e-6)
    assert line == expected


_RESPOND = """
import json
import jax
import numpy as np
import safetensors.numpy
from jax import export

folder, inputs, outputs = sys.argv[1:]
params = safetensors.numpy.load_file(folder + "/params.safetensors")
data = open(folder + "/respond.jax", "rb").read()
exported = export.deserialize(bytearray(data))
assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
respond = jax.jit(exported.call)
with np.load(inputs) as arrays:
  context, state, emotional = (arrays[n] for n in ("c", "s", "e"))
found = []
first = 0
for rows in (1, 7, 64, len(context) - 72):
  part = slice(first, first + rows)
  found.append(respond(params, context[part], state[part], emotional[part]))
  first += rows
np.savez(
  outputs, **{k: np.concatenate([f[k] for f in found]) for k in found[0]}
)
"""


def test_respond_without_the_package(
  exported: pathlib.Path, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Batches of 1, 7 and 64, and the rest of the test split."""
  system = load_system(exported)
  dataset = prepare.load_dataset(
    system.config.data, system.vocabulary, system.lexicon
  )
  encoded = dataset.encoded("test")
  longest = system.shapes[-1]
  batch = pipeline.collate(
    encoded, np.arange(len(encoded)), longest, len(encoded)
  )
  np.savez(
    tmp_path / "inputs.npz",
    c=batch.context,
    s=batch.state,
    e=batch.emotion_context,
  )
  argv = (exported, tmp_path / "inputs.npz", tmp_path / "outputs.npz")
  subprocess.run([sys.executable, "-c", ALONE + _RESPOND, *argv], check=True)
  with np.load(tmp_path / "outputs.npz") as outputs:
    tokens, copied = outputs["tokens"], outputs["copied_from"]
    emotions = outputs["emotion_probs"]
  assert emotions.shape == (len(encoded), 32)
  for row, line in enumerate(lines_of(workdir / "eval" / "test")):
    words = response_tokens(
      tokens[row],
      copied[row],
      source_words(encoded[row], longest),
      system.vocabulary,
    )
    assert " ".join(words) == line["response"]
    emotion = EMOTIONS[emotions[row].argmax()]
    assert emotion == line["predicted_emotion"]


@pytest.mark.parametrize(
  "turns",
  [
    ["i lost my dog ."],
    ["oh no ?", "i lost my dog ."],  # The listener began.
    ["i lost my dog .", "oh no .", "i zyzzyva it ."],
    ["i lost my dog . " * 20],  # Longer than what the system reads.
  ],
)
def test_the_cards_example(exported: pathlib.Path, turns: list[str]) -> None:
  example = example_of(exported / "README.md")
  assert example == example_of(ROOT / "README.md")
  # Words outside the vocabulary are emotional for the package alone.
  known = [turn.replace("zyzzyva", "saw") for turn in turns]
  response = export.load(exported).respond(known)
  said = run_example(example, exported, known).splitlines()
  assert said == [response.emotion, " ".join(response.tokens)]
  if turns != known:
    assert len(run_example(example, exported, turns).splitlines()) == 2


def test_in_python(exported: pathlib.Path, workdir: pathlib.Path) -> None:
  loaded = export.load(exported)
  turns = ["I am afraid of the dark.", "Oh no, why?", "I saw a zyzzyva."]
  response = loaded.respond(turns)
  assert response.text
  assert response.emotion in EMOTIONS
  assert response.emotions is not None
  assert response.emotions.sum() == pytest.approx(1.0, abs=1e-5)
  # Same as from the run folder, with lexicon words that the vocabulary lacks.
  ours = load_system(workdir, which="60")
  ours = export.Responder(ours)
  assert ours.encode(turns) == loaded.encode(turns)
  assert "zyzzyva" in loaded.encode(turns).emotion_words
  assert loaded.respond_batch([]) == []
  with pytest.raises(InputError, match="expected a list of turns"):
    loaded.respond("i lost my dog")
  two = loaded.respond_batch([turns, turns[:1]])
  assert [r.text for r in two] == [
    response.text,
    loaded.respond(turns[:1]).text,
  ]


def test_hashed_lexicon(lexicon_file: pathlib.Path) -> None:
  words = lexicon_lib.load_lexicon(str(lexicon_file))
  hashed = lexicon_lib.HashedWords(lexicon_lib.hashes_of(words))
  assert len(hashed) == len(words) == 5
  assert all(word in hashed for word in words)
  assert not [w for w in ("cat", "", "Dog") if w in hashed]
  assert np.array_equal(
    lexicon_lib.hashes_of(hashed), lexicon_lib.hashes_of(words)
  )


def test_commands_take_exports(
  copied: pathlib.Path,
  workdir: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """`generate`, then `evaluate` into the export, then `compare`."""
  (tmp_path / "in").write_text('["I lost my dog."]\n')
  argv = [f"--input={tmp_path / 'in'}"]
  for flag in (f"--bundle={copied}", f"--workdir={workdir}"):
    where = [flag] if "bundle" in flag else [flag, "--checkpoint=60"]
    assert main.main(["generate", *where, *argv]) == 0
  ours, theirs = capsys.readouterr().out.splitlines()
  assert ours == theirs
  assert main.main(["evaluate", f"--bundle={copied}", "--samples=1"]) == 0
  argv = ["compare", str(workdir), str(copied), "--format=json"]
  capsys.readouterr()
  assert main.main(argv) == 0
  rows = json.loads(capsys.readouterr().out)["rows"]
  # The same run twice is no second seed.
  assert [row["runs"] for row in rows] == [[str(workdir)], [str(copied)]]
  ours, theirs = (row["figures"]["perplexity"]["value"] for row in rows)
  assert ours == theirs
  (copied / "config.json").write_text("{}")
  said = refused(capsys, "compare", str(workdir), str(copied))
  assert "config.json is not what was exported" in said


@pytest.mark.parametrize("name", [*export_files.REQUIRED, "eval/metrics.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_file_is_named(
  copied: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  name: str,
  damage: str,
) -> None:
  path = copied / name
  if damage == "missing":
    path.unlink()
  else:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
  said = refused(capsys, "generate", f"--bundle={copied}")
  assert name in said


def test_any_flipped_bit_is_found(copied: pathlib.Path) -> None:
  """Tries all bytes of SHA256SUMS, and some of the other files."""
  export_files.read_export(copied)
  rng = np.random.default_rng(0)
  for name in ("SHA256SUMS", *export_files.REQUIRED):
    path = copied / name
    data = path.read_bytes()
    places = range(len(data))
    if name != "SHA256SUMS":
      places = rng.integers(0, len(data), 8)
    for place in places:
      flipped = bytearray(data)
      flipped[place] ^= 1 << int(rng.integers(8))
      path.write_bytes(flipped)
      with pytest.raises(InputError, match="SHA256SUMS"):
        export_files.read_export(copied)
    path.write_bytes(data)


def test_damaged_sums(
  copied: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  path = copied / "SHA256SUMS"
  text = path.read_text()
  digits = text.index("  config.json")
  flipped = "1" if text[digits - 1] == "0" else "0"
  path.write_text(text[: digits - 1] + flipped + text[digits:])
  assert "config.json is not what" in refused(
    capsys, "chat", f"--bundle={copied}"
  )
  path.write_text(text.replace("  config.json", "  konfig.json"))
  assert "does not list config.json" in refused(
    capsys, "chat", f"--bundle={copied}"
  )
  path.write_text("not sums\n")
  said = refused(capsys, "chat", f"--bundle={copied}")
  assert "SHA256SUMS is damaged in line 1" in said
  path.unlink()
  said = refused(capsys, "chat", f"--bundle={copied}")
  assert "SHA256SUMS cannot be read" in said


def test_a_newer_format(
  copied: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """The folder is whole but has other fields than today's."""
  about = json.loads((copied / "export.json").read_text())
  about["format_version"] = export_files.FORMAT_VERSION + 1
  (copied / "export.json").write_text(json.dumps(about))
  config = json.loads((copied / "config.json").read_text())
  config["model"]["mixture_of_experts"] = 8
  (copied / "config.json").write_text(json.dumps(config))
  names = ("export.json", "config.json")
  files = {name: (copied / name).read_bytes() for name in names}
  (copied / "SHA256SUMS").write_text(export_files.sums_text(files))
  said = refused(capsys, "chat", f"--bundle={copied}")
  assert "export.json has format version 2" in said
  assert "update" in said


def test_the_mean_of_checkpoints(
  workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  out = tmp_path / "mean"
  argv = ["export", f"--workdir={workdir}", f"--out={out}", "--average=3"]
  assert main.main(argv) == 0
  checkpoints = checkpoint.Checkpoints(workdir)
  like = params_like(run_folder.open_run(workdir))
  three = [
    checkpoints.restore_params(checkpoint.LATEST, like, step)["embedding"]
    for step in (30, 45, 60)
  ]
  assert not np.array_equal(three[0], three[2])
  params = safetensors.numpy.load_file(out / "params.safetensors")
  np.testing.assert_allclose(
    params["embedding"], sum(three) / 3, rtol=1e-6, atol=1e-8
  )
  about = json.loads((out / "export.json").read_text())
  assert about["step"] is None
  assert about["averaged_steps"] == [30, 45, 60]
  assert not (out / "eval").exists()  # No evaluation is of the mean.


def test_the_mean_is_of_one_phase(
  workdir: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setattr(
    checkpoint.Checkpoints,
    "restore_progress",
    lambda self, kind, step: {"phase": "mle" if step == 30 else "adversarial"},
  )
  argv = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--average=3"]
  said = refused(capsys, "export", *argv)
  assert "are of several phases, adversarial, mle" in said


def test_metrics_of_another_decoding_do_not_go_along(
  workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  copied = tmp_path / "run"
  shutil.copytree(workdir, copied)
  argv = ["evaluate", f"--workdir={copied}", "--checkpoint=60", "--samples=1"]
  assert main.main([*argv, "--config.eval.max_decode_steps=4"]) == 0
  argv = ["export", f"--workdir={copied}", f"--out={tmp_path / 'out'}"]
  assert main.main([*argv, "--checkpoint=60"]) == 0
  assert not (tmp_path / "out" / "eval").exists()
  (copied / "eval" / "test" / "metrics.json").write_text("[]")
  with pytest.raises(InputError, match=r"metrics\.json: damaged"):
    export.export(
      copied, tmp_path / "two", "60", 0, "float32", export.Console()
    )


def test_bfloat16(
  workdir: pathlib.Path, exported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  out = tmp_path / "half"
  argv = ["export", f"--workdir={workdir}", f"--out={out}", "--checkpoint=60"]
  assert main.main([*argv, "--dtype=bfloat16"]) == 0
  sizes = [
    (folder / "params.safetensors").stat().st_size for folder in (out, exported)
  ]
  assert sizes[0] < 0.6 * sizes[1]
  assert not (out / "eval").exists()  # The run's is of float32.
  half = export_files.read_export(out).params["embedding"]
  whole = export_files.read_export(exported).params["embedding"]
  np.testing.assert_array_equal(
    half, np.asarray(jnp.asarray(whole, jnp.bfloat16), np.float32)
  )
  assert run_example(example_of(out / "README.md"), out, ["i lost my dog ."])
  assert export.load(out).respond(["i lost my dog ."]).text


def test_the_list_of_checkpoints(
  workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  argv = ["checkpoints", f"--workdir={workdir}"]
  assert main.main([*argv, "--format=json"]) == 0
  listed = json.loads(capsys.readouterr().out)
  latest = [c["step"] for c in listed if c["kind"] == "latest"]
  assert latest == [30, 45, 60]
  (best,) = (c for c in listed if c["kind"] == "best")
  for one in listed:
    assert one["phase"] == "mle"
    assert one["bytes"] > 100_000
    assert best["metrics"]["perplexity"] <= one["metrics"]["perplexity"]
  assert main.main(argv) == 0
  assert capsys.readouterr().out.count("latest") == 3
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 60, "na')  # As a kill leaves it.
  assert main.main(argv) == 0


@pytest.mark.parametrize(
  ("more", "says"),
  [
    (["--checkpoint=7"], "--checkpoint=7: expected best, latest or a step"),
    (["--average=9"], "--average=9: the run keeps 3"),
    (["--average=2", "--checkpoint=60"], "exclude each other"),
    (["--dtype=int8"], "--dtype=int8: expected one of float32, bfloat16"),
    (["--out=EXPORT"], "exists"),
    (["--out="], "--out is missing"),
    (["--out=gs://bucket/out"], "expected a folder on a disk"),
    (["--workdir=EXPORT"], "is an export, not a run folder"),
    (["--workdir=/nowhere"], "is no run folder"),
  ],
)
def test_exports_that_cannot_be_made(
  exported: pathlib.Path,
  workdir: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  more: list[str],
  says: str,
) -> None:
  argv = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}", *more]
  argv = [a.replace("EXPORT", str(exported)) for a in argv]
  assert says in refused(capsys, "export", *argv)
  assert not list(tmp_path.iterdir())


def test_nothing_is_half_written(
  workdir: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  def full(*args: object) -> None:
    raise OSError("No space left on device")

  monkeypatch.setattr(pathlib.Path, "rename", full)
  argv = ("export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}")
  assert "No space left" in refused(capsys, *argv)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    ([], "--workdir is missing; give the run folder, or an export"),
    (["--bundle=EXPORT", "--workdir=RUN"], "exclude each other"),
    (["--bundle=EXPORT", "--checkpoint=best"], "holds a single one"),
    (["--bundle=RUN"], "is no export: it holds no SHA256SUMS"),
    (["--bundle=/nowhere"], "is no export: it holds no SHA256SUMS"),
    (["--bundle", "/nowhere"], "--bundle=/nowhere is no export"),
    (["--workdir=EXPORT"], "is an export, not a run folder"),
    (["--bundle=EXPORT", "--config.model.emb_dim=8"], "config.model.emb_dim=8"),
    (["--bundle=EXPORT", "--config=x.py"], "--config=x.py: a run has its own"),
  ],
)
def test_systems_that_cannot_be_loaded(
  exported: pathlib.Path,
  workdir: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  argv: list[str],
  says: str,
) -> None:
  argv = [
    a.replace("EXPORT", str(exported)).replace("RUN", str(workdir))
    for a in argv
  ]
  assert says in refused(capsys, "chat", *argv)


def test_training_does_not_go_on_in_an_export(
  exported: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  before = sorted(exported.iterdir())
  for command in ("train", "checkpoints"):
    said = refused(capsys, command, f"--workdir={exported}")
    assert "is an export, not a run folder" in said
  assert sorted(exported.iterdir()) == before


def test_load_says_what_is_wrong(workdir: pathlib.Path) -> None:
  with pytest.raises(InputError, match="is no export"):
    export.load(workdir)
