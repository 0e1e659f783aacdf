// Device memory: host memory that is counted, and refused beyond the device's size.
#include "device.h"

#include <c10/core/CPUAllocator.h>

#include <array>
#include <mutex>

namespace emulated {

Settings& settings() {
  static Settings values;
  return values;
}

namespace {

using c10::CachingDeviceAllocator::DeviceStats;

constexpr size_t kTotal = 0;  // c10::CachingAllocator::StatType::AGGREGATE

// One device's books. Blocks are freed from any thread, and after the interpreter has gone.
class Ledger {
 public:
  void take(size_t nbytes, c10::Device device) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto limit = settings().memory_bytes;
    const auto held = static_cast<size_t>(stats_.allocated_bytes[kTotal].current);
    if (limit != 0 && held + nbytes > limit) {
      ++stats_.num_ooms;
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "emulated out of memory. Tried to allocate ", nbytes, " bytes on ", device,
          ", which has ", limit, " bytes, of which ", limit - std::min(held, limit), " are free.");
    }
    for (auto* bytes : {&stats_.allocated_bytes, &stats_.reserved_bytes, &stats_.active_bytes, &stats_.requested_bytes})
      (*bytes)[kTotal].increase(nbytes);
    for (auto* blocks : {&stats_.allocation, &stats_.segment, &stats_.active})
      (*blocks)[kTotal].increase(1);
    ++stats_.num_device_alloc;
  }

  void give_back(size_t nbytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* bytes : {&stats_.allocated_bytes, &stats_.reserved_bytes, &stats_.active_bytes, &stats_.requested_bytes})
      (*bytes)[kTotal].decrease(nbytes);
    for (auto* blocks : {&stats_.allocation, &stats_.segment, &stats_.active})
      (*blocks)[kTotal].decrease(1);
    ++stats_.num_device_free;
  }

  DeviceStats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }

  template <typename Reset>
  void reset(Reset reset) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* stat : {&stats_.allocated_bytes, &stats_.reserved_bytes, &stats_.active_bytes, &stats_.requested_bytes,
                       &stats_.allocation, &stats_.segment, &stats_.active})
      reset((*stat)[kTotal]);
  }

 private:
  std::mutex mutex_;
  DeviceStats stats_;
};

Ledger& ledger(c10::DeviceIndex device) {
  static auto* ledgers = new std::array<Ledger, kMaxDevices>();  // never destroyed: tensors outlive static objects
  return ledgers->at(device);
}

struct Block {
  c10::DataPtr host;
  size_t nbytes;
  c10::DeviceIndex device;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  ledger(block->device).give_back(block->nbytes);
  delete block;
}

class HostMemory final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    const c10::Device device(kDevice, current_device());
    if (nbytes == 0)
      return {nullptr, device};
    ledger(device.index()).take(nbytes, device);
    try {
      return wrap(c10::GetCPUAllocator()->allocate(nbytes), nbytes, device);
    } catch (...) {
      ledger(device.index()).give_back(nbytes);
      throw;
    }
  }

  static c10::DataPtr wrap(c10::DataPtr host, size_t nbytes, c10::Device device) {
    void* data = host.get();
    return {data, new Block{std::move(host), nbytes, device.index()}, &free_block, device};
  }

  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  DeviceStats getDeviceStats(c10::DeviceIndex device) override { return ledger(device).stats(); }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    ledger(device).reset([](auto& stat) { stat.reset_accumulated(); });
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    ledger(device).reset([](auto& stat) { stat.reset_peak(); });
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    const auto held = static_cast<size_t>(ledger(device).stats().allocated_bytes[kTotal].current);
    const auto total = settings().memory_bytes;
    TORCH_CHECK_NOT_IMPLEMENTED(total != 0, "The emulated device has no memory limit; set one with `memory=`.");
    return {total - std::min(held, total), total};
  }
};

HostMemory allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

}  // namespace

c10::DeviceAllocator* device_allocator() {
  return &allocator;
}

c10::DataPtr adopt(c10::DataPtr host, size_t nbytes, c10::Device device) {
  if (nbytes == 0)
    return {nullptr, device};
  ledger(device.index()).take(nbytes, device);
  return HostMemory::wrap(std::move(host), nbytes, device);
}

}  // namespace emulated
