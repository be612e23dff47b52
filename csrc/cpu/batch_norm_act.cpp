// act(batch_norm(x) + residual), forward.
//
// In training moves x twice in, the residual once in and the result once out. Contiguous: a channel
// at a time, whose planes are often still in the second cache when they are read again. Channels
// last: all pieces twice, the second time from the last to the first, because the last are still in
// a cache. Values are summed less a shift, the mean of a few of them, in float within a piece and
// in double beyond; no cut depends on threads.
#include "cpu/batch_norm_act.h"

#include <cmath>

namespace magsd::MAGSD_ISA::batch_norm_act {
namespace {

constexpr int64_t kSamples = 16;

// plain[i] += sum over rows of x - shift, squares[i] += sum of its square.
template <int kRows, typename X, typename Shift, typename A>
void add_rows(Rows<const X> x, int64_t count, Shift shift, A* plain, A* squares) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    A value[kRows];
    for (int r = 0; r < kRows; ++r) value[r] = upcast(x.first[r * x.step + i]) - shift[i];
    if constexpr (kRows == 4) {
      plain[i] += (value[0] + value[1]) + (value[2] + value[3]);
      squares[i] +=
          (value[0] * value[0] + value[1] * value[1]) + (value[2] * value[2] + value[3] * value[3]);
    } else {
      plain[i] += value[0];
      squares[i] += value[0] * value[0];
    }
  }
}

template <Act kAct, bool kResidual, typename A, typename X, typename Norm>
void apply_row(const X* x, [[maybe_unused]] const X* residual, int64_t count, Norm norm, X* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    A z = (upcast(x[i]) - norm.mean[i]) * norm.factor[i] + norm.bias[i];
    if constexpr (kResidual) z += upcast(residual[i]);
    out[i] = downcast<X>(activate<kAct>(z));
  }
}

template <typename T, Act kAct, bool kResidual>
class Forward {
  using A = accumulate_t<T>;

 public:
  explicit Forward(const NormForward& call)
      : call_(call),
        shape_(call.shape),
        pieces_(pieces_of(call)),
        norms_(call.shape, pieces_.has_value() ? pieces_->pixels : 1, call.weight, call.bias),
        running_mean_(call.running_mean),
        running_var_(call.running_var),
        mean_(mutable_data<A>(call.mean)),
        rstd_(mutable_data<A>(call.rstd)),
        x_(data<T>(call.x.tensor)),
        residual_(kResidual ? data<T>(call.residual->tensor) : nullptr),
        out_(mutable_data<T>(call.output)),
        streamed_(shape_.elements() * static_cast<int64_t>(sizeof(T)) >= kStreamed) {}

  void run() {
    if (!call_.of_batch) {
      for (int64_t c = 0; c < shape_.channels; ++c) {
        for (int64_t g = 0; g < shape_.groups; ++g) {
          set(g, c, running_mean_.get(c), running_var_.get(c));
        }
      }
      if (shape_.empty()) return;
    }
    expect_writes(out_, shape_.elements());
    pieces_.has_value() ? channels_last(*pieces_) : contiguous();
  }

 private:
  static std::optional<Pieces> pieces_of(const NormForward& call) {
    if (!call.x.channels_last || call.shape.empty()) return std::nullopt;
    const Pixels x(call.x.steps);
    return Pieces(call.shape, {x, kResidual ? Pixels(call.residual->steps) : x});
  }

  void set(int64_t group, int64_t c, double mean, double variance) {
    const A rounded = static_cast<A>(mean);
    const A rstd = static_cast<A>(1 / std::sqrt(variance + call_.eps));
    norms_.set(group, c, rounded, rstd);
    mean_[group * shape_.channels + c] = rounded;
    rstd_[group * shape_.channels + c] = rstd;
  }

  // The statistics of a channel of a group from its shifted sums; groups come in order.
  void finish(int64_t group, int64_t c, double shift, double plain, double squares) {
    const double count = static_cast<double>(shape_.values());
    double mean = plain / count, variance = squares / count - mean * mean;
    mean += shift;
    if (!std::isfinite(squares)) variance = wide_variance(group, c, mean);
    variance = variance < 0 ? 0 : variance;
    running_mean_.update(c, call_.momentum, mean);
    running_var_.update(c, call_.momentum, variance * count / (count - 1));
    set(group, c, mean, variance);
  }

  // What float cannot hold double may.
  double wide_variance(int64_t group, int64_t c, double& mean) const {
    const MapSteps& steps = call_.x.steps;
    const auto sum = [&](const auto& term) {
      double total = 0;
      for (int64_t b = group * shape_.batch; b < (group + 1) * shape_.batch; ++b) {
        const T* plane = x_ + b * steps.step_b + c * steps.step_c;
        for (int64_t p = 0; p < shape_.pixels; ++p) {
          total += term(static_cast<double>(upcast(plane[p * steps.step_p])));
        }
      }
      return total / static_cast<double>(shape_.values());
    };
    mean = sum([](double value) { return value; });
    return sum([&](double value) { return (value - mean) * (value - mean); });
  }

  // Where value `i` of a channel's values in a group lies, less the channel's own step.
  const T* value(int64_t group, int64_t i) const {
    const MapSteps& steps = call_.x.steps;
    return x_ + (group * shape_.batch + i / shape_.pixels) * steps.step_b +
           i % shape_.pixels * steps.step_p;
  }

  // Rows of everything that a thread reads and writes, of at most so many elements.
  struct Buffers {
    Input<T> x, residual;
    Output<T> out;
    Buffers(int64_t most, bool streamed)
        : x(most), residual(kResidual ? most : 0), out(most, streamed) {}
  };
  // First elements of rows, or the steps from one row to the next; the result is dense.
  struct At {
    int64_t x, residual, out;
    At from(int64_t c) const { return {x + c, residual + c, out + c}; }
    At after(int64_t rows, const At& step) const {
      return {x + rows * step.x, residual + rows * step.residual, out + rows * step.out};
    }
  };

  template <typename Shift>
  void add(Input<T>& input, const T* x, int64_t step, int64_t rows, int64_t count, Shift shift,
           A* plain, A* squares) const {
    for_blocks(rows, [&](auto n, int64_t r) {
      constexpr int kRows = decltype(n)::value;
      fetch_ahead(x, step, r, rows, count);
      add_rows<kRows>(input.read(x + r * step, step, kRows, count), count, shift, plain, squares);
    });
  }

  template <typename Norm>
  void apply(Buffers& to, const At& start, const At& step, int64_t rows, int64_t count,
             const Norm& norm) const {
    for (int64_t r = 0; r < rows; ++r) {
      const At at = start.after(r, step);
      const auto x = to.x.read(x_ + at.x, step.x, 1, count);
      auto residual = x;
      if constexpr (kResidual) {
        residual = to.residual.read(residual_ + at.residual, step.residual, 1, count);
      }
      apply_row<kAct, kResidual, A>(x.first, residual.first, count, norm,
                                    to.out.begin(out_ + at.out));
      to.out.end(out_ + at.out, count);
    }
  }

  // Contiguous: one plane per image and channel.
  void contiguous() {
    const int64_t pixels = shape_.pixels;
    parallel_for(shape_.channels, grain_of(shape_.channels, shape_.elements()),
                 [&](int64_t begin, int64_t end) {
                   const int64_t piece = std::min(pixels, kPlanePiece);
                   Buffers buffers(std::max(piece, kLaneRow), streamed_);
                   for (int64_t c = begin; c < end; ++c) {
                     for (int64_t g = 0; g < shape_.groups; ++g) {
                       if (call_.of_batch) plane_statistics(buffers.x, g, c);
                       const auto norm = norms_.plane(g, c);
                       for (int64_t b = g * shape_.batch; b < (g + 1) * shape_.batch; ++b) {
                         for (int64_t p = 0; p < pixels; p += piece) {
                           const int64_t at = (b * shape_.channels + c) * pixels + p;
                           apply(buffers, {at, at, at}, {}, 1, std::min(piece, pixels - p), norm);
                         }
                       }
                     }
                   }
                   finish_rows(streamed_);
                 });
  }

  void plane_statistics(Input<T>& input, int64_t g, int64_t c) {
    const int64_t pixels = shape_.pixels, step_c = call_.x.steps.step_c;
    const int64_t samples = std::min(kSamples, shape_.values());
    double shift = 0;
    for (int64_t k = 0; k < samples; ++k) {
      shift += static_cast<double>(upcast(value(g, k * shape_.values() / samples)[c * step_c]));
    }
    const Shared<A> shared{static_cast<A>(shift / static_cast<double>(samples))};
    LaneSums<A> sums;
    for (int64_t b = 0; b < shape_.batch; ++b) {
      const T* plane = value(g, b * pixels) + c * step_c;
      sums.for_rows(pixels, [&](int64_t p, int64_t rows, int64_t count) {
        add(input, plane + p, kLaneRow, rows, count, shared, sums.first, sums.second);
      });
    }
    const auto [plain, squares] = sums.totals();
    finish(g, c, static_cast<double>(shared.value), plain, squares);
  }

  void channels_last(const Pieces& pieces) {
    const Pixels x(call_.x.steps);
    const Pixels residual(kResidual ? call_.residual->steps : call_.x.steps);
    if (call_.of_batch) row_statistics(x, pieces);
    const At step{pieces.pixels * x.step, pieces.pixels * residual.step, pieces.width};
    parallel_for(
        pieces.count, grain_of(pieces.count, shape_.elements()), [&](int64_t begin, int64_t end) {
          Buffers buffers(std::min(pieces.width, kSlab), streamed_);
          for (int64_t i = end; i-- > begin;) {
            const auto piece = pieces[i];
            const At start{piece.offset(x), piece.offset(residual),
                           (piece.image * shape_.pixels + piece.pixel) * shape_.channels};
            pieces.for_slabs(piece, [&](int64_t row, int64_t rows, int64_t first, int64_t count) {
              apply(buffers, start.after(row, step).from(first), step, rows, count,
                    norms_.row(piece.group, first));
            });
          }
          finish_rows(streamed_);
        });
  }

  void row_statistics(const Pixels& x, const Pieces& pieces) {
    const int64_t channels = shape_.channels, samples = std::min(kSamples, shape_.values());
    PerChannel<A> shifts(shape_.groups, channels, pieces.pixels);
    for (int64_t g = 0; g < shape_.groups; ++g) {
      std::vector<A> sum(channels);
      for (int64_t k = 0; k < samples; ++k) {
        const T* row = value(g, k * shape_.values() / samples);
        for (int64_t c = 0; c < channels; ++c) sum[c] += upcast(row[c]) / static_cast<A>(samples);
      }
      for (int64_t c = 0; c < channels; ++c) shifts.set(g, c, sum[c]);
    }
    LineVector<A> partial(pieces.count * 2 * padded(pieces.width));
    parallel_for(
        pieces.count, grain_of(pieces.count, shape_.elements()), [&](int64_t begin, int64_t end) {
          Input<T> input(std::min(pieces.width, kSlab));
          for (int64_t i = begin; i < end; ++i) {
            const auto piece = pieces[i];
            const int64_t step = pieces.pixels * x.step;
            A* plain = partial.data() + i * 2 * padded(pieces.width);
            A* squares = plain + padded(pieces.width);
            pieces.for_slabs(piece, [&](int64_t row, int64_t rows, int64_t first, int64_t count) {
              add(input, x_ + piece.offset(x) + row * step + first, step, rows, count,
                  shifts.row(piece.group, first), plain + first, squares + first);
            });
          }
        });
    sum_pieces(partial, pieces, shape_, [&](int64_t g, int64_t c, double plain, double squares) {
      finish(g, c, static_cast<double>(shifts.get(g, c)), plain, squares);
    });
  }

  const NormForward& call_;
  const NormShape shape_;
  const std::optional<Pieces> pieces_;  // of maps in channels last
  Norms<A> norms_;
  const Entries running_mean_, running_var_;
  A* mean_;  // (groups, C), as rstd_
  A* rstd_;
  const T* x_;
  const T* residual_;
  T* out_;
  bool streamed_;
};

struct Backend {
  template <typename T>
  static void forward(const DeviceScope&, const NormForward& call) {
    visit_act(call.act, [&](auto act) {
      constexpr Act kAct = decltype(act)::value;
      if (call.residual.has_value()) {
        Forward<T, kAct, true>(call).run();
      } else {
        Forward<T, kAct, false>(call).run();
      }
    });
  }
};

}  // namespace

MAGSD_OPERATORS(batch_norm_act, library) {
  library.impl("batch_norm_act", TORCH_BOX(&norm_forward<Backend>));
}

}  // namespace magsd::MAGSD_ISA::batch_norm_act
