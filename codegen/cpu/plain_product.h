// acc[M][N] += a[M][K] * b[K][N] of arrays, row by row: for the shapes and types that dot.h has no tiles for.
#ifndef EFFC_CPU_PLAIN_PRODUCT_H
#define EFFC_CPU_PLAIN_PRODUCT_H

namespace tt {

template <int W, int M, int N, int K, typename Sum, typename T>
static void plain_product(const T *a, const T *b, Sum *acc) {
  for (int32_t i = 0; i < M; ++i)
    for (int32_t j = 0; j < N; j += W) {
      if constexpr (W == 1) {
        Sum sum = acc[i * N + j];
        for (int32_t k = 0; k < K; ++k) sum += (Sum)a[i * K + k] * (Sum)b[k * N + j];
        acc[i * N + j] = sum;
      } else {
        typedef Vec<Sum, W> V;
        V sum = load<V>(acc + i * N + j);
        for (int32_t k = 0; k < K; ++k) sum += splat<V>((Sum)a[i * K + k]) * load<V>(b + k * N + j);
        store(acc + i * N + j, sum);
      }
    }
}

}  // namespace tt
#endif
