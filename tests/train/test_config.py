"""Settings from files: types, unknown names, and what overrides what."""

import pathlib

import pytest

from dpfa_jax.core import ArgumentError
from dpfa_jax.release import AdaptiveClipping
from dpfa_jax.train.config import TrainConfig, from_settings, read_config


def test_json_and_toml_agree(tmp_path):
    (tmp_path / "a.json").write_text('{"epsilon": 2, "learning-rate": 0.1, "class_names": ["a"]}')
    (tmp_path / "a.toml").write_text('epsilon = 2\nlearning_rate = 0.1\nclass-names = ["a"]\n')
    one, other = read_config(tmp_path / "a.json"), read_config(tmp_path / "a.toml")
    assert one == other == TrainConfig(epsilon=2.0, learning_rate=0.1, class_names=("a",))


def test_options_of_clipping_and_noise_come_from_files_too(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(
        'clipping = "per-layer"\nadaptive-clipping = true\nclip-quantile = 0.7\nnoise-bands = 1\n'
    )
    config = read_config(path)
    config.check()
    assert config.clipping == "per-layer" and config.adaptive() == AdaptiveClipping(quantile=0.7)


def test_settings_survive_the_round_trip():
    config = TrainConfig(data="x.csv", steps=3, class_names=("a", "b"))
    stored = config.settings() | {"class_names": ["a", "b"]}
    assert from_settings(stored, "test") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"epsilonn": 3}', "epsilonn"),
        ('{"epsilon": "3"}', "epsilon"),
        ('{"epsilon": true}', "epsilon"),
        ('{"steps": 1.5}', "steps"),
        ('{"clipping": 3}', "clipping"),
        ('{"clip-quantile": "half"}', "clip_quantile"),
        ('{"resume": true}', "resume"),
        ("[1]", "config"),
        ("{", "config"),
        ("[" * 100_000, "nested too deeply"),
        ('{"epsilon": 1' + "0" * 400 + "}", "epsilon = '<an int of 1329 bits>'"),
        ('{"epsilon": 1' + "0" * 5000 + "}", "malformed"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    """V23."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=message):
        read_config(path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model", "magic"),
        ("seed", 10**23),
        ("steps", 10**400),
        ("micro_batch", 2**53 + 1),
        ("max_length", 65537),
        ("data", "caf\udce9.csv"),
        ("out", pathlib.Path("caf\udce9")),
        ("class_names", ("yes", "\ud800")),
    ],
)
def test_values_no_run_could_use_are_refused_by_name(setting, value):
    """V23: a typed error that can be printed, before anything is loaded."""
    with pytest.raises(ArgumentError) as error:
        TrainConfig(**{setting: value}).check()
    assert error.value.parameter == setting and len(str(error.value).encode()) < 200
