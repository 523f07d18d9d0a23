"""Prompts, code extraction, rollouts and the agent, with fakes: python -m pytest tests/test_rollout.py"""

import dataclasses
import doctest
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from fakes import FakeEngine, FakePrompter, FakeSandbox

import rollout
import train
from buffer import Task, Trace
from rollout import (AgentConfig, AgentRun, PromptBudget, Request, RolloutConfig, choose_best,
                     choose_task, clip_middle, extract_code, preview_data, report_totals,
                     run_agent, task_messages, write_report)


@pytest.mark.parametrize("module", [rollout, train])
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("response, code", [
    ("```python\na\n```", "a\n"),
    ("```py\na\n```", "a\n"),
    ("```\na\n```", "a\n"),
    ("first ```python\na\n``` no, better ```python\nb\n```", "b\n"),
    ("<think>```python\nwrong\n```</think>\n```python\nright\n```", "right\n"),
    ("<think>```python\nwrong\n```", ""),
    ("```python\nnever closed", ""),
    ("```python\n\n```", ""),
    ("no code", ""),
])
def test_extract_code(response, code):
    found, reason = extract_code(response)
    assert found == code
    assert bool(reason) == (not code)


def test_a_response_cut_off_by_the_limit_is_a_failure():
    assert extract_code("```python\na\n```", "length") == (
        "", "the response was cut off by the length limit")


@pytest.fixture
def competition(tmp_path):
    pd.DataFrame({"key": range(5), "size": [1.5, None, 2, 3, 4], "colour": list("abcde"),
                  "price": range(5)}).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame({"key": range(3), "size": [1.0, 2, 3], "colour": list("abc")}).to_csv(
        tmp_path / "test.csv", index=False)
    (tmp_path / "readme.bin").write_bytes(b"123")
    return SimpleNamespace(id="toy", public_dir=tmp_path, description="Predict the price.",
                           lower_is_better=True, median=1.0)


def test_preview_names_files_columns_types_and_holes(competition):
    text = preview_data(competition.public_dir, 1000)
    assert "train.csv: 5 rows" in text and "test.csv: 3 rows" in text
    assert "- size float 1.5, 20% missing" in text
    assert "- colour text a" in text and "- key int 0" in text
    assert "readme.bin: 3 bytes" in text
    assert text.count("colour") == 1  # the test file's columns have been shown already


def test_preview_keeps_its_budget_and_says_what_it_left_out(competition):
    text = preview_data(competition.public_dir, 40)
    assert "more columns" in text and "colour" not in text
    assert "test.csv: 3 rows" in text


def test_clip_middle_keeps_both_ends():
    assert clip_middle("a" * 50 + "b" * 50, 21).startswith("aaa")
    assert clip_middle("a" * 50 + "b" * 50, 21).endswith("bbb")
    assert len(clip_middle("a" * 500, 100)) <= 105


def test_prompts_show_code_and_outcome_but_never_the_test_score(competition):
    parent = Trace("p", "toy/draft", "toy", "draft", code="print(1)", valid=True, score=0.123456,
                   human_rank=0.654321, validation_score=0.5, medal="gold")
    text = task_messages(competition, Task("x", "toy", "improve", parent=parent),
                         PromptBudget())[0]["content"]
    assert "print(1)" in text and "validation score: 0.5" in text
    assert not any(secret in text for secret in ("0.1234", "0.6543", "gold"))
    failed = Trace("p", "toy/draft", "toy", "draft", code="print(1)", status="invalid",
                   reason="submission must have the columns a,b")
    text = task_messages(competition, Task("x", "toy", "debug", parent=failed),
                         PromptBudget())[0]["content"]
    assert "status: invalid" in text and "columns a,b" in text and "Fix" in text


def test_prompts_of_each_operator_to_the_letter(competition):
    """A policy is taught these prompts: they must not change unnoticed."""
    parents = [Trace(f"p{n}", "toy/draft", "toy", "draft", code=f"print({n})\n", valid=True,
                     validation_score=n / 2) for n in (1, 2)]
    head = f"{rollout.INSTRUCTIONS}\n\nPredict the price.\n\n# Data\ncolumns"
    one = "# Script\n```python\nprint(1)\n```\n# Output\nvalidation score: 0.5"
    two = "# Second script\n```python\nprint(2)\n```\n# Output\nvalidation score: 1"
    for operator, parts in {
            "draft": ["# Task\nWrite a first script."],
            "improve": [one, "# Task\nWrite a better script."],
            "debug": [one, "# Task\nFix the script."],
            "crossover": [one, two, "# Task\nWrite a script that combines the best of both."]}.items():
        task = Task("x", "toy", operator, 1, *(parents[:1] if len(parts) > 1 else ()))
        if operator == "crossover":
            task = dataclasses.replace(task, second=parents[1])
        (message,) = task_messages(competition, task, PromptBudget(), preview="columns\n")
        assert message == {"role": "user", "content": "\n\n".join([head, *parts])}


def roll(task, **config):
    with ThreadPoolExecutor(1) as pool:
        return rollout.rollout(Request(task, 6, handout_version=3), FakeEngine(), FakeSandbox(),
                               FakePrompter(["toy"]), RolloutConfig(**config), pool)


def test_a_group_carries_what_the_learner_needs():
    group = roll(Task.root("toy")).group
    assert len(group.traces) == 6 and group.handout_version == 3 and group.policy_version == 0
    for trace in group.traces:
        assert len(trace.response_ids) == len(trace.logprobs) > 0
        assert trace.reward == pytest.approx(0.1 + 0.9 * trace.human_rank if trace.valid else 0.0)
    assert any(t.valid for t in group.traces) and not all(t.valid for t in group.traces)
    json.dumps([t.public() for t in group.traces])


def test_improve_pays_for_beating_the_parent_and_not_for_copying_it():
    first = roll(Task.root("toy")).group.traces
    parent = next(t for t in first if t.valid)
    group = roll(Task(f"toy/improve/{parent.id}", "toy", "improve", 1, parent)).group
    for trace in group.traces:
        if trace.valid:
            bonus = 0.5 * max(trace.base_reward - parent.base_reward, 0)
            expected = min(trace.base_reward + bonus, 1) * (trace.code_key != parent.code_key)
            assert trace.reward == pytest.approx(expected)


def test_a_crossover_pays_for_beating_the_better_parent_and_not_for_copying_either():
    group = roll(Task.root("toy")).group
    better, other = sorted((t for t in group.traces if t.valid), key=lambda t: -t.base_reward)[:2]
    task = Task("toy/crossover/x", "toy", "crossover", 1, better, second=other)
    traces = roll(task).group.traces
    for trace in traces:
        bonus = 0.5 * max(trace.base_reward - better.base_reward, 0)
        assert trace.reward == pytest.approx(min(trace.base_reward + bonus, 1) if trace.valid else 0)
    assert any(t.base_reward > better.base_reward for t in traces)
    for copied in (better, other):
        again = rollout.execute(dataclasses.replace(copied), task, SimpleNamespace(id="toy"),
                                FakeSandbox(), RolloutConfig())
        assert again.valid and again.reward == 0


def test_a_prompt_without_room_for_the_response_is_refused_not_cut():
    result = roll(Task.root("toy"), max_response_tokens=9_995)
    assert result.group is None and "response tokens" in result.error


# -- the agent


def trace(name, valid=False, score=None, operator="draft", parent=None, depth=0):
    return Trace(name, "", "toy", operator, depth=depth, parent_id=parent, code="x", valid=valid,
                 validation_score=score)


def test_the_best_is_chosen_by_validation_score_in_the_metrics_direction(competition):
    traces = [trace("a", True, 3.0), trace("b", True, 1.0), trace("c", False, 0.1),
              trace("d", True, None)]
    assert choose_best(competition, traces) == 1
    competition.lower_is_better = False
    assert choose_best(competition, traces) == 0
    assert choose_best(competition, traces[3:]) == 0  # no score is better than nothing
    assert choose_best(competition, [traces[2]]) is None


def test_search_drafts_first_then_debugs_or_improves(competition):
    import random

    agent = AgentConfig(drafts=2, debug_probability=1.0)
    rng = random.Random(0)
    assert choose_task(competition, [trace("a")], agent, rng).operator == "draft"
    failed = [trace("a"), trace("b", True, 1.0)]
    task = choose_task(competition, failed, agent, rng)
    assert (task.operator, task.parent.id) == ("debug", "a")
    tried = failed + [trace("c", operator="debug", parent="a", depth=1)]
    assert choose_task(competition, tried, agent, rng).parent.id == "c"  # its leaf, not a again
    never = AgentConfig(drafts=2, debug_probability=0.0)
    task = choose_task(competition, failed, never, rng)
    assert (task.operator, task.parent.id) == ("improve", "b")


def test_search_crosses_the_two_best_only_when_asked_to(competition):
    import random

    traces = [dataclasses.replace(trace(name, True, score), code_key=name)
              for name, score in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    agent = AgentConfig(drafts=1, crossover_probability=1.0)
    task = choose_task(competition, traces, agent, random.Random(0))
    assert task.operator == "crossover" and [t.id for t in task.parents] == ["a", "c"]
    assert choose_task(competition, traces[:1], agent, random.Random(0)).operator == "improve"
    assert choose_task(competition, traces, AgentConfig(drafts=1),
                       random.Random(0)).operator == "improve"


def test_agent_run_and_report(competition, tmp_path):
    agent = AgentConfig(steps=6, drafts=2)
    prompter = FakePrompter(["toy"])
    runs = [run_agent(competition, seed, FakeEngine(), FakeSandbox(), prompter, RolloutConfig(),
                      agent) for seed in range(3)]
    for run in runs:
        assert len(run.traces) == 6
        if run.chosen is not None:
            best = min(t.validation_score for t in run.traces if t.valid)
            assert run.traces[run.chosen].validation_score == best
    report = write_report(tmp_path / "out" / "report.json", runs, agent, "model")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    lines = (tmp_path / "out" / "submissions.jsonl").read_text().splitlines()
    assert {json.loads(line)["competition_id"] for line in lines} == {"toy"}
    values = [row["human_rank"] for row in report["runs"]]
    assert report["totals"]["human_rank"]["mean"] == pytest.approx(np.mean(values))
    assert report["totals"]["human_rank"]["sem"] == pytest.approx(
        np.std(values, ddof=1) / np.sqrt(3))


def test_never_valid_counts_as_all_steps(competition):
    run = AgentRun(competition, 0, [trace("a"), trace("b")])
    row = run.row()
    assert row["steps_to_first_valid"] is None and not row["valid"]
    totals = report_totals([row], 2)
    assert totals["extra_steps_to_first_valid"] == {"mean": 2.0, "sem": None}
    run = AgentRun(competition, 0, [trace("a", True, 1.0)])
    run.traces[0].score = 0.5
    run.chosen = 0
    totals = report_totals([run.row()], 2)
    assert totals["extra_steps_to_first_valid"]["mean"] == 0
    assert totals["above_median_rate"]["mean"] == 1
