/* Keeps what is not synced out of a database: LD_PRELOAD, for tests only.
 *
 * A kill -9 leaves the kernel's page cache alone, so a write that was never synced survives it. With this library it does
 * not: writes to the database file and its -wal stay in this process's memory until fsync or fdatasync, and reads are
 * answered from there. What was not synced when the process dies is gone, as after a power cut.
 *
 * PAYCORE_UNSYNCED: the database file's path. PAYCORE_UNSYNCED_NEVER=1: a sync does nothing either, like a disk that lies.
 * For one process that has the file for itself. The shared index of the log (-shm) is left alone: it is made anew.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define MAX_FDS 65536
#define MAX_FILES 16

struct shadow {
    dev_t dev;
    ino_t ino;
    char *bytes;          /* the whole file as the process sees it; never freed */
    size_t size, room;
    size_t dirty_from, dirty_to; /* what the real file lacks; empty where from >= to */
    int resized;
};

static struct shadow files[MAX_FILES];
static int file_count;
static struct shadow *shadow_of[MAX_FDS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t really_pread(int fd, void *into, size_t count, off64_t at) { REAL(pread64); return real(fd, into, count, at); }
static ssize_t really_pwrite(int fd, const void *from, size_t count, off64_t at) { REAL(pwrite64); return real(fd, from, count, at); }
static int really_truncate(int fd, off64_t size) { REAL(ftruncate64); return real(fd, size); }
static int really_sync(int fd) { REAL(fdatasync); return real(fd); }
static int really_fstat(int fd, struct stat64 *into) { REAL(fstat64); return real(fd, into); }

static void stop(const char *why) {
    static const char head[] = "unsynced: ";
    ssize_t ignored = write(2, head, sizeof head - 1);
    ignored = write(2, why, strlen(why));
    (void)ignored;
    abort();
}

static int is_ours(const char *path) {
    const char *database = getenv("PAYCORE_UNSYNCED");
    if (!database || !path) return 0;
    size_t length = strlen(database);
    return !strncmp(path, database, length) && (!path[length] || !strcmp(path + length, "-wal"));
}

static struct shadow *find(dev_t dev, ino_t ino) {
    for (int i = 0; i < file_count; i++)
        if (files[i].dev == dev && files[i].ino == ino) return &files[i];
    return NULL;
}

static void resize(struct shadow *file, size_t size) {
    if (size > file->room) {
        size_t room = size * 2 + 65536;
        char *bytes = realloc(file->bytes, room);
        if (!bytes) stop("out of memory\n");
        file->bytes = bytes;
        file->room = room;
    }
    if (size > file->size) memset(file->bytes + file->size, 0, size - file->size);
    file->size = size;
}

static void load(struct shadow *file, int fd, size_t size) {
    resize(file, size);
    for (size_t at = 0; at < size;) {
        ssize_t count = really_pread(fd, file->bytes + at, size - at, (off64_t)at);
        if (count <= 0) stop("the file cannot be read\n");
        at += (size_t)count;
    }
}

static int opened(int fd, const char *path) {
    struct stat64 status;
    if (fd < 0 || !is_ours(path)) return fd;
    if (fd >= MAX_FDS || really_fstat(fd, &status)) stop("no room for another file\n");
    pthread_mutex_lock(&lock);
    struct shadow *file = find(status.st_dev, status.st_ino);
    if (!file) {
        if (file_count == MAX_FILES) stop("too many files\n");
        file = &files[file_count++];
        file->dev = status.st_dev;
        file->ino = status.st_ino;
        load(file, fd, (size_t)status.st_size);
    }
    shadow_of[fd] = file;
    pthread_mutex_unlock(&lock);
    return fd;
}

int stat64(const char *path, struct stat64 *into);

static struct shadow *shadow(int fd) { return fd >= 0 && fd < MAX_FDS ? shadow_of[fd] : NULL; }

/* Opening and closing. */

int open64(const char *path, int flags, ...) {
    REAL(open64);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(real(path, flags, mode), path);
}

int open(const char *path, int flags, ...) {
    REAL(open);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(real(path, flags, mode), path);
}

int close(int fd) {
    REAL(close);
    if (shadow(fd)) shadow_of[fd] = NULL;
    return real(fd);
}

int unlink(const char *path) {
    REAL(unlink);
    struct stat64 status;
    if (is_ours(path) && !stat64(path, &status)) {
        /* The number of a file that is gone may be given to another one. */
        pthread_mutex_lock(&lock);
        struct shadow *file = find(status.st_dev, status.st_ino);
        if (file) file->ino = 0;
        pthread_mutex_unlock(&lock);
    }
    return real(path);
}

/* Reading and writing. */

ssize_t pread64(int fd, void *into, size_t count, off64_t at) {
    struct shadow *file = shadow(fd);
    if (!file) return really_pread(fd, into, count, at);
    pthread_mutex_lock(&lock);
    size_t left = (size_t)at < file->size ? file->size - (size_t)at : 0;
    if (count > left) count = left;
    memcpy(into, file->bytes + at, count);
    pthread_mutex_unlock(&lock);
    return (ssize_t)count;
}

ssize_t pread(int fd, void *into, size_t count, off_t at) { return pread64(fd, into, count, at); }

ssize_t pwrite64(int fd, const void *from, size_t count, off64_t at) {
    struct shadow *file = shadow(fd);
    if (!file) return really_pwrite(fd, from, count, at);
    pthread_mutex_lock(&lock);
    size_t start = (size_t)at, end = start + count;
    if (end > file->size) resize(file, end);
    memcpy(file->bytes + start, from, count);
    if (file->dirty_from >= file->dirty_to) file->dirty_from = start, file->dirty_to = end;
    if (start < file->dirty_from) file->dirty_from = start;
    if (end > file->dirty_to) file->dirty_to = end;
    pthread_mutex_unlock(&lock);
    return (ssize_t)count;
}

ssize_t pwrite(int fd, const void *from, size_t count, off_t at) { return pwrite64(fd, from, count, at); }

ssize_t read(int fd, void *into, size_t count) {
    REAL(read);
    if (!shadow(fd)) return real(fd, into, count);
    ssize_t done = pread64(fd, into, count, lseek(fd, 0, SEEK_CUR));
    if (done > 0) lseek(fd, done, SEEK_CUR);
    return done;
}

ssize_t write(int fd, const void *from, size_t count) {
    REAL(write);
    if (!shadow(fd)) return real(fd, from, count);
    ssize_t done = pwrite64(fd, from, count, lseek(fd, 0, SEEK_CUR));
    if (done > 0) lseek(fd, done, SEEK_CUR);
    return done;
}

int ftruncate64(int fd, off64_t size) {
    struct shadow *file = shadow(fd);
    if (!file) return really_truncate(fd, size);
    pthread_mutex_lock(&lock);
    resize(file, (size_t)size);
    file->resized = 1;
    pthread_mutex_unlock(&lock);
    return 0;
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

/* A file mapped into memory would go around all this; SQLite maps the database only where it is told to. */

/* Sizes. */

static void correct(struct stat64 *status) {
    pthread_mutex_lock(&lock);
    struct shadow *file = find(status->st_dev, status->st_ino);
    if (file) status->st_size = (off64_t)file->size;
    pthread_mutex_unlock(&lock);
}

int fstat64(int fd, struct stat64 *into) {
    int failed = really_fstat(fd, into);
    if (!failed && shadow(fd)) correct(into);
    return failed;
}

int fstat(int fd, struct stat *into) { return fstat64(fd, (struct stat64 *)into); }

int stat64(const char *path, struct stat64 *into) {
    REAL(stat64);
    int failed = real(path, into);
    if (!failed && is_ours(path)) correct(into);
    return failed;
}

int stat(const char *path, struct stat *into) { return stat64(path, (struct stat64 *)into); }

/* Syncing: only now the real file gets what was written. */

static int sync_all(struct shadow *file, int fd) {
    pthread_mutex_lock(&lock);
    size_t at = file->dirty_from, to = file->dirty_to < file->size ? file->dirty_to : file->size;
    while (at < to) {
        ssize_t count = really_pwrite(fd, file->bytes + at, to - at, (off64_t)at);
        if (count < 0) stop("the file cannot be written\n");
        at += (size_t)count;
    }
    if (file->resized && really_truncate(fd, (off64_t)file->size)) stop("the file cannot be resized\n");
    file->dirty_from = file->dirty_to = 0;
    file->resized = 0;
    pthread_mutex_unlock(&lock);
    return really_sync(fd);
}

static int sync_file(int fd) {
    struct shadow *file = shadow(fd);
    if (!file) return really_sync(fd);
    return getenv("PAYCORE_UNSYNCED_NEVER") ? 0 : sync_all(file, fd);
}

int fdatasync(int fd) { return sync_file(fd); }
int fsync(int fd) { return sync_file(fd); }
