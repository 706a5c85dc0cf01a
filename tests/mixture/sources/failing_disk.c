/* A disk that fails, for LD_PRELOAD: reading the file FAIL_NAME gives EIO after FAIL_AFTER bytes of it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static long read_bytes;
static char counted_name[4096];

static int fails(int descriptor) {
    const char *name = getenv("FAIL_NAME");
    char link[64], path[4096];
    if (name == NULL)
        return 0;
    if (strcmp(name, counted_name) != 0) {
        snprintf(counted_name, sizeof counted_name, "%s", name);
        read_bytes = 0;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strcmp(path, name) == 0;
}

static ssize_t counted(int descriptor, ssize_t result) {
    if (result > 0 && fails(descriptor))
        read_bytes += result;
    return result;
}

static int failed(int descriptor) {
    const char *after = getenv("FAIL_AFTER");
    if (after == NULL || read_bytes < atol(after) || !fails(descriptor))
        return 0;
    errno = EIO;
    return 1;
}

ssize_t read(int descriptor, void *buffer, size_t size) {
    ssize_t (*next)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    return failed(descriptor) ? -1 : counted(descriptor, next(descriptor, buffer, size));
}

ssize_t pread(int descriptor, void *buffer, size_t size, off_t place) {
    ssize_t (*next)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    return failed(descriptor) ? -1 : counted(descriptor, next(descriptor, buffer, size, place));
}

ssize_t pread64(int descriptor, void *buffer, size_t size, off64_t place) {
    ssize_t (*next)(int, void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pread64");
    return failed(descriptor) ? -1 : counted(descriptor, next(descriptor, buffer, size, place));
}
