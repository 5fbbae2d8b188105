"""Shape annotations: the tests check each call against them; users neither need jaxtyping nor pay for a check."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from scconv_jax import functional as F
from scconv_jax import layers


def test_a_function_called_with_a_wrong_shape():
    with pytest.raises(jaxtyping.TypeCheckError, match="x"):
        F.avg_pool(jnp.zeros((8, 8, 4)), 2)


def test_a_function_called_with_whole_numbers():
    with pytest.raises(jaxtyping.TypeCheckError, match="x"):
        F.avg_pool(jnp.zeros((1, 8, 8, 4), jnp.int32), 2)


def test_two_shapes_that_do_not_fit_each_other():
    x = jnp.zeros((1, 8, 8, 4))
    with pytest.raises(jaxtyping.TypeCheckError, match="gamma"):
        F.spatial_reconstruction(x, jnp.ones(3), jnp.zeros(4), groups=1)


@pytest.mark.parametrize(("layer", "options"), [(layers.ScConv, {}), (layers.SelfCalibratedConv, {"train": False})])
def test_a_layer_called_with_a_wrong_shape(layer, options):
    with pytest.raises(jaxtyping.TypeCheckError, match="x"):
        layer(8).init(jax.random.key(0), jnp.zeros((8, 8, 8)), **options)


def test_users_get_plain_arrays():
    program = (
        "import sys, typing, jax, scconv_jax\n"
        "assert 'jaxtyping' not in sys.modules and 'beartype' not in sys.modules\n"
        "assert typing.get_type_hints(scconv_jax.functional.conv)['x'] is jax.Array\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
