// Whether a step stays inside of what it indexes.
#pragma once

#include <algorithm>

#include "interface.h"

// Which argument points outside of what it indexes; 0 if none.
inline int refused(const Model& m, const Step& s) {
  auto outside = [](const int64_t* values, int64_t count, int64_t low, int64_t high) {
    return std::any_of(values, values + count, [=](int64_t v) { return v < low || v >= high; });
  };
  if (outside(s.tokens, s.tokens_count, 0, m.vocabulary)) return 1;
  if (outside(s.slots, s.tokens_count, INT64_MIN, s.pages * s.page_size)) return 2;
  if (s.rows_count > s.tokens_count || outside(s.rows, s.rows_count, 0, s.tokens_count)) return 3;
  if (s.query_offsets[0] != 0 || s.query_offsets[s.sequences] != s.tokens_count) return 4;
  for (int64_t i = 0; i < s.sequences; i++) {
    int64_t brought = s.query_offsets[i + 1] - s.query_offsets[i];
    if (brought < 0) return 4;
    if (s.lengths[i] < brought || s.lengths[i] > s.table_width * s.page_size) return 5;
    int64_t pages = brought ? (s.lengths[i] + s.page_size - 1) / s.page_size : 0;
    if (outside(s.page_table + i * s.table_width, pages, 0, s.pages)) return 6;
  }
  return 0;
}
