// How a kernel is launched in clusters; apart, so that hosts without clusters can name it.
#pragma once

#include <cstddef>

#include "common/macros.h"

namespace magsd::MAGSD_ISA {

struct ClusterShape {
  int blocks;     // of a cluster, neighbors in x
  int threads;    // of a block
  size_t shared;  // dynamic, bytes of a block
};

}  // namespace magsd::MAGSD_ISA
