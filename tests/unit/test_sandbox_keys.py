"""Keys of a dict from a sandbox are compared as JSON writes them."""

import pytest

from tether.rewards.sandbox import same


@pytest.mark.parametrize(
    ("got", "wanted", "alike"),
    [
        ({1: 2}, {"1": 2}, True),
        ({"1": 2}, {"1": 2}, True),
        ({True: [1], None: 0}, {"true": [1], "null": 0}, True),
        ({"a": {2: (1,)}}, {"a": {"2": [1]}}, True),
        ({1: 2}, {"2": 2}, False),
        ({1: 2}, {"True": 2}, False),
    ],
)
def test_a_key_that_is_no_text_equals_its_spelling_in_json(got, wanted, alike):
    assert same(got, wanted) is alike
