"""Rollouts: from a task to a group of graded traces, and the agent that is evaluated.

A rollout is the slow half of AceGRPO: build the prompt of a task, sample G responses, execute
the G scripts, grade what they submit. A file in the order in which a trace lives:

1. prompts          `task_messages(task)`: draft, improve, debug or crossover as chat messages
2. code extraction  `extract_code(response)`: the Python block of a response, or why there is none
3. engine           `Engine`: vLLM's AsyncLLM on an event loop in a thread of its own
4. rollout          `rollout(request)`: one group, start to end; `RolloutWorker`: the threads
5. agent            `run_agent(...)`: a greedy tree search over the same operators
6. report           of an evaluation: report.json, submissions.jsonl, a table
7. shared           locks, YAML settings, the guard: what train.py uses, too
8. command          `main(argv)`

What is whose:
[paper] steps (draft, improve, debug) rather than whole trajectories; rollouts run asynchronously
        to the learner.
[ours]  1. The wording of the prompts, and what of an execution they show: the script's own
           traceback frames, the error, the tail of the output, never the test score.
        2. Weights are swapped while requests are in flight (as AReaL and PipelineRL do): a
           response may be sampled by two versions. Each token keeps the log-probability under
           the weights that sampled it, and a trace's version is that of its oldest token.
        3. Prompt blocks in the prefix cache are salted with the policy version: G responses
           share one prefill, and no request that begins after a swap reads blocks of older
           weights.
        4. The agent's search rule (AIDE's: draft n, debug failures, else improve the best), its
           memory (AIDE's: design, result, validation score of what worked), its final choice by
           the validation score that the script printed.
        5. The agent learns of each file whether it is valid and, if not, why, which is what
           MLE-bench's validation server tells; never its score.

Alone:  python rollout.py --model DIR --competitions DIR --steps 20 --seeds 3 --out report.json
        python rollout.py --model DIR --competitions lite --config examples/lite_evaluation.yaml
        (the same command again goes on with an evaluation that was interrupted)
"""

import argparse
import asyncio
import fcntl
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import uuid
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields, replace
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
PLAN = "Begin with a plan of 3 to 5 sentences."  # asked for where there is a memory to keep it
ASK = {
    "draft": "Write a first script.",
    "improve": "Write a better script.",
    "debug": "Fix the script.",
    "crossover": "Write a script that combines the best of both.",
}


@dataclass(frozen=True)
class PromptBudget:
    """How much of each part a prompt may hold, in characters (three or four make a token); small
    models need small prompts."""

    description: int = 8000
    preview: int = 3000
    output: int = 2000
    memory: int = 0  # of earlier attempts; 0: no memory, and no plan is asked for


def clip_middle(text: str, limit: int) -> str:
    """Cut the middle out of a text that is too long, to about `limit` characters; both ends matter
    in logs.

    >>> clip_middle("abcdefghij", 7)
    'ab ... ij'
    """
    text = text.strip()
    if len(text) <= limit:
        return text
    keep = max((limit - 3) // 2, 0)
    return f"{text[:keep].rstrip()} ... {text[len(text) - keep:].lstrip()}"


# Sections of Kaggle's descriptions: what a script must know, and what no script needs.
NEEDED = re.compile(r"evaluat|metric|submission|data|file|field|column|format|label|predict", re.I)
NEEDLESS = re.compile(r"prize|timeline|citation|acknowledg|requirement|eligib|sponsor|getting "
                      r"started|conference|reference|kernels-only|code competition", re.I)


def cut_description(text: str, limit: int) -> str:
    """Cut a description that is too long at its headings: first the sections that no script needs
    (prizes, dates, citations, ...), then the stories, last the middle of what is left.

    >>> text = "# Overview\\nA long story.\\n## Prizes\\nA car.\\n## Evaluation\\nAUC."
    >>> cut_description(text, 45)
    '# Overview\\nA long story.\\n## Evaluation\\nAUC.'
    """
    if len(text.strip()) <= limit:
        return text.strip()
    sections, fenced, dropped = [], False, 7  # [title, body], level of the section being dropped
    for line in text.strip().splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"(#{1,6})(.*)", line)
        if heading:
            level = len(heading.group(1))
            if level <= dropped:  # a section ends with the next one of its level, or above it
                dropped = level if NEEDLESS.search(heading.group(2)) else 7
            if dropped == 7:
                sections.append([line, ""])
        elif dropped == 7:
            if not sections:
                sections.append(["", ""])
            sections[-1][1] += "\n" + line

    def joined():
        return "\n".join((title + body).strip() for title, body in sections).strip()

    excess = len(joined()) - limit
    for section in sections:
        if excess > 0 and not NEEDED.search(section[0]):
            short = "\n" + clip_middle(section[1], max(len(section[1]) - excess - 10, 100))
            excess -= len(section[1]) - len(short)
            section[1] = short if len(short) < len(section[1]) else section[1]
    return clip_middle(joined(), limit)


FEW = 4  # files of a kind, or sub-directories, that a preview shows one by one


def preview_data(public_dir: Path, limit: int) -> str:
    """Describe the files that a script will find in input/, in about `limit` characters.

    A table (CSV, also zipped; JSON records) is shown as its columns with type, an example, and the
    share of missing values; the columns that an earlier file has shown already are only counted.
    Other files: size, and what an image, a sound, an archive or a text is like. Many files of a
    kind are one line, with one of them described.
    """
    lines, seen = [], set()
    for pattern, files in list_files(public_dir):
        about, table = describe_file(files[0])
        size = sum(path.stat().st_size for path in files)
        if len(files) > 1:
            facts = [f"{len(files)} files", human_size(size),
                     f"e.g. {files[0].relative_to(public_dir)}", about]
        elif table is not None:
            facts = [f"{len(table)} rows" + "+" * (len(table) == 1000),
                     human_size(size) if size >= 1_000_000 else ""]
        else:
            facts = [human_size(size), about]
        lines.append(f"{pattern}: " + ", ".join(filter(None, facts)))
        for column in table.columns if table is not None else ():
            if column in seen:
                continue
            seen.add(column)
            values = table[column]
            kind = {"i": "int", "u": "int", "f": "float", "b": "bool"}.get(values.dtype.kind,
                                                                           "text")
            example = next(iter(values.dropna()), "")  # "": the column is empty
            if kind == "float" and example != "":
                example = f"{example:.4g}"
            example = " ".join(str(example).split())[:24]
            missing = f", {values.isna().mean():.0%} missing" if values.isna().any() else ""
            lines.append(f"- {column} {kind} {example}".rstrip() + missing)
    return fit_lines(lines, limit)


def fit_lines(lines: list[str], limit: int) -> str:
    """Of a preview what fits: a file's own line nearly always, columns while there is room."""
    text, columns, files = "", 0, 0
    for line in lines:
        if line.startswith("- ") and len(text) + len(line) > limit:
            columns += 1
            continue
        if columns and not line.startswith("- "):
            text += f"- ... {columns} more columns\n"
            columns = 0
        if len(text) + len(line) > 2 * limit:
            files += 1
        else:
            text += line + "\n"
    text += f"- ... {columns} more columns\n" if columns else ""
    return text + (f"... {files} more files\n" if files else "")


def list_files(public_dir: Path) -> list[tuple[str, list[Path]]]:
    """Names and files, the training table first: what other tables share with it need not be shown
    twice. Many files of a kind are one entry, `train/*.jpg`; so are those of many folders,
    `train/*/*.xyz`. Links that lead out of the public data are left out: scripts cannot follow
    them either."""
    order = {"train.csv": 0, "test.csv": 1}
    patterns, groups, root = {str(public_dir): Path()}, defaultdict(list), public_dir.resolve()
    for folder, folders, names in os.walk(public_dir):
        folders.sort()  # the order in which it goes on
        pattern = patterns.pop(folder)
        for name in folders:
            patterns[os.path.join(folder, name)] = pattern / ("*" if len(folders) > FEW else name)
        for name in sorted(names):
            path = Path(folder, name)
            if path == public_dir / "description.md":
                continue  # MLE-bench puts a copy there; the prompt has it already
            if path.is_file() and path.resolve().is_relative_to(root):
                groups[pattern, name if name in order else path.suffix].append(path)
    entries = []
    for (pattern, kind), files in groups.items():
        if len(files) <= (3 * FEW if kind == ".csv" else FEW) and "*" not in pattern.parts:
            entries += [(str(path.relative_to(public_dir)), [path]) for path in files]
        else:
            entries.append((str(pattern / (kind if kind in order else f"*{kind}")), files))
    return sorted(entries, key=lambda e: (order.get(e[1][0].name, 2), str(e[1][0])))


def describe_file(path: Path):
    """(what it is in a few words, its first 1000 rows when it is a table, else None)."""
    import pandas as pd

    suffix = path.suffix.lower()
    try:
        if suffix == ".csv" or path.name.lower().endswith((".csv.zip", ".csv.gz")):
            return "", pd.read_csv(path, nrows=1000)
        if suffix in (".jsonl", ".ndjson"):
            return "", pd.read_json(path, lines=True, nrows=1000)
        if suffix == ".json" and path.stat().st_size < 100_000_000:
            records = json.loads(path.read_bytes())
            if isinstance(records, list) and records and isinstance(records[0], dict):
                return "", pd.DataFrame(records[:1000])
            return f"{type(records).__name__} of {len(records)}", None
        tar = suffix in (".tar", ".tgz") or path.name.lower().endswith(".tar.gz")
        if suffix in (".zip", ".7z") or tar and path.stat().st_size < 1_000_000_000:
            names = archive_names(path, suffix)
            return f"{len(names)} files inside, e.g. {names[0]}" if names else "empty", None
        if suffix in (".wav", ".aif", ".aiff"):
            # The module for AIFF has left Python 3.13's library.
            with importlib.import_module("wave" if suffix == ".wav" else "aifc").open(
                    str(path), "rb") as sound:
                rate = sound.getframerate()
                return (f"{sound.getnframes() / rate:.1f} s of sound at {rate} Hz, "
                        f"{sound.getnchannels()} channel(s)"), None
        if suffix in (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff"):
            from PIL import Image

            with Image.open(path) as image:
                return f"{image.width}x{image.height} pixels, {image.mode}", None
        if suffix in (".txt", ".md", ".xyz", ".tsv", ".rtf", ".xml"):
            with open(path, encoding="utf-8", errors="replace") as file:
                return "begins " + repr(file.readline(80).strip()), None
    except Exception as error:  # the preview is no judge of files
        return f"not readable here ({type(error).__name__})", None
    return "", None


def archive_names(path: Path, suffix: str) -> list[str]:
    """The files in an archive, from its directory; nothing is unpacked."""
    if suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return [name for name in archive.namelist() if not name.endswith("/")]
    if suffix == ".7z":
        import py7zr

        with py7zr.SevenZipFile(path) as archive:
            return [entry.filename for entry in archive.list() if not entry.is_directory]
    with tarfile.open(path) as archive:
        return [member.name for member in archive if member.isfile()]


def human_size(size: int) -> str:
    """
    >>> human_size(3), human_size(25_000), human_size(999_999), human_size(1_500_000_000)
    ('3 bytes', '25 KB', '1 MB', '1.5 GB')
    """
    for unit, power in (("GB", 9), ("MB", 6), ("KB", 3)):
        if size >= 0.9995 * 10 ** power:  # what would be rounded to 1000 of the smaller unit, too
            return f"{size / 10 ** power:.3g} {unit}"
    return f"{size} bytes"


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
    if trace.reason[:100] not in " ".join(trace.output.split()):  # a traceback's is its last line
        lines.append(trace.reason)
    if trace.output:
        lines.append(trace.output)
    return "\n".join(lines)


def design_of(response: str) -> str:
    """The plan that a response puts before its code, on one line; without one, the names that the
    code imports.

    >>> design_of("A forest on counts.\\n```python\\nfit()\\n```")
    'A forest on counts.'
    >>> design_of("```python\\nfrom sklearn.linear_model import Ridge\\n```")
    'uses Ridge'
    """
    plan, _, code = response.rpartition("</think>")[2].partition("```")
    if plan.strip():
        return clip_middle(" ".join(plan.split()), 600)
    imports = re.findall(r"^from \S+ import (.+)$", code, re.MULTILINE)
    return "uses " + clip_middle(", ".join(imports), 200) if imports else "not described"


def recall(traces: list[Trace], designs: list[str], limit: int) -> str:
    """AIDE's memory: design, result and validation score of every attempt that worked, oldest
    first; of too many, the latest that fit into `limit` characters. "" without any."""
    text = ""
    for trace, design in reversed(list(zip(traces, designs))):
        if not trace.valid:
            continue
        result = clip_middle(" ".join(trace.output.split()), 200) or "no output"
        entry = f"Design: {design}\nResult: {result}\n{describe_outcome(trace).capitalize()}"
        if len(entry) + len(text) > limit:
            break
        text = f"{entry}\n\n{text}"
    return text.strip()


def task_messages(competition: Competition, task: Task, budget: PromptBudget,
                  preview: str | None = None, memory: str = "") -> list[dict]:
    """The chat messages that a task is prompted with.

    Args:
        competition: the task's competition.
        task: what to do; the scripts of its parents and their outcomes are shown.
        budget: how long each part may be.
        preview: the data preview when the caller has it already (it costs file reads).
        memory: what `recall` says of earlier attempts; "" for none.
    """
    if preview is None:
        preview = preview_data(competition.public_dir, budget.preview)
    parts = [
        f"{INSTRUCTIONS} {PLAN}" if budget.memory else INSTRUCTIONS,
        cut_description(competition.description, budget.description),
        "# Data\n" + preview.strip(),
    ]
    if memory:
        parts.append(f"# Memory\nWhat has worked so far; do something else.\n\n{memory}")
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

    def __call__(self, task: Task, memory: str = "") -> list[int]:
        competition = self.competitions[task.competition_id]
        messages = task_messages(competition, task, self.budget, self.previews[competition.id],
                                 memory)
        return encode_chat(self.tokenizer, messages)


def encode_chat(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a chat up to where the assistant's answer begins."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


# ---------------------------------------------------------------------------------------------
# 2. Code extraction


# (language, code) of every closed block, whatever its language: else the end of one could be taken
# for the beginning of another. A block ends where a line begins with a fence.
FENCE = re.compile(r"(?<!\S)```[ \t]*([\w+-]*)[^`\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def extract_code(response: str, finish_reason: str = "stop") -> tuple[str, str]:
    """The script in a response, or the reason why there is none: (code, reason), one of them "".

    What a reasoning model thinks (up to `</think>`) may hold code too: only the answer counts.
    The last closed block that says it is Python wins, since models correct themselves; one without
    a language only where there is no other: it may be what the script prints. A response that the
    length limit cut off is a failure even if an earlier block was closed: its answer never ended.

    >>> extract_code("Try:\\n```python\\nprint(1)\\n```")
    ('print(1)\\n', '')
    >>> extract_code("```python\\nprint(", "length")
    ('', 'the response was cut off by the length limit')
    """
    if finish_reason == "length":
        return "", "the response was cut off by the length limit"
    if "<think>" in response and "</think>" not in response:
        return "", "the response has no answer after <think>"
    answer = response.rpartition("</think>")[2].replace("\r\n", "\n")
    fences = [(language.lower(), code) for language, code in FENCE.findall(answer)]
    blocks = ([code for language, code in fences if language in ("python", "python3", "py")]
              or [code for language, code in fences if not language])
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


GPU_MEMORY_UTILIZATION = 0.85  # of a GPU, for an engine


@dataclass(frozen=True)
class EngineConfig:
    """How vLLM is started; see `Config` in train.py for the flags."""

    max_model_len: int = 2048  # prompt + response, tokens
    max_num_seqs: int = 64  # sequences decoded together
    dtype: str = "float32"
    kv_cache_gib: float | None = 1.0  # None: what GPU_MEMORY_UTILIZATION leaves
    tensor_parallel_size: int = 1
    threads: int = 1  # CPU threads of the engine; without meaning on GPUs
    seed: int = 0


def engine_plan(model, config: EngineConfig, parameter_count: int, memory_bytes: int) -> dict:
    """What an engine needs on each of its GPUs, before it is started.

    Args:
        model: the transformers configuration.
        parameter_count: of the model.
        memory_bytes: what a GPU has.

    Returns:
        bytes: `weights`, `logits` (float32, with their log-probabilities, of a batch and of the
        probe), `kv_cache`, and `total`. Numbers: `cache_tokens` that the cache holds, and
        `full_sequences`, how many of the longest sequences those are.

    Raises:
        ValueError: the cache does not hold one sequence of max_model_len.
    """
    size = {"float32": 4, "bfloat16": 2}[config.dtype]
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    # A GPU has at least one key-value head, also where there are more GPUs than heads.
    heads = max(model.num_key_value_heads // config.tensor_parallel_size, 1)
    token = 2 * model.num_hidden_layers * heads * head_dim * size
    plan = {"weights": parameter_count * size // config.tensor_parallel_size,
            "logits": 2 * 4 * model.vocab_size * max(config.max_num_seqs, 256)}
    free = int(GPU_MEMORY_UTILIZATION * memory_bytes) - sum(plan.values())
    plan["kv_cache"] = int(config.kv_cache_gib * 2**30) if config.kv_cache_gib else max(free, 0)
    plan["total"] = sum(plan.values())
    plan["cache_tokens"] = plan["kv_cache"] // token
    plan["full_sequences"] = plan["cache_tokens"] / config.max_model_len
    if plan["full_sequences"] < 1 or plan["kv_cache"] > free:
        needed = plan["total"] - plan["kv_cache"] + max(plan["kv_cache"],
                                                        token * config.max_model_len)
        raise ValueError(
            f"a rank of an engine needs {needed / 2**30:.1f} GiB (weights "
            f"{plan['weights'] / 2**30:.1f}, key-value cache for at least one sequence of "
            f"{config.max_model_len} tokens {token * config.max_model_len / 2**30:.1f}) and has "
            f"{GPU_MEMORY_UTILIZATION * memory_bytes / 2**30:.1f}: use a larger "
            "tensor_parallel, a smaller max_model_len or kv_cache_gib, or bfloat16")
    return plan


class EngineDead(RuntimeError):
    """vLLM's engine process has died; the message says what to look at."""


class WorkerExtension:
    """What vLLM adds to its workers, for `collective_rpc`."""

    def load_published(self, directory: str) -> None:
        """vLLM's layerwise reload, between two engine steps. On CPUs vLLM 0.32 packs the experts
        of a mixture while it sets their kernel up, and when it reloads them it does not: the kernel
        then reads unpacked weights as packed ones. Without a kernel it sets one up again."""
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            for module in self.get_model().modules():
                method = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None
        self.reload_weights(weights_path=directory)


class Engine:
    """vLLM's AsyncLLM behind three blocking calls, safe to use from many threads.

    `generate` samples, `load` swaps the weights in flight, `score` returns the log-probabilities
    of given tokens. All of them may run at the same time.
    """

    def __init__(self, model_dir: str | Path, config: EngineConfig,
                 scratch: str | Path | None = None):
        # vLLM's processes meet through files, which it leaves behind when it is killed.
        self.temporary = tempfile.TemporaryDirectory(prefix="vllm-", dir=scratch)
        os.environ["VLLM_RPC_BASE_PATH"] = self.temporary.name
        # vLLM reads these when it is imported. `spawn` keeps its processes clear of our threads.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", "3600")  # to load and compile
        # vLLM's core and its worker wait for each other by spinning. With 0 a single rank on a CPU
        # has both in one process, still apart from this one, and leaves the cores to the scripts.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=str(model_dir),
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(2048, config.max_model_len),
            tensor_parallel_size=config.tensor_parallel_size,
            # CUDA graphs pay on GPUs, and reloading keeps the tensors that they read. On a CPU,
            # compiling takes longer than it ever saves.
            enforce_eager=current_platform.is_cpu(),
            # vLLM refuses to start where less than this is free, even if the cache has a size.
            gpu_memory_utilization=0.01 if config.kv_cache_gib else GPU_MEMORY_UTILIZATION,
            kv_cache_memory_bytes=(int(config.kv_cache_gib * 2**30)
                                   if config.kv_cache_gib else None),
            # The CPU kernel's tiles: vLLM's own 128 takes 1.2 to 1.4 times as long at 300 tokens.
            block_size=32 if current_platform.is_cpu() else None,
            enable_prefix_caching=True,
            # After temperature, so that they are the behaviour policy's own log-probabilities.
            logprobs_mode="processed_logprobs",
            seed=config.seed,
            disable_log_stats=True,
            worker_extension_cls="rollout.WorkerExtension",
        )
        self.version = 0  # of the weights; `load` sets it
        self.max_model_len = config.max_model_len
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="vllm-loop", daemon=True).start()

        async def start():
            return AsyncLLM.from_engine_args(arguments)

        theirs = {"TMPDIR": self.temporary.name}  # of the processes that it starts
        if current_platform.is_cpu():
            theirs["TORCHDYNAMO_DISABLE"] = "1"
        ours = {name: os.environ.get(name) for name in theirs}
        os.environ.update(theirs)
        try:
            self.llm = self._wait(start())
        finally:
            for name, value in ours.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def _wait(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def _while_alive(self, coroutine):
        """The coroutine's result. vLLM leaves calls pending for ever when its process is killed."""
        from vllm.v1.engine.exceptions import EngineDeadError

        call = asyncio.ensure_future(coroutine)
        try:
            while not call.done():
                await asyncio.wait([call], timeout=1)
                await self.llm.check_health()
            return call.result()
        except EngineDeadError as error:
            call.cancel()
            raise EngineDead("the vLLM engine has died; its own message is above") from error

    async def _request(self, prompt_ids, params):
        from vllm.inputs import TokensPrompt

        # The salt keeps blocks of different versions apart in the prefix cache.
        prompt = TokensPrompt(prompt_token_ids=prompt_ids, cache_salt=f"v{self.version}")
        async for output in self.llm.generate(prompt, params, uuid.uuid4().hex):
            last = output
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
            logprobs=0, flat_logprobs=True,  # the sampled tokens' own log-probabilities, one list
            detokenize=False,
            # Without FINAL_ONLY the last yielded output misses the choices that ended earlier.
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        version = self.version
        output = self._wait(self._while_alive(self._request(prompt_ids, params)))
        completions = []
        for choice in sorted(output.outputs, key=lambda c: c.index):
            ids = list(choice.token_ids)
            assert choice.logprobs.token_ids == ids
            logprobs = np.array(choice.logprobs.logprobs, np.float32)
            completions.append(Completion(ids, logprobs, choice.finish_reason))
        return completions, version

    def score(self, token_ids: list[int]) -> np.ndarray:
        """Log-probabilities of token_ids[1:], each given its prefix: (T - 1,) float32."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)
        output = self._wait(self._while_alive(self._request(token_ids, params)))
        rows = output.prompt_logprobs[1:]  # the first token has no prefix
        if any(i not in row for row, i in zip(rows, token_ids[1:])):
            raise RuntimeError("vLLM has scored other tokens than it was given; try "
                               "VLLM_USE_V2_MODEL_RUNNER=0")
        return np.array([row[i].logprob for row, i in zip(rows, token_ids[1:])], np.float32)

    def load(self, directory: str | Path, version: int) -> None:
        """Swap in the weights of a Hugging Face directory while requests go on.

        It must hold `lm_head.weight` even when that is tied (see `Learner.publish`).
        """
        self._wait(self._while_alive(
            self.llm.collective_rpc("load_published", args=(str(directory),))))
        self.version = version

    def close(self) -> None:
        async def stop():  # on the loop: vLLM cancels tasks of its own there
            self.llm.shutdown()

        self._wait(stop())
        self.llm = None  # vLLM's finaliser fails when it runs as late as the interpreter's exit
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.temporary.cleanup()


# ---------------------------------------------------------------------------------------------
# 4. Rollout


@dataclass
class Request:
    """What the curriculum hands out: one task, rolled out `n` times."""

    task: Task
    n: int
    handout_version: int = 0  # learner's version when the task was handed out
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


def make_trace(task: Task, prompt_ids: list[int], completion: Completion, version: int, text: str
               ) -> Trace:
    """A trace as sampled, before its code has run; `reason` says why there is no code."""
    code, reason = extract_code(text, completion.finish_reason)
    return Trace(
        id=uuid.uuid4().hex[:16],
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


class SandboxRefused(CompetitionError):
    """A script was not executed, or not to its end: no fault of its own, so it must not become a
    reward."""


def record_run(trace: Trace, run: Execution, competition: Competition) -> None:
    """Note in the trace what the sandbox found. Raises SandboxRefused when that is nothing."""
    if run.status == "refused":
        raise SandboxRefused(f"{competition.id}: {run.reason}")
    trace.status, trace.exit_code, trace.seconds = run.status, run.exit_code, run.seconds
    trace.output = own_traceback(run.stderr_tail) or run.stdout_tail.strip()
    trace.validation_score, trace.valid, trace.score = run.validation_score, run.valid, run.score
    trace.medal, trace.human_rank, trace.reason = run.medal, run.human_rank, run.reason
    trace.isolation, trace.reused = run.isolation, run.reused
    trace.claim = claim(trace, competition)


def execute(trace: Trace, task: Task, competition: Competition, sandbox: Sandbox,
            config: RolloutConfig) -> Trace:
    """Run a trace's code, grade it and set its reward; without code there is nothing to run."""
    if not trace.code:
        return trace
    run = sandbox.run(competition, trace.code, timeout=config.timeout)
    record_run(trace, run, competition)
    trace.base_reward = base_reward(run, config.reward)
    held = max(task.parents, key=lambda parent: standing(parent.claim), default=None)
    trace.reward = step_reward(
        trace.base_reward, task.operator,
        parent_base=held.base_reward if held else None,
        unchanged=trace.code_key in [parent.code_key for parent in task.parents],
        preferred=held is None or standing(trace.claim) > standing(held.claim),
    )
    return trace


def claim(trace: Trace, competition: Competition) -> float | None:
    """What an agent chooses by: the validation score that a script printed, such that higher is
    better, and the lowest number that there is when it printed none. None: nothing to hand in."""
    if not trace.valid:
        return None
    if trace.validation_score is None:
        return -sys.float_info.max
    return -trace.validation_score if competition.lower_is_better else trace.validation_score


def standing(claimed: float | None) -> float:
    """A claim as a number to compare: none is the lowest."""
    return -math.inf if claimed is None else claimed


def rollout(request: Request, engine, sandbox, prompter: Prompter, config: RolloutConfig,
            pool: ThreadPoolExecutor, stage=lambda name: None) -> Result:
    """Sample, execute and grade one group.

    Args:
        engine: an `Engine`, or anything with its `generate` and `max_model_len`.
        sandbox: a `Sandbox`, or anything with its `run`.
        pool: runs the group's scripts side by side; the sandbox bounds how many really do.
        stage: is told what begins now.
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
    stage("sampling")
    started = time.monotonic()
    completions, version = engine.generate(prompt_ids, request.n, config.max_response_tokens,
                                           config.temperature)
    generated = time.monotonic()
    stage("executing")
    traces = []
    for completion in completions:
        text = prompter.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        traces.append(make_trace(task, prompt_ids, completion, version, text))
    traces = list(pool.map(lambda t: execute(t, task, competition, sandbox, config), traces))
    group = Group(task, traces, handout_version=request.handout_version)
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
        self.stages = [("waiting for a task", "", time.monotonic())] * threads  # of each thread
        self.threads = [threading.Thread(target=self._run, args=(i,), name=f"rollout-{i}",
                                         daemon=True) for i in range(threads)]
        for thread in self.threads:
            thread.start()

    def _run(self, index: int):
        def stage(name, task_id=""):
            self.stages[index] = (name, task_id, time.monotonic())

        try:
            while (request := self.tasks.get()) is not None:
                result = rollout(request, *self.arguments, self.pool,
                                 lambda name: stage(name, request.task.id))
                stage("handing in a group", request.task.id)
                self.results.put(result)
                stage("waiting for a task")
            self.tasks.put(None)  # for the next thread
        except BaseException as error:  # the owner decides what it means
            self.on_error(error)

    def describe(self) -> str:
        """What the threads are at, and for how long already; for the watchdog."""
        now, stages, parts = time.monotonic(), list(self.stages), []
        for name in sorted({name for name, _, _ in stages}):
            own = [(since, task_id) for other, task_id, since in stages if other == name]
            since, task_id = min(own)
            parts.append(f"{len(own)} threads {name}, the longest for {now - since:.0f} s"
                         + (f" ({task_id})" if task_id else ""))
        return "; ".join(parts)

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
    debug_depth: int = 3  # a script that more debug steps in a row led to is not mended again
    # Wall-clock of one run, waiting included: no step begins later, and a script gets what is left
    # of it when it is handed to the sandbox (a slot may not be free at once). MLE-bench advises 24.
    hours: float = 24.0
    crossover_probability: float = 0.0  # of combining the two best rather than improving the best
    retries: int = 0  # more answers asked for while they repeat a script that was tried [ours]


def data_digest(competition: Competition) -> str:
    """Of what an agent is told and what it is judged by (answers in a directory: by its name)."""
    digest = hashlib.sha256(competition.description.encode() + competition.leaderboard.tobytes())
    if competition.answers.is_file():
        with open(competition.answers, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@dataclass
class AgentRun:
    """One agent on one competition, and its record on disk.

    The folder holds steps.jsonl, a line a step, the best submission so far, step_N.csv, and the
    digest of the competition's data. A run that was killed is taken up after its last line.
    """

    competition: Competition
    seed: int
    traces: list[Trace] = field(default_factory=list)  # in order
    designs: list[str] = field(default_factory=list)  # what each trace set out to do
    hours: float = 0.0  # wall-clock of the steps
    folder: Path | None = None

    @classmethod
    def load(cls, competition: Competition, seed: int, folder: Path) -> "AgentRun":
        """Take up the record in `folder`, which is made when there is none; a torn line is cut.

        Raises:
            CompetitionError: the competition had other data, a line is no step of this agent, or
                the submission is gone; one line that names the file.
        """
        run = cls(competition, seed, folder=folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark, digest = folder / "data.sha256", data_digest(competition)
        if not mark.exists():
            write_whole(mark, digest + "\n")
        elif mark.read_bytes().strip() != digest.encode():
            raise CompetitionError(f"{mark}: {competition.id} has other data now: remove {folder} "
                                   "to run it again, or give another --out")
        log = folder / "steps.jsonl"
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        if lines and not lines[-1].endswith(b"\n"):  # killed while writing it
            os.truncate(log, sum(map(len, lines[:-1])))
            lines.pop()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                run.designs.append(str(row.pop("design")))
                run.hours += row.pop("hours")
                trace = Trace.from_json(row)
                if trace.id != f"{competition.id}/{seed}/{number - 1}":  # one is lost or doubled
                    raise ValueError(f"it is {trace.id}")
                for value in (run.hours, trace.score, trace.validation_score, trace.human_rank):
                    if value is not None and not math.isfinite(value):
                        raise ValueError(f"{value} is no number")
                run.traces.append(trace)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CompetitionError(
                    f"{log}, line {number} is no step of this agent ({type(error).__name__}: "
                    f"{error}): remove {folder} to run it again") from None
        if run.submission and not run.submission.exists():
            raise CompetitionError(f"{run.submission} is gone, which the agent hands in: remove "
                                   f"{folder} to run it again")
        return run

    def add(self, trace: Trace, design: str, hours: float, submission: bytes | None) -> None:
        """Write a step down. The submission's file comes before the line that counts the step, and
        the file that it replaces goes last: a kill loses the step in progress, no more."""
        self.traces.append(trace)
        self.designs.append(design)
        self.hours += hours
        best = self.chosen == len(self.traces) - 1
        if best:
            self.submission.write_bytes(submission)
        with open(self.folder / "steps.jsonl", "a") as log:
            log.write(json.dumps(trace.public() | {"design": design, "hours": hours}) + "\n")
        for old in self.folder.glob("step_*.csv") if best else ():
            if old != self.submission:
                old.unlink()

    @property
    def chosen(self) -> int | None:
        """Position in `traces` of the one that is handed in."""
        return choose_best(self.competition, self.traces)

    @property
    def submission(self) -> Path | None:
        """The file that is handed in."""
        return None if self.chosen is None else self.folder / f"step_{self.chosen + 1}.csv"

    def row(self) -> dict:
        """Its line of report.json. Steps count from 1; null: never."""
        first = next((i for i, t in enumerate(self.traces) if t.valid), None)
        best = self.traces[self.chosen] if self.chosen is not None else None
        executed = [t.seconds / 3600 for t in self.traces if t.code]
        so_far = [choose_best(self.competition, self.traces[:n + 1])
                  for n in range(len(self.traces))]
        return {
            "competition_id": self.competition.id,
            "seed": self.seed,
            "valid": best is not None,
            "medal": best.medal if best else "none",
            "score": best.score if best else None,
            "human_rank": best.human_rank if best else 0.0,
            "human_rank_by_step": [0.0 if i is None else self.traces[i].human_rank
                                   for i in so_far],  # had the run ended there
            "above_median": best is not None and (
                best.score < self.competition.median if self.competition.lower_is_better
                else best.score > self.competition.median),
            "first_draft_valid": bool(self.traces and self.traces[0].valid),
            "steps_to_first_valid": first + 1 if first is not None else None,
            "chosen_step": self.chosen + 1 if self.chosen is not None else None,
            "steps": len(self.traces),
            "different_scripts": len({t.code_key for t in self.traces if t.code}),
            "improvements": max(len(set(so_far) - {None}) - 1, 0),  # of the best script so far
            "hours": self.hours,
            "hours_per_execution": float(np.mean(executed)) if executed else 0.0,
        }


def choose_task(competition: Competition, traces: list[Trace], config: AgentConfig,
                rng: random.Random) -> Task:
    """The next step of the search, from what the agent may know: outcomes and the validation
    scores that the scripts printed, never test scores."""
    def task(operator, parent=None, second=None):  # the caller names it
        return Task("", competition.id, operator, depth=parent.depth + 1 if parent else 0,
                    parent=parent, second=second)

    if sum(t.operator == "draft" for t in traces) < config.drafts:
        return task("draft")
    tried, named = {t.parent_id for t in traces}, {t.id: t for t in traces}

    def repairs(trace):  # debug steps in a row that lead to it
        return 1 + repairs(named[trace.parent_id]) if trace.operator == "debug" else 0

    failures = [t for t in traces if not t.valid and t.code and t.id not in tried
                and repairs(t) <= config.debug_depth]
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
    valid = [i for i, t in enumerate(traces) if t.valid]
    return max(valid, default=None, key=lambda i: claim(traces[i], competition))


def step_prompt(task: Task, memory: str, prompter: Prompter, room: int) -> tuple[Task, list[int]]:
    """The step's task and its prompt, at most `room` tokens: one that is too long loses its memory
    first, then its parent.

    Raises:
        CompetitionError: not even a draft fits.
    """
    draft = Task(task.id, task.competition_id, "draft")
    for task, memory in ((task, memory), (task, ""), (draft, "")):
        prompt_ids = prompter(task, memory)
        if len(prompt_ids) <= room:
            return task, prompt_ids
    raise CompetitionError(f"{task.competition_id}: a prompt of {len(prompt_ids)} tokens leaves no "
                           "room for --max-response-tokens; raise --max-model-len or lower "
                           "--description-chars, --preview-chars")


def run_agent(competition: Competition, seed: int, engine, sandbox, prompter: Prompter,
              config: RolloutConfig, agent: AgentConfig, folder: Path,
              progress=lambda steps: None) -> AgentRun:
    """One run of the agent: `agent.steps` scripts, then the best by validation score.

    `seed` decides the search's own choices, step by step; the responses are the engine's to sample.
    `folder` is the run's record: what it holds already is not done again.

    Raises:
        CompetitionError: scripts are refused, or the prompt leaves no room for a response.
    """
    run = AgentRun.load(competition, seed, folder)
    progress(len(run.traces))
    for step in range(len(run.traces), agent.steps):
        left = 3600 * (agent.hours - run.hours)
        if left <= 0:
            break
        started = time.monotonic()
        name = f"{competition.id}/{seed}/{step}"  # a task of its own, whatever it starts from
        chosen = replace(choose_task(competition, run.traces, agent, random.Random(name)), id=name)
        # AIDE shows its memory to drafts and improvements.
        memory = "" if chosen.operator == "debug" else recall(run.traces, run.designs,
                                                              prompter.budget.memory)
        task, prompt_ids = step_prompt(chosen, memory, prompter,
                                       engine.max_model_len - config.max_response_tokens)
        tried = {t.code_key for t in run.traces if t.code}
        for _ in range(agent.retries + 1):
            completions, version = engine.generate(prompt_ids, 1, config.max_response_tokens,
                                                   config.temperature)
            text = prompter.tokenizer.decode(completions[0].token_ids, skip_special_tokens=True)
            trace = make_trace(task, prompt_ids, completions[0], version, text)
            if trace.code_key not in tried:
                break  # a script that is new, or no script
        trace.id, submission = task.id, None
        if chosen.operator == "debug" and task.operator == "draft":
            trace.parent_id = chosen.parent.id  # too long to be shown: it is not chosen again
        if trace.code:
            left = max(left - (time.monotonic() - started), 0.1)  # sampling has taken some
            execution = sandbox.run(competition, trace.code, timeout=min(config.timeout, left))
            record_run(trace, execution, competition)
            submission = execution.submission
        run.add(trace, design_of(text), (time.monotonic() - started) / 3600, submission)
        progress(1)
    return run


def evaluate(competitions: list[Competition], seeds: range, engine, sandbox, prompter: Prompter,
             config: RolloutConfig, agent: AgentConfig, parallel: int, folder: Path
             ) -> list[AgentRun]:
    """Every competition with every seed, `parallel` agents at a time, each with a record in
    `folder`. The first error ends all: nothing that was written down is lost."""
    from tqdm import tqdm

    pool, jobs = ThreadPoolExecutor(parallel), []
    total = len(seeds) * len(competitions) * agent.steps
    with tqdm(total=total, desc="agents", unit="step") as bar:
        try:
            for seed in seeds:
                for competition in competitions:
                    jobs.append(pool.submit(
                        run_agent, competition, seed, engine, sandbox, prompter, config, agent,
                        folder / f"{competition.id}-{seed}", bar.update))
            for job in as_completed(jobs):
                job.result()  # raises what has ended it
            return [job.result() for job in jobs]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# 6. The report of an evaluation


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
    "different_scripts": lambda r, steps: r["different_scripts"],
    "improvements": lambda r, steps: r["improvements"],
    "hours_per_competition": lambda r, steps: r["hours"],
    "hours_per_execution": lambda r, steps: r["hours_per_execution"],
}


def report_totals(rows: list[dict], steps: int) -> dict:
    """Mean over competitions, then mean and standard error (ddof 1) over seeds."""
    seeds = sorted({r["seed"] for r in rows})
    totals = {}
    for name, value in RATES.items():
        means = [np.mean([value(r, steps) for r in rows if r["seed"] == s]) for s in seeds]
        sem = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
        totals[name] = {"mean": float(np.mean(means)), "sem": sem}
    return totals


def describe_hardware() -> dict:
    """What an evaluation ran on, for its report."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    return {"cpu": cpu.group(1) if cpu else platform.machine(),
            "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory / 2**30, 1),
            "gpus": gpus, "system": platform.platform()}


def write_report(path: Path, runs: list[AgentRun], agent: AgentConfig, model: str,
                 **facts) -> dict:
    """report.json, and beside it submissions.jsonl for `mlebench grade`; of a report of another
    name, such as a.json, a-submissions.jsonl."""
    rows = [run.row() for run in runs]
    report = {"model": model, "agent": vars(agent), **facts, "hardware": describe_hardware(),
              "runs": rows, "totals": report_totals(rows, agent.steps)}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ""
    for run in runs:
        file = str(run.submission.resolve()) if run.submission else None
        lines += json.dumps({"competition_id": run.competition.id, "submission_path": file}) + "\n"
    prefix = "" if path.stem == "report" else f"{path.stem}-"
    write_whole(path.with_name(f"{prefix}submissions.jsonl"), lines)
    write_whole(path, json.dumps(report, indent=1) + "\n")
    return report


def print_report(report: dict) -> None:
    """A table: competitions down, then the totals."""
    rows = report["runs"]
    print(f"{'competition':28} {'valid':>6} {'medals':>7} {'human rank':>11} "
          f"{'first valid step':>17}")
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
    if len({r["seed"] for r in rows}) < 3:
        print("fewer than 3 seeds: MLE-bench asks for at least 3, and for their standard error")


# ---------------------------------------------------------------------------------------------
# 7. What this command and train.py share


def write_whole(path: Path, text: str) -> None:
    """Write a file at one stroke: a kill meanwhile leaves the old one, or none."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


class RecordLock(io.FileIO):
    """A file under an exclusive lock that ends when it is closed, or with the process."""

    def __init__(self, path: Path):
        super().__init__(path, "w")
        self.owner = os.getpid()
        fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        # Said aloud: a child that another thread is just starting has the file open, too.
        if not self.closed and os.getpid() == self.owner:
            fcntl.flock(self, fcntl.LOCK_UN)
        super().close()


def lock_record(folder: Path, flag: str = "--out") -> RecordLock:
    """The lock that says that this process writes to `folder`, which `flag` has named.

    Raises:
        CompetitionError: another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return RecordLock(folder / "lock")
    except BlockingIOError:
        raise CompetitionError(f"{flag} {folder}: another program is writing to it; wait for its "
                               "end, or give another folder") from None
    except OSError as error:
        raise CompetitionError(f"{flag}: {error}") from None


def read_settings(path: str | Path, known) -> list[str]:
    """A YAML file of flags -> the command line that it stands for; dashes or underscores.

    Raises:
        ValueError: one line that names the file and the field.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: must be a mapping of flags to values")
    words = []
    for name, value in values.items():
        flag = str(name).replace("_", "-")
        if flag.replace("-", "_") not in known:
            raise ValueError(f"--config {path}: there is no flag --{flag}")
        if not isinstance(value, (str, int, float)):
            raise ValueError(f"--config {path}: {name} must be one value")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag}={value}")
    return words


def gpus_of_slots(listed: str, slots: int, first: int = 0) -> list[str] | None:
    """CUDA_VISIBLE_DEVICES of each sandbox slot: one of the listed GPUs, in turn; `first` is the
    number of slots that other processes have already given theirs.

    >>> gpus_of_slots("4,5", 3), gpus_of_slots("4,5", 1, first=3), gpus_of_slots("", 2)
    (['4', '5', '4'], ['5'], None)
    """
    ids = [part.strip() for part in listed.split(",") if part.strip()]
    return [ids[(first + slot) % len(ids)] for slot in range(slots)] if ids else None


def check_model(directory: str, max_model_len: int) -> None:
    """Refuse, before anything is started, a directory that vLLM and the prompts cannot use.

    Raises:
        ValueError: one line that says why.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    for names, remedy in (
            (("config.json",), "give a Hugging Face model directory, such as the policy/ of a run"),
            (("tokenizer.json", "tokenizer_config.json"), "save one into it with tokenizer."
             "save_pretrained, or give the policy/ of a run"),  # a run directory has the first
            (("*.safetensors", "*.bin"), "save the weights into it with model.save_pretrained")):
        if not any(file.is_file() for name in names for file in Path(directory).glob(name)):
            raise ValueError(f"--model {directory}: no {names[0]} there; {remedy}")
    try:
        part = "config.json"
        model = AutoConfig.from_pretrained(directory)
        part = "tokenizer, or its chat template,"
        encode_chat(AutoTokenizer.from_pretrained(directory), [{"role": "user", "content": "?"}])
        part = "weights"
        for file in Path(directory).glob("*.safetensors"):
            with safe_open(file, "np"):  # its header, which knows how long the file has to be
                pass
    except Exception as error:  # of libraries, which raise what they like
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"--model {directory}: its {part} cannot be used ({why}); save it again, "
                         "or give another model directory") from None
    limit = getattr(model, "max_position_embeddings", None)
    scaled = (getattr(model, "rope_parameters", None) or {}).get("rope_type") != "default"
    if limit and limit < max_model_len and not scaled:
        raise ValueError(f"--max-model-len {max_model_len}: --model {directory} is made for "
                         f"{limit} tokens at most")


def trained_on(model: str | Path) -> list[str]:
    """Ids of the competitions that the policy of a run directory has seen; [] when not known."""
    path = Path(model).resolve().parent / "splits.json"  # train.py writes it beside policy/
    try:
        return json.loads(path.read_text())["train"] if path.exists() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompetitionError(f"{path} cannot be read ({type(error).__name__}: {error}): it says "
                               "what the policy was trained on; restore or remove it") from None


def leave(status: int) -> None:
    """End this process at once: threads of vLLM, gloo and the queues still run, and some of them do
    not survive it when the interpreter is taken down under them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def scratch_folder(name: str, needed: float = 0) -> Path:
    """A folder, mode 700, that the guard removes: in shared memory where that has room for `needed`
    bytes (in containers it is often 64 MB), else in the temporary folder. (The name is short: the
    path of a socket, and vLLM makes some here, may have no more than 107 characters.)"""
    shm = "/dev/shm"
    roomy = os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > needed
    return Path(tempfile.mkdtemp(prefix=f"acegrpo-{name}-", dir=shm if roomy else None))


def guard(owner: int, group: int, folders: list[str]) -> None:
    """The guard's whole program, so it imports for itself: wait for the end of process `owner`,
    then kill the processes of its group (0: none) and those whose environment names one of the
    folders, and remove the folders and the shared memory that these processes have left."""
    import os, pathlib, re, select, shutil, signal, time  # noqa: E401

    shared = set()

    def is_ours(process, pgrp):
        if group and pgrp == group:
            return True
        environ = (process / "environ").read_bytes()  # vLLM's processes are told their folder
        return any(f"={folder}/".encode() in environ for folder in folders)

    def members():
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
                if state not in "ZX" and is_ours(stat.parent, int(pgrp)):
                    # By inode: a semaphore is made under another name than it has then.
                    maps = (stat.parent / "maps").read_text()
                    shared.update(re.findall(" ([0-9]+) +/dev/shm/(?:psm_|sem[.])", maps))
                    yield int(stat.parent.name), (stat.parent / "cmdline").read_bytes()
            except OSError:
                pass  # it has ended meanwhile, or is somebody else's

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        ended = os.pidfd_open(owner)
        while True:
            list(members())  # notes which shared memory is in use
            if select.select([ended], [], [], 5)[0]:
                break
    except ProcessLookupError:
        pass  # it ended before we got here
    # Python's resource trackers unlink shared memory and semaphores once their clients are dead;
    # what a tracker that was killed itself can no longer unlink, we do.
    deadline = time.monotonic() + 5
    while (alive := list(members())) and time.monotonic() < deadline + 60:
        for pid, command in alive:
            if b"resource_tracker" not in command or time.monotonic() > deadline:
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
        select.select([], [], [], 0.05)
    for path in pathlib.Path("/dev/shm").glob("*"):
        try:
            if path.name.startswith(("psm_", "sem.")) and str(path.stat().st_ino) in shared:
                path.unlink()
        except OSError:
            pass  # it has gone meanwhile
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def guard_command(owner: int, group: int, folders: list[Path]) -> list[str]:
    """The command line that runs `guard` in a bare interpreter."""
    call = f"guard({owner}, {group}, {[str(folder) for folder in folders]})"
    return [sys.executable, "-ISc", f"{inspect.getsource(guard)}\n{call}"]


def start_guard(folders: list[Path]) -> None:
    """Start a process that outlives this one and cleans up when it has ended, however it did.

    It removes folders, and kills the processes whose environment names one (vLLM's engine, which
    survives a kill -9 of its owner and would keep its GPU) and, when this process leads a session
    of its own, as every rank under torchrun does, what is left of its group. (The sandbox's fork
    server has a session of its own, and ends with its owner.) Needs Linux 5.3 (pidfd_open).
    """
    leads = os.getsid(0) == os.getpid()
    command = guard_command(os.getpid(), os.getpid() if leads else 0, folders)
    # Not this process's environment: another guard would take this one for an engine.
    environ = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}

    def start():
        return subprocess.Popen(command, env=environ, start_new_session=True,
                                stdin=subprocess.DEVNULL)

    def replace_killed(process):
        while process.wait() < 0:  # killed by a signal
            process = start()

    threading.Thread(target=replace_killed, args=(start(),), name="guard", daemon=True).start()


# ---------------------------------------------------------------------------------------------
# 8. The command


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # one line, without 20 of usage


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Evaluate a policy as an agent: greedy tree search on every competition.",
        epilog="The same command again goes on with an evaluation that was interrupted.",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--config", help="YAML file of these flags; those given here win over it")
    add("--model", required=True, help="Hugging Face model directory")
    add("--competitions", required=True,
        help="lite (MLE-bench-Lite), all (MLE-bench), a file of ids, or a directory")
    add("--data-dir", help="where `mlebench prepare` has put its data; default: its own default")
    add("--allow-overlap", action=switch, default=False,
        help="evaluate on competitions that the model was trained on")
    add("--out", default="report.json", help="report to write; submissions beside it")
    # the agent
    add("--steps", type=int, default=AgentConfig.steps, help="scripts an agent may try")
    add("--seeds", type=int, default=3, help="runs per competition")
    add("--hours", type=float, default=AgentConfig.hours, help="wall-clock of one run")
    add("--drafts", type=int, default=AgentConfig.drafts, help="drafts before anything else")
    add("--debug-probability", type=float, default=AgentConfig.debug_probability,
        help="probability of mending a failure rather than improving the best")
    add("--debug-depth", type=int, default=AgentConfig.debug_depth,
        help="a script that more debug steps in a row than this led to is not mended again")
    add("--crossover-probability", type=float, default=AgentConfig.crossover_probability,
        help="probability of combining the two best rather than improving the best")
    add("--retries", type=int, default=AgentConfig.retries, help="answers asked for again, a step, "
        "while they repeat a script that this agent has tried already")
    add("--parallel", type=int, default=32, help="agents at a time")
    # the scripts
    add("--slots", type=int, default=2, help="scripts that run at the same time")
    add("--sandbox-gpus", default="",
        help="GPU ids for the scripts, e.g. 0,1: one for each slot in turn; '' for none")
    add("--timeout", type=float, default=10.0, help="wall-clock limit of a script, seconds")
    add("--cpu-seconds", type=float, default=0.0,
        help="CPU limit of a script; 0: timeout * threads")
    add("--threads", type=int, default=1, help="OpenMP and BLAS threads of a script")
    add("--memory-mb", type=int, default=2048, help="memory limit of a script, MB")
    add("--disk-mb", type=int, default=256, help="limit of what a script writes, MB")
    add("--reuse-mb", type=float, default=256.0, help="memory for results of scripts: one that "
        "comes again on the same competition is not run again; 0: all are run")
    add("--unsafe", action=switch, default=False, help="run scripts without isolation")
    # prompts and engine
    add("--temperature", type=float, default=1.0, help="sampling temperature")
    add("--max-model-len", type=int, default=1024, help="prompt + response, tokens")
    add("--max-response-tokens", type=int, default=256, help="tokens")
    add("--description-chars", type=int, default=600, help="in the prompt")
    add("--preview-chars", type=int, default=240, help="data preview in the prompt")
    add("--output-chars", type=int, default=300, help="output in the prompt")
    add("--memory-chars", type=int, default=0, help="earlier attempts in the prompt; 0: none")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the engine")
    add("--tensor-parallel", type=int, default=1, help="GPUs of the engine")
    add("--max-num-seqs", type=int, default=64, help="sequences decoded together")
    add("--kv-cache-gib", type=float, default=1.0, help="0: vLLM's fraction of the GPU memory")
    return parser


# Flags that may differ when an evaluation goes on: no run of it is another one for them.
MAY_CHANGE = ("config out model parallel slots sandbox_gpus reuse_mb seeds competitions data_dir "
              "allow_overlap max_num_seqs").split()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line -> flags; those of a --config file come first, so that given ones win."""
    parser = make_parser()
    words = sys.argv[1:] if argv is None else argv
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    if path := first.parse_known_args(words)[0].config:
        required = ["--model=", "--competitions="]
        own = read_settings(path, set(vars(parser.parse_args(required))) - {"config"})
        try:
            parser.parse_args(required + own)
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from None
        words = own + list(words)
    args = parser.parse_args(words)
    for names, right, what in (
            ("steps seeds parallel slots threads memory_mb disk_mb max_num_seqs "
             "tensor_parallel max_response_tokens", lambda x: x >= 1, "be at least 1"),
            ("hours timeout", lambda x: 0 < x <= 1e6, "be in (0, 1e6]"),
            ("debug_probability crossover_probability", lambda x: 0 <= x <= 1, "be in [0, 1]"),
            ("drafts debug_depth retries temperature cpu_seconds kv_cache_gib description_chars "
             "preview_chars output_chars memory_chars reuse_mb", lambda x: 0 <= x < math.inf,
             "be finite, and not negative")):
        for name in names.split():
            if not right(getattr(args, name)):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must {what}, not {getattr(args, name)}")
    if args.max_response_tokens >= args.max_model_len:
        raise ValueError("--max-response-tokens must be smaller than --max-model-len, which holds "
                         "prompt and response")
    return args


def check_overlap(model: Path, competitions: list[Competition]) -> None:
    """Refuse competitions that the policy of a run directory was trained on.

    Raises:
        CompetitionError: one line that names the first of them.
    """
    if both := {c.id for c in competitions} & set(trained_on(model)):
        raise CompetitionError(f"--competitions: {min(both)} was a training competition of "
                               f"{model}; --allow-overlap evaluates on it all the same")


def settings_of(args: argparse.Namespace) -> dict:
    """What decides the outcome of an evaluation: flags, and the weights' names, sizes and times."""
    model = Path(args.model).resolve()
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns)
               for p in sorted(model.glob("*.safetensors"))]
    return {k: v for k, v in vars(args).items() if k not in MAY_CHANGE} | {
        "weights": weights or str(model)}


def check_settings(folder: Path, settings: dict) -> None:
    """Make `folder` the record of an evaluation with these settings, or go on with the one there.

    Raises:
        CompetitionError: it holds an evaluation with other settings; runs must not be mixed.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_whole(path, json.dumps(settings, indent=1) + "\n")
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CompetitionError(f"{path} cannot be read ({error}): give another --out, or remove "
                               f"{folder}") from None
    for name in (settings.keys() | found.keys()) - set(MAY_CHANGE):
        if settings.get(name) != found.get(name):
            raise CompetitionError(
                f"{folder} holds an evaluation with {name} {found.get(name)!r}, not "
                f"{settings.get(name)!r}: give another --out, or remove it")


def prepare(args: argparse.Namespace) -> tuple[list[Competition], Path]:
    """Refuse what cannot be evaluated, before anything is started.

    Returns:
        The competitions, and the folder beside the report that holds the runs' records.

    Raises:
        ValueError, OSError: one line that names the flag or the file.
    """
    model, out = Path(args.model), Path(args.out)
    check_model(args.model, args.max_model_len)
    competitions = load_competitions(args.competitions, args.data_dir)
    if not args.allow_overlap:
        check_overlap(model, competitions)
    if os.path.isdir(out):
        raise ValueError(f"--out {out}: is a directory; name a file, such as {out}/report.json")
    return competitions, out.parent / f"{out.stem}-runs"


def make_prompter(args: argparse.Namespace, competitions: list[Competition]) -> Prompter:
    """What makes the prompts, once every competition's draft has been seen to fit.

    Raises:
        CompetitionError: one does not.
    """
    from transformers import AutoTokenizer

    prompter = Prompter(AutoTokenizer.from_pretrained(args.model), competitions, PromptBudget(
        args.description_chars, args.preview_chars, args.output_chars, args.memory_chars))
    for competition in competitions:
        step_prompt(Task("", competition.id, "draft"), "", prompter,
                    args.max_model_len - args.max_response_tokens)
    return prompter


def run_evaluation(args: argparse.Namespace, competitions: list[Competition], folder: Path) -> int:
    """From the start of the sandbox and the engine to the report; the exit status."""
    agent = AgentConfig(**{f.name: getattr(args, f.name) for f in fields(AgentConfig)})
    config = RolloutConfig(args.max_response_tokens, args.temperature, timeout=args.timeout)
    gpus = gpus_of_slots(args.sandbox_gpus, args.slots)
    prompter = make_prompter(args, competitions)
    for competition in competitions:
        for seed in range(args.seeds):  # a damaged record is refused now, not in a minute
            AgentRun.load(competition, seed, folder / f"{competition.id}-{seed}")
    recorded = sum(log.read_bytes().count(b"\n") for log in folder.glob("*/steps.jsonl"))
    with Sandbox(
            slots=args.slots, timeout=args.timeout, cpu_seconds=args.cpu_seconds or None,
            memory_mb=args.memory_mb, disk_mb=args.disk_mb, file_mb=args.disk_mb,
            threads=args.threads,
            gpus=gpus, unsafe=args.unsafe, attempts=4, reuse_mb=args.reuse_mb) as sandbox:
        if sandbox.problem:
            print(f"rollout.py: scripts cannot be isolated here: {sandbox.problem}; --unsafe runs "
                  "them without isolation", file=sys.stderr)
            return 3
        scratch = scratch_folder("evaluation")
        start_guard([scratch])
        print("starting vLLM, a minute or two", flush=True)
        engine = Engine(args.model, EngineConfig(
            max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs, dtype=args.dtype,
            tensor_parallel_size=args.tensor_parallel, kv_cache_gib=args.kv_cache_gib or None,
            # An evaluation that goes on must not meet the random numbers of what it did before.
            seed=recorded), scratch=scratch)
        try:
            runs = evaluate(competitions, range(args.seeds), engine, sandbox, prompter, config,
                            agent, args.parallel, folder)
        finally:
            engine.close()
    limits = {"hours_per_competition": args.hours, "hours_per_execution": args.timeout / 3600,
              "scripts_at_a_time": args.slots, "threads": args.threads, "memory_mb": args.memory_mb,
              "gpus": gpus or [], "isolation": sandbox.isolation}
    report = write_report(Path(args.out), runs, agent, args.model, seeds=args.seeds, limits=limits)
    print_report(report)
    print(f"wrote {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Exit status: 0 done, 1 the engine or the program failed, 2 bad input or a
    file that cannot be read or written, 3 no isolation, 130 interrupted. No exception leaves it:
    the threads of agents that it cuts off would keep the process alive."""
    try:
        try:
            args = parse_arguments(argv)
            competitions, folder = prepare(args)
        except ValueError as error:
            raise CompetitionError(error) from None
        with lock_record(folder):
            check_settings(folder, settings_of(args))
            return run_evaluation(args, competitions, folder)
    except (CompetitionError, OSError) as error:
        print("rollout.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EngineDead) as error:
        what = str(error) or "\ninterrupted"
        print(f"{what}; the same command goes on", file=sys.stderr)
        return 1 if isinstance(error, EngineDead) else 130
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    if status := main():
        leave(status)  # agents that an error cut off still wait, for an engine that is gone
