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

enum { ONCE, KILL, FULL };

static char folder[4096];
static long left = -1;
static long seen = 0;
static int mode = ONCE;
static int list = -1;

/* fault_arm("/folder", n, mode): the n-th call from now on fails with ENOSPC (ONCE), or kills (KILL), or it and all
   later ones that need room fail (FULL); a write does half of its work before. n = 0 only counts. */
void fault_arm(const char *path, long n, int how) {
    strncpy(folder, path, sizeof folder - 1);
    left = n;
    seen = 0;
    mode = how;
}
long fault_seen(void) { return seen; }
/* Write the name and path of every call that is counted to this file. */
void fault_list(int fd) { list = fd; }

/* Whether this is the call; later ones that need room count as well on a disk that is full. */
static int reached(const char *name, const char *path, int needs_room) {
    if (left < 0 || !path || strncmp(path, folder, strlen(folder)) != 0) return 0;
    seen++;
    if (list >= 0) dprintf(list, "%s %s\n", name, path);
    return seen == left || (mode == FULL && left > 0 && seen > left && needs_room);
}
static int reached_fd(const char *name, int fd, int needs_room) {
    char link[64], path[4096];
    if (left < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return reached(name, path, needs_room);
}
static int fault(void) {
    if (mode == KILL) kill(getpid(), SIGKILL);
    errno = ENOSPC;
    return 1;
}
static int hit(const char *name, const char *path, int room) { return reached(name, path, room) && fault(); }
static int hit_fd(const char *name, int fd, int room) { return reached_fd(name, fd, room) && fault(); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list a; va_start(a, flags); int bits = va_arg(a, int); va_end(a); \
        if ((flags & (O_WRONLY | O_RDWR)) && hit("open", path, flags & O_CREAT)) return -1; \
        return REAL(name)(path, flags, bits);                           \
    }
#define OPENAT(name)                                                    \
    int name(int at, const char *path, int flags, ...) {                \
        va_list a; va_start(a, flags); int bits = va_arg(a, int); va_end(a); \
        if ((flags & (O_WRONLY | O_RDWR)) && hit("open", path, flags & O_CREAT)) return -1; \
        return REAL(name)(at, path, flags, bits);                       \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
ssize_t write(int fd, const void *b, size_t n) {
    if (!reached_fd("write", fd, 1)) return REAL(write)(fd, b, n);
    if (seen > left || n < 2) { fault(); return -1; }
    ssize_t half = REAL(write)(fd, b, n / 2);
    if (mode == KILL) fault();
    /* The rest of the bytes, which the caller tries next, is what fails. */
    if (mode == ONCE) left = seen + 1;
    return half;
}
ssize_t writev(int fd, const struct iovec *v, int n) { return hit_fd("write", fd, 1) ? -1 : REAL(writev)(fd, v, n); }
int ftruncate64(int fd, off64_t n) { return hit_fd("write", fd, 1) ? -1 : REAL(ftruncate64)(fd, n); }
int fsync(int fd) { return hit_fd("fsync", fd, 0) ? -1 : REAL(fsync)(fd); }
int rename(const char *a, const char *b) { return hit("rename", a, 0) ? -1 : REAL(rename)(a, b); }
int mkdir(const char *path, mode_t m) { return hit("mkdir", path, 1) ? -1 : REAL(mkdir)(path, m); }
int rmdir(const char *path) { return hit("rmdir", path, 0) ? -1 : REAL(rmdir)(path); }
int unlink(const char *path) { return hit("unlink", path, 0) ? -1 : REAL(unlink)(path); }
int unlinkat(int at, const char *path, int f) { return hit_fd("unlink", at, 0) ? -1 : REAL(unlinkat)(at, path, f); }
