"""Adaptive Sampling: which task is worth the next rollouts.

In the paper (arXiv 2602.07906): "Adaptive Sampling guided by a Learnability Potential function",
the half of AceGRPO that keeps training at "the agent's learning frontier". GRPO learns from the
differences inside a group: a task that the policy always fails, or always solves, teaches nothing
and costs as much as any other. So every task x gets a potential and is drawn with probability

    LP(x) = sigma_x * (1 - mu_x)       spread of its rewards within a group times what they lack
    P(x) ~ [ (1 - eps) * S(x) + eps * U(x) ] * cool(x)  normalised over all tasks

    S(x) = share(operator of x) * LP(x)^(1/tau) / (sum of LP^(1/tau) over the operator's tasks)
    U(x) = uniform over competitions, then over its operators, then over the tasks of the two
    cool(x) = 0 in flight, else (1 + a) / (1 + cooldown), at most 1, a = draws since the last visit

What is the paper's and what is ours:
 1. [paper] A Learnability Potential guides the sampling. Its formula is not in the abstract; ours
            has what summaries of the paper name, variance and headroom (1 - mu).
 2. [ours]  mu and sigma are recency-weighted: an earlier group weighs `decay` of the next one.
            sigma is the mean of the standard deviations *inside* groups, since those are what GRPO
            learns from (advantages are rewards minus their group's mean): all zeros yesterday and
            all ones today is no spread. It is not the root of the mean variance: if one group in
            nine has deviation s and the others none, sigma is s/9, where the root would say s/3.
            What an improve step earns is 0.1 and a gain (sandbox.step_reward): its mu stays small,
            and its potential is little else than its sigma.
 3. [ours]  A task that was never visited has a prior: what its competition's groups have brought so
            far for each point of reward that there was to gain, times what there is to gain here,
            1 less the parent's base reward (`prior`); optimistic while nothing is known. It weighs
            as much as `prior_strength` rewards, so that one group without spread lowers a potential
            but does not end it.
 4. [ours]  share(operator) = how often an agent would take such a step now, times the mean
            LP^(1/tau) that a draw inside the operator meets; the shares add up to 1. A quarter of
            the steps are taken to be drafts (`DRAFTS`). The others follow a script: one that failed
            is debugged, any other improved (or crossed, half and half). So debug steps get rare as
            the scripts of the last groups, whatever their operators, get valid (at first half of
            them are taken to fail), however many failures lie in the buffer. With a plain sum over
            all tasks instead, a dozen draft roots drown among hundreds of children
            (`balance_operators=False`). The same reason gives U its middle level.
 5. [ours]  Cooling is the ageing: a task just visited waits while others are drawn.
 6. [ours]  Alternatives to LP: `variance` mu(1-mu), `regret` 1[any success]-mu, and `uniform`, the
            ablation: every task of the buffer alike, without floor and cooling.

How it stays fast with a million tasks: LP^(1/tau) changes only where a reward arrives, so its sums
are kept by blocks of 1024 tasks and one draw is two short searches. cool(x) changes for many tasks
with every draw, so it is in no sum: a draw is proposed without it and accepted with probability
cool(x), which gives P exactly. Where nearly everything is cooling (a small buffer) proposals are
refused again and again; the probabilities are then computed in full, which is cheap there.

    python sampler.py       # a worked example
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

KINDS = ("lp", "variance", "regret", "uniform")
OPERATORS = ("draft", "improve", "debug", "crossover")


def learnability_potential(mean, std, kind: str = "lp") -> np.ndarray:
    """How much a policy can learn from a task now. Pure; elementwise; never negative.

    Args:
        mean: of the task's rewards in [0, 1]; a scalar or an array.
        std: of its rewards within a group; of the same shape.
        kind: `lp` std * (1 - mean); `variance` mean * (1 - mean), the variance of a 0/1 reward;
            `regret` 1 - mean where the mean is above zero, else 0; `uniform` 1.

    Raises ValueError for another kind.

    >>> learnability_potential([0.0, 0.25, 0.5, 1.0], [0.0, 0.43, 0.5, 0.0]).round(4).tolist()
    [0.0, 0.3225, 0.25, 0.0]
    >>> learnability_potential([0.0, 0.25, 1.0], 0.0, "variance").tolist()
    [0.0, 0.1875, 0.0]
    >>> learnability_potential([0.0, 0.25, 1.0], 0.0, "regret").tolist()
    [0.0, 0.75, 0.0]
    """
    mean, std = np.asarray(mean, float), np.asarray(std, float)
    lack = np.maximum(1.0 - mean, 0.0)
    if kind == "lp":
        return std * lack
    if kind == "variance":
        return mean * lack
    if kind == "regret":
        return lack * (mean > 0)
    if kind == "uniform":
        return np.ones_like(mean)
    raise ValueError(f"unknown potential {kind!r}; choose one of {', '.join(KINDS)}")


# The most learnable group of 0/1 rewards: LP = sqrt(q(1-q))(1-q), q the share of ones, is largest
# at q = 1/4. No rewards in [0, 1] have more; what nothing is known of is assumed to be that.
OPTIMISTIC_MEAN = 0.25
OPTIMISTIC_STD = (3 / 16) ** 0.5
FIRST_LEVEL = (OPTIMISTIC_MEAN, OPTIMISTIC_STD, 1)  # of a competition: it counts as one group
DRAFTS = 0.25  # share of the steps that are drafts: more than the 3 of 20 that an agent takes
FAILURE_RATE = 0.05  # weight of a new group in the share of scripts that fail
LEVEL_RATE = 0.1  # least weight of a new group in its competition's level

BLOCK = 1024  # tasks a block: with a million tasks as many blocks as tasks in a block
PROPOSALS = 16  # refused proposals before the probabilities are computed in full
IN_FLIGHT = np.iinfo(np.int64).max // 2  # a last visit that lies in the future: cool is 0
NEVER = -IN_FLIGHT

ROW = np.dtype([
    ("mean", "f4"), ("std", "f4"),  # recency-weighted: of the rewards, within groups
    ("evidence", "f4"),  # the number of rewards that they stand for
    ("weight", "f4"),  # LP^(1/tau); 0 where that is below a float32
    ("last", "i8"),  # value of the draw counter at the last visit
    ("visits", "i4"), ("competition", "u2"), ("operator", "i1"),
    ("headroom", "f2"),  # the most that a step can gain
    ("hopeless", "?"),  # visited, and no reward was above 0
    ("place", "i4"),  # position in the list of its competition's and operator's tasks
])


class AdaptiveSampler:
    """Owns every task's reward statistics and draws the next tasks. Takes ids and numbers only.

    Args:
        kind: the potential, see `learnability_potential`.
        tau: temperature, at least 0.05; below 1 the highest potentials are preferred more strongly.
            (At 0.05 potentials below 0.006 have no weight as a float32: U alone draws them.)
        epsilon: share of the draws that go by U (before cooling), in [0, 1].
        decay: weight of a group's rewards once the task's next group has arrived, in [0, 1).
        cooldown: draws until a visited task is fully back.
        prior_strength: number of rewards that the prior of an unseen task weighs.
        balance_operators: False sums LP over all tasks alike (header, point 4).
        seed: of the draws.
        operators: the names that `add` accepts; all but `draft` and `debug` share alike the steps
            that these two leave.

    `in_flight` holds the ids drawn and neither updated nor released, in the order of drawing.
    """

    def __init__(self, kind: str = "lp", tau: float = 1.0, epsilon: float = 0.2,
                 decay: float = 0.5, cooldown: int = 8, prior_strength: float = 4.0,
                 balance_operators: bool = True, seed: int = 0,
                 operators: Sequence[str] = OPERATORS):
        learnability_potential(0.0, 0.0, kind)  # refuses an unknown kind
        if not (tau >= 0.05 and 0 <= epsilon <= 1 and 0 <= decay < 1 and 0 <= cooldown < np.inf
                and 0 <= prior_strength < np.inf):
            raise ValueError(
                f"out of range: tau {tau} >= 0.05, epsilon {epsilon} in [0, 1], decay {decay} in "
                f"[0, 1), cooldown {cooldown} >= 0, prior_strength {prior_strength} >= 0")
        if kind == "uniform":  # the ablation: nothing adapts, every task of the buffer alike
            epsilon, cooldown, balance_operators = 0.0, 0, False
        self.kind, self.tau, self.epsilon, self.decay = kind, tau, epsilon, decay
        self.cooldown, self.prior_strength = cooldown, prior_strength
        self.balance_operators = balance_operators
        self.rng = np.random.default_rng(seed)
        self.operators = tuple(operators)
        self.failures = 0.5  # share of the scripts that failed lately
        self.draws = 0  # tasks drawn so far: the clock of the ageing
        self.late = 0  # groups that came back after their task had been removed
        self.in_flight: dict[str, int] = {}  # id -> its last visit before
        self._removed_in_flight: set[str] = set()
        self.competitions: list[str] = []
        # of each competition: mean and std of rewards / headroom, number of groups
        self.levels: list[list[float]] = []
        self._clear(capacity=BLOCK)

    def _clear(self, capacity: int) -> None:
        self.table = np.zeros(capacity, ROW)  # rows [0, len(ids)) are in use
        self.ids: list[str] = []  # row -> id
        self.rows = _Rows(self.ids)  # id -> row
        # members[competition][operator] lists rows; counts are their lengths
        self.members = [[array("i") for _ in self.operators] for _ in self.competitions]
        self.counts = np.zeros((len(self.competitions), len(self.operators)), np.int64)
        # sums of weight and of weight^2 over each block's tasks of an operator
        self.sums = np.zeros((2, len(self.operators), capacity // BLOCK))

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, task_id: str) -> bool:
        return self.rows.find(task_id) >= 0

    # ---- the tasks

    def add(self, task_id: str, competition_id: str, operator: str, headroom: float = 1.0) -> None:
        """Make a task drawable.

        Args:
            headroom: the most that a step can gain, in (0, 1]: 1 less the parent's base reward.

        Raises ValueError for an id that is there already, or was removed and its group has not come
        back, an unknown operator, a headroom out of range, or a competition beyond the 65,536th.
        """
        if task_id in self:
            raise ValueError(f"task {task_id!r} is in the sampler already")
        if task_id in self._removed_in_flight:
            raise ValueError(f"task {task_id!r} was removed in flight: its group has to come first")
        if operator not in self.operators:
            raise ValueError(f"unknown operator {operator!r}; know {', '.join(self.operators)}")
        if not 0 < headroom <= 1:
            raise ValueError(f"the headroom of {task_id} has to be in (0, 1]: {headroom}")
        mean, std = self.prior(competition_id, headroom)
        if competition_id not in self.competitions:
            if len(self.competitions) > np.iinfo(ROW["competition"]).max:
                raise ValueError(f"{competition_id} is the 65,537th competition: ROW has room for "
                                 "65,536")
            self.competitions.append(competition_id)
            self.levels.append(list(FIRST_LEVEL))
            self.members.append([array("i") for _ in self.operators])
            self.counts = np.pad(self.counts, ((0, 1), (0, 0)))
        if len(self) == len(self.table):
            more = len(self.table) // 2 // BLOCK * BLOCK or BLOCK  # half as much again
            self.table = np.concatenate([self.table, np.zeros(more, ROW)])
            self.sums = np.pad(self.sums, ((0, 0), (0, 0), (0, more // BLOCK)))
        row = len(self)
        self.ids.append(task_id)
        self.rows.insert(task_id, row)
        competition = self.competitions.index(competition_id)
        self._place(row, competition, self.operators.index(operator))
        self.table["headroom"][row] = headroom
        self._write(row, mean, std, self.prior_strength, visits=0, hopeless=False, last=NEVER)

    def prior(self, competition_id: str, headroom: float = 1.0) -> tuple[float, float]:
        """Mean and standard deviation assumed of a task's rewards before its first visit: headroom
        times its competition's level.

        The level is the mean over the competition's groups, whatever their operators, of mean and
        standard deviation per point of headroom; recency-weighted from the tenth group on
        (`LEVEL_RATE`). It starts as learnable as a group can be, which counts as one group. A rough
        guess: scaled apart, the two can be of more spread than rewards of that mean have.

        >>> sampler = AdaptiveSampler()
        >>> sampler.prior("titanic")
        (0.25, 0.4330127018922193)
        >>> sampler.prior("titanic", headroom=0.2)  # little is left to improve, little to learn
        (0.05, 0.08660254037844387)
        """
        mean, std, _ = (self.levels[self.competitions.index(competition_id)]
                        if competition_id in self.competitions else FIRST_LEVEL)
        return headroom * mean, headroom * std

    def remove(self, task_id: str) -> None:
        """Forget a task (it was evicted). Its group, if in flight, is then ignored on arrival.

        Raises KeyError for an id that is not there.
        """
        row = self._row(task_id)
        if self.in_flight.pop(task_id, None) is not None:
            self._removed_in_flight.add(task_id)
        self.rows.delete(task_id)
        self._unplace(row)
        last = len(self) - 1
        blocks = {(row // BLOCK, int(self.table["operator"][row]))}
        if row != last:  # the last row fills the gap
            moved = self.table[last]
            self.table[row] = moved
            self.members[moved["competition"]][moved["operator"]][moved["place"]] = row
            self.ids[row] = self.ids[last]
            self.rows.move(self.ids[row], last, row)
            blocks |= {(row // BLOCK, int(moved["operator"])),
                       (last // BLOCK, int(moved["operator"]))}
        self.table[last] = 0
        self.ids.pop()
        for block, operator in blocks:
            self._sum_block(block, operator)

    # ---- what a group teaches

    def update(self, task_id: str, rewards: Sequence[float], failed: float | None = None) -> None:
        """Take in the rewards of a finished group; the task is no longer in flight. failed: the
        share of its responses that did not submit anything valid, where that is known.

        The group of a task removed while in flight is ignored and counted in `late`.
        Raises KeyError for any other unknown id, ValueError without rewards or beyond [0, 1].
        """
        if failed is not None and not 0 <= failed <= 1:
            raise ValueError(f"failed of {task_id} has to be a share in [0, 1]: {failed}")
        rewards = np.asarray(rewards, float)
        if rewards.size == 0 or not ((rewards >= 0) & (rewards <= 1)).all():
            raise ValueError(f"rewards of {task_id} have to be numbers in [0, 1]: {rewards}")
        if task_id in self._removed_in_flight:
            self._removed_in_flight.discard(task_id)
            self.late += 1
            return
        row = self._row(task_id)
        self.in_flight.pop(task_id, None)
        if failed is not None:
            self.failures += FAILURE_RATE * (failed - self.failures)
        mean, std = _moments(rewards)
        old = self.table[row]

        level_mean, level_std, groups = self.levels[old["competition"]]
        rate = max(1 / (groups + 1), LEVEL_RATE)
        # At most 1: a valid file earns 0.1 even where that is more than can be gained.
        headroom = max(float(old["headroom"]), 0.01)
        self.levels[old["competition"]] = [
            level_mean + rate * (min(mean / headroom, 1.0) - level_mean),
            level_std + rate * (min(std / headroom, 1.0) - level_std), groups + 1]

        kept = (self.decay if old["visits"] else 1.0) * float(old["evidence"])
        share = rewards.size / (kept + rewards.size)  # of the new group
        self._write(row, float(old["mean"]) + share * (mean - float(old["mean"])),
                    float(old["std"]) + share * (std - float(old["std"])),
                    kept + rewards.size, visits=int(old["visits"]) + 1, last=self.draws,
                    hopeless=bool(rewards.max() <= 0 and (old["hopeless"] or not old["visits"])))

    def release(self, task_id: str) -> None:
        """Put a task back without a result: it is drawable as if it had not been drawn (but the
        others have aged by that draw).

        A task that is not in flight is left alone.
        """
        self._removed_in_flight.discard(task_id)
        if task_id in self.in_flight:
            self.table["last"][self._row(task_id)] = self.in_flight.pop(task_id)

    def score(self, task_id: str) -> float:
        """The task's potential. Raises KeyError for an unknown id."""
        return float(self._potential(self.table[self._row(task_id)]))

    def statistics(self, task_id: str) -> dict[str, float]:
        """mean (of the rewards), std (within groups), visits. Raises KeyError for an unknown id."""
        row = self.table[self._row(task_id)]
        return {"mean": float(row["mean"]), "std": float(row["std"]),
                "visits": int(row["visits"])}

    def metrics(self) -> dict[str, float]:
        """Mean and maximum of the potential over all tasks."""
        potential = self._potential(self.table[:len(self)])
        return {"lp_mean": float(potential.mean()) if len(self) else 0.0,
                "lp_max": float(potential.max()) if len(self) else 0.0}

    # ---- drawing

    def draw(self, n: int = 1) -> list[str]:
        """The next n tasks, without replacement; they are in flight from now on.

        Fewer than n, down to none, when all others are in flight already.
        """
        drawn = []
        while len(drawn) < n and len(self.in_flight) < len(self):
            row = self._draw_row()
            task_id = self.ids[row]
            self.in_flight[task_id] = int(self.table["last"][row])
            self.table["last"][row] = IN_FLIGHT
            self.draws += 1
            drawn.append(task_id)
        return drawn

    def probabilities(self) -> dict[str, float]:
        """P(x) of every task for the next draw, in full: O(tasks). Empty if all are in flight."""
        if len(self.in_flight) == len(self):
            return {}
        return dict(zip(self.ids, self._probabilities().tolist(), strict=True))

    def _draw_row(self) -> int:
        for _ in range(PROPOSALS):
            row = self._propose()
            age = self.draws - int(self.table["last"][row])
            if self.rng.random() * (1 + self.cooldown) < 1 + age:
                return row
        cumulative = self._probabilities().cumsum()
        return _search(cumulative, self.rng.random() * cumulative[-1])

    def _propose(self) -> int:
        """A row with the probability [(1 - eps) S + eps U], whatever its cooling."""
        share = self._operator_shares().cumsum()
        if share[-1] == 0 or self.rng.random() < self.epsilon:
            return self._propose_uniform()
        operator = _search(share, self.rng.random() * share[-1])
        sums = self.sums[0, operator].cumsum()
        block = _search(sums, self.rng.random() * sums[-1])
        weights = self._weights(block, operator).cumsum()
        return block * BLOCK + _search(weights, self.rng.random() * weights[-1])

    def _propose_uniform(self) -> int:
        competitions = np.flatnonzero(self.counts.any(1))
        competition = competitions[self.rng.integers(len(competitions))]
        operators = np.flatnonzero(self.counts[competition])
        members = self.members[competition][operators[self.rng.integers(len(operators))]]
        return members[self.rng.integers(len(members))]

    def _operator_shares(self) -> np.ndarray:
        """(operators,), not normalised."""
        total, squares = self.sums.sum(2)
        if not self.balance_operators:
            return total
        debug = (1 - DRAFTS) * self.failures
        fixed = {"draft": DRAFTS, "debug": debug}
        others = sum(t > 0 for name, t in zip(self.operators, total.tolist()) if name not in fixed)
        rest = (1 - DRAFTS - debug) / max(others, 1)
        frequency = np.array([fixed.get(name, rest) for name in self.operators])
        met = np.divide(squares, total, out=np.zeros_like(total), where=total > 0)  # by a draw
        return frequency * met

    def _probabilities(self) -> np.ndarray:
        """(tasks,) P, computed in full. At least one task must not be in flight."""
        table = self.table[:len(self)]
        operator = table["operator"]
        share, total = self._operator_shares(), self.sums[0].sum(1)
        per_weight = np.divide(share, total * share.sum(), out=np.zeros_like(total),
                               where=share > 0)
        epsilon = self.epsilon if share.sum() > 0 else 1.0
        counts = self.counts.astype(float)
        choices = counts.any(1).sum() * (counts > 0).sum(1, keepdims=True)  # (competitions, 1)
        uniform = np.divide(1.0, counts * choices, out=np.zeros_like(counts), where=counts > 0)
        p = (1 - epsilon) * per_weight[operator] * table["weight"]
        p += epsilon * uniform[table["competition"], operator]
        cool = np.clip((1.0 + self.draws - table["last"]) / (1 + self.cooldown), 0.0, 1.0)
        p *= cool
        if p.sum() == 0:  # epsilon = 0, and all that has a share is in flight
            p = cool
        return p / p.sum()

    # ---- rows and sums

    def _row(self, task_id: str) -> int:
        row = self.rows.find(task_id)
        if row < 0:
            raise KeyError(f"no task {task_id!r} in the sampler")
        return row

    def _place(self, row: int, competition: int, operator: int) -> None:
        members = self.members[competition][operator]
        entry = self.table[row]
        entry["competition"], entry["operator"] = competition, operator
        entry["place"] = len(members)
        members.append(row)
        self.counts[competition, operator] += 1

    def _unplace(self, row: int) -> None:
        entry = self.table[row]
        members = self.members[entry["competition"]][entry["operator"]]
        members[entry["place"]] = members[-1]  # the last member fills the gap
        self.table["place"][members[-1]] = entry["place"]
        members.pop()
        self.counts[entry["competition"], entry["operator"]] -= 1

    def _write(self, row: int, mean: float, std: float, evidence: float, visits: int,
               hopeless: bool, last: int) -> None:
        entry = self.table[row]
        entry["mean"], entry["std"], entry["evidence"] = mean, std, evidence
        entry["visits"], entry["hopeless"], entry["last"] = visits, hopeless, last
        entry["weight"] = self._potential(entry) ** (1 / self.tau)
        self._sum_block(row // BLOCK, int(entry["operator"]))

    def _potential(self, rows: np.ndarray) -> np.ndarray:
        """Of one row of the table, or of several. The prior left in the mean is no success."""
        mean = rows["mean"]
        if self.kind == "regret":
            mean = np.where(rows["hopeless"], 0.0, mean)
        return learnability_potential(mean, rows["std"], self.kind)

    def _weights(self, block: int, operator: int) -> np.ndarray:
        """(BLOCK,) weights, zero for the tasks of other operators and for unused rows."""
        rows = self.table[block * BLOCK:(block + 1) * BLOCK]
        return rows["weight"] * (rows["operator"] == operator).astype(float)

    def _sum_block(self, block: int, operator: int) -> None:
        # Summed anew rather than adjusted by the difference: no rounding error accumulates, and
        # the sums are a function of the table alone, so a restored sampler draws the same tasks.
        weights = self._weights(block, operator)
        self.sums[0, operator, block] = weights.sum()
        self.sums[1, operator, block] = weights @ weights

    # ---- snapshot

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as JSON types, the random generator included.

        Tasks in flight are recorded as such: whoever restores reissues `in_flight`, or releases.
        """
        table = self.table[:len(self)]
        return {
            "rng": self.rng.bit_generator.state,
            "draws": self.draws, "late": self.late, "failures": self.failures,
            "in_flight": dict(self.in_flight),
            "removed_in_flight": sorted(self._removed_in_flight),
            "competitions": list(self.competitions),
            "levels": [list(level) for level in self.levels],
            "operators": list(self.operators),
            "ids": list(self.ids),
            "table": {name: table[name].tolist() for name in ROW.names if name != "weight"},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a snapshot. The options stay this sampler's own: potentials are recomputed.

        Raises ValueError when the snapshot has other operators.
        """
        if tuple(state["operators"]) != self.operators:
            raise ValueError(f"the snapshot has operators {state['operators']}, "
                             f"this sampler {list(self.operators)}")
        self.rng.bit_generator.state = state["rng"]
        self.draws, self.late = state["draws"], state["late"]
        self.failures = state["failures"]
        self.in_flight = dict(state["in_flight"])
        self._removed_in_flight = set(state["removed_in_flight"])
        self.competitions = list(state["competitions"])
        self.levels = [list(level) for level in state["levels"]]
        count = len(state["ids"])
        self._clear(capacity=(count // BLOCK + 1) * BLOCK)
        self.ids.extend(state["ids"])
        table = self.table[:count]
        for name, column in state["table"].items():
            table[name] = column
        table["weight"] = self._potential(table) ** (1 / self.tau)
        for row in np.argsort(table["place"], kind="stable").tolist():
            competition, operator = table["competition"][row], table["operator"][row]
            self.members[competition][operator].append(row)
            self.counts[competition, operator] += 1
        for row, task_id in enumerate(self.ids):
            self.rows.insert(task_id, row)
        for block in range(len(self.table) // BLOCK):
            for operator in range(len(self.operators)):
                self._sum_block(block, operator)


def _moments(rewards: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0), much faster than numpy's own for a few numbers."""
    mean = float(rewards.sum()) / rewards.size
    deviation = rewards - mean
    return mean, (float(deviation @ deviation) / rewards.size) ** 0.5


def _search(cumulative: np.ndarray, value: float) -> int:
    """The first index whose cumulative sum exceeds value; never one of weight zero."""
    index = int(np.searchsorted(cumulative, value, side="right"))
    if index < len(cumulative):
        return index
    return int(np.searchsorted(cumulative, cumulative[-1]))  # value was rounded up to the total


class _Rows:
    """id -> row in 6 to 16 bytes an entry: a hash table (open addressing) that stores rows only.

    The ids themselves stand in the sampler's list; a dict would hold them, and an int object for
    each row, once more (74 bytes an entry).
    """

    FREE, DELETED = -1, -2

    def __init__(self, ids: list[str]):
        self.ids = ids
        self._build(64)

    def _build(self, size: int) -> None:
        self.slots = array("i", [self.FREE]) * size  # a power of two
        self.used = 0  # slots not FREE

    def _slot(self, task_id: str, row: int | None = None) -> int:
        """The slot that holds the id (or, if given, exactly this row), else the FREE one after."""
        mask = len(self.slots) - 1
        slot = hash(task_id) & mask
        while (found := self.slots[slot]) != self.FREE:
            if found != self.DELETED and (found == row if row is not None
                                          else self.ids[found] == task_id):
                break
            slot = (slot + 1) & mask
        return slot

    def find(self, task_id: str) -> int:
        """The row, or a negative number."""
        return self.slots[self._slot(task_id)]

    def insert(self, task_id: str, row: int) -> None:
        """`ids[row]` must be the id already, and the id not be in the table."""
        if 3 * (self.used + 1) > 2 * len(self.slots):  # grow, and sweep out what was deleted
            self._build(1 << (4 * (row + 1)).bit_length() - 1)
            for other in range(row):
                self.insert(self.ids[other], other)
        self.slots[self._slot(task_id, row)] = row
        self.used += 1

    def delete(self, task_id: str) -> None:
        self.slots[self._slot(task_id)] = self.DELETED

    def move(self, task_id: str, old: int, new: int) -> None:
        self.slots[self._slot(task_id, old)] = new


# ----------------------------------------------------------------------------------- worked example


def main() -> None:
    sampler = AdaptiveSampler(cooldown=4, seed=0)
    for competition in ("easy", "frontier", "hard"):
        sampler.add(f"{competition}/draft", competition, "draft")
    print("Three draft roots, never visited: all as learnable as a group can be,")
    print("  LP = sqrt(3)/4 * 3/4 = 0.325, and equally likely:")
    show(sampler)

    print("\nOne group of four rewards for each:")
    groups = {"easy/draft": [1, 1, 1, 1], "frontier/draft": [0, 1, 0, 1],
              "hard/draft": [0, 0, 0, 0]}
    order = sampler.draw(3)
    for task_id in order:
        sampler.update(task_id, groups[task_id])
    print("  the prior weighs as much as a group of four: frontier has mean (0.25 + 0.5)/2 = 0.375")
    print("  and std (0.433 + 0.5)/2 = 0.467, so LP = 0.467 * 0.625 = 0.292")
    show(sampler)

    print("\nA draft of `frontier` with reward 0.6 opens an improve task, with headroom 0.4.")
    print("  Its prior is 0.4 times its competition's level, mean (0.25 + 0.5)/2 and")
    print("  std (0.433 + 0.5)/2; the less there is to gain, the lower.")
    print("  It is awake (cool 1), the others were just visited (1/5):")
    sampler.add("frontier/improve/a", "frontier", "improve", headroom=0.4)
    show(sampler)
    print("\nTwo draws without replacement:", sampler.draw(2), "(now in flight: probability 0)")
    show(sampler)


def show(sampler: AdaptiveSampler) -> None:
    for task_id, p in sampler.probabilities().items():
        s = sampler.statistics(task_id)
        print(f"  {task_id:18} mean {s['mean']:.3f}  std {s['std']:.3f}  visits {s['visits']}"
              f"  LP {sampler.score(task_id):.3f}  P {p:.3f}")


if __name__ == "__main__":
    main()
