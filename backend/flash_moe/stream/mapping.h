/* Which experts the page cache has, so that they can be computed where they lie.
 *
 * A few pages of a piece stand for all of it: experts are read whole. A page that has gone in the
 * meantime is read again by the system when the kernel comes to it: slow, not wrong.
 */
#include <sys/mman.h>
#include <sys/stat.h>

struct mapped { /* an open file */
    uint64_t address, length;
};

enum { FEW_PAGES = 64, PROBES = 4 };

static int in_memory(uintptr_t at, size_t length, size_t page) {
    unsigned char there[FEW_PAGES];
    const uintptr_t first = at / page, pages = (at + length - 1) / page - first + 1;
    if (pages <= FEW_PAGES) {
        if (mincore((void *)(first * page), pages * page, (void *)there)) return 0;
        for (size_t i = 0; i < pages; i++)
            if (!(there[i] & 1)) return 0;
        return 1;
    }
    for (size_t i = 0; i < PROBES; i++) {
        const uintptr_t probe = first + (pages - 1) * i / (PROBES - 1);
        if (mincore((void *)(probe * page), page, (void *)there) || !(there[0] & 1)) return 0;
    }
    return 1;
}

/* there[i]: whether all `per` pieces of expert i are in the page cache, and within their files as
 * these are now. Pieces of length 0 are none. `maps` has where each open file is mapped. */
void flash_in_memory(const struct piece *pieces, size_t experts, size_t per,
                     const struct mapped *maps, uint8_t *there) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    int64_t file = -1, size = 0;
    for (size_t i = 0; i < experts; i++) {
        there[i] = 1;
        for (size_t j = 0; j < per && there[i]; j++) {
            const struct piece *p = &pieces[i * per + j];
            struct stat now;
            if (p->file != file) {
                size = fstat((int)p->file, &now) ? 0 : (int64_t)now.st_size;
                file = p->file;
            }
            const struct mapped *map = &maps[p->file];
            const uint64_t offset = (uint64_t)p->offset, length = (uint64_t)p->length;
            there[i] = p->offset + p->length <= size && offset + length <= map->length &&
                       (!length || in_memory(map->address + offset, length, page));
        }
    }
}
