"""What goes wrong in long runs, with a fake engine: python -m pytest tests/test_faults.py

Each fault has one defined behaviour: retry, leave out with a count, or stop with a clear error; never
a hang. Most tests run rank 0 and a rollout rank as threads that talk through the real queue server;
those at the end start processes. Faults of one part alone are tested with it: a sandbox that is
killed (test_sandbox.py), a gradient that is not finite, a damaged checkpoint (test_learner.py).
"""

import asyncio
import base64
import json
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from chaos import check_run_dir
from fakes import (FakeEngine, FakeLearner, FakeSandbox, FakeTokenizer, completion, fake_modules,
                   write_world)
from test_end_to_end import Started, rows, torchrun, wait_until

import rollout
import train
from buffer import Task
from rollout import EngineDead, PromptBudget, Prompter, Request, RolloutConfig
from sandbox import CompetitionError, Execution, Sandbox, load_competitions
from train import Config, UserError, WorkerDied

STEPS = 6
SETTINGS = dict(groups=3, responses=4, steps=STEPS, max_staleness=1, checkpoint_every=2,
                eval_drafts=2, rollout_threads=4, sandbox_slots=2, watchdog=0.0, heldout="",
                max_model_len=4000, max_response_tokens=100, token_budget=4000)


class World:
    """A directory with competitions, a model and a run, and ways to run it."""

    def __init__(self, folder):
        write_world(folder)
        self.folder, self.dir, self.run = folder, folder / "run", None

    def config(self, **changes) -> Config:
        where = dict(model=str(self.folder / "model"), run_dir=str(self.dir),
                     competitions=str(self.folder / "competitions"))
        return Config(**(SETTINGS | where | changes))

    def start(self, resume=False, connection=lambda address: address, engine=None, sandbox=None,
              learner=None, **changes) -> train.Run:
        """A run from its start to its end. `connection` may put something between the rollout
        rank and the address of the queue server; the other arguments replace fakes or settings."""
        config = self.config(**changes)
        with train.prepare_run_dir(config, resume, ([], [])):
            return self.play(config, resume, connection, engine, sandbox, learner)

    def play(self, config, resume, connection=lambda address: address, engine=None, sandbox=None,
             learner=None) -> train.Run:
        """train.train, with threads for its processes."""
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        self.queues = queues = train.QueueServer()
        self.run = run = train.Run(config, learner or FakeLearner(), queues, [1], scratch, resume)
        connect = train.connect_queues(connection(queues.address), queues.key)
        prompter = Prompter(FakeTokenizer(), load_competitions(config.competitions),
                            PromptBudget())
        doing = {"now": lambda: "starts"}

        def rollout_rank():
            error = train.serve_rollouts(config, 1, connect, engine or FakeEngine(),
                                         sandbox or FakeSandbox(), prompter, doing)
            if error is not None:  # its process would end, and rank 0 would see that
                run.fail(WorkerDied(f"the rollout rank: {type(error).__name__}: {error}"))

        threading.Thread(target=rollout_rank, daemon=True).start()
        threading.Thread(target=train.answer_watchdog, daemon=True,
                         args=(1, connect("watchdog/1"), doing)).start()
        try:
            run.run()
        finally:  # after a fault the thread would go on, as no killed process does
            queues("results").put(None)
            run.curriculum.thread.join()
        return run

    def main(self, prepare=lambda: None, **parts) -> int:
        """The same, started by train.main; `prepare` is called once the run directory exists."""
        def play(config, resume):
            prepare()
            self.play(config, resume, **parts)

        flags = [text for name, value in vars(self.config()).items() if not isinstance(value, bool)
                 for text in ("--" + name.replace("_", "-"), str(value))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train", play)
            patch.setattr(train, "check_model", lambda *_: None)
            return train.main(flags)

    def rows(self, name: str) -> list[dict]:
        return rows(self.dir / name)

    def groups(self) -> list[dict]:
        return [g for g in self.rows("groups.jsonl") if "traces" in g]

    def traces(self) -> list[dict]:
        return [t for g in self.groups() for t in g["traces"]]

    def assert_good(self, steps=STEPS, epochs=1) -> list[dict]:
        """Every step and group once, nothing missing. Returns the rows of metrics.jsonl."""
        assert check_run_dir(self.dir) == []
        assert [m["step"] for m in self.rows("metrics.jsonl")] == list(range(1, steps + 1))
        assert {g["epoch"] for g in self.groups()} <= set(range(epochs))
        return self.rows("metrics.jsonl")


@pytest.fixture
def world(tmp_path, monkeypatch):
    for name, module in fake_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return World(tmp_path)


def test_without_a_fault(world):
    world.start()
    assert world.assert_good()[-1]["policy_version"] > 0
    assert world.dir.stat().st_mode & 0o777 == 0o700


def test_a_competition_without_description_has_a_probe_all_the_same(world):
    for path in world.folder.glob("competitions/*/description.md"):
        path.write_text("")
    assert len(world.start(steps=2).probe) >= 2


# -- parts that die: the run stops with an error that says which, and a resume loses nothing


def test_the_engine_dies(world):
    class Dying(FakeEngine):
        calls_left = 20

        def generate(self, *arguments):
            self.calls_left -= 1
            if self.calls_left < 0:
                raise EngineDead("the vLLM engine has died")
            return super().generate(*arguments)

    with pytest.raises(WorkerDied, match="the vLLM engine has died"):
        world.start(engine=Dying())
    finished = world.groups()
    assert 0 < len(finished) < 18
    world.start(resume=True)
    world.assert_good(epochs=2)
    assert world.groups()[:len(finished)] == finished


def test_calls_end_when_the_process_of_the_engine_was_killed(monkeypatch):
    """vLLM lets them wait for ever, reload_weights among them."""
    class EngineDeadError(Exception):
        pass

    monkeypatch.setitem(sys.modules, "vllm.v1.engine.exceptions",
                        SimpleNamespace(EngineDeadError=EngineDeadError))

    class Killed:
        async def collective_rpc(self, *_, **__):
            await asyncio.Event().wait()

        async def check_health(self):
            raise EngineDeadError

    engine = rollout.Engine.__new__(rollout.Engine)
    engine.llm, engine.loop = Killed(), asyncio.new_event_loop()
    threading.Thread(target=engine.loop.run_forever, daemon=True).start()
    with pytest.raises(EngineDead):
        engine.load("anywhere", 1)
    engine.loop.call_soon_threadsafe(engine.loop.stop)


def test_the_sandbox_refuses_to_go_on(world):
    """Not being executed is no script's fault: it must not become a reward of 0."""
    class Refusing(FakeSandbox):
        runs = 0

        def run(self, competition, code, timeout=None):
            self.runs += 1
            if self.runs > 80:
                return Execution("refused", reason="the fork server does not start")
            return super().run(competition, code)

    with pytest.raises(WorkerDied, match="SandboxRefused.*the fork server does not start"):
        world.start(sandbox=Refusing())
    assert world.groups() and all(t["status"] != "refused" for t in world.traces())


class Wire:
    """A TCP forwarder that can be cut."""

    def __init__(self, address):
        self.target, self.ends = address, []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = self.listener.getsockname()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            near, far = self.listener.accept()[0], socket.create_connection(self.target)
            self.ends += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self.forward, args=pair, daemon=True).start()

    def forward(self, source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)

    def cut(self):
        for end in self.ends:
            end.shutdown(socket.SHUT_RDWR)


def test_the_connection_to_the_queues_drops(world):
    wires = []

    def connection(address):
        wires.append(Wire(address))
        return wires[0].address

    class Cutting(FakeEngine):
        def load(self, directory, version):
            super().load(directory, version)
            if version == 3:
                wires[0].cut()

    with pytest.raises(WorkerDied, match="EOFError|Connection|BrokenPipe"):
        world.start(engine=Cutting(), connection=connection)
    world.start(resume=True)
    world.assert_good(epochs=2)


# -- a full disk: the run stops with one line, and goes on when there is room again


@contextmanager
def files_of_at_most(size):
    """A write beyond `size` bytes fails as it does on a full disk (with EFBIG)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def check_full_disk(world, status, capsys):
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and last.startswith("train.py: [Errno") and "GB are free" in last
    assert f"--resume {world.dir}" in last
    world.start(resume=True)
    world.assert_good(epochs=2)


@pytest.mark.parametrize("name", ["traces.jsonl", "metrics.jsonl"])
def test_the_disk_is_full(world, capsys, name):
    status = world.main(prepare=lambda: (world.dir / name).symlink_to("/dev/full"))
    (world.dir / name).unlink()
    check_full_disk(world, status, capsys)


def test_the_disk_is_full_when_a_group_is_logged(world, capsys):
    with files_of_at_most(20_000):
        status = world.main()
    assert world.groups()
    check_full_disk(world, status, capsys)


def test_the_disk_is_full_when_a_checkpoint_is_written(world, capsys):
    class Large(FakeLearner):
        def save(self, directory):
            super().save(directory)
            if self.version > 3:
                with open(f"{directory}/weights", "wb") as file:
                    file.write(bytes(1 << 20))

    with files_of_at_most(1 << 19):
        status = world.main(learner=Large())
    complete = {p.parent.name for p in world.dir.glob("checkpoints/*/DONE")}
    assert complete == {"step_2"} and (world.dir / "checkpoints/step_4").exists()
    check_full_disk(world, status, capsys)
    assert not (world.dir / "checkpoints/step_4/learner/weights").exists()


# -- resume


def test_resume_before_the_first_checkpoint(world):
    """What was rolled out feeds the curriculum, and training begins at the beginning."""
    class Dying(FakeLearner):
        def step(self, sequences):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.start(learner=Dying())
    finished = world.groups()
    assert len(finished) >= 3 and not list(world.dir.glob("checkpoints/*"))
    evaluated = world.rows("eval.jsonl")
    run = world.start(resume=True)
    world.assert_good(epochs=2)
    assert world.groups()[:len(finished)] == finished
    assert world.rows("eval.jsonl")[:len(evaluated)] == evaluated  # not taken again
    assert run.curriculum.epoch == 1


def kill_after(steps, world=None):
    """A learner whose process is killed within the step after `steps`, with `world` only when all
    groups that may have been handed out by then are there."""
    class Killed(FakeLearner):
        def step(self, sequences):
            if self.version == steps:
                handed = (steps + 1 + SETTINGS["max_staleness"]) * SETTINGS["groups"]
                wait_until(lambda: not world or len(world.groups()) == handed, 60, "all groups")
                raise KeyboardInterrupt
            return super().step(sequences)

    return Killed()


def test_groups_after_the_checkpoint_teach_the_curriculum_but_not_the_policy(world):
    with pytest.raises(KeyboardInterrupt):
        world.start(learner=kill_after(3, world))  # the checkpoint is that of step 2
    saved = json.loads((world.dir / "checkpoints/step_2/curriculum.json").read_text())
    later = {t["id"] for g in world.groups()[saved["buffer"]["sequence"]:] for t in g["traces"]}
    assert later
    ready = [t["id"] for g in saved["ready"] for t in g["traces"]]
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        make_batch = train.make_batch
        patch.setattr(train, "make_batch", lambda results, config: (
            batches.append([t.id for r in results for t in r.group.traces])
            or make_batch(results, config)))
        run = world.start(resume=True)
    learnt = {name for batch in batches for name in batch}
    assert not learnt & later and set(ready) <= learnt
    assert len(batches) == STEPS - 2
    assert run.curriculum.buffer.sequence == len(world.rows("groups.jsonl"))
    metrics = world.assert_good(epochs=2)
    assert max(m["staleness_max"] for m in metrics) <= 1  # the bound holds after the recovery


def test_epochs_of_three_starts_are_told_apart(world):
    for resume in (False, True):  # both killed before there is a checkpoint
        with pytest.raises(KeyboardInterrupt):
            world.start(learner=kill_after(3), resume=resume, checkpoint_every=9)
    world.start(resume=True)
    world.assert_good(epochs=3)
    epochs = [g["epoch"] for g in world.groups()]
    assert epochs == sorted(epochs) and set(epochs) == {0, 1, 2}


def test_torn_lines_are_mended(world):
    """A kill between two writes, or within one, leaves the last group's traces incomplete."""
    with pytest.raises(KeyboardInterrupt):
        world.start(learner=kill_after(3))
    (world.dir / "metrics.jsonl").open("a").write('{"step": 4, "policy_')
    traces = (world.dir / "traces.jsonl").read_text().splitlines()
    (world.dir / "traces.jsonl").write_text("\n".join(traces[:-2]) + "\n" + traces[-2][:50])
    world.start(resume=True)
    world.assert_good(epochs=2)
    assert [t["id"] for t in world.rows("traces.jsonl")] == [t["id"] for t in world.traces()]


def rewrite(path, change):
    """Change a JSON file, and its size in DONE where it is a checkpoint's."""
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))
    if (done := path.with_name("DONE")).exists() and done != path:
        done.write_text(json.dumps(json.loads(done.read_text()) | {path.name: path.stat().st_size}))


def append(name):
    """A line that is JSON, but no row."""
    return lambda d: open(d.parent.parent / name, "a").write("[]\n")


@pytest.mark.parametrize("damage, words", [
    (lambda d: (d / "learner/version").unlink(), ["step_6", "learner/version", "delete it"]),
    (lambda d: os.truncate(d / "curriculum.json", 100), ["step_6", "curriculum.json", "delete it"]),
    (lambda d: rewrite(d / "curriculum.json", lambda c: c.pop("epoch") and None),
     ["step_6", "epoch", "delete it"]),
    (lambda d: rewrite(d / "curriculum.json", lambda c: c["buffer"]["tasks"][0].update(x=1)),
     ["step_6", "'x'", "delete it"]),
    (lambda d: rewrite(d / "curriculum.json", lambda c: c["in_flight"].update(lost=6)),
     ["step_6", "lost", "delete it"]),
    (lambda d: rewrite(d / "curriculum.json", lambda c: c | {"handed": "9"}),
     ["step_6", "handed: '9' is no count", "delete it"]),
    (lambda d: rewrite(d / "curriculum.json", lambda c: c | {"version": -1}),
     ["step_6", "version: -1", "delete it"]),
    (lambda d: rewrite(d / "curriculum.json", lambda c: c | {"step": 5}),
     ["step_6", "step 5", "delete it"]),
    (lambda d: rewrite(d / "DONE", lambda _: [1]), ["step_6", "delete it"]),
    (lambda d: os.truncate(d.parent.parent / "groups.jsonl", 500), ["groups.jsonl", "start a new"]),
    (append("groups.jsonl"), ["groups.jsonl", "start a new"]),
    (append("traces.jsonl"), ["traces.jsonl", "start a new"]),
    (append("metrics.jsonl"), ["metrics.jsonl", "start a new"]),
    (append("eval.jsonl"), ["eval.jsonl", "start a new"]),
])
def test_a_damaged_run_is_refused_and_stays_as_it_is(world, damage, words):
    world.start(steps=6)
    damage(world.dir / "checkpoints/step_6")
    kept = {name: (world.dir / name).read_bytes() for name in ("config.json", "splits.json",
                                                               "metrics.jsonl", "eval.jsonl")}
    with pytest.raises(UserError) as error:
        world.start(resume=True, steps=8)
    assert all(word in str(error.value) for word in [f"--resume {world.dir}", *words])
    assert kept == {name: (world.dir / name).read_bytes() for name in kept}


def test_a_resume_with_other_competitions_is_refused_and_the_next_one_goes_on(world, capsys):
    world.start()
    write_world(world.folder / "other", ("dogwood", "elm", "fir"))
    with pytest.raises(UserError, match="other training competitions"):
        world.start(resume=True, steps=8, competitions=str(world.folder / "other/competitions"))
    config = train.parse_config(["--resume", str(world.dir), "--steps", "8"])[0]
    with train.prepare_run_dir(config, True, ([], [])):
        world.play(config, True)
    world.assert_good(8, epochs=2)
    assert json.loads((world.dir / "config.json").read_text())["steps"] == 8  # now it is changed
    assert json.loads((world.dir / "splits.json").read_text())["train"] == world.run.splits["train"]


def test_a_run_directory_has_one_run_at_a_time(world):
    with train.prepare_run_dir(world.config(), False, ([], [])):
        for resume in (False, True):
            with pytest.raises((UserError, CompetitionError),
                               match="another program is writing|not empty"):
                train.prepare_run_dir(world.config(), resume, ([], []))
    train.prepare_run_dir(world.config(), True, ([], [])).close()


def test_copies_and_notes_beside_the_checkpoints_stay_untouched(world):
    world.start()
    folder = world.dir / "checkpoints"
    shutil.copytree(folder / "step_4", folder / "step_4.bak")
    (folder / "step_notes").mkdir()
    world.start(resume=True, steps=10)
    assert sorted(p.name for p in folder.iterdir()) == ["step_10", "step_4.bak", "step_8",
                                                        "step_notes"]
    assert (folder / "step_4.bak/DONE").exists()


# -- policies, competitions and batches that bring nothing


class Saying(FakeEngine):
    """A policy that always says the same."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def complete(self, rng, version):
        return completion(self.text)


@pytest.mark.parametrize("text, tokens", [("I would rather not.", 19), ("\0", 1)])
def test_responses_without_code_and_all_groups_without_signal(world, capsys, text, tokens):
    """The second is a policy that emits only the stop token. Steps without signal change nothing."""
    world.start(engine=Saying(text), steps=25)
    metrics = world.assert_good(25)
    assert {m["groups_trained"] for m in metrics} == {0} and metrics[-1]["policy_version"] == 0
    assert {m["response_tokens"] for m in metrics} == {tokens}
    assert {(t["reward"], t["code"], t["reason"]) for t in world.traces()} == {
        (0.0, "", "the response has no ```python block")}
    error = capsys.readouterr().err
    assert re.findall(r"(\d+) steps in a row without anything to learn", error) == ["10", "20"]


class Grading(FakeSandbox):
    """Every script submits what the real grader of its competition then judges."""

    def run(self, competition, code, timeout=None):
        grade = competition.grade(b"id,y\n1,0\n2,1\n")
        return Execution("ok" if grade.valid else "invalid", valid=grade.valid, reason=grade.reason,
                         human_rank=grade.human_rank)


@pytest.mark.parametrize("body", ["raise ValueError('no such column')", "raise SystemExit(1)"])
def test_a_competition_whose_grader_always_raises(world, capsys, body):
    grader = world.folder / "competitions/birch/grade.py"
    grader.write_text(f"def grade(submission, answers):\n    {body}\n")
    world.start(sandbox=Grading(), steps=20, responses=10)
    world.assert_good(20)
    own = [t for t in world.traces() if t["competition_id"] == "birch"]
    assert {t["status"] for t in own} == {"invalid"}
    assert {t["reward"] for t in own} == {0.05, 0.0}  # 0: it repeats its parent's script
    assert any(t["valid"] for t in world.traces())
    (warning,) = re.findall("warning: (.*) has refused (.*) submissions", capsys.readouterr().err)
    assert warning[0] == "birch" and int(warning[1]) >= 100


def test_nan_in_a_batch(world, capsys):
    class Poisoned(FakeEngine):
        count = 0

        def complete(self, rng, version):
            self.count += 1
            found = super().complete(rng, version)
            if self.count in range(40, 60):
                found.logprobs[0] = np.nan
            return found

    world.start(engine=Poisoned(), steps=10)
    metrics = world.assert_good(10)
    text = (world.dir / "metrics.jsonl").read_text()
    assert '"skipped": true' in text and '"loss": null' in text and "NaN" not in text
    assert "loss or gradient is not finite" in capsys.readouterr().err
    for before, after in zip(metrics, metrics[1:]):
        assert after["policy_version"] == before["policy_version"] + (not before["skipped"])
    assert not metrics[-1]["skipped"]  # the next batches are learnt from


# -- prompts that do not fit


def test_competitions_whose_draft_does_not_fit_are_left_out_and_counted(world, capsys):
    (world.folder / "competitions/birch/description.md").write_text("long " * 1000)
    run = world.start(description_chars=5000, steps=20)
    assert run.splits["train"] == ["alder", "cedar"]
    metrics = world.assert_good(20)
    assert metrics[-1]["skipped_prompts"] == 0
    assert "birch" not in {g["task"]["competition_id"] for g in world.groups()}
    error = capsys.readouterr().err
    assert "1 of 3 training competitions" in error and "birch" in error
    assert "--max-model-len" in error


def test_no_draft_fits(world, capsys):
    with pytest.raises(UserError) as error:
        world.start(max_model_len=300)
    text = str(error.value)
    assert "\n" not in text and re.search("alder|birch|cedar", text)
    assert "--max-model-len" in text and "--description-chars" in text


def test_children_that_do_not_fit_leave_and_are_counted(world):
    """Their parent's script makes them too long; nothing is cut silently."""
    class Long(FakeEngine):
        max_model_len = 2000

        def complete(self, rng, version):
            found = super().complete(rng, version)
            if rng.random() < 0.6:
                found = completion("```python\n" + "#" * 2000 + "\nquality = 0.5\n```")
            return found

    run = world.start(engine=Long(), steps=30)
    metrics = world.assert_good(30)
    assert metrics[-1]["skipped_prompts"] > 0
    assert max(t["depth"] for t in world.traces()) > 0  # those that fit were drawn
    removed = [g for g in world.rows("groups.jsonl") if "removed" in g]
    assert len(removed) == run.curriculum.skipped


# -- slowness and the watchdog


def test_an_execution_that_does_not_end_is_named_by_the_watchdog(world, capsys):
    """The learner waits for it (`--stale wait`), and everybody says what they are waiting for.
    A real sandbox ends it at its time limit."""
    free, said = threading.Event(), [""]

    class Hanging(FakeSandbox):
        def run(self, competition, code, timeout=None):
            if competition.id == "birch":
                assert free.wait(60), said[0][-1500:]
            return super().run(competition, code)

    wanted = ("no group has arrived for", "rank 0: waits for a batch, for",
              r"of the 3 groups of a batch are there, \d+ tasks are in flight",
              r"rollout rank 1: .*\d+ threads executing, the longest for .* s \(\w+/draft\)")

    def look():
        while not all(re.search(pattern, said[0]) for pattern in wanted):
            time.sleep(0.05)
            said[0] += capsys.readouterr().err
        free.set()

    threading.Thread(target=look, daemon=True).start()
    world.start(sandbox=Hanging(), watchdog=0.3, eval_drafts=0)
    world.assert_good()
    assert free.is_set()


def test_the_watchdog_speaks_once_a_period_and_only_without_groups(capsys, monkeypatch):
    now, lines = 0.0, []
    curriculum = SimpleNamespace(arrived=0.0, describe=lambda: "curriculum: idle")

    def wait(seconds):
        nonlocal now
        now += seconds
        if now < 100:
            curriculum.arrived = now
            assert not capsys.readouterr().err
        return now > 135

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now))
    train.Run.watchdog(SimpleNamespace(
        config=SimpleNamespace(watchdog=10.0), curriculum=curriculum, stage=("learns", 0.0),
        over=SimpleNamespace(wait=wait), followers=[], rollout_ranks=[1],
        queues=lambda name: SimpleNamespace(put=lambda question: lines.append(name))))
    assert capsys.readouterr().err.count("no group has arrived for") == 3
    assert lines == ["watchdog/1"] * 3


# -- access


def knock(address, path) -> list[socket.socket]:
    """What peers without the key may send. The pickle among it creates `path` when it is loaded."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(path),)

    bomb, peers = pickle.dumps(Bomb()), []
    for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), b"\xff" * 64, b"",
                 struct.pack("!i", len(bomb)) + bomb,  # framed as multiprocessing frames it
                 struct.pack("!i", 100) + b"half a message",
                 struct.pack("!i", 1 << 30)):
        peers.append(socket.create_connection(address))
        peers[-1].sendall(data)
    return peers


def test_wrong_keys_and_garbage_are_refused_and_training_goes_on(world, capsys):
    from multiprocessing import AuthenticationError

    path, peers = world.folder / "unpickled", []

    class Attacked(FakeEngine):
        def load(self, directory, version):
            super().load(directory, version)
            address = world.queues.address
            assert address[0] == "127.0.0.1"
            peers.extend(knock(address, path))
            with pytest.raises(AuthenticationError):
                train.connect_queues(address, b"guess")

    world.start(engine=Attacked())
    world.assert_good()
    assert len(peers) == 7 * (STEPS + 2) and not path.exists()
    said = [""]  # by threads of the server

    def refused():
        said[0] += capsys.readouterr().err
        # A peer that says half a message, or nothing, is still waited for.
        return said[0].count("refused a connection that does not know the key") >= 4 * STEPS

    wait_until(refused, 30, "the refusals")
    for peer in peers:
        peer.close()


def test_no_secret_of_the_environment_reaches_a_script_a_trace_or_a_prompt(world, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    curious = ("import os\nfor name in ('self', str(os.getppid())):\n    try:\n"
               "        print(open(f'/proc/{name}/environ').read())\n    except OSError as e:\n"
               "        print(e)\nprint(os.environ)\nraise ValueError(dict(os.environ))")
    prompter = Prompter(FakeTokenizer(), load_competitions(world.folder / "competitions"),
                        PromptBudget())
    task = Task.root("alder")
    with Sandbox(slots=1, preload=("numpy",)) as sandbox, ThreadPoolExecutor(1) as pool:
        assert not sandbox.problem
        result = rollout.rollout(Request(task, 2), Saying(f"```python\n{curious}\n```"), sandbox,
                                 prompter, RolloutConfig(timeout=20.0), pool)
    trace = result.group.traces[0]
    assert "ValueError" in trace.output  # it did run, and its output is kept
    prompt = prompter.tokenizer.decode(prompter(task.child(trace)))
    assert "ValueError" in prompt
    for text in (prompt, json.dumps(trace.to_json())):
        assert "canary" not in text


# -- processes


def command(world, **changes) -> list[str]:
    """train.py with the fakes of tests/fakes.py."""
    values = vars(world.config()) | dict(learner_threads=1) | changes
    return [str(FAKES)] + [text for name, value in values.items() if not isinstance(value, bool)
                           for text in ("--" + name.replace("_", "-"), str(value))]


def launch(world, command, **fake) -> Started:
    environment = {"FAKE": json.dumps(fake), "PYTHONPATH": str(FAKES.parent.parent)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return Started(command, world.folder / "log")


def test_the_rollout_process_dies(world):
    run = launch(world, [sys.executable] + command(world), die=["rollout", 3])
    assert run.process.wait(300) == 1
    last = run.log.read_text().splitlines()[-1]
    assert "the rollout process has ended with exit code -9" in last
    assert f"--resume {world.dir}" in last
    run.assert_nothing_stays()
    run = launch(world, [sys.executable, str(FAKES), "--resume", str(world.dir)])
    run.finish(300)
    world.assert_good(epochs=2)
    run.assert_nothing_stays()


def test_torchrun_replaces_a_dead_learner_rank_and_the_run_goes_on(world):
    """--max-restarts: the new ranks find the run directory, whose name nobody gave, by themselves;
    more than once."""
    flags = command(world, learner_ranks=2, run_dir="")
    run = launch(world, torchrun(3) + ["--max-restarts=2"] + flags, die=["learner 1", 3], deaths=2)
    text = run.finish(300)
    assert text.count("resuming") == 2 and "after step 2" in text
    (world.dir,) = (world.folder / "runs").iterdir()
    world.assert_good(epochs=3)
    assert {g["epoch"] for g in world.groups()} == {0, 1, 2}
    run.assert_nothing_stays()


def test_a_directory_of_another_run_is_not_resumed_by_a_restart(world, monkeypatch):
    world.start()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not train.restarted_by_torchrun(world.config())
    config = world.config(run_dir=str(world.folder / "ours"))
    train.prepare_run_dir(config, False, ([], [])).close()
    assert train.restarted_by_torchrun(config)


@pytest.mark.parametrize("execution, timeout", [
    (4, 2), pytest.param(20, 5, marks=pytest.mark.long)])
def test_executions_may_outlast_the_timeout_of_collectives(world, execution, timeout):
    """As 15 minutes and 60 s would: no rank waits for a rollout inside a collective operation."""
    flags = command(world, learner_ranks=2, collective_timeout=timeout, steps=1, responses=2,
                    best_of=1, groups=1, eval_drafts=0)
    run = launch(world, torchrun(3) + flags, execution_seconds=execution)
    run.finish(300)
    metrics = world.assert_good(steps=1)
    assert min(m["seconds_wait"] for m in metrics) > execution - 0.5
    run.assert_nothing_stays()


def test_the_key_of_the_queues_is_in_no_argument_environment_or_file(world):
    run = launch(world, [sys.executable] + command(world, steps=30), execution_seconds=0.05,
                 show_key=str(world.folder / "key"))
    wait_until(lambda: len(world.rows("metrics.jsonl")) > 1, 300, "two steps", run.log)
    key, seen = (world.folder / "key").read_bytes(), 0
    spellings = [key, key.hex().encode(), base64.b64encode(key)[:-1], repr(key).encode()[2:-1]]
    for process in psutil.Process(run.process.pid).children(recursive=True) + [run.process]:
        for name in ("cmdline", "environ"):
            text = open(f"/proc/{process.pid}/{name}", "rb").read()
            seen += 1
            assert not any(spelling in text for spelling in spellings)
    assert seen >= 2 * 4  # rank 0, its rollout process, a guard each
    run.finish(300)
    for path in [run.log, *world.dir.rglob("*")]:
        if path.is_file():
            assert not any(spelling in path.read_bytes() for spelling in spellings)


FAKES = Path(__file__).with_name("fakes.py")


def test_the_guard_unlinks_shared_memory_whose_tracker_was_killed():
    program = """
import os, signal
from multiprocessing import get_context, resource_tracker, shared_memory
from train import start_guard
memory = shared_memory.SharedMemory(create=True, size=100)
resource_tracker.unregister(memory._name, "shared_memory")
lock = get_context("spawn").Lock()
resource_tracker.unregister(lock._semlock.name, "semaphore")
if os.fork() == 0:  # who still uses it, as vLLM's worker does, when the owner is killed
    signal.pause()
start_guard([])
print(memory.name, "sem." + lock._semlock.name.strip("/"), flush=True)
signal.pause()
"""
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=Path(train.__file__).parent,
                             stdout=subprocess.PIPE, text=True, start_new_session=True)
    paths = [Path("/dev/shm", name) for name in owner.stdout.readline().split()]
    assert len(paths) == 2 and all(path.exists() for path in paths)
    owner.kill()
    owner.wait()
    wait_until(lambda: not any(path.exists() for path in paths), 10, "the end of both")
