// Register the kernels of one backend with torch's dispatcher.
//
// Every function below checks the tensors of an operator, takes their pointers and calls a kernel of kernels.h. This
// file is compiled once per backend: for the CPU, with LRO_CUDA for CUDA, and with LRO_EMULATED for CUDA sources that
// run on the CPU in tests. It is one translation unit because parsing torch's headers takes longer than everything
// else.
//
// The operators themselves are defined in Python, in lowrank_optim/ops/schema.py. This library only adds kernels for
// one device to them, so a missing library changes speed and nothing else. It uses only the stable ABI of torch, and
// one binary therefore serves every torch from 2.10 on.
#if defined(LRO_CUDA) || defined(LRO_EMULATED)
#define LRO_ONLY_SHARED  // excludes the operators that have no CUDA kernel
#endif

#ifdef LRO_EMULATED
#define LRO_NAMESPACE lowrank_optim_emulated
#else
#define LRO_NAMESPACE lowrank_optim
#endif

#ifdef LRO_CUDA
#define LRO_KEY CUDA
#else
#define LRO_KEY CPU
#endif

#include "registration/adam.h"
#include "registration/bases.h"
#include "registration/cosines.h"
#include "registration/entries.h"
#include "registration/factored.h"
#include "registration/quantize.h"
#include "registration/random.h"
#include "registration/scaled.h"
#include "registration/weights.h"

// Each line binds an operator of the schema to a function. TORCH_BOX converts the dispatcher's stack of arguments.
STABLE_TORCH_LIBRARY_IMPL(LRO_NAMESPACE, LRO_KEY, m) {
  m.impl("projected_adam_", TORCH_BOX(&lro::projected_adam_));
  m.impl("projected_adam_list_", TORCH_BOX(&lro::projected_adam_list_));
  m.impl("projected_adam_bfloat16_list_", TORCH_BOX(&lro::projected_adam_bfloat16_list_));
  m.impl("projected_adam_int8_list_", TORCH_BOX(&lro::projected_adam_int8_list_));
#ifndef LRO_ONLY_SHARED
  m.impl("gram_", TORCH_BOX(&lro::gram_));
#endif
  m.impl("fix_signs_", TORCH_BOX(&lro::fix_signs_));
  m.impl("philox_bits16_", TORCH_BOX(&lro::philox_<lro::Kind::bits16>));
  m.impl("philox_noise16_", TORCH_BOX(&lro::philox_<lro::Kind::noise16>));
  m.impl("philox_uniform_", TORCH_BOX(&lro::philox_<lro::Kind::uniform>));
  m.impl("philox_normal_", TORCH_BOX(&lro::philox_<lro::Kind::normal>));
  m.impl("round_to_bfloat16_", TORCH_BOX(&lro::round_to_bfloat16_));
  m.impl("add_nearest_", TORCH_BOX(&lro::add_nearest_));
  m.impl("add_kahan_", TORCH_BOX(&lro::add_kahan_));
  m.impl("add_stochastic_", TORCH_BOX(&lro::add_stochastic_));
  m.impl("quantize_blockwise_", TORCH_BOX(&lro::quantize_blockwise_));
  m.impl("quantize_affine_", TORCH_BOX(&lro::quantize_affine_));
  m.impl("quantize_sixteenths_", TORCH_BOX(&lro::quantize_sixteenths_));
  m.impl("dequantize_blockwise_", TORCH_BOX(&lro::dequantize_blockwise_));
  m.impl("pack4_", TORCH_BOX(&lro::pack4_));
  m.impl("unpack4_", TORCH_BOX(&lro::unpack4_));
  m.impl("dequantize_affine_", TORCH_BOX(&lro::dequantize_affine_));
  m.impl("select_top_", TORCH_BOX(&lro::select_top_));
  m.impl("add_at_", TORCH_BOX(&lro::add_at_));
  m.impl("gather_at_", TORCH_BOX(&lro::gather_at_));
#ifndef LRO_ONLY_SHARED
  m.impl("add_sampled_product_", TORCH_BOX(&lro::add_sampled_product_));
  m.impl("scale_factored_", TORCH_BOX(&lro::scale_factored_));
  m.impl("factored_energy_", TORCH_BOX(&lro::factored_energy_));
  m.impl("step_factored_", TORCH_BOX(&lro::step_factored_));
  m.impl("squares_", TORCH_BOX(&lro::squares_));
  m.impl("take_scaled_", TORCH_BOX(&lro::take_scaled_));
  m.impl("projected_adam_rows_", TORCH_BOX(&lro::projected_adam_rows_));
  m.impl("move_rows_", TORCH_BOX(&lro::move_rows_));
  m.impl("cosine_scores_", TORCH_BOX(&lro::cosine_scores_));
  m.impl("cosine_rows_", TORCH_BOX(&lro::cosine_rows_));
  m.impl("add_cosines_", TORCH_BOX(&lro::add_cosines_));
#endif
}
