/* Preloaded library: errors of system calls and steps of the clock, on request, in one tree of processes.

   The file named by CHAOS_CONTROL is mapped and shared; chaos_faults/preload.py writes it. Calls fail only on
   paths, or on descriptors of paths, that begin with the prefix, so that imports and sockets are untouched. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t clock_ns; /* added to the wall clock */
    int32_t function; /* index of a function below, -1: none */
    int32_t error;    /* errno */
    int32_t skip;     /* calls that succeed first */
    int32_t left;     /* calls that fail after them */
    int32_t fired;    /* calls that failed */
    int32_t reserved;
    char prefix[1024];
};

enum { OPEN, READ, WRITE, FSYNC, RENAME, UNLINK, MKDIR, STAT, FLOCK, OPENDIR, CLOSE, LINK };

static struct control *control;

static void __attribute__((constructor)) map_control(void) {
    const char *path = getenv("CHAOS_CONTROL");
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    int file = path && real ? real(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *place = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (place != MAP_FAILED) control = place;
    close(file);
}

static int fails(int function, const char *path, int descriptor) {
    char link[64], name[1024];
    if (!control || __atomic_load_n(&control->function, __ATOMIC_ACQUIRE) != function) return 0;
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t length = readlink(link, name, sizeof name - 1);
        if (length < 0) return 0;
        name[length] = 0;
        path = name;
    }
    if (strncmp(path, control->prefix, strlen(control->prefix))) return 0;
    if (__atomic_sub_fetch(&control->skip, 1, __ATOMIC_ACQ_REL) >= 0) return 0;
    if (__atomic_sub_fetch(&control->left, 1, __ATOMIC_ACQ_REL) < 0) return 0;
    __atomic_add_fetch(&control->fired, 1, __ATOMIC_ACQ_REL);
    errno = control->error;
    return 1;
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }

int open(const char *path, int flags, ...) {
    MODE REAL(int, open, const char *, int, ...);
    return fails(OPEN, path, -1) ? -1 : real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE REAL(int, open64, const char *, int, ...);
    return fails(OPEN, path, -1) ? -1 : real(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    MODE REAL(int, openat, int, const char *, int, ...);
    return fails(OPEN, path, -1) ? -1 : real(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    MODE REAL(int, openat64, int, const char *, int, ...);
    return fails(OPEN, path, -1) ? -1 : real(at, path, flags, mode);
}
ssize_t read(int file, void *place, size_t size) {
    REAL(ssize_t, read, int, void *, size_t);
    return fails(READ, NULL, file) ? -1 : real(file, place, size);
}
ssize_t write(int file, const void *place, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    return fails(WRITE, NULL, file) ? -1 : real(file, place, size);
}
ssize_t pwrite64(int file, const void *place, size_t size, off64_t at) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    return fails(WRITE, NULL, file) ? -1 : real(file, place, size, at);
}
int fsync(int file) {
    REAL(int, fsync, int);
    return fails(FSYNC, NULL, file) ? -1 : real(file);
}
int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    return fails(RENAME, to, -1) ? -1 : real(from, to);
}
int unlink(const char *path) {
    REAL(int, unlink, const char *);
    return fails(UNLINK, path, -1) ? -1 : real(path);
}
int unlinkat(int at, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    return fails(UNLINK, at == AT_FDCWD ? path : NULL, at) ? -1 : real(at, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    return fails(MKDIR, path, -1) ? -1 : real(path, mode);
}
int stat64(const char *path, struct stat64 *facts) {
    REAL(int, stat64, const char *, struct stat64 *);
    return fails(STAT, path, -1) ? -1 : real(path, facts);
}
int stat(const char *path, struct stat *facts) {
    REAL(int, stat, const char *, struct stat *);
    return fails(STAT, path, -1) ? -1 : real(path, facts);
}
int lstat64(const char *path, struct stat64 *facts) {
    REAL(int, lstat64, const char *, struct stat64 *);
    return fails(STAT, path, -1) ? -1 : real(path, facts);
}
int fstatat64(int at, const char *path, struct stat64 *facts, int flags) {
    REAL(int, fstatat64, int, const char *, struct stat64 *, int);
    return fails(STAT, path, -1) ? -1 : real(at, path, facts, flags);
}
int flock(int file, int operation) {
    REAL(int, flock, int, int);
    return fails(FLOCK, NULL, file) ? -1 : real(file, operation);
}
int close(int file) {
    REAL(int, close, int);
    int failed = fails(CLOSE, NULL, file), error = errno;
    int result = real(file); /* as on Linux: the descriptor is gone whatever close returns */
    if (failed) errno = error;
    return failed ? -1 : result;
}
int link(const char *from, const char *to) {
    REAL(int, link, const char *, const char *);
    return fails(LINK, to, -1) ? -1 : real(from, to);
}
DIR *opendir(const char *path) {
    REAL(DIR *, opendir, const char *);
    return fails(OPENDIR, path, -1) ? NULL : real(path);
}

static int64_t step(void) { return control ? __atomic_load_n(&control->clock_ns, __ATOMIC_ACQUIRE) : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int result = real(clock, now);
    int64_t moved = step();
    if (result == 0 && moved && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t time = now->tv_sec * 1000000000LL + now->tv_nsec + moved;
        now->tv_sec = time / 1000000000LL;
        now->tv_nsec = time % 1000000000LL;
    }
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return result;
}
time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}
