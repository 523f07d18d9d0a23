"""The learner: from sampled sequences to one optimizer step, and to weights that an engine loads.

This is AceGRPO's training side [paper, arXiv 2602.07906: GRPO, asynchronously to the rollouts]. It
takes arrays and knows no task, group or queue. One call of `Learner.step` is one GRPO step: pack
the sequences, compute token log-probabilities, the loss of `grpo.py`, its gradient, one AdamW
update. It runs in one process, or on the ranks of a process group, where FSDP2 shards parameters,
gradients and optimizer state.

All of it is [ours], for the paper's abstract and summaries name no trainer:
1. Packing without padding. Sequences stand one after another in one row; attention runs within
   each (block-causal), position ids restart, so that a packed sequence computes what it would
   compute alone.
2. A prompt is computed once. The G traces of a group continue the same prompt: its tokens enter
   the row once and every response attends to them. The gradient is the same sum, for
   P + G * T instead of G * (P + T) tokens.
3. The last token of a sequence is never an input (nothing is predicted from it), and only hidden
   states that predict a response token meet the output head.
4. Losses are sums over micro-batches and ranks, divided by one global count (grpo.py, note 2);
   every metric is a mean over the whole batch, the same number on every rank.
5. One optimizer step a batch. The trainer's log-probabilities at the start of the step, which
   truncated importance sampling needs, are therefore those of the very forward pass that has the
   gradient: no extra pass.
6. A loss or gradient that is not finite skips the step: parameters, optimizer and `version` stay.

Run it alone: `python learner.py MODEL_DIR` takes three steps on made-up sequences, and prints
the metrics and tokens per second.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import pickle
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

import grpo

ATTENTION = "block_causal"
SHARD_BYTES = 4 << 30  # a published file holds at most about this much
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")


@dataclass
class Sequence:
    """One sampled response and what the loss needs to know of it."""

    tokens: np.ndarray  # (P + T,) int32, prompt and response, the sampled stop token included
    prompt_length: int  # P
    behavior_logprobs: np.ndarray  # (T,) float32, as the engine recorded them
    advantage: float


@dataclass
class LearnerConfig:
    """How the learner learns. Lengths in tokens, coefficients per nat."""

    learning_rate: float = 2e-4
    warmup_steps: int = 0  # linear warm-up from 0
    decay_steps: int = 0  # step at which linear decay reaches 0; 0: constant after the warm-up
    max_grad_norm: float = 1.0
    loss: str = "dr_grpo"  # grpo | dr_grpo | dapo | gspo | cispo
    clip_low: float = 0.2
    clip_high: float = 0.28  # above clip_low (clip-higher): rare good tokens may grow faster
    tis_cap: float | None = None  # truncated importance sampling: largest weight of a token
    kl_coef: float = 0.0  # above 0 a frozen copy of the first policy is held as the reference
    kl_kind: str = "k3"  # k2 | k3; as a loss, k1 is noise: its gradient is 0 in expectation
    entropy_coef: float = 0.0
    temperature: float = 1.0  # that of the sampling
    token_budget: int = 4096  # tokens of a micro-batch
    max_response_tokens: int = 0  # the sampling limit, dr_grpo's fixed length
    dtype: str = "float32"  # of the computation; masters and optimizer are always float32
    share_prompts: bool = True  # compute a group's prompt once
    activation_checkpointing: bool = False
    cpu_offload: bool = False  # parameters and optimizer in host memory between their uses

    def __post_init__(self) -> None:
        if self.loss not in grpo.LOSSES:
            raise ValueError(f"loss {self.loss!r}: choose one of {', '.join(grpo.LOSSES)}")
        if self.loss == "dr_grpo" and self.max_response_tokens < 1:
            raise ValueError("loss dr_grpo divides by max_response_tokens: set the sampling limit")
        if self.kl_kind not in ("k2", "k3"):
            raise ValueError(f"kl_kind {self.kl_kind!r}: choose k2 or k3 (k1's gradient is noise)")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r}: choose float32 or bfloat16")

    def learning_rate_at(self, version: int) -> float:
        """The rate of the step that follows `version` steps.

        >>> config = LearnerConfig(learning_rate=1.0, warmup_steps=2, decay_steps=4, loss="dapo")
        >>> [config.learning_rate_at(version) for version in range(5)]
        [0.5, 1.0, 0.5, 0.25, 0.0]
        """
        rate = self.learning_rate
        if version < self.warmup_steps:
            rate *= (version + 1) / self.warmup_steps
        elif self.decay_steps:
            rate *= max(self.decay_steps - version, 0) / self.decay_steps
        return rate


# ---------------------------------------------------------------------------------- packing


def prompt_key(sequence: Sequence) -> bytes:
    """Equal for sequences of equal prompts."""
    return np.asarray(sequence.tokens[: sequence.prompt_length], np.int32).tobytes()


def pack(
    sequences: list[Sequence], token_budget: int, ranks: int = 1, share_prompts: bool = True
) -> list[list[int]]:
    """Cut a batch into micro-batches of at most `token_budget` tokens.

    Sequences of equal prompts stay together where the budget allows, so that their prompt is
    computed once. First-fit-decreasing finds the number of micro-batches; they are then filled
    evenly where that fits as well, because ranks wait for the slowest.

    Args:
        ranks: the number of micro-batches is a multiple of it: FSDP's collectives must match, so
            every rank runs the same number. Rank r takes `result[r::ranks]`.

    Returns:
        indices into `sequences`, one list a micro-batch; an empty list is a dummy.

    Raises:
        ValueError: when one sequence is longer than the budget.
    """
    families: dict[bytes | int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        families.setdefault(prompt_key(sequence) if share_prompts else i, []).append(i)

    def cost(members: list[int]) -> int:
        prompt = sequences[members[0]].prompt_length
        return prompt + sum(len(sequences[i].tokens) - sequences[i].prompt_length - 1
                            for i in members)

    longest = max(cost([i]) for i in range(len(sequences)))
    if longest > token_budget:
        raise ValueError(f"a sequence of {longest} tokens does not fit a micro-batch of "
                         f"token_budget {token_budget}: raise the budget or shorten the context")
    total = sum(cost(members) for members in families.values())
    # A family much larger than a rank's share would leave the other ranks waiting.
    limit = min(token_budget, max(longest, math.ceil(total / ranks)))
    pieces: list[list[int]] = []
    for members in families.values():
        pieces.append([])
        for i in members:
            if pieces[-1] and cost(pieces[-1] + [i]) > limit:
                pieces.append([])
            pieces[-1].append(i)
    pieces.sort(key=lambda members: (-cost(members), members[0]))
    costs = [cost(members) for members in pieces]
    bins = first_fit(costs, token_budget)
    count = math.ceil(len(bins) / ranks) * ranks
    even = evenly(costs, count)
    if max(sum(costs[piece] for piece in chosen) for chosen in even) > token_budget:
        even = bins + [[] for _ in range(count - len(bins))]
    return [[i for piece in chosen for i in pieces[piece]] for chosen in even]


def first_fit(costs: list[int], budget: int) -> list[list[int]]:
    """Indices into `costs`, a list a bin of at most `budget`: each into the first bin with room.

    >>> first_fit([5, 4, 3, 1], 8)
    [[0, 2], [1, 3]]
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for i, cost in enumerate(costs):
        place = next((b for b, load in enumerate(loads) if load + cost <= budget), len(bins))
        if place == len(bins):
            bins.append([])
            loads.append(0)
        bins[place].append(i)
        loads[place] += cost
    return bins


def evenly(costs: list[int], count: int) -> list[list[int]]:
    """Indices into `costs`, in `count` bins: each into the emptiest so far.

    >>> evenly([5, 4, 3, 1], 2)
    [[0, 3], [1, 2]]
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i, cost in enumerate(costs):
        emptiest = loads.index(min(loads))
        bins[emptiest].append(i)
        loads[emptiest] += cost
    return bins


class Segments:
    """Who may attend to whom in a packed row.

    Segments follow one another and fill the row. A token attends to the tokens of its own segment
    up to itself, and to the whole of its parent segment: the prompt that its response continues.

    Args:
        sizes: tokens of each segment.
        parents: index of the segment that holds its prefix, or -1.
    """

    def __init__(self, sizes: list[int], parents: list[int], device: torch.device) -> None:
        self.sizes, self.parents, self.device = sizes, parents, device
        prefixes = [sizes[parent] if parent >= 0 else 0 for parent in parents]
        self.spans = [prefix + size for prefix, size in zip(prefixes, sizes)]  # keys of a segment
        self._masks: dict[tuple, Tensor] = {}

    @cached_property
    def query_ends(self) -> Tensor:
        """(S + 1,) int32 cumulative sizes of the S segments."""
        return torch.tensor(np.cumsum([0] + self.sizes), dtype=torch.int32, device=self.device)

    @cached_property
    def key_ends(self) -> Tensor:
        """(S + 1,) int32 cumulative spans: the keys that the S segments read."""
        return torch.tensor(np.cumsum([0] + self.spans), dtype=torch.int32, device=self.device)

    @cached_property
    def key_index(self) -> Tensor | None:
        """(K,) rows of K and V in the order in which the segments read them, each prefix again
        for every segment that continues it; None when that is the row as it is."""
        if max(self.parents) < 0:
            return None
        starts = np.cumsum([0] + self.sizes)
        rows = []
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                rows.append(np.arange(starts[parent], starts[parent + 1]))
            rows.append(np.arange(starts[i], starts[i + 1]))
        return torch.from_numpy(np.concatenate(rows)).to(self.device)

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """(L, L) additive causal mask, L the longest span; made once for all layers."""
        key = (window, like.dtype)
        if key not in self._masks:
            size = max(self.spans)
            allowed = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()  # (L, L)
            if window is not None:
                allowed = allowed.triu(1 - window)  # (L, L), the window counts itself
            mask = torch.zeros(size, size, dtype=like.dtype, device=like.device)  # (L, L)
            self._masks[key] = mask.masked_fill_(~allowed, float("-inf"))  # (L, L)
        return self._masks[key]


@dataclass
class MicroBatch:
    """One packed row and what the loss needs of its N sequences. R response tokens in all."""

    tokens: Tensor  # (1, T)
    position_ids: Tensor  # (1, T), restarting
    segments: Segments
    predictors: Tensor  # (R,) where in the row the hidden state stands that predicts a token
    targets: Tensor  # (R,) the response tokens
    mask: Tensor  # (N, longest response)
    behavior_logprobs: Tensor  # (N, longest response)
    advantages: Tensor  # (N,)

    @classmethod
    def build(
        cls, sequences: list[Sequence], device: torch.device, share_prompts: bool = True
    ) -> MicroBatch:
        """Lay sequences out in one row; no sequences make a dummy whose loss is 0.

        A prompt p of three tokens with the responses a (three) and b (two); nothing has to be
        predicted from the last token of a sequence, so it is no input:

            row         p1 p2 p3   a1 a2   b1      segments of 3, 2, 1; parents -1, 0, 0
            position     0  1  2    3  4    3
            predictors  2 3 4 (of a1 a2 a3)  2 5 (of b1 b2): places in the row
        """
        real = bool(sequences)
        if not real:
            sequences = [Sequence(np.zeros(2, np.int32), 1, np.zeros(1, np.float32), 0.0)]
        parts, positions, sizes, parents, predictors = [], [], [], [], []

        def lay(tokens: np.ndarray, first: int, parent: int) -> None:
            """Add a segment to the row; `first` is the position of its first token."""
            parts.append(tokens)
            positions.append(np.arange(first, first + len(tokens)))
            sizes.append(len(tokens))
            parents.append(parent)

        families: dict[bytes, tuple[int, int]] = {}  # prompt -> its segment, its end in the row
        prompts = [prompt_key(sequence) for sequence in sequences]
        uses = Counter(prompts)
        for sequence, prompt in zip(sequences, prompts):
            p, inputs = sequence.prompt_length, sequence.tokens[:-1]
            begin, parent, prompt_end = 0, -1, sum(sizes) + p
            if share_prompts and uses[prompt] > 1:
                if prompt not in families:
                    lay(inputs[:p], 0, -1)
                    families[prompt] = len(sizes) - 1, sum(sizes)
                begin, (parent, prompt_end) = p, families[prompt]
            start = sum(sizes) + p - begin  # of the response in the row
            if len(inputs) > begin:  # a response of one token adds no input
                lay(inputs[begin:], begin, parent)
            predictors.append([prompt_end - 1])
            predictors.append(np.arange(start, start + len(inputs) - p))
        lengths = np.array([len(s.tokens) - s.prompt_length for s in sequences])
        filled = np.arange(lengths.max())[None, :] < lengths[:, None]
        behavior = np.zeros(filled.shape, np.float32)
        behavior[filled] = np.concatenate([s.behavior_logprobs for s in sequences])

        def move(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(array, dtype=dtype, device=device)

        return cls(
            tokens=move(np.concatenate(parts), torch.long)[None],  # (1, T)
            position_ids=move(np.concatenate(positions), torch.long)[None],  # (1, T)
            segments=Segments(sizes, parents, device),
            predictors=move(np.concatenate(predictors), torch.long),  # (R,)
            targets=move(np.concatenate([s.tokens[s.prompt_length :] for s in sequences]),
                         torch.long),  # (R,)
            mask=move(filled & real, torch.bool),  # (N, longest)
            behavior_logprobs=move(behavior, torch.float32),  # (N, longest)
            advantages=move(np.array([s.advantage for s in sequences]), torch.float32),  # (N,)
        )

    def unpack(self, values: Tensor) -> Tensor:
        """(R,) values of the response tokens -> (N, longest response), zeros elsewhere."""
        if not self.mask.any():  # the dummy keeps its graph, so that backward runs on every rank
            return values[None] * 0  # (1, 1)
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)  # (N, longest)


# -------------------------------------------------------------------------------- attention


def block_causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    segments: Segments, scaling: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **_: object,
) -> tuple[Tensor, None]:
    """Attention within the segments of a packed row, registered with transformers.

    On CUDA in half precision one variable-length FlashAttention call (on the meta device too,
    where `memory_plan` counts), elsewhere one exact scaled_dot_product_attention a segment:
    linear in the row, quadratic in a sequence only. Grouped-query attention and sliding windows
    are honoured. There is no dropout here: the ratio compares the very function that sampled.

    Args:
        query: (1, heads, T, D); key, value: (1, kv heads, T, D).

    Returns:
        (1, T, heads, D) and None for the attention weights, as transformers expects.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel(f"{type(module).__name__} needs soft-capped logits or attention "
                               "sinks, which block-causal attention does not compute")
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # a norm or RoPE has ended in float32
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_meta or (query.is_cuda and half):
        return _varlen_attention(query, key, value, segments, scaling, sliding_window), None
    # Float32 also under autocast: on a CPU the bfloat16 kernel's backward is three times slower.
    with torch.autocast(query.device.type, enabled=False):
        out = _segment_attention(*(x.float() for x in (query, key, value)), segments, scaling,
                                 sliding_window)  # (1, T, heads, D)
    return out.to(query.dtype), None


def _segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None,
    window: int | None,
) -> Tensor:
    """One scaled_dot_product_attention a segment. Returns (1, T, heads, D)."""
    # split, not slices: its backward is one concatenation, a slice's is a zero tensor of the row.
    queries = query.split(segments.sizes, dim=2)  # (1, heads, t, D) each
    keys = key.split(segments.sizes, dim=2)  # (1, kv heads, t, D) each
    values = value.split(segments.sizes, dim=2)  # (1, kv heads, t, D) each
    outputs = []
    for i, (size, parent) in enumerate(zip(segments.sizes, segments.parents)):
        k, v, span = keys[i], values[i], segments.spans[i]  # (1, kv heads, t, D)
        if parent >= 0:
            k = torch.cat((keys[parent], k), dim=2)  # (1, kv heads, span, D)
            v = torch.cat((values[parent], v), dim=2)  # (1, kv heads, span, D)
        mask = None
        if parent >= 0 or (window is not None and window < span):
            mask = segments.mask(window, query)[span - size : span, :span]  # (t, span)
        out = F.scaled_dot_product_attention(
            queries[i], k, v, attn_mask=mask, is_causal=mask is None, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1])  # (1, heads, t, D)
        outputs.append(out.transpose(1, 2))  # (1, t, heads, D)
    return torch.cat(outputs, dim=1)  # (1, T, heads, D)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None,
    window: int | None,
) -> Tensor:
    """The same by one variable-length FlashAttention call; its causal mask is aligned to the last
    key, so that a response sees its whole prompt. Returns (1, T, heads, D)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (T, heads, D)
    if segments.key_index is not None:
        k = k.index_select(0, segments.key_index)  # (K, kv heads, D)
        v = v.index_select(0, segments.key_index)  # (K, kv heads, D)
    left = -1 if window is None else window - 1
    out = varlen_attn(q, k, v, segments.query_ends, segments.key_ends, max(segments.sizes),
                      max(segments.spans), scale=scaling, window_size=(left, 0),
                      enable_gqa=q.shape[1] != k.shape[1])  # (T, heads, D)
    return out[None]  # (1, T, heads, D)


AttentionInterface.register(ATTENTION, block_causal_attention)


# ------------------------------------------------------------------------------------ model


class Policy(nn.Module):
    """The causal language model with the output head's work inside `forward`.

    FSDP gathers a module's parameters for its forward only; the head's weight outside would be
    this rank's shard of it.
    """

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, batch: MicroBatch, temperature: float | None = None
                ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (R,) of the response tokens and the entropies (R,) there, at the
        temperature of the sampling unless another is given."""
        hidden = self.model.base_model(
            input_ids=batch.tokens, position_ids=batch.position_ids, segments=batch.segments,
            use_cache=False,
        ).last_hidden_state[0]  # (T, H)
        hidden = hidden.index_select(0, batch.predictors)  # (R, H)
        head = self.model.get_output_embeddings().weight  # (V, H)
        return grpo.chunked_token_logprobs(
            hidden, head, batch.targets, self.temperature if temperature is None else temperature)


class UnsupportedModel(NotImplementedError):
    """A model that the learner would compute wrongly; one line."""


def check_supported(config) -> None:
    """Refuse, before any weight is read, what packing would compute wrongly in silence."""
    name = config.model_type
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(
            f"{name} has layers of type {sorted(kinds)}: a recurrent or chunked layer would carry "
            "state from one packed sequence into the next")
    for option in ("attn_logit_softcapping", "final_logit_softcapping",
                   "use_bidirectional_attention"):
        if getattr(config, option, None):
            raise UnsupportedModel(f"{name} sets {option}, which the learner does not compute")


def load_policy(
    model_dir: Path, config: LearnerConfig, device: torch.device, mesh: DeviceMesh | None
) -> Policy:
    """The policy with float32 weights, whole (`mesh` None) or sharded over the mesh.

    Sharded, only the first rank reads the files, into host memory; the others start from the
    meta device, and weights travel one tensor at a time.
    """
    hf_config = AutoConfig.from_pretrained(model_dir)
    check_supported(hf_config)
    options = dict(dtype=torch.float32, attn_implementation=ATTENTION)
    if mesh is None or mesh.get_local_rank() == 0:
        model = AutoModelForCausalLM.from_pretrained(model_dir, **options)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, **options)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UnsupportedModel(f"{hf_config.model_type}: an output head with a bias")
    model.tie_weights()
    model.train()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, config.temperature)
    if mesh is not None:
        shard(policy, config, device, mesh)
    else:
        policy.to(device)
    return policy


def shard(policy: Policy, config: LearnerConfig, device: torch.device, mesh: DeviceMesh) -> None:
    """Shard every decoder layer, then the rest, and fill the shards from the first rank."""
    first = mesh.get_local_rank() == 0
    # Buffers too: rotary frequencies are computed at construction and stand in no file.
    source = {n: t.detach() for n, t in (*policy.named_parameters(), *policy.named_buffers())}
    half = config.dtype == "bfloat16"
    options = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if config.cpu_offload else OffloadPolicy(),
    )
    policy.to("meta")
    policy.model.tie_weights()
    for layer in policy.model.base_model.layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options)
    policy.to_empty(device="cpu" if config.cpu_offload else device)
    policy.model.tie_weights()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            whole = torch.empty(parameter.shape, device=device)
            if first:
                whole.copy_(source[name])
            part = distribute_tensor(whole, mesh, parameter.placements)
            parameter.to_local().copy_(part.to_local())
        for name, buffer in policy.named_buffers():
            whole = torch.empty_like(buffer, device=device)
            if first:
                whole.copy_(source[name])
            dist.broadcast(whole, group=mesh.get_group(), group_src=0)
            buffer.copy_(whole)


# ---------------------------------------------------------------------------------- learner


class Learner:
    """A policy, its optimizer, and the step that improves it.

    With a process group every rank makes one and calls the same methods with the same arguments:
    all of them are collective. Nothing here uses the default process group, so the learner's
    ranks can be a part of a larger world.

    Args:
        model_dir: a Hugging Face model directory; the frozen reference, where kl_coef asks for
            one, is read from it too, so a resumed run passes the directory it began with.
        group: the learner's ranks; None or a single rank trains without FSDP.
        device: where to compute; by default CUDA's current device where there is one, else CPU.

    Attributes:
        version: optimizer steps done; a skipped step does not count, its weights are the old ones.

    Raises:
        UnsupportedModel: a model family that packing would compute wrongly.
    """

    def __init__(
        self, model_dir: str | os.PathLike, config: LearnerConfig,
        group: dist.ProcessGroup | None = None, device: torch.device | str | None = None,
    ) -> None:
        self.model_dir, self.config = Path(model_dir), config
        self.group = group if group is not None and group.size() > 1 else None
        self.rank = self.group.rank() if self.group else 0
        self.ranks = self.group.size() if self.group else 1
        if device is None:
            device = (torch.device("cuda", torch.cuda.current_device())
                      if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        if config.cpu_offload and not self.group:
            raise ValueError("cpu_offload is FSDP's: it needs a group of at least two ranks")
        mesh = DeviceMesh.from_group(self.group, self.device.type) if self.group else None
        self.policy = load_policy(self.model_dir, config, self.device, mesh)
        self.reference = None
        if config.kl_coef > 0:
            self.reference = load_policy(self.model_dir, config, self.device, mesh)
            self.reference.requires_grad_(False)
        self.optimizer = make_optimizer(self.policy, config)
        self.version = 0
        # Published files keep the dtype that the model directory names; an engine casts to its own.
        self.publish_dtype = AutoConfig.from_pretrained(self.model_dir).dtype or torch.float32

    # ----------------------------------------------------------------------------- one step

    def step(self, sequences: list[Sequence]) -> dict[str, float]:
        """One optimizer step on a batch; every rank passes the same list.

        Returns:
            metrics of the whole batch, equal on every rank. Means over response tokens: `kl`, the
            k3 estimate of KL(behaviour || policy), how far off-policy the batch is; `kl_ref`, to
            the frozen reference, when there is one; `clip_frac`, `clip_frac_low`,
            `clip_frac_high`, `is_ratio_mean`; `entropy` in nats; `logprob_diff`, mean
            |log pi - log pi_behaviour|. Of the batch: `loss`; `grad_norm` before clipping; `ess`
            (grpo.policy_loss); `tokens` response tokens; `tokens_total` with each sequence's
            prompt; `tokens_computed` that went through the model; `skipped`; `learning_rate`.

        Raises:
            ValueError: for an empty batch or a sequence longer than the token budget.
        """
        if not sequences:
            raise ValueError("a step needs at least one sequence")
        config = self.config
        bins = pack(sequences, config.token_budget, self.ranks, config.share_prompts)
        lengths = torch.tensor([len(s.tokens) - s.prompt_length for s in sequences])  # (N,)
        denominator = grpo.loss_denominator(lengths, config.loss, config.max_response_tokens)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for members in bins[self.rank :: self.ranks]:
            batch = MicroBatch.build([sequences[i] for i in members], self.device,
                                     config.share_prompts)
            loss, parts = self._loss(batch, denominator)
            # FSDP takes the mean over ranks, but the losses are parts of one sum.
            (loss * self.ranks).backward()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()  # ()
        metrics = self._reduce(sums)
        metrics["tokens_total"] = sum(len(s.tokens) for s in sequences)
        metrics.update(self._update(math.isfinite(metrics["loss"])))
        return metrics

    def _loss(self, batch: MicroBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the loss, and its sums over response tokens."""
        config, mask, behavior = self.config, batch.mask, batch.behavior_logprobs
        with self._autocast():
            logprobs, entropy = self.policy(batch)  # (R,), (R,)
        logprobs, entropy = batch.unpack(logprobs), batch.unpack(entropy)  # (N, longest) each
        now = logprobs.detach()  # (N, longest)
        proximal = None if config.tis_cap is None else now  # note 5 of the header
        loss, metrics = grpo.policy_loss(
            logprobs, behavior, batch.advantages, mask, config.loss, config.clip_low,
            config.clip_high, config.tis_cap, proximal, denominator)  # ()
        tokens = mask.sum()  # ()
        sums = {name: value * tokens for name, value in metrics.items() if name != "ess"}
        sums["kl"] = (grpo.kl_estimate(behavior, now) * mask).sum()  # ()
        sums["logprob_diff"] = ((now - behavior).abs() * mask).sum()  # ()
        sums["entropy"] = (entropy * mask).sum()  # ()
        if config.entropy_coef:
            loss = loss - config.entropy_coef * grpo.aggregate(
                entropy, mask, config.loss, denominator)  # ()
        if self.reference is not None:
            ref = batch.unpack(self._forward(self.reference, batch))  # (N, longest)
            kl = grpo.kl_estimate(logprobs, ref, config.kl_kind)  # (N, longest)
            sums["kl_ref"] = (kl * mask).sum()  # ()
            loss = loss + config.kl_coef * grpo.aggregate(kl, mask, config.loss, denominator)  # ()
        sums["loss"], sums["tokens"] = loss, tokens
        sums["tokens_computed"] = torch.tensor(batch.tokens.numel(), device=self.device)  # ()
        return loss, sums

    def _reduce(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums of this rank -> metrics of the whole batch, by one all-reduce."""
        names = sorted(sums)
        vector = torch.stack([sums[name] for name in names])  # (metrics,)
        if self.group:
            dist.all_reduce(vector, group=self.group)
        totals = dict(zip(names, vector.tolist()))
        whole = {"loss": totals.pop("loss"), "tokens": int(totals.pop("tokens")),
                 "tokens_computed": int(totals.pop("tokens_computed"))}
        means = {name: total / max(whole["tokens"], 1) for name, total in totals.items()}
        square = means.pop("is_ratio_square_mean")
        means["ess"] = means["is_ratio_mean"] ** 2 / square if square else 0.0
        return {**whole, **means}

    def _update(self, loss_is_finite: bool) -> dict[str, float]:
        """Clip and apply the gradient, or drop it. Every rank decides alike: both facts are
        global."""
        (group,) = self.optimizer.param_groups
        norm = nn.utils.clip_grad_norm_(group["params"], self.config.max_grad_norm)  # ()
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        rate = self.config.learning_rate_at(self.version)
        skipped = not (loss_is_finite and math.isfinite(norm))
        if not skipped:
            group["lr"] = rate
            self.optimizer.step()
            self.version += 1
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "skipped": skipped, "learning_rate": rate}

    def _autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 without FSDP, whose own mixed-precision policy casts the parameters."""
        enabled = self.config.dtype == "bfloat16" and self.group is None
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def _forward(self, policy: Policy, batch: MicroBatch, temperature: float | None = None
                 ) -> Tensor:
        """Log-probabilities (R,) without gradient."""
        with self._autocast():
            logprobs, _ = policy(batch, temperature)  # (R,)
        if isinstance(policy, FSDPModule):
            policy.reshard()  # the root keeps its parameters gathered until a backward pass
        return logprobs

    def score(self, tokens: list[int], temperature: float | None = None) -> np.ndarray:
        """Log-probabilities (T - 1,) float32 of tokens[1:], each given the ones before it, at
        the temperature of the sampling unless another is given. Collective."""
        tokens = np.asarray(tokens, np.int32)  # (T,)
        probe = Sequence(tokens, 1, np.zeros(len(tokens) - 1, np.float32), 0.0)
        batch = MicroBatch.build([probe], self.device)
        return self._forward(self.policy, batch, temperature).float().cpu().numpy()

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply every matrix by a power of two: exact, and so is the way back. Collective."""
        for parameter in self.policy.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(factor)

    # -------------------------------------------------------------------------- publication

    def publish(self, directory: str | os.PathLike) -> None:
        """Write the policy as a Hugging Face model directory that the engine can load.

        Collective: tensors are gathered one at a time, and only the first rank keeps them, in
        host memory, in the dtype of the model directory. `lm_head.weight` is written also when
        it is tied, since an engine that updates its weights from a file without it would keep
        the old output head. Written beside `directory` and renamed, so that a reader never sees a
        half-written one (for an instant between two renames it may see none).

        Raises:
            OSError: it cannot be written (disk full).
        """
        directory = Path(directory)
        staging = directory.with_name(f".{directory.name}.new")
        if self.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        index: dict[str, str] = {}
        for number, shard in enumerate(self._shards()):
            if self.rank == 0:
                name = f"model-{number + 1:05d}.safetensors"
                with errors_as_os_error(f"{staging / name} cannot be written"):
                    save_file(shard, staging / name, metadata={"format": "pt"})
                index.update(dict.fromkeys(shard, name))
        if self.rank == 0:
            if len(set(index.values())) == 1:
                (staging / "model-00001.safetensors").rename(staging / "model.safetensors")
            else:
                (staging / "model.safetensors.index.json").write_text(
                    json.dumps({"metadata": {}, "weight_map": index}))
            copy_model_files(self.model_dir, staging)
            replace_directory(staging, directory)
        if self.group:
            dist.barrier(self.group)  # nobody goes on before the directory is there

    @property
    def published_bytes(self) -> int:
        """The size of what `publish` writes."""
        tensors = self.policy.model.state_dict().values()
        return sum(tensor.numel() for tensor in tensors) * self.publish_dtype.itemsize

    def _shards(self) -> Iterator[dict[str, Tensor]]:
        """Whole tensors under their published names, in parts of about SHARD_BYTES that end with
        a layer; empty on every rank but the first."""
        model, pending, size, layer = self.policy.model, {}, 0, None
        for name, tensor in model.state_dict().items():
            head, _, tail = name.partition(".layers.")
            previous, layer = layer, (head, tail.partition(".")[0])
            if layer != previous and size >= SHARD_BYTES:
                yield self._published(pending)
                pending, size = {}, 0
            if isinstance(tensor, DTensor):
                tensor = tensor.to(self.publish_dtype).full_tensor()
            size += tensor.numel() * self.publish_dtype.itemsize
            if self.rank == 0:
                pending[name] = tensor.to("cpu", self.publish_dtype, copy=True)
        yield self._published(pending)

    def _published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The names and layouts of the files: transformers packs experts when it loads them."""
        tensors = revert_weight_conversion(self.policy.model, tensors) if tensors else {}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    # --------------------------------------------------------------------------- checkpoint

    def save(self, directory: str | os.PathLike) -> None:
        """Write a sharded checkpoint: weights, optimizer, version (no RNG state: a step draws no
        random numbers). Collective.

        It loads at any number of ranks. The schedule is a function of the version. Raises OSError
        on every rank when one cannot write (disk full)."""
        with warnings.catch_warnings(), errors_as_os_error(f"{directory} cannot be written"):
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(self._state(), checkpoint_id=str(directory), process_group=self.group,
                     no_dist=self.group is None)

    def load(self, directory: str | os.PathLike) -> None:
        """Go on from a checkpoint of `save`; further steps are bit-identical at the same number
        of ranks on CPUs (on GPUs, atomic additions have no fixed order). Collective. Raises OSError
        when it is damaged or of another model."""
        state = self._state()
        with warnings.catch_warnings(), errors_as_os_error(f"{directory} cannot be loaded"):
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=str(directory), process_group=self.group,
                     no_dist=self.group is None)
        self.version = state["version"]

    def _state(self) -> dict[str, object]:
        """A flat dictionary of this learner's tensors: dcp.load fills them in place."""
        state: dict[str, object] = {"version": self.version}
        for name, parameter in self.policy.named_parameters():
            state[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{name}.{key}"] = value
        return state


@contextlib.contextmanager
def errors_as_os_error(what: str) -> Iterator[None]:
    """A full disk or a damaged file is an OSError here. torch and safetensors raise exceptions of
    their own, among them one (CheckpointException) that is no Exception."""
    try:
        yield
    except (torch.OutOfMemoryError, dist.DistError):
        raise  # of the devices and the ranks, not of a file
    except (OSError, dcp.api.CheckpointException, SafetensorError, pickle.UnpicklingError, EOFError,
            RuntimeError) as error:
        failures = getattr(error, "failures", None)  # by rank: (exception, traceback)
        cause = next(iter(failures.values()))[0] if failures else error
        text = " ".join(str(cause).split())[:300]
        raise OSError(f"{what}: {type(cause).__name__} {text}") from error


def make_optimizer(policy: Policy, config: LearnerConfig) -> torch.optim.AdamW:
    """AdamW with its state in place from the start: a checkpoint can then be loaded into it, and
    memory that does not suffice fails before the first rollout."""
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),  # ()
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def copy_model_files(source: Path, target: Path) -> None:
    """Configuration and tokenizer: everything in `source` that is a file and holds no weights.

    The configuration keeps its tie flag and dtype; re-saving it would take the trainer's."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)


def replace_directory(new: Path, directory: Path) -> None:
    """Put `new` where `directory` is; the old one is removed after the exchange."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


# ----------------------------------------------------------------------------- memory plan


def memory_plan(
    model: str | os.PathLike | PreTrainedConfig, config: LearnerConfig, ranks: int,
    prompt_tokens: int = 1, memory_bytes: int | None = None,
) -> dict[str, int]:
    """What one learner rank needs, before anything is allocated.

    The model is built on the meta device. Activations are what autograd would save for a row of
    `config.token_budget` tokens; they are counted on one and on two layers, whose difference is a
    layer, since that is exact and quick for any depth.

    Args:
        model: a model directory, or its transformers configuration.
        ranks: learner ranks that share the states.
        prompt_tokens: of the groups in the row; their responses have `max_response_tokens`.
        memory_bytes: what a rank has.

    Returns:
        bytes: `parameters`, `gradients`, `optimizer` (float32 shards), `reference`; `gathered`,
        parameters and gradients of the layers in flight; `activations`; `head`, chunks of logits
        and the head's gradient; `total` of these on the device. `host`: in the memory of the
        first rank's node while it reads the model, and with cpu_offload the states of all learner
        ranks, as if they were on that node.
        `parameter_count` is a number, not bytes.

    Raises:
        ValueError: when total exceeds memory_bytes; it names the parts and what would help.
    """
    hf_config = model if isinstance(model, PreTrainedConfig) else AutoConfig.from_pretrained(model)
    check_supported(hf_config)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(hf_config)
    count = sum(p.numel() for p in whole.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in whole.base_model.layers]
    layer, root = max(layers), count - sum(layers)
    shard_count = -(-count // ranks)
    states = {"parameters": 4 * shard_count, "gradients": 4 * shard_count,
              "optimizer": 8 * shard_count,
              "reference": 4 * shard_count if config.kl_coef > 0 else 0}
    if ranks == 1:  # autocast keeps a copy of every weight that it has cast
        gathered = 2 * count if config.dtype == "bfloat16" else 0
    else:  # the root stays, a layer is in use and the next is on its way, twice with a reference
        models = 2 if config.kl_coef > 0 else 1
        gathered = models * (root + 2 * layer) * dtype.itemsize
        gathered += max(layer, root) * (dtype.itemsize + 4)  # a gradient, and its float32 copy
    one, two = (saved_bytes(hf_config, n, config, prompt_tokens, dtype) for n in (1, 2))
    width = config.token_budget * hf_config.hidden_size * dtype.itemsize  # a layer's input
    if config.activation_checkpointing:  # every layer's input, and one layer computed again
        activations = one + width * len(layers)
    else:
        activations = one + (two - one) * (len(layers) - 1)
    # Three chunks of logits; the gradient of the head, and what the next chunk adds to it.
    head = 4 * hf_config.vocab_size * (3 * 1024 + 2 * hf_config.hidden_size)
    plan = {**states, "gathered": gathered, "activations": activations, "head": head}
    host = 4 * count
    if config.cpu_offload:
        host += ranks * sum(states.values())
        plan.update(dict.fromkeys(states, 0))
    plan["total"] = sum(plan.values())
    plan.update(host=host, parameter_count=count)
    if memory_bytes is not None and plan["total"] > memory_bytes:
        parts = ", ".join(f"{name} {plan[name] / 2**30:.1f}" for name in
                          (*states, "gathered", "activations", "head"))
        raise ValueError(
            f"a learner rank needs {plan['total'] / 2**30:.1f} GiB and has "
            f"{memory_bytes / 2**30:.1f} ({parts}): use more learner ranks, "
            "activation_checkpointing, a smaller token_budget, or cpu_offload")
    return plan


def saved_bytes(
    hf_config: PreTrainedConfig, layers: int, config: LearnerConfig, prompt_tokens: int,
    dtype: torch.dtype,
) -> int:
    """Bytes that autograd saves in the forward pass of a full row, on the meta device, without
    activation checkpointing, of a model cut to `layers` layers; parameters are not counted."""
    if getattr(hf_config, "num_experts", None) and dtype == torch.float32:
        # The grouped product of experts exists in bfloat16 only there: twice that is a bound.
        return 2 * saved_bytes(hf_config, layers, config, prompt_tokens, torch.bfloat16)
    cut = copy.deepcopy(hf_config)
    cut.num_hidden_layers = layers
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:layers]
    device = torch.device("meta")
    with device:
        model = AutoModelForCausalLM.from_config(cut, dtype=dtype, attn_implementation=ATTENTION)
    policy = Policy(model.train(), config.temperature)
    response = min(config.max_response_tokens or config.token_budget, config.token_budget)
    prompt_tokens = max(min(prompt_tokens, config.token_budget - response + 1), 1)
    # A response adds all but its last token to the row.
    group = max((config.token_budget - prompt_tokens) // max(response - 1, 1), 1)
    sequence = Sequence(np.zeros(prompt_tokens + response, np.int32), prompt_tokens,
                        np.zeros(response, np.float32), 0.0)
    batch = MicroBatch.build([sequence] * group, device, config.share_prompts)
    parameters = {p.untyped_storage()._cdata for p in policy.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batch)
    scale = config.token_budget / batch.tokens.numel()  # the row is filled with whole responses
    return int(scale * sum(tensor.untyped_storage().nbytes() for tensor in saved.values()))


def main() -> None:
    """Three steps on made-up groups of eight."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prompt", type=int, default=250, help="prompt tokens (default 250)")
    parser.add_argument("--response", type=int, default=200, help="response tokens (default 200)")
    parser.add_argument("--groups", type=int, default=16, help="groups of 8 (default 16)")
    parser.add_argument("--token-budget", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--no-share", action="store_true", help="compute each prompt G times")
    args = parser.parse_args()
    if not (args.model_dir / "config.json").is_file():
        parser.error(f"{args.model_dir}: no config.json there; give a Hugging Face model directory")
    if min(args.prompt, args.response, args.groups) < 1:
        parser.error("--prompt, --response and --groups must be at least 1")
    if args.token_budget < args.prompt + args.response:
        parser.error(f"--token-budget must be at least --prompt + --response, "
                     f"{args.prompt + args.response}")
    config = LearnerConfig(dtype=args.dtype, max_response_tokens=args.response,
                           token_budget=args.token_budget, share_prompts=not args.no_share)
    learner = Learner(args.model_dir, config)
    vocabulary = learner.policy.model.config.vocab_size
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(args.groups):
        prompt = rng.integers(0, vocabulary, args.prompt, dtype=np.int32)
        for advantage in rng.normal(size=8):
            response = rng.integers(0, vocabulary, args.response, dtype=np.int32)
            tokens = np.concatenate([prompt, response])
            logprobs = learner.score(tokens)[args.prompt - 1 :]
            sequences.append(Sequence(tokens, args.prompt, logprobs, float(advantage)))
    for _ in range(3):
        start = time.perf_counter()
        metrics = learner.step(sequences)
        seconds = time.perf_counter() - start
        print(json.dumps({k: round(float(v), 5) for k, v in metrics.items()}))
        print(f"{seconds:.2f} s, {metrics['tokens_total'] / seconds:.0f} tokens/s "
              f"({metrics['tokens_computed'] / seconds:.0f} computed)")


if __name__ == "__main__":
    main()
