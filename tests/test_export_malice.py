"""Exports made by a stranger, who can compute SHA256SUMS as well.

Each case damages one file of a small export, sums the files anew, and must be
refused at once, in one line that names the file.
"""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from typing import Any

import invented
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import finish, refused, wait_until
from rich.console import Console

from empdg_jax import config as config_lib
from empdg_jax.config import Config, InputError
from empdg_jax.data.vocab import SPECIAL_TOKENS, Vocabulary
from empdg_jax.inference import export, export_files
from empdg_jax.inference.system import load_system, params_like
from empdg_jax.models.registry import SYSTEMS
from empdg_jax.training.run_folder import Run

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "before_layout.tar.xz"
ABOUT, CONFIG, VOCABULARY = "export.json", "config.json", "vocab.txt"
EMOTIONS, FLAGS, HASHES = "emotions.txt", "lexicon.npy", "lexicon_hashes.npy"
PARAMS, METRICS, SUMS = "params.safetensors", "eval/metrics.json", "SHA256SUMS"
DEEP = b"[" * 60_000
HUGE = 10**6
MEBIBYTE = 2**20

Edit = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The export, loaded once, so that a refusal's cost is its own."""
  folder = tmp_path_factory.mktemp("stranger")
  with tarfile.open(FIXTURE) as archive:
    archive.extractall(folder, filter="data")
  load_system(folder / "export")
  return folder / "export"


@pytest.fixture
def folder(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of the export."""
  return pathlib.Path(shutil.copytree(original, tmp_path / "export"))


def sum_again(folder: pathlib.Path) -> None:
  names = [n for n in (*export_files.REQUIRED, METRICS) if n != SUMS]
  files = {n: (folder / n).read_bytes() for n in names if (folder / n).exists()}
  (folder / SUMS).write_text(export_files.sums_text(files))


def kibibytes(name: str) -> int:
  """Returns a row of /proc/self/status, as VmRSS or its peak VmHWM."""
  with open("/proc/self/status") as file:
    (row,) = (row for row in file if row.startswith(name))
  return int(row.split()[1])


def check_refused(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
  """Checks the line, its time, and the memory that it took."""
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # Resets VmHWM.
  before, start = kibibytes("VmRSS"), time.process_time()
  said = refused(capsys, "generate", f"--bundle={folder}")
  assert time.process_time() - start < 1
  assert kibibytes("VmHWM") - before < 100 * 1024
  assert name in said.replace(str(folder), "")
  assert said.isprintable()
  assert len(said) < 700


def set_fields(**fields: Any) -> Edit:
  """Returns an edit of JSON; `a__b` is the key b of the object a."""

  def edit(data: bytes) -> bytes:
    top = json.loads(data)
    for path, value in fields.items():
      *keys, last = path.split("__")
      values = top
      for key in keys:
        values = values[key]
      values[last] = value
    return json.dumps(top).encode()

  return edit


def without(*keys: str) -> Edit:
  def edit(data: bytes) -> bytes:
    top = values = json.loads(data)
    for key in keys[:-1]:
      values = values[key]
    del values[keys[-1]]
    return json.dumps(top).encode()

  return edit


def put(data: bytes) -> Edit:
  return lambda _: data


def swapped(old: bytes, new: bytes) -> Edit:
  return lambda data: data.replace(old, new, 1)


def npy(array: np.ndarray) -> Edit:
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=True)
  return put(buffer.getvalue())


def claiming(shape: str) -> Edit:
  """Returns a `.npy` file that claims a shape but holds nothing."""
  text = f"{{'descr': '|b1', 'fortran_order': False, 'shape': {shape}}}\n"
  size = len(text).to_bytes(2, "little")
  return put(b"\x93NUMPY\x01\x00" + size + text.encode())


def params(change: Callable[[dict[str, np.ndarray]], object]) -> Edit:
  """Returns an edit of the parameters by name."""

  def edit(data: bytes) -> bytes:
    arrays = safetensors.numpy.load(data)
    change(arrays)
    return safetensors.numpy.save(arrays)

  return edit


def poisoned(value: float) -> Edit:
  def change(arrays: dict[str, np.ndarray]) -> None:
    last = max(arrays)
    arrays[last] = arrays[last].copy()
    arrays[last].flat[-1] = value

  return params(change)


def of_type(kind: Any) -> Edit:
  return params(lambda a: a.update({n: x.astype(kind) for n, x in a.items()}))


def header(text: bytes) -> Edit:
  return put(len(text).to_bytes(8, "little") + text)


def overlapping(data: bytes) -> bytes:
  return data.replace(b'"data_offsets":[96,192]', b'"data_offsets":[0,96]  ')


REFUSED: dict[str, tuple[str, Edit]] = {
  "about: version is text": (ABOUT, set_fields(format_version="1")),
  "about: version is a bool": (ABOUT, set_fields(format_version=True)),
  "about: version is a fraction": (ABOUT, set_fields(format_version=1.5)),
  "about: version is null": (ABOUT, set_fields(format_version=None)),
  "about: version of 31 digits": (ABOUT, set_fields(format_version=10**30)),
  "about: no version": (ABOUT, without("format_version")),
  "about: no step": (ABOUT, without("step")),
  "about: step is text": (ABOUT, set_fields(step="\x1b[2J")),
  "about: step beyond int32": (ABOUT, set_fields(step=2**31)),
  "about: steps nested": (ABOUT, set_fields(averaged_steps=[[[]]])),
  "about: dtype is a list": (ABOUT, set_fields(dtype=["float32"])),
  "about: unknown dtype": (ABOUT, set_fields(dtype="int8")),
  "about: other system": (ABOUT, set_fields(system="moel")),
  "about: other length": (ABOUT, set_fields(context_length=HUGE)),
  "about: a list": (ABOUT, put(b"[1]")),
  "about: deep": (ABOUT, put(DEEP)),
  "about: NaN": (ABOUT, set_fields(step=float("nan"))),
  "about: garbage": (ABOUT, put(bytes(range(256)))),
  "about: large": (ABOUT, lambda data: data + b" " * MEBIBYTE),
  "config: no section": (CONFIG, without("train")),
  "config: a section is a list": (CONFIG, set_fields(model=["emb_dim"])),
  "config: unknown section": (CONFIG, set_fields(extra={"a": 1})),
  "config: unknown field": (CONFIG, set_fields(**{"model__\x1b[2J": 1})),
  "config: null": (CONFIG, put(b"null")),
  "config: text": (CONFIG, put(b'"data"')),
  "config: garbage": (CONFIG, put(b"\xff\xfe")),
  "config: deep": (CONFIG, put(DEEP)),
  "config: deep shapes": (
    CONFIG,
    set_fields(data__shapes=json.loads("[" * 400 + "]" * 400)),
  ),
  "config: flat shapes": (CONFIG, set_fields(data__shapes=[16, 10, 8])),
  "config: shapes of objects": (CONFIG, set_fields(data__shapes=[{}])),
  "config: shapes of text": (CONFIG, set_fields(data__shapes=[["a", 2, 2]])),
  "config: no shapes": (CONFIG, set_fields(data__shapes=[])),
  "config: widths of lists": (CONFIG, set_fields(model__kernel_widths=[[1]])),
  "config: huge widths": (CONFIG, set_fields(model__kernel_widths=[2**31])),
  "config: NaN": (CONFIG, set_fields(train__adam_b1=float("nan"))),
  "config: 1e999": (CONFIG, swapped(b"0.98", b"1e999")),
  "config: 4,000 digits": (CONFIG, set_fields(train__adam_b1=10**4000)),
  "config: 5,000 digits": (CONFIG, swapped(b"0.98", b"9" * 5000)),
  "config: trace of 5,000 digits": (
    CONFIG,
    set_fields(train__profile_steps="1:" + "9" * 5000),
  ),
  "config: a key twice": (CONFIG, swapped(b'"seed"', b'"seed": 1, "seed"')),
  "config: NUL": (CONFIG, set_fields(data__source="a\0b")),
  "config: seed beyond int32": (CONFIG, set_fields(train__seed=2**31)),
  "config: unknown system": (CONFIG, set_fields(model__name="\x1b[2J")),
  "config: long system": (CONFIG, set_fields(model__name="x" * 50_000)),
  "config: many listeners": (CONFIG, set_fields(model__listener_top_k=HUGE)),
  "config: many heads": (CONFIG, set_fields(model__num_heads=HUGE)),
  "config: huge shapes": (CONFIG, set_fields(data__shapes=[[HUGE] * 3])),
  "config: huge beam": (CONFIG, set_fields(eval__beam_size=HUGE)),
  "config: huge batch": (CONFIG, set_fields(eval__batch_size=HUGE)),
  "config: long responses": (ABOUT, set_fields(eval__max_decode_steps=5)),
  "config: huge responses": (CONFIG, set_fields(eval__max_decode_steps=HUGE)),
  "config: other width": (PARAMS, set_fields(model__emb_dim=8)),
  "config: huge width": (CONFIG, set_fields(model__emb_dim=HUGE)),
  "config: two layers": (PARAMS, set_fields(model__num_layers=2)),
  "config: huge layers": (PARAMS, set_fields(model__num_layers=HUGE)),
  "config: most layers": (CONFIG, set_fields(model__num_layers=2**31 - 1)),
  "config: huge filter": (CONFIG, set_fields(model__filter_size=2**31 - 1)),
  "config: huge depth": (CONFIG, set_fields(model__key_value_depth=2**31 - 2)),
  "config: untied": (PARAMS, set_fields(model__tie_embeddings=False)),
  "config: no pointer": (PARAMS, set_fields(model__pointer_generator=False)),
  "config: dense": (PARAMS, set_fields(model__feed_forward="dense")),
  "vocab: garbage": (VOCABULARY, put(b"\xff" * 1000)),
  "vocab: empty": (VOCABULARY, put(b"")),
  "vocab: twice": (VOCABULARY, lambda data: data + b"the\nthe\n"),
  "vocab: empty tokens": (VOCABULARY, lambda data: data + b"\n" * HUGE),
  "vocab: longer": (FLAGS, lambda data: data + b"zyzzyva\n"),
  "vocab: huge": (
    VOCABULARY,
    lambda data: data + b"".join(b"t%d\n" % n for n in range(HUGE)),
  ),
  "vocab: large": (
    FLAGS,
    lambda data: data + b"".join(b"t%d\n" % n for n in range(400_000)),
  ),
  "emotions: garbage": (EMOTIONS, put(b"\xff\n\xfe")),
  "emotions: empty": (EMOTIONS, put(b"")),
  "emotions: a single one": (EMOTIONS, put(b"sad\n")),
  "emotions: others": (EMOTIONS, swapped(b"sad", b"bad")),
  "emotions: an escape": (EMOTIONS, swapped(b"sad", b"\x1b[2J")),
  "emotions: twice": (EMOTIONS, swapped(b"sad", b"proud")),
  "flags: a pickle": (FLAGS, npy(np.array([{}], object))),
  "flags: two axes": (FLAGS, npy(np.zeros((2, 753), bool))),
  "flags: other type": (FLAGS, npy(np.zeros(1506, np.int8))),
  "flags: shorter": (FLAGS, npy(np.zeros(1505, bool))),
  "flags: a huge claim": (FLAGS, claiming("(10000000000000,)")),
  "flags: a negative claim": (FLAGS, claiming("(-1,)")),
  "flags: a deep header": (FLAGS, claiming("(" * 3000)),
  "flags: garbage": (FLAGS, put(b"\x93NUMPY" + bytes(100))),
  "flags: an archive": (FLAGS, put(b"PK\x03\x04" + bytes(100))),
  "hashes: a pickle": (HASHES, npy(np.array(["a"], object))),
  "hashes: other type": (HASHES, npy(np.zeros(3))),
  "hashes: other order": (HASHES, npy(np.zeros(3, ">u8"))),
  "hashes: cut": (HASHES, lambda data: data[:-3]),
  "hashes: scalar": (HASHES, npy(np.uint64(3))),
  "params: NaN": (PARAMS, poisoned(np.nan)),
  "params: infinite": (PARAMS, poisoned(-np.inf)),
  "params: float64": (PARAMS, of_type(np.float64)),
  "params: float16": (PARAMS, of_type(np.float16)),
  "params: integers": (PARAMS, of_type(np.int32)),
  "params: bfloat16": (PARAMS, of_type(ml_dtypes.bfloat16)),
  "params: one missing": (PARAMS, params(lambda a: a.pop("embedding"))),
  "params: one more": (
    PARAMS,
    params(lambda a: a.update({"x" * 9000: np.zeros(3, np.float32)})),
  ),
  "params: renamed": (
    PARAMS,
    params(lambda a: a.update({"\x1b[2J": a.pop("embedding")})),
  ),
  "params: transposed": (
    PARAMS,
    params(lambda a: a.update(embedding=a["embedding"].T.copy())),
  ),
  "params: garbage": (PARAMS, put(bytes(range(256)))),
  "params: empty": (PARAMS, put(b"")),
  "params: cut": (PARAMS, lambda data: data[:-5]),
  "params: longer": (PARAMS, lambda data: data + bytes(5)),
  "params: overlapping": (PARAMS, overlapping),
  "params: a long header": (PARAMS, put(b"\xff" * 7 + b"\x7f{}")),
  "params: a deep header": (PARAMS, header(DEEP)),
  "params: a list": (PARAMS, header(b"[]")),
  "params: fields of text": (
    PARAMS,
    header(json.dumps({f"p{n}": "x" for n in range(54)}).encode()),
  ),
  "params: many": (
    PARAMS,
    header(json.dumps(dict.fromkeys(map(str, range(60_000)), 0)).encode()),
  ),
  "metrics: a list": (METRICS, put(b"[[]]")),
  "metrics: deep": (METRICS, put(DEEP)),
  "metrics: NaN": (METRICS, set_fields(valid__bleu=float("nan"))),
  "metrics: nested": (METRICS, set_fields(valid__bleu=[1])),
  "metrics: unknown split": (METRICS, set_fields(**{"\x1b[2J": {}})),
  "metrics: null": (METRICS, set_fields(valid=None)),
  "metrics: garbage": (METRICS, put(b"\xff")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_file_is_refused(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
  named, edit = REFUSED[case]
  # The case says which file is edited; another may be the one that disagrees.
  edited = {"config": CONFIG, "vocab": VOCABULARY}.get(case.split(":")[0])
  path = folder / (edited or named)
  path.write_bytes(edit(path.read_bytes()))
  sum_again(folder)
  check_refused(folder, capsys, named)


@pytest.mark.parametrize("name", SYSTEMS)
def test_parameters_of_another_system(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
  for file, field in ((ABOUT, "system"), (CONFIG, "model__name")):
    path = folder / file
    path.write_bytes(set_fields(**{field: name})(path.read_bytes()))
  sum_again(folder)
  if SYSTEMS[name].generator is SYSTEMS["empdg"].generator:
    load_system(folder)
  else:
    check_refused(folder, capsys, PARAMS)


LINE = "0" * 64 + "  "


@pytest.mark.parametrize(
  "line",
  [
    LINE + "../vocab.txt",
    LINE + "/etc/passwd",
    LINE + "./vocab.txt",
    LINE + "vocab.txt",  # A second time.
    LINE + "eval/../vocab.txt",
    LINE + "x" * 5000,
    LINE + "\x1b[2J",
    LINE + "a\0b",
    LINE,
    LINE.upper().replace("0", "Z") + "vocab.txt",
    "vocab.txt",
    "",
    "x" * 100_000,
  ],
)
def test_hostile_sums(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
  path = folder / SUMS
  path.write_text(path.read_text() + line + "\n")
  check_refused(folder, capsys, SUMS)


@pytest.mark.parametrize("data", [b"", b"\xff" * 99, b"\0" * 2**20, DEEP])
def test_garbage_for_sums(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
  (folder / SUMS).write_bytes(data)
  check_refused(folder, capsys, SUMS)


def link_out(path: pathlib.Path) -> None:
  (folder,) = (p for p in path.parents if p.name == "export")
  outside = folder.with_name("outside")
  path.rename(outside)
  path.symlink_to(outside)


def endless(path: pathlib.Path) -> None:
  path.unlink()
  path.symlink_to("/dev/zero")


def circle(path: pathlib.Path) -> None:
  path.unlink()
  path.symlink_to(path.name)


def pipe(path: pathlib.Path) -> None:
  path.unlink()
  os.mkfifo(path)


def directory(path: pathlib.Path) -> None:
  path.unlink()
  path.mkdir()


def holes(path: pathlib.Path) -> None:
  os.truncate(path, 2**40)


@pytest.mark.parametrize("name", [*export_files.REQUIRED, METRICS, SUMS])
@pytest.mark.parametrize(
  "change", [link_out, endless, circle, pipe, directory, holes]
)
def test_no_plain_file(
  folder: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  name: str,
  change: Callable[[pathlib.Path], None],
) -> None:
  change(folder / name)
  check_refused(folder, capsys, name)


def test_an_export_behind_a_link(folder: pathlib.Path) -> None:
  """The folder itself may be one, and its files may be links inside it."""
  (folder / "deep").mkdir()
  (folder / VOCABULARY).rename(folder / "deep" / "words")
  (folder / VOCABULARY).symlink_to("deep/words")
  link = folder.with_name("link")
  link.symlink_to(folder)
  assert export.load(link).respond(["i lost my job today"]).emotion


@pytest.mark.parametrize("name", SYSTEMS)
def test_shapes_of_several_layers(config: Config, name: str) -> None:
  """They follow from those of one layer."""
  config.model.name, config.model.num_layers = name, 3
  vocabulary = Vocabulary((*SPECIAL_TOKENS, "the"))
  run = Run(pathlib.Path(), config, vocabulary, ("sad", "proud", "afraid"))
  like = export_files.named(params_like(run))
  rng = np.random.default_rng(0)
  arrays = {
    name: rng.normal(size=x.shape).astype(x.dtype) for name, x in like.items()
  }
  data = bytearray(safetensors.numpy.save(arrays))
  shapes = export_files._param_shapes(run)
  found = export_files._parse_params(data, shapes, "float32")
  assert jax.tree.all(jax.tree.map(np.array_equal, found, arrays))


def test_a_stored_configuration_is_named() -> None:
  text = config_lib.to_json(Config()).replace('"seed": 0', '"seed": 1e400')
  with pytest.raises(InputError, match=r"^run: config.train.seed=inf"):
    config_lib.from_json(text, "run")


_HOLD = """
import pathlib, sys, time
from empdg_jax.inference import export

def wait(self, data):
  print("writing", flush=True)
  time.sleep(60)

pathlib.Path.write_bytes = wait
export._write(pathlib.Path(sys.argv[1]), {"a": b""})
"""


def test_left_over_folders(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A killed export's folder goes with the next one; a living one's stays."""
  monkeypatch.setattr(export, "_check_loads", lambda temporary, out: None)
  out = tmp_path / "out"
  argv = [sys.executable, "-c", _HOLD, str(out)]
  writing = [
    subprocess.Popen(
      argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(2)
  ]
  try:
    for process in writing:
      assert process.stdout is not None
      assert process.stdout.readline() == "writing\n"
    others = [tmp_path / ".out.words", tmp_path / ".outer.12"]
    for other in others:
      other.mkdir()
    names = [tmp_path / f".out.{process.pid}" for process in writing]
    assert all(name.is_dir() for name in names)
    writing[0].kill()
    wait_until(lambda: writing[0].poll() is not None, "the kill")
    export._write(out, {"a/b": b"c"})
    assert (out / "a/b").read_bytes() == b"c"
    assert sorted(tmp_path.iterdir()) == sorted([out, names[1], *others])
  finally:
    for process in writing:
      process.kill()
      finish(process)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("eval__beam_size", 2**10 + 1),
    ("eval__max_decode_steps", 2**12 + 1),
    ("data__feedback_length", 2**12 + 1),
    ("data__shapes", ((2**12 + 1, 8, 8),)),
  ],
)
def test_what_no_one_could_load_is_not_exported(
  field: str, value: object, tmp_path: pathlib.Path
) -> None:
  run = invented.make_run(tmp_path / "run", "moel", 1, **{field: value})
  with pytest.raises(InputError, match="run: cannot be exported: config"):
    export.export(run, tmp_path / "out", None, 0, "float32", Console())
  assert not (tmp_path / "out").exists()


def test_an_export_that_cannot_be_loaded_is_not_written(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  files = {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file() and path.name != SUMS
  }
  files[export_files.EMOTION_NAMES] = b"sad\nproud\n"
  files[SUMS] = export_files.sums_text(files).encode()
  place = tmp_path / "place"
  place.mkdir()
  with pytest.raises(InputError, match=r"out: not written, .*: emotions.txt"):
    export._write(place / "out", files)
  assert not list(place.iterdir())
