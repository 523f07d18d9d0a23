"""Tests of sandbox.py: loading, grading, rewards, execution, and what is left behind.

    python -m pytest tests/test_sandbox.py         # attacks: tests/test_sandbox_attacks.py
    FUZZ=20000 python -m pytest tests/test_sandbox.py -k "fuzz or heavy"    # at length, and timed
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import psutil
import pytest
from hypothesis import strategies as st

import sandbox as module
from sandbox import (
    Competition, CompetitionError, Execution, Sample, Sandbox, SubmissionError, _fields_of_rows,
    base_reward, code_key, load_competitions, medal_ranks, read_submission, seccomp_program,
    step_reward,
)  # fmt: skip
from test_sandbox_attacks import make_competition

FUZZ = int(os.environ.get("FUZZ", "300"))
LIGHT = {"preload": ("numpy",)}  # a fork server that starts at once
GOOD = "import shutil; shutil.copy('input/sample_submission.csv', 'submission.csv')\n"


@pytest.fixture
def competition(tmp_path):
    return make_competition(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One sandbox and one competition for the tests that do not mind company."""
    competition = make_competition(tmp_path_factory.mktemp("shared"))
    with Sandbox(slots=2, timeout=300, cpu_seconds=60) as sandbox:
        if sandbox.problem:
            pytest.skip(sandbox.problem)
        yield lambda code, **options: sandbox.run(competition, code, **options)


def wait_until(condition, seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


# ------------------------------------------------------------------------------------------------
# Competitions and grades


def test_load_reads_every_field(competition, tmp_path):
    assert (competition.id, competition.name, competition.description) == (
        "toy",
        "Toy",
        "Predict y.",
    )
    assert competition.public_dir == tmp_path / "toy/prepared/public"
    assert not competition.lower_is_better and competition.leaderboard[0] == 1.0
    assert (competition.gold, competition.silver, competition.bronze) == (
        1 - 11 / 1000,
        1 - 49 / 1000,
        1 - 99 / 1000,
    )
    assert competition.median == pytest.approx(0.5005)


def test_load_with_the_data_elsewhere_as_mlebench_keeps_it(tmp_path):
    make_competition(tmp_path / "registry")
    (tmp_path / "data/toy").mkdir(parents=True)
    (tmp_path / "registry/toy/prepared").rename(tmp_path / "data/toy/prepared")
    competition = Competition.load(tmp_path / "registry/toy", data=tmp_path / "data")
    assert competition.answers == tmp_path / "data/toy/prepared/private/test.csv"


def test_a_renamed_competition_directory_still_loads(tmp_path):
    make_competition(tmp_path)
    (tmp_path / "toy").rename(tmp_path / "other")
    assert (
        Competition.load(tmp_path / "other").answers == tmp_path / "other/prepared/private/test.csv"
    )


def edit(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("config.yaml", None, "config.yaml: missing"),
        ("config.yaml", lambda t: t + "\n  bad: [1\n", r"config.yaml: line \d+: not valid YAML"),
        ("config.yaml", lambda t: "- a\n- b\n", "must be a mapping"),
        ("config.yaml", lambda t: edit(t, "id: toy\n", ""), "field 'id' is missing"),
        ("config.yaml", lambda t: edit(t, "id: toy\n", "id: 7\n"), "field 'id' must be a string"),
        (
            "config.yaml",
            lambda t: re.sub("dataset.*", "dataset: x", t),
            "field 'dataset' must be a mapping",
        ),
        ("config.yaml", lambda t: re.sub("dataset.*", "", t), "field 'dataset' is missing"),
        (
            "config.yaml",
            lambda t: edit(t, "answers: toy", "answer: toy"),
            "field 'answers' is missing",
        ),
        ("config.yaml", lambda t: edit(t, "grade_fn", "fn"), "field 'grade_fn' is missing"),
        ("config.yaml", lambda t: edit(t, "grade.py:grade", "other.py:grade"), "other.py: missing"),
        ("config.yaml", lambda t: edit(t, "grade.py:grade", "grade.py:judge"), "judge"),
        ("config.yaml", lambda t: "\x00", "not valid YAML|cannot be read"),
        ("description.md", None, "description.md: missing file"),
        ("leaderboard.csv", None, "leaderboard.csv: missing file"),
        ("leaderboard.csv", lambda t: edit(t, "score", "points"), "no column 'score'"),
        ("leaderboard.csv", lambda t: "score\n", "no score in it"),
        ("leaderboard.csv", lambda t: t + "\nmany\n", "line 1002: could not convert"),
        ("grade.py", None, "grade.py: missing"),
        ("grade.py", lambda t: "def grade(:\n", "SyntaxError"),
        ("grade.py", lambda t: "import no_such_module\n", "no_such_module"),
        ("prepared/private/test.csv", None, "test.csv: missing file"),
        ("prepared/public/sample_submission.csv", None, "sample_submission.csv: missing file"),
        ("config.yaml", lambda t: t + "\ndescription: 5\n", "'description' must be a string"),
        ("config.yaml", lambda t: re.sub("answers: [^,}]*", "answers: .", t), "toy: missing file"),
        ("config.yaml", lambda t: t + "\nmade: 2020-99-99\n", "config.yaml: not valid YAML: month"),
        ("grade.py", lambda t: "raise SystemExit(3)\n", "grade.py: cannot be loaded: SystemExit"),
        ("grade.py", lambda t: "grade = 5\n", "grade.py: cannot be loaded: .* no function"),
        ("prepared/public", None, "public: missing directory of competition 'toy'"),
        ("prepared/public/sample_submission.csv", lambda t: "", "has no rows"),
        ("prepared/private/test.csv", lambda t: "", "test.csv: the answers .* cannot be read"),
        ("prepared/private/test.csv", lambda t: "id,y\n", "cannot be read: no row in it"),
        ("prepared/private/test.csv", lambda t: b"\x89PNG\xff\xfe\0\n\xff,\xff", "cannot be read"),
    ],
)
def test_a_broken_competition_is_one_line(tmp_path, file, change, message):
    make_competition(tmp_path)
    path = tmp_path / "toy" / file
    if change is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        content = change(path.read_text())
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CompetitionError, match=message) as error:
        Competition.load(tmp_path / "toy")
    assert "\n" not in str(error.value)


def test_a_leaderboard_may_have_a_byte_order_mark_and_long_fields(competition, tmp_path):
    path = tmp_path / "toy/leaderboard.csv"
    rows = path.read_text().replace("\n", f",{'x' * 200_000}\n", 2)
    path.write_text("\ufeff" + rows)
    assert (Competition.load(tmp_path / "toy").leaderboard == competition.leaderboard).all()


def test_load_reads_no_more_of_sample_and_answers_than_their_first_row(tmp_path):
    make_competition(tmp_path)
    for name in ("public/sample_submission.csv", "private/test.csv"):
        with open(tmp_path / "toy/prepared" / name, "a") as file:
            file.truncate(2**36)  # 64 GiB of nothing, which take no space
    assert Competition.load(tmp_path / "toy").id == "toy"


def test_load_competitions(tmp_path):
    with pytest.raises(CompetitionError, match="no such"):
        load_competitions(tmp_path / "nowhere")
    with pytest.raises(CompetitionError, match="no sub-directory"):
        load_competitions(tmp_path)
    make_competition(tmp_path)
    (tmp_path / "notes").mkdir()
    assert [c.id for c in load_competitions(tmp_path)] == ["toy"]
    subprocess.run(["cp", "-r", tmp_path / "toy", tmp_path / "copy"], check=True)
    with pytest.raises(CompetitionError, match="two competitions have the id 'toy'"):
        load_competitions(tmp_path)


def test_medal_ranks_are_those_of_mlebench():
    for n in range(1, 6000):  # its rules as it writes them, with floats
        if n < 100:
            expected = int(n * 0.1), int(n * 0.2), int(n * 0.4)
        elif n < 250:
            expected = 10, int(n * 0.2), int(n * 0.4)
        elif n < 1000:
            expected = 10 + int(n * 0.002), 50, 100
        else:
            expected = 10 + int(n * 0.002), int(n * 0.05), int(n * 0.1)
        assert medal_ranks(n) == tuple(max(1, rank) for rank in expected)


@pytest.mark.parametrize("lower", [True, False])
def test_ranks_and_medals_on_a_board_with_ties(tmp_path, lower):
    make_competition(tmp_path)
    rng = np.random.default_rng(0)
    board = np.sort(rng.integers(0, 40, 57) / 10)
    board = board if lower else board[::-1]
    (tmp_path / "toy/leaderboard.csv").write_text("score\n" + "\n".join(map(str, board)))
    (tmp_path / "toy/grade.py").write_text("def grade(s, a):\n    return s.y.iloc[0]\n")
    competition = Competition.load(tmp_path / "toy")
    assert competition.lower_is_better == lower
    for score in np.arange(-5, 50) / 10:
        beats_or_ties = [
            rank
            for rank, other in enumerate(board, 1)
            if (score <= other if lower else score >= other)
        ]
        human_rank = (len(board) - beats_or_ties[0] + 1) / len(board) if beats_or_ties else 0.0
        medal = "none"
        for name, rank in (("bronze", 22), ("silver", 11), ("gold", 5)):
            if score <= board[rank - 1] if lower else score >= board[rank - 1]:
                medal = name
        grade = competition.grade(
            f"id,y\n{''.join(f'r{i},{score}' + chr(10) for i in range(20))}".encode()
        )
        assert grade.human_rank == pytest.approx(human_rank) and grade.medal == medal
        assert grade.above_median == (
            score < np.median(board) if lower else score > np.median(board)
        )


@pytest.mark.parametrize(
    "body, reason",
    [
        ("raise ValueError('first line\\nsecond line')", "first line second line"),
        ("raise KeyError", "KeyError"),
        ("return None", "finite"),
        ("return float('nan')", "finite"),
        ("return float('inf')", "finite"),
        ("return 'high'", "could not convert"),
        ("return 1 / 0", "division"),
        ("raise SystemExit(3)", "SystemExit"),
        ("answers.drop(columns='y', inplace=True); raise ValueError(len(answers.columns))", "2"),
    ],
)
def test_a_grader_that_refuses(tmp_path, body, reason):
    make_competition(tmp_path)
    (tmp_path / "toy/grade.py").write_text(f"def grade(submission, answers):\n    {body}\n")
    competition = Competition.load(tmp_path / "toy")
    for _ in range(2):  # the second grade sees the same answers
        grade = competition.grade(competition.sample_submission.read_bytes())
        assert (
            not grade.valid
            and grade.score is None
            and reason in grade.reason
            and "\n" not in grade.reason
        )


def test_rewards():
    def run(status="ok", valid=True, human_rank=0.0, medal="none", above=False):
        return Execution(
            status, valid=valid, human_rank=human_rank, medal=medal, above_median=above
        )

    failed = [run(s, False) for s in ("error", "timeout", "memory", "no_submission", "refused")]
    assert {base_reward(e, kind) for e in failed for kind in ("rank", "milestone", "medal")} == {
        0.0
    }
    assert [
        base_reward(run("invalid", False), kind) for kind in ("rank", "milestone", "medal")
    ] == [0.05, 0.05, 0.0]
    assert (
        base_reward(run(human_rank=0.5)) == pytest.approx(0.55)
        and base_reward(run(human_rank=1.0)) == 1.0
    )
    steps = [
        run(),
        run(above=True),
        *(run(medal=m, above=True) for m in ("bronze", "silver", "gold")),
    ]
    assert [base_reward(e, "milestone") for e in steps] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [base_reward(e, "medal") for e in steps] == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    with pytest.raises(ValueError, match="kind"):
        base_reward(run(), "fame")
    # 0.1 for a valid script and what is gained where it takes its parent's place
    assert step_reward(0.5, "improve", 0.7, preferred=False) == 0.1
    assert step_reward(0.9, "improve", 0.7, preferred=False) == 0.1
    assert step_reward(0.7, "crossover", 0.7) == 0.1
    assert step_reward(0.8, "improve", 0.6) == pytest.approx(0.3)
    assert step_reward(0.65, "improve", 0.7) == pytest.approx(0.05)
    assert step_reward(0.5, "improve", 0.7) == 0.0
    assert step_reward(1.0, "improve", 0.1) == pytest.approx(1.0)
    assert step_reward(0.05, "improve", 0.7, preferred=False) == 0.05
    assert step_reward(0.0, "improve", 0.7, preferred=False) == 0.0
    # --reward medal: no medal, as its parent; gold at once
    assert step_reward(0.0, "improve", 0.0) == 0.0 and step_reward(1.0, "improve", 0.0) == 1.0
    assert step_reward(0.5, "debug", 0.0) == 0.5
    assert step_reward(0.5, "debug", 0.0, unchanged=True) == 0.0


@pytest.mark.parametrize(
    "code",
    ["(" * 5000, "-" * 20000 + "1", "a." * 5000 + "a", "+".join("a" * 9000), "x=" * 5000 + "1",
     "[" * 150 + "]" * 150, "\0", "\ud800", "9" * 5000, "f'{" * 300, "if 1:\n" * 120, "x = '''",
     "lambda:" * 5000 + "0", "not " * 5000 + "1", "\N{SNOWMAN}"],
)  # fmt: skip
def test_code_key_survives_hostile_text(code):
    out = []
    thread = threading.Thread(
        target=lambda: out.append((code_key(code), code_key(code), code_key(code + "\nx")))
    )
    thread.start()
    thread.join()
    assert out[0][0] == out[0][1] != out[0][2]


def test_code_key_in_many_threads():
    # What made Python 3.11 raise SystemError: another thread parses while this one's parser waits
    # in a garbage collection, in a finaliser written in Python.
    class Cycle:
        def __init__(self):
            self.me = self

        def __del__(self):
            sum(range(20))

    def key(_):
        for _ in range(50):
            Cycle()
        return code_key(code)

    code = "\n".join(f"def f{i}(x):\n    return [x[{i}].y(z={i}) for x in {i}]" for i in range(60))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(key, range(1200)))) == 1
    finally:
        sys.setswitchinterval(before)


# ------------------------------------------------------------------------------------------------
# Reading submissions

SAMPLE = Sample(("id", "y"), 10, 5_000_000)


@st.composite
def submissions(draw) -> bytes:
    """From nearly right to noise, so that every check is reached."""
    cell = st.one_of(
        st.integers(-5, 5).map(str), st.floats().map(str), st.text(max_size=6),
        st.sampled_from(["", "nan", "inf", "1e400", "1_5", "\u0661", '"', '"a"', '""', '"x\ny"',
                         "\r", "\0", "NA", "True", "0x1", " 1 ", "-", "#", "\\", "'"]),
    )  # fmt: skip
    header = draw(
        st.sampled_from(
            [
                "id,y",
                "id,y",
                "id,y,y",
                "y,id",
                "id",
                "",
                ",",
                "id,",
                "id;y",
                "\ufeffid,y",
                '"id","y"',
                "id,y,z",
                "0,1",
            ]
        )
    )
    rows = draw(st.lists(st.lists(cell, min_size=1, max_size=3), max_size=12))
    newline = draw(st.sampled_from(["\n", "\n", "\r\n", "\r", "\n\n"]))
    data = newline.join([header, *(",".join(row) for row in rows)]).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 4)) == 0:  # flip bytes
        data = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            data.insert(draw(st.integers(0, len(data))), draw(st.integers(0, 255)))
    return bytes(data) * draw(st.sampled_from([1, 1, 1, 2]))


@hypothesis.settings(
    max_examples=FUZZ, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(st.one_of(submissions(), st.binary(max_size=200)))
def test_fuzz_the_reader(data):
    try:
        frame = read_submission(data, SAMPLE)
    except SubmissionError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return
    assert len(set(frame.columns)) == len(frame.columns) <= 20 and len(frame) <= 36


@hypothesis.settings(max_examples=FUZZ, deadline=None)
@hypothesis.given(st.text(alphabet='",\n\ra \N{SNOWMAN}', max_size=60))
def test_fuzz_fields_are_counted_as_the_csv_module_does(text):
    rows = list(csv.reader(io.StringIO(text.rstrip("\r\n"), newline="")))
    expected = [max(len(row), 1) for row in rows] or [1]
    assert _fields_of_rows(text.encode(), 100).tolist() == expected
    assert _fields_of_rows(text.encode(), 3).tolist() == expected[:4]


HEAVY = {  # about 5 MB each
    "equal columns": b"x," * 2_500_000,
    "distinct columns": b",".join(b"c%d" % i for i in range(600_000)),
    "one long row": b"id,y\n" + b"1," * 2_500_000,
    "short rows": b"id,y\n" + b"1,1\n" * 1_250_000,
    "empty rows": b"id,y\n" + b"\n" * 5_000_000,
    "quotes": b"id,y\n" + b'"' * 5_000_000,
    "quoted commas": b'id,y\n"' + b"," * 4_999_990 + b'",1\n',
    "quoted newlines": b'id,y\n"' + b"\n" * 4_999_990 + b'",1\n',
    "quoted cells": b'"x",' * 1_250_000,
    "quoted rows": b"id,y\n1,1\n" + b'"x"\n' * 1_250_000,
    "letters that are quotes": b"id,y\n" + b'1",1"\n' * 830_000,
    "doubled quotes": b"id,y\n" + b'"""",1\n' * 700_000,
    "one long field": b"id,y\n1," + b"9" * 5_000_000,
    "long header": b"x" * 5_000_000,
    "carriage returns": b"id,y\r\n" + b"\r" * 5_000_000,
    "NULs": b"\0" * 5_000_000,
    "spaces": b" " * 5_000_000,
    "commas": b"," * 5_000_000,
    "UTF-8": "\u0661".encode() * 2_500_000,
    "bad UTF-8 at the end": b"id,y\n" + b"1,1\n" * 1_200_000 + b"\xff",
    "legitimate": b"id,y\n" + b"".join(b"r%07d,0.%06d\n" % (i, i) for i in range(263_000)),
    "legitimate text": b"id,y\n"
    + b"".join(b"r%07d,class%03d\n" % (i, i % 999) for i in range(260_000)),
}


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_submissions_are_cheap(name):
    """The memory bound always; the time bound at length (`FUZZ`), with the machine to itself."""
    sample = Sample(("id", "y"), 270_000 if "legitimate" in name else 1000, 6_000_000)
    seconds = []
    for measure_memory in (*[False] * (3 if "FUZZ" in os.environ else 0), True):
        if measure_memory:
            tracemalloc.start()
        start = time.process_time()
        try:
            frame = read_submission(HEAVY[name], sample)
            assert len(frame) >= 260_000 if name.startswith("legitimate") else len(frame) <= 1
        except SubmissionError:
            assert not name.startswith("legitimate")
        seconds.append(time.process_time() - start)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    if "FUZZ" in os.environ:
        assert min(seconds[:-1]) <= 0.2


def test_a_submission_in_every_accepted_form():
    for text in (
        "id,y\na,1\nb,2\n",
        "id,y\r\na,1\r\nb,2\r\n",
        "\ufeffid,y\na,1\nb,2",
        '"id","y"\n"a","1"\n"b",2\n\n',
        "y,id\n1,a\n2,b\n",
    ):
        frame = read_submission(text.encode(), SAMPLE)
        assert list(frame["y"]) == [1, 2] and list(frame["id"]) == ["a", "b"]


def test_the_sample_bounds_the_size(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("id,a\nx,0\ny,1.5\n")
    sample = Sample.read(path)
    assert (sample.columns, sample.rows) == (("id", "a"), 2) and 4096 < sample.max_bytes < 5000
    path.write_text("id,mask\nx,\ny,1 1\n")  # encoded masks are far longer than the sample's
    assert Sample.read(path).max_bytes == 64 << 20
    with pytest.raises(CompetitionError, match="no rows"):
        path.write_text("id,a\n")
        Sample.read(path)


# ------------------------------------------------------------------------------------------------
# The seccomp filter, interpreted for both machines


def verdict(program: bytes, machine: str, number: int, *arguments: int) -> int:
    """A BPF interpreter of the handful of instructions that the filter uses."""
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(machine, 0)
    data = struct.pack("<IIQ6Q", number, architecture, 0, *(*arguments, *[0] * 6)[:6])
    code = [struct.unpack_from("<HBBI", program, i) for i in range(0, len(program), 8)]
    at, value = 0, 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        if operation == 0x20:
            value = struct.unpack_from("<I", data, k)[0]
        elif operation == 0x54:
            value &= k
        elif operation == 0x15:
            at += if_true if value == k else if_false
        elif operation == 0x35:
            at += if_true if value >= k else if_false
        elif operation == 0x06:
            return k
        else:
            raise AssertionError(operation)


ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_decides_as_written(machine):
    program = seccomp_program(machine)
    assert len(program) % 8 == 0 and len(program) // 8 <= 4096
    arm = machine == "aarch64"

    def ask(x86, arm64, *arguments):
        return verdict(program, machine, arm64 if arm else x86, *arguments)

    pid = module._PID
    assert ask(0, 63) == ask(1, 64) == ask(231, 94) == ALLOW  # read, write, exit_group
    assert (
        ask(41, 198, 2, 1) == ask(59, 221) == ask(101, 117) == ask(425 + 1, 426) == EPERM
    )  # socket, execve, ptrace, io_uring
    assert ask(435, 435) == ask(319, 279) == ENOSYS  # clone3, memfd_create
    assert ask(268, 53) == ask(280, 88) == 0x50000  # fchmodat, utimensat pretend
    assert ask(56, 220, 0x3D0F00) == ALLOW and ask(56, 220, 17) == EPERM  # thread, process
    assert ask(56, 220, 0x3D4F00) == EPERM  # a thread that the first one waits for
    assert ask(9, 222, 0, 0, 0, 0x22) == ask(9, 222, 0, 0, 0, 1) == ALLOW  # private; a file's
    assert ask(9, 222, 0, 0, 0, 0x21) == ask(9, 222, 0, 0, 0, 0x23) == EPERM  # shared, anonymous
    assert ask(62, 129, pid, 18) == ask(234, 131, pid, pid, 18) == EPERM  # SIGCONT
    assert ask(285, 47) == 0x5005F  # fallocate: ENOTSUP
    assert ask(56, 220, 0x3D0F00 | 0x10000000) == EPERM and ask(56, 220, 0x3D0F00 & ~0x400) == EPERM
    assert (
        ask(62, 129, pid) == ALLOW
        and ask(62, 129, 1) == ask(62, 129, 0) == ask(62, 129, 2**32 - 1) == EPERM
    )
    assert ask(302, 261, 0) == ask(302, 261, pid) == ALLOW and ask(302, 261, 5) == EPERM
    assert (
        ask(72, 25, 1, 3) == ALLOW and ask(72, 25, 1, 8) == ask(72, 25, 1, 10) == EPERM
    )  # F_GETFL, F_SETOWN, F_SETSIG
    assert ask(16, 29, 0, 0x5401) == ALLOW and ask(16, 29, 0, 0x5412) == EPERM  # TCGETS, TIOCSTI
    assert (
        ask(53, 199, 1, 1 | 0o2000000) == ALLOW
        and ask(53, 199, 1, 2) == ask(53, 199, 2, 1) == EPERM
    )
    assert ask(157, 167, 15) == ALLOW and ask(157, 167, 1) == EPERM  # PR_SET_NAME, PR_SET_PDEATHSIG
    assert (
        ask(257, 56, 0, 0, 0o101) == ALLOW and ask(257, 56, 0, 0, 0o1000) == EPERM
    )  # O_WRONLY|O_CREAT, O_RDONLY|O_TRUNC
    assert (
        ask(257, 56, 0, 0, 0o1001) == ALLOW and ask(257, 56, 0, 0, 0o20200002) == EPERM
    )  # O_TMPFILE
    assert verdict(program, "i386", 20) == KILL
    if not arm:
        assert verdict(program, machine, 0x40000000 | 39) == KILL  # x32
        assert ask(2, 0, 0, 0o1000) == EPERM  # plain open
    everything = {
        n for n in range(600) if verdict(program, machine, n, 0xDEAD, 0xDEAD, 0xDEAD) == ALLOW
    }
    assert len(everything) < 200 and not everything & {998, *range(450, 600)}
    gpu = seccomp_program(machine, gpu=True)
    assert (
        verdict(gpu, machine, 29 if arm else 16, 0, 0xC020462A) == ALLOW
        and verdict(gpu, machine, 198 if arm else 41) == EPERM
    )


def test_call_numbers_are_those_of_the_kernel_headers():
    headers = {
        1: ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
        2: ("/usr/include/asm-generic/unistd.h",),
    }
    table = " ".join(
        [
            module._ALLOW,
            module._PRETEND,
            module._UNSUPPORTED,
            module._MISSING,
            module._GPU_ALLOW,
            *module._CONDITIONS,
        ]
    )
    for which, paths in headers.items():
        text = next((Path(p).read_text() for p in paths if Path(p).exists()), None)
        if text is None:
            pytest.skip("no kernel headers here")
        numbers = {n: int(v) for n, v in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)\n", text)}
        for entry in table.split():
            name, value = entry.split(":")[0], entry.split(":")[which]
            if value == "-":
                assert which == 2 and name not in numbers, entry
            else:
                assert numbers.get(name, int(value)) == int(value), entry


# ------------------------------------------------------------------------------------------------
# Running scripts


def test_a_good_script(shared):
    run = shared(GOOD + "print('validation score: 0.75')\nprint('Validation Score: -1.5e-1 ')")
    assert (run.status, run.exit_code, run.valid, run.score, run.medal) == (
        "ok",
        0,
        True,
        0.5,
        "none",
    )
    assert (
        run.validation_score == -0.15
        and run.submission.startswith(b"id,y\n")
        and run.isolation == "landlock+seccomp"
    )
    assert (
        run.human_rank == pytest.approx(0.5) and 0 < run.seconds < 300 and 0 < run.cpu_seconds < 60
    )


def test_traceback_shows_the_script_and_nothing_else(shared):
    run = shared(
        "def f(x):\n    return 1 / x  # here\n\ntry:\n    f(0)\nexcept Exception as e:\n"
        "    raise KeyError('k') from e"
    )
    assert run.status == "error" and run.exit_code == 1 and run.reason == "KeyError: 'k'"
    assert (
        "return 1 / x  # here" in run.stderr_tail
        and 'File "script.py", line 2, in f' in run.stderr_tail
    )
    assert "sandbox" not in run.stderr_tail and run.stderr_tail.count("File ") == 3
    run = shared("x = 1\nif x\n    pass")
    assert (
        run.status == "error"
        and "SyntaxError" in run.reason
        and "line 2" in run.stderr_tail
        and "sandbox" not in run.stderr_tail
    )
    run = shared("import pandas as pd\npd.read_csv('input/test.csv')")
    assert run.reason.startswith("FileNotFoundError") and "sandbox.py" not in run.stderr_tail


@pytest.mark.parametrize(
    "code, status, exit_code, reason",
    [
        ("raise SystemExit", "no_submission", 0, "no submission.csv"),
        ("raise SystemExit(7)", "error", 7, "exit code 7"),
        ("raise SystemExit('bad data')", "error", 1, "bad data"),
        ("exit()", "no_submission", 0, ""),
        ("import os; os._exit(3)", "error", 3, ""),
        ("import os; os.kill(os.getpid(), 9)", "error", -9, "SIGKILL"),
        ("raise KeyboardInterrupt", "error", 1, "KeyboardInterrupt"),
        ("raise MemoryError", "memory", 1, "out of memory"),
        ("import numpy; numpy.empty(1 << 50)", "memory", 1, "ArrayMemoryError"),
        ("input()", "error", 1, "EOFError"),
        ("", "no_submission", 0, ""),
        ("\0", "error", 1, "null bytes"),
        ("'\ud800'", "no_submission", 0, ""),
        ("x" * 1_000_001, "error", None, "characters"),
        ("import threading\n"
         "threading.Thread(target=lambda: print('late')).start()\n" + GOOD, "ok", 0, ""),
        ("import atexit\natexit.register(print, 'bye')\n" + GOOD, "ok", 0, ""),
        ("if __name__ == '__main__':\n    " + GOOD, "ok", 0, ""),
        ("import tempfile, asyncio, os\n"
         "tempfile.TemporaryFile().write(b'x')\n"
         "asyncio.run(asyncio.sleep(0))\n"
         "os.listdir('input')\n" + GOOD, "ok", 0, ""),
        ("import pickle\n"
         "class A: pass\n"
         "pickle.loads(pickle.dumps(A()))\n"
         "import inspect; assert 'class A' in inspect.getsource(A)\n" + GOOD, "ok", 0, ""),
        ("import wave, sqlite3, xmlrpc.client, concurrent.futures as f\n"
         "list(f.ThreadPoolExecutor(4).map(abs, range(9)))\n" + GOOD, "ok", 0, ""),
        ("from pathlib import Path\n"
         "Path('helper.py').write_text('a = 3')\n"
         "import helper\n"
         "assert helper.a == 3 and Path(__file__).exists()\n" + GOOD,
         "ok", 0, ""),
        ("import shutil; shutil.copytree('input', 'copy'); shutil.copy2('input/train.csv', 'b')\n"
         "shutil.move('b', 'c')\n" + GOOD, "ok", 0, ""),
    ],
)  # fmt: skip
def test_status(shared, code, status, exit_code, reason):
    run = shared(code)
    assert (run.status, run.exit_code) == (status, exit_code), run
    assert reason in run.reason and "\n" not in run.reason


def test_limits_tell_wall_from_cpu(shared, competition):
    run = shared("import time; print('begun'); time.sleep(60)", timeout=0.5)
    assert run.status == "timeout" and "wall-clock" in run.reason and run.stdout_tail == "begun\n"
    assert run.seconds >= 0.5 and run.cpu_seconds < 0.5
    with Sandbox(1, timeout=600, cpu_seconds=0.5, **LIGHT) as sandbox:
        run = sandbox.run(competition, "while True: pass")
    assert run.status == "timeout" and "CPU" in run.reason and run.cpu_seconds >= 0.4


def test_a_flood_is_cut_with_both_ends_kept(shared):
    run = shared(
        "print('first')\nfor i in range(200000): print(i)\nprint('last')\n"
        "print('validation score: 0.5')"
    )
    assert run.stdout_tail.startswith("first\n0\n1\n") and run.stdout_tail.endswith(
        "last\nvalidation score: 0.5\n"
    )
    assert (
        re.search(r"\n\.\.\. \d+ bytes cut \.\.\.\n", run.stdout_tail)
        and len(run.stdout_tail) < 70_000
    )
    assert run.validation_score == 0.5


def test_equal_code_gives_equal_results_and_other_code_other_ones(shared):
    draw = (
        "import random, numpy as np\n"
        "print(random.random(), np.random.rand(), hash('a'), list({'a', 'b', 'c'}))"
    )
    first, again, other = (shared(code).stdout_tail for code in (draw, draw, draw + "\n"))
    assert first == again != other
    assert first.split()[2:] == other.split()[2:]  # hashes are fixed


def test_validation_scores_that_do_not_count(shared):
    for text in ("inf", "nan", "1_5", "1e999", "high", "\u0661", ""):
        assert shared(
            f"print('validation score: 1.0')\nprint({'validation score: ' + text!r})"
        ).validation_score in (None, 1.0 if not text else None)
    assert (
        shared("import sys; print('validation score: 1', file=sys.stderr)").validation_score is None
    )


def test_a_long_word_is_no_number_at_once():
    """Before, the time grew with its square, and no other thread of the owner went on."""
    start = time.monotonic()
    assert module._validation_score("validation score: " + "1" * 65_000 + "x") is None
    assert module._validation_score("validation score: -1.5e-3") == -0.0015
    assert time.monotonic() - start < 20  # 100 s then, 0.01 now


def test_nothing_passes_from_run_to_run(shared):
    assert (
        shared(
            "import os, json\nopen('left', 'w')\njson.x = 1\nos.environ['LEFT'] = '1'\n" + GOOD
        ).status
        == "ok"
    )
    run = shared(
        "import os, json\nprint(os.listdir('.'), hasattr(json, 'x'), 'LEFT' in os.environ)"
    )
    assert (
        eval(run.stdout_tail.split("]")[0] + "]").sort() is None and "left" not in run.stdout_tail
    )
    assert run.stdout_tail.endswith("False False\n") and run.status == "no_submission"


def test_which_public_data_another_uid_may_read(tmp_path):
    top = Path(os.path.realpath(tmp_path))
    closed = any(not parent.stat().st_mode & 0o001 for parent in top.parents)
    for name, mode, readable in (("open", 0o644, True), ("closed", 0o600, False)):
        folder = tmp_path / name / "train"
        folder.mkdir(parents=True)
        (folder / "image").touch(mode)
        (folder / "image").chmod(mode)
        (folder / "link").symlink_to("/nowhere")  # no script can follow it
        for path in (tmp_path, tmp_path / name, folder):
            path.chmod(0o755)
        assert module._readable_by_others(tmp_path / name) == (readable and not closed)


def test_refusals(competition, tmp_path):
    with Sandbox(1, layers=("landlock",), **LIGHT) as sandbox:
        run = sandbox.run(competition, GOOD)
        assert (
            run.status == "refused" and "seccomp was switched off" in run.reason and not run.valid
        )
    with Sandbox(1, layers=(), unsafe=True, **LIGHT) as sandbox:
        run = sandbox.run(competition, GOOD)
        assert run.status == "ok" and run.isolation == "unsafe (nothing)"
    assert sandbox.run(competition, GOOD).status == "refused"
    sandbox.close()
    with pytest.raises(ValueError, match="slots"):
        Sandbox(0)


def test_answers_where_scripts_may_read_are_refused(competition):
    from dataclasses import replace

    with Sandbox(1, **LIGHT) as sandbox:
        inside = replace(competition, answers=competition.public_dir / "train.csv")
        assert "scripts may read" in sandbox.run(inside, GOOD).reason
        bundled = replace(competition, answers=Path(np.__file__).resolve())
        assert sandbox.run(bundled, GOOD).status == "refused"


def test_options(competition):
    with Sandbox(
        2, preload=("json", "no_such_module"), threads=2, gpus=["5", ""], seed=1
    ) as sandbox:
        assert list(sandbox.hello["failed"]) == ["no_such_module"]
        code = (
            "import os, sys\nname = os.environ.get\nprint(sys.modules.get('pandas'), "
            "name('OMP_NUM_THREADS'), name('CUDA_VISIBLE_DEVICES'))"
        )
        assert sandbox.run(competition, code).stdout_tail == "None 2 5\n"
        assert sandbox.run(competition, code).stdout_tail == "None 2 \n"
        assert (
            sandbox.run(
                competition,
                "import pandas as pd\n"
                "pd.read_csv('input/sample_submission.csv').to_csv('submission.csv', index=False)",
            ).status
            == "ok"
        )


def test_scikit_learn_does_not_search_for_plugins_in_every_script(shared):
    """The fork server has done it: a fit on a data frame reads no package's metadata."""
    run = shared(GOOD + (
        "import sys\nimport pandas as pd\nfrom sklearn.tree import DecisionTreeClassifier\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, a: event == 'open' and opened.append(str(a[0])))\n"
        "DecisionTreeClassifier().fit(pd.DataFrame({'x': [0.0, 1.0]}), [0, 1])\n"
        "print(sum('entry_points' in name for name in opened), 'searched')\n"))
    assert run.status == "ok" and run.stdout_tail == "0 searched\n"


def test_delay_sleeps_in_the_slot_exponentially(competition):
    """48 runs on 8 slots, 0.2 s on average: each slot sleeps about 6 times 0.2 s."""
    with Sandbox(8, delay=0.2, **LIGHT) as sandbox, ThreadPoolExecutor(48) as pool:
        if sandbox.problem:
            pytest.skip(sandbox.problem)
        started = time.monotonic()
        runs = list(pool.map(lambda _: sandbox.run(competition, GOOD), range(48)))
        assert {run.status for run in runs} == {"ok"} and max(r.seconds for r in runs) < 1.0
        assert time.monotonic() - started > 0.8


def counted(sandbox):
    """The scripts that the sandbox really executes from now on."""
    executed, execute = [], sandbox._execute

    def count(slot, competition, code, timeout):
        executed.append(code)
        return execute(slot, competition, code, timeout)

    sandbox._execute = count
    return executed


def test_reuse_runs_equal_scripts_once(competition, tmp_path):
    other = make_competition(tmp_path / "other")
    with Sandbox(2, reuse_mb=1, **LIGHT) as sandbox, ThreadPoolExecutor(8) as pool:
        if sandbox.problem:
            pytest.skip(sandbox.problem)
        executed = counted(sandbox)
        slow = "import time; time.sleep(0.3)\n" + GOOD  # all eight come while the first one runs
        runs = list(pool.map(lambda _: sandbox.run(competition, slow), range(8)))
        assert executed == [slow] and sorted(run.reused for run in runs) == [False] + [True] * 7
        assert len({(run.score, run.seconds, run.submission) for run in runs}) == 1
        assert sandbox.run(competition, slow).reused and executed == [slow]
        assert not sandbox.run(competition, slow + "#").reused  # another script
        assert not sandbox.run(competition, slow, timeout=50).reused  # another limit
        assert not sandbox.run(other, slow).reused  # other data
        crash = "raise ValueError('no')"
        runs = [sandbox.run(competition, crash) for _ in range(2)]
        assert [(run.status, run.reused) for run in runs] == [("error", False), ("error", True)]
        assert len(executed) == 5


def test_reuse_keeps_only_runs_that_ended_by_themselves(competition):
    """A time-out or a dying fork server may be the machine's doing: equal scripts run again, those
    that waited for the first one as well."""
    endless, dies = "while True: pass", "import time; time.sleep(60)"
    with Sandbox(2, reuse_mb=1, **LIGHT) as sandbox, ThreadPoolExecutor(4) as pool:
        if sandbox.problem:
            pytest.skip(sandbox.problem)
        executed = counted(sandbox)
        runs = list(pool.map(lambda _: sandbox.run(competition, endless, timeout=0.5), range(3)))
        assert [(run.status, run.reused) for run in runs] == [("timeout", False)] * 3
        assert executed == [endless] * 3
        greedy = "x = bytearray(10**12)"  # MemoryError, exit code 1
        runs = [sandbox.run(competition, greedy) for _ in range(2)]
        assert [(run.status, run.reused) for run in runs] == [("memory", False)] * 2
        run = pool.submit(sandbox.run, competition, dies, 60)
        assert wait_until(lambda: executed[-1] == dies)
        os.kill(sandbox._process.pid, signal.SIGKILL)
        assert run.result().status == "error" and not sandbox._known and not sandbox._running


def test_reuse_forgets_what_was_used_longest_ago(competition):
    """0.01 MB hold three of these results; the first stays because it is used again and again."""
    with Sandbox(1, reuse_mb=0.01, **LIGHT) as sandbox:
        if sandbox.problem:
            pytest.skip(sandbox.problem)
        first, *others = [f"print('{'x' * 1000}'); VALUE = {i}" for i in range(6)]
        executed = counted(sandbox)
        for other in others:
            sandbox.run(competition, first)
            sandbox.run(competition, other)
            assert 0 < sandbox._known_bytes <= 0.01 * 2**20
        assert executed == [first, *others] and sandbox.run(competition, others[-1]).reused
        assert not sandbox.run(competition, others[0]).reused
        sandbox.run(competition, f"print('{'x' * 20000}')")  # larger than all there is: not kept
        assert sandbox._known_bytes == 0 and not sandbox._known


MIXTURE = [
    ("good", GOOD, "ok"),
    ("crash", "raise RuntimeError(NAME)", "error"),
    ("sleeper", "import time; time.sleep(60)", "timeout"),
    ("memory bomb", "x = [bytearray(64 << 20) for _ in range(200)]", "memory"),
    ("flood", "while True: print(NAME, 'x' * 1000)", "timeout"),
    (
        "fork bomb",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "timeout",
    ),
    ("segfault", "import ctypes; ctypes.string_at(0)", "error"),
    ("nothing", "pass", "no_submission"),
]


@pytest.mark.parametrize("slots", [8, pytest.param(32, marks=pytest.mark.long)])
def test_32_runs_at_the_same_time_are_told_apart(competition, slots):
    limits = (
        os.getpriority(os.PRIO_PROCESS, 0),
        os.sched_getaffinity(0),
        len(os.listdir("/proc/self/fd")),
    )
    with Sandbox(
        slots, timeout=3.0, cpu_seconds=20.0, memory_mb=400, **LIGHT
    ) as sandbox, ThreadPoolExecutor(32) as pool:
        root = Path(sandbox.hello["root"])
        descriptors = len(os.listdir("/proc/self/fd"))

        def one(i: int) -> Execution:
            kind, code, _ = MIXTURE[i % len(MIXTURE)]
            return sandbox.run(
                competition,
                f"NAME = 'run-{i}'\nprint(NAME)\n{code}",
                timeout=(
                    300.0
                    if kind in ("good", "crash", "segfault", "nothing", "memory bomb")
                    else 3.0
                ),
            )

        runs = list(pool.map(one, range(32)))
        for i, run in enumerate(runs):
            kind, _, status = MIXTURE[i % len(MIXTURE)]
            assert run.status == status, (kind, run)
            assert run.stdout_tail.startswith(f"run-{i}\n") and not re.search(
                rf"run-(?!{i}\b)\d", run.stdout_tail
            )
        assert wait_until(lambda: os.listdir(root) == ["canary"])
        assert len(os.listdir("/proc/self/fd")) == descriptors
    assert (
        os.getpriority(os.PRIO_PROCESS, 0),
        os.sched_getaffinity(0),
        len(os.listdir("/proc/self/fd")),
    ) == limits
    assert not root.exists()


def test_nothing_grows_over_many_runs(competition):
    with Sandbox(2, timeout=300) as sandbox, ThreadPoolExecutor(2) as pool:
        server = sandbox._process.pid

        def state() -> tuple:
            fields = Path(f"/proc/{server}/statm").read_text().split()
            readable = os.access(f"/proc/{server}/fd", os.R_OK)  # root only: the server is closed
            theirs = len(os.listdir(f"/proc/{server}/fd")) if readable else 0
            return theirs, len(os.listdir("/proc/self/fd")), int(fields[1])

        list(pool.map(lambda _: sandbox.run(competition, GOOD), range(10)))
        before = state()
        runs = list(pool.map(lambda _: sandbox.run(competition, GOOD), range(60)))
        assert {run.status for run in runs} == {"ok"}
        assert state()[:2] == before[:2] and state()[2] - before[2] < 500  # pages
        assert wait_until(lambda: os.listdir(sandbox.hello["root"]) == ["canary"])


# ------------------------------------------------------------------------------------------------
# kill -9


def descendants(pid: int) -> set[int]:
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)] = int(
                    Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                pass
    found, todo = set(), [pid]
    while todo:
        parent = todo.pop()
        children = {child for child, its in parents.items() if its == parent}
        found |= children
        todo += children
    return found


def alive(pids: set[int]) -> set[int]:
    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return {pid for pid in pids if runs(pid)}


OWNER = """
import sys, threading
sys.path.insert(0, {here!r})
from sandbox import *
competition = Competition.load({directory!r})
sandbox = Sandbox(slots=3, timeout=600, cpu_seconds=600, scratch={scratch!r}, preload=("numpy",))
for code in ("import time; time.sleep(600)", "while True: pass", 
             "import signal\\nsignal.signal(15, signal.SIG_IGN)\\nwhile True: pass"):
    threading.Thread(target=sandbox.run, args=(competition, code)).start()
print(sandbox._process.pid, flush=True)
"""


@pytest.mark.parametrize("victim", ["owner", "owner and server"])
def test_killing_the_owner_ends_everything(competition, tmp_path, victim):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    text = OWNER.format(
        here=str(Path(module.__file__).parent),
        directory=str(tmp_path / "toy"),
        scratch=str(scratch),
    )
    owner = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    server = int(owner.stdout.readline())
    assert wait_until(lambda: len(descendants(owner.pid)) == 1 + 3 + 3)  # server, nannies, workers
    tree = descendants(owner.pid)
    os.kill(owner.pid, signal.SIGKILL)
    if "server" in victim:
        os.kill(server, signal.SIGKILL)
    owner.wait()
    assert wait_until(lambda: not alive(tree)), alive(tree)
    if "server" not in victim:
        assert wait_until(lambda: not list(scratch.iterdir()))
    else:  # nobody is left to remove the root itself; the next sandbox does
        with Sandbox(1, scratch=str(scratch), **LIGHT):
            assert len(list(scratch.iterdir())) == 1
        assert not list(scratch.iterdir())


@pytest.mark.parametrize("victim", ["server", "nanny", "worker"])
def test_killing_a_part_fails_the_run_and_the_pool_goes_on(competition, tmp_path, victim):
    with Sandbox(
        1, timeout=600, cpu_seconds=600, scratch=str(tmp_path), **LIGHT
    ) as sandbox, ThreadPoolExecutor(1) as pool:
        server = sandbox._process.pid
        future = pool.submit(sandbox.run, competition, "import time; time.sleep(600)")
        assert wait_until(lambda: len(descendants(server)) == 2)
        nanny = next(pid for pid in descendants(server) if descendants(pid))
        worker = descendants(nanny).pop()
        time.sleep(0.2)  # let the script begin
        os.kill({"server": server, "nanny": nanny, "worker": worker}[victim], signal.SIGKILL)
        run = future.result(timeout=60)
        assert run.status == "error" and not run.valid
        assert ("sandbox process" in run.reason) == (victim != "worker")
        assert wait_until(lambda: not alive({nanny, worker}))
        assert sandbox.run(competition, GOOD).status == "ok"
        assert sandbox.restarts == (victim == "server")
        assert wait_until(lambda: os.listdir(sandbox.hello["root"]) == ["canary"])
    assert not [path for path in tmp_path.iterdir() if "sandbox" in path.name]


def test_a_second_attempt_repeats_a_run_whose_sandbox_is_killed(competition, tmp_path):
    with Sandbox(1, scratch=str(tmp_path), attempts=2, **LIGHT) as sandbox, ThreadPoolExecutor(1) as pool:
        server = sandbox._process.pid
        future = pool.submit(sandbox.run, competition, "import time; time.sleep(2)\n" + GOOD)
        assert wait_until(lambda: len(descendants(server)) == 2)
        os.kill(server, signal.SIGKILL)
        assert future.result(timeout=60).status == "ok" and sandbox.restarts == 1


def test_processes_that_survive_sigkill_take_their_slots_and_then_the_pool(competition, monkeypatch):
    """A disk or driver that hangs can do that; whoever waits for a slot must not wait for ever."""
    with Sandbox(1, **LIGHT) as sandbox, ThreadPoolExecutor(3) as pool:
        meet = threading.Barrier(2)

        def execute(*_):
            meet.wait(10)
            return {"killed": "timeout", "stuck": True, "seconds": 1.0}, []

        monkeypatch.setattr(sandbox, "_execute", execute)
        runs = [pool.submit(sandbox.run, competition, GOOD) for _ in range(3)]
        meet.wait(10)
        statuses = sorted(run.result(timeout=10).status for run in runs)
        assert statuses == ["refused", "refused", "timeout"]
        assert "SIGKILL" in sandbox.run(competition, GOOD).reason


def test_closing_in_the_middle(competition):
    sandbox = Sandbox(1, timeout=600, **LIGHT)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(sandbox.run, competition, "import time; time.sleep(600)")
        assert wait_until(lambda: len(descendants(sandbox._process.pid)) == 2)
        tree = descendants(sandbox._process.pid) | {sandbox._process.pid}
        sandbox.close()
        run = future.result(timeout=60)  # no fault of the script's
        assert (run.status, run.reason) == (
            "refused", "the run was not completed: the sandbox is closed")
        assert not alive(tree)


def test_closing_while_the_server_restarts(competition, tmp_path):
    sandbox = Sandbox(1, scratch=str(tmp_path), **LIGHT)
    os.kill(sandbox._process.pid, signal.SIGKILL)
    assert wait_until(lambda: sandbox._control is None)
    sandbox.close()
    assert not sandbox._keeper.is_alive() and sandbox._process.poll() is not None
    assert not [path for path in tmp_path.iterdir() if "acegrpo" in path.name]


def test_a_server_that_never_starts_is_a_problem_not_a_hang(competition, tmp_path):
    sandbox = Sandbox(1, scratch=str(tmp_path / "nowhere"))
    assert "does not start" in sandbox.problem
    assert sandbox.run(competition, GOOD).status == "refused"


@pytest.mark.parametrize("lacking", ["subprocess.Popen", "socket.socketpair"])
def test_a_full_machine_is_a_problem_not_a_hang(monkeypatch, capfd, lacking):
    def full(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(f"sandbox.{lacking}", full)
    assert "does not start" in Sandbox(1).problem
    assert "Resource temporarily unavailable" in capfd.readouterr().err


def test_a_machine_without_room_refuses_the_script(competition, tmp_path):
    with Sandbox(1, scratch=str(tmp_path), reuse_mb=1, **LIGHT) as sandbox:
        root = Path(sandbox.hello["root"])
        root.rename(tmp_path / "away")
        run = sandbox.run(competition, GOOD)
        assert run.status == "refused" and "could not be started" in run.reason
        assert "No such file or directory" in run.reason
        (tmp_path / "away").rename(root)
        run = sandbox.run(competition, GOOD)
        assert (run.status, run.reused) == ("ok", False)


def test_a_machine_without_room_for_a_moment_runs_the_script_then(competition, tmp_path):
    with Sandbox(1, scratch=str(tmp_path), attempts=9, **LIGHT) as sandbox:
        root = Path(sandbox.hello["root"])
        root.rename(tmp_path / "away")
        threading.Timer(0.2, (tmp_path / "away").rename, [root]).start()
        assert sandbox.run(competition, GOOD).status == "ok"


def test_the_nanny_misses_nothing_that_moves(tmp_path, monkeypatch):
    """A directory that is moved all the time is counted at every look, and the process that does it
    goes on afterwards."""
    monkeypatch.setattr(module, "STOP_SECONDS", 60.0)
    for place in "012":
        (tmp_path / place).mkdir()
    (tmp_path / "0" / "below").mkdir()
    (tmp_path / "0" / "below" / "large").write_bytes(bytes(3 << 20))
    code = ("import itertools, os\n"
            "for i in itertools.count(): os.rename(f'{i % 3}/below', f'{(i + 1) % 3}/below')")
    request = {"uid": 0, "memory_mb": 1000, "cpu_seconds": 1000, "max_threads": 9, "disk_mb": 2}
    directory = os.open(tmp_path, os.O_RDONLY)
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as renamer:
        try:
            assert wait_until(lambda: not (tmp_path / "0" / "below").exists())
            for _ in range(50):
                found = module._broken_limit(request, renamer.pid, str(tmp_path), directory, 0)
                assert found == "disk"
            before = psutil.Process(renamer.pid).cpu_times().user
            assert wait_until(lambda: psutil.Process(renamer.pid).cpu_times().user > before)
            request["disk_mb"] = 4
            assert module._broken_limit(request, renamer.pid, str(tmp_path), directory, 0) == ""
        finally:
            renamer.kill()
            os.close(directory)


# ------------------------------------------------------------------------------------------------
# Layers that are missing, openly or silently: patched copies of sandbox.py


def patched(tmp_path, old: str, new: str) -> Path:
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1
    path = tmp_path / "sandbox.py"
    path.write_text(text.replace(old, new))
    return path


NO_LANDLOCK = (
    "        return _syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))\n",
    "        return 0\n",
)


@pytest.mark.parametrize(
    "change, reason",
    [
        (NO_LANDLOCK, "no Landlock"),
        (("if _libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) < 0:", "if True:"), "no seccomp"),
        (
            ("        _syscall(446, ctypes.c_int(ruleset), ctypes.c_uint(0))\n", ""),
            "Landlock is not in force",
        ),
        (
            (
                '    _syscall({"x86_64": 317, "aarch64": 277}[_MACHINE], '
                "set_mode_filter, tsync, header)\n",
                "",
            ),
            "seccomp is not in force",
        ),
        (
            ("_MACHINE = platform.machine()", "_MACHINE = 'riscv64'"),
            "no isolation on linux riscv64",
        ),
        (
            (
                "_prctl(_PR_SET_NO_NEW_PRIVS, 1)",
                "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
            ),
            "more than one thread",
        ),
        (
            (
                "                pid = os.fork()\n",
                "                raise BlockingIOError(11, 'full')\n",
            ),
            "could not be started in isolation: BlockingIOError: [Errno 11] full",
        ),
    ],
    ids=[
        "no Landlock",
        "no seccomp",
        "Landlock silently off",
        "seccomp silently off",
        "unknown machine",
        "a second thread",
        "no process",
    ],
)
def test_a_missing_layer_refuses(competition, tmp_path, change, reason):
    path, script = patched(tmp_path, *change), tmp_path / "script.py"
    script.write_text(GOOD)
    command = [sys.executable, path, "run", "--competition", tmp_path / "toy", script]
    done = subprocess.run(command, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    assert (done.returncode, facts["status"], facts["valid"]) == (3, "refused", False)
    assert reason in facts["reason"]
    if change is NO_LANDLOCK:
        done = subprocess.run([*command, "--unsafe"], capture_output=True, text=True)
        facts = json.loads(done.stdout)
        assert (done.returncode, facts["status"], facts["isolation"]) == (
            0,
            "ok",
            "unsafe (seccomp)",
        )
        assert "WARNING" in done.stderr
        done = subprocess.run([sys.executable, path, "selftest"], capture_output=True, text=True)
        assert done.returncode == 3 and "no Landlock" in json.loads(done.stdout)["problem"]


# ------------------------------------------------------------------------------------------------
# What takes longer


@pytest.mark.long
def test_fuzz_the_reader_at_length():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        __file__,
        "-k",
        "fuzz or heavy",
        "-m",
        "not long",
    ]
    done = subprocess.run(
        command, env={**os.environ, "FUZZ": "12000"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.long
def test_everything_as_a_normal_user():
    from test_sandbox_attacks import WHO, as_someone

    if os.geteuid() != 0 or subprocess.run(as_someone(["true"]), capture_output=True).returncode:
        pytest.skip("needs root and mount namespaces")
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-m",
        "not long",
        "--basetemp",
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        environment = {**os.environ, "HOME": folder, "HYPOTHESIS_STORAGE_DIRECTORY": folder}
        command = as_someone([*WHO["a normal user"], *command, f"{folder}/base"])
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.long
@pytest.mark.parametrize("abi", [1, 2, 3, 4, 5])
def test_attacks_on_an_older_landlock(tmp_path, abi):
    """An older kernel's Landlock knows fewer rights (imitated); seccomp fills the gaps."""
    if module.landlock_abi() < abi:
        pytest.skip("this kernel is older")
    patched(tmp_path, NO_LANDLOCK[0], f"        return {abi}\n")
    subprocess.run(
        ["cp", Path(__file__).with_name("test_sandbox_attacks.py"), tmp_path], check=True
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-B", tmp_path / "test_sandbox_attacks.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["mode"]["landlock_abi"] == abi
    assert {name: wrong for name, wrong in report["results"].items() if wrong} == {}


# ------------------------------------------------------------------------------------------------
# Typical scripts

DATA = """
import numpy as np, pandas as pd
train = pd.read_csv('input/train.csv'); test = pd.read_csv('input/sample_submission.csv')
X, y = train[['x']].to_numpy(float), train['y']
X_test = np.arange(len(test))[:, None].astype(float)
"""
SAVE = "\ntest['y'] = model.predict(X_test)\ntest.to_csv('submission.csv', index=False)\n"
TYPICAL = {
    "random forest on all cores": DATA + "from sklearn.ensemble import RandomForestClassifier\n"
     "model = RandomForestClassifier(20, n_jobs=-1).fit(X, y)" + SAVE,
    "grid search on all cores": DATA + "from sklearn.model_selection import GridSearchCV\n"
     "from sklearn.svm import SVC\n"
    "model = GridSearchCV(SVC(), {'C': [1, 10]}, cv=3, n_jobs=-1).fit(X, y)\n"
     "print('validation score:', model.best_score_)" + SAVE,
    "cross-validation": DATA + "from sklearn.model_selection import cross_val_score\n"
     "from sklearn.linear_model import LogisticRegression\n"
    "model = LogisticRegression()\n"
     "print('validation score:', cross_val_score(model, X, y, n_jobs=2).mean())\n"
     "model.fit(X, y)" + SAVE,
    "gradient boosting (OpenMP)": DATA +
    "from sklearn.ensemble import HistGradientBoostingClassifier\n"
     "model = HistGradientBoostingClassifier(max_iter=10).fit(X, y)" + SAVE,
    "joblib in threads": DATA + "from joblib import Parallel, delayed\n"
     "print(sum(Parallel(n_jobs=4)(delayed(abs)(i) for i in range(9))))\n"
    "from sklearn.dummy import DummyClassifier\nmodel = DummyClassifier().fit(X, y)" + SAVE,
    "pipeline": DATA + "from sklearn.pipeline import make_pipeline\n"
     "from sklearn.preprocessing import StandardScaler\n"
    "from sklearn.impute import SimpleImputer\nfrom sklearn.neighbors import KNeighborsClassifier\n"
    "model = make_pipeline(SimpleImputer(), StandardScaler(), KNeighborsClassifier())\n"
    "model.fit(X, y)" + SAVE,
    "matplotlib to a file": DATA + "import matplotlib\n"
     "import matplotlib.pyplot as plt\n"
     "plt.plot(X, y); plt.title('x'); plt.savefig('plot.png')\n"
    "import os; assert os.path.getsize('plot.png') > 1000\n"
     "from sklearn.dummy import DummyClassifier\n"
     "model = DummyClassifier().fit(X, y)" + SAVE,
    "warnings on stderr": DATA + "import warnings, logging, sys\n"
     "warnings.simplefilter('always'); warnings.warn('careful')\n"
     "logging.warning('log')\n"
    "from sklearn.dummy import DummyClassifier\nmodel = DummyClassifier().fit(X, y)" + SAVE,
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_typical_scripts(competition, threads):
    with Sandbox(2, timeout=200, cpu_seconds=100, threads=threads) as sandbox, ThreadPoolExecutor(
        2
    ) as pool:
        runs = dict(
            zip(TYPICAL, pool.map(lambda code: sandbox.run(competition, code), TYPICAL.values()))
        )
    for name, run in runs.items():
        assert run.status == "ok" and run.valid, (name, run)
    assert (
        "careful" in runs["warnings on stderr"].stderr_tail
        and "WARNING:root:log" in runs["warnings on stderr"].stderr_tail
    )
    assert "script.py" in runs["warnings on stderr"].stderr_tail


TORCH = """
import torch
torch.set_num_threads(2)
x = torch.randn(256, 8)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters())
for batch in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 64, shuffle=True):
    loss = (model(batch[0]) ** 2).mean(); optimizer.zero_grad(); loss.backward(); optimizer.step()
torch.save(model.state_dict(), 'model.pt'); torch.load('model.pt')
print('validation score:', float(loss))
"""


@pytest.mark.parametrize(
    "preload", [(), ("numpy", "torch")], ids=["imported by the script", "preloaded"]
)
def test_torch_with_threads(competition, preload):
    pytest.importorskip("torch")
    with Sandbox(1, timeout=300, cpu_seconds=200, memory_mb=2048, preload=preload) as sandbox:
        run = sandbox.run(competition, TORCH + GOOD)
        assert run.status == "ok" and run.validation_score is not None, run


# ------------------------------------------------------------------------------------------------
# Commands


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, module.__file__, *map(str, arguments)], capture_output=True, text=True
    )


FIELDS = {
    "status", "exit_code", "seconds", "cpu_seconds", "stdout_tail", "stderr_tail", "valid", "score",
    "medal", "human_rank", "above_median", "validation_score", "reward", "reason", "isolation",
}  # fmt: skip


def test_command_run(competition, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(GOOD + "print('validation score: 0.4')")
    done = command("run", "--competition", tmp_path / "toy", script)
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and set(facts) == FIELDS
    assert facts["status"] == "ok" and facts["reward"] == pytest.approx(
        0.1 + 0.9 * facts["human_rank"]
    )
    script.write_text("import time; time.sleep(60)")
    done = command("run", "--competition", tmp_path / "toy", script, "--timeout", "0.5")
    assert done.returncode == 0 and json.loads(done.stdout)["status"] == "timeout"


def test_command_run_is_interrupted_without_a_traceback(competition, tmp_path):
    (tmp_path / "s.py").write_text("import time; time.sleep(60)")
    arguments = ["run", str(tmp_path / "s.py"), "--competition", str(tmp_path / "toy")]
    process = subprocess.Popen([sys.executable, module.__file__, *arguments],
                               stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: psutil.Process(process.pid).children(), 60)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 130


def test_command_grade(competition, tmp_path):
    done = command("grade", "--competition", tmp_path / "toy", competition.sample_submission)
    assert done.returncode == 0 and json.loads(done.stdout)["score"] == 0.5
    (tmp_path / "bad.csv").write_text("id,y\nr0,1\n")
    facts = json.loads(
        command("grade", "--competition", tmp_path / "toy", tmp_path / "bad.csv").stdout
    )
    assert facts["valid"] is False and "ids" in facts["reason"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--competition", "{toy}", "nowhere.py"], "nowhere.py"),
        (["run", "--competition", "nowhere", __file__], "nowhere: no such competition"),
        (["run", "--competition", "{toy}", __file__, "--timeout", "soon"], "invalid float"),
        (["run", "--competition", "{toy}", __file__, "--timeout", "-1"], "must be above 0"),
        (["grade", "--competition", "{toy}", "nowhere.csv"], "nowhere.csv"),
        (["grade", "--competition", "{toy}", "{toy}"], "toy"),
        (["fly"], "invalid choice"),
        ([], "required"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line_and_status_2(competition, tmp_path, arguments, message):
    done = command(*(argument.replace("{toy}", str(tmp_path / "toy")) for argument in arguments))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("sandbox.py") and not done.stdout


def test_command_selftest():
    done = command("selftest")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 3)
    assert (
        report["ok"] and set(report["proofs"].values()) == {"holds"} and report["landlock_abi"] >= 1
    )
