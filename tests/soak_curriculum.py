"""Soak of the curriculum with a fake engine: many rollout threads, a full buffer, very many groups.

    python tests/soak_curriculum.py                                     # the full size
    python tests/soak_curriculum.py --threads 50 --tasks 2000 --groups 20000

Everything but the engine, the scripts and the learner is real: curriculum, buffer, sampler, both
logs, rollout threads. Prints groups/s, the peak memory and the live Python objects of every tenth
of the groups. The queues must stay within what the staleness rule allows, the memory must not grow:
a leak shows as more live objects, fragmented memory as a larger peak alone.

The tenths begin once the buffer is full, or with `--settle` once it has then been replaced so many
times over; what it took until then is printed as well. A buffer that has just become full still
changes what it holds: the ids of evicted ancestors live on in their descendants' lineages, and debug
tasks take the place of improve tasks.

The full size, beside other work on two cores: 1008 -> 519 groups/s, peak 182 MiB when full, then by
tenths 189 192 194 195 195 196 196 196 197 197 MiB (+4.3 %), live objects +0.2 %.
"""

import argparse
import gc
import os
import queue
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fakes import FakePrompter, completion  # noqa: E402

from buffer import EvolvingBuffer  # noqa: E402
from rollout import RolloutConfig, RolloutWorker  # noqa: E402
from sampler import AdaptiveSampler  # noqa: E402
from sandbox import Execution  # noqa: E402
from train import Config, Curriculum  # noqa: E402


class Engine:
    """Scripts that were never seen before: nothing merges."""

    max_model_len, version = 10_000, 0

    def generate(self, prompt_ids, n, max_tokens, temperature):
        return [completion(f"```python\nquality = {random.random()}\n```")
                for _ in range(n)], self.version


class Scripts:
    """Two of five fail, each in one of twenty ways; quality is the number in the script."""

    def run(self, competition, code, timeout=None):
        quality = float(code.split("=")[1])
        if quality < 0.4:
            return Execution("error", exit_code=1, stderr_tail=f"E{int(quality * 50)}Error: bad")
        return Execution("ok", exit_code=0, valid=True, score=quality, human_rank=quality)


class MeasuredQueue(queue.Queue):
    longest = 0

    def _put(self, item):  # under the queue's lock
        super()._put(item)
        self.longest = max(self.longest, self._qsize())


def peak_mib() -> float:
    """Largest resident memory since the last call."""
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=1000, help="rollout threads")
    parser.add_argument("--tasks", type=int, default=100_000, help="capacity of the buffer")
    parser.add_argument("--groups", type=int, default=1_000_000,
                        help="groups, counted from when the tenths begin")
    parser.add_argument("--settle", type=int, default=0,
                        help="how often the buffer is replaced before memory is judged")
    parser.add_argument("--dir", default=".", help="where the logs go, about 3 KB a group; removed "
                                                   "at the end")
    options = parser.parse_args()
    batch = max(options.threads // 2, 1)  # B: with eta = 2 every thread has a task
    config = Config(groups=batch, responses=2, steps=10**9, max_staleness=2,
                    capacity=options.tasks)
    names = [f"competition-{i}" for i in range(100)]
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="soak-") as folder:
        buffer = EvolvingBuffer(names, config.capacity, max_depth=4,  # as in the header's figures
                                children_per_group=config.children,
                                frontier=0,  # so that it fills
                                log_path=Path(folder) / "groups.jsonl")
        sampler = AdaptiveSampler()
        for task in buffer.roots():
            sampler.add(task.id, task.competition_id, task.operator)
        tasks, results = MeasuredQueue(), MeasuredQueue()
        curriculum = Curriculum(config, buffer, sampler, tasks, results,
                                Path(folder) / "traces.jsonl")
        engine = Engine()
        RolloutWorker(tasks, results, engine, Scripts(), FakePrompter(names), RolloutConfig(),
                      options.threads, slots=8, on_error=curriculum.fail)
        curriculum.start()

        def roll_out(count: int) -> float:
            """Learn (do nothing) until so many more groups are through; returns groups/s."""
            started, first = time.monotonic(), engine.version
            while (engine.version - first) * batch < count:
                curriculum.next_batch()
                engine.version += 1
                curriculum.stepped(engine.version)
            return (engine.version - first) * batch / (time.monotonic() - started)

        def replaced() -> float:
            """How many times over the buffer's tasks have been evicted."""
            with curriculum.changed:  # groups go on arriving
                operators = buffer.statistics()["operator"].values()
            return sum(operator["evicted"] for operator in operators) / options.tasks

        def measure(speed: float) -> tuple:
            gc.collect()
            row = (buffer.sequence, speed, peak_mib(), sys.getallocatedblocks(), len(buffer),
                   replaced(), os.path.getsize(Path(folder) / "groups.jsonl") / 2**20)
            print("{:10} {:9.0f} {:9.0f} {:9} {:8} {:9.1f} {:8.0f}".format(*row), flush=True)
            return row

        print(f"{'groups':>10} {'groups/s':>9} {'peak MiB':>9} {'objects':>9} {'tasks':>8} "
              f"{'replaced':>9} {'log MiB':>8}")
        peak_mib()
        for times in range(options.settle + 1):  # 0: until it is full
            started, before = time.monotonic(), buffer.sequence
            while replaced() < max(times, 1e-9):
                roll_out(batch)
            measure((buffer.sequence - before) / (time.monotonic() - started))
        print("the tenths begin")
        rows = [measure(roll_out(options.groups // 10)) for _ in range(10)]
        first, last = rows[0], rows[-1]
        bound = (config.max_staleness + 1) * batch
        print(f"groups/s {first[1]:.0f} -> {last[1]:.0f}; peak memory {first[2]:.0f} -> "
              f"{last[2]:.0f} MiB ({last[2] / first[2] - 1:+.1%}); live objects "
              f"{last[3] / first[3] - 1:+.1%}")
        print(f"longest queues: tasks {tasks.longest}, results {results.longest}, of at most {bound}")
        flat = last[2] < 1.05 * first[2] and last[3] < 1.05 * first[3]
        bounded = max(tasks.longest, results.longest) <= bound
        print("memory is flat, queues are bounded" if flat and bounded else "NOT flat or bounded")
        sys.stdout.flush()
        return 0 if flat and bounded else 1


if __name__ == "__main__":
    sys.exit(main())
