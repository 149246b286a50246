/* Gives every request of h2load a body of its own.
 *
 * h2load reads the file of --data anew for each request: pread from offset 0, as many bytes as the file had at the
 * start. Loaded with LD_PRELOAD, this pread answers the n-th such read with the n-th record of another file, so that
 * n requests carry n bodies; everything else h2load does is its own. Needs h2load with one thread (-t 1).
 *
 * BODIES_FILE: records of BODIES_SIZE bytes, one after another. --data names a file of the first record, so that
 * h2load learns the size. What cannot be served whole fails the request: no body is ever sent twice, cut or mixed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static const char *records;
static size_t record_size;
static size_t record_count;
static size_t served;

__attribute__((constructor)) static void map_records(void)
{
    const char *path = getenv("BODIES_FILE");
    const char *size = getenv("BODIES_SIZE");
    struct stat about;
    int file;
    if (path == NULL || size == NULL || (record_size = strtoul(size, NULL, 10)) == 0)
        return;
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &about) != 0)
        return;
    /* Mapped until the process ends. */
    records = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (records == MAP_FAILED)
        records = NULL;
    else
        record_count = (size_t)about.st_size / record_size;
}

ssize_t pread(int file, void *buffer, size_t length, off_t offset)
{
    (void)file;
    /* An offset above 0 or too little room: flow control has cut the body, and its other part could not be told. */
    if (records == NULL || offset != 0 || length < record_size || served == record_count) {
        errno = EIO;
        return -1;
    }
    memcpy(buffer, records + record_size * served++, record_size);
    return (ssize_t)record_size;
}
