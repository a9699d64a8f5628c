"""Hang watchdog: which ranks are named when there is no progress."""

from fm_core.training.hang_watchdog import Heartbeat, find_culprits


def heartbeats(*facts, ticks=0):
    return {
        number: Heartbeat(f"host-{number}", 1, beats, ticked + ticks, at)
        for number, (beats, ticked, at) in enumerate(facts)
    }


def test_a_rank_that_sends_no_heartbeat():
    before = heartbeats((7, 10, "the backward pass of step 3"), (7, 20, "the forward pass of step 3"))
    now = dict(before) | {0: heartbeats((7, 16, "the backward pass of step 3"))[0]}
    assert find_culprits(before, now) == ([1], "sends no heartbeat (last at the forward pass of step 3)")


def test_a_rank_that_lives_and_is_behind():
    facts = [
        (8, 10, "the forward pass of step 3"),
        (7, 10, "the data of step 3"),
        (8, 9, "the forward pass of step 3"),
    ]
    assert find_culprits(heartbeats(*facts), heartbeats(*facts, ticks=6)) == (
        [1],
        "hangs at the data of step 3",
    )


def test_nobody_where_all_wait_for_each_other():
    facts = [(8, 10, "the update of step 3"), (8, 11, "the update of step 3")]
    culprits, reason = find_culprits(heartbeats(*facts), heartbeats(*facts, ticks=6))
    assert culprits == []
    assert "wait for each other" in reason
    assert "the update of step 3" in reason


def test_nobody_where_the_store_is_gone():
    assert find_culprits({}, {}) == ([], "the ranks' store does not answer")
