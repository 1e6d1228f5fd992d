"""The scripts as a user calls them: mistakes give one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import evaluate
import train
from clip_jax import cli

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train.py": train, "evaluate.py": evaluate}


def call(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def call_here(monkeypatch, capsys, quiet_again):
    """Call a script as its last line does, but in this process; gives its exit code and what it said."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(SCRIPTS[script].main)
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def other_workdir(tmp_path_factory):
    """A workdir that holds a finished run of a one-layer model."""
    workdir = tmp_path_factory.mktemp("other") / "run"
    small = {"vision.layers": 1, "vision.width": 32, "vision.mlp_width": 32, "text.width": 32, "text.layers": 1}
    model = [f"--config.model.{field}={value}" for field, value in {**small, "text.heads": 2}.items()]
    done = call("train.py", "--config", "demo", "--workdir", workdir, "--config.total_steps=2", *model,
                "--config.optimizer.warmup_steps=1", "--config.batch_size=8", "--config.data={'digits': {}}",
                "--config.eval_datasets=digits")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "convert_torch_weights.py"])
def test_help_is_complete(script):
    done = call(script, "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout and len(done.stdout.splitlines()) > 8


def mistakes():
    train, evaluate = ("train.py", "--workdir", "{tmp}/run"), ("evaluate.py", "--weights", "{tmp}/none")
    return {
        "unknown config": ((*train, "--config", "vit_b31"), "unknown config 'vit_b31'; expected a path or one of demo"),
        "misspelt override": ((*train, "--config", "demo", "--config.optimzer.learning_rate=1"),
                              "did you mean optimizer.learning_rate"),
        "override of a wrong type": ((*train, "--config", "demo", "--config.batch_size=many"), "must be of type int"),
        "no workdir": (("train.py", "--config", "demo"), "expected --workdir"),
        "missing folder": ((*train, "--config", "vit_b32", "--config.data.folder.path={tmp}/none"), "{tmp}/none"),
        "empty folder": ((*train, "--config", "vit_b32", "--config.data.folder.path={tmp}/empty"), "no image"),
        "evaluation of a missing folder": ((*evaluate, "--config", "demo", "--datasets", "{tmp}/none"), "{tmp}/none"),
        "evaluation of an empty folder": ((*evaluate, "--config", "demo", "--datasets", "{tmp}/empty"), "{tmp}/empty"),
        "missing weights": ((*evaluate, "--config", "demo", "--datasets", "digits"), "{tmp}/none"),
        "a class name that does not fit": (("evaluate.py", "--weights", "{other}", "--datasets", "{tmp}/long"),
                                           "tokens"),
        "neither weights nor config": (("evaluate.py", "--datasets", "digits"), "expected --weights W, or --config"),
        "results into a folder": (("evaluate.py", "--weights", "{other}", "--datasets", "digits", "--output", "{tmp}"),
                                  "cannot write {tmp}: it is a folder"),
        "a workdir that is a step": (("train.py", "--config", "demo", "--workdir", "{other}/checkpoints/2"),
                                     "names a model, not the workdir of a run"),
        "weights without data sets": (("evaluate.py", "--weights", "{other}"), "expected --datasets A,B,C"),
        "a task without what it needs": (("evaluate.py", "--weights", "{other}", "--datasets", "{tmp}/long",
                                          "--tasks", "zeroshot,retrieval"), "long has no captions, which retrieval"),
        "an override without a config": (("evaluate.py", "--weights", "{other}", "--config.dtype=bfloat16"),
                                         "give --config NAME too"),
        "a checkpoint of another model": (("evaluate.py", "--weights", "{other}", "--config", "demo",
                                           "--datasets", "digits"), "holds another model than the config demo: its"),
        "a workdir of another run": (("train.py", "--workdir", "{other}", "--config", "demo"), "holds a run with"),
        "no official weights": (("evaluate.py", "--config", "demo"), "--weights runs/demo"),
        "unknown topology": (("train.py", "--config", "vit_b32", "--plan", "v9-8"), "v9-8"),
        "half a cluster": ((*train, "--config", "demo", "--processes", "2"), "all three or none"),
    }  # fmt: skip


@pytest.mark.parametrize("name", mistakes())
def test_a_mistake_gives_one_line_and_exit_code_2(name, tmp_path, other_workdir, call_here):
    (tmp_path / "empty").mkdir()
    class_name = tmp_path / "long" / " ".join(["word"] * 30)
    class_name.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(class_name / "one.png")
    arguments, message = mistakes()[name]
    places = {"tmp": tmp_path, "other": other_workdir}
    code, said = call_here(*(argument.format(**places) for argument in arguments))
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2, said
    assert len(errors) == 1 and message.format(**places) in errors[0], said
    assert "Traceback" not in said


def test_a_mistake_ends_the_process_so(tmp_path):
    for script, *flags in (("train.py", "--config", "vit_b31"), ("evaluate.py", "--weights", tmp_path)):
        done = call(script, *flags)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_without_the_requirements_a_script_says_how_it_is_called():
    for script in ("train.py", "evaluate.py", "convert_torch_weights.py"):
        done = call("-S", script, "--help")  # without site-packages
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"call .venv/bin/python {script}" in done.stderr


def test_the_library_needs_neither_tensorflow_nor_torch():
    program = "import sys, clip_jax; print([m for m in ('tensorflow', 'torch', 'clip') if m in sys.modules])"
    assert call("-c", program).stdout.strip() == "[]"
