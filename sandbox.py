"""The judge: run a policy's script in isolation, grade what it submits, make a reward of the grade.

Where in the paper: AceGRPO (arXiv 2602.07906) trains on the results of executed scripts and names
execution latency as what stalls RL for ML engineering. Its abstract and summaries, all that we had,
do not describe the sandbox, so nearly everything here is our choice:

1. [paper] A step's feedback is the execution of one script and its MLE-bench grade.
2. [ours]  Reward: 0 for nothing usable, 0.05 for a refused submission, 0.1 + 0.9 * human rank for
           a valid one; `improve` is paid for what it gains on its parent (`step_reward`).
3. [ours]  Speed: scripts are forked from a server that has already imported pandas and
           scikit-learn. A run that imports them takes about 0.02 times what `python script.py`
           takes, which spends nearly all of it on imports (tests/bench_sandbox.py).
4. [ours]  Safety: the policy is rewarded for its score, so it will try to read the answers, to
           reach the trainer, to outlive its run. Landlock confines files, a seccomp filter confines
           system calls; neither is enough alone. Both work for a normal user, for root and in
           Docker, where user namespaces fail. Without both, runs are refused; `unsafe=True`
           overrides that, and every Execution says which layers were in force.
5. [ours]  Limits: `timeout` is wall-clock time, `cpu_seconds` is CPU time. On shared cores they
           differ: bound CPU time tightly and give the wall clock about three times as much, because
           a script must not fail for its neighbours' work.
6. [ours]  Runs are reproducible: seeds derive from the code, so equal scripts score equally, and
           a policy that has learnt repeats itself: with `reuse_mb` a script that has been run on
           the competition is not run again. (Not so for a script that takes its randomness from
           the clock or the system.) Python's warnings are off by default; a script may switch
           them on.

    owner (trainer) -- control socket --> fork server -- fork --> nanny -- fork --> worker
    holds the answers,                    has the libraries,      one per run:      the script:
    grades, rewards                       and no secret           limits, kills,    Landlock,
         |                                                        collects          seccomp
         +------ one socket per run: request in, result out, EOF is failure -+

The file goes from right to left: worker, nanny, fork server, owner.

Covered (tests/test_sandbox_attacks.py attacks each):
- Answers: no path, link, /proc entry, descriptor, handle, ptrace or memory read leads to them. The
  fork server never knew them; the owner's environment is not inherited.
- Poisoning: public data, the Python installation and other runs' files cannot be changed. Each run
  is a fresh fork, so monkeypatches die with it. No System V or POSIX IPC, no keyrings.
- Submission: read when every process of the run is dead, without following links; its bytes, rows
  and fields are bounded before pandas sees it.
- Processes: no fork, exec or signal to anyone else; threads only. Hangs, ignored signals and
  SIGSTOP end in SIGKILL. Nothing survives its run, its server or its owner (kill -9 included).
- Resources: CPU, wall clock, memory, file size, disk, inodes, threads, descriptors, output.
- Network and odd kernel interfaces: system calls are denied unless listed; foreign ABIs are fatal.
Not covered: kernel exploits; CPU and cache timing; stat() metadata (that a path exists, its size
and times: keep private directories 0700); what a run uses between two looks (POLL_SECONDS), for
each of which it stands still, so that a long write to a pipe may come back short; contention within
the limits; with `gpus` memory that is shared and anonymous, what a job leaves in the GPU's, and any
ioctl on /dev/nvidia*; process pools (fork is denied: joblib runs in threads, DataLoader needs
num_workers=0); systems other than Linux on x86_64 or aarch64 (refused: use a VM or a container).
Scripts can read whatever lies in the Python prefix, scikit-learn's bundled data included: a
competition must not be a copy of it. Links in the public data that lead out of it are not followed.

Run alone:
    python sandbox.py run --competition DIR script.py [--timeout S]
    python sandbox.py grade --competition DIR submission.csv
    python sandbox.py grade --competition spooky-author-identification --data-dir DIR submission.csv
    python sandbox.py selftest
"""

from __future__ import annotations

import argparse
import ast
import atexit
import codecs
import contextlib
import copy
import csv
import ctypes
import dataclasses
import errno
import fcntl
import functools
import gc
import hashlib
import importlib
import importlib.util
import io
import itertools
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
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# -- Competitions and grades: MLE-bench's layout and rules ----------------------------------------


class CompetitionError(ValueError):
    """A competition cannot be used, or what was asked for cannot be done with it (rollout.py); the
    message is one line: what, where, remedy."""


class SubmissionError(ValueError):
    """A submission is refused before the grader sees it; the message is one line for the agent."""


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else line[:297] + "..."


@dataclass(frozen=True)
class Grade:
    """What the grader said of one submission.

    score is in the competition's own metric, None when invalid; human_rank is in [0, 1]; reason is
    one line, empty when valid.
    """

    valid: bool
    score: float | None = None
    medal: str = "none"  # gold | silver | bronze | none
    human_rank: float = 0.0
    above_median: bool = False
    reason: str = ""


def medal_ranks(teams: int) -> tuple[int, int, int]:
    """The last ranks (1 = best) that win gold, silver and bronze among `teams` (MLE-bench's rules).

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

    leaderboard holds the private scores as its file lists them, (N,) float64; gold, silver and
    bronze are the scores of the last ranks that win the medal (inclusive), median is exclusive.
    sample_submission only bounds the size of a submission: MLE-bench keeps some of them private.
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
    grader: Callable  # grade(submission: DataFrame, answers: see `_answers`) -> float

    @classmethod
    def load(cls, directory: str | Path, data: str | Path | None = None) -> Competition:
        """Read <directory>/{config.yaml, description.md, grade.py, leaderboard.csv} and its data.

        data: the folder that holds <id>/prepared/{public,private}, as MLE-bench keeps it; default:
        `directory` itself holds prepared/. grade.py is trusted code: it runs in this process.
        Raises: CompetitionError.
        """
        csv.field_size_limit(sys.maxsize)  # Python's own 131072 characters are few for a mask
        directory = Path(directory).resolve()
        if not directory.is_dir():
            raise CompetitionError(f"{directory}: no such competition directory")
        where = str(directory / "config.yaml")
        config = _read_config(directory / "config.yaml")
        competition_id = _field(config, "id", where)
        home = Path(data).resolve() / competition_id if data else directory

        dataset = _field(config, "dataset", where, dict)

        def file(name: str) -> Path:
            parts = Path(_field(dataset, name, f"{where}: dataset")).parts
            parts = parts[1:] if parts[:1] == (competition_id,) else parts
            return home.joinpath(*parts).resolve()

        answers, sample = file("answers"), file("sample_submission")
        text = _field({"description": "description.md"} | config, "description", where)
        description, board = directory / Path(text).name, directory / "leaderboard.csv"
        public = home / "prepared" / "public"
        if not public.is_dir():
            what = f"missing directory of competition {competition_id!r}; prepare its data"
            raise CompetitionError(f"{public}: {what}")
        for path in (description, board, answers, sample):
            if not (path.is_file() or path == answers != home and path.is_dir()):
                raise CompetitionError(f"{path}: missing file of competition {competition_id!r}")
            if not os.access(path, os.R_OK):
                raise CompetitionError(f"{path}: this user may not read it")
        Sample.read(sample, 1)
        scores, lower = _read_leaderboard(board)
        gold, silver, bronze = (float(scores[rank - 1]) for rank in medal_ranks(len(scores)))
        grade_fn = _field(_field(config, "grader", where, dict), "grade_fn", f"{where}: grader")
        competition = cls(
            id=competition_id, name=str(config.get("name", competition_id)),
            description=description.read_text(encoding="utf-8", errors="replace"),
            public_dir=public, answers=answers, sample_submission=sample,
            leaderboard=scores, lower_is_better=lower, gold=gold, silver=silver, bronze=bronze,
            median=float(np.nanmedian(scores)), grader=_load_grader(grade_fn, directory),
        )
        competition._read_answers(1)
        return competition

    @classmethod
    def from_mlebench(
        cls, competition_id: str, data_dir: str | Path | None = None,
        registry: str | Path | None = None,
    ) -> Competition:
        """A competition of MLE-bench whose data `mlebench prepare` has put below `data_dir`.

        With the package mlebench: what its registry, its Grader and its medal thresholds say.
        Without it, or when `registry` is given: the same files, read from <registry>/<id> (default
        <data_dir>/<id>). data_dir: default as mlebench's own. Raises: CompetitionError.
        """
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        data = Path(data_dir or Path(cache) / "mle-bench" / "data")
        if not (data / competition_id / "prepared" / "public").is_dir():
            command = f"mlebench prepare -c {competition_id} --data-dir {data}"
            raise CompetitionError(f"{data / competition_id}: no prepared data; run `{command}`")
        package = None if registry else importlib.util.find_spec("mlebench")
        if package is None:
            directory = Path(registry or data) / competition_id
            if not directory.joinpath("config.yaml").is_file():
                raise CompetitionError(f"{directory}: no config.yaml there; {_GET_MLEBENCH}")
            return cls.load(directory, data)
        import pandas as pd

        try:
            theirs = importlib.import_module("mlebench.registry").registry.set_data_dir(data)
            theirs = theirs.get_competition(competition_id)
        except Exception as error:
            what = f"{type(error).__name__}: {_one_line(error)}"
            raise CompetitionError(f"mlebench: {competition_id}: {what}; {_GET_MLEBENCH}") from None
        ours = cls.load(theirs.leaderboard.parent, data)
        board = pd.read_csv(theirs.leaderboard)
        marks = theirs.grader.rank_score(None, board)
        return dataclasses.replace(
            ours, lower_is_better=theirs.grader.is_lower_better(board),
            grader=theirs.grader.grade_fn,
            **{name: marks[f"{name}_threshold"] for name in ("gold", "silver", "bronze", "median")},
        )

    def human_rank(self, score: float) -> float:
        """H = (N - pos + 1) / N, pos the first rank that `score` ties or beats (MLE-Dojo)."""
        board = self.leaderboard
        better = board < score if self.lower_is_better else board > score
        return 1.0 - int(better.sum()) / len(board)

    def grade(self, submission: bytes) -> Grade:
        """Grade the bytes of a submission.csv; whatever they hold, the answer is a Grade.

        Raises: CompetitionError when the answers cannot be read, which is no submission's fault.
        [ours] A score that is not finite is refused, where mlebench calls it valid without a medal:
        the reward is made of it.
        """
        answers = self._answers
        try:
            frame = read_submission(submission, self._sample)
        except SubmissionError as error:
            return Grade(False, reason=_one_line(error))
        try:
            score = self.grader(frame, copy.deepcopy(answers))
            score = math.nan if score is None else round(float(score), 5)  # as mlebench rounds
        except (Exception, SystemExit) as error:  # a grader refuses by raising, in its own words
            said = str(error) if " " in str(error) else f"{type(error).__name__}: {error}"
            return Grade(False, reason=_one_line(f"the grader refused the submission: {said}"))
        if not math.isfinite(score):
            return Grade(False, reason=f"the grader returned {score}, which is not a finite score")

        def reaches(threshold: float) -> bool:
            return score <= threshold if self.lower_is_better else score >= threshold

        medals = [m for m in ("gold", "silver", "bronze") if reaches(getattr(self, m))]
        above = reaches(self.median) and score != self.median
        return Grade(True, score, (medals or ["none"])[0], self.human_rank(score), above)

    @functools.cached_property
    def _sample(self) -> Sample:
        return Sample.read(self.sample_submission)

    @functools.cached_property
    def _answers(self):
        return self._read_answers()

    def _read_answers(self, rows: int | None = None):
        """What the grader gets: a DataFrame (.csv), a list of objects (.jsonl), else the path.

        rows: no more of them; the first shows whether the file is one. Raises: CompetitionError.
        """
        import pandas as pd

        try:
            if self.answers.suffix == ".csv":
                answers = pd.read_csv(self.answers, nrows=rows)
            elif self.answers.suffix == ".jsonl":
                with open(self.answers, "rb") as file:
                    answers = [json.loads(line) for line in itertools.islice(file, rows)]
            else:
                return self.answers
            if not len(answers):
                raise ValueError("no row in it")
            return answers
        except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
            what = f"the answers of {self.id!r} cannot be read: {_one_line(error)}"
            raise CompetitionError(f"{self.answers}: {what}; prepare its data again") from None


_GET_MLEBENCH = (
    "clone https://github.com/openai/mle-bench, run `git lfs pull` in it, then "
    "`pip install --no-deps CLONE` and `pip install appdirs py7zr diskcache tenacity tqdm`"
)
LITE = """
    aerial-cactus-identification aptos2019-blindness-detection denoising-dirty-documents
    detecting-insults-in-social-commentary dog-breed-identification
    dogs-vs-cats-redux-kernels-edition histopathologic-cancer-detection
    jigsaw-toxic-comment-classification-challenge leaf-classification mlsp-2013-birds
    new-york-city-taxi-fare-prediction nomad2018-predict-transparent-conductors
    plant-pathology-2020-fgvc7 random-acts-of-pizza ranzcr-clip-catheter-line-classification
    siim-isic-melanoma-classification spooky-author-identification
    tabular-playground-series-dec-2021 tabular-playground-series-may-2022
    text-normalization-challenge-english-language text-normalization-challenge-russian-language
    the-icml-2013-whale-challenge-right-whale-redux
""".split()
_DEVELOPMENT = """
    invasive-species-monitoring ml2021spring-hw2 movie-review-sentiment-analysis-kernels-only
    paddy-disease-classification plant-seedlings-classification playground-series-s3e18
    spaceship-titanic
""".split()  # in mlebench's registry, but not among the benchmark's 75


def load_competitions(where: str | Path, data_dir: str | Path | None = None) -> list[Competition]:
    """The competitions that `where` names, sorted by id. Raises: CompetitionError.

    where: "lite" (the 22 of MLE-bench-Lite), "all" (MLE-bench's 75), a text file with an id of
    MLE-bench a line (# begins a comment), or a directory whose sub-directories are competitions.
    data_dir: where MLE-bench's data are prepared, see `Competition.from_mlebench`.
    """
    path = Path(where)
    if str(where) in ("lite", "all") or path.is_file():
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise CompetitionError(f"{path}: no file of ids: {_one_line(error)}") from None
            ids = [line.partition("#")[0].strip() for line in lines]
        else:
            ids = LITE if str(where) == "lite" else _all_of_mlebench()
        found = [Competition.from_mlebench(name, data_dir) for name in filter(None, ids)]
        nothing = "no competition id in it"
    elif path.is_dir():
        homes = [config.parent for config in path.glob("*/config.yaml")]
        found = [Competition.load(home, None if (home / "prepared").is_dir() else data_dir)
                 for home in homes]
        nothing = "no sub-directory holds a config.yaml"
    else:
        raise CompetitionError(f"{path}: no such directory, file of ids, `lite` or `all`")
    if not found:
        raise CompetitionError(f"{path}: {nothing}")
    found.sort(key=lambda competition: competition.id)
    for first, second in zip(found, found[1:]):
        if first.id == second.id:
            raise CompetitionError(f"{path}: two competitions have the id {first.id!r}")
    return found


def _all_of_mlebench() -> list[str]:
    if not importlib.util.find_spec("mlebench"):
        raise CompetitionError(f"`all` needs the package mlebench: {_GET_MLEBENCH}")
    known = importlib.import_module("mlebench.registry").registry.list_competition_ids()
    return [name for name in known if name not in _DEVELOPMENT]


def _read_config(path: Path) -> dict:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompetitionError(f"{path}: missing; a competition needs config.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CompetitionError(f"{path}: cannot be read: {_one_line(error)}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 99th day of a month
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" line {mark.line + 1}:" if mark else ""
        what = _one_line(problem or error)
        raise CompetitionError(f"{path}:{line} not valid YAML: {what}") from None
    if not isinstance(config, dict):
        raise CompetitionError(f"{path}: must be a mapping of fields (id, dataset, grader, ...)")
    return config


def _field(mapping: dict, name: str, where: str, kind: type = str):
    value = mapping.get(name)
    if value is None or value == "":
        raise CompetitionError(f"{where}: field {name!r} is missing")
    if not isinstance(value, kind):
        expected = "mapping" if kind is dict else "string"
        raise CompetitionError(f"{where}: field {name!r} must be a {expected}")
    return value


def _read_leaderboard(path: Path) -> tuple[np.ndarray, bool]:
    """The scores in the file's order, which is best first, and whether lower is better (MLE-bench:
    first < last). As mlebench has it, a team without a score (NaN) counts.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        if file.readline().startswith("version https://git-lfs"):
            remedy = "run `git lfs pull` in the checkout that it comes from"
            raise CompetitionError(f"{path}: a Git LFS pointer, not a leaderboard; {remedy}")
        file.seek(0)
        rows = csv.DictReader(file)
        if "score" not in (rows.fieldnames or ()):
            raise CompetitionError(f"{path}: no column 'score' among {rows.fieldnames}")
        try:
            board = np.array([float(row["score"] or "nan") for row in rows])
        except (ValueError, csv.Error) as error:
            raise CompetitionError(f"{path}: line {rows.line_num}: {_one_line(error)}") from None
    if not np.isfinite(board).any():
        raise CompetitionError(f"{path}: no score in it")
    return board, bool(board[0] < board[-1])


def _load_grader(grade_fn: str, directory: Path) -> Callable:
    """The function that config.yaml names: "file:grade.py:grade", or mlebench's "a.module:grade".

    mlebench's own module is used when that package is installed, else grade.py beside config.yaml.
    """
    module_name, _, function = grade_fn.rpartition(":")
    name = module_name.removeprefix("file:") if module_name.startswith("file:") else "grade.py"
    path = directory / name
    theirs = module_name.startswith("mlebench.") and importlib.util.find_spec("mlebench")
    if not theirs and not path.is_file():
        raise CompetitionError(f"{path}: missing; grader.grade_fn is {grade_fn!r}")
    try:
        if theirs:
            module = importlib.import_module(module_name)
        else:
            spec = importlib.util.spec_from_file_location("grade", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        grader = getattr(module, function or "grade")
        if not callable(grader):
            raise TypeError(f"{function or 'grade'} is no function")
        return grader
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {_one_line(error)}"
        if (getattr(error, "name", None) or "").partition(".")[0] == "mlebench":
            what = f"it imports mlebench, which is not installed; {_GET_MLEBENCH}"
        raise CompetitionError(f"{path}: cannot be loaded: {what}") from None


# -- Reading a submission: hostile bytes, checked before pandas may see them ----------------------

# No two parts of it match the same digits: \d+\.?\d* would take hours to refuse a long word.
_NUMBER = re.compile(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)


@dataclass(frozen=True)
class Sample:
    """What the sample submission says about the size of a submission."""

    columns: tuple[str, ...]
    rows: int
    max_bytes: int  # bound for a submission's size

    @classmethod
    def read(cls, path: Path, most: int | None = None) -> Sample:
        """most: rows to count; one shows that the file has any. Raises: CompetitionError."""
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.reader(file)
            columns = tuple(next(reader, ()))
            numeric, rows = True, 0
            for row in itertools.islice(filter(None, reader), most):
                rows += 1
                if rows <= 1000:
                    numeric = numeric and all(_NUMBER.fullmatch(value) for value in row[1:])
        if not columns or not rows:
            raise CompetitionError(f"{path}: the sample submission has no rows")
        # Ids stay as long as they are; a float may take 25 characters where the sample says 0;
        # of text (encoded masks, say) the sample may show next to nothing.
        size = 2 * os.path.getsize(path) + 32 * len(columns) * (rows + 1) + 4096
        return cls(columns, rows, size if numeric else max(size, 64 << 20))


def read_submission(data: bytes, sample: Sample):
    """Parse a submission into the DataFrame that mlebench would read, or say in one line why not.

    What is valid is the grader's word. Here only the bytes are made safe: their size, encoding and
    numbers of rows and fields. That takes linear time and comes first because pandas is not safe on
    unchecked bytes: a header of a million equal names takes it minutes.
    Raises: SubmissionError.
    """
    _check_form(data, sample)
    import pandas as pd

    try:
        return pd.read_csv(io.BytesIO(data))
    except Exception as error:  # pandas' own refusals; the bytes are tame by now
        raise SubmissionError(f"submission.csv is not valid CSV: {_one_line(error)}") from None


def _check_form(data: bytes, sample: Sample) -> None:
    """Refuse bytes that are no CSV text of about the sample's size. Raises: SubmissionError."""

    def refuse(what: str):
        raise SubmissionError(f"submission.csv {what}")

    if len(data) > sample.max_bytes:
        refuse(f"has {len(data)} bytes; at most {sample.max_bytes} fit {sample.rows} rows")
    if not data.strip():
        refuse("is empty")
    if b"\0" in data:
        refuse("holds NUL bytes; it must be a text file")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 text (byte {error.start})")
    most_rows, most_fields = 2 * sample.rows + 17, 2 * len(sample.columns) + 16
    counts = _fields_of_rows(data, most_rows)
    if len(counts) and counts.max() > most_fields:
        row = int(np.argmax(counts > most_fields))
        where = f"row {row}" if row else "the header"
        refuse(f"has {counts[row]} fields in {where}, expected {len(sample.columns)} columns")
    if len(counts) > most_rows:
        refuse(f"has too many rows, expected {sample.rows}")
    if len(counts) < 2:
        refuse("has a header but no rows")


def _fields_of_rows(data: bytes, most: int) -> np.ndarray:
    """(R,) number of fields of each row of a CSV text; R is at most `most` + 1.

    As csv.reader has them, blank rows at the end aside, and quick on whatever bytes. A quote that
    begins a field opens a text, the next one closes it, any other is a letter; two in a row are
    an escaped quote or an empty text. So the number of field-beginning quotes since the last other
    one says, by being odd, that a text is open.
    """
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").rstrip(b"\n")
    quoted = b'"' in data
    if quoted:
        data = data.removeprefix(codecs.BOM_UTF8).replace(b'""', b"")
    symbols = np.frombuffer(data, np.uint8)
    is_end, is_comma = symbols == ord("\n"), symbols == ord(",")
    if quoted:
        quotes = np.flatnonzero(symbols == ord('"'))
        begins = (is_comma | is_end)[quotes - 1] | (quotes == 0)
        count = np.cumsum(begins, dtype=np.int32)
        count -= np.maximum.accumulate(np.where(begins, 0, count))
        turns = np.zeros(len(data), np.int8)  # 1 where a text opens, -1 where it closes
        turns[quotes] = np.diff((count % 2).astype(np.int8), prepend=np.int8(0))
        outside = np.cumsum(turns, dtype=np.int8) == 0
        is_end, is_comma = is_end & outside, is_comma & outside
    separators = is_end[is_end | is_comma]  # True where one ends a row
    ends = np.append(np.flatnonzero(separators), len(separators))[: most + 1]
    return np.diff(ends, prepend=-1)


# -- Executions and rewards -----------------------------------------------------------------------


@dataclass(frozen=True)
class Execution:
    """All facts of one run, flat. Status:

    ok             exit code 0 and a valid submission
    error          the script raised, exited with another code, broke a disk or thread limit, or
                   the sandbox's process died under it
    timeout        the wall-clock or CPU limit (reason says which)
    memory         a MemoryError, or the memory limit
    no_submission  exit code 0, but no regular file submission.csv
    invalid        exit code 0, but the submission was refused (reason says why)
    refused        not run, or not to its end: isolation is missing, or the sandbox was closed
    """

    status: str
    exit_code: int | None = None  # negative: killed by that signal; None: not known
    seconds: float = 0.0  # wall clock, from the script's first line to its end
    cpu_seconds: float = 0.0
    stdout_tail: str = ""
    stderr_tail: str = ""
    validation_score: float | None = None  # the last "validation score: <float>" printed
    valid: bool = False
    score: float | None = None
    medal: str = "none"
    human_rank: float = 0.0
    above_median: bool = False
    reason: str = ""
    isolation: str = ""  # "landlock+seccomp", or "unsafe (...)" with the layers that were in force
    submission: bytes | None = dataclasses.field(default=None, repr=False)  # what was graded
    reused: bool = False  # not run: all of the above is from an equal script's run (`reuse_mb`)

    @property
    def complete(self) -> bool:
        """The script ended by itself; no limit, kill or failing machine cut it short."""
        return (self.exit_code is not None and self.exit_code >= 0
                and self.status not in ("timeout", "memory", "refused"))


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
    if place:
        return 0.4 + 0.2 * place
    return 0.4 if execution.above_median else 0.2


def step_reward(
    base: float, operator: str, parent_base: float | None = None, unchanged: bool = False,
    preferred: bool = True,
) -> float:
    """The step's reward in [0, 1] [ours]: `draft` and `debug` earn the base reward of their script,
    `improve` and `crossover` at most 0.1 of it, and what an agent gains that had the parent before
    (of two parents, the one that it would choose). A copy of a parent earns 0.

    An agent goes on with the script that prints the best validation score. `preferred` says that
    the child claims to be better than its parent: then it takes the parent's place, for better or
    worse. Otherwise it has cost a step; paid for the base reward of each child, a policy learns
    edits that are safe.

    >>> step_reward(0.5, "draft"), step_reward(0.75, "improve", 0.5)
    (0.5, 0.35)
    >>> step_reward(0.3, "improve", 0.5, preferred=False)
    0.1
    >>> step_reward(0.3, "improve", 0.5)  # its validation score is not true
    0.0
    >>> step_reward(0.9, "improve", 0.9, unchanged=True)
    0.0
    """
    if unchanged:
        return 0.0
    if operator in ("improve", "crossover") and parent_base is not None:
        gain = base - parent_base if preferred else 0.0
        return min(max(min(base, 0.1) + gain, 0.0), 1.0)
    return base


# One thread parses at a time: Python 3.11 counts a syntax tree's depth in one place for all
# threads, and where a garbage collection lets another thread in between, both raise SystemError.
_parsing = threading.Lock()


def code_key(code: str) -> str:
    """Digest of the normalised syntax tree: scripts that differ in comments and layout are equal.

    Text that does not parse counts as it stands, stripped.

    >>> code_key("x = 1  # one") == code_key("x  =  1"), code_key("x = 1") == code_key("x = 2")
    (True, False)
    """
    text = code.strip()
    if len(text) < 200_000:  # a huge tree costs far more than its text
        try:
            with _parsing, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = ast.dump(ast.parse(code))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


# -- The kernel's part 1: Landlock, which files a script may open ---------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_MACHINE = platform.machine()
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_GET_SECCOMP = 1, 4, 21
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38

# Access rights, in the kernel's order; later versions (ABIs) of Landlock know a few more.
_EXECUTE, _WRITE, _READ, _LIST, _RMDIR, _RM, _CHAR, _MKDIR, _REGULAR = (1 << i for i in range(9))
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL_DEV  # the others are directories'
_READ_ONLY = _READ | _LIST
# The work directory: everything but links, fifos, sockets, devices and execution.
_WORK = _READ_ONLY | _WRITE | _RMDIR | _RM | _MKDIR | _REGULAR | _REFER | _TRUNCATE

_SYSTEM_FILES = """
    /usr/lib /usr/lib64 /usr/local/lib /lib /lib64 /usr/share/zoneinfo /usr/share/fonts
    /usr/share/fontconfig /usr/share/locale /usr/share/mime /etc/ld.so.cache /etc/localtime
    /etc/timezone /etc/fonts /etc/mime.types /dev/zero /dev/random /dev/urandom /proc/cpuinfo
    /proc/meminfo /proc/stat /proc/loadavg /proc/sys/vm/overcommit_memory /sys/devices/system/cpu
    /sys/devices/system/node /sys/kernel/mm/transparent_hugepage /sys/fs/cgroup/cpu.max
    /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us
    /sys/fs/cgroup/cpu/cpu.cfs_period_us
""".split()
_PROC_SELF = ("status", "stat", "statm", "maps", "cgroup", "cmdline")  # not mem, fd, environ, net


def _syscall(number: int, *arguments) -> int:
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"system call {number}")
    return result


def _prctl(option: int, value: int) -> None:
    number = {"x86_64": 157, "aarch64": 167}[_MACHINE]
    _syscall(number, *map(ctypes.c_ulong, (option, value, 0, 0, 0)))


def landlock_abi() -> int:
    """Landlock's version, 0 when it is not there (ask the call: securityfs may be absent)."""
    try:
        return _syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    except OSError:
        return 0


def readable_roots() -> list[str]:
    """Real paths that every script may read: the Python installation and system libraries."""
    paths = [sys.prefix, sys.base_prefix, sys.exec_prefix, *filter(os.path.isdir, sys.path)]
    return sorted({os.path.realpath(p) for p in paths + _SYSTEM_FILES if os.path.exists(p)})


def _landlock_ruleset(abi: int, rules: list[tuple[str, int]]) -> int:
    """A descriptor of a ruleset that denies every file access but `rules` (path, rights)."""
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    # Also handled, so denied: TCP (ABI 4); abstract sockets and signals out of the domain (ABI 6).
    attributes = struct.pack("QQQ", handled, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    size, flags = ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)
    ruleset = _syscall(444, attributes, size, flags)
    for path, rights in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not on this machine: nothing to allow
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FILE_RIGHTS
        rule = struct.pack("=Qi", rights & handled, descriptor)
        _syscall(445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, flags)
        os.close(descriptor)
    return ruleset


# -- The kernel's part 2: seccomp, which system calls a script may make (name:x86_64:aarch64) -----

_ALLOW = """
    read:0:63 write:1:64 close:3:57 stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291
    poll:7:- lseek:8:62 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69
    pwritev:296:70 preadv2:327:286 pwritev2:328:287 sendfile:40:71 copy_file_range:326:285
    splice:275:76 tee:276:77 access:21:- faccessat:269:48 faccessat2:439:439
    mprotect:10:226 munmap:11:215 brk:12:214 mremap:25:216 msync:26:227 mincore:27:232
    madvise:28:233 mlock:149:228 munlock:150:229 mlock2:325:284 membarrier:324:283
    get_mempolicy:239:236 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 select:23:-
    pselect6:270:72 ppoll:271:73 flock:73:32 epoll_create:213:- epoll_create1:291:20
    epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 eventfd:284:- eventfd2:290:19
    signalfd4:289:74 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
    sendto:44:206 recvfrom:45:207 shutdown:48:210
    fsync:74:82 fdatasync:75:83 ftruncate:77:46 sync_file_range:277:84
    fadvise64:221:223 readahead:187:213 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49
    fchdir:81:50 statfs:137:43 fstatfs:138:44 rename:82:- renameat:264:38 renameat2:316:276
    mkdir:83:- mkdirat:258:34 rmdir:84:- creat:85:- link:86:- linkat:265:37 unlink:87:-
    unlinkat:263:35 symlink:88:- symlinkat:266:36 readlink:89:- readlinkat:267:78 umask:95:166
    rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136
    rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:- alarm:37:-
    getitimer:36:102 setitimer:38:103 nanosleep:35:101 clock_nanosleep:230:115
    clock_gettime:228:113 clock_getres:229:114
    gettimeofday:96:169 time:201:- getpid:39:172 gettid:186:178 getppid:110:173 getpgrp:111:-
    getpgid:121:155 getsid:124:156 getuid:102:174 getgid:104:176 geteuid:107:175 getegid:108:177
    getresuid:118:148 getresgid:120:150 getgroups:115:158 capget:125:90 uname:63:160
    getrlimit:97:163 setrlimit:160:164 getrusage:98:165 sysinfo:99:179 times:100:153
    getcpu:309:168 getpriority:140:141 sched_yield:24:124 sched_getaffinity:204:123
    sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
    sched_get_priority_min:147:126 futex:202:98 set_robust_list:273:99 get_robust_list:274:100
    rseq:334:293 set_tid_address:218:96 restart_syscall:219:128 getrandom:318:278
    wait4:61:260 waitid:247:95 exit:60:93 exit_group:231:94
"""
# Landlock does not stop a change of mode or times, and shutil.copy makes one: say it is done.
_PRETEND = """
    chmod:90:- fchmod:91:52 fchmodat:268:53 fchmodat2:452:452 utimensat:280:88 utime:132:-
    utimes:235:- futimesat:261:-
"""
# Not supported: shutil.copy2 goes on without extended attributes, and posix_fallocate writes, which
# takes longer than to fill a disk between two of the nanny's looks.
_UNSUPPORTED = """
    fallocate:285:47
    setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 getxattr:191:8 lgetxattr:192:9
    fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13
"""
# "Not there" rather than "not permitted" makes callers fall back: clone3 hides its flags from the
# filter, clone shows them; memfd_create makes memory that no limit sees.
_MISSING = """
    clone3:435:435 memfd_create:319:279 io_uring_setup:425:425 openat2:437:437 close_range:436:436
"""
_GPU_ALLOW = """
    ioctl:16:29 memfd_create:319:279 mbind:237:235 set_mempolicy:238:237 sched_setaffinity:203:122
    mmap:9:222
"""

_PID = 0x5EEDC0DE  # stands for the worker's pid until the filter is installed
_CLONE_THREAD = 0x10400  # THREAD, and FILES: /proc shows its descriptors
_CLONE_DENIED = 0x7E024080  # namespaces; VFORK: a thread that waits for another cannot be stopped
_SHARED_ANONYMOUS = 0x21  # its pages stay when it is unmapped but for one: no limit sees them
_TRUNC, _ACCESS_MODE, _TMPFILE = 0x200, 3, 0x400000
# Landlock 1 and 2 miss O_RDONLY | O_TRUNC; an O_TMPFILE would hide from the disk limit.
_OPEN = (_TRUNC | _ACCESS_MODE, (_TRUNC,), False), (_TMPFILE, (0,), True)
# name: conditions that must hold: (argument, mask, values, is the masked argument one of them?)
_CONDITIONS = {
    "open:2:-": tuple((1, *condition) for condition in _OPEN),
    "openat:257:56": tuple((2, *condition) for condition in _OPEN),
    "clone:56:220": ((0, _CLONE_THREAD | _CLONE_DENIED, (_CLONE_THREAD,), True),),  # only threads
    "mmap:9:222": ((3, _SHARED_ANONYMOUS, (_SHARED_ANONYMOUS,), False),),
    # only oneself; and what the nanny has stopped stays so
    "kill:62:129": ((0, ~0, (_PID,), True), (1, ~0, (signal.SIGCONT,), False)),
    "tgkill:234:131": ((0, ~0, (_PID,), True), (2, ~0, (signal.SIGCONT,), False)),
    "prlimit64:302:261": ((0, ~0, (0, _PID), True),),
    "prctl:157:167": ((0, ~0, (15, 16, 0x53564D41), True),),  # names; not PDEATHSIG, DUMPABLE, ...
    "fcntl:72:25": ((1, ~0, (*range(8), 36, 37, 38, 1030, 1032), True),),  # not F_SETOWN, F_SETSIG
    "ioctl:16:29": ((1, ~0, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), True),),  # isatty
    "socketpair:53:199": ((0, ~0, (1,), True), (1, 0xF, (1,), True)),  # unix stream: asyncio's own
}


def seccomp_program(machine: str, gpu: bool = False) -> bytes:
    """The filter as raw BPF: default EPERM; a foreign ABI (int 0x80, x32) is fatal."""
    which, architecture = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}[machine]
    allow, fail, kill = 0x7FFF0000, 0x00050000, 0x80000000
    load, mask_with, equal, at_least = 0x20, 0x54, 0x15, 0x35

    def do(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", operation, if_true, if_false, value & 0xFFFFFFFF)

    def give(value: int) -> bytes:
        return do(0x06, value)

    def numbers(table: str) -> list[int]:
        fields = [entry.split(":")[which] for entry in table.split()]
        return [int(field) for field in fields if field != "-"]

    program = do(load, 4) + do(equal, architecture, 1, 0) + give(kill) + do(load, 0)
    if machine == "x86_64":
        program += do(at_least, 0x40000000, 0, 1) + give(kill)
    tables = [(_GPU_ALLOW, allow)] if gpu else []
    tables += [(_ALLOW, allow), (_PRETEND, fail), (_UNSUPPORTED, fail | errno.ENOTSUP)]
    for table, answer in [*tables, (_MISSING, fail | errno.ENOSYS)]:
        for number in numbers(table):
            program += do(equal, number, 0, 1) + give(answer)
    for name, conditions in _CONDITIONS.items():
        body = b""
        for argument, mask, values, wanted in conditions:
            body += do(load, 16 + 8 * argument) + do(mask_with, mask)
            for i, value in enumerate(values):  # a wanted value jumps over the refusal
                body += do(equal, value, len(values) - i, 0) if wanted else do(equal, value, 0, 1)
                body += b"" if wanted else give(fail | errno.EPERM)
            body += give(fail | errno.EPERM) if wanted else b""
        body += give(allow)
        for number in numbers(name):
            program += do(equal, number, 0, len(body) // 8) + body
    return program + give(fail | errno.EPERM)


def _install_seccomp(program: bytes) -> None:
    """Put the filter in force for this process and its threads; it lets it signal only itself."""
    program = program.replace(struct.pack("I", _PID), struct.pack("I", os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    set_mode_filter = tsync = ctypes.c_uint(1)
    _syscall({"x86_64": 317, "aarch64": 277}[_MACHINE], set_mode_filter, tsync, header)


# -- The worker: a fork that gives up everything, proves it, and becomes the script ---------------

POLL_SECONDS = 0.1  # mean time between the nanny's looks at memory, CPU, threads and disk
STOP_SECONDS = 0.1  # how long a script may take to stand still for a look
KILL_SECONDS = 10.0  # how long SIGKILL may take before a slot is given up
MAX_FILES = 10_000  # files and directories in a work directory
MAX_DEPTH = 64  # nested directories
MAX_CODE = 1_000_000  # characters of a script
OUTPUT_BYTES = 64 << 10  # kept of stdout and of stderr each


@dataclass(frozen=True)
class Setup:
    """What the fork server found on this machine; nannies and workers get it by fork."""

    layers: tuple[str, ...]
    root: str  # scratch directory: every run gets a directory in it
    canary: str  # a file that no script may read
    roots: list[str]  # what every script may read
    landlock_abi: int
    uid_base: int  # slot i runs as uid_base + i; 0: uids cannot be dropped here
    program: bytes  # the seccomp filter, and the one for runs with a GPU
    gpu_program: bytes


def _worker(setup: Setup, request: dict, work: str, nanny: int, pipes: list[int]) -> None:
    """Runs in the forked child and never returns; pipes are stdout, stderr and `ready`.

    `ready` says "ok", or what went wrong; it is closed before the script begins.
    """
    leave, ready = os._exit, pipes[2]  # bound now: the script may replace anything
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, pipe in enumerate(pipes, 1):
            os.dup2(pipe, target)
        ready = 3
        _syscall(436, ctypes.c_uint(4), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(0))  # close_range
        for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(work)
        _confine(setup, request, work, nanny)
        os.write(ready, b"ok")
        os.close(ready)
    except BaseException as error:
        os.write(ready, f"{type(error).__name__}: {_one_line(error)}".encode())
        leave(1)
    try:
        leave(_become_script(request["code"], request["seed"]))
    finally:
        leave(1)


def _confine(setup: Setup, request: dict, work: str, nanny: int) -> None:
    """Give up every right that the script must not have. The order matters: the ruleset is built
    while paths can still be opened, the uid goes before the capabilities, seccomp comes last."""
    _prctl(_PR_SET_DUMPABLE, 1)  # the nanny must see our descriptors; this process has no secret
    Path("/proc/self/oom_score_adj").write_text("1000")  # out of memory? then the script dies first
    ruleset = None
    if "landlock" in setup.layers:
        rules = [(path, _READ_ONLY) for path in [*setup.roots, request["public"]]]
        rules += [(work, _WORK), ("/dev/null", _READ | _WRITE)]
        rules += [(f"/proc/{os.getpid()}/{name}", _READ) for name in _PROC_SELF]
        if request["gpu"]:
            devices = [f"/dev/{name}" for name in os.listdir("/dev") if name.startswith("nvidia")]
            rules += [(path, _READ_ONLY | _WRITE | _IOCTL_DEV) for path in devices]
            about = "/proc/driver/nvidia", "/proc/devices", "/sys/bus/pci", "/sys/devices"
            rules += [(path, _READ_ONLY) for path in about]
        ruleset = _landlock_ruleset(setup.landlock_abi, rules)
    _limit(request)
    if request["uid"]:
        _drop_to(request["uid"])
        _prctl(_PR_SET_DUMPABLE, 1)  # setuid cleared it
    capset, version = {"x86_64": 126, "aarch64": 91}[_MACHINE], 0x20080522
    _syscall(capset, struct.pack("Ii", version, 0), bytes(24))  # none left, as root too
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


def _drop_to(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _limit(request: dict) -> None:
    """Resource limits, soft and hard; the nanny's are tighter, these hold between its looks."""
    megabyte = 1 << 20
    limits = {
        "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "NICE": 0, "RTPRIO": 0, "NOFILE": 256,
        # The kernel's count runs ahead of the nanny's where a hypervisor steals time.
        "CPU": math.ceil(1.5 * request["cpu_seconds"]) + 1,
        "FSIZE": request["file_mb"] * megabyte,
    }
    if not request["gpu"]:  # CUDA reserves far more address space than it uses
        base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits["AS"] = base + (request["memory_mb"] + 1024) * megabyte
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _prove(setup: Setup) -> None:
    """A call that returned 0 proves nothing: try what each layer must stop."""
    if "landlock" in setup.layers:
        with contextlib.suppress(PermissionError):
            os.close(os.open(setup.canary, os.O_RDONLY))
            raise RuntimeError("Landlock is not in force: a forbidden file could be opened")
    if "seccomp" in setup.layers:
        if _libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0) >= 0:
            raise RuntimeError("seccomp is not in force: socket() worked")
        if "\nSeccomp:\t2\n" not in Path("/proc/self/status").read_text():
            raise RuntimeError("seccomp is not in force")


def _become_script(code: str, seed: int) -> int:
    """Run the code as __main__ and return its exit code; tracebacks show its own frames only."""
    here = os.getcwd()
    names = "TMPDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"
    os.environ.update(HOME=here, **dict.fromkeys(names, f"{here}/tmp"))
    tempfile.tempdir = None  # the fork server's choice, if a module made one
    random.seed(seed)  # a fork inherits the generators: unseeded, every run would draw the same
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    options = {"encoding": "utf-8", "errors": "backslashreplace", "closefd": False, "buffering": 1}
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", **options)  # by lines: a kill loses no output
    sys.stderr = sys.__stderr__ = open(2, "w", **options)
    linecache.cache["script.py"] = len(code), None, code.splitlines(True), "script.py"
    sys.argv, sys.path[:0] = ["script.py"], [here]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(__file__=f"{here}/script.py", __builtins__=__builtins__)
    exit_code, report = 0, traceback.print_exception
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
        threading._shutdown()  # waits for the script's threads, as Python does
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
    except BaseException:
        exit_code = exit_code or 120
    return exit_code & 0xFF


# -- The nanny: one a run; holds the worker to its limits, kills it, collects the submission ------


class _Output:
    """The first quarter and the last three quarters of OUTPUT_BYTES: a flood loses its middle."""

    def __init__(self):
        self.head, self.tail, self.cut = bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        room = OUTPUT_BYTES // 4 - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        extra = max(0, len(self.tail) - OUTPUT_BYTES * 3 // 4)
        del self.tail[:extra]  # quick: a bytearray drops its beginning without a copy
        self.cut += extra

    def kept(self) -> bytes:
        gap = f"\n... {self.cut} bytes cut ...\n".encode() if self.cut else b""
        return bytes(self.head) + gap + bytes(self.tail)


def _send(channel: socket.socket, header: dict, *blobs: bytes) -> None:
    """One message: the header's length, the header (JSON, with the blobs' sizes), the blobs."""
    header = json.dumps(header | {"blobs": [len(blob) for blob in blobs]}).encode()
    channel.sendall(struct.pack("I", len(header)) + header + b"".join(blobs))


def _receive(channel: socket.socket) -> tuple[dict, list[bytes]]:
    """The counterpart of _send. Raises EOFError when the other side closed early."""
    with channel.makefile("rb") as file:

        def exactly(size: int) -> bytes:
            data = file.read(size)
            if len(data) < size:
                raise EOFError
            return data

        header = json.loads(exactly(*struct.unpack("I", exactly(4))))
        return header, [exactly(size) for size in header["blobs"]]


def _nanny(setup: Setup, channel: socket.socket) -> None:
    """Runs in a fork of the fork server; the caller exits afterwards."""
    server, stopping = os.getppid(), []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    request, (code,) = _receive(channel)
    request["code"] = code.decode("utf-8", "replace")
    request["uid"] = setup.uid_base + request["slot"] if request["readable"] else 0
    os.environ["CUDA_VISIBLE_DEVICES"] = request["gpu"]
    nanny = os.getpid()
    work = os.path.join(setup.root, str(nanny))

    def orphaned() -> bool:
        return bool(stopping) or os.getppid() != server

    try:
        try:
            directory = _prepare(request, work)
            pipes = [os.pipe() for _ in range(3)]
            worker = os.fork()
        except OSError as error:  # no room, no process: not the script's doing
            _send(channel, _not_started(error))
            return
        if worker == 0:
            _worker(setup, request, work, nanny, [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        reads = [read for read, _ in pipes]
        _send(channel, *_watch(request, worker, reads, work, directory, channel, orphaned))
    except ConnectionError:
        pass  # the owner is gone
    finally:
        _kill_children([])
        remove_tree(work)


def _prepare(request: dict, work: str) -> int:
    """Make the script's directory; returns a descriptor that is ours, whatever becomes of it."""
    os.mkdir(work, 0o700)
    directory = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    Path(work, "script.py").write_text(request["code"], encoding="utf-8")
    Path(work, "tmp").mkdir()
    Path(work, "input").symlink_to(request["public"])
    if request["uid"]:
        for name in ("", "tmp", "script.py"):
            os.chown(os.path.join(work, name), request["uid"], request["uid"])
    return directory


def _not_started(error: OSError) -> dict:
    """The facts of a run that the machine kept from beginning."""
    return {"killed": "refused", "said": f"{type(error).__name__}: {_one_line(error)}"}


def _watch(
    request: dict, worker: int, pipes: list[int], work: str, directory: int,
    channel: socket.socket, orphaned: Callable[[], bool],
) -> tuple[dict, bytes, bytes, bytes]:
    """See the worker to its end. Returns (facts, stdout, stderr, submission)."""
    stdout, stderr, ready = pipes
    pidfd = os.pidfd_open(worker)
    said = os.read(ready, 4096) if select.select([ready], [], [], 60)[0] else b"no sign of life"
    killed = "" if said == b"ok" else "refused"
    outputs = {pipe: _Output() for pipe in (stdout, stderr)}
    poll = select.poll()
    for descriptor in (stdout, stderr, pidfd):
        poll.register(descriptor, select.POLLIN)
    poll.register(channel, select.POLLIN | select.POLLRDHUP)
    inherited = _process_facts(os.getpid())["memory"]  # shared with the worker: not the script's
    start = time.monotonic()
    deadline, next_look = start + request["timeout"], start + POLL_SECONDS
    while not killed:
        now = time.monotonic()
        events = dict(poll.poll(1 + 1000 * max(0.0, min(deadline, next_look) - now)))
        for descriptor, output in outputs.items():
            if events.get(descriptor):
                data = os.read(descriptor, 1 << 16)
                output.add(data)
                if not data:
                    poll.unregister(descriptor)
        if events.get(pidfd):
            break
        if events.get(channel.fileno()) or orphaned():
            killed = "orphaned"
        elif now >= deadline:
            killed = "timeout"
        elif now >= next_look:
            killed = _broken_limit(request, worker, work, directory, inherited)
            # Not to be foreseen: a script could keep the limits at the looks alone.
            next_look = time.monotonic() + random.SystemRandom().uniform(0, 2 * POLL_SECONDS)
    seconds = time.monotonic() - start
    status, usage = _kill_children([worker]).get(worker, (None, None))
    for descriptor, output in outputs.items():  # everyone is dead: this is the last of it
        os.set_blocking(descriptor, False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(descriptor, 1 << 16):
                output.add(data)
    for descriptor in (stdout, stderr, ready, pidfd):
        os.close(descriptor)
    exit_code = None if status is None else os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime if usage else 0.0
    if not killed and exit_code in (-signal.SIGXCPU, -signal.SIGKILL):
        killed = "cpu" if cpu > request["cpu_seconds"] else ""  # RLIMIT_CPU came first
    submission, problem = b"", ""
    if exit_code == 0 and not killed:
        submission, problem = _collect(directory, request["submission_bytes"])
    facts = {
        "killed": killed, "said": said.decode("utf-8", "replace"), "problem": problem,
        "exit_code": exit_code, "stuck": status is None, "seconds": seconds, "cpu_seconds": cpu,
    }
    return facts, outputs[stdout].kept(), outputs[stderr].kept(), submission


def _process_facts(pid: int) -> dict:
    """State, parent, resident bytes, CPU seconds and threads; read after the last bracket, since
    the name in brackets is the script's to choose."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    memory = int(fields[21]) * resource.getpagesize()
    return {"state": fields[0], "parent": int(fields[1]), "threads": int(fields[17]), "cpu": cpu,
            "memory": memory}


def _living_thread(pid: int) -> tuple[int, dict]:
    """A thread through which /proc shows the process, and its facts. The first thread shows nothing
    once it has ended, though others may go on. Raises OSError when none lives."""
    for thread in map(int, os.listdir(f"/proc/{pid}/task")):
        with contextlib.suppress(OSError):
            if (facts := _process_facts(thread))["state"] not in (b"Z", b"X"):
                return thread, facts
    raise ProcessLookupError(pid)


def _broken_limit(request: dict, worker: int, work: str, directory: int, inherited: int) -> str:
    """The name of the limit that the run has broken, "" for none."""
    stopped_itself = _stopped(worker, 0.0)
    os.kill(worker, signal.SIGSTOP)  # we could miss what moves
    try:
        _stopped(worker, STOP_SECONDS)  # a thread that is busy in the kernel is not waited for
        thread, facts = _living_thread(worker)
        if facts["memory"] - inherited > request["memory_mb"] << 20:
            return "memory"
        if facts["cpu"] > request["cpu_seconds"]:
            return "cpu"
        if facts["threads"] > request["max_threads"]:
            return "threads"
        limit, (size, files) = request["disk_mb"] << 20, _disk_usage(directory)
        if files > MAX_FILES:
            return "files"
        over = size > limit or size + _unlinked_usage(thread, request["uid"], work) > limit
        return "disk" if over else ""
    except OSError:
        return ""  # it has just ended, the pidfd says so as well; or it moved: the next look tells
    finally:
        if not stopped_itself:
            os.kill(worker, signal.SIGCONT)


def _stopped(worker: int, patience: float) -> bool:
    """Whether all threads of our child stand still; waits for it, at most `patience` seconds."""
    deadline = time.monotonic() + patience
    events = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (event := os.waitid(os.P_PID, worker, events)) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.0005)
    return event.si_code == os.CLD_STOPPED


def _disk_usage(directory: int, depth: int = 0) -> tuple[int, int]:
    """(bytes, files) below an open directory; no path, which can be too long, no link followed.
    Stops early when they are too many, too deep, or cannot be listed. Raises OSError where one
    vanishes meanwhile."""
    size = files = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            facts = entry.stat(follow_symlinks=False)
            size, files = size + facts.st_blocks * 512, files + 1
            if stat.S_ISDIR(facts.st_mode):
                if depth == MAX_DEPTH:
                    return size, MAX_FILES + 1
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                try:
                    below = os.open(entry.name, flags, dir_fd=directory)
                except PermissionError:
                    return size, MAX_FILES + 1
                try:
                    more = _disk_usage(below, depth + 1)
                finally:
                    os.close(below)
                size, files = size + more[0], files + more[1]
            if files > MAX_FILES:
                break
    return size, files


def _unlinked_usage(thread: int, uid: int, work: str) -> int:
    """Bytes of files that were unlinked and are still open; unlimited where one is only mapped into
    memory, its descriptor closed: its size cannot be seen."""
    size = 0
    try:
        if uid:  # /proc lets only the same user look
            os.setegid(uid)
            os.seteuid(uid)
        with open(f"/proc/{thread}/maps", "rb") as maps:
            mapped = {int(line.split()[4]) for line in maps  # inodes
                      if work.encode() in line and line.endswith(b" (deleted)\n")}
        for name in os.listdir(f"/proc/{thread}/fd"):
            facts = os.stat(f"/proc/{thread}/fd/{name}")
            if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 0:
                size += facts.st_blocks * 512
                mapped.discard(facts.st_ino)
    finally:
        if uid:
            os.seteuid(0)
            os.setegid(0)
    return sys.maxsize if mapped else size


def _kill_children(known: list[int]) -> dict[int, tuple]:
    """SIGKILL our children, adopted orphans too, until none is left: {pid: (status, rusage)}."""
    ended: dict[int, tuple] = {}
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        for pid in known:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while (reaped := os.wait4(-1, os.WNOHANG))[0]:
                ended[reaped[0]] = reaped[1:]
        except ChildProcessError:
            return ended
        time.sleep(0.0005)
        known = _children()
    return ended


def _children() -> list[int]:
    """Pids of our direct children, zombies too."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if _process_facts(int(name))["parent"] == os.getpid():
                found.append(int(name))
        except OSError:
            continue
    return found


def _collect(directory: int, limit: int) -> tuple[bytes, str]:
    """The submission's bytes, or b"" and why not. No process of the run is left by now."""
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
            return b"", f"too large: submission.csv has {facts.st_size} bytes of at most {limit}"
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit), ""
    finally:
        os.close(descriptor)


def remove_tree(path: str) -> None:
    """Remove a directory that hostile code filled: any depth, any mode, no link followed.

    What is nested is first moved to the top directory, so that no path gets long.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        top = os.open(path, flags)
    except OSError:
        return
    names = ["."]
    for name in names:  # grows while we go
        try:
            here = os.open(name, flags, dir_fd=top)
        except OSError:
            continue
        with os.scandir(here) as entries:
            listing = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for child, is_directory in listing:
            with contextlib.suppress(OSError):
                if is_directory:
                    os.chmod(child, 0o700, dir_fd=here)
                    names.append(child if name == "." else secrets.token_hex(12))
                    if name != ".":
                        os.rename(child, names[-1], src_dir_fd=here, dst_dir_fd=top)
                else:
                    os.unlink(child, dir_fd=here)
        os.close(here)
        if name != ".":
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=top)
    os.close(top)
    with contextlib.suppress(OSError):
        os.rmdir(path)


# -- The fork server: imports the libraries once, forks a nanny for every request -----------------

PRELOAD = (
    "numpy", "pandas", "scipy.sparse", "scipy.stats",
    *(f"sklearn.{name}" for name in (
        "base", "calibration", "cluster", "compose", "decomposition", "discriminant_analysis",
        "dummy", "ensemble", "feature_selection", "gaussian_process", "impute",
        "kernel_approximation", "kernel_ridge", "linear_model", "metrics", "model_selection",
        "naive_bayes", "neighbors",
        "neural_network", "pipeline", "preprocessing", "svm", "tree",
    )),
)


def _serve(control: socket.socket) -> None:
    """The fork server's life: set-up, hello, a nanny for every message, until the owner is gone."""
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
        hello = {name: getattr(setup, name)
                 for name in ("root", "layers", "roots", "uid_base", "landlock_abi")}
        hello |= {"problem": problem, "failed": failed}
        control.send(json.dumps(hello).encode())
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
            except OSError as error:  # no process to be had
                with channel, contextlib.suppress(OSError):  # the owner may be gone
                    _send(channel, _not_started(error))
                continue
            if pid == 0:
                try:
                    control.close()
                    _nanny(setup, channel)
                except EOFError:
                    pass  # the owner is gone
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            nannies.add(pid)
            channel.close()
    finally:
        for pid in nannies:
            os.kill(pid, signal.SIGTERM)  # they kill their workers and clean up
        deadline = time.monotonic() + 0.5
        while nannies and time.monotonic() < deadline:
            _reap(nannies, root)
            time.sleep(0.005)
        _kill_children(list(nannies))
        remove_tree(root)


def _reap(nannies: set[int], root: str) -> None:
    """Collect ended nannies; one that was killed leaves a directory and orphans, now ours."""
    with contextlib.suppress(ChildProcessError):
        while (reaped := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = reaped
            if pid not in nannies:
                continue
            nannies.discard(pid)
            if status:
                for child in set(_children()) - nannies:
                    os.kill(child, signal.SIGKILL)
                remove_tree(os.path.join(root, str(pid)))


def _make_scratch(parent: str) -> str:
    """A fresh directory, locked while we or a nanny live. Unlocked ones are left-overs: remove."""
    for path in Path(parent).glob("acegrpo-sandbox-*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_uid == os.geteuid():
                remove_tree(str(path))
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
    fresh = tempfile.mkdtemp(prefix="acegrpo-new-", dir=parent)
    fcntl.flock(os.open(fresh, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX)
    root = fresh.replace("acegrpo-new-", "acegrpo-sandbox-")
    os.rename(fresh, root)  # only now may others look at it
    os.chmod(root, 0o711)  # a slot's uid must pass, and must not list
    return os.path.realpath(root)


def _preload(modules: list[str]) -> dict[str, str]:
    """Import, nothing more: after an OpenMP region of two threads, forks hang in a fit."""
    failed = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = _one_line(error)
    if "sklearn.utils.validation" in sys.modules and "pandas" in sys.modules:
        # At the first data frame, and at the first thing that is none, scikit-learn looks for data
        # frame plug-ins among all installed packages: 30 ms here, or in every script.
        check_array, frame = sys.modules["sklearn.utils.validation"].check_array, [[0.0]]
        check_array(sys.modules["pandas"].DataFrame(frame))
        check_array(frame)
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the shared pages
    return failed


def _find_layers(config: dict, root: str) -> tuple[Setup, str]:
    """What this machine can do, and why that is not enough ("" when it is)."""
    canary = os.path.join(root, "canary")
    Path(canary).write_text("no script may read this\n")
    os.chmod(canary, 0o644)
    abi, missing = landlock_abi(), {}
    if abi < 1:
        missing["landlock"] = "this kernel has no Landlock (Linux 5.13 or newer, lsm=landlock)"
    if _libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) < 0:
        missing["seccomp"] = "this kernel has no seccomp filters"
    for layer in {"landlock", "seccomp"} - set(config["layers"]) - set(missing):
        missing[layer] = f"{layer} was switched off"
    layers = tuple(layer for layer in config["layers"] if layer not in missing)
    uid_base = 61000 + os.getpid() % 60 * 64
    if os.geteuid() != 0 or not _can_drop_to(uid_base, root, canary):
        uid_base = 0
    setup = Setup(layers, root, canary, readable_roots(), abi, uid_base,
                  seccomp_program(_MACHINE), seccomp_program(_MACHINE, gpu=True))
    return setup, "" if config["unsafe"] else "; ".join(missing.values())


def _can_drop_to(uid: int, root: str, canary: str) -> bool:
    """May we own files and processes of `uid`, and can it read Python? Try all that a run needs."""
    home = os.path.join(root, "probe")
    os.mkdir(home, 0o700)
    try:
        os.chown(home, uid, uid)
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _drop_to(uid)
                needed = os.__file__, np.__file__, sys.executable, canary
                os.write(tell, b"y" if all(os.access(path, os.R_OK) for path in needed) else b"n")
                time.sleep(10)
            finally:
                os._exit(1)
        os.close(tell)
        answer = os.read(ready, 1)
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.mkdir(os.path.join(home, "x"))
        os.rmdir(os.path.join(home, "x"))
        os.chmod(home, 0o755)
        return answer == b"y"
    except OSError:  # a root without these capabilities
        return False
    finally:
        os.rmdir(home)


@functools.cache  # public data do not change
def _readable_by_others(directory: Path) -> bool:
    """May an unrelated uid read this directory and all that is below it?"""
    def open_to_all(path: Path) -> bool:
        mode = path.lstat().st_mode  # a link's own, which says yes: scripts cannot follow it out
        return bool(mode & 0o004 and (mode & 0o001 or not stat.S_ISDIR(mode)))

    return all(parent.stat().st_mode & 0o001 for parent in directory.parents) and all(
        map(open_to_all, itertools.chain([directory], directory.rglob("*"))))


# -- The owner's side: a pool that rollout threads share ------------------------------------------


class Sandbox:
    """A thread-safe pool of isolated executions; `problem` says why it refuses runs, "" if not.

    slots         runs at the same time; further callers of run() wait
    timeout       wall-clock seconds of a run
    cpu_seconds   CPU seconds of a run, all threads together (None: timeout * threads)
    memory_mb     what a run may add to the memory of the preloaded libraries
    file_mb       size of one file; disk_mb: of all files together
    threads       OpenMP and BLAS threads of a run
    gpus          a CUDA_VISIBLE_DEVICES value for each slot ("" or None: no GPU). Such runs may
                  use /dev/nvidia* with any ioctl, and have no RLIMIT_AS, which CUDA cannot bear
    preload       modules that the fork server imports; any other still imports, only slower
    layers        leave one out (tests do); then, or where one is missing, runs are refused unless
    unsafe        is set: then they run with what there is, and Execution.isolation says so
    seed          with the code, the seed of a run's random generators
    attempts      of a run whose sandbox dies under it (the OOM killer, an operator), or that cannot
                  be started or isolated: that need not be the script's doing. They are 1, 2, 4, ...
                  seconds apart
    scratch       where work directories are made (default: the temporary directory)
    delay         mean seconds of an exponential sleep before each run, in its slot: scripts that
                  take long without using this machine, to measure asynchrony with
    reuse_mb      memory for results: a script that comes again on the same competition, byte for
                  byte, gets what its first complete run gave (0: every script is run). Equal
                  scripts that come at the same time wait for one run. Exact on CPUs (see `seed`)
                  for scripts that neither look at the clock nor ask the system for randomness,
                  as numpy.random.default_rng() without a seed does
    """

    def __init__(
        self, slots: int = 2, timeout: float = 30.0, cpu_seconds: float | None = 10.0,
        memory_mb: int = 2048, file_mb: int = 64, disk_mb: int = 256, threads: int = 1,
        gpus: list[str] | None = None, preload: tuple[str, ...] = PRELOAD,
        layers: tuple[str, ...] = ("landlock", "seccomp"), unsafe: bool = False, seed: int = 0,
        scratch: str | None = None, delay: float = 0.0, attempts: int = 1, reuse_mb: float = 0.0,
    ):
        positive = {"slots": slots, "timeout": timeout, "cpu_seconds": cpu_seconds or 1,
                    "memory_mb": memory_mb, "threads": threads, "attempts": attempts}
        for name, value in positive.items():
            if not 0 < value <= 1e9:
                raise ValueError(f"{name} must be above 0, and 1e9 at most, not {value}")
        if gpus and len(gpus) != slots:
            raise ValueError(f"gpus must have one entry for each of the {slots} slots")
        self.slots, self.timeout, self.cpu_seconds = slots, timeout, cpu_seconds
        self.threads, self.gpus, self.seed = threads, gpus, seed
        self.attempts, self.delay, self._delays = attempts, delay, random.Random(seed)
        self.reuse_bytes, self._known_bytes = int(reuse_mb * 2**20), 0
        self._known: OrderedDict[tuple, Execution] = OrderedDict()  # complete runs
        self._running: dict[tuple, Future] = {}  # becomes the Execution, or None if not complete
        self._known_lock = threading.Lock()  # guards these three
        self._limits = {
            "memory_mb": memory_mb, "file_mb": file_mb, "disk_mb": disk_mb,
            "max_threads": 64 + 8 * threads,
        }
        self._config = {
            "owner": os.getpid(), "scratch": scratch or tempfile.gettempdir(), "unsafe": unsafe,
            "preload": list(preload), "layers": list(layers),
        }
        self.problem = ""
        self.hello: dict = {}  # what the fork server found: layers, uid_base, failed imports, ...
        self.restarts = 0
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        self._changed = threading.Condition()  # guards what follows, and `problem`
        self._control: socket.socket | None = None
        self._process: subprocess.Popen | None = None
        self._closed = False
        self._retired = 0  # slots that are lost to a process that does not die
        if sys.platform != "linux" or _MACHINE not in ("x86_64", "aarch64"):
            self.problem = f"no isolation on {sys.platform} {_MACHINE}: use a Linux container or VM"
            return
        # The fork server dies with the thread that started it (PDEATHSIG): give it one that stays.
        self._keeper = threading.Thread(target=self._keep, name="sandbox-keeper", daemon=True)
        self._keeper.start()
        with self._changed:
            self._changed.wait_for(lambda: self._control or self.problem)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs, end the fork server, remove its files. May be called twice."""
        with self._changed:
            self._closed = True
            self.problem = self.problem or "the sandbox is closed"
            if self._control:
                self._control.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()
        if self._process:
            self._keeper.join(60)  # a machine without time to spare cleans up slowly

    @property
    def isolation(self) -> str:
        """The layers in force: "landlock+seccomp", or "unsafe (...)" when one is missing."""
        layers = "+".join(self.hello.get("layers", ()))
        return layers if layers == "landlock+seccomp" else f"unsafe ({layers or 'nothing'})"

    def run(self, competition: Competition, code: str, timeout: float | None = None) -> Execution:
        """Execute `code` with ./input = the public data and grade its ./submission.csv.

        Blocks until a slot is free. timeout overrides the wall-clock limit. Never raises for what
        the script does.
        """
        if not self.reuse_bytes:
            return self._run(competition, code, timeout)
        key, kept = (competition.public_dir, timeout, code), None
        with self._known_lock:
            if key in self._known:
                self._known.move_to_end(key)  # the last used stands last
                return dataclasses.replace(self._known[key], reused=True)
            first = key not in self._running
            future = self._running.setdefault(key, Future())
        if not first and (known := future.result()):  # it waits for the one that runs now
            return dataclasses.replace(known, reused=True)
        try:
            execution = self._run(competition, code, timeout)
            kept = execution if execution.complete else None
            return execution
        finally:
            if first:
                with self._known_lock:
                    del self._running[key]
                    if kept:
                        self._remember(key, kept)
                future.set_result(kept)

    def _remember(self, key: tuple, execution: Execution) -> None:
        """Keep a result; those used longest ago make room for it."""
        def size(key, run):
            return 2048 + sum(map(len, (key[-1], run.stdout_tail, run.stderr_tail,
                                        run.submission or b"")))

        self._known[key] = execution
        self._known_bytes += size(key, execution)
        while self._known_bytes > self.reuse_bytes:
            self._known_bytes -= size(*self._known.popitem(last=False))

    def _run(self, competition: Competition, code: str, timeout: float | None) -> Execution:
        problem = self.problem or self._exposed(competition)
        if problem:
            return Execution("refused", reason=problem, isolation=self.isolation)
        if len(code) > MAX_CODE:
            problem = f"the script has more than {MAX_CODE} characters"
            return Execution("error", reason=problem, isolation=self.isolation)
        for attempt in range(self.attempts):
            slot, stuck = self._free.get(), False
            if slot is None:
                self._free.put(None)  # for the next one that waits
                return Execution("refused", reason=self.problem, isolation=self.isolation)
            try:
                if self.delay:
                    time.sleep(self._delays.expovariate(1 / self.delay))
                facts, blobs = self._execute(slot, competition, code, timeout or self.timeout)
                stuck = facts.get("stuck", False)
            finally:
                if stuck:  # whatever survives SIGKILL keeps its slot: no run may share it
                    self._retire_slot()
                else:
                    self._free.put(slot)
            again = facts["killed"] in ("lost", "orphaned", "refused") and not self.problem
            if attempt + 1 == self.attempts or not again:
                return self._judge(competition, facts, *blobs)
            with self._changed:  # what the machine lacks may come back
                self._changed.wait_for(lambda: self.problem, 2.0**attempt)

    def _retire_slot(self) -> None:
        with self._changed:
            self._retired += 1
            if self._retired == self.slots:
                self.problem = "every slot holds a process that SIGKILL does not end"
                self._free.put(None)

    def _exposed(self, competition: Competition) -> str:
        """The answers must not lie where every script may read."""
        for root in (*self.hello.get("roots", ()), competition.public_dir.resolve()):
            if competition.answers.is_relative_to(root):
                return f"the answers of {competition.id!r} lie in {root}, which scripts may read"
        return ""

    def _execute(
        self, slot: int, competition: Competition, code: str, timeout: float
    ) -> tuple[dict, list[bytes]]:
        data = code.encode("utf-8", "replace")
        digest = hashlib.sha256(struct.pack("q", self.seed) + data).digest()
        request = {
            "slot": slot, "timeout": timeout, "seed": int.from_bytes(digest[:4], "big"),
            "cpu_seconds": self.cpu_seconds or timeout * self.threads,
            "public": str(public := competition.public_dir.resolve()),
            "readable": bool(self.hello["uid_base"]) and _readable_by_others(public),
            "submission_bytes": competition._sample.max_bytes,
            "gpu": self.gpus[slot] if self.gpus else "", **self._limits,
        }
        # A whole submission must fit into one file, as large as the competition wants it.
        request["file_mb"] = max(request["file_mb"], 1 + (request["submission_bytes"] >> 20))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                self._hand_over(theirs)
                theirs.close()
                ours.settimeout(timeout + KILL_SECONDS + 60)
                with contextlib.suppress(ConnectionError):  # refused unread? Then it says why
                    _send(ours, request, data)
                return _receive(ours)
            except (OSError, EOFError) as error:
                return {"killed": "lost", "said": _one_line(error)}, []

    def _hand_over(self, channel: socket.socket) -> None:
        """Give the fork server its end of a run's socket; wait for a successor when it has died."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._control or self.problem)
                if self.problem:
                    raise OSError(self.problem)
                try:
                    socket.send_fds(self._control, [b"run"], [channel.fileno()])
                    return
                except OSError:  # dead, or else it has to be: the keeper waits for its end
                    with contextlib.suppress(OSError):
                        self._control.shutdown(socket.SHUT_RDWR)
                    self._control = None

    def _judge(
        self, competition: Competition, facts: dict,
        out: bytes = b"", err: bytes = b"", submission: bytes = b"",
    ) -> Execution:
        stdout, stderr = out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
        known = {
            "exit_code": facts.get("exit_code"), "seconds": facts.get("seconds", 0.0),
            "cpu_seconds": facts.get("cpu_seconds", 0.0), "stdout_tail": stdout,
            "stderr_tail": stderr, "validation_score": _validation_score(stdout),
            "isolation": self.isolation,
        }
        status, reason = self._status(facts, stderr)
        if status != "ok":
            return Execution(status, reason=reason, **known)
        grade = dataclasses.asdict(competition.grade(submission))
        status = "ok" if grade["valid"] else "invalid"
        return Execution(status, submission=submission, **known, **grade)

    def _status(self, facts: dict, stderr: str) -> tuple[str, str]:
        """(status, reason) before grading."""
        killed, exit_code, limits = facts["killed"], facts.get("exit_code"), self._limits
        if killed == "refused":
            what = facts["said"] or "the worker died in set-up"
            return "refused", f"the script could not be started in isolation: {what}"
        if killed in ("lost", "orphaned"):
            if self.problem:  # it was closed, or does not start again: no fault of the script's
                return "refused", f"the run was not completed: {self.problem}"
            what = "the sandbox process was killed in the middle of the run"
            return "error", f"{what} {facts['said']}".strip() if killed == "lost" else what
        if killed == "timeout":
            return "timeout", f"stopped at the wall-clock limit after {facts['seconds']:.1f} s"
        if killed == "cpu":
            return "timeout", f"stopped at the CPU limit after {facts['cpu_seconds']:.1f} s of CPU"
        if killed == "memory":
            return "memory", f"stopped at the memory limit of {limits['memory_mb']} MB"
        if killed:
            what = {
                "threads": f"{limits['max_threads']} threads",
                "files": f"{MAX_FILES} files in {MAX_DEPTH} levels of directories that "
                         "can be listed",
                "disk": f"{limits['disk_mb']} MB of disk",
            }[killed]
            return "error", f"stopped at the limit of {what}"
        last = _one_line(stderr.strip().rpartition("\n")[2])
        if exit_code and re.match(r"(\w+\.)*_?(Array)?MemoryError\b", last):
            return "memory", f"out of memory (limit {limits['memory_mb']} MB): {last}"
        if exit_code and "std::bad_alloc" in stderr[-2000:]:
            return "memory", f"out of memory (limit {limits['memory_mb']} MB)"
        if exit_code and exit_code < 0:
            hint = ", perhaps by the kernel for want of memory" if exit_code == -9 else ""
            names = {number: number.name for number in signal.Signals}  # not all have one
            return "error", f"killed by {names.get(-exit_code, f'signal {-exit_code}')}{hint}"
        if exit_code:
            return "error", last or f"exit code {exit_code}"
        if facts["problem"]:
            large = facts["problem"].startswith("too large")
            return "invalid" if large else "no_submission", facts["problem"]
        return "ok", ""

    def _keep(self) -> None:
        """The keeper thread: start the fork server, wait for its end, start it again.

        Three failed starts in a row are final.
        """
        failures = 0
        while not self.problem:
            control = self._start()
            with self._changed:
                failures = 0 if control else failures + 1
                if control and self._closed:  # while it was starting
                    control.shutdown(socket.SHUT_RDWR)
                elif control:
                    self._control, self.problem = control, self.hello["problem"]
                elif failures >= 3:
                    self.problem = "the fork server does not start (its message is on stderr)"
                self._changed.notify_all()
            if not control:
                with self._changed:  # what the machine lacks may come back within a second
                    self._changed.wait_for(lambda: self.problem, 1)
                continue
            with contextlib.suppress(ConnectionResetError):
                control.recv(1)  # it never speaks again: this waits for its end
            with self._changed:
                self._control = None
            self._process.wait()
            control.close()
            remove_tree(self.hello["root"])  # if it was killed; its nannies clean up as well
            self.restarts += not self._closed

    def _start(self) -> socket.socket | None:
        """Execute (not fork: this process may have threads and secrets) a fork server."""
        environment = dict.fromkeys(
            [f"{name}_NUM_THREADS" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "NUMBA")]
            + ["LOKY_MAX_CPU_COUNT"], str(self.threads),
        )
        environment |= {
            "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "USER": "script", "LOGNAME": "script",
            "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore", "JOBLIB_MULTIPROCESSING": "0",
            "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        }
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        # -P -s and the bare environment do what -I would, which ignores PYTHONHASHSEED.
        command = [sys.executable, "-P", "-s", "-B", os.path.abspath(__file__), "serve"]
        ours = process = None
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                process = self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/",
                    start_new_session=True,
                )
            ours.send(json.dumps(self._config).encode())
            self.hello = json.loads(ours.recv(1 << 20))
            return ours
        except (OSError, ValueError) as error:
            if ours:
                ours.close()
            if process:  # it has said what is wrong
                process.wait()
            else:
                print(f"sandbox: the fork server does not start: {error}", file=sys.stderr)
            return None


def _validation_score(stdout: str) -> float | None:
    """The last "validation score: <float>" that was printed; None unless a finite number."""
    said = re.findall(r"validation score:[ \t]*(\S+)", stdout, re.IGNORECASE)
    if not said or not _NUMBER.fullmatch(said[-1]):
        return None
    return float(said[-1]) if math.isfinite(float(said[-1])) else None


# -- Commands -------------------------------------------------------------------------------------

_PROOFS = {  # what each layer must stop; a script that is denied it says so
    "landlock: the answers": "open({answers!r}).read()",
    "landlock: listing the root": "import os; os.listdir('/')",
    "landlock: writing the public data": "open('input/x', 'w')",
    "landlock: the owner's environment": "open('/proc/{owner}/environ').read()",
    "seccomp: network": "import socket; socket.socket()",
    "seccomp: a process": "import os; os.fork()",
    "seccomp: another program": "import os; os.execv('/bin/true', ['true'])",
    "seccomp: a signal to the owner": "import os; os.kill({owner}, 0)",
}
_GOOD = "import shutil; shutil.copy('input/sample_submission.csv', 'submission.csv')"


def selftest() -> dict:
    """Which layers this machine has, and a proof of each: a script that tries to break it."""
    with tempfile.TemporaryDirectory() as folder, Sandbox(slots=1) as sandbox:
        competition = _toy_competition(Path(folder))
        report = {key: sandbox.hello.get(key) for key in ("landlock_abi", "uid_base", "failed")}
        report |= {"isolation": sandbox.isolation, "problem": sandbox.problem, "proofs": {}}

        def prove(name: str, code: str, expected: Callable[[Execution], bool]) -> None:
            run = sandbox.run(competition, code, timeout=20.0 if "limit" not in name else 2.0)
            report["proofs"][name] = "holds" if expected(run) else f"FAILS: {run}"

        if not sandbox.problem:
            prove("a good script is graded", _GOOD, lambda run: run.status == "ok")
            for name, attempt in _PROOFS.items():
                attempt = attempt.format(answers=str(competition.answers), owner=os.getpid())
                code = f"try:\n    {attempt}\nexcept PermissionError:\n    print('denied')"
                prove(name, code, lambda run: run.stdout_tail == "denied\n")
            sleep, hoard = "import time; time.sleep(99)", "x = bytearray(1 << 33)"
            prove("limit: wall clock", sleep, lambda run: run.status == "timeout")
            prove("limit: memory", hoard, lambda run: run.status == "memory")
        report["ok"] = not report["problem"] and set(report["proofs"].values()) == {"holds"}
        return report


def _toy_competition(folder: Path) -> Competition:
    """The smallest competition that loads."""
    files = {
        "config.yaml": "id: toy\ngrader: {grade_fn: 'file:grade.py:grade'}\ndataset:\n"
        "  answers: toy/prepared/private/test.csv\n"
        "  sample_submission: toy/prepared/public/sample_submission.csv\n",
        "description.md": "Predict y.\n",
        "grade.py": "def grade(submission, answers):\n"
        "    return (submission.y == answers.y).mean()\n",
        "leaderboard.csv": "score\n1.0\n0.5\n0.0\n",
        "prepared/public/sample_submission.csv": "id,y\n1,0\n2,0\n",
        "prepared/private/test.csv": "id,y\n1,0\n2,1\n",
    }
    for name, text in files.items():
        path = folder / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Competition.load(folder / "toy")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a script in isolation and grade its submission. Prints one JSON object.",
        epilog="Exit status: 0 the sandbox did its job, whatever the script did; 2 bad arguments; "
        "3 isolation is not available.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute one script and grade what it submits")
    run.add_argument("script", type=Path, help="it sees ./input and writes ./submission.csv")
    add = run.add_argument
    add("--timeout", type=float, default=30.0, metavar="S",
        help="wall-clock limit, seconds (default 30)")
    add("--cpu-seconds", type=float, metavar="S",
        help="CPU limit, seconds (default: timeout * threads)")
    add("--memory-mb", type=int, default=2048, metavar="N", help="memory limit, MB (default 2048)")
    add("--threads", type=int, default=1, metavar="N",
        help="OpenMP and BLAS threads (default 1)")
    add("--reward", default="rank", choices=("rank", "milestone", "medal"),
        help="reward to report")
    add("--unsafe", action="store_true", help="run even where isolation is missing")
    grade = commands.add_parser("grade", help="grade a submission without running anything")
    grade.add_argument("submission", type=Path, help="a submission.csv")
    for command in (run, grade):
        text = "directory of the competition, or an id of MLE-bench with --data-dir"
        command.add_argument("--competition", required=True, metavar="DIR", help=text)
        text = "where `mlebench prepare` has put its data"
        command.add_argument("--data-dir", metavar="DIR", help=text)
    commands.add_parser("selftest", help="print which layers this machine has and prove each")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "selftest":
        report = selftest()
        print(json.dumps(report, indent=2))
        return 0 if report["ok"] else 3
    try:
        if options.data_dir:
            competition = Competition.from_mlebench(options.competition, options.data_dir)
        else:
            competition = Competition.load(options.competition)
        if options.command == "grade":
            grade = competition.grade(options.submission.read_bytes())
            print(json.dumps({"competition_id": competition.id} | dataclasses.asdict(grade)))
            return 0
        code = options.script.read_text(encoding="utf-8", errors="replace")
        with Sandbox(
            1, options.timeout, options.cpu_seconds, options.memory_mb, threads=options.threads,
            unsafe=options.unsafe,
        ) as sandbox:
            execution = sandbox.run(competition, code)
    except (OSError, ValueError) as error:  # a CompetitionError is a ValueError
        print(f"sandbox.py: error: {_one_line(error)}", file=sys.stderr)
        return 2
    if execution.isolation.startswith("unsafe") and execution.status != "refused":
        print(f"sandbox.py: WARNING: isolation: {execution.isolation}", file=sys.stderr)
    facts = dataclasses.asdict(execution) | {"reward": base_reward(execution, options.reward)}
    del facts["submission"], facts["reused"]
    print(json.dumps(facts))
    return 3 if execution.status == "refused" else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:  # the fork server, started by Sandbox
        with contextlib.suppress(ConnectionError):  # the owner is gone
            _serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            sys.exit(130)
