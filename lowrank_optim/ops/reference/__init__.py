"""Each operator in plain torch: its default kernel, and the definition that native kernels have to match.

`schema.py` has checked the arguments. Codes, noise and moments have equal bits in all kernels, because each product and
each sum is rounded here (`lerp_` and `alpha=` fuse them in only a part of torch's loops). The direction may differ in
its last bits, because torch's roots do. The files are divided like csrc/registration/.
"""

# ruff: noqa: F401 -- operators are found by name: `getattr(reference, name)`

from .adam import (
    projected_adam_,
    projected_adam_bfloat16_list_,
    projected_adam_int8_list_,
    projected_adam_list_,
    projected_adam_rows_,
)
from .bases import fix_signs_, gram_, move_rows_, select_top_
from .cosines import add_cosines_, cosine_rows_, cosine_scores_
from .entries import add_at_, add_sampled_product_, gather_at_
from .factored import factored_energy_, scale_factored_, step_factored_
from .quantize import (
    dequantize_affine_,
    dequantize_blockwise_,
    pack4_,
    quantize_affine_,
    quantize_blockwise_,
    quantize_sixteenths_,
    unpack4_,
)
from .random import philox_bits16_, philox_noise16_, philox_normal_, philox_uniform_, round_to_bfloat16_
from .scaled import squares_, take_scaled_
from .weights import add_kahan_, add_nearest_, add_stochastic_
