"""The verdict from scores alone, and trials that fit the time."""

import math
import random

import pytest

from batchnorm.choosing.plan import LEAST_STEPS, Costs, Plan, check_budget, least_s, longest
from batchnorm.choosing.verdict import judge
from batchnorm.paired import Paired, student_t


def test_a_clear_winner_is_recommended_and_the_interval_is_bonferronis():
    scores = {"plain": [0.5, 0.52, 0.54], "ghost": [0.6, 0.63, 0.63], "group": [0.9, 0.93, 0.94]}
    found = judge(scores, True, 0.95)
    assert (found.best, found.recommended, found.tied) == ("group", "group", ())
    assert found.differences["plain"].values == pytest.approx((0.4, 0.41, 0.40))
    assert found.differences["plain"].confidence == pytest.approx(0.975)
    half = student_t(2, 0.975) * found.differences["ghost"].std / math.sqrt(3)
    assert found.differences["ghost"].half_width == pytest.approx(half)
    assert found.pairs_needed is None


def test_lower_is_better_for_losses():
    found = judge({"plain": [2.0, 2.1], "group": [1.0, 1.1]}, False, 0.9)
    assert found.recommended == "group"
    assert found.differences["plain"].values == pytest.approx((1.0, 1.0))


def test_what_cannot_be_told_from_plain_is_not_recommended():
    scores = {"plain": [0.5, 0.6, 0.7], "group": [0.52, 0.75, 0.61], "ghost": [0.1, 0.11, 0.12]}
    found = judge(scores, True, 0.95)
    assert (found.best, found.recommended, found.tied) == ("group", None, ("plain",))
    assert found.pairs_needed == Paired(found.differences["plain"].values, 0.975).pairs_needed()


def test_plain_is_recommended_only_if_told_from_all_others():
    clear = {"plain": [0.9, 0.91], "group": [0.5, 0.51], "ghost": [0.4, 0.41]}
    assert judge(clear, True, 0.95).recommended == "plain"
    near = {**clear, "ghost": [0.95, 0.84]}
    found = judge(near, True, 0.95)
    assert (found.best, found.recommended, found.tied) == ("plain", None, ("ghost",))


def test_a_tie_among_the_better_ones_is_told_and_still_better_than_plain():
    scores = {"plain": [0.5, 0.51, 0.52], "group": [0.9, 0.94, 0.92], "ghost": [0.92, 0.9, 0.93]}
    found = judge(scores, True, 0.95)
    assert (found.recommended, found.tied) == ("group", ("ghost",))
    assert found.pairs_needed == Paired(found.differences["ghost"].values, 0.975).pairs_needed()


def test_one_repetition_nobody_and_one_candidate():
    assert judge({"plain": [0.1], "group": [0.9]}, True, 0.95).recommended is None
    assert judge({}, True, 0.95).best is None
    alone = judge({"group": [0.5, 0.6]}, True, 0.95)
    assert (alone.best, alone.recommended) == ("group", "group")


def test_where_nothing_differs_a_false_verdict_is_as_rare_as_promised():
    draws = random.Random(0)
    names = ("plain", "ghost", "renorm", "group", "frozen")
    wrong = 0
    for _ in range(1000):
        shared = [draws.gauss(0, 1) for _ in range(5)]
        scores = {name: [s + draws.gauss(0, 1) for s in shared] for name in names}
        wrong += judge(scores, True, 0.95).recommended is not None
    assert wrong <= 50  # 5 %


COSTS = Costs({"plain": 0.01, "group": 0.03}, evaluation_s=0.5, batch_s=0.002)


def test_a_plans_time_by_hand():
    plan = Plan(steps=10, repetitions=3, num_rates=2)
    assert plan.points == [3, 5, 8, 10]
    assert plan.search_steps == 5
    assert plan.rounds == 2 * 5 + 3 * 10
    assert plan.search_s(COSTS) == pytest.approx(2 * (5 * 0.042 + 2 * 0.5))
    assert plan.seconds(COSTS) == pytest.approx(plan.search_s(COSTS) + 30 * 0.042 + 4 * 3 * 2 * 0.5)
    alone = Plan(steps=2, repetitions=1, num_rates=1)
    assert (alone.points, alone.search_steps, alone.search_s(COSTS)) == ([1, 2], 0, 0.0)
    assert COSTS.times(3).round_s == pytest.approx(0.126)
    assert COSTS.times(3).evaluation_s == 1.5


@pytest.mark.parametrize("left_s", [40.0, 100.0, 3600.0])
@pytest.mark.parametrize("num_rates", [1, 4])
def test_the_longest_plan_fits_and_one_step_more_does_not(left_s, num_rates):
    plan = longest(COSTS, left_s, 5, num_rates)
    if plan.steps > LEAST_STEPS:
        assert least_s(COSTS, 5, num_rates, plan.steps) <= left_s
    assert least_s(COSTS, 5, num_rates, plan.steps + 1) > left_s
    assert longest(COSTS, 0.0, 5, num_rates).steps == LEAST_STEPS


def test_a_budget_that_is_too_small_is_refused_with_what_would_do():
    least = math.ceil(3 + least_s(COSTS, 5, 4))
    check_budget(least, 3.0, COSTS, 5, 4)
    with pytest.raises(
        ValueError, match=rf"a budget of {least - 1} s is too little: 2 candidates .* {least} s"
    ):
        check_budget(least - 1, 3.0, COSTS, 5, 4)
