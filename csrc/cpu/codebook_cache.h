// Packed codebooks, kept from call to call.
#pragma once

#include <memory>

#include "codebook.h"

namespace semhitok::cpu {

// The codebook with these bytes: the one kept from an earlier call, or one packed now and kept.
std::shared_ptr<const Codebook> prepare(const Rows& codes, int64_t count, int64_t depth, const Kernels& kernels);

}  // namespace semhitok::cpu
