// The functions of one format of weights, SPARSIFY_FORMAT.

#include "formats.h"

namespace sparsify {

SPARSIFY_FORMAT_FUNCTIONS(, SPARSIFY_FORMAT)

}  // namespace sparsify
