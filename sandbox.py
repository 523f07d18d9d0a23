"""The judge: run a policy's script in isolation, grade what it submitted, turn the grade into a reward.

Where in the paper: AceGRPO (arXiv 2602.07906) trains on the results of executed scripts and names
execution latency as what stalls RL for ML engineering. Its sandbox is not described, so nearly
everything here is our choice:

1. [paper] A step's feedback is the execution of one script and its MLE-bench grade.
2. [ours]  Reward: 0 for nothing usable, 0.05 for a refused submission, 0.1 + 0.9 * human rank for a
           valid one; `improve` steps add half of the gain over their parent (`base_reward`).
3. [ours]  Speed: scripts are forked from a server that has already imported pandas and scikit-learn
           (a trivial run takes 15 ms; `python script.py` needs 900 ms, mostly for imports).
4. [ours]  Safety: the policy is rewarded for its score, so it will try to read the answers, to talk
           to the trainer, to outlive its run. Landlock confines files, a seccomp filter confines
           system calls; neither is enough alone. Both work for a normal user, for root and in
           Docker, where user namespaces fail. Without both, runs are refused (`unsafe` overrides).
5. [ours]  Limits: `timeout` is wall-clock time, `cpu_seconds` is CPU time. On shared cores they
           differ, so a trainer bounds CPU time tightly and gives the wall clock about 3x as much:
           a script must not fail because its neighbours were busy.
6. [ours]  Runs are reproducible: the random seed derives from the code, so equal scripts score equally.

Processes, one column a machine boundary for trust:

    owner (trainer) ── control socket ──> fork server ── fork ──> nanny ── fork ──> worker = the script
    holds answers,                        holds imported          one a run: limits,    Landlock, seccomp,
    grades, rewards                       libraries, no secret    kills, collects       rlimits, no privilege
          └──────────── one socket a run: request in, result out; EOF means failure ───┘

Covered (tests/test_sandbox_attacks.py attacks each):
- Answers: no path, link, /proc, descriptor, handle, ptrace or memory read leads to them; the fork
  server never knew them; the owner's environment is not inherited.
- Poisoning: the public data, the Python installation and other runs' files cannot be changed; each
  run is a fresh fork, so monkeypatches die with it; no System V or POSIX IPC, no keyrings.
- Submission: read after every process of the run is dead, through O_NOFOLLOW, bounded, strictly parsed.
- Processes: no fork, exec or signal to anyone else; threads only. Hangs, ignored signals and SIGSTOP
  end at the time limit by SIGKILL. Nothing survives its run, its server or its owner (kill -9).
- Resources: CPU, wall, memory, file size, disk, inodes, threads, descriptors, output.
- Network and odd kernel interfaces: default-deny list of system calls, for both native and foreign ABIs.
Not covered: kernel exploits; CPU and cache timing; stat() metadata (a script can see that a path exists
and how large it is: keep private directories 0700); overshoot between two polls (POLL_SECONDS);
contention within the limits; GPU memory between jobs (the `gpus` mode opens /dev/nvidia* and ioctl);
process pools (`fork` is denied; joblib runs in threads); systems other than Linux on x86_64 or aarch64
(refused: use a VM or a container a run). What lies in the Python prefix is readable to scripts,
scikit-learn's bundled data included: a competition must not be a plain copy of it.

Run alone:
    python sandbox.py run --competition DIR script.py [--timeout S]
    python sandbox.py grade --competition DIR submission.csv
    python sandbox.py selftest
"""

from __future__ import annotations

import argparse
import ast
import atexit
import csv
import ctypes
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import linecache
import math
import os
import platform
import queue
import random
import re
import resource
import secrets
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# ------------------------------------------------------------------------------------------------
# Competitions and grades: MLE-bench's layout and rules


class CompetitionError(ValueError):
    """A competition cannot be loaded or graded; the message is one line: what, where, remedy."""


class SubmissionError(ValueError):
    """A submission is refused before the grader sees it; the message is one line for the agent."""


@dataclass(frozen=True)
class Grade:
    """What the grader said of one submission.

    score is in the competition's own metric, None when invalid; human_rank is in [0, 1];
    reason is one line, empty when valid.
    """

    valid: bool
    score: float | None = None
    medal: str = "none"  # gold | silver | bronze | none
    human_rank: float = 0.0
    above_median: bool = False
    reason: str = ""


def medal_ranks(teams: int) -> tuple[int, int, int]:
    """Last ranks (1 = best) that win gold, silver and bronze among `teams` (MLE-bench, after Kaggle).

    >>> medal_ranks(50), medal_ranks(100), medal_ranks(500), medal_ranks(2000)
    ((5, 10, 20), (10, 20, 40), (11, 50, 100), (14, 100, 200))
    """
    if teams < 100:
        ranks = teams // 10, teams // 5, teams * 2 // 5
    elif teams < 250:
        ranks = 10, teams // 5, teams * 2 // 5
    elif teams < 1000:
        ranks = 10 + teams // 500, 50, 100
    else:
        ranks = 10 + teams // 500, teams // 20, teams // 10
    return tuple(max(1, rank) for rank in ranks)


@dataclass(frozen=True, eq=False)
class Competition:
    """One competition: what the agent may see (description, public_dir) and how it is judged.

    leaderboard holds the private scores, best first, (N,) float64; gold, silver and bronze are the
    scores of the last ranks with a medal (inclusive), median that of the whole board (exclusive).
    """

    id: str
    name: str
    description: str
    public_dir: Path
    answers: Path
    sample_submission: Path
    leaderboard: np.ndarray
    lower_is_better: bool
    gold: float
    silver: float
    bronze: float
    median: float
    grader: Callable  # grade(submission: DataFrame, answers: DataFrame) -> float

    @classmethod
    def load(cls, directory: str | Path, data: str | Path | None = None) -> Competition:
        """Read `<id>/{config.yaml, description.md, grade.py, leaderboard.csv}` and its prepared data.

        data: the folder that holds `<id>/prepared/{public,private}` (default: the folder that holds
        `directory`, as the examples write it; MLE-bench keeps registry and data apart).
        grade.py is trusted code: it runs in this process.
        Raises: CompetitionError.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CompetitionError(f"{directory}: no such competition directory")
        config = _read_config(directory / "config.yaml")
        where = f"{directory / 'config.yaml'}"
        competition_id = _field(config, "id", where)
        root = Path(data) if data else directory.absolute().parent
        public_dir = root / competition_id / "prepared" / "public"
        if not data and directory.absolute().name != competition_id:  # a renamed copy
            public_dir = directory.absolute() / "prepared" / "public"
        files = {}
        for name in ("answers", "sample_submission"):
            value = _field(_field(config, "dataset", where, dict), name, where + ": dataset")
            tail = Path(value).parts[1:] if Path(value).parts[0] == competition_id else Path(value).parts
            files[name] = public_dir.parent.parent.joinpath(*tail)
        description = _field(config, "description", where) if "description" in config else ""
        description = directory / (Path(description).name or "description.md")
        board = directory / "leaderboard.csv"
        needed = (description, board, *files.values())
        for path in needed:
            if not path.is_file():
                raise CompetitionError(f"{path}: missing file of competition {competition_id!r}")
        if not public_dir.is_dir():
            raise CompetitionError(f"{public_dir}: missing public data of competition {competition_id!r}")
        scores, lower = _read_leaderboard(board)
        ranks = medal_ranks(len(scores))
        grade_fn = _field(_field(config, "grader", where, dict), "grade_fn", where + ": grader")
        return cls(
            id=competition_id,
            name=str(config.get("name", competition_id)),
            description=description.read_text(encoding="utf-8", errors="replace"),
            public_dir=public_dir.resolve(),
            answers=files["answers"].resolve(),
            sample_submission=files["sample_submission"].resolve(),
            leaderboard=scores,
            lower_is_better=lower,
            **{medal: float(scores[rank - 1]) for medal, rank in zip(("gold", "silver", "bronze"), ranks)},
            median=float(np.median(scores)),
            grader=_load_grader(grade_fn, directory),
        )

    def human_rank(self, score: float) -> float:
        """H = (N - pos + 1) / N, pos the first rank that `score` ties or beats (MLE-Dojo's HumanRank)."""
        better = self.leaderboard < score if self.lower_is_better else self.leaderboard > score
        return 1.0 - int(better.sum()) / len(self.leaderboard)

    def grade(self, submission: bytes) -> Grade:
        """Grade the bytes of a submission.csv. Never raises for what the bytes hold: see Grade.reason."""
        try:
            frame = read_submission(submission, self._sample)
        except SubmissionError as error:
            return Grade(False, reason=_one_line(error))
        try:
            score = self.grader(frame, self._answers.copy())
            score = math.nan if score is None else float(score)
        except Exception as error:  # the grader refuses by raising, each competition in its own words
            said = str(error) if " " in str(error) else f"{type(error).__name__}: {error}"
            return Grade(False, reason=_one_line(f"the grader refused the submission: {said}"))
        if not math.isfinite(score):
            return Grade(False, reason=f"the grader returned {score}, which is not a finite score")

        def reaches(threshold: float) -> bool:
            return score <= threshold if self.lower_is_better else score >= threshold

        medal = next((m for m in ("gold", "silver", "bronze") if reaches(getattr(self, m))), "none")
        above = reaches(self.median) and score != self.median
        return Grade(True, score, medal, self.human_rank(score), above)

    @functools.cached_property
    def _sample(self) -> Sample:
        return Sample.read(self.sample_submission)

    @functools.cached_property
    def _answers(self):
        import pandas as pd

        return pd.read_csv(self.answers)


def load_competitions(directory: str | Path) -> list[Competition]:
    """Every sub-directory of `directory` that holds a config.yaml, sorted by id. Raises: CompetitionError."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CompetitionError(f"{directory}: no such directory of competitions")
    found = [Competition.load(path.parent) for path in sorted(directory.glob("*/config.yaml"))]
    if not found:
        raise CompetitionError(f"{directory}: no sub-directory holds a config.yaml")
    found.sort(key=lambda competition: competition.id)
    for first, second in zip(found, found[1:]):
        if first.id == second.id:
            raise CompetitionError(f"{directory}: two competitions have the id {first.id!r}")
    return found


def _read_config(path: Path) -> dict:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompetitionError(f"{path}: missing; a competition needs config.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CompetitionError(f"{path}: cannot be read: {_one_line(error)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise CompetitionError(f"{path}:{line} not valid YAML: {_one_line(problem)}") from None
    if not isinstance(config, dict):
        raise CompetitionError(f"{path}: must be a mapping of fields (id, dataset, grader, ...)")
    return config


def _field(mapping: dict, name: str, where: str, kind: type = str):
    value = mapping.get(name)
    if value is None or value == "":
        raise CompetitionError(f"{where}: field {name!r} is missing")
    if not isinstance(value, kind):
        raise CompetitionError(f"{where}: field {name!r} must be a {'mapping' if kind is dict else 'string'}")
    return value


def _read_leaderboard(path: Path) -> tuple[np.ndarray, bool]:
    """The finite scores, best first, and whether lower is better (MLE-bench: first < last)."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        if "score" not in (rows.fieldnames or ()):
            raise CompetitionError(f"{path}: no column 'score' among {rows.fieldnames}")
        try:
            scores = [float(row["score"]) for row in rows if row["score"]]
        except (ValueError, csv.Error) as error:
            raise CompetitionError(f"{path}: line {rows.line_num}: {_one_line(error)}") from None
    board = np.array([score for score in scores if math.isfinite(score)])
    if not len(board):
        raise CompetitionError(f"{path}: no score in it")
    lower = bool(board[0] < board[-1])
    return (np.sort(board) if lower else np.sort(board)[::-1].copy()), lower


def _load_grader(grade_fn: str, directory: Path) -> Callable:
    """`grade` of grade.py beside config.yaml ("file:grade.py:grade", or mlebench's own "package.module:grade").

    With the mlebench package installed, its own module is imported.
    """
    module_name, _, function = grade_fn.rpartition(":")
    path = directory / (module_name[5:] if module_name.startswith("file:") else "grade.py")
    try:
        if module_name.startswith("mlebench.") and importlib.util.find_spec("mlebench"):
            module = importlib.import_module(module_name)
        else:
            if not path.is_file():
                raise CompetitionError(f"{path}: missing; grader.grade_fn is {grade_fn!r}")
            unique = f"grade_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
            spec = importlib.util.spec_from_file_location(unique, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        grader = getattr(module, function or "grade")
    except CompetitionError:
        raise
    except Exception as error:
        raise CompetitionError(f"{path}: cannot be loaded: {type(error).__name__}: {_one_line(error)}") from None
    return grader


def _one_line(text: object, limit: int = 300) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


# ------------------------------------------------------------------------------------------------
# Reading a submission: hostile bytes, checked before pandas may see them

_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)


@dataclass(frozen=True)
class Sample:
    """What the sample submission says about the shape of a submission."""

    columns: tuple[str, ...]
    numeric: tuple[str, ...]  # columns whose every value is a finite number
    rows: int
    max_bytes: int  # bound for a submission's size

    @classmethod
    def read(cls, path: Path) -> Sample:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.reader(file)
            columns = tuple(next(reader, ()))
            numeric, rows = set(range(len(columns))), 0
            for row in reader:
                rows += bool(row)
                numeric -= {i for i in numeric if row and (i >= len(row) or not _NUMBER.fullmatch(row[i]))}
        if not columns or not rows:
            raise CompetitionError(f"{path}: the sample submission has no rows")
        # A float takes up to 25 characters where the sample may have a plain 0; ids stay as long as they are.
        size = 2 * os.path.getsize(path) + 32 * len(columns) * (rows + 1) + 4096
        return cls(columns, tuple(columns[i] for i in sorted(numeric)), rows, size)


def read_submission(data: bytes, sample: Sample):
    """Parse a submission into a DataFrame, or say in one line why not.

    Only the form is judged here: size, encoding, header, field counts, and finite numbers where the
    sample has numbers. Ids, columns and ranges are the grader's business. Everything is checked by
    linear-time code first because pandas is not safe on unchecked bytes: a header of a million
    equal names takes it minutes, and float() accepts `1_5` and Arabic digits.
    Raises: SubmissionError.
    """
    if len(data) > sample.max_bytes:
        raise SubmissionError(f"submission.csv has {len(data)} bytes; at most {sample.max_bytes} fit {sample.rows} rows")
    if not data.strip():
        raise SubmissionError("submission.csv is empty")
    if b"\0" in data:
        raise SubmissionError("submission.csv holds NUL bytes; it must be a text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SubmissionError(f"submission.csv is not UTF-8 text (byte {error.start})") from None
    text = text.replace("\r\n", "\n")
    if "\r" in text:
        raise SubmissionError("submission.csv holds a bare carriage return")
    text = text.rstrip("\n") + "\n"
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader)
        if len(header) > 2 * len(sample.columns) + 16:
            raise SubmissionError(f"submission.csv has {len(header)} columns, expected {list(sample.columns)[:8]}")
        if len(set(header)) < len(header):
            raise SubmissionError("submission.csv has two columns of the same name")
        rows = 0
        for row in reader:
            rows += 1
            if len(row) != len(header):
                raise SubmissionError(f"submission.csv: row {rows} has {len(row)} fields, the header has {len(header)}")
            if rows > 2 * sample.rows + 16:
                raise SubmissionError(f"submission.csv has too many rows, expected {sample.rows}")
    except csv.Error as error:
        raise SubmissionError(f"submission.csv is not valid CSV: {_one_line(error)}") from None
    if not rows:
        raise SubmissionError("submission.csv has a header but no rows")

    import pandas as pd

    try:
        frame = pd.read_csv(io.StringIO(text, newline=""), index_col=False)
    except Exception as error:  # pandas' own errors; the bytes are bounded by now
        raise SubmissionError(f"submission.csv cannot be parsed: {_one_line(error)}") from None
    if len(frame) != rows or list(frame.columns) != header:
        raise SubmissionError("submission.csv is ambiguous: blank lines, stray quotes or unnamed columns")
    for name in sample.numeric:
        if name in frame.columns:
            _check_numbers(frame[name], name)
    return frame


def _check_numbers(column, name: str) -> None:
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column):
        bad = np.flatnonzero(~np.isfinite(column.to_numpy(dtype=np.float64)))
    else:
        bad = (i for i, value in enumerate(column) if not _NUMBER.fullmatch(str(value)))
    for row in bad:
        value = str(column.iloc[row])[:40]
        raise SubmissionError(f"submission.csv: column {name!r}, row {row + 1}: {value!r} is not a finite number")


# ------------------------------------------------------------------------------------------------
# Executions and rewards


@dataclass(frozen=True)
class Execution:
    """All facts of one run, flat. Status:

    ok             exit code 0 and a valid submission
    error          the script raised, exited with another code, or broke a disk, thread or inode limit
    timeout        the wall-clock or CPU limit (reason says which)
    memory         a MemoryError or the memory limit
    no_submission  exit code 0, but no regular file submission.csv
    invalid        exit code 0, but the submission was refused (reason says why)
    refused        isolation is not available: the script was not run
    """

    status: str
    exit_code: int | None = None  # negative: killed by that signal; None: not known
    seconds: float = 0.0  # wall clock, from the script's first line to its end
    cpu_seconds: float = 0.0
    stdout_tail: str = ""
    stderr_tail: str = ""
    validation_score: float | None = None  # the last "validation score: <float>" that the script printed
    valid: bool = False
    score: float | None = None
    medal: str = "none"
    human_rank: float = 0.0
    above_median: bool = False
    reason: str = ""
    isolation: str = ""  # "landlock+seccomp", or "unsafe (...)" with the layers that were in force
    submission: bytes | None = dataclasses.field(default=None, repr=False)  # what was graded


def base_reward(execution: Execution, kind: str = "rank") -> float:
    """Reward in [0, 1] of one execution, whatever operator made it [ours].

    rank       0 nothing usable, 0.05 refused submission, 0.1 + 0.9 * human rank when valid
    milestone  0.05 refused, 0.2 valid, 0.4 above the median, 0.6 bronze, 0.8 silver, 1 gold
    medal      bronze 1/3, silver 2/3, gold 1, else 0
    """
    if kind not in ("rank", "milestone", "medal"):
        raise ValueError(f"reward kind {kind!r} is not one of rank, milestone, medal")
    place = ("none", "bronze", "silver", "gold").index(execution.medal)
    if not execution.valid:
        return 0.05 if execution.status == "invalid" and kind != "medal" else 0.0
    if kind == "rank":
        return 0.1 + 0.9 * execution.human_rank
    if kind == "medal":
        return place / 3
    return 0.4 + 0.2 * place if place else 0.4 if execution.above_median else 0.2


def step_reward(base: float, operator: str, parent_base: float | None = None, unchanged: bool = False) -> float:
    """The step's reward: `improve` adds half of the gain over the parent; a copy of the parent earns 0.

    >>> step_reward(0.5, "draft"), step_reward(0.5, "improve", 0.3), step_reward(0.9, "improve", 0.9, True)
    (0.5, 0.6, 0.0)
    """
    if unchanged:
        return 0.0
    if operator == "improve" and parent_base is not None:
        return min(1.0, base + 0.5 * max(base - parent_base, 0.0))
    return base


def code_key(code: str) -> str:
    """Digest of the normalised syntax tree: equal for scripts that differ in comments and layout only.

    Text that does not parse is compared as stripped text.

    >>> code_key("x = 1  # one") == code_key("x  =  1"), code_key("x = 1") == code_key("x = 2")
    (True, False)
    """
    text = code.strip()
    if len(text) < 200_000:  # a deep or huge tree costs the parser far more than its text
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = ast.dump(ast.parse(code))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# The kernel's part 1: Landlock, which files a script may open

PRELOAD = (
    "numpy", "pandas", "scipy.sparse", "scipy.stats", "sklearn.base", "sklearn.calibration", "sklearn.cluster",
    "sklearn.compose", "sklearn.decomposition", "sklearn.discriminant_analysis", "sklearn.dummy",
    "sklearn.ensemble", "sklearn.feature_selection", "sklearn.gaussian_process", "sklearn.impute",
    "sklearn.kernel_approximation", "sklearn.kernel_ridge", "sklearn.linear_model", "sklearn.metrics",
    "sklearn.model_selection", "sklearn.naive_bayes", "sklearn.neighbors", "sklearn.neural_network",
    "sklearn.pipeline", "sklearn.preprocessing", "sklearn.svm", "sklearn.tree",
)  # fmt: skip

POLL_SECONDS = 0.1  # how often the nanny looks at memory, threads, disk and CPU time
MAX_FILES = 10_000  # files and directories in a run's work directory
MAX_DEPTH = 64  # nested directories
MAX_CODE = 1_000_000  # characters of a script
KILL_SECONDS = 10.0  # how long SIGKILL may take before the slot is given up

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38

# Access rights of files, then of directories only; each ABI version of Landlock knows a few more.
_EXECUTE, _WRITE, _READ, _LIST, _RMDIR, _RM, _CHAR, _MKDIR, _REG, _SOCK, _FIFO, _BLOCK, _SYM = (1 << i for i in range(13))
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL_DEV
_READ_ONLY = _READ | _LIST
_WORK_DIR = _READ | _LIST | _WRITE | _RMDIR | _RM | _MKDIR | _REG | _REFER | _TRUNCATE  # no link, fifo, device, exec

_SYSTEM_FILES = """
    /usr/lib /usr/lib64 /usr/local/lib /lib /lib64 /usr/share/zoneinfo /usr/share/fonts /usr/share/fontconfig
    /usr/share/locale /usr/share/mime /etc/ld.so.cache /etc/localtime /etc/timezone /etc/fonts /etc/mime.types
    /dev/zero /dev/random /dev/urandom /proc/cpuinfo /proc/meminfo /proc/stat /proc/loadavg
    /proc/sys/vm/overcommit_memory /sys/devices/system/cpu /sys/devices/system/node
    /sys/kernel/mm/transparent_hugepage /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max
    /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us
""".split()
_PROC_SELF = ("status", "stat", "statm", "maps", "cgroup", "cmdline")  # not mem, fd, environ, net


def _syscall(number: int, *arguments) -> int:
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"prctl {option}")


def landlock_abi() -> int:
    """Landlock's version on this kernel, 0 when it is not there (asked by system call, not securityfs)."""
    if sys.platform != "linux":
        return 0
    try:
        return _syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    except OSError:
        return 0


def readable_roots() -> list[str]:
    """Real paths that every script may read: the Python installation and the system's libraries."""
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, *(path for path in sys.path if os.path.isdir(path))]
    return sorted({os.path.realpath(path) for path in python + _SYSTEM_FILES if path and os.path.exists(path)})


def _landlock_ruleset(abi: int, rules: list[tuple[str, int]]) -> int:
    """A descriptor of a ruleset that denies every file access but `rules` (path, rights)."""
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    # TCP bind and connect (ABI 4), abstract sockets and signals out of the domain (ABI 6): deny all of them.
    attributes = struct.pack("QQQ", handled, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _syscall(444, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    for path, rights in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not on this machine: nothing to allow
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FILE_RIGHTS
        rule = struct.pack("=Qi", rights & handled, descriptor)
        _syscall(445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
        os.close(descriptor)
    return ruleset


# ------------------------------------------------------------------------------------------------
# The kernel's part 2: seccomp, which system calls a script may make (name:x86_64:aarch64)

_ALLOW = """
    read:0:63 write:1:64 close:3:57 stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 poll:7:- lseek:8:62
    readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70 preadv2:327:286 pwritev2:328:287
    sendfile:40:71 copy_file_range:326:285 splice:275:76 tee:276:77 access:21:- faccessat:269:48 faccessat2:439:439
    mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214 mremap:25:216 msync:26:227 mincore:27:232 madvise:28:233
    mlock:149:228 munlock:150:229 mlock2:325:284 membarrier:324:283 get_mempolicy:239:236
    dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 select:23:- pselect6:270:72 ppoll:271:73 flock:73:32
    epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 eventfd:284:-
    eventfd2:290:19 signalfd4:289:74 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
    sendto:44:206 recvfrom:45:207 shutdown:48:210
    fsync:74:82 fdatasync:75:83 ftruncate:77:46 fallocate:285:47 sync_file_range:277:84 fadvise64:221:223
    readahead:187:213 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 statfs:137:43 fstatfs:138:44
    rename:82:- renameat:264:38 renameat2:316:276 mkdir:83:- mkdirat:258:34 rmdir:84:- creat:85:- link:86:- linkat:265:37
    unlink:87:- unlinkat:263:35 symlink:88:- symlinkat:266:36 readlink:89:- readlinkat:267:78 umask:95:166
    rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
    rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:- alarm:37:- getitimer:36:102 setitimer:38:103 timer_create:222:107
    timer_settime:223:110 timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111
    nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201:-
    getpid:39:172 gettid:186:178 getppid:110:173 getpgrp:111:- getpgid:121:155 getsid:124:156 getuid:102:174 getgid:104:176
    geteuid:107:175 getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 capget:125:90 uname:63:160
    getrlimit:97:163 setrlimit:160:164 getrusage:98:165 sysinfo:99:179 times:100:153 getcpu:309:168 getpriority:140:141
    sched_yield:24:124 sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120
    sched_get_priority_max:146:125 sched_get_priority_min:147:126 futex:202:98 set_robust_list:273:99
    get_robust_list:274:100 rseq:334:293 set_tid_address:218:96 restart_syscall:219:128 getrandom:318:278
    wait4:61:260 waitid:247:95 exit:60:93 exit_group:231:94
"""
# Landlock cannot stop a change of mode or times, and shutil.copy makes one: answer "done" and do nothing.
_PRETEND = "chmod:90:- fchmod:91:52 fchmodat:268:53 fchmodat2:452:452 utimensat:280:88 utime:132:- utimes:235:- futimesat:261:-"
_NO_XATTR = """setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10
    listxattr:194:11 llistxattr:195:12 flistxattr:196:13"""  # shutil.copy2 goes on after ENOTSUP
# "Not there" instead of "not permitted": callers then fall back (clone3 -> clone, whose flags we can read;
# memfd_create would be memory that no limit sees).
_MISSING = "clone3:435:435 memfd_create:319:279 io_uring_setup:425:425 openat2:437:437 close_range:436:436"
_GPU_ALLOW = "memfd_create:319:279 mbind:237:235 set_mempolicy:238:237 sched_setaffinity:203:122"

_PID = 0x5EEDC0DE  # stands for the worker's pid until the filter is installed
_CLONE_THREAD, _CLONE_NAMESPACES = 0x10400, 0x7E020080  # a thread shares its descriptors: /proc shows them
_TRUNC, _ACCESS_MODE, _TMPFILE = 0x200, 3, 0x400000
# name: conditions, all must hold: (argument, mask, values, allowed when the masked argument is one of the values?)
_OPEN = ((_TRUNC | _ACCESS_MODE, (_TRUNC,), False), (_TMPFILE, (0,), True))  # Landlock 1, 2 miss O_RDONLY|O_TRUNC;
_CONDITIONS = {  # an unlinked O_TMPFILE would hide from the disk limit
    "open:2:-": tuple((1, *condition) for condition in _OPEN),
    "openat:257:56": tuple((2, *condition) for condition in _OPEN),
    "clone:56:220": ((0, _CLONE_THREAD | _CLONE_NAMESPACES, (_CLONE_THREAD,), True),),  # threads, no processes
    "kill:62:129": ((0, ~0, (_PID,), True),),  # only oneself
    "tgkill:234:131": ((0, ~0, (_PID,), True),),
    "prlimit64:302:261": ((0, ~0, (0, _PID), True),),
    "prctl:157:167": ((0, ~0, (15, 16, 0x53564D41), True),),  # thread names, memory names; not PDEATHSIG
    "fcntl:72:25": ((1, ~0, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032), True),),  # not F_SETOWN, F_SETSIG
    "ioctl:16:29": ((1, ~0, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), True),),  # isatty, size, FIONREAD, flags
    "socketpair:53:199": ((0, ~0, (1,), True), (1, 0xF, (1,), True)),  # unix stream: asyncio's wake-up; cannot send away
}


def seccomp_program(machine: str, gpu: bool = False) -> bytes:
    """The filter as raw BPF: default EPERM, kill on a foreign ABI (int 0x80, x32); _PID still to be replaced."""
    which, architecture = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}[machine]
    allow, fail, kill, load, equal, at_least, mask_with = 0x7FFF0000, 0x00050000, 0x80000000, 0x20, 0x15, 0x35, 0x54

    def statement(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value & 0xFFFFFFFF)

    def give(value: int) -> bytes:
        return statement(0x06, value)

    def numbers(table: str) -> list[int]:
        return [int(entry.split(":")[which]) for entry in table.split() if not entry.endswith("-") or which == 1]

    program = statement(load, 4) + statement(equal, architecture, 1, 0) + give(kill) + statement(load, 0)
    if machine == "x86_64":
        program += statement(at_least, 0x40000000, 0, 1) + give(kill)
    conditions = {name: rule for name, rule in _CONDITIONS.items() if not (gpu and name.startswith("ioctl"))}
    tables = [(_ALLOW + ("ioctl:16:29 " + _GPU_ALLOW if gpu else ""), allow), (_PRETEND, fail), (_NO_XATTR, fail | errno.ENOTSUP)]
    for table, answer in [*tables, (_MISSING, fail | errno.ENOSYS)]:
        for number in numbers(table):
            program += statement(equal, number, 0, 1) + give(answer)
    for name, rule in conditions.items():
        body = b""
        for argument, mask, values, wanted in rule:
            body += statement(load, 16 + 8 * argument) + statement(mask_with, mask)
            if wanted:  # any value jumps over the refusal
                body += b"".join(statement(equal, v, len(values) - i, 0) for i, v in enumerate(values))
                body += give(fail | errno.EPERM)
            else:
                body += b"".join(statement(equal, v, 0, 1) + give(fail | errno.EPERM) for v in values)
        body += give(allow)
        for number in numbers(name):
            program += statement(equal, number, 0, len(body) // 8) + body
    return program + give(fail | errno.EPERM)


def _install_seccomp(program: bytes) -> None:
    program = program.replace(struct.pack("I", _PID), struct.pack("I", os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    number = 317 if platform.machine() == "x86_64" else 277
    _syscall(number, ctypes.c_uint(1), ctypes.c_uint(1), header)  # SET_MODE_FILTER, TSYNC


# ------------------------------------------------------------------------------------------------
# The worker: a fork that gives up everything, proves it, and becomes the script


def _worker(setup: Setup, request: dict, work: str, nanny: int, stdout: int, stderr: int, ready: int) -> None:
    """Runs in the forked child and never returns. Whatever goes wrong before the script is told on `ready`."""
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.dup2(ready, 3)
        ready = 3
        _syscall(436, ctypes.c_uint(4), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(0))  # close_range
        os.chdir(work)
        for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _confine(setup, request, work, nanny)
        os.write(ready, b"ok")
        os.close(ready)
    except BaseException as error:
        os.write(ready, f"{type(error).__name__}: {_one_line(error)}".encode())
        os._exit(1)
    leave = os._exit  # bound now: the script may replace anything
    try:
        leave(_become_script(request["code"], request["seed"]))
    finally:
        leave(1)


def _confine(setup: Setup, request: dict, work: str, nanny: int) -> None:
    _prctl(_PR_SET_DUMPABLE, 1)  # the nanny must see our descriptors; there is no secret in this process
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when the machine runs out of memory, the script dies first
    if request["cpus"]:
        os.sched_setaffinity(0, request["cpus"])
    ruleset = None
    if "landlock" in setup.layers:
        rules = [(path, _READ_ONLY) for path in setup.roots]
        rules += [(request["public"], _READ_ONLY), (work, _WORK_DIR), ("/dev/null", _READ | _WRITE)]
        rules += [(f"/proc/{os.getpid()}/{name}", _READ) for name in _PROC_SELF]
        if request["gpu"]:
            devices = [f"/dev/{name}" for name in os.listdir("/dev") if name.startswith("nvidia")]
            rules += [(path, _READ | _WRITE | _LIST | _IOCTL_DEV) for path in devices]
            rules += [("/proc/driver/nvidia", _READ_ONLY), ("/proc/devices", _READ), ("/sys/bus/pci", _READ_ONLY)]
        ruleset = _landlock_ruleset(setup.landlock_abi, rules)
    megabyte = 1 << 20
    limits = {"CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "NICE": 0, "RTPRIO": 0, "NOFILE": 256}
    limits |= {"CPU": math.ceil(request["cpu_seconds"]) + 1, "FSIZE": request["file_mb"] * megabyte}
    if not request["gpu"]:  # CUDA reserves far more address space than it uses
        with open("/proc/self/statm") as file:
            base = int(file.read().split()[0]) * resource.getpagesize()
        limits["AS"] = base + (request["memory_mb"] + 1024) * megabyte  # above the nanny's limit, which is exact
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    if request["uid"]:
        os.setgroups([])
        os.setresgid(*[request["uid"]] * 3)
        os.setresuid(*[request["uid"]] * 3)
        _prctl(_PR_SET_DUMPABLE, 1)
    _drop_capabilities()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # after setuid, which clears it
    if os.getppid() != nanny:
        raise RuntimeError("the nanny died")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("more than one thread: Landlock would confine only one of them")
    if ruleset is not None:
        _syscall(446, ctypes.c_int(ruleset), ctypes.c_uint(0))
        os.close(ruleset)
    if "seccomp" in setup.layers:
        _install_seccomp(setup.gpu_program if request["gpu"] else setup.program)
    _prove(setup)


def _drop_capabilities() -> None:
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _syscall({"x86_64": 126, "aarch64": 91}[platform.machine()], header, nothing)


def _prove(setup: Setup) -> None:
    """Do not trust that the layers hold because the calls returned 0: try what they must stop."""
    if "landlock" in setup.layers:
        try:
            os.close(os.open(setup.canary, os.O_RDONLY))
        except PermissionError:
            pass
        else:
            raise RuntimeError("Landlock is not in force: a file outside the allowed directories could be opened")
    if "seccomp" in setup.layers:
        if _libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0) >= 0:
            raise RuntimeError("seccomp is not in force: socket() worked")
        with open("/proc/self/status") as file:
            if "\nSeccomp:\t2\n" not in file.read():
                raise RuntimeError("seccomp is not in force")


def _become_script(code: str, seed: int) -> int:
    """Run the code as __main__, print a traceback of its own frames only; returns Python's exit code."""
    cwd = os.getcwd()
    os.makedirs("tmp", exist_ok=True)
    os.environ.update(HOME=cwd, TMPDIR=f"{cwd}/tmp", MPLCONFIGDIR=f"{cwd}/tmp", XDG_CACHE_HOME=f"{cwd}/tmp")
    with open("script.py", "w", encoding="utf-8") as file:
        file.write(code)
    tempfile.tempdir = None  # the fork server's choice, if it made one
    random.seed(seed)  # a fork inherits its parent's generators: without seeds every run would draw the same
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    linecache.cache["script.py"] = len(code), None, code.splitlines(True), "script.py"
    sys.argv, sys.path[:0] = ["script.py"], [cwd]
    options = {"encoding": "utf-8", "errors": "backslashreplace", "buffering": 1, "closefd": False}
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", **options)  # by lines: what was printed survives a kill
    sys.stderr = sys.__stderr__ = open(2, "w", **options)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=f"{cwd}/script.py", __builtins__=__builtins__)
    sys.modules["__main__"] = main
    exit_code, report = 0, traceback.print_exception  # bound now: the script may replace anything
    try:
        exec(compile(code, "script.py", "exec"), main.__dict__)
    except SystemExit as stop:
        exit_code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        exit_code = 1
        try:
            report(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
        except BaseException:
            pass
    try:
        threading._shutdown()  # waits for the script's threads
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
    except BaseException:
        exit_code = exit_code or 120
    return exit_code & 0xFF


# ------------------------------------------------------------------------------------------------
# The nanny: one a run. Starts the worker, holds it to its limits, kills it, collects the submission


class _Output:
    """The first quarter and the last three quarters of `limit` bytes; a flood is cut in the middle."""

    def __init__(self, limit: int):
        self.head_limit, self.tail_limit = limit // 4, limit - limit // 4
        self.head, self.tail, self.cut = bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        room = self.head_limit - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        if len(self.tail) > 2 * self.tail_limit:
            self._trim()

    def _trim(self) -> None:
        extra = max(0, len(self.tail) - self.tail_limit)
        del self.tail[:extra]
        self.cut += extra

    def bytes(self) -> bytes:
        self._trim()
        gap = f"\n... {self.cut} bytes cut ...\n".encode() if self.cut else b""
        return bytes(self.head) + gap + bytes(self.tail)


def _send(channel: socket.socket, header: dict, *blobs: bytes) -> None:
    header = json.dumps(header | {"blobs": [len(blob) for blob in blobs]}).encode()
    channel.sendall(struct.pack("I", len(header)) + header + b"".join(blobs))


def _receive(channel: socket.socket) -> tuple[dict, list[bytes]]:
    """The counterpart of _send. Raises EOFError when the other side closed early."""

    def exactly(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = channel.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    header = json.loads(exactly(*struct.unpack("I", exactly(4))))
    return header, [exactly(size) for size in header["blobs"]]


def _nanny(setup: Setup, channel: socket.socket) -> None:
    """Runs in a fork of the fork server; the caller exits afterwards."""
    server, stopping = os.getppid(), []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    request, (code,) = _receive(channel)
    request["code"] = code.decode("utf-8", "replace")
    drop = setup.uid_base and _readable_by_others(request["public"])
    request["uid"] = setup.uid_base + request["slot"] if drop else 0
    if not request["gpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = request["gpu"]
    work = os.path.join(setup.root, str(os.getpid()))
    os.mkdir(work, 0o700)
    directory = os.open(work, os.O_RDONLY | os.O_DIRECTORY)  # what we collect from, whatever happens to the path
    try:
        os.symlink(request["public"], "input", dir_fd=directory)
        if request["uid"]:
            os.chown(work, request["uid"], request["uid"])
        _send(channel, *_watch(setup, request, work, directory, channel, lambda: stopping or os.getppid() != server))
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):  # the owner is gone: only clean up
            raise
    finally:
        _kill_children([])
        os.close(directory)
        remove_tree(work)


def _watch(setup: Setup, request: dict, work: str, directory: int, channel: socket.socket, orphaned: Callable) -> tuple:
    """Run the worker to its end. Returns (facts, stdout, stderr, submission)."""
    pipes = [os.pipe() for _ in range(3)]
    nanny = os.getpid()
    worker = os.fork()
    if worker == 0:
        _worker(setup, request, work, nanny, *(write for _, write in pipes))
    for _, write in pipes:
        os.close(write)
    stdout, stderr, ready = (read for read, _ in pipes)
    pidfd = os.pidfd_open(worker)
    said = os.read(ready, 4096) if select.select([ready], [], [], 60)[0] else b"no sign of life"
    start = time.monotonic()
    outputs = {stdout: _Output(request["output_kb"] << 10), stderr: _Output(request["output_kb"] << 10)}
    poll = select.poll()
    for descriptor in (stdout, stderr, pidfd):
        poll.register(descriptor, select.POLLIN)
    poll.register(channel, select.POLLIN | select.POLLRDHUP)
    base_memory = _process_facts(nanny)["memory"]  # shared with the worker, not the script's doing
    killed, deadline, next_look = "", start + request["timeout"], start + POLL_SECONDS
    if said != b"ok":
        killed = "refused"
    while not killed:
        now = time.monotonic()
        if now >= deadline:
            killed = "timeout"
        elif now >= next_look:
            killed = _broken_limit(request, worker, work, base_memory)
            next_look = time.monotonic() + POLL_SECONDS
        if orphaned():
            killed = "orphaned"
        events = dict(poll.poll(max(0.0, min(deadline, next_look) - now) * 1000 + 1)) if not killed else {}
        for descriptor in (stdout, stderr):
            if events.get(descriptor):
                data = os.read(descriptor, 1 << 16)
                outputs[descriptor].add(data)
                if not data:
                    poll.unregister(descriptor)
        if events.get(channel.fileno()):
            killed = "orphaned"  # the owner closed its end
        if events.get(pidfd):
            break
    seconds = time.monotonic() - start
    ended = _kill_children([worker])
    status, usage = ended.get(worker, (None, None))
    for descriptor, output in outputs.items():  # everyone is dead: what is left in the pipes is final
        os.set_blocking(descriptor, False)
        try:
            while data := os.read(descriptor, 1 << 16):
                output.add(data)
        except BlockingIOError:
            pass
    for descriptor in (stdout, stderr, ready, pidfd):
        os.close(descriptor)
    exit_code = None if status is None else os.waitstatus_to_exitcode(status)
    submission, problem = b"", ""
    if exit_code == 0 and not killed:
        submission, problem = _collect(directory, request["submission_bytes"])
    facts = {
        "killed": killed, "said": said.decode("utf-8", "replace"), "exit_code": exit_code, "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime if usage else 0.0, "problem": problem, "stuck": status is None,
    }  # fmt: skip
    return facts, *(output.bytes() for output in outputs.values()), submission


def _process_facts(pid: int) -> dict:
    """Resident memory (bytes), CPU seconds and threads of a process; its name may hold spaces and brackets."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    cpu = (int(fields[11]) + int(fields[12])) / ticks
    return {"memory": int(fields[21]) * resource.getpagesize(), "cpu": cpu, "threads": int(fields[17])}


def _broken_limit(request: dict, worker: int, work: str, base_memory: int) -> str:
    """Which limit the run has broken, "" for none. What cannot be looked at counts as broken."""
    try:
        facts = _process_facts(worker)
    except OSError:
        return ""  # gone: the pidfd says so as well
    if facts["memory"] - base_memory > request["memory_mb"] << 20:
        return "memory"
    if facts["cpu"] > request["cpu_seconds"]:
        return "cpu"
    if facts["threads"] > request["max_threads"]:
        return "threads"
    size, files = _disk_usage(work)
    size += _hidden_usage(worker, request["uid"])
    if files > MAX_FILES:
        return "files"
    return "disk" if size > request["disk_mb"] << 20 else ""


def _disk_usage(work: str) -> tuple[int, int]:
    """(bytes, files) below `work`, without recursion or following links; stops early when there are too many."""
    size, files, todo = 0, 0, [(work, 0)]
    while todo and files <= MAX_FILES:
        path, depth = todo.pop()
        if depth > MAX_DEPTH:
            return size, MAX_FILES + 1
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    files += 1
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        todo.append((entry.path, depth + 1))
                    if files > MAX_FILES:
                        break
        except OSError:
            continue  # vanished meanwhile
    return size, files


def _hidden_usage(worker: int, uid: int) -> int:
    """Bytes of files that were unlinked but are still open."""
    size = 0
    try:
        if uid:  # /proc lets only the same user look
            os.setegid(uid)
            os.seteuid(uid)
        for name in os.listdir(f"/proc/{worker}/fd"):
            try:
                facts = os.stat(f"/proc/{worker}/fd/{name}")
            except OSError:
                continue
            if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 0:
                size += facts.st_blocks * 512
    except OSError:
        pass
    finally:
        if uid:
            os.seteuid(0)
            os.setegid(0)
    return size


def _kill_children(known: list[int]) -> dict[int, tuple]:
    """SIGKILL every child, orphans that we adopted included, until none is left. Returns pid -> (status, rusage)."""
    ended: dict[int, tuple] = {}
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        for pid in known:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if not pid:
                    break
                ended[pid] = status, usage
        except ChildProcessError:
            return ended
        time.sleep(0.0005)
        known = _children()
    return ended


def _children() -> list[int]:
    """Pids of our direct children; zombies too."""
    me, found = os.getpid(), []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    if int(file.read().rpartition(b")")[2].split()[1]) == me:
                        found.append(int(name))
            except OSError:
                continue
    return found


def _collect(directory: int, limit: int) -> tuple[bytes, str]:
    """The submission's bytes, or b"" and why not. Called when no process of the run is left."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open("submission.csv", flags, dir_fd=directory)
    except FileNotFoundError:
        return b"", "the script wrote no submission.csv"
    except OSError as error:
        return b"", f"submission.csv cannot be opened: {error.strerror}"
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
            return b"", "submission.csv is not a regular file of its own"
        if facts.st_size > limit:
            return b"", f"too large: submission.csv has {facts.st_size} bytes, at most {limit} are read"
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit), ""
    finally:
        os.close(descriptor)


def remove_tree(path: str) -> None:
    """Remove a directory that hostile code filled: any depth, any mode, nothing followed, no recursion.

    Nested directories are moved to the top one first, so that a path never gets long.
    """
    try:
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    names = ["."]
    while names:
        name = names.pop()
        try:
            here = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        except OSError:
            continue
        with os.scandir(here) as entries:
            listing = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for child, is_directory in listing:
            try:
                if not is_directory:
                    os.unlink(child, dir_fd=here)
                    continue
                os.chmod(child, 0o700, dir_fd=here)
                moved = child if name == "." else secrets.token_hex(12)
                if name != ".":
                    os.rename(child, moved, src_dir_fd=here, dst_dir_fd=top)
                names.append(moved)
            except OSError:
                continue
        os.close(here)
        try:
            os.rmdir(name if name != "." else path, **({"dir_fd": top} if name != "." else {}))
        except OSError:
            pass
    os.close(top)
    try:
        os.rmdir(path)
    except OSError:
        pass


# ------------------------------------------------------------------------------------------------
# The fork server: imports the libraries once, forks a nanny for every request


@dataclass
class Setup:
    """What the fork server found on this machine; workers get it by fork."""

    layers: tuple[str, ...]
    root: str  # scratch directory; every run has its own directory below
    canary: str
    roots: list[str]
    uid_base: int = 0  # slot i runs as uid_base + i; 0: uids cannot be dropped
    landlock_abi: int = 0
    program: bytes = b""
    gpu_program: bytes = b""


def _serve(control: socket.socket) -> None:
    """The fork server's life: set-up, hello, then a nanny for every message, until the owner is gone."""
    config = json.loads(control.recv(1 << 20))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: control.shutdown(socket.SHUT_RDWR))
    if os.getppid() != config["owner"]:
        return
    root = _make_scratch(config["scratch"])
    nannies: set[int] = set()
    try:
        failed = _preload(config["preload"])
        _prctl(_PR_SET_DUMPABLE, 0)
        setup, problem = _find_layers(config, root)
        hello = {"root": root, "layers": setup.layers, "roots": setup.roots, "problem": problem, "failed": failed}
        control.send(json.dumps(hello | {"uid_base": setup.uid_base, "landlock_abi": setup.landlock_abi}).encode())
        poll = select.poll()
        poll.register(control, select.POLLIN)
        while True:
            ready = poll.poll(500 if nannies else None)
            _reap(nannies, root)
            if not ready:
                continue
            message, descriptors, _, _ = socket.recv_fds(control, 16, 1)
            if not message:
                return
            channel = socket.socket(fileno=descriptors[0])
            try:
                pid = os.fork()
            except OSError:  # no process to be had: this run fails, its owner sees EOF
                channel.close()
                continue
            if pid == 0:
                try:
                    control.close()
                    _nanny(setup, channel)
                except (EOFError, BrokenPipeError):
                    pass
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            nannies.add(pid)
            channel.close()
    finally:
        for pid in nannies:
            os.kill(pid, signal.SIGTERM)  # they kill their worker and clean up
        deadline = time.monotonic() + 0.5
        while nannies and time.monotonic() < deadline:
            _reap(nannies, root)
            time.sleep(0.005)
        _kill_children(list(nannies))
        remove_tree(root)


def _make_scratch(parent: str) -> str:
    """A fresh directory, locked while this server or a nanny lives; unlocked ones are left-overs: remove them."""
    for name in os.listdir(parent):
        if name.startswith("acegrpo-sandbox-"):
            path = os.path.join(parent, name)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if os.fstat(descriptor).st_uid == os.geteuid():
                remove_tree(path)
            os.close(descriptor)
    fresh = tempfile.mkdtemp(prefix="acegrpo-new-", dir=parent)
    fcntl.flock(os.open(fresh, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX)
    root = fresh.replace("acegrpo-new-", "acegrpo-sandbox-")
    os.rename(fresh, root)  # only now may others look at it
    os.chmod(root, 0o711)  # a slot's uid must pass, and must not list
    return os.path.realpath(root)


def _preload(modules: list[str]) -> dict[str, str]:
    """Import only, no warm-up: a fork after an OpenMP region with two threads hangs in its first fit."""
    failed = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = _one_line(error)
    import gc

    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the shared pages
    return failed


def _find_layers(config: dict, root: str) -> tuple[Setup, str]:
    """What this machine can do, and "" or the reason why that is not enough."""
    canary = os.path.join(root, "canary")
    with open(canary, "w") as file:
        file.write("no script may read this\n")
    os.chmod(canary, 0o644)
    machine, abi = platform.machine(), landlock_abi()
    missing = []
    if abi < 1:
        missing.append("this kernel has no Landlock (Linux 5.13 or newer with lsm=landlock is needed)")
    if machine not in ("x86_64", "aarch64"):
        missing.append(f"no seccomp table for {machine}")
    elif _libc.prctl(21, 0, 0, 0, 0) < 0:  # PR_GET_SECCOMP
        missing.append("this kernel has no seccomp")
    layers = [layer for layer in config["layers"] if not any(layer in text.lower() for text in missing)]
    if len(layers) == 2 or config["unsafe"]:
        missing = []
    elif not missing:
        missing.append(f"only the layers {config['layers']} were asked for")
    setup = Setup(tuple(layers), root, canary, readable_roots(), landlock_abi=abi)
    if "seccomp" in layers:
        setup.program, setup.gpu_program = seccomp_program(machine), seccomp_program(machine, gpu=True)
    uid_base = 61000 + os.getpid() % 60 * 64
    if os.geteuid() == 0 and _probe_uid(uid_base, root, [os.__file__, sys.executable, np.__file__, canary]):
        setup.uid_base = uid_base
    return setup, "; ".join(missing)


def _probe_uid(uid: int, root: str, paths: list[str]) -> bool:
    """Can we own a process and files of `uid`, and can it read Python? A child tries all that a run needs."""
    home = os.path.join(root, "probe")
    ready, tell = os.pipe()
    os.mkdir(home, 0o700)
    pid = os.fork()
    try:
        if pid == 0:
            try:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                give_up = time.monotonic() + 10
                while os.stat(home).st_uid != uid and time.monotonic() < give_up:
                    time.sleep(0.001)
                os.mkdir(os.path.join(home, "0"), 0)
                os.write(tell, b"y" if all(os.access(path, os.R_OK) for path in paths) else b"n")
                time.sleep(10)
            finally:
                os._exit(1)
        os.close(tell)
        os.chown(home, uid, uid)
        answer = os.read(ready, 1)
        os.kill(pid, signal.SIGKILL)  # needs CAP_KILL, as the chown needed CAP_CHOWN
        os.waitpid(pid, 0)
        remove_tree(home)
        return answer == b"y" and not os.path.exists(home)
    except OSError:  # such as a root without these capabilities; a child that cannot be killed ends by itself
        return False
    finally:
        os.close(ready)


def _readable_by_others(directory: str) -> bool:
    """May an unrelated uid read this directory and its files?"""
    path = Path(directory)
    return all(parent.stat().st_mode & 0o001 for parent in path.parents) and all(
        facts.st_mode & 0o004 and (facts.st_mode & 0o001 or not stat.S_ISDIR(facts.st_mode))
        for facts in (path.stat(), *(child.stat() for child in path.iterdir()))
    )


def _reap(nannies: set[int], root: str) -> None:
    """Collect ended nannies; one that died early leaves a directory and perhaps children, which came to us."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        if pid in nannies:
            nannies.discard(pid)
            if status:
                for child in set(_children()) - nannies:
                    os.kill(child, signal.SIGKILL)
                remove_tree(os.path.join(root, str(pid)))


# ------------------------------------------------------------------------------------------------
# The owner's side: a pool that rollout threads share


class Sandbox:
    """A thread-safe pool of isolated executions.

    slots         runs at the same time; further callers of run() wait
    timeout       wall-clock seconds a run may take
    cpu_seconds   CPU seconds a run may use, all threads together (None: timeout * threads)
    memory_mb     memory a run may add to what the preloaded libraries take
    file_mb       size of one file; disk_mb: of all files together
    output_kb     of stdout and of stderr each; more is cut in the middle
    threads       OpenMP and BLAS threads a run (environment variables)
    cpus          one list of CPU numbers a slot to pin runs to (None: no pinning)
    gpus          one CUDA_VISIBLE_DEVICES value a slot ("" or None: no GPU). Opens /dev/nvidia* and all
                  ioctls and lifts the address-space limit, which CUDA cannot live with
    preload       modules that the fork server imports; any other module still imports, only slower
    layers        for tests: leave a layer out (needs unsafe)
    unsafe        run even where a layer is missing; Execution.isolation says so on every run
    seed          with the code, seeds each run's random generators
    """

    def __init__(
        self, slots: int = 2, timeout: float = 30.0, cpu_seconds: float | None = 10.0, memory_mb: int = 2048,
        file_mb: int = 64, disk_mb: int = 256, output_kb: int = 64, threads: int = 1,
        cpus: list[list[int]] | None = None, gpus: list[str] | None = None, preload: tuple[str, ...] = PRELOAD,
        layers: tuple[str, ...] = ("landlock", "seccomp"), unsafe: bool = False, seed: int = 0,
        scratch: str | None = None,
    ):  # fmt: skip
        for name, value in (("slots", slots), ("timeout", timeout), ("memory_mb", memory_mb), ("threads", threads)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        self.timeout, self.cpu_seconds, self.seed, self.unsafe = timeout, cpu_seconds, seed, unsafe
        self.threads, self.cpus, self.gpus = threads, cpus, gpus
        self._limits = {"memory_mb": memory_mb, "file_mb": file_mb, "disk_mb": disk_mb, "output_kb": output_kb}
        self._limits["max_threads"] = 64 + 8 * threads
        self._config = {
            "owner": os.getpid(), "scratch": scratch or tempfile.gettempdir(), "preload": list(preload),
            "layers": list(layers), "unsafe": unsafe,
        }  # fmt: skip
        self.problem = ""  # why runs are refused; "" when isolation works
        self.hello: dict = {}  # what the fork server found: layers, roots, uid_base, landlock_abi, failed imports
        self.restarts = 0
        self.slots = slots
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        self._control: socket.socket | None = None
        self._process: subprocess.Popen | None = None
        self._changed = threading.Condition()
        self._closed = False
        if sys.platform != "linux":
            self.problem = f"no isolation on {sys.platform}: use Linux, or a container or VM a run"
            return
        # The fork server dies with the thread that started it (PDEATHSIG): a thread that lives as long as we do.
        self._keeper = threading.Thread(target=self._keep, name="sandbox-keeper", daemon=True)
        self._keeper.start()
        with self._changed:
            self._changed.wait_for(lambda: self._control or self.problem)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs, end the fork server, remove its files. Idempotent."""
        with self._changed:
            self._closed = True
            self.problem = self.problem or "the sandbox is closed"
            if self._control:
                self._control.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()
        if self._process:
            self._keeper.join(KILL_SECONDS + 5)

    @property
    def isolation(self) -> str:
        """The layers in force: "landlock+seccomp", or "unsafe (...)" when one is missing."""
        layers = "+".join(self.hello.get("layers", ()))
        return layers if layers == "landlock+seccomp" else f"unsafe ({layers or 'nothing'})"

    def run(self, competition: Competition, code: str, timeout: float | None = None) -> Execution:
        """Execute `code` with ./input = the public data, grade ./submission.csv. Blocks until a slot is free."""
        refused = self.problem or self._exposed(competition)
        if refused:
            return Execution("refused", reason=refused, isolation=self.isolation)
        if len(code) > MAX_CODE:
            return Execution("error", reason=f"the script has more than {MAX_CODE} characters", isolation=self.isolation)
        slot = self._free.get()
        stuck = False
        try:
            facts, blobs = self._execute(slot, competition, code, timeout or self.timeout)
            stuck = facts.get("stuck", False)
        finally:
            if not stuck:  # a process that survives SIGKILL keeps its slot: no run may share it
                self._free.put(slot)
        return self._judge(competition, facts, *blobs)

    def _exposed(self, competition: Competition) -> str:
        """The answers must not lie where scripts may read."""
        for root in (*self.hello.get("roots", ()), competition.public_dir):
            if competition.answers.is_relative_to(root):
                return f"the answers of {competition.id!r} lie in {root}, which scripts may read: move them"
        return ""

    def _execute(self, slot: int, competition: Competition, code: str, timeout: float) -> tuple[dict, list[bytes]]:
        data = code.encode("utf-8", "replace")
        digest = hashlib.sha256(struct.pack("q", self.seed) + data).digest()
        request = {
            "slot": slot, "timeout": timeout, "cpu_seconds": self.cpu_seconds or timeout * self.threads,
            "public": str(competition.public_dir), "seed": int.from_bytes(digest[:4], "big"),
            "cpus": self.cpus[slot] if self.cpus else None, "gpu": self.gpus[slot] if self.gpus else "",
            "submission_bytes": competition._sample.max_bytes, **self._limits,
        }  # fmt: skip
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                self._hand_over(theirs)
                theirs.close()
                ours.settimeout(timeout + KILL_SECONDS + 60)
                _send(ours, request, data)
                return _receive(ours)
            except (OSError, EOFError) as error:
                what = "ended" if isinstance(error, EOFError) else f"failed ({_one_line(error)})"
                return {"killed": "lost", "said": f"the sandbox process {what} in the middle of the run"}, []

    def _hand_over(self, channel: socket.socket) -> None:
        """Give the fork server one end of a run's socket; wait for its successor when it has died."""
        for _ in range(5):
            with self._changed:
                self._changed.wait_for(lambda: self._control or self.problem)
                if self.problem:
                    raise OSError(self.problem)
                control = self._control
                try:
                    socket.send_fds(control, [b"run"], [channel.fileno()])
                    return
                except OSError:
                    if self._control is control:
                        self._control = None
        raise OSError("the fork server keeps dying")

    def _judge(self, competition: Competition, facts: dict, out: bytes = b"", err: bytes = b"", submission: bytes = b"") -> Execution:
        stdout, stderr = out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
        known = {
            "exit_code": facts.get("exit_code"), "seconds": facts.get("seconds", 0.0),
            "cpu_seconds": facts.get("cpu_seconds", 0.0), "stdout_tail": stdout, "stderr_tail": stderr,
            "validation_score": _validation_score(stdout), "isolation": self.isolation,
        }  # fmt: skip
        status, reason = self._status(facts, stderr)
        if status != "ok":
            return Execution(status, reason=reason, **known)
        grade = competition.grade(submission)
        return Execution(
            "ok" if grade.valid else "invalid", submission=submission, **known, **dataclasses.asdict(grade)
        )

    def _status(self, facts: dict, stderr: str) -> tuple[str, str]:
        """(status, reason) before grading."""
        killed, exit_code, limits = facts["killed"], facts.get("exit_code"), self._limits
        if killed == "refused":
            return "refused", f"isolation failed: {facts['said'] or 'the worker died while it was set up'}"
        if killed in ("lost", "orphaned"):
            what = "the sandbox was closed" if self._closed else "the sandbox process was killed"
            return "error", facts["said"] if killed == "lost" else f"{what} in the middle of the run"
        if killed == "timeout":
            return "timeout", f"stopped at the wall-clock limit after {facts['seconds']:.1f} s"
        if killed == "cpu" or exit_code == -signal.SIGXCPU:
            return "timeout", f"stopped at the CPU limit after {facts['cpu_seconds']:.1f} CPU seconds"
        if killed == "memory":
            return "memory", f"stopped at the memory limit of {limits['memory_mb']} MB"
        if killed:
            what = {"threads": f"{limits['max_threads']} threads", "files": f"{MAX_FILES} files", "disk": f"{limits['disk_mb']} MB of disk"}
            return "error", f"stopped at the limit of {what[killed]}"
        last = stderr.strip().rpartition("\n")[2]
        if exit_code:
            if re.match(r"(\w+\.)*_?(Array)?MemoryError\b", last) or "std::bad_alloc" in stderr[-2000:]:
                return "memory", f"out of memory (limit {limits['memory_mb']} MB): {_one_line(last)}"
            if exit_code < 0:
                hint = ", perhaps by the kernel for lack of memory" if exit_code == -signal.SIGKILL else ""
                return "error", f"killed by signal {-exit_code} ({signal.Signals(-exit_code).name}){hint}"
            return "error", _one_line(last) or f"exit code {exit_code}"
        if facts["problem"]:
            return "invalid" if facts["problem"].startswith("too large") else "no_submission", facts["problem"]
        return "ok", ""

    def _keep(self) -> None:
        """Start the fork server, wait for its end, start it again; three failures in a row are final."""
        failures = 0
        while not self._closed:
            control = self._start()
            with self._changed:
                if control and self._closed:  # while it was starting
                    control.shutdown(socket.SHUT_RDWR)
                elif control:
                    failures, self._control, self.problem = 0, control, self.hello["problem"]
                elif not self._closed:
                    failures += 1
                    if failures >= 3:
                        self.problem = f"the fork server does not start (exit status {self._process.wait()})"
                self._changed.notify_all()
            if control:
                try:
                    control.recv(1)  # it never speaks again: this waits for its end
                except ConnectionResetError:
                    pass
                with self._changed:
                    self._control = None
                self._process.wait()
                if not self._closed:
                    remove_tree(self.hello["root"])  # it may have been killed; its nannies clean up as well
                    self.restarts += 1
                control.close()
            if self.problem:
                return

    def _start(self) -> socket.socket | None:
        threads = str(self.threads)
        environment = {
            "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "USER": "script", "LOGNAME": "script", "MPLBACKEND": "Agg",
            "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore", "JOBLIB_MULTIPROCESSING": "0",
            "LOKY_MAX_CPU_COUNT": threads, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
            **{f"{name}_NUM_THREADS": threads for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "NUMBA")},
            **{name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ},
        }  # fmt: skip
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -P -s -B and this environment say what -I would, which ignores PYTHONHASHSEED.
        command = [sys.executable, "-P", "-s", "-B", os.path.abspath(__file__), "serve", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment,
            cwd="/", start_new_session=True,
        )  # fmt: skip
        theirs.close()
        try:
            ours.send(json.dumps(self._config).encode())
            ours.settimeout(300)
            self.hello = json.loads(ours.recv(1 << 20))
            ours.settimeout(None)
            return ours
        except (OSError, ValueError):
            ours.close()
            return None


def _validation_score(stdout: str) -> float | None:
    """The last "validation score: <float>" in what the script printed; None unless it is a finite number."""
    said = re.findall(r"validation score:[ \t]*(\S+)", stdout, re.IGNORECASE)
    if not said or not _NUMBER.fullmatch(said[-1]):
        return None
    value = float(said[-1])
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------
# Commands


def _selftest() -> dict:
    """Which layers this machine has, and a proof of each: a script that tries what the layer must stop."""
    attempts = {
        "landlock: a file outside the run": "open({secret!r}).read()",
        "landlock: listing the root": "import os; os.listdir('/')",
        "landlock: writing the public data": "open('input/x', 'w')",
        "landlock: the owner's environment": "open('/proc/{owner}/environ').read()",
        "seccomp: network": "import socket; socket.socket()",
        "seccomp: a process": "import os; os.fork()",
        "seccomp: a signal to the owner": "import os; os.kill({owner}, 0)",
        "seccomp: exec": "import os; os.execv('/bin/true', ['true'])",
    }
    with tempfile.TemporaryDirectory() as folder, Sandbox(slots=1, timeout=20) as sandbox:
        competition = _toy_competition(Path(folder))
        report = {name: sandbox.hello.get(name) for name in ("layers", "landlock_abi", "uid_base", "failed")}
        report |= {"isolation": sandbox.isolation, "problem": sandbox.problem, "proofs": {}}
        if not sandbox.problem:
            good = "import shutil; shutil.copy('input/sample_submission.csv', 'submission.csv')"
            run = sandbox.run(competition, good)
            report["proofs"]["a good script is graded"] = "holds" if run.status == "ok" else f"FAILS: {run}"
            names = {"secret": str(competition.answers), "owner": os.getpid()}
            for name, attempt in attempts.items():
                for key, value in names.items():
                    attempt = attempt.replace("{%s!r}" % key, repr(value)).replace("{%s}" % key, str(value))
                run = sandbox.run(competition, f"try:\n    {attempt}\nexcept PermissionError:\n    print('denied')")
                report["proofs"][name] = "holds" if run.stdout_tail == "denied\n" else f"FAILS: {run}"
            for name, attempt, status in (
                ("limit: wall clock", "import time; time.sleep(99)", "timeout"),
                ("limit: memory", "x = bytearray(1 << 33)", "memory"),
            ):
                run = sandbox.run(competition, attempt, timeout=2)
                report["proofs"][name] = "holds" if run.status == status else f"FAILS: {run}"
        report["ok"] = not report["problem"] and all(proof == "holds" for proof in report["proofs"].values())
    return report


def _toy_competition(folder: Path) -> Competition:
    home = folder / "toy"
    (home / "prepared" / "public").mkdir(parents=True)
    (home / "prepared" / "private").mkdir()
    (home / "config.yaml").write_text(
        "id: toy\nname: Toy\ndescription: toy/description.md\ngrader: {name: sum, grade_fn: 'file:grade.py:grade'}\n"
        "dataset: {answers: toy/prepared/private/test.csv, sample_submission: toy/prepared/public/sample_submission.csv}\n"
    )
    (home / "description.md").write_text("Add up.")
    (home / "grade.py").write_text("def grade(submission, answers):\n    return (submission.y == answers.y).mean()\n")
    (home / "leaderboard.csv").write_text("score\n" + "\n".join(str(i / 10) for i in range(10, 0, -1)))
    (home / "prepared" / "public" / "sample_submission.csv").write_text("id,y\n1,0\n2,0\n")
    (home / "prepared" / "private" / "test.csv").write_text("id,y\n1,0\n2,1\n")
    return Competition.load(home)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a script in isolation and grade its submission. Prints one JSON object.",
        epilog="Exit status: 0 the sandbox did its job, whatever the script did; 2 bad arguments; 3 no isolation.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute one script, grade what it submits")
    run.add_argument("script", type=Path, help="Python script; it sees ./input and writes ./submission.csv")
    run.add_argument("--timeout", type=float, default=30.0, metavar="S", help="wall-clock limit, seconds (default 30)")
    run.add_argument("--cpu-seconds", type=float, metavar="S", help="CPU limit, seconds (default: timeout * threads)")
    run.add_argument("--memory-mb", type=int, default=2048, metavar="MB", help="memory limit (default 2048)")
    run.add_argument("--threads", type=int, default=1, metavar="N", help="OpenMP and BLAS threads (default 1)")
    run.add_argument("--reward", default="rank", choices=("rank", "milestone", "medal"), help="reward to report")
    run.add_argument("--unsafe", action="store_true", help="run even where isolation is not available")
    grade = commands.add_parser("grade", help="grade a submission file without running anything")
    grade.add_argument("submission", type=Path, help="a submission.csv")
    for command in (run, grade):
        command.add_argument("--competition", type=Path, required=True, metavar="DIR", help="competition directory")
    commands.add_parser("selftest", help="print which layers this machine has and prove each")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "selftest":
        report = _selftest()
        print(json.dumps(report, indent=2))
        return 0 if report["ok"] else 3
    try:
        competition = Competition.load(options.competition)
        if options.command == "grade":
            data = options.submission.read_bytes()
            print(json.dumps({"competition_id": competition.id} | dataclasses.asdict(competition.grade(data))))
            return 0
        code = options.script.read_text(encoding="utf-8", errors="replace")
        limits = {"timeout": options.timeout, "cpu_seconds": options.cpu_seconds, "memory_mb": options.memory_mb}
        sandbox = Sandbox(1, **limits, threads=options.threads, unsafe=options.unsafe)
    except (CompetitionError, OSError, ValueError) as error:
        print(f"sandbox.py: error: {_one_line(error)}", file=sys.stderr)
        return 2
    with sandbox:
        execution = sandbox.run(competition, code)
    if execution.isolation.startswith("unsafe") and execution.status != "refused":
        print(f"sandbox.py: WARNING: isolation is {execution.isolation}", file=sys.stderr)
    facts = dataclasses.asdict(execution)
    del facts["submission"]
    print(json.dumps(facts | {"reward": base_reward(execution, options.reward)}))
    return 3 if execution.status == "refused" else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:  # the fork server, started by Sandbox
        _serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        sys.exit(main())
