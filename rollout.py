"""Rollouts: from a task to a group of graded traces, and the agent that is evaluated.

A rollout is the slow half of AceGRPO: build the prompt of a task, sample G responses, execute
the G scripts, grade what they submit. A file in the order in which a trace lives:

1. prompts          `build_prompt(task)`: draft, improve or debug as chat messages -> token ids
2. code extraction  `extract_code(response)`: the Python block of a response, or why there is none
3. engine           `Engine`: vLLM's AsyncLLM on an event loop in a thread of its own
4. rollout          `rollout(request)`: one group, start to end; `RolloutWorker`: the threads
5. agent            `run_agent(...)`: a greedy tree search over the same three operators

What is whose:
[paper] steps (draft, improve, debug) rather than whole trajectories; rollouts run asynchronously
        to the learner.
[ours]  1. The wording of the prompts, and what of an execution they show: the script's own
           traceback frames, the error, the tail of the output, never the test score.
        2. Weights are swapped while requests are in flight (as AReaL and PipelineRL do): a
           response may be sampled by two versions. Each token keeps the log-probability under
           the weights that sampled it, and a trace's version is that of its oldest token.
        3. Prompt blocks in the prefix cache are salted with the policy version: G responses
           share one prefill, and no request reads blocks that older weights computed.
        4. The agent's search rule (AIDE's: draft n, debug failures, else improve the best), its
           final choice by the validation score that the script printed.

Alone:  python rollout.py --model DIR --competitions DIR --steps 20 --seeds 3 --out report.json
"""

import argparse
import asyncio
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from buffer import Group, Task, Trace
from sandbox import (Competition, CompetitionError, Execution, Sandbox, base_reward, code_key,
                     load_competitions, step_reward)

# ---------------------------------------------------------------------------------------------
# 1. Prompts

INSTRUCTIONS = (
    "You are a machine learning engineer. Write one Python script that reads the data in input/, "
    "holds out training rows, prints 'validation score: <float>' and writes submission.csv. "
    "Answer with one ```python block."
)
ASK = {
    "draft": "Write a first script.",
    "improve": "Write a better script.",
    "debug": "Fix the script.",
}


@dataclass(frozen=True)
class PromptBudget:
    """How much of each part a prompt may hold, in characters; small models need small prompts."""

    description: int = 8000
    preview: int = 3000
    output: int = 2000


def clip_middle(text: str, limit: int) -> str:
    """Cut the middle out of a text that is too long; both ends matter in logs.

    >>> clip_middle("abcdefghij", 7)
    'ab ... ij'
    """
    text = text.strip()
    if len(text) <= limit:
        return text
    keep = max((limit - 3) // 2, 0)
    return f"{text[:keep].rstrip()} ... {text[len(text) - keep:].lstrip()}"


def preview_data(public_dir: Path, limit: int) -> str:
    """Describe the files that a script will find in input/, in at most `limit` characters.

    A CSV file is shown as its columns with type, an example, and the share of missing values; the
    columns that an earlier file has shown already are only counted. Other files: name and size.
    """
    import pandas as pd

    lines, seen = [], set()
    # The training table first: what the other tables share with it need not be shown twice.
    order = {"train.csv": 0, "test.csv": 1}
    for path in sorted(public_dir.rglob("*"), key=lambda p: (order.get(p.name, 2), str(p))):
        if not path.is_file():
            continue
        name = path.relative_to(public_dir)
        if path.suffix != ".csv":
            lines.append(f"{name}: {path.stat().st_size} bytes")
            continue
        table = pd.read_csv(path, nrows=1000)
        lines.append(f"{name}: {len(table)} rows" + ("+" if len(table) == 1000 else ""))
        for column in table.columns:
            if column in seen:
                continue
            seen.add(column)
            values = table[column]
            kind = {"i": "int", "u": "int", "f": "float", "b": "bool"}.get(values.dtype.kind, "text")
            example = values.dropna().iloc[0] if values.notna().any() else ""
            example = f"{example:.4g}" if kind == "float" else str(example)[:24]
            missing = f", {values.isna().mean():.0%} missing" if values.isna().any() else ""
            lines.append(f"- {column} {kind} {example}{missing}")
    text, omitted = "", 0
    for line in lines:
        # A file's own line always stays; column lines fill what is left of the budget.
        if line.startswith("- ") and len(text) + len(line) > limit:
            omitted += 1
            continue
        if omitted and not line.startswith("- "):
            text += f"- ... {omitted} more columns\n"
            omitted = 0
        text += line + "\n"
    return text + (f"- ... {omitted} more columns\n" if omitted else "")


def own_traceback(stderr: str) -> str:
    """Reduce a traceback to what helps to mend the script: its own frames and the error itself.

    Frames inside libraries are dropped; so is everything before the last traceback.

    >>> print(own_traceback('''Traceback (most recent call last):
    ...   File "script.py", line 3, in <module>
    ...     fit(X)
    ...   File "/usr/lib/x.py", line 9, in fit
    ...     raise ValueError
    ... ValueError: bad X'''))
    line 3: fit(X)
    ValueError: bad X
    """
    head, found, tail = stderr.rpartition("Traceback (most recent call last):\n")
    if not found:
        return stderr.strip()
    lines, kept, index = tail.splitlines(), [], 0
    while index < len(lines) and lines[index].startswith("  "):
        frame = re.match(r'  File "[^"]*\bscript\.py", line (\d+)', lines[index])
        if frame:
            source = lines[index + 1].strip() if index + 1 < len(lines) else ""
            kept.append(f"line {frame.group(1)}: {source}")
        index += 1
    return "\n".join(kept + lines[index:]).strip()


def describe_outcome(trace: Trace) -> str:
    """What the agent is told about an earlier attempt: status, reason, output. Never its score."""
    if trace.valid:
        value = trace.validation_score
        return "validation score: " + (f"{value:.4g}" if value is not None else "not printed")
    lines = [f"status: {trace.status}"]
    if trace.reason and trace.status != "error":
        lines.append(trace.reason)
    if trace.output:
        lines.append(trace.output)
    return "\n".join(lines)


def task_messages(competition: Competition, task: Task, budget: PromptBudget,
                  preview: str | None = None) -> list[dict]:
    """The chat messages that a task is prompted with.

    Args:
        competition: the task's competition.
        task: what to do; `improve` and `debug` show the parent's script and its outcome.
        budget: how long each part may be.
        preview: the data preview when the caller has it already (it costs file reads).
    """
    if preview is None:
        preview = preview_data(competition.public_dir, budget.preview)
    parts = [
        INSTRUCTIONS,
        clip_middle(competition.description, budget.description),
        "# Data\n" + preview.strip(),
    ]
    if task.parent is not None:
        outcome = clip_middle(describe_outcome(task.parent), budget.output)
        parts.append(f"# Script\n```python\n{task.parent.code.strip()}\n```\n# Output\n{outcome}")
    parts.append("# Task\n" + ASK[task.operator])
    return [{"role": "user", "content": "\n\n".join(parts)}]


class Prompter:
    """Turns tasks into token ids and remembers the data preview of each competition."""

    def __init__(self, tokenizer, competitions: list[Competition], budget: PromptBudget):
        self.tokenizer = tokenizer
        self.competitions = {c.id: c for c in competitions}
        self.budget = budget
        self.previews = {c.id: preview_data(c.public_dir, budget.preview) for c in competitions}

    def __call__(self, task: Task) -> list[int]:
        competition = self.competitions[task.competition_id]
        messages = task_messages(competition, task, self.budget, self.previews[competition.id])
        return encode_chat(self.tokenizer, messages)


def encode_chat(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a chat up to where the assistant's answer begins."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


# ---------------------------------------------------------------------------------------------
# 2. Code extraction


def extract_code(response: str, finish_reason: str = "stop") -> tuple[str, str]:
    """The script in a response, or the reason why there is none: (code, reason), one of them "".

    What a reasoning model thinks (up to `</think>`) may hold code too: only the answer counts.
    The last closed block wins, since models correct themselves. A response that the length limit
    cut off is a failure even if an earlier block was closed: its answer never ended.

    >>> extract_code("Try:\\n```python\\nprint(1)\\n```")
    ('print(1)\\n', '')
    >>> extract_code("```python\\nprint(", "length")
    ('', 'the response was cut off by the length limit')
    """
    if finish_reason == "length":
        return "", "the response was cut off by the length limit"
    if "<think>" in response and "</think>" not in response:
        return "", "the response has no answer after <think>"
    answer = response.rpartition("</think>")[2]
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", answer, re.DOTALL)
    if not blocks:
        return "", "the response has no ```python block"
    if not blocks[-1].strip():
        return "", "the ```python block is empty"
    return blocks[-1], ""


# ---------------------------------------------------------------------------------------------
# 3. Engine


@dataclass
class Completion:
    """One sampled response. `logprobs[t]` is log pi(token t) under the weights that sampled it."""

    token_ids: list[int]  # includes the sampled stop token, which is trained like any other
    logprobs: np.ndarray  # (T,) float32
    finish_reason: str  # "stop" | "length"


@dataclass(frozen=True)
class EngineConfig:
    """How vLLM is started; see `Config` in train.py for the flags."""

    max_model_len: int = 2048  # prompt + response, tokens
    max_num_seqs: int = 64  # sequences decoded together
    dtype: str = "float32"
    kv_cache_gib: float | None = 1.0  # None: vLLM's own fraction of the GPU's memory
    gpu_memory_utilization: float = 0.85
    tensor_parallel_size: int = 1
    enforce_eager: bool = True
    threads: int = 2  # CPU threads of the engine; without meaning on GPUs
    seed: int = 0


class EngineDead(RuntimeError):
    """vLLM's engine process has died; the message says what to look at."""


class Engine:
    """vLLM's AsyncLLM behind three blocking calls, safe to use from many threads.

    `generate` samples, `load` swaps the weights in flight, `score` returns the log-probabilities
    of given tokens. All of them may run at the same time.
    """

    def __init__(self, model_dir: str | Path, config: EngineConfig = EngineConfig(),
                 version: int = 0):
        # vLLM reads these when it is imported. `spawn` keeps its processes clear of our threads.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=str(model_dir),
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(2048, config.max_model_len),
            tensor_parallel_size=config.tensor_parallel_size,
            enforce_eager=config.enforce_eager,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_memory_bytes=(int(config.kv_cache_gib * 2**30)
                                   if config.kv_cache_gib else None),
            enable_prefix_caching=True,
            # After temperature, so that they are the behaviour policy's own log-probabilities.
            logprobs_mode="processed_logprobs",
            seed=config.seed,
            disable_log_stats=True,
        )
        self.version = version
        self.max_model_len = config.max_model_len
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="vllm-loop", daemon=True).start()

        async def start():
            return AsyncLLM.from_engine_args(arguments)

        self.llm = self._wait(start())

    def _wait(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def _request(self, prompt_ids, params):
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        # The salt keeps blocks of different versions apart in the prefix cache.
        prompt = TokensPrompt(prompt_token_ids=prompt_ids, cache_salt=f"v{self.version}")
        try:
            async for output in self.llm.generate(prompt, params, uuid.uuid4().hex):
                last = output
        except EngineDeadError as error:
            raise EngineDead("the vLLM engine has died; its own message is above") from error
        return last

    def generate(self, prompt_ids: list[int], n: int, max_tokens: int, temperature: float = 1.0,
                 seed: int | None = None) -> tuple[list[Completion], int]:
        """Sample n responses to one prompt: (completions, policy version when it was started)."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=n, max_tokens=max_tokens, temperature=temperature, top_p=1.0, top_k=0, seed=seed,
            logprobs=0,  # 0: the sampled token's own log-probability only
            # Without FINAL_ONLY the last yielded output misses the choices that ended earlier.
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        version = self.version
        output = self._wait(self._request(prompt_ids, params))
        completions = []
        for choice in sorted(output.outputs, key=lambda c: c.index):
            ids = list(choice.token_ids)
            logprobs = np.array([p[i].logprob for p, i in zip(choice.logprobs, ids)], np.float32)
            completions.append(Completion(ids, logprobs, choice.finish_reason))
        return completions, version

    def score(self, token_ids: list[int]) -> np.ndarray:
        """Log-probabilities of token_ids[1:], each given its prefix: (T - 1,) float32."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)
        output = self._wait(self._request(token_ids, params))
        rows = output.prompt_logprobs[1:]  # the first token has no prefix
        return np.array([row[i].logprob for row, i in zip(rows, token_ids[1:])], np.float32)

    def load(self, directory: str | Path, version: int) -> None:
        """Swap in the weights of a Hugging Face directory while requests go on.

        The directory must hold `lm_head.weight` even when the embeddings are tied: vLLM would
        otherwise keep the old output head, silently (see `Learner.publish`).
        """
        self._wait(self.llm.collective_rpc("reload_weights",
                                           kwargs={"weights_path": str(directory)}))
        self.version = version

    def close(self) -> None:
        self.llm.shutdown()
        self.loop.call_soon_threadsafe(self.loop.stop)


# ---------------------------------------------------------------------------------------------
# 4. Rollout


@dataclass
class Request:
    """What the curriculum hands out: one task, rolled out `n` times."""

    task: Task
    n: int
    handout_version: int = 0  # learner's version when the task was handed out
    epoch: int = 0  # run epoch: +1 with each resume, so that a stray answer is recognised
    purpose: str = "train"  # "train", or a label of eval.jsonl such as "before/heldout"


@dataclass
class Result:
    """What comes back: the group, or the one-line reason why there is none."""

    request: Request
    group: Group | None
    error: str = ""
    seconds_rollout: float = 0.0  # generation, wall
    seconds_sandbox: float = 0.0  # executions, wall


@dataclass(frozen=True)
class RolloutConfig:
    """What the rollout threads need to know; see `Config` in train.py for the flags."""

    max_response_tokens: int = 1024
    temperature: float = 1.0
    reward: str = "rank"
    timeout: float = 60.0  # seconds of wall-clock for one script
    seed: int | None = None


def make_trace(task: Task, index: int, prompt_ids: list[int], completion: Completion,
               version: int, text: str) -> Trace:
    """A trace as sampled, before its code has run; `reason` says why there is no code."""
    code, reason = extract_code(text, completion.finish_reason)
    return Trace(
        id=f"{uuid.uuid4().hex[:12]}-{index}",
        task_id=task.id,
        competition_id=task.competition_id,
        operator=task.operator,
        depth=task.depth,
        parent_id=task.parent.id if task.parent else None,
        prompt_ids=np.array(prompt_ids, np.int32),
        response_ids=np.array(completion.token_ids, np.int32),
        logprobs=completion.logprobs,
        policy_version=version,
        finish_reason=completion.finish_reason,
        code=code,
        code_key=code_key(code) if code else "",
        reason=reason,
        status="error",
    )


def describe_run(trace: Trace, run: Execution) -> None:
    """Copy what the sandbox found into the trace."""
    trace.status, trace.exit_code, trace.seconds = run.status, run.exit_code, run.seconds
    trace.output = own_traceback(run.stderr_tail) or run.stdout_tail.strip()
    trace.validation_score, trace.valid, trace.score = run.validation_score, run.valid, run.score
    trace.medal, trace.human_rank, trace.reason = run.medal, run.human_rank, run.reason


def execute(trace: Trace, task: Task, competition: Competition, sandbox: Sandbox,
            config: RolloutConfig) -> Trace:
    """Run a trace's code, grade it and set its reward; without code there is nothing to run."""
    if not trace.code:
        return trace
    run = sandbox.run(competition, trace.code, timeout=config.timeout)
    describe_run(trace, run)
    trace.base_reward = base_reward(run, config.reward)
    parent = task.parent
    trace.reward = step_reward(
        trace.base_reward, task.operator,
        parent_base=parent.base_reward if parent else None,
        unchanged=parent is not None and trace.code_key == parent.code_key,
    )
    return trace


def rollout(request: Request, engine, sandbox, prompter: Prompter, config: RolloutConfig,
            pool: ThreadPoolExecutor) -> Result:
    """Sample, execute and grade one group.

    Args:
        engine: an `Engine`, or anything with its `generate` and `max_model_len`.
        sandbox: a `Sandbox`, or anything with its `run`.
        pool: runs the group's scripts side by side; the sandbox bounds how many really do.
    Returns:
        A Result without a group when the prompt leaves no room for a response: cutting the
        prompt would train on something that nobody asked.
    """
    task = request.task
    competition = prompter.competitions[task.competition_id]
    prompt_ids = prompter(task)
    room = engine.max_model_len - len(prompt_ids)
    if room < config.max_response_tokens:
        return Result(request, None, f"prompt of {len(prompt_ids)} tokens leaves {room} of "
                                     f"{config.max_response_tokens} response tokens")
    started = time.monotonic()
    completions, version = engine.generate(prompt_ids, request.n, config.max_response_tokens,
                                           config.temperature, config.seed)
    generated = time.monotonic()
    traces = []
    for index, completion in enumerate(completions):
        text = prompter.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        traces.append(make_trace(task, index, prompt_ids, completion, version, text))
    traces = list(pool.map(lambda t: execute(t, task, competition, sandbox, config), traces))
    group = Group(task=task, traces=traces, epoch=request.epoch,
                  handout_version=request.handout_version)
    return Result(request, group, seconds_rollout=generated - started,
                  seconds_sandbox=time.monotonic() - generated)


class RolloutWorker:
    """Threads that turn requests into results until they read None.

    A thread spends its life waiting, for the engine or for a script, so there should be as many
    as keep both busy: `threads` groups are in flight at once.
    """

    def __init__(self, tasks, results, engine, sandbox, prompter: Prompter,
                 config: RolloutConfig, threads: int, slots: int, on_error):
        self.arguments = (engine, sandbox, prompter, config)
        self.tasks, self.results, self.on_error = tasks, results, on_error
        self.pool = ThreadPoolExecutor(slots, thread_name_prefix="execute")
        self.threads = [threading.Thread(target=self._run, name=f"rollout-{i}", daemon=True)
                        for i in range(threads)]
        for thread in self.threads:
            thread.start()

    def _run(self):
        try:
            while (request := self.tasks.get()) is not None:
                self.results.put(rollout(request, *self.arguments, self.pool))
            self.tasks.put(None)  # for the next thread
        except BaseException as error:  # the owner decides what it means
            self.on_error(error)

    def join(self):
        for thread in self.threads:
            thread.join()
        self.pool.shutdown()
