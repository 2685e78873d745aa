// Rows of x that a launch in front of this one has brought, once for all blocks, into the order in which wgmma reads them: how it does
// that, and how many rows of a long K are multiplied.
//
// Activations stream through a ring of the block beside the weights, which have one a wave. So x need not fit in shared memory,
// and K is split over blocks only where there are too few rows of w to occupy them. Blocks of a cluster that multiply the same
// part of x ("share" it) each fetch a piece of it for all of them.
#pragma once

constexpr int PREPARING_WAVES = 8;  // of a block that prepares

/// Brings x into `XTile`s: for every `room` rows, which is the M that reads them, one after the other along K. A wave takes
/// eight rows of an MX block, its lanes eight values each, so that both sides move whole sectors. Rows beyond m are left as they
/// are: their sums reach nobody.
template <Weight W>
DEVICE void prepare_bf16(const uint16_t* x, uint8_t* prepared, int64_t x_stride, int m, int k, int room) {
    const int blocks = ceil_div(k, Tile<W>::K) * Tile<W>::BLOCKS, unit = block_index() * PREPARING_WAVES + wave_index();
    const int row = quotient(unit, blocks) * 8 + lane_index() / 4, piece = remainder_of(unit, blocks) * 4 + lane_index() % 4;
    wait_for_previous_launch();
    if (row >= m) return;
    const Words out = 8 * piece < k ? load_words(x + row * x_stride + 8 * piece) : Words{};
    const int64_t tile = static_cast<int64_t>(shared_by(row, room)) * (blocks / 2) + piece / 8;
    XTile<W, 1>::keep(prepared + tile * room * XTile<W, 1>::BYTES, row & (room - 1), piece % 8, out);
}

/// Quantizes a row of x under the largest scale of its MX blocks. Several blocks may take a row: each looks at all of it, and quantizes its part.
template <Weight W, Act A>
DEVICE void prepare_row(const uint16_t* x, const float* x_scale, uint8_t* prepared, int64_t x_stride, int m, int k, int room, int carry) {
    constexpr int THREADS = PREPARING_WAVES * WAVE, HELD = 4;  // pieces that a thread loads once only
    __shared__ uint32_t of_waves[PREPARING_WAVES];
    const int part = quotient(block_index(), m), row = block_index() - part * m, parts = quotient(grid_blocks(), m), wave = wave_index();
    const int tiles = ceil_div(k, Tile<W>::K), all = tiles * (Tile<W>::K / 8), first_tile = quotient(tiles * part, parts);
    const int first = first_tile * (Tile<W>::K / 8), own = (quotient(tiles * (part + 1), parts) - first_tile) * (Tile<W>::K / 8);
    const auto piece = [&](int i) { return first + i < all ? first + i : first + i - all; };  // this block's come first
    uint8_t* const to = prepared + static_cast<int64_t>(shared_by(row, room)) * tiles * room * XTile<W, 1>::BYTES;
    // At first none of it, before the launch in front has ended: instructions have been fetched then.
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        const int pieces = anew(turn) == 0 ? 0 : all, mine = smaller(own, pieces);
        if (turn > 0) wait_for_previous_launch();
        const auto load = [&](int i) { return i < pieces && 8 * piece(i) < k ? load_words(x + row * x_stride + 8 * piece(i)) : Words{}; };
        Words held[HELD];
        uint32_t of_thread = 0;
#pragma unroll
        for (int u = 0; u < HELD; u++) held[u] = load(u * THREADS + thread_index());
#pragma unroll
        for (int u = 0; u < HELD; u++) of_thread = larger(of_thread, largest_of(held[u]));
#pragma unroll 1
        for (int i = HELD * THREADS + thread_index(); i < pieces; i += THREADS) of_thread = larger(of_thread, largest_of(load(i)));
        const uint32_t of_wave = largest_in_wave(of_thread);
        if (lane_index() == 0) of_waves[wave] = of_wave;
        block_barrier();
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < PREPARING_WAVES; i++) largest = larger(largest, of_waves[i]);
        const int exponent = exponent_of<A>(largest, carry);
        const float static_scale = A == Act::fp8_static && pieces > 0 ? *x_scale : 1.0f;
        const auto put = [&](const Words& eight, int i) {
            Words saturated[1] = {eight};
            saturate<A>(saturated, carry);
            const Codes codes = row_codes<A>(saturated[0], exponent, carry, static_scale);
            if (i >= mine) return;
            XTile<W, 1>::keep(to + piece(i) / 8 * room * XTile<W, 1>::BYTES, row & (room - 1), piece(i) % 8, codes);
        };
#pragma unroll
        for (int u = 0; u < HELD; u++)
            if (u == 0 || u * THREADS < mine) put(held[u], u * THREADS + thread_index());
#pragma unroll 1
        for (int i = HELD * THREADS; i < mine; i += THREADS) put(load(i + thread_index()), i + thread_index());
        if (thread_index() == 0 && part == 0 && pieces > 0)
            reinterpret_cast<float*>(prepared + prepared_bytes<W>(m, k, room))[row] =
                A == Act::fp8_static ? static_scale : float_from_e8m0(exponent);
    }
}

template <Weight W, Act A>
DEVICE void prepare(const uint16_t* x, const float* x_scale, uint8_t* prepared, int64_t x_stride, int m, int k, int room,
                    int carry) {
    allow_next_launch();
    if constexpr (is_row(W))
        prepare_row<W, A>(x, x_scale, prepared, x_stride, m, k, room, carry);
    else
        prepare_bf16<W>(x, prepared, x_stride, m, k, room);
}

/// x on its way through a block's shared memory, by stages: one chunk for each of the waves that share K.
///
/// Wave 0 fetches: when it begins a stage, into the place of the one before, which the others have read by then or are about to have. Where it
/// `Shares`, blocks of a cluster that multiply the same part of x fetch it together; else each by itself.
template <Weight W, int M, bool Shares>
class XRing {
   public:
    /// `barriers`: `depth` that say what has arrived, and `depth` for what has been read.
    DEVICE XRing(const DecodeArgs& a, const Share& s, uint8_t* lds, uint64_t* barriers)
        : a(a), s(s), lds(matrix_aligned(lds + whole_lines(FACTORS))), full(barriers), empty(barriers + a.depth), factors(reinterpret_cast<float*>(lds)),
          share(Shares ? shared_by(cluster_blocks(), a.split) : 1) {
        stages = quotient(s.block_tiles + a.waves_k * a.chunk - 1, a.waves_k * a.chunk);
        if (thread_index() != 0) return;
        for (int i = 0; i < a.depth; i++) barrier_init(full + i), barrier_init(empty + i, share * s.threads / WAVE);
        barrier_init(factors_are_there());
        barriers_are_ready();
    }

    DEVICE static int bytes(const DecodeArgs& a) { return whole_lines(FACTORS) + 1024 + a.depth * a.waves_k * a.chunk * XTile<W, M>::TILE_BYTES; }

    /// Once x is there, and all blocks that share it: starts fetching, what sums of rows are to be multiplied by too.
    DEVICE void begin(int row_block) {
        next = reinterpret_cast<const uint8_t*>(a.x) +
               (static_cast<int64_t>(row_block) * s.tiles + s.block_first) * XTile<W, M>::TILE_BYTES;
        if (wave != 0) return;
        for (int i = 0; i < smaller(a.depth, stages); i++) fetch(i, i);
        if (FACTORS > 0 && elected()) {
            barrier_expect(factors_are_there(), FACTORS);
            bulk_copy(factors, prepared_factors<W>(a, a.x, M) + row_block * M, FACTORS, factors_are_there());
        }
    }

    /// Waits for the next stage.
    DEVICE void wait() { barrier_wait(full + at_stage, parity); }

    /// Has wave 0 fetch into the place of the stage before.
    DEVICE void refill() {
        if (wave != 0 || number == 0 || number - 1 + a.depth >= stages) return;
        const int before = at_stage == 0 ? a.depth - 1 : at_stage - 1;
        barrier_wait(empty + before, at_stage == 0 ? parity ^ 1 : parity);
        fetch(number - 1 + a.depth, before);
    }

    /// Gives the stage back.
    DEVICE void release() {
        __syncwarp();
        // What nobody will fill again need not be given back, and the blocks that would be told may have ended.
        if (number + a.depth < stages && lane_index() < share)
            barrier_arrive_in(address_in(empty + at_stage, Shares ? lane_index() * a.split + s.rank : cluster_rank()));
        if (++at_stage == a.depth) at_stage = 0, parity ^= 1;
        number++;
    }

    /// What step `step` of 16 of the 64 of K that begin with MX block `block` of this wave's chunk multiplies.
    DEVICE uint32_t at(int block, int step) const {
        const int tile = (at_stage * a.waves_k + s.wave_k) * a.chunk;
        return matrix_in_lds(lds) + tile * (XTile<W, M>::TILE_BYTES / 16) + block / 2 * (XTile<W, M>::BYTES / 16) + step * 2;
    }

    /// MX blocks from block `block` of this wave's chunk to the end of K.
    DEVICE int left(int block) const {
        const int tile = s.block_first + (number * a.waves_k + s.wave_k) * a.chunk;
        return a.k / MX_BLOCK - tile * Tile<W>::BLOCKS - block;
    }

    /// All lanes: until there is what sums of rows are to be multiplied by.
    DEVICE void wait_for_factors() const {
        if (FACTORS > 0) barrier_wait(factors_are_there(), 0);
    }
    /// What sums of row `i` are to be multiplied by.
    DEVICE float factor(int i) const { return factors[i]; }

    int stages;

   private:
    static constexpr int FACTORS = is_row(W) ? M * 4 : 0;
    DEVICE static uint64_t* factors_are_there() { return own_barriers() + 1; }

    /// Wave 0: stage `i` into place `place`. This block's piece of it, for all that share it.
    DEVICE void fetch(int i, int place) {
        if (!elected()) return;
        const int tiles = a.waves_k * a.chunk, bytes = smaller(tiles, s.block_tiles - i * tiles) * XTile<W, M>::TILE_BYTES;
        const int mine = Shares ? shared_by(cluster_rank(), a.split) * shared_by(bytes, share) : 0, offset = place * tiles * XTile<W, M>::TILE_BYTES + mine;
        barrier_expect(full + place, bytes);
        if (share == 1) {
            bulk_copy(lds + offset, next, bytes, full + place);
        } else {
            int blocks = 0;
            for (int j = 0; j < share; j++) blocks |= 1 << (j * a.split + s.rank);
            bulk_copy_to(blocks, lds + offset, next + mine, shared_by(bytes, share), full + place);
        }
        next += bytes;
    }

    const DecodeArgs& a;
    const Share& s;
    uint8_t* lds;
    const uint8_t* next;
    uint64_t *full, *empty;
    float* factors;
    const int wave = wave_index();
    int share, at_stage = 0, number = 0;
    uint32_t parity = 0;
};
