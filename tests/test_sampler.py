"""Potential and sampler: cases by hand, properties.   python -m pytest tests/test_sampler.py"""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sampler as module
from sampler import AdaptiveSampler, learnability_potential


def roots(names="abc", **options):
    options.setdefault("cooldown", 0)
    sampler = AdaptiveSampler(**options)
    for name in names:
        sampler.add(f"{name}/draft", name, "draft")
    return sampler


def approx(**values):
    return pytest.approx(values, abs=1e-6)


def restored(sampler, **options):
    copy = AdaptiveSampler(**options)
    copy.load_state_dict(json.loads(json.dumps(sampler.state_dict(), allow_nan=False)))
    return copy


# ---- the potential


@pytest.mark.parametrize("kind, expected", [
    ("lp", [0.0, 0.4 * 0.8, 0.5 * 0.5, 0.0]), ("variance", [0.0, 0.16, 0.25, 0.0]),
    ("regret", [0.0, 0.8, 0.5, 0.0]), ("uniform", [1, 1, 1, 1])])
def test_potential(kind, expected):
    found = learnability_potential([0.0, 0.2, 0.5, 1.0], [0.0, 0.4, 0.5, 0.0], kind)
    assert found.tolist() == pytest.approx(expected)


def test_nothing_to_learn_from_always_and_never_solved_tasks():
    for kind in ("lp", "variance", "regret"):
        assert not learnability_potential([0.0, 1.0], [0.0, 0.0], kind).any()


def test_regret_of_a_task_that_never_succeeded_is_none_whatever_its_prior():
    sampler = AdaptiveSampler("regret")
    for name in "ab":
        sampler.add(f"{name}/draft", name, "draft")
    assert sampler.score("a/draft") == 0.75  # not visited: the prior
    sampler.update("a/draft", [0.0] * 4)
    sampler.update("b/draft", [0.0, 0.0, 0.0, 1.0])
    sampler.update("b/draft", [0.0] * 4)
    assert sampler.score("a/draft") == 0.0 and sampler.score("b/draft") > 0.75
    assert restored(sampler, kind="regret").state_dict() == sampler.state_dict()
    sampler.update("a/draft", [0.0, 0.4])
    sampler.update("a/draft", [0.0, 0.0])
    assert sampler.score("a/draft") > 0.75


def test_an_unknown_kind_is_refused_at_once():
    with pytest.raises(ValueError, match="unknown potential 'ucb'; choose one of lp, "):
        AdaptiveSampler(kind="ucb")


# ---- prior and statistics


def test_the_prior_is_the_level_times_the_headroom():
    sampler = AdaptiveSampler()
    assert sampler.prior("a") == pytest.approx((0.25, 3**0.5 / 4))
    assert sampler.prior("a", headroom=0.4) == pytest.approx((0.1, 3**0.5 / 10))
    sampler.add("a/improve", "a", "improve", headroom=0.5)
    assert sampler.score("a/improve") == pytest.approx(3**0.5 / 8 * (1 - 0.125))


def test_a_level_is_of_rewards_for_each_point_of_headroom():
    sampler = AdaptiveSampler()
    sampler.add("a/improve", "a", "improve", headroom=0.5)
    sampler.update("a/improve", [0.1, 0.3])  # mean 0.2, std 0.1: 0.4 and 0.2 of the headroom
    level = (0.25 + 0.4) / 2, (3**0.5 / 4 + 0.2) / 2
    assert sampler.prior("a") == pytest.approx(level)
    sampler.add("a/weaker", "a", "improve", headroom=0.75)  # its parent leaves more to gain
    sampler.add("a/stronger", "a", "improve", headroom=0.25)
    assert sampler.score("a/weaker") == pytest.approx(0.75 * level[1] * (1 - 0.75 * level[0]))
    assert sampler.score("a/stronger") == pytest.approx(0.25 * level[1] * (1 - 0.25 * level[0]))


def test_a_headroom_below_a_hundredth_counts_as_one():
    sampler = AdaptiveSampler()
    sampler.add("a/improve", "a", "improve", headroom=0.001)
    sampler.update("a/improve", [0.004, 0.004])
    assert sampler.levels[0] == pytest.approx([(0.25 + 0.4) / 2, 3**0.5 / 8, 2])


def test_a_level_is_at_most_one():
    sampler = AdaptiveSampler()
    sampler.add("a/improve", "a", "improve", headroom=0.05)
    sampler.update("a/improve", [0.0, 0.2])  # mean and spread are more than all there is to gain
    assert sampler.prior("a") == pytest.approx(((0.25 + 1.0) / 2, (3**0.5 / 4 + 1.0) / 2))


def test_a_competitions_level_follows_its_groups():
    sampler = roots("ba")
    sampler.update("a/draft", [1.0, 1.0])  # the optimistic start counts as one group
    assert sampler.prior("a") == pytest.approx((0.625, 3**0.5 / 8))
    for _ in range(8):
        sampler.update("a/draft", [0.0, 1.0])  # ten groups with the start: all count alike
    mean, std = (0.25 + 1 + 8 * 0.5) / 10, (3**0.5 / 4 + 8 * 0.5) / 10
    assert sampler.prior("a") == pytest.approx((mean, std))
    sampler.update("a/draft", [0.0, 0.0])  # from now on the last group weighs a tenth
    assert sampler.prior("a") == pytest.approx((0.9 * mean, 0.9 * std))
    for other in ("b", "new"):
        assert sampler.prior(other) == pytest.approx((0.25, 3**0.5 / 4))


def test_new_tasks_of_a_hopeless_competition_are_expected_to_be_hopeless():
    sampler = roots("ba")
    for _ in range(9):
        sampler.update("a/draft", [0.0] * 4)
    for name in "ab":
        sampler.add(f"{name}/debug", name, "debug")
    assert sampler.score("a/debug") == pytest.approx(3**0.5 / 40 * (1 - 0.025), abs=1e-6)
    assert sampler.score("b/debug") == pytest.approx(3**0.5 / 4 * (1 - 0.25), abs=1e-6)


def test_a_level_outlives_its_tasks_and_counts_no_late_group():
    sampler = roots("ab")
    sampler.update("a/draft", [1.0, 1.0])
    level = sampler.prior("a")
    (task,) = [task for task in sampler.draw(2) if task == "a/draft"]
    sampler.remove(task)
    sampler.update(task, [0.0, 0.0], 1.0)
    assert sampler.late == 1 and sampler.prior("a") == level and sampler.failures == 0.5


def test_recency_weighted_mean_and_std():
    sampler = roots("a", prior_strength=4, decay=0.5)
    sampler.update("a/draft", [0, 1, 0, 1])  # evidence 4 + 4
    first = sampler.statistics("a/draft")
    std = (3**0.5 / 4 + 0.5) / 2
    assert first == approx(mean=0.375, std=std, visits=1)
    assert sampler.score("a/draft") == pytest.approx(std * 0.625, abs=1e-6)
    sampler.update("a/draft", [1, 1, 1, 1])  # evidence 8 / 2 + 4: the new group counts half
    assert sampler.statistics("a/draft") == approx(
        mean=(0.375 + 1) / 2, std=std / 2, visits=2)


def test_spread_between_groups_is_no_spread():
    sampler = roots("a", prior_strength=0)
    sampler.update("a/draft", [0.0] * 4)
    sampler.update("a/draft", [1.0] * 4)
    assert sampler.statistics("a/draft") == approx(mean=2 / 3, std=0.0, visits=2)


def test_a_rare_spread_counts_as_rarely_as_it_comes():
    sampler = roots("a", prior_strength=0, decay=0.5)
    sampler.update("a/draft", [0.0, 1.0])
    sampler.update("a/draft", [0.0, 0.0])  # evidence 2 / 2 + 2: two thirds are without spread
    assert sampler.statistics("a/draft") == approx(mean=0.5 / 3, std=0.5 / 3, visits=2)


def test_a_hopeless_task_fades_by_and_by():
    sampler = roots("a")
    scores = [sampler.score("a/draft")]
    for _ in range(4):
        sampler.update("a/draft", [0.0] * 16)
        scores.append(sampler.score("a/draft"))
    assert all(later < earlier for earlier, later in zip(scores, scores[1:], strict=False))
    assert scores[4] > 0


# ---- probabilities


def with_scores(sampler, **groups):
    """Make mean and spread exactly those of the group given for each task."""
    for name, rewards in groups.items():
        sampler.update(f"{name}/draft", rewards)
    return sampler


def test_probabilities_by_hand():
    sampler = roots(prior_strength=0, epsilon=0.3)
    with_scores(sampler, a=[0, 1], b=[0, 0, 0, 1], c=[1, 1])
    lp_a, lp_b = 0.5 * 0.5, 0.1875**0.5 * 0.75
    assert sampler.probabilities() == pytest.approx({
        "a/draft": 0.7 * lp_a / (lp_a + lp_b) + 0.1, "b/draft": 0.7 * lp_b / (lp_a + lp_b) + 0.1,
        "c/draft": 0.1}, abs=1e-6)


def test_tau_sharpens():
    sampler = roots(prior_strength=0, epsilon=0, tau=0.5)
    with_scores(sampler, a=[0, 1], b=[0, 0, 0, 1], c=[1, 1])
    a, b = 0.25**2, 0.1875 * 0.75**2
    assert sampler.probabilities()["a/draft"] == pytest.approx(a / (a + b), abs=1e-6)
    assert sampler.score("a/draft") == pytest.approx(0.25)  # the potential itself, not its power


def test_debug_steps_are_as_frequent_as_failures_are():
    """By hand: failures 0.5, then 0.5 + 0.05 * (0.1 - 0.5) = 0.48, then 0.456 where all is valid."""
    sampler = roots("a", epsilon=0.0)
    for operator in ("improve", "debug"):
        sampler.add(f"a/{operator}", "a", operator)

    def shares():
        return pytest.approx([sampler.probabilities()[f"a/{o}"]
                              for o in ("draft", "improve", "debug")], abs=1e-6)

    same = [1.0, 0.0, 0.0, 0.0]  # leaves mean and deviation as the prior has them
    assert [0.25, 0.375, 0.375] == shares()
    sampler.update("a/draft", same, 0.1)
    assert [0.25, 0.75 * 0.52, 0.75 * 0.48] == shares()
    sampler.update("a/draft", same)  # not known
    sampler.update("a/draft", same, 0.0)
    assert [0.25, 0.75 * 0.544, 0.75 * 0.456] == shares()
    assert restored(sampler, epsilon=0.0, cooldown=0).failures == pytest.approx(0.456)


def test_crossing_takes_half_of_the_improve_steps():
    sampler = roots("a", epsilon=0.0)
    for operator in ("improve", "crossover"):
        sampler.add(f"a/{operator}", "a", operator)
    # Nothing to debug: what debugging would take goes to all. 0.25 : 0.1875 : 0.1875
    assert sampler.probabilities() == approx(**{"a/draft": 0.4, "a/improve": 0.3,
                                                "a/crossover": 0.3})


@pytest.mark.parametrize("failed", [-0.1, 1.5, float("nan")])
def test_a_share_of_failures_that_is_none_is_refused(failed):
    sampler = roots("a")
    with pytest.raises(ValueError, match="failed of a/draft"):
        sampler.update("a/draft", [0.0, 1.0], failed)
    assert sampler.failures == 0.5 and sampler.statistics("a/draft")["visits"] == 0


def test_many_children_do_not_drown_the_roots():
    def share(**options):
        sampler = roots("ab", epsilon=0.1, **options)
        for i in range(200):
            sampler.add(f"a/debug/{i}", "a", "debug")
        assert sampler.score("a/debug/0") == pytest.approx(sampler.score("a/draft"))
        p = sampler.probabilities()
        return p["a/draft"], p["b/draft"]

    # Equal potentials; one step in four is a draft, half of the others are taken to be debug steps:
    # the two roots share 0.4 of the 0.9. The floor gives a competition 0.05.
    assert share() == pytest.approx((0.9 * 0.2 + 0.05 / 2, 0.9 * 0.2 + 0.05), abs=1e-6)
    assert share(balance_operators=False) == pytest.approx(
        (0.9 / 202 + 0.05 / 2, 0.9 / 202 + 0.05), abs=1e-6)


def test_the_uniform_ablation_is_uniform_over_tasks():
    sampler = roots("ab", kind="uniform", cooldown=9)
    for i in range(3):
        sampler.add(f"a/debug/{i}", "a", "debug")
    (task,) = sampler.draw()
    sampler.update(task, [1.0, 1.0])
    assert list(sampler.probabilities().values()) == pytest.approx([0.2] * 5)


def test_cooling_and_ageing():
    sampler = roots("ab", cooldown=4, epsilon=1.0)
    assert set(sampler.draw(2)) == {"a/draft", "b/draft"}
    sampler.update("a/draft", [0, 1])
    sampler.add("c/draft", "c", "draft")
    # a was just visited: cool 1/5; b is in flight; c was never visited: cool 1
    assert sampler.probabilities() == pytest.approx(
        {"a/draft": 1 / 6, "b/draft": 0.0, "c/draft": 5 / 6})
    sampler.draws += 2  # two draws later: cool 3/5
    assert sampler.probabilities()["a/draft"] == pytest.approx(3 / 8)
    sampler.draws += 99
    assert sampler.probabilities()["a/draft"] == pytest.approx(1 / 2)


def test_draws_match_the_probabilities(monkeypatch):
    """Both ways of drawing: proposals refused by cooling, and all probabilities in full."""
    for proposals in (module.PROPOSALS, 0):
        monkeypatch.setattr(module, "PROPOSALS", proposals)
        sampler = roots("abc", cooldown=4, epsilon=0.2, seed=1)
        for i in range(5):
            sampler.add(f"a/debug/{i}", "a", "debug", 0.2 + 0.2 * i)
        for task in sampler.draw(6):
            sampler.update(task, [0.0, 0.5, 1.0])
        (busy,) = sampler.draw()
        expected = sampler.probabilities()
        last = sampler.table["last"].copy()
        counts, n = Counter(), 6000
        for _ in range(n):
            (task,) = sampler.draw()
            counts[task] += 1
            del sampler.in_flight[task]
            sampler.draws -= 1
            sampler.table["last"][:] = last
        assert counts[busy] == 0
        for task, p in expected.items():  # five standard errors
            assert abs(counts[task] / n - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1e-9


# ---- drawing


def test_draws_are_without_replacement_and_end_when_all_are_in_flight():
    sampler = roots("abcde")
    first = sampler.draw(3)
    second = sampler.draw(9)
    assert sorted(first + second) == [f"{c}/draft" for c in "abcde"]
    assert sampler.draw() == [] and sampler.probabilities() == {}
    assert list(sampler.in_flight) == first + second
    sampler.update(first[0], [0.0, 1.0])
    assert sampler.draw(2) == [first[0]]


def test_tasks_without_potential_are_drawn_when_nothing_else_is_left():
    sampler = roots("ab", prior_strength=0, epsilon=0)
    with_scores(sampler, a=[1, 1], b=[0, 1])
    assert sampler.draw(2) == ["b/draft", "a/draft"]
    for task in ("a/draft", "b/draft"):
        sampler.update(task, [1, 1])
        sampler.update(task, [1, 1])
    assert sorted(sampler.draw(2)) == ["a/draft", "b/draft"]


def test_release_undoes_a_draw():
    sampler = roots("ab", cooldown=5)
    sampler.draw(2)
    sampler.update("a/draft", [0, 1])
    before = sampler.table["last"][:2].copy()
    (task,) = sampler.draw()
    sampler.release(task)
    sampler.release(task)
    assert task == "a/draft" and list(sampler.in_flight) == ["b/draft"]
    assert (sampler.table["last"][:2] == before).all()


def test_unknown_ids_are_errors_and_groups_of_removed_tasks_are_counted():
    sampler = roots("ab")
    sampler.draw(2)
    sampler.remove("a/draft")
    assert "a/draft" not in sampler and "b/draft" in sampler and len(sampler) == 1
    sampler.update("a/draft", [0, 1])
    assert sampler.late == 1
    for call in (lambda: sampler.update("a/draft", [0, 1]), lambda: sampler.score("x"),
                 lambda: sampler.remove("x")):
        with pytest.raises(KeyError, match="no task"):
            call()


def test_a_task_removed_in_flight_does_not_come_back_before_its_group():
    sampler = roots("ab")
    sampler.draw(2)
    sampler.remove("a/draft")
    with pytest.raises(ValueError, match="removed in flight"):
        sampler.add("a/draft", "a", "draft")
    sampler.update("a/draft", [0, 1])
    sampler.add("a/draft", "a", "draft")
    assert sampler.late == 1 and sampler.draw() == ["a/draft"]
    sampler.remove("a/draft")
    sampler.release("a/draft")  # nor after its group was given up
    sampler.add("a/draft", "a", "draft")


def test_one_competition_too_many_is_refused_and_leaves_no_trace():
    sampler = AdaptiveSampler()
    sampler.competitions = [str(number) for number in range(65_536)]
    with pytest.raises(ValueError, match="65,537th"):
        sampler.add("x/draft", "x", "draft")
    assert len(sampler) == 0 and "x/draft" not in sampler


@pytest.mark.parametrize("call, message", [
    (lambda s: s.add("a/draft", "a", "draft"), "already"),
    (lambda s: s.add("x", "a", "mutate"), "unknown operator"),
    (lambda s: s.update("a/draft", []), r"in \[0, 1\]"),
    (lambda s: s.update("a/draft", [0.0, float("nan")]), r"in \[0, 1\]"),
    (lambda s: s.update("a/draft", [0.0, 1.5]), r"in \[0, 1\]"),
    (lambda s: s.update("a/draft", [-0.5, 1.0]), r"in \[0, 1\]"),
    (lambda s: AdaptiveSampler(tau=0.01), "out of range"),
    (lambda s: AdaptiveSampler(tau=float("nan")), "out of range"),
    (lambda s: AdaptiveSampler(prior_strength=-1), "out of range"),
    (lambda s: AdaptiveSampler(cooldown=float("inf")), "out of range"),
    (lambda s: s.add("x", "a", "improve", 0.0), "headroom of x"),
    (lambda s: s.add("x", "a", "improve", float("nan")), "headroom of x"),
    (lambda s: s.add("x", "a", "improve", 1.5), "headroom of x"),
    (lambda s: s.load_state_dict(AdaptiveSampler(operators=("draft",)).state_dict()), "operators")])
def test_bad_arguments(call, message):
    sampler = roots("a")
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        call(sampler)
    assert sampler.state_dict() == before


def test_metrics():
    sampler = roots("abcd", prior_strength=0)
    with_scores(sampler, a=[0, 1], b=[0, 0], c=[1, 1], d=[1, 1])
    assert sampler.metrics() == approx(lp_mean=0.25 / 4, lp_max=0.25)
    assert AdaptiveSampler().metrics() == approx(lp_mean=0, lp_max=0)


def test_nobody_starves():
    """A task that never had a success is still drawn about as often as the floor says."""
    sampler = roots("abcdef", prior_strength=0, epsilon=0.1, cooldown=8)
    counts = Counter()
    for _ in range(400):
        for task in sampler.draw(4):
            counts[task] += 1
            sampler.update(task, [0.0, 0.0] if task == "f/draft" else [0.0, 1.0])
    assert counts["f/draft"] >= 0.5 * 1600 * 0.1 / 6
    assert counts["f/draft"] < counts["a/draft"] / 3


def test_three_thousand_tasks_come_and_go():
    """More than one block and several growths of the tables; then everything is taken out."""
    sampler = AdaptiveSampler(seed=3)
    ids = [f"c{i % 7}/improve/{i}" for i in range(3_000)]
    for i, task in enumerate(ids):
        sampler.add(task, f"c{i % 7}", "improve", 1 - i / 3_000)
    consistent(sampler)
    assert len(set(sampler.draw(64))) == 64
    for task in ids[::2] + ids[1::2][::-1]:
        sampler.remove(task)
    consistent(sampler)
    assert len(sampler) == 0 and not sampler.sums.any() and sampler.draw() == []


def test_draws_reach_every_block():
    options = dict(prior_strength=0, epsilon=0, cooldown=0)
    sampler = AdaptiveSampler(**options)
    for i in range(3_000):
        sampler.add(f"t{i}", "c", "improve")
        sampler.update(f"t{i}", [1.0, 1.0])
    for i in (1_500, 2_500):
        sampler.update(f"t{i}", [0.0, 1.0])
    copy = restored(sampler, **options)
    consistent(copy)
    assert set(sampler.draw(2)) == set(copy.draw(2)) == {"t1500", "t2500"}


def test_the_table_of_ids_is_rarely_built_anew(monkeypatch):
    """Just below a power of two as well, where the default capacity keeps the buffer."""
    sampler, built = AdaptiveSampler(), []
    for i in range(4_095):
        sampler.add(f"t{i}", "c", "improve")
    build = sampler.rows._build
    monkeypatch.setattr(sampler.rows, "_build", lambda size: (built.append(size), build(size)))
    for i in range(300):
        sampler.remove(f"t{i}")
        sampler.add(f"u{i}", "c", "improve")
    assert len(built) <= 2
    consistent(sampler)


# ---- snapshot


def test_a_restored_sampler_goes_on_as_if_nothing_had_happened():
    def go_on(sampler, steps):
        drawn = []
        for step in range(steps):
            batch = sampler.draw(3)
            drawn.append(batch)
            for task in batch[:2]:
                sampler.update(task, [0.0, (len(task) % 5) / 5, 1.0])
                name = f"{task}+"
                if name not in sampler and step % 2:
                    sampler.add(name, task[0], "improve", 0.4)
            for task in batch[2:]:
                if task.endswith("+"):
                    sampler.remove(task)
                    sampler.update(task, [0.0])
                else:
                    sampler.release(task)
        return drawn

    sampler = roots("abcdef", cooldown=6, seed=5)
    go_on(sampler, 20)
    sampler.draw(2)
    copy = restored(sampler, cooldown=6)
    state = sampler.state_dict()
    assert copy.state_dict() == state and list(copy.in_flight) == list(sampler.in_flight)
    assert len({groups for _, _, groups in state["levels"]}) > 1
    assert go_on(copy, 20) == go_on(sampler, 20)
    assert copy.state_dict() == sampler.state_dict() != state


def test_a_snapshot_loads_into_another_kind():
    copy = restored(with_scores(roots(prior_strength=0), a=[0, 1]), kind="regret")
    assert copy.score("a/draft") == pytest.approx(0.5)


def test_a_snapshot_knows_what_was_removed_in_flight_and_is_not_changed_afterwards():
    sampler = roots("ab")
    sampler.draw(2)
    sampler.remove("a/draft")
    state = sampler.state_dict()
    copy = AdaptiveSampler()
    copy.load_state_dict(state)
    copy.update("a/draft", [1.0])
    copy.update("b/draft", [0.0, 1.0])
    assert copy.late == 1 and state == sampler.state_dict()


# ---- properties


def consistent(sampler):
    """The incremental structures say what a computation from scratch says."""
    assert len(sampler.levels) == len(sampler.competitions) == len(sampler.counts)
    table = sampler.table[:len(sampler)]
    for row, task in enumerate(sampler.ids):
        assert sampler.rows.find(task) == row
        members = sampler.members[table["competition"][row]][table["operator"][row]]
        assert members[table["place"][row]] == row
    assert sampler.counts.sum() == len(sampler)
    for operator in range(len(sampler.operators)):
        weights = table["weight"][table["operator"] == operator].astype(float)
        assert sampler.sums[0, operator].sum() == pytest.approx(weights.sum())
        assert sampler.sums[1, operator].sum() == pytest.approx((weights**2).sum())
        assert sampler.counts[:, operator].sum() == len(weights)


actions = st.lists(st.tuples(
    st.sampled_from(["add", "add", "draw", "update", "remove", "release"]),
    st.integers(0, 99), st.lists(st.sampled_from([0.0, 0.05, 0.5, 1.0]), min_size=1, max_size=4)),
    max_size=40)


@settings(max_examples=80, deadline=None)
@given(actions=actions, kind=st.sampled_from(module.KINDS),
       epsilon=st.sampled_from([0.0, 0.1, 1.0]), cooldown=st.integers(0, 9),
       balance=st.booleans(), seed=st.integers(0, 9))
def test_properties_of_any_history(actions, kind, epsilon, cooldown, balance, seed):
    options = dict(kind=kind, epsilon=epsilon, cooldown=cooldown, balance_operators=balance)
    sampler = AdaptiveSampler(seed=seed, **options)
    known, flying = {}, set()
    for number, (action, pick, rewards) in enumerate(actions):
        task = list(known)[pick % len(known)] if known else None
        if action == "add":
            name = f"task{number}"
            known[name] = (f"c{pick % 3}", module.OPERATORS[pick // 3 % 4])
            sampler.add(name, *known[name], max(*rewards, 0.05))
        elif action == "draw":
            drawn = sampler.draw(pick % 4)
            assert len(drawn) == len(set(drawn)) == min(pick % 4, len(known) - len(flying))
            assert not flying & set(drawn) and set(drawn) <= known.keys()
            flying |= set(drawn)
        elif task and action == "update":
            sampler.update(task, rewards)
            flying.discard(task)
        elif task and action == "remove":
            sampler.remove(task)
            if task in flying:
                sampler.update(task, rewards)  # late: ignored
            known.pop(task)
            flying.discard(task)
        elif task and action == "release":
            sampler.release(task)
            flying.discard(task)
        assert set(sampler.ids) == known.keys() and set(sampler.in_flight) == flying
    consistent(sampler)
    p = sampler.probabilities()
    if len(flying) < len(known):
        assert sum(p.values()) == pytest.approx(1)
        assert all(p[task] == 0 for task in flying)
        if epsilon > 0 or kind == "uniform":  # no starvation
            assert all(p[task] > 0 for task in known if task not in flying)
    copy = restored(sampler, **options)
    assert copy.state_dict() == sampler.state_dict()
    assert copy.draw(3) == sampler.draw(3)
