"""The profile of a program: every moment counted once, every convolution and matmul with its direction and its multiply-adds."""

import pytest

from benchmarks.profile import instructions, kernel_shapes, shares

TEXT = """HloModule jit_step

FileNames
1 "/x/site-packages/optax/update.py"

FunctionNames
1 "apply"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=2 end_column=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%fused_computation.1 (a: f32[2,8,8,3], k: f32[3,3,3,5]) -> f32[2,8,8,5] {
  %a = f32[2,8,8,3]{3,2,1,0} parameter(0)
  %k = f32[3,3,3,5]{3,2,1,0} parameter(1)
  ROOT %c = f32[2,8,8,5]{3,2,1,0} convolution(%a, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}

ENTRY %main (a: f32[2,8,8,3]) -> f32[2,8,8,5] {
  %a = f32[2,8,8,3]{3,2,1,0} parameter(0)
  %k = f32[3,3,3,5]{3,2,1,0} parameter(1)
  %x = f32[128,3]{1,0} bitcast(%a)
  %g = f32[128,5]{1,0} parameter(2)
  %conv.1 = f32[2,8,8,5]{3,2,1,0} fusion(%a, %k), calls=%fused_computation.1, metadata={op_name="jvp(Net)"}
  %dot.1 = f32[3,5]{1,0} dot(%x, %g), lhs_contracting_dims={0}, metadata={op_name="transpose(jvp(Net))"}
  %add.1 = f32[3,5]{1,0} add(%dot.1, %dot.1), metadata={op_name="jit(step)/add" stack_frame_id=1}
}
"""


def test_moments_are_shared_by_the_instructions_that_run_in_them():
    found = shares([(0, 100, ""), (10, 50, "a"), (30, 50, "b"), (60, 70, "a")])
    assert {name: pytest.approx(1e9 * seconds) for name, seconds in found.items()} == {"": 50, "a": 40, "b": 10}


def test_instructions_have_kind_source_and_multiply_adds():
    class Kernel:
        def __init__(self, *shape):
            self.shape, self.ndim = shape, len(shape)

    assert kernel_shapes([Kernel(1, 1, 3, 5), Kernel(3, 3, 3, 5), Kernel(5)]) == {
        (1, 1, 3, 5), (3, 1, 1, 5), (3, 5), (3, 3, 3, 5), (3, 3, 3, 5),
    }  # fmt: skip
    found = instructions(TEXT, {(3, 5), (3, 3, 3, 5)})
    assert found["conv.1"][::2] == ("convolution, forward", 2 * 8 * 8 * 5 * 27)
    assert found["dot.1"][::2] == ("matmul, weight gradient", 3 * 5 * 128)
    assert found["add.1"] == ("optimizer", "optax/update.py:7 apply", 0)
