"""What is counted, and the papers' tables beside it; the command line that prints them."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from scconv_jax import create_model, list_models
from scconv_jax.cli import main
from scconv_jax.models.complexity import multiply_adds, summarise
from scconv_jax.models.published import ROWS


@pytest.mark.parametrize("name", ["scnet20_small", "scconv_resnet20_small", "ghost_resnet56_small"])
@pytest.mark.parametrize("depth", [1, 2, 9])
def test_parts_add_up_to_the_whole(name, depth):
    model = create_model(name)
    parts = summarise(model, (32, 32), depth)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert sum(part.parameters for part in parts) == sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    assert sum(part.multiply_adds for part in parts) == multiply_adds(model, (32, 32))
    assert len({part.name for part in parts}) == len(parts)


def test_multiply_adds_by_hand():
    """The first convolution and its norm: 3·3·3·16 and 16 for each of 32² pixels; the last layer: 256·10."""
    parts = {part.name: part for part in summarise(create_model("resnet20_small"), (32, 32))}
    assert parts["conv1"].multiply_adds == 27 * 16 * 32 * 32
    assert parts["bn1"].multiply_adds == 16 * 32 * 32
    assert parts["fc"].multiply_adds == 2560
    assert parts["fc"].parameters == 2570
    # 1×1, 3×3, 1×1 and the shortcut, on 32² pixels, with their norms
    block = 16 * 16 + 9 * 16 * 16 + 16 * 64 + 16 * 64 + 16 + 16 + 64 + 64
    assert parts["layer1/0"].multiply_adds == block * 32 * 32


def test_scconv_is_counted_as_the_paper_writes_it():
    """Eq. 11 for each pixel, and the norms': what is computed in another form is not counted in it."""
    inner = {part.name: part for part in summarise(create_model("scconv_resnet20_small"), (32, 32), depth=4)}
    assert inner["layer1/0/conv2/CRU"].multiply_adds == 1.8125 * 16**2 * 32**2
    assert inner["layer1/0/conv2/SRU"].multiply_adds == 16 * 32**2


def test_summary_of_one_network(capsys):
    assert main(["summary", "scnet20_small", "--json", "--num-classes", "7"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["size"] == 32
    assert record["parts"][-1]["name"] == "total"
    assert record["parts"][-1]["parameters"] == 220_826 - 3 * 257
    assert main(["summary", "scnet20_small"]) == 0
    table = capsys.readouterr().out
    assert "layer3/1" in table
    assert "220,826" in table


def test_the_papers_tables(capsys):
    assert main(["summary", "--all", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == len(ROWS)
    for record in records:
        assert abs(record["parameters_percent"]) <= record["margins_percent"][0], record
        assert abs(record["multiply_adds_percent"]) <= record["margins_percent"][1], record


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "scnet5"], "There is no model 'scnet5'. Did you mean 'scnet50'"),
        (["summary", "scnet50", "--output-stride", "4"], "output_stride=4 cannot be had from this network; it has 32"),
        (["summary", "scnet50", "--size", "96"], "This network needs images of at least 97×97 px; got 96×96."),
        (["summary", "scnet50", "--depth", "0"], "--depth 0 must be 1 or more"),
        (["summary", "scnet50", "--size", "0"], "--size 0 must be 1 or more"),
        (["summary", "scnet50", "--num-classes", "-2"], "num_classes=-2: a network has at least one class."),
        (["summary", "--all", "scnet50"], "--all shows both papers' tables as they stand; leave it out, or MODEL."),
        (["summary", "--all", "--num-classes", "7"], "leave it out, or --num-classes."),
        (["summary", "wrn28_10_small", "--output-stride", "8"], "has no option 'output_stride'."),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("scconv-jax: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_the_names_as_json(capsys):
    assert main(["summary", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == list_models()


def test_as_a_program():
    run = subprocess.run([sys.executable, "-m", "scconv_jax", "summary"], capture_output=True, text=True, check=True)
    assert "scnet50\n" in run.stdout
