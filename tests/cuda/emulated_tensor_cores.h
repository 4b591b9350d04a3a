// What emulated_ptx.cpp and emulated_tensor_cores.cpp know of each other.
#pragma once

#include "emulator.h"

namespace emulator {

void tensor_cores_block_begins(int threads);
void tensor_cores_thread_exits(Thread thread);
void tensor_cores_block_ends();
bool was_bulk_written(const char* shared);  // dynamic shared memory

}  // namespace emulator
