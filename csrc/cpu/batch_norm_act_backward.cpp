// act(batch_norm(x) + residual), backward.
//
// With g the gradient before the activation, S1 = sum g and S2 = sum g (x - mean) over the n values
// of a channel in a group (Ioffe and Szegedy 2015):
//   grad_x = weight rstd (g - S1 / n - (x - mean) rstd^2 S2 / n)
// Moves the gradient and x twice in and grad_x once out. With a residual's gradient the first pass
// also reads the kept map and writes g, which the second then reads where it has not been rounded.
// Cuts and sums are those of the forward.
#include "cpu/batch_norm_act.h"

namespace magsd::MAGSD_ISA::batch_norm_act {
namespace {

// Where the argument of the activation comes from.
enum class Source {
  kX,          // the norm of x
  kOutput,     // relu's result tells as much
  kXResidual,  // the norm of x and the residual
};

// Coefficients of the second pass: grad_x = factor (g - shift - (x - mean) slope).
template <typename Coefficients>
struct RowGradient {
  Coefficients shift, slope;
};

// What loops read of a block of rows.
template <typename X>
struct Values {
  Rows<const X> grad, x, kept;
};

// g of element i of row r.
template <Act kAct, Source kSource, typename A, typename X, typename Norm>
MAGSD_HD A before_activation(const Values<X>& of, const Norm& norm, int r, int64_t i) {
  A z{0};
  if constexpr (kAct != Act::kNone && kSource == Source::kOutput) {
    z = upcast(of.kept.first[r * of.kept.step + i]);
  } else if constexpr (kAct != Act::kNone) {
    z = (upcast(of.x.first[r * of.x.step + i]) - norm.mean[i]) * norm.factor[i] + norm.bias[i];
    if constexpr (kSource == Source::kXResidual) z += upcast(of.kept.first[r * of.kept.step + i]);
  }
  const A grad = upcast(of.grad.first[r * of.grad.step + i]);
  return differentiate<kAct>(grad, z);
}

// first[i] += sum over rows of g, second[i] += sum of g (x - mean); with `kWrites` the g of a
// single row is also written.
template <int kRows, Act kAct, Source kSource, bool kWrites, typename A, typename X, typename Norm>
void add_rows(Values<X> of, int64_t count, Norm norm, A* first, A* second,
              [[maybe_unused]] X* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    A g[kRows], product[kRows];
    for (int r = 0; r < kRows; ++r) {
      g[r] = before_activation<kAct, kSource, A>(of, norm, r, i);
      product[r] = g[r] * (upcast(of.x.first[r * of.x.step + i]) - norm.mean[i]);
      if constexpr (kWrites) out[i] = downcast<X>(g[0]);
    }
    if constexpr (kRows == 4) {
      first[i] += (g[0] + g[1]) + (g[2] + g[3]);
      second[i] += (product[0] + product[1]) + (product[2] + product[3]);
    } else {
      first[i] += g[0];
      second[i] += product[0];
    }
  }
}

// grad_x of a row; without statistics of the batch it does not depend on x, which may be infinite.
template <Act kAct, Source kSource, bool kOfBatch, typename A, typename X, typename Norm,
          typename Gradient>
void apply_row(Values<X> of, int64_t count, Norm norm, [[maybe_unused]] Gradient gradient, X* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    A g = before_activation<kAct, kSource, A>(of, norm, 0, i);
    if constexpr (kOfBatch) {
      g -= gradient.shift[i] + (upcast(of.x.first[i]) - norm.mean[i]) * gradient.slope[i];
    }
    out[i] = downcast<X>(norm.factor[i] * g);
  }
}

template <typename T, Act kAct, Source kSource>
class Backward {
  using A = accumulate_t<T>;
  using X = Readable<T>;
  static constexpr bool kKeeps = kSource != Source::kX;
  // The second pass takes g from the residual's gradient where that has not rounded it.
  static constexpr bool kReadsWritten = kAct == Act::kRelu || std::is_same_v<T, A>;

 public:
  explicit Backward(const NormBackward& call)
      : call_(call),
        shape_(call.shape),
        pieces_(pieces_of(call)),
        norms_(call.shape, pixels_of_row(), call.weight, call.bias),
        shift_(call.shape.groups, call.shape.channels, pixels_of_row()),
        slope_(call.shape.groups, call.shape.channels, pixels_of_row()),
        of_weight_(call.shape.channels),
        of_bias_(call.shape.channels),
        rstd_(data<A>(call.rstd)),
        grad_(data<T>(call.grad.tensor)),
        x_(data<T>(call.x.tensor)),
        kept_(kKeeps ? data<T>(call.kept->tensor) : nullptr),
        grad_x_(mutable_data<T>(call.grad_x)),
        grad_residual_(mutable_data<T>(call.grad_residual)),
        streamed_(shape_.elements() * static_cast<int64_t>(sizeof(T)) >= kStreamed),
        sums_(call.of_parameters || (call.of_batch && call.of_x)) {
    if (call.of_parameters) {
      grad_weight_.emplace(call.grad_weight);
      grad_bias_.emplace(call.grad_bias);
    }
    const A* mean = data<A>(call.mean);
    for (int64_t g = 0; g < shape_.groups; ++g) {
      for (int64_t c = 0; c < shape_.channels; ++c) {
        const int64_t i = g * shape_.channels + c;
        norms_.set(g, c, mean[i], rstd_[i]);
      }
    }
  }

  void run() {
    if (!shape_.empty()) {
      if (call_.of_x) expect_writes(grad_x_, shape_.elements());
      if (call_.of_residual) expect_writes(grad_residual_, shape_.elements());
      pieces_.has_value() ? channels_last(*pieces_) : contiguous();
    } else {
      for (int64_t g = 0; g < shape_.groups; ++g) {
        for (int64_t c = 0; c < shape_.channels; ++c) finish(g, c, 0, 0);
      }
    }
  }

 private:
  static std::optional<Pieces> pieces_of(const NormBackward& call) {
    if (!call.x.channels_last || call.shape.empty()) return std::nullopt;
    const Pixels x(call.x.steps);
    return Pieces(call.shape, {Pixels(call.grad.steps), x, kKeeps ? Pixels(call.kept->steps) : x});
  }
  int64_t pixels_of_row() const { return pieces_.has_value() ? pieces_->pixels : 1; }

  // Rows of everything that a thread reads and writes, of at most so many elements.
  struct Buffers {
    Input<T> grad, x, kept;
    Output<T> grad_x, grad_residual;
    Buffers(int64_t most, const Backward& of)
        : grad(most),
          x(most),
          kept(kKeeps ? most : 0),
          grad_x(of.call_.of_x ? most : 0, of.streamed_),
          grad_residual(of.call_.of_residual ? most : 0, of.streamed_) {}
  };
  // First elements of rows, or the steps from one row to the next; results are dense.
  struct At {
    int64_t grad, x, kept, out;
    At from(int64_t c) const { return {grad + c, x + c, kept + c, out + c}; }
    At after(int64_t rows, const At& step) const {
      return {grad + rows * step.grad, x + rows * step.x, kept + rows * step.kept,
              out + rows * step.out};
    }
  };

  // Of a channel of a group; groups come in order.
  void finish(int64_t g, int64_t c, double first, double second) {
    const double rstd = static_cast<double>(rstd_[g * shape_.channels + c]);
    const double values = static_cast<double>(shape_.values());
    if (call_.of_batch) {
      shift_.set(g, c, static_cast<A>(first / values));
      slope_.set(g, c, static_cast<A>(rstd * rstd * second / values));
    }
    if (!call_.of_parameters) return;
    // Not over the entries of parameters yet: these are rounded once, after the last group.
    of_bias_[c] += first;
    of_weight_[c] += rstd * second;
    if (g + 1 < shape_.groups) return;
    grad_weight_->set(c, of_weight_[c]);
    grad_bias_->set(c, of_bias_[c]);
  }

  Values<X> read(Buffers& from, const At& at, const At& step, int rows, int64_t count) const {
    Values<X> of{from.grad.read(grad_ + at.grad, step.grad, rows, count),
                 from.x.read(x_ + at.x, step.x, rows, count),
                 {nullptr, 0}};
    if constexpr (kKeeps) of.kept = from.kept.read(kept_ + at.kept, step.kept, rows, count);
    return of;
  }

  // The first pass over `rows` rows: sums and, if it is wanted, the residual's gradient.
  template <typename Norm>
  void add(Buffers& buffers, const At& start, const At& step, int64_t rows, int64_t count,
           const Norm& norm, A* first, A* second) const {
    if (call_.of_residual) {
      for (int64_t r = 0; r < rows; ++r) {
        const At at = start.after(r, step);
        add_rows<1, kAct, kSource, true>(read(buffers, at, step, 1, count), count, norm, first,
                                         second,
                                         buffers.grad_residual.begin(grad_residual_ + at.out));
        buffers.grad_residual.end(grad_residual_ + at.out, count);
      }
      return;
    }
    for_blocks(rows, [&](auto n, int64_t r) {
      constexpr int kRows = decltype(n)::value;
      fetch_ahead(grad_ + start.grad, step.grad, r, rows, count);
      fetch_ahead(x_ + start.x, step.x, r, rows, count);
      if constexpr (kKeeps) fetch_ahead(kept_ + start.kept, step.kept, r, rows, count);
      add_rows<kRows, kAct, kSource, false>(read(buffers, start.after(r, step), step, kRows, count),
                                            count, norm, first, second, static_cast<X*>(nullptr));
    });
  }

  // The second pass.
  template <typename Norm, typename Gradient>
  void apply(Buffers& buffers, const At& start, const At& step, int64_t rows, int64_t count,
             const Norm& norm, const Gradient& gradient) const {
    for (int64_t r = 0; r < rows; ++r) {
      const At at = start.after(r, step);
      X* out = buffers.grad_x.begin(grad_x_ + at.out);
      if (kReadsWritten && call_.of_residual) {
        const Values<X> of{buffers.grad.read(grad_residual_ + at.out, step.out, 1, count),
                           buffers.x.read(x_ + at.x, step.x, 1, count),
                           {nullptr, 0}};
        apply_row_of<Act::kNone, Source::kX>(of, count, norm, gradient, out);
      } else {
        apply_row_of<kAct, kSource>(read(buffers, at, step, 1, count), count, norm, gradient, out);
      }
      buffers.grad_x.end(grad_x_ + at.out, count);
    }
  }

  template <Act kOfAct, Source kOf, typename Norm, typename Gradient>
  void apply_row_of(const Values<X>& of, int64_t count, const Norm& norm, const Gradient& gradient,
                    X* out) const {
    if (call_.of_batch) {
      apply_row<kOfAct, kOf, true, A>(of, count, norm, gradient, out);
    } else {
      apply_row<kOfAct, kOf, false, A>(of, count, norm, gradient, out);
    }
  }

  void contiguous() {
    const int64_t pixels = shape_.pixels, channels = shape_.channels;
    parallel_for(channels, grain_of(channels, shape_.elements()), [&](int64_t begin, int64_t end) {
      const int64_t piece = std::min(pixels, kPlanePiece);
      Buffers buffers(std::max(piece, kLaneRow), *this);
      const At step{kLaneRow, kLaneRow, kLaneRow, kLaneRow};
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t g = 0; g < shape_.groups; ++g) {
          const auto norm = norms_.plane(g, c);
          const auto for_planes = [&](const auto& body) {
            for (int64_t b = g * shape_.batch; b < (g + 1) * shape_.batch; ++b) {
              body((b * channels + c) * pixels);
            }
          };
          if (sums_ || call_.of_residual) {
            LaneSums<A> sums;
            for_planes([&](int64_t plane) {
              sums.for_rows(pixels, [&](int64_t p, int64_t rows, int64_t count) {
                const int64_t at = plane + p;
                add(buffers, {at, at, at, at}, step, rows, count, norm, sums.first, sums.second);
              });
            });
            const auto totals = sums.totals();
            finish(g, c, totals.first, totals.second);
          }
          if (!call_.of_x) continue;
          finish_rows(streamed_);
          const RowGradient<Shared<A>> gradient{shift_.plane(g, c), slope_.plane(g, c)};
          for_planes([&](int64_t plane) {
            for (int64_t p = 0; p < pixels; p += piece) {
              const int64_t at = plane + p;
              apply(buffers, {at, at, at, at}, {}, 1, std::min(piece, pixels - p), norm, gradient);
            }
          });
        }
      }
      finish_rows(streamed_);
    });
  }

  void channels_last(const Pieces& pieces) {
    const int64_t most = std::min(pieces.width, kSlab),
                  grain = grain_of(pieces.count, shape_.elements());
    const Pixels grad(call_.grad.steps), x(call_.x.steps);
    const Pixels kept(kKeeps ? call_.kept->steps : call_.x.steps);
    const At step{pieces.pixels * grad.step, pieces.pixels * x.step, pieces.pixels * kept.step,
                  pieces.width};
    const auto start = [&](const Pieces::Piece& piece) {
      return At{piece.offset(grad), piece.offset(x), piece.offset(kept),
                (piece.image * shape_.pixels + piece.pixel) * shape_.channels};
    };
    if (sums_ || call_.of_residual) {
      LineVector<A> partial(pieces.count * 2 * padded(pieces.width));
      parallel_for(pieces.count, grain, [&](int64_t begin, int64_t end) {
        Buffers buffers(most, *this);
        for (int64_t i = begin; i < end; ++i) {
          const auto piece = pieces[i];
          const At at = start(piece);
          A* sums = partial.data() + i * 2 * padded(pieces.width);
          A* second = sums + padded(pieces.width);
          pieces.for_slabs(piece, [&](int64_t row, int64_t rows, int64_t first, int64_t count) {
            add(buffers, at.after(row, step).from(first), step, rows, count,
                norms_.row(piece.group, first), sums + first, second + first);
          });
        }
        finish_rows(streamed_);
      });
      sum_pieces(partial, pieces, shape_, [&](int64_t g, int64_t c, double first, double second) {
        finish(g, c, first, second);
      });
    }
    if (!call_.of_x) return;
    parallel_for(pieces.count, grain, [&](int64_t begin, int64_t end) {
      Buffers buffers(most, *this);
      for (int64_t i = end; i-- > begin;) {
        const auto piece = pieces[i];
        const At at = start(piece);
        pieces.for_slabs(piece, [&](int64_t row, int64_t rows, int64_t first, int64_t count) {
          const RowGradient<PerElement<A>> gradient{shift_.row(piece.group, first),
                                                    slope_.row(piece.group, first)};
          apply(buffers, at.after(row, step).from(first), step, rows, count,
                norms_.row(piece.group, first), gradient);
        });
      }
      finish_rows(streamed_);
    });
  }

  const NormBackward& call_;
  const NormShape shape_;
  const std::optional<Pieces> pieces_;  // of maps in channels last
  Norms<A> norms_;
  PerChannel<A> shift_, slope_;
  std::vector<double> of_weight_, of_bias_;  // (C,)
  std::optional<Entries> grad_weight_, grad_bias_;
  const A* rstd_;  // (groups, C)
  const T* grad_;
  const T* x_;
  const T* kept_;
  T* grad_x_;
  T* grad_residual_;
  bool streamed_, sums_;
};

struct Backend {
  template <typename T>
  static void backward(const DeviceScope&, const NormBackward& call) {
    const bool kept = call.kept.has_value();
    switch (call.act) {
      case Act::kRelu:
        return kept ? Backward<T, Act::kRelu, Source::kOutput>(call).run()
                    : Backward<T, Act::kRelu, Source::kX>(call).run();
      case Act::kSilu:
        return kept ? Backward<T, Act::kSilu, Source::kXResidual>(call).run()
                    : Backward<T, Act::kSilu, Source::kX>(call).run();
      default:
        return Backward<T, Act::kNone, Source::kX>(call).run();
    }
  }
};

}  // namespace

MAGSD_OPERATORS(batch_norm_act_backward, library) {
  library.impl("batch_norm_act_backward", TORCH_BOX(&norm_backward<Backend>));
}

}  // namespace magsd::MAGSD_ISA::batch_norm_act
