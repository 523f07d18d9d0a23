"""Wall-clock of asynchronous (eta = 2) against synchronous training when scripts are slow.

    python tests/bench_async.py              # flags of train.py follow a --

    python examples/tiny_policy.py --hidden 512 --layers 8 --prompts 500 --lessons 0 \\
        --out data/policy-27m                # a policy whose learner step is as long as a rollout
    python tests/bench_async.py --light --model data/policy-27m --steps 48 --delay 2 --slots 24 \\
        -- --learning-rate 3e-4

Two runs of train.py with the same seed and the same number of learner steps, by default those of
`make train`. Scripts are made slow without using the machine: each sleeps in its slot first
(--sandbox-delay, exponential). --light takes only the six competitions whose scripts took the least
time in a synchronous run on all, so that it is hardly anything but their sleep that makes them
slow.

What there is to gain follows from the stages of the synchronous run, R (waiting for a batch) and L
(learning, publishing). Both bounds are printed:

- The slots hold about one batch: scripts of the next batch run while this one is learnt from, and
  the longer stage remains, (R + L) / max(R, L). So in the second call above.
- The slots hold all that may be under way, eta + 1 batches: these sleep side by side. A batch is
  learnt from eta + 1 steps after it was handed out, so that a step lasts at least L, and at least
  (R + L) / (eta + 1): the ratio is at most the smaller of (R + L) / L and eta + 1. So by default.

Printed as well: seconds of each stage and of a step, what the frozen policies' drafts are worth.
Both runs share the machine's cores between learner, engine and scripts: nothing else may run.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LIGHT = "auction-clocks clinic-progression kiln-cracks meter-parity rail-wear ticket-glyphs".split()
sys.path.insert(0, str(ROOT))
from train import die_with_parent, read_jsonl  # noqa: E402


def run(eta: int, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One training run: means over its steps, and its final quality."""
    command = [sys.executable, ROOT / "train.py", "--preset", "tiny", "--model", args.model,
               "--competitions", args.competitions, "--heldout", "",
               "--run-dir", folder, "--steps", args.steps, "--max-staleness", eta,
               "--sandbox-delay", args.delay, "--sandbox-slots", args.slots, "--reuse-mb", 0,
               "--timeout", 30,  # slots share cores: no script fails for its neighbours' work
               "--eval-drafts", args.drafts, "--checkpoint-every", args.steps, *args.flags]
    done = subprocess.run([str(word) for word in command], preexec_fn=die_with_parent)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return measure(folder)


def measure(folder: Path) -> dict[str, float]:
    metrics = read_jsonl(folder / "metrics.jsonl")
    after = [row for row in read_jsonl(folder / "eval.jsonl") if row["when"] == "after"]

    def mean(name, source=metrics):
        return float(np.mean([row[name] for row in source])) if source else float("nan")

    return {"steps": len(metrics), "step": mean("seconds_step"), "wait": mean("seconds_wait"),
            "learn": mean("seconds_learn"), "sync": mean("seconds_sync"),
            "generate": mean("seconds_rollout"), "execute": mean("seconds_sandbox"),
            "staleness": mean("staleness_mean"), "valid": mean("valid_rate", after),
            "human rank": mean("human_rank", after)}


def bounds(synchronous: dict[str, float], eta: int) -> tuple[float, float]:
    """Largest ratios where the slots hold one batch, and where they hold eta + 1."""
    rollout, learner = synchronous["wait"], synchronous["learn"] + synchronous["sync"]
    both = rollout + learner
    return both / max(rollout, learner), min(both / learner, eta + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="Flags of train.py may follow a --.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="data/policy", help="the policy")
    add("--light", action="store_true", help="the six competitions with the quickest scripts")
    add("--steps", type=int, default=76, help="learner steps of each run")
    add("--delay", type=float, default=3.0, help="mean sleep before a script, seconds")
    add("--slots", type=int, default=288, help="scripts that sleep or run at the same time")
    add("--drafts", type=int, default=96, help="drafts per competition, for the final quality")
    add("--out", type=Path, help="new directory where both runs stay; without, they are deleted")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.flags = words[cut + 1:]
    if args.out and args.out.exists():
        parser.error(f"--out {args.out}: exists; name a new directory")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes as well
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        args.competitions = ROOT / "data/competitions/train"
        if args.light:
            light = Path(folder) / "competitions"
            light.mkdir()
            for name in LIGHT:
                (light / name).symlink_to(args.competitions / name)
            args.competitions = light
        out = args.out or Path(folder)
        results = {eta: run(eta, out / f"eta-{eta}", args) for eta in (0, 2)}
    print("\nmeans over the steps, seconds; quality of the frozen policy's drafts after training")
    print(f"{'eta':>4}" + "".join(f"{name:>11}" for name in results[0]))
    for eta, values in results.items():
        print(f"{eta:4}" + "".join(f"{value:11.2f}" for value in values.values()))
    one, all_of_them = bounds(results[0], 2)
    print(f"wall-clock: {results[0]['steps'] * results[0]['step']:.0f} s synchronous, "
          f"{results[2]['steps'] * results[2]['step']:.0f} s with eta = 2: "
          f"{results[0]['step'] / results[2]['step']:.2f} times faster; at most {one:.2f} where the "
          f"slots hold one batch, {all_of_them:.2f} where they hold three")


if __name__ == "__main__":
    main()
