"""Counts of parameters and multiply-adds, the papers' tables, and the command `summary`."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from scconv_jax import create_model, list_models
from scconv_jax.cli import main
from scconv_jax.models.complexity import multiply_adds, summarise
from scconv_jax.models.registry import MODELS

# A network repeats the calls of its layers; `test_layers*` and `test_networks_equivalence` check their shape annotations.
pytestmark = pytest.mark.usefixtures("unchecked")


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


@pytest.mark.parametrize(("name", "size"), [("scnet20_small", 32), ("wrn28_10_small", 32), ("ghostnet_100", 224)])
def test_the_default_size_is_the_one_that_the_network_was_designed_for(name, size):
    model = create_model(name)
    assert multiply_adds(model) == multiply_adds(model, (size, size))


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
    """Eq. 11 and the norm for each pixel, although another form may run."""
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
    assert len(records) == sum(len(spec.rows) for spec in MODELS.values()) == 24
    for record in records:
        assert abs(record["parameters_percent"]) <= record["margins_percent"][0], record
        assert abs(record["multiply_adds_percent"]) <= record["margins_percent"][1], record


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "scnet5"], "There is no model 'scnet5'. Did you mean 'scnet50'"),
        (
            ["summary", "scnet50", "--output-stride", "4"],
            "output_stride=4 is not possible for this network. It can be 32, or with dilation 16 or 8.",
        ),
        (["summary", "scnet50", "--size", "96"], "This network needs images of at least 97×97 px; got 96×96."),
        (["summary", "scnet50", "--depth", "0"], "--depth 0 must be 1 or more"),
        (["summary", "scnet50", "--size", "0"], "--size 0 must be 1 or more"),
        (["summary", "scnet50", "--num-classes", "-2"], "num_classes=-2 must be 0, for no head, or a positive integer."),
        (["summary", "--all", "scnet50"], "--all shows all networks as they are and cannot be combined with MODEL."),
        (["summary", "--all", "--num-classes", "7"], "cannot be combined with --num-classes."),
        (["summary", "--markdown", "--json"], "--markdown shows all networks as they are and cannot be combined with --json."),
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


@pytest.mark.slow
def test_the_page_of_all_networks_is_up_to_date(capsys):
    """`python -m scconv_jax summary --markdown > docs/networks.md` writes it."""
    assert main(["summary", "--markdown"]) == 0
    page = Path(__file__).parents[2] / "docs" / "networks.md"
    assert capsys.readouterr().out == page.read_text(encoding="utf-8")


def test_as_a_program():
    run = subprocess.run([sys.executable, "-m", "scconv_jax", "summary"], capture_output=True, text=True, check=True)
    assert "scnet50\n" in run.stdout
