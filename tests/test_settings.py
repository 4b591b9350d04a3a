"""Every number in every configuration has a range, and what is outside is refused by name."""

import copy
import dataclasses
import math
import typing

import pytest

from semhitok._settings import Range, Settings, from_dict, override, ranges_of
from semhitok.config import TrainConfig, preset_names, train_config
from semhitok.corpus.config import EncodingConfig
from semhitok.mllm.config import LoRAConfig, MLLMTrainConfig, SourceConfig, mllm_config
from semhitok.processor import ImageProcessor

ROOTS = (TrainConfig, MLLMTrainConfig, EncodingConfig, ImageProcessor)


def parts_of(hint):
    """The types that an annotation is made of, those of numbers with their ranges."""
    if typing.get_origin(hint) is typing.Annotated:
        return [hint]
    inner = typing.get_args(hint)
    return [part for argument in inner for part in parts_of(argument)] if inner else [hint]


def reachable():
    """Every dataclass of settings, with the fields that it has."""
    waiting, found = list(ROOTS), {}
    while waiting:
        cls = waiting.pop()
        if cls in found:
            continue
        found[cls] = typing.get_type_hints(cls, include_extras=True)
        parts = [part for hint in found[cls].values() for part in parts_of(hint)]
        waiting += [part for part in parts if dataclasses.is_dataclass(part)]
    return found


CLASSES = reachable()
NUMBERS = [(cls, name) for cls, hints in CLASSES.items() for name, hint in hints.items() if ranges_of(hint)]


def intact(cls):
    """An instance whose settings are valid."""
    needed = {"width": 8, "depth": 1, "heads": 2, "path": "a.jsonl", "task": "text", "size": 8}
    hints = CLASSES[cls]
    return cls(**{k: v for k, v in needed.items() if k in hints and (k in ("path", "task") or cls.__name__ in LACKING)})


LACKING = ("ViTConfig", "ImageProcessor")  # whose numbers have no defaults


def test_all_classes_are_found_and_all_their_numbers_have_ranges():
    names = {cls.__name__ for cls in CLASSES}
    assert {"TeacherConfig", "CriticConfig", "OptimizerConfig", "SourceConfig", "LoRAConfig", "HeldOutConfig"} <= names
    for cls, hints in CLASSES.items():
        assert issubclass(cls, Settings)
        for name, hint in hints.items():
            assert not {int, float} & set(parts_of(hint)), f"{cls.__name__}.{name}: a number without a range"
    assert len(NUMBERS) > 70


def with_number(value, hint, number, place):
    """`value` of a field with one of its numbers changed; `place` counts those of a tuple."""
    if typing.get_origin(hint) is typing.Annotated:
        return number
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return tuple(number if n == place else item for n, item in enumerate(value))
    if typing.get_origin(hint) is list:
        return [number]
    return with_number(value, arguments[0], number, place)


@pytest.mark.parametrize(("cls", "name"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_numbers_out_of_range_are_refused_by_name(cls, name):
    hint, config = CLASSES[cls][name], intact(cls)
    whole = int in [typing.get_args(part)[0] for part in parts_of(hint) if typing.get_args(part)]
    for place, allowed in enumerate(ranges_of(hint)):
        below = allowed.low - 1 if whole or allowed.ends[0] == "[" else allowed.low
        above = allowed.high + 1 if whole or allowed.ends[1] == "]" else allowed.high
        bad = [below, above, True, "3", math.nan, *([1.5] if whole else [math.inf, -math.inf])]
        for number in [int(n) if whole and n in (below, above) else n for n in bad]:
            changed = copy.copy(config)
            value = with_number(getattr(config, name), hint, number, place)
            object.__setattr__(changed, name, value)
            with pytest.raises(ValueError, match=rf"^{name}(\[{place}\])?: expected ") as caught:
                changed.__post_init__()
            assert "\n" not in str(caught.value)


def test_the_ends_of_a_range():
    both, neither = Range(0, 1), Range(0, 1, "()")
    assert [both.problem(x) == "" for x in (-0.1, 0, 0.5, 1, 1.1)] == [False, True, True, True, False]
    assert [neither.problem(x) == "" for x in (0, 0.5, 1)] == [False, True, False]
    assert neither.problem(0) == "expected more than 0, got 0" and neither.problem(1) == "expected less than 1, got 1"
    assert both.problem(-1) == "expected at least 0, got -1" and both.problem(2) == "expected at most 1, got 2"
    assert len(both.problem(10**400)) < 200  # beyond any floating-point number
    assert both.problem(math.nan) == "expected a number from 0 to 1, got nan"


def test_errors_have_the_whole_path():
    with pytest.raises(ValueError, match=r"^config\.pixel\.optimizer\.betas\[1\]: expected less than 1, got 1\.0$"):
        from_dict(TrainConfig, {"pixel": {"optimizer": {"betas": [0.9, 1.0]}}})
    with pytest.raises(ValueError, match=r"^config\.semantic\.decay: expected a number from 0 to 1, got nan$"):
        from_dict(TrainConfig, {"semantic": {"decay": math.nan}})
    config = train_config("semhitok-tiny")
    for setting, problem in (
        ("pixel.optimizer.lr=-1", r"^pixel\.optimizer\.lr: expected more than 0, got -1\.0$"),
        ("data.crop_scale=[0.9, 0.5]", r"^data\.crop_scale: expected the smaller value first, got \[0\.9, 0\.5\]$"),
        ("pixel.loss.critic.kind=cnn", r"^pixel\.loss\.critic\.kind: expected patch or dino, got 'cnn'$"),
        ("model.teacher.share=0", r"^model\.teacher\.share: expected more than 0, got 0\.0$"),
        ("data.workers=-1", r"^data\.workers: expected at least 0, got -1$"),
        ("seed=9223372036854775808", r"^seed: expected at most "),
    ):
        with pytest.raises(ValueError, match=problem):
            override(copy.deepcopy(config), setting)


def test_presets_are_in_range():
    assert all(train_config(name) for name in preset_names())
    assert all(mllm_config(name) for name in preset_names("mllm"))
    assert SourceConfig("a", "text").weight == 1 and LoRAConfig().r == 16
