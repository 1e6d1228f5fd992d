"""Config files of one's own, and what a script says: one line for a mistake, events beside the bar."""

import logging
import sys

import pytest
from tqdm import tqdm

from clip_jax import cli, options
from clip_jax.errors import UserError
from clip_jax.models import OPENAI_MODELS
from clip_jax.training.config import RunConfig

HEAD = "from ml_collections import ConfigDict\n\n\ndef get_config():\n"


@pytest.fixture
def own(tmp_path):
    def write(body):
        path = tmp_path / "mine.py"
        path.write_text(HEAD + f"    {body}\n")
        return str(path)

    return write


def test_a_config_of_ones_own_is_short(own):
    config = cli.load_config(own("return ConfigDict({'name': 'mine', 'model': 'ViT-B/32', 'batch_size': 64})"))
    assert config == RunConfig("mine", OPENAI_MODELS["ViT-B/32"], batch_size=64)
    wider = cli.load_config("vit_b32", {"model.logit_bias": "true", "model.vision.layers": "3"})
    assert wider.model.logit_bias and wider.model.vision.layers == 3 and wider.model.vision.width == 768


def test_every_config_is_complete_and_every_option_has_its_line():
    for name in cli.config_names():
        config = cli.load_config(name)
        assert options.from_dict(RunConfig, options.to_dict(config), name) == config
    assert [name for name, item in options.walk(RunConfig) if not item.metadata.get("help")] == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return ConfigDict({'name': 'mine'})", "mine.py needs a value for model: the architecture"),
        (
            "return ConfigDict({'name': 'm', 'model': 'RN50', 'sed': 1})",
            "mine.py has no field 'sed'; did you mean seed",
        ),
        ("return {'name': 'mine'}", r"mine.py: get_config\(\) must return an ml_collections.ConfigDict, got {'name'"),
        ("return ConfigDict({'name': unknown})", r"mine.py:5: NameError: name 'unknown' is not defined"),
        ("return ConfigDict({'name'", r"mine.py:5: SyntaxError"),
        ("import none_such", r"mine.py:5: ModuleNotFoundError: No module named 'none_such'"),
        (
            "return ConfigDict({'name': 'm', 'model': 'RN51'})",
            "unknown model 'RN51'; expected its fields, or one of RN50",
        ),
    ],
)
def test_a_mistake_in_ones_own_config_is_one_line(own, body, message):
    with pytest.raises(UserError, match=message):
        cli.load_config(own(body))


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("optimizer.learning_rate", "-1e-4", "optimizer.learning_rate must be above 0, got -0.0001"),
        ("optimizer.learning_rate", "0", "optimizer.learning_rate must be above 0"),
        ("optimizer.b1", "1", "optimizer.b1 must be at least 0 and below 1"),
        ("optimizer.eps", "0", "optimizer.eps must be above 0"),
        ("optimizer.weight_decay", "-1", "optimizer.weight_decay must be at least 0"),
        ("optimizer.mu_dtype", "int8", "optimizer.mu_dtype must be one of float32, bfloat16"),
        ("mesh.rules", "{'embed': 'nope'}", "mesh.rules.embed must be some of data, fsdp, tensor; got 'nope'"),
        ("mesh.rules", "{'embd': 'data'}", "mesh.rules has no logical axis 'embd'"),
        ("mesh.rules.embed", "3", "mesh.rules.embed must be some of data, fsdp, tensor"),
        ("data", "{'folder': 3}", "data.folder must be of type mapping"),
    ],
)
def test_values_out_of_range_are_refused(field, text, message):
    with pytest.raises(UserError, match=message):
        cli.load_config("demo", {field: text})


def test_neither_events_nor_the_error_break_the_bar(capsys, monkeypatch, quiet_again):
    def main(argv):
        bar = tqdm(total=3, desc="training", file=sys.stderr, mininterval=0)
        for step in range(3):
            bar.update()
            logging.getLogger("clip_jax.training").info("step %d", step)
            if step == 1:
                raise UserError("an image\nis damaged")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert ended.value.code == 2
    assert "step 0" in lines and "step 1" in lines
    assert lines[-2:] == ["error: an image is damaged", ""]
