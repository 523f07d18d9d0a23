"""How fast the sampler answers, and how much it holds, with a million tasks.

    python tests/bench_sampler.py [--tasks 1000000]

The tasks lie as a long run leaves them: 75 competitions, one draft root each, the rest improve and
debug tasks; each batch is drawn, updated, and replaced by children while as many tasks leave.
Times are of the process's CPU, which one thread uses, so that a busy machine does not blur them.
Goals: a batch of 64 within 5 ms, an update within 50 us, 100 bytes a task beyond its id.
"""

import argparse
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sampler import AdaptiveSampler  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    names = [f"competition-{i}" for i in range(75)]
    ids = [f"{name}/draft" for name in names]
    ids += [f"{names[i % 75]}/{('improve', 'debug')[i % 2]}/{i:016x}"
            for i in range(args.tasks - 75)]
    outcomes = [(rng.random(16) < p).astype(np.float32) for p in rng.random(256)]

    def add(sampler, task_id, headroom):
        any_mix = ("improve", "debug")[len(task_id) % 2]
        operator = "draft" if task_id.endswith("/draft") else any_mix
        sampler.add(task_id, task_id.split("/")[0], operator, headroom)

    # tracemalloc slows Python down several times: memory is measured in a pass of its own
    tracemalloc.start()
    sampler = AdaptiveSampler(seed=0)
    for i, task_id in enumerate(ids):
        add(sampler, task_id, 1 - i % 256 / 257)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"memory: {held / args.tasks:.0f} bytes a task beyond its id (with growth's copies "
          f"{peak / args.tasks:.0f}), all structures counted",
          flush=True)

    sampler = AdaptiveSampler(seed=0)
    start = time.process_time()
    for i, task_id in enumerate(ids):
        add(sampler, task_id, 1 - i % 256 / 257)
    print(f"add:    {(time.process_time() - start) / args.tasks * 1e6:.1f} us a task")

    draw_ms, update_us, churn_us = [], [], []
    for step in range(args.batches):
        start = time.process_time()
        batch = sampler.draw(args.batch)
        draw_ms.append((time.process_time() - start) * 1e3)
        start = time.process_time()
        for i, task_id in enumerate(batch):
            sampler.update(task_id, outcomes[(step + i) % 256])
        update_us.append((time.process_time() - start) / args.batch * 1e6)
        start = time.process_time()
        for i, task_id in enumerate(batch):  # one task leaves, a child comes
            if not task_id.endswith("/draft"):
                sampler.remove(task_id)
            add(sampler, f"{task_id}/{step}", 1 - (step + i) % 256 / 257)
        churn_us.append((time.process_time() - start) / args.batch * 1e6)
    for name, values, unit in (("draw", draw_ms, f"ms a batch of {args.batch}"),
                               ("update", update_us, "us a task"),
                               ("remove + add", churn_us, "us a task")):
        high = np.quantile(values, 0.99)
        print(f"{name + ':':7} mean {np.mean(values):.2f}, p99 {high:.2f} {unit}")
    start = time.process_time()
    sampler.metrics()
    print(f"metrics: {(time.process_time() - start) * 1e3:.1f} ms, "
          f"all probabilities: {timed(sampler._probabilities):.0f} ms")


def timed(function) -> float:
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3


if __name__ == "__main__":
    main()
