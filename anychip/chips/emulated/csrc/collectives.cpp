// Collectives of the device: another backend's (gloo's) over the same memory, refusing what the emulated chip lacks and
// taking as long as its links would. Also what Python calls.
#include "device.h"

#include <c10/util/intrusive_ptr.h>
#include <pybind11/chrono.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <chrono>
#include <functional>
#include <mutex>
#include <thread>

PYBIND11_DECLARE_HOLDER_TYPE(T, c10::intrusive_ptr<T>, true)

namespace emulated {
namespace {

using c10d::ReduceOp;
using c10d::Work;
using Clock = std::chrono::steady_clock;
using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<Work>;

struct Lacks {
  bool avg, premul_sum, int64_reductions, fp64;
};

// This process's link, shared by all its groups: what is sent later leaves later. Both directions run at full speed.
class Link {
 public:
  enum Direction { kOut = 1, kIn = 2, kBoth = 3 };

  Clock::time_point reserve(double bytes, double bytes_per_second, Direction direction) {
    if (bytes_per_second <= 0)
      return Clock::time_point::min();
    const auto passes = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bytes / bytes_per_second));
    std::lock_guard<std::mutex> lock(mutex_);
    auto start = Clock::now();
    for (auto one : {kOut, kIn})
      if (direction & one)
        start = std::max(start, free_at_[one == kIn]);
    for (auto one : {kOut, kIn})
      if (direction & one)
        free_at_[one == kIn] = start + passes;
    return start + passes;
  }

 private:
  std::mutex mutex_;
  std::array<Clock::time_point, 2> free_at_{};
};

Link& link() {
  static Link shared;
  return shared;
}

// The other backend's work, done when the link has carried it too. Waiting for it the first time moves results to where
// they belong (some of gloo's works do so) and then runs `finish` (a division, say).
class LinkedWork final : public Work {
 public:
  LinkedWork(WorkPtr inner, Tensors outputs, Clock::time_point ready, std::function<void()> finish)
      : inner_(std::move(inner)), outputs_(std::move(outputs)), ready_(ready), finish_(std::move(finish)) {}

  bool isCompleted() override { return inner_->isCompleted() && Clock::now() >= ready_; }
  bool isSuccess() const override { return inner_->isSuccess(); }
  std::exception_ptr exception() const override { return inner_->exception(); }
  int sourceRank() const override { return inner_->sourceRank(); }
  Tensors result() override { return outputs_; }
  void synchronize() override { wait(); }
  void abort() override { inner_->abort(); }

  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override {
    std::lock_guard<std::mutex> lock(waiting_);
    if (!waited_) {
      if (!inner_->wait(timeout))
        return false;
      std::this_thread::sleep_until(ready_);
      if (finish_)
        finish_();
      waited_ = true;
    }
    return true;
  }

  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    auto self = c10::intrusive_ptr<LinkedWork>::reclaim_copy(this);
    // A thread of its own: inside gloo's callback, its work does not yet count as done.
    std::thread([self, future] {
      try {
        self->wait();
        future->markCompleted(self->outputs_);
      } catch (...) {
        future->setError(std::current_exception());
      }
    }).detach();
    return future;
  }

 private:
  WorkPtr inner_;
  Tensors outputs_;
  Clock::time_point ready_;
  std::function<void()> finish_;
  std::mutex waiting_;
  bool waited_ = false;
};

Tensors hosts(const Tensors& tensors) {
  Tensors views;
  views.reserve(tensors.size());
  for (const auto& tensor : tensors)
    views.push_back(host_view(tensor));
  return views;
}

std::vector<Tensors> hosts(const std::vector<Tensors>& lists) {
  std::vector<Tensors> views;
  views.reserve(lists.size());
  for (const auto& list : lists)
    views.push_back(hosts(list));
  return views;
}

double bytes_of(const Tensors& tensors) {
  double total = 0;
  for (const auto& tensor : tensors)
    total += static_cast<double>(tensor.nbytes());
  return total;
}

double bytes_of(const std::vector<Tensors>& lists) {
  double total = 0;
  for (const auto& list : lists)
    total += bytes_of(list);
  return total;
}

Tensors flat(const std::vector<Tensors>& lists) {
  Tensors all;
  for (const auto& list : lists)
    all.insert(all.end(), list.begin(), list.end());
  return all;
}

class Collectives final : public c10d::Backend {
 public:
  Collectives(c10::intrusive_ptr<c10d::Backend> inner, Lacks lacks, double bytes_per_second)
      : Backend(inner->getRank(), inner->getSize()), inner_(std::move(inner)), lacks_(lacks), rate_(bytes_per_second) {}

  const std::string getBackendName() const override { return "emulated_ccl"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return inner_->getBackendOptions(); }
  void setTimeout(std::chrono::milliseconds timeout) override { inner_->setTimeout(timeout); }
  void setSequenceNumberForGroup() override { inner_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner_->getSequenceNumberForGroup(); }
  void abort() override { inner_->abort(); }
  void shutdown() override { inner_->shutdown(); }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto views = hosts(tensors);
    return carried(inner_->broadcast(views, options), tensors, bytes_of(tensors));
  }

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto plain = options;
    auto finish = as_sum(plain.reduceOp, tensors, tensors);
    auto views = hosts(tensors);
    return carried(inner_->allreduce(views, plain), tensors, 2 * others() * bytes_of(tensors), std::move(finish));
  }

  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    auto plain = options;
    auto finish = as_sum(plain.reduceOp, tensors, tensors);
    auto views = hosts(tensors);
    const auto bytes = 2 * others() * bytes_of(tensors);
    return carried(inner_->allreduce_coalesced(views, plain), tensors, bytes, std::move(finish));
  }

  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto plain = options;
    auto finish = as_sum(plain.reduceOp, tensors, tensors);
    auto views = hosts(tensors);
    return carried(inner_->reduce(views, plain), tensors, bytes_of(tensors), std::move(finish));
  }

  WorkPtr allgather(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = hosts(outputs);
    auto from = hosts(inputs);
    return carried(inner_->allgather(to, from, options), flat(outputs), others() * bytes_of(outputs));
  }

  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto to = host_view(output), from = host_view(input);
    return carried(inner_->_allgather_base(to, from, options), {output}, others() * bytes_of(Tensors{output}));
  }

  WorkPtr allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = hosts(outputs), from = hosts(inputs);
    auto work = inner_->allgather_into_tensor_coalesced(to, from, options);
    return carried(std::move(work), outputs, others() * bytes_of(outputs));
  }

  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto to = hosts(outputs);
    auto from = hosts(inputs);
    const auto bytes = std::max(bytes_of(outputs), bytes_of(inputs));
    return carried(inner_->gather(to, from, options), flat(outputs), bytes);
  }

  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override {
    auto to = hosts(outputs);
    auto from = hosts(inputs);
    const auto bytes = std::max(bytes_of(outputs), bytes_of(inputs));
    return carried(inner_->scatter(to, from, options), outputs, bytes);
  }

  WorkPtr reduce_scatter(
      Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& options) override {
    auto plain = options;
    auto scaled = inputs;
    std::function<void()> finish;
    for (auto& list : scaled)
      finish = as_sum_of_copies(plain.reduceOp, options.reduceOp, list, outputs);
    auto to = hosts(outputs);
    auto from = hosts(scaled);
    auto work = inner_->reduce_scatter(to, from, plain);
    return carried(std::move(work), outputs, others() * bytes_of(inputs), std::move(finish));
  }

  WorkPtr _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto plain = options;
    Tensors inputs{input}, outputs{output};
    auto finish = as_sum_of_copies(plain.reduceOp, options.reduceOp, inputs, outputs);
    auto to = host_view(output), from = host_view(inputs.front());
    auto work = inner_->_reduce_scatter_base(to, from, plain);
    return carried(std::move(work), outputs, others() * bytes_of(inputs), std::move(finish));
  }

  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    auto plain = options;
    auto scaled = inputs;
    auto finish = as_sum_of_copies(plain.reduceOp, options.reduceOp, scaled, outputs);
    auto to = hosts(outputs), from = hosts(scaled);
    auto work = inner_->reduce_scatter_tensor_coalesced(to, from, plain);
    return carried(std::move(work), outputs, others() * bytes_of(inputs), std::move(finish));
  }

  WorkPtr alltoall_base(
      at::Tensor& output,
      at::Tensor& input,
      std::vector<int64_t>& output_sizes,
      std::vector<int64_t>& input_sizes,
      const c10d::AllToAllOptions& options) override {
    auto to = host_view(output), from = host_view(input);
    auto work = inner_->alltoall_base(to, from, output_sizes, input_sizes, options);
    return carried(std::move(work), {output}, others() * bytes_of(Tensors{input}));
  }

  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override {
    auto to = hosts(outputs), from = hosts(inputs);
    return carried(inner_->alltoall(to, from, options), outputs, others() * bytes_of(inputs));
  }

  WorkPtr send(Tensors& tensors, int to, int tag) override {
    auto views = hosts(tensors);
    return carried(inner_->send(views, to, tag), {}, bytes_of(tensors), {}, Link::kOut);
  }

  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    auto views = hosts(tensors);
    return carried(inner_->recv(views, from, tag), tensors, bytes_of(tensors), {}, Link::kIn);
  }

  WorkPtr recvAnysource(Tensors& tensors, int tag) override {
    auto views = hosts(tensors);
    return carried(inner_->recvAnysource(views, tag), tensors, bytes_of(tensors), {}, Link::kIn);
  }

  WorkPtr barrier(const c10d::BarrierOptions& options) override { return inner_->barrier(options); }
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override {
    inner_->monitoredBarrier(options, wait_all_ranks);
  }

 private:
  // Share of a message that crosses the link of one rank in a ring.
  double others() const { return static_cast<double>(getSize() - 1) / getSize(); }

  WorkPtr carried(
      WorkPtr inner,
      Tensors outputs,
      double bytes,
      std::function<void()> finish = {},
      Link::Direction direction = Link::kBoth) {
    const auto ready = link().reserve(bytes, rate_, direction);
    return c10::make_intrusive<LinkedWork>(std::move(inner), std::move(outputs), ready, std::move(finish));
  }

  void check_reduction(const ReduceOp& op, const Tensors& tensors) const {
    TORCH_CHECK(
        op != ReduceOp::AVG || !lacks_.avg, "emulated_ccl has no ReduceOp.AVG (quirk no_avg): use SUM and divide.");
    TORCH_CHECK(
        op != ReduceOp::PREMUL_SUM || !lacks_.premul_sum,
        "emulated_ccl has no ReduceOp.PREMUL_SUM (quirk no_premul_sum): multiply first and use SUM.");
    for (const auto& tensor : tensors) {
      TORCH_CHECK(
          !lacks_.int64_reductions || tensor.scalar_type() != at::kLong,
          "emulated_ccl does not reduce int64 (quirk no_int64_reduce): use int32 or float32.");
      TORCH_CHECK(
          !lacks_.fp64 || tensor.scalar_type() != at::kDouble,
          "emulated_ccl does not reduce float64 (quirk no_fp64): use float32.");
    }
  }

  // gloo knows neither AVG nor PREMUL_SUM: scale inputs first, or divide what `finish` will find in `outputs`.
  std::function<void()> as_sum(ReduceOp& op, Tensors& inputs, const Tensors& outputs) {
    check_reduction(op, inputs);
    if (op == ReduceOp::AVG) {
      op = ReduceOp::SUM;
      return [outputs, size = getSize()] {
        for (auto output : outputs)
          host_view(output).div_(size);
      };
    }
    if (op == ReduceOp::PREMUL_SUM) {
      const auto* factor = static_cast<const c10d::PreMulSumSupplement*>(op.supplement_.get());
      for (auto& input : inputs)
        host_view(input).mul_(
            factor->tensor_factor.defined() ? factor->tensor_factor.item() : c10::Scalar(factor->double_factor));
      op = ReduceOp::SUM;
    }
    return {};
  }

  std::function<void()> as_sum_of_copies(
      ReduceOp& op, const ReduceOp& asked, Tensors& inputs, const Tensors& outputs) {
    op = asked;
    if (op == ReduceOp::PREMUL_SUM)
      for (auto& input : inputs)
        input = input.clone();
    return as_sum(op, inputs, outputs);
  }

  c10::intrusive_ptr<c10d::Backend> inner_;
  Lacks lacks_;
  double rate_;
};

}  // namespace
}  // namespace emulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("configure", [](int devices, size_t memory_bytes, bool fp64) {
    emulated::settings() = {devices, memory_bytes, fp64};
  });
  m.def(
      "collectives",
      [](c10::intrusive_ptr<c10d::Backend> inner, bool no_avg, bool no_premul_sum, bool no_int64_reduce, bool no_fp64,
         double bytes_per_second) -> c10::intrusive_ptr<c10d::Backend> {
        const emulated::Lacks lacks{no_avg, no_premul_sum, no_int64_reduce, no_fp64};
        return c10::make_intrusive<emulated::Collectives>(std::move(inner), lacks, bytes_per_second);
      },
      pybind11::arg("inner"), pybind11::kw_only(), pybind11::arg("no_avg"), pybind11::arg("no_premul_sum"),
      pybind11::arg("no_int64_reduce"), pybind11::arg("no_fp64"), pybind11::arg("bytes_per_second"));
}
