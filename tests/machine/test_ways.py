"""Streamed, over several links, or computed in RAM: one way is the schedule that streamers follow, and no lane lies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigkit.draw.ways import busy, ways_figure, ways_text
from bigkit.machine.streams import Turn, schedule
from bigkit.machine.ways import play


@given(st.integers(1, 9), st.floats(0.001, 0.1), st.integers(1, 4))
def test_one_link_is_the_schedule(blocks, work, slots):
    turns = [Turn(f"h.{i}", 10**9, work, "cpu") for i in range(blocks)]
    whole = schedule(turns, link=25e9, slots=min(slots, blocks), tokens=3)
    if slots < blocks:  # else blocks stay in their slots
        assert play(blocks, 1e9, work, 25e9, slots=slots).ends == pytest.approx(whole.ends)


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 4), st.sets(st.integers(0, 11)), st.floats(1e-4, 0.05))
def test_lanes_do_one_thing_at_a_time_in_order(blocks, gpus, slots, on_cpu, work):
    way = play(blocks, 1e9, work, 25e9, gpus=gpus, slots=slots, mlp=6e8, cpu=20e9, on_cpu=on_cpu)
    for lane in {span.lane for span in way.spans}:
        own = [span for span in way.spans if span.lane == lane]
        assert all(one.end <= other.start + 1e-9 for one, other in zip(own, own[1:]))
    works = [span for span in way.spans if not span.lane.startswith("link")]
    assert all(one.end <= other.start + 1e-9 for one, other in zip(works, works[1:])), "blocks work one after another"
    arrived = {(span.turn, span.token): span.end for span in way.spans if span.lane.startswith("link")}
    for span in works:
        assert span.start >= arrived[span.turn, span.token] - 1e-9
        assert span.lane == "CPU" or span.lane == f"GPU {span.turn % gpus}"
    assert sorted({span.turn for span in works if span.lane == "CPU"}) == sorted(on_cpu & {*range(blocks)})


def test_the_picture_says_what_the_table_says():
    ways = {"streamed": play(6, 1e9, 0.001, 50e9), "both": play(6, 1e9, 0.001, 50e9, gpus=2)}
    picture = ways_figure(ways, "<Six>")
    assert "both 60.0 ms" in picture.label and "<Six>" not in picture.svg and "60.0 ms" in ways_text(ways)
    assert busy(ways["both"], "link 1") == pytest.approx(1)
