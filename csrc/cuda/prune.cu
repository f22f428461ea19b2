// The pipeline: waves of images that fit the workspace; ranking, Gram matrix, the method and
// gather.
#include <vector>

#include "batch.cuh"
#include "methods/methods.cuh"
#include "vispruner/cuda.h"
#include "vispruner/plan.h"

namespace vispruner::cuda {
namespace {

constexpr int kMostImages = 32768;  // grid.y

int64_t image_bytes(const PruneArgs& args, const ImageShape& shape) {
  const int residual = shape.residual();
  return workspace_layout(shape.tokens, residual, args.feats.channels).method +
         (residual > 0 ? stages_of(args.selection.method).bytes(residual) : 0);
}

int64_t table_bytes(const PruneArgs& args) {
  return args.ragged ? round_up(args.images * static_cast<int64_t>(sizeof(Image)), 256) : 0;
}

struct Wave {
  int64_t begin, end;
  WaveSize size;
  int64_t bytes;
};

int larger(int a, int b) { return a > b ? a : b; }

// As many images from `begin` on as the limit allows, at least one.
Wave next_wave(const PruneArgs& args, int64_t begin) {
  const int64_t left = args.images - begin;
  if (!args.ragged) {
    const int64_t each = image_bytes(args, args.shape);
    int64_t fit = each > 0 ? args.workspace_limit / each : left;
    fit = fit < 1 ? 1 : fit;
    fit = fit > kMostImages ? kMostImages : fit;
    fit = fit < left ? fit : left;
    return {begin,
            begin + fit,
            {static_cast<int>(fit), args.shape.tokens, args.shape.residual(), args.shape.kept()},
            fit * each};
  }
  Wave wave{begin, begin, {}, 0};
  while (wave.end < args.images && wave.size.images < kMostImages) {
    const ImageShape& shape = args.ragged[wave.end].shape;
    const int64_t bytes = image_bytes(args, shape);
    if (wave.end > begin && wave.bytes + bytes > args.workspace_limit) break;
    wave.bytes += bytes;
    wave.size = {wave.size.images + 1, larger(wave.size.tokens, shape.tokens),
                 larger(wave.size.residual, shape.residual()),
                 larger(wave.size.kept, shape.kept())};
    ++wave.end;
  }
  return wave;
}

int run_wave(const PruneArgs& args, const Batch& batch, const WaveSize& size, void* workspace,
             Stream stream) {
  const int64_t channels = args.feats.channels;
  if (size.kept == 0) return 0;
  const MethodStages& method = stages_of(args.selection.method);
  const Ranking ranking{method.order, args.selection.seed, method.scores};
  const bool ranked = method.order != Order::kIndex || method.scores;
  if (const int e = rank_and_quantize(followed(batch), size, args.feats,
                                      ranked ? args.attention : AttentionView{}, ranking,
                                      RankOutput{}, workspace, stream)) {
    return e;
  }
  if (size.residual > 0) {
    if (const int e =
            gram(followed(batch), size, channels, method.matrix, nullptr, workspace, stream)) {
      return e;
    }
  }
  const Batch selected = args.kept_feats ? followed(batch) : batch;
  if (const int e = method.select(selected, size, channels, args.selection, args.indices, workspace,
                                  stream)) {
    return e;
  }
  if (!args.kept_feats) return 0;
  return gather(batch, size, args.feats, args.indices, args.kept_feats, stream);
}

// The images of a wave, whose workspaces are consecutive from `offset` on.
std::vector<Image> wave_images(const PruneArgs& args, const Wave& wave, int64_t offset) {
  std::vector<Image> images;
  images.reserve(static_cast<size_t>(wave.size.images));
  for (int64_t i = wave.begin; i < wave.end; ++i) {
    const RaggedImage& image = args.ragged[i];
    images.push_back({image.shape, image.first_token * args.feats.token_stride,
                      image.first_token * args.attention.token_stride, image.first_kept,
                      image.first_token, offset});
    offset += image_bytes(args, image.shape);
  }
  return images;
}

}  // namespace

int64_t prune_workspace_bytes(const PruneArgs& args) {
  int64_t most = 0;
  for (int64_t begin = 0; begin < args.images;) {
    const Wave wave = next_wave(args, begin);
    most = wave.bytes > most ? wave.bytes : most;
    begin = wave.end;
    if (!args.ragged) break;  // the first wave is the largest
  }
  return table_bytes(args) + most;
}

int prune(const PruneArgs& args, void* workspace, Stream stream) {
  auto* table = static_cast<Image*>(workspace);
  const int64_t images_at = table_bytes(args);
  for (int64_t begin = 0; begin < args.images;) {
    const Wave wave = next_wave(args, begin);
    Batch batch{};
    if (args.ragged) {
      const std::vector<Image> images = wave_images(args, wave, images_at);
      batch.table = table + begin;
      if (const int e = write_table(images.data(), wave.size.images, table + begin, stream)) {
        return e;
      }
    } else {
      batch.first = {args.shape,
                     begin * args.feats.image_stride,
                     begin * args.attention.image_stride,
                     begin * args.shape.kept(),
                     0,
                     images_at};
      batch.feature_stride = args.feats.image_stride;
      batch.attention_stride = args.attention.image_stride;
      batch.kept_stride = args.shape.kept();
      batch.workspace_stride = image_bytes(args, args.shape);
    }
    if (const int e = run_wave(args, batch, wave.size, workspace, stream)) return e;
    begin = wave.end;
  }
  return 0;
}

namespace {
int64_t cosine_image_bytes(const FeatureView& feats, int tokens) {
  return workspace_layout(tokens, tokens, feats.channels, false).method;
}

int64_t cosine_wave(const FeatureView& feats, int64_t images, int tokens, int64_t limit) {
  int64_t fit = limit / cosine_image_bytes(feats, tokens);
  fit = fit < 1 ? 1 : fit;
  fit = fit > kMostImages ? kMostImages : fit;
  return fit < images ? fit : images;
}
}  // namespace

int64_t cosine_workspace_bytes(const FeatureView& feats, int64_t images, int tokens,
                               int64_t workspace_limit) {
  return cosine_wave(feats, images, tokens, workspace_limit) * cosine_image_bytes(feats, tokens);
}

int pairwise_cosine(const FeatureView& feats, int64_t images, int tokens, float* out,
                    int64_t workspace_limit, void* workspace, Stream stream) {
  const int64_t per_wave = cosine_wave(feats, images, tokens, workspace_limit);
  Batch batch{};
  batch.first.shape = {tokens, 0, tokens};
  batch.feature_stride = feats.image_stride;
  batch.workspace_stride = cosine_image_bytes(feats, tokens);
  for (int64_t begin = 0; begin < images; begin += per_wave) {
    batch.first.first_feature = begin * feats.image_stride;
    const auto now = static_cast<int>(images - begin < per_wave ? images - begin : per_wave);
    const WaveSize size{now, tokens, tokens, 0};
    if (const int e = rank_and_quantize(followed(batch), size, feats, AttentionView{}, Ranking{},
                                        RankOutput{}, workspace, stream)) {
      return e;
    }
    float* wave_out = out + begin * tokens * tokens;
    if (const int e =
            gram(batch, size, feats.channels, Matrix::kCosine, wave_out, workspace, stream)) {
      return e;
    }
  }
  return 0;
}

}  // namespace vispruner::cuda
