"""Which network a checkpoint is of."""

import jax
import numpy as np
import pytest

from scconv_jax import create_model, list_models, model_info
from scconv_jax.interop import conventions
from scconv_jax.interop.conversion import shapes
from scconv_jax.interop.recognition import _traced, head, recognise, template

# A network repeats the calls of its layers; `test_layers*` and `test_networks_equivalence` check their shape annotations.
pytestmark = pytest.mark.usefixtures("unchecked")


def entries_of(name, **options):
    """Names and shapes of a checkpoint, at no cost."""
    found = shapes(template(create_model(name, **options)))
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in found.items()}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("scnet50_v1d", (3, 1, 4, 2)),
        ("scconv_resnet56_small", (4, 1, 1)),
        ("ghost_resnet50", (1, 3, 1, 1)),
        ("wrn28_10_small", None),
    ],
)
def test_the_short_way_to_shapes_gives_the_shapes(name, sizes):
    model = create_model(name, num_classes=7)
    model = model if sizes is None else model.clone(stage_sizes=sizes)
    assert jax.tree.structure(template(model)) == jax.tree.structure(_traced(model))
    assert jax.tree.leaves(template(model)) == jax.tree.leaves(_traced(model))


SLOW = [name for name in list_models() if any(part in name for part in ("densenet", "ghostnet", "101"))]  # they trace slowly


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in list_models()])
def test_every_network_is_recognised(name):
    found = recognise(entries_of(name, num_classes=7))
    assert found is not None
    assert found.model == name
    assert found.options["num_classes"] == 7


@pytest.mark.parametrize("name", [name for name in list_models() if name not in SLOW])
def test_the_record_names_the_key_convention(name):
    conventions_of = model_info(name).conventions or ("own",)
    own = "ghostnet_100_pytorchcv"  # its keys here are those of GhostNet's authors
    assert conventions.identify(entries_of(name)).name == conventions_of[0] or name == own


def test_every_convention_of_a_record_exists():
    known = {found.name for found in conventions.CONVENTIONS}
    assert {name for spec in map(model_info, list_models()) for name in spec.conventions} <= known


@pytest.mark.parametrize(("alpha", "variant"), [(0.75, "2023-10"), (0.5, "2023-07"), (0.5, "2023-09")])
def test_options_of_scconv_show(alpha, variant):
    found = recognise(entries_of("scconv_resnet20_small", alpha=alpha, variant=variant))
    assert found is not None
    assert found.model == "scconv_resnet20_small"
    assert found.options == {"alpha": alpha, "variant": variant, "num_classes": 10}


def test_without_its_head():
    entries = {name: value for name, value in entries_of("scnet20_small").items() if not name.startswith("fc.")}
    found = recognise(entries)
    assert found is not None
    assert (found.model, found.options) == ("scnet20_small", {})


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries.pop("layer3.1.bn3.bias"),
        lambda entries: entries.update({"layer1.0.conv3.weight": np.zeros((64, 8, 1, 1))}),
        lambda entries: entries.update({"layer1.2.conv3.weight": np.zeros((64, 16, 1, 1))}),
        lambda entries: entries.update({"layer1.0.se.fc.weight": np.zeros((4, 4, 1, 1))}),
        lambda entries: entries.update({"fc.2.weight": np.zeros((4, 4))}),
    ],
)
def test_what_differs_in_one_entry_is_not_recognised(change):
    entries = entries_of("scnet20_small")
    change(entries)
    assert recognise(entries) is None


def test_entries_beside_the_networks_modules_play_no_part():
    entries = entries_of("scnet20_small")
    found = recognise({**entries, "criterion.weight": np.zeros((4, 4)), "ema_model.conv1.weight": np.zeros((4, 4, 1, 1))})
    assert found is not None
    assert found.model == "scnet20_small"


def test_heads():
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, np.float32)

    dense, conv = {"kernel": shape(8, 3), "bias": shape(3)}, {"kernel": shape(3, 3, 8, 8)}
    assert head({"params": {"conv_head": conv, "classifier": dense}}) == "classifier"
    assert head({"params": {"conv1": conv, "blocks": {"0": {"fc": dense}}}}) is None
    assert head({"params": {"first": dense, "second": dense}}) is None
    assert head({"params": conv}) is None
