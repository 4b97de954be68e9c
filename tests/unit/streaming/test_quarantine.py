"""The quarantine keeps what could not be used, once each, and budgets end rotten runs."""

import dataclasses
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.errors import ConfigError, DataError, SourceError
from gemma_tuner.streaming.quarantine import BadExample, Budget, Quarantine, read_reason


def bad(number=1, **more):
    fields = {
        "key": f"k{number}",
        "origin": f"f:{number}",
        "row": number,
        "stage": "decode",
        "error": "DataError",
        "reason": "damaged",
        "objects": ("gs://b/x.jpg#7",),
    }
    return BadExample(**{**fields, **more})


def test_each_fault_is_written_once_and_read_back(tmp_path):
    path = tmp_path / "deep" / "q.jsonl"
    quarantine = Quarantine(path, Budget())
    for record in (bad(), bad(), bad(2), bad(stage="fetch")):
        quarantine.add(record)
    expected = [bad(), bad(2), bad(stage="fetch")]
    assert quarantine.inspect() == expected
    again = Quarantine(path, Budget())
    again.add(bad(2))
    assert again.inspect() == expected
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_that_share_a_file_write_each_fault_once(tmp_path):
    path = tmp_path / "q.jsonl"
    train, held_out = Quarantine(path, Budget()), Quarantine(path, Budget())
    train.add(bad())
    held_out.add(bad())
    held_out.add(bad(2))
    train.add(bad(2))
    train.add(bad(3))
    assert path.read_text().count("\n") == 3
    assert train.inspect() == [bad(), bad(2), bad(3)]
    train.replace([bad(3)])  # mended, and bad again
    held_out.add(bad(4))
    held_out.add(bad())
    assert train.inspect() == [bad(3), bad(4), bad()]


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path):
    path = tmp_path / "q.jsonl"
    quarantine = Quarantine(path, Budget())
    quarantine.add(bad())
    quarantine.add(bad(2))
    path.write_bytes(path.read_bytes()[:-9])
    assert Quarantine(path, Budget()).inspect() == [bad()]
    again = Quarantine(path, Budget())
    again.add(bad(3))
    assert again.inspect() == [bad(), bad(3)]


def test_a_line_cut_off_within_a_character_is_passed_over(tmp_path):
    path = tmp_path / "q.jsonl"
    Quarantine(path, Budget()).add(bad())
    with path.open("ab") as file:
        file.write('\n{"key": "é'.encode()[:-1])
    again = Quarantine(path, Budget())
    again.add(bad(2))
    assert again.inspect() == [bad(), bad(2)]


def test_mended_examples_are_taken_out(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", Budget())
    for number in range(4):
        quarantine.add(bad(number))
    quarantine.replace([bad(0), bad(2)])
    assert quarantine.inspect() == [bad(0), bad(2)]
    quarantine.add(bad(1))
    assert len(quarantine.inspect()) == 3
    quarantine.replace([])
    assert quarantine.inspect() == []
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named_without_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    quarantine = Quarantine(tmp_path / "file2", Budget())
    quarantine.path = tmp_path / "file" / "q.jsonl"
    with pytest.raises(SourceError, match=r"q\.jsonl.*cache_dir=") as caught:
        quarantine.add(bad())
    assert str(tmp_path) not in str(caught.value)


def check(budget, error, **counts):
    budget.check(error, read_records=lambda: [bad(), bad(2), bad(3, reason="gone")], **counts)


def test_a_budget_of_none_raises_the_first_as_it_is():
    error = DataError("empty answer; fill it", key="k")
    with pytest.raises(DataError) as caught:
        check(Budget(0.01), error, bad=1, consecutive=1, rows=99)
    assert caught.value is error
    check(Budget(0.01), error, bad=1, consecutive=1, rows=100)


def test_beyond_the_budget_the_error_says_what_was_allowed():
    error = DataError("empty answer; fill it", key="k")
    with pytest.raises(
        DataError,
        match=r"bad row 11 .*0.01 of 1,000 .*10. Most frequent: 2 × decode: damaged \(first 'k1'",
    ):
        check(Budget(0.01), error, bad=11, consecutive=1, rows=1000)
    check(Budget(0.5, 5), error, bad=5, consecutive=5, rows=1000)
    with pytest.raises(DataError, match=r"6 in a row.*max_consecutive_bad=5"):
        check(Budget(0.5, 5), error, bad=6, consecutive=6, rows=1000)
    assert read_reason(error) == "empty answer; fill it"
    assert Budget(0.29).count_allowed(100) == 29


@pytest.mark.parametrize(
    "settings",
    [{"max_bad_fraction": value} for value in (-0.1, 1.1, "1", True, None)]
    + [{"max_consecutive_bad": value} for value in (0, 1.5, True)],
)
def test_budgets_that_cannot_be(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=name):
        Budget(**settings)
    assert dataclasses.asdict(Budget())[name] is not value


@given(fraction=st.floats(0.001, 0.5), rows=st.integers(100, 100_000), shards=st.integers(1, 16))
def test_shards_together_keep_the_budget_of_the_whole_to_one_row_each(fraction, rows, shards):
    budget = Budget(fraction, max_consecutive_bad=10**9)

    def is_within(bad):
        try:
            check(
                budget,
                DataError("x", key="k"),
                bad=bad,
                consecutive=1,
                rows=rows,
                num_shards=shards,
            )
        except DataError:
            return False
        return True

    allowed = budget.count_allowed(rows)
    of_a_shard = -(-allowed // shards)
    assert is_within(of_a_shard)
    assert not is_within(of_a_shard + 1)
    assert allowed <= of_a_shard * shards < allowed + shards
