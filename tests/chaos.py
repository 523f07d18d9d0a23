"""Chaos: a real training run whose processes are killed at random moments, and resumed each time.

    python tests/chaos.py --kills 20 --run-dir runs/chaos --reference runs/first

`--reference` is a finished, undisturbed run of the same seed and flags (such as `make train`'s):
the disturbed run must end where it ended. Flags that this script does not know go to train.py.

Every other start is left alone until it has learnt a step: half of them are killed while they start,
half in training. After each kill either the run goes on (a sandbox process, a guard: somebody
replaces it), or all of it ends by itself, with no process, no file in /dev/shm and no temporary file
left. At the end every step and every finished group must be there exactly once (`check_run_dir`).
"""

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from buffer import EvolvingBuffer  # noqa: E402
from train import Config  # noqa: E402


def rows(path: Path) -> list[dict]:
    """Of a finished run: a torn line, which train.read_jsonl skips, is an error here."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_run_dir(run_dir: Path) -> list[str]:
    """What is wrong with a finished run; [] when every step and group is there exactly once."""
    problems = []

    def check(holds: bool, problem: str) -> None:
        if not holds:
            problems.append(problem)

    config = json.loads((run_dir / "config.json").read_text())
    metrics = rows(run_dir / "metrics.jsonl")
    check([m["step"] for m in metrics] == list(range(1, config["steps"] + 1)),
          "metrics.jsonl: the step numbers are not 1, 2, 3, ... up to the last")
    versions = [m["policy_version"] for m in metrics]
    check(versions == sorted(versions), "metrics.jsonl: a policy version goes back")
    check(max(m["staleness_max"] for m in metrics) <= config["max_staleness"],
          "metrics.jsonl: a group was too old when it was learnt from")

    log = rows(run_dir / "groups.jsonl")
    check([g["sequence"] for g in log] == list(range(1, len(log) + 1)),
          "groups.jsonl: the sequence numbers are not 1, 2, 3, ...")
    groups = [g for g in log if "traces" in g]
    epochs = [g["epoch"] for g in groups]
    check(epochs == sorted(epochs), "groups.jsonl: an epoch goes back")
    traces = [t["id"] for g in groups for t in g["traces"]]
    check(len(set(traces)) == len(traces), "groups.jsonl: a trace is there twice")
    check([t["id"] for t in rows(run_dir / "traces.jsonl")] == traces,
          "traces.jsonl: not the traces of groups.jsonl")

    checkpoints = sorted(run_dir.glob("checkpoints/*"), key=lambda p: int(p.name.split("_")[1]))
    check(all((p / "DONE").exists() for p in checkpoints), "checkpoints: an incomplete one is left")
    check(len(checkpoints) <= config["keep_checkpoints"], "checkpoints: too many are left")
    check(checkpoints[-1].name == f"step_{config['steps']}", "checkpoints: none of the last step")
    state = json.loads((checkpoints[-1] / "curriculum.json").read_text())["buffer"]
    check(state["sequence"] == len(log), "the last checkpoint's buffer lacks groups of the log")
    whole = EvolvingBuffer(state["competition_ids"], config["capacity"])
    whole.replay(run_dir / "groups.jsonl")
    for name in ("tasks", "totals"):
        check(json.loads(json.dumps(whole.state_dict()[name])) == state[name],
              f"the last checkpoint's buffer is not the sum of the log: {name}")
    return problems


def compare_curves(run_dir: Path, reference: Path, tolerance: float) -> list[str]:
    """Drafts of the frozen policy after training, by competition, against the undisturbed run's."""
    problems = []
    for split in ("train", "heldout"):
        for name in ("valid_rate", "human_rank"):
            ends = [{r["competition_id"]: r[name] for r in rows(folder / "eval.jsonl")
                     if r["when"] == "after" and r["split"] == split}
                    for folder in (run_dir, reference)]
            if not ends[1]:
                continue
            gaps = np.array([ends[0][c] - ends[1][c] for c in ends[1]])
            error = gaps.std(ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
            print(f"{split:8} {name:11} disturbed {np.mean(list(ends[0].values())):.3f}  undisturbed "
                  f"{np.mean(list(ends[1].values())):.3f}  difference {gaps.mean():+.3f} +- "
                  f"{error:.3f} (standard error over competitions)")
            if not abs(gaps.mean()) <= tolerance:
                problems.append(f"{split} {name} ends {gaps.mean():+.3f} from the undisturbed run")
    return problems


def label(process, first_pid: int) -> str:
    """What a process of a run is, for the table of kills."""
    command = " ".join(process.cmdline())
    if process.pid == first_pid:
        return "rank 0"
    for text, name in (("-ISc", "guard"), ("resource_tracker", "resource tracker"),
                       ("sandbox.py serve", "sandbox"), ("VLLM::", "engine"),
                       ("multiprocessing", "rollout or engine")):
        if text in command:
            return name
    return "other: " + command[:40]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--run-dir", type=Path, required=True, help="must not exist yet")
    parser.add_argument("--longest", type=float, default=120, help="seconds until a kill, at most")
    parser.add_argument("--patience", type=float, default=600,
                        help="seconds without anything written after which a run counts as hung")
    parser.add_argument("--reference", type=Path, help="an undisturbed run to compare with")
    parser.add_argument("--tolerance", type=float, default=0.15,
                        help="of the rates at the end, against the reference")
    parser.add_argument("--chaos-seed", type=int, default=0, help="of the moments and victims")
    options, flags = parser.parse_known_args()
    import psutil
    from test_end_to_end import Started

    rng = random.Random(options.chaos_seed)
    run_dir, log = options.run_dir.resolve(), options.run_dir.with_suffix(".log").resolve()
    if run_dir.exists():
        parser.error(f"--run-dir {run_dir} exists")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    kills, finished, begun = [], b"", time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "tiny", "--checkpoint-every", "2",
               "--model", str(ROOT / Config.model), "--heldout", str(ROOT / Config.heldout),
               "--competitions", str(ROOT / Config.competitions),
               "--run-dir", str(run_dir), *flags]

    def written() -> float:
        """When the run last wrote something."""
        names = ("groups.jsonl", "metrics.jsonl", "config.json", "eval.jsonl")
        return max((p.stat().st_mtime for n in names if (p := run_dir / n).exists()), default=0.0)

    def steps() -> int:
        metrics = run_dir / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    for start in itertools.count():
        run, killed, begun_at = Started(command, log), 0, steps()
        next_kill = time.monotonic() + rng.uniform(1, options.longest) if start % 2 == 0 else None
        started = time.time()
        while run.process.poll() is None:
            time.sleep(0.1)
            if time.time() - max(started, written()) > options.patience:
                print(f"HUNG: nothing was written for {options.patience:.0f} s; see {log}")
                run.process.kill()
                return 1
            if next_kill is None and steps() > begun_at:
                next_kill = time.monotonic() + rng.uniform(1, options.longest)
            if len(kills) < options.kills and next_kill and time.monotonic() > next_kill:
                by_label = {}
                for process in run.alive():
                    try:
                        by_label.setdefault(label(process, run.process.pid), []).append(process)
                    except psutil.Error:
                        pass
                if not by_label:
                    continue
                name = rng.choice(sorted(by_label))
                try:
                    rng.choice(by_label[name]).kill()
                except psutil.Error:
                    continue  # it has just ended by itself
                kills.append(name)
                killed += 1
                print(f"kill {len(kills):3}: {name:18} {time.time() - started:5.0f} s after the start, "
                      f"after {steps()} steps", flush=True)
                next_kill = time.monotonic() + rng.uniform(10, options.longest)
        run.assert_nothing_stays()  # processes, /dev/shm, the temporary folder
        shutil.rmtree(run.temporary)  # at most what torch has compiled
        now = (run_dir / "groups.jsonl").read_bytes() if (run_dir / "groups.jsonl").exists() else b""
        complete = finished[:finished.rfind(b"\n") + 1]
        assert now.startswith(complete), "groups.jsonl has lost groups"
        finished = now
        if run.process.returncode == 0:
            break
        if not killed:
            print(f"the run has failed without a kill: see {log}")
            return 1
        if (run_dir / "config.json").exists():
            command = [sys.executable, str(ROOT / "train.py"), "--resume", str(run_dir)]
    problems = check_run_dir(run_dir)
    if options.reference:
        problems += compare_curves(run_dir, options.reference, options.tolerance)
    print(f"{len(kills)} kills in {time.monotonic() - begun:.0f} s: "
          + ", ".join(f"{n} {name}" for name, n in Counter(kills).most_common()))
    print("\n".join(f"PROBLEM: {p}" for p in problems) or "nothing is lost, nothing is left")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
