"""GRPO in pure functions of tensors: advantages, losses, importance weights, KL, log-probabilities.

This is the learning rule of AceGRPO: every trace is one *step* of the agent (a draft, an
improvement or a repair), G traces of one task are compared with one another, and the policy is
pushed towards those that scored above their group [paper, arXiv 2602.07906: step-wise GRPO].
Which loss the paper uses is not known here: only its abstract and summaries were available to us,
and they do not say. What follows are the published variants, so that they can be compared, and
our choices where they differ.

    ratio      rho_t = exp(log pi(y_t) - log pi_old(y_t))            pi_old: the policy that sampled
    token loss l_t   = -min(rho_t * A, clip(rho_t, 1 - low, 1 + high) * A)
    loss             = sum over tokens of w_t * l_t / denominator    w_t: 1, but see point 3

(`grpo` and `gspo` take the mean within each sequence first; `gspo` has one ratio a sequence, and
`cispo` another l_t: see `policy_loss`.)

Shapes use the same letters everywhere: B groups, G traces a group, N = B * G sequences,
T response tokens (padded to the longest of the call), V vocabulary, H hidden.

What differs from the textbook, and whose choice it is:
1. [ours] No standard deviation in the default advantage (`dr_grpo`, arXiv 2503.20783): dividing
   by it blows tiny reward differences up, and group difficulty becomes a weight.
2. [ours] Denominators are counts over the *whole batch*. A caller that cuts the batch into
   micro-batches or over ranks passes `denominator`; the sum of the parts is then the loss, and
   no result depends on how the batch was cut.
3. [ours] pi_old's log-probabilities are the ones that the engine recorded while sampling. The
   correction for a trainer that computes slightly different numbers (truncated importance
   sampling) needs the proximal log-probabilities, the trainer's own at the start of the step:
   the ratio is then taken against these and w_t = min(pi_prox / pi_behaviour, cap), which is
   also the decoupled objective for stale data (arXiv 2505.24298).
4. [ours] The sampled stop token is part of the response: whoever masks it out never teaches the
   policy to stop.
5. [ours] Rewards can be replaced by what a response adds to the one chosen out of k (`best_of`): a
   search keeps one answer, so a policy should vary its answers and know which is good, not repeat
   the same one.
6. [ours] Entropy is the entropy of the distribution, from the logits, with its gradient; the
   negative log-likelihood of a sample is only an estimate of it and has another gradient.

Run it alone: `python grpo.py` prints a small worked example. It needs torch and nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ADVANTAGES = ("grpo", "dr_grpo")
LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
KL_KINDS = ("k1", "k2", "k3")


# ------------------------------------------------------------------------------- advantages


def group_advantages(
    rewards: Tensor, kind: str = "dr_grpo", eps: float = 1e-6, tolerance: float = 1e-6
) -> Tensor:
    """Group-relative advantages: how much better a trace did than its group.

    Args:
        rewards: (B, G) finite rewards, one row a group.
        kind: `grpo` (r - mean) / (std + eps), std with ddof 0; `dr_grpo` r - mean.
        eps: added to the standard deviation.
        tolerance: a group whose rewards lie within it is degenerate: nothing to learn, zeros.

    Returns:
        (B, G) advantages, in the dtype of `rewards`.

    Raises:
        ValueError: for an unknown kind, another shape, or rewards that are not finite.

    Source: GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783.

    >>> rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.3, 0.3, 0.3, 0.3]])
    >>> group_advantages(rewards, kind="dr_grpo")
    tensor([[-0.5000,  0.5000,  0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"unknown advantage {kind!r}: choose one of {', '.join(ADVANTAGES)}")
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be (B, G), got the shape {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (B, G)
    if kind == "grpo":
        std = centred.square().mean(dim=1, keepdim=True).sqrt()  # (B, 1)
        centred = centred / (std + eps)  # (B, G)
    spread = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True)  # (B, 1)
    # Rounding leaves 1e-8 of noise in a group of equal rewards, and the division by std + eps
    # would turn that noise into a signal.
    return torch.where(spread > tolerance, centred, torch.zeros_like(centred))  # (B, G)


def best_of(rewards: Tensor, k: int, claims: Tensor | None = None) -> Tensor:
    """What each response adds to the reward of the one that is chosen out of k.

    An agent that asks for k responses keeps the one with the highest claim. Draw k - 1 of the
    group's others at random, and let j be the one of these that claims most: response i adds
    r_i - r_j where it claims more than j, else nothing. The result is the mean over all draws.
    With V_k the expected reward of the chosen response, the sum over a group of what they add times
    the gradient of log pi has the expectation G/k grad V_k; less the group's mean, as
    `group_advantages` returns it, (G/k - 1) grad V_k + grad V_(k-1), for their mean is an estimate
    of V_k - V_(k-1). A policy that gives one answer gets nothing for giving it again; one that is
    right where the others fail gets all of it; one that claims too much pays for what it pushes
    out.

    Args:
        rewards: (B, G) finite.
        k: 1 gives the rewards back, at most G.
        claims: (B, G) what is known of the responses when one is chosen, -inf included; of equal
            ones the later in the group counts as higher. None: the rewards, so that the best is
            chosen.

    Raises:
        ValueError: k is not in [1, G], another shape, a reward that is not finite, a claim of NaN.

    Source: with rewards as claims "Pass@K Policy Optimization" (arXiv 2505.15201), which subtracts
    the best of the k - 1 as a baseline, too; claims are ours.

    >>> best_of(torch.tensor([[0.0, 0.5, 0.5, 1.0]]), k=2)  # the mean of r_i - r_j, where positive
    tensor([[0.0000, 0.1667, 0.1667, 0.6667]])
    >>> best_of(torch.tensor([[0.0, 0.5, 0.5, 1.0]]), k=3)
    tensor([[0.0000, 0.0000, 0.0000, 0.5000]])
    >>> best_of(torch.tensor([[0.2, 0.6]]), k=2, claims=torch.tensor([[0.9, 0.7]]))  # 0.9: untrue
    tensor([[-0.4000,  0.0000]])
    """
    claims = rewards if claims is None else claims
    if rewards.ndim != 2 or claims.shape != rewards.shape:
        raise ValueError(f"rewards and claims must both be (B, G), not {tuple(rewards.shape)} and "
                         f"{tuple(claims.shape)}")
    if not torch.isfinite(rewards).all() or claims.isnan().any():
        raise ValueError("rewards must be finite, and claims not NaN")
    size = rewards.shape[1]
    if not 1 <= k <= size:
        raise ValueError(f"k must be from 1 to the group's {size} responses, not {k}")
    if k == 1:
        return rewards
    order = claims.argsort(dim=1, stable=True)  # (B, G)
    ascending = rewards.gather(1, order)  # (B, G)
    # Of the others, the j-th lowest claim (from 0) is the highest of S in C(j, k - 2) of the
    # C(G - 1, k - 1) cases; where it is above that of i, i adds nothing.
    chance = [math.comb(j, k - 2) / math.comb(size - 1, k - 1) for j in range(size)]
    ahead = (ascending[:, :, None] - ascending[:, None, :]).tril()  # (B, G, G)
    added = (ahead * rewards.new_tensor(chance)).sum(dim=2)  # (B, G)
    return torch.zeros_like(rewards).scatter(1, order, added)  # (B, G)


# --------------------------------------------------------------------- from tokens to a loss


def loss_denominator(
    lengths: Tensor, kind: str, max_response_tokens: int | None = None
) -> float:
    """The global count that a loss of this kind is divided by.

    `grpo`, `gspo`: sequences; `dapo`, `cispo`: response tokens; `dr_grpo`: sequences times the
    fixed maximum response length, so that a long response is not worth less per token.

    Args:
        lengths: (N,) response tokens of every sequence of the whole batch, over all
            micro-batches and ranks; empty ones are not counted.
        max_response_tokens: the sampling limit, needed by `dr_grpo` only.

    >>> loss_denominator(torch.tensor([3, 1]), "dapo")
    4.0
    >>> loss_denominator(torch.tensor([3, 1]), "dr_grpo", max_response_tokens=8)
    16.0
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown loss {kind!r}: choose one of {', '.join(LOSSES)}")
    if kind in ("dapo", "cispo"):
        return float(lengths.sum())
    sequences = float((lengths > 0).sum())
    if kind != "dr_grpo":
        return sequences
    if not max_response_tokens:
        raise ValueError("dr_grpo divides by the maximum response length: pass it")
    return sequences * max_response_tokens


def aggregate(
    values: Tensor, mask: Tensor, kind: str, denominator: float | None = None
) -> Tensor:
    """Per-token values to one number, in the way of the loss `kind`.

    Policy loss, KL penalty and entropy bonus of a step must be weighed alike, or their balance
    would shift with the response lengths. `grpo` and `gspo` take the mean within each sequence
    first.

    Args:
        values: (N, T) per-token values; what stands under a false mask is ignored, NaN included.
        mask: (N, T) true at response tokens.
        denominator: global count of `loss_denominator`; computed from this mask by default (for
            `dr_grpo` with T in the place of the maximum response length: pass it where T varies).

    Returns:
        () the sum of this part over the global count.
    """
    mask = mask.bool()  # (N, T)
    lengths = mask.sum(dim=1)  # (N,)
    if denominator is None:
        denominator = loss_denominator(lengths, kind, mask.shape[1])
    values = _masked(values, mask)  # (N, T)
    sums = values.sum(dim=1)  # (N,)
    if kind in ("grpo", "gspo"):
        sums = sums / lengths.clamp(min=1)  # (N,)
    return sums.sum() / max(denominator, 1.0)  # ()


def policy_loss(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    kind: str = "dr_grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    tis_cap: float | None = None,
    proximal_logprobs: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy-gradient loss of a batch, or of one part of it.

    With rho_t the ratio to the behaviour policy (to the proximal one where it is given):

    - `grpo`, `dr_grpo`, `dapo`: -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A); they
      differ in the denominator (`loss_denominator`), and `dapo`'s clip-higher is clip_high.
    - `gspo`: the same with one ratio a sequence, exp(mean_t log rho_t). It moves little, so that
      its source clips at 3e-4 and 4e-4.
    - `cispo`: -stop_gradient(min(rho_t, 1 + clip_high)) A log pi: the weight is clipped, no
      token loses its gradient. As in its source there is no lower clip: clip_low is not used.

    Args:
        logprobs: (N, T) of the policy that is trained, with gradient.
        behavior_logprobs: (N, T) of the policy that sampled, as its engine recorded them.
        advantages: (N,) one a sequence.
        mask: (N, T) true at response tokens, the sampled stop token included.
        clip_low, clip_high: how far the ratio may move below and above 1.
        tis_cap: largest weight min(pi_proximal / pi_behaviour, tis_cap) of a token (of a
            sequence for `gspo`: of its geometric mean); None leaves the weight untruncated. With
            one step a batch the ratio to the proximal policy is 1: then nothing is clipped.
        proximal_logprobs: (N, T) of the trainer at the start of the step; None means that the
            ratio to the behaviour policy already is the whole correction.
        denominator: as in `aggregate`.

    Returns:
        loss (): with gradient; metrics: detached () tensors, each a mean over the tokens of this
        mask: `clip_frac`, `clip_frac_low` (A < 0, ratio below), `clip_frac_high` (A > 0, ratio
        above; cispo: weight cut), `is_ratio_mean` and `is_ratio_square_mean` of the whole
        importance ratio (weight included), and `ess`, the effective sample size as a share of
        the tokens, mean^2 / mean of squares. A batch-wide ess comes from the batch-wide means.

    Raises:
        ValueError: for an unknown kind, shapes that do not match, or tis_cap without
            proximal_logprobs, where the ratio would be corrected twice.

    Source: GRPO 2402.03300, Dr. GRPO 2503.20783, DAPO 2503.14476, GSPO 2507.18071, CISPO
    2506.13585, AReaL's decoupled objective 2505.24298.

    >>> old = torch.tensor([[-1.0, -1.0]])
    >>> new = torch.tensor([[-0.5, -1.0]])                 # ratios 1.65 and 1
    >>> loss, metrics = policy_loss(new, old, torch.tensor([1.0]), torch.ones(1, 2))
    >>> round(loss.item(), 4), metrics["clip_frac_high"].item()     # -(1.28 + 1) / 2
    (-1.14, 0.5)
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown loss {kind!r}: choose one of {', '.join(LOSSES)}")
    if tis_cap is not None and proximal_logprobs is None:
        raise ValueError("tis_cap needs proximal_logprobs: without them the ratio to the behaviour "
                         "policy already corrects, and would be applied twice")
    if not logprobs.shape == behavior_logprobs.shape == mask.shape:
        raise ValueError(f"logprobs {tuple(logprobs.shape)}, behavior_logprobs "
                         f"{tuple(behavior_logprobs.shape)} and mask {tuple(mask.shape)} differ")
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(f"advantages must be ({logprobs.shape[0]},), one a sequence, got "
                         f"{tuple(advantages.shape)}")
    mask = mask.bool()  # (N, T)
    old = behavior_logprobs if proximal_logprobs is None else proximal_logprobs  # (N, T)
    log_ratio = _masked(logprobs - old.detach(), mask)  # (N, T)
    log_weight = _masked((old - behavior_logprobs).detach(), mask)  # (N, T), zeros without proximal
    if kind == "gspo":
        log_ratio = _sequence_mean(log_ratio, mask)  # (N, T), one value a row
        log_weight = _sequence_mean(log_weight, mask)  # (N, T)
    ratio = log_ratio.exp()  # (N, T)
    weight = log_weight.exp().clamp(max=float("inf") if tis_cap is None else tis_cap)  # (N, T)
    advantage = advantages.detach()[:, None].expand_as(ratio)  # (N, T)

    if kind == "cispo":
        capped = ratio.detach().clamp(max=1 + clip_high)  # (N, T)
        token_loss = -capped * advantage * _masked(logprobs, mask)  # (N, T)
        low = torch.zeros_like(mask)  # (N, T)
        high = ratio > 1 + clip_high  # (N, T)
    else:
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # (N, T)
        token_loss = -torch.minimum(ratio * advantage, clipped * advantage)  # (N, T)
        low = (ratio < 1 - clip_low) & (advantage < 0)  # (N, T)
        high = (ratio > 1 + clip_high) & (advantage > 0)  # (N, T)
    loss = aggregate(weight * token_loss, mask, kind, denominator)  # ()

    importance = (ratio.detach() * weight)[mask]  # (tokens,)
    mean, square = _mean(importance), _mean(importance.square())  # (), ()
    metrics = {
        "clip_frac": _mean((low | high)[mask]),
        "clip_frac_low": _mean(low[mask]),
        "clip_frac_high": _mean(high[mask]),
        "is_ratio_mean": mean,
        "is_ratio_square_mean": square,
        "ess": mean.square() / square.clamp(min=torch.finfo(square.dtype).tiny),
    }
    return loss, metrics


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimates of KL(pi || pi_ref) for tokens that pi sampled.

    With d = log pi - log pi_ref: `k1` d, unbiased, of either sign; `k2` d^2 / 2, biased, and its
    gradient is that of the KL; `k3` exp(-d) - 1 + d, unbiased and never negative, and its gradient
    is that of KL(pi_ref || pi).

    Args:
        logprobs, ref_logprobs: (N, T) log-probabilities of the same tokens.

    Returns:
        (N, T) estimates in nats.

    Source: http://joschu.net/blog/kl-approx.html

    >>> kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), kind="k1")
    tensor([[0.5000]])
    """
    difference = logprobs - ref_logprobs  # (N, T)
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2  # (N, T)
    if kind == "k3":
        return torch.expm1(-difference) + difference  # (N, T)
    raise ValueError(f"unknown KL estimate {kind!r}: choose one of {', '.join(KL_KINDS)}")


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Zero where the mask is false, whatever stood there (0 * inf would be NaN)."""
    return torch.where(mask, values, values.new_zeros(()))  # (N, T)


def _sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over each sequence's tokens, spread over the row again."""
    mean = values.sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # (N,)
    return mean[:, None].expand_as(values)  # (N, T)


def _mean(values: Tensor) -> Tensor:
    """Mean of a possibly empty vector, 0 when it is."""
    return values.sum() / max(values.numel(), 1)  # ()


# ------------------------------------------------------- log-probabilities from hidden states


def chunked_token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen tokens and entropies, without ever holding (T, V) logits.

    Logits of `chunk` tokens at a time are made, reduced and dropped; the backward pass makes
    them again. At 32k tokens and a vocabulary of 152k the logits alone would be 20 GB, and
    autograd would keep two more tensors of that size.

    Args:
        hidden: (T, H) final hidden states, after the last norm.
        weight: (V, H) the output head.
        targets: (T,) token ids.
        temperature: the logits are divided by it, as the engine did when it sampled: at another
            temperature the two would not speak of the same distribution.
        chunk: tokens whose logits exist at the same time.

    Returns:
        logprobs (T,) of `targets`, entropy (T,) in nats; float32, or float64 for float64 hidden.
        Both are differentiable in `hidden` and `weight`, once.

    >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> logprobs, entropy = chunked_token_logprobs(hidden, weight, torch.tensor([0, 2]))
    >>> logprobs
    tensor([-0.5514, -1.5514])
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be (T, H) and targets (T,), got {tuple(hidden.shape)} and "
                         f"{tuple(targets.shape)}")
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk)


class _TokenLogprobs(torch.autograd.Function):
    """The recomputation is written out, because autograd's checkpoint of each chunk would keep a
    (V, H) weight gradient a chunk, where two buffers are enough for any number of chunks.

        d logp_y / d z_j = 1[j = y] - p_j        d entropy / d z_j = -p_j (log p_j + entropy)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        logprobs, lse, entropy = [], [], []
        with _no_autocast(hidden):
            head = _head(weight, hidden)  # (V, H)
            for h, y in zip(hidden.split(chunk), targets.split(chunk)):  # (t, H), (t,)
                logits = _product(h, head.t()).div_(temperature)  # (t, V)
                lse.append(logits.logsumexp(dim=-1))  # (t,)
                logprobs.append(logits.gather(-1, y[:, None])[:, 0] - lse[-1])  # (t,)
                logp = logits.sub_(lse[-1][:, None])  # (t, V), in the logits' memory
                entropy.append(-(logp.exp() * logp).sum(dim=-1))  # (t,)
        logprobs, lse, entropy = map(torch.cat, (logprobs, lse, entropy))  # (T,) each
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # an unused entropy then costs nothing
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(lse)  # (T,)
        grad_hidden = torch.empty_like(hidden)  # (T, H)
        grad_weight = weight.new_zeros(weight.shape, dtype=_wide(hidden))  # (V, H)
        with _no_autocast(hidden):
            head = _head(weight, hidden)  # (V, H)
            for start in range(0, len(hidden), ctx.chunk):
                part = slice(start, start + ctx.chunk)
                h, y = hidden[part], targets[part]  # (t, H), (t,)
                logp = _product(h, head.t()).div_(ctx.temperature)  # (t, V)
                logp.sub_(lse[part, None])  # (t, V)
                grad = logp.exp()  # (t, V), the probabilities
                slope = -grad_logprobs[part, None]  # (t, 1)
                if grad_entropy is not None:
                    slope = logp.add_(entropy[part, None]).mul_(-grad_entropy[part, None]).add_(
                        slope)  # (t, V)
                grad.mul_(slope)  # (t, V)
                grad.scatter_add_(-1, y[:, None], grad_logprobs[part, None])  # (t, V)
                grad = grad.div_(ctx.temperature).to(head.dtype)  # (t, V)
                if ctx.needs_input_grad[0]:
                    grad_hidden[part] = grad @ head  # (t, H)
                if ctx.needs_input_grad[1]:
                    grad_weight += _product(grad.t(), h.to(head.dtype))  # (V, H)
        grad_hidden = grad_hidden if ctx.needs_input_grad[0] else None
        grad_weight = grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, None, None, None


def _no_autocast(hidden: Tensor) -> torch.autocast:
    """Autocast would turn the float32 products of `_product` into bfloat16 ones."""
    kind = hidden.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


def _wide(hidden: Tensor) -> torch.dtype:
    """Reductions over the vocabulary run in float32 at least."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _head(weight: Tensor, hidden: Tensor) -> Tensor:
    """The head in the dtype of its matrix products: half precision only where the hardware can
    return float32 sums (CUDA), because logits rounded to bfloat16 are off by up to 0.06."""
    half = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
    return weight.to(hidden.dtype if half else _wide(hidden))  # (V, H)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with float32 sums and a result in float32 at least."""
    left = left.to(right.dtype)
    if right.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


# ----------------------------------------------------------------------------------- worked example


def main() -> None:
    """From rewards to a better policy, in small numbers."""
    torch.manual_seed(0)
    rewards = torch.tensor([[0.0, 0.1, 0.1, 0.7], [0.5, 0.5, 0.5, 0.5]])  # (B, G)
    print("1. Rewards of two groups of four traces; the second agrees: nothing to learn from it.")
    rows = {"rewards": rewards} | {kind: group_advantages(rewards, kind) for kind in ADVANTAGES}
    rows["best_of"] = best_of(rewards, 3)
    for name, values in rows.items():
        print(f"   {name:8}", "   ".join(" ".join(f"{value:+.3f}" for value in group)
                                        for group in values.tolist()))
    print("   Both advantages are r - mean; grpo also divides by the group's standard deviation.")
    print("   best_of: what a trace adds to the best of three; taken as rewards, 0.1 is worth "
          "nothing here.")

    print("\n2. The clip, 0.2 below and 0.28 above: a token whose probability is `ratio` times "
          "what it was sampled with.")
    print("   ratio    A = +1: loss  gradient    A = -1: loss  gradient")
    for ratio in (0.5, 1.0, 1.5):
        cells = []
        for advantage in (1.0, -1.0):
            logprob = torch.tensor([[ratio]]).log().requires_grad_()  # (1, 1), sampled with 1
            loss, _ = policy_loss(logprob, torch.zeros(1, 1), torch.tensor([advantage]),
                                  torch.ones(1, 1), "dapo")
            loss.backward()
            cells.append(f"{loss.item():13.2f} {logprob.grad.item() + 0.0:9.2f}")
        print(f"   {ratio:5.2f} ", "    ".join(cells))
    print("   Gradient 0: it has moved far enough the right way. One that moved the wrong way "
          "keeps its own.")

    print("\n3. What one token weighs, in a batch of two sequences of 4 and 1 tokens, limit 8:")
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])  # (N, T)
    for kind in LOSSES:
        values = torch.ones(2, 4, requires_grad=True)  # (N, T)
        aggregate(values, mask, kind, loss_denominator(mask.sum(1), kind, 8)).backward()
        print(f"   {kind:8} long {values.grad[0, 0]:.4f}   short {values.grad[1, 0]:.4f}")

    print("\n4. One update of a toy policy on the rewards above, by the gradient of each loss:")
    hidden = torch.randn(8 * 5, 16)  # (N * T, H)
    head = (0.3 * torch.randn(32, 16)).requires_grad_()  # (V, H)
    tokens = torch.randint(0, 32, (8 * 5,))  # (N * T,)
    advantages = group_advantages(rewards, "dr_grpo").flatten()  # (N,)
    mask = torch.ones(8, 5, dtype=torch.bool)  # (N, T)
    mask[3, 3:] = False  # the best trace stopped after three tokens

    def logprobs_of(weight):
        return chunked_token_logprobs(hidden, weight, tokens)[0].view(8, 5)  # (N, T)

    before = logprobs_of(head).detach()  # (N, T)
    behavior = before + 0.02 * torch.randn(8, 5)  # (N, T), the engine rounds differently
    print("   loss        value   ratio   ess      change of log pi(trace), group 1")
    for kind in LOSSES:
        loss, metrics = policy_loss(logprobs_of(head), behavior, advantages, mask, kind)
        (gradient,) = torch.autograd.grad(loss, head)  # (V, H)
        moved = head - 0.1 * gradient / gradient.norm()  # (V, H), a step of the same length
        change = ((logprobs_of(moved) - before) * mask).sum(dim=1)[:4].tolist()  # (G,)
        print(f"   {kind:8} {loss.item():8.4f}  {metrics['is_ratio_mean']:.4f}  "
              f"{metrics['ess']:.4f}  ", " ".join(f"{value:+.3f}" for value in change))
    print("   The best trace (0.7) becomes likelier, the worst (0.0) less likely. ratio, ess: "
          "policy over\n   engine, and the effective sample size; 1 when the two agree.")


if __name__ == "__main__":
    main()
