// The library of one format of weights, SPARSIFY_FORMAT, whose number is SPARSIFY_NUMBER.

#include "formats.h"

namespace sparsify {
namespace {

template <class T, int B>
void provide() {
    functions<T, B>() = {dot_input<T, 1, B>,        dot_input<T, rows_at_once(B), B>, add_listed<T, B>, phases<T, B>,
                         step::project<T, B, 1>, step::project<T, B, 3>,           step::head<T, B>};
}

}  // namespace
}  // namespace sparsify

extern "C" {

void sparsify_start() {}

// Adds this format to the table of the kernels, unless these were compiled for another processor; returns whether it did.
int sparsify_join(void* table, int64_t layout) {
    using namespace sparsify;
    static_assert(NUMBER<SPARSIFY_FORMAT> == SPARSIFY_NUMBER);
    if (layout != Formats::layout()) return 0;
    formats = static_cast<Formats*>(table);
    provide<SPARSIFY_FORMAT, 1>();
    provide<SPARSIFY_FORMAT, 2>();
    provide<SPARSIFY_FORMAT, 4>();
    provide<SPARSIFY_FORMAT, 8>();
    formats->is_loaded[SPARSIFY_NUMBER] = true;
    return 1;
}
}
