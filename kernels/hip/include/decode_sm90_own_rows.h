// Results of rows of which a wave has all of K: from its registers by way of its own part of shared memory into memory, no wave waiting for
// another.
#pragma once

/// A row tile of w that a wave finishes, and what its sums are multiplied by and what is added then, loaded before they are known.
template <Weight W, Act A, int M>
class OwnTile {
   public:
    static constexpr int BYTES = 2 * TILE_ROWS * 4;

    /// `lds`: BYTES for each wave.
    DEVICE OwnTile(const DecodeArgs& a, const Share& s, int group, uint8_t* lds)
        : first((group * s.waves_n + s.wave_n) * TILE_ROWS), known(reinterpret_cast<float*>(lds + wave_index() * BYTES)) {
        const int lane = lane_index(), row = first + lane % TILE_ROWS;
        const bool multiplied_by = lane < TILE_ROWS;
        mine = multiplied_by ? 1.0f : 0.0f;
        if (row >= a.n) return;
        if (multiplied_by)
            mine = row_factor<W, A, M>(a, s, 0, row);
        else if (a.bias != nullptr)
            mine = float_from_bf16(a.bias[bias_index(a, row)]);
    }

    /// All lanes, when they have nothing else to do: what was loaded need not be held in registers any more.
    DEVICE void keep() const {
        known[lane_index()] = mine;
        __syncwarp();
    }

    DEVICE bool finishes(const WideSums<M>&) const { return true; }

    /// All lanes: finishes sums, and stores results. `lds`: TILE_ROWS * 32 bytes of this wave's.
    DEVICE void store(const DecodeArgs& a, const Share& s, const Rows<false>& rows, WideSums<M>& totals, uint8_t* lds) const {
        const int lane = anew(lane_index()), g = lane / 4, q = lane % 4;
        const bool gated = a.activation != NO_ACTIVATION;
        const int first_result = gated ? first / 2 : first, results = gated ? a.n / 2 : a.n;
        float times[2], plus[2];
#pragma unroll
        for (int half = 0; half < 2; half++) times[half] = known[g + 8 * half], plus[half] = known[TILE_ROWS + g + 8 * half];
        // Of rows g and g + 8, or of what becomes of both: columns 2 q and 2 q + 1 of eight.
        const auto finished = [&](const float(&sum)[4], float (&v)[2][2]) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int c = 0; c < 2; c++) v[half][c] = sum[2 * half + c] * times[half] + plus[half];
                finish<W, A>(a, s, 0, first + g + 8 * half, v[half]);
            }
            if (gated)
#pragma unroll
                for (int c = 0; c < 2; c++) v[0][c] = activated(v[0][c], v[1][c], a);
        };
        if (a.out == OUT_BF16 && a.row_weights == nullptr && a.residual == nullptr) {
            const Staged staged(lds, lane);
            const int column = lane / 2, row = lane % 2 * 8;  // that this lane stores
#pragma unroll
            for (int i = 0; i < M / 16; i++) {
                if (16 * i >= rows.count) break;
                float low[2][2], high[2][2];
                finished(totals.sum[2 * i], low), finished(totals.sum[2 * i + 1], high);
                staged.put(low, high);
                if (16 * i + column < rows.count && !(gated && row > 0)) staged.copy(a, rows.first + 16 * i + column, first_result + row, results);
                __syncwarp();  // what follows goes where this was
            }
            return;
        }
#pragma unroll 1
        for (int i = 0; 8 * i < rows.count; i++) {
            float v[2][2];
            finished(totals.sum[0], v);
#pragma unroll
            for (int j = 0; j < M / 8 - 1; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) totals.sum[j][c] = totals.sum[j + 1][c];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int column = 8 * i + 2 * q + c, row = first_result + g + 8 * half;
                    if (column < rows.count && row < results && !(gated && half > 0)) store_result(a, rows.first + column, row, v[half][c]);
                }
        }
    }

    const int first;  // row of w

   private:
    /// Sixteen rows of w of sixteen rows of x as bf16: of each row of x 32 bytes, of which the halves of four and four change places, so that
    /// eight rows lie in all banks.
    struct Staged {
        uint8_t *to, *from;  // what this lane points the matrix store at, and what it reads
        DEVICE Staged(uint8_t* lds, int lane) : to(place(lds, lane / 16 * 8 + lane % 8, lane / 8 % 2)), from(place(lds, lane / 2, lane % 2)) {}
        DEVICE static uint8_t* place(uint8_t* lds, int column, int half) { return lds + column * 32 + (half ^ column / 4 % 2) * 16; }

        /// All lanes, of two eights of rows of x.
        DEVICE void put(const float (&low)[2][2], const float (&high)[2][2]) const {
            store_turned(to, bf16x2_from_floats({low[0][0], low[0][1]}), bf16x2_from_floats({low[1][0], low[1][1]}),
                         bf16x2_from_floats({high[0][0], high[0][1]}), bf16x2_from_floats({high[1][0], high[1][1]}));
            __syncwarp();
        }

        /// Eight results of row `row` of x, from `at` of `results` on.
        DEVICE void copy(const DecodeArgs& a, int row, int at, int results) const {
            uint16_t* y = static_cast<uint16_t*>(a.y) + row * a.y_stride + at;
            if (at + 8 <= results && reinterpret_cast<uintptr_t>(y) % 16 == 0) return store_words(y, load_words(from));
#pragma unroll 1
            for (int i = 0; i < 8 && at + i < results; i++) y[i] = reinterpret_cast<const uint16_t*>(from)[i];
        }
    };

    float* const known;  // factors of sixteen rows, then their biases
    float mine;
};
