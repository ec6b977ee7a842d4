// What CuPy's kernels need to be compiled by g++ for one host thread. It stands for <cuda_fp16.h>, <cuda_bf16.h> and
// CuPy's <cupy/complex.cuh>, which are empty here.
#pragma once
#include <algorithm>
#include <cassert>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)
#define __CUDACC_VER_MAJOR__ 12
struct Dim { unsigned x, y, z; };
extern "C" { extern Dim threadIdx, blockIdx, blockDim, gridDim; void emulated_barrier(void); }  // runtime.c's
static inline void __syncthreads() { emulated_barrier(); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }

template <class To, class From> static inline To bits_of(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
static inline int __float_as_int(float f) { return bits_of<int>(f); }
static inline float __int_as_float(int i) { return bits_of<float>(i); }
static inline long long __double_as_longlong(double f) { return bits_of<long long>(f); }
static inline double __longlong_as_double(long long i) { return bits_of<double>(i); }

template <class T> static inline T atomicAdd(T *a, T v) { T old = *a; *a += v; return old; }
template <class T> static inline T atomicMax(T *a, T v) { T old = *a; *a = old > v ? old : v; return old; }
template <class T> static inline T atomicMin(T *a, T v) { T old = *a; *a = old < v ? old : v; return old; }
template <class T> static inline T atomicCAS(T *a, T was, T v) { T old = *a; if (old == was) *a = v; return old; }
using std::abs; using std::exp; using std::floor; using std::fmax; using std::fmin; using std::isfinite;
using std::isinf; using std::isnan; using std::log; using std::max; using std::min; using std::pow; using std::signbit;
using std::sqrt; using std::tanh;

struct __half_raw { unsigned short x; };
struct half {
    _Float16 v;
    half() {}
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>> half(T f) : v((_Float16)(float)f) {}
    half(const __half_raw &r) : v(bits_of<_Float16>(r.x)) {}
    operator float() const { return (float)v; }
    operator __half_raw() const { return {bits_of<unsigned short>(v)}; }
};
typedef half __half;
static inline unsigned short __half_as_ushort(half h) { return bits_of<unsigned short>(h.v); }
static inline half __ushort_as_half(unsigned short x) { return half(__half_raw{x}); }

struct __nv_bfloat16 {
    unsigned short x;
    __nv_bfloat16() {}
    __nv_bfloat16(float f) {
        uint32_t bits = bits_of<uint32_t>(f);
        x = (f != f ? 0x7fff0000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16;      // to nearest, ties to even
    }
    operator float() const { return bits_of<float>((uint32_t)x << 16); }
};
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.x; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { __nv_bfloat16 h; h.x = x; return h; }
static inline bool __hisnan(__nv_bfloat16 h) { return std::isnan((float)h); }
static inline bool __hisinf(__nv_bfloat16 h) { return std::isinf((float)h); }

template <class T> struct complex {
    T r, i;
    complex(T r = 0, T i = 0) : r(r), i(i) {}
    T real() const { return r; }
    T imag() const { return i; }
};
template <class T> bool operator<(const complex<T> &a, const complex<T> &b) { return a.r < b.r; }
template <class T> bool operator>(const complex<T> &a, const complex<T> &b) { return a.r > b.r; }
template <class T> bool isnan(const complex<T> &a) { return a.r != a.r; }

// emulated_run(p) calls the kernel with the arguments that p points to
template <class... A> static void emulated_call(void (*f)(A...), void **p) {
    [&]<size_t... I>(std::index_sequence<I...>) {
        f(*(std::remove_const_t<A> *)p[I]...);
    }(std::index_sequence_for<A...>{});
}
#define EMULATED_RUN(name) extern "C" void emulated_run(void **p) { emulated_call(&name, p); }
