"""The Evolving Data Buffer: execution traces become new training tasks.

In the paper (arXiv 2602.07906): "Evolving Data Buffer", the half of AceGRPO that makes the task
distribution grow. A policy is trained on single steps, and every step it takes leaves a script with
a known outcome behind; that script is the starting point of the next step:

    draft ──► failed trace ──► debug task ──► valid trace ──► improve task ──► ...
         └──► valid trace  ──► improve task ──► failed trace ──► debug task ──► ...

What is the paper's and what is ours:
 1. [paper] Execution traces are repurposed as training tasks.
 2. [ours]  Which ones: a failed trace opens a `debug` task; a valid trace with headroom left
            (base reward < 1 - min_headroom) opens an `improve` task; one without code opens none.
 3. [ours]  Duplicates merge: one task for each (competition, operator, code_key of the parent).
 4. [ours]  Diversity: at most k new tasks a group. Valid and failed parents take turns; valid ones
            best first and of distinct reward, failed ones of distinct error type.
 5. [ours]  Depth <= D, and capacity C: the lowest scores leave first (oldest first among equals),
            never roots and never protected tasks (those in flight). The scores are the caller's:
            Learnability Potential in training. What cannot be made room for is not admitted.
            Of a competition only the `frontier` newest improve tasks stay, newest by admission: an
            agent improves what the policy writes today. On a poor script of the past the best
            answer is to start all over; the best scripts of a whole run are better than any that an
            agent will have.
 6. [ours]  State = append-only log + snapshot. A decision (admitted, evicted) is made once, written
            to the log, and only then applied, so replaying the log gives the same state without
            asking for scores again.
 7. [ours]  `crossover` tasks, off by default, in nothing that we know of the paper: the best valid
            trace of a group and the best valid script that the buffer holds of the same
            competition, to be made one better script. At most one a group, among its k.

Durability: every group is one line, handed to the operating system before the buffer changes, so
a killed process loses nothing. fsync runs in `state_dict()`: a power failure can lose groups that
finished after the last checkpoint, but a checkpoint never knows more than the log.
One thread owns a buffer; nothing here locks.

    python buffer.py        # a worked example
"""

from __future__ import annotations

import heapq
import json
import math
import os
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

OPERATORS = ("draft", "improve", "debug", "crossover")


# ------------------------------------------------------------------------------------- records


# The token arrays of a trace. What a task keeps of its parent has none, and there are many tasks:
# all share these; three empty arrays of their own would be 336 bytes a task.
NO_TOKENS = {"prompt_ids": np.zeros(0, np.int32), "response_ids": np.zeros(0, np.int32),
             "logprobs": np.zeros(0, np.float32)}


def _empty(name: str):
    return field(default_factory=lambda: NO_TOKENS[name])


@dataclass(eq=False)
class Trace:
    """One response to a task, with everything known of it.

    T is the number of response tokens, the sampled stop token included. Rewards are in [0, 1].
    """

    id: str
    task_id: str
    competition_id: str
    operator: str
    depth: int = 0  # of its task: 0 for a draft
    parent_id: str | None = None  # id of the trace that its task starts from
    prompt_ids: np.ndarray = _empty("prompt_ids")  # (P,)
    response_ids: np.ndarray = _empty("response_ids")  # (T,)
    logprobs: np.ndarray = _empty("logprobs")  # (T,) the behaviour policy's, from the engine
    policy_version: int = 0  # of the oldest token
    finish_reason: str = "stop"  # stop | length
    code: str = ""  # "" when the response holds none
    code_key: str = ""  # digest of the normalised code: equal keys are the same script
    # ok | error | timeout | memory | no_submission | invalid: the grader refused the submission |
    # refused: the sandbox did not run it
    status: str = ""
    exit_code: int | None = None
    seconds: float = 0.0  # wall-clock of the execution
    output: str = ""  # its tail, as a debug prompt shows it
    validation_score: float | None = None  # what the script printed about itself
    claim: float | None = None  # what an agent chooses by (rollout.claim); None: not valid
    valid: bool = False  # the grader accepted the submission
    score: float | None = None  # the competition's metric, on the private answers
    medal: str = "none"  # gold | silver | bronze | none
    human_rank: float = 0.0
    base_reward: float = 0.0  # of the outcome alone
    reward: float = 0.0  # of the step (sandbox.step_reward): what the policy is trained on
    reason: str = ""  # why it failed, in a line
    isolation: str = ""  # what confined the execution; "unsafe (...)" when something was missing
    reused: bool = False  # not executed: an equal script had been, on the same competition

    def public(self) -> dict[str, Any]:
        """Every field but the token arrays, as JSON types: a line of traces.jsonl.

        Scores that are not finite become None, since JSON has no NaN.
        """
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)
                if f.name not in NO_TOKENS}

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON types; `from_json` gives the same trace back, bit by bit (but for
        scores that are not finite)."""
        return self.public() | {name: np.asarray(getattr(self, name)).tolist()
                                for name in NO_TOKENS}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trace:
        """Inverse of `to_json`, and of `public` (the token arrays are then empty).

        Raises TypeError for what is no trace: a field that is missing, unknown or of another type.
        """
        arrays = {name: np.array(data[name], none.dtype) for name, none in NO_TOKENS.items()
                  if name in data}
        for f in fields(cls):
            value, types = data.get(f.name), f.type.split(" | ")  # such as "float | None"
            known = type(value).__name__ in types or type(value) is int and "float" in types
            if f.name in data and f.name not in NO_TOKENS and not (
                    known or value is None and "None" in types):
                raise TypeError(f"{f.name}: {value!r} is no {f.type}")
        return cls(**(data | arrays))

    def without_tokens(self) -> Trace:
        """What a task keeps of its parent: a copy without token arrays, and without the id of the
        parent's own parent, which would outlive the task that it belongs to."""
        return replace(self, parent_id=None, **NO_TOKENS)


def plain(value):
    """A numpy scalar as a Python one; a float that is not finite as None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Task:
    """What a policy is prompted with: (competition, operator, parent trace).

    `lineage` are the ids of the tasks that led here, root first, without this one. A task carries
    it because its ancestors may have been evicted. A `crossover` task has a second parent, whose
    base reward is at most the first one's; its lineage is that of the trace that opened it.
    """

    id: str
    competition_id: str
    operator: str
    depth: int = 0
    parent: Trace | None = None  # as `without_tokens` leaves it; so is `second`
    lineage: tuple[str, ...] = ()
    second: Trace | None = None  # the other parent of a crossover

    @property
    def parents(self) -> list[Trace]:
        """[] for a draft, two for a crossover (the better one first), else one."""
        return [trace for trace in (self.parent, self.second) if trace is not None]

    @property
    def headroom(self) -> float:
        """The most that a step can gain: 1 less the base reward of the (better) parent."""
        return 1.0 - self.parent.base_reward if self.parent else 1.0

    @classmethod
    def root(cls, competition_id: str) -> Task:
        return cls(f"{competition_id}/draft", competition_id, "draft")

    def child(self, parent: Trace) -> Task:
        """The task that `parent`, one of this task's traces, opens."""
        return Task(child_id(parent), self.competition_id, child_operator(parent), self.depth + 1,
                    parent.without_tokens(), (*self.lineage, self.id))

    def crossing(self, trace: Trace, partner: Trace) -> Task:
        """The crossover task of `trace`, one of this task's, and a valid trace found earlier."""
        best, other = sorted((trace, partner), key=lambda t: -t.base_reward)
        return Task(crossing_id(trace, partner), self.competition_id, "crossover", self.depth + 1,
                    best.without_tokens(), (*self.lineage, self.id), other.without_tokens())

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "competition_id": self.competition_id, "operator": self.operator,
                "depth": self.depth, "parent": self.parent and self.parent.public(),
                "lineage": list(self.lineage), "second": self.second and self.second.public()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Task:
        parents = {name: data.get(name) and Trace.from_json(data[name])
                   for name in ("parent", "second")}
        return cls(**(data | parents | {"lineage": tuple(data["lineage"])}))


def child_operator(parent: Trace) -> str:
    return "improve" if parent.valid else "debug"


def child_id(parent: Trace) -> str:
    """Equal scripts give equal ids: that is how duplicates merge. 16 hex digits: no collisions."""
    return f"{parent.competition_id}/{child_operator(parent)}/{parent.code_key[:16]}"


def crossing_id(one: Trace, other: Trace) -> str:
    """The same for both orders of the parents."""
    keys = sorted((one.code_key[:16], other.code_key[:16]))
    return f"{one.competition_id}/crossover/{keys[0]}+{keys[1]}"


@dataclass(eq=False)
class Group:
    """The G traces of one task, rolled out together: GRPO's unit.

    `epoch` counts how often a run was resumed: groups of an earlier epoch that were not trained on
    before a resume feed the curriculum, but their policy belongs to an abandoned line of training.
    """

    task: Task
    traces: list[Trace]
    epoch: int = 0
    handout_version: int = 0  # the learner's version when the task was handed out

    @property
    def policy_version(self) -> int:
        """Of the oldest token in the group."""
        return min(trace.policy_version for trace in self.traces)

    @property
    def rewards(self) -> np.ndarray:
        return np.array([trace.reward for trace in self.traces], np.float32)  # (G,)

    @property
    def failed(self) -> float:
        """Share of the traces that are not valid."""
        return sum(not trace.valid for trace in self.traces) / len(self.traces)

    def to_json(self) -> dict[str, Any]:
        """With token arrays, for the groups that a checkpoint finds finished but not consumed."""
        return {"task": self.task.to_json(), "traces": [t.to_json() for t in self.traces],
                "epoch": self.epoch, "handout_version": self.handout_version}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Group:
        return cls(**(data | {"task": Task.from_json(data["task"]),
                              "traces": [Trace.from_json(t) for t in data["traces"]]}))


# ---------------------------------------------------------------------- which traces become tasks


def error_type(trace: Trace) -> str:
    """What kind of failure this is: the exception's class, else the execution's status.

    >>> error_type(Trace("t", "c/draft", "c", "draft", status="error", output=(
    ...     "Traceback (most recent call last):\\n  File 'script.py', line 3\\nKeyError: 'id'")))
    'KeyError'
    >>> error_type(Trace("t", "c/draft", "c", "draft", status="timeout", output="epoch 3"))
    'timeout'
    """
    if trace.status == "error":
        for text in (trace.output, trace.reason):
            if found := EXCEPTION_LINE.findall(text):
                return found[-1].rsplit(".", 1)[-1]  # the last one: earlier ones were its causes
    return trace.status


# The last line of a traceback: `KeyError: 'id'`, `sklearn.exceptions.NotFittedError: ...`
EXCEPTION_LINE = re.compile(
    r"^([A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Iteration))(?::|\s*$)", re.MULTILINE)


def select_parents(traces: Iterable[Trace], count: int) -> list[Trace]:
    """At most `count` traces, unlike each other, valid and failed ones taking turns.

    Valid ones come best first, one for each reward (to two digits: about one per cent of the
    leaderboard); failed ones likewise (a refused submission has 0.05, a crash 0), one for each
    error type.

    >>> def trace(name, base=0.0, status="ok"):
    ...     return Trace(name, "c/draft", "c", "draft", valid=base > 0, base_reward=base,
    ...                  status=status)
    >>> group = [trace("a", 0.40), trace("b", status="timeout"), trace("c", 0.70),
    ...          trace("d", 0.701), trace("e", status="timeout"), trace("f", status="memory")]
    >>> [t.id for t in select_parents(group, 4)]
    ['d', 'b', 'a', 'f']
    """
    valid: dict[float, Trace] = {}
    failed: dict[str, Trace] = {}
    for trace in sorted(traces, key=lambda t: -t.base_reward):  # stable: ties keep their order
        if trace.valid:
            valid.setdefault(round(trace.base_reward, 2), trace)
        else:
            failed.setdefault(error_type(trace), trace)
    queues = [list(valid.values()), list(failed.values())]
    chosen: list[Trace] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen


# -------------------------------------------------------------------------------------- the buffer


class Change(NamedTuple):
    """What one record of the log did: enough to bring a sampler along when a log is replayed."""

    sequence: int
    epoch: int | None  # of the group; None when the record only takes a task out
    task_id: str
    rewards: np.ndarray  # (G,); empty when the record only takes a task out
    failed: float  # Group.failed; 0 when the record only takes a task out
    admitted: list[Task]
    evicted: list[str]


RECORD = {"sequence", "epoch", "task", "traces", "admitted", "merged", "evicted"}  # of a group
COUNTERS = ("groups", "traces", "valid", "medals", "reward", "admitted", "merged", "evicted")
RATES = {"valid_rate": "valid", "medal_rate": "medals", "reward_mean": "reward"}  # a trace


class EvolvingBuffer:
    """The tasks that training draws from: one draft root a competition, and what grew from them.

    Args:
        competition_ids: one root each.
        capacity: most tasks held, roots included.
        max_depth: deepest task admitted; a draft has depth 0.
        children_per_group: k, the most tasks that one group adds.
        frontier: `improve` tasks of a competition that stay, the newest; 0: no limit. One in flight
            stays until a later group of its competition.
        min_headroom: a valid trace opens an `improve` task only while its base reward leaves
            more than this to gain.
        enabled: False admits nothing: the ablation `--no-buffer`. Groups are logged all the same.
        crossover: also admit tasks with two parents, one a group; it takes one of k >= 2 places.
        log_path: JSON lines, one a group; None keeps no log. An existing log has to be replayed
            before the first `add`.

    Raises:
        ValueError: no or repeated competitions, a capacity that does not hold the roots, a negative
            limit, or a min_headroom outside [0, 1].
    """

    def __init__(self, competition_ids: Iterable[str], capacity: int = 4096, max_depth: int = 16,
                 children_per_group: int = 3, frontier: int = 8, min_headroom: float = 0.05,
                 enabled: bool = True, crossover: bool = False,
                 log_path: str | os.PathLike | None = None):
        self.competition_ids = list(competition_ids)
        if not self.competition_ids:
            raise ValueError("no competitions: a buffer needs at least one draft root")
        if len(set(self.competition_ids)) < len(self.competition_ids):
            raise ValueError(f"a competition is named twice in {self.competition_ids}")
        if capacity < len(self.competition_ids):
            raise ValueError(f"capacity {capacity} is below the number of competitions "
                             f"({len(self.competition_ids)}): the roots never leave")
        if min(max_depth, children_per_group, frontier) < 0:
            raise ValueError(f"below 0: max_depth {max_depth}, children_per_group "
                             f"{children_per_group} or frontier {frontier}")
        if not 0 <= min_headroom <= 1:
            raise ValueError(f"min_headroom has to be in [0, 1]: {min_headroom}")
        self.capacity = capacity
        self.max_depth = max_depth
        self.children_per_group = children_per_group
        self.frontier = frontier
        self.min_headroom = min_headroom
        self.enabled = enabled
        self.crossover = crossover
        self.log_path = log_path
        self.tasks: dict[str, Task] = {}  # in order of admission, roots first
        for competition_id in self.competition_ids:
            root = Task.root(competition_id)
            self.tasks[root.id] = root
        # ids of the improve tasks, oldest first
        self._improve = {name: [] for name in self.competition_ids}
        self.sequence = 0  # changes since the run began: groups added and tasks taken out
        self._totals: dict[tuple[str, str], dict[str, float]] = {}  # by (competition, operator)
        self._log = None
        self._replay_from = 0  # bytes of the log that the loaded snapshot covers

    def roots(self) -> list[Task]:
        return [task for task in self.tasks.values() if task.depth == 0]

    def __len__(self) -> int:
        return len(self.tasks)

    # ---- growing

    def add(self, group: Group, score: Callable[[str], float] | None = None,
            protected: Container[str] = ()) -> tuple[list[Task], list[str]]:
        """Learn from a finished group: admit children of its traces, evict what no longer fits
        (at capacity, a 64th of it at once).

        Args:
            group: its task may have been evicted meanwhile; its competition must be known.
            score: task id -> worth of keeping it; the lowest leave first. None: oldest first.
            protected: ids that must stay, such as those of the tasks in flight.

        Returns:
            The tasks admitted (valid and failed parents in turn, each the best first; a crossover
            comes last), and the ids of those evicted.

        Raises:
            ValueError: the group is empty, of an unknown competition or with a reward that is not
                finite, or the log on disk holds other groups than this buffer (replay it first).
            OSError: the log cannot be written (disk full). The buffer and the log are then as they
                were before the call, which can be repeated.
        """
        record = self._decide(group, score, protected)
        self._append(record)
        change = self._apply(record)
        return change.admitted, change.evicted

    def remove(self, task_id: str) -> None:
        """Take out a task that cannot be used (its prompt is longer than the context).

        It goes through the log like everything else; replay reports it as a change without rewards.
        Raises ValueError for a root, KeyError for a task that the buffer does not hold.
        """
        if self.tasks[task_id].depth == 0:
            raise ValueError(f"{task_id} is a root: roots never leave")
        record = {"sequence": self.sequence + 1, "removed": task_id}
        self._append(record)
        self._apply(record)

    def _decide(self, group: Group, score, protected) -> dict[str, Any]:
        """What this group changes, as the record that the log keeps. Changes nothing itself."""
        if not group.traces:
            raise ValueError(f"the group of {group.task.id} has no traces")
        if not np.isfinite([(t.reward, t.base_reward) for t in group.traces]).all():
            raise ValueError(f"the group of {group.task.id} has a reward that is not finite")
        if f"{group.task.competition_id}/draft" not in self.tasks:
            raise ValueError(f"unknown competition {group.task.competition_id!r}; "
                             f"this buffer has {self.competition_ids}")
        candidates: dict[str, Trace] = {}  # by the id of the task that the trace would open
        merged = 0
        for trace in group.traces:
            if self._opens_task(group.task, trace):
                name = child_id(trace)
                merged += self._known(name, group) or name in candidates
                if not self._known(name, group):
                    candidates.setdefault(name, trace)
        crossing = self._crossing(group)
        parents = select_parents(candidates.values(), self.children_per_group - len(crossing))
        admitted = [group.traces.index(trace) for trace in parents] + crossing

        evicted = []
        if self.frontier:
            held = self._improve[group.task.competition_id]
            new = [entry for entry in admitted
                   if isinstance(entry, int) and group.traces[entry].valid]
            admitted = [entry for entry in admitted if entry not in new[self.frontier:]]
            over = max(len(held) + len(new) - self.frontier, 0)
            evicted = [name for name in held[:over] if name not in protected]
        room = self.capacity - len(self.tasks) + len(evicted)
        if len(admitted) > room:
            evictable = [task.id for task in self.tasks.values() if task.depth > 0
                         and task.id not in protected and task.id not in evicted]
            # Scoring every task is what costs: a large buffer makes room for some groups at once.
            count = max(len(admitted) - room, self.capacity // 64)
            lowest = heapq.nsmallest(count, evictable, key=score) if score else evictable[:count]
            admitted, evicted = admitted[:max(room + len(lowest), 0)], evicted + lowest

        return {
            "sequence": self.sequence + 1,
            "epoch": group.epoch,
            "handout_version": group.handout_version,
            # The parents' own groups have them.
            "task": group.task.to_json() | {"parent": None, "second": None},
            "traces": [trace.public() for trace in group.traces],
            "admitted": admitted,  # position of the parent; of a crossover (position, partner)
            "merged": merged,
            "evicted": evicted,
        }

    def _opens_task(self, task: Task, trace: Trace) -> bool:
        if not self.enabled or not trace.code or task.depth >= self.max_depth:
            return False
        if trace.valid:
            return trace.base_reward < 1.0 - self.min_headroom
        return trace.status != "refused"  # the sandbox's failure, not the script's

    def _known(self, task_id: str, group: Group) -> bool:
        """The buffer holds it, or it is the group's own task, which may be evicted by now."""
        return task_id in self.tasks or task_id == group.task.id

    def _crossing(self, group: Group) -> list[tuple[int, str]]:
        """At most one pair: position of the group's best valid trace, task that holds the best
        script to cross it with."""
        traces = [t for t in group.traces if t.valid and self._opens_task(group.task, t)]
        if not self.crossover or self.children_per_group < 2 or not traces:
            return []
        trace = max(traces, key=lambda t: t.base_reward)
        partners = [task for task in map(self.tasks.get, self._improve[trace.competition_id])
                    if task.parent.code_key != trace.code_key
                    and not self._known(crossing_id(trace, task.parent), group)]
        if not partners:
            return []
        partner = max(partners, key=lambda task: task.parent.base_reward)
        return [(group.traces.index(trace), partner.id)]

    def _drop(self, task_ids: list[str]) -> None:
        for task in map(self.tasks.get, task_ids):
            self._count(task.competition_id, task.operator, evicted=1)
            if task.operator == "improve":
                self._improve[task.competition_id].remove(task.id)
        if gone := set(task_ids):
            # A new dictionary: one that entries are popped from keeps their places, and grows.
            self.tasks = {name: task for name, task in self.tasks.items() if name not in gone}

    def _apply(self, record: dict[str, Any]) -> Change:
        """Bring a decision into effect: the only place where tasks and counters change."""
        self.sequence = record["sequence"]
        if "removed" in record:
            gone = record["removed"]
            self._drop([gone])
            return Change(self.sequence, None, gone, np.zeros(0, np.float32), 0.0, [], [gone])
        task = Task.from_json(record["task"])
        traces = [Trace.from_json(data) for data in record["traces"]]
        admitted = [task.child(traces[entry]) if isinstance(entry, int)
                    else task.crossing(traces[entry[0]], self.tasks[entry[1]].parent)
                    for entry in record["admitted"]]
        self._drop(record["evicted"])
        for child in admitted:
            self.tasks[child.id] = child
            if child.operator == "improve":
                self._improve[child.competition_id].append(child.id)
            self._count(child.competition_id, child.operator, admitted=1)
        self._count(
            task.competition_id, task.operator, groups=1, traces=len(traces),
            valid=sum(t.valid for t in traces), medals=sum(t.medal != "none" for t in traces),
            reward=math.fsum(t.reward for t in traces), merged=record["merged"])
        group = Group(task, traces)
        return Change(self.sequence, record["epoch"], task.id, group.rewards, group.failed,
                      admitted, list(record["evicted"]))

    # ---- looking

    def counts(self) -> dict[str, int]:
        """Tasks held, by operator."""
        counts = dict.fromkeys(OPERATORS, 0)
        for task in self.tasks.values():
            counts[task.operator] += 1
        return counts

    def ancestry(self, task_id: str) -> list[str]:
        """Ids of the tasks from the root to this one, evicted ancestors included.

        With the `task_id` and `parent_id` of traces.jsonl this draws the tree of traces.
        Raises KeyError for a task that the buffer does not hold.
        """
        return [*self.tasks[task_id].lineage, task_id]

    def statistics(self) -> dict[str, dict[str, dict[str, float]]]:
        """What happened since the run began: {"operator": {name: entry}, "competition": {...}}.

        Each entry holds `tasks` (held now), `groups`, `traces`, `valid_rate`, `medal_rate`,
        `reward_mean` (over the traces rolled out on such tasks), and `admitted`, `evicted` (tasks)
        and `merged` (traces whose task another trace of their group opens, were it not for the
        diversity rule, or that the buffer already held).
        """
        by_operator: dict[str, dict[str, float]] = {}
        by_competition: dict[str, dict[str, float]] = {}

        def add(competition_id: str, operator: str, amounts: dict[str, float]) -> None:
            for group, key in ((by_operator, operator), (by_competition, competition_id)):
                entry = group.setdefault(key, dict.fromkeys(("tasks", *COUNTERS), 0))
                for counter, amount in amounts.items():
                    entry[counter] += amount

        for task in self.tasks.values():
            add(task.competition_id, task.operator, {"tasks": 1})
        for (competition_id, operator), totals in self._totals.items():
            add(competition_id, operator, totals)
        for entry in (*by_operator.values(), *by_competition.values()):
            for rate, counter in RATES.items():
                entry[rate] = entry.pop(counter) / max(entry["traces"], 1)
        return {"operator": by_operator, "competition": by_competition}

    def _count(self, competition_id: str, operator: str, **amounts: float) -> None:
        totals = self._totals.setdefault((competition_id, operator), dict.fromkeys(COUNTERS, 0))
        for counter, amount in amounts.items():
            totals[counter] += amount

    # ---- snapshot and log

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as JSON types. Forces the log to disk first."""
        if self._log:
            os.fsync(self._log.fileno())
        return {
            "sequence": self.sequence,
            "log_bytes": self._log.tell() if self._log else self._replay_from,
            "competition_ids": list(self.competition_ids),
            "tasks": [task.to_json() for task in self.tasks.values()],
            "totals": [[*key, dict(totals)] for key, totals in self._totals.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a snapshot. `replay()` then adds the groups that the log has beyond it.

        Raises ValueError when the snapshot is of other competitions.
        """
        if state["competition_ids"] != self.competition_ids:
            raise ValueError(f"the snapshot is of competitions {state['competition_ids']}, "
                             f"this buffer of {self.competition_ids}")
        self.close()
        self.sequence = state["sequence"]
        self.tasks = {data["id"]: Task.from_json(data) for data in state["tasks"]}
        self._improve = {name: [] for name in self.competition_ids}
        for task in self.tasks.values():
            if task.operator == "improve":
                self._improve[task.competition_id].append(task.id)
        self._totals = {(c, o): dict(totals) for c, o, totals in state["totals"]}
        self._replay_from = state["log_bytes"]

    def replay(self, path: str | os.PathLike | None = None) -> list[Change]:
        """Apply the changes in the log (default: this buffer's own) that came after this state.

        A torn last line, what a kill in the middle of a write leaves, is ignored. Scores are not
        needed: the log holds what was evicted.

        Returns:
            The changes in their order, so that the caller can repeat them in its sampler.

        Raises:
            ValueError: a damaged line before the last, or sequence numbers that do not go on from
                this state, or a log that is shorter than what this state knows of it.
        """
        changes = []
        path = path or self.log_path
        size = os.path.getsize(path) if path and os.path.exists(path) else 0
        if size < self._replay_from:
            raise ValueError(f"{path} has {size} bytes, but the snapshot knows of "
                             f"{self._replay_from}: it was cut or is of another run")
        if not size:
            return changes
        with open(path, "rb") as log:
            log.seek(self._replay_from)
            for line in log:
                if not line.endswith(b"\n"):
                    break  # torn
                record = _parse(line, path)
                if record["sequence"] <= self.sequence and not changes:
                    continue  # the snapshot has it
                if record["sequence"] != self.sequence + 1:
                    raise ValueError(f"{path}: change {record['sequence']} follows "
                                     f"{self.sequence}; the log is of another run or incomplete")
                changes.append(self._apply(record))
        return changes

    def _append(self, record: dict[str, Any]) -> None:
        """Write one line. On failure the log is cut back to where it was."""
        if self.log_path is None:
            return
        if self._log is None:
            self._log = self._open_log()
        start = self._log.tell()
        line = memoryview(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        try:
            while line:  # a raw write may be partial
                line = line[self._log.write(line):]
        except OSError:
            self._log.truncate(start)
            self._log.seek(start)
            raise

    def _open_log(self):
        """Unbuffered, at its end; a torn last line is cut off."""
        log = open(self.log_path, "ab+", buffering=0)
        try:
            end, last = last_line(log)
            found = _parse(last, self.log_path)["sequence"] if last else 0
            if found != self.sequence:
                raise ValueError(f"{self.log_path} holds {found} changes, this buffer "
                                 f"{self.sequence}: replay() it or name another log")
            log.truncate(end)
            log.seek(end)
        except BaseException:
            log.close()
            raise
        return log

    def close(self) -> None:
        """Close the log; a later `add` opens it again."""
        if self._log:
            self._log.close()
            self._log = None


def _parse(line: bytes, path) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if {"sequence", "removed"} <= record.keys() or RECORD <= record.keys():
            return record
        raise ValueError("no record of a change")
    except (ValueError, AttributeError) as error:  # AttributeError: not an object
        raise ValueError(f"{path}: damaged line {line[:60]!r}... ({error})") from None


def last_line(file, block: int = 1 << 16) -> tuple[int, bytes]:
    """Where a binary file's last complete line ends, and that line (b"" when there is none)."""
    end = file.seek(0, os.SEEK_END)
    tail, start = b"", end
    while start > 0 and tail.count(b"\n") < 2:
        start = max(0, start - block)
        file.seek(start)
        tail = file.read(end - start)
    complete = tail[:tail.rfind(b"\n") + 1]
    return start + len(complete), complete.splitlines()[-1] if complete else b""


# ----------------------------------------------------------------------------------- worked example


def main() -> None:
    def trace(task, name, base, status="ok", output=""):
        return Trace(f"{task.id}#{name}", task.id, task.competition_id, task.operator, task.depth,
                     task.parent and task.parent.id, code=f"script {name}", code_key=name,
                     status=status, output=output, valid=base > 0, base_reward=base, reward=base)

    buffer = EvolvingBuffer(["iris", "wine"], capacity=5, children_per_group=3)
    root = buffer.tasks["iris/draft"]
    print("Two competitions, capacity 5:", *buffer.tasks)

    print("\nA draft group: two scripts alike (a, a), one of nearly the same reward (b),\n"
          "two KeyErrors (c, d), a timeout (e).")
    admitted, _ = buffer.add(Group(root, [
        trace(root, "a", 0.55), trace(root, "a", 0.55), trace(root, "b", 0.553),
        trace(root, "c", 0.0, "error", "KeyError: 'species'"),
        trace(root, "d", 0.0, "error", "KeyError: 'target'"),
        trace(root, "e", 0.0, "timeout")]))
    for task in admitted:
        print(f"  admitted {task.id:18} parent's reward {task.parent.base_reward:.3f}"
              f"  {'' if task.parent.valid else error_type(task.parent)}")
    print("  a: its reward is b's to two digits. d: its error type is c's.")

    fix = buffer.tasks["iris/debug/c"]
    print(f"\nThe debug task is solved: {fix.id} -> reward 0.73. The buffer is full (5 of 5), so")
    scores = {"iris/improve/b": 0.25, "iris/debug/c": 0.20, "iris/debug/e": 0.05}
    admitted, evicted = buffer.add(Group(fix, [trace(fix, "f", 0.73)]),
                                   score=lambda task_id: scores.get(task_id, 1.0))
    print(f"  the lowest score leaves: {evicted}; admitted: {[task.id for task in admitted]}")
    print("  ancestry:", " -> ".join(buffer.ancestry(admitted[0].id)))
    print("  tasks by operator:", buffer.counts())


if __name__ == "__main__":
    main()
