/* Stands between a process and its files below one directory: records what is written and synced, and fails the n-th
 * call. Preloaded; driven by shim_record() and shim_arm(). Calls of all threads are recorded in the order in which they
 * were done. The format of a record stands in disk.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { OPEN = 1, CLOSE, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MARK };
enum { SHORT = -1, DESCRIPTORS = 4096 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char directory[4096], tracked[DESCRIPTORS];
static int log_fd = -1, failure;
static long calls, first, last;

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

void shim_watch(const char *path) { strncpy(directory, path, sizeof directory - 1); }

void shim_record(const char *path) {
    if (log_fd >= 0) syscall(SYS_close, log_fd);
    log_fd = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
}

/* Fail `times` calls from the n-th on, counted from here, with an errno or SHORT. */
void shim_arm(long nth, int error, long times) { calls = 0; first = nth; last = nth + times - 1; failure = error; }
long shim_calls(void) { return calls; }

static int is_ours(const char *path) { return directory[0] && !strncmp(path, directory, strlen(directory)); }
static int is_tracked(int fd) { return fd >= 0 && fd < DESCRIPTORS && tracked[fd]; }

/* Whether this call has to fail: 0, an errno, or SHORT. */
static int verdict(void) { calls++; return first && calls >= first && calls <= last ? failure : 0; }

static void note(int op, int fd, int64_t offset, const void *data, uint32_t length) {
    char head[17];
    if (log_fd < 0) return;
    head[0] = (char)op;
    memcpy(head + 1, &fd, 4); memcpy(head + 5, &offset, 8); memcpy(head + 13, &length, 4);
    syscall(SYS_write, log_fd, head, sizeof head);
    if (length) syscall(SYS_write, log_fd, data, length);
}

/* What the process itself wants to stand between its calls. */
void shim_mark(const char *text) {
    pthread_mutex_lock(&lock);
    note(MARK, -1, 0, text, (uint32_t)strlen(text));
    pthread_mutex_unlock(&lock);
}

static int opened(int dir, const char *path, int flags, mode_t mode) {
    int fd, error = 0;
    if (!is_ours(path)) return (int)syscall(SYS_openat, dir, path, flags, mode);
    pthread_mutex_lock(&lock);
    if (flags & O_CREAT) error = verdict();
    if (error > 0) { errno = error; fd = -1; }
    else fd = (int)syscall(SYS_openat, dir, path, flags, mode);
    if (fd >= 0 && fd < DESCRIPTORS) { tracked[fd] = 1; note(OPEN, fd, flags & (O_CREAT | O_TRUNC), path, strlen(path)); }
    pthread_mutex_unlock(&lock);
    return fd;
}

#define MODE mode_t mode = 0; if (flags & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE return opened(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE return opened(dir, path, flags, mode); }

int close(int fd) {
    int result;
    if (!is_tracked(fd)) return REAL(int, close, int)(fd);
    pthread_mutex_lock(&lock);
    tracked[fd] = 0;
    note(CLOSE, fd, 0, 0, 0);
    result = REAL(int, close, int)(fd);
    pthread_mutex_unlock(&lock);
    return result;
}

static ssize_t written(int fd, const void *data, size_t size, int64_t at, int moves) {
    ssize_t result;
    int error;
    pthread_mutex_lock(&lock);
    error = verdict();
    if (error == SHORT && size > 1) size /= 2;
    if (moves) at = lseek64(fd, 0, SEEK_CUR);
    if (error > 0) { errno = error; result = -1; }
    else result = moves ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, at);
    if (result > 0) note(WRITE, fd, at, data, (uint32_t)result);
    pthread_mutex_unlock(&lock);
    return result;
}

ssize_t write(int fd, const void *data, size_t size) {
    return is_tracked(fd) ? written(fd, data, size, 0, 1) : syscall(SYS_write, fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return is_tracked(fd) ? written(fd, data, size, at, 0) : syscall(SYS_pwrite64, fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return is_tracked(fd) ? written(fd, data, size, at, 0) : syscall(SYS_pwrite64, fd, data, size, at);
}

static int truncated(int fd, int64_t size) {
    int result, error;
    if (!is_tracked(fd)) return (int)syscall(SYS_ftruncate, fd, size);
    pthread_mutex_lock(&lock);
    error = verdict();
    if (error > 0) { errno = error; result = -1; }
    else result = (int)syscall(SYS_ftruncate, fd, size);
    if (!result) note(TRUNCATE, fd, size, 0, 0);
    pthread_mutex_unlock(&lock);
    return result;
}
int ftruncate(int fd, off_t size) { return truncated(fd, size); }
int ftruncate64(int fd, off64_t size) { return truncated(fd, size); }

/* A sync that fails is recorded as such: what was to be synced may never reach the disk. One that was interrupted has
 * not begun. */
static int synced(int fd, int number) {
    int result, error;
    if (!is_tracked(fd)) return (int)syscall(number, fd);
    pthread_mutex_lock(&lock);
    error = verdict();
    if (error > 0) { errno = error; result = -1; }
    else result = (int)syscall(number, fd);
    if (error != EINTR) note(SYNC, fd, result, 0, 0);
    pthread_mutex_unlock(&lock);
    return result;
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

int rename(const char *from, const char *to) {
    int result, error;
    char both[8192];
    if (!is_ours(from)) return (int)syscall(SYS_rename, from, to);
    pthread_mutex_lock(&lock);
    error = verdict();
    if (error > 0) { errno = error; result = -1; }
    else result = (int)syscall(SYS_rename, from, to);
    if (!result) {
        size_t length = strlen(from) + 1;
        memcpy(both, from, length);
        strcpy(both + length, to);
        note(RENAME, -1, 0, both, (uint32_t)(length + strlen(to)));
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int unlink(const char *path) {
    int result, error;
    if (!is_ours(path)) return (int)syscall(SYS_unlink, path);
    pthread_mutex_lock(&lock);
    error = verdict();
    if (error > 0) { errno = error; result = -1; }
    else result = (int)syscall(SYS_unlink, path);
    if (!result) note(UNLINK, -1, 0, path, strlen(path));
    pthread_mutex_unlock(&lock);
    return result;
}
