"""Train an agent that does machine-learning engineering: AceGRPO, asynchronously.

    python train.py                                   # one CPU or one GPU: everything on it
    torchrun --nproc_per_node=8 train.py              # half the ranks learn, half roll out
    python train.py --resume runs/tiny-...            # go on from the last complete checkpoint
    python train.py --preset small --dry-run          # what it would do and need, without doing it

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
        2. Only queues cross processes, and one process owns buffer and sampler: no locks, no
           shared state. The queues are plain `queue.Queue`s that a `multiprocessing.managers`
           server on rank 0 offers over TCP under a random key.
        3. Every publication of weights ends in a self-check: the engine scores a fixed probe and
           the learner compares with its own log-probabilities.
        4. Whatever ends a run (the last step, Ctrl-C, a crash, kill -9 of any process), a guard
           process per rank removes what it leaves behind.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from multiprocessing.managers import BaseManager
from pathlib import Path

import numpy as np

from buffer import EvolvingBuffer, Group, Task
from rollout import (Engine, EngineConfig, PromptBudget, Prompter, Request, Result, RolloutConfig,
                     RolloutWorker)
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
    preset: str = opt("tiny", "named set of defaults", choices=["tiny", "small", "ace30b"])
    model: str = opt("data/policy", "Hugging Face model directory, the policy to start from")
    competitions: str = opt("data/competitions/train", "directory of training competitions")
    heldout: str = opt("data/competitions/heldout",
                       "directory of competitions for evaluation only; '' for none")
    run_dir: str = opt("", "where the run is written; '' means runs/<preset>-<time>")
    seed: int = opt(0, "seed of the sampler, the engine and the learner")
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
    rollout_threads: int = opt(24, "groups in flight per engine; (eta + 1) * B keeps the engine's batches "
                                       "large: it samples a whole hand-out at once")
    sandbox_slots: int = opt(2, "scripts that run at the same time per rollout rank")
    sandbox_gpus: str = opt("", "GPU ids that scripts may see, e.g. 6,7; '' for none")
    learner_threads: int = opt(1, "CPU threads of the learner (CPU training only); two that wait for "
                                  "each other lose where sandboxes want the same cores")
    engine_threads: int = opt(1, "CPU threads of the engine (CPU engines only)")
    # --- asynchrony
    max_staleness: int = opt(2, "eta: versions a group may be old when it is learnt from; 0: "
                                "synchronous")
    stale: str = opt("wait", "a group that would become too old: the learner waits for it, or it is "
                             "dropped (which favours fast scripts)", choices=["wait", "drop"])
    # --- the algorithm
    advantage: str = opt("dr_grpo", "group-relative advantage: with (grpo) or without (dr_grpo) "
                                    "division by the standard deviation",
                         choices=["grpo", "dr_grpo"])
    loss: str = opt("dr_grpo", "policy loss", choices=["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
    clip_low: float = opt(0.2, "the ratio is clipped below at 1 - this")
    clip_high: float = opt(0.28, "the ratio is clipped above at 1 + this; more than clip-low keeps "
                                 "exploration alive")
    tis_cap: float = opt(0.0, "cap of truncated importance sampling; 0: off (the ratio to the "
                              "behaviour policy corrects already)")
    kl_coef: float = opt(0.0, "weight of the KL divergence to the initial policy; 0: no reference")
    kl_kind: str = opt("k3", "estimator of that KL", choices=["k2", "k3"])
    entropy_coef: float = opt(0.002, "weight of the entropy bonus")
    temperature: float = opt(1.0, "sampling temperature; it divides the learner's logits too")
    reward: str = opt("rank", "what a valid submission earns: human rank, milestones, medals only",
                      choices=["rank", "milestone", "medal"])
    # --- what to train on
    sampler: str = opt("lp", "task score: Learnability Potential or an alternative",
                       choices=["lp", "variance", "regret", "uniform"])
    buffer: bool = opt(True, "evolving buffer; --no-buffer trains on drafts only")
    capacity: int = opt(4096, "tasks that the buffer holds")
    max_depth: int = opt(4, "longest chain of improve and debug steps")
    children: int = opt(3, "new tasks admitted per group")
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
    # --- the engine
    engine_dtype: str = opt("float32", "dtype of the vLLM engine", choices=["float32", "bfloat16"])
    max_model_len: int = opt(1024, "prompt + response, tokens")
    max_response_tokens: int = opt(256, "longest response, tokens")
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
    unsafe: bool = opt(False, "run scripts without isolation where the system offers none")


PRESETS = {
    # `tiny` is the defaults above: a 2M-parameter policy on two CPU cores.
    "tiny": {},
    # One node of 8 x 80 GB: 4 ranks learn with FSDP, 4 engines roll out.
    "small": dict(
        model="Qwen/Qwen3-8B", competitions="data/mlebench/train", heldout="data/mlebench/heldout",
        steps=400, groups=16, responses=8, eval_drafts=0, rollout_threads=16, sandbox_slots=16,
        learning_rate=1e-6, warmup_steps=10, decay=False, max_grad_norm=1.0, entropy_coef=0.0,
        token_budget=32768,
        activation_checkpointing=True, engine_dtype="bfloat16", max_model_len=24576,
        max_response_tokens=8192, max_num_seqs=128, kv_cache_gib=0.0, logprob_gap_limit=0.1,
        description_chars=12000, preview_chars=6000, output_chars=4000, timeout=3600.0,
        cpu_seconds=14400.0, memory_mb=32768),
    # The paper's scale: 4 nodes of 8 x 80 GB.
    "ace30b": dict(
        model="Qwen/Qwen3-30B-A3B", competitions="data/mlebench/train",
        heldout="data/mlebench/heldout", steps=400, groups=16, responses=8, eval_drafts=0,
        learner_ranks=16, tensor_parallel=2, rollout_threads=16, sandbox_slots=16,
        learning_rate=1e-6, warmup_steps=10, decay=False, max_grad_norm=1.0, entropy_coef=0.0,
        token_budget=32768,
        activation_checkpointing=True, engine_dtype="bfloat16", max_model_len=24576,
        max_response_tokens=8192, max_num_seqs=128, kv_cache_gib=0.0, logprob_gap_limit=0.1,
        description_chars=12000, preview_chars=6000, output_chars=4000, timeout=3600.0,
        cpu_seconds=14400.0, memory_mb=32768),
}


def parse_config(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """Command line -> (Config, arguments that are not part of it: resume, dry_run).

    A flag that is given wins over the resumed run's config.json or the preset, which win over the
    field's default.

    >>> parse_config(["--preset", "tiny", "--steps", "3"])[0].steps
    3
    """
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Defaults are those of the tiny preset; PRESETS in train.py has the others.")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with this run, with its config")
    parser.add_argument("--dry-run", action="store_true",
                        help="print the plan (processes, memory) and stop")
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        # SUPPRESS: a flag that is not given does not appear, so that given ones can be told.
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%"),
                            choices=f.metadata.get("choices"), **kind)
    arguments = parser.parse_args(argv)
    given = {k: v for k, v in vars(arguments).items() if k not in ("resume", "dry_run")}
    if arguments.resume:
        base = load_config(Path(arguments.resume))
    else:
        preset = given.get("preset", "small" if shutil.which("nvidia-smi") else "tiny")
        base = {"preset": preset, **PRESETS[preset]}
    return Config(**{**base, **given}), arguments


def load_config(run_dir: Path) -> dict:
    """The config.json of a run that is resumed."""
    try:
        values = json.loads((run_dir / "config.json").read_text())
        Config(**values)
        return {**values, "run_dir": str(run_dir)}
    except FileNotFoundError:
        raise UserError(f"--resume {run_dir}: no config.json there; give a run directory")
    except (ValueError, TypeError) as error:
        raise UserError(f"--resume {run_dir}: config.json cannot be read ({error})")


def validate(config: Config, world_size: int) -> None:
    """Refuse what cannot work before anything is started; fills in `learner_ranks` and `run_dir`.

    Raises:
        UserError: one line that names the flag and the remedy.
    """
    if config.learner_ranks == 0:
        config.learner_ranks = max(1, world_size // 2)
    if world_size > 1 and config.learner_ranks >= world_size:
        raise UserError(f"--learner-ranks {config.learner_ranks}: at least one of the {world_size} "
                        f"ranks must roll out; use at most {world_size - 1}")
    for name in ("steps", "groups", "responses", "rollout_threads", "sandbox_slots", "children",
                 "checkpoint_every", "keep_checkpoints", "learner_threads", "engine_threads",
                 "learner_ranks", "tensor_parallel", "token_budget", "max_response_tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("learning_rate", "temperature", "tau", "timeout", "cpu_seconds", "max_grad_norm"):
        if not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be greater than 0")
    for name in ("max_staleness", "eval_drafts", "kl_coef", "entropy_coef", "tis_cap", "max_depth"):
        if not getattr(config, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative")
    if config.responses < 2:
        raise UserError("--responses must be at least 2: the advantage compares within the group")
    if not 0 <= config.epsilon <= 1:
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
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is not installed; pip install tensorboard")
    if not config.run_dir:
        config.run_dir = f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_model(directory: str) -> None:
    """Refuse a model directory that lacks what vLLM and the prompts need."""
    path = Path(directory)
    if not path.is_dir():
        default = directory == Config.model
        if not default and directory.count("/") == 1 and not path.parent.exists():
            return  # owner/name: Hugging Face resolves it
        hint = "run `make data`" if default else "give a model directory"
        raise UserError(f"--model {directory}: no such directory; {hint}")
    if not (path / "config.json").is_file():
        raise UserError(f"--model {directory}: no config.json there; it must be a Hugging Face "
                        "model directory")
    if not any((path / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(f"--model {directory}: no tokenizer there; save one into it with "
                        "tokenizer.save_pretrained")


# ---------------------------------------------------------------------------------------------
# 2. Curriculum: what is rolled out next, and what may be learnt from


class Curriculum:
    """Hands out tasks, takes in groups, forms batches. Owns the buffer and the sampler.

    The staleness rule. With learner version i, another task is handed out only while
    n < (i + eta + 1) * B, n being the groups handed out that were or may still be trained on.
    A group handed out at version v is learnt from at version v + eta at the latest: `next_batch`
    waits for groups in flight that would otherwise become too old (`stale=wait`), or they are let
    go and never trained on (`stale=drop`).

    One thread (`run`) reads the results; the learner calls `next_batch` and `stepped`. Everything
    is under one lock, which is never held while waiting for a queue or a collective.
    """

    def __init__(self, config: Config, buffer, sampler, tasks, results,
                 trace_log: Path | None = None):
        self.config, self.buffer, self.sampler = config, buffer, sampler
        self.tasks, self.results = tasks, results
        self.epoch = 0  # +1 with each resume
        self.trace_log = open(trace_log, "a") if trace_log else None
        self.changed = threading.Condition()
        self.version = 0  # learner version, as far as published
        self.handed = 0  # n of the staleness rule
        self.issued = 0  # tasks handed out in the whole run: what bounds its length
        self.in_flight: dict[str, int] = {}  # task id -> version at which it was handed out
        self.ready: list[Result] = []  # groups that wait to be learnt from, oldest first
        self.evaluations: list[Result] = []
        self.dropped = 0  # groups that became too old (stale=drop)
        self.skipped = 0  # tasks whose prompt left no room for a response
        self.error: BaseException | None = None

    def start(self) -> None:
        threading.Thread(target=self.run, name="curriculum", daemon=True).start()

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
            self.tasks.put(Request(task, config.responses, self.version, self.epoch))

    # -- taking in

    def receive(self, result: Result) -> None:
        """File one result. Call with the lock held."""
        request, group = result.request, result.group
        if request.epoch != self.epoch:
            return  # handed out before a resume
        if request.purpose != "train":
            self.evaluations.append(result)
            return
        task_id = request.task.id
        version = self.in_flight.pop(task_id)
        if group is None:
            # Nothing came of it (prompt too long): its place in the batch is given back.
            self.skipped += 1
            self.handed -= 1
            self.issued -= 1
            self.sampler.release(task_id)
            if request.task.operator != "draft":
                self.buffer.remove(task_id)
                self.sampler.remove(task_id)
            elif self.skipped > 3 * len(self.buffer.tasks):
                raise UserError(f"{request.task.competition_id}: {result.error}; raise "
                                "--max-model-len or lower --description-chars, --preview-chars")
            return
        # The buffer first: its log may fail (disk full), and then nothing has happened yet.
        admitted, evicted = self.buffer.add(group, self.sampler.score, self.in_flight)
        self.sampler.update(task_id, group.rewards)
        self.follow(group.rewards, admitted, evicted)
        if self.trace_log:
            for trace in group.traces:
                self.trace_log.write(json.dumps(trace.public()) + "\n")
            self.trace_log.flush()
        if version < self.version - self.config.max_staleness:
            self.dropped += 1  # only with stale=drop: wait never lets it come to this
            self.handed -= 1
            self.issued -= 1
            return
        self.ready.append(result)
        self.ready.sort(key=lambda r: r.group.policy_version)  # stable: then by arrival

    def follow(self, rewards, admitted, evicted) -> None:
        """Keep the sampler's tasks those of the buffer."""
        for task_id in evicted:
            self.sampler.remove(task_id)
        for task in admitted:
            self.sampler.add(task.id, task.competition_id, task.operator, prior_rewards=rewards,
                             parent_reward=task.parent.base_reward)

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
        if len(self.ready) < config.groups or config.stale == "drop":
            return len(self.ready) >= config.groups
        left = [r.group.policy_version for r in self.ready[config.groups:]]
        left = sorted(left + list(self.in_flight.values()))
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
                self.dropped += len(self.ready) - len(young)
                self.handed -= len(self.ready) - len(young)
                self.issued -= len(self.ready) - len(young)
                self.ready = young
            self.hand_out()

    def evaluate(self, requests: list[Request], progress=lambda: None) -> list[Result]:
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
                "version": self.version,
                "handed": self.handed,
                "issued": self.issued,
                "dropped": self.dropped,
                "skipped": self.skipped,
                "in_flight": dict(self.in_flight),
                "ready": [result.group.to_json() for result in self.ready],
            }

    def load_state_dict(self, state: dict) -> None:
        """Take up a checkpoint. Groups that finished after it feed the buffer and the sampler (from
        the buffer's log), but are not learnt from: the policy that sampled them is abandoned."""
        with self.changed:
            self.epoch = state["epoch"] + 1
            self.buffer.load_state_dict(state["buffer"])
            self.sampler.load_state_dict(state["sampler"])
            self.version, self.handed, self.issued = (
                state["version"], state["handed"], state["issued"])
            self.dropped, self.skipped = state["dropped"], state["skipped"]
            self.ready = [Result(Request(g.task, len(g.traces), g.handout_version), g)
                          for g in map(Group.from_json, state["ready"])]
            waiting = dict(state["in_flight"])
            for change in self.buffer.replay():
                if change.rewards.size:  # none: a task was removed
                    self.sampler.update(change.task_id, change.rewards)
                self.follow(change.rewards, change.admitted, change.evicted)
                waiting.pop(change.task_id, None)
            # What was in flight and has not come back is handed out again, at its old place in the
            # staleness rule; the place of what came back is free.
            self.handed -= len(state["in_flight"]) - len(waiting)
            self.issued -= len(state["in_flight"]) - len(waiting)
            self.in_flight = waiting
            for task_id, version in waiting.items():
                self.tasks.put(Request(self.buffer.tasks[task_id], self.config.responses, version,
                                       self.epoch))


# ---------------------------------------------------------------------------------------------
# 3. From groups to a learner batch and to metrics


def make_batch(results: list[Result], config: Config) -> list:
    """Groups -> the learner's sequences; groups whose rewards all agree teach nothing and stay out.

    Returns:
        Sequences (see learner.py), the G of a group next to each other.
    """
    import torch

    from grpo import group_advantages
    from learner import Sequence

    sequences = []
    for group in (r.group for r in results):
        rewards = torch.tensor(group.rewards, dtype=torch.float64)[None]  # (1, G)
        advantages = group_advantages(rewards, kind=config.advantage)[0]  # (G,)
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
        "groups_trained": sum(bool(np.ptp(g.rewards) > 1e-6) for g in groups),
        "staleness_mean": np.mean(staleness),
        "staleness_max": max(staleness),
        "unique_scripts": len({t.code_key for t in traces if t.code}),
        "unchanged_rate": np.mean([g.task.parent is not None and t.code_key == g.task.parent.code_key
                                   for g in groups for t in g.traces]),
        "response_tokens": np.mean([len(t.response_ids) for t in traces]),
        "seconds_rollout": np.mean([r.seconds_rollout for r in results]),
        "seconds_sandbox": np.mean([r.seconds_sandbox for r in results]),
    }
    for operator in ("draft", "improve", "debug"):
        own = [t for t in traces if t.operator == operator]
        metrics[f"groups_{operator}"] = sum(g.task.operator == operator for g in groups)
        metrics[f"reward_{operator}"] = np.mean([t.reward for t in own]) if own else None
        metrics[f"valid_{operator}"] = np.mean([t.valid for t in own]) if own else None
        metrics[f"medal_{operator}"] = np.mean([t.medal != "none" for t in own]) if own else None
    return {k: None if v is None else round(float(v), 6) for k, v in metrics.items()}


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


def append_jsonl(path: Path, rows: list[dict]) -> None:
    with open(path, "a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------------------------------
# 4. Queues between processes


class QueueServer:
    """Named `queue.Queue`s on rank 0, offered to the other processes over TCP.

    Whoever knows the random key may connect: it travels through the process group or a pipe, never
    in arguments or the environment. As with gloo and NCCL, the network between the nodes is
    trusted: the traffic is authenticated, not encrypted.
    """

    def __init__(self, host: str = "127.0.0.1"):
        self.queues: dict[str, queue.Queue] = defaultdict(queue.Queue)
        self.key = secrets.token_bytes(32)

        class Manager(BaseManager):
            pass

        Manager.register("queue", callable=lambda name: self.queues[name])
        server = Manager(address=(host, 0), authkey=self.key).get_server()
        self.address = server.address
        threading.Thread(target=server.serve_forever, name="queues", daemon=True).start()

    def __call__(self, name: str) -> queue.Queue:
        return self.queues[name]


def connect_queues(address: tuple[str, int], key: bytes):
    """The other processes' way to the queues: returns `name -> queue proxy`."""

    class Manager(BaseManager):
        pass

    Manager.register("queue")
    manager = Manager(address=address, authkey=key)
    manager.connect()
    return manager.queue


# ---------------------------------------------------------------------------------------------
# 5. Nothing stays behind

GUARD = """
import os, pathlib, select, shutil, signal, sys, time

rank, group, folders = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]

def members():
    for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
        try:
            state, _, pgrp = stat.read_text().rpartition(')')[2].split()[:3]
            if int(pgrp) == group and state not in 'ZX':
                yield int(stat.parent.name), (stat.parent / 'cmdline').read_bytes()
        except OSError:
            pass  # it has ended meanwhile

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
select.select([os.pidfd_open(rank)], [], [])
# Python's resource trackers unlink shared memory and semaphores once their clients are dead.
deadline = time.monotonic() + 5
while group and (alive := list(members())):
    for pid, command in alive:
        if b'resource_tracker' not in command or time.monotonic() > deadline:
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
    select.select([], [], [], 0.05)
for folder in folders:
    shutil.rmtree(folder, ignore_errors=True)
"""


def start_guard(folders: list[Path]) -> None:
    """Start a process that outlives this one and cleans up when it has ended, however it did.

    It removes folders, and kills what is left of this process's group (vLLM's engine, the
    sandbox's fork server) when this process leads a session of its own, as every rank under
    torchrun does. Needs Linux 5.3 (pidfd_open).
    """
    leads = os.getsid(0) == os.getpid()
    subprocess.Popen(
        [sys.executable, "-ISc", GUARD, str(os.getpid()), str(os.getpid() if leads else 0),
         *map(str, folders)],
        start_new_session=True, stdin=subprocess.DEVNULL)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies: torchrun, or rank 0."""
    import ctypes

    PR_SET_PDEATHSIG = 1
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


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


def scratch_folder(name: str) -> Path:
    """A folder in shared memory (else in the temporary folder), mode 700, removed by the guard."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix=f"acegrpo-{name}-", dir=parent))


# ---------------------------------------------------------------------------------------------
# 6. Roles


def rollout_main(config: Config, rank: int, address, key: bytes) -> None:
    """A rollout rank: one engine, one pool of sandboxes, threads that serve the task queue."""
    from transformers import AutoTokenizer

    scratch = scratch_folder("rollout")
    start_guard([scratch])
    ended = queue.Queue()  # None when there is nothing left to do, or the error
    connect = connect_queues(address, key)
    weights, acks = connect(f"weights/{rank}"), connect("acks")
    competitions = load_competitions(config.competitions)
    if config.heldout:
        competitions += load_competitions(config.heldout)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    budget = PromptBudget(config.description_chars, config.preview_chars, config.output_chars)
    engine = Engine(config.model, EngineConfig(
        max_model_len=config.max_model_len, max_num_seqs=config.max_num_seqs,
        dtype=config.engine_dtype, kv_cache_gib=config.kv_cache_gib or None,
        tensor_parallel_size=config.tensor_parallel, threads=config.engine_threads,
        seed=config.seed + rank), scratch=scratch)
    sandbox = Sandbox(slots=config.sandbox_slots, timeout=config.timeout,
                      cpu_seconds=config.cpu_seconds, memory_mb=config.memory_mb,
                      gpus=[config.sandbox_gpus] * config.sandbox_slots if config.sandbox_gpus
                      else None, unsafe=config.unsafe, scratch=str(scratch))
    if sandbox.problem:
        print(f"rollout rank {rank}: scripts cannot be isolated here: {sandbox.problem}; --unsafe "
              "runs them without isolation", file=sys.stderr)
        leave(2)
    worker = RolloutWorker(
        connect("tasks"), connect("results"), engine, sandbox,
        Prompter(tokenizer, competitions, budget),
        RolloutConfig(config.max_response_tokens, config.temperature, config.reward,
                      config.timeout),
        threads=config.rollout_threads, slots=config.sandbox_slots, on_error=ended.put)

    def serve_weights():
        """Load each published version and answer with the probe's log-probabilities."""
        try:
            while (message := weights.get()) is not None:
                directory, version, probe = message
                engine.load(directory, version)
                acks.put(engine.score(probe))
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    threading.Thread(target=serve_weights, name="weights", daemon=True).start()
    if (error := ended.get()) is not None:
        lost = isinstance(error, (EOFError, ConnectionError))
        print(f"rollout rank {rank}: " + ("rank 0 is gone" if lost else
              f"{type(error).__name__}: {error}"), file=sys.stderr, flush=True)
        os._exit(1)
    worker.join()
    sandbox.close()
    engine.close()


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
        dtype=config.learner_dtype, activation_checkpointing=config.activation_checkpointing)


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
        train, heldout = load_splits(config)
        self.splits = {"train": [c.id for c in train], "heldout": [c.id for c in heldout]}
        buffer = EvolvingBuffer(self.splits["train"], capacity=config.capacity,
                                max_depth=config.max_depth, children_per_group=config.children,
                                enabled=config.buffer, log_path=self.dir / "groups.jsonl")
        sampler = AdaptiveSampler(config.sampler, tau=config.tau, epsilon=config.epsilon,
                                  seed=config.seed)
        for task in buffer.roots():
            sampler.add(task.id, task.competition_id, task.operator)
        self.curriculum = Curriculum(config, buffer, sampler, queues("tasks"), queues("results"),
                                     self.dir / "traces.jsonl")
        # Any fixed text will do: it is scored, not answered.
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        self.probe = tokenizer.encode(train[0].description * 4, add_special_tokens=False)[:256]
        if resume:
            self.restore()

    def everyone(self, method: str, *arguments):
        """Call a method of the learner on every learner rank; most of them are collectives."""
        for orders in self.followers:
            orders.put((method, arguments))
        return getattr(self.learner, method)(*arguments)

    # -- the loop

    def run(self) -> None:
        from tqdm import tqdm

        config, curriculum, learner = self.config, self.curriculum, self.learner
        self.publish()
        curriculum.start()
        if self.step == 0:
            self.evaluate("before")
        bar = tqdm(total=config.steps, initial=self.step, desc="training", unit="step",
                   dynamic_ncols=True)
        board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # The steps that a resumed run takes again replace the earlier ones.
            board = SummaryWriter(self.dir / "tensorboard", purge_step=self.step + 1)
        while self.step < config.steps:
            started = time.monotonic()
            results = curriculum.next_batch()
            waited = time.monotonic()
            version = learner.version
            metrics = {"step": self.step + 1, "policy_version": version,
                       **batch_metrics(results, version)}
            sequences = make_batch(results, config)
            if sequences:
                metrics |= self.everyone("step", sequences)
            learnt = time.monotonic()
            metrics["logprob_gap"] = self.publish() if learner.version != version else None
            synced = time.monotonic()
            curriculum.stepped(learner.version)
            self.step += 1
            metrics |= {f"buffer_{op}": n for op, n in curriculum.buffer.counts().items()}
            metrics |= curriculum.sampler.metrics()
            metrics |= {"dropped": curriculum.dropped, "skipped_prompts": curriculum.skipped,
                        "seconds_wait": waited - started, "seconds_learn": learnt - waited,
                        "seconds_sync": synced - learnt,
                        "seconds_step": time.monotonic() - started}
            append_jsonl(self.dir / "metrics.jsonl", [{**EMPTY_METRICS, **metrics}])
            if board:
                for name, value in metrics.items():
                    if value is not None:
                        board.add_scalar(name, value, self.step)
                board.flush()
            bar.update()
            bar.set_postfix(
                reward=f"{metrics['reward_mean']:.2f}", valid=f"{metrics['valid_rate']:.0%}",
                medal=f"{metrics['medal_rate']:.0%}", stale=f"{metrics['staleness_mean']:.1f}",
                tasks=len(curriculum.buffer))
            if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                self.save()
        bar.close()
        self.evaluate("after")
        ranks = range(self.rollout_ranks[0], self.rollout_ranks[-1] + config.tensor_parallel)
        for orders in self.followers + [self.queues(f"weights/{rank}") for rank in ranks]:
            orders.put(None)
        self.queues("tasks").put(None)

    def publish(self) -> float:
        """Give every engine the learner's weights, and check that it samples with them.

        The check: each engine scores a fixed token sequence, the probe, and the learner compares
        with its own log-probabilities at that version. An engine that took over part of the weights
        only (vLLM keeps a tied output head, packed experts on CPUs) is caught here and nowhere
        else: it goes on sampling fluent text, from a wrong policy.

        Returns:
            the mean |log-probability difference| on the probe, the largest over the engines, nat.

        Raises:
            UserError: it is above --logprob-gap-limit.
        """
        version = self.learner.version
        directory = self.scratch / f"v{version}"
        self.everyone("publish", directory)
        # An engine scores a prompt at temperature 1, whatever it samples at.
        own = self.everyone("score", self.probe, 1.0)  # (T - 1,)
        for rank in self.rollout_ranks:
            self.queues(f"weights/{rank}").put((str(directory), version, self.probe))
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
        requests = [Request(Task.root(c), self.config.eval_drafts, self.learner.version,
                            self.curriculum.epoch, f"{when}/{split}")
                    for split, ids in self.splits.items() for c in ids]
        with tqdm(total=len(requests), desc=f"drafts {when} training", unit="competition") as bar:
            rows = evaluation_rows(self.curriculum.evaluate(requests, lambda: bar.update()))
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
        """Write checkpoints/step_N; it counts only once its DONE file exists."""
        folder = self.dir / "checkpoints" / f"step_{self.step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.everyone("save", str(folder / "learner"))
        state = {"step": self.step, "epoch": self.curriculum.epoch, **self.curriculum.state_dict()}
        (folder / "curriculum.json").write_text(json.dumps(state))
        (folder / "DONE").touch()
        self.everyone("publish", self.dir / "policy")
        complete = sorted((p.parent for p in self.dir.glob("checkpoints/step_*/DONE")),
                          key=checkpoint_step)
        for old in complete[:-self.config.keep_checkpoints]:
            shutil.rmtree(old)

    def restore(self) -> None:
        """Go on from the last complete checkpoint; without one, from the start."""
        complete = sorted((p.parent for p in self.dir.glob("checkpoints/step_*/DONE")),
                          key=checkpoint_step)
        if not complete:
            raise UserError(f"--resume {self.dir}: no complete checkpoint there; start a new run")
        folder = complete[-1]
        try:
            state = json.loads((folder / "curriculum.json").read_text())
            self.everyone("load", str(folder / "learner"))
            self.step = state["step"]
            self.curriculum.load_state_dict(state)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--resume {self.dir}: {folder.name} cannot be read ({error!r}); "
                            "delete it to go on from the checkpoint before it")
        # Steps after the checkpoint are taken again.
        metrics = self.dir / "metrics.jsonl"
        if metrics.exists():
            rows = [json.loads(line) for line in metrics.read_text().splitlines()]
            metrics.unlink()
            append_jsonl(metrics, [r for r in rows if r["step"] <= self.step])
        print(f"resuming {self.dir} after step {self.step}", flush=True)


# Every row of metrics.jsonl has the same keys: a skipped step has no learner metrics.
EMPTY_METRICS = dict.fromkeys(
    "step policy_version reward_mean reward_std valid_rate medal_rate groups groups_trained tokens "
    "staleness_mean staleness_max loss grad_norm kl clip_frac entropy is_ratio_mean logprob_gap "
    "unique_scripts".split())


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def load_splits(config: Config) -> tuple[list, list]:
    """Training and held-out competitions, which must not overlap."""
    train = load_competitions(config.competitions)
    heldout = load_competitions(config.heldout) if config.heldout else []
    if both := {c.id for c in train} & {c.id for c in heldout}:
        raise UserError(f"--heldout {config.heldout}: {min(both)} is a training competition too")
    return train, heldout


# ---------------------------------------------------------------------------------------------
# 7. Start and end


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
    rollout_main(config, 1, address, key)
    leave(0)


def leave(status: int) -> None:
    """End this process at once: threads of vLLM, gloo and the queues still run, and some of them do
    not survive it when the interpreter is taken down under them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def train(config: Config, resume: bool) -> None:
    """Play this process's role until the run is over."""
    import torch
    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    one_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == world
    group, scratch, queues = None, None, None
    if world > 1:
        die_with_parent()
        exit_on_sigterm()
        dist.init_process_group("gloo")
    if rank == 0:
        # Other nodes reach rank 0 where torchrun's own rendezvous reaches it.
        queues = QueueServer("127.0.0.1" if one_node else os.environ["MASTER_ADDR"])
        contact = [(queues.address, queues.key)]
    else:
        contact = [None]
    if world > 1:
        dist.broadcast_object_list(contact, src=0)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        group = dist.new_group(list(range(config.learner_ranks)), backend=backend)
    hide_torchrun()
    address, key = contact[0]

    if rank >= config.learner_ranks:
        first = (rank - config.learner_ranks) % config.tensor_parallel == 0
        if torch.cuda.is_available():
            gpus = range(local_rank, local_rank + config.tensor_parallel)
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        if first:
            rollout_main(config, rank, address, key)
        else:  # its GPU belongs to another rank's engine: wait for the end
            connect_queues(address, key)(f"weights/{rank}").get()
        dist.barrier()
        return

    from learner import Learner

    torch.manual_seed(config.seed)
    if not torch.cuda.is_available():
        torch.set_num_threads(config.learner_threads)
    else:
        torch.cuda.set_device(local_rank)
    learner = Learner(config.model, learner_config(config), group=group)
    if rank > 0:
        learner_follow(learner, connect_queues(address, key)(f"learner/{rank}"))
        dist.barrier()
        return

    scratch = scratch_folder("weights")
    start_guard([scratch])
    child = None
    if world == 1:
        rollout_ranks = [1]
        child = multiprocessing.get_context("spawn").Process(
            target=child_main, args=(config, address, key))
        child.start()
    else:
        rollout_ranks = list(range(config.learner_ranks, world, config.tensor_parallel))
    run = Run(config, learner, queues, rollout_ranks, scratch, resume)

    def watch():
        """Under torchrun the agent ends all ranks when one dies; alone we have to look."""
        child.join()
        if child.exitcode:
            run.fail(WorkerDied(f"the rollout process has ended with exit code {child.exitcode}"))

    if child:
        threading.Thread(target=watch, daemon=True).start()
    try:
        run.run()
        if child:
            child.join()
        else:
            dist.barrier()
    finally:
        if child and child.is_alive():
            child.terminate()
            child.join()


def prepare_run_dir(config: Config, resume: bool) -> None:
    """Create the run directory, readable by its owner only, with config.json."""
    run_dir = Path(config.run_dir)
    if not resume and run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"--run-dir {run_dir}: not empty; use --resume {run_dir} to go on with it, "
                        "or another directory")
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def print_plan(config: Config, splits: tuple[list, list]) -> None:
    """What a run would do and need, for --dry-run; nothing is started."""
    import torch

    from learner import memory_plan

    world = int(os.environ.get("WORLD_SIZE", 1))
    engines = max(world - config.learner_ranks, 1) // config.tensor_parallel
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    plan = memory_plan(config.model, learner_config(config), config.learner_ranks)
    print(f"preset {config.preset}: {len(splits[0])} training and {len(splits[1])} held-out "
          f"competitions, {config.steps} steps of {config.groups} groups x {config.responses} "
          f"responses\n{config.learner_ranks} learner ranks, {engines} engines, each "
          f"{config.rollout_threads} groups in flight and {config.sandbox_slots} sandboxes\n"
          f"run directory {config.run_dir}\nmemory of a learner rank:")
    for name, value in plan.items():
        print(f"  {name:16} {value / 1e6:12.1f} M" if name == "parameter_count" else
              f"  {name:16} {value / 2**30:12.2f} GiB")
    if memory and plan["total"] > memory:
        raise UserError(f"--dry-run: a learner rank needs {plan['total'] / 2**30:.1f} GiB and has "
                        f"{memory / 2**30:.1f}: use more --learner-ranks, a smaller --token-budget "
                        "or --activation-checkpointing")


def how_to_go_on(config: Config | None) -> str:
    if config and any(Path(config.run_dir).glob("checkpoints/step_*/DONE")):
        return f"go on with --resume {config.run_dir}"
    return "there is no checkpoint to go on from yet (--checkpoint-every)"


def main(argv: list[str] | None = None) -> int:
    config = None
    first = os.environ.get("RANK", "0") == "0"

    def say(text: str) -> None:
        if first:
            print(text, file=sys.stderr, flush=True)

    try:
        interrupt_on_signals()
        config, arguments = parse_config(argv)
        validate(config, int(os.environ.get("WORLD_SIZE", 1)))
        check_model(config.model)
        splits = load_splits(config)
        if arguments.dry_run:
            if first:
                print_plan(config, splits)
            return 0
        if first:
            prepare_run_dir(config, bool(arguments.resume))
            print(f"run directory: {config.run_dir}", flush=True)
        train(config, bool(arguments.resume))
        if first:
            print(f"done: {config.run_dir}/metrics.jsonl, eval.jsonl, policy/", flush=True)
        return 0
    except (UserError, CompetitionError) as error:
        say(f"train.py: {error}")
        return 2
    except WorkerDied as error:
        say(f"train.py: {error}; {how_to_go_on(config)}")
        return 1
    except BaseException:
        if not INTERRUPTED.is_set():  # a checkpoint being written turns it into another exception
            raise
        say(f"\ninterrupted; {how_to_go_on(config)}")
        return 130


if __name__ == "__main__":
    leave(main())
