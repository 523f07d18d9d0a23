"""Rollouts: from a task to a group of graded traces, and the agent that is evaluated.

A rollout is the slow half of AceGRPO: build the prompt of a task, sample G responses, execute
the G scripts, grade what they submit. A file in the order in which a trace lives:

1. prompts          `task_messages(task)`: draft, improve, debug or crossover as chat messages
2. code extraction  `extract_code(response)`: the Python block of a response, or why there is none
3. engine           `Engine`: vLLM's AsyncLLM on an event loop in a thread of its own
4. rollout          `rollout(request)`: one group, start to end; `RolloutWorker`: the threads
5. agent            `run_agent(...)`: a greedy tree search over the same operators

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
import random
import re
import sys
import tempfile
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
    "crossover": "Write a script that combines the best of both.",
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
        task: what to do; the scripts of its parents and their outcomes are shown.
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
    for title, parent in zip(("Script", "Second script"), task.parents):
        outcome = clip_middle(describe_outcome(parent), budget.output)
        parts.append(f"# {title}\n```python\n{parent.code.strip()}\n```\n# Output\n{outcome}")
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
    threads: int = 1  # CPU threads of the engine; without meaning on GPUs
    seed: int = 0


class EngineDead(RuntimeError):
    """vLLM's engine process has died; the message says what to look at."""


class Engine:
    """vLLM's AsyncLLM behind three blocking calls, safe to use from many threads.

    `generate` samples, `load` swaps the weights in flight, `score` returns the log-probabilities
    of given tokens. All of them may run at the same time.
    """

    def __init__(self, model_dir: str | Path, config: EngineConfig = EngineConfig(),
                 version: int = 0, scratch: Path | None = None):
        # vLLM's processes talk through socket files, which it leaves behind when it is killed.
        self.sockets = tempfile.TemporaryDirectory(prefix="vllm-", dir=scratch)
        os.environ["VLLM_RPC_BASE_PATH"] = self.sockets.name
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

    def generate(self, prompt_ids: list[int], n: int, max_tokens: int, temperature: float = 1.0
                 ) -> tuple[list[Completion], int]:
        """Sample n responses to one prompt: (completions, policy version when it was started).

        There is one seed, the engine's: seeds of single requests kill vLLM's CPU backend ("CPU
        Generator does not use offset") when a prompt is prefilled in chunks.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=n, max_tokens=max_tokens, temperature=temperature, top_p=1.0, top_k=0,
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
        async def stop():  # on the loop: vLLM cancels tasks of its own there
            self.llm.shutdown()

        self._wait(stop())
        self.llm = None  # vLLM's finaliser fails when it runs as late as the interpreter's exit
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.sockets.cleanup()


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
    trace.isolation = run.isolation


def execute(trace: Trace, task: Task, competition: Competition, sandbox: Sandbox,
            config: RolloutConfig) -> Trace:
    """Run a trace's code, grade it and set its reward; without code there is nothing to run."""
    if not trace.code:
        return trace
    run = sandbox.run(competition, trace.code, timeout=config.timeout)
    describe_run(trace, run)
    trace.base_reward = base_reward(run, config.reward)
    trace.reward = step_reward(
        trace.base_reward, task.operator,
        parent_base=task.parent.base_reward if task.parent else None,
        unchanged=trace.code_key in [parent.code_key for parent in task.parents],
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
                                           config.temperature)
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


# ---------------------------------------------------------------------------------------------
# 5. The agent that is evaluated


@dataclass(frozen=True)
class AgentConfig:
    """Greedy tree search after AIDE (arXiv 2502.13138)."""

    steps: int = 20  # scripts that one run may try
    drafts: int = 3  # drafts before anything else
    debug_probability: float = 0.5  # of mending a failure rather than improving the best
    debug_depth: int = 3  # longest chain of debug steps
    crossover_probability: float = 0.0  # of combining the two best rather than improving the best


@dataclass
class AgentRun:
    """One agent on one competition: its traces in order, and the one it hands in."""

    competition: Competition
    seed: int
    traces: list[Trace] = field(default_factory=list)
    submission: bytes | None = None  # of the chosen trace
    chosen: int | None = None  # its position in `traces`

    def row(self) -> dict:
        """Its line of report.json. Steps count from 1; null: never."""
        first = next((i for i, t in enumerate(self.traces) if t.valid), None)
        best = self.traces[self.chosen] if self.chosen is not None else None
        return {
            "competition_id": self.competition.id,
            "seed": self.seed,
            "valid": best is not None,
            "medal": best.medal if best else "none",
            "score": best.score if best else None,
            "human_rank": best.human_rank if best else 0.0,
            "above_median": bool(best and beats(best.score, self.competition.median,
                                                self.competition)),
            "first_draft_valid": bool(self.traces and self.traces[0].valid),
            "steps_to_first_valid": first + 1 if first is not None else None,
            "chosen_step": self.chosen + 1 if self.chosen is not None else None,
            "steps": len(self.traces),
        }


def beats(score: float, other: float, competition: Competition) -> bool:
    """Strictly better, in the metric's direction."""
    return score < other if competition.lower_is_better else score > other


def choose_task(competition: Competition, traces: list[Trace], config: AgentConfig,
                rng: random.Random) -> Task:
    """The next step of the search, from what the agent may know: outcomes and the validation
    scores that the scripts printed, never test scores."""
    def task(operator, parent=None, second=None):
        parent_id = parent.id if parent else ""
        return Task(f"{competition.id}/{operator}/{parent_id}", competition.id, operator,
                    depth=parent.depth + 1 if parent else 0, parent=parent, second=second)

    if sum(t.operator == "draft" for t in traces) < config.drafts:
        return task("draft")
    tried = {t.parent_id for t in traces}
    failures = [t for t in traces if not t.valid and t.code and t.id not in tried
                and (t.operator != "debug" or t.depth <= config.debug_depth)]
    if failures and rng.random() < config.debug_probability:
        return task("debug", rng.choice(failures))
    best = choose_best(competition, traces)
    if best is not None:
        others = [t for t in traces if t.code_key != traces[best].code_key]
        second = choose_best(competition, others) if config.crossover_probability else None
        if second is not None and rng.random() < config.crossover_probability:
            return task("crossover", traces[best], others[second])
        return task("improve", traces[best])
    return task("debug", rng.choice(failures)) if failures else task("draft")


def choose_best(competition: Competition, traces: list[Trace]) -> int | None:
    """Position of the valid trace with the best printed validation score; one that printed none
    only when there is no other. Ties: the earliest."""
    sign = -1.0 if competition.lower_is_better else 1.0
    valid = [i for i, t in enumerate(traces) if t.valid]
    return max(valid, default=None, key=lambda i: (
        traces[i].validation_score is not None,
        sign * (traces[i].validation_score or 0.0)))


def run_agent(competition: Competition, seed: int, engine, sandbox, prompter: Prompter,
              config: RolloutConfig, agent: AgentConfig, progress=lambda: None) -> AgentRun:
    """One run of the agent: `agent.steps` scripts, then the best by validation score.

    `seed` decides the search's own choices; the responses are the engine's to sample.
    """
    rng = random.Random(f"{competition.id}/{seed}")
    run, submissions = AgentRun(competition, seed), []
    for _ in range(agent.steps):
        task = choose_task(competition, run.traces, agent, rng)
        prompt_ids = prompter(task)
        if len(prompt_ids) + config.max_response_tokens > engine.max_model_len:
            task = Task(f"{competition.id}/draft", competition.id, "draft")
            prompt_ids = prompter(task)
        completions, version = engine.generate(prompt_ids, 1, config.max_response_tokens,
                                               config.temperature)
        text = prompter.tokenizer.decode(completions[0].token_ids, skip_special_tokens=True)
        trace = make_trace(task, 0, prompt_ids, completions[0], version, text)
        submission = None
        if trace.code:
            execution = sandbox.run(competition, trace.code, timeout=config.timeout)
            describe_run(trace, execution)
            submission = execution.submission
        run.traces.append(trace)
        submissions.append(submission)
        progress()
    run.chosen = choose_best(competition, run.traces)
    run.submission = submissions[run.chosen] if run.chosen is not None else None
    return run


RATES = {  # total of report.json -> value of one run
    "valid_rate": lambda r, steps: r["valid"],
    "any_medal_rate": lambda r, steps: r["medal"] != "none",
    "gold_rate": lambda r, steps: r["medal"] == "gold",
    "silver_rate": lambda r, steps: r["medal"] == "silver",
    "bronze_rate": lambda r, steps: r["medal"] == "bronze",
    "above_median_rate": lambda r, steps: r["above_median"],
    "human_rank": lambda r, steps: r["human_rank"],
    "first_draft_valid_rate": lambda r, steps: r["first_draft_valid"],
    "extra_steps_to_first_valid": lambda r, steps: (r["steps_to_first_valid"] or steps + 1) - 1,
}


def report_totals(rows: list[dict], steps: int) -> dict:
    """Mean over competitions, then mean and standard error (ddof 1) over seeds.
    """
    seeds = sorted({r["seed"] for r in rows})
    totals = {}
    for name, value in RATES.items():
        means = [np.mean([value(r, steps) for r in rows if r["seed"] == s]) for s in seeds]
        sem = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
        totals[name] = {"mean": float(np.mean(means)), "sem": sem}
    return totals


def evaluate(competitions: list[Competition], seeds: range, engine, sandbox, prompter: Prompter,
             config: RolloutConfig, agent: AgentConfig, parallel: int) -> list[AgentRun]:
    """Every competition with every seed, `parallel` agents at a time."""
    from tqdm import tqdm

    jobs = [(c, s) for s in seeds for c in competitions]
    with tqdm(total=len(jobs) * agent.steps, desc="agents", unit="step") as bar, \
            ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(
            lambda job: run_agent(*job, engine, sandbox, prompter, config, agent, bar.update),
            jobs))


def write_report(path: Path, runs: list[AgentRun], agent: AgentConfig, model: str) -> dict:
    """report.json, and beside it the submissions and submissions.jsonl for `mlebench grade`."""
    rows = [run.row() for run in runs]
    report = {"model": model, "agent": vars(agent), "runs": rows,
              "totals": report_totals(rows, agent.steps)}
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f"{path.stem}-submissions"
    folder.mkdir(exist_ok=True)
    with open(path.parent / "submissions.jsonl", "w") as lines:
        for run in runs:
            name = None
            if run.submission is not None:
                name = folder / f"{run.competition.id}-{run.seed}.csv"
                name.write_bytes(run.submission)
            lines.write(json.dumps({"competition_id": run.competition.id,
                                    "submission_path": str(name) if name else None}) + "\n")
    path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def print_report(report: dict) -> None:
    """A table: competitions down, then the totals."""
    rows = report["runs"]
    print(f"{'competition':28} {'valid':>6} {'medals':>7} {'human rank':>11} {'first valid step':>17}")
    for name in sorted({r["competition_id"] for r in rows}):
        own = [r for r in rows if r["competition_id"] == name]
        first = [r["steps_to_first_valid"] for r in own if r["steps_to_first_valid"]]
        print(f"{name[:28]:28} {np.mean([r['valid'] for r in own]):6.0%} "
              f"{np.mean([r['medal'] != 'none' for r in own]):7.0%} "
              f"{np.mean([r['human_rank'] for r in own]):11.3f} "
              f"{np.mean(first) if first else float('nan'):17.1f}")
    for name, total in report["totals"].items():
        sem = f" +- {total['sem']:.3f}" if total["sem"] is not None else ""
        print(f"{name:30} {total['mean']:8.3f}{sem}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Evaluate a policy as an agent: greedy tree search on every competition.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face model directory")
    parser.add_argument("--competitions", required=True, help="directory of competitions")
    parser.add_argument("--out", default="report.json", help="report to write; submissions beside it")
    parser.add_argument("--steps", type=int, default=20, help="scripts an agent may try")
    parser.add_argument("--seeds", type=int, default=3, help="runs per competition")
    parser.add_argument("--drafts", type=int, default=3, help="drafts before anything else")
    parser.add_argument("--debug-probability", type=float, default=0.5,
                        help="probability of mending a failure rather than improving the best")
    parser.add_argument("--crossover-probability", type=float, default=0.0,
                        help="probability of combining the two best rather than improving the best")
    parser.add_argument("--parallel", type=int, default=32, help="agents at a time")
    parser.add_argument("--slots", type=int, default=2, help="scripts that run at the same time")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for one script")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature")
    parser.add_argument("--max-model-len", type=int, default=1024, help="prompt + response, tokens")
    parser.add_argument("--max-response-tokens", type=int, default=256, help="tokens")
    parser.add_argument("--description-chars", type=int, default=600, help="in the prompt")
    parser.add_argument("--preview-chars", type=int, default=240, help="data preview in the prompt")
    parser.add_argument("--output-chars", type=int, default=300, help="output in the prompt")
    parser.add_argument("--unsafe", action="store_true", help="run scripts without isolation")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    try:
        competitions = load_competitions(args.competitions)
        if not (Path(args.model) / "config.json").is_file():
            raise CompetitionError(f"--model {args.model}: no config.json there; give a Hugging "
                                   "Face model directory")
    except CompetitionError as error:
        print(f"rollout.py: {error}", file=sys.stderr)
        return 2
    from transformers import AutoTokenizer

    prompter = Prompter(AutoTokenizer.from_pretrained(args.model), competitions, PromptBudget(
        args.description_chars, args.preview_chars, args.output_chars))
    agent = AgentConfig(args.steps, args.drafts, args.debug_probability,
                        crossover_probability=args.crossover_probability)
    config = RolloutConfig(args.max_response_tokens, args.temperature, timeout=args.timeout)
    engine = Engine(args.model, EngineConfig(max_model_len=args.max_model_len))
    try:
        with Sandbox(slots=args.slots, timeout=args.timeout, unsafe=args.unsafe) as sandbox:
            runs = evaluate(competitions, range(args.seeds), engine, sandbox, prompter, config,
                            agent, args.parallel)
    finally:
        engine.close()
    report = write_report(Path(args.out), runs, agent, args.model)
    print_report(report)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
