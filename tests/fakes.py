"""A fake engine, sandbox and learner: the whole asynchronous loop in milliseconds, on one thread a
rollout. What they return is a function of (task, policy version), so that runs can be compared."""

import random
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np

from rollout import Completion, PromptBudget
from sandbox import Execution


class FakeTokenizer:
    """Token ids are code points."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


class FakePrompter:
    tokenizer = FakeTokenizer()

    def __init__(self, competition_ids, budget=PromptBudget()):
        self.competitions = {c: SimpleNamespace(id=c) for c in competition_ids}
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
        completions = []
        for _ in range(n):
            quality = round(min(rng.random() * (0.4 + 0.1 * version), 1.0), 3)
            text = f"```python\nquality = {quality if rng.random() < 0.6 else -1}\n```"
            ids = [ord(c) for c in text]
            completions.append(Completion(ids, np.full(len(ids), -1.0, np.float32), "stop"))
        return completions, version


class FakeSandbox:
    """Grades a script by the number in it; a negative one has crashed."""

    def run(self, competition, code, timeout=None):
        quality = float(code.split("=")[1])
        if quality < 0:
            return Execution("error", exit_code=1, reason="ValueError: bad")
        return Execution("ok", exit_code=0, valid=True, score=quality, human_rank=quality,
                         validation_score=quality, medal="bronze" if quality > 0.9 else "none",
                         submission=code.encode())


class FakeLearner:
    """Counts steps; its loss is a checksum of what it was given."""

    def __init__(self):
        self.version = 0

    def step(self, sequences):
        self.version += 1
        data = b"".join(s.tokens.tobytes() + np.float64(s.advantage).tobytes() for s in sequences)
        return {"loss": float(zlib.crc32(data)), "tokens": sum(len(s.tokens) for s in sequences)}
