// Launch plans: the kernel or algorithm that each stage uses.
//
// Every plan of a stage returns the same tokens. The functions below choose one from the shape of
// the work; a plan that is requested by name replaces that choice. If it cannot do the work, that
// is an error; no other plan is used.
#pragma once
#include <cstdint>
#include <string>

namespace vispruner::plan {

enum class Rank { kAuto, kTokens8, kTokens32 };            // tokens per block
enum class Gram { kAuto, kTiles32, kTiles64, kTiles128 };  // rows per block
enum class Neighbours {                                    // the most residual tokens it can hold
  kAuto,
  kWarp576,
  kWarp1024,
  kBlock4096,
  kBlock16384,
  kBlock32768
};
enum class Dedup { kAuto, kListsShared, kStateShared, kWorkspace };  // where the loop's arrays are
enum class Sort { kAuto, kBuckets, kCounting };
enum class ClsAttention { kAuto, kShared, kWorkspace };  // where the logits are
enum class ReceivedAttention { kAuto, kWide, kNarrow };  // 64 columns per tile, or 16
enum class Launch { kAuto, kOrdered, kDependent };
enum class Cpu { kAuto, kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16 };
constexpr int kCpus = 6;

struct Plans {
  Rank rank;
  Gram gram;
  Neighbours neighbours;
  Dedup dedup;
  Sort sort;
  ClsAttention cls_attention;
  ReceivedAttention received_attention;
  Launch launch;
  Cpu cpu;
};

// ---- requested plans --------------------------------------------------------------------------
// Process-wide. The environment variables (VISPRUNER_RANK_PLAN, ...) are read once, when the
// library is loaded; set() overrides them.
Plans current();
Cpu current_cpu();  // for inner loops

// Both return a one-line error message, or an empty string.
std::string set(const std::string& stage, const std::string& name);
std::string environment_error();

// {"stage": {"variable": ..., "names": [...], "current": ...}, ...} as JSON; GPU stages are
// included only if `cuda`.
std::string describe(bool cuda);

// ---- plans chosen from the shape --------------------------------------------------------------
constexpr int64_t kFewBlocks = 64;  // fewer leave the smallest GPUs idle: use more, smaller ones

inline Rank choose(Rank asked, int64_t blocks_of_32) {
  if (asked != Rank::kAuto) return asked;
  return blocks_of_32 <= 2 * kFewBlocks ? Rank::kTokens8 : Rank::kTokens32;
}

inline Gram choose(Gram asked, int64_t blocks_of_64) {
  if (asked != Gram::kAuto) return asked;
  return blocks_of_64 <= kFewBlocks ? Gram::kTiles32 : Gram::kTiles64;
}

inline int most_residual(Neighbours plan) {
  switch (plan) {
    case Neighbours::kWarp576: return 576;
    case Neighbours::kWarp1024: return 1024;
    case Neighbours::kBlock4096: return 4096;
    case Neighbours::kBlock16384: return 16384;
    default: return 32768;
  }
}

inline Neighbours choose(Neighbours asked, int residual) {
  if (asked != Neighbours::kAuto) return asked;
  for (const Neighbours plan : {Neighbours::kWarp576, Neighbours::kWarp1024, Neighbours::kBlock4096,
                                Neighbours::kBlock16384}) {
    if (residual <= most_residual(plan)) return plan;
  }
  return Neighbours::kBlock32768;
}

// Shared memory that each plan of the dedup loop needs, in bytes per block.
struct DedupBytes {
  int64_t lists_shared, state_shared, workspace;

  int64_t of(Dedup plan) const {
    return plan == Dedup::kListsShared   ? lists_shared
           : plan == Dedup::kStateShared ? state_shared
                                         : workspace;
  }
};

inline Dedup choose(Dedup asked, const DedupBytes& bytes, int64_t limit) {
  if (asked != Dedup::kAuto) return asked;
  if (bytes.lists_shared <= limit) return Dedup::kListsShared;
  return bytes.state_shared <= limit ? Dedup::kStateShared : Dedup::kWorkspace;
}

// Whether A is ranked by buckets (unless one is crowded).
inline bool ranks_by_buckets(Sort asked) { return asked != Sort::kCounting; }

// `bytes` of shared memory for the logits and the query. The limit fits every GPU that the kernels
// run on, so that the workspace's size does not depend on the device.
inline ClsAttention choose(ClsAttention asked, int64_t bytes) {
  constexpr int64_t kMostShared = 64 * 1024;
  if (asked != ClsAttention::kAuto) return asked;
  return bytes <= kMostShared ? ClsAttention::kShared : ClsAttention::kWorkspace;
}

inline ReceivedAttention choose(ReceivedAttention asked, int64_t wide_bytes, int64_t limit) {
  if (asked != ReceivedAttention::kAuto) return asked;
  return wide_bytes <= limit ? ReceivedAttention::kWide : ReceivedAttention::kNarrow;
}

// Whether a kernel may let the next one of its call start early. (Whether that one does is decided
// at its launch.)
inline bool overlaps(Launch asked) { return asked != Launch::kOrdered; }

}  // namespace vispruner::plan
