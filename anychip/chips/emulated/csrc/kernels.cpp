// Operators of the device. A few make or reshape tensors; every other one runs the CPU's kernel over the same memory,
// so that numbers are the CPU's to the last bit and nothing is copied.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/resize_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>

namespace emulated {

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      settings().fp64 || (dtype != c10::kDouble && dtype != c10::kComplexDouble),
      "This emulated chip has no float64 (quirk no_fp64): use float32, or compute on the CPU.");
}

namespace {

// A pointer that keeps the storage it belongs to.
c10::DataPtr borrowed(const c10::Storage& storage) {
  auto* owner = c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage.unsafeGetStorageImpl()).release();
  const auto give_back = +[](void* owner) {
    c10::intrusive_ptr<c10::StorageImpl>::reclaim(static_cast<c10::StorageImpl*>(owner));
  };
  return {storage.mutable_data(), owner, give_back, c10::kCPU};
}

c10::Storage host_storage(const c10::Storage& storage) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), borrowed(storage), c10::GetCPUAllocator(), true));
}

c10::Storage device_storage(const c10::Storage& host, c10::Device device) {
  auto memory = adopt(borrowed(host), host.nbytes(), device);
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), host.nbytes(), std::move(memory), device_allocator(), true));
}

at::Tensor over(c10::Storage storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj())
    impl->_set_conj(true);
  if (like.is_neg())
    impl->_set_neg(true);
  return made;
}

bool on_device(const at::Tensor& tensor) {
  return tensor.device().type() == kDevice;
}

// One call of an operator: device tensors go in as CPU tensors over the same memory, and come out as what they were.
class HostCall {
 public:
  explicit HostCall(const c10::OperatorHandle& op, bool crosses_devices) : op_(op), crosses_devices_(crosses_devices) {}

  void run(torch::jit::Stack* stack) {
    const auto& arguments = op_.schema().arguments();
    const auto begin = stack->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i)
      visit_tensors((*stack)[begin + i]);
    check_devices((*stack)[begin]);
    for (size_t i = 0; i < arguments.size(); ++i) {
      auto& value = (*stack)[begin + i];
      if (value.isGenerator() || (value.isNone() && draws(arguments[i])))
        value = host_generator_for(value);
      else
        value = to_host(value);
    }
    {
      constexpr auto above = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
      const c10::impl::ExcludeDispatchKeyGuard below(above);
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    }
    follow_resizes();
    for (auto it = stack->end() - static_cast<int64_t>(op_.schema().returns().size()); it != stack->end(); ++it)
      *it = to_device(*it);
  }

 private:
  struct Twin {
    at::Tensor host, device;
    c10::StorageImpl* storage;
  };
  struct StorageTwin {
    c10::Storage host, device;
  };

  // First look: which device, how many elements, and what lies elsewhere.
  void visit_tensors(const c10::IValue& value) {
    if (value.isTensor()) {
      visit(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorList())
        visit(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        if (tensor.has_value())
          visit(*tensor);
    } else if (value.isDevice() && value.toDevice().type() == kDevice) {
      device_ = with_index(value.toDevice());
    }
  }

  void visit(const at::Tensor& tensor) {
    if (!tensor.defined())
      return;
    elements_ = std::max(elements_, tensor.numel());
    if (!on_device(tensor)) {
      if (tensor.dim() > 0)
        elsewhere_ = tensor.device();
    } else if (!device_.has_value()) {
      device_ = tensor.device();
    } else if (*device_ != tensor.device()) {
      elsewhere_ = tensor.device();
    }
  }

  // As on other accelerators: only numbers (tensors without dimensions) may lie elsewhere, and indices.
  void check_devices(const c10::IValue& first) {
    if (!device_.has_value())
      device_ = c10::Device(kDevice, current_device());
    if (!elsewhere_.has_value() || crosses_devices_)
      return;
    const std::string_view name = op_.schema().name();
    const bool indexes = name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
        name == "aten::_index_put_impl_" || name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put";
    TORCH_CHECK(
        indexes && elsewhere_->is_cpu() && on_device(first.toTensor()), "Expected all tensors to be on the same device, but ", op_.schema().name(),
        " was given tensors on ", *device_, " and ", *elsewhere_, ".");
  }

  static bool draws(const c10::Argument& argument) {
    const auto* optional = argument.type()->castRaw<c10::OptionalType>();
    return optional != nullptr && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
  }

  c10::IValue host_generator_for(const c10::IValue& value) {
    const auto& generator = value.isNone() ? default_generator(device_->index()) : value.toGenerator();
    TORCH_CHECK(
        generator.device().type() == kDevice, "Expected an 'emulated' generator for a tensor on ", *device_,
        ", but found one of '", generator.device(), "'.");
    return host_generator(generator, elements_);
  }

  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor())
      return host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> hosts;
      for (const at::Tensor& tensor : value.toTensorList())
        hosts.push_back(host(tensor));
      return hosts;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> hosts;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        hosts.push_back(tensor.has_value() ? std::optional<at::Tensor>(host(*tensor)) : std::nullopt);
      return hosts;
    }
    if (value.isDevice() && value.toDevice().type() == kDevice)
      return c10::Device(c10::kCPU);
    return value;
  }

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined())
      return tensor;
    if (!on_device(tensor)) {
      of_host_.push_back(tensor.unsafeGetTensorImpl());
      return tensor;
    }
    auto made = over(host_storage_of(tensor.storage()), tensor, c10::DispatchKey::CPU);
    twins_.push_back({made, tensor, made.storage().unsafeGetStorageImpl()});
    return made;
  }

  // Tensors that share memory must do so on the CPU too: kernels look whether inputs overlap.
  c10::Storage host_storage_of(const c10::Storage& storage) {
    for (const auto& twin : storages_)
      if (twin.device.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl())
        return twin.host;
    storages_.push_back({host_storage(storage), storage});
    return storages_.back().host;
  }

  c10::Storage device_storage_of(const c10::Storage& storage) {
    for (const auto& twin : storages_)
      if (twin.host.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl())
        return twin.device;
    storages_.push_back({storage, device_storage(storage, *device_)});
    return storages_.back().device;
  }

  // `out=` and in-place operators may have moved or reshaped what they were given.
  void follow_resizes() {
    for (size_t i = 0; i < storages_.size(); ++i) {
      const auto& [host, device] = storages_[i];
      if (host.data() == device.data() && host.nbytes() == device.nbytes())
        continue;
      auto* impl = device.unsafeGetStorageImpl();
      const auto nbytes = host.nbytes();
      auto moved = adopt(host.unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr(nullptr, c10::kCPU)), nbytes, device.device());
      host.unsafeGetStorageImpl()->set_data_ptr_noswap(c10::DataPtr(moved.get(), c10::kCPU));
      impl->set_data_ptr_noswap(std::move(moved));
      impl->set_nbytes(nbytes);
    }
    for (const auto& twin : twins_) {
      auto* impl = twin.device.unsafeGetTensorImpl();
      if (twin.host.storage().unsafeGetStorageImpl() != twin.storage)
        impl->set_storage_keep_dtype(device_storage_of(twin.host.storage()));
      if (twin.host.sizes() != twin.device.sizes() || twin.host.strides() != twin.device.strides() ||
          twin.host.storage_offset() != twin.device.storage_offset())
        impl->set_sizes_and_strides(twin.host.sizes(), twin.host.strides(), twin.host.storage_offset());
    }
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor())
      return device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> devices;
      for (const at::Tensor& tensor : value.toTensorList())
        devices.push_back(device(tensor));
      return devices;
    }
    return value;
  }

  at::Tensor device(const at::Tensor& tensor) {
    if (!tensor.defined())
      return tensor;
    auto* impl = tensor.unsafeGetTensorImpl();
    for (const auto& twin : twins_)
      if (twin.host.unsafeGetTensorImpl() == impl)
        return twin.device;
    if (std::find(of_host_.begin(), of_host_.end(), impl) != of_host_.end())
      return tensor;
    TORCH_CHECK_NOT_IMPLEMENTED(
        tensor.layout() == c10::kStrided, op_.schema().name(), " made a tensor of layout ", tensor.layout(),
        ", which the emulated device does not hold.");
    check_dtype(tensor.scalar_type());
    return over(device_storage_of(tensor.storage()), tensor, c10::DispatchKey::PrivateUse1);
  }

  const c10::OperatorHandle& op_;
  const bool crosses_devices_;
  std::optional<c10::Device> device_, elsewhere_;
  int64_t elements_ = 0;
  c10::SmallVector<Twin, 4> twins_;
  c10::SmallVector<StorageTwin, 4> storages_;
  c10::SmallVector<c10::TensorImpl*, 4> of_host_;
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  HostCall(op, false).run(stack);
}

void copy_across(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  HostCall(op, true).run(stack);
}

constexpr auto kKeys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);

c10::ScalarType checked_dtype(std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      c10::layout_or_default(layout) == c10::kStrided, "The emulated device holds strided tensors only.");
  const auto chosen = c10::dtype_or_default(dtype);
  check_dtype(chosen);
  return chosen;
}

at::Tensor empty(
    c10::IntArrayRef size,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout> layout,
    std::optional<c10::Device> device,
    std::optional<bool> pinned,
    std::optional<c10::MemoryFormat> memory_format) {
  TORCH_CHECK(!pinned.value_or(false), "Only CPU tensors can be pinned.");
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, device_allocator(), kKeys, checked_dtype(dtype, layout), memory_format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size,
    c10::IntArrayRef stride,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout> layout,
    std::optional<c10::Device> device,
    std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "Only CPU tensors can be pinned.");
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys, checked_dtype(dtype, layout));
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) {
  return at::cpu::view(self, size);
}

at::Tensor as_strided(
    const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::cpu::as_strided(self, size, stride, offset);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::cpu::as_strided(self, size, stride, self.storage_offset());
}

const at::Tensor& resize_(
    const at::Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> memory_format) {
  const c10::DeviceGuard guard(self.device());
  return at::cpu::resize_(self, size, memory_format);
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source) {
  return at::cpu::set_(self, std::move(source));
}

at::Tensor& set_storage_part(
    at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  const c10::DeviceGuard guard(self.device());
  return at::cpu::set_(self, std::move(source), offset, size, stride);
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return at::cpu::set_(self, source);
}

void record_stream(at::Tensor&, c10::Stream) {}

// The CPU's kernel would draw from the CPU's generator.
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double p, std::optional<bool> train) {
  if (input.numel() == 0 || !train.value_or(true))
    return {input.clone(), at::ones_like(input, input.options().dtype(at::kBool))};
  auto mask = at::empty_like(input, input.options().dtype(at::kBool)).bernoulli_(1 - p);
  return {input.mul(mask).mul_(p == 1 ? 0.0 : 1.0 / (1.0 - p)), mask};
}

int64_t choose_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const std::optional<at::Tensor>& mask,
    double dropout_p,
    bool is_causal,
    std::optional<double> scale,
    bool enable_gqa) {
  const auto view = [](const at::Tensor& tensor) {
    return host_view(tensor).set_requires_grad(tensor.requires_grad());
  };
  const auto host_mask = mask.has_value() && mask->defined() ? std::optional<at::Tensor>(view(*mask)) : std::nullopt;
  return at::_fused_sdp_choice(
      view(query), view(key), view(value), host_mask, dropout_p, is_causal, scale, enable_gqa);
}

}  // namespace

at::Tensor host_view(const at::Tensor& tensor) {
  return on_device(tensor) ? over(host_storage(tensor.storage()), tensor, c10::DispatchKey::CPU) : tensor;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&copy_across>());
  m.impl("_copy_from", torch::CppFunction::makeFromBoxedFunction<&copy_across>());
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_part);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("record_stream", &record_stream);
  m.impl("native_dropout", &native_dropout);
  // Operators that the CPU computes by a kernel and other devices by a formula, which rounds otherwise, or by a detour.
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findOp(name);
    if (op.has_value() && name.getNamespace() == "aten" && op->hasKernelForDispatchKey(c10::DispatchKey::CPU) &&
        (op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) ||
         op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
         op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional)))
      m.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

TORCH_LIBRARY(emulated, m) {
  m.def("host_view(Tensor(a) self) -> Tensor(a)");
  m.impl("host_view", c10::DispatchKey::PrivateUse1, &host_view);
  m.def("device_count() -> int", [] { return static_cast<int64_t>(settings().devices); });
  m.def("default_generator(int device) -> Generator?", [](int64_t device) { return default_generator(device); });
}

}  // namespace emulated

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &emulated::choose_attention)
}  // namespace at::native
