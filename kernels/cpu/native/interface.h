// What the caller hands over; kernels/cpu/decoder.py declares the same fields in the same order.
//
// N tokens, S sequences, D hidden width, H query heads, G key-value heads, C channels of a head, E experts, K experts
// per token, F expert width, Fd that of a dense layer, V vocabulary, P rows of a page. Weights are (outputs, inputs),
// float32 or bfloat16; norms and routers float32, padded by zeros to a multiple of 32 channels.
#pragma once

#include <cstdint>

struct Layer {
  const float *input_norm, *post_norm;  // (D)
  const void *qkv, *attention_out;      // ((H + 2 G) C, D), (D, H C)
  const float* router;                  // (E, D), null in a dense layer
  const float* router_bias;             // (E), null if the experts are chosen by their logits
  const void *gate_up, *down;           // (E, 2 F, D) and (E, D, F), or (2 Fd, D) and (D, Fd)
  const void *shared_gate_up, *shared_down;
};

struct Model {
  int64_t layers, hidden, heads, kv_heads, head_dim, width, dense_width, experts, top, shared_width, vocabulary;
  int64_t normalize;                 // whether the weights of the chosen experts sum to 1
  int64_t half_weights, half_cache;  // whether weights, keys and values are bfloat16
  double eps;
  const void *embedding, *head;  // (V, D)
  const float* norm;
  const Layer* layer;
};

struct Step {
  int64_t tokens_count, sequences, table_width, page_size, pages, rows_count, threads;
  const int64_t *tokens, *slots, *page_table, *query_offsets, *lengths, *rows;
  const float *cos, *sin;  // (N, C / 2)
  void *keys, *values;     // (layers, pages, P, G, C)
  float* logits;           // (rows, V)
  int32_t* experts;        // (layers with a router, N, K)
  void* workspace;         // workspace_bytes of it
};

// Tokens to be guessed for sequences, each after what it has not read. Of the step that comes with it only the page
// table, sizes, cache and room count, tokens_count being that of `tokens`.
struct Guess {
  int64_t width;                       // of `found`
  const int64_t *tokens, *offsets;     // (N) not read: sequence s has offsets[s] .. offsets[s + 1] of them
  const int64_t *starts, *counts;      // (S) position of its first one, and how many it wants, 1 .. width
  const float *cos_table, *sin_table;  // (positions, C / 2)
  const float* temperatures;           // (S) that tokens are drawn at; 0 for the likeliest ones
  const double* uniforms;              // (S, width) in [0, 1), for the tokens to draw
  int64_t* found;                      // (S, width); -1 from where logits have a NaN or no finite largest value
  float* laws;                         // (S, width, V) what tokens are drawn from; null if none are
};
