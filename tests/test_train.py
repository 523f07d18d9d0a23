"""The curriculum and the loop around it, with fakes: python -m pytest tests/test_train.py"""

import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import FakeEngine, FakeLearner, FakePrompter, FakeSandbox, write_world

import train
from buffer import EvolvingBuffer, Group, Task, Trace
from rollout import Request, Result, RolloutConfig, RolloutWorker, guard_command, rollout
from sampler import AdaptiveSampler
from train import Config, Curriculum, UserError, batch_metrics, make_batch, parse_config

COMPETITIONS = "alder birch cedar dogwood elm fir gum hazel ilex juniper".split()


def make_config(**changes) -> Config:
    return dataclasses.replace(Config(groups=3, responses=4, steps=12, max_staleness=2, seed=1),
                               **changes)


def make_curriculum(config, tmp_path=None):
    buffer = EvolvingBuffer(COMPETITIONS, capacity=60,
                            log_path=tmp_path / "groups.jsonl" if tmp_path else None)
    sampler = AdaptiveSampler(config.sampler, epsilon=config.epsilon, seed=config.seed)
    for task in buffer.roots():
        sampler.add(task.id, task.competition_id, task.operator)
    return Curriculum(config, buffer, sampler, queue.Queue(), queue.Queue())


def start_workers(curriculum, engine, threads, on_error=None):
    return RolloutWorker(curriculum.tasks, curriculum.results, engine, FakeSandbox(),
                         FakePrompter(COMPETITIONS), RolloutConfig(), threads, slots=2,
                         on_error=on_error or curriculum.fail)


def run_async(config, threads, delay=0.0, tmp_path=None):
    """The loop of train.Run, without processes: metrics of every step."""
    curriculum, engine, learner = make_curriculum(config, tmp_path), FakeEngine(delay), FakeLearner()
    worker = start_workers(curriculum, engine, threads)
    curriculum.start()
    rows = []
    for _ in range(config.steps):
        results = curriculum.next_batch()
        rows.append(batch_metrics(results, learner.version))
        if sequences := make_batch(results, config):
            rows[-1] |= learner.step(sequences)
        engine.version = learner.version  # a publication
        curriculum.stepped(learner.version)
    curriculum.tasks.put(None)
    worker.join()
    curriculum.results.put(None)
    return rows, curriculum


def run_synchronous(config):
    """What max_staleness 0 must equal: draw B, roll out B, learn, and again."""
    curriculum, engine, learner = make_curriculum(config), FakeEngine(), FakeLearner()
    buffer, sampler = curriculum.buffer, curriculum.sampler
    prompter, rows = FakePrompter(COMPETITIONS), []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(config.steps):
            tasks = [buffer.tasks[i] for i in sampler.draw(config.groups)]
            results = []
            for task in tasks:
                results.append(rollout(Request(task, config.responses), engine, FakeSandbox(),
                                       prompter, RolloutConfig(), pool))
                group = results[-1].group
                in_flight = {t.id for t in tasks[len(results):]}
                admitted, evicted = buffer.add(group, sampler.score, in_flight)
                sampler.update(task.id, group.rewards, group.failed)
                curriculum.follow(admitted, evicted)
            rows.append(batch_metrics(results, learner.version))
            if sequences := make_batch(results, config):
                rows[-1] |= learner.step(sequences)
            engine.version = learner.version
    return rows, buffer


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def test_staleness_zero_equals_a_synchronous_loop():
    config = make_config(max_staleness=0, steps=20)
    rows, curriculum = run_async(config, threads=1)
    expected, buffer = run_synchronous(config)
    assert without_times(rows) == without_times(expected)
    assert list(curriculum.buffer.tasks) == list(buffer.tasks)
    assert {row["staleness_max"] for row in rows} == {0}
    assert len({row["loss"] for row in rows}) == len(rows)  # the comparison compares something


@pytest.mark.parametrize("stale", ["wait", "drop"])
@pytest.mark.parametrize("eta", [1, 2])
def test_no_group_is_older_than_eta(stale, eta):
    config = make_config(max_staleness=eta, steps=25, stale=stale)
    rows, curriculum = run_async(config, threads=5, delay=0.01)
    assert max(row["staleness_max"] for row in rows) <= eta
    assert any(row["staleness_max"] > 0 for row in rows)  # it did run ahead
    if stale == "wait":
        assert curriculum.dropped == 0
        assert curriculum.buffer.sequence == config.steps * config.groups  # nothing is lost


def test_metrics_are_taken_while_groups_arrive():
    """The learner's thread counts tasks while the curriculum's adds and evicts them."""
    config = make_config(steps=10**6)
    curriculum, engine = make_curriculum(config), FakeEngine()
    worker = start_workers(curriculum, engine, threads=3)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        curriculum.start()
        while curriculum.buffer.sequence < 300:
            curriculum.next_batch()
            engine.version += 1
            curriculum.stepped(engine.version)
            for _ in range(20):
                metrics = curriculum.metrics()
                assert metrics["buffer_draft"] == len(COMPETITIONS)
    finally:
        sys.setswitchinterval(interval)
        curriculum.tasks.put(None)
        worker.join()
        curriculum.results.put(None)


def test_a_late_group_of_fresh_tokens_is_not_dropped():
    """Handed out at version 0, it waited for a free thread and was sampled at version 3: the age of
    its oldest token counts."""
    config = make_config(max_staleness=2, stale="drop")
    curriculum, engine = make_curriculum(config), FakeEngine()
    with curriculum.changed:
        curriculum.hand_out()
    for version in (1, 2, 3):
        curriculum.stepped(version)
    for engine.version, kept in ((3, 1), (0, 1), (1, 2)):
        result = rollout(curriculum.tasks.get(), engine, FakeSandbox(), FakePrompter(COMPETITIONS),
                         RolloutConfig(), ThreadPoolExecutor(1))
        assert result.group.handout_version == 0
        with curriculum.changed:
            curriculum.receive(result)
        assert len(curriculum.ready) == kept
    assert curriculum.dropped == 1


def test_the_learner_waits_for_a_straggler():
    config = make_config(max_staleness=1)
    curriculum = make_curriculum(config)
    with curriculum.changed:
        curriculum.hand_out()
    requests = [curriculum.tasks.get() for _ in range(6)]  # (0 + 1 + 1) * 3
    assert curriculum.tasks.empty()
    engine, pool = FakeEngine(), ThreadPoolExecutor(1)
    results = [rollout(r, engine, FakeSandbox(), FakePrompter(COMPETITIONS), RolloutConfig(), pool)
               for r in requests]
    straggler = results.pop(0)

    def give(result):
        with curriculum.changed:
            curriculum.receive(result)

    for result in results[:3]:
        give(result)
    assert curriculum.batch_is_ready()  # the straggler may still be learnt from at version 1
    assert len(curriculum.next_batch()) == 3
    engine.version = 1
    curriculum.stepped(1)
    for result in results[3:]:
        give(result)
    for request in [curriculum.tasks.get() for _ in range(3)]:
        give(rollout(request, engine, FakeSandbox(), FakePrompter(COMPETITIONS), RolloutConfig(),
                     pool))
    assert not curriculum.batch_is_ready()  # five are ready, but it would be too old afterwards
    give(straggler)
    assert curriculum.batch_is_ready()
    assert straggler in curriculum.next_batch()


def test_groups_without_signal_are_not_trained_on_but_count():
    config = make_config(steps=3)

    class Dull(FakeSandbox):
        def run(self, competition, code, timeout=None):
            return super().run(competition, "quality = -1")

    curriculum, engine = make_curriculum(config), FakeEngine()
    worker = RolloutWorker(curriculum.tasks, curriculum.results, engine, Dull(),
                           FakePrompter(COMPETITIONS), RolloutConfig(), 2, 2, curriculum.fail)
    curriculum.start()
    for _ in range(3):
        results = curriculum.next_batch()
        assert make_batch(results, config) == []
        curriculum.stepped(0)  # skipped: the version stays
    assert curriculum.handed == 0 and curriculum.issued == 9
    assert curriculum.buffer.sequence == 9
    curriculum.tasks.put(None)
    worker.join()


def test_what_counts_is_what_a_response_adds_to_the_one_of_three_that_is_chosen():
    """A second copy of the best adds nothing to the first; one that stands alone adds most; one
    that claims more than it is worth costs the reward of what it pushes out."""
    def advantages(rewards, claims=None, **options):
        traces = [Trace(f"t{i}", "toy/draft", "toy", "draft", reward=reward, claim=claim)
                  for i, (reward, claim) in enumerate(zip(rewards, claims or rewards))]
        result = SimpleNamespace(group=Group(Task.root("toy"), traces))
        return [s.advantage for s in make_batch([result], make_config(**options))]

    # 0.9 against two of (0.9, 0.3, 0): only in one of three cases without the other 0.9, it adds
    # 0.6, on average 0.2; 0.3 always meets a 0.9. The mean is 0.1.
    assert advantages((0.9, 0.9, 0.3, 0.0)) == pytest.approx([0.1, 0.1, -0.1, -0.1])
    assert advantages((0.9, 0.3, 0.3, 0.3)) == pytest.approx([0.45, -0.15, -0.15, -0.15])
    assert advantages((0.9, 0.9, 0.9, 0.0)) == []  # of three there is always another 0.9
    assert advantages((0.9, 0.9, 0.3, 0.1), best_of=1) == pytest.approx([0.35, 0.35, -0.25, -0.45])
    # The first pushes out 0.9, 0.9 and 0.3: -0.4 on average. 0.9 is chosen only where the first is
    # not there, over 0.3, and adds 0.6: 0.2. The mean is -0.05.
    assert advantages((0.3, 0.9, 0.3, 0.0), (8.0, 2.0, 1.0, None)) == pytest.approx(
        [-0.35, 0.25, 0.05, 0.05])
    silent = -sys.float_info.max  # valid without a printed score: better than nothing valid
    assert advantages((0.6, 0.0, 0.0), (silent, None, None)) == pytest.approx([0.4, -0.2, -0.2])
    assert advantages((0.0, 0.0, 0.6), (None, None, silent)) == pytest.approx([-0.2, -0.2, 0.4])


def test_a_failing_rollout_stops_the_learner():
    config = make_config()
    curriculum = make_curriculum(config)

    class Broken(FakeEngine):
        def generate(self, *args, **kwargs):
            raise RuntimeError("engine is gone")

    start_workers(curriculum, Broken(), 2)
    curriculum.start()
    with pytest.raises(RuntimeError, match="engine is gone"):
        curriculum.next_batch()


def test_checkpoint_goes_on_like_the_uninterrupted_run(tmp_path):
    """Save in the middle, load into fresh objects, compare all that follows (synchronous, so that
    the order of events is defined)."""
    config = make_config(max_staleness=0, steps=10)
    full, _ = run_async(config, threads=1)

    def loop(curriculum, engine, learner, steps):
        worker = start_workers(curriculum, engine, 1)
        curriculum.start()
        rows = []
        for _ in range(steps):
            results = curriculum.next_batch()
            rows.append(batch_metrics(results, learner.version))
            if sequences := make_batch(results, config):
                rows[-1] |= learner.step(sequences)
            engine.version = learner.version
            curriculum.stepped(learner.version)
        curriculum.tasks.put(None)
        worker.join()
        curriculum.results.put(None)
        return rows

    first, learner = make_curriculum(make_config(max_staleness=0, steps=4)), FakeLearner()
    rows = loop(first, FakeEngine(), learner, 4)
    state = json.loads(json.dumps(first.state_dict()))
    second, engine = make_curriculum(config), FakeEngine()
    second.load_state_dict(state)
    second.replay()
    assert second.epoch == 1
    engine.version = learner.version
    rows += loop(second, engine, learner, 6)
    assert without_times(rows) == without_times(full)


def test_replay_brings_the_sampler_along(tmp_path):
    """Killed before the first checkpoint: all that is known comes from the buffer's log."""
    config = make_config(max_staleness=0, steps=6)
    _, live = run_async(config, threads=1, tmp_path=tmp_path)
    resumed = make_curriculum(config, tmp_path)
    resumed.replay()
    assert resumed.sampler.failures == live.sampler.failures != 0.5
    tasks = live.sampler.ids
    assert resumed.sampler.ids == tasks and set(tasks) == set(live.buffer.tasks)
    assert [resumed.sampler.statistics(t) for t in tasks] == [
        live.sampler.statistics(t) for t in tasks]


def test_replay_counts_a_task_that_was_taken_out(tmp_path):
    """Its prompt was too long; it was in flight at the checkpoint."""
    config = make_config(max_staleness=0, steps=6)
    _, live = run_async(config, threads=1, tmp_path=tmp_path)
    task = next(task for task in live.buffer.tasks.values() if task.depth)
    live.in_flight[task.id] = live.sampler.in_flight[task.id] = 0
    state = json.loads(json.dumps(live.state_dict()))
    live.receive(Result(Request(task, config.responses), None))
    resumed = make_curriculum(config, tmp_path)
    resumed.load_state_dict(state)
    resumed.replay()
    assert resumed.skipped == live.skipped == 1
    assert resumed.sampler.state_dict() == live.sampler.state_dict()


def test_replay_after_a_shorter_resume_that_evicted_what_it_had_released(tmp_path):
    config = make_config(max_staleness=0, steps=6)
    _, live = run_async(config, threads=1, tmp_path=tmp_path)
    gone = next(task for task in live.buffer.tasks.values() if task.depth)
    live.in_flight[gone.id] = live.sampler.in_flight[gone.id] = 0
    state = json.loads(json.dumps(live.state_dict()))
    live.buffer.capacity = len(live.buffer)  # the next admission evicts the one of lowest score
    root = live.buffer.roots()[0]
    trace = Trace("t", root.id, root.competition_id, "draft", code="new", code_key="new",
                  valid=True, status="ok", base_reward=0.5, reward=0.5)
    admitted, evicted = live.buffer.add(Group(root, [trace]), lambda name: name != gone.id)
    assert (len(admitted), evicted) == (1, [gone.id])
    resumed = make_curriculum(config, tmp_path)
    resumed.load_state_dict(state)
    resumed.replay()
    assert gone.id not in resumed.in_flight and gone.id not in resumed.sampler
    assert resumed.handed == state["handed"] - 1
    resumed.start()  # does not ask for it
    resumed.results.put(None)
    resumed.sampler.add(gone.id, gone.competition_id, gone.operator)  # it may come back


def test_in_flight_tasks_are_handed_out_again():
    config = make_config()
    curriculum = make_curriculum(config)
    with curriculum.changed:
        curriculum.hand_out()
    state = json.loads(json.dumps(curriculum.state_dict()))
    resumed = make_curriculum(config)
    resumed.load_state_dict(state)
    resumed.replay()
    assert resumed.tasks.empty()  # not before the engines have the checkpoint's weights
    resumed.start()
    again = [resumed.tasks.get_nowait() for _ in range(resumed.tasks.qsize())]
    assert {r.task.id for r in again} == set(curriculum.in_flight)
    assert resumed.epoch == 1
    assert resumed.handed == curriculum.handed
    resumed.results.put(None)


@pytest.mark.parametrize("steps, left", [(0, 0), (1, 8), (2, 16)])
def test_a_resume_with_fewer_steps_rolls_nothing_out_that_nobody_learns_from(steps, left):
    config = make_config(groups=8, max_staleness=2, steps=20)
    curriculum = make_curriculum(config)
    with curriculum.changed:
        for number in range(30):  # enough tasks for all that may be in flight
            task = Task(f"toy/{number}", COMPETITIONS[0], "draft")
            curriculum.buffer.tasks[task.id] = task
            curriculum.sampler.add(task.id, task.competition_id, task.operator)
        curriculum.hand_out()
        while not curriculum.tasks.empty():
            curriculum.tasks.get()
        assert curriculum.issued == 24
        curriculum.config = dataclasses.replace(config, steps=steps)
        curriculum.start()
    assert curriculum.tasks.qsize() == len(curriculum.in_flight) == curriculum.issued == left
    assert curriculum.handed == left and len(curriculum.sampler.in_flight) == left
    curriculum.results.put(None)


# -- command line


def test_flags_win_over_presets_and_presets_over_defaults():
    assert parse_config(["--preset", "small"])[0].responses == 8
    assert parse_config(["--preset", "small", "--responses", "5"])[0].responses == 5
    assert not parse_config(["--preset", "tiny", "--no-buffer"])[0].buffer


def test_a_config_file_comes_between_flags_and_presets(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("preset: small\nresponses: 6\nlearning_rate: 1e-5\nbuffer: false\n")
    config = parse_config(["--config", str(path), "--responses", "5"])[0]
    assert (config.preset, config.responses, config.learning_rate, config.buffer, config.groups) == (
        "small", 5, 1e-5, False, 16)
    path.write_text("stepz: 5\n")
    with pytest.raises(UserError, match="c.yaml: there is no flag --stepz"):
        parse_config(["--config", str(path)])
    path.write_text("steps: x\n")
    with pytest.raises(UserError, match="--config .*c.yaml: argument --steps: invalid int value"):
        parse_config(["--config", str(path)])


@pytest.mark.parametrize("flags", ["--steps x", "--reward gold", "--step 5", "--model", "--no"])
def test_a_flag_that_is_wrong_is_one_line_and_status_2(flags, capsys):
    assert train.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1
    assert flags.split()[0] in error


def named(monkeypatch, **ids):
    """load_competitions that knows these names and notes where it is told to look for data."""
    seen = []
    monkeypatch.setattr(train, "load_competitions", lambda where, data: seen.append(data) or
                        [SimpleNamespace(id=i) for i in ids[where].split()])
    return seen


def test_training_and_evaluation_sets_are_disjoint_unless_wanted(monkeypatch):
    seen = named(monkeypatch, lite="elm fir", ids="fir gum")
    config = make_config(competitions="ids", heldout="lite", data_dir="/data")
    with pytest.raises(UserError, match="--heldout lite: fir is a training.*--allow-overlap"):
        train.load_splits(config)
    train_set, heldout = train.load_splits(dataclasses.replace(config, allow_overlap=True))
    assert [c.id for c in train_set + heldout] == ["fir", "gum", "elm", "fir"]
    assert set(seen) == {"/data"}
    assert train.load_splits(dataclasses.replace(config, heldout=""))[1] == []


def test_a_run_directory_says_what_it_was_trained_on(tmp_path):
    splits = [SimpleNamespace(id="elm")], [SimpleNamespace(id="fir")]
    train.prepare_run_dir(make_config(run_dir=str(tmp_path / "run")), False, splits)
    assert json.loads((tmp_path / "run/splits.json").read_text()) == {"train": ["elm"],
                                                                    "heldout": ["fir"]}
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0


def test_what_the_policy_was_trained_on_before_counts_too(tmp_path, monkeypatch):
    splits = [SimpleNamespace(id="elm")], []
    train.prepare_run_dir(make_config(run_dir=str(tmp_path / "one")), False, splits)
    config = make_config(competitions="ids", heldout="lite", model=str(tmp_path / "one/policy"),
                         run_dir=str(tmp_path / "two"))
    named(monkeypatch, lite="elm fir", ids="gum")
    with pytest.raises(UserError, match="elm is a training competition too.*or of --model's"):
        train.load_splits(config)
    train.prepare_run_dir(config, False, ([SimpleNamespace(id="gum")], []))
    assert json.loads((tmp_path / "two/splits.json").read_text())["train"] == ["gum", "elm"]


def test_every_field_is_documented_in_help(capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"].split("(")[0][:40].split("  ")[0].strip()[:25] in text


@pytest.mark.parametrize("arguments, words", [
    (["--competitions", "/nowhere"], ["/nowhere"]),
    (["--model", "/nowhere/at/all"], ["--model", "/nowhere/at/all"]),
    (["--learner-ranks", "1", "--responses", "1"], ["--responses"]),
    (["--learner-ranks", "4"], ["--learner-ranks 4", "torchrun"]),  # one process
    (["--epsilon", "2"], ["--epsilon"]),
    (["--max-response-tokens", "5000"], ["--max-response-tokens", "--max-model-len"]),
    (["--capacity", "2"], ["--capacity 2", "3 training competitions"]),
    (["--resume", "/nowhere"], ["--resume", "/nowhere"]),
    (["--resume", ""], ["--resume", "give a run directory"]),
    (["--resume", "model/config.json"], ["--resume", "give a run directory"]),
    (["--run-dir", "model/config.json"], ["--run-dir model/config.json: "]),
    (["--run-dir", "model/config.json/a/b"], ["--run-dir model/config.json/a/b: "]),
    (["--run-dir", "long" * 75], ["--run-dir", "name too long"]),
    (["--run-dir", "model"], ["--run-dir model: not empty"]),
])
def test_bad_input_is_one_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    if "--model" not in arguments:
        monkeypatch.setattr(train, "check_model", lambda *_: None)
    world = ["--model", "model", "--competitions", "competitions", "--heldout", ""]
    assert train.main(["--preset", "tiny", *world, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert sorted(tmp_path.rglob("*")) == files  # no run directory is left, no lock


def test_an_error_before_the_ranks_part_is_told_once_and_a_rank_s_own_by_itself(
        capsys, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("no disk on this node")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(train, "check_model", lambda *_: None)
    monkeypatch.setenv("RANK", "1")
    write_world(tmp_path)
    world = ["--preset", "tiny", "--model", "model", "--competitions", "competitions"]
    assert train.main([*world, "--heldout", "nowhere"]) == 2
    assert capsys.readouterr().err == ""  # rank 0 finds the same
    assert train.main([*world, "--heldout", ""]) == 2
    assert capsys.readouterr().err == "train.py: no disk on this node\n"


def test_every_number_has_bounds():
    """Each numeric flag is in the table once; NaN, infinity, and what is below are refused."""
    names = " ".join(row[2] for row in train.BOUNDS).split()
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(Config)
                                   if f.type in (int, float))
    good = make_config(learner_ranks=1)
    train.validate(dataclasses.replace(good), world_size=1)
    for name in names:
        flag, wrong = "--" + name.replace("_", "-") + " ", [-1, 10**400]
        if Config.__annotations__[name] is float:
            wrong += [float("nan"), float("inf")]
        if name not in train.BOUNDS[2][2] and name != "learner_ranks":  # of which 0 means: half
            wrong += [0]
        for value in wrong:
            with pytest.raises(UserError, match=flag):
                train.validate(dataclasses.replace(good, **{name: value}), world_size=1)
    with pytest.raises(UserError, match="--best-of 9 of the .* responses .* raise --responses"):
        train.validate(dataclasses.replace(good, best_of=9), world_size=1)
    with pytest.raises(UserError, match="--crossover needs --children 2"):
        train.validate(dataclasses.replace(good, crossover=True, children=1), world_size=1)


def test_learner_ranks_must_leave_one_that_rolls_out():
    with pytest.raises(UserError, match="--learner-ranks 2"):
        train.validate(make_config(learner_ranks=2), world_size=2)


def test_an_engine_stays_on_one_node():
    config = make_config(learner_ranks=6, tensor_parallel=3)
    with pytest.raises(UserError, match="--tensor-parallel 3: the engine of rank 6 would span"):
        train.validate(config, world_size=24, node_size=8)
    train.validate(config, world_size=24)
    train.validate(make_config(learner_ranks=6, tensor_parallel=2), world_size=24, node_size=8)


def test_a_slow_start_is_no_collective_operation():
    """The second rank comes later than --collective-timeout allows."""
    program = ("import sys, time, train; time.sleep(float(sys.argv[1])); "
               "import torch.distributed as dist; "
               "train.join_world(train.Config(learner_ranks=1, collective_timeout=2.0)); "
               "dist.barrier()")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [subprocess.Popen(
        [sys.executable, "-c", program, delay], cwd=Path(train.__file__).parent, text=True,
        stderr=subprocess.PIPE, env=os.environ | {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for rank, delay in (("0", "0"), ("1", "6"))]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors


def test_help_is_no_crash(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0 and "Traceback" not in capsys.readouterr().err


def test_a_fresh_clone_is_told_to_make_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--preset", "tiny"]) == 2
    assert "make data" in capsys.readouterr().err


def test_the_hint_to_resume_is_only_given_once_a_run_has_begun(tmp_path):
    config = make_config(run_dir=str(tmp_path))
    assert "--resume" not in train.how_to_go_on(config)
    train.prepare_run_dir(config, False, ([], []))
    assert f"--resume {tmp_path}" in train.how_to_go_on(config)


@pytest.mark.parametrize("text, words", [
    ('{"steps": "abc"}', "steps: 'abc' is no int"), ('{"steps": null}', "steps: None is no int"),
    ('{"steps": 2.5}', "steps: 2.5"), ('{"steps": true}', "steps: True"),
    ('{"model": [1]}', "model"), ('{"buffer": "no"}', "buffer"), ('{"timeout": "1"}', "timeout"),
    ('{"loss": "ppo"}', "loss: 'ppo' is none of grpo"), ('{"stepz": 1}', "stepz"),
    ("[]", "mapping"), ("{", "delimiter|property name"), (None, "directory")])
def test_a_damaged_config_of_a_run_is_refused(text, words, tmp_path):
    path = tmp_path / "config.json"
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=f"--resume .*config.json cannot be read .*({words})"):
        parse_config(["--resume", str(tmp_path)])


def test_what_a_resumed_run_must_keep(tmp_path, monkeypatch):
    """Its directory, what its groups were made with, and eta at least."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(
        '{"groups": 4, "responses": 6, "max_staleness": 2, "stale": "drop", "timeout": 7}')
    resume = ["--resume", "run"]
    for flags in (["--groups", "3"], ["--responses", "5"], ["--stale", "wait"],
                  ["--max-staleness", "1"], ["--run-dir", "other"], ["--no-buffer"],
                  ["--preset", "small"]):
        with pytest.raises(UserError, match=" ".join(flags)):
            parse_config(resume + flags)
    config, _ = parse_config(resume + ["--groups", "4", "--max-staleness", "3", "--steps", "9",
                                       "--run-dir", str(tmp_path / "run/../run")])
    assert (config.groups, config.max_staleness, config.steps, config.timeout) == (4, 3, 9, 7)


def test_ctrl_c_while_a_checkpoint_is_read_blames_no_checkpoint(tmp_path):
    train.INTERRUPTED.set()
    try:
        with pytest.raises(OSError, match="CheckpointException"):
            with train.reading(tmp_path, "checkpoint step_4"):
                raise OSError("CheckpointException ranks:dict_keys([0]) KeyboardInterrupt")
    finally:
        train.INTERRUPTED.clear()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_within_a_finalizer_ends_the_run_at_its_next_stage():
    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run = object.__new__(train.Run)
    run.begin("waits for a batch")
    train.interrupt_on_signals()
    try:
        Finalized()  # the KeyboardInterrupt is printed and ignored
        with pytest.raises(KeyboardInterrupt):
            run.begin("waits for a batch")
    finally:
        train.INTERRUPTED.clear()
        for number, handler in kept.items():
            signal.signal(number, handler)


def play_role(monkeypatch, learner, **place):
    """train.train of one process among others that are not there."""
    class Queues:
        def get(self):
            return None  # the run is over

    monkeypatch.setattr(train, "join_world", lambda _: train.Place(
        group=None, queues=None, address=("", 0), key=b"", **place))
    monkeypatch.setattr(train, "local_model", lambda model: model)
    monkeypatch.setattr(train, "connect_queues", lambda *_: lambda _: Queues())
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    monkeypatch.setitem(sys.modules, "learner", SimpleNamespace(
        Learner=learner, LearnerConfig=SimpleNamespace, UnsupportedModel=NotImplementedError))


def test_the_second_gpu_of_an_engine_is_left_to_it(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    play_role(monkeypatch, None, world=4, rank=3, local_rank=3)
    train.train(make_config(learner_ranks=2, tensor_parallel=2), resume=False)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_a_model_that_only_its_forward_pass_refuses_is_one_line(monkeypatch):
    def lead(*_):
        raise NotImplementedError("Attention needs sinks")

    play_role(monkeypatch, lambda *_, **__: None, world=1, rank=0, local_rank=0)
    monkeypatch.setattr(train, "lead", lead)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    with pytest.raises(UserError, match="--model data/policy: Attention needs sinks"):
        train.train(make_config(learner_ranks=1), resume=False)


def test_a_refused_resume_takes_the_rollout_process_along(tmp_path, monkeypatch):
    """Left alone, it would find no queues and say so with a traceback."""
    said = []

    class Process:
        def __init__(self, **_):
            pass

        def __getattr__(self, name):
            return lambda: said.append(name) or True

    def refuse(*_):
        raise UserError("--resume: damaged")

    monkeypatch.setattr(train.multiprocessing, "get_context", lambda _: SimpleNamespace(
        Process=Process))
    monkeypatch.setattr(train, "start_guard", lambda _: None)
    monkeypatch.setattr(train, "scratch_folder", lambda *_: tmp_path)
    monkeypatch.setattr(train, "Run", refuse)
    place = SimpleNamespace(world=1, address=None, key=b"", queues=SimpleNamespace(queues={}))
    with pytest.raises(UserError, match="damaged"):
        train.lead(make_config(), place, SimpleNamespace(published_bytes=0), resume=True)
    assert said == ["start", "is_alive", "terminate", "join"]


def test_a_model_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.check_policy("owner/name", 1024)  # a name of the hub
    with pytest.raises(UserError, match="no config.json"):
        train.check_policy(f"{tmp_path}/nowhere", 1024)
    with pytest.raises(UserError, match="make data"):
        train.check_policy(train.Config.model, 1024)


# -- the self-check of a publication


class PublishedLearner:
    version = 3

    def publish(self, directory):
        directory.mkdir()

    def score(self, tokens, temperature):
        assert temperature == 1.0
        return np.full(len(tokens) - 1, -2.0, np.float32)


def publish(answers, tmp_path):
    """Run.publish with two engines that answer the probe with these log-probabilities."""
    queues = defaultdict(queue.Queue)
    run = SimpleNamespace(learner=PublishedLearner(), scratch=tmp_path, probe=[1, 2, 3],
                          rollout_ranks=[1, 2], config=make_config(), queues=queues.__getitem__,
                          begin=lambda stage: None)
    run.everyone = lambda method, *arguments: getattr(run.learner, method)(*arguments)
    for answer in answers:
        queues["acks"].put(answer)
    gap = train.Run.publish(run)
    assert [queues[f"weights/{rank}"].get()[1] for rank in (1, 2)] == [3, 3]
    return gap


def test_a_publication_reports_the_largest_gap_and_leaves_no_files(tmp_path):
    gap = publish([np.array([-2.0, -2.0]), np.array([-2.0, -2.01])], tmp_path)
    assert gap == pytest.approx(0.005)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [-2.5, float("nan")])
def test_an_engine_with_other_weights_stops_training(wrong, tmp_path):
    with pytest.raises(UserError, match="engine and learner disagree"):
        publish([np.array([-2.0, wrong]), np.array([-2.0, -2.0])], tmp_path)


@pytest.mark.parametrize("follows", [True, False])
def test_an_engine_that_ignores_updates_is_caught_before_the_first_step(follows, tmp_path):
    """Its weights are right at first, and at a small learning rate nearly right for long."""
    class Halved(PublishedLearner):
        weights = published = 1.0

        def scale(self, factor):
            self.weights *= factor

        def publish(self, directory):
            directory.mkdir()
            self.published = self.weights if follows else 1.0
            acks.put(np.full(2, -2.0 * self.published, np.float32))

        def score(self, tokens, temperature):
            return np.full(len(tokens) - 1, -2.0 * self.weights, np.float32)

    acks = queue.Queue()
    run = SimpleNamespace(learner=Halved(), scratch=tmp_path, probe=[1, 2, 3], rollout_ranks=[1],
                          config=make_config(), begin=lambda stage: None,
                          queues=lambda name: acks if name == "acks" else queue.Queue())
    run.everyone = lambda method, *arguments: getattr(run.learner, method)(*arguments)
    run.publish = lambda suffix: train.Run.publish(run, suffix)
    if follows:
        train.Run.rehearse(run)
        assert run.learner.weights == 1.0
    else:
        with pytest.raises(UserError, match="engine and learner disagree"):
            train.Run.rehearse(run)


def test_scratch_folders_are_in_shared_memory_where_that_is_large_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix, dir: dir or "temporary")
    monkeypatch.setattr("os.access", lambda *_: True)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=64e6))
    assert str(train.scratch_folder("x", 60e6)) == "/dev/shm"
    assert str(train.scratch_folder("x", 15e9)) == "temporary"


def test_a_model_of_the_hub_is_fetched_once_and_a_directory_is_itself(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: f"cache/{name}")
    assert train.local_model("Qwen/Qwen3-8B") == "cache/Qwen/Qwen3-8B"
    assert train.local_model(str(tmp_path)) == str(tmp_path)

    def missing(name, **_):
        raise OSError(f"404 Client Error.\n\nRepository Not Found: {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(UserError, match="--model Qwen/Qwen3-9B: 404 .* Not Found"):
        train.local_model("Qwen/Qwen3-9B")


def test_a_dead_rollout_rank_ends_the_wait_for_its_answer(tmp_path):
    with pytest.raises(train.WorkerDied, match="exit code -9"):
        publish([train.WorkerDied("exit code -9")], tmp_path)


# -- queues


def test_queues_reach_other_processes_and_need_the_key():
    server = train.QueueServer()
    connect = train.connect_queues(server.address, server.key)
    connect("tasks").put(np.arange(3))
    assert server("tasks").get().tolist() == [0, 1, 2]
    got = []
    waiting = threading.Thread(target=lambda: got.append(connect("results").get()))
    waiting.start()
    server("results").put("late")
    waiting.join(10)
    assert got == ["late"]
    from multiprocessing import AuthenticationError

    with pytest.raises(AuthenticationError):
        train.connect_queues(server.address, b"another key")


def test_all_who_ask_for_a_name_at_once_get_the_same_queue(monkeypatch):
    class Slow(queue.Queue):
        def __init__(self):
            time.sleep(0.1)
            super().__init__()

    monkeypatch.setattr(train, "queue", SimpleNamespace(Queue=Slow))
    server = train.QueueServer()
    with ThreadPoolExecutor(4) as pool:
        assert len({id(found) for found in pool.map(server, ["new"] * 4)}) == 1


def test_the_guard_of_a_process_that_has_ended_already_cleans_up(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = tmp_path / "scratch"
    folder.mkdir()
    guard = subprocess.run(guard_command(ended.pid, 0, [folder]), capture_output=True, text=True)
    assert (guard.returncode, guard.stderr) == (0, "") and not folder.exists()


def test_ranks_of_another_node_copy_a_version_once_and_drop_the_one_before(tmp_path, monkeypatch):
    class Counting(train.PublishedFiles):
        reads = 0

        def read(self, *arguments):
            Counting.reads += 1
            return super().read(*arguments)

    guarded = []
    monkeypatch.setattr(train, "CHUNK", 1000)
    monkeypatch.setattr(train, "start_guard", guarded.append)
    here, there = tmp_path / "here" / "weights-1", tmp_path / "there" / "weights-1"
    there.parent.mkdir()
    server = train.QueueServer()
    server.queues["published"] = Counting(here)
    connect = train.connect_queues(server.address, server.key)
    files = {"model.safetensors": os.urandom(3500), "config.json": b"{}", "empty": b""}
    for version in ("v1", "v2"):
        (here / version).mkdir(parents=True)
        for name, content in files.items():
            (here / version / name).write_bytes(content)
        train.fetch_weights(here / version, connect)  # on rank 0's own node: nothing to do
        ranks = [threading.Thread(target=train.fetch_weights, args=(there / version, connect))
                 for _ in range(4)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(30)
        assert {p.name: p.read_bytes() for p in (there / version).iterdir()} == files
    assert Counting.reads == 2 * (4 + 1)  # chunks of the two files that are not empty
    assert sorted(p.name for p in there.iterdir()) == ["lock", "v2"] and guarded == [[there]]
    assert there.stat().st_mode & 0o077 == 0


# -- --dry-run


@pytest.mark.parametrize("preset, parts", [
    ("small", ["8 ranks, 8 a node: 4 learner ranks, 4 engines of tensor-parallel size 1",
               "8.19 billion", "15.26 GiB, gathered"]),
    ("ace30b", ["32 ranks, 8 a node: 16 learner ranks, 8 engines of tensor-parallel size 2",
                "30.53 billion", "nodes 2, 3: 113.7"]),
])
def test_a_dry_run_plans_for_the_world_of_its_preset(preset, parts, capsys, monkeypatch, tmp_path):
    """Without torchrun, GPUs, network or data; nothing is written."""
    monkeypatch.chdir(train.Path(train.__file__).parent)
    run_dir = tmp_path / "run"
    assert train.main(["--preset", preset, "--run-dir", str(run_dir), "--dry-run"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("  ")]
    sizes = {row[0]: float(row[1]) for row in rows if len(row) > 2 and row[2] == "GiB"}
    for name in ("parameters", "gradients", "optimizer", "activations", "weights", "kv_cache"):
        assert sizes[name] > 0
    assert sizes["optimizer"] == pytest.approx(2 * sizes["gradients"], abs=0.02)
    for part in parts:
        assert part in out
    assert not run_dir.exists()
    if preset == "ace30b":  # half of the learner ranks: twice the states, which do not fit
        assert train.main(["--preset", preset, "--learner-ranks", "6", "--dry-run",
                           "--tensor-parallel", "1"]) == 2
        error = capsys.readouterr().err.strip()
        assert "a learner rank needs" in error and "more learner ranks" in error
        assert len(error.splitlines()) == 1


def test_a_dry_run_refuses_a_model_that_the_learner_does_not_compute(tmp_path, capsys,
                                                                     monkeypatch):
    from transformers import AutoConfig

    monkeypatch.setattr(train, "check_model", lambda *_: None)
    AutoConfig.for_model("gemma2", num_hidden_layers=2, hidden_size=8, vocab_size=9,
                         attn_logit_softcapping=50.0).save_pretrained(tmp_path)
    assert train.main(["--model", str(tmp_path), "--dry-run", "--run-dir", "unused"]) == 2
    error = capsys.readouterr().err.strip()
    assert "gemma2 sets attn_logit_softcapping" in error and len(error.splitlines()) == 1


def test_a_dry_run_refuses_an_engine_without_room_for_one_sequence():
    from transformers import AutoConfig

    from rollout import EngineConfig, engine_plan

    model = AutoConfig.for_model(**train.SHAPES["Qwen/Qwen3-8B"])
    config = EngineConfig(max_model_len=24576, dtype="bfloat16", kv_cache_gib=None)
    plan = engine_plan(model, config, 8_190_735_360, 79 << 30)
    # 36 layers x 8 key-value heads x 128 numbers x (key, value) x 2 bytes
    assert plan["cache_tokens"] == plan["kv_cache"] // (36 * 8 * 128 * 2 * 2)
    assert plan["total"] <= 0.85 * (79 << 30)
    with pytest.raises(ValueError, match="needs 18.9 GiB .* has 17.0: use a larger tensor_par"):
        engine_plan(model, config, 8_190_735_360, 20 << 30)
    with pytest.raises(ValueError, match="smaller max_model_len or kv_cache_gib"):
        engine_plan(model, dataclasses.replace(config, kv_cache_gib=90.0), 8_190_735_360, 79 << 30)


def test_a_run_of_another_version_is_not_resumed(tmp_path):
    saved = dataclasses.asdict(Config())
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert train.load_config(tmp_path) == saved | {"run_dir": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(saved | {"gap_penalty": 0.5}))
    with pytest.raises(UserError, match="another version .* had gap_penalty: start a new run"):
        train.load_config(tmp_path)
