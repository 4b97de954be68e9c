// A pretend "mps" device for a torch without Metal; pretend_device.py is its other half and says
// what it is for. The parts: a device guard and hooks, so that torch believes in the device; an
// allocator with a budget; and a fallback that runs the CPU kernel of operators that Metal has,
// refuses the others as torch on a Mac does, and writes down what it was asked.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Scalar;
using at::ScalarType;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using Counts = std::unordered_map<std::string, int64_t>;

constexpr int64_t GIB = int64_t(1) << 30;
const Device kPretend(DeviceType::MPS, 0);

// --- what is written down ---------------------------------------------------------------------

std::mutex g_mutex;
std::unordered_set<std::string> g_supported;  // operators with an MPS kernel, "name.overload"
Counts g_calls;                               // signature -> calls
Counts g_unsupported;                         // operator without an MPS kernel -> calls
Counts g_uploads;                             // "blocking" or "queued" -> copies from the host
std::atomic<bool> g_recording{false};
PyObject* g_on_sync = nullptr;  // called with the reason of each host sync; never freed

// Kernels that run inside one of ours are not the user's.
thread_local int t_depth = 0;
struct Inside {
  Inside() { ++t_depth; }
  ~Inside() { --t_depth; }
};

void note_sync(const std::string& reason) {
  if (!g_recording || t_depth > 0 || g_on_sync == nullptr) return;
  pybind11::gil_scoped_acquire held;
  const pybind11::handle call(g_on_sync);
  call(reason);
}

void note_upload(bool non_blocking) {
  if (!g_recording || t_depth > 0) return;
  std::lock_guard<std::mutex> lock(g_mutex);
  ++g_uploads[non_blocking ? "queued" : "blocking"];
}

// "m" on the device, "c" on the CPU, "n" a Python number; then "Float[2,3]".
void describe(const Tensor& tensor, std::string& text) {
  if (!tensor.defined()) return;
  const bool is_number = tensor.unsafeGetTensorImpl()->is_wrapped_number();
  text += is_number ? 'n' : tensor.device().is_mps() ? 'm' : 'c';
  text += c10::toString(tensor.scalar_type());
  text += '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (i > 0) text += ',';
    text += std::to_string(tensor.size(i));
  }
  text += "]|";
}

void describe(const c10::IValue& value, std::string& text) {
  if (value.isTensor()) {
    describe(value.toTensor(), text);
  } else if (value.isTensorList()) {
    for (const Tensor& tensor : value.toTensorVector()) describe(tensor, text);
  } else if (value.isOptionalTensorList()) {
    for (const auto& tensor : value.toOptionalTensorVector()) {
      if (tensor) describe(*tensor, text);
    }
  }
}

void note_call(const std::string& signature) {
  std::lock_guard<std::mutex> lock(g_mutex);
  ++g_calls[signature];
}

// For the operators that have a kernel of their own here, and not the fallback.
void note_kernel(const char* name, std::initializer_list<Tensor> inputs, const Tensor& output) {
  if (!g_recording || t_depth > 0) return;
  std::string signature = std::string(name) + "(";
  for (const Tensor& input : inputs) describe(input, signature);
  signature += ">";
  describe(output, signature);
  note_call(signature);
}

// --- memory -----------------------------------------------------------------------------------

struct Memory {
  std::atomic<int64_t> live{0}, peak{0}, largest{0}, allocations{0}, fail_in{0};
  std::atomic<int64_t> recommended{12 * GIB}, max_buffer{9 * GIB};
  std::atomic<double> high_ratio{1.7};
} g_memory;

std::string readable(double bytes) {
  char text[64];
  if (bytes >= double(GIB)) {
    snprintf(text, sizeof text, "%.2f GiB", bytes / double(GIB));
  } else if (bytes >= 1 << 20) {
    snprintf(text, sizeof text, "%.2f MiB", bytes / (1 << 20));
  } else if (bytes >= 1 << 10) {
    snprintf(text, sizeof text, "%.2f KiB", bytes / (1 << 10));
  } else {
    snprintf(text, sizeof text, "%.0f bytes", bytes);
  }
  return text;
}

void raise_to(std::atomic<int64_t>& maximum, int64_t value) {
  int64_t seen = maximum;
  while (value > seen && !maximum.compare_exchange_weak(seen, value)) {
  }
}

struct PretendAllocator final : public c10::Allocator {
  static constexpr size_t kHeader = 64;  // holds the size; keeps 64-byte alignment

  static void release(void* pointer) {
    if (pointer == nullptr) return;
    auto* header = reinterpret_cast<int64_t*>(static_cast<char*>(pointer) - kHeader);
    g_memory.live -= header[0];
    std::free(header);
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, kPretend};
    TORCH_CHECK(
        int64_t(bytes) < g_memory.max_buffer, "Invalid buffer size: ", readable(double(bytes)));
    const int64_t size = (int64_t(bytes) + 255) & ~int64_t(255);
    const double high_ratio = g_memory.high_ratio;
    const auto limit = int64_t(high_ratio * double(g_memory.recommended.load()));
    ++g_memory.allocations;
    const bool fails = g_memory.fail_in > 0 && --g_memory.fail_in == 0;
    // The text that torch raises on a Mac, on which callers match.
    TORCH_CHECK(
        !fails && (high_ratio == 0.0 || g_memory.live + size <= limit),
        "MPS backend out of memory (MPS allocated: ", readable(double(g_memory.live)),
        ", other allocations: ", readable(0), ", max allowed: ", readable(double(limit)),
        "). Tried to allocate ", readable(double(size)),
        " on shared pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for "
        "memory allocations (may cause system failure).");
    auto* header = static_cast<char*>(std::aligned_alloc(64, size_t(size) + kHeader));
    TORCH_CHECK(header != nullptr, "the pretend mps device ran out of host memory");
    reinterpret_cast<int64_t*>(header)[0] = size;
    raise_to(g_memory.peak, g_memory.live += size);
    raise_to(g_memory.largest, size);
    return {header + kHeader, header + kHeader, &release, kPretend};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
PretendAllocator g_allocator;

// --- the device -------------------------------------------------------------------------------

struct PretendGuard final : public c10::impl::NoOpDeviceGuardImpl<DeviceType::MPS> {
  Device exchangeDevice(Device) const override { return kPretend; }
  Device getDevice() const override { return kPretend; }
  c10::Stream getStream(Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kPretend); }
};

// A generator of its own, which to save and replay the CPU's does not replay: as on a Mac.
struct PretendGenerator final : public c10::GeneratorImpl {
  explicit PretendGenerator(uint64_t seed)
      : GeneratorImpl(kPretend, DispatchKeySet(DispatchKey::MPS)), inner(seed) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.get_state(); }
  PretendGenerator* clone_impl() const override {
    auto* copy = new PretendGenerator(inner.current_seed());
    copy->inner.set_engine(const_cast<at::CPUGeneratorImpl&>(inner).engine());
    return copy;
  }
  at::CPUGeneratorImpl inner;
};

struct PretendHooks : public at::MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isOnMacOSorNewer(unsigned major, unsigned) const override { return major <= 15; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Allocator* getMPSDeviceAllocator() const override { return &g_allocator; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static at::Generator generator = at::make_generator<PretendGenerator>(c10::default_rng_seed_val);
    return generator;
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<PretendGenerator>(c10::default_rng_seed_val);
  }
  void deviceSynchronize() const override { note_sync("synchronize"); }
  void commitStream() const override {}
  void emptyCache() const override {}
  size_t getCurrentAllocatedMemory() const override { return g_memory.live; }
  size_t getDriverAllocatedMemory() const override { return g_memory.live; }
  size_t getRecommendedMaxMemory() const override { return g_memory.recommended; }
  size_t getMaxBufferLength() const override { return g_memory.max_buffer; }
  void setMemoryFraction(double ratio) const override { g_memory.high_ratio = ratio; }
};

// A CUDA build of torch says that it has CUDA even without a GPU, and then refuses a second
// accelerator. Its hooks object is given the interface's own answers: there is none.
void deny_cuda() {
  static at::CUDAHooksInterface none;
  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&hooks) = *reinterpret_cast<void**>(&none);
}

// --- tensors ----------------------------------------------------------------------------------

// Source of the texts: torch/csrc and ATen/native/mps, as raised on a Mac.
void check_dtype(ScalarType dtype) {
  TORCH_CHECK_TYPE(
      dtype != ScalarType::Double,
      "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
      "Please use float32 instead.");
  TORCH_CHECK_TYPE(
      dtype != ScalarType::ComplexDouble && dtype != ScalarType::Float8_e4m3fn &&
          dtype != ScalarType::Float8_e5m2,
      "Trying to convert ", dtype, " to the MPS backend but it does not have support for that dtype.");
}

Tensor empty(
    IntArrayRef size, std::optional<ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const auto chosen = dtype.value_or(c10::get_default_dtype_as_scalartype());
  check_dtype(chosen);
  return at::detail::empty_generic(
      size, &g_allocator, DispatchKeySet(DispatchKey::MPS), chosen, format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype,
    std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  const auto chosen = dtype.value_or(c10::get_default_dtype_as_scalartype());
  check_dtype(chosen);
  return at::detail::empty_strided_generic(
      size, stride, &g_allocator, DispatchKeySet(DispatchKey::MPS), chosen);
}

// The same memory, seen as a CPU tensor.
Tensor as_cpu(const Tensor& tensor) {
  if (!tensor.device().is_mps()) return tensor;
  c10::Storage storage = tensor.storage();
  const auto elements = int64_t(storage.nbytes() / tensor.element_size());
  auto flat = at::from_blob(
      const_cast<void*>(storage.data()), {elements}, [storage](void*) {},
      at::TensorOptions().dtype(tensor.scalar_type()).device(at::kCPU));
  return flat.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (from.device().is_cpu() && to.device().is_mps()) note_upload(non_blocking);
  if (from.device().is_mps() && to.device().is_cpu()) note_sync("copy to the CPU");
  as_cpu(to).copy_(as_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (from.device() == to.device()) note_kernel("copy_", {to, from}, to);
  copy_from(from, to, non_blocking);
  return to;
}

Scalar local_scalar_dense(const Tensor& tensor) {
  note_sync("_local_scalar_dense");
  return as_cpu(tensor).item();
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto bytes = size_t(c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  const c10::Storage& storage = self.storage();
  if (bytes > storage.nbytes()) {
    auto memory = g_allocator.allocate(bytes);
    if (storage.nbytes() > 0) std::memcpy(memory.get(), storage.data(), storage.nbytes());
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage(
    Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

// --- operators --------------------------------------------------------------------------------

// CPU kernels draw from the CPU's generator: for a while, its numbers are those of the device's.
class DrawsFromDevice {
 public:
  DrawsFromDevice() : cpu_engine(cpu().engine()) { cpu().set_engine(device().engine()); }
  ~DrawsFromDevice() {
    device().set_engine(cpu().engine());
    cpu().set_engine(cpu_engine);
  }

 private:
  static at::CPUGeneratorImpl& cpu() {
    return *at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
  }
  static at::CPUGeneratorImpl& device() {
    const auto& generator = at::detail::getMPSHooks().getDefaultGenerator(0);
    return static_cast<PretendGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
  }
  at::mt19937 cpu_engine;
};

bool is_random(const std::string& name) {
  static const std::unordered_set<std::string> bases = {
      "bernoulli_", "native_dropout", "normal_", "random_", "uniform_"};
  return bases.count(name.substr(0, name.find('.'))) > 0;
}

std::string name_of(const c10::OperatorHandle& op) {
  std::string name = op.schema().name().substr(6);  // without "aten::"
  if (!op.schema().overload_name().empty()) name += "." + op.schema().overload_name();
  return name;
}

void check_devices(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  // Lists of tensors are not looked at: indices may lie on the CPU.
  for (const auto& value : arguments) {
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const Tensor& tensor = value.toTensor();
    TORCH_CHECK(
        !tensor.device().is_cpu() || tensor.dim() == 0,
        "Expected all tensors to be on the same device, but found at least two devices, mps:0 and "
        "cpu! (aten::", name, ")");
  }
}

// Kernels that read back how much they found, or what. Source: ATen/native/mps, where writing by
// index and masked_scatter_ turn a mask into indices, and masked_fill_ reads a value that is a
// tensor. Reading by mask asks for nonzero before it comes here.
void note_syncs(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  static const std::unordered_set<std::string> always = {
      "nonzero", "nonzero.out", "masked_select", "masked_select.out", "masked_scatter_",
      "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor", "equal",
      "bincount"};
  bool waits = always.count(name) > 0;
  if (name.rfind("_index_put", 0) == 0 || name.rfind("index_put", 0) == 0) {
    for (const auto& value : arguments) {
      if (!value.isOptionalTensorList()) continue;
      for (const auto& index : value.toOptionalTensorVector()) {
        waits |= index && index->defined() &&
            (index->scalar_type() == ScalarType::Bool || index->scalar_type() == ScalarType::Byte);
      }
    }
  }
  if (name == "masked_fill_.Tensor") waits |= arguments[2].toTensor().device().is_mps();
  if (waits) note_sync(name);
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = name_of(op);
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    if (g_supported.count(name) == 0) {
      ++g_unsupported[name];
      TORCH_CHECK_NOT_IMPLEMENTED(
          false, "The operator 'aten::", name,
          "' is not currently implemented for the MPS device. (A pretend device said so, from "
          "torch's own table of kernels.)");
    }
  }
  const size_t num_arguments = op.schema().arguments().size();
  const auto arguments = c10::ArrayRef<c10::IValue>(*stack).slice(stack->size() - num_arguments);
  check_devices(name, arguments);
  const bool is_noted = g_recording && t_depth == 0;
  std::string signature = name + "(";
  if (is_noted) {
    note_syncs(name, arguments);
    for (const auto& value : arguments) describe(value, signature);
  }
  const size_t below = stack->size() - num_arguments;
  {
    Inside inside;
    std::optional<DrawsFromDevice> draws;
    if (is_random(name)) draws.emplace();
    at::native::cpu_fallback(op, stack);
  }
  if (is_noted) {
    signature += ">";
    for (const auto& value : c10::ArrayRef<c10::IValue>(*stack).slice(below)) {
      describe(value, signature);
    }
    note_call(signature);
  }
}

// Training on a Mac takes the composite path: there is no fused choice for MPS with a gradient.
Tensor attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
    double dropout, bool is_causal, std::optional<double> scale, bool enable_gqa) {
  std::optional<Tensor> bias = mask;
  if (mask && mask->scalar_type() == ScalarType::Bool) {
    bias = at::zeros_like(*mask, query.options()).masked_fill(mask->logical_not(), -INFINITY);
  }
  return std::get<0>(at::_scaled_dot_product_attention_math(
      query, key, value, bias, dropout, is_causal, std::nullopt, scale, enable_gqa));
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(
    const Tensor& input, const Tensor& gradient, const Tensor& weight, std::array<bool, 3> wanted) {
  note_kernel("linear_backward", {input, gradient, weight}, gradient);
  Tensor of_input, of_weight, of_bias;
  Inside inside;
  if (wanted[0]) of_input = at::matmul(gradient, weight);
  if (wanted[1] || wanted[2]) {
    const Tensor rows = gradient.reshape({-1, gradient.size(-1)});
    of_weight = at::mm(rows.t(), input.reshape({-1, input.size(-1)}));
    of_bias = rows.sum(0);
  }
  return {of_input, of_weight, of_bias};
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed,
    IntArrayRef output_padding, int64_t groups) {
  // torch answers error 212 on a Mac (pytorch#192212)
  TORCH_CHECK(weight.is_contiguous(), "conv2d with a non-contiguous weight fails on MPS");
  std::optional<Tensor> cpu_bias;
  if (bias && bias->defined()) cpu_bias = as_cpu(*bias);
  Tensor output;
  {
    Inside inside;
    output = at::convolution(
                 as_cpu(input), as_cpu(weight), cpu_bias, stride, padding, dilation, transposed,
                 output_padding, groups)
                 .to(input.device());
  }
  note_kernel("_mps_convolution", {input, weight}, output);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> wanted) {
  note_kernel("mps_convolution_backward", {gradient, input, weight}, input);
  Inside inside;
  const std::array<int64_t, 1> bias_size = {weight.size(transposed ? 1 : 0) * (transposed ? groups : 1)};
  auto result = at::convolution_backward(
      as_cpu(gradient).contiguous(), as_cpu(input), as_cpu(weight),
      at::OptionalIntArrayRef(IntArrayRef(bias_size)), stride, padding, dilation, transposed,
      output_padding, groups, wanted);
  const auto back = [&](const Tensor& tensor) {
    return tensor.defined() ? tensor.to(input.device()) : tensor;
  };
  return {back(std::get<0>(result)), back(std::get<1>(result)), back(std::get<2>(result))};
}

}  // namespace

C10_REGISTER_GUARD_IMPL(MPS, PretendGuard)

namespace at {
C10_REGISTER_TYPED_CLASS(MPSHooksRegistry, "MPSHooks", ::PretendHooks)
}

TORCH_LIBRARY_IMPL(_, MPS, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, AutogradMPS, library) {
  library.impl("scaled_dot_product_attention", &attention);
}

TORCH_LIBRARY_IMPL(aten, MPS, library) {
  library.impl("scaled_dot_product_attention", &attention);
  library.impl("linear_backward", &linear_backward);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("copy_", &copy_);
  library.impl("_local_scalar_dense", &local_scalar_dense);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  // Views: the same memory on any device.
  library.impl("as_strided", [](const Tensor& self, IntArrayRef size, IntArrayRef stride,
                                std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(self, size, stride, offset);
  });
  library.impl("view", [](const Tensor& self, IntArrayRef size) {
    return at::native::view(self, size);
  });
  library.impl("_reshape_alias", [](const Tensor& self, IntArrayRef size, IntArrayRef stride) {
    return at::native::_reshape_alias(self, size, stride);
  });
  library.impl("permute", [](const Tensor& self, IntArrayRef order) {
    return at::native::permute(self, order);
  });
  library.impl("unfold", [](const Tensor& self, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(self, dim, size, step);
  });
  // Composite elsewhere, kernels of their own on MPS.
  for (const char* name :
       {"addr", "addr.out", "constant_pad_nd", "native_group_norm", "native_layer_norm",
        "_fused_rms_norm", "linear", "pixel_shuffle", "pixel_unshuffle", "repeat"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  deny_cuda();
  module.def("support", [](const std::vector<std::string>& names) {
    std::lock_guard<std::mutex> lock(g_mutex);
    g_supported.insert(names.begin(), names.end());
  });
  module.def("on_sync", [](pybind11::object call) { g_on_sync = call.release().ptr(); });
  module.def("start", []() {
    std::lock_guard<std::mutex> lock(g_mutex);
    g_calls.clear();
    g_unsupported.clear();
    g_uploads.clear();
    g_memory.peak = g_memory.live.load();
    g_memory.largest = 0;
    g_memory.allocations = 0;
    g_recording = true;
  });
  module.def("stop", []() { g_recording = false; });
  module.def("calls", []() {
    std::lock_guard<std::mutex> lock(g_mutex);
    return g_calls;
  });
  module.def("unsupported", []() {
    std::lock_guard<std::mutex> lock(g_mutex);
    return g_unsupported;
  });
  module.def("uploads", []() {
    std::lock_guard<std::mutex> lock(g_mutex);
    return g_uploads;
  });
  module.def("memory", []() {
    return std::unordered_map<std::string, int64_t>{
        {"live", g_memory.live},
        {"peak", g_memory.peak},
        {"largest", g_memory.largest},
        {"allocations", g_memory.allocations}};
  });
  module.def("set_budget", [](int64_t recommended, double high_ratio) {
    return std::make_pair(
        g_memory.recommended.exchange(recommended), g_memory.high_ratio.exchange(high_ratio));
  });
  module.def("fail_allocation", [](int64_t number) { g_memory.fail_in = number; });
}
