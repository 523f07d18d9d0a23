"""Learning curves as a picture.   python -m pytest tests/test_plot.py"""

import json

import numpy as np
import plot as module
import pytest
from matplotlib.image import imread
from plot import load_run, main, smooth


def write_run(directory, steps, evaluated=False, **columns):
    """A run directory; `columns` overrides what is logged at every step (None: null)."""
    directory.mkdir()
    with open(directory / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            rate = step / (steps + 1)
            row = {"step": step, "reward_mean": rate, "valid_rate": rate, "medal_rate": rate / 2,
                   "valid_draft": rate, "valid_improve": None if step % 2 else rate,
                   "valid_debug": None, "staleness_mean": 1.0, "staleness_max": 2,
                   "buffer_draft": 4, "buffer_improve": step, "buffer_debug": 2 * step,
                   "seconds_rollout": 3.0, "seconds_sandbox": 2.0, "seconds_wait": 0.5,
                   "seconds_learn": 1.0, "seconds_sync": 0.1}
            file.write(json.dumps(row | columns) + "\n")
    if evaluated:
        with open(directory / "eval.jsonl", "w") as file:
            for when, split, name in [(w, s, n) for w in ("before", "after")
                                      for s in ("train", "heldout") for n in "ab"]:
                value = {"before": 0.2, "after": 0.8}[when]
                file.write(json.dumps({
                    "when": when, "split": split, "competition_id": name, "valid_rate": value,
                    "medal_rate": value / 2, "human_rank": None}) + "\n")
    return directory


def labels(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def draw(*directories):
    runs = module.load_runs(directories)
    splits = [s for s in module.SPLITS if any(r["split"] == s for run in runs for r in run.evals)]
    return labels(module.draw(runs, splits))


def test_smoothing_keeps_constants_gaps_and_the_mean():
    assert smooth(np.full(50, 0.3)) == pytest.approx(0.3)
    noisy = np.random.default_rng(0).normal(size=400)
    noisy[7] = np.nan
    smoothed = smooth(noisy)
    assert np.isnan(smoothed[7]) and np.isfinite(np.delete(smoothed, 7)).all()
    assert np.nanstd(smoothed) < 0.4 * np.nanstd(noisy)


def test_the_picture_is_written(tmp_path, capsys):
    run = write_run(tmp_path / "full", 12, evaluated=True)
    out = tmp_path / "curves.png"
    assert main([str(run), "--out", str(out)]) == 0
    image = imread(out)
    assert image.shape[1] > 1500 and image.std() > 0.05  # something is on it


def test_panels_and_curves_of_one_run(tmp_path):
    panels = draw(write_run(tmp_path / "full", 12, evaluated=True))
    assert [t for t in panels] == [
        "Reward", "Valid submissions", "Medals", "Staleness", "Buffer", "Where the time goes",
        "Before and after: training competitions", "Before and after: held-out competitions"]
    curves = {line.get_label(): line for line in panels["Valid submissions"].lines}
    assert {"all", "draft", "improve"} <= curves.keys() and "debug" not in curves
    assert curves["improve"].get_xdata().tolist() == [2, 4, 6, 8, 10, 12]
    heights = [bar.get_height() for bar in panels["Before and after: training competitions"].patches]
    assert heights == pytest.approx([0.2, 0.1, 0.8, 0.4])  # human_rank is null: no bar


def test_several_runs_are_told_apart_by_colour(tmp_path):
    panels = draw(write_run(tmp_path / "a", 8, evaluated=True), write_run(tmp_path / "b", 12))
    assert {line.get_color() for line in panels["Reward"].lines} == set(module.RUNS[:2])
    bars = panels["Where the time goes"].patches  # five stages of each run, shares of 6.6 s
    assert len(bars) == 10 and bars[0].get_height() == pytest.approx(3 / 6.6)


def test_seeds_of_one_setting_are_one_mean_with_each_seed_behind_it(tmp_path):
    for name, seed, steps, loss, rate in [
            ("full-0", 0, 8, "grpo", 0.2), ("full-1", 1, 6, "grpo", 0.4),
            ("dapo-0", 0, 8, "dapo", 0.9)]:
        run = write_run(tmp_path / name, steps, evaluated=True, reward_mean=rate)
        config = {"seed": seed, "loss": loss, "run_dir": name}
        (run / "config.json").write_text(json.dumps(config))
    directories = [tmp_path / name for name in ("full-0", "dapo-0", "full-1")]
    runs = module.load_runs(directories)
    assert [run.name for run in runs] == ["full (2 runs)", "dapo-0"]
    assert len(runs[0].rows) == 6 and runs[0]["reward_mean"] == pytest.approx(0.3)
    means = [(line.get_ydata().mean(), line.get_linewidth())
             for line in draw(*directories)["Reward"].lines if line.get_color() == runs[0].color]
    assert sorted(means) == [pytest.approx(x) for x in [(0.2, 0.9), (0.3, 2.0), (0.4, 0.9)]]
    module.plot(directories, tmp_path / "curves.png")


def test_runs_of_one_name_are_told_apart_by_their_folder(tmp_path):
    for setting in ("full", "none"):
        (tmp_path / setting).mkdir()
        write_run(tmp_path / setting / "0", 3)
    runs = module.load_runs([tmp_path / "full/0", tmp_path / "none/0"])
    assert [run.name for run in runs] == ["full/0", "none/0"]
    assert runs[0].color != runs[1].color


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("columns", [{}, dict.fromkeys(
    ("reward_mean", "staleness_mean", "staleness_max", "buffer_draft", "seconds_wait"))])
def test_short_runs_and_nulls(tmp_path, steps, columns):
    out = tmp_path / "curves.png"
    run = write_run(tmp_path / "short", steps, **columns)
    module.plot([run], out)
    module.plot([run, run], out)
    assert out.stat().st_size > 10_000


def test_a_torn_last_line_of_a_running_run_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", 5)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')
    assert len(load_run(run, "k").rows) == 5


@pytest.mark.parametrize("files, message", [
    ({}, "no such file"),
    ({"metrics": b""}, "no learner step"),
    ({"metrics": b'{"step": 1}\nx\n{"step": 2}\n'}, "metrics.jsonl, line 2"),
    ({"metrics": b"\xff\xfe\n{}\n"}, "metrics.jsonl, line 1: not JSON"),
    ({"metrics": b'{"step": 1}\n[1]\n'}, "metrics.jsonl, line 2: not an object"),
    ({"metrics": b"{}", "eval": b"5"}, "eval.jsonl, line 1: not an object"),
    ({"metrics": b"{}", "config": b"{x"}, "config.json: not JSON"),
    ({"metrics": b"{}", "config": b"\xff"}, "config.json: not JSON"),
    ({"metrics": b"{}", "config": b"[]"}, "config.json: not an object"),
])
def test_errors_are_one_line_and_status_2(tmp_path, capsys, files, message):
    for name, content in files.items():
        ending = "json" if name == "config" else "jsonl"
        (tmp_path / f"{name}.{ending}").write_bytes(content)
    assert main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_status_2(tmp_path, capsys):
    run = write_run(tmp_path / "run", 3)
    assert main([str(run), "--out", str(tmp_path / "no" / "x.png")]) == 2
    assert "cannot write" in capsys.readouterr().err
