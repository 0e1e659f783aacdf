// Random numbers as accelerators make them: the state is (seed, offset), 16 bytes, and an operator's numbers are a
// function of it. The numbers differ from the CPU's for the same seed, as every vendor's do.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <mutex>
#include <vector>

namespace emulated {
namespace {

struct State {
  uint64_t seed;
  uint64_t offset;
};

// SplitMix64's output function (Steele, Lea, Flood 2014): every bit of the input reaches every bit of the output.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

class CounterGenerator final : public c10::GeneratorImpl {
 public:
  explicit CounterGenerator(c10::DeviceIndex index)
      : GeneratorImpl(c10::Device(kDevice, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}

  void set_current_seed(uint64_t seed) override { state_ = {seed, 0}; }
  uint64_t current_seed() const override { return state_.seed; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return state_.seed;
  }
  void set_offset(uint64_t offset) override { state_.offset = offset; }
  uint64_t get_offset() const override { return state_.offset; }
  void set_state(const c10::TensorImpl& state) override {
    at::detail::check_rng_state(state);
    TORCH_CHECK(
        state.numel() == sizeof(State), "The state of an emulated generator has ", sizeof(State), " bytes, not ",
        state.numel(), ".");
    std::memcpy(&state_, state.data(), sizeof(State));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::empty({static_cast<int64_t>(sizeof(State))}, at::kByte);
    std::memcpy(state.mutable_data_ptr(), &state_, sizeof(State));
    return state.getIntrusivePtr();
  }

  at::Generator draw(int64_t count) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto seed = mix(mix(state_.seed) ^ state_.offset);
    state_.offset += 4 * ((static_cast<uint64_t>(count) + 3) / 4);  // offsets stay multiples of 4, as Philox's are
    return at::detail::createCPUGenerator(seed);
  }

 private:
  CounterGenerator* clone_impl() const override {
    auto* copy = new CounterGenerator(device_.index());
    copy->state_ = state_;
    return copy;
  }

  State state_{c10::default_rng_seed_val, 0};
};

}  // namespace

at::Generator new_generator(c10::DeviceIndex device) {
  return at::make_generator<CounterGenerator>(device < 0 ? current_device() : device);
}

const at::Generator& default_generator(c10::DeviceIndex device) {
  static auto* generators = [] {
    auto* made = new std::vector<at::Generator>;
    for (int index = 0; index < kMaxDevices; ++index)
      made->push_back(at::make_generator<CounterGenerator>(index));
    return made;
  }();
  return generators->at(device < 0 ? current_device() : device);
}

at::Generator host_generator(const at::Generator& generator, int64_t count) {
  return generator.get<CounterGenerator>()->draw(count);
}

}  // namespace emulated
