// cublasGemmEx and cublasGemmStridedBatchedEx in host memory, as strict about their arguments as cuBLAS; sums are doubles.
// What else CuPy wants to find in the library is made by emulator.py, and fails.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { FLOAT = 0, DOUBLE = 1, HALF = 2, BFLOAT = 14 };      // cudaDataType
enum { IN_FLOAT = 68, IN_DOUBLE = 70, IN_TF32 = 77 };       // cublasComputeType
static void *const HANDLE = (void *)0x1234;
int emulated_compute = 1;                                   // 0: products are counted, not computed
void (*emulated_note)(void);

int cublasCreate_v2(void **h) { *h = HANDLE; return OK; }
int cublasDestroy_v2(void *h) { return OK; }
int cublasGetVersion_v2(void *h, int *v) { *v = 120900; return OK; }
int cublasSetStream_v2(void *h, void *s) { return h == HANDLE ? OK : NOT_INITIALIZED; }
int cublasGetStream_v2(void *h, void **s) { *s = 0; return OK; }
int cublasSetMathMode(void *h, int m) { return OK; }
int cublasGetMathMode(void *h, int *m) { *m = 0; return OK; }
int cublasSetPointerMode_v2(void *h, int m) { return OK; }
int cublasGetPointerMode_v2(void *h, int *m) { *m = 0; return OK; }

static size_t size_of(int type) { return type == DOUBLE ? 8 : type == FLOAT ? 4 : 2; }
static double get(const char *p, int type, long long i) {
    float f; _Float16 h; uint32_t bits;
    switch (type) {
        case FLOAT: return ((const float *)p)[i];
        case DOUBLE: return ((const double *)p)[i];
        case BFLOAT: bits = (uint32_t)((const uint16_t *)p)[i] << 16; memcpy(&f, &bits, 4); return f;
        default: memcpy(&h, p + 2 * i, 2); return (double)h;
    }
}
static void put(char *p, int type, long long i, double value) {
    float f = (float)value;
    _Float16 h = (_Float16)value;
    uint32_t bits;
    switch (type) {
        case FLOAT: ((float *)p)[i] = f; return;
        case DOUBLE: ((double *)p)[i] = value; return;
        case BFLOAT:
            memcpy(&bits, &f, 4);
            bits = f != f ? 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);    // to nearest, ties to even
            ((uint16_t *)p)[i] = bits >> 16;
            return;
        default: memcpy(p + 2 * i, &h, 2);
    }
}
static int supported(int in, int out, int compute) {
    if (compute == IN_DOUBLE) return in == DOUBLE && out == DOUBLE;
    if (in == FLOAT) return out == FLOAT && (compute == IN_FLOAT || compute == IN_TF32);
    return (in == HALF || in == BFLOAT) && (out == in || out == FLOAT) && compute == IN_FLOAT;
}

int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const char *A, int at, int lda,
        long long sa, const char *B, int bt, int ldb, long long sb, const void *beta, char *C, int ct, int ldc, long long sc,
        int count, int compute, int algo) {
    if (h != HANDLE) return NOT_INITIALIZED;
    if (m < 0 || n < 0 || k < 0 || count < 0 || ta < 0 || ta > 1 || tb < 0 || tb > 1) return INVALID_VALUE;
    if (algo != -1 && algo != 99) return INVALID_VALUE;     // cublasGemmAlgo: default, default on tensor cores (CuPy's)
    if (lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m || lda < 1 || ldb < 1 || ldc < 1) return INVALID_VALUE;
    if (at != bt || !supported(at, ct, compute)) return NOT_SUPPORTED;
    if ((uintptr_t)A % size_of(at) || (uintptr_t)B % size_of(bt) || (uintptr_t)C % size_of(ct)) return INVALID_VALUE;
    double a = compute == IN_DOUBLE ? *(const double *)alpha : *(const float *)alpha;
    double b = compute == IN_DOUBLE ? *(const double *)beta : *(const float *)beta;
    if (emulated_note) emulated_note();
    if (!emulated_compute) return OK;
    double *left = malloc(sizeof(double) * ((size_t)m * k + 1)), *row = malloc(sizeof(double) * (m + 1));
    for (int batch = 0; batch < count; batch++) {
        const char *a_ = A + batch * sa * (long long)size_of(at), *b_ = B + batch * sb * (long long)size_of(bt);
        char *c_ = C + batch * sc * (long long)size_of(ct);
        for (int p = 0; p < k; p++)
            for (int i = 0; i < m; i++) left[(size_t)p * m + i] = get(a_, at, ta ? (long long)i * lda + p : (long long)p * lda + i);
        for (int j = 0; j < n; j++) {
            memset(row, 0, sizeof(double) * m);
            for (int p = 0; p < k; p++) {
                double right = get(b_, bt, tb ? (long long)p * ldb + j : (long long)j * ldb + p);
                for (int i = 0; i < m; i++) row[i] += right * left[(size_t)p * m + i];
            }
            for (int i = 0; i < m; i++) {
                long long at_ = (long long)j * ldc + i;
                put(c_, ct, at_, a * row[i] + (b != 0 ? b * get(c_, ct, at_) : 0));     // beta = 0: C is not read
            }
        }
    }
    free(left);
    free(row);
    return OK;
}
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const char *A, int at, int lda, const char *B,
        int bt, int ldb, const void *beta, char *C, int ct, int ldc, int compute, int algo) {
    return cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, alpha, A, at, lda, 0, B, bt, ldb, 0, beta, C, ct, ldc, 0, 1, compute,
                                      algo);
}

// CuPy's matmul takes these where leading axes are broadcast; the matrices stand behind arrays of pointers.
static int each(void *h, int ta, int tb, int m, int n, int k, const void *alpha, char **A, int lda, char **B, int ldb,
        const void *beta, char **C, int ldc, int count, int type, int compute) {
    int status = OK;
    for (int i = 0; i < count && status == OK; i++)
        status = cublasGemmEx(h, ta, tb, m, n, k, alpha, A[i], type, lda, B[i], type, ldb, beta, C[i], type, ldc, compute, -1);
    return status;
}
int cublasSgemmBatched(void *h, int ta, int tb, int m, int n, int k, const float *alpha, char **A, int lda, char **B, int ldb,
        const float *beta, char **C, int ldc, int count) {
    return each(h, ta, tb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc, count, FLOAT, IN_FLOAT);
}
int cublasDgemmBatched(void *h, int ta, int tb, int m, int n, int k, const double *alpha, char **A, int lda, char **B, int ldb,
        const double *beta, char **C, int ldc, int count) {
    return each(h, ta, tb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc, count, DOUBLE, IN_DOUBLE);
}
