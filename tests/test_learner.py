"""The learner on toy models: packing is exact, cuts change nothing, ranks agree, state survives.

Run: python -m pytest tests/test_learner.py
As a script it is the worker of the tests with several ranks:
    torchrun --nproc_per_node=3 tests/test_learner.py DIR
"""

import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
import learner as L  # noqa: E402

torch.set_num_threads(1)
VOCABULARY, LONGEST = 64, 24
COMMON = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
              max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=None)
FAMILIES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, tie_word_embeddings=True)),
    "qwen3_untied": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(
        **COMMON, sliding_window=8, layer_types=["sliding_attention", "full_attention"])),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        decoder_sparse_step=1, norm_topk_prob=True)),
}


def make_models(directory: Path) -> dict[str, Path]:
    for name, build in FAMILIES.items():
        torch.manual_seed(0)
        build().save_pretrained(directory / name)
        (directory / name / "tokenizer.json").write_text("{}")
    return {name: directory / name for name in FAMILIES}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def make_sequences(groups: int = 3, size: int = 4, seed: int = 0) -> list[L.Sequence]:
    """Groups of one prompt each; responses of 1..LONGEST tokens, one of a single token."""
    rng, sequences = np.random.default_rng(seed), []
    for _ in range(groups):
        prompt = rng.integers(0, VOCABULARY, rng.integers(1, 15), dtype=np.int32)
        for i in range(size):
            length = 1 if i == 0 else int(rng.integers(2, LONGEST + 1))
            response = rng.integers(0, VOCABULARY, length, dtype=np.int32)
            logprobs = -4 + 0.3 * rng.normal(size=length)
            sequences.append(L.Sequence(np.concatenate([prompt, response]), len(prompt),
                                        logprobs.astype(np.float32), float(rng.normal())))
    return sequences


def make_config(**changes) -> L.LearnerConfig:
    return L.LearnerConfig(**{**dict(max_response_tokens=LONGEST, token_budget=128,
                                     entropy_coef=0.01, learning_rate=1e-3), **changes})


def step_gradient(learner: L.Learner, sequences: list[L.Sequence]):
    """Metrics and unclipped gradient of a step that does not move the parameters."""
    found, step = {}, learner.optimizer.step
    learner.optimizer.step = lambda: found.update(
        (n, p.grad.clone()) for n, p in learner.policy.named_parameters())
    limit, learner.config.max_grad_norm = learner.config.max_grad_norm, math.inf
    metrics = learner.step(sequences)
    learner.optimizer.step, learner.config.max_grad_norm = step, limit
    return metrics, found


def assert_same_gradient(one: dict, two: dict, tolerance: float = 1e-5):
    for name, gradient in one.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (gradient - two[name]).abs().max() <= tolerance * scale, name


def parameters(learner: L.Learner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in learner.policy.named_parameters()}


def alone_logprobs(model, sequence: L.Sequence) -> torch.Tensor:
    """The reference: transformers' own forward pass of one sequence, nothing packed."""
    tokens = torch.tensor(sequence.tokens, dtype=torch.long)[None]  # (1, P + T)
    logp = model(tokens).logits[0].log_softmax(-1)  # (P + T, V)
    targets = tokens[0, sequence.prompt_length :]  # (T,)
    return logp[sequence.prompt_length - 1 : -1].gather(-1, targets[:, None])[:, 0]  # (T,)


# --------------------------------------------------------------------------- packed = alone


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(models, family, share):
    sequences = make_sequences()
    learner = L.Learner(models[family], make_config(), device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(models[family], attn_implementation="eager")
    batch = L.MicroBatch.build(sequences, learner.device, share)
    with torch.no_grad():
        packed, _ = learner.policy(batch)
        alone = torch.cat([alone_logprobs(reference, s) for s in sequences])
    assert (packed - alone).abs().max() < 2e-5
    assert any(len(s.tokens) > 8 + 1 for s in sequences)  # Gemma's window of 8 matters


def test_a_sequence_never_sees_another(models):
    learner = L.Learner(models["gemma3"], make_config(), device="cpu")
    sequences = make_sequences()
    with torch.no_grad():
        before = L.MicroBatch.build(sequences, learner.device)
        before = before.unpack(learner.policy(before)[0])
        changed = sequences[5]
        tokens = changed.tokens.copy()
        tokens[changed.prompt_length :] = (tokens[changed.prompt_length :] + 1) % VOCABULARY
        sequences[5] = dataclasses.replace(changed, tokens=tokens)
        after = L.MicroBatch.build(sequences, learner.device)
        after = after.unpack(learner.policy(after)[0])
    others = [i for i in range(len(sequences)) if i != 5]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[5], after[5])


def documented_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
                           window_size=(-1, -1), enable_gqa=False):
    """What torch.nn.attention.varlen documents, one sequence at a time; causal masks of
    FlashAttention are aligned to the last query and key."""
    outputs = []
    for s in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[s] : cu_seq_q[s + 1]].transpose(0, 1)  # (heads, q, D)
        k = key[cu_seq_k[s] : cu_seq_k[s + 1]].transpose(0, 1)  # (kv heads, k, D)
        v = value[cu_seq_k[s] : cu_seq_k[s + 1]].transpose(0, 1)  # (kv heads, k, D)
        assert q.shape[1] <= max_q and k.shape[1] <= max_k
        rows = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]  # (q, 1)
        columns = torch.arange(k.shape[1])[None, :]  # (1, k)
        allowed = columns <= rows + window_size[1]  # (q, k)
        if window_size[0] >= 0:
            allowed &= columns >= rows - window_size[0]  # (q, k)
        outputs.append(F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=allowed, scale=scale,
            enable_gqa=enable_gqa)[0].transpose(0, 1))  # (q, heads, D)
    return torch.cat(outputs)  # (T, heads, D)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("share", [True, False])
def test_the_varlen_call_means_the_same(monkeypatch, window, share):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented_varlen_attn)
    segments = L.MicroBatch.build(make_sequences(), torch.device("cpu"), share).segments
    total = sum(segments.sizes)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, total, 8) for heads in (4, 2, 2))
    slow, _ = L.block_causal_attention(None, query, key, value, None, segments=segments,
                                       sliding_window=window)
    fast = L._varlen_attention(query, key, value, segments, None, window)
    assert (slow - fast).abs().max() < 1e-5


# ------------------------------------------------------------------------------- micro-batches


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30)), min_size=1, max_size=40),
       st.integers(1, 5), st.booleans(), st.integers(42, 200))
def test_packing_keeps_the_budget_and_every_sequence(items, ranks, share, budget):
    prompts = [np.arange(3 * (p + 1), dtype=np.int32) % (p + 2) for p in range(5)]
    sequences = [L.Sequence(np.concatenate([prompts[p], np.zeros(t, np.int32)]), len(prompts[p]),
                            np.zeros(t, np.float32), 0.0) for p, t in items]
    if max(len(s.tokens) - 1 for s in sequences) > budget:
        with pytest.raises(ValueError, match="token_budget"):
            L.pack(sequences, budget, ranks, share)
        return
    bins = L.pack(sequences, budget, ranks, share)
    assert len(bins) % ranks == 0
    assert sorted(i for members in bins for i in members) == list(range(len(sequences)))
    for members in bins:
        if members:
            row = L.MicroBatch.build([sequences[i] for i in members], torch.device("cpu"), share)
            assert row.tokens.numel() <= budget
            assert sum(row.segments.sizes) == row.tokens.numel()


def test_packing_computes_real_tokens_and_fills_ranks_evenly():
    rng, sequences = np.random.default_rng(0), []
    for _ in range(16):
        prompt = rng.integers(0, 99, rng.integers(150, 350), dtype=np.int32)
        for _ in range(8):
            t = int(rng.integers(60, 400))
            sequences.append(L.Sequence(np.concatenate([prompt, np.zeros(t, np.int32)]),
                                        len(prompt), np.zeros(t, np.float32), 0.0))
    for ranks in (1, 2, 4):
        bins = L.pack(sequences, L.LearnerConfig(max_response_tokens=400).token_budget, ranks)
        rows = [L.MicroBatch.build([sequences[i] for i in members], torch.device("cpu"))
                for members in bins]
        dummies = sum(row.tokens.numel() for row in rows if not row.mask.any())
        computed = sum(row.tokens.numel() for row in rows)
        assert dummies <= 0.05 * computed
        loads = [sum(row.tokens.numel() for row in rows[r::ranks]) for r in range(ranks)]
        assert min(loads) >= 0.9 * max(loads)
    unshared = sum(len(s.tokens) - 1 for s in sequences)
    assert computed < 0.65 * unshared


# The gradient of a step is one number, however the batch was cut: (token_budget, sharing).
CUTS = {"one row": (10_000, False), "one shared row": (10_000, True), "two": (160, False),
        "seven": (44, False), "shared prompts": (64, True), "alone": (1, False)}


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_the_cut_of_the_batch_changes_nothing(models, loss):
    """Against transformers' unpacked forward passes and policy_loss on padded tensors."""
    sequences = make_sequences()
    config = make_config(loss=loss, kl_coef=0.1)
    learner = L.Learner(models["qwen3"], config, device="cpu")
    with torch.no_grad():  # away from the reference, or its penalty would have no gradient
        for parameter in learner.policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    model, reference = (AutoModelForCausalLM.from_pretrained(models["qwen3"]) for _ in range(2))
    model.load_state_dict(learner.policy.model.state_dict())

    lengths = torch.tensor([len(s.tokens) - s.prompt_length for s in sequences])  # (N,)
    mask = torch.arange(LONGEST)[None, :] < lengths[:, None]  # (N, T)
    rows = {}
    for name, values in {
        "new": [alone_logprobs(model, s) for s in sequences],
        "ref": [alone_logprobs(reference, s).detach() for s in sequences],
        "old": [torch.tensor(s.behavior_logprobs) for s in sequences],
        "entropy": [alone_entropy(model, s) for s in sequences],
    }.items():
        rows[name] = torch.stack([F.pad(v, (0, LONGEST - len(v))) for v in values])  # (N, T)
    advantages = torch.tensor([s.advantage for s in sequences])  # (N,)
    expected, _ = grpo.policy_loss(rows["new"], rows["old"], advantages, mask, loss,
                                   config.clip_low, config.clip_high)
    kl = grpo.kl_estimate(rows["new"], rows["ref"])  # (N, T)
    expected = (expected + 0.1 * grpo.aggregate(kl, mask, loss)
                - 0.01 * grpo.aggregate(rows["entropy"], mask, loss))
    expected.backward()
    gradient = {f"model.{n}": p.grad for n, p in model.named_parameters()}

    counts, whole = {}, None
    for name, (budget, share) in CUTS.items():
        longest = max(len(s.tokens) - 1 for s in sequences)
        config.token_budget, config.share_prompts = max(budget, longest), share
        metrics, found = step_gradient(learner, sequences)
        counts[name] = len(L.pack(sequences, config.token_budget, 1, share))
        assert abs(metrics["loss"] - expected.item()) <= 1e-5 * abs(expected.item()), name
        assert_same_gradient(gradient, found, 2e-5)
        whole = whole or metrics
        for key in ("kl", "kl_ref", "clip_frac", "entropy", "ess", "logprob_diff", "grad_norm"):
            assert metrics[key] == pytest.approx(whole[key], rel=1e-4), (name, key)
    assert counts["one row"] == 1 and counts["two"] == 2 and counts["seven"] == 7


def alone_entropy(model, sequence: L.Sequence) -> torch.Tensor:
    tokens = torch.tensor(sequence.tokens, dtype=torch.long)[None]  # (1, P + T)
    logp = model(tokens).logits[0].log_softmax(-1)[sequence.prompt_length - 1 : -1]  # (T, V)
    return -(logp.exp() * logp).sum(-1)  # (T,)


def test_metrics_by_hand(models):
    """logprob_diff and kl are means over all response tokens, not of the last micro-batch."""
    sequences = make_sequences()
    learner = L.Learner(models["qwen3"], make_config(token_budget=60), device="cpu")
    scored = [learner.score(s.tokens)[s.prompt_length - 1 :] for s in sequences]
    difference = np.concatenate([new - s.behavior_logprobs for new, s in zip(scored, sequences)])
    metrics, _ = step_gradient(learner, sequences)
    assert metrics["logprob_diff"] == pytest.approx(np.abs(difference).mean(), rel=1e-4)
    assert metrics["kl"] == pytest.approx((np.expm1(difference) - difference).mean(), rel=1e-4)
    assert metrics["is_ratio_mean"] == pytest.approx(np.exp(difference).mean(), rel=1e-4)
    assert metrics["tokens"] == len(difference)
    assert metrics["tokens_total"] == sum(len(s.tokens) for s in sequences)
    assert metrics["tokens_computed"] < metrics["tokens_total"]


def test_temperature_enters_the_learner(models):
    tokens = make_sequences()[2].tokens
    one = L.Learner(models["llama"], make_config(), device="cpu").score(tokens)
    learner = L.Learner(models["llama"], make_config(temperature=2.0), device="cpu")
    warm = learner.score(tokens)
    assert np.array_equal(learner.score(tokens, 1.0), one)  # what the engine's probe compares with
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0]  # (T, V)
    expected = (logits / 2).log_softmax(-1)[np.arange(len(tokens) - 1), tokens[1:]]  # (T - 1,)
    assert warm.dtype == np.float32 and warm.shape == (len(tokens) - 1,)
    assert np.abs(warm - expected.numpy()).max() < 1e-5 and np.abs(warm - one).max() > 0.1


# -------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_steps_raise_good_and_lower_bad_responses(models, loss):
    sequences = make_sequences()
    learner = L.Learner(models["qwen3"], make_config(loss=loss, entropy_coef=0.0), device="cpu")

    def scores():
        return np.array([learner.score(s.tokens)[s.prompt_length - 1 :].mean() for s in sequences])

    for s in sequences:
        s.behavior_logprobs = learner.score(s.tokens)[s.prompt_length - 1 :]
    before = scores()
    for _ in range(3):
        metrics = learner.step(sequences)
    gain = (scores() - before) * np.array([s.advantage for s in sequences])
    assert gain.mean() > 0 and learner.version == 3 and not metrics["skipped"]


def test_a_step_that_is_not_finite_changes_nothing(models):
    sequences = make_sequences()
    learner = L.Learner(models["qwen3"], make_config(), device="cpu")
    before = parameters(learner)
    poisoned = make_sequences()
    poisoned[3].behavior_logprobs[0], poisoned[3].advantage = -math.inf, -1.0
    metrics = learner.step(poisoned)
    assert metrics["skipped"] and learner.version == 0
    assert all(torch.equal(before[n], p) for n, p in parameters(learner).items())
    twin = L.Learner(models["qwen3"], make_config(), device="cpu")
    learner.step(sequences)
    twin.step(sequences)
    after = parameters(twin)  # nor has the optimizer's state seen the bad gradient
    assert all(torch.equal(after[n], p) for n, p in parameters(learner).items())


def test_a_policy_that_emits_only_the_stop_token_can_be_trained(models):
    """Such responses add no token to the row: they are predicted from the prompt's last one."""
    learner, sequences = L.Learner(models["qwen3"], make_config(entropy_coef=0.0)), []
    prompt = np.arange(1, 9, dtype=np.int32)
    for token, advantage in ((3, 1.0), (5, -1.0)):
        tokens = np.append(prompt, np.int32(token))
        sequences.append(L.Sequence(tokens, 8, learner.score(tokens)[-1:], advantage))
    before = np.array([learner.score(s.tokens)[-1] for s in sequences])
    metrics = learner.step(sequences)
    gain = np.array([learner.score(s.tokens)[-1] for s in sequences]) - before
    assert metrics["tokens"] == 2 and not metrics["skipped"] and gain[0] > 0 > gain[1]


def test_truncated_importance_sampling_bounds_the_weights(models):
    sequences = make_sequences()
    free = L.Learner(models["qwen3"], make_config(loss="dapo"), device="cpu")
    capped = L.Learner(models["qwen3"], make_config(loss="dapo", tis_cap=1.0), device="cpu")
    loose, _ = step_gradient(free, sequences)
    tight, _ = step_gradient(capped, sequences)
    assert loose["clip_frac"] > 0 and tight["clip_frac"] == 0  # the ratio to the proximal is 1
    assert tight["is_ratio_mean"] < min(1.0, loose["is_ratio_mean"])


def test_gradient_clipping_and_schedule(models):
    config = make_config(max_grad_norm=1e-3, warmup_steps=4, entropy_coef=0.0)
    learner = L.Learner(models["qwen3"], config, device="cpu")
    seen, step = [], learner.optimizer.step
    learner.optimizer.step = lambda: (seen.append(math.sqrt(sum(
        float(p.grad.square().sum()) for p in learner.policy.parameters()))), step())
    first, second = learner.step(make_sequences()), learner.step(make_sequences())
    assert seen == pytest.approx([1e-3, 1e-3], rel=1e-3) and first["grad_norm"] > 1e-3
    assert [m["learning_rate"] for m in (first, second)] == pytest.approx([2.5e-4, 5e-4])


def test_bfloat16_stays_close(models):
    sequences = make_sequences()
    exact = L.Learner(models["qwen3"], make_config(), device="cpu")
    half = L.Learner(models["qwen3"], make_config(dtype="bfloat16"), device="cpu")
    one, two = (learner.step(sequences) for learner in (exact, half))
    assert one["loss"] != two["loss"] and one["loss"] == pytest.approx(two["loss"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in half.policy.parameters())
    gap = np.abs(exact.score(sequences[1].tokens) - half.score(sequences[1].tokens))
    assert gap.mean() < 0.02


def test_activation_checkpointing_is_exact(models):
    sequences = make_sequences()
    plain = L.Learner(models["gemma3"], make_config(), device="cpu")
    lean = L.Learner(models["gemma3"], make_config(activation_checkpointing=True), device="cpu")
    one, gradient = step_gradient(plain, sequences)
    two, found = step_gradient(lean, sequences)
    assert one["loss"] == two["loss"]
    assert_same_gradient(gradient, found, 1e-6)


def test_refusals(models, tmp_path):
    for changes, words in [(dict(loss="ppo"), "choose one of"), (dict(dtype="float16"), "dtype"),
                           (dict(max_response_tokens=0), "sampling limit"),
                           (dict(kl_kind="k1"), "noise")]:
        with pytest.raises(ValueError, match=words):
            make_config(**changes)
    with pytest.raises(ValueError, match="cpu_offload"):
        L.Learner(models["qwen3"], make_config(cpu_offload=True), device="cpu")
    learner = L.Learner(models["qwen3"], make_config(token_budget=10), device="cpu")
    with pytest.raises(ValueError, match="at least one sequence"):
        learner.step([])
    with pytest.raises(ValueError, match="token_budget 10"):
        learner.step(make_sequences())
    source = json.loads((models["gemma3"] / "config.json").read_text())
    for option, value in [("final_logit_softcapping", 30.0), ("attn_logit_softcapping", 50.0),
                          ("layer_types", ["full_attention", "chunked_attention"])]:
        (tmp_path / "config.json").write_text(json.dumps({**source, option: value}))
        with pytest.raises(NotImplementedError, match="softcapping|chunked"):
            L.Learner(tmp_path, make_config(), device="cpu")


# ------------------------------------------------------------- publication and checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_publishes(models, tmp_path, family):
    sequences = make_sequences()
    learner = L.Learner(models[family], make_config(activation_checkpointing=True), device="cpu")
    before = learner.score(sequences[1].tokens)
    assert math.isfinite(learner.step(sequences)["grad_norm"])
    for _ in range(2):  # the second replaces the first
        learner.publish(tmp_path / "policy")
    after = learner.score(sequences[1].tokens)
    learner.scale(0.5)
    assert np.abs(learner.score(sequences[1].tokens) - after).max() > 1e-3
    learner.scale(2.0)
    assert np.array_equal(learner.score(sequences[1].tokens), after)
    assert np.abs(after - before).max() > 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy"]
    size = (tmp_path / "policy" / "model.safetensors").stat().st_size
    assert 0 <= size - learner.published_bytes < 1 << 16  # names and shapes come on top

    published = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    whole = dataclasses.replace(sequences[1], prompt_length=1)
    with torch.no_grad():
        assert np.abs(alone_logprobs(published, whole).numpy() - after).max() < 2e-5
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "policy" / name).read_bytes() == (models[family] / name).read_bytes()
    with safe_open(tmp_path / "policy" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert torch.equal(file.get_tensor("lm_head.weight"),
                           learner.policy.model.get_output_embeddings().weight)
    with safe_open(models[family] / "model.safetensors", "pt") as file:
        assert names == set(file.keys()) | {"lm_head.weight"}


def test_publication_in_parts(models, tmp_path, monkeypatch):
    monkeypatch.setattr(L, "SHARD_BYTES", 1 << 10)
    learner = L.Learner(models["qwen3_moe"], make_config(), device="cpu")
    learner.publish(tmp_path / "policy")
    files = sorted(p.name for p in (tmp_path / "policy").glob("*.safetensors"))
    assert len(files) >= 3 and (tmp_path / "policy" / "model.safetensors.index.json").exists()
    again = L.Learner(tmp_path / "policy", make_config(), device="cpu")
    tokens = make_sequences()[1].tokens
    assert np.array_equal(again.score(tokens), learner.score(tokens))


def test_publication_in_the_dtype_of_the_model(models, tmp_path):
    AutoModelForCausalLM.from_pretrained(models["qwen3"], dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half")
    learner = L.Learner(tmp_path / "half", make_config(), device="cpu")
    learner.step(make_sequences())
    assert all(p.dtype == torch.float32 for p in learner.policy.parameters())
    learner.publish(tmp_path / "policy")
    with safe_open(tmp_path / "policy" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}


def test_a_loaded_learner_goes_on_bit_for_bit(models, tmp_path):
    config = make_config(warmup_steps=3, kl_coef=0.05)
    learner = L.Learner(models["qwen3"], config, device="cpu")
    for seed in (0, 1):
        learner.step(make_sequences(seed=seed))
    learner.save(tmp_path / "checkpoint")
    first = [learner.step(make_sequences(seed=seed)) for seed in (2, 3)]
    again = L.Learner(models["qwen3"], config, device="cpu")
    again.load(tmp_path / "checkpoint")
    assert again.version == 2
    assert [again.step(make_sequences(seed=seed)) for seed in (2, 3)] == first
    expected = parameters(learner)
    assert all(torch.equal(expected[n], p) for n, p in parameters(again).items())


def test_a_checkpoint_that_holds_more_is_loaded(models, tmp_path, monkeypatch):
    """Those of earlier versions had the random numbers' state of every rank."""
    learner = L.Learner(models["qwen3"], make_config(), device="cpu")
    learner.step(make_sequences())
    state = learner._state() | {"rng.0": torch.get_rng_state()}
    with monkeypatch.context() as patch:
        patch.setattr(learner, "_state", lambda: state)
        learner.save(tmp_path / "checkpoint")
    again = L.Learner(models["qwen3"], make_config(), device="cpu")
    again.load(tmp_path / "checkpoint")
    expected = parameters(learner)
    assert again.version == 1
    assert all(torch.equal(expected[n], p) for n, p in parameters(again).items())


def test_a_full_disk_is_an_os_error(models, tmp_path):
    learner = L.Learner(models["qwen3"], make_config(), device="cpu")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        for write in (learner.save, learner.publish):
            with pytest.raises(OSError, match="cannot be written"):
                write(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    learner.publish(tmp_path / "full")  # there is room again
    assert {"config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "full").iterdir()}


def test_a_damaged_or_foreign_checkpoint_is_an_os_error(models, tmp_path):
    learner = L.Learner(models["qwen3"], make_config(), device="cpu")
    learner.save(tmp_path / "good")
    damages = [lambda d: os.truncate(d / "__0_0.distcp", 1000), lambda d: os.truncate(
        d / ".metadata", 100), lambda d: (d / "__0_0.distcp").unlink(), shutil.rmtree]
    for number, damage in enumerate(damages):
        shutil.copytree(tmp_path / "good", tmp_path / f"bad{number}")
        damage(tmp_path / f"bad{number}")
        with pytest.raises(OSError, match=f"bad{number} cannot be loaded"):
            learner.load(tmp_path / f"bad{number}")
    for family in ("qwen3_untied", "qwen3_moe"):
        with pytest.raises(OSError, match="cannot be loaded"):
            L.Learner(models[family], make_config(), device="cpu").load(tmp_path / "good")
    learner.load(tmp_path / "good")


# ----------------------------------------------------------------------------- memory plan


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe"])
def test_memory_plan_counts_what_autograd_saves(models, tmp_path, family, lean):
    """Against a real forward pass of four layers on a full row."""
    source = json.loads((models[family] / "config.json").read_text())
    source.update(num_hidden_layers=4, layer_types=source.get("layer_types", []) * 2 or None)
    source = {key: value for key, value in source.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(source))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    config = make_config(token_budget=400, max_response_tokens=20, activation_checkpointing=lean)
    plan = L.memory_plan(tmp_path, config, ranks=1, prompt_tokens=20)

    learner = L.Learner(tmp_path, config, device="cpu")
    owned = {p.untyped_storage()._cdata for p in learner.policy.parameters()}
    assert plan["parameter_count"] == sum(p.numel() for p in learner.policy.parameters())
    sequence = L.Sequence(np.arange(40, dtype=np.int32) % 9, 20, np.zeros(20, np.float32), 0.0)
    batch = L.MicroBatch.build([sequence] * 20, learner.device)
    assert batch.tokens.numel() == 400
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.policy(batch)
    measured = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in owned)
    if lean:  # backward computes one layer again on top of what it kept
        assert measured <= plan["activations"] < L.memory_plan(
            tmp_path, make_config(token_budget=400, max_response_tokens=20), 1, 20)["activations"]
    elif family == "qwen3_moe":  # in float32 an upper bound
        assert measured <= plan["activations"] <= 1.6 * measured
    else:
        assert measured == pytest.approx(plan["activations"], rel=0.1)


def test_memory_plan_of_thirty_billion_parameters():
    moe = Qwen3MoeConfig(
        vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768)
    config = make_config(dtype="bfloat16", token_budget=16_384, max_response_tokens=8192,
                         activation_checkpointing=True)
    plan = L.memory_plan(moe, config, ranks=16, prompt_tokens=4096, memory_bytes=80 << 30)
    assert 30e9 < plan["parameter_count"] < 31e9
    assert plan["parameters"] == pytest.approx(4 * 30.5e9 / 16, rel=0.01)
    assert plan["optimizer"] == 2 * plan["parameters"] == 2 * plan["gradients"]
    parts = ("parameters", "gradients", "optimizer", "reference", "gathered", "activations", "head")
    assert plan["total"] == sum(plan[part] for part in parts) < 80 << 30
    assert plan["host"] == 4 * plan["parameter_count"]
    offload = dataclasses.replace(config, cpu_offload=True)
    offloaded = L.memory_plan(moe, offload, ranks=16, prompt_tokens=4096)
    assert offloaded["host"] == pytest.approx(5 * plan["host"], rel=0.01)  # 16 bytes a parameter
    with pytest.raises(ValueError, match="needs .* GiB and has 80.0 .*more learner ranks"):
        L.memory_plan(moe, config, ranks=2, prompt_tokens=4096, memory_bytes=80 << 30)


# ------------------------------------------------------------------------------- two ranks

STEPS = 5
DISTRIBUTED = {  # name -> (family, changes of the configuration)
    "tied": ("qwen3", {}),
    "untied": ("qwen3_untied", dict(kl_coef=0.05)),
    "window": ("gemma3", dict(activation_checkpointing=True)),
    "experts": ("qwen3_moe", dict(loss="gspo")),
    "offload": ("qwen3", dict(cpu_offload=True)),
}


def train(learner: L.Learner, steps: int = STEPS) -> list[dict]:
    return [learner.step(make_sequences(seed=seed)) for seed in range(steps)]


def worker(directory: Path) -> None:
    """One of three ranks; the learner's group is the first two."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.new_group([0, 1])
    if rank < 2:
        report = {}
        for name, (family, changes) in DISTRIBUTED.items():
            learner = L.Learner(directory / "models" / family, make_config(**changes), group, "cpu")
            report[name] = {"metrics": train(learner)}
            report[name]["score"] = learner.score(make_sequences()[1].tokens).tolist()
            learner.publish(directory / f"published_{name}")
        learner = L.Learner(directory / "models" / "qwen3", make_config(), group, "cpu")
        train(learner, 2)
        learner.save(directory / "from_two")
        more = [learner.step(make_sequences(seed=seed)) for seed in (2, 3)]
        again = L.Learner(directory / "models" / "qwen3", make_config(), group, "cpu")
        again.load(directory / "from_two")
        report["resumed_equal"] = more == [again.step(make_sequences(seed=s)) for s in (2, 3)]
        again.load(directory / "from_one")
        report["loaded_version"] = again.version
        again.scale(0.5)
        again.scale(2.0)
        again.publish(directory / "published_from_one")
        before = again.score(make_sequences()[1].tokens)
        poisoned = make_sequences()
        poisoned[3].behavior_logprobs[0], poisoned[3].advantage = -math.inf, -1.0
        report["skipped"] = again.step(poisoned)["skipped"]
        report["untouched"] = bool((again.score(make_sequences()[1].tokens) == before).all())
        half = L.Learner(directory / "models" / "qwen3", make_config(dtype="bfloat16"), group,
                         "cpu")
        report["half"] = {"metrics": train(half, 1)}
        few = L.Learner(directory / "models" / "qwen3", make_config(), group, "cpu")
        report["one_sequence"] = few.step(make_sequences()[1:2])
        (directory / f"report_{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("two_ranks")
    models = make_models(directory / "models")
    learner = L.Learner(models["qwen3"], make_config(), device="cpu")
    train(learner, 2)
    learner.save(directory / "from_one")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
         f"--log-dir={directory / 'torchrun'}",  # else it leaves a temporary folder
         __file__, str(directory)],
        capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return directory


def reports(directory: Path) -> list[dict]:
    return [json.loads((directory / f"report_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_ranks_equal_one(two_ranks, tmp_path, name):
    family, changes = DISTRIBUTED[name]
    config = make_config(**{**changes, "cpu_offload": False})  # that is FSDP's
    one = L.Learner(two_ranks / "models" / family, config, device="cpu")
    metrics = train(one)
    first, second = reports(two_ranks)
    assert first[name] == second[name]  # the same numbers on every rank
    for ours, theirs in zip(metrics, first[name]["metrics"]):
        for key in ("loss", "grad_norm", "entropy", "kl", "ess", "logprob_diff"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
        assert ours["tokens"] == theirs["tokens"]
    one.publish(tmp_path / "policy")
    with safe_open(tmp_path / "policy" / "model.safetensors", "pt") as ours, safe_open(
            two_ranks / f"published_{name}" / "model.safetensors", "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        gap = max(float((ours.get_tensor(key) - theirs.get_tensor(key)).abs().max())
                  for key in ours.keys())
    print(f"{name}: largest difference of a parameter after {STEPS} steps: {gap:.1e}")
    assert gap < 1e-5  # five steps of Adam at 1e-3 move a parameter by up to 5e-3
    score = one.score(make_sequences()[1].tokens)
    assert np.abs(score - np.array(first[name]["score"])).max() < 1e-4


def test_checkpoints_load_at_another_number_of_ranks(two_ranks, tmp_path):
    report = reports(two_ranks)[0]
    assert report["resumed_equal"] and report["loaded_version"] == 2
    one = L.Learner(two_ranks / "models" / "qwen3", make_config(), device="cpu")
    one.load(two_ranks / "from_one")
    published = L.Learner(two_ranks / "published_from_one", make_config(), device="cpu")
    expected = parameters(one)
    assert all(torch.equal(expected[n], p) for n, p in parameters(published).items())

    one.load(two_ranks / "from_two")
    assert one.version == 2
    straight = L.Learner(two_ranks / "models" / "qwen3", make_config(), device="cpu")
    train(straight, 2)
    for learner in (one, straight):
        learner.step(make_sequences(seed=2))  # with the optimizer's state
    expected = parameters(straight)
    assert max(float((expected[n] - p).abs().max()) for n, p in parameters(one).items()) < 1e-5


def test_ranks_skip_together_and_share_little_work(two_ranks):
    first, second = reports(two_ranks)
    assert first["skipped"] and second["skipped"] and first["untouched"] and second["untouched"]
    assert first["one_sequence"] == second["one_sequence"]  # the second rank ran a dummy
    assert first["one_sequence"]["tokens"] > 0 and not first["one_sequence"]["skipped"]
    exact = first["tied"]["metrics"][0]
    assert first["half"]["metrics"][0]["loss"] == pytest.approx(exact["loss"], rel=0.05)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
