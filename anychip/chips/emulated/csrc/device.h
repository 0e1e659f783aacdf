// What the files of the emulated device share. Its memory is host memory; what makes it a device of its own is that
// PyTorch keeps its tensors, generators, streams and process groups apart from the CPU's.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

namespace emulated {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 64;

// Set once, before the first tensor.
struct Settings {
  int devices = 1;
  size_t memory_bytes = 0;  // of each device; 0: as much as the host has
  bool fp64 = true;
};
Settings& settings();

// device.cpp: the current device is the calling thread's.
c10::DeviceIndex current_device();
c10::Device with_index(c10::Device device);

// memory.cpp
c10::DeviceAllocator* device_allocator();
// Hands memory that the CPU allocated to the device, counted as the device's; it may not fit.
c10::DataPtr adopt(c10::DataPtr host, size_t nbytes, c10::Device device);

// generator.cpp
const at::Generator& default_generator(c10::DeviceIndex device);
at::Generator new_generator(c10::DeviceIndex device);
// A CPU generator for one operator that draws up to `count` numbers; the device's generator moves past them.
at::Generator host_generator(const at::Generator& generator, int64_t count);

// aliases.cpp
void check_dtype(c10::ScalarType dtype);
// A CPU tensor over a device tensor's memory, which it keeps alive.
at::Tensor host_view(const at::Tensor& tensor);

}  // namespace emulated
