"""train.py --tensorboard: the numbers of metrics.jsonl, once more.

    python -m pytest tests/test_tensorboard.py
"""

import importlib.util
import json
import queue
import sys
import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest
from fakes import FakeEngine, FakeLearner
from test_train import make_config, make_curriculum, start_workers

import train


def training_run(run_dir, steps=3) -> list[dict]:
    """The loop of train.Run with fakes around it; returns the rows of metrics.jsonl."""
    config = make_config(steps=steps, tensorboard=True, checkpoint_every=2, watchdog=0.0)
    curriculum, learner = make_curriculum(config), FakeLearner()
    worker = start_workers(curriculum, FakeEngine(), 2)

    class Run(train.Run):
        def __init__(self):
            self.config, self.curriculum, self.learner = config, curriculum, learner
            self.dir, self.step, self.dull = run_dir, 0, 0
            self.evaluated, self.followers = True, []
            self.rollout_ranks, self.over = [1], threading.Event()
            self.queues = defaultdict(queue.Queue, tasks=curriculum.tasks).__getitem__
            self.publish, self.rehearse = lambda: 0.0, lambda: None
            self.save, self.evaluate = lambda: None, lambda when: None

    Run().run()
    worker.join()
    curriculum.results.put(None)
    return [json.loads(line) for line in open(run_dir / "metrics.jsonl")]


def numbers(rows) -> dict:
    return {(name, row["step"]): pytest.approx(float(value), rel=1e-5) for row in rows
            for name, value in row.items() if value is not None}


def test_every_number_of_metrics_jsonl_is_written(tmp_path, monkeypatch):
    """With a writer that only takes notes, so that the package need not be there."""
    written, flushed = {}, []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            assert log_dir == tmp_path / "tensorboard" and purge_step == 1

        def add_scalar(self, name, value, step):
            written[name, step] = float(value)

        def flush(self):
            flushed.append(len(written))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=SummaryWriter))
    assert written == numbers(training_run(tmp_path)) and len(flushed) == 3
    assert ("reward_mean", 3) in written and ("seconds_step", 1) in written
    assert all(0 < written["groups_trained", n] <= written["groups", n] for n in (1, 2, 3))


def test_tensorboard_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = training_run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {(name, event.step): event.value for name in events.Tags()["scalars"]
            for event in events.Scalars(name)} == numbers(rows)


def test_the_package_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(train.UserError) as error:  # main() prints it and exits with status 2
        train.validate(make_config(tensorboard=True), world_size=1)
    assert "pip install tensorboard" in str(error.value) and "\n" not in str(error.value)
    train.validate(make_config(tensorboard=False), world_size=1)
