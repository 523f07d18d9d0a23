"""Learning curves of one or several runs as a picture.

    python examples/plot.py RUN_DIR [RUN_DIR ...] --out curves.png

Reads metrics.jsonl (one object a learner step) and, where there is one, eval.jsonl (the frozen
policy's drafts before and after training). A single run is drawn by operator; several runs are
told apart by colour. Runs whose config.json differs in nothing but the seed are drawn as one: their
mean, over the steps that all of them have, with each seed faint behind it. Strong lines are
smoothed (a Gaussian window of about a twentieth of the run), the faint ones behind a single run
are the figures as logged.

Steps whose value is null or missing are passed over. Exit status 2, with one line on stderr, when a
run has no metrics or the picture cannot be written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, MUTED, GRID = "#22262e", "#737a87", "#e6e8ec"
OPERATORS = {"draft": "#3b6fd4", "improve": "#1f9d7a", "debug": "#e08a2e", "crossover": "#c9508c"}
STAGES = {"rollout": "#4b5f8f", "sandbox": "#9db3d8", "learn": "#8a63c2", "sync": "#d0609a",
          "wait": "#dfe2e8"}
RUNS = ["#3b6fd4", "#e08a2e", "#1f9d7a", "#c9508c", "#7d5bbf", "#6b7280", "#b3a02a", "#2aa5b8",
        "#8c5a3c"]
BEFORE, AFTER = "#c5cad3", "#2aa5b8"
SCORES = {"valid_rate": "valid", "medal_rate": "medal", "human_rank": "human rank"}
SPLITS = {"train": "training competitions", "heldout": "held-out competitions"}

STYLE = {
    "font.size": 9.5, "font.family": "DejaVu Sans", "text.color": INK,
    "axes.edgecolor": "#b9bec8", "axes.labelcolor": MUTED, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.8,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 3, "ytick.major.size": 0,
    "legend.frameon": False, "legend.fontsize": 8.5, "axes.xmargin": 0.02,
    "lines.solid_capstyle": "round",
}


class PlotError(Exception):
    """Nothing to draw; the message is one line."""


@dataclass
class Run:
    """What a run directory has logged, and how it is drawn; `run["kl"]` is a column of its rows."""

    name: str
    color: str
    rows: list[dict]  # of metrics.jsonl
    evals: list[dict]  # of eval.jsonl
    seeds: list[Run] = field(default_factory=list)  # the runs that this one is the mean of

    def __getitem__(self, column: str) -> np.ndarray:
        """(steps,) float; nan where the value is null or missing."""
        return np.array([_number(row.get(column)) for row in self.rows])

    @property
    def steps(self) -> np.ndarray:
        steps = self["step"]
        return steps if np.isfinite(steps).all() else np.arange(1.0, len(self.rows) + 1)

    @property
    def operators(self) -> dict[str, str]:
        """Operator -> colour; crossover, which is off by default, only where there was one."""
        crossed = np.nansum(self["buffer_crossover"]) > 0
        return {op: color for op, color in OPERATORS.items() if op != "crossover" or crossed}


def _number(value) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; a torn last line, of a run still going, is left out."""
    rows = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise PlotError(f"{path}, line {number}: not JSON ({error.msg})") from None
            continue
        if not isinstance(row, dict):
            raise PlotError(f"{path}, line {number}: not an object of field names and values")
        rows.append(row)
    return rows


def load_config(path: Path) -> dict:
    """The run's settings; none when it has no config.json."""
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise PlotError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise PlotError(f"{path}: not an object of flags and values")
    return config


def load_run(directory: Path, color: str) -> Run:
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise PlotError(f"{path}: no such file; name a run directory of train.py")
    rows = read_jsonl(path)
    if not rows:
        raise PlotError(f"{path}: no learner step is logged yet")
    evals = directory / "eval.jsonl"
    return Run(directory.resolve().name, color, rows, read_jsonl(evals) if evals.is_file() else [])


def load_runs(directories: list[Path]) -> list[Run]:
    """The runs to compare: one a directory, or one for several that differ in their seed only."""
    seeds: dict[str, list[Run]] = defaultdict(list)
    for directory, name in zip(directories, distinct_names(directories), strict=True):
        run = load_run(directory, "")
        run.name = name
        setting = load_config(directory / "config.json") or {"alone": len(seeds)}
        setting |= {"seed": None, "run_dir": None}
        seeds[json.dumps(setting, sort_keys=True)].append(run)
    runs = [group[0] if len(group) == 1 else mean_run(group) for group in seeds.values()]
    for i, run in enumerate(runs):
        run.color = RUNS[i % len(RUNS)]
    return runs


def distinct_names(directories: list[Path]) -> list[str]:
    """As much of the end of each path as tells them apart.

    >>> distinct_names([Path("/a/full"), Path("/a/none")])
    ['full', 'none']
    >>> distinct_names([Path("/full/0"), Path("/none/0")])
    ['full/0', 'none/0']
    """
    paths = [directory.resolve() for directory in directories]
    for depth in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def mean_run(seeds: list[Run]) -> Run:
    """The mean of every column over the seeds that have a value, at the steps that all have.

    >>> rows = [[{"step": 1, "kl": 0.5}, {"step": 2, "kl": 9}], [{"step": 1, "kl": None, "x": 2}]]
    >>> run = mean_run([Run(f"full-{i}", "", rows[i], []) for i in range(2)])
    >>> run.name, run.rows
    ('full (2 runs)', [{'step': 1.0, 'kl': 0.5, 'x': 2.0}])
    """
    rows = []
    for of_step in zip(*(run.rows for run in seeds), strict=False):
        names = dict.fromkeys(name for row in of_step for name in row)
        values = {name: [row[name] for row in of_step if np.isfinite(_number(row.get(name)))]
                  for name in names}
        rows.append({name: float(np.mean(v)) if v else None for name, v in values.items()})
    same = commonprefix([run.name for run in seeds])
    name = re.sub(r"[-_/. ]*(seed)?[-_/. ]*\d*$", "", same) or seeds[0].name
    return Run(f"{name} ({len(seeds)} runs)", "", rows, [e for run in seeds for e in run.evals],
               seeds)


def smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian-weighted mean of the neighbours, ignoring nan; nan stays nan.

    >>> smooth(np.array([1.0, np.nan, 1.0])).tolist()
    [1.0, nan, 1.0]
    """
    sigma = max(len(values) / 40, 0.8)
    position = np.arange(len(values))
    kernel = np.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    known = np.isfinite(values)
    mean = kernel @ np.where(known, values, 0.0) / np.maximum(kernel @ known, 1e-12)
    return np.where(known, mean, np.nan)


# --------------------------------------------------------------------------------------- the panels


def curve(ax, run: Run, column: str, color: str, label: str | None, width=2.0, style="-") -> None:
    """The smoothed line over the faint raw one; nothing for a column without values."""
    values = run[column]
    known = np.isfinite(values)
    if not known.any():
        return
    steps, values = run.steps[known], values[known]  # joins over the steps without a value
    if not run.seeds:
        ax.plot(steps, values, color=color, alpha=0.22, linewidth=0.9)
    for seed in run.seeds:
        ax.plot(seed.steps, smooth(seed[column]), color=color, alpha=0.35, linewidth=0.9)
    few = len(values) < 3
    ax.plot(steps, values if few else smooth(values), style, color=color, linewidth=width,
            label=label, marker="o" if few else None, markersize=4)


def title(ax, text: str, note: str = "") -> None:
    ax.set_title(text, loc="left", fontsize=11, fontweight="bold", pad=20)
    ax.text(0, 1.035, note, transform=ax.transAxes, fontsize=8.5, color=MUTED)


def by_operator(ax, runs: list[Run], total: str, prefix: str, percent=True) -> None:
    """One run: all tasks in ink, each operator in its colour. Several: all tasks, by run."""
    if len(runs) == 1:
        for operator, color in runs[0].operators.items():
            curve(ax, runs[0], f"{prefix}_{operator}", color, operator, width=1.6)
        curve(ax, runs[0], total, INK, "all", width=2.4)
    else:
        for run in runs:
            curve(ax, run, total, run.color, None)
    ax.set_ylim(0, 1.02)
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def legend(ax, **options) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**({"loc": "best", "ncols": 2, "handlelength": 1.2, "columnspacing": 1.0,
                      "labelspacing": 0.3} | options))


def staleness_panel(ax, runs: list[Run]) -> None:
    title(ax, "Staleness", "learner's version - the group's, in optimizer steps")
    for run in runs:
        color = run.color if len(runs) > 1 else INK
        largest = run["staleness_max"]
        ax.plot(run.steps, largest, linestyle="none", marker="_", markersize=5, color=color,
                alpha=0.45, label="max" if run is runs[0] else None)
        curve(ax, run, "staleness_mean", color, "mean" if run is runs[0] else None)
    top = max(np.nan_to_num(run["staleness_max"]).max() for run in runs)
    ax.set_ylim(0, max(top, 1.0) * 1.25)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend(ax, loc="upper right")


def buffer_panel(ax, runs: list[Run]) -> None:
    if len(runs) == 1:
        title(ax, "Buffer", "tasks held, by operator")
        colors = runs[0].operators
        bands(ax, runs[0], {op: runs[0][f"buffer_{op}"] for op in colors}, colors)
    else:
        title(ax, "Buffer", "tasks held")
        for run in runs:
            size = sum(np.nan_to_num(run[f"buffer_{op}"]) for op in OPERATORS)
            ax.plot(run.steps, size, color=run.color, linewidth=2.0)
    ax.set_ylim(bottom=0)


def time_panel(ax, runs: list[Run]) -> None:
    note = "share of the seconds logged by each stage; stages overlap"
    title(ax, "Where the time goes", note)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(runs) == 1:
        seconds = np.array([np.nan_to_num(runs[0][f"seconds_{stage}"]) for stage in STAGES])
        shares = seconds / np.maximum(seconds.sum(0), 1e-12)  # (stages, steps)
        if shares.shape[1] >= 3:
            shares = np.array([smooth(row) for row in shares])
        bands(ax, runs[0], dict(zip(STAGES, shares, strict=True)), STAGES)
    else:
        for position, run in enumerate(runs):
            seconds = {stage: np.nan_to_num(run[f"seconds_{stage}"]).sum() for stage in STAGES}
            total, bottom = max(sum(seconds.values()), 1e-12), 0.0
            for stage, color in STAGES.items():
                share = seconds[stage] / total
                ax.bar(position, share, 0.62, bottom, color=color, edgecolor="white",
                       linewidth=0.8, label=stage if position == 0 else None)
                bottom += share
        ax.set_xlim(-0.6, len(runs) - 0.4)
        ax.set_xticks(range(len(runs)), [str(i + 1) for i in range(len(runs))])
        for tick, run in zip(ax.get_xticklabels(), runs, strict=True):
            tick.set(color=run.color, fontweight="bold")
    ax.set_ylim(0, 1)
    legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=5)


def bands(ax, run: Run, series: dict[str, np.ndarray], colors: dict[str, str]) -> None:
    """Stacked areas; bars while there are too few steps for an area."""
    values = np.nan_to_num(np.array(list(series.values())))  # (bands, steps)
    if values.shape[1] >= 2:
        ax.stackplot(run.steps, values, colors=[colors[name] for name in series],
                     labels=list(series), edgecolor="white", linewidth=0.5, alpha=0.9)
        ax.set_xlim(run.steps[0], run.steps[-1])
        return
    bottom = np.zeros(values.shape[1])
    for name, row in zip(series, values, strict=True):
        ax.bar(run.steps, row, 0.5, bottom, color=colors[name], label=name)
        bottom += row


def eval_panel(ax, runs: list[Run], split: str) -> None:
    """Bars: mean over competitions, before (grey: all runs together) and after; dots: each one."""
    competitions = {row.get("competition_id") for run in runs for row in run.evals
                    if row.get("split") == split}
    title(ax, f"Before and after: {SPLITS[split]}",
          f"frozen policy's drafts; bars: mean, dots: the {len(competitions)} competitions")
    before = [row for run in runs for row in run.evals if row.get("when") == "before"]
    series = [("before", BEFORE, before)]
    for run in runs:
        color, label = (run.color, None) if len(runs) > 1 else (AFTER, "after")
        series.append((label, color, [row for row in run.evals if row.get("when") == "after"]))
    width = 0.8 / len(series)
    for place, (label, color, rows) in enumerate(series):
        rows = [row for row in rows if row.get("split") == split]
        for x, score in enumerate(SCORES):
            per_competition: dict[str, list[float]] = {}
            for row in rows:
                per_competition.setdefault(row.get("competition_id"), []).append(
                    _number(row.get(score)))
            values = np.array([np.nanmean(v) for v in per_competition.values()
                               if np.isfinite(v).any()])
            if not values.size:
                continue
            center = x - 0.4 + width * (place + 0.5)
            ax.bar(center, values.mean(), width * 0.92, color=color,
                   label=label if x == 0 else None)
            # the figure over the left half of the bar, the dots in its right half
            spread = np.linspace(0.05, 0.4, len(values)) if len(values) > 1 else 0.22
            ax.scatter(center + spread * width, np.sort(values), s=10, color=INK, alpha=0.4,
                       linewidths=0, clip_on=False)
            ax.annotate(f"{100 * values.mean():.0f}", (center - 0.2 * width, values.mean()),
                        (0, 3), textcoords="offset points", ha="center", fontsize=9.5,
                        fontweight="bold", color=INK)
    ax.set_xticks(range(len(SCORES)), list(SCORES.values()))
    ax.tick_params(axis="x", length=0, labelcolor=INK)
    ax.set_ylim(0, 1.1)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend(ax, loc="upper right", bbox_to_anchor=(1.0, 1.2))


# -------------------------------------------------------------------------------------- the picture


def plot(directories: list[Path | str], out: Path | str) -> None:
    """Draw the runs into one PNG. Raises PlotError with a one-line message."""
    runs = load_runs([Path(directory) for directory in directories])
    splits = [s for s in SPLITS if any(row.get("split") == s for r in runs for row in r.evals)]
    with rc_context(STYLE):
        figure = draw(runs, splits)
        try:
            figure.savefig(out, dpi=150, facecolor="white")
        except (OSError, ValueError) as error:
            raise PlotError(f"cannot write {out}: {error}") from None


def draw(runs: list[Run], splits: list[str]) -> Figure:
    """Six panels over the steps, and one for each of the splits that were evaluated."""
    rows = 3 if splits else 2
    height = 4.0 * rows + 1.1  # inches
    figure = Figure(figsize=(15, height))
    grid = figure.add_gridspec(rows, 6, left=0.05, right=0.98, top=1 - 1.5 / height,
                               bottom=0.75 / height, hspace=0.52, wspace=0.75)
    panels = [figure.add_subplot(grid[i // 3, 2 * (i % 3):2 * (i % 3) + 2]) for i in range(6)]
    reward, valid, medal, staleness, held, time = panels

    note = "mean over the traces of a step" + (", by operator" if len(runs) == 1 else "")
    title(reward, "Reward", note)
    by_operator(reward, runs, "reward_mean", "reward", percent=False)
    title(valid, "Valid submissions", "share of the traces that the grader accepts")
    by_operator(valid, runs, "valid_rate", "valid")
    title(medal, "Medals", "share of the traces that win any medal")
    by_operator(medal, runs, "medal_rate", "medal")
    staleness_panel(staleness, runs)
    buffer_panel(held, runs)
    time_panel(time, runs)
    for ax in panels if len(runs) == 1 else panels[:5]:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("learner step", fontsize=8.5, loc="right", labelpad=1)
        if max(len(run.rows) for run in runs) == 1:
            ax.set_xlim(runs[0].steps[0] - 1, runs[0].steps[0] + 1)

    span = 6 // max(len(splits), 1)
    for i, split in enumerate(splits):
        eval_panel(figure.add_subplot(grid[2, i * span:(i + 1) * span]), runs, split)
    headline(figure, runs, height)
    return figure


def headline(figure: Figure, runs: list[Run], height: float) -> None:
    """Name of the one run and the operators' colours, or the runs' numbered names in theirs."""
    def y(inches):
        return 1 - inches / height

    steps = max(len(run.rows) for run in runs)
    if len(runs) == 1:
        name, note = runs[0].name, f"{steps} learner step{'s' * (steps != 1)}"
        entries = {"all tasks": INK} | runs[0].operators
        place = {"loc": "center right", "bbox_to_anchor": (0.985, y(0.84))}
    else:
        name, note = "runs compared", ""
        entries = {f"{i}  {run.name}": run.color for i, run in enumerate(runs, 1)}
        place = {"loc": "center left", "bbox_to_anchor": (0.043, y(0.84))}
    figure.text(0.05, y(0.45), f"AceGRPO: {name}", fontsize=17, fontweight="bold", va="center")
    figure.text(0.05, y(0.84), note, fontsize=10, color=MUTED, va="center")
    figure.legend([Line2D([], [], color=color, linewidth=3) for color in entries.values()],
                  list(entries), ncols=min(len(entries), 6), fontsize=10, handlelength=1.2,
                  columnspacing=1.8, **place)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run directories of train.py")
    parser.add_argument("--out", default="curves.png", help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        plot(args.runs, args.out)
    except PlotError as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
