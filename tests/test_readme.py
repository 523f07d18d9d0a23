"""README.md: its snippets run, its links lead somewhere, its metrics and flags exist.

Run: pytest tests/test_readme.py
"""

import dataclasses
import importlib
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeLearner, fake_modules
from test_faults import World
from test_learner import make_config, make_models, make_sequences

import train
from buffer import OPERATORS
from learner import Learner

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
NEEDS = {"rollout": ("buffer", "sandbox"), "learner": ("grpo",)}


@pytest.fixture(scope="module")
def competition(tmp_path_factory):
    import mini_mlebench as bench

    folder = tmp_path_factory.mktemp("competitions")
    spec = bench.SPECS[0]
    bench.write_competition(spec, folder, 0, bench.load_references(0)[spec.id])
    return folder / spec.id


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, competition, tmp_path):
    """Each as a file of its own, beside nothing but the modules it imports."""
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[number])
    for name in re.findall(r"^from (\w+) import", SNIPPETS[number], re.MULTILINE):
        for part in (name, *NEEDS.get(name, ())):
            if (ROOT / f"{part}.py").exists():
                (tmp_path / f"{part}.py").write_text((ROOT / f"{part}.py").read_text())
    run = subprocess.run([sys.executable, str(script), str(competition)], cwd=tmp_path,
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    if "Sandbox(" in SNIPPETS[number]:
        assert "PermissionError" in run.stdout
    if "admitted" in SNIPPETS[number]:
        assert "improve" in run.stdout and "debug" in run.stdout


def test_every_part_has_a_snippet():
    imported = set(re.findall(r"^from (\w+) import", "\n".join(SNIPPETS), re.MULTILINE))
    assert {"grpo", "buffer", "sampler", "sandbox", "rollout", "learner"} <= imported


def test_files_that_are_named_exist():
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`((?:tests|examples|docs)/[\w./]+\.\w+)`", TEXT):
        assert (ROOT / name).exists(), name


def test_functions_that_are_named_exist():
    named = re.findall(r"`(grpo|buffer|sampler|sandbox|rollout|learner|train)\.([\w.]+)", TEXT)
    assert ("buffer", "EvolvingBuffer.add") in named
    for module, path in named:
        if path != "py":
            operator.attrgetter(path)(importlib.import_module(module))


def test_flags_that_are_named_exist():
    known = {f.name.replace("_", "-") for f in dataclasses.fields(train.Config)}
    others = {"resume", "dry-run", "help", "nproc_per_node", "nnodes", "node-rank",
              "master-addr", "master-port", "max-restarts",  # of torchrun
              "deps"}  # --no-deps, of pip
    files = (*ROOT.glob("*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("tests/bench_*.py"))
    sources = "".join(p.read_text() for p in files)
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", TEXT)):
        assert flag.removeprefix("no-") in known | others or f'"--{flag}"' in sources, f"--{flag}"


def test_commands_over_several_lines_can_be_pasted():
    """A backslash ends its line, and no line that begins with a flag stands without one before."""
    lines = TEXT.splitlines()
    for before, line in zip(lines, lines[1:]):
        if line.startswith("    "):
            assert "\\ " not in line, line
            assert not line.lstrip().startswith("--") or before.endswith("\\"), line


def metrics_in_the_table() -> set[str]:
    """The first column of "Every metric"; `reward_<op>` stands for one metric an operator."""
    section = TEXT.split("## Every metric")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = re.findall(r"`([\w<>]+)`", " ".join(cells))
    return {name.replace("<op>", op) for name in names
            for op in (OPERATORS if "<op>" in name else ("",))}


def test_the_table_of_metrics_names_every_logged_one_and_no_other(tmp_path):
    """metrics.jsonl of a run with fakes for everything but the keys of a real learner's step."""
    make_models(tmp_path)
    learner = Learner(tmp_path / "qwen3", make_config(kl_coef=0.1))
    learned = learner.step(make_sequences())
    assert set(learned) <= set(train.EMPTY_METRICS)  # rows of skipped steps have them too

    class Logging(FakeLearner):
        def step(self, sequences):
            return learned | super().step(sequences)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in fake_modules().items():
            patch.setitem(sys.modules, name, module)
        world = World(tmp_path)
        world.start(learner=Logging(), steps=2)
    for row in world.rows("metrics.jsonl"):
        assert set(row) == metrics_in_the_table()
