"""The study, with programs that only pretend to train and to evaluate.

    python -m pytest tests/test_study.py
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import bench_async
import study
from test_sandbox_attacks import make_competition

QUALITY = {"full": 0.7, "no-buffer": 0.6, "uniform": 0.5, "before": 0.2}
COMPETITIONS = {"train": ("rail-wear", "hive-swarms", "tide-mills"), "heldout": ("loom-breaks",)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("competitions")
    for split, names in COMPETITIONS.items():
        for name in names:
            home = make_competition(folder / split).public_dir.parent.parent
            config = (home / "config.yaml").read_text().replace("toy", name)
            (home / "config.yaml").write_text(config)
            home.rename(folder / split / name)
    return folder


GROUPS = "".join(json.dumps(record) + "\n" for record in [  # a buffer's log
    {"traces": [{"reward": 0.1}, {"reward": 0.1}]}, {"removed": "toy/improve/x"},
    {"traces": [{"reward": 0.0}, {"reward": 0.1}]}, {"traces": [{"reward": 0.5}] * 2}])


class Programs:
    """Stands for train.py and rollout.py: writes what they leave behind, and remembers calls."""

    def __init__(self):
        self.calls, self.cut = [], None

    def __call__(self, command, log):
        name, flags = Path(command[0]).name, [str(word) for word in command[1:]]
        value = {flag: flags[i + 1] for i, flag in enumerate(flags[:-1]) if flag.startswith("--")}
        self.calls.append((name, flags, value))
        (self.train if name == "train.py" else self.evaluate)(value)

    def train(self, value):
        run = Path(value.get("--resume") or value["--run-dir"])
        if "--resume" not in value:
            assert not run.exists()
            run.mkdir(parents=True)
            (run / "config.json").write_text(json.dumps({"responses": 4, "groups": 2}))
        if self.cut:  # killed, with or without a checkpoint
            cut, self.cut = self.cut, None
            if cut == "after a checkpoint":
                self.checkpoint(run, 1, epoch=0)
            raise KeyboardInterrupt
        rows = [{"groups": 2.0, "groups_trained": 2.0 - s % 2, "seconds_step": 30.0,
                 "unique_scripts": 8, "reused_rate": 0.0} for s in range(3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "groups.jsonl").write_text(GROUPS)
        self.checkpoint(run, 3, epoch=int("--resume" in value))

    def checkpoint(self, run, step, epoch):
        folder = run / f"checkpoints/step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "curriculum.json").write_text(json.dumps({"epoch": epoch}))
        (folder / "DONE").touch()

    def evaluate(self, value):
        out = Path(value["--out"])
        arm = out.parent.name.rpartition("-")[0] or out.parent.name
        names = sorted(path.name for path in Path(value["--competitions"]).iterdir())
        medal = "none" if arm == "no-buffer" else "gold"
        rows = [{"competition_id": name, "seed": seed, "valid": True, "medal": medal, "score": 1.0,
                 "human_rank": QUALITY[arm] + 0.01 * seed, "above_median": True,
                 "human_rank_by_step": [QUALITY[arm] / 2, QUALITY[arm] + 0.01 * seed],
                 "first_draft_valid": False, "steps_to_first_valid": 3}
                for seed in range(int(value["--seeds"])) for name in names]
        out.write_text(json.dumps({"runs": rows}))


@pytest.fixture
def programs(monkeypatch):
    fake = Programs()
    monkeypatch.setattr(study, "call", fake)
    return fake


def arguments(folders, out, *more):
    return ["--out", str(out), "--competitions", str(folders / "train"), "--heldout",
            str(folders / "heldout"), "--steps", "3", "--eval-seeds", "2", "--seeds", "2",
            "--arms", "full", "no-buffer", *more]


def results(out):
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/result.json")}


def test_a_study_from_start_to_end_and_nothing_to_do_the_second_time(folders, tmp_path, programs):
    more = ["--model", str(folders), "--retries", "5", "--", "--groups", "2", "--cpu-seconds", "7",
            "--output-chars", "200", "--max-response-tokens", "700", "--unsafe"]
    assert study.main(arguments(folders, tmp_path, *more)) == 0
    assert set(results(tmp_path)) == {"before", "full-0", "full-1", "no-buffer-0", "no-buffer-1"}
    trained = [(flags, value) for name, flags, value in programs.calls if name == "train.py"]
    assert [value["--seed"] for _, value in trained] == ["0", "0", "1", "1"]
    assert ["--no-buffer" in flags for flags, _ in trained] == [False, True, False, True]
    assert all(value["--groups"] == "2" and value["--heldout"] == "" for _, value in trained)
    assert all(value["--model"] == str(folders) for _, value in trained)
    evaluated = [value for name, _, value in programs.calls if name == "rollout.py"]
    assert all("--unsafe" in flags for _, flags, _ in programs.calls)  # training and agents alike
    assert [value["--model"] for value in evaluated] == [str(folders)] + [
        str(tmp_path / name / "policy") for name in ("full-0", "no-buffer-0", "full-1",
                                                     "no-buffer-1")]
    asked = "--retries", "--cpu-seconds", "--output-chars", "--max-response-tokens"
    assert all([value[flag] for flag in asked] == ["5", "7.0", "200", "700"]
               for value in evaluated)  # the prompts and lengths that it trained on
    table = (tmp_path / "table.md").read_text()
    row = next(line for line in table.splitlines() if "no buffer" in line)
    assert "| no buffer: drafts only | 2 | 0.605 ± 0.000 | -0.100 [-0.100, -0.100] |" in row
    assert "| 0.300 ± 0.000 | -0.050 [-0.050, -0.050] |" in row  # the first script
    assert "| 0.0 ± 0.0 | -100.0 [-100.0, -100.0] | 100.0 ± 0.0 |" in row  # medals; valid
    assert "2.00 ± 0.00" in row  # extra steps: 3 - 1
    # 1 of 6 groups by its metrics, 2 of 3 by its log; 3 steps of half a minute
    assert "| 16.7 ± 0.0 | 66.7 ± 0.0 | 1.5 ± 0.0 |" in row
    assert "Training seeds 0, 1; 3 steps of 8 rollouts" in table
    assert (tmp_path / "study.png").stat().st_size > 10_000
    before = list(programs.calls)
    assert study.main(arguments(folders, tmp_path, *more)) == 0
    assert programs.calls == before


@pytest.mark.parametrize("cut, flag", [("after a checkpoint", "--resume"),
                                       ("before the first", "--run-dir")])
def test_a_cut_run_is_taken_up_again(folders, tmp_path, programs, cut, flag):
    programs.cut = cut
    assert study.main(arguments(folders, tmp_path)) == 130
    assert set(results(tmp_path)) == {"before"}
    assert study.main(arguments(folders, tmp_path)) == 0
    trained = [value for name, _, value in programs.calls if name == "train.py"]
    assert Path(trained[1][flag]).name == "full-0" and len(trained) == 5
    assert results(tmp_path)["full-0"]["training"]["resumed"] == (flag == "--resume")


def test_held_out_competitions_are_looked_at_on_request_only(folders, tmp_path, programs):
    study.main(arguments(folders, tmp_path))
    assert not any("heldout" in str(part) for _, flags, value in programs.calls
                   for part in value.values())
    assert set(results(tmp_path)["full-0"]["evaluations"]) == {"train"}
    count = len(programs.calls)
    assert study.main(arguments(folders, tmp_path, "--final")) == 0
    assert [name for name, _, _ in programs.calls[count:]] == ["rollout.py"] * 5
    assert {r["competition_id"] for r in results(tmp_path)["full-0"]["evaluations"]["heldout"]} \
        == {"loom-breaks"}
    assert "| held-out | no buffer: drafts only |" in (tmp_path / "table.md").read_text()


def test_both_splits_take_one_engine_start(folders, tmp_path, programs):
    study.main(arguments(folders, tmp_path, "--final", "--dev", "rail-wear"))
    evaluations = [value for name, _, value in programs.calls if name == "rollout.py"]
    assert len(evaluations) == 5
    assert Path(evaluations[0]["--competitions"]).name == "train+dev+heldout"
    trained = next(value for name, _, value in programs.calls if name == "train.py")
    assert sorted(p.name for p in Path(trained["--competitions"]).iterdir()) == [
        "hive-swarms", "tide-mills"]


def test_runs_of_other_settings_are_not_mixed(folders, tmp_path, programs, capsys):
    study.main(arguments(folders, tmp_path))
    capsys.readouterr()
    assert study.main(arguments(folders, tmp_path, "--retries", "3")) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "retries 8, not 3" in error and "--out" in error


def test_evaluation_seeds_may_be_added(folders, tmp_path, programs):
    def of(split):
        return [study.evaluation_seeds(result, split) for result in results(tmp_path).values()]

    study.main(arguments(folders, tmp_path))
    for seeds in (["2", "3"], ["3"], ["1"]):  # of held-out competitions alone; of all; fewer
        count = len(programs.calls)
        assert study.main(arguments(folders, tmp_path, "--final", "--eval-seeds", *seeds)) == 0
        calls = [(name, value["--seeds"], Path(value["--competitions"]).name, Path(value["--out"]))
                 for name, _, value in programs.calls[count:]]
        assert of("heldout") == [3] * 5 and of("train") == [2 if seeds == ["2", "3"] else 3] * 5
        # In the place of the runs that there are, so that they are gone on with.
        assert {out.name for *_, out in calls} <= {"report.json"}
        assert [call[:3] for call in calls] == {
            "2": [("rollout.py", "3", "heldout")], "3": [("rollout.py", "3", "train")],
            "1": []}[seeds[0]] * 5
        table = (tmp_path / "table.md").read_text()
        assert f"3 training competitions with {of('train')[0]} evaluation seeds, 1 held-out " \
               "competitions with 3 evaluation seeds; 20 agent steps" in table
    assert "| 0.710 ± 0.000 |" in table  # the mean of 0.70, 0.71, 0.72


def test_a_study_with_several_numbers_of_evaluation_seeds_says_so(folders, tmp_path, programs):
    study.main(arguments(folders, tmp_path))
    assert study.main(arguments(folders, tmp_path, "--arms", "uniform", "--eval-seeds", "4")) == 0
    assert "with 2 or 4 evaluation seeds" in (tmp_path / "table.md").read_text()


def test_runs_that_began_with_another_policy_are_not_mixed(folders, tmp_path, programs, capsys):
    model = tmp_path / "policy"
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_bytes(b"taught")
    assert study.main(arguments(folders, tmp_path / "out", "--model", str(model))) == 0
    weights.write_bytes(b"taught again")
    assert study.main(arguments(folders, tmp_path / "out", "--model", str(model))) == 2
    assert "model's weights" in capsys.readouterr().err


def test_runs_made_before_and_after_a_default_changed_are_not_mixed(folders, tmp_path, programs,
                                                                    capsys, monkeypatch):
    study.main(arguments(folders, tmp_path))
    capsys.readouterr()
    parse_config = study.parse_config

    def with_another_default(argv):
        config, others = parse_config(argv)
        return dataclasses.replace(config, tau=0.9), others

    monkeypatch.setattr(study, "parse_config", with_another_default)
    assert study.main(arguments(folders, tmp_path)) == 2
    assert "train.py's tau 1.0, not 0.9" in capsys.readouterr().err


def test_runs_of_other_flags_in_a_file_of_the_same_name_are_not_mixed(folders, tmp_path, programs,
                                                                      capsys):
    file = tmp_path / "flags.yaml"
    for tau, status in ((0.5, 0), (0.7, 2)):
        file.write_text(f"tau: {tau}\n")
        more = ("--", "--config", str(file))
        assert study.main(arguments(folders, tmp_path / "out", *more)) == status
    assert "train.py's tau 0.5, not 0.7" in capsys.readouterr().err


def test_other_competitions_under_the_same_name_are_not_mixed(folders, tmp_path, programs, capsys):
    study.main(arguments(folders, tmp_path, "--final"))
    other = tmp_path / "other"
    make_competition(other)
    capsys.readouterr()
    assert study.main(arguments(folders, tmp_path, "--final", "--heldout", str(other))) == 2
    assert "heldout competitions ['loom-breaks'], not" in capsys.readouterr().err


def test_a_competition_that_is_trained_on_is_not_held_out(folders, tmp_path, programs, capsys):
    assert study.main(arguments(folders, tmp_path, "--final", "--heldout",
                                str(folders / "train"))) == 2
    assert "hive-swarms is a competition of" in capsys.readouterr().err


def test_settings_bind_once_there_is_a_result(folders, tmp_path, programs, capsys, monkeypatch):
    def broken(*_):
        raise study.StudyError("rollout.py ended with status 2")

    with monkeypatch.context() as patch:
        patch.setattr(study, "call", broken)
        assert study.main(arguments(folders, tmp_path, "--retries", "3")) == 2
    assert study.main(arguments(folders, tmp_path)) == 0
    monkeypatch.setitem(study.ARMS, "no-buffer", study.Arm("another", ("--frontier", "64")))
    assert study.main(arguments(folders, tmp_path)) == 2
    assert "arm no-buffer ['--no-buffer'], not ['--frontier', '64']" in capsys.readouterr().err
    assert study.main(arguments(folders, tmp_path, "--arms", "full")) == 2  # the table has its rows
    assert "arm no-buffer" in capsys.readouterr().err


def test_what_an_arm_changes_is_not_changed_back(folders, tmp_path, programs):
    study.main(arguments(folders, tmp_path, "--", "--buffer"))
    flags = next(flags for name, flags, _ in programs.calls
                 if name == "train.py" and "--no-buffer" in flags)
    assert study.parse_config(flags)[0].buffer is False


def test_two_studies_do_not_share_a_directory(folders, tmp_path, programs, capsys):
    with study.lock_record(tmp_path):
        assert study.main(arguments(folders, tmp_path)) == 2
    assert "another program is writing to it" in capsys.readouterr().err and not programs.calls


def test_a_lock_ends_with_its_owner_though_a_child_that_is_being_started_has_it_open(tmp_path):
    lock = study.lock_record(tmp_path)
    wait, go = os.pipe()
    if not (child := os.fork()):  # another thread's, before it closes what it must not keep
        os.read(wait, 1)
        os._exit(0)
    try:
        lock.close()
        study.lock_record(tmp_path).close()
    finally:
        os.write(go, b"x")
        os.waitpid(child, 0)


def test_a_plain_call_keeps_the_held_out_rows_and_a_copy_is_no_seed(folders, tmp_path, programs):
    study.main(arguments(folders, tmp_path, "--final"))
    for copy in ("copy-full-0", "full-0.bak"):
        shutil.copytree(tmp_path / "full-0", tmp_path / copy)
    study.main(arguments(folders, tmp_path))
    table = (tmp_path / "table.md").read_text()
    assert "| held-out | full method | 2 |" in table and "| training | full method | 2 |" in table
    assert "3 training competitions with 2 evaluation seeds, 1 held-out competitions with" in table


def test_links_to_competitions_that_moved_are_made_anew(folders, tmp_path, programs):
    programs.cut = "after a checkpoint"
    assert study.main(arguments(folders, tmp_path)) == 130
    link = tmp_path / "competitions/train/rail-wear"
    link.unlink()
    link.symlink_to("/nowhere")
    programs.cut = "after a checkpoint"  # the resumed run, too: nothing is linked after it
    assert study.main(arguments(folders, tmp_path)) == 130
    assert link.resolve() == (folders / "train/rail-wear").resolve()


@pytest.mark.parametrize("text", ['{"arm": "full", "se', "[1]", '{"arm": "full"}'])
def test_a_damaged_result_is_named_and_made_again(folders, tmp_path, programs, capsys, text):
    path = tmp_path / "full-0/result.json"
    study.main(arguments(folders, tmp_path))
    path.write_text(text)
    capsys.readouterr()
    assert study.main(arguments(folders, tmp_path)) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # a progress bar may stand before it
    assert "full-0/result.json is damaged: remove it" in error
    path.unlink()
    assert study.main(arguments(folders, tmp_path)) == 0


@pytest.mark.parametrize("text", ["[1]", None])
def test_without_their_settings_runs_are_not_mixed_with_others(folders, tmp_path, programs, capsys,
                                                               text):
    study.main(arguments(folders, tmp_path))
    (tmp_path / "study.json").unlink()
    if text:
        (tmp_path / "study.json").write_text(text)
    capsys.readouterr()
    assert study.main(arguments(folders, tmp_path, "--retries", "3")) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "study.json is" in error and "another --out" in error


@pytest.mark.parametrize("flags", [["--seed", "7"], ["--competitions=x"], ["--steps", "a"],
                                   ["--grups", "4"], ["--see", "7"], ["--tau", "0"],
                                   ["--dry-run"]])
def test_flags_for_training_are_checked_before_anything_runs(folders, tmp_path, programs, flags):
    assert study.main(arguments(folders, tmp_path, "--", *flags)) == 2 and not programs.calls


@pytest.mark.parametrize("more, words", [
    (["--dev", "titanic"], "--dev titanic"), (["--seeds", "0"], "--seeds"),
    (["--first-seed", "-1"], "--first-seed"), (["--eval-seeds", "2", "0"], "--eval-seeds"),
    (["--eval-seeds", "1", "2", "3"], "--eval-seeds takes"),
    (["--dev", *COMPETITIONS["train"]], "--dev: nothing is left to train on"),
    (["--competitions", "/nowhere"], "/nowhere"), (["--out", "/proc/study"], "/proc/study"),
    (["--out", __file__], "test_study.py")])
def test_bad_arguments_are_one_line_and_status_2(folders, tmp_path, capsys, more, words):
    assert study.main(arguments(folders, tmp_path, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and words in error


def test_a_program_that_fails_is_named_with_its_last_words(tmp_path):
    program = tmp_path / "broken.py"
    program.write_text("raise SystemExit('the disk is full')")
    with pytest.raises(study.StudyError, match="broken.py ended with status 1: the disk is full"):
        study.call([program], tmp_path / "log")


def result(arm, seed, ranks, groups=10, trained=8, rollouts=120):
    """A complete run; `ranks` has a row for each competition, a column for each evaluation seed."""
    rows = [{"competition_id": f"c{c}", "seed": e, "valid": rank > 0, "human_rank": rank,
             "medal": "gold" if rank >= 0.9 else "none", "first_draft_valid": False,
             "steps_to_first_valid": 1 if rank > 0 else None}
            for c, row in enumerate(ranks) for e, rank in enumerate(row)]
    training = {"groups": [groups], "groups_trained": [trained], "minutes": 2.0, "resumed": 0,
                "rollouts": rollouts, "equal_rewards": 0.1}
    by_step = {f"c{c}": [0.0, float(np.mean(row))] for c, row in enumerate(ranks)}
    return {"arm": arm, "seed": seed, "evaluations": {"train": rows}, "by_step": {"train": by_step},
            "training": None if seed is None else training}


def test_differences_are_paired_by_competition_and_seed():
    rows = study.summarize([
        result("full", 0, [[0.8, 0.6], [0.4, 0.4]]), result("full", 1, [[0.9, 0.9], [0.5, 0.5]]),
        result("uniform", 0, [[0.6, 0.6], [0.4, 0.2]], trained=6),
        result("uniform", 1, [[0.7, 0.7], [0.4, 0.4]]), result("uniform", 2, [[0.0, 0.0]] * 2),
        result("before", None, [[0.0, 0.2], [0.1, 0.1]])], ["train"], 20)
    before, full, uniform = rows
    # uniform: seed 0 (0.6 - 0.7, 0.3 - 0.4), seed 1 (0.7 - 0.9, 0.4 - 0.5); seed 2 has no partner
    rank, medals = (uniform["to full"][title] for title in ("human rank", "any medal"))
    assert rank.by_seed == pytest.approx([-0.1, -0.15]) and rank.mean == pytest.approx(-0.125)
    assert rank.interval == pytest.approx(
        study.bootstrap_interval(np.array([[-0.1, -0.1], [-0.2, -0.1]])))
    assert medals.by_seed == pytest.approx([0.0, -0.5])  # full: seed 1, both of c0
    assert uniform["no gradient"][0] == pytest.approx((0.4 + 0.2 + 0.2) / 3)
    assert not full["to full"] and full["human rank"] == pytest.approx((0.625, 0.075))
    assert before["to full"]["human rank"].by_seed == pytest.approx([0.1 - 0.55, 0.1 - 0.7])
    assert before["extra steps to first valid"][0] == pytest.approx((20 + 0 + 0 + 0) / 4)


def test_equal_rewards_are_counted_over_the_groups_of_a_log(tmp_path):
    (tmp_path / "groups.jsonl").write_text(GROUPS)
    assert study.equal_rewards(tmp_path / "groups.jsonl") == pytest.approx(2 / 3)


def test_the_rank_by_step_keeps_what_a_run_had():
    runs = [("a", [0.2, 0.6]), ("b", [0.1, 0.2, 0.3]), ("a", []), ("b", [0.3])]
    found = study.rank_by_step(
        [{"competition_id": name, "human_rank_by_step": ranks} for name, ranks in runs], 4)
    assert found == {"a": [0.1, 0.3, 0.3, 0.3], "b": [0.2, 0.25, 0.3, 0.3]}
    ranks = [[0.5], [0.5]]
    rows = study.summarize([
        result("full", 0, ranks) | {"by_step": {"train": found}},
        result("neither", 0, ranks) | {"by_step": {"train": {"a": [0.0] * 4, "b": [0.1] * 4}}},
    ], ["train"], 4)
    full, neither = rows
    assert full["first script"] == (pytest.approx(0.15), None)
    assert full["by_step"] == pytest.approx([0.15, 0.275, 0.3, 0.3])
    assert "first script" not in full["to full"]
    assert neither["to full"]["first script"].mean == pytest.approx(-0.1)  # (0 - 0.1, 0.1 - 0.2)
    assert neither["to full"]["first script"].interval == pytest.approx((-0.1, -0.1))


def test_the_interval_covers_both_seeds_and_competitions():
    """Against a plain loop that draws seeds and competitions, and the normal approximation."""
    rng = np.random.default_rng(1)
    difference = rng.normal(0, 0.1, (12, 1)) + rng.normal(0, 0.2, (1, 40)) + 0.05
    low, high = study.bootstrap_interval(difference)
    naive = [difference[rng.integers(12, size=12)][:, rng.integers(40, size=40)].mean()
             for _ in range(4000)]
    assert (low, high) == pytest.approx(np.quantile(naive, (0.025, 0.975)), abs=0.006)
    spread = (difference.mean(1).var() / 12 + difference.mean(0).var() / 40) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.05)


def test_arms_with_other_numbers_of_rollouts_are_not_compared():
    with pytest.raises(study.StudyError, match="full-0 120, uniform-0 96"):
        study.rollouts_of([result("full", 0, [[1.0]]), result("uniform", 0, [[1.0]], rollouts=96)])


def test_the_benchmark_of_asynchrony_compares_stages_and_steps(tmp_path):
    rows = [{"seconds_step": 10.0, "seconds_wait": 5.0, "seconds_learn": 3.0, "seconds_sync": 1.0,
             "seconds_rollout": 2.0, "seconds_sandbox": 3.0, "staleness_mean": 0.0},
            {"seconds_step": 12.0, "seconds_wait": 7.0, "seconds_learn": 3.0, "seconds_sync": 1.0,
             "seconds_rollout": 2.0, "seconds_sandbox": 5.0, "staleness_mean": 0.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evals = [{"when": when, "valid_rate": rate, "human_rank": rate / 2}
             for when, rate in (("before", 0.1), ("after", 0.6), ("after", 0.8))]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
    found = bench_async.measure(tmp_path)
    assert (found["step"], found["wait"], found["valid"]) == pytest.approx((11.0, 6.0, 0.7))
    assert bench_async.bounds(found, 2) == pytest.approx(((6 + 4) / 6, (6 + 4) / 4))
    assert bench_async.bounds(found | {"wait": 36.0}, 2) == pytest.approx((40 / 36, 3))
