"""Prompts, code extraction, rollouts and the agent, with fakes: python -m pytest tests/test_rollout.py"""

import dataclasses
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import wave
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import tiny_policy
from fakes import FakeEngine, FakePrompter, FakeSandbox, completion

import rollout
import train
from buffer import Task, Trace
from rollout import (AgentConfig, AgentRun, PromptBudget, Prompter, Request, RolloutConfig,
                     check_overlap, check_settings, choose_best, choose_task, clip_middle,
                     cut_description, design_of, evaluate, extract_code, preview_data,
                     read_settings, recall, report_totals, run_agent, task_messages, write_report)
from sandbox import CompetitionError, Execution


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
    # other blocks beside the script
    ("```bash\npip install x\n```\nthen\n```python\na\n```", "a\n"),
    ("```python\na\n```\nIt prints:\n```\nscore: 1\n```", "a\n"),
    ("```python\na\n```\n```text\nscore: 1\n```\n```python\nb\n```\n```json\n{}\n```", "b\n"),
    ("```\na\n```\n```sh\nls\n```", "a\n"),
    ("```bash\nls\n```", ""),
    ("Take ```x```\n```python\na\n```", "a\n"),
    # other spellings
    ("```Python\na\n```", "a\n"),
    ("```python3\na\n```", "a\n"),
    ("``` python title=x\na\n```", "a\n"),
    ("```python\r\na\r\nb\r\n```\r\n", "a\nb\n"),
    ("```python\na = '```'\n```", "a = '```'\n"),
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
                           lower_is_better=True, median=1.0, leaderboard=np.array([1.0, 2.0]),
                           answers=tmp_path / "test.csv")


def test_preview_names_files_columns_types_and_holes(competition):
    text = preview_data(competition.public_dir, 1000)
    assert "train.csv: 5 rows" in text and "test.csv: 3 rows" in text
    assert "- size float 1.5, 20% missing" in text
    assert "- colour text a" in text and "- key int 0" in text
    assert "readme.bin: 3 bytes" in text
    assert text.count("colour") == 1  # the test file's columns have been shown already


def test_preview_shows_a_column_without_a_value(tmp_path):
    (tmp_path / "train.csv").write_text("id,empty\n1,\n2,\n")
    assert preview_data(tmp_path, 1000).splitlines()[1:] == [
        "- id int 1", "- empty float, 100% missing"]


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


@pytest.mark.parametrize("reason, output, told", [
    ("exit code 3", "half way", "status: error\nexit code 3\nhalf way"),  # there is no traceback
    ("NameError: name 'x' is not defined", "line 1: x\nNameError: name 'x' is not defined",
     "status: error\nline 1: x\nNameError: name 'x' is not defined"),  # here it says it already
])
def test_what_ended_a_script_is_told_once(reason, output, told):
    failed = Trace("p", "toy/draft", "toy", "draft", code="x", status="error", reason=reason,
                   output=output)
    assert rollout.describe_outcome(failed) == told


PINNED = """You are a machine learning engineer. Write one Python script that reads the data in input/, \
holds out training rows, prints 'validation score: <float>' and writes submission.csv. Answer with \
one ```python block.

Predict the price.

# Data
train.csv: 5 rows
- key int 0
- size float 1.5, 20% missing
- colour text a
- price int 0
test.csv: 3 rows
"""


def test_prompts_of_the_tiny_preset_stay_as_they_were_taught(competition):
    """Byte for byte: a policy of two million parameters reads no other prompt."""
    (competition.public_dir / "readme.bin").unlink()

    def prompt(operator, parent=None):
        task = Task("x", "toy", operator, parent=parent)
        messages = task_messages(competition, task, tiny_policy.BUDGET)
        assert [m["role"] for m in messages] == ["user"]
        return messages[0]["content"]

    assert prompt("draft") == PINNED + "\n# Task\nWrite a first script."
    valid = Trace("p", "", "toy", "draft", code="print(1)\n", valid=True, validation_score=0.51234)
    assert prompt("improve", valid) == PINNED + (
        "\n# Script\n```python\nprint(1)\n```\n# Output\nvalidation score: 0.5123\n\n"
        "# Task\nWrite a better script.")
    failed = Trace("p", "", "toy", "draft", code="a", status="error", output="line 1: a\nNameError: a")
    assert prompt("debug", failed) == PINNED + (
        "\n# Script\n```python\na\n```\n# Output\nstatus: error\nline 1: a\nNameError: a\n\n"
        "# Task\nFix the script.")


@pytest.fixture
def zoo(tmp_path):
    """Public data of every kind that MLE-bench-Lite holds."""
    from PIL import Image

    def many(folder, names, write):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            write(tmp_path / folder / name)

    def sound(path):
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
            file.writeframes(bytes(2 * 32000))

    many("train", [f"{i}.jpg" for i in range(30)], Image.new("RGB", (64, 48)).save)
    many("scans", ["a.tif"], Image.new("L", (10, 20)).save)
    many("geometry", [f"{i}/atoms.xyz" for i in range(9)], lambda p: p.write_text("#1 atom\n"))
    many("wavs", [f"PC{i}.wav" for i in range(12)], sound)
    table = "id,text\n1,hello\n2,\n"
    with zipfile.ZipFile(tmp_path / "en_train.csv.zip", "w") as archive:
        archive.writestr("en_train.csv", table.replace("text", "before"))
    with zipfile.ZipFile(tmp_path / "test2.zip", "w") as archive:
        archive.writestr("test2/", "")
        archive.writestr("test2/a.aif", b"x"), archive.writestr("test2/b.aif", b"x")
    with tarfile.open(tmp_path / "more.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "scans/a.tif", "inner/a.tif")
    (tmp_path / "extra.csv.gz").write_bytes(gzip.compress(b"zipped\n1\n"))
    (tmp_path / "train.json").write_text(json.dumps([{"request_id": "t3", "votes": 4}] * 3))
    (tmp_path / "notes.jsonl").write_text('{"line": 1}\n{"line": 2}\n')
    (tmp_path / "labels.txt").write_text("rec_id,[labels]\n0,1,2\n")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "train.csv").write_text(table)
    (tmp_path / "description.md").write_text("in the prompt anyway")
    return tmp_path


def test_preview_shows_images_sounds_archives_and_records(zoo):
    lines = preview_data(zoo, 5000).splitlines()
    assert lines[:3] == ["train.csv: 2 rows", "- id int 1", "- text text hello, 50% missing"]
    text = "\n".join(lines)
    assert "description" not in text
    for pattern in (r"train/\*\.jpg: 30 files, [\d.]+ KB, e\.g\. train/0\.jpg, 64x48 pixels, RGB",
                    r"scans/a\.tif: \d+ bytes, 10x20 pixels, L",
                    r"geometry/\*/\*\.xyz: 9 files, 72 bytes, e\.g\. geometry/\d/atoms\.xyz, begins '#1",
                    r"wavs/\*\.wav: 12 files, \d+ KB, e\.g\. wavs/PC0\.wav, 2\.0 s of sound at 16000 Hz,"
                    r" 1 channel",
                    r"en_train\.csv\.zip: 2 rows\n- before text hello",
                    r"test2\.zip: \d+ bytes, 2 files inside, e\.g\. test2/a\.aif",
                    r"more\.tar\.gz: \d+ bytes, 1 files inside, e\.g\. inner/a\.tif",
                    r"extra\.csv\.gz: 1 rows\n- zipped int 1",
                    r"train\.json: 3 rows\n- request_id text t3\n- votes int 4",
                    r"notes\.jsonl: 2 rows\n- line int 1",
                    r"labels\.txt: 22 bytes, begins 'rec_id,\[labels\]'",
                    r"broken\.png: 12 bytes, not readable here \(UnidentifiedImageError\)"):
        assert re.search("^" + pattern, text, re.MULTILINE), (pattern, text)


def test_preview_of_many_files_keeps_its_budget(zoo):
    for i in range(40):
        (zoo / f"folder{i % 4}.{i}").mkdir()
        (zoo / f"note-{i}.txt").write_text("x" * 300)
        (zoo / f"table-{i}.csv").write_text(",".join(f"c{i}_{j}" for j in range(50)) + "\n")
    text = preview_data(zoo, 300)
    assert len(text) < 2 * 300 + 100 and "more columns" in text and "more files" in text
    assert text.startswith("train.csv: 2 rows\n- id int 1\n")


DESCRIPTION = """# Overview
## Description
{story}
## Prizes
### First
A car.
## Evaluation
The metric is AUC.
```
# id,y   (a comment, no heading)
```
### Submission File
id,y
## Timeline
Long ago.
# Data
## Files
train.csv
## Citation
Somebody.
"""


def test_a_long_description_is_cut_where_it_matters_least():
    text = DESCRIPTION.format(story="It was a dark night. " * 10)
    assert cut_description(text, len(text)) == text.strip()
    shorter = cut_description(text, len(text) - 60)
    assert ("It was a dark night. " * 10).strip() in shorter
    for gone in ("Prizes", "First", "A car", "Timeline", "Long ago", "Citation", "Somebody"):
        assert gone not in shorter
    short = cut_description(text, 260)
    assert len(short) <= 260 and " ... " in short  # of the story
    needed = "## Evaluation\nThe metric is AUC.\n```\n# id,y   (a comment, no heading)\n```\n" \
             "### Submission File\nid,y\n# Data\n## Files\ntrain.csv"
    assert needed in short
    assert len(cut_description("word " * 1000, 100)) <= 102  # no headings at all


def test_design_is_the_plan_else_what_is_imported():
    assert design_of("<think>no</think> Trees,\n then\nmore.\n```python\nx\n```") == "Trees, then more."
    code = "```python\nimport os\nfrom a import B, C\nfrom d import E\n```"
    assert design_of(code) == "uses B, C, E"
    assert design_of("```python\n1\n```") == "not described"


def test_memory_is_what_worked_with_design_result_and_validation_score(competition):
    traces = [Trace(str(i), "", "toy", "draft", valid=i != 1, validation_score=i / 10, score=0.98765,
                    human_rank=0.87654, medal="gold", output=f"fold\n{i}") for i in range(4)]
    designs = ["forest", "broken", "ridge", "boosting"]
    memory = recall(traces, designs, 1000)
    assert memory.split("\n\n") == [
        f"Design: {designs[i]}\nResult: fold {i}\nValidation score: {i / 10:g}" for i in (0, 2, 3)]
    assert recall(traces, designs, 120).count("Design") == 2  # the latest
    assert "ridge" in recall(traces, designs, 120)
    budget = PromptBudget(memory=1000)
    text = task_messages(competition, Task("x", "toy", "draft"), budget, memory=memory)[0]["content"]
    assert "plan of 3 to 5 sentences" in text and "# Memory\nWhat has worked" in text
    assert not any(secret in text for secret in ("0.98", "0.87", "gold"))
    plain = task_messages(competition, Task("x", "toy", "draft"), PromptBudget())[0]["content"]
    assert "plan of" not in plain and "# Memory" not in plain


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
    parent = min((t for t in first if t.valid), key=lambda t: t.base_reward)
    group = roll(Task(f"toy/improve/{parent.id}", "toy", "improve", 1, parent)).group
    assert any(t.base_reward > parent.base_reward for t in group.traces)
    for trace in group.traces:
        if trace.valid:
            gain = max(trace.base_reward - parent.base_reward, 0)  # claims are true here
            expected = (0.1 + gain) * (trace.code_key != parent.code_key)
            assert trace.reward == pytest.approx(expected)


def test_a_crossover_pays_for_beating_the_better_parent_and_not_for_copying_either():
    group = roll(Task.root("toy")).group
    better, other = sorted((t for t in group.traces if t.valid), key=lambda t: -t.base_reward)[:2]
    task = Task("toy/crossover/x", "toy", "crossover", 1, better, second=other)
    traces = roll(task).group.traces
    for trace in traces:
        gain = max(trace.base_reward - better.base_reward, 0)
        assert trace.reward == pytest.approx(0.1 + gain if trace.valid else 0)
    assert any(t.base_reward > better.base_reward for t in traces)
    for copied in (better, other):
        again = rollout.execute(dataclasses.replace(copied), task,
                                SimpleNamespace(id="toy", lower_is_better=False),
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
    # Repairs are counted in a row: an improvement further down the tree may fail and be mended too.
    chain = [trace("g", True, 1.0), trace("a"), trace("b", operator="improve", parent="g", depth=7)]
    chain += [trace(f"d{i}", operator="debug", parent=f"d{i - 1}" if i else "b", depth=8 + i)
              for i in range(3)]
    short = AgentConfig(drafts=1, debug_probability=1.0, debug_depth=2)
    assert {choose_task(competition, chain[:-1], short, rng).parent.id for _ in range(40)} == {
        "a", "d1"}
    assert {choose_task(competition, chain, short, rng).parent.id for _ in range(40)} == {"a"}
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
                      agent, tmp_path / str(seed)) for seed in range(3)]
    for run in runs:
        assert len(run.traces) == 6
        if run.chosen is not None:
            best = min(t.validation_score for t in run.traces if t.valid)
            assert run.traces[run.chosen].validation_score == best
    write_report(tmp_path / "out" / "other.json", runs[:1], agent, "another model")
    assert len((tmp_path / "out" / "other-submissions.jsonl").read_text().splitlines()) == 1
    report = write_report(tmp_path / "out" / "report.json", runs, agent, "model", seeds=3)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    lines = (tmp_path / "out" / "submissions.jsonl").read_text().splitlines()
    assert {json.loads(line)["competition_id"] for line in lines} == {"toy"}
    for run, line in zip(runs, lines):
        file = json.loads(line)["submission_path"]
        code = run.traces[run.chosen].code if run.chosen is not None else None
        assert (Path(file).read_text() if file else None) == code
        assert len(list(run.folder.glob("*.csv"))) == bool(file)  # only the best is kept
    assert report["seeds"] == 3 and report["hardware"]["cores"] >= 1
    assert all(row["hours"] > 0 for row in report["runs"])
    values = [row["human_rank"] for row in report["runs"]]
    assert report["totals"]["human_rank"]["mean"] == pytest.approx(np.mean(values))
    assert report["totals"]["human_rank"]["sem"] == pytest.approx(
        np.std(values, ddof=1) / np.sqrt(3))


class Parrot(FakeEngine):
    """Its answers, in order; then the last one for ever."""

    def __init__(self, *texts):
        super().__init__()
        self.texts, self.asked = list(texts), 0

    def generate(self, prompt_ids, n, max_tokens, temperature):
        self.asked += 1
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        return [completion(text)], 0


def test_an_answer_that_repeats_a_script_is_asked_for_again(competition, tmp_path):
    a, b = "```python\nquality = 0.1\n```", "```python\nquality = 0.2\n```"
    a_again = "```python\nquality  =  0.1  # the same\n```"
    engine = Parrot(a, a_again, a, b, "no script", a)
    run = run_agent(competition, 0, engine, FakeSandbox(), FakePrompter(["toy"]), RolloutConfig(),
                    AgentConfig(steps=4, retries=2), tmp_path)
    # a; then a twice more and b; an answer without a script counts; a, a and a, the last one taken
    assert [t.code.strip() for t in run.traces] == ["quality = 0.1", "quality = 0.2", "",
                                                    "quality = 0.1"]
    assert engine.asked == 1 + 3 + 1 + 3


def test_never_valid_counts_as_all_steps(competition):
    run = AgentRun(competition, 0, [trace("a"), trace("b")])
    row = run.row()
    assert row["steps_to_first_valid"] is None and not row["valid"]
    totals = report_totals([row], 2)
    assert totals["extra_steps_to_first_valid"] == {"mean": 2.0, "sem": None}
    run = AgentRun(competition, 0, [trace("a", True, 1.0)])
    run.traces[0].score = 0.5
    totals = report_totals([run.row()], 2)
    assert totals["extra_steps_to_first_valid"]["mean"] == 0
    assert totals["above_median_rate"]["mean"] == 1


def test_the_rank_by_step_is_that_of_what_would_have_been_handed_in(competition):
    # Smaller is better. The third is chosen although the grader likes it less; a failure, or a
    # worse validation score, changes nothing.
    run = AgentRun(competition, 0, [trace("a"), trace("b", True, 0.6), trace("c", True, 0.3),
                                    trace("d"), trace("e", True, 0.4)])
    for step, rank in zip(run.traces, (0.0, 0.7, 0.4, 0.0, 0.9)):
        step.human_rank, step.score = rank, rank
        step.code, step.code_key = "print()", step.id
    run.traces[3].code_key = run.traces[2].code_key
    row = run.row()
    assert row["human_rank_by_step"] == [0.0, 0.7, 0.4, 0.4, 0.4]
    assert (row["different_scripts"], row["improvements"]) == (4, 1)  # the first valid is none


class Notebook(FakePrompter):
    """Remembers what it was asked for."""

    def __init__(self):
        super().__init__(["toy"], PromptBudget(memory=500))
        self.asked = []

    def __call__(self, task, memory=""):
        self.asked.append((task.operator, memory))
        return super().__call__(task, memory)


def test_drafts_and_improvements_see_the_memory_and_repairs_do_not(competition, tmp_path):
    prompter = Notebook()
    agent = AgentConfig(steps=12, drafts=3, debug_probability=0.5)
    run = run_agent(competition, 5, FakeEngine(), FakeSandbox(), prompter, RolloutConfig(), agent,
                    tmp_path)
    assert {operator for operator, _ in prompter.asked} == {"draft", "debug", "improve"}
    for step, (operator, memory) in enumerate(prompter.asked):
        worked = [t for t in run.traces[:step] if t.valid]
        assert memory.count("Design") == (0 if operator == "debug" else len(worked))
        assert bool(memory) == (operator != "debug" and bool(worked))


def test_a_prompt_that_is_too_long_loses_its_memory_first(competition, tmp_path):
    class Long(Notebook):
        def __call__(self, task, memory=""):
            self.asked.append((task.operator, memory))
            return [65] * (9_900 if memory else 100)

    prompter = Long()
    engine = FakeEngine()
    engine.generate = lambda ids, *rest: FakeEngine.generate(engine, [ord("a")] * 3, *rest)
    run = run_agent(competition, 0, engine, FakeSandbox(), prompter,
                    RolloutConfig(max_response_tokens=1000), AgentConfig(steps=6), tmp_path)
    tried = [i for i, (_, memory) in enumerate(prompter.asked) if memory]
    assert tried and all(prompter.asked[i + 1] == (prompter.asked[i][0], "") for i in tried)
    assert len(run.traces) == 6
    with pytest.raises(CompetitionError, match="toy: a prompt of 100 tokens.*--max-model-len"):
        run_agent(competition, 1, engine, FakeSandbox(), prompter,
                  RolloutConfig(max_response_tokens=9_950), AgentConfig(steps=6), tmp_path / "1")


def test_a_failure_too_long_to_be_shown_is_chosen_once(competition, tmp_path):
    class Short(FakePrompter):
        def __call__(self, task, memory=""):
            return [65] * (9_900 if task.operator == "debug" else 100)

    fails = "```python\nquality = -1\n```"
    works = [f"```python\nquality = 0.{i}\n```" for i in range(1, 6)]
    run = run_agent(competition, 0, Parrot(fails, *works), FakeSandbox(), Short(["toy"]),
                    RolloutConfig(max_response_tokens=1000),
                    AgentConfig(steps=6, drafts=1, debug_probability=1.0), tmp_path)
    assert [t.valid for t in run.traces] == [False] + 5 * [True]
    assert [t.operator for t in run.traces] == ["draft", "draft"] + 4 * ["improve"]


def test_a_run_ends_when_its_hours_are_over(competition, tmp_path):
    agent = AgentConfig(steps=50, hours=0.3 / 3600)
    limits = []

    class Slow(FakeSandbox):
        def run(self, competition, code, timeout=None):
            limits.append(timeout)
            time.sleep(0.1)
            return super().run(competition, code, timeout)

    class Thinking(FakeEngine):
        def generate(self, *rest):
            time.sleep(0.05)
            return super().generate(*rest)

    run = run_agent(competition, 0, Thinking(), Slow(), FakePrompter(["toy"]), RolloutConfig(),
                    agent, tmp_path)
    assert len(run.traces) < 10 and run.hours >= agent.hours
    assert limits[0] <= 0.25 and limits == sorted(limits, reverse=True)  # a script may not outlive it
    again = run_agent(competition, 0, None, None, FakePrompter(["toy"]), RolloutConfig(), agent,
                      tmp_path)  # over: nothing more is asked for
    assert again.row() == run.row()


def test_scripts_that_are_refused_end_the_evaluation(competition, tmp_path):
    class Refusing:
        def run(self, competition, code, timeout=None):
            return Execution("refused", reason="the answers of 'toy' lie in /usr/lib")

    with pytest.raises(CompetitionError, match="toy: the answers of"):
        evaluate([competition], range(2), FakeEngine(), Refusing(), FakePrompter(["toy"]),
                 RolloutConfig(), AgentConfig(), 2, tmp_path)
    assert not any(log.read_bytes() for log in tmp_path.glob("*/steps.jsonl"))  # no step is counted


EVALUATION = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from fakes import FakeEngine, FakePrompter, FakeSandbox
from rollout import AgentConfig, RolloutConfig, evaluate, write_report
names = ["ash", "beech", "cedar"]
competitions = [SimpleNamespace(id=n, median=0.3, lower_is_better=n == "beech", description=n,
                                leaderboard=np.zeros(1), answers=Path("/dev/null")) for n in names]
agent = AgentConfig(steps=12)
out = Path({out!r})
runs = evaluate(competitions, range(3), FakeEngine({delay}), FakeSandbox(), FakePrompter(names),
                RolloutConfig(), agent, 4, out / "runs")
write_report(out / "report.json", runs, agent, "fake", seeds=3)
"""


def finished(out: Path) -> int:
    return sum(p.read_bytes().count(b"\n") for p in out.glob("runs/*/steps.jsonl"))


def outcome(out: Path) -> tuple:
    """What must not depend on interruptions: the report but for the clock, and the submissions."""
    report = json.loads((out / "report.json").read_text())
    for row in report["runs"]:
        assert row.pop("hours") > 0
    del report["totals"]["hours_per_competition"]
    lines = map(json.loads, (out / "submissions.jsonl").read_text().splitlines())
    files = [(line["competition_id"], line["submission_path"] and
              Path(line["submission_path"]).read_text()) for line in lines]
    return report, files


def test_an_evaluation_that_is_killed_goes_on_and_gives_the_same_report(tmp_path):
    def start(out, delay):
        folders = [str(Path(rollout.__file__).parent), str(Path(__file__).parent)]
        code = EVALUATION.format(path=folders, out=str(out), delay=delay)
        return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole, 1e-9).wait(600) == 0
    for mark in (20, 60):  # killed twice, in the middle of steps
        process = start(cut, 0.2)
        while finished(cut) < mark and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert mark <= finished(cut) < 108 and not (cut / "report.json").exists()
    # A kill may also cut a line, or come between a submission's file and its line.
    log = next(cut.glob("runs/*/steps.jsonl"))
    log.write_bytes(log.read_bytes()[:-7])
    (log.parent / "step_11.csv").write_text("half a fi")
    before = {p: p.read_text().splitlines()[:-1] for p in cut.glob("runs/*/steps.jsonl")}
    assert start(cut, 1e-9).wait(600) == 0
    assert outcome(cut) == outcome(whole)
    for path, lines in before.items():  # what was done was not done again
        assert path.read_text().splitlines()[:len(lines)] == lines


def test_what_an_evaluation_leaves_behind_is_removed_when_it_is_killed(tmp_path):
    """The engine is a process that does not notice the end of its owner."""
    scratch = tmp_path / "scratch"
    (scratch / "vllm-x").mkdir(parents=True)
    code = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(Path(rollout.__file__).parent)!r})
import rollout
rollout.start_guard([{str(scratch)!r}])
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
engine = subprocess.Popen(sleep, env={{"VLLM_RPC_BASE_PATH": {str(scratch / "vllm-x")!r}}})
other = subprocess.Popen(sleep, env={{"VLLM_RPC_BASE_PATH": {str(tmp_path / "vllm-y")!r}}})
print(engine.pid, other.pid, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    engine, other = (psutil.Process(int(pid)) for pid in owner.stdout.readline().split())
    try:
        assert engine.is_running() and scratch.exists()
        owner.kill()
        owner.wait()
        end = time.monotonic() + 60
        while scratch.exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not scratch.exists()
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
        assert other.is_running()
    finally:
        other.kill()


def test_a_record_is_not_mixed_with_other_settings(tmp_path):
    (tmp_path / "runs").mkdir()
    check_settings(tmp_path / "runs", {"steps": 20, "weights": [("a", 1, 2)]})
    check_settings(tmp_path / "runs", {"steps": 20, "weights": [("a", 1, 2)]})
    with pytest.raises(CompetitionError, match="with steps 20, not 30: give another --out"):
        check_settings(tmp_path / "runs", {"steps": 30, "weights": [("a", 1, 2)]})


def test_a_run_that_was_moved_is_evaluated_on_and_other_weights_are_not(tmp_path):
    def settings(home, *more):
        return rollout.settings_of(rollout.parse_arguments(
            ["--model", str(home / "policy"), "--competitions", "lite", *more]))

    home = tmp_path / "here"
    (home / "policy").mkdir(parents=True)
    (home / "runs").mkdir()
    weights = home / "policy/model.safetensors"
    weights.write_text("a")
    check_settings(home / "runs", settings(home))
    home = home.rename(tmp_path / "there")
    check_settings(home / "runs", settings(home, "--seeds", "20", "--max-num-seqs", "7"))
    (home / "policy/model.safetensors").write_text("b c")
    with pytest.raises(CompetitionError, match="with weights .* give another --out"):
        check_settings(home / "runs", settings(home))


def test_standard_error_over_seeds_has_ddof_1():
    def row(seed, medal):
        return {"seed": seed, "valid": True, "medal": medal, "above_median": False, "human_rank": 0.5,
                "first_draft_valid": True, "steps_to_first_valid": 1, "hours": seed,
                "hours_per_execution": 0.5, "different_scripts": 4, "improvements": 1}

    rows = [row(0, "gold"), row(0, "none"), row(1, "none"), row(1, "none"), row(2, "gold"),
            row(2, "bronze")]  # 1/2, 0, 1 of the competitions have a medal
    totals = report_totals(rows, 5)
    assert totals["any_medal_rate"]["mean"] == pytest.approx(0.5)
    assert totals["any_medal_rate"]["sem"] == pytest.approx(0.5 / 3 ** 0.5)
    assert totals["hours_per_competition"]["mean"] == pytest.approx(1.0)
    assert totals["valid_rate"] == {"mean": 1.0, "sem": 0.0}


@pytest.mark.parametrize("lower", [False, True])
def test_an_improve_step_is_paid_for_what_an_agent_gains_by_its_claim(lower):
    competition = SimpleNamespace(id="toy", lower_is_better=lower)
    sign = -1.0 if lower else 1.0
    parent = Trace("p", "", "toy", "draft", code="p", code_key="p", valid=True, claim=0.5,
                   base_reward=0.55)
    task = Task("toy/improve/p", "toy", "improve", depth=1, parent=parent)

    def improve(rank, printed, valid=True, task=task):
        run = Execution("ok" if valid else "invalid", valid=valid, human_rank=rank,
                        validation_score=None if printed is None else sign * printed)
        sandbox = SimpleNamespace(run=lambda *_, **__: run)
        return rollout.execute(Trace("a", "", "toy", "improve", code="x", code_key="x"), task,
                               competition, sandbox, RolloutConfig())

    assert improve(0.7, 0.6).claim == 0.6 and improve(0.7, None).claim == -sys.float_info.max
    assert improve(0.7, 0.6).reward == pytest.approx(0.1 + 0.73 - 0.55)
    assert improve(0.7, 0.5).reward == 0.1  # as good as the parent, as far as the agent knows
    assert improve(0.2, 0.4).reward == 0.1  # worse, and known to be
    assert improve(0.45, 0.6).reward == pytest.approx(0.1 + 0.505 - 0.55)  # worse, and taken
    assert improve(0.2, 0.6).reward == 0.0
    assert improve(0.9, None).reward == 0.1  # silence is no way out
    refused = improve(0.0, 0.9, valid=False)
    assert refused.claim is None and refused.reward == refused.base_reward == 0.05
    parent.claim = -sys.float_info.max  # a silent parent gives way to all that speak
    assert improve(0.7, 0.1).reward == pytest.approx(0.1 + 0.73 - 0.55)
    assert improve(0.7, None).reward == 0.1
    # Of two parents an agent holds the one that claims more, though it is the worse one.
    parent.claim = 0.5
    other = dataclasses.replace(parent, code_key="q", base_reward=0.3, claim=0.65)
    crossover = dataclasses.replace(task, operator="crossover", second=other)
    assert improve(0.7, 0.6, task=crossover).reward == 0.1
    assert improve(0.7, 0.7, task=crossover).reward == pytest.approx(0.1 + 0.73 - 0.3)


# -- flags


def test_settings_of_a_yaml_file_and_its_mistakes(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-6\nrun-dir: x y\nbuffer: false\nsteps: 3\n")
    known = ["learning_rate", "run_dir", "buffer", "steps"]
    words = ["--learning-rate=1e-6", "--run-dir=x y", "--no-buffer", "--steps=3"]
    assert read_settings(path, known) == words
    for text, message in (("stepz: 3\n", "no flag --stepz"), ("steps: [1]\n", "steps must be one"),
                          ("- a\n", "mapping"), ("a: [\n", "c.yaml"), ("steps:\n", "one value")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read_settings(path, known)
        assert "\n" not in str(error.value) and "c.yaml" in str(error.value)
    with pytest.raises(ValueError, match="nowhere.yaml"):
        read_settings(tmp_path / "nowhere.yaml", known)


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 7\nseeds: 5\ncompetitions: lite\n")
    args = rollout.parse_arguments(["--model", "m", "--seeds", "4", "--config", str(path)])
    assert (args.steps, args.seeds, args.competitions, args.drafts) == (7, 4, "lite", 3)


def test_competitions_of_the_training_run_are_refused(tmp_path, competition):
    (tmp_path / "run/policy").mkdir(parents=True)
    check_overlap(tmp_path / "run/policy", [competition])  # nothing is known
    (tmp_path / "run/splits.json").write_text(json.dumps({"train": ["other"], "heldout": ["toy"]}))
    check_overlap(tmp_path / "run/policy", [competition])
    (tmp_path / "run/splits.json").write_text(json.dumps({"train": ["toy"], "heldout": []}))
    with pytest.raises(CompetitionError, match="toy was a training competition.*--allow-overlap"):
        check_overlap(tmp_path / "run/policy", [competition])


@pytest.mark.parametrize("arguments, message", [
    (["--steps", "0"], "--steps must be at least 1"),
    (["--config", "/nowhere.yaml"], "--config /nowhere.yaml"),
    ([], "--model m: no config.json there"),
    (["--steps", "x"], "--steps: invalid int"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--hours", "-1"], "--hours must be in (0, 1e6], not -1.0"),
    (["--timeout", "nan"], "--timeout must be in (0, 1e6], not nan"),
    (["--timeout", "1e10"], "--timeout must be in (0, 1e6]"),
    (["--kv-cache-gib", "inf"], "--kv-cache-gib must be finite, and not negative, not inf"),
    (["--debug-probability", "7"], "--debug-probability must be in [0, 1]"),
    (["--memory-chars", "-5"], "--memory-chars must be finite, and not negative"),
    (["--max-model-len", "256"], "--max-response-tokens must be smaller"),
])
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys):
    assert rollout.main(["--model", "m", "--competitions", "lite", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("text, message", [
    ("steps: x", "--steps: invalid int value: 'x'"), ("steps: true", "--steps: expected one"),
    ("unsafe: maybe", "--unsafe/--no-unsafe"), ("dtype: float16", "--dtype: invalid choice"),
    ("config: other.yaml", "there is no flag --config"),
])
def test_mistakes_in_the_file_name_the_file(text, message, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    arguments = ["--model=m", "--competitions=lite", f"--config={tmp_path / 'c.yaml'}"]
    assert rollout.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'c.yaml'}: " in error and message in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "policy"
    tokenizer = tiny_policy.make_tokenizer(["some text"], 300)
    tiny_policy.make_model(tokenizer, hidden=64, layers=1, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name, text, message", [
    ("config.json", None, "no config.json there"),
    ("config.json", "{", "its config.json cannot be used"),
    ("config.json", '{"model_type": "nonesuch"}', "its config.json cannot be used"),
    ("tokenizer.json", "{", "its tokenizer, or its chat template, cannot be used"),
    ("chat_template.jinja", None, "its tokenizer, or its chat template, cannot be used"),
    ("model.safetensors", None, "no *.safetensors there"),
    ("model.safetensors", "cut", "its weights cannot be used"),
    ("", "", "--max-model-len 4096: "),
])
def test_a_model_of_no_use_is_refused_before_anything_starts(
        name, text, message, small_model, tmp_path, competition, monkeypatch, capsys):
    model = tmp_path / "policy"
    shutil.copytree(small_model, model)
    if name:
        (model / name).unlink()
        if text is not None:
            (model / name).write_text(text)
    arguments = ["--model", str(model), "--competitions", "mine",
                 "--max-model-len", "1024" if name else "4096"]
    monkeypatch.setattr(rollout, "load_competitions", lambda *_: [competition])
    monkeypatch.setattr(rollout, "Sandbox", lambda **_: pytest.fail("started"))
    there = set(tmp_path.iterdir())
    assert rollout.main([*arguments, "--out", str(tmp_path / "report.json")]) == 2
    assert train.main([*arguments, "--preset", "tiny", "--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(message in line and f"--model {model}" in line for line in said)
    assert set(tmp_path.iterdir()) == there  # neither run nor report


def test_broken_records_are_one_line_and_status_2(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollout, "load_competitions", lambda *_: [])
    shutil.copytree(small_model, tmp_path / "policy")
    (tmp_path / "policy/tokenizer.json").unlink()  # as in a run directory, given for its policy/
    (tmp_path / "policy/tokenizer_config.json").unlink()

    def said(out="report.json"):
        arguments = ["--model", str(tmp_path / "policy"), "--competitions", "lite", "--out",
                     str(tmp_path / out)]
        assert rollout.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "policy: no tokenizer.json there" in said()
    shutil.copytree(small_model, tmp_path / "policy", dirs_exist_ok=True)
    (tmp_path / "file").touch()
    assert "--out" in said("file/report.json")
    assert "--out" in said("x" * 300)
    assert "is a directory" in said("policy")
    (tmp_path / "report-runs").mkdir()
    with rollout.lock_record(tmp_path / "report-runs"):
        assert "another program is writing to it" in said()
    for text in ("{", "[1]"):
        (tmp_path / "report-runs/settings.json").write_text(text)
        assert "settings.json cannot be read" in said()
        (tmp_path / "splits.json").write_text(text)
        assert "splits.json cannot be read" in said()
        (tmp_path / "splits.json").unlink()


@pytest.mark.parametrize("where, error, status, message", [
    ("Engine", KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    ("Sandbox", KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    ("evaluate", rollout.EngineDead("the engine has died"), 1, "died; the same command goes on"),
    ("evaluate", OSError(28, "No space left on device", "steps.jsonl"), 2, "steps.jsonl"),
    ("evaluate", CompetitionError("toy: no room"), 2, "toy: no room"),
    ("evaluate", KeyError("a bug"), 1, "Traceback"),
    ("write_report", PermissionError(13, "Permission denied", "report.json"), 2, "report.json"),
])
def test_no_error_leaves_main(where, error, status, message, tmp_path, monkeypatch, capsys):
    """Its caller ends the process at once; an exception would wait for the agents' threads."""
    def fail(*_, **__):
        raise error

    class Ready(FakeSandbox):
        isolation = "none"
        __enter__ = lambda self: self
        __exit__ = lambda self, *_: None

    for name, fake in {
            "load_competitions": lambda *_: [], "Sandbox": lambda **_: Ready(),
            "start_guard": lambda folders: os.rmdir(*folders), "make_prompter": lambda *_: None,
            "evaluate": lambda *_: [], "Engine": lambda *_, **__: SimpleNamespace(
                close=lambda: None), where: fail}.items():
        monkeypatch.setattr(rollout, name, fake)
    monkeypatch.setattr(rollout, "check_model", lambda *_: None)
    arguments = ["--model", str(tmp_path), "--competitions", "lite", "--out",
                 str(tmp_path / "report.json")]
    assert rollout.main(arguments) == status
    said = capsys.readouterr().err
    assert message in said
    assert ("Traceback" in said) == (message == "Traceback")


def test_an_evaluation_that_goes_on_has_an_engine_seed_of_its_own(tmp_path, monkeypatch, capsys):
    """Every start that follows a recorded step samples with other random numbers."""
    seeds = []

    class Ready(FakeSandbox):
        isolation = "none"
        __enter__ = lambda self: self
        __exit__ = lambda self, *_: None

    def engine(_, config, scratch):
        seeds.append(config.seed)
        os.rmdir(scratch)
        return SimpleNamespace(close=lambda: None)

    def cut(*_):  # after two more steps of an agent
        (tmp_path / "report-runs/toy-0").mkdir(exist_ok=True)
        with open(tmp_path / "report-runs/toy-0/steps.jsonl", "a") as log:
            log.write("{}\n{}\n")
        raise rollout.EngineDead("cut off")

    for name, fake in {"load_competitions": lambda *_: [], "Sandbox": lambda **_: Ready(),
                       "start_guard": lambda _: None, "make_prompter": lambda *_: None,
                       "Engine": engine, "evaluate": cut}.items():
        monkeypatch.setattr(rollout, name, fake)
    monkeypatch.setattr(rollout, "check_model", lambda *_: None)
    for _ in range(3):
        assert rollout.main(["--model", str(tmp_path), "--competitions", "lite", "--out",
                             str(tmp_path / "report.json")]) == 1
    assert seeds == [0, 2, 4]


@pytest.mark.parametrize("line", ["x", "[1]", '{"design": "a"}', '{"design": "a", "hours": 1}'])
def test_a_line_that_is_no_step_names_the_file(line, competition, tmp_path):
    (tmp_path / "steps.jsonl").write_text(line + "\n")
    with pytest.raises(CompetitionError, match="steps.jsonl, line 1 is no step.*: remove ") as error:
        AgentRun.load(competition, 0, tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_record_is_refused_before_anything_starts(competition, tmp_path, monkeypatch,
                                                            capsys):
    for name, fake in {"check_model": lambda *_: None, "make_prompter": lambda *_: None,
                       "load_competitions": lambda *_: [competition],
                       "Sandbox": lambda **_: pytest.fail("started")}.items():
        monkeypatch.setattr(rollout, name, fake)
    (tmp_path / "report-runs/toy-1").mkdir(parents=True)
    (tmp_path / "report-runs/toy-1/steps.jsonl").write_text("x\n")
    assert rollout.main(["--model", str(tmp_path), "--competitions", "lite", "--seeds", "2",
                         "--out", str(tmp_path / "report.json")]) == 2
    assert "toy-1/steps.jsonl, line 1 is no step" in capsys.readouterr().err


def test_a_record_is_of_the_data_that_it_was_made_with(competition, tmp_path):
    AgentRun.load(competition, 0, tmp_path)
    AgentRun.load(competition, 0, tmp_path)
    for digest in (b"other", b"\xff\xfe"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/data.sha256").write_bytes(digest)
        with pytest.raises(CompetitionError, match="toy has other data now: remove"):
            AgentRun.load(competition, 0, tmp_path / "other")
    for other in ({"description": "other"}, {"leaderboard": competition.leaderboard + 1},
                  {"answers": tmp_path / "train.csv"}):
        with pytest.raises(CompetitionError, match="toy has other data now: remove"):
            AgentRun.load(SimpleNamespace(**vars(competition) | other), 0, tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda rows: rows[1:], "it is toy/0/1"), (lambda rows: rows[:1] + rows, "it is toy/0/0"),
    (lambda rows: [rows[0] | {"hours": math.nan}], "nan is no number"),
    (lambda rows: [rows[0] | {"score": "0.7"}], "score: '0.7' is no float"),
    (lambda rows: [rows[0] | {"output": None}], "output: None is no str"),
    (lambda rows: rows, "step_1.csv is gone")])
def test_a_record_that_is_not_whole_is_refused(change, words, competition, tmp_path):
    run = AgentRun.load(competition, 0, tmp_path)
    run.add(Trace("toy/0/0", "", "toy", "draft", code="x", code_key="x", valid=True, score=0.7,
                  validation_score=0.7), "", 0.1, b"id,target")
    run.add(Trace("toy/0/1", "", "toy", "draft", code="y", code_key="y"), "", 0.1, None)
    assert len(AgentRun.load(competition, 0, tmp_path).traces) == 2
    log = tmp_path / "steps.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    (tmp_path / "step_1.csv").unlink()
    with pytest.raises(CompetitionError, match=words):
        AgentRun.load(competition, 0, tmp_path)


def test_each_slot_has_a_gpu_of_its_own_and_no_isolation_is_status_3(tmp_path, monkeypatch, capsys):
    given = {}

    class Stopped:
        problem = "no Landlock"

        def __init__(self, **options):
            given.update(options)

        __enter__ = lambda self: self
        __exit__ = lambda self, *_: None

    monkeypatch.setattr(rollout, "Sandbox", Stopped)
    monkeypatch.setattr(rollout, "make_prompter", lambda *_: None)
    monkeypatch.setattr(rollout, "load_competitions", lambda *_: [])
    monkeypatch.setattr(rollout, "check_model", lambda *_: None)
    arguments = ["--model", str(tmp_path), "--competitions", "lite", "--slots", "3",
                 "--sandbox-gpus", "4,5", "--out", str(tmp_path / "report.json")]
    assert rollout.main(arguments) == 3
    assert given["gpus"] == ["4", "5", "4"] and given["slots"] == 3
    assert "no Landlock" in capsys.readouterr().err
    assert rollout.main([*arguments, "--steps", "7"]) == 2  # the record is one of 20 steps
    assert "steps 20, not 7" in capsys.readouterr().err


@pytest.mark.parametrize("file, known", [
    ("ace30b_lite.yaml", {f for f in train.Config.__dataclass_fields__}),
    ("lite_evaluation.yaml", set(vars(rollout.make_parser().parse_args(
        ["--model=", "--competitions="])))),
])
def test_every_value_of_the_papers_setting_says_whose_it_is(file, known):
    import yaml

    path = Path(rollout.__file__).parent / "examples" / file
    values = yaml.safe_load(path.read_text())
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(values)
    for line in lines:
        assert re.search(r"# \[(paper|ours)\]", line), line
    # What the command line or the machine decides stays out; nothing else does.
    left_out = {"run_dir", "learner_threads", "engine_threads", "config", "model", "data_dir",
                "allow_overlap", "unsafe", "cpu_seconds"}
    assert known - left_out <= set(values) <= known


def test_the_papers_setting_is_what_the_paper_says():
    path = str(Path(rollout.__file__).parent / "examples/ace30b_lite.yaml")
    assert train.parse_config(["--config", path])[0] == train.parse_config(["--preset", "ace30b"])[0]
    config = train.parse_config(["--config", path, "--seed", "3"])[0]
    train.validate(config, 32)
    assert (config.model, config.steps, config.heldout) == ("Qwen/Qwen3-30B-A3B", 400, "lite")
    assert (config.preset, config.seed, config.learning_rate) == ("ace30b", 3, 1e-6)
    listed = (Path(path).parent / "mlebench_medium.txt").read_text().splitlines()
    ids = {line for line in listed if not line.startswith("#")}
    from sandbox import LITE

    assert len(ids) == 36 and not ids & set(LITE)
