// Run the kit's pixels with ONNX Runtime's C++ API and compare the logits: classify MODEL KIT_FOLDER N SIZE TOLERANCE
// Nothing is resized here: pixels.bin holds RGB uint8 [N, SIZE, SIZE, 3]. See INTEGRATE.md.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

static std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "usage: classify MODEL KIT_FOLDER N SIZE TOLERANCE\n";
    return 2;
  }
  const std::string kit = argv[2];
  const int64_t n = std::atoll(argv[3]), size = std::atoll(argv[4]);
  const double tolerance = std::atof(argv[5]);
  std::vector<char> pixels = read(kit + "/pixels.bin"), logits = read(kit + "/logits.bin");
  const size_t image_bytes = static_cast<size_t>(size * size * 3);
  const size_t classes = logits.size() / sizeof(float) / static_cast<size_t>(n);
  const float* expected = reinterpret_cast<const float*>(logits.data());

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "classify");
  Ort::Session session(env, argv[1], Ort::SessionOptions{});
  Ort::AllocatorWithDefaultOptions allocator;
  auto input = session.GetInputNameAllocated(0, allocator);
  auto output = session.GetOutputNameAllocated(0, allocator);
  const char* inputs[] = {input.get()};
  const char* outputs[] = {output.get()};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const std::array<int64_t, 4> shape{1, size, size, 3};

  double worst = 0;
  for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
    auto* image = reinterpret_cast<uint8_t*>(pixels.data()) + i * image_bytes;
    auto tensor = Ort::Value::CreateTensor<uint8_t>(memory, image, image_bytes, shape.data(), shape.size());
    auto answers = session.Run(Ort::RunOptions{nullptr}, inputs, &tensor, 1, outputs, 1);
    const float* found = answers[0].GetTensorData<float>();
    for (size_t c = 0; c < classes; ++c) {
      worst = std::max(worst, std::fabs(double(found[c]) - expected[i * classes + c]));
    }
  }
  std::cout << "largest difference of logits " << worst << ", tolerance " << tolerance << "\n";
  return worst <= tolerance ? 0 : 1;
}
