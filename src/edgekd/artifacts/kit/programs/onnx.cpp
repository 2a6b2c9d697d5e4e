// Run the kit's pixels with ONNX Runtime's C++ API and compare the logits: classify MODEL KIT_FOLDER N TOLERANCE
// Nothing is resized here: the .ppm files hold what the model takes. See INTEGRATE.md.
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

struct Image {
  int64_t width = 0, height = 0;
  std::vector<uint8_t> pixels;  // RGB, row by row
};

static Image read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int most = 0;
  Image image;
  file >> kind >> image.width >> image.height >> most;
  file.get();  // the end of the header's line
  image.pixels.assign(std::istreambuf_iterator<char>(file), {});
  return image;
}

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: classify MODEL KIT_FOLDER N TOLERANCE\n";
    return 2;
  }
  const std::string kit = argv[2];
  const size_t n = std::strtoul(argv[3], nullptr, 10);
  const double tolerance = std::atof(argv[4]);
  std::ifstream file(kit + "/logits.bin", std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const float* expected = reinterpret_cast<const float*>(bytes.data());
  const size_t classes = bytes.size() / sizeof(float) / n;

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "classify");
  Ort::Session session(env, argv[1], Ort::SessionOptions{});
  Ort::AllocatorWithDefaultOptions allocator;
  auto input = session.GetInputNameAllocated(0, allocator);
  auto output = session.GetOutputNameAllocated(0, allocator);
  const char* inputs[] = {input.get()};
  const char* outputs[] = {output.get()};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

  double worst = 0;
  for (size_t i = 0; i < n; ++i) {
    Image image = read_ppm(kit + "/" + std::to_string(i) + ".ppm");
    const std::array<int64_t, 4> shape{1, image.height, image.width, 3};
    auto tensor = Ort::Value::CreateTensor<uint8_t>(memory, image.pixels.data(), image.pixels.size(), shape.data(),
                                                    shape.size());
    auto answers = session.Run(Ort::RunOptions{nullptr}, inputs, &tensor, 1, outputs, 1);
    const float* found = answers[0].GetTensorData<float>();
    for (size_t c = 0; c < classes; ++c) {
      worst = std::max(worst, std::fabs(double(found[c]) - expected[i * classes + c]));
    }
  }
  std::cout << "largest difference of logits " << worst << ", tolerance " << tolerance << "\n";
  return worst <= tolerance ? 0 : 1;
}
