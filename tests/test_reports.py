"""`summary` and `count_parameters` from Python, which the command prints."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import scconv_jax
from scconv_jax.cli import main

MODEL = scconv_jax.models.ResNet(scconv_jax.models.BasicBlock, (1, 1), planes=(4, 8), output_stride=8, num_classes=3)


@pytest.fixture(scope="module")
def variables():
    return jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))


def test_parameters_of_a_name_a_network_and_variables(variables):
    number = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert scconv_jax.count_parameters(MODEL) == number
    assert scconv_jax.count_parameters(variables) == scconv_jax.count_parameters(variables["params"]) == number
    assert scconv_jax.count_parameters("resnet20_small") == scconv_jax.model_info("resnet20_small").parameters == 220_378
    assert scconv_jax.count_parameters("resnet20_small", num_classes=0) == 220_378 - 257 * 10
    assert scconv_jax.count_parameters(nn.Dense(3).init(jax.random.key(0), jnp.zeros((1, 2)))) == 9


def test_a_summary_holds_and_prints_the_parts():
    found = scconv_jax.summary(MODEL, 32, depth=1)
    assert [part.name for part in found.parts] == ["conv1", "bn1", "layer1", "layer2", "fc"]
    assert found.total.parameters == scconv_jax.count_parameters(MODEL)
    assert found == scconv_jax.summary(MODEL, (32, 32), depth=1)
    lines = str(found).splitlines()
    assert lines[0] == "ResNet, 32×32 px"
    assert lines[1].split() == ["part", "kind", "output", "parameters", "share", "multiply-adds", "share"]
    assert re.split(r"  +", lines[3].strip())[:4] == ["conv1", "Conv", "16×16×64", "9,408"]
    assert lines[-1].startswith("total")
    assert repr(found) == str(found)
    assert len({len(line) for line in lines[2:-1]}) == 1, "columns are aligned"


def test_the_command_prints_the_same_numbers(capsys):
    assert main(["summary", "resnet20_small", "--depth", "1", "--num-classes", "0", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = scconv_jax.summary("resnet20_small", depth=1, num_classes=0)
    assert printed["size"] == 32
    assert [(part["name"], part["parameters"]) for part in printed["parts"]] == [
        (part.name, part.parameters) for part in (*found.parts, found.total)
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("scnet5",), {}, "There is no model 'scnet5'. Did you mean 'scnet50'"),
        ((MODEL,), {"num_classes": 3}, "num_classes: a module already has its options."),
        ((MODEL, 0), {}, "height=0 must be one positive integer."),
        ((MODEL,), {"depth": 0}, "depth=0 must be one positive integer."),
    ],
)
def test_what_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        scconv_jax.summary(*arguments, **options)
