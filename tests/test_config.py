"""Configuration: shipped files, overrides, suggestions, and that no setting is dead."""

import re
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from dino_depth.cli import COMMANDS, main
from dino_depth.config import PretrainConfig, config_keys, find_config, load_config, parse, save_config
from dino_depth.errors import ConfigError
from dino_depth.settings import in_words, kind_of, load_yaml

ROOT = Path(__file__).resolve().parents[1]
# What only the parser's own messages say.
INNER = re.compile(r"<class|typing|Literal|Union|NestedArg|Parser|Expected|Unable|Namespace|NoneType|\n")


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
        (["--config"], "--config needs a value"),
        (["stray"], "stray"),
        (["--optim.lr"], "--optim.lr needs a value"),
        (["--train.steps=--3"], "--train.steps must be a whole number, got --3"),
        (["--data.worker=4"], "unknown argument '--data.worker'; did you mean '--data.workers'?"),
        (["--optim", "{lr: 1, lr: 2}"], "--optim: 'lr' is given twice, in line 1"),
        (["--data.mixing", "{a: 1, a: 2}"], "--data.mixing: 'a' is given twice, in line 1"),
        (["--optim.lr", "abc"], "--optim.lr must be a number, got abc"),
        (["--optim.lr", "abc", "--optim.lr", "3"], "--optim.lr must be a number, got abc"),
        (["--optim", "{lr: abc}"], "--optim.lr must be a number, got abc"),
        (["--optim", "{lr: null}"], "--optim.lr must be a number, got null"),
        (["--model", "5"], "--model must be {setting: value, ...} or a YAML file, got 5"),
        (["--data", ""], "--data must be {setting: value, ...} or a YAML file, got ''"),
        (
            ["--data.normalization", "[1]"],
            "--data.normalization must be {setting: value, ...} or a YAML file, got [1]",
        ),
        (["--data.normalization.method", "max2"], "--data.normalization.method must be one of max, minmax, log, plane"),
        (["--data.mixing.a", "b"], "--data.mixing.a must be a number, got b"),
        (["--data.mixing", "{a: b}"], "--data.mixing must be {name: a number, ...}, got {a: b}"),
        (["--crops.global_scale", "[1, 2, 3]"], "--crops.global_scale must be [a number, a number], got [1, 2, 3]"),
        (["--crops.sizes", "[[1]]"], "--crops.sizes must be [[a whole number, a whole number], ...], got [[1]]"),
        (["--data.splits", "[1]"], "--data.splits must be [text, ...], got [1]"),
        (["--model.dim.x", "3"], "unknown argument '--model.dim.x'; did you mean '--model.dim'?"),
        (["--data.workers", "9" * 200 + "x"], "got " + "9" * 80 + "..."),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_key(arguments, expected):
    with pytest.raises(ConfigError) as error:
        read(*arguments)
    assert expected in str(error.value) and not INNER.search(str(error.value))


def test_no_setting_of_any_command_is_described_in_inner_words():
    for name, command in COMMANDS.items():
        cls = getattr(import_module(command.module), command.config)
        for key in config_keys(cls):
            words = in_words(kind_of(cls, key))
            assert not INNER.search(words) and ("a value" not in words or (name, key) == ("tables", "settings")), key


def test_a_group_of_another_command_is_unknown(capsys):
    assert main(["bench", "timm:any", "--data.shards", "x"]) == 2
    assert capsys.readouterr().err == "dino-depth: unknown argument '--data.shards'; did you mean '--data'?\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("data: {worker: 4}", "data.workers"),
        ("model: 5", "model must be {setting: value, ...} or a YAML file, got 5"),
        ("model: null", "model must be {setting: value, ...} or a YAML file, got null"),
        ("model: any", "model must be {setting: value, ...} or a YAML file, got any"),
        ("data: {normalization: []}", "data.normalization must be {setting: value, ...} or a YAML file, got []"),
        ("optim: {lr: null}", "optim.lr must be a number, got null"),
        ("optim: {lr: abc}", "optim.lr must be a number, got abc"),
        ("train: {precision: f16}", "train.precision must be one of bf16, fp32, got f16"),
        ("data: {mixing: {a: b}}", 'data.mixing must be {name: a number, ...}, got {"a": "b"}'),
        ("train:\n  steps: 3\ntrain:\n  steps: 5", ": 'train' is given twice, in lines 1 and 3"),
        ("train:\n  steps: 3\n  steps: 3", ": 'steps' is given twice, in lines 2 and 3"),
        ("train: {steps: 3}\ntrain.steps: 5", ": train.steps is given twice"),
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
    assert expected in str(error.value) and not INNER.search(str(error.value))


@pytest.mark.parametrize(
    "text, expected",
    [("dim: abc", "model.dim must be a whole number, got abc"), ("dimm: 3", "unknown key 'model.dimm'"),
     ("dim: null", "model.dim must be a whole number, got null"), ("dim: 1\ndim: 2", "'dim' is given twice")],
)  # fmt: skip
def test_a_bad_file_of_a_group_is_named(tmp_path, text, expected):
    file = tmp_path / "model.yaml"
    file.write_text("dim: 192")
    assert read("--model", str(file)).model.dim == 192
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read("--model", str(file))
    assert str(error.value).startswith(f"{file}: {expected}")
    (tmp_path / "all.yaml").write_text("model: model.yaml")
    with pytest.raises(ConfigError) as error:
        read("--config", str(tmp_path / "all.yaml"))
    assert str(error.value).startswith(f"{file}: {expected}")


def test_a_merged_mapping_may_give_a_key_once_more():
    assert load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: *a}") == {
        "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}
    }  # fmt: skip


def test_no_shipped_file_repeats_a_key():
    for path in (ROOT / "configs").rglob("*.yaml"):
        load_yaml(path.read_text())


def test_options_joined_with_their_values_mean_the_same():
    assert read("--init-from=--x", "--resume=false", "--data.splits=[a]") == read(
        "--resume", "false", "--init_from=--x", "--data.splits", "[a]"
    )


def test_what_a_command_requires_is_told_in_plain_words_and_may_stand_in_a_file(tmp_path):
    for name, command in COMMANDS.items():
        cls = getattr(import_module(command.module), command.config)
        required = [entry.name for entry in fields(cls) if entry.default is entry.default_factory is MISSING]
        for missing in required:
            words = [word for key in required if key != missing for word in (f"--{key}", "bop")]
            is_position = missing in [word.removesuffix("...") for word in command.positional]
            told = f"missing argument {missing.upper()}" if is_position else f"--{missing} is missing"
            with pytest.raises(ConfigError, match=f"^{told}$"):
                parse(cls, words, name, command.positional)
            (tmp_path / "rest.yaml").write_text(f"{missing}: {'[bop]' if missing == 'encoders' else 'bop'}")
            parse(cls, [*words, "--config", str(tmp_path / "rest.yaml")], name, command.positional)


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
