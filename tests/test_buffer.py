"""Evolving buffer: hand-computed cases and properties.   python -m pytest tests/test_buffer.py"""

import errno
import json
from dataclasses import fields
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer import NO_TOKENS, EvolvingBuffer, Group, Task, Trace, error_type, select_parents


def trace(task, key, base=0.0, status=None, output="", code=None, **more):
    """A trace of `task` whose script is told apart by `key`; base > 0 means valid."""
    return Trace(
        id=f"{task.id}#{key}", task_id=task.id, competition_id=task.competition_id,
        operator=task.operator, depth=task.depth, code=f"print({key!r})" if code is None else code,
        code_key=key, status=status or ("ok" if base > 0 else "error"), output=output,
        valid=base > 0, base_reward=base, reward=base, **more)


def snapshot(buffer):
    """The state but for the position in the log, which a buffer without a log does not have."""
    state = buffer.state_dict()
    del state["log_bytes"]
    return json.loads(json.dumps(state, allow_nan=False))


@pytest.fixture
def buffer():
    return EvolvingBuffer(["iris", "wine"])


@pytest.fixture
def root(buffer):
    return buffer.tasks["iris/draft"]


# ---- records


def test_trace_survives_json_bit_by_bit():
    original = Trace(
        "t", "iris/draft", "iris", "draft", prompt_ids=[3, 1], response_ids=np.array([7], np.int32),
        logprobs=np.array([-0.1], np.float32), score=np.float64(0.25), valid=np.bool_(True))
    for field in fields(Trace):  # nothing may come back as a default
        if not getattr(original, field.name) and field.name not in NO_TOKENS:
            kind = field.type.partition(" | ")[0]
            setattr(original, field.name, {"str": "x", "int": 7, "float": 0.3, "bool": True}[kind])
    copy = Trace.from_json(json.loads(json.dumps(original.to_json())))
    assert all(getattr(copy, field.name) == getattr(original, field.name)
               for field in fields(Trace) if field.name not in NO_TOKENS)
    assert copy.logprobs.dtype == np.float32 and copy.logprobs[0] == original.logprobs[0]
    assert copy.prompt_ids.dtype == np.int32 and copy.valid is True
    assert not {"prompt_ids", "response_ids", "logprobs"} & original.public().keys()
    for bare in (original.without_tokens(), Trace.from_json(original.public())):
        assert all(getattr(bare, name) is none for name, none in NO_TOKENS.items())  # shared
    assert len(Trace.from_json(original.public()).response_ids) == 0


def test_scores_that_are_not_finite_become_null(root):
    assert trace(root, "a", score=float("nan")).public()["score"] is None


def test_group_reports_its_oldest_version_and_survives_json(root):
    traces = [trace(root, "a", 0.5, policy_version=4), trace(root, "b", policy_version=3)]
    group = Group(root, traces, epoch=2, handout_version=4)
    assert group.policy_version == 3
    assert group.rewards.dtype == np.float32 and group.rewards.tolist() == [0.5, 0.0]
    copy = Group.from_json(json.loads(json.dumps(group.to_json())))
    assert copy.to_json() == group.to_json() and copy.task.id == root.id
    assert (copy.epoch, copy.handout_version) == (2, 4)


@pytest.mark.parametrize("field", ["reward", "base_reward"])
def test_a_reward_that_is_not_finite_is_refused_before_anything_is_written(field, tmp_path):
    buffer = EvolvingBuffer(["iris"], log_path=tmp_path / "log")
    buffer.add(Group(buffer.roots()[0], [trace(buffer.roots()[0], "a", 0.5)]))
    before, log = snapshot(buffer), (tmp_path / "log").read_bytes()
    for value in (float("nan"), float("inf")):
        bad = trace(buffer.roots()[0], "b", 0.5)
        setattr(bad, field, value)
        with pytest.raises(ValueError, match="iris/draft has a reward that is not finite"):
            buffer.add(Group(buffer.roots()[0], [trace(buffer.roots()[0], "c", 0.5), bad]))
    assert snapshot(buffer) == before and (tmp_path / "log").read_bytes() == log


# ---- admission


def test_failed_opens_debug_and_valid_opens_improve(buffer, root):
    admitted, evicted = buffer.add(Group(root, [trace(root, "good", 0.6), trace(root, "bad")]))
    assert [(t.id, t.operator, t.depth) for t in admitted] == [
        ("iris/improve/good", "improve", 1), ("iris/debug/bad", "debug", 1)]
    assert admitted[0].parent.code == "print('good')" and evicted == []
    assert [t.headroom for t in (root, *admitted)] == [1.0, 0.4, 1.0]
    assert buffer.counts() == {"draft": 2, "improve": 1, "debug": 1, "crossover": 0}


def test_no_task_without_code_without_headroom_or_from_a_refused_execution(buffer, root):
    admitted, _ = buffer.add(Group(root, [
        trace(root, "empty", code=""), trace(root, "perfect", 1.0), trace(root, "near", 0.952),
        trace(root, "refused", status="refused"), trace(root, "below", 0.949)]))
    assert [t.id for t in admitted] == ["iris/improve/below"]


def test_depth_ends_at_its_maximum(buffer, root):
    buffer.max_depth = 2
    task = root
    for key in "ab":
        (task,), _ = buffer.add(Group(task, [trace(task, key)]))
    assert task.depth == 2 and buffer.add(Group(task, [trace(task, "c")])) == ([], [])


def test_a_task_keeps_neither_tokens_of_its_parent_nor_the_id_of_what_came_before(buffer, root):
    (first,), _ = buffer.add(Group(root, [trace(root, "a")]))
    child = trace(first, "b", parent_id=first.parent.id,
                  response_ids=np.arange(3, dtype=np.int32))
    (second,), _ = buffer.add(Group(first, [child]))
    assert second.parent.id == child.id and second.parent.parent_id is None
    assert second.parent.response_ids.size == 0
    assert child.parent_id == first.parent.id  # what the learner and the log see is untouched


def test_duplicates_merge_within_a_group_and_with_the_buffer(buffer, root):
    admitted, _ = buffer.add(Group(root, [trace(root, "a"), trace(root, "a"), trace(root, "a")]))
    assert [t.id for t in admitted] == ["iris/debug/a"]
    again, _ = buffer.add(Group(root, [trace(root, "a"), trace(root, "b", status="timeout")]))
    assert [t.id for t in again] == ["iris/debug/b"]
    assert buffer.statistics()["operator"]["draft"]["merged"] == 3


def test_equal_code_of_another_outcome_or_competition_is_no_duplicate(buffer, root):
    wine = buffer.tasks["wine/draft"]
    buffer.add(Group(root, [trace(root, "a")]))
    assert buffer.add(Group(root, [trace(root, "a", 0.4)]))[0][0].id == "iris/improve/a"
    assert buffer.add(Group(wine, [trace(wine, "a")]))[0][0].id == "wine/debug/a"


def test_diversity_takes_turns_between_distinct_scores_and_distinct_errors(root):
    traces = [trace(root, "low", 0.3), trace(root, "key1", output="KeyError: 'a'"),
              trace(root, "top", 0.8), trace(root, "key2", output="KeyError: 'b'"),
              trace(root, "top2", 0.8), trace(root, "value", output="ValueError: x")]
    names = [t.code_key for t in select_parents(traces, 6)]
    assert names == ["top", "key1", "low", "value"]
    assert [t.code_key for t in select_parents(traces, 3)] == names[:3]


def test_at_most_k_new_tasks_a_group(buffer, root):
    group = Group(root, [trace(root, f"s{i}", 0.1 + 0.1 * i) for i in range(6)])
    admitted, _ = buffer.add(group)
    assert [t.parent.base_reward for t in admitted] == pytest.approx([0.6, 0.5, 0.4])


@pytest.mark.parametrize("status, output, reason, expected", [
    ("error", "Traceback:\n  ...\nValueError: first\n\nDuring ...\nKeyError: 'id'", "", "KeyError"),
    ("error", "sklearn.exceptions.NotFittedError: call fit", "", "NotFittedError"),
    ("error", "x.py:3: FutureWarning: soon\nMemoryError", "", "MemoryError"),
    ("error", "print of NameError: in the middle", "IndexError: 3", "IndexError"),
    ("error", "no traceback at all", "", "error"),
    ("timeout", "KeyError: caught and printed", "", "timeout"),
    ("invalid", "", "expected 10 rows", "invalid"),
])
def test_error_type(root, status, output, reason, expected):
    assert error_type(trace(root, "a", status=status, output=output, reason=reason)) == expected


def test_without_the_buffer_only_roots(root):
    buffer = EvolvingBuffer(["iris", "wine"], enabled=False)
    assert buffer.add(Group(root, [trace(root, "a", 0.5), trace(root, "b")])) == ([], [])
    assert list(buffer.tasks) == ["iris/draft", "wine/draft"]
    assert buffer.statistics()["operator"]["draft"]["traces"] == 2


# ---- crossover


def crossing_buffer(**options):
    """Holds two valid scripts of iris, 0.4 and 0.6, and one of wine."""
    buffer = EvolvingBuffer(["iris", "wine"], crossover=True, **options)
    for competition, key, base in (("iris", "f4", 0.4), ("iris", "f6", 0.6), ("wine", "f9", 0.9)):
        root = buffer.tasks[f"{competition}/draft"]
        buffer.add(Group(root, [trace(root, key, base)]))
    return buffer, buffer.tasks["iris/draft"]


def test_a_crossover_has_the_groups_best_and_the_buffers_best_as_parents():
    buffer, root = crossing_buffer()
    admitted, _ = buffer.add(Group(root, [trace(root, "a", 0.3), trace(root, "b", 0.5)]))
    assert [t.id for t in admitted] == [
        "iris/improve/b", "iris/improve/a", "iris/crossover/b+f6"]
    task = admitted[-1]
    assert [t.code_key for t in task.parents] == ["f6", "b"]  # the better one first
    assert (task.operator, task.depth, task.lineage) == ("crossover", 1, ("iris/draft",))
    assert task.headroom == 0.4  # beyond the better one
    assert buffer.counts()["crossover"] == 2  # f4 and f6 were crossed when f6 came
    copy = Task.from_json(json.loads(json.dumps(task.to_json())))
    assert [t.code_key for t in copy.parents] == ["f6", "b"] and copy.to_json() == task.to_json()


def test_a_crossover_takes_one_of_the_k_places():
    buffer, root = crossing_buffer(children_per_group=2)
    traces = [trace(root, key, base) for key, base in (("a", 0.2), ("b", 0.3), ("c", 0.5))]
    assert [t.operator for t in buffer.add(Group(root, traces))[0]] == ["improve", "crossover"]


@pytest.mark.parametrize("k, operators", [(0, []), (1, ["improve"]), (2, ["improve", "crossover"])])
def test_nothing_is_crossed_where_it_would_take_the_only_place(k, operators):
    buffer, root = crossing_buffer(children_per_group=k)
    group = Group(root, [trace(root, "b", 0.5)])
    assert [t.operator for t in buffer.add(group)[0]] == operators


def test_a_pair_is_crossed_once_then_the_next_best_partner_is_taken():
    buffer, root = crossing_buffer()
    group = Group(root, [trace(root, "b", 0.5)])
    names = [t.id for _ in range(3) for t in buffer.add(group)[0] if t.operator == "crossover"]
    assert names == ["iris/crossover/b+f6", "iris/crossover/b+f4"]


def test_a_late_group_of_an_evicted_crossover_does_not_bring_it_back():
    buffer, root = crossing_buffer()
    task = buffer.add(Group(root, [trace(root, "b", 0.5)]))[0][-1]
    buffer.remove(task.id)
    admitted, _ = buffer.add(Group(task, [trace(task, "b", 0.5)]))
    assert task.id == "iris/crossover/b+f6" and task.id not in [t.id for t in admitted]


def test_no_crossover_without_the_option_without_two_parents_or_beyond_the_depth():
    buffer, root = crossing_buffer()
    off, first = EvolvingBuffer(["iris"]), EvolvingBuffer(["iris"], crossover=True)
    for other in (off, first):
        task = other.tasks["iris/draft"]
        other.add(Group(task, [trace(task, "f4", 0.4), trace(task, "f6", 0.6)]))
        assert other.counts()["crossover"] == 0  # nothing was held yet
    off.add(Group(root, [trace(root, "b", 0.5)]))
    assert off.counts()["crossover"] == 0
    assert "crossover" not in {t.operator for t in buffer.add(Group(root, [trace(root, "x")]))[0]}
    buffer.max_depth = 0
    assert buffer.add(Group(root, [trace(root, "y", 0.5)])) == ([], [])


def test_what_a_crossover_brings_forth_is_improved_or_mended_like_anything_else():
    buffer, root = crossing_buffer()
    task = buffer.add(Group(root, [trace(root, "b", 0.5)]))[0][-1]
    admitted, _ = buffer.add(Group(task, [trace(task, "c", 0.7), trace(task, "d")]))
    assert [t.id for t in admitted] == ["iris/improve/c", "iris/debug/d", "iris/crossover/c+f6"]
    assert buffer.ancestry("iris/debug/d") == ["iris/draft", task.id, "iris/debug/d"]


# ---- capacity


def fill(capacity, keys):
    buffer = EvolvingBuffer(["iris"], capacity=capacity)
    root = buffer.tasks["iris/draft"]
    for key in keys:
        buffer.add(Group(root, [trace(root, key)]))
    return buffer, root


def test_the_lowest_score_leaves_first():
    buffer, root = fill(4, "abc")
    scores = {"iris/debug/a": 0.3, "iris/debug/b": 0.1, "iris/debug/c": 0.2}
    admitted, evicted = buffer.add(Group(root, [trace(root, "d")]), score=scores.__getitem__)
    assert evicted == ["iris/debug/b"] and [t.id for t in admitted] == ["iris/debug/d"]
    assert len(buffer) == 4


def test_the_oldest_leaves_among_equals_and_without_scores():
    buffer, root = fill(4, "abc")
    assert buffer.add(Group(root, [trace(root, "d")]), lambda _: 0.5)[1] == ["iris/debug/a"]
    assert buffer.add(Group(root, [trace(root, "e")]))[1] == ["iris/debug/b"]


def test_protected_tasks_stay_and_what_finds_no_room_is_not_admitted():
    buffer, root = fill(3, "ab")
    everything = {"iris/debug/a", "iris/debug/b"}
    group = Group(root, [trace(root, "c", 0.5), trace(root, "d")])
    assert buffer.add(group, protected=everything) == ([], [])
    admitted, evicted = buffer.add(group, protected={"iris/debug/a"})
    assert [t.id for t in admitted] == ["iris/improve/c"] and evicted == ["iris/debug/b"]


def test_a_large_buffer_makes_room_for_several_groups_at_once():
    buffer, root = fill(128, [f"{i}" for i in range(127)])
    assert len(buffer) == 128
    calls = []
    _, evicted = buffer.add(Group(root, [trace(root, "x")]), lambda i: calls.append(i) or 0.0)
    assert evicted == ["iris/debug/0", "iris/debug/1"] and len(calls) == 127


def test_of_a_competition_the_newest_improve_tasks_stay():
    buffer = EvolvingBuffer(["iris", "wine"], frontier=2)
    root, other = buffer.tasks["iris/draft"], buffer.tasks["wine/draft"]
    buffer.add(Group(root, [trace(root, "a", 0.5), trace(root, "b", 0.3), trace(root, "x")]))
    buffer.add(Group(other, [trace(other, "c", 0.1)]))
    admitted, evicted = buffer.add(Group(root, [trace(root, "d", 0.2)]))
    assert [t.id for t in admitted] == ["iris/improve/d"] and evicted == ["iris/improve/a"]
    assert buffer.add(Group(root, [trace(root, "y")]))[1] == []  # a failure takes no such place
    assert "iris/debug/x" in buffer.tasks and "wine/improve/c" in buffer.tasks
    # One in flight stays until a later group of its competition.
    first = {"iris/improve/b"}
    assert buffer.add(Group(root, [trace(root, "e", 0.4)]), protected=first)[1] == []
    assert buffer.add(Group(root, [trace(root, "z")]))[1] == ["iris/improve/b"]
    # One group brings no more than that: its best.
    three = [trace(root, name, base) for name, base in zip("fgh", (0.7, 0.6, 0.8))]
    admitted, evicted = buffer.add(Group(root, three))
    assert [t.id for t in admitted] == ["iris/improve/h", "iris/improve/f"]
    assert evicted == ["iris/improve/d", "iris/improve/e"]
    assert buffer.add(Group(root, [trace(root, "i", 0.1)]))[1] == ["iris/improve/h"]  # came first


def test_no_frontier_keeps_all():
    buffer = EvolvingBuffer(["iris"], frontier=0)
    root = buffer.tasks["iris/draft"]
    for number in range(20):
        buffer.add(Group(root, [trace(root, f"{number}", 0.5)]))
    assert buffer.counts()["improve"] == 20


def test_an_evicted_task_can_come_back(buffer):
    buffer, root = fill(2, "a")
    buffer.add(Group(root, [trace(root, "b")]))
    assert [t.id for t in buffer.add(Group(root, [trace(root, "a")]))[0]] == ["iris/debug/a"]


def test_a_late_group_of_an_evicted_task_still_teaches(buffer):
    buffer, root = fill(2, "a")
    gone = buffer.tasks["iris/debug/a"]
    buffer.add(Group(root, [trace(root, "b")]))
    admitted, _ = buffer.add(Group(gone, [trace(gone, "c", 0.5)]))
    assert buffer.ancestry(admitted[0].id) == ["iris/draft", "iris/debug/a", "iris/improve/c"]
    assert buffer.add(Group(gone, [trace(gone, "a")]))[0] == []  # no task is its own child


@pytest.mark.parametrize("ids, capacity, message", [
    ([], 10, "no competitions"), (["a", "a"], 10, "twice"), (["a", "b"], 1, "capacity 1")])
def test_impossible_buffers_are_refused(ids, capacity, message):
    with pytest.raises(ValueError, match=message):
        EvolvingBuffer(ids, capacity=capacity)


@pytest.mark.parametrize("headroom", [-0.1, 1.1, float("nan")])
def test_a_headroom_that_is_none_is_refused(headroom):
    with pytest.raises(ValueError, match="headroom"):
        EvolvingBuffer(["iris"], min_headroom=headroom)


def test_groups_that_do_not_belong_are_refused(buffer, root):
    with pytest.raises(ValueError, match="no traces"):
        buffer.add(Group(root, []))
    stranger = Task.root("titanic")
    with pytest.raises(ValueError, match="unknown competition 'titanic'"):
        buffer.add(Group(stranger, [trace(stranger, "a")]))
    assert buffer.sequence == 0


def test_a_removed_task_is_gone_after_replay_too(tmp_path, root):
    buffer = logged(tmp_path)
    buffer.add(Group(root, [trace(root, "a")]))
    state = buffer.state_dict()
    buffer.remove("iris/debug/a")
    buffer.add(Group(root, [trace(root, "a")]))  # the same script again opens the task again
    resumed = logged(tmp_path)
    resumed.load_state_dict(state)
    removed, added = resumed.replay()
    assert (removed.evicted, removed.rewards.size) == (["iris/debug/a"], 0)
    assert [t.id for t in added.admitted] == ["iris/debug/a"]
    assert snapshot(resumed) == snapshot(buffer)
    with pytest.raises(ValueError, match="roots never leave"):
        buffer.remove("iris/draft")


def test_statistics_by_operator_and_competition(buffer, root):
    wine = buffer.tasks["wine/draft"]
    (_, bad), _ = buffer.add(
        Group(root, [trace(root, "a", 0.5, medal="bronze"), trace(root, "b")]))
    buffer.add(Group(bad, [trace(bad, "c", 0.3)]))
    buffer.add(Group(wine, [trace(wine, "d")]))
    found = buffer.statistics()
    assert found["operator"]["draft"] == {
        "tasks": 2, "groups": 2, "traces": 3, "admitted": 0, "merged": 0, "evicted": 0,
        "valid_rate": 1 / 3, "medal_rate": 1 / 3, "reward_mean": 0.5 / 3}
    assert found["operator"]["improve"]["admitted"] == 2
    assert found["competition"]["iris"]["traces"] == 3
    assert found["competition"]["iris"]["reward_mean"] == pytest.approx(0.8 / 3)


# ---- log and snapshot


def logged(tmp_path, **options):
    return EvolvingBuffer(["iris", "wine"], log_path=tmp_path / "groups.jsonl", **options)


def test_the_log_holds_the_epoch_and_is_on_disk_at_once(tmp_path, root):
    buffer = logged(tmp_path)
    buffer.add(Group(root, [trace(root, "a")], epoch=3, handout_version=7))
    (line,) = (tmp_path / "groups.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["sequence"], record["epoch"], record["handout_version"]) == (1, 3, 7)
    assert record["traces"][0]["code"] == "print('a')" and "logprobs" not in record["traces"][0]


def test_replay_goes_on_from_a_snapshot_and_reports_the_changes(tmp_path, root):
    buffer = logged(tmp_path, capacity=3)
    buffer.add(Group(root, [trace(root, "a")]))
    state = json.loads(json.dumps(buffer.state_dict()))
    nothing = trace(root, "", status="no_code")
    group = Group(root, [trace(root, "b", 0.5), nothing, nothing], epoch=1)
    buffer.add(group, lambda task_id: 0.0)
    resumed = logged(tmp_path, capacity=3)
    resumed.load_state_dict(state)
    (change,) = resumed.replay()
    assert (change.sequence, change.epoch, change.task_id) == (2, 1, "iris/draft")
    assert change.rewards.tolist() == [0.5, 0.0, 0.0] and change.evicted == ["iris/debug/a"]
    assert change.failed == group.failed == pytest.approx(2 / 3)
    assert [t.id for t in change.admitted] == ["iris/improve/b"]
    assert snapshot(resumed) == snapshot(buffer)
    assert resumed.replay() == []
    resumed.add(Group(root, [trace(root, "c")]))  # and the log goes on
    whole = EvolvingBuffer(["iris", "wine"], capacity=3)
    assert len(whole.replay(tmp_path / "groups.jsonl")) == 3
    assert snapshot(whole) == snapshot(resumed)
    (tmp_path / "groups.jsonl").write_bytes(b"")
    resumed = logged(tmp_path, capacity=3)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="has 0 bytes, but the snapshot knows of"):
        resumed.replay()


@pytest.mark.parametrize("keep", [1, 40, -1])
def test_a_torn_last_line_is_ignored_and_then_cut_off(tmp_path, root, keep):
    path = tmp_path / "groups.jsonl"
    buffer = logged(tmp_path)
    buffer.add(Group(root, [trace(root, "a")]))
    whole = path.read_bytes()
    buffer.add(Group(root, [trace(root, "b", status="timeout")]))
    path.write_bytes(whole + path.read_bytes()[len(whole):][:keep])
    resumed = logged(tmp_path)
    assert len(resumed.replay()) == 1
    resumed.add(Group(root, [trace(root, "c", status="memory")]))
    assert [json.loads(line)["sequence"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_damaged_line_a_gap_and_a_log_not_replayed_are_errors(tmp_path, root):
    path = tmp_path / "groups.jsonl"
    buffer = logged(tmp_path)
    for key in "abc":
        buffer.add(Group(root, [trace(root, key)]))
    with pytest.raises(ValueError, match="holds 3 changes, this buffer 0: replay"):
        logged(tmp_path).add(Group(root, [trace(root, "d")]))
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + third)
    with pytest.raises(ValueError, match="change 3 follows 1"):
        logged(tmp_path).replay()
    for damaged in (second[:50], b"[1]", b'{"sequence":2}'):
        path.write_bytes(first + damaged + b"\n" + third)
        for _ in range(2):  # nothing of it counts as applied
            with pytest.raises(ValueError, match="damaged line"):
                (again := logged(tmp_path)).replay()
            assert again.sequence == 1


def test_a_snapshot_in_a_smaller_buffer_admits_nothing_while_it_is_too_full(root):
    def group(keys):
        return Group(root, [trace(root, key, base=0.1 + 0.03 * i) for i, key in enumerate(keys)])

    buffer = EvolvingBuffer(["iris"], frontier=0, children_per_group=9)
    buffer.add(group("abcdefghi"))
    small = EvolvingBuffer(["iris"], frontier=0, children_per_group=9, capacity=5)
    small.load_state_dict(buffer.state_dict())
    admitted, evicted = small.add(group("klmnopq"), protected=list(small.tasks)[:8])
    assert not admitted and len(evicted) == 2 and len(small) == 8


def test_a_full_disk_leaves_buffer_and_log_as_they_were(tmp_path, root):
    path = tmp_path / "groups.jsonl"
    buffer = logged(tmp_path)
    buffer.add(Group(root, [trace(root, "a")]))
    before, text = snapshot(buffer), path.read_bytes()
    group = Group(root, [trace(root, "b", status="timeout")])

    class FullDisk:
        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if self.calls > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    real, buffer._log = buffer._log, FullDisk(buffer._log)
    with pytest.raises(OSError, match="No space left"):
        buffer.add(group)
    assert snapshot(buffer) == before and path.read_bytes() == text
    buffer._log = real
    buffer.add(group)  # there is room again
    assert len(EvolvingBuffer(["iris", "wine"]).replay(path)) == 2


def test_a_long_line_is_found_when_the_log_is_opened_again(tmp_path, root):
    buffer = logged(tmp_path)
    for key in "ab":
        buffer.add(Group(root, [trace(root, key, code="x" * 200_000)]))
    resumed = logged(tmp_path)
    resumed.replay()
    resumed.add(Group(root, [trace(root, "c")]))
    assert resumed.sequence == 3


def test_a_snapshot_of_other_competitions_is_refused(buffer):
    with pytest.raises(ValueError, match="snapshot is of competitions"):
        EvolvingBuffer(["titanic"]).load_state_dict(buffer.state_dict())


# ---- properties

outcomes = st.tuples(st.sampled_from("abcdefgh"), st.sampled_from([0.0, 0.0, 0.05, 0.4, 0.6, 1.0]),
                     st.sampled_from(["KeyError", "ValueError", "TypeError"]))
steps = st.lists(st.tuples(st.integers(0, 999), st.lists(outcomes, min_size=1, max_size=5),
                           st.integers(0, 3), st.integers(0, 9)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(steps=steps, capacity=st.integers(2, 12), k=st.integers(1, 4), stop=st.integers(0, 25),
       crossover=st.booleans(), frontier=st.integers(0, 3))
def test_properties_of_any_history(tmp_path_factory, steps, capacity, k, stop, crossover,
                                  frontier):
    """Capacity, depth and frontier hold, roots and protected stay, replay and save/load give the
    snapshot."""
    path = tmp_path_factory.mktemp("log") / "groups.jsonl"
    options = dict(capacity=capacity, children_per_group=k, max_depth=3, crossover=crossover,
                   frontier=frontier)
    buffer = EvolvingBuffer(["iris", "wine"], log_path=path, **options)
    saved = json.loads(json.dumps(buffer.state_dict()))
    for number, (pick, group, protect, salt) in enumerate(steps):
        task = list(buffer.tasks.values())[pick % len(buffer)]
        traces = [trace(task, f"{key}{salt}", base, output=f"{error}: x")
                  for key, base, error in group]
        before = dict(buffer.tasks)
        protected = set(list(before)[-protect:]) if protect else set()
        admitted, evicted = buffer.add(Group(task, traces), lambda i: crc32(i.encode()) % 7,
                                       protected)
        assert len(buffer) <= capacity and len(admitted) <= k
        assert all(root in buffer.tasks for root in ("iris/draft", "wine/draft"))
        assert not protected & set(evicted)
        assert set(buffer.tasks) == (set(before) - set(evicted)) | {t.id for t in admitted}
        assert all(t.depth <= 3 and t.depth == len(buffer.ancestry(t.id)) - 1
                   for t in buffer.tasks.values())
        improve = [t for t in buffer.tasks.values() if t.operator == "improve"
                   and t.competition_id == task.competition_id and t.id not in protected]
        assert not frontier or len(improve) <= frontier
        if number == stop:
            saved = json.loads(json.dumps(buffer.state_dict()))
    final = snapshot(buffer)

    from_start = EvolvingBuffer(["iris", "wine"], log_path=path, **options)
    assert len(from_start.replay()) == len(steps) and snapshot(from_start) == final
    from_middle = EvolvingBuffer(["iris", "wine"], log_path=path, **options)
    from_middle.load_state_dict(saved)
    from_middle.replay()
    assert snapshot(from_middle) == final
    copy = EvolvingBuffer(["iris", "wine"], **options)
    copy.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    assert snapshot(copy) == final and list(copy.tasks) == list(buffer.tasks)
    # What is evicted next hangs on orders that a snapshot does not spell out.
    root = buffer.tasks["iris/draft"]
    more = [Group(root, [trace(root, f"new{i}", 0.3 + 0.1 * i)]) for i in range(4)]
    for other in (from_start, from_middle, copy):
        assert other._improve == buffer._improve
    assert [copy.add(group)[1] for group in more] == [buffer.add(group)[1] for group in more]
