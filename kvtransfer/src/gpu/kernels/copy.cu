// Copies by lists: pages, pieces of any length, rows of head slices, whole windows of a paged cache.
//
// Compiled by NVRTC for the device it runs on, or loaded from the PTX beside this file. It includes nothing, so it builds
// without a toolkit. Every index computation has its twin in twin.rs, which the tests compare with a naive copy; whoever
// changes one changes the other, then runs build.py for the PTX.
//
// A launch moves `total` units (16, 8, 4 or 1 bytes, the widest that every address, stride and length allows). Unit number n
// lies in row n / units, and that in piece row / rows. Totals stay below 2^31, so that a division is one multiplication.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

// What both sides of a piece look like: `rows` rows of `units` units each, their starts a stride apart.
struct Shape {
    u64 source_stride;
    u64 target_stride;
    u32 first;  // units of the whole that come before this launch's
    u32 total;  // units of this launch
    u32 units;
    u32 units_factor;
    u32 units_shift;
    u32 rows;
    u32 rows_factor;
    u32 rows_shift;
};

struct Pair {
    u64 source;
    u64 target;
};

struct Tile {
    u64 source;
    u64 target;
    u64 len;
};

// Buffers times items: piece number p is item p % items of buffer p / items. A side without a list counts its items.
struct Window {
    const Pair *buffers;
    const u32 *source_items;
    const u32 *target_items;
    u64 source_item_stride;
    u64 target_item_stride;
    u32 items;
    u32 items_factor;
    u32 items_shift;
    u32 reserved;
};

// Exact for n < 2^31: the factor and shift are those of divide.rs.
__device__ __forceinline__ u32 divide(u32 n, u32 factor, u32 shift) {
    return (__umulhi(n, factor) + n) >> shift;
}

struct InPairs {
    const Pair *pairs;
    __device__ __forceinline__ Pair at(u32 piece) const { return pairs[piece]; }
};

struct InWindow {
    Window window;
    __device__ __forceinline__ Pair at(u32 piece) const {
        const u32 buffer = divide(piece, window.items_factor, window.items_shift);
        const u32 item = piece - buffer * window.items;
        Pair pair = window.buffers[buffer];
        const u32 source = window.source_items ? window.source_items[item] : item;
        const u32 target = window.target_items ? window.target_items[item] : item;
        pair.source += source * window.source_item_stride;
        pair.target += target * window.target_item_stride;
        return pair;
    }
};

// Sources are read once and targets not at all, so neither should push anything out of L1.
struct Bytes16 {
    u32 x, y, z, w;
    static const u32 width = 16;
    __device__ __forceinline__ void load(u64 at) {
        asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "l"(at));
    }
    __device__ __forceinline__ void store(u64 at) const {
        asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1,%2,%3,%4};"
                     :: "l"(at), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
    }
};
struct Bytes8 {
    u64 x;
    static const u32 width = 8;
    __device__ __forceinline__ void load(u64 at) {
        asm volatile("ld.global.L1::no_allocate.u64 %0, [%1];" : "=l"(x) : "l"(at));
    }
    __device__ __forceinline__ void store(u64 at) const {
        asm volatile("st.global.L1::no_allocate.u64 [%0], %1;" :: "l"(at), "l"(x) : "memory");
    }
};
struct Bytes4 {
    u32 x;
    static const u32 width = 4;
    __device__ __forceinline__ void load(u64 at) {
        asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(at));
    }
    __device__ __forceinline__ void store(u64 at) const {
        asm volatile("st.global.L1::no_allocate.u32 [%0], %1;" :: "l"(at), "r"(x) : "memory");
    }
};
struct Bytes1 {
    u16 x;
    static const u32 width = 1;
    __device__ __forceinline__ void load(u64 at) {
        asm volatile("ld.global.u8 %0, [%1];" : "=h"(x) : "l"(at));
    }
    __device__ __forceinline__ void store(u64 at) const {
        asm volatile("st.global.u8 [%0], %1;" :: "l"(at), "h"(x) : "memory");
    }
};

__device__ __forceinline__ Pair row_at(const Shape &shape, const Pair &piece, u32 row) {
    Pair pair;
    pair.source = piece.source + row * shape.source_stride;
    pair.target = piece.target + row * shape.target_stride;
    return pair;
}

// Each thread has UNROLL loads in flight before its first store. A warp's loads touch consecutive units.
template <typename Unit, int UNROLL, typename Pieces>
__device__ __forceinline__ void copy_units(const Pieces &pieces, const Shape &shape) {
    const u32 lane = threadIdx.x & 31;
    const u32 warps = blockDim.x >> 5;
    const u32 warp = blockIdx.x * warps + (threadIdx.x >> 5);
    const u32 step = gridDim.x * warps * 32 * UNROLL;
    // The sum cannot wrap: total < 2^31 and a step is below 2^31 (checked by the host).
    for (u32 start = warp * 32 * UNROLL; start < shape.total; start += step) {
        Unit units[UNROLL];
        u64 targets[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; k++) {
            const u32 n = start + k * 32 + lane;
            if (n < shape.total) {
                const u32 row = divide(shape.first + n, shape.units_factor, shape.units_shift);
                const u32 unit = shape.first + n - row * shape.units;
                const u32 piece = divide(row, shape.rows_factor, shape.rows_shift);
                const Pair pair = row_at(shape, pieces.at(piece), row - piece * shape.rows);
                targets[k] = pair.target + (u64)unit * Unit::width;
                units[k].load(pair.source + (u64)unit * Unit::width);
            }
        }
#pragma unroll
        for (int k = 0; k < UNROLL; k++) {
            if (start + k * 32 + lane < shape.total) {
                units[k].store(targets[k]);
            }
        }
    }
}

#define COPIES(NAME, UNIT, UNROLL)                                                                             \
    extern "C" __global__ void __launch_bounds__(1024, 1) kvt_pairs_##NAME(const Pair *pairs, const Shape shape) { \
        const InPairs pieces = {pairs};                                                                        \
        copy_units<UNIT, UNROLL>(pieces, shape);                                                               \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(1024, 1) kvt_window_##NAME(const Window window, const Shape shape) { \
        const InWindow pieces = {window};                                                                      \
        copy_units<UNIT, UNROLL>(pieces, shape);                                                               \
    }

COPIES(16, Bytes16, 4)

// For blocks that have a multiprocessor to themselves: twice the bytes in flight. Windows take too many registers for it.
extern "C" __global__ void __launch_bounds__(1024, 1) kvt_pairs_16_deep(const Pair *pairs, const Shape shape) {
    const InPairs pieces = {pairs};
    copy_units<Bytes16, 8>(pieces, shape);
}
COPIES(8, Bytes8, 4)
COPIES(4, Bytes4, 4)
COPIES(1, Bytes1, 4)

// A warp copies `len` bytes from `source` to `target`, both multiples of Unit::width apart from each other.
template <typename Unit, int UNROLL>
__device__ __forceinline__ void copy_tile(u64 source, u64 target, u32 len, u32 lane) {
    // Bytes before the first aligned unit, at most len.
    u32 head = (u32)(0 - source) & (Unit::width - 1);
    head = head < len ? head : len;
    for (u32 at = lane; at < head; at += 32) {
        Bytes1 byte;
        byte.load(source + at);
        byte.store(target + at);
    }
    const u32 count = (len - head) / Unit::width;
    for (u32 start = 0; start < count; start += 32 * UNROLL) {
        Unit units[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; k++) {
            const u32 n = start + k * 32 + lane;
            if (n < count) {
                units[k].load(source + head + (u64)n * Unit::width);
            }
        }
#pragma unroll
        for (int k = 0; k < UNROLL; k++) {
            const u32 n = start + k * 32 + lane;
            if (n < count) {
                units[k].store(target + head + (u64)n * Unit::width);
            }
        }
    }
    for (u32 at = head + count * Unit::width + lane; at < len; at += 32) {
        Bytes1 byte;
        byte.load(source + at);
        byte.store(target + at);
    }
}

// Pieces of any length and alignment, cut by the host into tiles of at most 16 KiB. A warp takes one at a time.
extern "C" __global__ void __launch_bounds__(1024, 1) kvt_tiles(const Tile *tiles, const u32 count) {
    const u32 lane = threadIdx.x & 31;
    const u32 warps = blockDim.x >> 5;
    for (u32 n = blockIdx.x * warps + (threadIdx.x >> 5); n < count; n += gridDim.x * warps) {
        const Tile tile = tiles[n];
        const u32 apart = (u32)(tile.source ^ tile.target);
        const u32 len = (u32)tile.len;
        if ((apart & 15) == 0) {
            copy_tile<Bytes16, 4>(tile.source, tile.target, len, lane);
        } else if ((apart & 7) == 0) {
            copy_tile<Bytes8, 4>(tile.source, tile.target, len, lane);
        } else if ((apart & 3) == 0) {
            copy_tile<Bytes4, 4>(tile.source, tile.target, len, lane);
        } else {
            copy_tile<Bytes1, 4>(tile.source, tile.target, len, lane);
        }
    }
}

// ---- Bulk copies (Hopper and later): the copy engine of each multiprocessor moves bytes to shared memory and out again, so
// that one block keeps its whole ring in flight, which needs no register and hardly an instruction per byte.
//
// Each warp owns a ring of stages and nothing is shared between warps. A stage holds a row, or a part of a row that is longer
// than a stage. Lane n % 32 moves part n: it looks its addresses up a batch ahead, since a lookup takes as long as moving
// many parts, issues the load and later the store.

#define BULK_WARPS 4
#define BULK_RING_BYTES 49152
#define BULK_STAGES_MAX 32
#define BULK_PART_BYTES 16384
// A thin block is one warp of at most 32 registers a thread, so that it fits beside a block that takes nearly all of a
// multiprocessor, as those of matrix products do.
#define THIN_RING_BYTES 12288
#define THIN_PART_BYTES 2048

struct BulkShape {
    u64 source_stride;
    u64 target_stride;
    u32 first;  // parts of rows before this launch's
    u32 total;  // of this launch
    u32 bytes;  // of a row
    u32 stage_bytes;
    u32 stages;
    u32 storing;  // stages whose stores may still be reading when the next load is issued; the others are loading
    u32 parts;  // of a row; 1 where a row fits a stage
    u32 parts_factor;
    u32 parts_shift;
    u32 rows;
    u32 rows_factor;
    u32 rows_shift;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }

__device__ __forceinline__ void barrier_init(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" :: "r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_load(u32 shared, u64 source, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared), "l"(source), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void bulk_store(u64 target, u32 shared, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :: "l"(target), "r"(shared), "r"(bytes) : "memory");
}

struct Part {
    Pair pair;
    u32 bytes;
};

template <typename Pieces>
__device__ __forceinline__ Part part_at(const Pieces &pieces, const BulkShape &shape, u32 n) {
    const u32 row = divide(shape.first + n, shape.parts_factor, shape.parts_shift);
    const u32 offset = (shape.first + n - row * shape.parts) * shape.stage_bytes;
    const u32 piece = divide(row, shape.rows_factor, shape.rows_shift);
    const u32 within = row - piece * shape.rows;
    const u32 left = shape.bytes - offset;
    Part part;
    part.pair = pieces.at(piece);
    part.pair.source += within * shape.source_stride + offset;
    part.pair.target += within * shape.target_stride + offset;
    part.bytes = left < shape.stage_bytes ? left : shape.stage_bytes;
    return part;
}

template <u32 WARPS, u32 RING_BYTES, typename Pieces>
__device__ __forceinline__ void copy_bulk(const Pieces &pieces, const BulkShape &shape) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ __align__(8) u64 full[WARPS * BULK_STAGES_MAX];
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u32 ring = shared_address(shared) + warp * RING_BYTES;
    const u32 barriers = shared_address(full) + warp * (BULK_STAGES_MAX * 8);
    if (lane < shape.stages) {
        barrier_init(barriers + lane * 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    const u32 worker = blockIdx.x * WARPS + warp, workers = gridDim.x * WARPS;
    // This warp's parts are worker, worker + workers, …
    const u32 mine = worker < shape.total ? (shape.total - worker - 1) / workers + 1 : 0;
    const u32 ahead = shape.stages - shape.storing;
    Part now = {}, then = {};
    if (lane < mine) {
        now = part_at(pieces, shape, worker + lane * workers);
    }
    if (lane < ahead && lane < mine) {
        barrier_expect(barriers + lane * 8, now.bytes);
        bulk_load(ring + lane * shape.stage_bytes, now.pair.source, now.bytes, barriers + lane * 8);
    }
    __syncwarp();
    u32 stage = 0, parity = 0, next = ahead;
    for (u32 batch = 0; batch < mine; batch += 32) {
        if (batch + 32 + lane < mine) {
            then = part_at(pieces, shape, worker + (batch + 32 + lane) * workers);
        }
        const u32 count = mine - batch < 32 ? mine - batch : 32;
        for (u32 k = 0; k < count; k++) {
            barrier_wait(barriers + stage * 8, parity);
            if (lane == k) {
                bulk_store(now.pair.target, ring + stage * shape.stage_bytes, now.bytes);
                asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            }
            if (batch + k + ahead < mine) {
                // The stage to be loaded was last stored `storing` parts ago, by that part's lane.
                if (batch + k >= shape.storing && lane == ((k - shape.storing) & 31)) {
                    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
                }
                __syncwarp();
                if (lane == ((k + ahead) & 31)) {
                    const u64 source = k + ahead < 32 ? now.pair.source : then.pair.source;
                    const u32 bytes = k + ahead < 32 ? now.bytes : then.bytes;
                    barrier_expect(barriers + next * 8, bytes);
                    bulk_load(ring + next * shape.stage_bytes, source, bytes, barriers + next * 8);
                }
                __syncwarp();
            }
            next = next + 1 == shape.stages ? 0 : next + 1;
            stage = stage + 1 == shape.stages ? 0 : stage + 1;
            parity ^= stage == 0;
        }
        now = then;
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define BULK_BODY(WARPS, RING_BYTES, PIECES) copy_bulk<WARPS, RING_BYTES>(PIECES, shape)
#else
#define BULK_BODY(WARPS, RING_BYTES, PIECES)
#endif

#define BULK_COPIES(NAME, BOUNDS, WARPS, RING_BYTES)                                                                      \
    extern "C" __global__ void BOUNDS kvt_##NAME##_pairs(const Pair *pairs, const BulkShape shape) {                      \
        const InPairs pieces = {pairs};                                                                                  \
        BULK_BODY(WARPS, RING_BYTES, pieces);                                                                            \
    }                                                                                                                    \
    extern "C" __global__ void BOUNDS kvt_##NAME##_window(const Window window, const BulkShape shape) {                   \
        const InWindow pieces = {window};                                                                                \
        BULK_BODY(WARPS, RING_BYTES, pieces);                                                                            \
    }

BULK_COPIES(bulk, __launch_bounds__(BULK_WARPS * 32, 1), BULK_WARPS, BULK_RING_BYTES)
// The second bound stands for 32 registers: a multiprocessor's 65,536 for 32 blocks of 64 threads. Blocks have 32.
BULK_COPIES(thin, __launch_bounds__(64, 32), 1, THIN_RING_BYTES)

// ---- CRC32C (Castagnoli, reflected) of each piece while it is copied. Rows are one, lengths multiples of 16.
//
// A CRC without its start and end values is linear: the checksum of a message is the sum of its vectors' checksums, each
// multiplied by x^(bits that follow). A lane takes every 32nd vector and multiplies by x^4096 from one to the next (four
// table steps); at the end lane l multiplies by x^(128 (31 - l)) and the lanes are added. Vectors are counted from the end,
// so missing ones are at the front, where zeroes change nothing; the start value goes into the first four bytes.

struct CrcTables {
    u32 step[4][256];    // times x^4096, by byte of the state
    u32 vector[16][256]; // checksum of a vector, by place and value of each byte
    u32 lane[32];        // x^(128 (31 - l)), reflected
};

__device__ __forceinline__ u32 crc_times(u32 a, u32 b) {
    u32 product = 0;
#pragma unroll 4
    for (int bit = 0; bit < 32; bit++) {
        product ^= (a & 0x80000000u) ? b : 0;
        a <<= 1;
        b = (b >> 1) ^ ((b & 1) ? 0x82f63b78u : 0);
    }
    return product;
}

__device__ __forceinline__ u32 crc_word(const u32 (*table)[256], u32 word) {
    return table[0][word & 255] ^ table[1][(word >> 8) & 255] ^ table[2][(word >> 16) & 255] ^ table[3][word >> 24];
}

extern "C" __global__ void __launch_bounds__(1024, 1)
kvt_pairs_crc(const Pair *pairs, u32 *sums, const CrcTables *global, const u32 count, const u32 vectors) {
    __shared__ CrcTables tables;
    for (u32 n = threadIdx.x; n < sizeof(CrcTables) / 4; n += blockDim.x) {
        ((u32 *)&tables)[n] = ((const u32 *)global)[n];
    }
    __syncthreads();
    const u32 lane = threadIdx.x & 31;
    const u32 warps = blockDim.x >> 5;
    const u32 rounds = (vectors + 31) / 32;
    for (u32 n = blockIdx.x * warps + (threadIdx.x >> 5); n < count; n += gridDim.x * warps) {
        const Pair pair = pairs[n];
        u32 sum = 0;
        for (u32 round = 0; round < rounds; round += 4) {
            Bytes16 units[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                // Negative, and so huge, for the vectors that are missing at the front.
                const u32 vector = (round + k) * 32 + lane - (rounds * 32 - vectors);
                units[k].x = units[k].y = units[k].z = units[k].w = 0;
                if (vector < vectors) {
                    units[k].load(pair.source + (u64)vector * 16);
                }
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const u32 vector = (round + k) * 32 + lane - (rounds * 32 - vectors);
                if (vector < vectors) {
                    units[k].store(pair.target + (u64)vector * 16);
                }
                if (round + k < rounds) {
                    sum = crc_word(tables.step, sum);
                    sum ^= crc_word(tables.vector, vector == 0 ? ~units[k].x : units[k].x);
                    sum ^= crc_word(tables.vector + 4, units[k].y);
                    sum ^= crc_word(tables.vector + 8, units[k].z);
                    sum ^= crc_word(tables.vector + 12, units[k].w);
                }
            }
        }
        sum = crc_times(tables.lane[lane], sum);
        for (int half = 16; half > 0; half >>= 1) {
            sum ^= __shfl_xor_sync(0xffffffffu, sum, half);
        }
        if (lane == 0) {
            sums[n] = ~sum;
        }
    }
}
