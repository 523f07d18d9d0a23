"""A fake engine, sandbox, learner and tokenizer: the whole asynchronous loop in milliseconds. What
they return is a function of (task, its visits, policy version), so that runs can be compared.

    python tests/fakes.py [flags]       # train.py with these fakes in place of the real parts

The environment variable FAKE holds options of the latter as JSON: `execution_seconds` of each
script; `die`: [role, version], the process that kills itself when it gets to that version, before
its first restart (`deaths`: in so many starts); role is "rollout" or "learner" and its rank;
`show_key`: a file for the queues' key.
"""

import json
import os
import random
import signal
import sys
import threading
import time
import types
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import train
from rollout import Completion, PromptBudget
from sandbox import Competition, Execution


class FakeTokenizer:
    """Token ids are code points."""

    @classmethod
    def from_pretrained(cls, directory):
        return cls()

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return "\n".join(m["content"] for m in messages)

    def encode(self, text, add_special_tokens=False):
        return list(map(ord, text))

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


class FakePrompter:
    tokenizer = FakeTokenizer()

    def __init__(self, competition_ids, budget=PromptBudget()):
        self.competitions = {c: SimpleNamespace(id=c, lower_is_better=False)
                             for c in competition_ids}
        self.budget = budget

    def __call__(self, task, memory=""):
        return [ord(c) for c in task.id]


class FakeEngine:
    """Answers are scripts `quality = <float>`; quality rises with the policy version."""

    max_model_len = 10_000

    def __init__(self, delay=0.0):
        self.version, self.delay = 0, delay
        self.calls: dict = {}
        self.lock = threading.Lock()

    def generate(self, prompt_ids, n, max_tokens, temperature):
        version, task_id = self.version, "".join(map(chr, prompt_ids))
        with self.lock:  # the same task at the same version: another answer each time
            visit = self.calls[task_id, version] = self.calls.get((task_id, version), 0) + 1
        rng = random.Random(zlib.crc32(f"{task_id} {version} {visit}".encode()))
        if self.delay:
            time.sleep(rng.random() * self.delay)
        return [self.complete(rng, version) for _ in range(n)], version

    def complete(self, rng, version):
        quality = round(min(rng.random() * (0.4 + 0.1 * version), 1.0), 3)
        text = f"```python\nquality = {quality if rng.random() < 0.6 else -1}\n```"
        return completion(text)

    def load(self, directory, version):
        assert Path(directory).is_dir()
        self.version = version

    def score(self, token_ids):
        return np.zeros(len(token_ids) - 1, np.float32)

    def close(self):
        pass


def completion(text, logprob=-1.0):
    ids = [ord(c) for c in text]
    return Completion(ids, np.full(len(ids), logprob, np.float32), "stop")


class FakeSandbox:
    """Grades a script by the number in it; a negative one has crashed."""

    problem = ""

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def run(self, competition, code, timeout=None):
        time.sleep(self.seconds)
        quality = float(code.split("=")[1])
        if quality < 0:
            return Execution("error", exit_code=1, reason="ValueError: bad")
        return Execution("ok", exit_code=0, valid=True, score=quality, human_rank=quality,
                         validation_score=quality, medal="bronze" if quality > 0.9 else "none",
                         submission=code.encode())

    def close(self):
        pass


class FakeLearner:
    """Counts steps; its loss is a checksum of what it was given. On several ranks a step is a real
    collective operation."""

    def __init__(self, model_dir=None, config=None, group=None):
        self.version, self.group = 0, group

    def step(self, sequences):
        metrics = {"tokens": sum(len(s.tokens) for s in sequences), "skipped": False}
        if not all(np.isfinite(s.behavior_logprobs).all() for s in sequences):
            return {**metrics, "loss": float("nan"), "skipped": True}
        self.meet()
        self.version += 1
        data = b"".join(s.tokens.tobytes() + np.float64(s.advantage).tobytes() for s in sequences)
        return {**metrics, "loss": float(zlib.crc32(data))}

    def meet(self):
        if self.group is not None:
            import torch

            torch.distributed.all_reduce(torch.zeros(1), group=self.group)

    def score(self, tokens, temperature=None):
        return np.zeros(len(tokens) - 1, np.float32)

    def scale(self, factor):
        self.meet()

    published_bytes = 0

    def publish(self, directory):
        self.meet()
        Path(directory).mkdir(exist_ok=True)

    def save(self, directory):
        self.meet()
        Path(directory).mkdir(exist_ok=True)
        (Path(directory) / "version").write_text(f"{self.version}\n")

    def load(self, directory):
        self.meet()
        self.version = int((Path(directory) / "version").read_text())


def write_world(folder: Path, names=("alder", "birch", "cedar"), grade="return 1.0") -> None:
    """folder/competitions/<names> and folder/model, enough for train.py to start."""
    for name in names:
        files = {
            "config.yaml": f"id: {name}\ngrader: {{grade_fn: 'file:grade.py:grade'}}\ndataset:\n"
                           f"  answers: {name}/prepared/private/test.csv\n"
                           f"  sample_submission: {name}/prepared/public/sample_submission.csv\n",
            "description.md": f"Predict y of {name}.\n",
            "grade.py": f"def grade(submission, answers):\n    {grade}\n",
            "leaderboard.csv": "score\n1.0\n0.5\n0.0\n",
            "prepared/public/sample_submission.csv": "id,y\n1,0\n2,0\n",
            "prepared/private/test.csv": "id,y\n1,0\n2,1\n",
        }
        for file, text in files.items():
            path = folder / "competitions" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        Competition.load(folder / "competitions" / name)
    (folder / "model").mkdir()
    for file in ("config.json", "tokenizer.json"):
        (folder / "model" / file).write_text("{}")


def fake_modules(learner=FakeLearner) -> dict[str, types.ModuleType]:
    """For sys.modules: what train.py imports late, because it takes seconds."""
    fakes = {"transformers": dict(AutoTokenizer=FakeTokenizer),
             "learner": dict(Learner=learner, LearnerConfig=SimpleNamespace,
                             UnsupportedModel=NotImplementedError, Sequence=SimpleNamespace)}
    modules = {name: types.ModuleType(name) for name in fakes}
    for name, contents in fakes.items():
        vars(modules[name]).update(contents)
    return modules


def install() -> None:
    """Put the fakes where train.py looks for the real parts."""
    options = json.loads(os.environ.get("FAKE", "{}"))
    role, deadly_version = options.get("die", ("nobody", 0))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) >= options.get("deaths", 1):
        role = "nobody"
    rank = os.environ.get("RANK", "0")

    class Learner(FakeLearner):
        def step(self, sequences):
            if role == f"learner {rank}" and self.version == deadly_version:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step(sequences)

    class Engine(FakeEngine):
        def __init__(self, model_dir, config, scratch):
            super().__init__()

        def load(self, directory, version):
            if role == "rollout" and version == deadly_version:
                os.kill(os.getpid(), signal.SIGKILL)
            super().load(directory, version)

    class QueueServer(train.QueueServer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if "show_key" in options:
                Path(options["show_key"]).write_bytes(self.key)

    train.QueueServer, train.Engine = QueueServer, Engine
    train.check_model = lambda *_: None  # its model directory is empty
    train.Sandbox = lambda **_: FakeSandbox(options.get("execution_seconds", 0.0))
    sys.modules.update(fake_modules(Learner))


if __name__ in ("__main__", "__mp_main__"):  # the latter: in the rollout process that it starts
    install()
if __name__ == "__main__":
    train.leave(train.main())
