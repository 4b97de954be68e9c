"""When a page draws: at every look while a run is young, then as its charts come to look new."""

from itertools import pairwise

from gemma_tuner.watch.run import Run
from gemma_tuner.watch.watched import LONGEST_SECONDS, Pace, Watched
from tests.unit.watch.test_watched_runs import write_run, write_step


def test_a_page_draws_less_and_less_often(tmp_path):
    with write_run(tmp_path, steps=1, max_steps=10_000) as log:
        watched = Watched([Run(tmp_path, "run")])
        pace = Pace(watched, 0.0)
        assert not pace.is_due(1e9)  # there is nothing new
        drawn = []
        for step in range(2, 1002):  # a record a second
            write_step(log, step)
            watched.refresh()
            if pace.is_due(float(step)):
                drawn.append(step)
        assert drawn[:9] == list(range(2, 11))
        assert 25 < sum(step <= 300 for step in drawn) < 60
        later = [step for step in drawn if step > 700]
        pauses = [new - old for old, new in pairwise(later)]
        assert set(pauses) == {LONGEST_SECONDS}


def test_what_cannot_wait_is_drawn_at_once(tmp_path):
    with write_run(tmp_path, steps=1000, max_steps=10_000) as log:
        watched = Watched([Run(tmp_path, "run")])
        pace = Pace(watched, 0.0)
        write_step(log, 1001)
        watched.refresh()
        assert not pace.is_due(1.0)
        log.event(1001, "finished")
        watched.refresh()
        assert pace.is_due(1.0)
        assert not pace.is_due(2.0)
    (tmp_path / "log.jsonl").unlink()
    write_run(tmp_path, steps=3).close()  # another run, begun anew under this name
    watched.refresh()
    assert pace.is_due(2.0)
