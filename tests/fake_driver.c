/* A CUDA driver whose one GPU is the memory of the host, for tests of the calls that are made. No kernel runs: a launch
   is recorded. Built by test_cuda_calls.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OUT_OF_MEMORY 2
#define TOTAL (1ull << 30)

static size_t used;
static int capturing, live_allocations;
static struct { unsigned grid[3], block[3], shared; void *stream; unsigned long long first; int number; } launched;

int cuInit(unsigned flags) { return 0; }
static int setting(const char *name, int usual) { return getenv(name) ? atoi(getenv(name)) : usual; }
int cuDriverGetVersion(int *version) { return *version = setting("FAKE_CUDA_VERSION", 13000), 0; }
int cuDeviceGetCount(int *count) { return *count = setting("FAKE_GPUS", 1), 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, size, "Fake GPU"), 0; }
int cuDeviceGetUuid_v2(char *uuid, int device) { return memset(uuid, 1, 16), 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 75: return *value = 8, 0; /* compute capability 8.9 */
    case 76: return *value = 9, 0;
    case 16: return *value = 128, 0; /* multiprocessors */
    case 39: return *value = 1536, 0; /* threads of each */
    }
    return *value = 1, 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &used, 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetCurrent(void **context) { return *context = &used, 0; }
int cuCtxPushCurrent_v2(void *context) { return 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = &used, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuCtxGetDevice_v2(int *device, void *context) { return *device = 0, 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, 0; }
int cuCtxSynchronize(void) { return 0; }
int cuCtxSynchronize_v2(void *context) { return 0; }
int cuMemGetInfo_v2(size_t *free_, size_t *total) { return *total = TOTAL, *free_ = TOTAL - used, 0; }

int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return *stream = malloc(1), 0; }
int cuStreamDestroy_v2(void *stream) { return free(stream), 0; }
int cuStreamSynchronize(void *stream) { return capturing ? 900 : 0; }
int cuStreamGetCtx_v2(void *stream, void **context, void **green) { return *context = &used, *green = NULL, 0; }
int cuStreamGetCtx(void *stream, void **context) { return *context = &used, 0; }
int cuStreamGetDevice(void *stream, int *device) { return *device = 0, 0; }

int cuDeviceGetMemPool(void **pool, int device) { return *pool = &live_allocations, 0; }
int cuDeviceGetDefaultMemPool(void **pool, int device) { return *pool = &live_allocations, 0; }
int cuMemPoolGetAttribute(void *pool, int attribute, void *value) { return memset(value, 0, 8), 0; }
int cuMemPoolSetAttribute(void *pool, int attribute, void *value) { return 0; }
int cuMemAllocFromPoolAsync(void **pointer, size_t size, void *pool, void *stream) {
    if (size > TOTAL - used) return OUT_OF_MEMORY;
    size_t *block = aligned_alloc(64, (size + 127) / 64 * 64);
    *block = size;
    used += size, live_allocations++;
    return *pointer = (char *)block + 64, 0;
}
int cuMemFreeAsync(void *pointer, void *stream) {
    size_t *block = (size_t *)((char *)pointer - 64);
    used -= *block, live_allocations--;
    return free(block), 0;
}
int cuMemcpyAsync(void *target, void *source, size_t size, void *stream) { return memcpy(target, source, size), 0; }

int cuStreamBeginCapture_v2(void *stream, int mode) { return capturing = 1 + mode, 0; }
int cuStreamEndCapture(void *stream, void **graph) { return capturing = 0, graph ? *graph = &used : 0, 0; }
int cuStreamGetCaptureInfo_v3(void *stream, int *status, unsigned long long *id, void **graph, void *a, void *b, void *c) {
    if (status) *status = capturing != 0;
    if (id) *id = 1;
    if (graph) *graph = &used;
    return 0;
}
int cuStreamGetCaptureInfo_v2(void *stream, int *status, unsigned long long *id, void **graph, void *a, void *b) {
    return cuStreamGetCaptureInfo_v3(stream, status, id, graph, a, b, NULL);
}
int cuStreamIsCapturing(void *stream, int *status) { return *status = capturing != 0, 0; }
int cuGraphInstantiateWithParams(void **executable, void *graph, void *parameters) { return *executable = &used, 0; }
int cuGraphInstantiate(void **executable, void *graph, unsigned long long flags) { return *executable = &used, 0; }
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) { return *executable = &used, 0; }
int cuGraphClone(void **copy, void *graph) { return *copy = &used, 0; }
int cuGraphRetainUserObject(void *graph, void *object, unsigned count, unsigned flags) { return 0; }
int cuUserObjectCreate(void **object, void *pointer, void *destroy, unsigned count, unsigned flags) { return *object = &used, 0; }
int cuGraphReleaseUserObject(void *graph, void *object, unsigned count) { return 0; }
int cuUserObjectRelease(void *object, unsigned count) { return 0; }
int cuGraphLaunch(void *executable, void *stream) { return launched.number++, 0; }
int cuGraphExecDestroy(void *executable) { return 0; }
int cuGraphDestroy(void *graph) { return 0; }

int cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
    return *library = &launched, memcmp(code, "\177ELF", 4) ? 200 : 0;
}
int cuLibraryUnload(void *library) { return setting("FAKE_UNLOAD", 0); }
#define MOST_ARGUMENTS 32
/* The kernels by name, and the sizes of their arguments, which a driver reads from the cubin. */
static struct kernel { char name[32]; int num_arguments, sizes[MOST_ARGUMENTS]; } kernels[16];
static struct kernel *kernel_of(const char *name) {
    for (struct kernel *kernel = kernels;; kernel++)
        if (!*kernel->name || !strcmp(kernel->name, name)) return strcpy(kernel->name, name), kernel;
}
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    return *kernel = kernel_of(name), strncmp(name, "ttt_", 4) ? 500 : 0;
}
static int shared_limit = 48 << 10;
int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) { return shared_limit = value, 0; }
struct config { unsigned grid[3], block[3], shared; void *stream; };
static struct record { struct kernel *kernel; unsigned long long blocks, arguments[MOST_ARGUMENTS]; } records[64];
static int num_records;
void fake_expect(const char *name, const int *sizes, int count) {
    struct kernel *kernel = kernel_of(name);
    memcpy(kernel->sizes, sizes, count * sizeof *sizes), kernel->num_arguments = count;
}
/* The launches since the last call of fake_forget. */
int fake_launches(void) { return num_records; }
void fake_forget(void) { num_records = 0; }
const char *fake_launch(int index, unsigned long long *blocks, unsigned long long *arguments, int *count) {
    struct record *record = &records[index];
    *blocks = record->blocks, *count = record->kernel->num_arguments;
    memcpy(arguments, record->arguments, sizeof record->arguments);
    return record->kernel->name;
}
int cuLaunchKernelEx(struct config *config, void *function, void **arguments, void **extra) {
    if (config->shared > (unsigned)shared_limit) return 1;
    struct kernel *kernel = function;
    struct record *record = &records[num_records++ % 64];
    memset(record, 0, sizeof *record), record->kernel = kernel, record->blocks = config->grid[0];
    for (int i = 0; i < kernel->num_arguments; i++) memcpy(&record->arguments[i], arguments[i], kernel->sizes[i]);
    memcpy(launched.grid, config->grid, 12), memcpy(launched.block, config->block, 12);
    launched.shared = config->shared, launched.stream = config->stream;
    launched.first = **(unsigned long long **)arguments, launched.number++;
    return 0;
}
void fake_report(unsigned long long *out) {
    unsigned long long values[] = {launched.grid[0], launched.block[0], launched.shared, (size_t)launched.stream,
                                   launched.first, launched.number, used, live_allocations, capturing};
    memcpy(out, values, sizeof values);
}

int cuGetErrorName(int error, const char **text) {
    return *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN", 0;
}
int cuGetErrorString(int error, const char **text) { return *text = "as the fake driver was told", 0; }
static int absent(void) { return 801; } /* CUDA_ERROR_NOT_SUPPORTED */
int cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long long flags, int *status) {
    static const char *suffixes[] = {"_v3", "_v2", "", NULL};
    char name[128];
    *function = NULL;
    for (const char **suffix = suffixes; *suffix && !*function; suffix++) {
        snprintf(name, sizeof name, "%s%s", symbol, *suffix);
        *function = dlsym(RTLD_DEFAULT, name);
        if (!*function) {
            static void *self;
            Dl_info info;
            if (!self && dladdr((void *)cuInit, &info)) self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
            if (self) *function = dlsym(self, name);
        }
    }
    if (status) *status = *function ? 0 : 1;
    if (!*function) *function = absent;
    return 0;
}
int cuGetProcAddress(const char *symbol, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}
