"""Hang watchdog: which ranks are named when there is no progress, and what counts as progress."""

import pytest

from fm_core.launch.worker_main import Rank
from fm_core.training import hang_watchdog
from fm_core.training.hang_watchdog import SAVE_FACTOR, HangWatchdog, Heartbeat, find_culprits


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


def test_no_rank_is_named_if_all_wait_for_each_other():
    facts = [(8, 10, "the update of step 3"), (8, 11, "the update of step 3")]
    culprits, reason = find_culprits(heartbeats(*facts), heartbeats(*facts, ticks=6))
    assert culprits == []
    assert "wait for each other" in reason
    assert "the update of step 3" in reason


def test_no_rank_is_named_if_the_store_does_not_answer():
    assert find_culprits({}, {}) == ([], "the ranks' store does not answer")


class Store(dict):
    """The ranks' store, in this process."""

    set = dict.__setitem__

    def get(self, key):
        return self[key].encode()


@pytest.fixture
def ranks(monkeypatch, tmp_path):
    """The watchdogs of two ranks, without their threads."""
    store = Store()
    monkeypatch.setattr(hang_watchdog, "_store", lambda: store)
    monkeypatch.setattr(hang_watchdog.threading, "Thread", lambda **facts: Started())
    return [HangWatchdog("train", Rank(number, 2, number, tmp_path, "a1"), 10.0) for number in (0, 1)]


class Started:
    def start(self):
        pass


def publish(ranks):
    for watchdog in ranks:
        watchdog._publish(1)


def test_a_rank_that_waits_for_a_save_sees_that_it_makes_progress(ranks):
    first, other = ranks
    for watchdog in ranks:
        watchdog.heartbeat("gathering a of raw, saving step 3", SAVE_FACTOR)
    other.heartbeat("gathering a of ema, saving step 3", SAVE_FACTOR)
    publish(ranks)
    assert not other._others_moved()
    publish(ranks)
    assert not other._others_moved()
    first.progress("hashing raw.safetensors")
    publish(ranks)
    assert other._others_moved()
    assert not other._others_moved()


def test_the_rank_that_does_not_move_in_a_save_is_named(ranks):
    first, other = ranks
    for watchdog in ranks:
        watchdog.heartbeat("gathering a of raw, saving step 3", SAVE_FACTOR)
    first.progress("writing raw.safetensors")
    other.heartbeat("gathering a of ema, saving step 3", SAVE_FACTOR)
    publish(ranks)
    before = other._heartbeats()
    for watchdog in ranks:
        watchdog._publish(7)
    assert find_culprits(before, other._heartbeats()) == ([0], "hangs at writing raw.safetensors")


def test_one_operation_of_a_save_may_take_longer_than_a_step(ranks):
    first = ranks[0]
    for step in range(5):
        first.heartbeat(f"the data of step {step}")
    assert first._limit() == 10.0
    first.heartbeat("saving step 5", SAVE_FACTOR)
    assert first._limit() == 10.0 * SAVE_FACTOR
    first.heartbeat("the data of step 6")
    assert first._limit() == 10.0
