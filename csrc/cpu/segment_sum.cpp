// Sums of rows by segment on the CPU.
//
// sums[s] = sum of values[r] over the rows r with ids[r] == s, counts[s] their number; rows with an id outside
// [0, segments) are skipped. Every element is added up in ascending row order, in fp64, and rounded once: the bits
// depend only on the input.
//
// Plan. A stable counting sort orders the rows: chunks of rows are counted and placed in parallel, a segment's rows of
// one chunk after those of the chunks before. Blocks of about equally many rows are then summed in parallel, whole
// segments each; a long segment is split over the depth instead. Rows ahead are prefetched: their order is random.
// Cost: ids read twice, values once, sums written once. Scratch: 4 bytes a row, and 4 a segment for every chunk, of
// which there are no more than rows / segments.
#include <algorithm>
#include <vector>

#include "backend.h"
#include "convert.h"

namespace semhitok::cpu {
namespace {

constexpr int64_t kChunkRows = 1 << 15;    // rows worth a thread of their own in the sort
constexpr int64_t kElementWork = 8;        // adding up a value costs about as much as this many multiply-adds
constexpr int64_t kLongSegment = 1 << 16;  // rows
constexpr int64_t kSliceColumns = 32;      // of a long segment: two cache lines of fp32, which memory delivers together
constexpr int64_t kBatch = 4;              // rows added at a time, so that totals are loaded and stored less often
constexpr int64_t kPrefetchRows = 32, kPrefetchBytes = 1024;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
inline double widened(double x) { return x; }
inline double widened(float x) { return x; }
inline double widened(Float16 x) { return from_float16(x.bits); }
inline double widened(BFloat16 x) { return from_bfloat16(x.bits); }

// Rows by segment: those of segment s are rows[begin(s) .. ends[s]). kPrefetchRows entries follow the last.
struct Order {
  Buffer<int32_t> rows, places;
  const int32_t* ends;
  std::vector<int64_t> long_segments;

  int64_t begin(int64_t segment) const { return segment == 0 ? 0 : ends[segment - 1]; }
};

Order sort(const SegmentSum& p) {
  const int64_t chunks = std::clamp<int64_t>(p.rows / std::max(p.segments, kChunkRows), 1, thread_count());
  Order order;
  order.rows = allocate<int32_t>(p.rows + kPrefetchRows);
  order.places = allocate<int32_t>(chunks * p.segments);
  const auto places_of = [&](int64_t chunk) { return order.places.get() + chunk * p.segments; };
  const auto for_each_row = [&](const auto& f) {  // f(the chunk's places, segment, row), chunks in parallel
    parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        int32_t* places = places_of(chunk);
        const int64_t last = p.rows * (chunk + 1) / chunks;
        for (int64_t row = p.rows * chunk / chunks; row < last; ++row) {
          const int64_t id = p.ids[row];
          if (id >= 0 && id < p.segments) f(places, id, row);
        }
      }
    });
  };

  std::fill_n(order.places.get(), chunks * p.segments, 0);
  for_each_row([](int32_t* counts, int64_t id, int64_t) { ++counts[id]; });
  int32_t position = 0;
  for (int64_t s = 0; s < p.segments; ++s) {
    const int32_t first = position;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int32_t& place = places_of(chunk)[s];
      const int32_t count = place;
      place = position;
      position += count;
    }
    if (position - first > kLongSegment) order.long_segments.push_back(s);
  }
  int32_t* rows = order.rows.get();
  for_each_row([rows](int32_t* places, int64_t id, int64_t row) { rows[places[id]++] = static_cast<int32_t>(row); });
  std::fill_n(rows + position, kPrefetchRows, 0);
  order.ends = places_of(chunks - 1);  // the last chunk's places have advanced to the ends
  return order;
}

// total[d] = the sum of column d < width over rows[0 .. count).
template <typename T>
void add_rows(const T* values, int64_t depth, int64_t width, const int32_t* rows, int64_t count,
              double* __restrict total) {
  const int64_t bytes = std::min<int64_t>(width * static_cast<int64_t>(sizeof(T)), kPrefetchBytes);
  const auto row = [&](int64_t i) { return values + rows[i] * depth; };
  std::fill_n(total, width, 0.0);
  int64_t i = 0;
  for (; i + kBatch <= count; i += kBatch) {
    for (int64_t k = 0; k < kBatch; ++k) prefetch_row<2>(row(i + k + kPrefetchRows), bytes);
    const T *r0 = row(i), *r1 = row(i + 1), *r2 = row(i + 2), *r3 = row(i + 3);
    for (int64_t d = 0; d < width; ++d) {
      total[d] = total[d] + widened(r0[d]) + widened(r1[d]) + widened(r2[d]) + widened(r3[d]);
    }
  }
  for (; i < count; ++i) {
    prefetch_row<2>(row(i + kPrefetchRows), bytes);
    const T* r = row(i);
    for (int64_t d = 0; d < width; ++d) total[d] += widened(r[d]);
  }
}

template <typename T, typename Sum>
void sum_segments(const SegmentSum& p, const Order& order) {
  const T* values = static_cast<const T*>(p.values.data);
  Sum* sums = static_cast<Sum*>(p.sums);
  const auto sum_columns = [&](int64_t s, int64_t column, int64_t width, double* total) {
    const int64_t begin = order.begin(s);
    add_rows(values + column, p.depth, width, order.rows.get() + begin, order.ends[s] - begin, total);
    std::copy_n(total, width, sums + s * p.depth + column);
  };
  const auto sum_range = [&](int64_t s, int64_t end, double* total) {
    while (s < end) {
      const int64_t begin = order.begin(s), first_empty = s;
      while (s < end && order.ends[s] == begin) p.counts[s++] = 0;
      std::fill_n(sums + first_empty * p.depth, (s - first_empty) * p.depth, Sum(0));
      if (s == end) return;
      p.counts[s] = order.ends[s] - begin;
      if (p.counts[s] <= kLongSegment) sum_columns(s, 0, p.depth, total);
      ++s;
    }
  };

  // The work before segment s: its rows to read and its sums to write.
  const auto work_before = [&](int64_t s) { return order.begin(s) + s; };
  const auto first_segment = [&](int64_t work) {  // with at least this much before it
    int64_t low = 0, high = p.segments;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work_before(middle) < work) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  const int64_t block = ceil_div(kInlineWork / kElementWork, p.depth);
  const int64_t blocks = ceil_div(work_before(p.segments), block), slices = ceil_div(p.depth, kSliceColumns);
  const int64_t long_items = static_cast<int64_t>(order.long_segments.size()) * slices;
  parallel_blocks(long_items + blocks, 1, [&](const auto& next) {
    const auto total = allocate<double>(p.depth);
    for (int64_t item = next(); item >= 0; item = next()) {
      if (item < long_items) {
        const int64_t column = item % slices * kSliceColumns;
        sum_columns(order.long_segments[item / slices], column, std::min(kSliceColumns, p.depth - column), total.get());
      } else {
        const int64_t work = (item - long_items) * block;
        sum_range(first_segment(work), first_segment(work + block), total.get());
      }
    }
  });
}

}  // namespace

void segment_sum(const SegmentSum& p) {
  if (p.segments == 0) return;
  const Order order = sort(p);
  switch (p.values.dtype) {
    case Dtype::kFloat32: return sum_segments<float, float>(p, order);
    case Dtype::kFloat16: return sum_segments<Float16, float>(p, order);
    case Dtype::kBFloat16: return sum_segments<BFloat16, float>(p, order);
    case Dtype::kFloat64: return sum_segments<double, double>(p, order);
  }
}

}  // namespace semhitok::cpu
