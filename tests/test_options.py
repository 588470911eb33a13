"""Fields with help and ranges, values as people write them in YAML, KEY=VALUE, names that are not known."""

from dataclasses import dataclass

import pytest

from lion_fast.errors import OptionError, refuse_unknown
from lion_fast.options import Options, documented, dump_yaml, key_lists, key_values, parse_yaml, setting


@documented
@dataclass(frozen=True)
class Some(Options):
    """Some settings."""

    rate: float = setting(0.5, "how fast", above=0, most=1)
    steps: int | None = setting(None, "how many", default_is="all")
    kind: str = setting("a", "which", choices=("a", "b"))
    quick: bool = setting(True, "whether")
    name: str = setting("x", "what it is called")
    more: dict = setting({}, "others")


def test_the_docstring_says_help_choices_and_default():
    lines = "rate: how fast [0.5]", "steps: how many [all]", "kind: which: a, b [a]", "quick: whether [yes]"
    for line in lines:
        assert f"\n        {line}\n" in Some.__doc__


@pytest.mark.parametrize(
    "given",
    [
        {"rate": 0}, {"rate": float("nan")}, {"rate": True}, {"rate": None}, {"rate": "1"}, {"steps": 0},
        {"steps": 1.5}, {"kind": "c"}, {"quick": 1}, {"name": 5}, {"more": [1]},
    ],
)  # fmt: skip
def test_values_outside_are_refused_by_name(given):
    with pytest.raises(OptionError, match=next(iter(given))):
        Some.from_dict(given)


def test_values_inside_are_kept():
    given = {"rate": 1, "steps": 3, "kind": "b", "quick": False, "name": "y", "more": {"z": [1]}}
    assert Some.from_dict(given).to_dict() == given and Some().steps is None
    assert Some().more is not Some().more


def test_unknown_names_come_with_the_nearest_one():
    with pytest.raises(OptionError, match="'rat'; did you mean rate"):
        Some.from_dict({"rat": 1})
    with pytest.raises(OptionError, match="unknown part 'z'. Valid: a, b"):
        refuse_unknown({"z": 1}, ["a", "b"], "part")


@pytest.mark.parametrize("text", ["1e-3", "+1E3", "-.5e2", "2.e0", "1.0e-05", "7e+1"])
def test_numbers_as_people_write_them(text):
    assert parse_yaml(f"[{text}]") == [float(text)]


@pytest.mark.parametrize("text", ["1e-3", "e3", "1e", "0x1e-3", "yes", "null", "12"])
def test_texts_stay_texts(text):
    assert parse_yaml(f"'{text}'") == text
    assert parse_yaml(dump_yaml({"a": text, "b": [text]})) == {"a": text, "b": [text]}


def test_key_values():
    assert key_values(["kv-length=5", "lr=1e-2", "ends=[input]", "a=b=c", "x="], "--set") == {
        "kv_length": 5, "lr": 0.01, "ends": ["input"], "a": "b=c", "x": None,
    }  # fmt: skip
    assert key_lists(["lr=1e-3,5e-3", "depth=deep,shallow", "ends=[input],[input, output]"], "--grid") == {
        "lr": (0.001, 0.005), "depth": ("deep", "shallow"), "ends": (["input"], ["input", "output"]),
    }  # fmt: skip
    assert key_lists(["clip-norm=null,1.5"], "--grid") == {"clip_norm": (None, 1.5)}
    for wrong in ("lr", "=1", "lr=[1"):
        with pytest.raises(OptionError, match="--set takes KEY=VALUE"):
            key_values([wrong], "--set")
    for wrong in ("lr", "lr=", "=1", "lr=1,,2", "lr=[1"):
        with pytest.raises(OptionError, match="--grid takes KEY=V1,V2"):
            key_lists([wrong], "--grid")
    with pytest.raises(OptionError, match="lr twice"):
        key_lists(["lr=1", "lr=2"], "--grid")
