// How partial sums meet: of waves that share K in their block, of blocks that share it, a cluster, in the one of them that finishes a row.
#pragma once

/// What the sums of weight row `row` are multiplied by.
template <Weight W, Act A, int M>
DEVICE float row_factor(const DecodeArgs& a, const Share& s, int expert, int row) {
    using X = Activations<W, A, M>;
    float factor = X::UNLIFT;
    if constexpr (W == Weight::e2m1 || is_row(W)) factor = a.factors[static_cast<int64_t>(expert) * s.row_tiles * TILE_ROWS + row];
    return factor;
}

/// Rows of a group that a block finishes, and what it knows of them beforehand.
class OwnedRows {
   public:
    int owned, first;     // rows of the group, from which on
    float *times, *plus;  // of every owned row: what its sums are multiplied by, and what is added then

    /// Bytes in front of the partial sums.
    DEVICE static int ahead_of_partial(const DecodeArgs& a) { return shared_by(a.waves_n * TILE_ROWS, a.split) * 8; }

    DEVICE OwnedRows(const DecodeArgs& a, const Share& s, uint8_t* lds)
        : owned(shared_by(s.waves_n * TILE_ROWS, a.split)), first(s.rank * owned), times(reinterpret_cast<float*>(lds)),
          plus(times + owned), a(a), s(s), of_owner(owned), outputs(outputs_of(a, owned)) {}

    /// Loads, before they are needed, what one of the owned rows is multiplied by and what is added to it.
    template <Weight W, Act A, int M>
    DEVICE void look_ahead(int expert, int group) {
        const int row = group * s.waves_n * TILE_ROWS + first + thread_index();
        my_times = 1, my_plus = 0;
        if (thread_index() >= owned || row >= a.n) return;
        my_times = row_factor<W, A, M>(a, s, expert, row);
        if (a.bias != nullptr) my_plus = float_from_bf16(a.bias[static_cast<int64_t>(expert) * a.n + bias_index(a, row)]);
    }

   protected:
    /// Tells every thread of the block, after its next barrier, what was loaded ahead.
    DEVICE void publish() const {
        if (thread_index() < owned) times[thread_index()] = my_times, plus[thread_index()] = my_plus;
    }

    /// Adds `count` partial sums, in their order, of which `part(i)` says where they are.
    template <int Columns, typename Part>
    DEVICE static void add_up(int count, Part part, float (&total)[Columns]) {
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const auto floats = *reinterpret_cast<const Floats<Columns>*>(part(i));
#pragma unroll
            for (int c = 0; c < Columns; c++) total[c] += floats.v[c];
        }
    }

    /// Their sums, and what follows for owned row `row`.
    template <int Columns, typename Part>
    DEVICE void sum_up(int count, Part part, int row, float (&total)[Columns]) const {
#pragma unroll
        for (int c = 0; c < Columns; c++) total[c] = 0;
        add_up(count, part, total);
#pragma unroll
        for (int c = 0; c < Columns; c++) total[c] = total[c] * times[row] + plus[row];
    }

    const DecodeArgs& a;
    const Share& s;
    const Divisor of_owner, outputs;  // rows of a group that a block finishes, and what becomes of them

   private:
    float my_times = 1, my_plus = 0;
};

/// Where the first results of a thread go if they are bf16 with nothing fused behind them, which is known before they are; else null.
DEVICE uint16_t* plain_results(const DecodeArgs& a, const Share& s, int first_row, const OwnedRows& rows, const Output& output, int group) {
    if (anew(a.out) != OUT_BF16 || a.activation != NO_ACTIVATION || a.row_weights != nullptr || a.residual != nullptr) return nullptr;
    return static_cast<uint16_t*>(a.y) + anew(first_row) * a.y_stride + group * s.waves_n * TILE_ROWS + rows.first + output.number +
           output.first_column * a.y_stride;
}

template <int Count>
DEVICE void store_floats(float* to, const Floats<Count>& floats) { *reinterpret_cast<Floats<Count>*>(to) = floats; }

/// Partial sums of a row group on their way to the block that finishes their rows. Blocks that share K are a cluster, and each owns
/// rows / split rows. What comes from other blocks announces itself to a barrier, so that no fence is needed.
class GroupSums : public OwnedRows {
   public:
    DEVICE GroupSums(const DecodeArgs& a, const Share& s, uint8_t* lds, uint64_t* barrier)
        : OwnedRows(a, s, lds), barrier(barrier), partial(plus + owned) {
        if (a.split == 1) return;
        if (thread_index() == 0) barrier_init(barrier), barriers_are_ready();
    }

    /// All threads: others may send from here on, before the first group, and after the last `sum` of a group that another follows.
    DEVICE void ready() const {
        if (a.split > 1) cluster_arrive();
    }
    /// All threads that are to send, before the first group: waits until all blocks that share K are `ready`.
    DEVICE void meet() const {
        if (a.split > 1) cluster_wait();
    }

   protected:
    /// All threads, before a group's sums are handed over, of which so many floats will come from other blocks: when nobody wants
    /// those of the group before any more.
    DEVICE void expect(int floats, bool first_group) const {
        if (a.split > 1) {
            if (!first_group) cluster_wait();
            if (thread_index() == 0) barrier_expect(barrier, floats * 4);
        } else if (!first_group) {
            block_barrier();
        }
    }

    DEVICE void wait() {
        if (a.split > 1) barrier_wait(barrier, parity), parity ^= 1;
    }

    /// A barrier of the threads that multiply; those that brought x have gone.
    DEVICE void everybody_has() const { asm volatile("barrier.sync 1, %0;" ::"r"(s.threads) : "memory"); }

    uint64_t* const barrier;
    float* const partial;

   private:
    uint32_t parity = 0;
};

/// Barriers of four waves that multiply together: of themselves; and of two fours, of which one multiplies when the other has asked the matrix
/// unit for all of its products.
DEVICE void four_has(int four) { asm volatile("barrier.sync %0, 128;" ::"r"(8 + four) : "memory"); }
DEVICE void after_four_in_front(int four) {
    if (four > 0) asm volatile("barrier.sync %0, 256;" ::"r"(1 + four) : "memory");
}
DEVICE void let_four_behind(int four, int fours) {
    if (four + 1 < fours) asm volatile("barrier.arrive %0, 256;" ::"r"(2 + four) : "memory");
}

/// Of few rows of x each wave's travel by st.async: [rank][wave_k][owned row][column].
template <int Room, int Columns = Room < 16 ? 1 : 4>
class Sums : public GroupSums {
   public:
    static constexpr int COLUMNS = Columns;  // that one thread finishes together

    DEVICE Sums(const DecodeArgs& a, const Share& s, uint8_t* lds, uint64_t* barrier)
        : GroupSums(a, s, lds, barrier), place(anew(s.rank * a.waves_k + s.wave_k)) {}
    /// Behind `used` bytes of rings and activations, in a block with one row group.
    DEVICE Sums(const DecodeArgs& a, const Share& s, uint8_t* rings, int used, uint64_t* barrier, const float*) : Sums(a, s, rings + used, barrier) {}
    DEVICE static int behind(const DecodeArgs&, int used) { return used; }

    /// Where a row of a wave's row tile goes: into another block, whose barrier is told, or to `barrier` 0; and by what its columns are turned.
    struct Destination {
        uint32_t to, barrier, turn;
        DEVICE uint32_t at(int column) const { return to + turned(column, turn) * 4; }
    };
    DEVICE Destination destination(int row) const {
        row += s.wave_n * TILE_ROWS;
        const int owner = of_owner.of(row), own_row = row - owner * owned;
        float* to = partial + (place * owned + own_row) * Room;
        if (owner == s.rank) return {shared_address(to), 0, turn_of(own_row)};
        return {address_in(to, owner), address_in(barrier, owner), turn_of(own_row)};
    }

    /// All threads that multiply: sums up, and tells them what was loaded ahead. `destination_of(row)`: its `destination`.
    template <typename T, typename DestinationOf>
    DEVICE void hand_over(const T& totals, int columns, bool first_group, DestinationOf destination_of) {
        const int handed_on = ceil_div(smaller(anew(columns), Room), T::TOGETHER) * T::TOGETHER;  // of a row; not worked out before the group's products
        expect((a.split - 1) * a.waves_k * owned * handed_on, first_group);
        totals.each(columns, [&](int row, int column, const auto& values) {
            const Destination there = destination_of(row);
            if (there.barrier != 0)
                cluster_store(there.at(column), values, there.barrier);
            else
                store_floats(there.at(column), values);
        });
        publish();
        everybody_has();
        wait();
    }
    template <typename T>
    DEVICE void hand_over(const T& totals, int columns, bool first_group, bool) {
        hand_over(totals, columns, first_group, [&](int row) { return destination(row); });
    }

    DEVICE Output output() const { return {a, s, outputs, COLUMNS}; }

    /// The finished sums of an owned row, columns `column` ... , in an order that never changes.
    DEVICE void sum(int row, int column, float (&total)[COLUMNS]) const {
        const float* from = partial + row * Room + turned(column, turn_of(row));
        sum_up(a.split * a.waves_k, [&](int i) { return from + i * owned * Room; }, row, total);
    }

    /// All threads, at the end.
    DEVICE void leave() const {}

   private:
    /// Columns of a row are turned by fours, so that the same ones of eight rows lie in all banks.
    DEVICE static uint32_t turn_of(int row) { return Room < 8 ? 0 : row / (32 / Room) % (Room / 4); }
    DEVICE static uint32_t turned(int column, uint32_t turn) { return (column / 4 ^ turn) * 4 + column % 4; }

    const int place;  // of this wave's sums among those of their rows
};

/// Of a block with one row group, for an x that streams: those of waves that share K meet where rings and x were, [wave_k][row][column]; then
/// what other blocks own travels: [rank][owned row][column], 64 columns copied whole, fewer by st.async.
template <int Room>
class MetSums : public GroupSums {
    static constexpr bool WHOLE = Room >= 64;

   public:
    static constexpr int COLUMNS = 4;  // that one thread finishes together

    /// `of_waves`: where those of waves meet, which may still read what was there.
    DEVICE MetSums(const DecodeArgs& a, const Share& s, uint8_t* lds, uint64_t* barrier, float* of_waves)
        : GroupSums(a, s, lds, barrier), of_waves(of_waves) {}

    /// Behind `used` bytes of rings and activations.
    DEVICE static MetSums behind(const DecodeArgs& a, const Share& s, uint8_t* rings, int used, uint64_t* barrier) {
        return {a, s, rings + larger(used, met_bytes(a)), barrier, reinterpret_cast<float*>(rings)};
    }

    /// All threads: sums up, and tells every thread of the block what was loaded ahead.
    template <typename T>
    DEVICE void hand_over(const T& totals, int columns) {
        const int handed_on = WHOLE ? Room : ceil_div(smaller(columns, Room), 4) * 4;  // of a row
        expect((WHOLE ? a.split - 1 : a.split) * owned * handed_on, true);
        block_barrier();
        float* mine = of_waves + (s.wave_k * a.waves_n + s.wave_n) * TILE_ROWS * Room;
        totals.each_pair(columns, [&](int row, int column, const auto& values) { store_floats(mine + place(row, column), values); });
        publish();
        if (WHOLE && a.split > 1) {
            if (a.waves_k > 1) {
                block_barrier();
                each_sum(columns, [&](int row, int column, const Floats<4>& sum) { store_floats(of_waves + place(row, column), sum); });
            }
            show_to_async();
        }
        block_barrier();
        if (a.split > 1) {
            if (WHOLE)
                send(of_waves, partial);
            else
                each_sum(columns, [&](int row, int column, const Floats<4>& sum) { send(row, column, sum); });
        }
        wait();
        if (WHOLE) ready();
    }

    DEVICE Output output() const { return {a, s, outputs, COLUMNS}; }

    /// The finished sums of an owned row, columns `column` ... , in an order that never changes.
    DEVICE void sum(int row, int column, float (&total)[COLUMNS]) const {
        const bool split = a.split > 1;
        const float *own = of_waves + first * Room, *others = split ? partial : of_waves;
        const int at = place(row, column);  // owned rows are multiples of eight
        sum_up(
            split ? a.split : a.waves_k, [&](int i) { return (WHOLE && split && i == s.rank ? own : others + i * owned * Room) + at; }, row,
            total);
    }

    /// All threads, at the end: what this block has sent must have arrived before it goes.
    DEVICE void leave() const {
        if (WHOLE && a.split > 1) cluster_wait();
    }

   protected:
    DEVICE static int met_bytes(const DecodeArgs& a) { return a.waves_k * a.waves_n * TILE_ROWS * Room * 4; }
    DEVICE int rows() const { return a.waves_n * TILE_ROWS; }  // of a group

    /// Columns of a row are turned by it, so that the four times four pairs of columns that half a wave stores, and four columns of eight
    /// rows, lie in all banks.
    DEVICE static int place(int row, int column) { return row * Room + (column ^ ((row & 3) << 3 | row & 4) & Room - 1); }

    /// Sums of waves that have met: `use(row, column, those of four columns)`.
    template <typename Use>
    DEVICE void each_sum(int columns, Use use) const {
        const int set = quotient(thread_index(), rows()), row = thread_index() - set * rows();
        for (int column = set * 4; column < columns; column += a.waves_k * 8) {
            const float* from = of_waves + place(row, column);
            Floats<4> total = {};
#pragma unroll 4
            for (int i = 0; i < a.waves_k; i++) {
                const auto part = *reinterpret_cast<const Floats<4>*>(from + i * rows() * Room);
#pragma unroll
                for (int c = 0; c < 4; c++) total.v[c] += part.v[c];
            }
            use(row, column, total);
        }
    }

    /// A sum to the block that owns its row, which may be this one.
    DEVICE void send(int row, int column, const Floats<4>& sum) const {
        const int owner = of_owner.of(row), block = cluster_rank() - s.rank + owner;
        float* to = partial + s.rank * owned * Room + place(row - owner * owned, column);
        cluster_store(address_in(to, block), sum, address_in(barrier, block));
    }

    /// To every other block what it owns of `rows`, into its `others`: a wave each, as one that sent several would send one after the other.
    template <typename Number>
    DEVICE void send(Number* rows, Number* others) const {
        for (int owner = wave_index(); owner < a.split; owner += s.threads / WAVE) {
            if (owner == s.rank || !elected()) continue;
            const int block = cluster_rank() - s.rank + owner;
            bulk_send(address_in(others + s.rank * owned * Room, block), rows + owner * owned * Room, owned * Room * sizeof(Number), address_in(barrier, block));
        }
    }

    float* const of_waves;
};

/// Those of a block that holds all of its x, behind `used` bytes of rings and activations.
template <int Room>
DEVICE Sums<Room> sums_of_block(const DecodeArgs& a, const Share& s, uint8_t* rings, int used, uint64_t* barriers) {
    return {a, s, rings + used, barriers};
}
