"""Every module by itself: examples in docstrings, and files that can be copied alone.

    python -m pytest tests/test_modules.py
"""

import ast
import doctest
import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

MODULES = sorted(path.stem for folder in (ROOT, ROOT / "examples") for path in folder.glob("*.py"))
HEAVY = {"torch", "vllm", "transformers", "pandas", "sklearn", "scipy", "matplotlib"}
WITH_EXAMPLES = "grpo buffer sampler sandbox rollout learner train study plot report".split()
# file -> (arguments of its demo, words of its output, heavy libraries it may import)
ALONE = {
    "grpo": ([], ["dr_grpo  -0.225 -0.125 -0.125 +0.475", "likelier"], {"torch"}),
    "buffer": ([], ["the lowest score leaves: ['iris/debug/e']"], set()),
    "sampler": ([], ["LP 0.292", "LP 0.159", "Two draws without replacement"], set()),
    "sandbox": (["--help"], ["run", "grade", "selftest"], set()),
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name not in WITH_EXAMPLES


def test_imports_go_one_way_as_the_picture_in_the_readme_says():
    """Each file's imports of other files of the project, at its top and inside functions."""
    files = [path.stem for path in ROOT.glob("*.py")]
    found = set()
    for name in files:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            modules = ([node.module] if isinstance(node, ast.ImportFrom)
                       else [alias.name for alias in node.names] if isinstance(node, ast.Import)
                       else [])
            found |= {(name, module) for module in modules if module in files}
    picture = (ROOT / "README.md").read_text().split("flowchart LR\n  train -->")[1].split("```")[0]
    drawn = set()
    for line in ("train -->" + picture).splitlines():
        start, _, ends = line.partition("-->")
        drawn |= {(start.strip(), end.strip()) for end in ends.split("&") if end.strip()}
    assert found == drawn


def run(folder, *arguments: str) -> str:
    """What a Python started in the folder prints; nothing of this repository is on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ALONE)
def test_a_file_copied_alone_runs_its_demo(name, tmp_path):
    arguments, words, _ = ALONE[name]
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    output = run(tmp_path, f"{name}.py", *arguments)
    for word in words:
        assert word in output


@pytest.mark.parametrize("name", ALONE)
def test_a_file_copied_alone_imports_nothing_heavy(name, tmp_path):
    """Nor any other file of the project, and its demo is done in a moment (processor time)."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    loaded, seconds = json.loads(run(tmp_path, "-c", f"""if True:
        import contextlib, io, json, sys, time, {name}
        started = time.process_time()
        if {name!r} != "sandbox":
            with contextlib.redirect_stdout(io.StringIO()):
                {name}.main()
        seconds = time.process_time() - started
        print(json.dumps([sorted({{m.split(".")[0] for m in sys.modules}}), seconds]))
    """))
    assert name in loaded
    assert (HEAVY | set(MODULES)) & set(loaded) - {name} <= ALONE[name][2]
    assert seconds < 1
