"""The reading and judging of compiled programs (`benchmarks.compiled`), without XLA's compilers for GPUs and TPUs."""

import pytest
from flax import linen as nn

from benchmarks import compiled, compiled_report, hlo_text
from benchmarks.floor import floor_bytes
from scconv_jax.layers.core import ConvNorm

TEXT = """HloModule jit_step

%region (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (p0: bf16[4,8], p1: f32[8]) -> f32[8] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  %fusion.1 = (f32[8]{0}, bf16[4,8]{1,0}) fusion(%p0, %p1), kind=kLoop, calls=%f, metadata={op_name="jit(step)/layer1/mul"}
  %get-tuple-element.1 = f32[8]{0} get-tuple-element(%fusion.1), index=0
  %all-reduce-start = f32[8]{0} all-reduce-start(%get-tuple-element.1), to_apply=%region
  %all-reduce-done = f32[8]{0} all-reduce-done(%all-reduce-start)
  %copy.3 = f32[8]{0} copy(%all-reduce-done)
  ROOT %cudnn = f32[8]{0} custom-call(%copy.3), custom_call_target="__cudnn$conv"
}
"""


def test_the_figures_of_a_programs_text():
    figures = hlo_text.figures(TEXT, top=1)
    assert figures["kernels"] == 4
    assert figures["largest"] == [
        {"bytes": 64 + 32 + 32 + 64, "kind": "fusion", "result": "(f32[8]{0}, bf16[4,8]{1,0})", "source": "jit(step)/layer1/mul"}
    ]
    assert figures["kernel_bytes"] == 192 + 3 * 64
    assert (figures["moved_kernels"], figures["moved_bytes"]) == (1, 64)
    assert figures["bytes_by_kind"]["custom-call:__cudnn$conv"] == 64
    assert figures["collectives"] == {"count": 1, "bytes": 32}


FUSION = """\
%halves (param_0: bf16[4,8], param_1: f32[4,8]) -> f32[4,4] {
  %param_0 = bf16[4,8]{1,0} parameter(0)
  %convert.1 = f32[4,8]{1,0} convert(%param_0)
  %slice.1 = f32[4,4]{1,0} slice(%convert.1), slice={[0:4], [4:8]}
  %param_1 = f32[4,8]{1,0} parameter(1)
  %slice.2 = f32[4,4]{1,0} slice(%param_1), slice={[0:4], [0:4]}
  %reduce.1 = f32[4]{0} reduce(%param_1), dimensions={1}
  ROOT %add.1 = f32[4,4]{1,0} add(%slice.1, %slice.2)
}
"""


def test_of_an_operand_that_a_fusion_only_slices_the_slice_is_counted():
    """The second parameter is also summed, so it is read whole."""
    entry = (
        "ENTRY %main (a: bf16[4,8], b: f32[4,8]) -> f32[4,4] {\n"
        "  %a = bf16[4,8]{1,0} parameter(0)\n"
        "  %b = f32[4,8]{1,0} parameter(1)\n"
        "  ROOT %fusion = f32[4,4]{1,0} fusion(%a, %b), kind=kLoop, calls=%halves\n"
        "}\n"
    )
    [kernel] = hlo_text.kernels(FUSION + "\n" + entry)
    assert kernel.bytes == 4 * 8 * 2 // 2 + 4 * 8 * 4 + 4 * 4 * 4
    assert hlo_text.parts_read(FUSION) == {0: 0.5}


class TwoConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return ConvNorm(6, strides=2)(ConvNorm(4, relu=True)(x, train=train), train=train)


def test_the_least_bytes_by_hand():
    """A convolution of images, read and written twice, and a norm of eight passes over its output; then a second of each."""
    first = 2 * (8 * 8 * 3 + 8 * 8 * 4) + 8 * 8 * 8 * 4
    second = 3 * (8 * 8 * 4 + 4 * 4 * 6) + 8 * 4 * 4 * 6
    assert floor_bytes(TwoConvolutions(), images=5, size=8) == 2 * 5 * (first + second)


@pytest.mark.parametrize("name", compiled.NETWORKS)
def test_no_recorded_program_for_a_gpu_moves_less_than_the_least(name):
    programs = compiled.json.loads(compiled_report.DATA.read_text())["programs"]
    [found] = [
        program for program in programs if (program["target"], program["network"]) == ("h100", name) and not program["short"]
    ]
    if name == compiled.PLAIN:
        assert found["least_bytes"] is None
    else:
        assert 0.8 < found["least_bytes"] / compiled.traffic(found) <= 1


KNOWN = {"compiler": "jax-cuda12-plugin 1", "bytes": 1000, "collectives": 1}


def found(**changes):
    figures = {"target": "h100", "compiler": "jax-cuda12-plugin 1", "kernel_bytes": 1030, "collectives": {"count": 1}}
    return figures | changes


def test_a_program_as_recorded_passes():
    assert compiled.judge(found(), KNOWN) is None
    assert compiled.judge(found(kernel_bytes=5000, compiler="jax-cuda12-plugin 2"), KNOWN) is None, "another compiler"


@pytest.mark.parametrize(
    ("changes", "known", "message"),
    [
        ({"kernel_bytes": 1031}, KNOWN, "reads and writes 0.0 MB, recorded 0.0 MB"),
        ({"collectives": {"count": 2}}, KNOWN, "has 2 collectives, recorded 1"),
        ({"error": "exit code -6: Check failed"}, KNOWN, "does not compile: exit code -6: Check failed"),
        ({}, None, "is not in the record; run with --record-short"),
    ],
)
def test_a_program_that_differs_is_a_fault(changes, known, message):
    assert compiled.judge(found(**changes), known) == message


def test_an_abort_of_the_compiler_is_an_error_of_its_program_alone(monkeypatch):
    monkeypatch.setattr(compiled.sys, "executable", "/bin/sh")
    monkeypatch.setattr(compiled.json, "dumps", lambda _value: "x")
    result = compiled.in_a_process(compiled.Program("h100", "scnet50"))
    assert result["error"].startswith("exit code ")
    assert result["network"] == "scnet50"


def test_every_short_program_is_recorded_once():
    recorded = [
        compiled.Program(**entry["program"]) for entry in compiled.json.loads(compiled.SHORT_RECORD.read_text())["programs"]
    ]
    assert sorted(recorded, key=repr) == sorted(compiled.SHORT, key=repr)


def test_memory_by_batch_is_that_of_the_compiled_batch_and_grows_with_the_images_alone():
    image, weights, statistics, activations = 4 * 4 * 3 + 4, 1000, 10, 700
    entry = {"target": "h100", "network": "x", "size": 4, "batch": 8, "reduced_bytes": weights + statistics}
    entry |= {"arguments": 2 * weights + statistics + 8 * image, "temporaries": weights + 8 * activations}
    fixed, per_image = compiled_report.memory_parts(entry)
    assert (fixed, per_image) == (3 * weights + statistics, image + activations)
    assert fixed + 8 * per_image == entry["arguments"] + entry["temporaries"]


def test_the_recorded_report_is_that_of_the_record():
    entries = compiled.json.loads(compiled_report.DATA.read_text())["programs"]
    assert (compiled.RESULTS / "compiled.md").read_text() == compiled_report.page(entries)
