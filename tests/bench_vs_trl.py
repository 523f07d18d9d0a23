"""One GRPO step of this repository and of `trl.GRPOTrainer`, side by side on the CPU.

The same random-init Qwen3 of 5.2M parameters (hidden 256, 6 layers, vocabulary 2048), the same
8 prompts x 8 completions of up to 200 tokens, a reward that costs nothing, the same number of
threads. Ours: generation by vLLM, `Learner.step`, publication, weights into the engine, one after
another; and overlapped, as train.py has it. TRL: its own generation by transformers, without
gradient checkpointing, in float32; with --bf16 also in its default bfloat16, and the faster of the
two is compared.

TRL is not a dependency: install it into a venv of its own that sees this one's packages through
a .pth file, so that both sides run the same torch and transformers.

    python -m venv --without-pip /tmp/trl
    python -c "import torch; print(torch.__path__[0] + '/..')" \
        > /tmp/trl/lib/python3.11/site-packages/base.pth
    python -m pip --python /tmp/trl/bin/python install trl==1.16.0
    python tests/bench_vs_trl.py --trl-python /tmp/trl/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROMPTS, GENERATIONS, RESPONSE, VOCABULARY = 8, 8, 200, 2048


def make_model(directory: Path) -> None:
    """The policy, and a tokenizer of one word a token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=752, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    model.save_pretrained(directory)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                            eos_token="<eos>").save_pretrained(directory)


def prompt_ids(tokens: int, step: int) -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(step)
    return rng.integers(2, VOCABULARY, (PROMPTS, tokens)).tolist()


def reward(ids) -> float:
    """Costs nothing, and differs within a group."""
    return sum(i % 2 for i in ids) / max(len(ids), 1)


def our_side(model_dir: Path, args: argparse.Namespace) -> dict:
    """With --overlap the next batch is generated while this one is learnt from, as train.py does
    it (eta = 1); engine and learner then have half of the threads each."""
    import numpy as np
    import torch

    import grpo
    from learner import Learner, LearnerConfig, Sequence
    from rollout import Engine, EngineConfig

    threads = max(args.threads // 2, 1) if args.overlap else args.threads
    torch.set_num_threads(threads)
    engine = Engine(model_dir, EngineConfig(max_model_len=args.prompt_tokens + RESPONSE,
                                            max_num_seqs=PROMPTS * GENERATIONS, threads=threads))
    learner = Learner(model_dir, LearnerConfig(
        learning_rate=1e-6, max_response_tokens=RESPONSE, dtype="float32",
        share_prompts=not args.no_share))
    pool = ThreadPoolExecutor(PROMPTS)

    def group(prompt: list[int]):
        return engine.generate(prompt, GENERATIONS, RESPONSE)[0], time.perf_counter()

    def generate(step: int):
        """(prompts, when they were asked for, futures of their groups)"""
        prompts = prompt_ids(args.prompt_tokens, step)
        return prompts, time.perf_counter(), [pool.submit(group, prompt) for prompt in prompts]

    rows, batch = [], generate(0)
    for step in range(args.warmup + args.steps):
        start = time.perf_counter()
        prompts, asked, futures = batch if args.overlap or step == 0 else generate(step)
        groups, answered = zip(*(future.result() for future in futures))
        if args.overlap:
            batch = generate(step + 1)
        rewards = torch.tensor([[reward(c.token_ids) for c in row] for row in groups])
        advantages = grpo.group_advantages(rewards, "dr_grpo")  # (B, G)
        begin, cpu = time.perf_counter(), time.process_time()
        metrics = learner.step([
            Sequence(np.array(prompts[i] + list(c.token_ids), np.int32), len(prompts[i]),
                     np.asarray(c.logprobs, np.float32), float(advantages[i, j]))
            for i in range(PROMPTS) for j, c in enumerate(groups[i])])
        learned, cpu = time.perf_counter(), time.process_time() - cpu
        learner.publish(model_dir.parent / "published")
        engine.load(model_dir.parent / "published", learner.version)
        done = time.perf_counter()
        rows.append(dict(generation=max(answered) - asked, learning=learned - begin,
                         learning_cpu=cpu, sync=done - learned, step=done - start,
                         tokens=metrics["tokens_total"], response_tokens=metrics["tokens"],
                         logprob_diff=metrics["logprob_diff"]))
    pool.shutdown()
    engine.close()
    return average(rows[args.warmup :])


def trl_side(model_dir: Path, args: argparse.Namespace) -> dict:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(args.threads)
    total = args.warmup + args.steps
    texts = [" ".join(f"w{i}" for i in ids) for step in range(total)
             for ids in prompt_ids(args.prompt_tokens, step)]
    rows, clock = [], {}

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            out = super()._generate_and_score_completions(inputs)
            clock["generation"] = time.perf_counter() - start
            clock["cpu"] = time.process_time()
            clock["response_tokens"] = int(out["completion_mask"].sum())
            clock["tokens"] = clock["response_tokens"] + int(out["prompt_mask"].sum())
            return out

    class Timer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock["start"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            step = time.perf_counter() - clock["start"]
            cpu = time.process_time() - clock["cpu"]
            rows.append(dict(generation=clock["generation"], learning=step - clock["generation"],
                             learning_cpu=cpu, step=step, tokens=clock["tokens"],
                             response_tokens=clock["response_tokens"]))

    trainer = Trainer(
        model=str(model_dir), train_dataset=Dataset.from_dict({"prompt": texts}),
        reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
        args=GRPOConfig(
            output_dir=str(model_dir.parent / "trl"), use_cpu=True, bf16=args.trl_bf16,
            gradient_checkpointing=False, per_device_train_batch_size=PROMPTS * GENERATIONS,
            num_generations=GENERATIONS, max_completion_length=RESPONSE, max_steps=total,
            learning_rate=1e-6, beta=0.0, loss_type="dr_grpo", scale_rewards="none", top_k=0,
            report_to="none", save_strategy="no", logging_steps=10_000, disable_tqdm=True,
            dataloader_pin_memory=False),
        callbacks=[Timer()])
    trainer.train()
    return average(rows[args.warmup :])


def average(rows: list[dict]) -> dict:
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    mean["learner_tokens_per_second"] = mean["tokens"] / mean["learning"]
    mean["generated_tokens_per_second"] = mean["response_tokens"] / mean["generation"]
    return {key: round(value, 5 if key == "logprob_diff" else 2) for key, value in mean.items()}


def run_side(name: str, args: argparse.Namespace, python: str, *options: str) -> dict:
    """A side in a process of its own, so that neither inherits the other's threads."""
    command = [python, __file__, "--side", name, "--model", str(args.model), "--steps",
               str(args.steps), "--threads", str(args.threads), "--prompt-tokens",
               str(args.prompt_tokens), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not lines:
        raise SystemExit(f"the side {name} {options} failed: {result.stdout[-2000:]}")
    print(f"{name} {' '.join(options)}  load {os.getloadavg()[0]:.1f}\n  {lines[-1]}", flush=True)
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", help="the interpreter of the venv that has TRL 1.16")
    parser.add_argument("--steps", type=int, default=3, help="measured steps (default 3)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--bf16", action="store_true", help="let TRL try bfloat16 too: quicker "
                        "where the CPU computes in it, and many times slower where it does not")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--overlap", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-share", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--trl-bf16", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "ours":
        print(json.dumps(our_side(args.model, args)))
        return
    if args.side == "trl":
        print(json.dumps(trl_side(args.model, args)))
        return
    if not args.trl_python:
        raise SystemExit("TRL is not among this repository's dependencies: make a venv that has "
                         "it, as the docstring shows, and pass --trl-python")
    with tempfile.TemporaryDirectory() as directory:
        args.model = Path(directory) / "model"
        make_model(args.model)
        ours = run_side("ours", args, sys.executable)
        overlapped = run_side("ours", args, sys.executable, "--overlap")
        run_side("ours", args, sys.executable, "--no-share")
        sides = ((), ("--trl-bf16",)) if args.bf16 else ((),)
        trl = min((run_side("trl", args, args.trl_python, *options) for options in sides),
                  key=lambda side: side["step"])
    print(f"\n{'':16}{'ours':>9}{'TRL':>9}{'ratio':>8}")
    for name in ("step", "generation", "learning", "learning_cpu"):
        print(f"{name + ', s':16}{ours[name]:9.2f}{trl[name]:9.2f}{trl[name] / ours[name]:8.2f}")
    print(f"{'overlapped, s':16}{overlapped['step']:9.2f}{trl['step']:9.2f}"
          f"{trl['step'] / overlapped['step']:8.2f}")
    for name in ("learner_tokens_per_second", "generated_tokens_per_second"):
        print(f"{name}: {ours[name]:.0f} against {trl[name]:.0f}")


if __name__ == "__main__":
    main()
