"""The command line and the config: one line that names the option, the value and the cure."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar_jax import config as config_module
from cifar_jax import train
from cifar_jax.__main__ import COMMANDS
from cifar_jax.check_data import CheckOptions
from cifar_jax.cli import make_parser
from cifar_jax.config import PRESETS, TrainConfig, check_resumable, from_json, to_json
from cifar_jax.convert import ConvertOptions
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.evaluate import EvaluateOptions
from cifar_jax.export.__main__ import ExportOptions
from cifar_jax.options import REQUIRED, flag
from cifar_jax.predict import PredictOptions
from cifar_jax.report.__main__ import ReportOptions
from cifar_jax.serve.__main__ import ServeOptions
from cifar_jax.summary import SummaryOptions


def parse(*argv: str) -> TrainConfig:
    given = make_parser(TrainConfig, prog="train", description="").parse_given(argv)
    return dataclasses.replace(PRESETS[given.get("preset", "default")], **given)


@pytest.mark.fault("B8", "B11")
@pytest.mark.parametrize(
    ("argv", "what", "fix"),
    [
        (["--epoch", "3"], "unknown option --epoch", "--epochs"),
        (["--lr", "1"], "unknown option --lr", "did you mean --learning-rate?"),
        (["photos"], "unknown argument photos", "--help"),
        (["--epochs", "x"], "--epochs 'x' is not a whole number", "give a whole number"),
        (["--epochs", "0"], "--epochs 0 is out of range", "at least 1"),
        (["--epochs", "9" * 20], "--epochs 999", "at least 1 and at most 100000"),
        (["--epochs"], "--epochs", "--help"),
        (["--learning-rate", "nan"], "--learning-rate nan", "above 0"),
        (["--learning-rate", "0"], "--learning-rate 0", "above 0"),
        (["--dropout", "1"], "--dropout 1.0", "below 1"),
        (["--seed", "-1"], "--seed -1", "at least 0"),
        (["--seed", "4294967296"], "--seed 4294967296", "below 4294967296"),
        (["--seed", "9" * 400], "--seed 999", "below 4294967296"),
        (["--model", "cn"], "--model 'cn' is not one of linear, mlp", "did you mean cnn?"),
        (["--optimizer", "newton"], "'newton' is not one of sgd, adam, adamw", "one of these"),
        (["--devices", "two"], "--devices 'two' is not 'all' or a", "whole number"),
        (["--widths", "8,x"], "--widths 'x'", "whole number"),
        (["--widths", "0,8"], "--widths 0", "at least 1"),
        (["--widths", ","], "--widths '' is not a whole number", "whole number"),
        (["--widths", ""], "--widths '' is not a whole number", "whole number"),
        (["--data", ""], "--data '' is empty", "leave it out"),
        (["--initial-weights="], "--initial-weights '' is empty", "leave it out"),
        (["--batch-size", "100", "--devices", "3"], "--batch-size 100", "99 or 102"),
        (["--batch-size", "2", "--devices", "4"], "--batch-size 2", "--batch-size 4"),
        (["--batch-size", "10", "--accumulate", "4"], "4 micro-batch", "8 or 12"),
        (["--nesterov"], "--nesterov with --optimizer adam", "sgd"),
        (["--optimizer", "muon"], "muon without --batch-norm", "--batch-norm"),
        (["--preset", "fast", "--weight-decay", "1e-4"], "--weight-decay with", "decay 0"),
        (
            ["--patch-size", "2", "--model", "resnet9"],
            "--patch-size with --model res",
            "--patch-size 1",
        ),
        (
            ["--preset", "fast", "--model", "resnet9"],
            "--patch-size (set by --preset fast) with --model resnet9",
            "--patch-size 1",
        ),
        (
            ["--preset", "fast", "--patch-size", "3", "--model", "resnet9"],
            "--patch-size with --model resnet9",
            "--patch-size 1",
        ),
        (
            ["--preset", "fast", "--model", "mlp"],
            "--batch-norm (set by --preset fast) with --model mlp",
            "--no-batch-norm",
        ),
        (["--model", "mlp", "--widths", "8"], "--widths with --model mlp", "drop --widths"),
        (["--model", "linear", "--dropout", "0.5"], "--dropout with --model linear", "mlp"),
        (["--model", "airbench", "--dropout", "0.5"], "--dropout with --model airbench", "resnet9"),
        (["--model", "cnn-gap", "--dropout", "0.5"], "--dropout with --model cnn-gap", "--hidden"),
        (["--widths", "9" * 20], "--widths 999", "at most 1000000"),
        (["--image-size", "9" * 9], "--image-size 999", "at most 8000"),
        (["--model", "airbench", "--hidden", "8"], "--hidden with --model airbench", "drop"),
        (
            ["--model", "airbench", "--patch-size", "2"],
            "--patch-size with --model air",
            "--patch-size 1",
        ),
        (["--model", "resnet9", "--widths", "8,8"], "2 numbers for resnet9", "64,128,256,512"),
    ],
)
def test_a_bad_option_is_named_with_its_cure(argv: list[str], what: str, fix: str) -> None:
    with pytest.raises(CifarJaxError) as caught:
        parse(*argv)
    message, cure = str(caught.value).split("Fix:")
    assert what in message
    assert fix in cure
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("options", "name", "value", "what", "fix"),
    [
        (TrainConfig, "optimizer", "newton", "--optimizer 'newton' is not one of sgd, adam", ""),
        (TrainConfig, "schedule", "one-cycle", "--schedule 'one-cycle' is", "mean onecycle?"),
        (TrainConfig, "dtype", "float16", "not one of float32, bfloat16", "float"),
        (TrainConfig, "input", "gpu", "--input 'gpu'", "choose one"),
        (TrainConfig, "model", "CNN", "--model 'CNN'", "choose one"),
        (TrainConfig, "epochs", "3", "--epochs '3' is not a whole number", "whole number"),
        (TrainConfig, "epochs", 2.0, "--epochs 2.0 is not a whole number", "whole number"),
        (TrainConfig, "epochs", True, "--epochs True is not a whole number", "whole number"),
        (TrainConfig, "learning_rate", None, "--learning-rate None", "give a number"),
        (TrainConfig, "flip", 1, "--flip 1 is not True or False", "True or False"),
        (TrainConfig, "data", Path("x"), "is not text", "give text"),
        (TrainConfig, "data_dir", "", "--data-dir '' is empty", "give a value"),
        (ConvertOptions, "classes", ("ant", ""), "--classes '' is empty", "give a value"),
        (TrainConfig, "devices", "2", "--devices '2' is not 'all' or a whole number", "'all'"),
        (TrainConfig, "widths", [4], "is not a tuple in which each is a whole", "a tuple"),
        (TrainConfig, "widths", (4.0,), "is not a tuple in which each is a whole", "a tuple"),
        (EvaluateOptions, "split", "vall", "--split 'vall'", "did you mean val?"),
        (PredictOptions, "fit", "pad", "--fit 'pad' is not one of", "choose one"),
        (ExportOptions, "format", "tflite", "--format 'tflite'", "choose one"),
        (ServeOptions, "port", "x", "--port 'x' is not a whole number", "number"),
        (ReportOptions, "output", 3, "--output 3 is not text or None", "text"),
        (ConvertOptions, "classes", "ant", "--classes 'ant' is not a tuple", "tuple"),
        (SummaryOptions, "optimizer", "newton", "--optimizer 'newton'", "choose one"),
        (CheckOptions, "image_size", "x", "--image-size 'x'", "whole number"),
    ],
)  # fmt: skip
def test_python_is_held_to_the_same_as_the_command_line(
    options: type, name: str, value: object, what: str, fix: str
) -> None:
    """Or another run than the one asked for is trained, and its config cannot be read again."""
    required = {f.name: "x" for f in dataclasses.fields(options) if f.default is REQUIRED}
    with pytest.raises(CifarJaxError) as caught:
        options(**{**required, name: value})
    message, cure = str(caught.value).split("Fix:")
    assert what in message
    assert fix in cure
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    "options",
    [
        *(TrainConfig, CheckOptions, ConvertOptions, EvaluateOptions, ExportOptions),
        *(PredictOptions, ReportOptions, ServeOptions, SummaryOptions),
    ],
)
def test_help_has_each_heading_once(options: type) -> None:
    text = make_parser(options, prog="x", description="").format_help()
    headings = [line for line in text.splitlines() if re.fullmatch(r"\S.*:", line)]
    assert len(set(headings)) == len(headings)
    assert "options:" in headings


def test_numbers_of_numpy_are_numbers() -> None:
    rate = np.logspace(-3, -1, 3)[1]
    assert from_json(to_json(TrainConfig(learning_rate=rate)), where="").learning_rate == rate


def test_options_override_the_preset_that_they_name() -> None:
    assert parse("--preset", "tutorial").schedule == "constant"
    assert parse("--preset", "tutorial", "--crop", "3") == dataclasses.replace(
        PRESETS["tutorial"], crop=3
    )
    assert parse("--no-flip").flip is False
    assert parse("--devices", "all").devices == "all"
    assert parse("--widths", "4,8").widths == (4, 8)
    assert parse("--data=~/photos").data == str(Path.home() / "photos")


def test_the_names_of_a_list_are_stripped_and_not_paths() -> None:
    parser = make_parser(ConvertOptions, prog="convert", description="")
    assert parser.parse_given(["--classes", "ant, bee,~"]) == {"classes": ("ant", "bee", "~")}


def test_every_preset_has_the_name_it_is_listed_under() -> None:
    assert {name: preset.preset for name, preset in PRESETS.items()} == {n: n for n in PRESETS}
    assert tuple(PRESETS) == typing.get_args(config_module.PresetName)


def test_each_preset_is_the_default_but_for_what_it_is_known_for() -> None:
    default = to_json(PRESETS["default"])
    assert default == to_json(TrainConfig())
    own = {
        name: {n: v for n, v in to_json(preset).items() if v != default[n] and n != "preset"}
        for name, preset in PRESETS.items()
    }
    muon: dict[str, Any] = {"optimizer": "muon", "momentum": 0.6, "schedule": "linear"}
    assert own == {
        "default": {},
        "tutorial": {"learning_rate": 1e-3, "schedule": "constant", "flip": False, "crop": 0},
        "fast": {
            **muon, "model": "cnn-gap", "patch_size": 2, "batch_norm": True, "epochs": 3,
            "batch_size": 256, "learning_rate": 0.1, "label_smoothing": 0.1,
        },
        "airbench": {
            **muon, "model": "airbench", "epochs": 8, "batch_size": 2000, "learning_rate": 0.24,
            "label_smoothing": 0.2,
        },
    }  # fmt: skip


def test_no_number_is_below_zero_and_no_share_is_all() -> None:
    hints = typing.get_type_hints(TrainConfig)
    shares = {"val_fraction", "dropout", "momentum", "label_smoothing"}
    numbers = {
        name for name, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}
    }
    assert shares | {"seed", "devices", "image_size", "widths", "crop"} < numbers
    for name, value in [(name, -1) for name in numbers] + [(name, 1) for name in shares]:
        number = float(value) if hints[name] is float else value
        given = (number,) if name in ("widths", "hidden") else number
        with pytest.raises(CifarJaxError, match=rf"^{flag(name)} {number} is out of range"):
            TrainConfig(**{name: given})


def test_a_bound_is_itself_allowed() -> None:
    for options in ({"image_size": 1}, {"image_size": 10_000}):
        assert SummaryOptions(**options).image_size == options["image_size"]


def test_a_preset_that_is_only_named_is_refused(tmp_path: Path) -> None:
    """Its options are another config: ``config.json`` would tell of a run that was not."""
    with pytest.raises(CifarJaxError, match=r"names preset 'fast'.*Fix: .*PRESETS\['fast'\]"):
        train.train_and_evaluate(TrainConfig(preset="fast", data="shapes"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for preset in PRESETS.values():
        config_module.check_preset(dataclasses.replace(preset, data="shapes", epochs=1))
    config_module.check_preset(parse("--preset", "fast", "--patch-size", "1", "--epochs", "1"))


def test_the_config_survives_json() -> None:
    config = TrainConfig(widths=(4, 8), data_dir="x", devices="all", learning_rate=0.1)
    assert from_json(to_json(config), where="a.json") == config
    assert from_json({"data_dir": ""}, where="a.json") == TrainConfig()  # as it was once written
    with pytest.raises(CifarJaxError, match=r"^a.json has 'epoch'.*did you mean epochs"):
        from_json({"epoch": 3}, where="a.json")


@pytest.mark.fault("A9", "A12")
def test_resume_may_change_where_a_run_is_but_not_what_it_computes() -> None:
    saved = TrainConfig()
    check_resumable(dataclasses.replace(saved, devices=2, data="elsewhere", resume=True), saved)
    with pytest.raises(CifarJaxError, match=r"--batch-size 64 \(was 128\), --learning-rate 0.1"):
        check_resumable(dataclasses.replace(saved, batch_size=64, learning_rate=0.1), saved)
    longer = {"epochs": saved.epochs + 1}
    with pytest.raises(CifarJaxError, match=r"--epochs 11 \(was 10\)"):
        check_resumable(dataclasses.replace(saved, **longer), saved)
    may_change = set()
    for field in dataclasses.fields(TrainConfig):
        other = copy.copy(saved)
        object.__setattr__(other, field.name, "another")
        with contextlib.suppress(CifarJaxError):
            check_resumable(other, saved)
            may_change.add(field.name)
    assert may_change == {
        "resume", "coordinator", "num_processes", "process_id", "data", "data_dir", "input",
        "cache_mb", "devices", "checkpoint_every", "tensorboard",
    }  # fmt: skip
    constant = dataclasses.replace(saved, schedule="constant")
    check_resumable(dataclasses.replace(constant, **longer), constant)


SLOW = ["jax", "tensorflow", "torch", "numpy", "matplotlib", "PIL", "onnx"]
SLOW += ["jinja2", "starlette", "uvicorn"]
WRONG = [
    ("train --epochs 0", "--epochs 0 is out of range"),
    ("train --resume", "--resume without --workdir"),
    ("train --workdir ''", "--workdir '' is empty"),
    ("train --initial-weights absent", "absent does not exist"),
    ("train --momentum 0.8", "--momentum with --optimizer adam"),
    ("evaluate --checkpoint absent", "absent does not exist"),
    ("predict --checkpoint absent a.png", "absent does not exist"),
    ("predict --checkpoint absent ''", "IMAGE '' is empty"),
    ("report ''", "WORKDIR '' is empty"),
    ("report .", ". holds no run"),
    ("serve", "required: --checkpoint"),
    ("serve --port x", "--port 'x'"),
    ("serve --checkpoint absent", "absent does not exist"),
    ("export --format onnx", "required: --checkpoint"),
    ("export --checkpoint run", "required: --format"),
    ("export --checkpoint run --format tflite", "'tflite' is not one of stablehlo, onnx"),
    ("export --checkpoint run --format onnx", "run.onnx exists"),
    ("export --checkpoint run --format onnx --output net.pth", "net.pth does not end in .onnx"),
    ("export --checkpoint run --format pth", "run does not exist"),
    ("convert . new", ". is neither a run's workdir nor a checkpoint"),
    ("convert a.pth", "required: DESTINATION"),
    ("convert a b --model vgg", "--model 'vgg' is not one of linear"),
    ("convert a.pth /", "/ exists"),
    ("summary --batch-size 0", "--batch-size 0 is out of range"),
    ("check_data . --image-size x", "--image-size 'x'"),
]


@pytest.mark.fault("B11")
def test_help_and_errors_import_nothing_slow(tmp_path: Path) -> None:
    program = """if True:
        import contextlib, importlib, io, json, shlex, sys
        from cifar_jax.errors import CifarJaxError
        lines, slow = json.load(sys.stdin)
        for line in lines:
            name, *argv = shlex.split(line)
            module = importlib.import_module(f"cifar_jax.{name}")
            if hasattr(module, "__path__"):
                module = importlib.import_module(f"cifar_jax.{name}.__main__")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                try:
                    module.main(argv)
                except SystemExit:
                    said = printed.getvalue()
                except CifarJaxError as error:
                    said = str(error)
            print(json.dumps([said, sorted(sys.modules.keys() & slow)]))
    """
    helped = [f"{command} --help" for command in COMMANDS]
    lines = [*helped, "train --version", *(line for line, _ in WRONG)]
    (tmp_path / "run.onnx").touch()
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([lines, SLOW]),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=tmp_path,
    )
    said = {}
    for line, answer in zip(lines, done.stdout.splitlines(), strict=True):
        said[line], imported = json.loads(answer)
        assert not imported, f"{line} imports {imported}"
    for line, what in WRONG:
        assert what in said[line]
        assert ". Fix: " in said[line]
    for line in helped:
        assert said[line].startswith(f"usage: python -m cifar_jax.{line.split()[0]} ")
    assert "--learning-rate X" in said["train --help"]
    assert "[images; at least 1; default 128]" in said["train --help"]
    assert "[above 0; default 0.003]" in said["train --help"]
    assert "python -m cifar_jax.convert cifar10-cnn.pth" in said["convert --help"]
    assert "python -m cifar_jax.export --checkpoint" in said["export --help"]


def test_data_that_cannot_be_trained_on_is_said_before_jax_starts(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    program = """if True:
        import sys
        from cifar_jax.errors import CifarJaxError
        from cifar_jax.train import main
        for options in (["empty"], ["absent"], ["shapes", "--image-size", "16"]):
            try:
                main(["--data", *options])
            except CifarJaxError as error:
                print(error, {"jax", "tensorflow"} & sys.modules.keys())
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    empty, absent, resized = done.stdout.splitlines()
    assert "empty holds 0 class folder(s)" in empty
    assert "--data absent does not exist" in absent
    assert "--image-size 16 with --data shapes, whose images are 32x32" in resized
    assert all(line.endswith(". set()") for line in (empty, absent, resized))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"], "no runs/ without a run"


def test_a_command_ends_in_one_line_and_its_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cifar_jax.train", "--batch-size", "many"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == ExitCode.USAGE
    assert done.stderr == (
        "cifar_jax: error: --batch-size 'many' is not a whole number. Fix: give a whole number.\n"
    )


def test_a_command_whose_reader_has_read_enough_ends_without_a_word() -> None:
    """As `| head` has; a shell says the same of other commands."""
    program = "from cifar_jax import cli\ndef main():\n    while True: print('y')\ncli.run(main)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        assert command.stdout.readline() == "y\n"
        command.stdout.close()
        assert command.wait(timeout=30) == 128 + signal.SIGPIPE
        assert command.stderr.read() == ""


def test_a_command_whose_input_and_output_are_closed_does_its_work(tmp_path: Path) -> None:
    """And no file that it opens takes their place."""
    program = """if True:
        import os, sys
        from cifar_jax import cli
        def main():
            print("a word", sys.stdin.read())
            with open(sys.argv[1], "w") as file:
                os.write(1, b"as C++ prints")
                file.write("work")
        cli.run(main)
    """
    command = f"{sys.executable} -c {shlex.quote(program)} {tmp_path}/file <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command]).returncode == 0
    assert (tmp_path / "file").read_text() == "work"


def test_the_package_lists_its_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cifar_jax"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "python -m cifar_jax.train " in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("1 / 0", ExitCode.BUG, "a bug of this program: ZeroDivisionError: division by zero"),
        ("open('/no/such')", ExitCode.ENVIRONMENT, "No such file or directory: '/no/such'"),
        ("bytearray(2**62)", ExitCode.ENVIRONMENT, "out of memory"),
    ],
)
def test_errors_that_no_one_foresaw_are_one_line_too(error: str, code: ExitCode, said: str) -> None:
    program = f"from cifar_jax import cli\ndef main():\n    {error}\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    if code == ExitCode.BUG:
        file = Path(done.stderr.split("traceback in ")[1].removesuffix(".\n"))
        assert "ZeroDivisionError" in file.read_text()
        file.unlink()
    command = [sys.executable, "-c", program, "--debug"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" in done.stderr
    for file in re.findall(r"/\S*cifar_jax-\S*[.]txt", done.stderr):
        Path(file).unlink()


@pytest.mark.fault("A4")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_not_lost_where_python_ignores_exceptions(signum: signal.Signals) -> None:
    program = f"""if True:
        import signal, time
        from cifar_jax import cli
        class Unlucky:
            def __del__(self):
                signal.raise_signal({int(signum)})
        def main():
            Unlucky()
            time.sleep(60)
        cli.run(main)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 128 + signum
    assert done.stderr.startswith(f"cifar_jax: stopped by {signum.name}")
    assert done.stderr.count("\n") == 1


@pytest.mark.fault("A4")
@pytest.mark.parametrize(
    ("end", "status", "last_words"),
    [
        ("", 0, ""),
        ("raise KeyboardInterrupt", 130, "cifar_jax: stopped by SIGINT\n"),
        ("raise SystemExit(2)", 2, ""),
        ("raise SystemExit('why')", 1, "why\n"),
    ],
)
def test_a_crash_while_python_is_taken_apart_changes_nothing(
    end: str, status: int, last_words: str
) -> None:
    """As threads of JAX do that are still at work."""
    program = f"""if True:
        import os
        from cifar_jax import cli
        class Crash:
            def __del__(self, abort=os.abort):
                abort()
        crash = Crash()
        def main():
            print("done")
            {end}
        cli.run(main)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "done\n", last_words)


def test_what_python_ignores_is_shown_with_debug_alone() -> None:
    program = """if True:
        from cifar_jax import cli
        class Unlucky:
            def __del__(self):
                raise RuntimeError("unlucky")
        def main():
            Unlucky()
        cli.run(main)
    """
    for options, shown in (([], False), (["--debug"], True)):
        command = [sys.executable, "-c", program, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0
        assert ("RuntimeError: unlucky" in done.stderr) == bool(done.stderr) == shown


@pytest.mark.fault("D20")
@pytest.mark.parametrize(
    "values",
    [
        {"epochs": "many"}, {"epochs": True}, {"epochs": 1.5}, {"epochs": None}, {"widths": 3},
        {"widths": [[1]]}, {"model": 3}, {"model": "vgg"}, {"flip": 1}, {"devices": "some"},
        {"data": ["a"]}, {"learning_rate": "0.1"}, {"epochs": 0}, {"learning_rate": float("nan")},
        [], "epochs",
    ],
)  # fmt: skip
def test_a_config_file_of_other_types_is_refused(values: typing.Any) -> None:
    with pytest.raises(CifarJaxError) as caught:
        from_json(values, where="a.json")
    assert caught.value.exit_code == ExitCode.USAGE
    assert str(caught.value).startswith("a.json ")
    assert str(caught.value).count("Fix:") == 1
