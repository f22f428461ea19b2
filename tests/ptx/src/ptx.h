// Output of the parser and input of the executor: instructions, kernels, modules.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

struct Instruction;
struct Warp;

// Runs one instruction for the lanes of a mask.
using LaneFunction = void (*)(Warp& warp, const Instruction& instruction, uint32_t lanes);

constexpr uint32_t kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;

// Generic addresses from here on are those of shared memory.
constexpr uint64_t kSharedWindow = uint64_t{0x7a} << 56;

enum class Type : uint8_t {
  kNone,
  kB8,
  kB16,
  kB32,
  kB64,
  kU8,
  kS8,
  kU16,
  kS16,
  kU32,
  kS32,
  kU64,
  kS64,
  kF16,
  kBF16,
  kF32,
  kF64,
  kPredicate
};
uint32_t bytes_of(Type type);
bool is_signed(Type type);
Type type_named(const std::string& name);  // kNone: there is no such type

enum class Kind : uint8_t {
  kArithmetic,  // neither synchronizes nor accesses memory: Instruction::function
  kNothing,     // griddepcontrol
  kBranch,
  kExit,
  kLoad,
  kStore,
  kAtomic,
  kAsyncCopy,
  kAsyncCommit,
  kAsyncWait,
  kShuffle,
  kVote,
  kReduce,
  kWarpBarrier,
  kLoadMatrix,
  kMultiplyMatrix,
  kBarrier,
  kBarrierReduce
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kParameter };

// Instruction::operation, by kind and opcode
enum class Comparison : uint8_t {
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual,
  kEqualUnordered,
  kNotEqualUnordered,
  kLessUnordered,
  kLessEqualUnordered,
  kGreaterUnordered,
  kGreaterEqualUnordered,
  kNumbers,
  kNan
};
enum class Logic : uint8_t { kNone, kAnd, kOr, kXor, kNot };
enum class Atomic : uint8_t {
  kAdd,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kExchange,
  kCompareAndSwap,
  kIncrement,
  kDecrement
};
enum class Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };
enum class Vote : uint8_t { kBallot, kAny, kAll, kUniform };
enum class Reduction : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor };
enum class BarrierReduction : uint8_t { kAnd, kOr, kCount };
enum class Matrix : uint8_t { kInt8, kFloat16, kBFloat16 };

// The categories of the counters.
enum class Category : uint8_t {
  kInteger,
  kLogic,
  kMove,
  kPredicate,
  kConversion,
  kFloat32,
  kFloat64,
  kSpecialFunction,
  kBranch,
  kParameterLoad,
  kGlobalLoad,
  kGlobalStore,
  kSharedLoad,
  kSharedStore,
  kAtomic,
  kAsyncCopy,
  kMatrixLoad,
  kMatrixMultiply,
  kWarpSync,
  kBlockSync,
  kOther,
  kCount
};
const char* name_of(Category category);

// Number of a register in the file of its width. Negative: the constant number ~r.
using Register = int32_t;
constexpr Register kNoRegister = INT32_MAX;

struct Instruction {
  LaneFunction function = nullptr;
  // Offset of the address; pending groups of a wait; the table of lop3.
  int64_t immediate = 0;
  Register guard = kNoRegister;
  Register d = kNoRegister, d2 = kNoRegister;  // results
  Register a = kNoRegister, b = kNoRegister, c = kNoRegister;
  Register e = kNoRegister;   // fourth source, or the member mask
  uint32_t values = 0;        // first of Kernel::value_registers: elements of vectors, matrices
  uint32_t target = 0;        // of a branch
  int32_t source_offset = 0;  // of the global address of an asynchronous copy
  mutable uint32_t last_used = 0;  // the allocation of the last access
  Kind kind = Kind::kNothing;
  Category category = Category::kOther;
  Space space = Space::kGeneric;
  Type type = Type::kNone;
  uint8_t bytes = 0;             // in memory, of an element
  uint8_t elements = 1;          // of a vector, or matrices
  uint8_t operation = 0;         // one of the enumerations above
  Logic combine = Logic::kNone;  // setp: how the comparison is combined with predicate c
  bool negate_guard = false;
  bool negate_source = false;  // of a predicate source
  bool wide_values = false;    // the registers of the values are those of 64 bits
  bool wide_address = true;
  bool read_only = false;       // ld.global.nc
  bool transposed = false;      // ldmatrix.trans
  bool wait_all = false;        // cp.async.wait_all
  bool waits_for_grid = false;  // griddepcontrol.wait
};

// The origin of an instruction.
struct Place {
  uint32_t ptx_line = 0;
  uint32_t file = 0, line = 0;              // of the source
  uint32_t outer_file = 0, outer_line = 0;  // of the caller it was inlined into; 0: none
  std::string text;
};

struct Parameter {
  uint32_t offset, bytes;
};

struct SharedVariable {
  std::string name;
  uint32_t alignment = 1, bytes = 0;
  bool dynamic = false;
  // Here variables are kRedZone bytes further apart than on hardware, so that they have the same
  // banks and an access beyond one of them is not in the next.
  uint32_t address = 0;
};
constexpr uint32_t kRedZone = 1024;

enum class SpecialRegister : uint8_t {
  kThreadX,
  kThreadY,
  kThreadZ,
  kBlockSizeX,
  kBlockSizeY,
  kBlockSizeZ,
  kBlockX,
  kBlockY,
  kBlockZ,
  kGridX,
  kGridY,
  kGridZ,
  kLane,
  kWarp,
  kMaskEqual,
  kMaskLess,
  kMaskLessEqual,
  kMaskGreater,
  kMaskGreaterEqual
};

using FileNames = std::map<uint32_t, std::string>;

struct Kernel {
  std::string name;
  std::string pretty_name;  // demangled, without namespaces and parameters
  uint32_t target = 0;      // the compute capability that it was compiled for: 80, 90, ...
  std::vector<Instruction> code;
  std::vector<Place> places;  // of the instructions
  std::shared_ptr<const FileNames> files;
  std::vector<Register> value_registers;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  std::vector<SharedVariable> shared;
  uint32_t static_shared_bytes = 0;  // in the hardware's layout
  uint32_t max_threads = 1024;
  uint32_t required_block[3] = {0, 0, 0};  // .reqntid; 0: any
  uint32_t registers32 = 0, registers64 = 0, predicates = 0;
  std::vector<uint32_t> constants32;  // each kLanes times
  std::vector<uint64_t> constants64;
  std::vector<uint32_t> predicate_constants;
  std::vector<std::pair<SpecialRegister, uint32_t>> specials;  // and their 32-bit registers
  std::vector<std::string> static_findings;
  bool waits_for_grid = false;  // has griddepcontrol.wait

  // "rank.cu:120 (inlined at ...), PTX line n `...`"
  std::string where(uint32_t pc) const;
  // "rank.cu:120 < outer.cu:7"
  std::string source_line(uint32_t pc) const;
};

struct Module {
  std::unordered_map<std::string, std::unique_ptr<Kernel>> kernels;
};

}  // namespace ptx
