import math

import pytest

from loopfm_ray.report import words
from loopfm_ray.report.summary import read_summary
from tests.report.example import example_summary


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("fm", "FM"),
        ("vm", "VM"),
        ("vm_kd", "VM + KD"),
        ("vm_kd_loopfm", "VM + KD + LoopFM"),
        ("vm_raw", "VM + raw history"),
        ("vm_mystery", "VM + mystery"),
        ("_", "_"),
    ],
)
def test_model_keys_get_readable_names(key, name):
    assert words.pretty_name(key) == name


def test_models_stand_in_the_order_of_the_story_and_unknown_ones_last():
    assert words.model_order(["zz", "vm_kd", "vm", "fm"]) == ["fm", "vm", "vm_kd", "zz"]


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (words.format_number, 0.87234, "0.8723"),
        (words.format_number, -0.5, "−0.5000"),
        (words.format_share, 0.462, "46.2 %"),
        (words.format_count, 1234567, "1,234,567"),
        (words.format_bytes, 16, "16 B"),
        (words.format_bytes, 2_500_000, "2.5 MB"),
        (words.format_bytes, 3_000_000_000, "3.0 GB"),
        (words.format_seconds, 12.34, "12.3 s"),
        (words.format_seconds, 93_784, "1.1 d"),
        (words.format_seconds, 90, "1.5 min"),
        (words.format_small, 2.4e-7, "2.4 × 10⁻⁷"),
        (words.format_small, 0.0, "0"),
        (words.format_small, 0.258, "0.26"),
        (words.format_small, -0.0012, "−0.0012"),
        (words.format_small, 0.00096, "9.6 × 10⁻⁴"),
    ],
)
def test_numbers_are_written_with_their_unit(function, value, text):
    assert function(value) == text
    assert function(None) == function(math.nan) == words.MISSING


def test_headline_without_any_ratio_claims_nothing():
    summary = read_summary({**example_summary(), "transfer_ratio": {}})
    assert words.headline(summary) == "6 models, trained and tested on the same rows"


def test_subline_is_empty_without_a_model_that_was_taught():
    tree = example_summary()
    tree["models"] = {"fm": tree["models"]["fm"]}
    assert words.subline(read_summary(tree)) == ""
