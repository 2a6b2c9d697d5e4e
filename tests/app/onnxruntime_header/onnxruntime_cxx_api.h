// What a test kit's classify.cpp uses of ONNX Runtime's C++ API, over the real library's C functions. ONNX Runtime's own
// header comes with its release archives only; the places of functions in its table never change.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

struct OrtApiBase {
  void** (*table)(uint32_t version);
  const char* (*version)();
};
extern "C" const OrtApiBase* OrtGetApiBase();

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING = 2 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };

namespace Ort {
enum Place {
  kErrorMessage = 2, kCreateEnv = 3, kCreateSession = 7, kRun = 9, kCreateOptions = 10, kInputName = 36,
  kOutputName = 37, kCreateTensor = 49, kTensorData = 51, kCreateCpuMemory = 69, kAllocator = 78
};

template <class... A>
void call(Place place, A... arguments) {
  void** table = OrtGetApiBase()->table(1);
  void* status = reinterpret_cast<void* (*)(A...)>(table[place])(arguments...);
  if (status) throw std::runtime_error(reinterpret_cast<const char* (*)(void*)>(table[kErrorMessage])(status));
}

struct Handle {
  void* pointer = nullptr;
};

struct Env : Handle {
  Env(OrtLoggingLevel level, const char* name) { call(kCreateEnv, int(level), name, &pointer); }
};
struct SessionOptions : Handle {
  SessionOptions() { call(kCreateOptions, &pointer); }
};
struct RunOptions {
  explicit RunOptions(std::nullptr_t) {}
};
struct AllocatorWithDefaultOptions : Handle {
  AllocatorWithDefaultOptions() { call(kAllocator, &pointer); }
};
struct MemoryInfo : Handle {
  static MemoryInfo CreateCpu(OrtAllocatorType kind, OrtMemType memory) {
    MemoryInfo made;
    call(kCreateCpuMemory, int(kind), int(memory), &made.pointer);
    return made;
  }
};
struct Value : Handle {
  template <class T>
  static Value CreateTensor(const MemoryInfo& memory, T* data, size_t count, const int64_t* shape, size_t rank) {
    static_assert(sizeof(T) == 1, "uint8 alone");
    const int uint8 = 2;
    Value made;
    call(kCreateTensor, memory.pointer, static_cast<void*>(data), count, shape, rank, uint8, &made.pointer);
    return made;
  }
  template <class T>
  const T* GetTensorData() const {
    void* data = nullptr;
    call(kTensorData, pointer, &data);
    return static_cast<const T*>(data);
  }
};
struct Session : Handle {
  Session(Env& env, const char* path, const SessionOptions& options) {
    call(kCreateSession, env.pointer, path, options.pointer, &pointer);
  }
  std::unique_ptr<char, void (*)(char*)> name(Place place, size_t index, Handle& allocator) {
    char* found = nullptr;
    call(place, pointer, index, allocator.pointer, &found);
    return {found, [](char*) {}};
  }
  auto GetInputNameAllocated(size_t index, Handle& allocator) { return name(kInputName, index, allocator); }
  auto GetOutputNameAllocated(size_t index, Handle& allocator) { return name(kOutputName, index, allocator); }
  std::vector<Value> Run(const RunOptions&, const char* const* inputs, Value* values, size_t count,
                         const char* const* outputs, size_t answers) {
    std::vector<Value> found(answers);
    std::vector<void*> given, made(answers, nullptr);
    for (size_t i = 0; i < count; ++i) given.push_back(values[i].pointer);
    void* options = nullptr;
    call(kRun, pointer, options, inputs, given.data(), count, outputs, answers, made.data());
    for (size_t i = 0; i < answers; ++i) found[i].pointer = made[i];
    return found;
  }
};
}  // namespace Ort
