"""The ablation study: what the buffer and adaptive sampling are worth, with error bars.

    make study                                  # all arms, 3 training seeds: hours on two cores
    python examples/study.py --out runs/study   # the same; run it again to go on where it was cut
    python examples/study.py --out runs/study --final     # the held-out competitions: once, last
    python examples/study.py --out runs/short --arms full no-buffer --seeds 1 --steps 4 \\
        --eval-seeds 2 --agent-steps 4 -- --groups 4      # what follows -- goes to train.py

An arm is train.py with a part of the method switched off or exchanged. All arms get the same number
of rollouts. Every trained policy, and the policy before reinforcement learning, is then evaluated
as an agent by rollout.py: one engine start a policy, all competitions and evaluation seeds in it
(a second where the held-out ones have another number of seeds).

    OUT/study.json           the settings; a later call must agree with them once there are results,
                             except for more arms, seeds, evaluation seeds, and --final
    OUT/<arm>-<seed>/        train.py's run directory,
                report-runs  the agents' records; report.json is that of the last evaluation
                result.json  all that the table needs of this run; once complete, it is skipped
    OUT/<arm>-<seed>.log     what train.py and rollout.py printed
    OUT/table.md, study.png  the table is written anew after every run, the picture at the end

How the numbers are made (everything here is [ours]):

1. human_rank is that of the script which the agent hands in; it chooses by the validation scores
   that its scripts printed. A run that hands in nothing has human_rank 0 and took all its steps.
2. mean +- standard error: over training seeds, of the means over competitions and evaluation seeds.
3. The difference of an arm to `full` is paired: same competition, same training seed, over the
   seeds that both have. Its interval is a percentile bootstrap (95 %) over competitions and
   training seeds, both drawn anew, and so speaks of other competitions and other runs. With few
   seeds it is rough: it takes the spread of S seeds for that of all, which is short by a factor
   of sqrt(1 - 1/S), but counts more than once what differs by seed and competition at a time
   (simulated, 3 seeds, 16 competitions: 0.8 times as wide as it should be where all spread is the
   seeds', 1.5 times where it is all such noise). With one seed it speaks of other competitions.
4. Groups without gradient: all G advantages 0, counted over the whole run. That is so where all
   rewards are equal (a column of its own, which also counts groups that a resumed run did not
   learn from), and with --best-of k also where only the k - 2 lowest claims have another reward.
5. Minutes: the training steps alone, without start and evaluation.
6. "First script": human rank had the agent handed in its first script, a draft. It says what one
   answer of the policy is worth; twenty tries and a choice among them make up for much.

Held-out competitions are evaluated with --final only, and train.py never sees them. Tune on the
training competitions, or keep some of them out of training with --dev.
"""

import argparse
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rollout import RATES, Parser, lock_record, make_parser, write_whole  # noqa: E402
from sandbox import CompetitionError, load_competitions  # noqa: E402
from train import Config, UserError, die_with_parent, parse_config, validate  # noqa: E402


class StudyError(Exception):
    """One line that says what is wrong and what to do; exit status 2."""


@dataclass(frozen=True)
class Arm:
    text: str
    train: tuple[str, ...] = ()  # flags of train.py
    agent: tuple[str, ...] = ()  # flags of rollout.py


ARMS = {
    "full": Arm("full method"),
    "no-buffer": Arm("no buffer: drafts only", ("--no-buffer",)),
    "uniform": Arm("uniform sampling", ("--sampler", "uniform")),
    "neither": Arm("neither", ("--no-buffer", "--sampler", "uniform")),
    "all-ages": Arm("improve tasks of all ages", ("--frontier", "0")),
    "sync": Arm("synchronous", ("--max-staleness", "0")),
    "crossover": Arm("with crossover, in training and agent", ("--crossover",),
                     ("--crossover-probability", "0.33")),
    "milestone": Arm("reward: milestones", ("--reward", "milestone")),
    "medal": Arm("reward: medals only", ("--reward", "medal")),
}
KEPT = ("competition_id seed valid medal score human_rank above_median first_draft_valid "
        "steps_to_first_valid").split()  # of a row of report.json
PLACES = "model competitions heldout data_dir run_dir resume".split()  # of train.py's settings
SET = "seed steps preset eval_drafts keep_checkpoints".split()  # by the study
MANAGED = [f"--{name.replace('_', '-')}" for name in PLACES + SET]  # so not by the user
SHARED = ("timeout cpu_seconds memory_mb disk_mb temperature max_model_len description_chars "
          "preview_chars output_chars").split()  # flags of train.py that its agents are given, too
BEFORE = "before"  # the policy that all arms start from
SPLITS = {"train": "training", "dev": "development", "heldout": "held-out"}


# ---------------------------------------------------------------------------------------------
# 1. Runs


def call(command: list, log: Path) -> None:
    """Run a command in a session of its own, with its output in `log`; Ctrl-C is passed on to it.

    Raises:
        StudyError: it failed.
    """
    with open(log, "a") as output:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True,
                                   preexec_fn=die_with_parent)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if status:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        raise StudyError(f"{Path(command[0]).name} ended with status {status}: {lines[-1][-300:]} "
                         f"({log})")


def train(arm: str, seed: int, folder: Path, args: argparse.Namespace) -> dict:
    """Train one policy, or go on with it; what its metrics say. Held-out competitions stay out."""
    flags = ["--heldout", "", "--eval-drafts", 0,
             # Made anew, for a resumed run as well: it may have moved.
             "--competitions", competition_folder(args, ["train"])]
    if any(folder.glob("checkpoints/step_*/DONE")):
        flags += ["--resume", folder]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        flags += ["--preset", "tiny", "--run-dir", folder, "--seed", seed,
                  "--steps", args.steps, "--model", args.model, "--keep-checkpoints", 1,
                  *args.train_flags, *ARMS[arm].train]
    call([ROOT / "train.py", *flags], folder.with_suffix(".log"))
    return training_summary(folder)


def training_summary(run: Path) -> dict:
    """What the table and the picture need of a run directory, and a few facts to look up."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    checkpoint = max(run.glob("checkpoints/step_*/curriculum.json"),
                     key=lambda path: int(path.parent.name.removeprefix("step_")))
    return {
        "rollouts": sum(r["groups"] for r in rows) * config["responses"],
        "groups": [r["groups"] for r in rows],
        "groups_trained": [r["groups_trained"] for r in rows],
        "equal_rewards": equal_rewards(run / "groups.jsonl"),
        "minutes": sum(r["seconds_step"] for r in rows) / 60,
        "resumed": json.loads(checkpoint.read_text())["epoch"],  # how often
        "unique_scripts": [r["unique_scripts"] for r in rows],
        "reused_rate": [r["reused_rate"] for r in rows],
        "config": {name: value for name, value in config.items() if name not in PLACES},
    }


def equal_rewards(log: Path) -> float:
    """Share of the groups in a buffer's log whose rewards are all the same."""
    groups = [json.loads(line).get("traces") for line in log.read_text().splitlines()]
    spreads = [np.ptp([trace["reward"] for trace in traces]) for traces in groups if traces]
    return float(np.mean([spread < 1e-6 for spread in spreads]))


def evaluate(arm: str, model: Path, splits: list[str], seeds: int, folder: Path,
             args: argparse.Namespace) -> dict[str, list[dict]]:
    """The agent's runs on these splits, in one engine start: {split: rows of report.json}. Those
    on record, of earlier calls with other splits or fewer seeds, are not made again."""
    out = folder / "report.json"
    call([ROOT / "rollout.py", "--model", model, "--out", out,
          "--competitions", competition_folder(args, splits), "--allow-overlap",
          "--steps", args.agent_steps, "--seeds", seeds, "--retries", args.retries,
          "--parallel", args.parallel, "--max-num-seqs", args.parallel,
          *(["--unsafe"] if args.config.unsafe else []),
          *(word for name in SHARED
            for word in ("--" + name.replace("_", "-"), getattr(args.config, name))),
          "--max-response-tokens",
          max(args.config.max_response_tokens, make_parser().get_default("max_response_tokens")),
          *(ARMS[arm].agent if arm in ARMS else ())], folder.with_suffix(".log"))
    rows = json.loads(out.read_text())["runs"]
    return {split: [r for r in rows if r["competition_id"] in args.ids[split]]
            for split in splits}


def run(arm: str, seed: int, args: argparse.Namespace) -> None:
    """Bring one run up to date: train, evaluate on what is missing, write result.json."""
    folder = args.out / (arm if arm == BEFORE else f"{arm}-{seed}")
    result = read_result(folder) or {"arm": arm, "seed": seed, "training": None,
                                     "evaluations": {}, "evaluation_minutes": {}}
    if arm != BEFORE and result["training"] is None:
        result["training"] = train(arm, seed, folder, args)
        write_whole(folder / "result.json", json.dumps(result) + "\n")
    for seeds in sorted(set(args.eval_seeds.values())):  # one or two numbers
        missing = [split for split in args.splits if args.eval_seeds[split] == seeds
                   and evaluation_seeds(result, split) < seeds]
        if not missing:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        started, minutes = time.monotonic(), result["evaluation_minutes"]
        model = args.model if arm == BEFORE else folder / "policy"
        for split, rows in evaluate(arm, model, missing, seeds, folder, args).items():
            result["evaluations"][split] = [{name: row[name] for name in KEPT} for row in rows]
            result.setdefault("by_step", {})[split] = rank_by_step(rows, args.agent_steps)
        key = "+".join(missing)
        minutes[key] = minutes.get(key, 0.0) + (time.monotonic() - started) / 60
        write_whole(folder / "result.json", json.dumps(result) + "\n")


def evaluation_seeds(result: dict, split: str) -> int:
    """How many runs a result has on each competition."""
    return len({row["seed"] for row in result["evaluations"].get(split, [])})


def rank_by_step(rows: list[dict], steps: int) -> dict[str, list[float]]:
    """{competition: human rank had the agent stopped after step 1, 2, ...}, mean over its runs; a
    run that ended early keeps what it had."""
    found = {}
    for row in rows:
        ranks = row["human_rank_by_step"] or [0.0]
        found.setdefault(row["competition_id"], []).append(
            ranks + ranks[-1:] * (steps - len(ranks)))
    return {name: np.mean(runs, axis=0).round(5).tolist() for name, runs in sorted(found.items())}


def read_result(folder: Path) -> dict | None:
    return read_json(folder / "result.json", "remove it; the same command then makes it again",
                     ("arm", "seed", "training", "evaluations"))


def read_json(path: Path, remedy: str, needs: tuple = ()) -> dict | None:
    """None where there is no such file. Raises StudyError when it does not hold what it should."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError:
        value = None
    if not isinstance(value, dict) or not set(needs) <= value.keys():
        raise StudyError(f"{path} is damaged: {remedy}")
    return value


def competition_folder(args: argparse.Namespace, splits: list[str]) -> Path:
    """A folder with a link to each competition of these splits, made anew: they may have moved."""
    folder = args.out / "competitions" / "+".join(splits)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for split in splits:
        for competition_id, path in args.ids[split].items():
            (folder / competition_id).symlink_to(path)
    return folder


# ---------------------------------------------------------------------------------------------
# 2. Statistics


def cells(results: list[dict], split: str, measure: str, steps: int
          ) -> dict[str, dict[int, np.ndarray]]:
    """{arm: {training seed: (C,)}}: means over evaluation seeds, competitions sorted by id."""
    value, found = RATES[measure], {}
    for result in results:
        rows = result["evaluations"].get(split)
        if rows:
            names = sorted({r["competition_id"] for r in rows})
            found.setdefault(result["arm"], {})[result["seed"]] = np.array([
                np.mean([value(r, steps) for r in rows if r["competition_id"] == name])
                for name in names])
    return found


def cells_by_step(results: list[dict], split: str) -> dict[str, dict[int, np.ndarray]]:
    """{arm: {training seed: (C, agent steps)}}: human rank had the agent stopped there."""
    found = {}
    for result in results:
        if ranks := result.get("by_step", {}).get(split):
            found.setdefault(result["arm"], {})[result["seed"]] = np.array(
                [ranks[name] for name in sorted(ranks)])
    return found


def mean_and_error(values) -> tuple[float, float | None]:
    """Mean and its standard error (ddof 1); None for a single value.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    values = np.asarray(values, float)
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def paired_difference(arm: dict[int, np.ndarray], full: dict[int, np.ndarray]) -> np.ndarray | None:
    """(S, C) arm - full for the training seeds that both have; the policy before training, which
    has no seed, is compared with every seed of `full`."""
    if list(arm) == [None]:
        arm = dict.fromkeys(full, arm[None])
    seeds = sorted(set(arm) & set(full))
    return np.array([arm[s] - full[s] for s in seeds]) if seeds else None


def bootstrap_interval(difference: np.ndarray, draws: int = 10_000, seed: int = 0
                       ) -> tuple[float, float]:
    """95 % percentile interval of the mean of (S, C), seeds and competitions drawn anew.

    >>> bootstrap_interval(np.array([[0.5, 0.5], [0.5, 0.5]]))
    (0.5, 0.5)
    """
    rng, (s, c) = np.random.default_rng(seed), difference.shape
    seeds = rng.multinomial(s, [1 / s] * s, draws) / s  # (draws, S) weights
    competitions = rng.multinomial(c, [1 / c] * c, draws) / c  # (draws, C)
    means = np.einsum("ds,sc,dc->d", seeds, difference, competitions)
    return tuple(float(q) for q in np.quantile(means, (0.025, 0.975)))


def without_gradient(result: dict) -> float:
    training = result["training"]
    return 1 - sum(training["groups_trained"]) / sum(training["groups"])


# ---------------------------------------------------------------------------------------------
# 3. Table and picture


MEASURES = {"human rank": "human_rank", "any medal": "any_medal_rate", "valid": "valid_rate",
            "first draft valid": "first_draft_valid_rate",
            "extra steps to first valid": "extra_steps_to_first_valid"}


class Difference(NamedTuple):
    """Of an arm to the full method, paired by competition and training seed."""

    mean: float
    interval: tuple[float, float]  # bootstrap, 95 %
    by_seed: list[float]


def summarize(results: list[dict], splits: list[str], steps: int) -> list[dict]:
    """A row for each split and arm, in the order of SPLITS, and of ARMS after `before`:
    {"split", "arm", "seeds", measure: (mean, error), ..., "by_step": (agent steps,),
    "to full": {measure: Difference}}."""
    rows = []
    for split in (s for s in SPLITS if s in splits):
        tables = {title: cells(results, split, name, steps) for title, name in MEASURES.items()}
        rank, by_step = tables["human rank"], cells_by_step(results, split)
        first = {arm: {seed: ranks[:, 0] for seed, ranks in runs.items()}
                 for arm, runs in by_step.items()}
        for arm in (a for a in (BEFORE, *ARMS) if a in rank):
            own = [r for r in results if r["arm"] == arm and r["evaluations"].get(split)]
            row = {"split": split, "arm": arm, "seeds": len(own), "to full": {}}
            row |= {title: mean_and_error([v.mean() for v in table[arm].values()])
                    for title, table in tables.items()}
            if arm != BEFORE:
                row["no gradient"] = mean_and_error([without_gradient(r) for r in own])
                if all("equal_rewards" in r["training"] for r in own):  # docs/ has older ones
                    row["equal rewards"] = mean_and_error(
                        [r["training"]["equal_rewards"] for r in own])
                row["minutes"] = mean_and_error([r["training"]["minutes"] for r in own])
            row["first script"] = mean_and_error([v.mean() for v in first[arm].values()])
            row["by_step"] = np.mean([v.mean(0) for v in by_step[arm].values()], 0).tolist()
            for title, table in (("human rank", rank), ("first script", first),
                                 ("any medal", tables["any medal"])):
                difference = (paired_difference(table[arm], table["full"])
                              if arm != "full" and "full" in table else None)
                if difference is not None:
                    row["to full"][title] = Difference(float(difference.mean()),
                                                       bootstrap_interval(difference),
                                                       difference.mean(1).tolist())
            rows.append(row)
    return rows


def markdown(rows: list[dict], results: list[dict], args: argparse.Namespace) -> str:
    """The table, with what it was made from below it."""
    def competitions(split):
        return {r["competition_id"] for result in results
                for r in result["evaluations"].get(split, [])}

    def show(value, scale=1.0, digits=3):
        if value is None:
            return "-"
        mean, error = value
        return f"{mean * scale:.{digits}f}" + ("" if error is None
                                               else f" ± {error * scale:.{digits}f}")

    def evaluated(split):  # a study that was cut while seeds were added has several numbers
        numbers = sorted({evaluation_seeds(r, split) for r in results} - {0})
        return " or ".join(map(str, numbers))

    def difference(row, measure, scale=1.0, digits=3):
        if measure not in row["to full"]:
            return "-"
        found = row["to full"][measure]
        mean, low, high = (f"{v * scale:+.{digits}f}" for v in (found.mean, *found.interval))
        return f"{mean} [{low}, {high}]"

    lines = ["| competitions | arm | seeds | human rank | difference to full [95 %] | first script "
             "| difference to full [95 %] | any medal, % | difference to full [95 %] | valid, % "
             "| first draft valid, % | extra steps to first valid | groups without gradient, % "
             "| groups of equal rewards, % | minutes |",
             "|" + " --- |" * 15]
    for row in rows:
        text = "before RL" if row["arm"] == BEFORE else ARMS[row["arm"]].text
        lines.append("| " + " | ".join([
            SPLITS[row["split"]], text, "-" if row["arm"] == BEFORE else str(row["seeds"]),
            show(row["human rank"]), difference(row, "human rank"),
            show(row.get("first script")), difference(row, "first script"),
            show(row["any medal"], 100, 1), difference(row, "any medal", 100, 1),
            show(row["valid"], 100, 1), show(row["first draft valid"], 100, 1),
            show(row["extra steps to first valid"], digits=2),
            show(row.get("no gradient"), 100, 1), show(row.get("equal rewards"), 100, 1),
            show(row.get("minutes"), digits=1)]) + " |")
    seeds = sorted({r["seed"] for r in results if r["training"]})
    counts = ", ".join(f"{len(competitions(split))} {SPLITS[split]} competitions with "
                       f"{evaluated(split)} evaluation seeds"
                       for split in dict.fromkeys(row["split"] for row in rows))
    flags = f" {' '.join(args.train_flags)}" if args.train_flags else ""
    again = sum(bool(r["training"] and r["training"]["resumed"]) for r in results)
    lines += ["", f"Training seeds {', '.join(map(str, seeds))}; {args.steps} steps of "
              f"{rollouts_of(results) / args.steps:.0f} rollouts in every arm; {counts}; "
              f"{args.agent_steps} agent steps, "
              f"{args.retries} retries{flags}; "
              f"{again} of the runs were interrupted and resumed."]
    return "\n".join(lines) + "\n"


def rollouts_of(results: list[dict]) -> int:
    """The number of rollouts, the same in all runs. Raises StudyError when it is not."""
    counts = {r["training"]["rollouts"]: f"{r['arm']}-{r['seed']}"
              for r in results if r["training"]}
    if len(counts) > 1:
        raise StudyError("the arms cannot be compared, their rollouts differ: " + ", ".join(
            f"{name} {count}" for count, name in counts.items()))
    return next(iter(counts))


def draw(rows: list[dict], out: Path) -> None:
    """Differences to `full`, medals and groups without gradient, arms downwards; and human rank as
    the agent goes on, of the last split."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from plot import INK, MUTED, RUNS, STYLE, legend, title

    arms = [a for a in (BEFORE, *ARMS) if any(r["arm"] == a for r in rows)]
    names = ["before RL" if a == BEFORE else a for a in arms]
    places = {arm: -i for i, arm in enumerate(arms)}
    splits = list(dict.fromkeys(r["split"] for r in rows))
    colors = {split: RUNS[i] for i, split in enumerate(splits)}
    shift = {split: 0.22 * ((len(splits) - 1) / 2 - i) for i, split in enumerate(splits)}
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 9.5))
        grid = figure.add_gridspec(2, 2, left=0.08, right=0.98, top=0.91, bottom=0.06, hspace=0.35,
                                   wspace=0.2)
        ranks, medals, zeros, steps = (figure.add_subplot(g) for g in grid)
        title(ranks, "Human rank: difference to the full method",
              "mean and 95 % bootstrap interval over competitions and seeds; dots: training seeds")
        title(medals, "Any medal", "mean and standard error over training seeds")
        for row in rows:
            y, color = places[row["arm"]] + shift[row["split"]], colors[row["split"]]
            mean, error = row["any medal"]
            medals.errorbar(mean, y, xerr=error, fmt="o", color=color, capsize=3)
            if difference := row["to full"].get("human rank"):
                ranks.plot(difference.interval, [y, y], color=color, linewidth=3, alpha=0.45)
                ranks.plot(difference.by_seed, [y] * len(difference.by_seed), "o", color=INK,
                           alpha=0.4, markersize=3.5)
                ranks.plot(difference.mean, y, "o", color=color, markersize=7)
        for split in splits:
            ranks.plot([], [], "o", color=colors[split], label=SPLITS[split])
        legend(ranks, ncols=1)
        ranks.axvline(0, color=MUTED, linewidth=1)
        title(zeros, "Groups without gradient", "share over the run; bar: standard error")
        title(steps, "Human rank as the agent goes on",
              f"had it stopped after so many scripts; {SPLITS[splits[-1]]} competitions")
        for row in (r for r in rows if r["arm"] != BEFORE):
            if row["split"] == splits[0]:
                mean, error = row["no gradient"]
                zeros.barh(places[row["arm"]], mean, 0.6, xerr=error, color="#9db3d8", ecolor=INK)
            if row["split"] == splits[-1]:
                steps.plot(range(1, len(row["by_step"]) + 1), row["by_step"],
                           color=RUNS[arms.index(row["arm"]) % len(RUNS)], label=row["arm"])
        steps.xaxis.get_major_locator().set_params(integer=True)
        legend(steps, ncols=2)
        for ax in (medals, zeros):
            ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        for ax in (ranks, medals, zeros):
            ax.grid(axis="y", visible=False)
            ax.grid(axis="x", visible=True)
            ax.set_yticks(list(places.values()), names)
            ax.set_ylim(-len(arms) + 0.4, 0.6)
        figure.savefig(out, dpi=150, facecolor="white")


def report(args: argparse.Namespace, picture: bool) -> None:
    """table.md, and study.png, of the runs that are complete so far."""
    arms = "|".join(map(re.escape, ARMS))
    folders = [path for path in sorted(args.out.iterdir())
               if re.fullmatch(rf"{BEFORE}|({arms})-\d+", path.name)]  # copies of them are no runs
    results = [r for r in map(read_result, folders)
               if r and all(s in r["evaluations"] for s in args.splits)]
    if any(r["training"] for r in results):
        splits = [s for s in SPLITS if any(s in r["evaluations"] for r in results)]
        rows = summarize(results, splits, args.agent_steps)
        (args.out / "table.md").write_text(markdown(rows, results, args))
        if picture:
            draw(rows, args.out / "study.png")


# ---------------------------------------------------------------------------------------------
# 4. Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__.split("\n\n")[0], epilog="What follows -- is passed to train.py.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default="runs/study", help="directory of the study")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what is compared")
    add("--seeds", type=int, default=3, help="training seeds of each arm: 0, 1, ...")
    add("--first-seed", type=int, default=0,
        help="where they begin. The table is of all seeds in --out: fresh ones, after tuning, take "
             "another --out")
    add("--steps", type=int, default=Config.steps, help="learner steps of each run")
    add("--eval-seeds", type=int, nargs="+", default=[20], metavar="N",
        help="agent runs on each competition; a second number is for the held-out ones. More may "
             "be asked for later: the runs that there are stay")
    add("--agent-steps", type=int, default=20, help="scripts that an agent may try")
    add("--retries", type=int, default=8,
        help="answers that an agent asks for again, a step, while they repeat a script it tried")
    add("--parallel", type=int, default=160, help="agents at a time")
    add("--model", type=Path, default=Config.model, help="the policy to start from")
    add("--competitions", default=Config.competitions, help="training competitions")
    add("--heldout", default=Config.heldout, help="held-out competitions")
    add("--dev", nargs="*", default=[], metavar="ID",
        help="training competitions that are kept out of training and evaluated on")
    add("--final", action="store_true", help="evaluate on the held-out competitions as well")
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    try:
        args = parser.parse_args(words[:cut])
    except ValueError as error:
        raise StudyError(error) from None
    args.train_flags = words[cut + 1:]
    args.dev = sorted(set(args.dev))
    if len(args.eval_seeds) > 2:
        raise StudyError("--eval-seeds takes one number, or a second one for --heldout")
    for name, least in {"seeds": 1, "first_seed": 0, "steps": 1, "eval_seeds": 1, "agent_steps": 1,
                        "retries": 0, "parallel": 1}.items():
        value = getattr(args, name)
        if (min(value) if isinstance(value, list) else value) < least:
            raise StudyError(f"--{name.replace('_', '-')} must be at least {least}")
    args.eval_seeds = {split: args.eval_seeds[-1 if split == "heldout" else 0] for split in SPLITS}
    for word in (word.partition("=")[0] for word in args.train_flags):
        if word in MANAGED:
            raise StudyError(f"{word} after --: the study sets that itself")
    # Says what is wrong before hours are lost.
    args.config, others = parse_config(["--preset", "tiny", *args.train_flags])
    validate(args.config, world_size=1)
    if others.dry_run:
        raise StudyError("--dry-run after --: a study has to train")
    return args


def find_competitions(args: argparse.Namespace) -> dict[str, dict[str, Path]]:
    """{split: {id: directory}} of what is trained on or evaluated now."""
    def found(directory):
        paths = {c.id: c.public_dir.parent.parent for c in load_competitions(directory)}
        for name, path in paths.items():
            if not (path / "config.yaml").is_file():
                raise StudyError(f"{directory}: {name} has its data elsewhere, in {path}; a study "
                                 "takes directories of competitions that hold their data")
        return paths

    ids = {"train": found(args.competitions)}
    if args.dev:
        if unknown := set(args.dev) - set(ids["train"]):
            raise StudyError(f"--dev {min(unknown)}: no such competition in {args.competitions}")
        ids["dev"] = {name: ids["train"].pop(name) for name in args.dev}
        if not ids["train"]:
            raise StudyError("--dev: nothing is left to train on")
    if args.final:
        if seen := set(found(args.competitions)) & set(heldout := found(args.heldout)):
            raise StudyError(f"--heldout {args.heldout}: {min(seen)} is a competition of "
                             f"{args.competitions}, so it is not held out")
        ids["heldout"] = heldout
    return ids


def check_settings(args: argparse.Namespace) -> None:
    """Runs with other settings must not be mixed. Arms and seeds, of both kinds, may be added; so
    may --final."""
    path = args.out / "study.json"
    settings = {name: getattr(args, name)
                for name in ("steps", "agent_steps", "retries", "dev", "train_flags")}
    settings |= {"model": str(args.model), "competitions": str(args.competitions),
                 "model's weights": weights_digest(args.model)}
    settings |= {f"{split} competitions": sorted(ids) for split, ids in args.ids.items()}
    shown = {path.parent.name.rpartition("-")[0] for path in args.out.glob("*/result.json")}
    settings |= {f"arm {name}": list(arm.train + arm.agent) for name, arm in ARMS.items()
                 if name in shown or name in args.arms}
    settings |= {f"train.py's {name}": value for name, value in asdict(args.config).items()
                 if name not in PLACES + SET}
    begun = read_json(path, "its runs cannot be told from others now: give another --out") or {}
    if not shown:  # nothing has come of it yet
        begun = {}
    elif not begun:
        raise StudyError(f"{path} is missing, and with it the settings of the runs in {args.out}: "
                         "give another --out")
    for name, value in settings.items():
        if begun.get(name, value) != value:
            raise StudyError(f"{args.out} was begun with {name} {begun[name]!r}, not {value!r}: "
                             "give another --out")
    write_whole(path, json.dumps(begun | settings) + "\n")


def weights_digest(model: Path) -> str:
    """Of a model directory: a policy that was taught again is another one to start from."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    from tqdm import tqdm

    try:
        args = parse(argv)
        args.ids = find_competitions(args)
        args.splits = list(args.ids)
        args.out = args.out.resolve()
        with lock_record(args.out):
            check_settings(args)
            # Seed by seed, so that what there is can be compared at any time, and a machine that
            # becomes slower does so for all arms.
            seeds = range(args.first_seed, args.first_seed + args.seeds)
            jobs = [(BEFORE, None)] + [(arm, seed) for seed in seeds for arm in args.arms]
            bar = tqdm(jobs, unit="run")
            for arm, seed in bar:
                bar.set_description(arm if seed is None else f"{arm}-{seed}")
                run(arm, seed, args)
                report(args, picture=(arm, seed) == jobs[-1])
            print((args.out / "table.md").read_text())
            print(f"{args.out}/table.md, study.png")
            return 0
    except (StudyError, CompetitionError, UserError, OSError) as error:
        print(f"study.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
