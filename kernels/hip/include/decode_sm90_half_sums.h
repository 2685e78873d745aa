// How partial sums of many rows of x meet where a cluster's exchange would else take longer than the products: as halves.
#pragma once

/// Of a block with one row group and an x that a launch in front has prepared. Where blocks share K, what one of them sends are sums of
/// codes times 2^-14, [row][column] as halves: of 4096 of K, none is beyond 448 * 448 * 4096 * 2^-14 < 65504, and one that is rounded
/// moves by 2^-11 of itself at most, or by 2^-11 where products of codes are below 1. A cluster moves 16 bytes a cycle, so that this saves half.
template <int Room>
class HalfSums : public MetSums<Room> {
    using Base = MetSums<Room>;
    using Base::a, Base::s, Base::of_waves, Base::place, Base::everybody_has;

   public:
    using Base::COLUMNS, Base::owned, Base::first;

    /// Where factors and what other blocks send lie, behind `used` bytes of rings and activations.
    DEVICE static int behind(const DecodeArgs& a, int used) { return larger(used, Base::met_bytes(a) + halves_bytes(a)); }
    DEVICE static int ahead_of_partial(const DecodeArgs& a) { return Room * 4 + Base::ahead_of_partial(a); }

    /// `factors`: of rows of x, where sums of waves will be.
    DEVICE HalfSums(const DecodeArgs& a, const Share& s, uint8_t* rings, int used, uint64_t* barrier, const float* factors)
        : Base(a, s, rings + behind(a, used) + Room * 4, barrier, reinterpret_cast<float*>(rings)),
          halves(reinterpret_cast<uint16_t*>(rings + Base::met_bytes(a))), others(reinterpret_cast<uint16_t*>(Base::partial)),
          factors(factors), of_x(reinterpret_cast<float*>(rings + behind(a, used))) {}

    /// Whether four waves that multiply together send what they have summed up while others still multiply: from where their weights were.
    DEVICE bool by_fours() const { return a.split > 1 && a.waves_k == 1; }

    /// Before sums are there, as each instruction behind that is waited for: works out where those of a thread will be.
    DEVICE void look_at(const Output& output) {
        const int row = output.row, in_group = first + row, four = in_group / FOUR;
        const uint16_t* own_row = by_fours() ? of_four(four) + (in_group - four * FOUR) * Room : halves + in_group * Room;
        looked_at = row, turn = anew(turn_of(row));
        own = shared_address(own_row), other = shared_address(others + row * Room);
        asm volatile("" : "+r"(own), "+r"(other));
    }

    /// All threads that multiply: sums up, and tells them what was loaded ahead.
    template <typename T>
    DEVICE void hand_over(const T& totals, int columns) {
        Base::expect((a.split - 1) * owned * (Room / 2), true);
        if (by_fours()) return hand_over_by_fours(totals);
        if (thread_index() < Room) of_x[thread_index()] = factors[thread_index()];
        everybody_has();
        float* mine = of_waves + (s.wave_k * Base::rows() + s.wave_n * TILE_ROWS) * Room;
        totals.each_pair(columns, [&](int row, int column, const auto& sums) { store_floats(mine + place(row, column), sums); });
        if (a.split > 1) {
            everybody_has();
            Base::each_sum(columns, [&](int row, int column, const Floats<4>& sum) {
                halve(row, column, sum.v[0], sum.v[1]), halve(row, column + 2, sum.v[2], sum.v[3]);
            });
        }
        Base::publish();
        if (a.split > 1) show_to_async();
        everybody_has();
        if (a.split == 1) return;
        Base::send(halves, others);
        Base::wait();
        Base::ready();
    }

    /// The finished sums of an owned row, columns `column` ... , in an order that never changes.
    DEVICE void sum(int row, int column, float (&total)[COLUMNS]) const {
        const auto times_x = *reinterpret_cast<const Floats<4>*>((by_fours() ? factors : of_x) + column);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) total[c] = 0;
        if (a.split > 1) {
            const int at = ((row - looked_at) * Room + (column ^ turn)) * 2;  // the former is 8 or 0
#pragma unroll 4
            for (int i = 0; i < a.split; i++) {
                const auto four = load_shared((i == s.rank ? own : other + i * owned * Room * 2) + at);
                const Float2 low = floats_from_half2(bits<uint32_t>(four.v[0])), high = floats_from_half2(bits<uint32_t>(four.v[1]));
                total[0] += low.x, total[1] += low.y, total[2] += high.x, total[3] += high.y;
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) total[c] *= 1 / DOWN;
        } else {
            Base::add_up(a.waves_k, [&](int i) { return of_waves + i * Base::rows() * Room + place(row, column); }, total);
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) total[c] = total[c] * times_x.v[c] * Base::times[row] + Base::plus[row];
    }

    /// All threads, at the end: what this block has sent must have arrived before it goes.
    DEVICE void leave() const {
        if (a.split > 1) cluster_wait();
    }

   private:
    static constexpr float DOWN = 0x1p-14f;

    DEVICE static int halves_bytes(const DecodeArgs& a) { return a.split > 1 ? a.waves_n * TILE_ROWS * Room * 2 : 0; }

    /// Columns of a row are turned by it, so that pairs of columns of eight rows lie in all banks.
    DEVICE static int turn_of(int row) { return row % 8 / (64 / Room) * 8; }

    /// Sums of two neighbouring columns, as they travel.
    DEVICE static uint32_t halved(float first, float second) { return bits<uint32_t>(half2_from_floats({first * DOWN, second * DOWN})); }

    DEVICE void halve(int row, int column, float first, float second) const {
        *reinterpret_cast<uint32_t*>(halves + row * Room + (column ^ turn_of(row))) = halved(first, second);
    }

    static constexpr int FOUR = 4 * TILE_ROWS, WAVES_RING = 4 * TILE_ROWS * 64;  // rows of four waves, and bytes of a tile of each in their rings

    /// Where four waves that multiply together had their weights.
    DEVICE uint16_t* of_four(int four) const { return reinterpret_cast<uint16_t*>(of_waves) + four * (a.depth * a.chunk * WAVES_RING / 2); }

    /// As `hand_over`. Four waves wait for nobody else before they send.
    template <typename T>
    DEVICE void hand_over_by_fours(const T& totals) {
        const int four = s.wave() / 4, wave = s.wave() % 4;
        uint16_t* const mine = of_four(four);
        four_has(four);  // multiplied
        const int lane = anew(counted(thread_index()) % WAVE), row = wave * TILE_ROWS + lane % 16;
        const uint32_t to = shared_address(mine + row * Room), turn = turn_of(lane % 8), second = lane / 16 * 8;
#pragma unroll
        for (int set = 0; set < Room / 8; set += 2) {
            const auto &low = totals.sum[set], &high = totals.sum[set + 1];
            store_rows(to + ((8 * set + second) ^ turn) * 2, halved(low[0], low[1]), halved(low[2], low[3]), halved(high[0], high[1]),
                       halved(high[2], high[3]));
        }
        show_to_async();
        four_has(four);  // what is sent
        const int first_row = four * FOUR;
        for (int owner = Base::of_owner.of(first_row) + wave; owner * owned < first_row + FOUR; owner += 4) {
            if (owner == s.rank || !elected()) continue;
            const int from = larger(owner * owned, first_row), count = smaller((owner + 1) * owned, first_row + FOUR) - from;
            uint16_t* to = others + (s.rank * owned + from - owner * owned) * Room;
            bulk_send(address_in(to, owner), mine + (from - first_row) * Room, count * Room * 2, address_in(Base::barrier, owner));
        }
        Base::publish();
        everybody_has();
        Base::wait();
        Base::ready();
    }

    uint16_t *const halves, *const others;
    const float* const factors;
    float* const of_x;
    int looked_at = 0, turn = 0;  // an owned row, and by what its columns are turned
    uint32_t own = 0, other = 0;  // where this block's halves of it are, and the cluster's first block's
};
