// Decoders of branches and of instructions that synchronize lanes or warps.
#include "decoder.h"

namespace ptx {
namespace {

void decode_bra(Decoding& d) {
  d.take("uni");  // a hint
  d.need(1);
  d.instruction().kind = Kind::kBranch;
  d.instruction().category = Category::kBranch;
  d.builder().branch_to(d.operand(0).text);
}

void decode_exit(Decoding& d) {
  d.take("uni");
  d.need(0);
  d.instruction().kind = Kind::kExit;
  d.instruction().category = Category::kBranch;
}

void decode_shfl(Decoding& d) {
  Instruction& i = d.instruction();
  d.require("sync");
  d.require("b32");
  const auto mode = d.take_one_of<Shuffle>({{"up", Shuffle::kUp},
                                            {"down", Shuffle::kDown},
                                            {"bfly", Shuffle::kButterfly},
                                            {"idx", Shuffle::kIndex}});
  d.need(5);
  i.kind = Kind::kShuffle;
  i.category = Category::kWarpSync;
  i.operation = static_cast<uint8_t>(mode);
  if (d.operand(0).kind == Operand::Kind::kPair) {
    i.d = d.destination(d.operand(0).parts[0], 32);
    i.d2 = d.predicate(d.operand(0).parts[1]);
  } else {
    i.d = d.destination(0, 32);
  }
  i.a = d.source(1, 32);
  i.b = d.source(2, 32);
  i.c = d.source(3, 32);
  i.e = d.source(4, 32);
}

void decode_vote(Decoding& d) {
  Instruction& i = d.instruction();
  d.require("sync");
  const auto mode = d.take_one_of<Vote>({{"ballot", Vote::kBallot},
                                         {"any", Vote::kAny},
                                         {"all", Vote::kAll},
                                         {"uni", Vote::kUniform}});
  d.require(mode == Vote::kBallot ? "b32" : "pred");
  d.need(3);
  i.kind = Kind::kVote;
  i.category = Category::kWarpSync;
  i.operation = static_cast<uint8_t>(mode);
  i.d = mode == Vote::kBallot ? d.destination(0, 32) : d.predicate(d.operand(0));
  i.a = d.predicate(d.operand(1));
  i.negate_source = d.operand(1).negated;
  i.e = d.source(2, 32);
}

void decode_redux(Decoding& d) {
  Instruction& i = d.instruction();
  d.require("sync");
  i.type = d.take_type();
  const auto operation = d.take_one_of<Reduction>({{"add", Reduction::kAdd},
                                                   {"min", Reduction::kMin},
                                                   {"max", Reduction::kMax},
                                                   {"and", Reduction::kAnd},
                                                   {"or", Reduction::kOr},
                                                   {"xor", Reduction::kXor}});
  const bool number = operation <= Reduction::kMax;
  if (number ? i.type != Type::kU32 && i.type != Type::kS32 : i.type != Type::kB32) d.unknown();
  d.need(3);
  i.kind = Kind::kReduce;
  i.category = Category::kWarpSync;
  i.operation = static_cast<uint8_t>(operation);
  i.d = d.destination(0, 32);
  i.a = d.source(1, 32);
  i.e = d.source(2, 32);
}

// bar is barrier.aligned. Without .aligned the lanes of a warp may arrive one after the other. Here
// both allow it, as long as they arrive at the same instruction.
void decode_bar(Decoding& d) {
  Instruction& i = d.instruction();
  if (d.opcode() == "bar" && d.take("warp")) {
    d.require("sync");
    d.need(1);
    i.kind = Kind::kWarpBarrier;
    i.category = Category::kWarpSync;
    i.e = d.source(0, 32);
    return;
  }
  i.category = Category::kBlockSync;
  d.take("cta");
  if (d.opcode() == "barrier") d.take("aligned");
  size_t barrier = 0;
  if (d.take("red")) {
    const auto operation = d.take_one_of<BarrierReduction>({{"and", BarrierReduction::kAnd},
                                                            {"or", BarrierReduction::kOr},
                                                            {"popc", BarrierReduction::kCount}});
    const bool counts = operation == BarrierReduction::kCount;
    d.require(counts ? "u32" : "pred");
    d.need(3);
    barrier = 1;
    i.kind = Kind::kBarrierReduce;
    i.operation = static_cast<uint8_t>(operation);
    i.d = counts ? d.destination(0, 32) : d.predicate(d.operand(0));
    i.a = d.predicate(d.operand(2));
    i.negate_source = d.operand(2).negated;
  } else {
    d.require("sync");
    d.need(1);
    i.kind = Kind::kBarrier;
  }
  if (d.number(barrier) != 0) d.fail("a barrier other than 0");
}

void decode_ldmatrix(Decoding& d) {
  Instruction& i = d.instruction();
  for (const char* modifier : {"sync", "aligned", "m8n8", "b16"}) d.require(modifier);
  if (!d.take("shared::cta")) d.require("shared");
  i.transposed = d.take("trans");
  i.elements = d.take_one_of<uint8_t>({{"x1", 1}, {"x2", 2}, {"x4", 4}});
  d.need(2);
  i.kind = Kind::kLoadMatrix;
  i.category = Category::kMatrixLoad;
  i.space = Space::kShared;
  i.bytes = 16;  // of a row
  std::vector<Register> registers;
  for (const Operand& part : d.operand(0).parts) registers.push_back(d.destination(part, 32));
  if (registers.size() != i.elements) d.fail("wrong number of matrices");
  i.values = d.builder().value_registers(registers);
  d.address(1);
}

void decode_mma(Decoding& d) {
  Instruction& i = d.instruction();
  for (const char* modifier : {"sync", "aligned", "row", "col"}) d.require(modifier);
  if (d.take("m16n8k32")) {
    i.operation = static_cast<uint8_t>(Matrix::kInt8);
    for (const char* modifier : {"s32", "s8", "s8", "s32"}) d.require(modifier);
  } else {
    d.require("m16n8k16");
    const bool half = d.take_one_of<bool>({{"f16", true}, {"bf16", false}});
    i.operation = static_cast<uint8_t>(half ? Matrix::kFloat16 : Matrix::kBFloat16);
    for (const char* modifier : {"f32", half ? "f16" : "bf16", "f32"}) d.require(modifier);
  }
  d.need(4);
  i.kind = Kind::kMultiplyMatrix;
  i.category = Category::kMatrixMultiply;
  std::vector<Register> registers;  // a (4), b (2), c (4), d (4)
  const std::pair<size_t, size_t> kSources[] = {{1, 4}, {2, 2}, {3, 4}};
  for (const auto& [operand, count] : kSources) {
    if (d.operand(operand).parts.size() != count) d.fail("wrong number of registers");
    for (const Operand& part : d.operand(operand).parts) registers.push_back(d.source(part, 32));
  }
  if (d.operand(0).parts.size() != 4) d.fail("wrong number of registers");
  for (const Operand& part : d.operand(0).parts) registers.push_back(d.destination(part, 32));
  i.values = d.builder().value_registers(registers);
}

void decode_griddepcontrol(Decoding& d) {
  d.need(0);
  d.instruction().kind = Kind::kNothing;
  d.instruction().waits_for_grid =
      d.take_one_of<bool>({{"wait", true}, {"launch_dependents", false}});
}

}  // namespace

const OpcodeTable& synchronization_opcodes() {
  static const OpcodeTable kTable = {
      {"bra", decode_bra},
      {"ret", decode_exit},
      {"exit", decode_exit},
      {"shfl", decode_shfl},
      {"vote", decode_vote},
      {"redux", decode_redux},
      {"bar", decode_bar},
      {"barrier", decode_bar},
      {"ldmatrix", decode_ldmatrix},
      {"mma", decode_mma},
      {"griddepcontrol", decode_griddepcontrol},
  };
  return kTable;
}

}  // namespace ptx
