"""The faults that the tests of the kernels must detect.

Each breaks one barrier, wait, tie rule, fragment, alignment, bound or launch limit.
"""

from __future__ import annotations

from mutations.mutation import RESULTS, Mutation

RANK = "cuda/rank.cu"
GRAM = "cuda/gram.cu"
NEIGHBOURS = "cuda/methods/neighbours.cu"
DEDUP = "cuda/methods/vispruner.cu"
SELECT = "cuda/methods/select.cuh"
GREEDY = "cuda/methods/greedy.cuh"
MAXMIN = "cuda/methods/maxmin.cu"
MMR = "cuda/methods/mmr.cu"
SCOPE = "cuda/methods/scope.cu"
GATHER = "cuda/gather.cu"
CLS = "cuda/cls_attention.cu"
RECEIVED = "cuda/received_attention.cu"
LAUNCH = "cuda/launch.cuh"
NUMERICS = "include/vispruner/numerics.h"

BARRIERS = [
    Mutation(
        "ranking: the tile is read before it is complete",
        RANK,
        "base, count, tile); __syncthreads();",
        "base, count, tile);",
        "racecheck",
    ),
    Mutation(
        "ranking: the tile is overwritten while it is read",
        RANK,
        "if (t > 0) __syncthreads();",
        "",
        "racecheck",
    ),
    Mutation(
        "ranking: ranks are read before all are known",
        RANK,
        "if (residual == 0) return; __syncthreads();",
        "if (residual == 0) return;",
        "racecheck",
    ),
    Mutation(
        "Gram: a stage is read before it is complete for all",
        GRAM,
        "copy_async_wait<S::kStages - 2>(); __syncthreads();",
        "copy_async_wait<S::kStages - 2>();",
        "racecheck",
    ),
    Mutation(
        "Gram: the output tile lies over a stage in use",
        GRAM,
        "copy_async_wait<0>(); __syncthreads();",
        "copy_async_wait<0>();",
        "racecheck",
    ),
    Mutation(
        "Gram: the output tile is read before it is complete",
        GRAM,
        "own_sums[S::kRows + column])); } } } __syncthreads();",
        "own_sums[S::kRows + column])); } } }",
        "racecheck",
    ),
    Mutation(
        "neighbours: the list is read before it is complete",
        NEIGHBOURS,
        "meet<kWarps>(); const int count = kWarps",
        "const int count = kWarps",
        "racecheck",
    ),
    Mutation(
        "neighbours: sums of two turns in one array",
        NEIGHBOURS,
        "slots[turn & 1]",
        "slots[0]",
        "racecheck",
    ),
    Mutation(
        "neighbours: sums of warps are read before all are there",
        NEIGHBOURS,
        "slots[threadIdx.x / kWarp] = value; __syncthreads();",
        "slots[threadIdx.x / kWarp] = value;",
        "racecheck",
    ),
    Mutation(
        "dedup: the flags are cleared before all have read them",
        DEDUP,
        "__syncthreads(); if (left && threadIdx.x == 0) *shared.missing = *shared.crowded = 0;",
        "if (left && threadIdx.x == 0) *shared.missing = *shared.crowded = 0; __syncthreads();",
        "racecheck",
    ),
    Mutation(
        "dedup: a round does not wait for the one before it",
        DEDUP,
        "__syncthreads(); uint32_t* list = round.list;",
        "uint32_t* list = round.list;",
        "racecheck",
    ),
    Mutation(
        "dedup: a barrier that only some threads reach",
        DEDUP,
        "__syncthreads_or(look_up<B>(shared, similarity, round, tokens)) != 0;",
        "look_up<B>(shared, similarity, round, tokens);",
        "synccheck",
    ),
    Mutation(
        "dedup: words are ranked before all are in their buckets",
        DEDUP,
        "__syncthreads(); if (left && threadIdx.x == 0)",
        "if (left && threadIdx.x == 0)",
        "racecheck",
    ),
    Mutation(
        "dedup: the keys of scanned tokens are read before they are complete",
        DEDUP,
        "scan_missing(shared, state, similarity, round); __syncthreads();",
        "scan_missing(shared, state, similarity, round);",
        "racecheck",
    ),
    Mutation(
        "dedup: scanned tokens are not all in their buckets",
        DEDUP,
        "token, state.keys[p]); }); __syncthreads();",
        "token, state.keys[p]); });",
        "racecheck",
    ),
    Mutation(
        "selection: sums of warps are read before all are there",
        SELECT,
        "warp_sums[warp] = before + own; __syncthreads();",
        "warp_sums[warp] = before + own;",
        "racecheck",
    ),
    Mutation(
        "dedup: shuffles that only some lanes reach",
        DEDUP,
        "p0 < round.a_count; p0 += groups",
        "p0 + (threadIdx.x >> shift) < round.a_count; p0 += groups",
        "synccheck",
    ),
    Mutation(
        "dedup: tokens are counted without atomics",
        DEDUP,
        "atomicAdd(&shared.totals[b / kGroup], 1u);",
        "shared.totals[b / kGroup] += 1u;",
        "racecheck",
    ),
    Mutation(
        "[CLS] attention: the query is read before it is complete",
        CLS,
        "q[d] = to_float(query[d]); __syncthreads();",
        "q[d] = to_float(query[d]);",
        "racecheck",
    ),
    Mutation(
        "[CLS] attention: the dots are read before they are complete",
        CLS,
        "warp_highest[warp] = highest; __syncthreads();",
        "warp_highest[warp] = highest;",
        "racecheck",
    ),
    Mutation(
        "received attention: a tile is read before it is complete for all",
        RECEIVED,
        "copy_async_wait<0>(); __syncthreads();",
        "copy_async_wait<0>();",
        "racecheck",
    ),
    Mutation(
        "received attention: a tile is overwritten while it is read",
        RECEIVED,
        "if (S::kBuffers == 1) { __syncthreads();",
        "if (S::kBuffers == 1) {",
        "racecheck",
    ),
]

COPIES = [
    Mutation(
        "received attention: copies that no wait covers",
        RECEIVED,
        "tokens, head_dim, column_operand.aligned); copy_async_commit();",
        "tokens, head_dim, column_operand.aligned); if (S::kBuffers == 2 || tile == 0) "
        "copy_async_commit();",
        "async",
    ),
    Mutation(
        "Gram: no wait for the copies",
        GRAM,
        "copy_async_wait<S::kStages - 2>();",
        "",
        "async",
    ),
    Mutation(
        "Gram: waits for a group too few",
        GRAM,
        "copy_async_wait<S::kStages - 2>()",
        "copy_async_wait<S::kStages - 1>()",
        "async",
    ),
    Mutation(
        "Gram: waits after the barrier",
        GRAM,
        "copy_async_wait<S::kStages - 2>(); __syncthreads();",
        "__syncthreads(); copy_async_wait<S::kStages - 2>();",
        "async",
    ),
    Mutation(
        "dedup: lists are used before they are complete",
        DEDUP,
        "copy_async_wait<0>();",
        "",
        "async",
    ),
]

MEMORY = [
    Mutation(
        "ranking: digits one byte too far",
        RANK,
        "*reinterpret_cast<Plane*>(to) = high;",
        "*reinterpret_cast<Plane*>(to + 1) = high;",
        "memcheck",
    ),
    Mutation(
        "Gram: copies to misaligned places",
        GRAM,
        "to = shared + chunk_offset(row, chunk);",
        "to = shared + 8 + chunk_offset(row, chunk);",
        "memcheck",
    ),
    Mutation(
        "Gram: misaligned matrix rows",
        GRAM,
        "{ load_matrices(of, chunk); }",
        "{ load_matrices(of, chunk + 4); }",
        "memcheck",
    ),
    Mutation(
        "Gram: rows past the last one are read",
        GRAM,
        "min(first_row + row + i * kApart, rows - 1)",
        "(first_row + row + i * kApart + rows)",
        "initcheck",
    ),
    Mutation(
        "neighbours: candidates are not cleared",
        NEIGHBOURS,
        "for (int e = threadIdx.x; e < kCandidates; e += kThreads) found_keys[e] = 0;",
        "",
        "initcheck",
    ),
    Mutation(
        "dedup: counts are not cleared",
        DEDUP,
        "clear_counts<B>(shared); for (int byte",
        "for (int byte",
        "initcheck",
    ),
    Mutation(
        "dedup: no words after the last one",
        DEDUP,
        "if (threadIdx.x < kSentinels) state.words[round.a_count + threadIdx.x] =",
        "if (threadIdx.x > 9999) state.words[0] =",
        "initcheck",
    ),
    Mutation(
        "gather: a row too many",
        GATHER,
        "if (row >= image.shape.kept()) return;",
        "if (row > image.shape.kept()) return;",
        "memcheck",
    ),
    Mutation(
        "gather: a row too few",
        GATHER,
        "if (row >= image.shape.kept()) return;",
        "if (row + 1 >= image.shape.kept()) return;",
        "output",
    ),
    Mutation(
        "gather: vectors where rows are not aligned",
        GATHER,
        "if (misaligned == 0) {",
        "if (misaligned >= 0) {",
        "memcheck",
    ),
    Mutation(
        "gather: copies of 4 bytes of rows of odd length",
        GATHER,
        "misaligned % 4 == 0",
        "misaligned % 2 == 0",
        "memcheck",
    ),
]

LAUNCHES = [
    Mutation(
        "launch: 48 KiB are taken to be available in addition to the static variables",
        LAUNCH,
        "if (shared_bytes > 0 || launch != plan::Launch::kOrdered) {",
        "if (shared_bytes > 48 * 1024) {",
        "launch",
    ),
    Mutation(
        "launch: dependent launches of code that does not wait",
        LAUNCH,
        "attributes.ptxVersion >= 90",
        "attributes.ptxVersion >= 80",
        "launch",
    ),
    Mutation(
        "gather: does not wait for the kernel before it",
        GATHER,
        "begin_dependent(batch.more);",
        "",
        "launch",
    ),
    Mutation(
        "neighbours: reads memory before it waits",
        NEIGHBOURS,
        "begin_dependent(batch.more); constexpr int kWarps",
        "const int early = *workspace; begin_dependent(batch.more); "
        "if (early == 123) return; constexpr int kWarps",
        "static",
    ),
]

DECISIONS = [
    Mutation(
        "ranking: ties go to the higher token",
        RANK,
        "base + 4 * i + 3 >= token ? 1u : 0u",
        "base + 4 * i + 3 >= token ? 0u : 1u",
        RESULTS,
    ),
    Mutation(
        "ranking: equal scores of the same vector do not count",
        RANK,
        "lane == 0 && e < token % 4 && own.of[e] == key",
        "0",
        RESULTS,
    ),
    Mutation(
        "ranking: the words after the last score are not cleared",
        RANK,
        "if (threadIdx.x < -count % 4u) tile[count + threadIdx.x] = 0;",
        "",
        "initcheck",
    ),
    Mutation(
        "ranking: another tile is the first",
        RANK,
        "own_tile = first / kTile",
        "own_tile = 0",
        RESULTS,
    ),
    Mutation(
        "quantization: channels past the last one are not zero",
        RANK,
        "if (c + e < row.channels) vectors[i].v[e] = row.data[c + e];",
        "vectors[i].v[e] = row.data[min(c + e, row.channels - 1)];",
        RESULTS,
    ),
    Mutation(
        "score: the other heads in the opposite order",
        RANK,
        "sums[i] += to_float(loaded[i][h]);",
        "sums[i] += to_float(loaded[i][kHeads - 1 - h]);",
        RESULTS,
    ),
    Mutation(
        "quantization: one level less",
        NUMERICS,
        "kQuantMax = 2047.0f",
        "kQuantMax = 2046.0f",
        RESULTS,
    ),
    Mutation(
        "quantization: another split into digits",
        NUMERICS,
        "kDigitBias = 2080",
        "kDigitBias = 2048",
        RESULTS,
    ),
    Mutation(
        "Gram: low digits count once too often",
        NUMERICS,
        "int64_t{63} * ll",
        "int64_t{64} * ll",
        RESULTS,
    ),
    Mutation(
        "Gram: columns of a fragment are swapped",
        GRAM,
        "columns.of[n / 2][n % 2 * 2], columns.of[n / 2][n % 2 * 2 + 1]",
        "columns.of[n / 2][n % 2 * 2 + 1], columns.of[n / 2][n % 2 * 2]",
        RESULTS,
    ),
    Mutation(
        "Gram: tiles next to the diagonal are not mirrored",
        GRAM,
        "if (i < column0) {",
        "if (i + S::kRows < column0) {",
        RESULTS,
    ),
    Mutation(
        "Gram: sums of many channels are taken for negative",
        NUMERICS,
        "int64_t{64} * ss",
        "int64_t{64} * static_cast<int>(ss)",
        RESULTS,
    ),
    Mutation(
        "neighbours: the greatest key of each lane is skipped",
        NEIGHBOURS,
        "keys[v] >= threshold || (ties > 0",
        "(keys[v] >= threshold && keys[v] != most) || (ties > 0",
        RESULTS,
    ),
    Mutation(
        "dedup: counts stay for the next round",
        DEDUP,
        "clear_counts<B>(shared); if (!crowded)",
        "if (!crowded)",
        RESULTS,
    ),
    Mutation(
        "dedup: ties are not stable", DEDUP, "other >= p ? 1u : 0u", "other <= p ? 1u : 0u", RESULTS
    ),
    Mutation(
        "dedup: every second word of a bucket is not compared",
        DEDUP,
        "rank += words.of[1] < word;",
        "",
        RESULTS,
    ),
    Mutation(
        "dedup: buckets count among those before them",
        DEDUP,
        "byte % kGroup < byte / kGroup",
        "byte % kGroup <= byte / kGroup",
        RESULTS,
    ),
    Mutation(
        "dedup: counts of a full bucket turn negative",
        DEDUP,
        "base = __dp4a(counts.of[w], earlier.of[w], base);",
        "base += __dp4a(static_cast<int>(counts.of[w]), static_cast<int>(earlier.of[w]), 0);",
        RESULTS,
    ),
    Mutation(
        "dedup: a lower key falls into an earlier bucket",
        DEDUP,
        "high - min(key, high)",
        "min(key, high)",
        RESULTS,
    ),
    Mutation(
        "dedup: merging is not stable",
        DEDUP,
        "(uint64_t{~key} << 32) | static_cast<uint32_t>(p)",
        "(uint64_t{~key} << 32) | (0xffffu - static_cast<uint32_t>(p))",
        RESULTS,
    ),
    Mutation(
        "dedup: B is not scanned when the list runs out",
        DEDUP,
        "int b = 2 * lane + 1; b < round.n; b += 2 * kWarp",
        "int b = 2 * lane + 1; b < 2; b += 2 * kWarp",
        RESULTS,
    ),
    Mutation(
        "[CLS] attention: its own column is not dropped",
        CLS,
        "if (t > 0) out[t - 1] =",
        "if (t < patches) out[t] =",
        RESULTS,
    ),
    Mutation(
        "received attention: two of the four lanes of a row are not added",
        RECEIVED,
        "int offset = 1; offset < 4; offset *= 2",
        "int offset = 1; offset < 2; offset *= 2",
        RESULTS,
    ),
    Mutation(
        "received attention: columns beyond the last token count",
        RECEIVED,
        "if (first_column + 8 * n + e % 2 >= tokens) logits[n][e] = -INFINITY;",
        "",
        RESULTS,
    ),
    Mutation(
        "received attention: channels after the last one are not cleared",
        RECEIVED,
        "for (int d = begin; d < stride - kElements; ++d) {",
        "for (int d = begin; d < 0; ++d) {",
        "initcheck",
    ),
    Mutation(
        "received attention: a caller's lse is taken to be to the base 2",
        RECEIVED,
        "from[token * lse_token_stride] * lse_scale",
        "from[token * lse_token_stride]",
        RESULTS,
    ),
    Mutation(
        "[CLS] attention: keys past the last one are read",
        CLS,
        "min(first + i * kApart, args.tokens - 1)",
        "(first + i * kApart)",
        "memcheck",
    ),
    Mutation(
        "[CLS] attention: two lanes' shares of a key are mixed up",
        CLS,
        "*value = 2 * upper + second;",
        "*value = 2 * second + upper;",
        RESULTS,
    ),
    Mutation(
        "received attention: rows of a fragment are swapped",
        RECEIVED,
        "row0 + lane / 4 + 8 * half",
        "row0 + lane / 4 + 8 * (1 - half)",
        RESULTS,
    ),
]

METHODS = [
    Mutation(
        "random: tokens are counted from the tile on",
        RANK,
        "random_key(ranking.seed, base + at, key)",
        "random_key(ranking.seed, at, key)",
        RESULTS,
    ),
    Mutation(
        "random: the seed is not mixed in",
        NUMERICS,
        "mix_bits(seed + 0x9e3779b9u * token)",
        "mix_bits(0x9e3779b9u * token)",
        RESULTS,
    ),
    Mutation(
        "importance: scores below 0 count",
        NUMERICS,
        "return score > 0.0f ?",
        "return score != 0.0f ?",
        RESULTS,
    ),
    Mutation(
        "greedy: candidates are read before all are there",
        GREEDY,
        "slots[threadIdx.x / kWarp] = of_warp; __syncthreads();",
        "slots[threadIdx.x / kWarp] = of_warp;",
        "racecheck",
    ),
    Mutation(
        "greedy: candidates of two picks in one array",
        GREEDY,
        "best_of_block(best, slots[pick & 1])",
        "best_of_block(best, slots[1])",
        "racecheck",
    ),
    Mutation(
        "greedy: marks are set before all are cleared",
        GREEDY,
        "marks.clear(image.shape.tokens); __syncthreads();",
        "marks.clear(image.shape.tokens);",
        "racecheck",
    ),
    Mutation(
        "greedy: ties between warps go to the higher token",
        GREEDY,
        "return {key, __reduce_min_sync(kAllLanes, token)};",
        "return {key, __reduce_max_sync(kAllLanes, token == kMaxTokens ? 0 : token)};",
        RESULTS,
    ),
    Mutation(
        "greedy: ties of a thread go to the higher token",
        GREEDY,
        "if (other_key > key)",
        "if (other_key >= key)",
        RESULTS,
    ),
    Mutation(
        "greedy: a token is picked again",
        GREEDY,
        "if (token == best.token) rule.take(v);",
        "",
        RESULTS,
    ),
    Mutation("maxmin: a token is near to itself", MAXMIN, "if (j != row)", "if (j != -1)", RESULTS),
    Mutation(
        "maxmin: the keys of the first pick count for the others",
        MAXMIN,
        "nearest[v] = first ? key : max(nearest[v], key);",
        "nearest[v] = max(nearest[v], key);",
        RESULTS,
    ),
    Mutation(
        "mmr: cosines below 0 do not count",
        MMR,
        "first ? cosine : fmaxf(nearest[v], cosine)",
        "fmaxf(nearest[v], cosine)",
        RESULTS,
    ),
    Mutation(
        "coverage: is not symmetric",
        GRAM,
        "*to = value(g, inv_j, own_inv[r], true);",
        "*to = value(g, own_inv[r], inv_j, true);",
        RESULTS,
    ),
    Mutation(
        "coverage: is cut off, not rounded",
        NUMERICS,
        "float_bits(scaled + 8388608.0f)",
        "float_bits(floorf(scaled) + 8388608.0f)",
        RESULTS,
    ),
    Mutation(
        "coverage: rows do not end with zeros",
        GRAM,
        "if (j < (kCoverage ? ld : rows))",
        "if (j < rows)",
        "initcheck",
    ),
    Mutation(
        "scope: the list is read before it is complete",
        SCOPE,
        "__syncthreads(); const Listed now",
        "const Listed now",
        "racecheck",
    ),
    Mutation(
        "scope: the list is cleared while it is read",
        SCOPE,
        "__syncthreads(); for (int c = threadIdx.x; c < now.count",
        "for (int c = threadIdx.x; c < now.count",
        "racecheck",
    ),
    Mutation(
        "scope: the next list is made while this one is cleared",
        SCOPE,
        "if (kVectors > 1) __syncthreads();",
        "",
        "racecheck",
    ),
    Mutation(
        "scope: changes of a longer list stay",
        SCOPE,
        "for (int c = threadIdx.x; c < now.count; c += threads) changes[c] = Change{};",
        "",
        RESULTS,
    ),
    Mutation(
        "scope: a count stays for the list after the next one",
        SCOPE,
        "listed[(turn + 1) & 1] = {0, 0};",
        "listed[(turn + 1) & 1].count = 0;",
        RESULTS,
    ),
    Mutation(
        "scope: coverage is not stored",
        SCOPE,
        "scope.covered[token] = after;",
        "",
        RESULTS,
    ),
    Mutation(
        "scope: gains are not those after the first pick",
        SCOPE,
        "gain += max(covers[u], covered[u]) - covered[u];",
        "gain += covers[u];",
        RESULTS,
    ),
]

FAULTS = [*BARRIERS, *COPIES, *MEMORY, *LAUNCHES, *DECISIONS, *METHODS]
