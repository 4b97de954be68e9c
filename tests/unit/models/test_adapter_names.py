"""Names of modules in adapters of other makers."""

import pytest

from gemma_tuner.models.adapter_names import is_endless


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r".*\.layers\.(\d+)\.self_attn\.(q|k|v|o)_proj", False),
        (r"(?:.*\.)?(q_proj|v_proj)", False),
        (r"^model\.(?:language_model\.)?layers\.[0-9]+\..*(?<!lm_head)$", False),
        (r"(a\)*)b", False),
        (r"[(*+]+)", False),
        (r"(a|b)?c", False),
        (r"\.[\d]{1,}\.(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj).*?)", False),
        (r"(a|aa)*c", True),
        (r"(a?){40}a{40}", True),
        (r".*.*.*.*.*.*.*!", True),
        (r"a?a?a?a?a?a?a?a?a?a?a?a?aaaaaaaaaaaa", True),
        (r"(((.*)*)*)*!", True),
        (r"(a+)+$", True),
        (r"((a|b*)c)+", True),
        (r"(x{2,})*", True),
        (r"(.*,){2,}", True),
        (["q_proj"], False),
        (None, False),
    ],
)
def test_repeats_within_repeats_are_seen(pattern, expected):
    assert is_endless(pattern) is expected
