"""Rows of one data set to examples, and what is wrong with single rows in its place."""

import pytest

from gemma_tuner.errors import DataError
from gemma_tuner.sources.examples import ExampleReader
from gemma_tuner.sources.files import Row

COLUMNS = ("image", "prompt", "response")


def read(*images, columns=COLUMNS):
    reader = ExampleReader(columns, {})
    rows = [
        Row(str(number), {"image": image, "prompt": "Q", "response": "A"})
        for number, image in enumerate(images)
    ]
    return dict(reader.read(rows, lambda kind, source, folder, key: source))


@pytest.mark.parametrize("lacking", [{0}, {3}, {0, 1}, {0, 2, 5}, set()])
def test_rows_without_media_in_a_set_with_media_are_told_wherever_they_stand(lacking):
    found = read(*(None if number in lacking else "a.png" for number in range(6)))
    assert list(found) == [str(number) for number in range(6)]
    bad = {int(key) for key, outcome in found.items() if isinstance(outcome, DataError)}
    assert bad == lacking
    for number in lacking:
        error = found[str(number)]
        assert error.key == str(number)
        assert "nothing in 'image', and other rows have" in str(error)


def test_a_set_without_media_is_one_of_texts_in_order():
    found = read(*[None] * 1500)
    assert list(found) == [str(number) for number in range(1500)]
    assert not any(isinstance(outcome, DataError) for outcome in found.values())
