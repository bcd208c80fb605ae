"""The estimate of a compiled program's time: sums made by hand for small programs."""

import re

import pytest
from conftest import ROOT

from lmscale_jax.model import flops
from lmscale_jax.train import gpu_report, hlo_text, roofline
from lmscale_jax.train.roofline_bytes import fusion_bytes

H100 = flops.CHIPS["H100"]
GPU = roofline.Gpu(H100, 132, 67e12)
# Bytes a second that a kernel reaches.
MEMORY = 3.35e12 * 0.8


def kernels_of(text: str) -> dict[str, roofline.TimedKernel]:
    program = hlo_text.parse_program(text)
    return {kernel.instruction.name: kernel for kernel in roofline.estimate_kernels(program, GPU)}


def bytes_of(computation: str) -> float:
    program = hlo_text.parse_program(f"{computation}\nENTRY %main () -> f32[] {{\n}}\n")
    return fusion_bytes(program.computations["fused"])


# 132 tiles of 128 x 256: one full wave.
PRODUCT = """
ENTRY %main (x: bf16[16896,4000], w: bf16[4000,256]) -> bf16[16896,256] {
  %x = bf16[16896,4000]{1,0} parameter(0)
  %w = bf16[4000,256]{1,0} parameter(1)
  ROOT %dot = bf16[16896,256]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_a_product_takes_its_flops_or_its_bytes():
    flops_ = 2 * 16896 * 4000 * 256
    kernel = kernels_of(PRODUCT)["dot"]
    assert kernel.flops == {"bf16": flops_}
    assert kernel.category == "dense"
    moved = 2 * (16896 * 4000 + 4000 * 256 + 16896 * 256)
    # The tensor cores would need 54 us of the 55.
    assert kernel.seconds == pytest.approx(moved / MEMORY)
    compute = flops_ / (989.4e12 * 0.8 * 4000 / 4128)
    assert compute < kernel.seconds
    # Twice as wide: two waves, and half the bytes for each operation.
    wide = kernels_of(PRODUCT.replace("256]", "512]"))["dot"]
    assert wide.seconds == pytest.approx(2 * compute)


def test_a_wave_that_is_hardly_filled_counts_whole():
    program = hlo_text.parse_program(PRODUCT.replace("16896", "17024"))
    (entry,) = program.computations.values()
    taller = roofline.product_seconds(entry["dot"], entry, GPU)
    program = hlo_text.parse_program(PRODUCT)
    (entry,) = program.computations.values()
    full = roofline.product_seconds(entry["dot"], entry, GPU)
    # 133 tiles of 128 x 256 would take two waves; tiles of 64 x 256 take 266/132, so three at 85 %
    # of the rate and half the size; of 128 x 128 they are 266 too, three at 90 %.
    assert taller == pytest.approx(full * 3 / 2 / 0.9)


def test_types_and_precision_set_the_rate():
    def seconds(text):
        program = hlo_text.parse_program(text)
        return roofline.product_seconds(
            program.computations["main"]["dot"], program.computations["main"], GPU
        )

    bf16 = seconds(PRODUCT)
    assert seconds(PRODUCT.replace("bf16", "f32")) == pytest.approx(2 * bf16)
    assert seconds(PRODUCT.replace("bf16", "f8e4m3fn")) == pytest.approx(bf16 / 2)
    exact = PRODUCT.replace("bf16", "f32").replace(
        "rhs_contracting_dims={0}", "rhs_contracting_dims={0}, operand_precision={highest,highest}"
    )
    assert seconds(exact) == pytest.approx(2 * 16896 * 4000 * 256 / (67e12 * 0.8))


def test_dimensions_of_a_batched_product_of_cublas():
    text = """
ENTRY %main (x: bf16[8,32,64], w: bf16[8,16,64]) -> bf16[8,32,16] {
  %x = bf16[8,32,64]{2,1,0} parameter(0)
  %w = bf16[8,16,64]{2,1,0} parameter(1)
  ROOT %dot = bf16[8,32,16]{2,1,0} custom-call(%x, %w), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
}
"""
    kernel = kernels_of(text)["dot"]
    program = hlo_text.parse_program(text)
    main = program.computations["main"]
    assert roofline.product_dims(main["dot"], main) == (8, 32, 16, 64)
    assert kernel.seconds == roofline.LAUNCH
    assert gpu_report.kernel_kind(kernel) == ("product bf16", "cuBLAS")


def test_a_fusion_reads_of_an_input_what_it_uses():
    # One layer of ten, cast.
    text = """%fused (p: f32[10,100,100], i: s32[]) -> bf16[1,100,100] {
  %p = f32[10,100,100]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,100,100]{2,1,0} dynamic-slice(%p, %i, %zero, %zero)
  ROOT %cast = bf16[1,100,100]{2,1,0} convert(%slice)
}"""
    assert bytes_of(text) == 4 * 10_000 + 4 + 2 * 10_000


def test_an_update_works_in_place():
    text = """%fused (p: f32[10,100], i: s32[], x: f32[100]) -> (f32[10,100], f32[100]) {
  %p = f32[10,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[100]{0} parameter(2)
  %zero = s32[] constant(0)
  %double = f32[100]{0} add(%x, %x)
  %row = f32[1,100]{1,0} bitcast(%double)
  %update = f32[10,100]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
  ROOT %both = (f32[10,100]{1,0}, f32[100]{0}) tuple(%update, %double)
}"""
    # Read x and i; write the row and the other output.
    assert bytes_of(text) == 400 + 4 + 400 + 400
    # An update that is computed with afterwards has to read the rest.
    behind = text.replace("tuple(%update, %double)", "tuple(%more, %double)").replace(
        "  ROOT", "  %more = f32[10,100]{1,0} negate(%update)\n  ROOT"
    )
    assert bytes_of(behind) == 4000 + 400 + 4 + 4000 + 400


def test_a_scatter_reads_and_writes_its_rows():
    text = """%fused (p: f32[1000,8], i: s32[5,1], x: f32[5,8]) -> f32[1000,8] {
  %p = f32[1000,8]{1,0} parameter(0)
  %i = s32[5,1]{1,0} parameter(1)
  %x = f32[5,8]{1,0} parameter(2)
  ROOT %new = f32[1000,8]{1,0} scatter(%p, %i, %x), to_apply=%sum
}"""
    assert bytes_of(text) == 20 + 160 + 2 * 160


GATHER = """
ENTRY %main (x: f32[{n}], y: f32[{work}]) -> f32[{n}] {
  %x = f32[{n}]{0} parameter(0)
  %y = f32[{work}]{0} parameter(1)
  %all-gather-start.1 = (f32[{n}]{0}, f32[{n}]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8]
  %work = f32[{work}]{0} negate(%y)
  ROOT %all-gather-done.1 = f32[{n}]{0} all-gather-done(%all-gather-start.1)
}
"""


def test_a_collective_is_hidden_by_the_work_until_its_end():
    n = 1_000_000
    # A ring of 8: each device sends its part of 4 MB on seven times, at 80 % of 450 GB/s.
    whole = 8e-6 + 7 * 4 * n / 450e9 / 0.8
    for work in (5_000_000, 100_000_000):
        text = GATHER.replace("{n}", f"{n}").replace("{work}", f"{work}")
        kernels = kernels_of(text)
        beside = 8 * work / MEMORY
        gather = kernels["all-gather-start.1"]
        assert kernels["work"].seconds == pytest.approx(beside)
        assert gather.hidden == pytest.approx(min(whole, beside))
        assert gather.seconds == pytest.approx(max(0, whole - beside), abs=1e-12)
        assert gather.bytes == 28 * n
    assert beside > whole


def test_a_collective_without_a_start_is_waited_for():
    text = """
ENTRY %main (x: f32[1000000]) -> f32[1000000] {
  %x = f32[1000000]{0} parameter(0)
  ROOT %all-reduce.3 = f32[1000000]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum
}
"""
    kernels = kernels_of(text)
    whole = 8e-6 + 2 * 4e6 / 2 / 450e9 / 0.8
    assert kernels["all-reduce.3"].seconds == pytest.approx(whole)
    rows = gpu_report.collective_rows(list(kernels.values()))
    waited = f"{whole * 1e3:.2f} ms"
    assert rows[1:] == [("all-reduce", "1", "0.004 GB", "0.00 ms", waited)]
    # Between two nodes: the pair's half goes over one network port of 50 GB/s.
    between = kernels_of(text.replace("{{0,1},{2,3}}", "{{0,8},{1,9}}"))["all-reduce.3"]
    assert between.seconds == pytest.approx(8e-6 + 2 * 4e6 / 2 / 50e9 / 0.8)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}, dimensions={0}", [0, 4]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", [0, 4]),
        ("dimensions={0}", [0]),
    ],
)
def test_groups_of_devices(text, group):
    assert roofline.replica_group(text) == group


def test_loops_count_their_turns_and_branches_the_slowest():
    text = """
%small (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  ROOT %minor = f32[1000]{0} negate(%a)
}

%large (b: f32[100000000]) -> f32[100000000] {
  %b = f32[100000000]{0} parameter(0)
  ROOT %major = f32[100000000]{0} negate(%b)
}

%body (s: f32[100000000]) -> f32[100000000] {
  %s = f32[100000000]{0} parameter(0)
  ROOT %turn = f32[100000000]{0} negate(%s)
}

ENTRY %main (x: f32[100000000], i: s32[]) -> f32[100000000] {
  %x = f32[100000000]{0} parameter(0)
  %i = s32[] parameter(1)
  %while.1 = f32[100000000]{0} while(%x), body=%body, config={"known_trip_count":{"n":"7"}}
  ROOT %choice = f32[100000000]{0} conditional(%i, %x, %x), branch_computations={%small, %large}
}
"""
    kernels = kernels_of(text)
    assert set(kernels) == {"turn", "major"}
    assert kernels["turn"].times == 7
    assert kernels["turn"].seconds == pytest.approx(7 * 8e8 / MEMORY)
    assert kernels["major"].seconds == pytest.approx(8e8 / MEMORY)
    assert roofline.unknown_loops(hlo_text.parse_program(text)) == 0
    unknown = text.replace("known_trip_count", "other")
    assert roofline.unknown_loops(hlo_text.parse_program(unknown)) == 1
    assert kernels_of(unknown)["turn"].times == 1


ATTENTION = """
ENTRY %main (q: bf16[32,512,12,64]) -> bf16[32,12,512,64] {
  %q = bf16[32,512,12,64]{3,2,1,0} parameter(0)
  ROOT %out = bf16[32,12,512,64]{3,1,2,0} custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", \
backend_config={"mask_type":"CAUSAL","sliding_window_length":0}
}
"""


def test_fused_attention_counts_the_keys_that_are_seen():
    kernel = kernels_of(ATTENTION)["out"]
    causal = 4 * 32 * 12 * 64 * 512 * 512 / 2
    assert kernel.flops == {"bf16": causal}
    assert kernel.category == "attention"
    assert kernel.seconds == pytest.approx(causal / (989.4e12 * 0.485 * 512 / (512 + 700)))
    assert gpu_report.kernel_kind(kernel) == ("attention forward", "cuDNN")
    window = ATTENTION.replace('length":0', 'length":128').replace("Softmax", "SoftmaxBackward")
    kernel = kernels_of(window)["out"]
    # 512 queries see 128 keys each, but for the first 128, which see half as many.
    assert kernel.flops == {"bf16": 10 * 32 * 12 * 64 * (512 * 128 - 128 * 128 / 2)}
    assert gpu_report.kernel_kind(kernel) == ("attention backward", "cuDNN")


TOKAMAX = r"""
ENTRY %main (q: bf16[8,8192,6,128], k: bf16[8,8192,6,128]) -> bf16[8,8192,6,128] {
  %q = bf16[8,8192,6,128]{3,2,1,0} parameter(0)
  %k = bf16[8,8192,6,128]{3,2,1,0} parameter(1)
  ROOT %out = (bf16[8,8192,6,128]{3,2,1,0}, f32[8,6,8192]{2,1,0}) custom-call(%q, %k, %k), \
custom_call_target="mosaic_gpu_v2", metadata={op_name="jvp(mean_keys_833)/tokamax:{\"op\":{\
\"__type\":\"FlashAttention\"},\"arguments\":{\"mask\":{\"is_causal\":true}}}/call"}
}
""".replace("\\\n", "")


def test_attention_by_ranges_counts_what_its_kernels_do():
    """Forward the keys of the window; backward all keys, or half of them if causal."""
    pair = 8 * 6 * 128 * 8192

    def flops(text):
        kernel = kernels_of(text)["out"]
        assert kernel.category == "attention"
        return kernel.flops, gpu_report.kernel_kind(kernel)

    assert flops(TOKAMAX) == ({"bf16": 4 * pair * 833}, ("attention forward", "tokamax, Mosaic"))
    causal = TOKAMAX.replace("mean_keys_833", "")
    assert flops(causal)[0] == {"bf16": 4 * pair * 4096}
    backward = TOKAMAX.replace("FlashAttention", "FlashAttentionVjp").replace("mosaic", "triton")
    assert flops(backward) == (
        {"bf16": 6 * pair * 4096}, ("attention backward", "tokamax, Triton")
    )  # fmt: skip
    both = backward.replace("f32[8,6,8192]", "bf16[8,8192,6,128]").replace("true", "false")
    assert flops(both)[0] == {"bf16": 8 * pair * 8192}


FRAMES = """HloModule step

FileNames
1 "/somewhere/lmscale_jax/train/step.py"
2 "/somewhere/lmscale_jax/model/loss.py"
3 "/somewhere/jax/_src/numpy.py"

FunctionNames
1 "train_step"
2 "cross_entropy"
3 "exp"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=2 function_name_id=2 line=2}
3 {file_name_id=3 function_name_id=3 line=3}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %loss = f32[8]{0} exponential(%x), metadata={op_name="jit(step)/jvp()/exp" stack_frame_id=3}
  %model = f32[8]{0} exponential(%x), metadata={op_name="jit(step)/jvp()/exp" stack_frame_id=1}
  %adam = f32[8]{0} exponential(%x), metadata={op_name="jit(step)/exp" stack_frame_id=1}
  %copy = f32[8]{0} copy(%x)
  ROOT %unknown = f32[8]{0} exponential(%x)
}
"""


def test_categories_come_from_source_frames():
    program = hlo_text.parse_program(FRAMES)
    assert program.frames[3] == (
        "/somewhere/jax/_src/numpy.py:exp",
        "/somewhere/lmscale_jax/model/loss.py:cross_entropy",
        "/somewhere/lmscale_jax/train/step.py:train_step",
    )
    categories = {name: kernel.category for name, kernel in kernels_of(FRAMES).items()}
    assert categories == {
        "loss": "loss",
        "model": "elementwise",
        "adam": "optimizer",
        "copy": "copies",
        "unknown": "other",
    }


def test_the_frames_that_name_a_category_exist():
    package = ROOT / "lmscale_jax"
    frames = set()
    for path in package.rglob("*.py"):
        names = re.findall(r"^ *(?:def|class) (\w+)", path.read_text(), re.MULTILINE)
        frames |= {f"{path}:{name}" for name in names}
        # A method's frame has its class before it.
        frames |= {f"{path}:{c}.{name}" for c in names if c[0].isupper() for name in names}
    unmatched = [c for c, p in roofline.CATEGORIES if not any(p.search(f) for f in frames)]
    assert not unmatched


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo_text.parse_program("HloModule nothing\n")
