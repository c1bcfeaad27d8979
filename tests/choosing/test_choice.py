"""What a choice says of scores that are given."""

import math

import pytest

from batchnorm.choosing import Choice, Tried
from batchnorm.choosing.candidates import Settings
from batchnorm.choosing.verdict import judge

PLAIN = Tried("plain", "as it is", 0.1, 0.02, (5, 10), ((0.4, 0.5), (0.5, 0.6)), ((1.0, 2.0), (1.0, 3.0)))
GROUP = Tried("group", "groups", 0.03, 0.04, (5, 10), ((0.8, 0.9), (0.9, 1.0)), ((2.0, 4.0), (3.0, 6.0)))
LOST = Tried("ghost", "ghosts", 0.1, 0.03, (5, 10), ((0.2,), (0.2, 0.1)), ((1.0,), (1.0, 2.0)), 1)


def choice_of(*tried: Tried, higher: bool = True, score: str = "accuracy", **changes) -> Choice:
    verdict = judge({one.name: one.final for one in tried if not one.diverged}, higher, 0.95)
    settings = {
        "steps": 10,
        "batch_size": 4,
        "repetitions": 2,
        "num_held_out": 50,
        "seconds": 9.0,
        "confidence": 0.95,
    }
    return Choice(
        tried=tried,
        not_tried=(("synced", "no ranks"),),
        verdict=verdict,
        score=score,
        higher_is_better=higher,
        settings=Settings(4),
        **{**settings, **changes},
    )


def test_scores_between_evaluations_lie_on_a_line():
    assert PLAIN.after(0.5) == (0.4, 0.5)  # before the first: that
    assert PLAIN.after(1.25) == pytest.approx((0.425, 0.5125))
    assert PLAIN.after(2.5) == pytest.approx((0.5, 0.575))
    assert PLAIN.after(99.0) == (0.5, 0.6)
    assert GROUP.final == (0.9, 1.0)
    assert (LOST.final, LOST.after(1.0)) == ((), ())


def test_the_table_by_hand():
    choice = choice_of(GROUP, PLAIN, LOST)
    rows = {row[0]: row for row in choice.rows()}
    # After 2 s, in which plain had its ten steps once: group had five steps, and in the slower one fewer.
    assert choice.shortest_s == 2.0
    assert choice.fastest_to_score == "group"
    assert rows["group"] == ("group", "95.00 ± 7.07", "", "40 ms", "85.00 ± 7.07", "0.03", "groups")
    assert rows["plain"][1:5] == ("55.00 ± 7.07", "40.0 ± 0.0 points", "20 ms", "52.50 ± 3.54")
    assert rows["ghost"][1:5] == ("–", "diverged in 1 of 2", "30 ms", "–")
    assert choice.columns[1] == "accuracy, %"
    text = str(choice)
    assert text.startswith("take group: 40.0 ± 0.0 points better than plain\n")
    assert "batch size 4, 10 steps, 2 repetitions, 9 s in all; accuracy on 50 examples held out" in text
    assert "not tried: synced: no ranks" in text


def test_who_is_ahead_in_equal_time_may_be_another():
    slow = Tried("group", "", 0.1, 0.1, (5, 10), ((0.1, 0.7), (0.1, 0.7)), ((5.0, 10.0), (5.0, 10.0)))
    choice = choice_of(slow, PLAIN)
    assert choice.verdict.best == "group"
    assert choice.fastest_to_score == "plain"


def test_losses_are_shown_as_they_are_and_lower_is_better():
    low = Tried("group", "", 0.1, 0.1, (5,), ((1.25,), (1.26,)), ((1.0,), (1.0,)))
    high = Tried("plain", "", 0.1, 0.1, (5,), ((2.25,), (2.26,)), ((1.0,), (1.0,)))
    choice = choice_of(low, high, higher=False, score="loss", num_held_out=0)
    assert choice.rows()[0][1] == "1.255 ± 0.007071"
    assert choice.recommended == "group"
    assert choice.fastest_to_score == "group"
    assert choice.sentence.startswith("take group: 1 ± ")
    assert choice.sentence.endswith(" of loss better than plain")
    assert "held out" not in choice.caption


def near(name: str, *final: float) -> Tried:
    return Tried(name, "", 0.1, 0.1, (5,), tuple((s,) for s in final), ((1.0,),) * len(final))


@pytest.mark.parametrize(
    ("tried", "says"),
    [
        (
            (near("group", 0.5, 0.7), near("plain", 0.5, 0.6)),
            "cannot tell group from plain; about 11 repetitions would, 5.5 times this",
        ),
        (
            (near("group", 0.5, 0.7), near("plain", 0.6, 0.6)),
            "cannot tell group from plain; no reasonable number of repetitions would, as things stand",
        ),
        (
            (near("plain", 0.6, 0.7), near("group", 0.5, 0.7), near("ghost", 0.1, 0.2)),
            "cannot tell plain from group; about 14 repetitions would, 7.0 times this",
        ),
        (
            (near("group", 0.8, 0.9), near("ghost", 0.7, 0.9), near("plain", 0.4, 0.5)),
            "take group: 40.0 ± 0.0 points better than plain; it cannot be told from ghost; about 14 "
            "repetitions would, 7.0 times this",
        ),
        ((near("plain", 0.8, 0.9), near("ghost", 0.6, 0.7)), "take plain"),
        ((near("group", 0.8, 0.9),), "take group: no other candidate could be compared"),
        ((LOST,), "every candidate diverged: give lower rates"),
    ],
    ids=["near", "nothing", "plain is best", "two are better", "plain it is", "alone", "all diverged"],
)
def test_the_verdict_in_words(tried, says):
    choice = choice_of(*tried)
    assert choice.sentence == says
    assert (choice.recommended is None) == says.startswith(("cannot", "every"))


def test_one_repetition_shows_no_spread():
    choice = choice_of(near("group", 0.9), near("plain", 0.1), repetitions=1)
    assert choice.sentence == "cannot tell group from plain, as one repetition shows no spread"
    plain = choice.to_json()
    assert plain["verdict"]["differences"]["plain"]["half_width"] is None
    assert plain["verdict"]["differences"]["plain"]["mean"] == pytest.approx(0.8)
    assert choice.rows()[0][1] == "90.00"
    assert math.isinf(choice.verdict.differences["plain"].half_width)
