"""The mathematics of grpo.py against naive loops, autograd of the formulas, and exact sums.

Run: python -m pytest tests/test_grpo.py
"""

import collections
import itertools
import math
import types
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo

N, T = 6, 9
WEIGHTINGS = {  # name -> (has proximal log-probabilities, tis_cap)
    "plain": (False, None),
    "decoupled": (True, None),
    "truncated": (True, 1.1),
}


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
    """Random per-token tensors (N, T), lengths 1..T, advantages (N,) of both signs."""
    generator = torch.Generator().manual_seed(seed)
    behavior = -torch.rand(N, T, generator=generator, dtype=dtype) * 3  # (N, T)
    lengths = torch.tensor([T, 1, 4, 7, 2, 5])  # (N,)
    return dict(
        logprobs=behavior + 0.3 * torch.randn(N, T, generator=generator, dtype=dtype),  # (N, T)
        behavior_logprobs=behavior,
        proximal_logprobs=behavior + 0.2 * torch.randn(N, T, generator=generator, dtype=dtype),
        advantages=torch.randn(N, generator=generator, dtype=dtype),  # (N,)
        mask=torch.arange(T)[None, :] < lengths[:, None],  # (N, T)
    )


def naive_loss(data: dict, kind: str, low: float, high: float, proximal: bool,
               cap: float | None) -> torch.Tensor:
    """The double loop over sequences and tokens, one scalar at a time, with autograd."""
    total, sequences, tokens = torch.zeros((), dtype=torch.float64), 0, 0
    for n in range(N):
        length = int(data["mask"][n].sum())
        advantage = data["advantages"][n]
        logratios, logweights = [], []
        for t in range(length):
            new, behavior = data["logprobs"][n, t], data["behavior_logprobs"][n, t]
            old = data["proximal_logprobs"][n, t] if proximal else behavior
            logratios.append(new - old)
            logweights.append(old - behavior)
        if kind == "gspo":
            logratios = [sum(logratios) / length] * length
            logweights = [sum(logweights) / length] * length
        terms = []
        for t in range(length):
            ratio, weight = torch.exp(logratios[t]), torch.exp(logweights[t])
            if cap is not None and weight > cap:
                weight = torch.tensor(cap, dtype=torch.float64)
            if kind == "cispo":
                factor = min(ratio.item(), 1 + high)
                term = factor * advantage * data["logprobs"][n, t]
            else:
                bounded = ratio
                if ratio < 1 - low:
                    bounded = torch.tensor(1 - low, dtype=torch.float64)
                if ratio > 1 + high:
                    bounded = torch.tensor(1 + high, dtype=torch.float64)
                unclipped, clipped = ratio * advantage, bounded * advantage
                term = unclipped if unclipped < clipped else clipped
            terms.append(-weight * term)
        inner = sum(terms)
        if kind in ("grpo", "gspo"):
            inner = inner / length
        total = total + inner
        sequences, tokens = sequences + 1, tokens + length
    return total / {"grpo": sequences, "gspo": sequences, "dr_grpo": sequences * T,
                    "dapo": tokens, "cispo": tokens}[kind]


def our_loss(data: dict, kind: str, proximal: bool, cap: float | None, **options):
    return grpo.policy_loss(
        data["logprobs"], data["behavior_logprobs"], data["advantages"], data["mask"], kind,
        tis_cap=cap, proximal_logprobs=data["proximal_logprobs"] if proximal else None, **options)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", grpo.LOSSES)
def test_loss_and_gradient_equal_the_naive_double_loop(kind, weighting):
    proximal, cap = WEIGHTINGS[weighting]
    for seed in range(3):
        ours, theirs = batch(seed), batch(seed)
        ours["logprobs"].requires_grad_()
        theirs["logprobs"].requires_grad_()
        loss, _ = our_loss(ours, kind, proximal, cap, clip_low=0.15, clip_high=0.28)
        naive = naive_loss(theirs, kind, 0.15, 0.28, proximal, cap)
        loss.backward()
        naive.backward()
        assert abs(loss.item() - naive.item()) < 1e-12
        assert (ours["logprobs"].grad - theirs["logprobs"].grad).abs().max() < 1e-12


@pytest.mark.parametrize("kind", grpo.LOSSES)
def test_gradient_at_ratio_one_is_the_policy_gradient(kind):
    """On-policy, each loss is a weighted REINFORCE: d loss / d logp = -A / count of the token."""
    data = batch()
    data["logprobs"] = data["behavior_logprobs"].clone().requires_grad_()
    loss, metrics = our_loss(data, kind, False, None)
    loss.backward()
    lengths = data["mask"].sum(1, keepdim=True)
    count = {"grpo": N * lengths, "gspo": N * lengths, "dr_grpo": torch.tensor(N * T),
             "dapo": lengths.sum(), "cispo": lengths.sum()}[kind]
    expected = -data["advantages"][:, None] / count * data["mask"]
    assert (data["logprobs"].grad - expected).abs().max() < 1e-12
    assert metrics["clip_frac"] == 0 and abs(metrics["is_ratio_mean"] - 1) < 1e-12
    assert abs(metrics["ess"] - 1) < 1e-12


@pytest.mark.parametrize("kind", grpo.LOSSES)
@pytest.mark.parametrize("parts", [1, 2, 6])
def test_parts_with_the_global_denominator_sum_to_the_whole(kind, parts):
    data = batch(dtype=torch.float32)
    whole, _ = our_loss(data, kind, True, 1.1)
    denominator = grpo.loss_denominator(data["mask"].sum(1), kind, T)
    total = torch.zeros(())
    for rows in torch.arange(N).chunk(parts):
        width = int(data["mask"][rows].sum(1).max())  # a micro-batch is padded to its own longest
        part = {name: value[rows] if value.ndim == 1 else value[rows, :width]
                for name, value in data.items()}
        total += our_loss(part, kind, True, 1.1, denominator=denominator)[0]
    assert abs(total - whole) <= 1e-6 * abs(whole)


@pytest.mark.parametrize("kind", grpo.LOSSES)
def test_what_stands_under_the_mask_never_matters(kind):
    clean, dirty = batch(), batch()
    for name in ("logprobs", "behavior_logprobs", "proximal_logprobs"):
        dirty[name][~dirty["mask"]] = float("nan") if name == "logprobs" else float("inf")
    clean["logprobs"].requires_grad_()
    dirty["logprobs"].requires_grad_()
    for data in (clean, dirty):
        loss, metrics = our_loss(data, kind, True, 2.0)
        loss.backward()
        data["loss"], data["metrics"] = loss.item(), metrics
    assert clean["loss"] == dirty["loss"]
    assert torch.equal(clean["logprobs"].grad, dirty["logprobs"].grad)
    assert clean["metrics"] == dirty["metrics"]


def test_metrics_by_hand():
    ratios = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]], dtype=torch.float64)  # (N, T)
    zeros, mask = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3)
    _, metrics = grpo.policy_loss(ratios.log(), zeros, torch.tensor([1.0, -1.0]), mask)
    # A > 0 clips at 1.5 only, A < 0 at 0.5 only: the other ends pull back towards the old policy.
    assert metrics["clip_frac_high"] == pytest.approx(1 / 6)
    assert metrics["clip_frac_low"] == pytest.approx(1 / 6)
    assert metrics["clip_frac"] == pytest.approx(2 / 6)
    assert metrics["is_ratio_mean"] == pytest.approx(1.0)
    assert metrics["ess"] == pytest.approx(1 / ((0.25 + 1 + 2.25) / 3))


def test_proximal_equal_to_the_policy_leaves_only_the_truncated_weight():
    data = batch()
    data["proximal_logprobs"] = data["logprobs"].clone()
    _, metrics = our_loss(data, "dapo", True, 1.05)
    ratio = (data["logprobs"] - data["behavior_logprobs"]).exp()[data["mask"]]
    assert metrics["clip_frac"] == 0
    assert metrics["is_ratio_mean"] == pytest.approx(ratio.clamp(max=1.05).mean().item())


@pytest.mark.parametrize("weighting", ["plain", "truncated"])
@pytest.mark.parametrize("kind", grpo.LOSSES)
def test_loss_and_gradient_equal_trl(kind, weighting):
    """TRL's own GRPOTrainer._compute_loss, given our log-probabilities, in float64."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0 into a "
                                            "venv of its own to compare the losses with it")
    proximal, cap = WEIGHTINGS[weighting]
    if kind == "gspo" and proximal:
        pytest.skip("TRL truncates gspo's weight by token, we by sequence")
    for seed in range(3):
        ours, theirs = batch(seed), batch(seed)
        for data in (ours, theirs):
            data["logprobs"].requires_grad_()
        loss, metrics = our_loss(ours, kind, proximal, cap, clip_low=0.15, clip_high=0.28)
        loss.backward()
        trainer, inputs = trl_trainer(theirs, kind, proximal, cap, 0.15, 0.28)
        other = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
        other.backward()
        assert abs(loss.item() - other.item()) < 1e-6
        assert (ours["logprobs"].grad - theirs["logprobs"].grad).abs().max() < 1e-6
        if kind in ("grpo", "dr_grpo", "dapo"):
            reported = trainer._metrics["train"]
            for mine, name in [("clip_frac_low", "low_mean"), ("clip_frac_high", "high_mean")]:
                assert metrics[mine] == pytest.approx(reported[f"clip_ratio/{name}"][0], abs=1e-6)


def trl_trainer(data: dict, kind: str, proximal: bool, cap: float | None, low: float, high: float):
    """What GRPOTrainer._compute_loss (TRL 1.16) reads of its trainer, and its inputs."""
    old = data["proximal_logprobs" if proximal else "behavior_logprobs"]  # (N, T)
    weight = (old - data["behavior_logprobs"]).exp().clamp(max=cap) if proximal else None  # (N, T)
    mask = data["mask"].double()  # (N, T)
    ids = torch.zeros(N, T, dtype=torch.long)
    trainer = types.SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if kind == "gspo" else "token", beta=0.0,
        loss_type="grpo" if kind == "gspo" else kind, epsilon_low=low,
        epsilon_high=1 + high if kind == "cispo" else high, use_vllm=proximal,
        vllm_importance_sampling_correction=proximal, model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, max_completion_length=T,
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False,
                                   steps_per_generation=1),
        accelerator=types.SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _entropy_bonus_enabled=False, _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **options: (
            data["logprobs"], torch.zeros(N, T), None),
    )
    inputs = dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask,
                  advantages=data["advantages"], old_per_token_logps=old,
                  importance_sampling_ratio=weight, num_items_in_batch=mask.sum())
    return trainer, inputs


def test_refusals():
    data = batch()
    with pytest.raises(ValueError, match="applied twice"):
        our_loss(data, "grpo", False, 2.0)
    with pytest.raises(ValueError, match="unknown loss"):
        our_loss(data, "ppo", False, None)
    with pytest.raises(ValueError, match="one a sequence"):
        our_loss({**data, "advantages": data["advantages"][:2]}, "grpo", False, None)
    with pytest.raises(ValueError, match="differ"):
        our_loss({**data, "mask": data["mask"][:, :3]}, "grpo", False, None)
    with pytest.raises(ValueError, match="maximum response length"):
        grpo.loss_denominator(torch.tensor([3]), "dr_grpo")


# ------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.4, 0.6, 0.8]], dtype=torch.float64)
    std = math.sqrt((0.09 + 0.01 + 0.01 + 0.09) / 4)
    expected = torch.tensor([[-1, -1, 1, 1], [-0.3 / std, -0.1 / std, 0.1 / std, 0.3 / std]])
    divided = grpo.group_advantages(rewards, "grpo", eps=0.0)
    assert torch.allclose(divided.float(), expected.float())
    centred = grpo.group_advantages(rewards)
    assert torch.allclose(centred[1].float(), torch.tensor([-0.3, -0.1, 0.1, 0.3]))


@pytest.mark.parametrize("kind", grpo.ADVANTAGES)
def test_degenerate_groups_give_exact_zeros(kind):
    rewards = torch.tensor([[0.7, 0.7, 0.7], [0.1, 0.1 + 5e-8, 0.1]])  # the second: rounding noise
    assert torch.equal(grpo.group_advantages(rewards, kind), torch.zeros(2, 3))
    assert torch.equal(grpo.group_advantages(torch.tensor([[0.4]]), kind), torch.zeros(1, 1))


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize("k", range(1, 7))
def test_best_of_counts_all_choices_of_the_others(k, claimed):
    generator = torch.Generator().manual_seed(k)
    rewards = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    rewards[0, 4] = rewards[0, 1]  # a tie
    claims = torch.rand(3, 6, generator=generator, dtype=torch.float64) if claimed else rewards
    claims[1, 3] = claims[1, 0]  # another: the later one is chosen
    found = grpo.best_of(rewards, k, claims if claimed else None)
    for row in range(3) if k > 1 else ():
        def rank(i, row=row):
            return claims[row, i].item(), i

        for i in range(6):
            choices = itertools.combinations([j for j in range(6) if j != i], k - 1)
            rivals = [max(chosen, key=rank) for chosen in choices]
            added = [(rewards[row, i] - rewards[row, j]).item() if rank(i) > rank(j) else 0.0
                     for j in rivals]
            assert found[row, i].item() == pytest.approx(sum(added) / len(added), abs=1e-12)
    assert k > 1 or torch.equal(found, rewards)


@pytest.mark.parametrize("claims", [None, [0.7, 0.9, 0.1, 0.8]])
def test_best_of_follows_the_gradient_of_what_is_chosen(claims):
    """Exactly, over all groups of three that a policy of four answers can give: what responses add
    makes the policy gradient of V_k = E[reward of the one of k with the highest claim], and less
    the group's mean that of (3 / k - 1) V_k + V_(k-1)."""
    values = torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=torch.float64)
    claims = values if claims is None else torch.tensor(claims, dtype=torch.float64)
    logits = torch.tensor([0.4, 0.1, -0.3, -1.0], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)

    def gradient(y):
        return torch.autograd.grad(y, logits, retain_graph=True)[0]

    chosen = [None] + [  # V_k's gradient
        gradient(sum(logprobs[list(c)].sum().exp() * values[max(c, key=claims.__getitem__)]
                     for c in itertools.product(range(4), repeat=k))) for k in (1, 2, 3)]
    for k in (2, 3):
        added = centred = 0.0
        for c in map(list, itertools.product(range(4), repeat=3)):
            adds = grpo.best_of(values[c][None], k, claims[c][None])
            probability = logprobs[c].sum().exp().detach()
            added = added + probability * (adds[0] * logprobs[c]).sum()
            advantages = grpo.group_advantages(adds, tolerance=0.0)[0]
            centred = centred + probability * (advantages * logprobs[c]).sum()
        assert torch.allclose(gradient(added), 3 / k * chosen[k])
        assert torch.allclose(gradient(centred), (3 / k - 1) * chosen[k] + chosen[k - 1])


def test_advantages_refuse_bad_input():
    with pytest.raises(ValueError, match="finite"):
        grpo.group_advantages(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"\(B, G\)"):
        grpo.group_advantages(torch.zeros(4))
    with pytest.raises(ValueError, match="unknown advantage"):
        grpo.group_advantages(torch.zeros(1, 4), "rloo")
    for k in (0, 5):
        with pytest.raises(ValueError, match="from 1 to the group's 4 responses"):
            grpo.best_of(torch.zeros(1, 4), k)
    with pytest.raises(ValueError, match=r"must both be \(B, G\)"):  # it would be of one row
        grpo.best_of(torch.zeros(2, 4), 2, torch.zeros(1, 4))
    for rewards, claims in ((float("inf"), 0.0), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="finite, and claims not NaN"):
            grpo.best_of(torch.full((1, 4), rewards), 2, torch.full((1, 4), claims))


# ------------------------------------------------------------------------------- divergence


def two_policies(requires_grad: bool = False):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)  # (2, V)
    policy = logits[0].clone().requires_grad_(requires_grad)  # (V,)
    return policy, logits[1].log_softmax(-1)


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    logits, reference = two_policies()
    logp = logits.log_softmax(-1)  # (V,)
    exact = (logp.exp() * (logp - reference)).sum()
    for kind in ("k1", "k3"):
        estimate = (logp.exp() * grpo.kl_estimate(logp[None], reference[None], kind)[0]).sum()
        assert abs(estimate - exact) < 1e-12
    assert (grpo.kl_estimate(logp[None], reference[None], "k3") >= 0).all()
    with pytest.raises(ValueError, match="unknown KL"):
        grpo.kl_estimate(logp[None], reference[None], "k4")


def test_gradients_of_the_estimates_as_losses():
    """Under sampling from pi: k2's expected gradient is that of KL(pi || reference), k3's that of
    KL(reference || pi), k1's is zero (noise)."""
    logits, reference = two_policies(requires_grad=True)
    logp = logits.log_softmax(-1)  # (V,)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits,
                                   retain_graph=True)
    expected = {}
    for kind in grpo.KL_KINDS:
        per_token = grpo.kl_estimate(logp[None], reference[None], kind)[0]  # (V,)
        (expected[kind],) = torch.autograd.grad((logp.exp().detach() * per_token).sum(), logits,
                                                retain_graph=True)
    assert (expected["k2"] - exact).abs().max() < 1e-12
    assert expected["k1"].abs().max() < 1e-12
    (forward,) = torch.autograd.grad((reference.exp() * (reference - logp)).sum(), logits)
    assert (expected["k3"] - forward).abs().max() < 1e-12


# ------------------------------------------------------------------- chunked log-probabilities


def head_problem(dtype=torch.float64, tokens=11, hidden=5, vocabulary=13):
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(tokens, hidden, generator=generator, dtype=dtype).requires_grad_()  # (T, H)
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=dtype).requires_grad_()  # (V, H)
    y = torch.randint(0, vocabulary, (tokens,), generator=generator)  # (T,)
    grads = torch.randn(2, tokens, generator=generator, dtype=dtype)  # (2, T)
    return h, w, y, grads


def naive_head(h, w, y, temperature):
    logp = (h @ w.t() / temperature).log_softmax(-1)  # (T, V)
    return logp.gather(-1, y[:, None])[:, 0], -(logp.exp() * logp).sum(-1)  # (T,), (T,)


@pytest.mark.parametrize("chunk", [1, 4, 11, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_values_and_gradients_are_exact(chunk, temperature):
    h, w, y, grads = head_problem()
    ours = grpo.chunked_token_logprobs(h, w, y, temperature, chunk)
    theirs = naive_head(h, w, y, temperature)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 1e-12
    ours = torch.autograd.grad(ours, (h, w), list(grads))
    theirs = torch.autograd.grad(theirs, (h, w), list(grads))
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_its_own_exact_gradient(used):
    h, w, y, grads = head_problem()
    ours = torch.autograd.grad(grpo.chunked_token_logprobs(h, w, y, 1.0, 4)[used], (h, w), grads[0])
    theirs = torch.autograd.grad(naive_head(h, w, y, 1.0)[used], (h, w), grads[0])
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 1e-12


def test_frozen_inputs_and_no_tokens():
    h, w, y, _ = head_problem()
    logprobs, _ = grpo.chunked_token_logprobs(h, w.detach(), y)
    (grad,) = torch.autograd.grad(logprobs.sum(), (h,))
    assert grad.shape == h.shape
    empty, entropy = grpo.chunked_token_logprobs(h[:0], w, y[:0])
    assert empty.shape == entropy.shape == (0,)
    (empty.sum() + entropy.sum()).backward()
    assert torch.equal(w.grad, torch.zeros_like(w))
    with pytest.raises(ValueError, match="temperature"):
        grpo.chunked_token_logprobs(h, w, y, temperature=0.0)
    with pytest.raises(ValueError, match="targets"):
        grpo.chunked_token_logprobs(h, w, y[:3])


def test_bfloat16_hidden_states_keep_float32_logits():
    """Logits rounded to bfloat16 would be off by 1e-2; the inputs' own rounding is no error."""
    h, w, y, _ = head_problem(torch.float32, tokens=64, hidden=32, vocabulary=101)
    half, half_head = h.detach().bfloat16(), w.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = grpo.chunked_token_logprobs(half, half_head, y)
    exact, _ = naive_head(half.double(), half_head.double(), y, 1.0)
    assert logprobs.dtype == torch.float32
    assert (logprobs - exact).abs().max() < 1e-5


class PeakMemory(TorchDispatchMode):
    """Largest sum of live tensor storages made under the mode; works on meta tensors."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    size = storage.nbytes()
                    self.seen[storage._cdata] = size
                    self.live += size
                    weakref.finalize(storage, self._free, storage._cdata, size)
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key, size):
        self.live -= size
        self.seen.pop(key, None)


def peak_of(function, tokens, vocabulary, hidden, device):
    h = torch.randn(tokens, hidden, device=device, requires_grad=True)  # (T, H)
    w = torch.randn(vocabulary, hidden, device=device, requires_grad=True)  # (V, H)
    y = torch.zeros(tokens, dtype=torch.long, device=device)  # (T,)
    with PeakMemory() as memory:
        sum(output.sum() for output in function(h, w, y)).backward()
    return memory.peak


def leanest_naive_head(h, w, y):
    """No entropy, no temperature: what a cross-entropy loss on full logits holds."""
    return [(h @ w.t()).log_softmax(-1).gather(-1, y[:, None])]  # (T, 1)


def test_peak_memory_at_32k_tokens_and_152k_vocabulary_on_meta_tensors():
    size = dict(tokens=32_768, vocabulary=151_936, hidden=1024, device="meta")
    ours = peak_of(grpo.chunked_token_logprobs, **size)
    naive = peak_of(leanest_naive_head, **size)
    print(f"peak {ours / 2**30:.2f} GiB against {naive / 2**30:.2f} GiB: {ours / naive:.1%}")
    assert naive > 2 * 4 * 32_768 * 151_936  # it sees the logits
    assert ours <= 0.15 * naive


def test_peak_memory_measured_at_a_reduced_size():
    size = dict(tokens=1024, vocabulary=4096, hidden=32, device="cpu")
    ours = peak_of(lambda h, w, y: grpo.chunked_token_logprobs(h, w, y, chunk=32), **size)
    naive = peak_of(leanest_naive_head, **size)
    assert ours <= 0.15 * naive
