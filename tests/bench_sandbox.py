"""Latency of the sandbox against `subprocess.run([python, script])`; then many runs in a row.

    python tests/bench_sandbox.py [--rounds 15] [--runs 1000]

Prints one line a case: median milliseconds of both ways and their ratio; then p99 / median over
--runs runs, and what grew: memory and descriptors of owner and fork server, files on disk. One
OpenMP thread in both ways. Rounds are interleaved, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from sandbox import Competition, Sandbox  # noqa: E402
from test_sandbox_attacks import make_competition  # noqa: E402

IMPORTS = """import numpy as np, pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score
"""
CASES = {
    "trivial script": "print(1)\n",
    "imports pandas and scikit-learn": IMPORTS,
    "random forest, cross-validation": IMPORTS + """
rng = np.random.default_rng(0)
X = rng.normal(size=(200, 6)); y = (X[:, 0] + rng.normal(size=200) > 0).astype(int)
print("validation score:", cross_val_score(RandomForestClassifier(15), X, y, cv=4).mean())
sub = pd.read_csv("input/sample_submission.csv"); sub.to_csv("submission.csv", index=False)
""",
}  # fmt: skip
BOUNDS = {"imports pandas and scikit-learn": 0.03, "random forest, cross-validation": 0.15}


def milliseconds(function) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def compare(sandbox: Sandbox, competition: Competition, rounds: int) -> None:
    """Each case both ways, taking turns."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(competition.public_dir, f"{folder}/input")
        times: dict[str, tuple[list, list]] = {name: ([], []) for name in CASES}
        for _ in range(rounds):
            for name, code in CASES.items():
                Path(folder, "script.py").write_text(code)
                command = [sys.executable, "script.py"]
                times[name][0].append(
                    milliseconds(
                        lambda: subprocess.run(
                            command, cwd=folder, env=environment, capture_output=True
                        )
                    )
                )
                times[name][1].append(milliseconds(lambda: sandbox.run(competition, code)))
    print(f"{'':34} {'subprocess':>11} {'sandbox':>9} {'ratio':>7} {'bound':>6}")
    for name, (plain, ours) in times.items():
        plain, ours = statistics.median(plain), statistics.median(ours)
        bound = BOUNDS.get(name)
        print(f"{name:34} {plain:8.0f} ms {ours:6.0f} ms {ours / plain:7.3f} {bound or '':>6}")


def endurance(sandbox: Sandbox, competition: Competition, runs: int) -> None:
    """Many short runs: the tail of the latency, and what grows."""
    code = (
        IMPORTS + 'pd.read_csv("input/sample_submission.csv").to_csv("submission.csv", index=False)'
    )

    def sizes() -> dict:
        out = {}
        for who, pid in (("owner", os.getpid()), ("server", sandbox._process.pid)):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            out[f"{who} MB"] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            out[f"{who} descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
        return out

    for _ in range(20):
        sandbox.run(competition, code)
    before = sizes()
    times = sorted(milliseconds(lambda: sandbox.run(competition, code)) for _ in range(runs))
    after = sizes()
    time.sleep(0.5)
    median, p99 = statistics.median(times), times[int(0.99 * runs)]
    print(
        f"\n{runs} runs: median {median:.1f} ms, p99 {p99:.1f} ms = {p99 / median:.2f}x, "
        f"maximum {times[-1]:.1f} ms"
    )
    print("grew: " + ", ".join(f"{name} {after[name] - before[name]:+.1f}" for name in before))
    print(
        f"left on disk: {[name for name in os.listdir(sandbox.hello['root']) if name != 'canary']}"
    )


def kills(competition: Competition, times: int = 5) -> None:
    """kill -9 in the middle of runs: seconds until the tree is dead and its files are gone."""
    from test_sandbox import OWNER, alive, descendants

    seconds = {"owner": [], "fork server": []}
    for victim in seconds:
        for _ in range(times):
            with tempfile.TemporaryDirectory() as scratch:
                here, directory = str(Path(__file__).resolve().parent.parent), str(
                    competition.public_dir.parent.parent
                )
                text = OWNER.format(here=here, directory=directory, scratch=scratch)
                owner = subprocess.Popen(
                    [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                server = int(owner.stdout.readline())
                while len(tree := descendants(owner.pid)) < 7:
                    time.sleep(0.01)
                start = time.perf_counter()
                os.kill(owner.pid if victim == "owner" else server, signal.SIGKILL)
                if victim == "owner":
                    owner.wait()
                while alive(tree) or (victim == "owner" and os.listdir(scratch)):
                    time.sleep(0.002)
                seconds[victim].append(time.perf_counter() - start)
                if owner.poll() is None:
                    owner.kill()
                    owner.wait()
                    time.sleep(1)
    for victim, measured in seconds.items():
        print(
            f"kill -9 of the {victim}: "
            f"tree dead and files gone after at most {max(measured):.3f} s of {times} times"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=15, help="interleaved rounds of the comparison"
    )
    parser.add_argument(
        "--runs", type=int, default=1000, help="runs in a row for the tail of the latency"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        competition = make_competition(Path(folder))
        sandbox = None

        def begin():
            nonlocal sandbox
            sandbox = Sandbox(slots=1)

        start = milliseconds(begin)
        print(
            f"fork server ready after {start:.0f} ms ({sandbox.isolation}); "
            f"load {os.getloadavg()[0]:.1f}\n"
        )
        with sandbox:
            compare(sandbox, competition, options.rounds)
            endurance(sandbox, competition, options.runs)
        print()
        kills(competition)
        print(f"threads left in this process: {threading.active_count() - 1}")


if __name__ == "__main__":
    main()
