/* Counts the system calls by which a process changes what is below a folder, and kills it at one.

   Loaded by LD_PRELOAD; asleep until kills_arm. Each call that counts is a line of the journal,
   "number<TAB>name<TAB>path", written before the call is made. Call number `at` is not made: the
   process is killed instead, or, where `half` is set and it writes bytes, after half of them.
   What passes by the C library is not seen: of all that the package writes, that is the rename by
   which safetensors ends a file within a hidden folder, and what changes modes and times.
   `no_swap` stands in for file systems on which two folders cannot change places. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static long at, count;
static int half, no_swap, journal = -1;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

void kills_arm(const char *folder, long number, int is_half, int without_swap, int descriptor) {
    root_length = strlen(folder);
    memcpy(root, folder, root_length + 1);
    at = number, half = is_half, no_swap = without_swap, count = 0, journal = descriptor;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static void of_name(int folder, const char *name, char *path) {
    size_t length = 0;
    path[0] = 0;
    if (name[0] != '/') {
        if (folder == AT_FDCWD ? getcwd(path, PATH_MAX) == NULL : !of_descriptor(folder, path))
            return;
        length = strlen(path);
        path[length++] = '/';
    }
    snprintf(path + length, PATH_MAX - length, "%s", name);
}

/* Says whether half of it is to be written; does not return where the process ends before it. */
static int cut(const char *name, const char *path, int is_writing) {
    int is_cut = 0;
    if (journal < 0 || strncmp(path, root, root_length) || (path[root_length] && path[root_length] != '/'))
        return 0;
    pthread_mutex_lock(&turn);
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\n", ++count, name, path + root_length);
    syscall(SYS_write, journal, line, length);
    if (count == at) {
        if (!half || !is_writing) die();
        is_cut = 1; /* and keeps its turn: no other thread goes on */
    } else
        pthread_mutex_unlock(&turn);
    return is_cut;
}

static int cut_descriptor(const char *name, int descriptor, int is_writing) {
    char path[PATH_MAX];
    return journal >= 0 && of_descriptor(descriptor, path) && cut(name, path, is_writing);
}

static void cut_name(const char *name, int folder, const char *given) {
    char path[PATH_MAX];
    if (journal < 0) return;
    of_name(folder, given, path);
    cut(name, path, 0);
}

#define REAL(name, ...) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* --- bytes --- */

ssize_t write(int d, const void *bytes, size_t n) {
    REAL(write);
    if (n && cut_descriptor("write", d, 1)) { real(d, bytes, n / 2); die(); }
    return real(d, bytes, n);
}
#define PWRITE(name, offset_t) \
    ssize_t name(int d, const void *bytes, size_t n, offset_t offset) { \
        REAL(name); \
        if (n && cut_descriptor("pwrite", d, 1)) { real(d, bytes, n / 2, offset); die(); } \
        return real(d, bytes, n, offset); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
ssize_t writev(int d, const struct iovec *parts, int n) {
    REAL(writev);
    if (cut_descriptor("writev", d, 1)) { syscall(SYS_write, d, parts[0].iov_base, parts[0].iov_len / 2); die(); }
    return real(d, parts, n);
}
#define COPY(name, offset_t) \
    ssize_t name(int to, int from, offset_t *offset, size_t n) { \
        REAL(name); \
        if (cut_descriptor("sendfile", to, 1)) { \
            struct stat s; \
            fstat(from, &s); \
            real(to, from, offset, s.st_size / 2); \
            die(); \
        } \
        return real(to, from, offset, n); \
    }
COPY(sendfile, off_t)
COPY(sendfile64, off64_t)
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t n, unsigned flags) {
    REAL(copy_file_range);
    if (cut_descriptor("copy_file_range", to, 1)) {
        struct stat s;
        fstat(from, &s);
        real(from, a, to, b, s.st_size / 2, flags);
        die();
    }
    return real(from, a, to, b, n, flags);
}
#define RESIZE(name, offset_t) \
    int name(int d, offset_t size) { REAL(name); cut_descriptor("ftruncate", d, 0); return real(d, size); }
RESIZE(ftruncate, off_t)
RESIZE(ftruncate64, off64_t)
#define ALLOCATE(name, offset_t) \
    int name(int d, offset_t a, offset_t b) { REAL(name); cut_descriptor("fallocate", d, 0); return real(d, a, b); }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)
int fsync(int d) { REAL(fsync); cut_descriptor("fsync", d, 0); return real(d); }
int fdatasync(int d) { REAL(fdatasync); cut_descriptor("fdatasync", d, 0); return real(d); }

/* --- names --- */

static void cut_open(int folder, const char *path, int flags) {
    if (flags & (O_CREAT | O_TRUNC)) cut_name("open", folder, path);
}
#define MODE(flags) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); MODE(flags) cut_open(AT_FDCWD, path, flags); return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); MODE(flags) cut_open(folder, path, flags); return real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)
int rename(const char *a, const char *b) { REAL(rename); cut_name("rename", AT_FDCWD, b); return real(a, b); }
int renameat(int x, const char *a, int y, const char *b) {
    REAL(renameat); cut_name("rename", y, b); return real(x, a, y, b);
}
int renameat2(int x, const char *a, int y, const char *b, unsigned flags) {
    REAL(renameat2);
    if (no_swap && flags) { errno = EINVAL; return -1; }
    cut_name("swap", y, b);
    return real(x, a, y, b, flags);
}
int link(const char *a, const char *b) { REAL(link); cut_name("link", AT_FDCWD, b); return real(a, b); }
int linkat(int x, const char *a, int y, const char *b, int flags) {
    REAL(linkat); cut_name("link", y, b); return real(x, a, y, b, flags);
}
int symlink(const char *a, const char *b) { REAL(symlink); cut_name("symlink", AT_FDCWD, b); return real(a, b); }
int unlink(const char *path) { REAL(unlink); cut_name("unlink", AT_FDCWD, path); return real(path); }
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat); cut_name("unlink", folder, path); return real(folder, path, flags);
}
int rmdir(const char *path) { REAL(rmdir); cut_name("rmdir", AT_FDCWD, path); return real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); cut_name("mkdir", AT_FDCWD, path); return real(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat); cut_name("mkdir", folder, path); return real(folder, path, mode);
}
int truncate(const char *path, off_t size) { REAL(truncate); cut_name("truncate", AT_FDCWD, path); return real(path, size); }
