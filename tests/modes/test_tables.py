"""What holds for the modes of every framework, and the table of the docs, which is made of their docstrings."""

import inspect
import json
import math

import numpy as np
import pytest
from named_modes import _NEEDED, FRAMEWORKS, module_of, rows, table, title

import drpo_core.anchors
import drpo_core.corrections
import drpo_core.objectives
import drpo_core.penalties
from drpo_core import modes
from drpo_core.modes import Mode

ROWS = list(rows())
NAMESPACE = {
    name: getattr(room, name)
    for room in (drpo_core.objectives, drpo_core.anchors, drpo_core.corrections, drpo_core.penalties, modes)
    for name in room.__all__
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_docstring_lists_every_name(framework):
    listed = [row.name for row in ROWS if row.framework == framework]
    if framework == "nemo_rl":
        assert set(listed) - {"none"} <= module_of(framework).DEFAULTS.keys()
    else:
        assert set(listed) == module_of(framework).LOSSES.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.call)
def test_call_and_repr_make_the_value(row):
    for text in (row.call, repr(row.mode)):
        assert eval(text, {"modes": modes, **NAMESPACE}) == row.mode  # noqa: S307 -- our own text
    assert Mode.from_dict(json.loads(json.dumps(row.mode.to_dict()))) == row.mode
    hash(row.mode)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_unknown_names_and_keys_are_errors(framework):
    function = getattr(modes, framework)
    for unknown in ("nothing", None, [], 3):
        with pytest.raises(ValueError, match=r": expected '.*, got "):
            function(unknown)
    name = next(row.name for row in ROWS if row.framework == framework)
    with pytest.raises(ValueError, match=r"nothing: expected keys of .* among "):
        function("ClippedPGLossFn" if framework == "nemo_rl" else name, nothing=1)
    # the name is positional, so that a framework may have a key of that name
    first = next(iter(inspect.signature(function).parameters.values()))
    assert first.kind is inspect.Parameter.POSITIONAL_ONLY


SWITCHES = {
    "areal": [{"use_decoupled_loss": True, "rejection_sampling": {"level": "sequence", "agg": "sum"}}],
    "ms_swift": [{"rollout_importance_sampling_mode": "token_truncate", "beta": 0.0}, {"fipo_safety_threshold": None}],
    "nemo_rl": [
        {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": "icepop",
            "truncated_importance_sampling_ratio": 5.0,
            "truncated_importance_sampling_ratio_min": 0.5,
        }
    ],
    "open_instruct": [{"use_rho_correction": True}],
    "openrlhf": [
        {"algo.advantage.is_correction_level": "token"},
        {"algo.kl.use_loss": True},
    ],
    "roll": [
        {"use_pg_clip_range": True},
        {"use_kl_loss": True},
        {
            "train_infer_correction": {
                "filters": [{"enabled": True, "ratio_enabled": True}],
                "is_weight": {"enabled": True, "upper_bound": 2.0},
            }
        },
    ],
    "skyrl": [
        {"loss_reduction": "seq_mean_token_sum_norm", "max_seq_len": 100},
        {"use_kl_loss": True, "loss_reduction": "sequence_mean"},
        {"tis_ratio_type": "token"},
        {"tis_ratio_type": "sequence"},
        {"sequence_mask_metric": "geometric"},
        {"sequence_mask_metric": "product"},
    ],
    "slime": [{"use_opsm": True}, {"use_tis": True}, {"use_kl_loss": True}],
    "trl": [{"use_vllm": True}, {"beta": 0.1}],
    "verl": [
        {"clip_ratio_low": None},
        {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 100.0},
        {"use_kl_loss": True},
        {"rollout_is": "token"},
        {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": 1.01},
    ],
}
"""Settings with which a framework's losses read the keys that they don't by default."""

WRONG = (
    *(None, "x", "", "1_2_3", "nan_1", "1e400", "0.5_inf", b"x", True, 0, 1, -1, 0.5, 3, 900, -900, 1j, int, object()),
    *(math.nan, math.inf, -math.inf, 1e308, -1e308, 1e-308, 10**400, [], [1], [1, 2], [[1]], {}, {"upper": 1}),
    *(np.float64(0.5), np.float32(math.nan), np.array(2.0), np.array([1.0, 2.0])),
)


def inner(value, path=()):
    """Where a setting has dicts and lists: the paths to everything in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*path, key)
        yield from inner(each, (*path, key))


def changed(value, path, by):
    """A copy with something else at a path."""
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], by)
    return copy


def refusal(function, name, keys):
    """What is said of the keys, or None; anything but a TypeError or a ValueError is wrong."""
    try:
        function(name, **keys)
    except (TypeError, ValueError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return None


def places(function, name, defaults, settings):
    """Every key with a setting that reads it, as a path of one; and every path into a setting."""
    found = {}
    for setting in settings:
        for key in defaults.keys() - {path[0] for path in found if len(path) == 1}:
            if refusal(function, name, {key: defaults[key]} | setting) is None:
                found[(key,)] = setting
        found |= {path: setting for path in inner(setting) if len(path) > 1}
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_wrong_types_and_extreme_numbers_are_refused_by_the_name_of_a_key(framework):
    """For every key of every loss, in the first setting that reads it, and in every dict of a setting."""
    function, known = getattr(modes, framework), module_of(framework).DEFAULTS
    names = [row.name for row in ROWS if row.framework == framework] if framework != "nemo_rl" else ["ClippedPGLossFn"]
    of_name = known if framework == "prime_rl" else dict.fromkeys(names, known)
    wrong, read = [], set()
    for name in names:
        needed = _NEEDED.get((framework, name), {})
        settings = [needed | setting for setting in ({}, *SWITCHES.get(framework, ()))]
        settings = [setting for setting in settings if refusal(function, name, setting) is None]
        for path, setting in places(function, name, of_name[name], settings).items():
            read.add(path[0])
            for value in WRONG:
                text = refusal(function, name, changed({path[0]: None} | setting, path, value))
                named = text is None or set(text.partition(":")[0].split(", ")) & of_name[name].keys()
                wrong += [] if named else [f"{name} {path} = {value!r}: {text}"[:300]]
    assert not wrong, "\n".join(wrong[:40])
    assert read == {key for defaults in of_name.values() for key in defaults}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_documented(framework):
    text = inspect.getdoc(getattr(modes, framework))
    for section in ("Parameters", "Returns", "Raises", "References", "Examples"):
        assert f"\n{section}\n" in text
    assert "https://" in text
    documented = module_of(framework).DEFAULTS
    keys = {key for each in documented.values() for key in each} if framework == "prime_rl" else documented
    assert not [key for key in keys if _shortened(key) not in text]
    assert any(character.isdigit() for character in title(framework))


def _shortened(key):
    """A key as a docstring names it after the first of its kind."""
    for prefix in ("algo.advantage.is_correction", "outlier_token_is_threshold", "token_mask_is_threshold"):
        key = key.removeprefix(prefix)
    return key


def test_table_has_a_line_a_mode():
    lines = table()
    assert len(lines) == len(ROWS) + 2
    assert all(line.count(" | ") == lines[0].count(" | ") for line in lines)
    assert len({row.call for row in ROWS}) == len(ROWS)
