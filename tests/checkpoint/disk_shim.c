/* Stands between a process and its disk (LD_PRELOAD): counts the calls that touch files below one folder, and at a given
 * one kills the process or fails. All processes that map the same control page share count and lock, so that calls of
 * several ranks and threads have one order. With a trace, every change that was made is written down, data included. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum action { NOTHING, KILL, FAIL };
enum kind { READS = 1, WRITES = 2, FLUSHES = 4, CHANGES = 8, OTHER = 16 };

struct control { /* tests/checkpoint/disk_shim.py has the same fields */
    int32_t lock, action, error, kinds;
    int64_t count, at, until, delay_us, struck, most;
    char root[1024], trace[1024];
};

static struct control *control;

__attribute__((constructor)) static void map_control(void) {
    const char *path = getenv("DISK_SHIM_CONTROL");
    int descriptor = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0) return;
    void *page = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    syscall(SYS_close, descriptor);
    if (page != MAP_FAILED) control = page;
}

static int below(const char *path) {
    size_t size = strlen(control->root);
    return size && !strncmp(path, control->root, size) && (path[size] == '/' || path[size] == 0 || path[size] == ' ');
}

static void of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[size < 0 ? 0 : size] = 0;
}

static void absolute(int folder, const char *name, char *path) {
    if (name[0] == '/') { snprintf(path, PATH_MAX, "%s", name); return; }
    char start[PATH_MAX];
    if (folder == AT_FDCWD) { if (!getcwd(start, sizeof start)) start[0] = 0; }
    else of_descriptor(folder, start);
    snprintf(path, PATH_MAX, "%.2000s/%.2000s", start, name);
}

/* Called before a call: returns -1 when it is to fail (errno set), else 0 with the lock held when `path` is watched. */
static int enter(const char *path, int kind, int *watched) {
    *watched = control && below(path);
    if (!*watched) return 0;
    while (__atomic_exchange_n(&control->lock, 1, __ATOMIC_ACQUIRE)) sched_yield();
    int64_t number = ++control->count;
    int struck = number >= control->at && number < control->until && (kind & control->kinds) && control->struck < control->most;
    if (control->delay_us && (kind & (WRITES | FLUSHES))) {
        struct timespec pause = {control->delay_us / 1000000, control->delay_us % 1000000 * 1000};
        nanosleep(&pause, NULL);
    }
    if (!struck || control->action == NOTHING) return 0;
    ++control->struck;
    __atomic_store_n(&control->lock, 0, __ATOMIC_RELEASE);
    if (control->action == KILL) { kill(getpid(), SIGKILL); for (;;) pause(); }
    errno = control->error;
    return -1;
}

static void leave(int watched) {
    if (watched) __atomic_store_n(&control->lock, 0, __ATOMIC_RELEASE);
}

/* One record: `kind number offset length path other\n`, then `length` bytes of data. The lock is held. */
static void record(char kind, const char *path, const char *other, int64_t offset, const void *data, int64_t length) {
    if (!control->trace[0]) return;
    char line[3 * 1024];
    int size = snprintf(line, sizeof line, "%c\t%lld\t%lld\t%lld\t%s\t%s\n", kind, (long long)control->count,
                        (long long)offset, (long long)length, path, other);
    int descriptor = (int)syscall(SYS_openat, AT_FDCWD, control->trace, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    syscall(SYS_write, descriptor, line, size);
    if (data) syscall(SYS_write, descriptor, data, length);
    syscall(SYS_close, descriptor);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define PATH_CALL(kind, folder, name, before, call, after)                                                            \
    char path[PATH_MAX]; int watched;                                                                                 \
    if (control) absolute(folder, name, path); else path[0] = 0;                                                      \
    before                                                                                                            \
    if (enter(path, kind, &watched)) return -1;                                                                       \
    int result = call; int error = errno;                                                                             \
    if (watched && result >= 0) { after; }                                                                            \
    leave(watched); errno = error; return result;
#define FD_CALL(type, kind, descriptor, call, after)                                                                  \
    char path[PATH_MAX]; int watched;                                                                                 \
    if (control && control->root[0]) of_descriptor(descriptor, path); else path[0] = 0;                               \
    if (enter(path, kind, &watched)) return -1;                                                                       \
    type result = call; int error = errno;                                                                            \
    if (watched && result >= 0) { after; }                                                                            \
    leave(watched); errno = error; return result;

static int opening(int folder, const char *name, int flags, mode_t mode) {
    int kind = (flags & (O_CREAT | O_TRUNC)) ? CHANGES : READS;
    PATH_CALL(kind, folder, name, , (int)syscall(SYS_openat, folder, name, flags, mode),
              if (flags & O_CREAT) record('C', path, "", 0, NULL, 0);
              if (flags & O_TRUNC) record('T', path, "", 0, NULL, 0))
}
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, flags); mode = va_arg(l, int); va_end(l); }
int open(const char *name, int flags, ...) { MODE return opening(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE return opening(AT_FDCWD, name, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE return opening(folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE return opening(folder, name, flags | O_LARGEFILE, mode); }

ssize_t write(int descriptor, const void *data, size_t size) {
    off_t offset = control && control->root[0] ? (off_t)syscall(SYS_lseek, descriptor, 0, SEEK_CUR) : 0;
    FD_CALL(ssize_t, WRITES, descriptor, syscall(SYS_write, descriptor, data, size), record('W', path, "", offset, data, result))
}
static ssize_t writing(int descriptor, const void *data, size_t size, off_t offset) {
    FD_CALL(ssize_t, WRITES, descriptor, syscall(SYS_pwrite64, descriptor, data, size, offset), record('W', path, "", offset, data, result))
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) { return writing(descriptor, data, size, offset); }
ssize_t pwrite64(int descriptor, const void *data, size_t size, off_t offset) { return writing(descriptor, data, size, offset); }

static ssize_t reading(int descriptor, const struct iovec *parts, int count, off_t offset) {
    FD_CALL(ssize_t, READS, descriptor, syscall(SYS_preadv, descriptor, parts, count, offset, 0), )
}
ssize_t preadv(int d, const struct iovec *p, int n, off_t o) { return reading(d, p, n, o); }
ssize_t preadv64(int d, const struct iovec *p, int n, off_t o) { return reading(d, p, n, o); }
ssize_t preadv2(int d, const struct iovec *p, int n, off_t o, int flags) { return reading(d, p, n, o); }
ssize_t preadv64v2(int d, const struct iovec *p, int n, off_t o, int flags) { return reading(d, p, n, o); }
ssize_t read(int descriptor, void *data, size_t size) {
    FD_CALL(ssize_t, READS, descriptor, syscall(SYS_read, descriptor, data, size), )
}
off_t lseek(int d, off_t offset, int from) { FD_CALL(off_t, READS, d, syscall(SYS_lseek, d, offset, from), ) }
off_t lseek64(int d, off_t offset, int from) { FD_CALL(off_t, READS, d, syscall(SYS_lseek, d, offset, from), ) }

int fsync(int d) { FD_CALL(int, FLUSHES, d, (int)syscall(SYS_fsync, d), record('S', path, "", 0, NULL, 0)) }
int fdatasync(int d) { FD_CALL(int, FLUSHES, d, (int)syscall(SYS_fdatasync, d), record('S', path, "", 0, NULL, 0)) }
int ftruncate(int d, off_t size) { FD_CALL(int, CHANGES, d, (int)syscall(SYS_ftruncate, d, size), record('T', path, "", size, NULL, 0)) }
int ftruncate64(int d, off_t size) { FD_CALL(int, CHANGES, d, (int)syscall(SYS_ftruncate, d, size), record('T', path, "", size, NULL, 0)) }
int flock(int d, int operation) { FD_CALL(int, OTHER, d, (int)syscall(SYS_flock, d, operation), ) }
static int advising(int descriptor, off_t offset, off_t size, int advice) {
    char path[PATH_MAX]; int watched;
    if (control && control->root[0]) of_descriptor(descriptor, path); else path[0] = 0;
    if (enter(path, OTHER, &watched)) return errno;  /* this one returns its error */
    int result = syscall(SYS_fadvise64, descriptor, offset, size, advice) ? errno : 0;
    leave(watched); return result;
}
int posix_fadvise(int d, off_t offset, off_t size, int advice) { return advising(d, offset, size, advice); }
int posix_fadvise64(int d, off_t offset, off_t size, int advice) { return advising(d, offset, size, advice); }
int close(int descriptor) {  /* a file is closed also when that tells of an error */
    char path[PATH_MAX]; int watched;
    if (control && control->root[0]) of_descriptor(descriptor, path); else path[0] = 0;
    int failed = enter(path, OTHER, &watched);
    int error = errno, result = (int)syscall(SYS_close, descriptor);
    if (failed) { errno = error; return -1; }
    leave(watched); return result;
}

static int renaming(int from, const char *old, int to, const char *new) {
    char other[PATH_MAX];
    PATH_CALL(CHANGES, from, old, if (control) absolute(to, new, other);,
              (int)syscall(SYS_renameat, from, old, to, new), record('R', path, other, 0, NULL, 0))
}
int rename(const char *old, const char *new) { return renaming(AT_FDCWD, old, AT_FDCWD, new); }
int renameat(int from, const char *old, int to, const char *new) { return renaming(from, old, to, new); }
static int removing(int folder, const char *name, int flags) {
    PATH_CALL(CHANGES, folder, name, , (int)syscall(SYS_unlinkat, folder, name, flags), record('U', path, "", 0, NULL, 0))
}
int unlink(const char *name) { return removing(AT_FDCWD, name, 0); }
int unlinkat(int folder, const char *name, int flags) { return removing(folder, name, flags); }
int rmdir(const char *name) { return removing(AT_FDCWD, name, AT_REMOVEDIR); }
static int making(int folder, const char *name, mode_t mode) {
    PATH_CALL(CHANGES, folder, name, , (int)syscall(SYS_mkdirat, folder, name, mode), record('M', path, "", 0, NULL, 0))
}
int mkdir(const char *name, mode_t mode) { return making(AT_FDCWD, name, mode); }
int mkdirat(int folder, const char *name, mode_t mode) { return making(folder, name, mode); }
int chmod(const char *name, mode_t mode) {
    PATH_CALL(CHANGES, AT_FDCWD, name, , (int)syscall(SYS_fchmodat, AT_FDCWD, name, mode), )
}
DIR *opendir(const char *name) {
    char path[PATH_MAX]; int watched;
    if (control) absolute(AT_FDCWD, name, path); else path[0] = 0;
    if (enter(path, READS, &watched)) return NULL;
    DIR *result = REAL(opendir)(name);
    leave(watched); return result;
}
DIR *fdopendir(int descriptor) {
    char path[PATH_MAX]; int watched;
    if (control && control->root[0]) of_descriptor(descriptor, path); else path[0] = 0;
    if (enter(path, READS, &watched)) return NULL;
    DIR *result = REAL(fdopendir)(descriptor);
    leave(watched); return result;
}
