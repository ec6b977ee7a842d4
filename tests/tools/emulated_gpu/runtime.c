// A CUDA runtime and driver in host memory, and what CuPy needs of cuBLAS. `install` puts it under CuPy, whose modules
// call the runtime through the pointers in __pyx_capi__. Each launch, copy, product and wait is noted after `start`.
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>

static PyObject *on_function, *on_product, *notes;
static long long live_bytes = 0, limit_bytes = 80LL << 30;

static void note(const char *kind, PyObject *name) {
    PyObject *pair = notes ? Py_BuildValue("(sO)", kind, name) : NULL;
    if (pair) PyList_Append(notes, pair);
    Py_XDECREF(pair);
}

// ---------------------------------------------------------------- memory
static void cuda_error(int status) {
    PyObject *module = PyImport_ImportModule("cupy_backends.cuda.api.runtime");
    PyObject *type = PyObject_GetAttrString(module, "CUDARuntimeError");
    PyErr_SetObject(type, PyObject_CallFunction(type, "i", status));        // once in a test: nothing is given back
}

static intptr_t r_malloc(size_t n) {                        // the size is kept in front of what is handed out
    if (live_bytes + (long long)n > limit_bytes) { cuda_error(2); return 0; }       // out of memory
    char *p = aligned_alloc(256, ((n + 511) / 256 + 1) * 256);
    *(size_t *)p = n;
    memset(p + 256, 0x7F, n);                               // nothing may rely on zeros: floats of 3e38
    live_bytes += n;
    note("malloc", Py_None);
    return (intptr_t)(p + 256);
}
static PyObject *r_free(intptr_t p) {
    if (p) { live_bytes -= *(size_t *)(p - 256); free((char *)p - 256); }
    Py_RETURN_NONE;
}
static PyObject *r_memGetInfo(void) { return Py_BuildValue("(LL)", limit_bytes - live_bytes, limit_bytes); }
static PyObject *noted(const char *kind) { note(kind, Py_None); Py_RETURN_NONE; }
static PyObject *r_memset(void *p, int v, size_t n) { if (on_product != Py_None) memset(p, v, n); return noted("memset"); }
static PyObject *r_memcpy(void *to, void *from, size_t n) { memmove(to, from, n); return noted("memcpy"); }

// ---------------------------------------------------------------- the device, streams, events
// A function may be called with more arguments than it reads. (Cython's last one tells nothing that is needed here.)
static int zero(void) { return 0; }
static int one(void) { return 1; }
static int r_version(void) { return 13000; }
static PyObject *nothing(void) { Py_RETURN_NONE; }
static int r_deviceGetAttribute(int attribute) {
    switch (attribute) {
        case 75: return 9;          // ComputeCapabilityMajor
        case 16: return 132;        // MultiProcessorCount
        case 10: return 32;         // WarpSize
        case 1: return 1024;        // MaxThreadsPerBlock
        case 8: return 49152;       // MaxSharedMemoryPerBlock
        default: return 0;
    }
}
static PyObject *r_synchronize(void) { return noted("sync"); }
static intptr_t r_eventCreate(void) { return (intptr_t)calloc(1, sizeof(struct timespec)); }
static PyObject *r_eventDestroy(intptr_t e) { free((void *)e); Py_RETURN_NONE; }
static PyObject *r_eventRecord(intptr_t e) { clock_gettime(CLOCK_MONOTONIC, (void *)e); Py_RETURN_NONE; }
static float r_eventElapsedTime(intptr_t a, intptr_t b) {
    struct timespec *x = (void *)a, *y = (void *)b;
    return (float)((y->tv_sec - x->tv_sec) * 1e3 + (y->tv_nsec - x->tv_nsec) / 1e6);
}

// ---------------------------------------------------------------- kernels
// A kernel without a barrier loops over all elements by the size of its grid: one thread does it all. In a kernel with
// barriers each thread of a block is a fiber, which gives way to the next one at a barrier.
typedef struct { PyObject *name; void (*run)(void **); int fibers; } Kernel;
struct { unsigned x, y, z; } threadIdx, blockIdx, blockDim, gridDim;        // kernels find these by their names

enum { STACK = 64 << 10, THREADS = 1024 };
static jmp_buf home, at[THREADS];               // jumps, because swapcontext would ask the kernel at each switch
static char started[THREADS], done[THREADS], *stacks;
static Kernel *running;
static void **arguments;
void emulated_barrier(void) { if (!_setjmp(at[threadIdx.x])) _longjmp(home, 1); }
static void fiber_body(void) { for (;;) { running->run(arguments); done[threadIdx.x] = 1; emulated_barrier(); } }
static void resume(unsigned t) {
    threadIdx.x = t;
    if (_setjmp(home)) return;
    if (started[t]) _longjmp(at[t], 1);
    started[t] = 1;
    ucontext_t fiber;
    getcontext(&fiber);
    fiber.uc_stack = (stack_t){.ss_sp = stacks + (size_t)t * STACK, .ss_size = STACK};
    makecontext(&fiber, fiber_body, 0);
    setcontext(&fiber);
}

static void execute_block(unsigned threads) {
    memset(done, 0, threads);
    for (unsigned left = threads; left;) {
        left = 0;
        for (unsigned t = 0; t < threads; t++)
            if (!done[t]) { resume(t); left += !done[t]; }
    }
}

static void execute(Kernel *kernel, void **parameters, unsigned blocks, unsigned threads) {
    running = kernel;
    arguments = parameters;
    threadIdx.x = blockIdx.x = 0;
    blockDim.x = kernel->fibers ? threads : 1;
    gridDim.x = kernel->fibers ? blocks : 1;
    if (!kernel->fibers) { kernel->run(parameters); return; }
    if (!stacks) stacks = malloc((size_t)THREADS * STACK);
    for (; blockIdx.x < blocks; blockIdx.x++) execute_block(threads);
}

static PyObject *d_moduleLoadData(PyObject *image) { return Py_NewRef(image); }
static intptr_t d_moduleGetFunction(PyObject *image, PyObject *name) {
    Kernel *k = calloc(1, sizeof *k);
    k->name = Py_NewRef(name);
    PyObject *found = PyObject_CallFunction(on_function, "OO", image, name);
    int ok = found && (found == Py_None || PyArg_ParseTuple(found, "ni", &k->run, &k->fibers));
    Py_XDECREF(found);
    return ok ? (intptr_t)k : 0;
}
static PyObject *d_launchKernel(Kernel *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                unsigned bz, unsigned shared, intptr_t stream, intptr_t parameters) {
    if (!gx || !bx || bx > THREADS || gy * gz * by * bz != 1)
        return PyErr_Format(PyExc_RuntimeError, "invalid grid %u %u %u, block %u %u %u", gx, gy, gz, bx, by, bz);
    note("kernel", kernel->name);
    if (kernel->run) execute(kernel, (void **)parameters, gx, bx);
    Py_RETURN_NONE;
}
static PyObject *d_maxPotentialBlockSize(void) { return Py_BuildValue("(ii)", 132, 1024); }
static int d_funcGetAttribute(void) { return 1024; }

// ---------------------------------------------------------------- cuBLAS
// Products are refused or computed by on_product, if there is one. CuPy finds these functions by their names.
static void *const HANDLE = (void *)0x1234;

int cublasCreate_v2(void **h) { *h = HANDLE; return 0; }
int cublasLtGetVersion(void) { return 120900; }
int cublasGetVersion_v2(void *h, int *v) { *v = 120900; return 0; }
int cublasSetStream_v2(void *h) { return h == HANDLE ? 0 : 1; }
int cublasDestroy_v2(void) { return 0; }
int cublasSetMathMode(void) { return 0; }
int cublasGetMathMode(void *h, int *m) { *m = 0; return 0; }
int cublasSetPointerMode_v2(void) { return 0; }
int cublasGetPointerMode_v2(void *h, int *m) { *m = 0; return 0; }

#define SHAPE void *h, int ta, int tb, int m, int n, int k, const void *alpha
int cublasGemmStridedBatchedEx(SHAPE, char *A, int at, int lda, long long sa, char *B, int bt, int ldb, long long sb,
                               const void *beta, char *C, int ct, int ldc, long long sc, int count, int compute,
                               int algo) {
    PyGILState_STATE state = PyGILState_Ensure();
    note("gemm", Py_None);
    PyObject *status = on_product == Py_None ? PyLong_FromLong(0) : PyObject_CallFunction(
        on_product, "iiiiiiinniiLniiLnniiLii", h == HANDLE, count, m, n, k, ta, tb, alpha, A, at, lda, sa, B, bt, ldb,
        sb, beta, C, ct, ldc, sc, compute, algo);
    int refused = status ? PyLong_AsLong(status) : 14;
    if (!status) PyErr_Print();
    Py_XDECREF(status);
    PyGILState_Release(state);
    return refused;
}
int cublasGemmEx(SHAPE, char *A, int at, int lda, char *B, int bt, int ldb, const void *beta, char *C, int ct, int ldc,
                 int compute, int algo) {
    return cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, alpha, A, at, lda, 0, B, bt, ldb, 0, beta, C, ct, ldc, 0, 1,
                                      compute, algo);
}
// CuPy's matmul takes these where leading axes are broadcast; the matrices stand behind arrays of pointers.
#define BEHIND_POINTERS(name, type, compute) \
    int name(SHAPE, char **A, int lda, char **B, int ldb, const void *beta, char **C, int ldc, int count) { \
        int refused = 0; \
        for (int i = 0; i < count && !refused; i++) \
            refused = cublasGemmEx(h, ta, tb, m, n, k, alpha, A[i], type, lda, B[i], type, ldb, beta, C[i], type, \
                                   ldc, compute, -1); \
        return refused; \
    }
BEHIND_POINTERS(cublasSgemmBatched, 0, 68)
BEHIND_POINTERS(cublasDgemmBatched, 1, 70)

// ---------------------------------------------------------------- the Python module
#define RUNTIME(name, f) {"runtime", #name, f}
#define DRIVER(name, f) {"driver", #name, f}
static struct { const char *module, *name; void *function; } table[] = {
    RUNTIME(getDevice, zero), RUNTIME(getDeviceCount, one), RUNTIME(driverGetVersion, r_version),
    RUNTIME(setDevice, nothing), RUNTIME(_ensure_context, nothing), RUNTIME(deviceSynchronize, r_synchronize),
    RUNTIME(deviceGetAttribute, r_deviceGetAttribute), RUNTIME(memGetInfo, r_memGetInfo), RUNTIME(malloc, r_malloc),
    RUNTIME(free, r_free), RUNTIME(hostAlloc, r_malloc), RUNTIME(freeHost, r_free), RUNTIME(memset, r_memset),
    RUNTIME(memsetAsync, r_memset), RUNTIME(memcpy, r_memcpy), RUNTIME(memcpyAsync, r_memcpy),
    RUNTIME(pointerGetMemoryType, zero), RUNTIME(streamSynchronize, r_synchronize), RUNTIME(streamQuery, nothing),
    RUNTIME(streamIsCapturing, zero), RUNTIME(eventCreateWithFlags, r_eventCreate), RUNTIME(eventCreate, r_eventCreate),
    RUNTIME(eventDestroy, r_eventDestroy), RUNTIME(eventRecord, r_eventRecord),
    RUNTIME(eventSynchronize, r_synchronize), RUNTIME(eventElapsedTime, r_eventElapsedTime),
    DRIVER(moduleLoadData, d_moduleLoadData), DRIVER(moduleUnload, nothing),
    DRIVER(moduleGetFunction, d_moduleGetFunction), DRIVER(launchKernel, d_launchKernel), DRIVER(ctxGetCurrent, one),
    DRIVER(occupancyMaxPotentialBlockSize, d_maxPotentialBlockSize), DRIVER(funcGetAttribute, d_funcGetAttribute),
    DRIVER(occupancyMaxActiveBlocksPerMultiprocessor, one), {0}};

static PyObject *install(PyObject *self, PyObject *args) {
    if (!PyArg_ParseTuple(args, "OO", &on_function, &on_product)) return NULL;
    Py_INCREF(args);                                        // it holds both
    for (int i = 0; table[i].module; i++) {
        char path[99];
        snprintf(path, sizeof path, "cupy_backends.cuda.api.%s", table[i].module);
        PyObject *module = PyImport_ImportModule(path);
        PyObject *api = module ? PyObject_GetAttrString(module, "__pyx_capi__") : NULL;
        PyObject *old = api ? PyDict_GetItemString(api, table[i].name) : NULL;
        if (!old) return PyErr_Format(PyExc_KeyError, "this CuPy has no %s.%s", path, table[i].name);
        Py_INCREF(old);                                     // the new capsule shares its name, the C signature
        PyObject *capsule = PyCapsule_New(table[i].function, PyCapsule_GetName(old), NULL);
        PyDict_SetItemString(api, table[i].name, capsule);
        Py_DECREF(capsule), Py_DECREF(api), Py_DECREF(module);
    }
    Py_RETURN_NONE;
}
static PyObject *start(PyObject *self, PyObject *list) { Py_XDECREF(notes); Py_INCREF(notes = list); Py_RETURN_NONE; }
static PyObject *stop(PyObject *self, PyObject *unused) { Py_CLEAR(notes); Py_RETURN_NONE; }
static PyObject *py_note(PyObject *self, PyObject *args) {
    const char *kind;
    return PyArg_ParseTuple(args, "s", &kind) ? noted(kind) : NULL;
}
static PyMethodDef methods[] = {
    {"install", install, METH_VARARGS}, {"start", start, METH_O}, {"stop", stop, METH_NOARGS},
    {"memGetInfo", (PyCFunction)r_memGetInfo, METH_NOARGS}, {"note", py_note, METH_VARARGS}, {0}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "emulated_runtime", 0, -1, methods};
PyMODINIT_FUNC PyInit_emulated_runtime(void) { return PyModule_Create(&definition); }
