"""MLE-bench drops in: its format, its grades, its splits. python -m pytest tests/test_mlebench.py

The comparison with mlebench itself needs a checkout of https://github.com/openai/mle-bench outside
this repository and what its grading imports; its data and Kaggle are not needed:

    git clone https://github.com/openai/mle-bench /somewhere/mle-bench
    pip install appdirs py7zr diskcache tenacity
    MLEBENCH_CHECKOUT=/somewhere/mle-bench python -m pytest -s tests/test_mlebench.py
"""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakes import FakePrompter
from test_sandbox_attacks import make_competition

import sandbox as module
from rollout import (AgentConfig, Completion, RolloutConfig, preview_data, run_agent,
                     write_report)
from sandbox import LITE, Competition, CompetitionError, Sandbox, load_competitions, medal_ranks

# ------------------------------------------------------------------------------------------------
# Medal rules


def board_of(n: int, lower: bool) -> list[float]:
    """Best first, with ties: pairs of teams share a score."""
    scores = [1 + (i // 2) / 8 for i in range(n)]
    return scores if lower else [10_000 - score for score in scores]


LAST_RANKS = {  # teams: the last ranks of gold, silver, bronze, by hand from kaggle.com/progression
    1: (1, 1, 1), 9: (1, 1, 3), 10: (1, 2, 4), 99: (9, 19, 39), 100: (10, 20, 40),
    249: (10, 49, 99), 250: (10, 50, 100), 999: (11, 50, 100), 1000: (12, 50, 100),
    5000: (20, 250, 500),
}


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("n", LAST_RANKS)
def test_medals_are_inclusive_and_the_median_is_strict(tmp_path, n, lower):
    assert medal_ranks(n) == LAST_RANKS[n]
    board = board_of(n, lower)
    make_competition(tmp_path)
    (tmp_path / "toy/leaderboard.csv").write_text("score\n" + "\n".join(map(str, board)) + "\n")
    (tmp_path / "toy/grade.py").write_text("def grade(s, a):\n    return s.y[0]\n")
    competition = Competition.load(tmp_path / "toy")
    assert competition.lower_is_better == (lower and n > 1 and board[0] != board[-1])
    sign = -1 if competition.lower_is_better else 1
    gold, silver, bronze = (board[rank - 1] for rank in LAST_RANKS[n])
    assert (competition.gold, competition.silver, competition.bronze) == (gold, silver, bronze)
    marks = gold, silver, bronze, float(np.median(board)), board[0], board[-1]
    for score in {mark + d for mark in marks for d in (-1e-3, 0, 1e-3)}:
        grade = competition.grade(f"id,y\nr0,{score!r}\n".encode())
        expected = next((name for name, mark in (("gold", gold), ("silver", silver),
                                                 ("bronze", bronze))
                         if sign * score >= sign * mark), "none")  # a tie has the medal
        assert grade.medal == expected, (score, grade)
        assert grade.above_median == (sign * score > sign * np.median(board))  # a tie has not
        assert 0 <= grade.human_rank <= 1


# ------------------------------------------------------------------------------------------------
# The format, without mlebench


def config_of(folder: Path, **changes) -> None:
    """Rewrite fields of the toy's dataset section."""
    import yaml

    path = folder / "toy/config.yaml"
    config = yaml.safe_load(path.read_text())
    config["dataset"] |= changes
    path.write_text(yaml.safe_dump(config))


def test_a_leaderboard_that_git_lfs_has_not_fetched_is_a_clear_error(tmp_path):
    make_competition(tmp_path)
    (tmp_path / "toy/leaderboard.csv").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(CompetitionError, match="leaderboard.csv: a Git LFS pointer.*git lfs pull"):
        Competition.load(tmp_path / "toy")


def test_teams_without_a_score_count_as_mlebench_counts_them(tmp_path):
    make_competition(tmp_path)
    (tmp_path / "toy/leaderboard.csv").write_text("teamId,score\n" + "\n".join(
        f"{i},{'' if i == 12 else 1 - i / 100}" for i in range(20)) + "\n")
    competition = Competition.load(tmp_path / "toy")
    assert len(competition.leaderboard) == 20 and competition.bronze == 1 - 7 / 100
    assert competition.median == pytest.approx(np.nanmedian(competition.leaderboard))
    assert competition.human_rank(-1.0) == pytest.approx(1 / 20)


def test_answers_other_than_csv_reach_the_grader(tmp_path):
    make_competition(tmp_path)
    private = tmp_path / "toy/prepared/private"
    (private / "test.jsonl").write_text('{"id": "r0", "y": [1]}\n{"id": "r1", "y": []}\n')
    config_of(tmp_path, answers="toy/prepared/private/test.jsonl")
    grader = tmp_path / "toy/grade.py"
    grader.write_text("def grade(submission, answers):\n"
                      "    return sum(len(a.pop('y')) for a in answers) / len(answers)\n")
    competition = Competition.load(tmp_path / "toy")
    for _ in range(2):  # the grader may spoil its copy
        assert competition.grade(competition.sample_submission.read_bytes()).score == 0.5
    (private / "masks").mkdir()
    (private / "masks/r0.txt").write_text("7")
    config_of(tmp_path, answers="toy/prepared/private/masks")
    grader.write_text("def grade(submission, answers):\n"
                      "    return float((answers / 'r0.txt').read_text())\n")
    competition = Competition.load(tmp_path / "toy")
    assert competition.grade(competition.sample_submission.read_bytes()).score == 7.0


@pytest.mark.parametrize("name, content", [("test.csv", b""), ("test.csv", b"\xff\xfe\0"),
                                           ("test.jsonl", b"{"), ("test.jsonl", b"\xff")])
def test_answers_that_cannot_be_read_are_no_fault_of_a_submission(tmp_path, name, content):
    answers = tmp_path / "toy/prepared/private" / name
    competition = dataclasses.replace(make_competition(tmp_path), answers=answers)
    answers.write_bytes(content)
    config_of(tmp_path, answers=f"toy/prepared/private/{name}")
    for read in (lambda: competition.grade(competition.sample_submission.read_bytes()),
                 lambda: Competition.load(tmp_path / "toy")):
        with pytest.raises(CompetitionError, match="answers of 'toy' cannot be read.*prepare") as error:
            read()
        assert "\n" not in str(error.value)


def test_a_score_that_is_not_finite_is_refused(tmp_path):
    make_competition(tmp_path)
    for value in ("nan", "inf", "-inf"):
        (tmp_path / "toy/grade.py").write_text(f"def grade(s, a): return float('{value}')\n")
        competition = Competition.load(tmp_path / "toy")
        grade = competition.grade(competition.sample_submission.read_bytes())
        assert not grade.valid and grade.medal == "none" and "finite" in grade.reason


def test_nothing_private_is_visible_where_the_sample_submission_is_private(tmp_path):
    make_competition(tmp_path)
    prepared = tmp_path / "toy/prepared"
    (prepared / "public/sample_submission.csv").rename(prepared / "private/sample_submission.csv")
    (prepared / "public/notes.txt").symlink_to(prepared / "private/sample_submission.csv")
    config_of(tmp_path, sample_submission="toy/prepared/private/sample_submission.csv")
    competition = Competition.load(tmp_path / "toy")
    assert competition._sample.rows == 20
    preview = preview_data(competition.public_dir, 5000)
    assert "train.csv" in preview and "notes" not in preview and "sample" not in preview
    script = f"""
import os
seen = sorted(os.listdir('input'))
for path in ('input/notes.txt', {str(competition.sample_submission)!r}, {str(competition.answers)!r}):
    try:
        seen.append(open(path).read())
    except OSError as error:
        seen.append(type(error).__name__)
print(seen)
"""
    with Sandbox(slots=1, preload=("numpy",)) as sandbox:
        if sandbox.problem:
            pytest.skip(sandbox.problem)
        run = sandbox.run(competition, script)
    assert run.stdout_tail.strip() == str(["notes.txt", "train.csv"] + ["PermissionError"] * 3)


def test_a_submission_may_be_as_large_as_its_competition_needs(tmp_path):
    """Text columns may hold encoded masks: one of 80 KB, where csv's own limit is 128 KB, and of
    2 MB, beyond --file-mb."""
    make_competition(tmp_path)
    sample = tmp_path / "toy/prepared/public/sample_submission.csv"
    sample.write_text("id,y\nr0,1 1\n")
    (tmp_path / "toy/grade.py").write_text("def grade(s, a):\n    return len(s.y[0])\n")
    competition = Competition.load(tmp_path / "toy")
    with Sandbox(slots=1, preload=("numpy",), file_mb=1) as sandbox:
        if sandbox.problem:
            pytest.skip(sandbox.problem)
        run = sandbox.run(competition, "open('submission.csv', 'w').write('id,y\\nr0,' + '1 ' * 10**6)")
    assert run.valid and run.score == 2e6


@pytest.mark.parametrize("text", ["from mlebench.grade_helpers import InvalidSubmissionError\n",
                                  "import mlebench\n"])
def test_a_grader_that_needs_mlebench_is_refused_with_the_remedy(tmp_path, monkeypatch, text):
    make_competition(tmp_path)
    monkeypatch.setitem(sys.modules, "mlebench", None)  # not installed, whatever is
    monkeypatch.setitem(sys.modules, "mlebench.grade_helpers", None)
    (tmp_path / "toy/grade.py").write_text(text + "def grade(s, a): return 1.0\n")
    with pytest.raises(CompetitionError, match="imports mlebench.*pip install") as error:
        Competition.load(tmp_path / "toy")
    assert "\n" not in str(error.value)


def test_from_mlebench_without_the_package_reads_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlebench", None)
    make_competition(tmp_path / "registry")
    with pytest.raises(CompetitionError, match="mlebench prepare -c toy --data-dir .*/data"):
        Competition.from_mlebench("toy", tmp_path / "data")
    (tmp_path / "data/toy").mkdir(parents=True)
    (tmp_path / "registry/toy/prepared").rename(tmp_path / "data/toy/prepared")
    with pytest.raises(CompetitionError, match="no config.yaml there; clone https://github.com/openai"):
        Competition.from_mlebench("toy", tmp_path / "data")
    competition = Competition.from_mlebench("toy", tmp_path / "data", tmp_path / "registry")
    assert competition.answers == tmp_path / "data/toy/prepared/private/test.csv"
    shutil.copytree(tmp_path / "registry/toy", tmp_path / "data/toy", dirs_exist_ok=True)
    assert Competition.from_mlebench("toy", tmp_path / "data").id == "toy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # mlebench's default place
    (tmp_path / "cache/mle-bench").mkdir(parents=True)
    (tmp_path / "data").rename(tmp_path / "cache/mle-bench/data")
    assert Competition.from_mlebench("toy").id == "toy"


STAND_IN = '''
from pathlib import Path
class Grader:
    def grade_fn(self, submission, answers):
        return 0.123456789
    def is_lower_better(self, board):
        return True
    def rank_score(self, score, board):
        return {f"{name}_threshold": i for i, name in enumerate(("gold", "silver", "bronze", "median"))}
class Found:
    def __init__(self, name):
        self.leaderboard, self.grader = Path(__file__).parent / "competitions" / name / "leaderboard.csv", Grader()
class Registry:
    def set_data_dir(self, folder):
        return self
    def get_competition(self, name):
        if name == "broken":
            raise ModuleNotFoundError("No module named 'appdirs'")
        return Found(name)
    def list_competition_ids(self):
        return ["a", "spaceship-titanic", "b"]
registry = Registry()
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package `mlebench` whose answers cannot come from our own reading of the files."""
    package = tmp_path / "packages/mlebench"
    make_competition(package / "competitions")
    (package / "__init__.py").touch()
    (package / "registry.py").write_text(STAND_IN)
    for name in [n for n in sys.modules if n.partition(".")[0] == "mlebench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    (tmp_path / "data/toy").mkdir(parents=True)
    (package / "competitions/toy/prepared").rename(tmp_path / "data/toy/prepared")
    yield tmp_path / "data"
    for name in [n for n in sys.modules if n.partition(".")[0] == "mlebench"]:
        del sys.modules[name]


def test_with_the_package_its_word_counts(stand_in):
    competition = Competition.from_mlebench("toy", stand_in)
    assert competition.lower_is_better
    assert (competition.gold, competition.silver, competition.bronze, competition.median) == (0, 1, 2, 3)
    grade = competition.grade(competition.sample_submission.read_bytes())
    assert grade.score == 0.12346 and grade.medal == "silver"  # rounded as its Grader rounds
    (stand_in / "broken/prepared/public").mkdir(parents=True)
    with pytest.raises(CompetitionError, match="appdirs.*pip install"):
        Competition.from_mlebench("broken", stand_in)


def test_splits_by_name(stand_in, tmp_path, monkeypatch):
    assert len(LITE) == len(set(LITE)) == 22
    asked = []
    monkeypatch.setattr(module.Competition, "from_mlebench", classmethod(
        lambda cls, name, data: asked.append((name, data)) or
        type("C", (), {"id": name})()))
    assert [c.id for c in load_competitions("lite", stand_in)] == sorted(LITE)
    assert asked[0][1] == stand_in
    assert [c.id for c in load_competitions("all", stand_in)] == ["a", "b"]  # 75, not the 7 others
    ids = tmp_path / "ids.txt"
    ids.write_text("# two\nzebra  # last\n\nant\n")
    assert [c.id for c in load_competitions(ids)] == ["ant", "zebra"]
    ids.write_text("ant\nant\n")
    with pytest.raises(CompetitionError, match="two competitions have the id 'ant'"):
        load_competitions(ids)
    ids.write_bytes(b"\xff\xfe")
    with pytest.raises(CompetitionError, match="ids.txt: no file of ids"):
        load_competitions(ids)
    ids.write_text("# none\n")
    with pytest.raises(CompetitionError, match="no competition id"):
        load_competitions(ids)
    with pytest.raises(CompetitionError, match="file of ids, `lite` or `all`"):
        load_competitions("light")


def test_a_directory_of_registry_folders_with_the_data_elsewhere(tmp_path):
    make_competition(tmp_path / "registry")
    (tmp_path / "data/toy").mkdir(parents=True)
    (tmp_path / "registry/toy/prepared").rename(tmp_path / "data/toy/prepared")
    (found,) = load_competitions(tmp_path / "registry", tmp_path / "data")
    assert found.public_dir == tmp_path / "data/toy/prepared/public"


def test_the_command_grades_a_competition_by_its_id(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlebench", None)
    make_competition(tmp_path)
    sample = tmp_path / "toy/prepared/public/sample_submission.csv"
    arguments = ["grade", "--competition", "toy", "--data-dir", str(tmp_path), str(sample)]
    assert module.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["score"] == 0.5


# ------------------------------------------------------------------------------------------------
# Equal to mlebench: synthetic data of the right columns, synthetic leaderboards

CHECKOUT = os.environ.get("MLEBENCH_CHECKOUT")
needs_checkout = pytest.mark.skipif(
    not CHECKOUT, reason="MLEBENCH_CHECKOUT does not name a checkout of openai/mle-bench")
AUTHORS = ["EAP", "HPL", "MWS"]
NOMAD = ["formation_energy_ev_natom", "bandgap_energy_ev"]
# competition: (id column, target columns, teams, the sample's values, name of the sample)
SPECS = {
    "spooky-author-identification": ("id", AUTHORS, 1244, (0.4, 0.29, 0.31),
                                     "sample_submission.csv"),
    "random-acts-of-pizza": ("request_id", ["requester_received_pizza"], 462, (0,),
                             "sampleSubmission.csv"),
    "tabular-playground-series-may-2022": ("id", ["target"], 149, (0.5,), "sample_submission.csv"),
    "tabular-playground-series-dec-2021": ("Id", ["Cover_Type"], 57, (2,), "sample_submission.csv"),
    "nomad2018-predict-transparent-conductors": ("id", NOMAD, 878, (0.1779, 1.8892),
                                                 "sample_submission.csv"),
}
ROWS = 120


def write_data(name: str, data: Path) -> None:
    """<data>/<name>/prepared/{public,private} with the columns that prepare.py gives them."""
    rng = np.random.default_rng(len(name))
    public, private = data / name / "prepared/public", data / name / "prepared/private"
    public.mkdir(parents=True)
    private.mkdir()
    key, targets, _, constants, sample_name = SPECS[name]
    if name.startswith("spooky"):
        ids = [f"id{n:05}" for n in rng.permutation(99999)[:ROWS]]
        label = rng.integers(3, size=ROWS)
        answers = pd.DataFrame(np.eye(3, dtype=int)[label], columns=AUTHORS)
        answers.insert(0, "id", ids)
        test = pd.DataFrame({"id": ids, "text": [f"It was dark, {AUTHORS[i]} said." for i in label]})
        test.assign(author=[AUTHORS[i] for i in label]).to_csv(public / "train.csv", index=False)
    elif name.startswith("random"):
        ids = [f"t3_{n:x}" for n in rng.permutation(1 << 20)[:ROWS]]
        answers = pd.DataFrame({key: ids, targets[0]: rng.integers(2, size=ROWS)})
        test = [{"request_id": i, "request_text": "Hungry.", "hint": int(y)}
                for i, y in zip(ids, answers[targets[0]])]
        (public / "test.json").write_text(json.dumps(test))
        (public / "train.json").write_text(json.dumps(test))
        test = None
    else:
        answers = pd.DataFrame({key: rng.permutation(900_000)[:ROWS]})
        for target in targets:
            answers[target] = (rng.integers(1, 8, ROWS) if target == "Cover_Type" else
                               rng.integers(2, size=ROWS) if target == "target" else
                               rng.gamma(2.0, 0.5, ROWS).round(4))
            answers[f"f_{target}"] = answers[target] + rng.normal(0, 0.3, ROWS)
        test = answers.drop(columns=targets)
        answers.to_csv(public / "train.csv", index=False)
    answers.to_csv(private / "test.csv", index=False)
    if test is not None:
        test.to_csv(public / "test.csv", index=False)
    sample = answers[[key]].copy()
    sample[targets] = constants
    sample.to_csv(public / sample_name, index=False)


def submissions(name: str, prepared: Path) -> dict[str, bytes]:
    """Good, bad and malformed files, by what they are."""
    key, targets, _, _, sample_name = SPECS[name]
    rng = np.random.default_rng(1)
    truth = pd.read_csv(prepared / "private/test.csv")[[key, *targets]]
    sample = pd.read_csv(prepared / "public" / sample_name)

    def guess(noise: float) -> pd.DataFrame:
        """The truth, the worse the larger the noise; always of the right form."""
        frame = truth.copy()
        if name.startswith("tabular-playground-series-dec"):
            wrong = rng.random(ROWS) < noise
            frame.loc[wrong, targets[0]] = rng.integers(1, 8, wrong.sum())
        elif name.startswith("nomad"):
            frame[targets] = np.abs(frame[targets] + rng.normal(0, 2 * noise, (ROWS, 2)))
        else:
            wrong = rng.random(ROWS) < noise / 2  # a blur alone would leave the ranks as they are
            frame.loc[wrong, targets] = frame.loc[wrong, targets].to_numpy()[::-1]
            blurred = frame[targets] * (1 - noise) + noise * rng.random((ROWS, len(targets)))
            total = blurred.sum(axis=1) if len(targets) > 1 else 1
            frame[targets] = blurred.div(total, axis=0) if len(targets) > 1 else blurred
        return frame

    def csv(frame: pd.DataFrame, **options) -> str:
        return frame.to_csv(index=False, **options)

    good, found = guess(0.2), {}
    for noise in (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        found[f"guess of noise {noise}"] = csv(guess(noise))
    plain = csv(good)
    lines = plain.splitlines()
    first = good[targets[0]].dtype

    def with_cell(value: str, column: int = 1) -> str:
        fields = [line.split(",") for line in lines]
        fields[5][column] = value
        return "\n".join(map(",".join, fields)) + "\n"

    found |= {
        "sample": csv(sample), "shuffled": csv(good.sample(frac=1, random_state=0)),
        "columns reversed": csv(good[good.columns[::-1]]),
        "another column": csv(good.assign(note="x")),
        "index written": good.to_csv(), "quoted": csv(good, quoting=1),
        "17 digits": csv(good, float_format="%.17g"), "3 digits": csv(good, float_format="%.3f"),
        "exponents": csv(good, float_format="%.12e"), "CRLF": plain.replace("\n", "\r\n"),
        "old Macintosh": plain.replace("\n", "\r"), "byte order mark": "\ufeff" + plain,
        "no last newline": plain.rstrip("\n"), "blank lines": plain.replace("\n", "\n\n"),
        "blank line first": "\n" + plain, "spaces after commas": plain.replace(",", ", "),
        "unnamed index": lines[0] + "\n" + "\n".join(f"{i},{l}" for i, l in enumerate(lines[1:])),
        "float ids": csv(good.assign(**{key: good[key] + 0.0}) if good[key].dtype != object and
                         pd.api.types.is_numeric_dtype(good[key]) else good.assign(x=1.5)),
        "a row missing": csv(good[:-1]), "a row twice": csv(pd.concat([good, good[-1:]])),
        "all rows twice": csv(pd.concat([good, good])), "all rows thrice": csv(pd.concat([good] * 3)),
        "an id twice": csv(good.assign(**{key: [good[key][0], *good[key][:-1]]})),
        "an unknown id": with_cell("987654321", 0), "an empty id": with_cell("", 0),
        "id column missing": csv(good[targets]), "target missing": csv(good[[key]]),
        "id column renamed": plain.replace(key, "key", 1),
        "target renamed": plain.replace(targets[0], "guess", 1),
        "upper-case header": lines[0].upper() + "\n" + "\n".join(lines[1:]),
        "no header": "\n".join(lines[1:]), "header only": lines[0] + "\n",
        "a target column twice": csv(pd.concat([good, good[targets]], axis=1)),
        "semicolons": plain.replace(",", ";"), "tabs": plain.replace(",", "\t"),
        "NaN": with_cell("nan"), "NA": with_cell("NA"), "empty cell": with_cell(""),
        "infinity": with_cell("inf"), "minus infinity": with_cell("-inf"),
        "overflow": with_cell("1e400"), "negative": with_cell("-0.5"), "above one": with_cell("1.5"),
        "large": with_cell("123456"), "text": with_cell("yes"), "underscore": with_cell("1_0"),
        "hexadecimal": with_cell("0x1"), "Arabic digit": with_cell("\u0661"),
        "True": with_cell("True"), "all True": csv(good.assign(**{targets[0]: True})),
        "text all over": csv(good.assign(**{targets[0]: "a"})),
        "missing all over": csv(good.assign(**{targets[0]: np.nan})),
        "percent": csv(good.assign(**{targets[0]: good[targets[0]].astype(str) + "%"})),
        "a long row": plain + lines[1] + ",7\n", "a long row first": "\n".join(
            [lines[0], lines[1] + ",7", *lines[2:]]),
        "a short row": "\n".join([*lines[:4], lines[4].split(",")[0], *lines[5:]]),
        "unclosed quote": plain + '"', "quote in a cell": with_cell('0.5"'),
        "comment": plain + "# that was it\n", "JSON": good.to_json(orient="records"),
        "HTML": good.to_html(index=False), "empty": "", "blank": "\n \n", "one word": "nothing",
        "a thousand columns": ",".join(f"c{i}" for i in range(1000)) + "\n",
    }
    assert first.kind in "if"
    files = {what: text.encode() for what, text in found.items()}
    files |= {"UTF-16": plain.encode("utf-16"), "Latin-1": (plain + "\u00e9,1\n").encode("latin-1"),
              "NUL bytes": with_cell("\0").encode(), "binary": rng.bytes(4000)}
    return files


@pytest.fixture(scope="module")
def mlebench(tmp_path_factory):
    """(data folder, mlebench.grade), from a copy of the checkout with leaderboards of our own."""
    folder = tmp_path_factory.mktemp("mlebench")
    here, rng = os.getcwd(), np.random.default_rng(0)
    shutil.copytree(Path(CHECKOUT, "mlebench"), folder / "copy/mlebench")
    for name in [n for n in sys.modules if n.partition(".")[0] == "mlebench"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder / "copy"))
    os.chdir(folder)  # mlebench puts a cache where it is imported
    for name, (_, _, teams, _, _) in SPECS.items():
        write_data(name, folder / "data")
        # Scores that submissions reach exactly are on the board: every mark is met by a tie.
        files = submissions(name, folder / "data" / name / "prepared")
        grade = importlib.import_module(f"mlebench.competitions.{name}.grade").grade
        answers = pd.read_csv(folder / "data" / name / "prepared/private/test.csv")
        reached = set()
        for what in [w for w in files if w.startswith("guess")]:
            (folder / "x.csv").write_bytes(files[what])
            reached.add(round(grade(pd.read_csv(folder / "x.csv"), answers.copy()), 5))
        best = sorted(reached, reverse=not name.startswith(("spooky", "nomad")))
        gold, silver, bronze = medal_ranks(teams)
        board = [best[1]] * gold + [best[3]] * (silver - gold) + [best[5]] * (bronze - silver)
        board += sorted(rng.choice(best[6:], teams - bronze).tolist(), key=best.index)
        (folder / f"copy/mlebench/competitions/{name}/leaderboard.csv").write_text(
            "teamId,score\n" + "".join(f"{i},{score}\n" for i, score in enumerate(board)))
    yield folder / "data", importlib.import_module("mlebench.grade")
    os.chdir(here)
    sys.path.remove(str(folder / "copy"))


def theirs_of(grade, competition, path: Path) -> dict:
    """What `mlebench grade` says of a file; that it crashes, on some, is a refusal too."""
    try:
        return grade.grade_csv(path, competition).to_dict()
    except Exception:
        return {"valid_submission": False, "score": None, "above_median": False,
                "gold_medal": False, "silver_medal": False, "bronze_medal": False}


@needs_checkout
def test_the_named_splits_are_those_of_mlebench(mlebench):
    splits = Path(CHECKOUT, "experiments/splits")
    assert sorted(LITE) == sorted((splits / "low.txt").read_text().split())
    assert sorted(module._all_of_mlebench()) == sorted((splits / "split75.txt").read_text().split())
    listed = Path(module.__file__).parent / "examples/mlebench_medium.txt"
    ids = [line for line in listed.read_text().splitlines() if not line.startswith("#")]
    left_out = {"hubmap-kidney-segmentation", "multi-modal-gesture-recognition"}
    assert set(ids) == set((splits / "medium.txt").read_text().split()) - left_out


@needs_checkout
@pytest.mark.parametrize("name", SPECS)
def test_grades_equal_those_of_mlebench(mlebench, tmp_path, name):
    from mlebench.registry import registry

    data, grade = mlebench
    theirs = registry.set_data_dir(data).get_competition(name)
    read = theirs.leaderboard.parent.parent  # the same files, read by us
    competitions = [Competition.from_mlebench(name, data), Competition.from_mlebench(name, data, read)]
    files = submissions(name, data / name / "prepared")
    assert len(files) >= 50
    medals, wrong, valid = set(), [], 0
    for what, content in files.items():
        path = tmp_path / "submission.csv"
        path.write_bytes(content)
        report = theirs_of(grade, theirs, path)
        medal = next((m for m in ("gold", "silver", "bronze") if report[f"{m}_medal"]), "none")
        expected = report["valid_submission"], report["score"], medal, report["above_median"]
        medals.add(medal)
        valid += report["valid_submission"]
        for competition in competitions:
            ours = competition.grade(content)
            if (ours.valid, ours.score, ours.medal, ours.above_median) != expected:
                wrong.append((what, expected, ours))
            if "gold_threshold" in report:
                marks = [report[f"{m}_threshold"] for m in ("gold", "silver", "bronze", "median")]
                assert marks == [competition.gold, competition.silver, competition.bronze,
                                 competition.median]
                assert report["is_lower_better"] == competition.lower_is_better
    print(f"\n{name}: {len(files)} submissions, {valid} valid, {len(files) - valid} not, medals "
          f"{sorted(medals)}, {len(competitions[0].leaderboard)} teams: {len(wrong)} differ")
    assert not wrong
    assert medals == {"gold", "silver", "bronze", "none"}


WRITE = """
import json, os
import numpy as np, pandas as pd
name = [f for f in os.listdir('input') if f.lower().startswith('sample')][0]
s = pd.read_csv('input/' + name)
if os.path.exists('input/test.json'):
    s['requester_received_pizza'] = [r['hint'] for r in json.load(open('input/test.json'))]
else:
    t = pd.read_csv('input/test.csv')
    for c in s.columns[1:]:
        if 'text' in t:
            s[c] = t.text.str.contains(c) * 0.94 + 0.02
        elif c == 'Cover_Type':
            s[c] = t['f_' + c].round().clip(1, 7).astype(int)
        elif c == 'target':
            s[c] = t['f_' + c].clip(0, 1)
        else:
            s[c] = t['f_' + c].clip(0, None)
BREAK
s.to_csv('submission.csv', index=False)
print('validation score:', SCORE)
"""


class ScriptedEngine:
    """Writes scripts that work, fail, or submit what no grader takes."""

    max_model_len = 10_000

    def __init__(self, seed: int):
        self.seed = seed

    def generate(self, prompt_ids, n, max_tokens, temperature):
        step = int("".join(map(chr, prompt_ids)).rpartition("/")[2])
        change = ["s = s[:-1]", "", "raise ValueError('no')", "s.iloc[:, 1:] = s.iloc[::-1, 1:].values"]
        script = WRITE.replace("BREAK", change[(step + self.seed) % 4] if self.seed < 3 else change[0])
        ids = [ord(c) for c in f"```python\n{script.replace('SCORE', str(step))}\n```"]
        return [Completion(ids, np.zeros(len(ids), np.float32), "stop")], 0


@needs_checkout
def test_mlebench_grade_takes_the_submissions_of_an_evaluation(mlebench, tmp_path):
    """submissions.jsonl of a real evaluation, scripts in the sandbox, into the real command."""
    data, _ = mlebench
    runs, agent = [], AgentConfig(steps=2, drafts=2)
    with Sandbox(slots=1, timeout=120, cpu_seconds=60) as sandbox:
        if sandbox.problem:
            pytest.skip(sandbox.problem)
        for name in SPECS:
            competition = Competition.from_mlebench(name, data)
            for seed in range(4):  # in the last no step is valid
                runs.append(run_agent(competition, seed, ScriptedEngine(seed), sandbox,
                                      FakePrompter(SPECS), RolloutConfig(timeout=120), agent,
                                      tmp_path / f"{name}-{seed}"))
    report = write_report(tmp_path / "report.json", runs, agent, "scripted")
    command = [sys.executable, "-m", "mlebench.cli", "grade", "--submission",
               str(tmp_path / "submissions.jsonl"), "--output-dir", str(tmp_path / "graded"),
               "--data-dir", str(data)]
    copy = next(p for p in sys.path if (Path(p) / "mlebench/competitions").is_dir())
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": copy},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next((tmp_path / "graded").iterdir()).read_text())
    rows = report["runs"]
    print(f"\nmlebench grade: {theirs['total_runs']} runs, {theirs['total_valid_submissions']} valid, "
          f"{theirs['total_medals']} medals")
    assert theirs["total_runs"] == len(rows) == 20
    assert theirs["total_valid_submissions"] == sum(row["valid"] for row in rows) == 15
    assert theirs["total_medals"] == sum(row["medal"] != "none" for row in rows) > 0
    for row, graded in zip(rows, theirs["competition_reports"]):
        assert row["competition_id"] == graded["competition_id"]
        assert row["score"] == graded["score"] and row["valid"] == graded["valid_submission"]
        assert row["above_median"] == graded["above_median"]
        for medal in ("gold", "silver", "bronze"):
            assert (row["medal"] == medal) == graded[f"{medal}_medal"]
