"""Times our steps and a strong PyTorch version of them, in turn.

python benchmarks/pytorch_peer.py

It needs the extra `peer`, or any build of PyTorch. Both programs have the same
sizes, parameters, batch, cores and threads; each runs in a process of its own,
and they take turns. First their numbers are compared, without dropout.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

STEPS = ("mle", "critics", "greedy")
# The largest relative difference of losses and gradients in float32.
TOLERANCE = 1e-4
_FOLDER = pathlib.Path(__file__).resolve().parent


def _flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add("--modes", default="eager,compiled", help="PyTorch's modes: eager,"
      " compiled; on a GPU also graphs (CUDA graphs)")  # fmt: skip
  add("--dtype", default="float32,bfloat16", help="of products; eager mode"
      " has float32 alone")  # fmt: skip
  add("--steps", default=",".join(STEPS), help="the steps to time")
  add("--rounds", type=int, default=10, help="turns of each program")
  add("--repeat", type=int, default=3, help="steps in a turn")
  add("--batch_size", type=int, default=16)
  add("--vocab_size", type=int, default=20_100)
  add("--emb_dim", type=int, default=300)
  add("--shape", default="24,14,16", help="padded lengths of the context, its"
      " emotional words and the target")  # fmt: skip
  add("--checkout", action="append", default=[], help="another version of"
      " empdg_jax to time as well, a folder")  # fmt: skip
  add("--cores", default="", help="such as 0,1; all by default")
  add("--numbers_only", action="store_true", help="compare numbers only")
  add("--output", default="", help="a file for the results, JSON")
  add("--worker", default="", help=argparse.SUPPRESS)
  add("--folder", default="", help=argparse.SUPPRESS)
  return parser


# What both sides compute


def _config(args: argparse.Namespace, dtype: str, dropout: bool) -> Any:
  from empdg_jax.config import Config

  config = Config()
  config.model.name = "empdg"
  config.model.emb_dim = args.emb_dim
  config.data.shapes = (tuple(map(int, args.shape.split(","))),)
  config.train.batch_size = config.eval.batch_size = args.batch_size
  if hasattr(config.train, "compute_dtype"):
    config.train.compute_dtype = dtype
  if not dropout:
    config.model.dropout_rate = 0.0
  return config


def _examples(args: argparse.Namespace) -> list[Any]:
  """Draws a batch whose lengths fill 70 to 100% of the padded ones."""
  from empdg_jax.data import vocab
  from empdg_jax.data.pipeline import EncodedExample

  rng = np.random.default_rng(0)
  most = [int(n) for n in args.shape.split(",")]

  def words(longest: int) -> list[int]:
    length = int(rng.integers(max(1, int(0.7 * longest)), longest))
    first = len(vocab.SPECIAL_TOKENS)
    return rng.integers(first, args.vocab_size, length).tolist()

  examples = []
  for _ in range(args.batch_size):
    context, target = words(most[0] - 1), words(most[2] - 1)
    # Some words of the response are the context's, to copy.
    target[::3] = context[: len(target[::3])]
    examples.append(
      EncodedExample(
        context=[vocab.CLS, *context],
        state=[vocab.CLS, *[vocab.USR] * len(context)],
        emotion_context=[vocab.LAB, *words(most[1] - 1)],
        target=[*target, vocab.EOS],
        feedback=words(32),
        emotion=int(rng.integers(32)),
        words=(),
        emotion_words=(),
        cut=(0, 0, 0, 0),
      )
    )
  return examples


def _is_emotional(args: argparse.Namespace) -> np.ndarray:
  return np.random.default_rng(1).random(args.vocab_size) < 0.15


class Ours:
  """Our steps."""

  def __init__(self, args: argparse.Namespace, dtype: str, dropout: bool):
    """Makes states and compiled steps."""
    import jax

    from empdg_jax.data import pipeline
    from empdg_jax.parallel import devices
    from empdg_jax.training import steps
    from empdg_jax.training.trainable import assemble

    self.config = _config(args, dtype, dropout)
    trainable = assemble(self.config, args.vocab_size, 32, _is_emotional(args))
    self.states = devices.replicate(trainable.create_states(0))
    # Steps donate their states.
    self.first = devices.replicate(self.states)
    self.compiled = trainable.compile_steps()
    self.predict = steps.compile_step(
      steps.predict_step, model=trainable.generator, config=self.config.eval
    )
    self.host_batch = pipeline.collate(
      _examples(args),
      np.arange(args.batch_size),
      pipeline.padded_shapes(self.config.data)[0],
      args.batch_size,
    )
    self.batch = devices.shard(self.host_batch)
    self.key = devices.replicate(jax.random.key(0))

  def mle(self) -> Any:
    """Takes a step of maximum likelihood."""
    self.states["generator"], sums = self.compiled.mle(
      self.states["generator"], self.batch, self.key
    )
    return sums

  def critics(self) -> Any:
    """Takes a step of the discriminators."""
    self.states["discriminator"], sums = self.compiled.discriminator(
      self.states["discriminator"],
      self.states["generator"].params,
      self.batch,
      self.key,
    )
    return sums

  def greedy(self) -> Any:
    """Responds to the batch."""
    return self.predict(self.states["generator"].params, self.batch)

  def wait(self, result: Any) -> None:
    """Waits for a step's result."""
    import jax

    jax.block_until_ready(result)

  def inputs(self) -> dict[str, np.ndarray]:
    """Returns parameters, batch and random numbers of the first step."""
    import jax

    from empdg_jax import rng
    from empdg_jax.parallel.devices import unreplicate
    from empdg_jax.training import steps

    found = {}
    for player, state in self.first.items():
      for name, x in _by_name(unreplicate(state.params)).items():
        found[f"{player}/{name}"] = x
    batch = self.host_batch
    found |= {f"batch/{k}": np.asarray(v) for k, v in batch._asdict().items()}
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(b"discriminators"))
    keys = steps.example_keys(key, jax.numpy.int32(0), batch)
    fold_in = jax.vmap(jax.random.fold_in, (0, None))
    for name in ("semantic", "emotional"):
      own = fold_in(keys, zlib.crc32(name.encode()))
      found[f"alpha/{name}"] = np.asarray(jax.vmap(jax.random.uniform)(own))
    vocab = self.first["generator"].params["embedding"].shape[0]
    found["noise"] = np.stack([
      jax.vmap(lambda key: rng.exponential(key, vocab))(fold_in(keys, i))
      for i in range(self.config.train.sample_steps)
    ])  # fmt: skip
    return found

  def numbers(self) -> dict[str, np.ndarray]:
    """Returns losses, gradients and responses of the first step."""
    import jax
    import optax

    from empdg_jax.parallel.devices import unreplicate, unshard

    found = {"greedy": unshard(self.greedy().tokens)}
    # In this order: the critics read the generator's parameters.
    for step, player, terms in (
      ("critics", "discriminator", ("loss", "gradient_norm")),
      ("mle", "generator", ("loss", "nll")),
    ):
      sums = getattr(self, step)()
      found |= {
        f"{step}/{t}": np.asarray(sums[t]).reshape(-1)[0] for t in terms
      }
      # After a first update, a tenth of the gradient.
      state = unreplicate(self.states[player].opt_state)
      moments = _by_name(optax.tree_utils.tree_get(state, "mu"))
      found |= {f"{step}/gradient/{k}": x for k, x in moments.items()}
    return jax.tree.map(np.asarray, found)


def _by_name(tree: Any) -> dict[str, np.ndarray]:
  import jax

  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


class Peer:
  """PyTorch's steps."""

  def __init__(
    self, args: argparse.Namespace, mode: str, dtype: str, dropout: bool
  ):
    """Reads what `Ours.inputs` wrote."""
    import pytorch_model as model
    import torch

    self.torch, self.model = torch, model
    self.cuda = torch.cuda.is_available()
    device = torch.device("cuda" if self.cuda else "cpu")
    if self.cuda:
      torch.backends.cuda.matmul.allow_tf32 = True
      torch.backends.cudnn.allow_tf32 = True
    stored = dict(np.load(pathlib.Path(args.folder, "inputs.npz")))
    config = _config(args, "float32", dropout)
    self.dtype = getattr(torch, dtype)
    self.schedule = config.train
    self.sizes = model.Sizes(
      args.emb_dim,
      config.model.num_heads,
      config.model.kernel_widths,
      config.model.max_emotional_words,
      config.model.dropout_rate,
      config.model.label_smoothing,
      config.train.gradient_penalty_weight,
      config.train.sample_steps,
      config.eval.max_decode_steps,
    )

    def tensors(prefix: str) -> dict[str, Any]:
      names = [n for n in stored if n.startswith(prefix)]
      return {
        n.removeprefix(prefix): torch.tensor(stored[n]).to(device)
        for n in names
      }

    self.generator = tensors("generator/")
    self.critic = tensors("discriminator/")
    for p in (*self.generator.values(), *self.critic.values()):
      p.requires_grad_()
    batch = {k: v.long() for k, v in tensors("batch/").items()}
    fields = model.Batch._fields[:-1]
    rows = torch.nonzero(batch["target"].flatten() != model.PAD)[:, 0]
    self.batch = model.Batch(*(batch[f] for f in fields), rows)
    self.alphas = tensors("alpha/")
    self.noise = None if dropout else tensors("noise")[""]
    self.is_emotional = torch.tensor(_is_emotional(args)).to(device)
    adam, options = torch.optim.Adam, {"fused": True}
    if mode == "graphs":
      options["capturable"] = True
    train = config.train
    # A rate in a tensor changes without a new graph.
    self.rate = torch.tensor(0.0, device=device)
    self.optimizer = adam(
      self.generator.values(),
      lr=self.rate,
      betas=(train.adam_b1, train.adam_b2),
      eps=train.adam_eps,
      **options,
    )
    self.critic_optimizer = adam(
      self.critic.values(),
      lr=torch.tensor(train.discriminator_learning_rate, device=device),
      **options,
    )
    self.updates = 0
    off = mode != "compiled"
    self._mle_loss = torch.compile(model.mle_loss, disable=off)
    self._critics_loss = torch.compile(model.critics_loss, disable=off)
    self._decode_step = torch.compile(model.decode_step, disable=off)
    if mode == "graphs":
      for step in STEPS:
        setattr(self, step, self._captured(getattr(self, step)))

  def _captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
    """Returns a call that replays a step as one CUDA graph."""
    graph, results = self.torch.cuda.CUDAGraph(), []
    stream = self.torch.cuda.Stream()

    def run() -> Any:
      if not results:
        with self.torch.cuda.stream(stream):
          for _ in range(3):
            step()
        self.torch.cuda.synchronize()
        with self.torch.cuda.graph(graph):
          results.append(step())
      graph.replay()
      return results[0]

    return run

  def _lower(self) -> contextlib.AbstractContextManager[Any]:
    kind = "cuda" if self.cuda else "cpu"
    enabled = self.dtype is not self.torch.float32
    return self.torch.autocast(kind, self.torch.bfloat16, enabled=enabled)

  def mle(self) -> Any:
    """Takes a step of maximum likelihood."""
    train = self.schedule
    self.rate.fill_(
      self.model.learning_rate(
        self.updates,
        self.sizes.emb_dim,
        train.warmup_steps,
        train.learning_rate_factor,
      )  # fmt: skip
    )
    self.updates += 1
    self.optimizer.zero_grad(set_to_none=True)
    with self._lower():
      loss, nll = self._mle_loss(
        self.generator, self.batch, self.sizes, self.dtype
      )
    loss.backward()
    self.optimizer.step()
    return loss.detach(), nll.detach()

  def _choose(self, probs: Any, index: int) -> Any:
    """Draws a token of each row."""
    if self.noise is not None:  # The same draws as ours.
      return (probs / self.noise[index]).argmax(-1)
    total = probs.cumsum(-1)
    point = self.torch.rand_like(probs[:, :1]) * total[:, -1:]
    found = self.torch.searchsorted(total, point, right=True)[:, 0]
    return found.clamp(max=probs.shape[1] - 1)

  def critics(self) -> Any:
    """Takes a step of the discriminators."""
    with self.torch.no_grad(), self._lower():
      tokens, encoded = self.model.decode(
        self.generator, self.batch, self.sizes, self.dtype,
        self.sizes.sample_steps, self._choose, self._decode_step,
      )  # fmt: skip
    alphas = self.alphas
    if self.noise is None:
      alphas = {k: self.torch.rand_like(a) for k, a in alphas.items()}
    self.critic_optimizer.zero_grad(set_to_none=True)
    with self._lower():
      loss, norm = self._critics_loss(
        self.critic, (tokens, self.batch.target), encoded, self.batch,
        self.is_emotional, alphas, self.generator, self.sizes,
      )  # fmt: skip
    loss.backward()
    self.critic_optimizer.step()
    return loss.detach(), norm.detach()

  def greedy(self) -> Any:
    """Responds to the batch."""
    with self.torch.no_grad(), self._lower():
      tokens, encoded = self.model.decode(
        self.generator, self.batch, self.sizes, self.dtype,
        self.sizes.decode_steps, lambda probs, _: probs.argmax(-1),
        self._decode_step,
      )  # fmt: skip
      return tokens, encoded.emotion_logits.softmax(-1)

  def wait(self, result: Any) -> None:
    """Waits for the GPU; a CPU has finished already."""
    del result
    if self.cuda:
      self.torch.cuda.synchronize()

  def numbers(self) -> dict[str, np.ndarray]:
    """Returns losses, gradients and responses of the first step."""
    rows = len(self.batch.target)
    found = {"greedy": self.greedy()[0]}
    loss, norm = self.critics()
    found |= {"critics/loss": loss * rows, "critics/gradient_norm": norm * rows}
    loss, nll = self.mle()
    found |= {"mle/loss": loss * rows, "mle/nll": nll}
    for step, params, optimizer in (
      ("critics", self.critic, self.critic_optimizer),
      ("mle", self.generator, self.optimizer),
    ):
      for name, p in params.items():
        found[f"{step}/gradient/{name}"] = optimizer.state[p]["exp_avg"]
    return {k: x.detach().float().cpu().numpy() for k, x in found.items()}


# The processes


def _work(args: argparse.Namespace) -> None:
  """Runs steps as the parent asks."""
  kind, mode, dtype = args.worker.split(":")
  cores = os.sched_getaffinity(0)
  if kind == "peer":
    import torch

    torch.set_num_threads(len(cores))

  def build(dropout: bool) -> Any:
    if kind == "ours":
      return Ours(args, dtype, dropout)
    return Peer(args, mode, dtype, dropout)

  made: dict[bool, Any] = {}
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # What libraries print is no answer.
  for line in sys.stdin:
    command, *rest = line.split()
    answer: Any = None
    if command in ("inputs", "numbers"):
      values = getattr(made.setdefault(False, build(False)), command)()
      np.savez(pathlib.Path(args.folder, rest[0]), **values)
    elif command == "forget":
      made.clear()
    else:
      if True not in made:
        made[True] = build(True)
      step, answer = getattr(made[True], command), []
      for _ in range(int(rest[0])):
        start = time.perf_counter()
        made[True].wait(step())
        answer.append(time.perf_counter() - start)
    print(json.dumps(answer), file=answers, flush=True)


@dataclasses.dataclass
class _Program:
  """A process that takes turns."""

  name: str
  process: subprocess.Popen

  def ask(self, *words: object) -> Any:
    """Has it run a command; returns its answer."""
    assert self.process.stdin is not None
    assert self.process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
      print(*words, file=self.process.stdin, flush=True)
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"{self.name}: stopped; see above")
    return json.loads(line)


@contextlib.contextmanager
def _programs(
  args: argparse.Namespace, folder: str
) -> Iterator[dict[str, _Program]]:
  """Starts the processes; ends them on leaving."""
  # Not in workers, which may import another version of the package.
  sys.path.insert(0, str(_FOLDER.parent))
  from empdg_jax.main import ALLOCATOR

  workers = {}
  dtypes = args.dtype.split(",")
  for dtype in dtypes:
    workers[f"ours, {dtype}"] = f"ours::{dtype}", str(_FOLDER.parent)
  for checkout in args.checkout:
    name = f"{pathlib.Path(checkout).name}, float32"
    workers[name] = "ours::float32", checkout
  for mode in args.modes.split(","):
    for dtype in dtypes:
      if mode != "eager" or dtype == "float32":
        worker = f"peer:{mode}:{dtype}"
        workers[f"PyTorch {mode}, {dtype}"] = worker, str(_FOLDER.parent)
  programs: dict[str, _Program] = {}
  try:
    for name, (worker, root) in workers.items():
      environment = os.environ | {
        "PYTHONPATH": root,
        # All have the allocator of `empdg train`.
        "GLIBC_TUNABLES": ALLOCATOR,
      }
      command = [sys.executable, __file__, *sys.argv[1:]]
      command += [f"--worker={worker}", f"--folder={folder}"]
      process = subprocess.Popen(
        command, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      )  # fmt: skip
      programs[name] = _Program(name, process)
    yield programs
  finally:
    for program in programs.values():
      program.process.kill()
      program.process.wait()


def differences(
  ours: dict[str, np.ndarray], other: dict[str, np.ndarray]
) -> dict[str, float]:
  """Returns the largest relative differences by kind of number.

  A gradient's is relative to the largest in its array, or to a thousandth of
  the largest of all parameters, if that is more: some are 0 but for rounding.
  Of responses it is the share of other tokens.
  """
  largest: dict[str, float] = {}
  for name, x in ours.items():
    step = name.split("/gradient/")[0]
    largest[step] = max(largest.get(step, 0.0), float(np.abs(x).max()))
  worst: dict[str, float] = {}
  for name, x in ours.items():
    step, _, gradient = name.partition("/gradient/")
    if name == "greedy":
      found = float(np.mean(x != other[name]))
    else:
      scale = max(float(np.abs(x).max()), 1e-3 * largest[step], 1e-30)
      found = float(np.abs(x - other[name]).max()) / scale
    kind = f"{step}/gradient" if gradient else step
    worst[kind] = max(worst.get(kind, 0.0), found)
  return worst


def _compare(folder: str, ours: _Program, peer: _Program) -> float:
  """Prints how far two programs' numbers differ; returns the largest."""
  ours.ask("inputs", "inputs.npz")
  ours.ask("numbers", "ours.npz")
  peer.ask("numbers", "peer.npz")
  found = differences(
    *(dict(np.load(pathlib.Path(folder, f"{n}.npz"))) for n in ("ours", "peer"))
  )
  for kind, value in found.items():
    print(f"  {kind:24} {value:.1e}")
  for program in (ours, peer):
    program.ask("forget")
  return max(found.values())


def _time(
  args: argparse.Namespace, programs: dict[str, _Program]
) -> dict[str, dict[str, float]]:
  """Returns each program's median seconds of each step."""
  medians: dict[str, dict[str, float]] = {}
  for step in args.steps.split(","):
    times: dict[str, list[float]] = {name: [] for name in programs}
    for name, program in programs.items():
      print(f"compiling {step}: {name}", file=sys.stderr)
      program.ask(step, 3)
    for _ in range(args.rounds):
      for name, program in programs.items():
        # The threads of the one before may still spin.
        time.sleep(0.02)
        # The first one of a turn finds cold caches.
        times[name] += program.ask(step, args.repeat + 1)[1:]
    medians[step] = {n: statistics.median(t) for n, t in times.items()}
    _print_step(step, medians[step])
  return medians


def _print_step(step: str, medians: dict[str, float]) -> None:
  first = next(iter(medians.values()))
  print(f"{step}: ms a step, and times that of {next(iter(medians))}")
  for name, seconds in medians.items():
    print(
      f"  {name:30} {1e3 * seconds:9.2f} {seconds / first:7.2f}", flush=True
    )


def main() -> None:
  """Compares numbers, then times."""
  args = _flags().parse_args()
  if args.cores:
    os.sched_setaffinity(0, [int(c) for c in args.cores.split(",")])
  if args.worker:
    _work(args)
    return
  with tempfile.TemporaryDirectory() as folder, _programs(args, folder) as all_:
    ours = all_.get("ours, float32")
    peers = [p for n, p in all_.items() if n.startswith("PyTorch")]
    if ours is None or not peers:
      raise SystemExit("--dtype and --modes: give float32 and a mode")
    print(f"numbers of {ours.name} and {peers[0].name}, relative differences:")
    worst = _compare(folder, ours, peers[0])
    if worst > TOLERANCE:
      raise SystemExit(f"the numbers differ by {worst:.1e}, over {TOLERANCE}")
    if args.numbers_only:
      return
    medians = _time(args, all_)
  if args.output:
    values = {"flags": vars(args), "seconds": medians}
    pathlib.Path(args.output).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
  main()
