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

    /// All threads that multiply: sums up, and tells them what was loaded ahead.
    template <typename T>
    DEVICE void hand_over(const T& totals, int columns) {
        Base::expect((a.split - 1) * owned * (Room / 2), true);
        if (thread_index() < Room) of_x[thread_index()] = factors[thread_index()];
        everybody_has();
        const int row_of_wave = s.wave_n * TILE_ROWS;
        if (a.split > 1 && a.waves_k == 1) {
            totals.each_pair(columns, [&](int row, int column, const Floats<2>& sums) { halve(row_of_wave + row, column, sums.v[0], sums.v[1]); });
        } else {
            float* mine = of_waves + (s.wave_k * Base::rows() + row_of_wave) * Room;
            totals.each_pair(columns, [&](int row, int column, const auto& sums) { store_floats(mine + place(row, column), sums); });
            if (a.split > 1) {
                everybody_has();
                Base::each_sum(columns, [&](int row, int column, const Floats<4>& sum) {
                    halve(row, column, sum.v[0], sum.v[1]), halve(row, column + 2, sum.v[2], sum.v[3]);
                });
            }
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
        const auto times_x = *reinterpret_cast<const Floats<4>*>(of_x + column);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) total[c] = 0;
        if (a.split > 1) {
            const int at = place_of_half(row, column);  // owned rows are multiples of eight
            const uint16_t* own = halves + first * Room;
#pragma unroll 4
            for (int i = 0; i < a.split; i++) {
                const auto four = *reinterpret_cast<const Codes*>((i == s.rank ? own : others + i * owned * Room) + at);
                const Float2 low = floats_from_half2(four.v[0]), high = floats_from_half2(four.v[1]);
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
    DEVICE static int place_of_half(int row, int column) { return row * Room + (column ^ row % 8 / (64 / Room) * 8); }

    DEVICE void halve(int row, int column, float first, float second) const {
        *reinterpret_cast<Half2*>(halves + place_of_half(row, column)) = half2_from_floats({first * DOWN, second * DOWN});
    }

    uint16_t *const halves, *const others;
    const float* const factors;
    float* const of_x;
};
