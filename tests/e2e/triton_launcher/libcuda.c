/* A driver without a device, for machines that have none: what Triton's launcher asks of
 * libcuda.so.1, answered as an H100 would (sm_90).
 *
 * Memory of the device is that of the host, and a launch computes nothing: it is written as a line
 * of JSON to the file that STAND_IN_LAUNCHES names, with its arguments as the kernel would get them.
 * How many there are and how long is read from the kernel's binary, as the driver does.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PARAMETERS = 64, KPARAM_INFO = 0x17, WITH_PAYLOAD = 4 };

struct kernel {
  char name[256];
  int count;
  int sizes[MOST_PARAMETERS]; /* bytes, by place */
};

struct module {
  char *image;
};

static int the_context; /* its address is the only context there is */
static _Thread_local CUcontext current;

CUresult cuGetErrorString(CUresult error, const char **text) {
  (void)error;
  *text = "an error of the stand-in";
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (device != 0)
    return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)&the_context;
  return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

/* Of the size of printf's buffer, which nobody here asks for. */
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  (void)value, (void)limit;
  return CUDA_ERROR_UNSUPPORTED_LIMIT;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  (void)limit, (void)value;
  return CUDA_ERROR_UNSUPPORTED_LIMIT;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *loaded, const void *image) {
  const Elf64_Ehdr *head = image;
  if (memcmp(head->e_ident, ELFMAG, SELFMAG) != 0 || head->e_machine != EM_CUDA)
    return CUDA_ERROR_INVALID_IMAGE;
  size_t size = head->e_shoff + (size_t)head->e_shnum * head->e_shentsize;
  const Elf64_Shdr *sections = (const void *)((const char *)image + head->e_shoff);
  for (int i = 0; i < head->e_shnum; i++)
    if (sections[i].sh_type != SHT_NOBITS && sections[i].sh_offset + sections[i].sh_size > size)
      size = sections[i].sh_offset + sections[i].sh_size;
  struct module *module = malloc(sizeof *module);
  module->image = memcpy(malloc(size), image, size);
  *loaded = (CUmodule)module;
  return CUDA_SUCCESS;
}

/* The section `.nv.info.NAME` is a list of (form, kind, bytes); one entry for each parameter. */
CUresult cuModuleGetFunction(CUfunction *function, CUmodule loaded, const char *name) {
  const char *image = ((struct module *)loaded)->image;
  const Elf64_Ehdr *head = (const void *)image;
  const Elf64_Shdr *sections = (const void *)(image + head->e_shoff);
  const char *names = image + sections[head->e_shstrndx].sh_offset;
  char wanted[sizeof ".nv.info." + 256];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  for (int i = 0; i < head->e_shnum; i++) {
    if (strcmp(names + sections[i].sh_name, wanted) != 0)
      continue;
    struct kernel *kernel = calloc(1, sizeof *kernel);
    snprintf(kernel->name, sizeof kernel->name, "%s", name);
    const uint8_t *at = (const void *)(image + sections[i].sh_offset);
    const uint8_t *end = at + sections[i].sh_size;
    while (at < end) {
      uint16_t length;
      memcpy(&length, at + 2, 2);
      if (at[0] == WITH_PAYLOAD && at[1] == KPARAM_INFO) {
        uint16_t place;
        uint32_t packed;
        memcpy(&place, at + 8, 2);
        memcpy(&packed, at + 12, 4);
        if (place >= MOST_PARAMETERS)
          return CUDA_ERROR_INVALID_IMAGE;
        kernel->sizes[place] = packed >> 18;
        kernel->count += 1;
      }
      at += 4 + (at[0] == WITH_PAYLOAD ? length : 0);
    }
    *function = (CUfunction)kernel;
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = 0; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  (void)function, (void)attribute, (void)value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  (void)function, (void)config;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  (void)extra;
  if (current == NULL)
    return CUDA_ERROR_INVALID_CONTEXT;
  const struct kernel *kernel = (const void *)function;
  const char *path = getenv("STAND_IN_LAUNCHES");
  FILE *file = path == NULL ? NULL : fopen(path, "a");
  if (file == NULL)
    return CUDA_ERROR_OPERATING_SYSTEM;
  fprintf(file, "{\"name\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], ", kernel->name,
          config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
          config->blockDimY, config->blockDimZ);
  fprintf(file, "\"shared\": %u, \"stream\": %llu, \"arguments\": [", config->sharedMemBytes,
          (unsigned long long)(uintptr_t)config->hStream);
  for (int i = 0; i < kernel->count; i++) {
    uint64_t value = 0; /* little-endian, as the machine that the stand-in is for */
    if (kernel->sizes[i] > (int)sizeof value)
      return CUDA_ERROR_INVALID_VALUE;
    memcpy(&value, parameters[i], kernel->sizes[i]);
    fprintf(file, "%s[%d, %llu]", i ? ", " : "", kernel->sizes[i], (unsigned long long)value);
  }
  fprintf(file, "]}\n");
  return fclose(file) == 0 ? CUDA_SUCCESS : CUDA_ERROR_OPERATING_SYSTEM;
}
