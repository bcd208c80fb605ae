"""The time of a program on a TPU, from the cycles that its compiler writes into it."""

import pytest

from lmscale_jax.model.flops import CHIPS
from lmscale_jax.train import hlo_text, tpu_cycles

PROGRAM = r"""
%fused (p: bf16[64,64]) -> bf16[64,64] {
  %p = bf16[64,64]{1,0} parameter(0)
  ROOT %c = bf16[64,64]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%more (s: (s32[])) -> pred[] {
  %s = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[]{:T(128)} constant(10)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%turn (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %inner = s32[] negate(%s), backend_config={"estimated_cycles":"1500"}
  ROOT %next = (s32[]) tuple(%inner)
}

ENTRY %main (x: bf16[64,64]) -> bf16[64,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  %product = bf16[64,64]{1,0} fusion(%x), calls=%fused, backend_config={"estimated_cycles":"3000"}
  %loop = (s32[]) while(%x), condition=%more, body=%turn
  %start = (bf16[64,64]{1,0}, u32[]) copy-start(%x)
  %splash = (bf16[16,12,512,128]{3,2,1,0}, f32[16,12,512]{2,1,0}) custom-call(%x), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jvp(mean_keys_512)/splash_mha_fwd"}
  ROOT %other = bf16[64,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
}
""".replace("\\\n", "")


def test_cycles_become_seconds():
    chip = CHIPS["v5e"]
    kernels, missing = tpu_cycles.estimate_cycles(hlo_text.parse_program(PROGRAM), chip)
    seconds = {kernel.instruction.name: (kernel.category, kernel.seconds) for kernel in kernels}
    products = 4 * 16 * 12 * 512 * 128 * 512
    assert set(seconds) == {"product", "inner", "splash"}
    assert seconds["product"] == ("dense", pytest.approx(2e-6))
    assert seconds["inner"][1] == pytest.approx(10 * 1e-6)
    assert seconds["splash"] == ("attention", pytest.approx(products / (0.6 * 197e12)))
    assert missing == {"tpu_custom_call": 1}
