// Weights on sm_90: how they lie, and how a wave gets hold of them.
#pragma once
#include "decode.h"
#include "decode_sm90_fragments.h"
#include "hopper.h"

/// e4m3: layout `mma_tile`. e2m1: layout `hopper_bf16`; rows of either: `hopper_e4m3`. Both have scales relative to a row's largest,
/// which `factors` keeps; rows of e4m3 have no others. int4: layout `mma_int4`, two of whose tiles are one here if a group is as long.
template <Weight W>
struct Tile {
    static constexpr int BLOCKS = W == Weight::int4_g128 ? 4 : 2;  // of 32 elements of a row: MX blocks
    static constexpr int K = BLOCKS * MX_BLOCK;
    static constexpr int BYTES = TILE_ROWS * K / (W == Weight::e4m3 || W == Weight::row_e4m3 ? 1 : 2);
    static constexpr int OF_BLOCKS = W == Weight::row_e4m3 ? 0 : TILE_ROWS * BLOCKS / (W == Weight::row_e2m1 ? 2 : 1);  // bytes of MX scales
    static constexpr int SCALES = is_int4(W) ? TILE_ROWS * K / group_of(W) * 4 : OF_BLOCKS;
    static constexpr bool SHORT = W == Weight::int4_g32;  // a row's last tile may have scales for one block only
};

/// Who waits for tiles that are under way (`by_turns`): `settle`, each itself, or the next, which has been decoded ahead.
enum class Waits { SETTLE, ITSELF, AHEAD };
template <Weight W, int M>
constexpr Waits WAITS = !is_int4(W) ? Waits::SETTLE : M < (group_of(W) < 64 ? 32 : 64) ? Waits::AHEAD : Waits::ITSELF;

/// A number that the compiler knows.
template <int>
struct Number {};

/// `each(t)` for `count` tiles: while one is multiplied, the next is decoded, into other registers. `settle(n)` waits until at most
/// n of those that `each` started are under way. `Throughout`: always one, until the last; else by fours, which takes fewer registers.
/// `Own`: or `each` waits itself, for what it has started, or started before; then it decodes ahead, into registers by turns.
template <bool Throughout, Waits Own, typename Each, typename Settle>
DEVICE void by_turns(int count, Each each, Settle settle) {
    constexpr Number<1> one{};
    constexpr Number<0> none{};
    int t = 0;
    if constexpr (Own == Waits::ITSELF) {
#pragma unroll 1
        for (; t < count; t++) each(t);
    } else if constexpr (Own == Waits::AHEAD) {
        each(t++);
#pragma unroll 1
        while (t < count) {
            each(t++);
            if (t == count) break;
            each(t++);
        }
        settle(none);
    } else if constexpr (Throughout) {
        each(t++);
#pragma unroll 1
        for (; t + 1 < count; t += 2) {
            each(t), settle(one);
            each(t + 1), settle(one);
        }
        if (t < count) each(t);
        settle(none);
    } else {
#pragma unroll 1
        for (; t + 3 < count; t += 4) {
            each(t), each(t + 1), settle(one);
            each(t + 2), settle(one);
            each(t + 3), settle(none);
        }
#pragma unroll 1
        for (; t + 1 < count; t += 2) each(t), each(t + 1), settle(none);
        if (t < count) each(t), settle(none);
    }
}

/// Where registers suffice to multiply throughout; streaming x takes fewer, and a block that has a multiprocessor for itself has more.
template <Weight W, int M, bool Streaming, bool Alone = M >= 16>
constexpr bool THROUGHOUT = is_row(W) && (Alone || W == Weight::row_e4m3) && (M < 64 || Streaming);

/// Blocks of a launch, at most, beside which the next one's find multiprocessors.
constexpr int BESIDE = 66;

/// Rows of x from which on `decode_early` has them prepared by a launch in front.
constexpr int EARLY_PREPARED = 32;

/// A wave's weights, chunk by chunk, through a ring in shared memory. Of waves that multiply together (`is_wide`),
/// those that have no row tile of their own read the last one again, because the others cannot multiply without them.
///
/// `Early`: the ring holds all that the wave ever reads. It is brought in place, before x is there, into the order in which wgmma reads it
/// from there (`DECODED`), row_e2m1 as e4m3: codes arrive in the second half of the room for that, scales where others want nothing before
/// they are decoded.
template <Weight W, int M, bool Early = false>
class Stream {
   public:
    /// Whether all becomes the matrix unit's left operand in shared memory; e4m3 is multiplied as it arrives if there are few rows of x.
    static constexpr bool DECODED = Early && (W == Weight::row_e2m1 || M >= EARLY_PREPARED);
    /// Tiles of decoded e4m3, which fill their room, take turns with those of the three waves that multiply with this one; so rows 0 to 7
    /// and 8 to 15 of all are equally far apart. Of e2m1, all of the former lie in front of all of the latter.
    static constexpr bool BY_TURNS = DECODED && W == Weight::row_e4m3;
    static constexpr int ROOM = Tile<Early ? Weight::row_e4m3 : W>::BYTES;     // for a tile
    static constexpr int TILE = BY_TURNS ? 4 * ROOM : LeftMatrix::CORE * 4;  // from one decoded to the next

    /// `lds` is this wave's part, `bytes(a)` long, and early `scales_lds` that of scales, `scale_room(a)` long. Starts fetching, if
    /// `now`: weights depend on no launch before this one.
    DEVICE Stream(const DecodeArgs& a, const Share& s, int expert, uint8_t* lds, uint64_t* barriers, uint8_t* scales_lds = nullptr, bool now = true)
        : a(a), s(s), ring(BY_TURNS ? lds - s.wave() % 4 * (bytes(a) - ROOM) : lds), early_scales(scales_lds), barriers(barriers), expert(expert),
          group(s.first_group) {
        seek();
        if (!Early && lane_index() == 0 && group < s.row_groups) {
#pragma unroll 1
            for (int i = 0; i < a.depth; i++) barrier_init(barriers + i);
            barriers_are_ready();
        }
        __syncwarp();
        if (now) begin(Early ? at_once() : M >= 16 ? 1 : a.depth);
    }

    /// Early: asks for what is asked for at first.
    DEVICE void begin() { begin(at_once()); }

    /// Makes sure that the first `chunks` have been asked for. Many rows of x are asked for behind the first chunk alone: behind
    /// all of them, they would come when memory has delivered those.
    DEVICE void begin(int chunks) {
#pragma unroll 1
        for (; begun < chunks; begun++) fetch();
        if (Early) __syncwarp();
    }

    DEVICE static int scale_room(const DecodeArgs& a) { return a.depth * a.chunk * Tile<W>::SCALES; }
    /// Of codes with scales beside them whole lines, or copies into other waves' rings would write each to parts of two.
    DEVICE static int bytes(const DecodeArgs& a) {
        const int used = a.depth * a.chunk * ROOM + (Early ? 0 : scale_room(a));
        return !Early && W == Weight::row_e2m1 && M < 64 ? whole_lines(used) : used;
    }

    /// `each(t, number along K, Number of tiles)` for all tiles of the next row group, one or `Together` at a time; t is the
    /// first one's place in its chunk. `begin()` when a chunk has come. `settle`: as in `by_turns`.
    template <int Together, bool Alone = M >= 16, typename Begin, typename Each, typename Settle>
    DEVICE void each_tile(Begin begin, Each each, Settle settle) {
        for (int first = s.wave_first; first < s.wave_end; first += s.wave_step) {
            const int count = smaller(a.chunk, s.wave_end - first);
            wait();
            if constexpr (!is_wide(W, M)) {
                int t = 0;
#pragma unroll(M == 4 ? 2 : 1)
                for (; t + Together <= count; t += Together) each(t, first + t, Number<Together>{});
                if (Together > 1 && t < count) each(t, first + t, Number<1>{});
            } else {
                begin();
                by_turns<THROUGHOUT<W, M, false, Alone>, WAITS<W, M>>(
                    count, [&](int t) { each(t, first + t, Number<1>{}); }, settle);
            }
            if constexpr (Early)
                stage++;
            else
                release();
        }
    }

    /// Early: brings all into wgmma's order (`DECODED`), as it arrives, and asks for more in its stead; else until all has been asked for.
    DEVICE void decode() {
        const int tiles = s.wave_end - s.wave_first;
#pragma unroll 1
        for (int i = 0, first = 0; first < tiles && (DECODED || begun < a.depth); i++, first += a.chunk) {
            barrier_wait(barriers + i, 0);
            begin(smaller(i + 1 + at_once(), a.depth));
            if constexpr (DECODED) {
#pragma unroll 2
                for (int t = first; t < smaller(first + a.chunk, tiles); t++) {
                    uint32_t fragments[2][4];
                    uint8_t* from = arriving() + t * (BY_TURNS ? TILE : Tile<W>::BYTES) + lane_index() * 16;
                    if constexpr (W == Weight::row_e2m1) {
                        e4m3_from_e2m1(load_words(from), steps_of_lane(scales() + t * (Tile<W>::SCALES / 4)), fragments);
                    } else {
                        const Words words[2] = {load_words(from), load_words(from + TILE_ROWS * MX_BLOCK)};
#pragma unroll
                        for (int i = 0; i < 8; i++) fragments[i / 4][i % 4] = words[i / 4].v[i % 4];
                    }
                    __syncwarp();  // what follows goes where this tile was
#pragma unroll
                    for (int i = 0; i < 2; i++) store_cores(ring + i * half() + t * TILE, fragments[0][i], fragments[0][i + 2], fragments[1][i], fragments[1][i + 2]);
                }
            }
        }
        if constexpr (DECODED) show_to_async();
    }

    /// Tile 0 of the four waves that multiply together, when all have decoded; others follow at TILE bytes.
    DEVICE LeftMatrix decoded() const { return {ring - s.wave() % 4 * (BY_TURNS ? ROOM : bytes(a)), half()}; }

    /// Waits for the next chunk.
    DEVICE void wait() { barrier_wait(barriers + stage, parity); }
    /// Tile `t` of the chunk.
    DEVICE const uint8_t* codes(int t) const { return ring + (stage * a.chunk + t) * ROOM; }
    DEVICE const uint32_t* scale_words(int t) const { return scales() + (stage * a.chunk + t) * (Tile<W>::SCALES / 4); }
    /// Gives the chunk back and fetches into its place.
    DEVICE void release() {
        __syncwarp();
        fetch();
        if (++stage == a.depth) stage = 0, parity ^= 1;
    }

   private:
    /// Chunks that are asked for at once: what has been asked for all else waits behind. A launch that has found room beside the one in front has time,
    /// and leaves memory to sixteen rows of x of that.
    DEVICE int at_once() const { return a.depth < 4 ? a.depth : M >= 16 && grid_blocks() <= BESIDE ? a.depth / 4 : a.depth / 2; }
    /// From rows 0 to 7 of a tile to the others.
    DEVICE int half() const { return BY_TURNS ? ROOM / 2 : a.depth * a.chunk * TILE; }
    DEVICE uint8_t* arriving() const { return ring + a.depth * a.chunk * (ROOM - Tile<W>::BYTES); }
    DEVICE uint32_t* scales() const { return reinterpret_cast<uint32_t*>(Early ? early_scales : ring + a.depth * a.chunk * ROOM); }

    /// To the first tile of this wave's row tile in row group `group`, or beyond all groups if it has none.
    DEVICE void seek() {
        tile = s.wave_first;
        const int wanted = group * s.waves_n + s.wave_n;
        const int row_tile = is_wide(W, M) ? smaller(wanted, s.row_tiles - 1) : wanted;
        if (!Early && (row_tile >= s.row_tiles || s.wave_first >= s.wave_end)) group = s.row_groups;
        const int64_t row = static_cast<int64_t>(expert) * s.row_tiles + row_tile, from = row * s.tiles + tile;
        codes_from = a.w + from * Tile<W>::BYTES;
        scales_from = a.scales + (Tile<W>::SHORT ? row * row_scales() + tile * Tile<W>::SCALES : from * Tile<W>::SCALES);
    }

    /// Bytes of scales of a row tile, and of `count` of its tiles from `tile` on.
    DEVICE int row_scales() const { return a.k / group_of(W) * TILE_ROWS * 4; }
    DEVICE int scale_bytes(int count) const {
        if constexpr (Tile<W>::SHORT) return smaller(count * Tile<W>::SCALES, row_scales() - tile * Tile<W>::SCALES);
        return count * Tile<W>::SCALES;
    }

    /// Whether there is a chunk to fetch.
    DEVICE bool more() const { return Early ? tile < s.wave_end : group < s.row_groups; }

    /// Early, a chunk's barrier is made when that is asked for: another one's would be waited for.
    DEVICE static void announce(uint64_t* barrier, int bytes) {
        if (Early) barrier_init(barrier), barriers_are_ready();
        barrier_expect(barrier, bytes);
    }

    DEVICE void fetch() {
        if constexpr (BY_TURNS) {
            if (more()) {
                const int count = smaller(a.chunk, s.wave_end - tile), lane = counted(thread_index()) % WAVE;
                uint64_t* barrier = barriers + fetch_stage;
                if (lane == 0) announce(barrier, count * ROOM);
                __syncwarp();
                if (lane < count) bulk_copy(ring + (fetch_stage * a.chunk + lane) * TILE, codes_from + lane * ROOM, ROOM, barrier);
            }
        } else if (more() && elected()) {
            const int count = smaller(a.chunk, s.wave_end - tile), at = fetch_stage * a.chunk;
            uint64_t* barrier = barriers + fetch_stage;
            announce(barrier, count * Tile<W>::BYTES + scale_bytes(count));
            bulk_copy(arriving() + at * Tile<W>::BYTES, codes_from, count * Tile<W>::BYTES, barrier);
            if (Tile<W>::SCALES > 0) bulk_copy(scales() + at * (Tile<W>::SCALES / 4), scales_from, scale_bytes(count), barrier);
        }
        if (++fetch_stage == a.depth && !Early) fetch_stage = 0;
        tile += s.wave_step, codes_from += s.wave_step * Tile<W>::BYTES, scales_from += s.wave_step * Tile<W>::SCALES;
        if (!Early && tile >= s.wave_end) group += s.groups, seek();
    }

    const DecodeArgs& a;
    const Share& s;
    uint8_t* ring;
    uint8_t* early_scales;
    uint64_t* barriers;
    const int expert;
    const uint8_t *codes_from, *scales_from;  // what is fetched next: of row group `group`, from `tile` on
    int group, tile, begun = 0, fetch_stage = 0, stage = 0;
    uint32_t parity = 0;
};
