"""`Float` and `Array` for shape annotations, as in `Float[Array, "n h w c"]`.

The tests import jaxtyping before the library and check each call against its annotations. Otherwise `Float` is a placeholder:
jaxtyping is not needed, and nothing is checked.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Array, Float
else:
    from jax import Array

    class Float:
        """`Float[Array, "n h w c"]` is `Array`."""

        def __class_getitem__(cls, item):
            return item[0]


__all__ = ["Array", "Float"]
