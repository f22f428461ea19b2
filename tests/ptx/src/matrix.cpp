// Matrices that a warp loads and multiplies.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "conversions.h"
#include "execution.h"

namespace ptx {

// Matrices of eight rows of 16 bytes. Lane l has the address of row l % 8 of matrix l / 8, and
// gets the 4 bytes 4 (l % 4) of row l / 4 of each.
void Execution::load_matrix(Warp& warp, const Instruction& i, uint32_t pc) {
  constexpr uint32_t kRows = 8, kRowBytes = 16;
  uint64_t addresses[kLanes];
  uint8_t* places[kLanes];
  load_addresses(warp, i, addresses);
  const uint32_t used = kAllLanes >> (kLanes - kRows * i.elements);
  if (options_.profile) {
    uint32_t ideal = 0;
    const uint32_t actual = wavefronts(addresses, used, kRowBytes, &ideal);
    counters_.matrix.add(actual, i.elements, uint64_t{kRows} * kRowBytes * i.elements);
    counters_.by_instruction[pc].add(actual, i.elements, uint64_t{kRows} * kRowBytes * i.elements);
  }
  resolve(warp, i, pc, used, Space::kShared, addresses, kRowBytes, Access::kRead, nullptr, places);
  uint8_t rows[kLanes][kRowBytes];
  for (uint32_t l = 0; l < kRows * i.elements; ++l) std::memcpy(rows[l], places[l], kRowBytes);
  for (uint32_t n = 0; n < i.elements; ++n) {
    uint32_t* d = destination<uint32_t>(warp, kernel_.value_registers[i.values + n]);
    for (uint32_t l = 0; l < kLanes; ++l) {
      uint8_t (*matrix)[kRowBytes] = rows + kRows * n;
      if (i.transposed) {  // elements of two bytes
        const uint32_t column = l / 4, row = l % 4 * 2;
        std::memcpy(&d[l], matrix[row] + 2 * column, 2);
        std::memcpy(reinterpret_cast<uint8_t*>(&d[l]) + 2, matrix[row + 1] + 2 * column, 2);
      } else {
        std::memcpy(&d[l], matrix[l / 4] + 4 * (l % 4), 4);
      }
    }
  }
}

namespace {

// Operands in the PTX manual's layout over the lanes: register by register, four lanes hold 16
// bytes of a row of a, or of a column of b.
struct Operands {
  const uint32_t *a[4], *b[2], *c[4];
  uint32_t* d[4];
};
constexpr uint32_t kRows = 16, kColumns = 8, kRowBytes = 32;

void gather(const Operands& operands, uint8_t (&rows)[kRows][kRowBytes],
            uint8_t (&columns)[kColumns][kRowBytes]) {
  for (uint32_t n = 0; n < 8; ++n) {
    std::memcpy(rows[n], operands.a[0] + 4 * n, 16);
    std::memcpy(rows[n + 8], operands.a[1] + 4 * n, 16);
    std::memcpy(rows[n] + 16, operands.a[2] + 4 * n, 16);
    std::memcpy(rows[n + 8] + 16, operands.a[3] + 4 * n, 16);
    std::memcpy(columns[n], operands.b[0] + 4 * n, 16);
    std::memcpy(columns[n] + 16, operands.b[1] + 4 * n, 16);
  }
}

// Element e of lane l is in this row and column of the product.
uint32_t row_of(uint32_t l, uint32_t e) { return l / 4 + e / 2 * 8; }
uint32_t column_of(uint32_t l, uint32_t e) { return l % 4 * 2 + e % 2; }

void multiply_int8(const Operands& operands) {
  uint8_t row_bytes[kRows][kRowBytes], column_bytes[kColumns][kRowBytes];
  gather(operands, row_bytes, column_bytes);
  int16_t rows[kRows][kRowBytes], columns[kColumns][kRowBytes];
  for (uint32_t r = 0; r < kRows; ++r) {
    for (uint32_t k = 0; k < kRowBytes; ++k) rows[r][k] = static_cast<int8_t>(row_bytes[r][k]);
  }
  for (uint32_t c = 0; c < kColumns; ++c) {
    for (uint32_t k = 0; k < kRowBytes; ++k) {
      columns[c][k] = static_cast<int8_t>(column_bytes[c][k]);
    }
  }
  uint32_t product[kRows][kColumns];
  for (uint32_t r = 0; r < kRows; ++r) {
    for (uint32_t c = 0; c < kColumns; ++c) {
      int32_t sum = 0;
      for (uint32_t k = 0; k < kRowBytes; ++k) sum += int32_t{rows[r][k]} * int32_t{columns[c][k]};
      product[r][c] = static_cast<uint32_t>(sum);
    }
  }
  for (uint32_t e = 0; e < 4; ++e) {
    for (uint32_t l = 0; l < kLanes; ++l) {
      operands.d[e][l] = operands.c[e][l] + product[row_of(l, e)][column_of(l, e)];
    }
  }
}

// PTX leaves the order and the rounding of 16-bit products' sums open. Tensor cores add in blocks:
// the exact products and the previous sum are aligned to the largest exponent and cut off after a
// few bits more than a float has, and their sum is cut off to a float. As measured, these are
// blocks of 8 and 1 bit on compute capability 8.x, 16 and 2 bits on 9.0 and 10.0 (Fasi et al.,
// "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021; Xie et al., "MMA-Sim",
// arXiv:2511.10909). The executor has the former, which are less accurate.
constexpr uint32_t kBlock = 8;
constexpr int kExtraBits = 1;

float add_products(float sum, const float* row, const float* column) {
  double terms[kBlock + 1] = {sum};
  for (uint32_t k = 0; k < kBlock; ++k) terms[k + 1] = double{row[k]} * double{column[k]};
  double largest = 0, total = 0;
  for (const double term : terms) largest = std::max(largest, std::fabs(term));
  if (!std::isfinite(largest)) {  // an infinity or NaN
    for (const double term : terms) total += term;
    return static_cast<float>(total);
  }
  if (largest == 0) return 0;
  const int lowest = std::ilogb(largest) - (std::numeric_limits<float>::digits - 1) - kExtraBits;
  for (const double term : terms) total += std::trunc(std::ldexp(term, -lowest));
  total = std::ldexp(total, lowest);  // exact: less than 2^30 units
  const auto rounded = static_cast<float>(total);
  return std::fabs(double{rounded}) > std::fabs(total) ? std::nextafterf(rounded, 0) : rounded;
}

template <typename F>
void multiply_16(const Operands& operands) {
  constexpr uint32_t kDepth = kRowBytes / 2;
  uint8_t row_bytes[kRows][kRowBytes], column_bytes[kColumns][kRowBytes];
  gather(operands, row_bytes, column_bytes);
  float rows[kRows][kDepth], columns[kColumns][kDepth];
  const auto number = [](const uint8_t* bytes) {
    uint16_t bits;
    std::memcpy(&bits, bytes, sizeof bits);
    return F::to_float(bits);
  };
  for (uint32_t k = 0; k < kDepth; ++k) {
    for (uint32_t r = 0; r < kRows; ++r) rows[r][k] = number(row_bytes[r] + 2 * k);
    for (uint32_t c = 0; c < kColumns; ++c) columns[c][k] = number(column_bytes[c] + 2 * k);
  }
  for (uint32_t e = 0; e < 4; ++e) {
    for (uint32_t l = 0; l < kLanes; ++l) {
      const float *row = rows[row_of(l, e)], *column = columns[column_of(l, e)];
      float sum = value_of<float>(operands.c[e][l]);
      for (uint32_t k = 0; k < kDepth; k += kBlock) sum = add_products(sum, row + k, column + k);
      operands.d[e][l] = slot_of<float>(sum);
    }
  }
}

}  // namespace

void Execution::multiply_matrix(Warp& warp, const Instruction& i) {
  const Register* registers = &kernel_.value_registers[i.values];
  Operands operands;
  for (int n = 0; n < 4; ++n) {
    operands.a[n] = source<uint32_t>(warp, registers[n]);
    operands.c[n] = source<uint32_t>(warp, registers[6 + n]);
    operands.d[n] = destination<uint32_t>(warp, registers[10 + n]);
  }
  for (int n = 0; n < 2; ++n) operands.b[n] = source<uint32_t>(warp, registers[4 + n]);
  switch (static_cast<Matrix>(i.operation)) {
    case Matrix::kInt8: return multiply_int8(operands);
    case Matrix::kFloat16: return multiply_16<Half>(operands);
    case Matrix::kBFloat16: return multiply_16<BFloat>(operands);
  }
}

}  // namespace ptx
