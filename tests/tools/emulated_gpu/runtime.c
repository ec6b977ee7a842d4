// A CUDA runtime and driver in host memory. `install` puts it under CuPy, whose modules call these functions through the
// pointers in __pyx_capi__. Each launch, copy, product and wait is noted while `start` has been called.
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>

static PyObject *on_module, *on_function, *notes;
static long long live_bytes = 0, peak_bytes = 0, limit_bytes = 80LL << 30;

static void note(const char *kind, PyObject *detail) {      // steals detail
    PyObject *pair = notes ? Py_BuildValue("(sO)", kind, detail) : NULL;
    if (pair) PyList_Append(notes, pair);
    Py_XDECREF(pair), Py_XDECREF(detail);
}

// ---------------------------------------------------------------- memory
static void cuda_error(int status) {
    PyObject *module = PyImport_ImportModule("cupy_backends.cuda.api.runtime");
    PyObject *type = PyObject_GetAttrString(module, "CUDARuntimeError");
    PyErr_SetObject(type, PyObject_CallFunction(type, "i", status));        // once in a test: nothing is given back
}

static intptr_t r_malloc(size_t n, int s) {                 // the size is kept in front of what is handed out
    if (live_bytes + (long long)n > limit_bytes) { cuda_error(2); return 0; }       // out of memory
    char *p = aligned_alloc(256, ((n + 511) / 256 + 1) * 256);
    *(size_t *)p = n;
    memset(p + 256, 0x7F, n);                               // nothing may rely on zeros: floats of 3e38
    live_bytes += n;
    if (live_bytes > peak_bytes) peak_bytes = live_bytes;
    note("malloc", PyLong_FromSize_t(n));
    return (intptr_t)(p + 256);
}
static PyObject *r_free(intptr_t p, int s) {
    if (p) { live_bytes -= *(size_t *)(p - 256); free((char *)p - 256); }
    Py_RETURN_NONE;
}
static intptr_t r_hostAlloc(size_t n, unsigned flags, int s) { return (intptr_t)aligned_alloc(256, (n / 256 + 1) * 256); }
static PyObject *r_freeHost(intptr_t p, int s) { free((void *)p); Py_RETURN_NONE; }
static PyObject *r_memGetInfo(int s) { return Py_BuildValue("(LL)", limit_bytes - live_bytes, limit_bytes); }
static PyObject *done_with(const char *kind, size_t n) { note(kind, PyLong_FromSize_t(n)); Py_RETURN_NONE; }
static PyObject *r_memset(intptr_t p, int v, size_t n, int s) { memset((void *)p, v, n); return done_with("memset", n); }
static PyObject *r_memsetAsync(intptr_t p, int v, size_t n, intptr_t stream, int s) { return r_memset(p, v, n, 0); }
static PyObject *r_memcpy(intptr_t to, intptr_t from, size_t n, int kind, int s) {
    memmove((void *)to, (void *)from, n);
    return done_with("memcpy", n);
}
static PyObject *r_memcpyAsync(intptr_t to, intptr_t from, size_t n, int kind, intptr_t stream, int s) {
    return r_memcpy(to, from, n, kind, 0);
}

// ---------------------------------------------------------------- the device, streams, events
static int r_zero(int s) { return 0; }
static int r_one(int s) { return 1; }
static int r_version(int s) { return 13000; }
static PyObject *r_setDevice(int d, int s) { Py_RETURN_NONE; }
static PyObject *r_nothing(void) { Py_RETURN_NONE; }
static int r_deviceGetAttribute(int attribute, int d, int s) {
    switch (attribute) {
        case 75: return 9;          // ComputeCapabilityMajor
        case 16: return 132;        // MultiProcessorCount
        case 10: return 32;         // WarpSize
        case 1: return 1024;        // MaxThreadsPerBlock
        case 8: return 49152;       // MaxSharedMemoryPerBlock
        default: return 0;
    }
}
static PyObject *waited(const char *what) { note("sync", PyUnicode_FromString(what)); Py_RETURN_NONE; }
static PyObject *r_deviceSynchronize(int s) { return waited("device"); }
static PyObject *r_streamSynchronize(intptr_t stream, int s) { return waited("stream"); }
static PyObject *r_eventSynchronize(intptr_t e, int s) { return waited("event"); }
static int r_ofStream(intptr_t stream, int s) { return 0; }
static PyObject *r_streamQuery(intptr_t stream, int s) { Py_RETURN_NONE; }
static intptr_t r_eventCreateWithFlags(unsigned f, int s) { return (intptr_t)calloc(1, sizeof(struct timespec)); }
static intptr_t r_eventCreate(int s) { return r_eventCreateWithFlags(0, 0); }
static PyObject *r_eventDestroy(intptr_t e, int s) { free((void *)e); Py_RETURN_NONE; }
static PyObject *r_eventRecord(intptr_t e, intptr_t stream, int s) {
    clock_gettime(CLOCK_MONOTONIC, (void *)e);
    Py_RETURN_NONE;
}
static float r_eventElapsedTime(intptr_t a, intptr_t b, int s) {
    struct timespec *x = (void *)a, *y = (void *)b;
    return (float)((y->tv_sec - x->tv_sec) * 1e3 + (y->tv_nsec - x->tv_nsec) / 1e6);
}

// ---------------------------------------------------------------- kernels
// A kernel without a barrier loops over all elements by the size of its grid: one thread does it all. In a kernel with
// barriers each thread of a block is a fiber, which gives way to the next one at a barrier.
typedef struct { unsigned x, y, z; } Dim;
typedef struct { PyObject *name; void (*run)(void **); Dim *thread, *block, *blockDim, *gridDim; void (**barrier)(void); int fibers; } Kernel;

enum { STACK = 64 << 10, THREADS = 1024 };
static ucontext_t home, fiber[THREADS];
static char done[THREADS], *stacks;
static int current;
static Kernel *running;
static void **arguments;

static void fiber_body(void) { running->run(arguments); done[current] = 1; swapcontext(&fiber[current], &home); }
static void fiber_barrier(void) { swapcontext(&fiber[current], &home); }

static void execute_block(unsigned threads) {
    for (unsigned t = 0; t < threads; t++) {
        getcontext(&fiber[t]);
        fiber[t].uc_stack.ss_sp = stacks + (size_t)t * STACK;
        fiber[t].uc_stack.ss_size = STACK;
        fiber[t].uc_link = &home;
        makecontext(&fiber[t], fiber_body, 0);
        done[t] = 0;
    }
    for (unsigned left = threads; left;) {
        left = 0;
        for (unsigned t = 0; t < threads; t++) {
            if (done[t]) continue;
            current = t;
            *running->thread = (Dim){t, 0, 0};
            swapcontext(&home, &fiber[t]);
            left += !done[t];
        }
    }
}

static void execute(Kernel *kernel, void **parameters, unsigned blocks, unsigned threads) {
    running = kernel;
    arguments = parameters;
    *kernel->thread = *kernel->block = (Dim){0, 0, 0};
    *kernel->barrier = kernel->fibers ? fiber_barrier : abort;
    *kernel->blockDim = (Dim){kernel->fibers ? threads : 1, 1, 1};
    *kernel->gridDim = (Dim){kernel->fibers ? blocks : 1, 1, 1};
    if (!kernel->fibers) { kernel->run(parameters); return; }
    if (!stacks) stacks = mmap(0, (size_t)THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (unsigned b = 0; b < blocks; b++) {
        *kernel->block = (Dim){b, 0, 0};
        execute_block(threads);
    }
}

static intptr_t d_moduleLoadData(PyObject *image, int s) {
    PyObject *key = PyObject_CallOneArg(on_module, image);
    intptr_t module = key ? PyLong_AsSsize_t(key) : 0;
    Py_XDECREF(key);
    return module;
}
static intptr_t d_moduleGetFunction(intptr_t module, PyObject *name, int s) {
    Kernel *k = calloc(1, sizeof *k);
    Py_INCREF(k->name = name);
    PyObject *found = PyObject_CallFunction(on_function, "nO", (Py_ssize_t)module, name);
    int ok = found && (found == Py_None || PyArg_ParseTuple(found, "nnnnnni", &k->run, &k->thread, &k->block, &k->blockDim,
                                                            &k->gridDim, &k->barrier, &k->fibers));
    Py_XDECREF(found);
    return ok ? (intptr_t)k : 0;
}
static PyObject *d_launchKernel(intptr_t kernel_, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                                unsigned shared, intptr_t stream, intptr_t parameters, intptr_t extra, int s) {
    Kernel *kernel = (Kernel *)kernel_;
    if (!gx || !bx || bx * by * bz > THREADS || gy * gz * by * bz != 1) {
        PyErr_Format(PyExc_RuntimeError, "CUDA_ERROR_INVALID_VALUE: grid %u %u %u, block %u %u %u", gx, gy, gz, bx, by, bz);
        return NULL;
    }
    note("kernel", Py_BuildValue("O", kernel->name));
    if (kernel->run) execute(kernel, (void **)parameters, gx, bx);
    Py_RETURN_NONE;
}
static PyObject *d_moduleUnload(intptr_t m, int s) { Py_RETURN_NONE; }
static PyObject *d_maxPotentialBlockSize(intptr_t f, size_t d, int l, int s) { return Py_BuildValue("(ii)", 132, 1024); }
static int d_maxActiveBlocks(intptr_t f, int b, size_t d, int s) { return 2; }
static int d_funcGetAttribute(int a, intptr_t f, int s) { return 1024; }
static intptr_t d_ctxGetCurrent(int s) { return 1; }

// ---------------------------------------------------------------- the Python module
static struct { const char *module, *name; void *function; } table[] = {
    {"runtime", "getDevice", r_zero}, {"runtime", "getDeviceCount", r_one}, {"runtime", "driverGetVersion", r_version},
    {"runtime", "setDevice", r_setDevice}, {"runtime", "_ensure_context", r_nothing}, {"runtime", "malloc", r_malloc},
    {"runtime", "deviceSynchronize", r_deviceSynchronize}, {"runtime", "memGetInfo", r_memGetInfo},
    {"runtime", "deviceGetAttribute", r_deviceGetAttribute}, {"runtime", "free", r_free}, {"runtime", "hostAlloc", r_hostAlloc},
    {"runtime", "freeHost", r_freeHost}, {"runtime", "memset", r_memset}, {"runtime", "memsetAsync", r_memsetAsync},
    {"runtime", "memcpy", r_memcpy}, {"runtime", "memcpyAsync", r_memcpyAsync}, {"runtime", "pointerGetMemoryType", r_ofStream},
    {"runtime", "streamSynchronize", r_streamSynchronize}, {"runtime", "streamIsCapturing", r_ofStream},
    {"runtime", "streamQuery", r_streamQuery}, {"runtime", "eventCreateWithFlags", r_eventCreateWithFlags},
    {"runtime", "eventCreate", r_eventCreate}, {"runtime", "eventDestroy", r_eventDestroy},
    {"runtime", "eventRecord", r_eventRecord}, {"runtime", "eventSynchronize", r_eventSynchronize},
    {"runtime", "eventElapsedTime", r_eventElapsedTime}, {"driver", "moduleLoadData", d_moduleLoadData},
    {"driver", "moduleUnload", d_moduleUnload}, {"driver", "moduleGetFunction", d_moduleGetFunction},
    {"driver", "launchKernel", d_launchKernel}, {"driver", "occupancyMaxPotentialBlockSize", d_maxPotentialBlockSize},
    {"driver", "occupancyMaxActiveBlocksPerMultiprocessor", d_maxActiveBlocks},
    {"driver", "funcGetAttribute", d_funcGetAttribute}, {"driver", "ctxGetCurrent", d_ctxGetCurrent}, {0}};

static PyObject *install(PyObject *self, PyObject *args) {
    if (!PyArg_ParseTuple(args, "OO", &on_module, &on_function)) return NULL;
    Py_INCREF(on_module), Py_INCREF(on_function);
    for (int i = 0; table[i].module; i++) {
        char path[99];
        snprintf(path, sizeof path, "cupy_backends.cuda.api.%s", table[i].module);
        PyObject *module = PyImport_ImportModule(path), *api = module ? PyObject_GetAttrString(module, "__pyx_capi__") : NULL;
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
static PyObject *memory(PyObject *self, PyObject *unused) { return Py_BuildValue("(LL)", live_bytes, peak_bytes); }
static PyObject *py_note(PyObject *self, PyObject *args) {
    const char *kind, *detail;
    if (!PyArg_ParseTuple(args, "sz", &kind, &detail)) return NULL;
    note(kind, PyUnicode_FromString(detail ? detail : ""));
    Py_RETURN_NONE;
}
static PyMethodDef methods[] = {{"install", install, METH_VARARGS}, {"start", start, METH_O}, {"stop", stop, METH_NOARGS},
                                {"memory", memory, METH_NOARGS}, {"note", py_note, METH_VARARGS}, {0}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "emulated_runtime", 0, -1, methods};
PyMODINIT_FUNC PyInit_emulated_runtime(void) { return PyModule_Create(&definition); }
