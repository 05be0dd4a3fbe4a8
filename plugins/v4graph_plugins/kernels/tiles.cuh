// 64 rows times 16 rows of each of two weight matrices per warp. A block of eight warps keeps the rows, two 128-wide
// blocks at a time, in shared memory, where quantised weights come too: they are on their way without holding registers.
// Capped at 128 registers two blocks would share a multiprocessor, and spill 68 to 408 bytes.
#pragma once
#include "rows.cuh"

constexpr int TILE_ROWS = 64, TILE_WARPS = 8;
constexpr int TILE_BYTES = TILE_ROWS * 128 * 2;

// Bytes of a warp's codes of a block: 16 for each lane, matrix, half and load.
template <Format F>
constexpr int WARP_CODES = F == Format::BF16 ? 0 : 2 * 2 * LOADS<F> * 512;

template <Format F>
constexpr int STAGE_BYTES = TILE_BYTES + TILE_WARPS * WARP_CODES<F>;

// Place in a tile's row of the eight channels number `chunk` of a block: as they are read, piece i of the four parts
// together; in odd rows with the pieces of a pair exchanged, so that two rows do not share banks.
template <Format F>
DEVICE int place_in_tile(int chunk, int odd) {
  const int i = F == Format::FP4 ? chunk % 4 : IS_FP8<F> ? chunk / 8 * 2 + chunk % 2 : chunk / 4;
  const int part = F == Format::FP4 ? chunk / 4 : IS_FP8<F> ? chunk % 8 / 2 : chunk % 4;
  return 8 * (4 * (i ^ odd) + part);
}

// Begin to copy a block of the 64 rows; each of 256 threads has a quarter of row threadIdx.x / 4.
template <Format F>
DEVICE void copy_tile(bf16* to, const bf16* row) {
  const int quarter = threadIdx.x % 4, odd = threadIdx.x / 4 % 2;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    cp_async16(to + threadIdx.x / 4 * 128 + place_in_tile<F>(4 * j + quarter, odd),
               row + 8 * (4 * j + quarter));
  }
}

// Begin to copy a lane's codes of a block of two matrices to where it reads them again.
template <Format F>
DEVICE void copy_codes(unsigned char* mine, const RowsLane<F> (&from)[2]) {
#pragma unroll
  for (int i = 0; i < 4 * LOADS<F>; ++i) {
    cp_async16(mine + i * 512, from[i / (2 * LOADS<F>)].place(0, i / LOADS<F> % 2) + i % LOADS<F> * 64);
  }
}

// Codes of pieces 2j and 2j + 1 from there.
template <Format F>
DEVICE void fetch_codes(RawBlock<F> (&raw)[2], const unsigned char* mine, int j) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4& codes = raw[i / 2].codes[i % 2][IS_FP8<F> ? j : 0];
    const unsigned char* at = mine + i * LOADS<F> * 512;
    if (IS_FP8<F>) codes = load16(at + j * 512);
    if (F == Format::FP4) {
      const uint2 two = *reinterpret_cast<const uint2*>(at + 8 * j);
      (j ? codes.z : codes.x) = two.x;
      (j ? codes.w : codes.y) = two.y;
    }
  }
}

// Add to sums (zero, but for BF16) the products of 64 rows (`row` is number threadIdx.x / 4) with 16 rows of two
// matrices per warp, over all blocks. Shared memory: 2 * STAGE_BYTES, free for the block at the end.
template <Format F>
DEVICE void multiply_tile(float (&sums)[2][8][4], const RowsLane<F> (&from)[2], const bf16* row, int blocks) {
  constexpr bool STAGED = F != Format::BF16;
  const int lane = threadIdx.x % 32, odd = lane / 4 % 2;
  const int codes_at = TILE_BYTES + threadIdx.x / 32 * WARP_CODES<F> + lane * 16;
  RowsLane<F> at[2] = {from[0], from[1]};
  RawBlock<F> raw[2], next[2];
  const auto begin = [&](int block) {
    unsigned char* stage = shared_memory() + block % 2 * STAGE_BYTES<F>;
    copy_tile<F>(reinterpret_cast<bf16*>(stage), row);
    if (STAGED) copy_codes<F>(stage + codes_at, at);
    cp_async_commit();
    row += 128;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      STAGED ? at[m].load_scale(next[m], 0) : at[m].load(next[m], 0);
      at[m].advance();
    }
  };
  begin(0);
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    cp_async_wait<0>();
    __syncthreads();
    raw[0] = next[0];
    raw[1] = next[1];
    if (block + 1 < blocks) begin(block + 1);
    const unsigned char* stage = shared_memory() + block % 2 * STAGE_BYTES<F>;
    const bf16* mine = reinterpret_cast<const bf16*>(stage) + lane / 4 * 128 + lane % 4 * 8;
    const bf16 *even = mine + 32 * odd, *other = mine - 32 * odd;  // pieces 0 and 2, 1 and 3
    add_block<F, 2, 8>(
        sums, raw, at, [&](int n, int i) { return load16((i % 2 ? other : even) + 8 * n * 128 + 32 * i); },
        [&](int i) {
          if (i % 2 == 0) fetch_codes<F>(raw, stage + codes_at, i / 2);
        });
  }
  finish_sums<F, 2, 8>(sums, at);
  __syncthreads();
}
