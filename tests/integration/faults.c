/* Preloaded into a process, it makes the n-th system call that touches a folder fail, or kills the process there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long left = -1;
static long seen = 0;
static int deadly = 0;

/* fault_arm("/folder", n, kill): the n-th call from now on fails with ENOSPC, or kills. n = 0 only counts. */
void fault_arm(const char *path, long n, int kill_there) {
    strncpy(folder, path, sizeof folder - 1);
    left = n;
    seen = 0;
    deadly = kill_there;
}
long fault_seen(void) { return seen; }

static int hit(const char *path) {
    if (left < 0 || !path || strncmp(path, folder, strlen(folder)) != 0) return 0;
    seen++;
    if (seen != left) return 0;
    if (deadly) kill(getpid(), SIGKILL);
    errno = ENOSPC;
    return 1;
}
static int hit_fd(int fd) {
    char link[64], path[4096];
    if (left < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return hit(path);
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list a; va_start(a, flags); int mode = va_arg(a, int); va_end(a); \
        if ((flags & (O_WRONLY | O_RDWR)) && hit(path)) return -1;      \
        return REAL(name)(path, flags, mode);                           \
    }
#define OPENAT(name)                                                    \
    int name(int at, const char *path, int flags, ...) {                \
        va_list a; va_start(a, flags); int mode = va_arg(a, int); va_end(a); \
        if ((flags & (O_WRONLY | O_RDWR)) && hit(path)) return -1;      \
        return REAL(name)(at, path, flags, mode);                       \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ssize_t write(int fd, const void *b, size_t n) { return hit_fd(fd) ? -1 : REAL(write)(fd, b, n); }
ssize_t writev(int fd, const struct iovec *v, int n) { return hit_fd(fd) ? -1 : REAL(writev)(fd, v, n); }
int ftruncate64(int fd, off64_t n) { return hit_fd(fd) ? -1 : REAL(ftruncate64)(fd, n); }
int fsync(int fd) { return hit_fd(fd) ? -1 : REAL(fsync)(fd); }
int rename(const char *a, const char *b) { return hit(a) ? -1 : REAL(rename)(a, b); }
int mkdir(const char *path, mode_t m) { return hit(path) ? -1 : REAL(mkdir)(path, m); }
int rmdir(const char *path) { return hit(path) ? -1 : REAL(rmdir)(path); }
int unlink(const char *path) { return hit(path) ? -1 : REAL(unlink)(path); }
int unlinkat(int at, const char *path, int f) { return hit_fd(at) ? -1 : REAL(unlinkat)(at, path, f); }
