"""Train an agent that does machine-learning engineering: AceGRPO, asynchronously.

    python train.py                                   # one CPU: everything on it
    torchrun --nproc_per_node=8 train.py              # half the ranks learn, half roll out
    python train.py --resume runs/tiny-...            # go on from the last complete checkpoint
    python train.py --preset small --dry-run          # what it would do and need, without doing it

Without --preset: `tiny`, a policy of 2M parameters; `small`, Qwen3-8B, where nvidia-smi is found.

                                  tasks (bounded by the staleness rule)
    rank 0  curriculum thread  ------------------------------------->  ranks L..W-1: rollout
            buffer + sampler                                             threads, one vLLM engine,
                               <-------------------------------------    sandboxes
                                  results (groups of graded traces)
    ranks 0..L-1  learner (FSDP2): B groups -> one GRPO step -> weights of version v+1
                               ------------------------------------->  in flight, no restart

What is whose:
[paper] rollouts and learner run asynchronously; an Evolving Data Buffer and Adaptive Sampling
        decide what to roll out next.
[ours]  1. The staleness rule (after AReaL), see `Curriculum`.
        2. Only queues cross processes, and one process owns buffer and sampler: no lock is held
           across processes. The queues are plain `queue.Queue`s that a `multiprocessing.managers`
           server on rank 0 offers over TCP under a random key. Weights are files in shared memory;
           other nodes than rank 0's copy them into theirs through the same server.
        3. Every publication of weights ends in a self-check: the engine scores a fixed probe and
           the learner compares with its own log-probabilities.
        4. Whatever ends a run (the last step, Ctrl-C, a crash, kill -9 of any process), guard
           processes beside rank 0 and each engine remove what it leaves behind.
"""

import argparse
import bisect
import contextlib
import dataclasses
import fcntl
import functools
import importlib.util
import json
import multiprocessing
import os
import queue
import secrets
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from buffer import OPERATORS, EvolvingBuffer, Group, Task, last_line, plain
from rollout import (Engine, EngineConfig, Parser, PromptBudget, Prompter, Request, Result,
                     RolloutConfig, RolloutWorker, check_model, engine_plan, gpus_of_slots, leave,
                     lock_record, read_settings, scratch_folder, standing, start_guard, trained_on,
                     write_whole)
from sampler import AdaptiveSampler
from sandbox import CompetitionError, Sandbox, load_competitions

# torch, transformers and vllm are imported where they are used: --help and errors come at once.


class UserError(Exception):
    """Something that the user can mend: one line that names it and the remedy, exit status 2."""


class WorkerDied(Exception):
    """A process of the run has ended unexpectedly: one line, exit status 1."""


# ---------------------------------------------------------------------------------------------
# 1. Config: a field is a flag, its text is the flag's --help


def opt(default, text: str, **extra):
    """A Config field with its --help text; `choices` as for argparse."""
    return field(default=default, metadata={"help": text, **extra})


@dataclass
class Config:
    # --- where things are
    preset: str = opt("tiny", "named set of defaults; where there is an NVIDIA driver (nvidia-smi) "
                              "the default is small instead", choices=["tiny", "small", "ace30b"])
    model: str = opt("data/policy", "Hugging Face model directory, the policy to start from")
    competitions: str = opt("data/competitions/train", "training competitions: a directory, a file "
                            "of MLE-bench ids, lite (MLE-bench-Lite) or all (MLE-bench)")
    heldout: str = opt("data/competitions/heldout",
                       "competitions for evaluation only, named likewise; '' for none")
    data_dir: str = opt("", "where `mlebench prepare` has put MLE-bench's data; '' means its own "
                            "default")
    allow_overlap: bool = opt(False, "let competitions be both trained and evaluated on")
    run_dir: str = opt("", "where the run is written; '' means runs/<preset>-<time>")
    seed: int = opt(0, "seed of the sampler and the engines")
    # --- how much
    steps: int = opt(76, "learner steps")
    groups: int = opt(8, "B: groups (tasks) a learner step")
    responses: int = opt(12, "G: responses a group; the advantage compares them")
    eval_drafts: int = opt(32, "drafts per competition before and after training; 0: no evaluation")
    checkpoint_every: int = opt(20, "steps between checkpoints; the last step always has one")
    keep_checkpoints: int = opt(2, "checkpoints kept; older ones are deleted")
    tensorboard: bool = opt(False, "write the numbers of metrics.jsonl for TensorBoard too, into "
                                   "<run-dir>/tensorboard")
    # --- roles
    learner_ranks: int = opt(0, "L: ranks that learn, the others roll out; 0: half of them")
    tensor_parallel: int = opt(1, "GPUs per engine; so many rollout ranks share one engine")
    rollout_threads: int = opt(24, "groups in flight per engine; (eta + 1) * B, all that is handed "
                                   "out at a time, keeps its batches large")
    sandbox_slots: int = opt(2, "scripts that run at the same time per rollout rank")
    sandbox_gpus: str = opt("", "GPU ids for the scripts, e.g. 6,7: one for each sandbox slot in "
                                "turn; '' for none")
    learner_threads: int = opt(1, "CPU threads of the learner (CPU training only); with two, each "
                                  "waits for the other whenever a sandbox has its core")
    engine_threads: int = opt(1, "CPU threads of the engine (CPU engines only)")
    # --- asynchrony
    max_staleness: int = opt(2, "eta: versions a group may be old when it is learnt from; 0: "
                                "synchronous")
    stale: str = opt("wait", "a group that would become too old: the learner waits for it, or it "
                             "is dropped (which favours fast scripts)", choices=["wait", "drop"])
    # --- faults
    watchdog: float = opt(600.0, "seconds without a finished group after which every part says "
                                 "what it is waiting for; 0: never")
    collective_timeout: float = opt(1800.0, "seconds after which a collective operation among the "
                                            "ranks gives up; no rollout ever runs inside one")
    # --- the algorithm
    advantage: str = opt("dr_grpo", "group-relative advantage: with (grpo) or without (dr_grpo) "
                                    "division by the standard deviation",
                         choices=["grpo", "dr_grpo"])
    best_of: int = opt(3, "k: reinforce what a response adds to the one of k of its group that an "
                          "agent would choose, by printed validation score; 1: its reward, as GRPO")
    loss: str = opt("dr_grpo", "policy loss", choices=["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
    clip_low: float = opt(0.2, "the ratio is clipped below at 1 - this; gspo, whose ratio is a "
                               "geometric mean, wants 3e-4, and 4e-4 above")
    clip_high: float = opt(0.28, "the ratio is clipped above at 1 + this; more than clip-low keeps "
                                 "exploration alive")
    tis_cap: float = opt(0.0, "cap of truncated importance sampling; 0: off. The ratio to the "
                              "behaviour policy corrects already; with a cap, weights are "
                              "truncated instead, and nothing is clipped")
    kl_coef: float = opt(0.0, "weight of the KL divergence to the initial policy; 0: no reference")
    kl_kind: str = opt("k3", "estimator of that KL", choices=["k2", "k3"])
    entropy_coef: float = opt(0.0005, "weight of the entropy bonus")
    temperature: float = opt(1.0, "sampling temperature; it divides the learner's logits too")
    reward: str = opt("rank", "what a valid submission earns: human rank, milestones, medals only",
                      choices=["rank", "milestone", "medal"])
    # --- what to train on
    sampler: str = opt("lp", "task score: Learnability Potential or an alternative",
                       choices=["lp", "variance", "regret", "uniform"])
    buffer: bool = opt(True, "evolving buffer; --no-buffer trains on drafts only")
    crossover: bool = opt(False, "a fourth operator: combine two valid scripts [ours]")
    capacity: int = opt(4096, "tasks that the buffer holds")
    max_depth: int = opt(16, "longest chain of improve and debug steps")
    children: int = opt(3, "new tasks admitted per group")
    frontier: int = opt(8, "improve tasks held of a competition, the newest; 0: no limit")
    tau: float = opt(1.0, "temperature of the task distribution; smaller is greedier")
    epsilon: float = opt(0.2, "share of the task distribution that is uniform over competitions")
    # --- the learner
    learning_rate: float = opt(1e-3, "peak learning rate of AdamW")
    warmup_steps: int = opt(3, "steps of linear warm-up")
    decay: bool = opt(True, "the learning rate falls linearly and would be 0 after the last step")
    max_grad_norm: float = opt(0.01, "gradient norm is clipped at this; dr_grpo's are small, its "
                                     "denominator counts the longest response allowed")
    token_budget: int = opt(8192, "tokens packed into one micro-batch")
    learner_dtype: str = opt("float32", "dtype of the learner's forward and backward (master "
                                         "weights are float32)", choices=["float32", "bfloat16"])
    activation_checkpointing: bool = opt(False, "recompute activations in the backward pass")
    cpu_offload: bool = opt(False, "parameters, gradients and optimizer in host memory between "
                                   "uses; needs two learner ranks or more")
    # --- the engine
    engine_dtype: str = opt("float32", "dtype of the vLLM engine", choices=["float32", "bfloat16"])
    max_model_len: int = opt(1024, "prompt + response, tokens")
    max_response_tokens: int = opt(72, "longest response, tokens; scripts that work have up to 62 "
                                       "here, and garbage that runs on would outweigh them")
    max_num_seqs: int = opt(96, "sequences decoded together")
    kv_cache_gib: float = opt(0.5, "key-value cache, GiB; 0: vLLM's fraction of the GPU memory")
    logprob_gap_limit: float = opt(0.02, "mean |engine - learner| log-probability on the probe "
                                         "after an update beyond which training stops, nat")
    # --- prompts and executions
    description_chars: int = opt(600, "longest competition description in a prompt, characters")
    preview_chars: int = opt(240, "longest data preview in a prompt, characters")
    output_chars: int = opt(300, "longest execution output in a prompt, characters")
    timeout: float = opt(10.0, "wall-clock limit of a script, seconds")
    cpu_seconds: float = opt(3.0, "CPU limit of a script, seconds")
    memory_mb: int = opt(2048, "memory limit of a script, MB")
    disk_mb: int = opt(256, "limit of what a script writes, MB")
    reuse_mb: float = opt(256.0, "memory of a rollout rank for results of scripts, MB: one that "
                                 "comes again on the same competition is not run again; 0: all are")
    sandbox_delay: float = opt(0.0, "sleep this long on average (exponential) before each script, "
                                    "in its slot, seconds; to measure asynchrony with slow scripts")
    unsafe: bool = opt(False, "run scripts without isolation where the system offers none")


# One node of 8 x 80 GB: 4 ranks learn with FSDP, 4 engines roll out.
SMALL = dict(
    model="Qwen/Qwen3-8B", competitions="examples/mlebench_medium.txt", heldout="lite",
    steps=400, groups=16, responses=8, eval_drafts=0, rollout_threads=16, sandbox_slots=16,
    learning_rate=1e-6, warmup_steps=10, decay=False, max_grad_norm=1.0, entropy_coef=0.0,
    best_of=1, token_budget=32768, learner_dtype="bfloat16", activation_checkpointing=True,
    engine_dtype="bfloat16", max_model_len=24576, max_response_tokens=8192, max_num_seqs=128,
    kv_cache_gib=0.0, logprob_gap_limit=0.1, description_chars=12000, preview_chars=6000,
    output_chars=4000, timeout=3600.0, cpu_seconds=14400.0, memory_mb=32768, disk_mb=16384)
PRESETS = {
    "tiny": {},  # the defaults above: a 2M-parameter policy on two CPU cores
    "small": SMALL,
    # The paper's model and number of steps; 4 nodes of 8 x 80 GB are our choice.
    "ace30b": SMALL | dict(model="Qwen/Qwen3-30B-A3B", learner_ranks=16, tensor_parallel=2),
}


def parse_config(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """Command line -> (Config, arguments that are not part of it: resume, dry_run).

    A flag that is given wins over the --config file, which wins over the resumed run's config.json
    or the preset, which win over the field's default.

    Raises:
        UserError: one line that names the flag and, where it comes from one, the file.

    >>> parse_config(["--preset", "tiny", "--steps", "3"])[0].steps
    3
    """
    parser = Parser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        epilog="Defaults shown are those of the tiny preset, which is taken on machines without "
               "nvidia-smi; PRESETS in train.py has what the others change.")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with this run, with its config")
    parser.add_argument("--dry-run", action="store_true",
                        help="print the plan (processes, memory) and stop")
    parser.add_argument("--config", metavar="FILE",
                        help="YAML file of these flags; examples/ has one")
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        # SUPPRESS: a flag that is not given does not appear, so that given ones can be told.
        text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text,
                            choices=f.metadata.get("choices"), **kind)
    try:
        arguments = parser.parse_args(argv)
        if arguments.config:
            words = read_settings(arguments.config, Config.__annotations__)
            try:
                parser.parse_args(words)
            except ValueError as error:
                raise UserError(f"--config {arguments.config}: {error}") from None
            arguments = parser.parse_args(words + list(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        raise UserError(str(error)) from None
    given = {k: v for k, v in vars(arguments).items() if k not in ("resume", "dry_run", "config")}
    if arguments.resume is not None:
        base = load_config(Path(arguments.resume))
        refuse_to_change(base, given)
    else:
        preset = given.get("preset", "small" if shutil.which("nvidia-smi") else "tiny")
        base = {"preset": preset, **PRESETS[preset]}
    return Config(**{**base, **given}), arguments


def load_config(run_dir: Path) -> dict:
    """The config.json of a run that is resumed."""
    try:
        saved = json.loads((run_dir / "config.json").read_text())
        if unknown := set(saved) - set(Config.__annotations__):
            raise ValueError("it is of another version of train.py, which had "
                             + ", ".join(sorted(unknown)) + ": start a new run")
        config = Config(**saved)
        for f in dataclasses.fields(Config):
            value, choices = getattr(config, f.name), f.metadata.get("choices")
            # JSON may have a whole number where a float is meant.
            if type(value) not in (f.type, int if f.type is float else f.type):
                raise ValueError(f"{f.name}: {value!r} is no {f.type.__name__}")
            if choices and value not in choices:
                raise ValueError(f"{f.name}: {value!r} is none of {', '.join(choices)}")
        return {**dataclasses.asdict(config), "run_dir": str(run_dir)}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--resume {run_dir}: no config.json there; give a run directory")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume {run_dir}: config.json cannot be read ({error})")


def refuse_to_change(base: dict, given: dict) -> None:
    """A resumed run stays in its directory, and keeps what its staleness rule has counted with."""
    new, run_dir = {**base, **given}, base["run_dir"]
    if Path(new["run_dir"]).resolve() != Path(run_dir).resolve():
        raise UserError(f"--run-dir {new['run_dir']}: --resume goes on in {run_dir}; give one of "
                        "the two")
    if new["preset"] != base["preset"]:  # it is the start of a config, not a part of it
        raise UserError(f"--preset {new['preset']}: --resume {run_dir} goes on with its own "
                        f"settings, which began as {base['preset']}; give the flags that are to "
                        "change")
    if new["buffer"] != base["buffer"]:
        raise UserError(f"--{'' if new['buffer'] else 'no-'}buffer: --resume {run_dir} began "
                        f"with{'' if base['buffer'] else 'out'} the buffer and goes on so")
    for name in ("groups", "responses"):  # finished groups wait in the checkpoint
        if new[name] != base[name]:
            raise UserError(f"--{name} {new[name]}: --resume {run_dir} began with {base[name]} and "
                            "must keep them")
    if (base["stale"], new["stale"]) == ("drop", "wait"):
        raise UserError(f"--stale wait: --resume {run_dir} began with --stale drop, and groups may "
                        "have become too old already")
    if new["max_staleness"] < base["max_staleness"]:
        raise UserError(f"--max-staleness {new['max_staleness']}: --resume {run_dir} has handed "
                        f"out tasks that count on {base['max_staleness']}: it may only grow")


# Bounds of each numeric flag; NaN fails every comparison. MOST keeps seconds within poll(2)'s 2^31
# milliseconds, and numpy's seeds, of which each rank has its own, within 2^32.
BOUNDS = (
    (lambda x: x >= 1, "at least 1",
     "steps groups responses best_of checkpoint_every keep_checkpoints learner_ranks "
     "tensor_parallel rollout_threads sandbox_slots learner_threads engine_threads capacity "
     "children token_budget max_model_len max_response_tokens max_num_seqs memory_mb disk_mb"),
    (lambda x: x > 0, "greater than 0",
     "collective_timeout temperature learning_rate max_grad_norm logprob_gap_limit timeout "
     "cpu_seconds"),
    (lambda x: x >= 0, "at least 0",
     "seed eval_drafts max_staleness watchdog clip_low clip_high tis_cap kl_coef entropy_coef "
     "max_depth frontier epsilon warmup_steps kv_cache_gib description_chars "
     "preview_chars output_chars sandbox_delay reuse_mb"),
    (lambda x: x >= 0.05, "at least 0.05", "tau"),
)
MOST = {int: 2**31, float: 2e6}


def validate(config: Config, world_size: int, node_size: int | None = None) -> None:
    """Refuse what cannot work before anything is started; fills in `learner_ranks` and `run_dir`.

    Args:
        world_size: ranks of the run.
        node_size: ranks a node; default: all are on one.

    Raises:
        UserError: one line that names the flag and the remedy.
    """
    if config.learner_ranks == 0:
        config.learner_ranks = max(1, world_size // 2)
    can_learn = max(world_size - 1, 1)  # a single process starts one more, which rolls out
    if config.learner_ranks > can_learn:
        raise UserError(f"--learner-ranks {config.learner_ranks}: of {world_size} ranks at most "
                        f"{can_learn} can learn, for one must roll out; torchrun starts more")
    for holds, words, names in BOUNDS:
        for name in names.split():
            value, most = getattr(config, name), MOST[Config.__annotations__[name]]
            if not (holds(value) and value <= most):
                raise UserError(f"--{name.replace('_', '-')} must be {words} and at most "
                                f"{most:.0f}, not {value}")
    if config.responses < 2:
        raise UserError("--responses must be at least 2: the advantage compares within the group")
    if config.best_of > config.responses:
        raise UserError(f"--best-of {config.best_of} of the {config.responses} responses of a "
                        "group: lower it, or raise --responses")
    if config.crossover and config.children < 2:
        raise UserError("--crossover needs --children 2 or more: it takes one of their places")
    if config.epsilon > 1:
        raise UserError("--epsilon must lie between 0 and 1")
    if config.max_response_tokens >= config.max_model_len:
        raise UserError("--max-response-tokens must be smaller than --max-model-len, which holds "
                        "prompt and response")
    if config.token_budget < config.max_model_len:
        raise UserError("--token-budget must be at least --max-model-len: a sequence has to fit")
    rollout_ranks = max(world_size - config.learner_ranks, 1)
    if rollout_ranks % config.tensor_parallel:
        raise UserError(f"--tensor-parallel {config.tensor_parallel} does not divide the "
                        f"{rollout_ranks} rollout ranks")
    node_size = node_size or world_size
    for rank in range(config.learner_ranks, world_size, config.tensor_parallel):
        if rank % node_size + config.tensor_parallel > node_size:
            raise UserError(f"--tensor-parallel {config.tensor_parallel}: the engine of rank "
                            f"{rank} would span two nodes of {node_size} ranks; choose "
                            "--learner-ranks such that no engine does")
    if config.cpu_offload and config.learner_ranks < 2:
        raise UserError("--cpu-offload is FSDP's: it needs at least two --learner-ranks")
    if world_size == 1 and not config.kv_cache_gib:
        raise UserError("--kv-cache-gib 0: in a single process the engine shares the learner's "
                        "device; give the cache a size, or start torchrun with several ranks")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is not installed; pip install tensorboard")
    if not config.run_dir:
        started = time.strftime("%Y%m%d-%H%M%S", time.localtime(start_of_run()))
        config.run_dir = f"runs/{config.preset}-{started}"


def start_of_run() -> float:
    """Seconds since 1970. Under torchrun when its agent, our parent, was started: ranks that it
    starts again must find the run directory of the ranks before them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return time.time()
    ticks = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    boot = Path("/proc/stat").read_text().partition("btime ")[2].split()[0]
    return int(boot) + int(ticks) / os.sysconf("SC_CLK_TCK")


def restarted_by_torchrun(config: Config) -> bool:
    """Whether these ranks replace others of the same torchrun (--max-restarts), so that they have
    to go on with its run directory; `launch` there names who wrote it."""
    try:
        return (Path(config.run_dir) / "launch").read_text() == f"{start_of_run():.2f}"
    except OSError:
        return False


def check_policy(model: str, max_model_len: int) -> None:
    """Refuse a --model that is neither a model directory nor, by its form, a name of the hub."""
    path = Path(model)
    if model == Config.model and not path.is_dir():
        raise UserError(f"--model {model}: no such directory; run `make data`")
    if path.is_dir() or model.count("/") != 1 or path.parent.exists():
        try:
            check_model(model, max_model_len)
        except ValueError as error:
            raise UserError(error) from None


# ---------------------------------------------------------------------------------------------
# 2. Curriculum: what is rolled out next, and what may be learnt from


class Curriculum:
    """Hands out tasks, takes in groups, forms batches. Owns the buffer and the sampler.

    The staleness rule. With learner version i, another task is handed out only while
    n < (i + eta + 1) * B, n being the groups handed out that were or may still be trained on.
    A group whose oldest token is of version v is learnt from at version v + eta at the latest:
    `next_batch` waits for groups in flight that would otherwise become too old (`stale=wait`), or
    they are let go and never trained on (`stale=drop`).

    One thread (`run`) reads the results; the learner calls `next_batch` and `stepped`. Everything
    is under one lock, which is never held while waiting for a queue or a collective.
    """

    def __init__(self, config: Config, buffer, sampler, tasks, results,
                 trace_log: Path | None = None):
        self.config, self.buffer, self.sampler = config, buffer, sampler
        self.tasks, self.results = tasks, results
        self.epoch = 0  # +1 with each resume
        self.trace_log = open(trace_log, "a") if trace_log else None
        self.arrived = time.monotonic()  # when the last result came in
        self.refused: dict[str, int] = defaultdict(int)  # submissions in a row, by competition
        self.changed = threading.Condition()
        self.version = 0  # learner version, as far as published
        self.handed = 0  # n of the staleness rule
        self.issued = 0  # the same, with the groups of skipped steps: what bounds a run's length
        self.in_flight: dict[str, int] = {}  # task id -> version at which it was handed out
        self.ready: list[Result] = []  # groups that wait to be learnt from, oldest first
        self.evaluations: list[Result] = []
        self.dropped = 0  # groups that became too old (stale=drop)
        self.skipped = 0  # tasks whose prompt left no room for a response
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begin, once the engines have the weights: what a checkpoint found in flight is handed out
        again here, unless the run is to be shorter now and nobody would learn from it."""
        for task_id, version in list(self.in_flight.items()):
            if self.issued > self.config.steps * self.config.groups:
                del self.in_flight[task_id]
                self.sampler.release(task_id)
                self.give_back()
            else:
                self.tasks.put(Request(self.buffer.tasks[task_id], self.config.responses, version))
        self.thread = threading.Thread(target=self.run, name="curriculum", daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            while (result := self.results.get()) is not None:
                with self.changed:
                    self.receive(result)
                    self.hand_out()
                    self.changed.notify_all()
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Wake the learner up with an error: it must not wait for groups that never come."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    # -- handing out

    def hand_out(self) -> None:
        """Hand out as many tasks as the staleness rule allows. Call with the lock held."""
        config = self.config
        while (self.handed < (self.version + config.max_staleness + 1) * config.groups
               and self.issued < config.steps * config.groups):
            drawn = self.sampler.draw(1)
            if not drawn:
                return  # every task is in flight
            task = self.buffer.tasks[drawn[0]]
            self.in_flight[task.id] = self.version
            self.handed += 1
            self.issued += 1
            self.tasks.put(Request(task, config.responses, self.version))

    # -- taking in

    def receive(self, result: Result) -> None:
        """File one result. Call with the lock held."""
        self.arrived = time.monotonic()
        request, group = result.request, result.group
        if request.purpose != "train":
            self.evaluations.append(result)
            return
        task_id = request.task.id
        del self.in_flight[task_id]
        if group is None:
            # Its prompt is too long, by the parent's script and output: drafts were checked at the
            # start. The task leaves, and its place in the batch is given back.
            self.skipped += 1
            self.give_back()
            self.sampler.release(task_id)
            self.buffer.remove(task_id)
            self.sampler.remove(task_id)
            return
        group.epoch = self.epoch
        # The buffer first: its log may fail (disk full), and the sampler knows no more than the log
        # then. It evicts by the potentials before this group.
        admitted, evicted = self.buffer.add(group, self.sampler.score, self.in_flight)
        self.sampler.update(task_id, group.rewards, group.failed)
        self.follow(admitted, evicted)
        if self.trace_log:
            for trace in group.traces:
                self.trace_log.write(json.dumps(trace.public()) + "\n")
            self.trace_log.flush()
        self.watch_grader(group)
        if group.policy_version < self.version - self.config.max_staleness:
            self.dropped += 1  # only with stale=drop: wait never lets it come to this
            self.give_back()
            return
        # By age, then by arrival.
        bisect.insort(self.ready, result, key=lambda r: r.group.policy_version)

    def give_back(self, groups: int = 1) -> None:
        """Groups that are never learnt from: others may be handed out in their place."""
        self.handed -= groups
        self.issued -= groups

    def follow(self, admitted, evicted) -> None:
        """Keep the sampler's tasks those of the buffer."""
        for task_id in evicted:
            self.sampler.remove(task_id)
        for task in admitted:
            self.sampler.add(task.id, task.competition_id, task.operator, task.headroom)

    def watch_grader(self, group: Group) -> None:
        """Say so when a competition refuses everything: perhaps it is its grader that is broken."""
        competition, many = group.task.competition_id, 100
        before = self.refused[competition]
        for trace in group.traces:
            if trace.valid:
                self.refused[competition] = 0
            elif trace.status == "invalid":
                self.refused[competition] += 1
                reason = trace.reason
        if before < many <= self.refused[competition]:
            print(f"warning: {competition} has refused {self.refused[competition]} submissions in "
                  f"a row, the last because {reason}", file=sys.stderr, flush=True)

    def describe(self) -> str:
        """What the next batch waits for, in a line; for the watchdog."""
        if not self.changed.acquire(timeout=1):
            return "curriculum: at work on a result (its lock is taken)"
        try:
            text = (f"curriculum: {len(self.ready)} of the {self.config.groups} groups of a batch "
                    f"are there, {len(self.in_flight)} tasks are in flight, "
                    f"{self.tasks.qsize()} of them not taken up by a rollout thread")
            if self.in_flight:
                task_id, version = next(iter(self.in_flight.items()))
                text += f"; the oldest is {task_id}, handed out at version {version}"
            return text
        finally:
            self.changed.release()

    # -- the learner's side

    def next_batch(self) -> list[Result]:
        """Wait for a batch: the B oldest groups, see `batch_is_ready`."""
        with self.changed:
            self.hand_out()
            self.changed.wait_for(lambda: self.error or self.batch_is_ready())
            if self.error:
                raise self.error
            batch = self.ready[:self.config.groups]
            self.ready = self.ready[self.config.groups:]
            return batch

    def batch_is_ready(self) -> bool:
        """Whether the B oldest finished groups may be learnt from now.

        With `wait`, what they leave behind must still be young enough when its turn comes: in order
        of age, the k-th group left is learnt from at version i + 1 + k // B at best. Taking young
        groups early would push an old one, that is still in flight, over the limit.
        """
        config = self.config
        if len(self.ready) < config.groups:
            return False
        if config.stale == "drop":
            return True
        left = sorted([r.group.policy_version for r in self.ready[config.groups:]]
                      + list(self.in_flight.values()))
        return all(self.version + 1 + k // config.groups - version <= config.max_staleness
                   for k, version in enumerate(left))

    def stepped(self, version: int) -> None:
        """The learner has taken a step, or skipped it when `version` has not changed."""
        with self.changed:
            if version == self.version:
                self.handed -= self.config.groups  # a skipped step's groups leave n
            self.version = version
            if self.config.stale == "drop":
                oldest = version - self.config.max_staleness
                young = [r for r in self.ready if r.group.policy_version >= oldest]
                old = len(self.ready) - len(young)
                self.dropped += old
                self.give_back(old)
                self.ready = young
            self.hand_out()

    def metrics(self) -> dict:
        """Its part of a row of metrics.jsonl."""
        with self.changed:  # groups go on arriving
            return ({f"buffer_{operator}": n for operator, n in self.buffer.counts().items()}
                    | self.sampler.metrics()
                    | {"dropped": self.dropped, "skipped_prompts": self.skipped})

    def evaluate(self, requests: list[Request], progress) -> list[Result]:
        """Hand out evaluation requests and wait for all of their results."""
        results = []
        for request in requests:
            self.tasks.put(request)
        with self.changed:
            while len(results) < len(requests):
                self.changed.wait_for(lambda: self.error or self.evaluations)
                if self.error:
                    raise self.error
                results.append(self.evaluations.pop())
                progress()
        return results

    # -- checkpoint

    def state_dict(self) -> dict:
        """Everything that a resumed run needs, as JSON. Groups that wait to be learnt from are
        kept; tasks in flight are handed out again."""
        with self.changed:
            return {
                "buffer": self.buffer.state_dict(),
                "sampler": self.sampler.state_dict(),
                "epoch": self.epoch,
                "version": self.version,
                "handed": self.handed,
                "issued": self.issued,
                "dropped": self.dropped,
                "skipped": self.skipped,
                "in_flight": dict(self.in_flight),
                "ready": [result.group.to_json() for result in self.ready],
            }

    def load_state_dict(self, state: dict) -> None:
        """Take up a checkpoint; `replay` has to follow."""
        with self.changed:
            self.buffer.load_state_dict(state["buffer"])
            self.sampler.load_state_dict(state["sampler"])
            for name in ("version", "epoch", "handed", "issued", "dropped", "skipped"):
                if type(state[name]) is not int or state[name] < 0:
                    raise ValueError(f"{name}: {state[name]!r} is no count")
                setattr(self, name, state[name])
            self.in_flight = dict(state["in_flight"])
            if lost := self.in_flight.keys() - self.buffer.tasks.keys():
                raise ValueError(f"the buffer lacks {min(lost)}, which is in flight")
            self.ready = [Result(Request(g.task, len(g.traces), g.handout_version), g)
                          for g in map(Group.from_json, state["ready"])]

    def replay(self) -> None:
        """Groups that finished after the checkpoint, or before there was one, feed the buffer and
        the sampler (from the buffer's log), but are not learnt from: the policy that sampled them
        is abandoned."""
        with self.changed:
            for change in self.buffer.replay():
                if change.rewards.size:  # none: a task whose prompt was too long was removed
                    self.sampler.update(change.task_id, change.rewards, change.failed)
                    self.epoch = max(self.epoch, change.epoch)
                else:
                    self.skipped += 1
                    self.sampler.release(change.task_id)
                for task_id in change.evicted:
                    # In flight and evicted: a resume with fewer steps had released it.
                    if self.in_flight.pop(task_id, None) is not None:
                        self.sampler.release(task_id)
                        self.give_back()
                self.follow(change.admitted, change.evicted)
                # What was in flight and has not come back keeps its old place in the staleness
                # rule; the place of what came back is free.
                if self.in_flight.pop(change.task_id, None) is not None:
                    self.give_back()
            self.epoch += 1


# ---------------------------------------------------------------------------------------------
# 3. From groups to a learner batch and to metrics


def make_batch(results: list[Result], config: Config) -> list:
    """Groups -> the learner's sequences; groups whose advantages are all 0 teach nothing and stay
    out.

    Returns:
        Sequences (see learner.py), the G of a group next to each other.
    """
    import torch

    from grpo import best_of, group_advantages
    from learner import Sequence

    sequences = []
    for group in (r.group for r in results):
        rewards = torch.tensor(group.rewards, dtype=torch.float64)[None]  # (1, G)
        claims = torch.tensor([[standing(t.claim) for t in group.traces]], dtype=torch.float64)
        rewards = best_of(rewards, config.best_of, claims)
        advantages = group_advantages(rewards, config.advantage)[0]  # (G,)
        if not advantages.any():
            continue
        for trace, advantage in zip(group.traces, advantages.tolist()):
            sequences.append(Sequence(
                tokens=np.concatenate([trace.prompt_ids, trace.response_ids]),
                prompt_length=len(trace.prompt_ids),
                behavior_logprobs=trace.logprobs,
                advantage=advantage))
    return sequences


def batch_metrics(results: list[Result], version: int) -> dict:
    """What a batch looked like before it was learnt from; rates over all of its traces."""
    groups = [r.group for r in results]
    traces = [t for g in groups for t in g.traces]
    rewards = np.array([t.reward for t in traces])
    staleness = [version - g.policy_version for g in groups]
    metrics = {
        "reward_mean": rewards.mean(),
        "reward_std": rewards.std(),
        "valid_rate": np.mean([t.valid for t in traces]),
        "medal_rate": np.mean([t.medal != "none" for t in traces]),
        "groups": len(groups),
        "staleness_mean": np.mean(staleness),
        "staleness_max": max(staleness),
        "unique_scripts": len({t.code_key for t in traces if t.code}),
        "unchanged_rate": np.mean([t.code_key in [p.code_key for p in g.task.parents]
                                   for g in groups for t in g.traces]),
        "reused_rate": np.mean([t.reused for t in traces]),
        "response_tokens": np.mean([len(t.response_ids) for t in traces]),
        "seconds_rollout": np.mean([r.seconds_rollout for r in results]),
        "seconds_sandbox": np.mean([r.seconds_sandbox for r in results]),
    }
    for operator in OPERATORS:
        own = [t for t in traces if t.operator == operator]
        metrics[f"groups_{operator}"] = sum(g.task.operator == operator for g in groups)
        metrics[f"reward_{operator}"] = np.mean([t.reward for t in own]) if own else None
        metrics[f"valid_{operator}"] = np.mean([t.valid for t in own]) if own else None
        metrics[f"medal_{operator}"] = np.mean([t.medal != "none" for t in own]) if own else None
    return {k: None if v is None else round(float(v), 6) for k, v in metrics.items()}


# Every row of metrics.jsonl has the same keys: these are null where a step had nothing to learn
# from.
EMPTY_METRICS = dict.fromkeys(
    "tokens tokens_total tokens_computed loss grad_norm learning_rate skipped kl kl_ref "
    "logprob_diff clip_frac clip_frac_low clip_frac_high entropy is_ratio_mean ess "
    "logprob_gap".split())


def evaluation_rows(results: list[Result]) -> list[dict]:
    """Rows of eval.jsonl: per competition, rates over the drafts of a frozen policy."""
    rows = []
    for result in sorted(results, key=lambda r: r.request.task.competition_id):
        when, split = result.request.purpose.split("/")
        if result.group is None:
            raise UserError(f"{result.request.task.competition_id}: {result.error}")
        traces = result.group.traces
        rows.append({
            "when": when,
            "split": split,
            "competition_id": result.request.task.competition_id,
            "policy_version": result.group.policy_version,
            "drafts": len(traces),
            "valid_rate": float(np.mean([t.valid for t in traces])),
            "medal_rate": float(np.mean([t.medal != "none" for t in traces])),
            # A draft that is not valid ranks behind everybody: 0.
            "human_rank": float(np.mean([t.human_rank if t.valid else 0.0 for t in traces])),
        })
    return rows


# ---------------------------------------------------------------------------------------------
# 4. Queues between processes


class QueueServer:
    """Named `queue.Queue`s on rank 0, offered to the other processes over TCP.

    Whoever knows the random key may connect: it travels through the process group or a pipe, never
    in arguments or the environment. Nothing that a peer without it sends is unpickled. As with
    gloo and NCCL, the network between the nodes is trusted: the traffic is authenticated, not
    encrypted.
    """

    def __init__(self, host: str = "127.0.0.1"):
        """`host`: where to listen; "" for every interface."""
        self.queues: dict[str, queue.Queue] = {}
        self.key = secrets.token_bytes(32)

        class Manager(BaseManager):
            pass

        Manager.register("queue", callable=self)
        server = Manager(address=(host, 0), authkey=self.key).get_server()
        self.address = server.address
        handle = server.handle_request

        def handle_request(connection):
            """Say when a peer is turned away: multiprocessing tells the peer, and nobody else."""
            send = connection.send

            def say(message):
                if message[0] == "#TRACEBACK" and "_challenge" in message[1]:
                    print("queue server: refused a connection that does not know the key",
                          file=sys.stderr, flush=True)
                else:
                    send(message)

            connection.send = say
            handle(connection)

        server.handle_request = handle_request
        threading.Thread(target=server.serve_forever, name="queues", daemon=True).start()

    def __call__(self, name: str) -> queue.Queue:
        # Each connection has a thread of its own: of two that ask first, both must get the same.
        return self.queues.setdefault(name, queue.Queue())


def connect_queues(address: tuple[str, int], key: bytes):
    """The other processes' way to the queues: returns `name -> queue proxy`."""

    class Manager(BaseManager):
        pass

    Manager.register("queue")
    manager = Manager(address=address, authkey=key)
    manager.connect()
    return manager.queue


class PublishedFiles:
    """Rank 0's folder of published weights, for ranks on other nodes; offered beside the queues,
    under the name "published"."""

    def __init__(self, folder: Path):
        self.folder = folder

    def sizes(self, version: str) -> dict[str, int]:
        """File names of a version, and their bytes."""
        return {path.name: path.stat().st_size for path in (self.folder / version).iterdir()}

    def read(self, version: str, name: str, offset: int, size: int) -> bytes:
        with open(self.folder / version / name, "rb") as file:
            file.seek(offset)
            return file.read(size)


CHUNK = 64 << 20  # bytes of a file that travel in one message


def fetch_weights(directory: Path, connect) -> None:
    """Have the published `directory` on this node as well, under the same path.

    On rank 0's node it is there. On another one the first rank that comes copies it, for all ranks
    of the node, in the place of the version before, which every engine has taken over by now;
    the guard of the rank that made the folder removes it.
    """
    if directory.exists():
        return
    folder = directory.parent
    with contextlib.suppress(FileExistsError):  # another rank of this node has made it
        folder.mkdir(mode=0o700)
        start_guard([folder])
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return
        for old in folder.glob("v*"):
            shutil.rmtree(old)
        staging = folder / "incoming"
        staging.mkdir()
        published = connect("published")
        for name, size in published.sizes(directory.name).items():
            with open(staging / name, "wb") as file:
                for offset in range(0, size, CHUNK):
                    file.write(published.read(directory.name, name, offset, CHUNK))
        staging.rename(directory)


# ---------------------------------------------------------------------------------------------
# 5. Nothing stays behind (see also rollout.start_guard)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies: torchrun, or rank 0."""
    import ctypes

    PR_SET_PDEATHSIG = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        leave(1)


INTERRUPTED = threading.Event()


def interrupt_on_signals() -> None:
    """Ctrl-C and SIGTERM both raise KeyboardInterrupt, also where the shell had them ignored, as it
    does for background jobs."""
    def interrupt(*_):
        INTERRUPTED.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)


def exit_on_sigterm() -> None:
    """torchrun ends its ranks with SIGTERM, perhaps inside a collective: leave at once, and let
    the guard clean up."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))


# ---------------------------------------------------------------------------------------------
# 6. Roles


def load_splits(config: Config) -> tuple[list, list]:
    """Training and held-out competitions, which must not overlap unless that is wanted."""
    train = load_competitions(config.competitions, config.data_dir or None)
    heldout = load_competitions(config.heldout, config.data_dir or None) if config.heldout else []
    both = ({c.id for c in train} | set(trained_on(config.model))) & {c.id for c in heldout}
    if both and not config.allow_overlap:
        raise UserError(f"--heldout {config.heldout}: {min(both)} is a training competition too, "
                        "of this run or of --model's; --allow-overlap lets it be both")
    if config.capacity < len(train):
        raise UserError(f"--capacity {config.capacity}: the buffer must hold a draft task for each "
                        f"of the {len(train)} training competitions")
    return train, heldout


def fitting(config: Config, competitions: list, tokenizer, kind: str) -> list[str]:
    """Ids of the competitions whose draft prompt leaves room for a response; the others are
    counted and left out, since a prompt is never cut.

    Raises:
        UserError: none is left.
    """
    prompter = make_prompter(config, tokenizer, competitions)
    lengths = {c.id: len(prompter(Task.root(c.id))) for c in competitions}
    room = config.max_model_len - config.max_response_tokens
    long = {c: length for c, length in lengths.items() if length > room}
    if long:
        text = (f"{len(long)} of {len(lengths)} {kind} competitions leave no room for a response "
                f"of {config.max_response_tokens} tokens, {max(long, key=long.get)} with a prompt "
                f"of {max(long.values())} tokens: raise --max-model-len (it is "
                f"{config.max_model_len}) or lower --description-chars, --preview-chars")
        if len(long) == len(lengths) and kind == "training":
            raise UserError(text)
        print(f"warning: left out: {text}", file=sys.stderr, flush=True)
    return [c for c in lengths if c not in long]


def rollout_main(config: Config, rank: int, address, key: bytes) -> None:
    """A rollout rank: one engine, one pool of sandboxes, threads that serve the task queue."""
    from transformers import AutoTokenizer

    scratch = scratch_folder("rollout")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each may come to need as much
    boxes = scratch_folder("sandbox",
                           ranks_here * config.sandbox_slots * config.disk_mb * 2**20)
    start_guard([scratch, boxes])
    connect = connect_queues(address, key)
    doing = {"now": lambda: "starts its engine"}
    threading.Thread(target=answer_watchdog, name="watchdog", daemon=True,
                     args=(rank, connect(f"watchdog/{rank}"), doing)).start()
    competitions = sum(load_splits(config), [])
    engine_number = (rank - config.learner_ranks) // config.tensor_parallel
    model = local_model(config.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    sandbox = Sandbox(slots=config.sandbox_slots, timeout=config.timeout,
                      cpu_seconds=config.cpu_seconds, memory_mb=config.memory_mb,
                      disk_mb=config.disk_mb, file_mb=config.disk_mb,
                      gpus=gpus_of_slots(config.sandbox_gpus, config.sandbox_slots,
                                         engine_number * config.sandbox_slots),
                      unsafe=config.unsafe, scratch=str(boxes),
                      delay=config.sandbox_delay, attempts=4, reuse_mb=config.reuse_mb)
    if sandbox.problem:
        print(f"rollout rank {rank}: scripts cannot be isolated here: {sandbox.problem}; --unsafe "
              "runs them without isolation", file=sys.stderr)
        leave(2)
    engine = Engine(model, engine_config(config, rank), scratch=scratch)
    prompter = make_prompter(config, tokenizer, competitions)
    error = serve_rollouts(config, rank, connect, engine, sandbox, prompter, doing)
    if error is not None:
        lost = isinstance(error, (EOFError, ConnectionError))
        print(f"rollout rank {rank}: " + ("the connection to rank 0 is lost" if lost else
              f"{type(error).__name__}: {error}"), file=sys.stderr)
        leave(1)
    sandbox.close()
    engine.close()


def serve_rollouts(config: Config, rank: int, connect, engine, sandbox, prompter: Prompter,
                   doing: dict) -> BaseException | None:
    """Roll out tasks and load published weights until rank 0 says that it is over.

    Returns:
        what ended it early, else None.
    """
    ended = queue.Queue()
    weights, acks = connect(f"weights/{rank}"), connect("acks")
    worker = RolloutWorker(
        connect("tasks"), connect("results"), engine, sandbox, prompter,
        RolloutConfig(config.max_response_tokens, config.temperature, config.reward,
                      config.timeout),
        threads=config.rollout_threads, slots=config.sandbox_slots, on_error=ended.put)
    doing["now"] = worker.describe

    def serve_weights():
        """Load each published version and answer with the probe's log-probabilities."""
        try:
            while (message := weights.get()) is not None:
                directory, version, probe = message
                fetch_weights(Path(directory), connect)
                engine.load(directory, version)
                acks.put(engine.score(probe))
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    threading.Thread(target=serve_weights, name="weights", daemon=True).start()
    if (error := ended.get()) is None:
        worker.join()
    return error


def answer_watchdog(rank: int, questions, doing: dict) -> None:
    """Say what this rank is doing whenever rank 0's watchdog asks."""
    try:
        while questions.get() is not None:
            print(f"  rollout rank {rank}: {doing['now']()}", file=sys.stderr, flush=True)
    except (EOFError, OSError):
        pass  # rank 0 is gone: others notice that too


def make_prompter(config: Config, tokenizer, competitions: list) -> Prompter:
    return Prompter(tokenizer, competitions, PromptBudget(
        config.description_chars, config.preview_chars, config.output_chars))


def engine_config(config: Config, rank: int = 0) -> EngineConfig:
    """The part of Config that the engine of a rollout rank understands."""
    return EngineConfig(
        max_model_len=config.max_model_len, max_num_seqs=config.max_num_seqs,
        dtype=config.engine_dtype, kv_cache_gib=config.kv_cache_gib or None,
        tensor_parallel_size=config.tensor_parallel, threads=config.engine_threads,
        seed=config.seed + rank)


def learner_config(config: Config):
    """The part of Config that learner.py understands."""
    from learner import LearnerConfig

    return LearnerConfig(
        learning_rate=config.learning_rate, warmup_steps=config.warmup_steps,
        decay_steps=config.steps if config.decay else 0, max_grad_norm=config.max_grad_norm,
        loss=config.loss, clip_low=config.clip_low, clip_high=config.clip_high,
        tis_cap=config.tis_cap or None, kl_coef=config.kl_coef, kl_kind=config.kl_kind,
        entropy_coef=config.entropy_coef, temperature=config.temperature,
        token_budget=config.token_budget, max_response_tokens=config.max_response_tokens,
        dtype=config.learner_dtype, activation_checkpointing=config.activation_checkpointing,
        cpu_offload=config.cpu_offload)


def learner_follow(learner, orders) -> None:
    """Learner ranks 1..L-1: do what rank 0 says, until it says None.

    They wait for it on a queue, which has no timeout, never inside a collective, which has one:
    an execution of an hour must not trip NCCL's watchdog.
    """
    while (order := orders.get()) is not None:
        method, arguments = order
        getattr(learner, method)(*arguments)


class Run:
    """Rank 0: the learner's loop, with the curriculum beside it.

    A step: wait for a batch, learn from it, publish the weights, write metrics.
    """

    def __init__(self, config: Config, learner, queues: QueueServer, rollout_ranks: list[int],
                 scratch: Path, resume: bool):
        from transformers import AutoTokenizer

        self.config, self.learner, self.queues, self.scratch = config, learner, queues, scratch
        self.followers = [queues(f"learner/{r}") for r in range(1, config.learner_ranks)]
        self.rollout_ranks = rollout_ranks
        self.dir = Path(config.run_dir)
        self.step = 0  # batches consumed; learner.version counts those that changed the policy
        self.dull = 0  # steps in a row that had nothing to learn from
        self.stage = ("starts", time.monotonic())  # what this rank does, and since when
        self.over = threading.Event()
        train, heldout = load_splits(config)
        tokenizer = AutoTokenizer.from_pretrained(local_model(config.model))
        self.splits = {"train": fitting(config, train, tokenizer, "training"),
                       "heldout": fitting(config, heldout, tokenizer, "held-out")}
        buffer = EvolvingBuffer(self.splits["train"], capacity=config.capacity,
                                max_depth=config.max_depth, children_per_group=config.children,
                                frontier=config.frontier,
                                enabled=config.buffer, crossover=config.crossover,
                                log_path=self.dir / "groups.jsonl")
        sampler = AdaptiveSampler(config.sampler, tau=config.tau, epsilon=config.epsilon,
                                  seed=config.seed)
        for task in buffer.roots():
            sampler.add(task.id, task.competition_id, task.operator)
        self.curriculum = Curriculum(config, buffer, sampler, queues("tasks"), queues("results"),
                                     self.dir / "traces.jsonl")
        # Any fixed text will do, if it is not too short: it is scored, not answered.
        text = f"{train[0].id}\n{train[0].description}\n"
        probe = tokenizer.encode(text * 4, add_special_tokens=False)
        self.probe = probe[:min(256, config.max_model_len - 1)]
        self.evaluated = False  # before training
        if resume:
            self.restore()
            describe_run(config, (train, heldout))  # not before: a refused resume changes nothing

    def everyone(self, method: str, *arguments):
        """Call a method of the learner on every learner rank; most of them are collectives."""
        self.begin(f"learner.{method}")
        for orders in self.followers:
            orders.put((method, arguments))
        return getattr(self.learner, method)(*arguments)

    def begin(self, stage: str) -> None:
        """The main thread passes here several times a step.

        Raises:
            KeyboardInterrupt: a signal's own was lost: what is raised within a finalizer or a
                library's callback, Python prints and ignores.
        """
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt
        self.stage = (stage, time.monotonic())

    def watchdog(self) -> None:
        """Have every part say what it is waiting for when no group arrives for too long."""
        limit = self.config.watchdog
        quiet_since = time.monotonic()
        while not self.over.wait(limit / 20):
            now = time.monotonic()
            quiet_since = max(quiet_since, self.curriculum.arrived)
            if now - quiet_since < limit:
                continue
            stage, since = self.stage
            lines = [f"no group has arrived for {now - self.curriculum.arrived:.0f} s:",
                     f"  rank 0: {stage}, for {now - since:.0f} s",
                     f"  {self.curriculum.describe()}"]
            lines += [f"  learner rank {rank}: {orders.qsize()} orders not taken up"
                      for rank, orders in enumerate(self.followers, 1)]
            print("\n".join(lines), file=sys.stderr, flush=True)
            for rank in self.rollout_ranks:  # they add their own lines
                self.queues(f"watchdog/{rank}").put(True)
            quiet_since = now

    # -- the loop

    def run(self) -> None:
        from tqdm import tqdm

        config = self.config
        if config.watchdog:
            threading.Thread(target=self.watchdog, name="watchdog", daemon=True).start()
        self.rehearse()
        self.publish()
        self.curriculum.start()
        if not self.evaluated:
            self.evaluate("before")
        with tqdm(total=config.steps, initial=self.step, desc="training", unit="step",
                  dynamic_ncols=True) as bar:
            self.learn(bar)
        self.evaluate("after")
        self.begin("ends")
        ranks = range(self.rollout_ranks[0], self.rollout_ranks[-1] + config.tensor_parallel)
        for orders in self.followers + [self.queues(f"weights/{rank}") for rank in ranks]:
            orders.put(None)
        for rank in self.rollout_ranks:
            self.queues(f"watchdog/{rank}").put(None)
        self.queues("tasks").put(None)
        self.over.set()

    def learn(self, bar) -> None:
        """All steps that are left, and what is written of each."""
        config, board = self.config, None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # The steps that a resumed run takes again replace the earlier ones.
            board = SummaryWriter(self.dir / "tensorboard", purge_step=self.step + 1)
        while self.step < config.steps:
            metrics = self.take_step()
            append_jsonl(self.dir / "metrics.jsonl", [metrics])
            if board:
                for name, value in metrics.items():
                    if value is not None:
                        board.add_scalar(name, value, self.step)
                board.flush()
            bar.update()
            bar.set_postfix(
                reward=f"{metrics['reward_mean']:.2f}", valid=f"{metrics['valid_rate']:.0%}",
                medal=f"{metrics['medal_rate']:.0%}", stale=f"{metrics['staleness_mean']:.1f}",
                tasks=len(self.curriculum.buffer))
            if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                self.save()

    def take_step(self) -> dict:
        """Wait for a batch, learn from it, publish the weights; the row of metrics.jsonl."""
        curriculum, learner = self.curriculum, self.learner
        started = time.monotonic()
        self.begin("waits for a batch")
        results = curriculum.next_batch()
        waited = time.monotonic()
        version = learner.version
        metrics = {"step": self.step + 1, "policy_version": version,
                   **batch_metrics(results, version), **EMPTY_METRICS}
        sequences = make_batch(results, self.config)
        metrics["groups_trained"] = len(sequences) // self.config.responses
        self.dull = 0 if sequences else self.dull + 1
        if sequences:
            metrics |= self.everyone("step", sequences)
        if metrics["skipped"]:
            print(f"warning: step {self.step + 1}: loss or gradient is not finite; the policy "
                  "stays as it was", file=sys.stderr, flush=True)
        if self.dull and self.dull % 10 == 0:
            print(f"warning: {self.dull} steps in a row without anything to learn from: within "
                  f"each group all advantages are 0 (rewards {metrics['reward_mean']:.3f} on "
                  "average in the last batch)", file=sys.stderr, flush=True)
        learnt = time.monotonic()
        if learner.version != version:
            metrics["logprob_gap"] = self.publish()
        synced = time.monotonic()
        curriculum.stepped(learner.version)
        self.step += 1
        return metrics | curriculum.metrics() | {
            "seconds_wait": waited - started, "seconds_learn": learnt - waited,
            "seconds_sync": synced - learnt, "seconds_step": time.monotonic() - started}

    def publish(self, suffix: str = "") -> float:
        """Give every engine the learner's weights, and check that it samples with them. The
        directory that they travel in has the version's name, and the suffix.

        The check: each engine scores a fixed token sequence, the probe, and the learner compares
        with its own log-probabilities at that version. An engine that took over part of the weights
        only (vLLM's own reload keeps a tied output head that no file names, and packs no experts
        on CPUs) is caught here and nowhere else: it goes on sampling fluent text, from a wrong
        policy.

        Returns:
            the mean |log-probability difference| on the probe, the largest over the engines, nat.

        Raises:
            UserError: it is above --logprob-gap-limit.
        """
        version = self.learner.version
        directory = self.scratch / f"v{version}{suffix}"
        self.everyone("publish", directory)
        for rank in self.rollout_ranks:
            self.queues(f"weights/{rank}").put((str(directory), version, self.probe))
        # An engine scores a prompt at temperature 1, whatever it samples at.
        own = self.everyone("score", self.probe, 1.0)  # (T - 1,)
        self.begin("waits for the engines to take over the weights")
        gaps = []
        for _ in self.rollout_ranks:
            answer = self.queues("acks").get()
            if isinstance(answer, BaseException):  # from `fail`
                raise answer
            gaps.append(np.abs(own - answer).mean())
        gap = float(np.max(gaps))  # NaN if any is, and then refused below
        shutil.rmtree(directory)
        if not gap <= self.config.logprob_gap_limit:
            raise UserError(
                f"engine and learner disagree after the update to version {version}: mean "
                f"|log-probability difference| {gap:.4f} nat, --logprob-gap-limit "
                f"{self.config.logprob_gap_limit}. The engine has not taken over all weights: this "
                "vLLM cannot update this architecture in place")
        return gap

    def rehearse(self) -> None:
        """Publish a policy whose matrices are halved, before anything is sampled.

        Later versions differ little from the first one where the learning rate is small: an engine
        that ignores updates, or takes over a part of the weights, could pass the check of `publish`
        for hundreds of steps. Halved it is off by 2.6 nat (the tiny policy), with only its head,
        its embeddings, attention or MLPs left as they were by 1.4, 1.4, 0.28, 0.39. (Not seen:
        norms, and queries and keys that a norm follows, as in Qwen3.)
        """
        self.everyone("scale", 0.5)
        self.publish("-halved")
        self.everyone("scale", 2.0)

    def fail(self, error: BaseException) -> None:
        """Wake up whatever rank 0 waits for, from any thread."""
        self.curriculum.fail(error)
        self.queues("acks").put(error)

    # -- evaluation

    def evaluate(self, when: str) -> None:
        """Drafts of the frozen policy on every competition -> eval.jsonl."""
        from tqdm import tqdm

        if not self.config.eval_drafts:
            return
        self.begin(f"waits for the drafts {when} training")
        requests = [Request(Task.root(c), self.config.eval_drafts, self.learner.version,
                            purpose=f"{when}/{split}")
                    for split, ids in self.splits.items() for c in ids]
        with tqdm(total=len(requests), desc=f"drafts {when} training", unit="competition") as bar:
            rows = evaluation_rows(self.curriculum.evaluate(requests, bar.update))
        append_jsonl(self.dir / "eval.jsonl", rows)
        for split, ids in self.splits.items():
            own = [r for r in rows if r["split"] == split]
            if own:
                means = {k: np.mean([r[k] for r in own])
                         for k in ("valid_rate", "medal_rate", "human_rank")}
                print(f"{when} training, {split}: valid {means['valid_rate']:.1%}, medals "
                      f"{means['medal_rate']:.1%}, human rank {means['human_rank']:.3f}")

    # -- checkpoints

    def save(self) -> None:
        """Write checkpoints/step_N, complete only once its DONE file exists, and policy/."""
        folder = self.dir / "checkpoints" / f"step_{self.step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.everyone("save", folder / "learner")
        state = {"step": self.step, **self.curriculum.state_dict()}
        with open(folder / "curriculum.json", "w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        self.everyone("publish", self.dir / "policy")
        sizes = {str(path.relative_to(folder)): path.stat().st_size
                 for path in sorted(folder.rglob("*")) if path.is_file()}
        write_whole(folder / "DONE", json.dumps(sizes))
        for old in self.checkpoints()[:-self.config.keep_checkpoints]:
            (old / "DONE").unlink()  # first, so that what is left of it never counts
            shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        """The complete ones, oldest first."""
        return [folder for folder in checkpoint_folders(self.dir) if (folder / "DONE").exists()]

    def restore(self) -> None:
        """Go on from the last complete checkpoint; before the first one, from the start."""
        complete = self.checkpoints()
        for folder in checkpoint_folders(self.dir):
            if folder not in complete:  # a kill has left it
                shutil.rmtree(folder)
        if complete:
            folder = complete[-1]
            with reading(self.dir, f"checkpoint {folder.name}", remedy=(
                    "delete it to go on from the one before it" if len(complete) > 1
                    else "start a new run")):
                for name, size in json.loads((folder / "DONE").read_text()).items():
                    if (folder / name).stat().st_size != size:
                        raise ValueError(f"{name} does not have its {size} bytes")
                state = json.loads((folder / "curriculum.json").read_text())
                if state["buffer"]["competition_ids"] != self.splits["train"]:
                    raise UserError(
                        f"--resume {self.dir}: its checkpoint is of other training competitions; "
                        "give the --competitions and the limits of prompts that the run began with")
                if folder.name != f"step_{state['step']}":
                    raise ValueError(f"curriculum.json is of step {state['step']}")
                self.everyone("load", folder / "learner")
                self.step = state["step"]
                self.curriculum.load_state_dict(state)
        with reading(self.dir, "groups.jsonl or traces.jsonl"):
            self.curriculum.replay()
            mend_traces(self.dir)
        # Steps after the checkpoint are taken again, and so is an evaluation after the end.
        metrics, drafts = self.dir / "metrics.jsonl", self.dir / "eval.jsonl"
        with reading(self.dir, "metrics.jsonl or eval.jsonl"):
            learnt = [r for r in read_jsonl(metrics) if r["step"] <= self.step]
            before = [r for r in read_jsonl(drafts) if r["when"] == "before"]
        self.evaluated = self.step > 0 or len(before) == sum(map(len, self.splits.values()))
        write_whole(metrics, jsonl(learnt))
        write_whole(drafts, jsonl(before if self.evaluated else []))
        print(f"resuming {self.dir} after step {self.step}", flush=True)


# ---------------------------------------------------------------------------------------------
# 7. Records and checkpoints of a run directory


def jsonl(rows: list[dict]) -> str:
    """Lines of a file; numbers that are not finite become null, since JSON has no NaN."""
    return "".join(json.dumps({k: plain(v) for k, v in row.items()}) + "\n" for row in rows)


def append_jsonl(path: Path, rows: list[dict]) -> None:
    with open(path, "a") as file:
        file.write(jsonl(rows))


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file that a killed run has left; a torn last line is no row."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last newline is torn, or nothing
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def reading(run_dir: Path, what: str, remedy: str = "start a new run"):
    """Whatever is wrong with what a resume reads, one line that names it and the remedy."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if INTERRUPTED.is_set():  # torch's checkpoints make an OSError of Ctrl-C
            raise
        raise UserError(f"--resume {run_dir}: {what} cannot be read ({type(error).__name__}: "
                        f"{error}); {remedy}")


def mend_traces(run_dir: Path) -> None:
    """Make traces.jsonl complete: a kill may have come after the last group was logged and before
    its traces were, or within a line."""
    if not (run_dir / "groups.jsonl").exists():
        return
    with open(run_dir / "groups.jsonl", "rb") as log, open(run_dir / "traces.jsonl", "ab+") as file:
        traces = json.loads(last_line(log)[1] or b"{}").get("traces", [])
        end, last = last_line(file)
        file.truncate(end)
        written = [t["id"] for t in traces]
        if last and (name := json.loads(last)["id"]) in written:
            traces = traces[written.index(name) + 1:]
        file.write(b"".join(json.dumps(t).encode() + b"\n" for t in traces))


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """checkpoints/step_N, by N. What else somebody keeps there, such as a copy, stays untouched."""
    folders = [p for p in run_dir.glob("checkpoints/step_*") if p.name[5:].isdecimal()]
    return sorted(folders, key=lambda p: int(p.name[5:]))


# ---------------------------------------------------------------------------------------------
# 8. Start and end


def hide_torchrun() -> None:
    """vLLM starts distributed processes of its own: torchrun's variables would mislead them."""
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE") or name.startswith(
                ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")):
            del os.environ[name]


def child_main(config: Config, address, key: bytes) -> None:
    """The rollout process that a single-process run starts; it has a session of its own."""
    os.setsid()
    die_with_parent()
    exit_on_sigterm()
    try:
        rollout_main(config, 1, address, key)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


class Place(NamedTuple):
    """Where this process stands among those of the run."""

    world: int  # how many they are
    rank: int
    local_rank: int  # on its node
    group: object | None  # process group of the learner ranks; None in a run of a single process
    queues: QueueServer | None  # rank 0's
    address: tuple[str, int]  # of the queue server
    key: bytes


def join_world(config: Config) -> Place:
    """Meet the other processes; rank 0 tells them where its queues are."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    one_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == world
    group, queues, contact = None, None, [None]
    if world > 1:
        die_with_parent()
        exit_on_sigterm()
        timeout = timedelta(seconds=config.collective_timeout)
        # A slow start, such as a download, is no collective operation, and may take longer.
        store, _, _ = next(rendezvous("env://", timeout=max(timeout, timedelta(hours=3))))
        if one_node:
            # torchrun keeps one store for all its restarts, full of the addresses of dead ranks
            # (pytorch #135712). Agents of several nodes count their restarts apart: there, start
            # torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt_{attempt}", store)
        store.set(f"here_{rank}", "")
        store.wait([f"here_{r}" for r in range(world)])
        store.set_timeout(timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    if rank == 0:
        # Other nodes reach rank 0 where torchrun's own rendezvous reaches it. That name may mean
        # the loopback interface on rank 0's node itself, so it is no place to listen at.
        queues = QueueServer("127.0.0.1" if one_node else "")
        host = "127.0.0.1" if one_node else os.environ["MASTER_ADDR"]
        contact = [((host, queues.address[1]), queues.key)]
    if world > 1:
        dist.broadcast_object_list(contact, src=0)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl" and config.cpu_offload:  # gradients are clipped on the CPU
            backend = "cpu:gloo,cuda:nccl"
        group = dist.new_group(list(range(config.learner_ranks)), backend=backend,
                               timeout=timeout)
    hide_torchrun()
    return Place(world, rank, local_rank, group, queues, *contact[0])


@functools.cache
def local_model(model: str) -> str:
    """A model directory: the one that is named, or what the Hugging Face hub has under the name,
    fetched once. config.json keeps the name: the directory is another one on each node."""
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.pt", "*.gguf"])
    except (OSError, ValueError) as error:  # no such repository, no network
        raise UserError(f"--model {model}: {' '.join(str(error).split())[:200]}; give a model "
                        "directory, or a name that the hub has")


def visible_gpus(positions) -> str:
    """CUDA_VISIBLE_DEVICES for these of the GPUs that this process sees.

    >>> os.environ["CUDA_VISIBLE_DEVICES"] = "4,5,6,7"
    >>> visible_gpus([2, 3])
    '6,7'
    >>> del os.environ["CUDA_VISIBLE_DEVICES"]
    >>> visible_gpus([2, 3])
    '2,3'
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    ids = seen.split(",") if seen else None
    return ",".join(ids[position] if ids else str(position) for position in positions)


def train(config: Config, resume: bool) -> None:
    """Play this process's role until the run is over."""
    import torch
    import torch.distributed as dist

    model = local_model(config.model)
    place = join_world(config)
    if place.rank >= config.learner_ranks:
        if (place.rank - config.learner_ranks) % config.tensor_parallel == 0:
            if torch.cuda.is_available():
                gpus = range(place.local_rank, place.local_rank + config.tensor_parallel)
                os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus(gpus)
            rollout_main(config, place.rank, place.address, place.key)
        else:  # its GPU belongs to another rank's engine: wait for the end
            connect_queues(place.address, place.key)(f"weights/{place.rank}").get()
    else:
        from learner import Learner, UnsupportedModel

        if not torch.cuda.is_available():
            torch.set_num_threads(config.learner_threads)
        else:
            torch.cuda.set_device(place.local_rank)
        try:
            learner = Learner(model, learner_config(config), group=place.group)
            if place.rank > 0:
                orders = connect_queues(place.address, place.key)(f"learner/{place.rank}")
                learner_follow(learner, orders)
            else:
                lead(config, place, learner, resume)
        except UnsupportedModel as error:  # some show it in their first forward pass only
            raise UserError(f"--model {config.model}: {error}")
    if place.world > 1:
        dist.barrier()


def lead(config: Config, place: Place, learner, resume: bool) -> None:
    """Rank 0's role: the run itself, with a rollout process of its own where it is alone."""
    scratch = scratch_folder("weights", 1.1 * learner.published_bytes)
    start_guard([scratch])
    place.queues.queues["published"] = PublishedFiles(scratch)
    if place.world > 1:
        rollout_ranks = list(range(config.learner_ranks, place.world, config.tensor_parallel))
        Run(config, learner, place.queues, rollout_ranks, scratch, resume).run()
        return
    child = multiprocessing.get_context("spawn").Process(
        target=child_main, args=(config, place.address, place.key))
    child.start()
    try:
        run = Run(config, learner, place.queues, [1], scratch, resume)

        def watch():
            """Under torchrun the agent ends all ranks when one dies; alone we have to look."""
            child.join()
            if child.exitcode:
                run.fail(WorkerDied("the rollout process has ended with exit code "
                                    f"{child.exitcode}"))

        threading.Thread(target=watch, daemon=True).start()
        run.run()
        child.join()
    finally:
        if child.is_alive():
            child.terminate()
            child.join()


def prepare_run_dir(config: Config, resume: bool, splits: tuple[list, list]):
    """Create the run directory, readable by its owner only.

    Returns:
        the open file whose lock keeps other runs out until it is closed, or this process ends.

    Raises:
        UserError: it cannot be made or written, or is not empty though not resumed.
        CompetitionError: it is in use.
    """
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resume and any(path.name != "lock" for path in run_dir.iterdir()):
            raise UserError(f"--run-dir {run_dir}: not empty; use --resume {run_dir} to go on with "
                            "it, or another directory")
        run_dir.chmod(0o700)
        lock = lock_record(run_dir, "--run-dir")
        if not resume:
            describe_run(config, splits)
            (run_dir / "launch").write_text(f"{start_of_run():.2f}")
        return lock
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error.strerror}; give another directory")


def describe_run(config: Config, splits: tuple[list, list]) -> None:
    """config.json, and splits.json, by which an evaluation knows what its policy was trained on."""
    run_dir = Path(config.run_dir)
    write_whole(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    ids = {name: [c.id for c in own] for name, own in zip(("train", "heldout"), splits)}
    ids["train"] += [name for name in trained_on(config.model) if name not in ids["train"]]
    write_whole(run_dir / "splits.json", json.dumps(ids, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------
# 9. --dry-run


# For --dry-run, where the presets are planned for: (nodes, ranks a node), and the bytes of a GPU,
# an H100 of "80 GB" as CUDA reports it. The shapes of their models, so that it needs no network.
WORLDS = {"tiny": (1, 1), "small": (1, 8), "ace30b": (4, 8)}
GPU_BYTES = 79 << 30
SHAPES = {
    "Qwen/Qwen3-8B": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        tie_word_embeddings=False, dtype="bfloat16"),
    "Qwen/Qwen3-30B-A3B": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144,
        num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1,
        norm_topk_prob=True, tie_word_embeddings=False, dtype="bfloat16"),
}


def planned_world(preset: str) -> tuple[int, int]:
    """(ranks, ranks a node): torchrun's if it has started us, else what the preset is made for."""
    if "WORLD_SIZE" in os.environ:
        world = int(os.environ["WORLD_SIZE"])
        return world, int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes, local = WORLDS[preset]
    return nodes * local, local


# What a plan counts that is not bytes: (divisor, unit).
UNITS = {"parameter_count": (1e9, "billion"), "cache_tokens": (1000, "thousand"),
         "full_sequences": (1, "of --max-model-len tokens")}


def print_plan(config: Config) -> None:
    """What a run would do and need, for --dry-run; nothing is started. The model is built on the
    meta device.

    Raises:
        UserError: it does not fit.
    """
    import torch
    from transformers import AutoConfig

    from learner import UnsupportedModel, memory_plan

    world, local = planned_world(config.preset)
    if torch.cuda.is_available():
        memory, where = torch.cuda.get_device_properties(0).total_memory, "this GPU"
    elif config.preset == "tiny":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        where = "this machine"
    else:
        memory, where = GPU_BYTES, "an 80-GB GPU; there is none here"
    shape = SHAPES.get(config.model)
    try:
        model = AutoConfig.for_model(**shape) if shape else AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {config.model}: {' '.join(str(error).split())[:200]}")
    rollout_ranks = range(config.learner_ranks, max(world, 2))
    engines = len(rollout_ranks) // config.tensor_parallel
    print(f"preset {config.preset}: {config.steps} steps of {config.groups} groups x "
          f"{config.responses} responses, run directory {config.run_dir}\n"
          f"{world} ranks, {local} a node: {config.learner_ranks} learner ranks, {engines} engines "
          f"of tensor-parallel size {config.tensor_parallel}, each {config.rollout_threads} groups "
          f"in flight and {config.sandbox_slots} sandboxes\n"
          f"memory of a rank: {memory / 2**30:.1f} GiB ({where})")
    for name, kind in (("competitions", config.competitions), ("heldout", config.heldout)):
        try:
            found = len(load_competitions(kind, config.data_dir or None)) if kind else 0
            print(f"--{name} {kind}: {found}")
        except CompetitionError as error:
            print(f"--{name} {kind}: not ready: {error}")

    def show(title: str, plan: dict) -> None:
        print(title)
        for name, value in plan.items():
            divisor, unit = UNITS.get(name, (2**30, "GiB"))
            print(f"  {name:16} {value / divisor:10.2f} {unit}")

    try:
        plan = memory_plan(model, learner_config(config), config.learner_ranks,
                           config.max_model_len - config.max_response_tokens, memory)
        show("a learner rank:", plan)
        engine = engine_plan(model, engine_config(config), plan["parameter_count"], memory)
        show("a rank of an engine:", engine)
    except (ValueError, UnsupportedModel) as error:
        raise UserError(f"--dry-run: {error}")
    # A version is published in the dtype of the model's files.
    version = plan["parameter_count"] * (model.dtype or torch.float32).itemsize
    far = sorted({rank // local for rank in rollout_ranks} - {0}) if world > local else []
    print(f"weights of a version: {version / 2**30:.2f} GiB, gathered one tensor at a time, "
          "written by rank 0 as\n  files in its node's shared memory, read there by every engine "
          "of the node")
    if far:
        print(f"  copied over TCP, once a node, into the shared memory of nodes "
              f"{', '.join(map(str, far))}: {len(far) * version / 2**30:.2f} GiB a step")


# ---------------------------------------------------------------------------------------------
# 10. The command


def how_to_go_on(config: Config | None) -> str:
    if config and (Path(config.run_dir) / "config.json").exists():
        return f"go on with --resume {config.run_dir}"
    return "nothing was written yet"


def main(argv: list[str] | None = None) -> int:
    config, started = None, False
    rank = int(os.environ.get("RANK", 0))

    def say(text: str) -> None:
        if rank == 0:
            print(text, file=sys.stderr, flush=True)

    try:
        interrupt_on_signals()
        config, arguments = parse_config(argv)
        planned = arguments.dry_run or "WORLD_SIZE" in os.environ
        validate(config, *(planned_world(config.preset) if planned else (1, 1)))
        check_policy(config.model, config.max_model_len)
        if arguments.dry_run:
            if rank == 0:
                print_plan(config)
            return 0
        splits = load_splits(config)
        resume = arguments.resume is not None or restarted_by_torchrun(config)
        lock = contextlib.nullcontext()
        if rank == 0:
            lock = prepare_run_dir(config, resume, splits)
            print(f"run directory: {config.run_dir}; starting vLLM, a minute or two", flush=True)
        started = True
        with lock:
            train(config, resume)
        if rank == 0:
            print(f"done: {config.run_dir}/metrics.jsonl, eval.jsonl, policy/", flush=True)
        return 0
    except (UserError, CompetitionError) as error:
        if rank == 0 or started:  # before, all ranks find the same
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        return 2
    except WorkerDied as error:
        say(f"train.py: {error}; {how_to_go_on(config)}")
        return 1
    except SystemExit:  # --help has said what there is to say
        raise
    except BaseException as error:
        if INTERRUPTED.is_set():  # a checkpoint being written turns it into another exception
            say(f"\ninterrupted; {how_to_go_on(config)}")
            return 130
        if rank > 0 and isinstance(error, (EOFError, ConnectionError)):
            print(f"rank {rank}: the connection to rank 0 is lost", file=sys.stderr, flush=True)
        elif rank == 0 and config and isinstance(error, OSError):  # a full disk, most of all
            where = Path(str(error.filename or config.run_dir)).absolute()
            beside = next(p for p in where.parents if p.exists())
            say(f"train.py: {error} ({shutil.disk_usage(beside).free / 1e9:.1f} GB are free in "
                f"{beside}); {how_to_go_on(config)}")
        else:
            traceback.print_exc()
        return 1


if __name__ == "__main__":
    leave(main())
