"""Configuration: shipped files, overrides, suggestions, and that no setting is dead."""

import re
from pathlib import Path

import pytest
import yaml

from dino_depth.cli import COMMANDS, main
from dino_depth.config import PretrainConfig, config_keys, find_config, load_config, parse, save_config
from dino_depth.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def read(*arguments) -> PretrainConfig:
    return parse(PretrainConfig, list(arguments), "dino-depth pretrain")


def test_the_published_recipe_lists_every_key_and_is_the_default():
    path = find_config("pretrain")
    assert read("--config", "pretrain") == PretrainConfig()
    loaded = yaml.safe_load(path.read_text())
    flat = {f"{group}.{key}" for group, values in loaded.items() if isinstance(values, dict) for key in values}
    assert flat | set(loaded) >= {
        key for key in config_keys(PretrainConfig) if not key.startswith("data.normalization.")
    }


@pytest.mark.parametrize("name", ["pretrain_demo", "pretrain_small_data"])
def test_shipped_files_are_found_by_name_and_path(name):
    config = read("--config", name)
    assert config == read("--config", f"configs/{name}.yaml") == read("--config", f"{name}.yaml") != PretrainConfig()


def test_overrides_win_in_order(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 7, batch: 4}\ncrops: {global_scale: [0.4, 0.9]}\n")
    config = read("--config", "pretrain_demo", "--config", str(file), "--train.steps=9", "--resume")
    assert (config.train.steps, config.train.batch, config.crops.global_scale) == (9, 4, (0.4, 0.9))
    assert config.resume and config.model.dim == 128
    assert read("--init-from", "x").init_from == "x"
    assert read("--data.shards", "[a, b]").data.shards == ["a", "b"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--data.worker", "4"], "--data.workers"),
        (["--data", "{worker: 4}"], "data.workers"),
        (["--train.precision", "f16"], "train.precision"),
        (["--train.steps", "many"], "train.steps"),
        (["--train.steps"], "train.steps"),
        (["--config", "pretrain_dmo"], "pretrain_demo"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_key(arguments, expected):
    with pytest.raises(ConfigError) as error:
        read(*arguments)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("data: {worker: 4}", "data.workers"),
        ("data: [", "not YAML"),
        ("- 1", "keys"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(file))) as error:
        read("--config", str(file))
    assert expected in str(error.value)


def test_saved_configurations_read_back(tmp_path):
    config = read("--config", "pretrain_demo", "--data.shards", "s")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(PretrainConfig, tmp_path / "config.yaml") == config


def test_every_setting_is_read_somewhere():
    sources = "\n".join(path.read_text() for path in (ROOT / "dino_depth").rglob("*.py") if path.name != "config.py")
    leaves = {key.split(".")[-1] for key in config_keys(PretrainConfig)}
    dead = {leaf for leaf in leaves if not re.search(rf"\.{leaf}\b", sources) and f'"{leaf}"' not in sources}
    assert dead == set()


def test_commands_parse_their_help(capsys):
    for name in COMMANDS:
        assert main([name, "--help"]) == 0, name
        assert f"dino-depth {name}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--views", "3"], ["--views=3"]])
def test_short_names_stand_for_settings(words, capsys):
    assert main(["evaluate", *words, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["head"]["modmap"]["sources"] == 3


def test_exit_codes_and_messages(capsys, tmp_path):
    assert main([]) == 0
    assert main(["--version"]) == 0
    assert main(["pretran"]) == 2
    assert "did you mean 'pretrain'" in capsys.readouterr().err
    assert main(["pretrain", "--data.shards", str(tmp_path), "--out", str(tmp_path / "run")]) == 3
    assert "manifest.json" in capsys.readouterr().err
    assert main(["pretrain", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "data.shards" in error and error.count("\n") == 1


def test_print_config_is_valid_yaml(capsys):
    assert main(["pretrain", "--config", "pretrain_demo", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["dim"] == 128
