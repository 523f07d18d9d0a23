"""Mini MLE-bench: layout, grader, leaderboard and disguise of every competition.

    python -m pytest tests/test_mini_mlebench.py -q
"""

import filecmp
import importlib.util
import os
import re
import sys
import time
import types

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn import metrics as sk

import mini_mlebench as mini

REFERENCES = mini.load_references(0)
every = pytest.mark.parametrize("spec", mini.SPECS, ids=lambda spec: spec.id)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini")
    assert mini.main(["--out", str(out)]) == 0
    return out


def lower(spec):
    return mini.METRICS[spec.metric].lower_is_better


def human_rank(board, score, lower_is_better):
    """Share of the teams that the score ties or beats."""
    return float(np.mean(board >= score if lower_is_better else board <= score))


def rank(spec, score):
    return human_rank(mini.leaderboard(spec, REFERENCES[spec.id], 0), score, lower(spec))


def load_grader(folder):
    where = importlib.util.spec_from_file_location(f"grade_{folder.name}", folder / "grade.py")
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    return module


# --- what is written -------------------------------------------------------------------------

def test_breadth_of_both_splits():
    for split, least in (("train", 12), ("heldout", 6)):
        specs = [spec for spec in mini.SPECS if spec.split == split]
        assert len(specs) >= least
        assert {spec.metric for spec in specs} == set(mini.METRICS)
        assert {spec.kind for spec in specs} == {
            "binary classification", "multi-class classification", "regression"}
        assert {spec.origin for spec in specs} >= {
            "generated", "breast_cancer", "diabetes", "digits"}
        assert 1 <= sum(len(spec.submission_columns) > 2 for spec in specs) <= 3


@every
def test_layout_and_config(spec, built):
    root = built / spec.split / spec.id
    config = yaml.safe_load((root / "config.yaml").read_text())
    assert config["id"] == spec.id and config["grader"]["name"] == spec.metric
    assert config["origin"] == spec.origin and config["awards_medals"] is True
    assert {"name", "competition_type", "prizes", "description", "preparer"} <= set(config)
    data = built / spec.split
    answers = pd.read_csv(data / config["dataset"]["answers"])
    sample = pd.read_csv(data / config["dataset"]["sample_submission"])
    public = root / "prepared" / "public"
    train, test = pd.read_csv(public / "train.csv"), pd.read_csv(public / "test.csv")

    assert (len(train), len(test)) == mini.ROWS and 4 <= len(spec.features) <= 16
    assert list(train.columns) == [spec.id_column, *spec.features, spec.target]
    assert list(test.columns) == [spec.id_column, *spec.features]
    assert list(sample.columns) == spec.submission_columns
    assert list(answers.columns) == [spec.id_column, spec.target]
    assert (sample[spec.id_column] == test[spec.id_column]).all()
    assert not set(train[spec.id_column]) & set(test[spec.id_column])
    assert sample.drop(columns=spec.id_column).nunique().max() == 1
    # what a script that knows no name does
    assert [c for c in train.columns if c not in test.columns] == [spec.target]
    if len(spec.submission_columns) > 2:
        assert list(sample.columns[1:]) == sorted(train[spec.target].unique())
    if spec.labels:
        assert set(train[spec.target]) == set(answers[spec.target]) == set(spec.labels)


@every
def test_description_is_short_and_regular(spec, built):
    text = (built / spec.split / spec.id / "description.md").read_text()
    assert 40 <= len(text.split()) <= 90 and text.isascii()
    direction = "lower" if lower(spec) else "higher"
    lines = text.splitlines()
    assert lines[0] == f"# {spec.title}"
    assert f"Task: {spec.kind}." in lines
    assert f"Metric: {mini.METRICS[spec.metric].plain} ({direction} is better)." in lines
    assert f"Submission columns: {', '.join(spec.submission_columns)}." in lines
    assert ("generated" in lines[-1]) == (spec.origin == "generated")


def test_nothing_private_is_public(built):
    for spec in mini.SPECS:
        root = built / spec.split / spec.id
        assert sorted(p.name for p in (root / "prepared" / "public").iterdir()) == [
            "sample_submission.csv", "test.csv", "train.csv"]
        private = root / "prepared" / "private"
        assert [p.name for p in private.iterdir()] == ["test.csv"]
        assert private.stat().st_mode & 0o077 == 0


def test_same_seed_same_bytes_other_seed_other_data(built, tmp_path):
    assert mini.main(["--out", str(tmp_path)]) == 0
    paths = sorted(p.relative_to(built) for p in built.rglob("*") if p.is_file())
    assert paths == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert filecmp.cmpfiles(built, tmp_path, map(str, paths), shallow=False)[1:] == ([], [])
    for spec in mini.SPECS[::6]:
        assert not mini.build_files(spec, 1).train.equals(mini.build_files(spec, 0).train)


def test_names_are_disjoint():
    """No id, no column name occurs in two competitions, except class labels written as columns."""
    assert len({spec.id for spec in mini.SPECS}) == len(mini.SPECS)
    names = [name for spec in mini.SPECS for name in (spec.id_column, spec.target, *spec.features)]
    assert len(names) == len(set(names))
    assert set(names) <= mini.all_column_names()
    generic = {"id", "target", "label", "class", "y", "price", "age", "feature", "value", "score"}
    assert not generic & mini.all_column_names()


@pytest.mark.parametrize("arguments, reason", [
    (["--seed", "-1"], "--seed must be >= 0"),
    (["--seed", "5"], "add --recompute-references"),
])
def test_errors_are_one_line_and_status_2(arguments, reason, tmp_path, capsys):
    assert mini.main(["--out", str(tmp_path / "x"), *arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_another_seed_with_its_own_references(tmp_path, monkeypatch):
    """Two competitions and three pipelines, to be quick."""
    few = [spec for spec in mini.SPECS if spec.id in ("glacier-melt", "kiln-cracks")]
    some, full = ("dummy", "forest", "boosting"), mini.pipelines
    monkeypatch.setattr(mini, "SPECS", few)
    monkeypatch.setattr(mini, "pipelines", lambda *a: {n: full(*a)[n] for n in some})
    arguments = ["--out", str(tmp_path), "--seed", "5", "--recompute-references"]
    assert mini.main(arguments) == 0
    scores = mini.load_references(5, tmp_path / "references.json")
    assert {spec.id for spec in few} == set(scores)
    assert all(set(each) == set(some) for each in scores.values())
    board = pd.read_csv(tmp_path / "heldout" / "glacier-melt" / "leaderboard.csv")["score"]
    forest = human_rank(board.to_numpy(), scores["glacier-melt"]["forest"], True)
    assert forest == pytest.approx(0.5, abs=0.02)


def test_foreign_directories_are_left_alone(tmp_path, capsys):
    (tmp_path / "train" / "mine").mkdir(parents=True)
    assert mini.main(["--out", str(tmp_path)]) == 2
    assert "mine, not one of ours" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "train"]


# --- graders -----------------------------------------------------------------------------------

def perfect(spec, answers):
    """A submission that scores best, in shuffled order of ids."""
    out = answers.copy()
    if len(spec.submission_columns) > 2:
        out = answers[[spec.id_column]].copy()
        for label in spec.submission_columns[1:]:
            out[label] = (answers[spec.target] == label).astype(float)
    return out.sample(frac=1, random_state=0)


@every
def test_grader_accepts_and_refuses(spec, built):
    root = built / spec.split / spec.id
    module = load_grader(root)
    answers = pd.read_csv(root / "prepared" / "private" / "test.csv")
    good = perfect(spec, answers)
    best = module.grade(good, answers)
    assert isinstance(best, float) and best == pytest.approx(0.0 if lower(spec) else 1.0)
    sample = pd.read_csv(root / "prepared" / "public" / "sample_submission.csv")
    assert np.isfinite(module.grade(sample, answers))

    key, value = spec.id_column, spec.submission_columns[1]

    def changed(column, new):
        frame = good.copy().astype({column: object})
        frame.iloc[3, frame.columns.get_loc(column)] = new
        return frame

    refusals = {
        "must have the columns": good.rename(columns={value: "strange"}),
        "found": good.assign(extra=1.0),
        "rows; found": good.iloc[1:],
        "twice": changed(key, good[key].iloc[0]),
        "unknown id": changed(key, "nobody"),
        f"column {value}": changed(value, np.nan),
        f"column {value} ": changed(value, "no such thing"),
    }
    if mini.METRICS[spec.metric].form == "probability":
        refusals["probabilities in [0, 1]"] = changed(value, 1.5)
    if mini.METRICS[spec.metric].form != "label":
        refusals[f"column {value} holds 1 values that are not finite"] = changed(value, np.inf)
    else:
        refusals["which is not one of"] = changed(value, 77)
    if len(spec.submission_columns) > 2:
        refusals["sum to 1"] = good.assign(**{c: 0.5 for c in spec.submission_columns[1:]})
    for reason, frame in refusals.items():
        with pytest.raises(module.InvalidSubmission) as caught:
            module.grade(frame, answers)
        assert reason in str(caught.value) and "\n" not in str(caught.value)
        assert isinstance(caught.value, ValueError)


@every
def test_grader_agrees_with_scikit_learn(spec):
    files, rng = mini.build_files(spec, 0), np.random.default_rng(3)
    y, sub = files.answers[spec.target].to_numpy(), files.sample.copy()
    if spec.metric in ("accuracy", "f1"):
        guess = np.where(rng.random(len(y)) < 0.5, y, rng.choice(spec.labels, len(y)))
        expected = {"accuracy": sk.accuracy_score, "f1": sk.f1_score}[spec.metric](y, guess)
    elif len(spec.submission_columns) > 2:
        guess = rng.dirichlet(np.ones(len(spec.labels)), len(y)).clip(0.01)
        guess /= guess.sum(axis=1, keepdims=True)
        expected = sk.log_loss(y, guess)
    elif mini.METRICS[spec.metric].form == "probability":
        guess = np.round(rng.uniform(0.01, 0.99, len(y)), 1).clip(0.01, 0.99)  # with ties
        expected = {"roc_auc": sk.roc_auc_score, "log_loss": sk.log_loss}[spec.metric](y, guess)
    else:
        guess = y + rng.normal(size=len(y))
        expected = {"rmse": sk.root_mean_squared_error, "mae": sk.mean_absolute_error}[spec.metric](
            y, guess)
    sub[spec.submission_columns[1:]] = guess.reshape(len(y), -1)
    score = mini.load_grade(spec)(sub.sample(frac=1, random_state=1), files.answers)
    assert score == pytest.approx(expected)


def test_grader_inside_mlebench_raises_its_exception(monkeypatch):
    class InvalidSubmissionError(Exception):
        pass

    helpers = types.SimpleNamespace(InvalidSubmissionError=InvalidSubmissionError)
    monkeypatch.setitem(sys.modules, "mlebench.grade_helpers", helpers)
    files = mini.build_files(mini.SPECS[0], 0)
    with pytest.raises(InvalidSubmissionError):
        mini.load_grade(mini.SPECS[0])(files.sample.iloc[1:], files.answers)


# --- leaderboards ------------------------------------------------------------------------------

@every
def test_leaderboard_is_long_smooth_and_ordered(spec):
    board = mini.leaderboard(spec, REFERENCES[spec.id], 0)
    assert 1000 <= len(board) < 1400 and np.isfinite(board).all()
    assert (np.diff(board) >= 0).all() if lower(spec) else (np.diff(board) <= 0).all()
    assert (board[0] < board[-1]) == lower(spec)
    assert pd.Series(board).value_counts().max() <= len(board) // 50
    marks = mini.thresholds(board)
    assert len({marks[name] for name in ("gold", "silver", "bronze", "median")}) == 4


@every
def test_dummy_is_last_and_a_minority_of_models_gets_bronze(spec):
    scores = REFERENCES[spec.id]
    ranks = {name: rank(spec, score) for name, score in scores.items()}
    assert ranks["dummy"] <= 0.10
    single = [name for name in scores if name != "dummy" and not name.startswith("blend")]
    medals = [name for name in single if ranks[name] > 0.9]
    assert 1 <= len(medals) <= len(single) // 4, medals
    assert 0.4 <= ranks["forest"] <= 0.6


def test_the_best_family_differs_between_competitions():
    for split, least in (("train", 6), ("heldout", 4)):
        best = set()
        for spec in (s for s in mini.SPECS if s.split == split):
            single = {n: s for n, s in REFERENCES[spec.id].items() if not n.startswith("blend")}
            best.add((min if lower(spec) else max)(single, key=single.get).split()[0])
        assert len(best) >= least, best


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@every
def test_default_forest_and_a_medal_by_a_fresh_fit(spec, built):
    """Fits again: the stored references are not just numbers."""
    files = mini.build_files(spec, 0)
    grade, matrices = mini.load_grade(spec), mini.features_of(files, spec)
    models = mini.pipelines(spec, 0)
    forest = mini.submission_of(spec, files, models["forest"], *matrices)
    assert 0.3 <= rank(spec, grade(forest, files.answers)) <= 0.7
    assert rank(spec, grade(files.sample, files.answers)) <= 0.1
    single = [name for name in models if name != "dummy" and not name.startswith("blend")]
    best = sorted(single, key=REFERENCES[spec.id].get, reverse=not lower(spec))[:2]
    board = mini.leaderboard(spec, REFERENCES[spec.id], 0)
    bronze = mini.thresholds(board)["bronze"]
    scores = (grade(mini.submission_of(spec, files, models[name], *matrices), files.answers)
              for name in best)
    assert any(score <= bronze if lower(spec) else score >= bronze for score in scores)


def test_sandbox_reads_and_grades_them(built):
    sandbox = pytest.importorskip("sandbox")
    for spec in mini.SPECS:
        root = built / spec.split / spec.id
        competition = sandbox.Competition.load(root)
        assert competition.lower_is_better == lower(spec) and competition.id == spec.id
        sample = (root / "prepared" / "public" / "sample_submission.csv").read_bytes()
        grade = competition.grade(sample)
        assert grade.valid and grade.medal == "none" and grade.human_rank <= 0.1
        assert not grade.above_median
        refused = competition.grade(sample.replace(spec.id_column.encode(), b"nonsense", 1))
        assert not refused.valid and spec.id_column in refused.reason
        marks = mini.thresholds(competition.leaderboard)
        for name in ("gold", "silver", "bronze", "median"):
            assert getattr(competition, name) == pytest.approx(marks[name])


# --- disguise ------------------------------------------------------------------------------------

REAL = [spec for spec in mini.SPECS if spec.origin != "generated"]


def column_ranks(x):
    """(n, p) -> ranks of each column, standardised: blind to any monotone change of units."""
    return mini.standard(pd.DataFrame(x).rank().to_numpy())


def originals(spec):
    """Bundled columns that vary; for digits the block means as well."""
    x, _ = mini.bundled(spec.origin)
    x = x[:, x.std(axis=0) > 0]
    return np.hstack([x, mini.digit_blocks(np.arange(len(x)))]) if spec.origin == "digits" else x


def matched(columns, assigned, signs, x, source):
    """Share of the rows whose nearest bundled row, over the assigned columns, is the true one."""
    candidates = x[:, assigned] * signs
    nearest = [((candidates - row) ** 2).sum(axis=1).argmin() for row in columns]
    return np.mean(np.array(nearest) == source)


@pytest.mark.parametrize("spec", REAL, ids=lambda spec: spec.id)
def test_real_rows_cannot_be_matched_to_the_bundled_data(spec):
    files = mini.build_files(spec, 0)
    table = np.vstack(mini.features_of(files, spec))
    raw = originals(spec)
    columns, x, source = column_ranks(table), column_ranks(raw), files.source
    assert len(source) == len(table)

    # An upper bound: the attacker is told which original column is most like which of ours.
    p = columns.shape[1]
    with np.errstate(invalid="ignore"):  # a pixel may be blank in all images of some digits
        likeness = np.nan_to_num(np.corrcoef(columns.T, x[source].T)[:p, p:])
    assert np.abs(likeness).max() < 0.85
    assigned = np.abs(likeness).argmax(axis=1)
    signs = np.sign(likeness[np.arange(p), assigned])
    assert matched(columns, assigned, signs, x, source) < 0.06

    # What a script can really do: pair the columns whose distributions look alike, then rows.
    levels = np.linspace(0.02, 0.98, 49)
    ours = np.quantile(mini.standard(table), levels, axis=0)[:, :, None]
    theirs = np.quantile(mini.standard(raw), levels, axis=0)[:, None, :]
    up, down = ((ours - theirs) ** 2).mean(axis=0), ((ours + theirs[::-1]) ** 2).mean(axis=0)
    assigned = np.minimum(up, down).argmin(axis=1)
    signs = np.where(up[np.arange(p), assigned] <= down[np.arange(p), assigned], 1, -1)
    assert matched(columns, assigned, signs, x, source) < 0.03


def test_the_matching_attack_works_on_undisguised_rows():
    """The test above would notice: rescaled but unmixed columns are matched at once."""
    raw, rng = mini.bundled("diabetes")[0], np.random.default_rng(0)
    source = rng.permutation(len(raw))[:300]
    columns, x = column_ranks(np.exp(raw[source] * 3)), column_ranks(raw)
    assert matched(columns, np.arange(raw.shape[1]), 1, x, source) > 0.9


def test_heldout_digits_are_other_images():
    images = {split: set() for split in mini.SPLITS}
    for spec in REAL:
        if spec.origin == "digits":
            images[spec.split] |= set(mini.build_files(spec, 0).source)
    assert images["train"] and images["heldout"] and not images["train"] & images["heldout"]


# --- speed -----------------------------------------------------------------------------------

LARGEST = sorted(mini.SPECS, key=lambda spec: spec.rows[0] * len(spec.features))[-3:]


@pytest.mark.parametrize("spec", LARGEST, ids=lambda spec: spec.id)
def test_a_forest_script_is_quick(spec):
    """CPU seconds, so that a busy machine does not fail it; generous against slow machines."""
    files = mini.build_files(spec, 0)
    x_train, x_test = mini.features_of(files, spec)
    start = time.process_time()
    for _ in range(2):  # half of what cross-validation and the last fit cost
        mini.submission_of(spec, files, mini.pipelines(spec, 0)["forest"], x_train, x_test)
    assert time.process_time() - start < 2.0


def test_names_are_plain():
    assert all(re.fullmatch(r"[a-z0-9-]+", spec.id) for spec in mini.SPECS)
