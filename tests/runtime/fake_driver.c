/* Stands in for libcuda and libamdhip64: remembers the last launch, and fails whatever call the test names. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef void *handle;

struct launch {
    uint32_t size[7]; /* grid x, y, z, block x, y, z, LDS */
    handle function, stream;
    uint8_t arguments[256];
    uint64_t bytes, count, end;
    int device;
    uint32_t cluster, overlap; /* 0: not asked for */
};

static struct launch last;
static char failing[64];
static int status, current, loads, image_bytes_seen, attributes[16];
static char text[64];

struct launch *fake_last(void) { return &last; }
void fake_fail(const char *call, int code) { snprintf(failing, sizeof failing, "%s", call), status = code; }
int fake_loads(void) { return loads; }
int fake_attribute(int which) { return attributes[which]; }
int fake_current(void) { return current; }
void fake_set_current(int device) { current = device; }

#define CALL(name) \
    if (!strcmp(failing, name)) return status

static int load(const char *name, handle *module, const char *image) {
    CALL(name);
    if (memcmp(image, "\177ELF", 4)) return 200;
    *module = (handle)(uintptr_t)(0x1000 + ++loads + 256 * current);
    return 0;
}
static int find(const char *call, handle *function, handle module, const char *name) {
    CALL(call);
    if (!strcmp(name, "absent")) return 500;
    *function = (handle)((uintptr_t)module << 8);
    return 0;
}
static int start(const char *call, handle f, const uint32_t size[7], handle stream, void **extra) {
    CALL(call);
    last.function = f, last.stream = stream, last.device = current, last.count++;
    memcpy(last.size, size, sizeof last.size);
    if ((uintptr_t)extra[0] != 1 || (uintptr_t)extra[2] != 2) return 1;
    last.bytes = *(uint64_t *)extra[3], last.end = (uintptr_t)extra[4];
    memcpy(last.arguments, extra[1], last.bytes);
    return 0;
}
#define START(name)                                                                                                 \
    int name(handle f, uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t e, uint32_t g, uint32_t lds,        \
             handle stream, void **params, void **extra) {                                                          \
        const uint32_t size[7] = {a, b, c, d, e, g, lds};                                                           \
        return params ? 1 : start(#name, f, size, stream, extra);                                                   \
    }

/* CUDA: contexts are the device's number plus 0x100 */
int cuInit(unsigned flags) { CALL("cuInit"); return (int)flags; }
int cuDevicePrimaryCtxRetain(handle *context, int device) {
    CALL("cuDevicePrimaryCtxRetain");
    if (device > 1) return 101;
    *context = (handle)(uintptr_t)(0x100 + device);
    return 0;
}
int cuCtxGetCurrent(handle *context) { *context = current < 0 ? 0 : (handle)(uintptr_t)(0x100 + current); return 0; }
int cuCtxSetCurrent(handle context) { CALL("cuCtxSetCurrent"); current = (int)(uintptr_t)context - 0x100; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device > 1) return 101;
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 97 ? 232448 : -1;
    return 0;
}
int cuFuncGetAttribute(int *value, int attribute, handle f) { (void)f; *value = attribute == 1 ? 1024 : -1; return 0; }
int cuFuncSetAttribute(handle f, int attribute, int value) { (void)f; attributes[attribute] = value; return 0; }
int cuModuleLoadData(handle *module, const char *image) { return load("cuModuleLoadData", module, image); }
int cuModuleGetFunction(handle *f, handle module, const char *name) { return find("cuModuleGetFunction", f, module, name); }
struct attribute { int id, pad; uint32_t value[16]; };
struct config { uint32_t size[7]; handle stream; struct attribute *attributes; uint32_t count; };
int cuLaunchKernelEx(const struct config *config, handle f, void **params, void **extra) {
    last.cluster = last.overlap = 0;
    for (uint32_t i = 0; i < config->count; i++) {
        const struct attribute *a = config->attributes + i;
        if (a->id == 4 && a->value[1] == 1 && a->value[2] == 1) last.cluster = a->value[0];
        else if (a->id == 6) last.overlap = a->value[0];
        else return 1;
    }
    return params ? 1 : start("cuLaunchKernelEx", f, config->size, config->stream, extra);
}
int cuGetErrorName(int code, const char **name) {
    if (code == 12345) return 1;
    snprintf(text, sizeof text, "CUDA_ERROR_%d", code), *name = text;
    return 0;
}
int cuGetErrorString(int code, const char **string) { (void)code; *string = "what CUDA says"; return 0; }

/* HIP */
int hipInit(unsigned flags) { CALL("hipInit"); return (int)flags; }
int hipGetDevice(int *device) { *device = current; return 0; }
int hipSetDevice(int device) { CALL("hipSetDevice"); if (device > 1) return 101; current = device; return 0; }
int hipGetDevicePropertiesR0600(char *properties, int device) {
    if (device > 1) return 101;
    memset(properties, 0, 1472);
    strcpy(properties, "AMD Instinct MI355X"), strcpy(properties + 1160, "gfx950:sramecc+:xnack-");
    return 0;
}
int hipDeviceGetAttribute(int *value, int attribute, int device) { (void)device; *value = attribute == 63 ? 256 : -1; return 0; }
int hipModuleLoadData(handle *module, const char *image) { return load("hipModuleLoadData", module, image); }
int hipModuleGetFunction(handle *f, handle module, const char *name) { return find("hipModuleGetFunction", f, module, name); }
START(hipModuleLaunchKernel)
const char *hipGetErrorName(int code) { snprintf(text, sizeof text, "hipError%d", code); return text; }
const char *hipGetErrorString(int code) { (void)code; return "what HIP says"; }
